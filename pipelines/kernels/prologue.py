"""From a layer's input to the codes that an operator takes: centred, scaled, rotated, quantised, in one pass over it.

Compiled kernels do it where they take the shape; otherwise torch does, with the operations of training. The bits are
the same.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipelines.errors import NumericalFault
from pipelines.kernels.pending import Pending
from pipelines.quant.affine import quantise
from pipelines.quant.hadamard import compiled_for, rotate_activation, rotate_last, signs_of
from pipelines.quant.layers import row_spans
from pipelines.quant.spec import SitePlan
from pipelines.quant.surroundings import Surroundings

NAN = 2  # what hqdm_codes returns where it saw one
NOTHING = (None, None, 1, False, False)  # pending before it
IN_CACHE = 2**18  # values that a pass takes in torch: 1 MB in fp32, and no temporary of the input's size


@dataclass(frozen=True)
class Operand:
    """How codes are handed to an operator: centred (code − zero-point) plus `offset`, in `dtype`, and after the
    channels some that hold the constants `carried`.
    """

    dtype: torch.dtype
    offset: int = 0
    carried: tuple[int, ...] = ()

    def of(self, centred: torch.Tensor, channel: int) -> torch.Tensor:
        """Centred codes of any type, as the operator takes them."""
        codes = (centred.float() + self.offset).to(self.dtype)
        if not self.carried:
            return codes
        constants = torch.tensor(self.carried, dtype=self.dtype)
        last = codes.movedim(channel, -1)
        return torch.cat([last, constants.expand(*last.shape[:-1], -1)], -1).movedim(-1, channel)


def centred_operand(plan: SitePlan) -> Operand:
    """Centred codes in the narrowest type that holds them; fp32 where they are rotated back, which makes them wider."""
    low, high = plan.activation_range
    if plan.inverse == "activation":
        return Operand(torch.float32)
    return Operand(torch.int8 if high - low <= 127 or low < 0 else torch.int16)


class Prologue(nn.Module):
    """What a layer does to its input before an operator takes it; a module, so that its time can be told."""

    def __init__(self, surroundings: Surroundings):
        super().__init__()
        self.surroundings, self.plan = surroundings, surroundings.plan

    def forward(
        self, x: torch.Tensor | Pending, scale: float, zero: int, operand: Operand
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The codes of x in its own shape, channels-last for a convolution, and the mean that a dynamic centre
        subtracted.

        scale: what fp32 holds. clamp(⌊x̃/s⌉ + z, low, high) − z is computed as clamp(⌊x̃/s⌉, low − z, high − z): the same
        integers, a pass less. NumericalFault where the input holds NaN and compiled kernels see it.
        """
        plan, surroundings = self.plan, self.surroundings
        low, high = plan.activation_range
        bounds = low - zero, high - zero
        spatial = plan.site.kind == "conv"
        # What is written by rows must lie in memory by rows: a linear's input may be another tensor's transpose.
        layout = torch.channels_last if spatial else torch.contiguous_format
        channels, order = x.shape[1 if spatial else -1], plan.transform.order
        bytes_fit = plan.transform.axis != "width" and operand.dtype in (torch.int8, torch.uint8)
        pending = x if isinstance(x, Pending) else None
        if pending is not None:
            x = pending.x
        compiled = compiled_for(x, channels, order) if bytes_fit else None
        if pending is not None and (compiled is None or plan.centring == "dynamic"):
            x, pending = pending.tensor(), None
        if plan.transform.axis == "width":
            moved, mean = surroundings.before(x.contiguous(memory_format=layout))
            rotated = rotate_activation(moved, plan.transform, spatial)
            centred = quantise(rotated, torch.tensor(scale), None, *bounds, overwrite=True)
            return rotate_activation(centred, plan.transform, spatial, inverse=True), mean
        if compiled is None:
            moved, mean = surroundings.before(x)
            return _in_torch(moved.contiguous(memory_format=layout), plan, scale, bounds, operand), mean
        x, mean = surroundings.without_mean(x)
        x = x.contiguous(memory_format=layout)
        shape = x.shape if pending is None else pending.shape
        codes = _room_for(shape, operand, spatial)
        carried = bytes(operand.carried)
        fault = compiled.hqdm_codes(
            x.data_ptr(), codes.data_ptr(), shape.numel() // channels, channels, order,
            *(None if value is None else value.data_ptr() for value in self._constants()), scale, *bounds,
            operand.offset, carried, len(carried), *(NOTHING if pending is None else pending.arguments()),
            torch.get_num_threads(),
        )  # fmt: skip
        if fault == NAN:
            raise NumericalFault(f"site {plan.site.name}: its input holds NaN", "distill again at lower rates")
        return codes, mean

    def _constants(self) -> tuple[torch.Tensor | None, ...]:
        return signs_of(self.plan.transform), self.surroundings.centre, self.surroundings.gain


def _room_for(shape: torch.Size, operand: Operand, spatial: bool) -> torch.Tensor:
    """An empty tensor for the codes of an input of `shape` and the carried channels after them, channels last."""
    if spatial:
        wide = shape[0], shape[1] + len(operand.carried), *shape[2:]
        return torch.empty(wide, dtype=operand.dtype, memory_format=torch.channels_last)
    return torch.empty((*shape[:-1], shape[-1] + len(operand.carried)), dtype=operand.dtype)


def _in_torch(x: torch.Tensor, plan: SitePlan, scale: float, bounds: tuple[int, int], operand: Operand) -> torch.Tensor:
    step = torch.tensor(scale)  # fp32: a number might be turned into its reciprocal
    spatial = plan.site.kind == "conv"
    channels = x.shape[1 if spatial else -1]
    codes = _room_for(x.shape, operand, spatial)
    rows, out = (value.movedim(1, -1) if spatial else value for value in (x, codes))
    rows, out = rows.reshape(-1, channels), out.flatten(0, -2)
    out[:, channels:] = torch.tensor(operand.carried, dtype=operand.dtype)
    out = out[:, :channels]
    plain = plan.transform.is_identity
    for span in row_spans(*rows.shape, IN_CACHE):
        part = rows[span] if plain else rotate_last(rows[span], plan.transform)
        out[span] = quantise(part, step, None, *bounds, overwrite=not plain).add_(operand.offset)
    return codes
