"""What training does with every entry of a weight or an input, in one pass where autograd would take ten: values to
codes, and the codes' gradient back to the values.

Defined here in torch; fp32 on a processor takes compiled kernels (pipelines/native/training.cpp) where there are such.
Integers and the gradients of entries have the same bits in both; sums are taken in fp64, and rounded once by whoever
asks for them.
"""

import ctypes
from dataclasses import dataclass

import torch

from pipelines import native
from pipelines.quant.affine import centred_codes, quantise
from pipelines.quant.hadamard import compiled_for, rotate_activation, rotate_last, signs_of
from pipelines.quant.spec import SitePlan
from pipelines.quant.surroundings import Surroundings


@dataclass(frozen=True)
class WeightRows:
    """Rows (n, …·in) of a layer's weight, input channels last, and how they are quantised.

    base: what adapters add to, fp32; or, where there is a base_scale (n,), codes uint8 from each row's smallest, which
    stand for (code − zero)·base_scale in the quantiser's coordinates. scale, zero: (n,) fp32. low, high: numbers, or
    (n, 1) fp32.
    """

    plan: SitePlan
    surroundings: Surroundings
    base: torch.Tensor
    base_scale: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor
    low: torch.Tensor | int
    high: torch.Tensor | int

    def values(self) -> torch.Tensor:
        """The base in the layer's own coordinates, fp32; perhaps the base itself."""
        if self.base_scale is None:
            return self.base
        value = (self.base.float() + self.low).sub_(self.zero[:, None]).mul_(self.base_scale[:, None])
        if self.plan.inverse == "double":
            value = rotate_last(value, self.plan.transform, inverse=True).div_(self.plan.transform.order)
        return self.surroundings.from_quantiser(value)

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the coordinates in which the weight is quantised: over the gain, and rotated for `double`."""
        rows = self.surroundings.to_quantiser(rows)
        return rotate_last(rows, self.plan.transform) if self.plan.inverse == "double" else rows

    @property
    def own_zero(self) -> torch.Tensor | None:
        """The zero-points of the codes, or None where they have none."""
        return None if self.plan.weight_quantiser == "symmetric" else self.zero

    def quantise(
        self, added: torch.Tensor | None, rounded: torch.Tensor | None, centred: torch.Tensor | None,
        fold: bool = False, factor: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Quantise base + added (n, …·in), into what is wanted:

        rounded: ⌊W/s⌉ + z, cut off one beyond the codes, int8 or int16, which tells what was clipped. centred: codes −
        zero-points fp32, rotated as `single` folds them where `fold`, then times factor (n,).
        """
        compiled, weight = self._compiled(fold)
        if compiled is not None:
            compiled.hqdm_weight_codes(
                ctypes.byref(weight), _address(added), _address(factor), _address(rounded),
                rounded is not None and rounded.dtype == torch.int16, _address(centred), torch.get_num_threads(),
            )  # fmt: skip
            return
        value = self.values() if added is None else added + self.values()
        zero = None if self.own_zero is None else self.own_zero[:, None]
        codes = quantise(self.turned(value), self.scale[:, None], zero, self.low - 1, self.high + 1)
        if rounded is not None:
            rounded.copy_(codes)
        if centred is None:
            return
        codes.clamp_(self.low, self.high)
        if zero is not None:
            codes.sub_(zero)
        codes = rotate_last(codes, self.plan.transform) if fold else codes
        centred.copy_(codes if factor is None else codes.mul_(factor[:, None]))

    def gradient(self, rounded: torch.Tensor, grad: torch.Tensor, fold: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A gradient of codes (n, …·in), of rotated ones where `fold`, becomes that of base + added times the scale, in
        place: straight through the quantiser inside its range, nothing outside. `rounded` is what `quantise` gave.

        Returns the rows' sums of the gradient of codes times codes − zero-points, and of the result times the base,
        (n,) fp64.
        """
        compiled, weight = self._compiled(fold)
        sums = grad.new_empty(2, len(grad), dtype=torch.float64)
        if compiled is not None:
            compiled.hqdm_weight_gradient(
                ctypes.byref(weight), rounded.data_ptr(), rounded.dtype == torch.int16, grad.data_ptr(),
                sums[0].data_ptr(), sums[1].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            return sums[0], sums[1]
        found = rounded.float()
        codes = found.clamp(self.low, self.high)
        part = rotate_last(grad, self.plan.transform, inverse=True) if fold else grad
        centred = codes if self.own_zero is None else codes.sub(self.own_zero[:, None])
        sums[0] = (part * centred).sum(1, dtype=torch.float64)
        part = part * found.eq_(codes)  # as a float: passes that read or write booleans take several times as long
        if self.plan.inverse == "double":
            part = rotate_last(part, self.plan.transform, inverse=True)
        grad.copy_(self.surroundings.to_quantiser(part))
        sums[1] = (grad * self.values()).sum(1, dtype=torch.float64)
        return sums[0], sums[1]

    def _compiled(self, fold: bool):
        """The compiled kernels, or None, and the structure that they read."""
        plan, gain = self.plan, self.surroundings.gain
        turned = plan.inverse == "double"
        order = plan.transform.order if fold or turned else 1
        channels = plan.site.weight[1]  # that an output has, of a convolution in groups fewer than the input
        compiled = compiled_for(self.scale, channels, order) if self.base.is_contiguous() else None
        if compiled is None:
            return None, None
        coded, mixed = self.base_scale is not None, isinstance(self.low, torch.Tensor)
        signs = signs_of(plan.transform) if order > 1 else None
        lows, highs = (self.low, self.high) if mixed else (None, None)
        low, high = (0, 0) if mixed else (self.low, self.high)
        return compiled, native.Weight(
            None if coded else self.base.data_ptr(), _address(self.base if coded else None),
            *map(_address, (self.base_scale, self.zero, gain, self.scale, self.own_zero, lows, highs, signs)),
            *self.base.shape, channels, low, high, order, turned, fold,
        )  # fmt: skip


def _address(value: torch.Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def activation_codes(
    x: torch.Tensor, plan: SitePlan, scale: torch.Tensor, zero: torch.Tensor | None, undone: bool
) -> torch.Tensor:
    """Codes − zero-point of a layer's rotated input, fp32 of its shape, rotated back where `undone`; channels-last of a
    convolution. scale, zero: scalars.
    """
    spatial = plan.site.kind == "conv"
    compiled, x = _for_activation(x, plan)
    if compiled is None:
        codes = centred_codes(rotate_activation(x, plan.transform, spatial), scale, zero, *plan.activation_range)
        return rotate_activation(codes, plan.transform, spatial, inverse=True) if undone else codes
    codes = torch.empty_like(x)
    compiled.hqdm_activation(x.data_ptr(), codes.data_ptr(), *_numbers(x, plan, scale, zero, undone))
    return codes


def activation_gradient(
    grad: torch.Tensor, x: torch.Tensor, plan: SitePlan, scale: torch.Tensor, zero: torch.Tensor | None, undone: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of `activation_codes`, which may be overwritten: that of x, the sum of the codes' gradient
    where x is clipped, and Σ x·∂L/∂x, fp64.
    """
    spatial = plan.site.kind == "conv"
    compiled, x = _for_activation(x, plan)
    if compiled is not None:
        layout = torch.channels_last if spatial else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        sums = torch.empty(x.numel() // plan.site.channels, 2, dtype=torch.float64)
        compiled.hqdm_activation_gradient(
            x.data_ptr(), grad.data_ptr(), sums.data_ptr(), *_numbers(x, plan, scale, zero, undone)
        )
        outside, through = sums.sum(0)
        return grad, outside, through
    low, high = plan.activation_range
    found = torch.div(rotate_activation(x, plan.transform, spatial), scale).round_()
    if zero is not None:
        found.add_(zero)
    grad = rotate_activation(grad, plan.transform, spatial) if undone else grad
    total = grad.sum(dtype=torch.float64)
    grad = inside(grad, found, low, high)
    outside = total - grad.sum(dtype=torch.float64)
    grad = rotate_activation(grad, plan.transform, spatial, inverse=True).div_(scale)
    return grad, outside, (grad * x).sum(dtype=torch.float64)


def _for_activation(x: torch.Tensor, plan: SitePlan):
    """The compiled kernels, or None, and x as they read it."""
    if plan.transform.axis == "width":
        return None, x
    compiled = compiled_for(x, plan.site.channels, plan.transform.order)
    if compiled is None:
        return None, x
    layout = torch.channels_last if plan.site.kind == "conv" else torch.contiguous_format
    return compiled, x.contiguous(memory_format=layout)


def _numbers(x, plan: SitePlan, scale: torch.Tensor, zero: torch.Tensor | None, undone: bool) -> tuple:
    """What both kernels are told after their tensors. clamp(⌊x̃/s⌉ + z, low, high) − z is clamp(⌊x̃/s⌉, low − z, high −
    z): the same integers.
    """
    low, high = plan.activation_range
    shift = 0 if zero is None else zero.item()
    channels, transform = plan.site.channels, plan.transform
    return (
        x.numel() // channels, channels, transform.order, _address(signs_of(transform)), scale.item(), low - shift,
        high - shift, undone, torch.get_num_threads(),
    )  # fmt: skip


def inside(grad: torch.Tensor, rounded: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The gradient where `rounded` lies within its codes, zeros elsewhere; overwrites it. One pass, and without
    booleans, which torch is slow with.
    """
    return torch.ops.aten.hardtanh_backward.grad_input(grad, rounded, low - 0.5, high + 0.5, grad_input=grad)
