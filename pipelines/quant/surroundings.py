"""What happens around a layer's quantisers besides the transform: centring, scaling, and bit widths by output.

A layer computes x·Wᵀ = ((x − c)·g)·(W/g)ᵀ + c·Wᵀ with a centre c and a gain g for every input channel: exact before
quantisation (SmoothQuant, equation 3; Outlier Suppression+, equation 5). The first product is quantised, the second is
not. A convolution pads x with zeros; then c·Wᵀ at a position counts the kernel's places that lie inside the image.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.quant.hadamard import rotate_last
from pipelines.quant.spec import WEIGHT_BITS, Site, SitePlan, integer_range

NAMES = ("gain", "centre", "taps", "row_bits")  # of the tensors, as files have them


class Surroundings(nn.Module):
    """A layer's constants, and what is done with them. Every tensor may be None.

    gain, centre: (C,) fp32. taps: c·Wᵀ, (out,) of a linear or (out, kh, kw) of a convolution, fp32. row_bits: (out,)
    uint8, where outputs have bit widths of their own.
    """

    def __init__(self, plan: SitePlan, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.plan = plan
        for name in NAMES:
            self.register_buffer(name, tensors.get(name), persistent=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x − c)·g, and an image's own c where it is dynamic: (N, 1, …, C), the mean over its tokens."""
        x, mean = self.without_mean(x)
        if self.centre is not None:
            x = x - self._by_channel(self.centre)
        return (x if self.gain is None else x * self._by_channel(self.gain)), mean

    def without_mean(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x without an image's own mean where that is its centre, and that mean; else x."""
        if self.plan.centring != "dynamic":
            return x, None
        mean = x.mean(tuple(range(1, x.ndim - 1)), keepdim=True)
        return x - mean, mean

    def _by_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1) if self.plan.site.kind == "conv" else values

    def after(
        self, y: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, folded, weight_scale: torch.Tensor
    ) -> torch.Tensor:
        """y + c·Wᵀ. x: the layer's input (its shape counts); folded: () -> V fp32, for a dynamic centre alone."""
        if mean is not None:
            gained = mean if self.gain is None else mean * self.gain
            transform = self.plan.transform
            turned = gained if transform.is_identity else rotate_last(gained, transform)
            return y + F.linear(turned, folded()) * (weight_scale / transform.order)
        if self.taps is None:
            return y
        site = self.plan.site
        if site.kind == "linear":
            return y + self.taps
        ones = torch.ones(1, 1, *x.shape[-2:], device=y.device)
        return y + F.conv2d(ones, self.taps[:, None], None, site.stride, site.padding, site.dilation)

    def to_quantiser(self, rows: torch.Tensor) -> torch.Tensor:
        """W/g. rows: (n, …·C), the input channels last."""
        return rows if self.gain is None else (rows.view(len(rows), -1, len(self.gain)) / self.gain).view(rows.shape)

    def from_quantiser(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_quantiser`."""
        return rows if self.gain is None else (rows.view(len(rows), -1, len(self.gain)) * self.gain).view(rows.shape)

    def bounds(self, span: slice) -> tuple[torch.Tensor | int, torch.Tensor | int]:
        """The smallest and the largest weight code of some outputs, numbers or (rows, 1)."""
        return weight_bounds(self.plan, self.row_bits, span)


def weight_bounds(plan: SitePlan, row_bits: torch.Tensor | None, span: slice = slice(None)):
    """The smallest and the largest weight code of a site's outputs: two numbers, or two (rows, 1) where they differ."""
    if row_bits is None:
        return plan.weight_range
    symmetric = plan.weight_quantiser == "symmetric"
    ranges = torch.tensor([integer_range(bits, symmetric) for bits in range(1, max(WEIGHT_BITS) + 1)])
    low, high = ranges.to(row_bits.device).float().T[:, row_bits[span].long() - 1]
    return low[:, None], high[:, None]


def taps_of(centre: torch.Tensor, weight: torch.Tensor, site: Site) -> torch.Tensor:
    """c·Wᵀ of a weight (out, in, …) for each place of its kernel: (out, …), added up in fp64."""
    by_channel = centre.double().view(1, -1, *[1] * (weight.ndim - 2))
    return (weight.detach().double() * by_channel).sum(1).float()
