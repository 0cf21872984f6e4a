"""What the methods share that move channels between activation and weight, x·Wᵀ = ((x − c)·g)·(W/g)ᵀ + c·Wᵀ.

The common frame of `plan_of`: first, last, time and condition layers are 8/8 bits and as they are, shortcut and
downsampling convolutions stay in floating point, activations are quantised by tensor. 8-bit activation scales that a
sample gave are widened by `Recipe.headroom`. Not all methods keep to it: `q_diffusion` quantises the shortcuts that
read [h, skip] at the bits asked (--set shortcuts, as of `tfmq`), `dmq` has shortcuts at 8 bits, `hqdm` variants `ours`
and `auto` have shortcuts and downsampling at 8. A comparison counts the layers of each kind beside its figures. Torch
is imported by the functions that need it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.methods.base import EIGHT_BIT_ROLES, FLOAT_ROLES, Measured, left_in_float
from pipelines.quant.spec import IDENTITY, ORDERS, Bits, Site, SitePlan, Transform

if TYPE_CHECKING:
    import torch


def plan_of(
    site: Site, bits: Bits, measured: Measured, quantiser: str, words: str, transform: Transform = IDENTITY,
    weight_quantiser: str = "asymmetric", **placement,
) -> SitePlan:  # fmt: skip
    """A site's plan in the common frame. transform, placement: of the sites that have the bits asked for, and no other.

    quantiser: of the activation. words: what the method does there, for the plan's record.
    """
    if plan := left_out(site, ", as in the other methods"):
        return plan
    if site.role in EIGHT_BIT_ROLES:
        transform, placement = IDENTITY, {}
        words = f"a {site.role} layer has 8 bits and nothing else"
    plan = plain(site, bits, measured, quantiser, f"{words}; unrotated ", weight_quantiser=weight_quantiser)
    return replace(plan, transform=transform, **placement)


def left_out(site: Site, because: str) -> SitePlan | None:
    """The plan of a site that cannot be quantised, or by its role is not; None of all others."""
    if site.obstacle:
        return left_in_float(site, site.obstacle)
    if site.role in FLOAT_ROLES:
        return left_in_float(site, f"{site.role} convolutions stay in floating point{because}")
    return None


def plain(
    site: Site, bits: Bits, measured: Measured, quantiser: str, before: str = "", after: str = "",
    weight_quantiser: str = "asymmetric",
) -> SitePlan:  # fmt: skip
    """A site without transform, at the bits asked for or, by its role, at eight; its record is what was measured, with
    words before and after.
    """
    weight, activation = (8, 8) if site.role in EIGHT_BIT_ROLES else (bits.weight, bits.activation)
    known = measured.sqnrs(site, quantiser, activation)
    return SitePlan(
        site, weight_bits=weight, activation_bits=activation, weight_quantiser=weight_quantiser,
        activation_quantiser=quantiser, why=f"{before}{known['none']:.1f} dB at {activation} bits{after}", sqnr=known,
    )  # fmt: skip


def widest(site: Site, most: int) -> Transform:
    """The Hadamard transform along the channels with the widest block up to `most`; the identity where none fits."""
    fitting = [order for order in ORDERS if order <= most and site.admits(Transform("channels", order))]
    return Transform("channels", max(fitting)) if fitting else IDENTITY


def extremes(site: Site, measured: Measured) -> "tuple[torch.Tensor, torch.Tensor]":
    """Smallest and largest input of each channel (C,), of all that the profile saw at all timesteps."""
    return measured.statistic(site, "low").amin(0), measured.statistic(site, "high").amax(0)


def columns_max(weight: "torch.Tensor") -> "torch.Tensor":
    """max|w| of each input channel (C,) of a weight (out, C, …)."""
    return weight.abs().movedim(1, 0).flatten(1).amax(1)


def by_column(weight: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """A weight (out, C, …) with its input channels multiplied with values (C,)."""
    return weight * values.view(1, -1, *[1] * (weight.ndim - 2))


def few(sample: "torch.Tensor", count: int) -> "torch.Tensor":
    """About `count` tokens of a sample, spread over its timesteps and rows: (rows, C, W) or (rows, C)."""
    import torch

    rows = sample.flatten(0, 1)
    wanted = min(len(rows), max(1, count // (rows.shape[2] if rows.ndim == 3 else 1)))
    return rows[torch.linspace(0, len(rows) - 1, wanted).round().long()]


def outputs(x: "torch.Tensor", weight: "torch.Tensor", site: Site) -> "torch.Tensor":
    """The layer's outputs on some of a sample, without bias: (rows, out) of a linear, (rows, out·kh, W') of a
    convolution. A sample has single image rows, so that every row of a kernel gives outputs of its own there.
    """
    from torch.nn import functional as F

    if site.kind == "linear":
        return F.linear(x, weight)
    kernel = weight.transpose(1, 2).flatten(0, 1)  # (out·kh, C, kw)
    return F.conv1d(x, kernel, None, site.stride[1], site.padding[1], site.dilation[1])
