"""The transforms a site could have, and what each costs: SQNR and initial scales, measured on a sample of its input."""

from dataclasses import dataclass

import torch

from pipelines.quant.affine import choose, cover, dequantise, quantise, sqnr
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.spec import IDENTITY, ORDERS, Site, SitePlan, Transform, integer_range, largest_block

SIGN_SEED = 1  # of the diagonal D that a profile measures; plans may have others
WIDEST = 32  # order of a transform along the width: the paper's choice, where the width allows it
CENTRED = "centred"
# Steps of the search for a scale: few bits clip most, so that they need the finest search over the widest range.
SEARCH_STEPS = {3: 16, 4: 16, 6: 10, 8: 8}
EXACT = 200.0  # dB; what a row without any signal gets, since zeros are quantised without error


@dataclass(frozen=True)
class Candidate:
    """A transform by its name. `centred`: every channel's mean is subtracted first. That is measured alone; layers
    centre by `SitePlan.centring`.
    """

    name: str
    transform: Transform
    centred: bool = False


def order_on_channels(site: Site) -> int:
    """The largest order up to 32 that divides the site's channels; 1 where none of ORDERS does."""
    fitting = [order for order in ORDERS if order <= 32 and site.admits(Transform("channels", order))]
    return max(fitting, default=1)


def order_on_width(site: Site) -> int:
    """The largest power of two up to 32 that divides the width of a convolution's input; 1 where none does."""
    return largest_block(site.positions[1], WIDEST) if site.kind == "conv" else 1


def shown(site: Site) -> list[Transform]:
    """The transforms whose effect on the channels' maxima is recorded: channels-32, the same with signs, and width."""
    transforms = []
    if (order := order_on_channels(site)) > 1:
        transforms += [Transform("channels", order), Transform("channels", order, SIGN_SEED)]
    if (order := order_on_width(site)) > 1:
        transforms.append(Transform("width", order))
    return transforms


def candidates(site: Site) -> list[Candidate]:
    """Everything the site admits: none, along the channels at every order without and with signs, width, centred.

    Centring is not offered on the time embedding: all images share it, so that nothing would be left but the mean.
    """
    along = [Transform("channels", order, signs) for order in ORDERS for signs in (None, SIGN_SEED)]
    if (order := order_on_width(site)) > 1:
        along.append(Transform("width", order))
    admitted = [IDENTITY, *(transform for transform in along if site.admits(transform))]
    found = [Candidate(transform.name, transform) for transform in admitted]
    if site.role.startswith("time"):
        return found
    found.append(Candidate(CENTRED, IDENTITY, centred=True))
    if (order := order_on_channels(site)) > 1:
        rotated = Transform("channels", order)
        found.append(Candidate(f"{CENTRED}-{rotated.name}", rotated, centred=True))
    return found


def rotated_rows(sample: torch.Tensor, transform: Transform) -> torch.Tensor:
    """A sample (T, rows, C, W) of a convolution or (T, rows, C) of a linear, rotated as the layers do it: (T, n)."""
    spatial = sample.ndim == 4
    x = sample.flatten(0, 1)
    rotated = rotate_activation(x[:, :, None] if spatial else x, transform, spatial)  # (T·rows, C, 1, W) or (T·rows, C)
    return rotated.reshape(len(sample), -1)


def centred_rows(rows: torch.Tensor, mean: torch.Tensor, sample: torch.Tensor, transform: Transform) -> torch.Tensor:
    """`rotated_rows` of the sample less its channels' means (T, C): rotation is linear, so the mean is rotated too."""
    expanded = mean[:, None, :, None] if sample.ndim == 4 else mean[:, None]
    return rows - rotated_rows(expanded.expand_as(sample), transform)


def initial(rows: torch.Tensor, plan: SitePlan, by: str, headroom: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point (T,) of a plan's activation quantiser on rotated rows (T, n), one quantiser a timestep.

    by: `error` minimises the squared error, `max` covers the range. headroom: see `widened`.
    """
    if by == "max":
        scale, zero = cover(rows, *plan.activation_range)
    else:
        scale, zero, _ = measure(rows, plan.activation_bits, plan.activation_quantiser)
    return widened(scale, plan, headroom), zero


def widened(scale: torch.Tensor, plan: SitePlan, headroom: float) -> torch.Tensor:
    """An 8-bit activation scale times its headroom, and others as they are: at few bits rounding costs more than rare
    values that are clipped.
    """
    return scale * headroom if plan.activation_bits == 8 else scale


def measure(
    rows: torch.Tensor, bits: int, quantiser: str, signal: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, zero-point and SQNR in dB, each (T,) fp32, of rotated rows (T, n), one quantiser a timestep.

    The scale minimises the squared error, and is that of the raw-rotated activation, as the layers use it. A rotation
    keeps the ratio of energies, so the SQNR is that of the activation itself. Rows less their mean come with their
    `signal` (T, n), the rows before that: the noise counts against the whole activation.
    """
    low, high = integer_range(bits, quantiser == "symmetric")
    scale, zero = choose(rows, low, high, steps=SEARCH_STEPS[bits], norm=2.0)
    back = dequantise(quantise(rows, scale[:, None], zero[:, None], low, high), scale[:, None], zero[:, None])
    if signal is not None:
        back = back + (signal - rows)
        rows = signal
    ratio = torch.nan_to_num(sqnr(rows, back), neginf=EXACT)
    return scale, zero, ratio.float()
