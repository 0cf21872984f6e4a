"""Layers that rotate, quantise and compute in integers. The prologue is training's, call for call; the rest is a
back end's.
"""

import math

import torch
from torch import nn

from pipelines.kernels import backend
from pipelines.kernels.attention import shorten
from pipelines.memory import give_back
from pipelines.quant.affine import quantise
from pipelines.quant.hadamard import rotate_activation, rotate_last
from pipelines.quant.integers import PackedWeights
from pipelines.quant.layers import divide, output_spans, row_spans, zero_point
from pipelines.quant.spec import SitePlan
from pipelines.quant.surroundings import Surroundings
from pipelines.quant.tables import TimestepTables

LARGE = 2**18  # values of an input before whose layer free pages are returned, where memory is scarce
IN_CACHE = 2**18  # values that a pass of the prologue takes: 1 MB in fp32, and no temporary of the input's size


class IntegerLayer(nn.Module):
    """A linear or convolution in integer arithmetic, for inference: x fp32 to y fp32, integers in between."""

    def __init__(self, weights: PackedWeights, tables: TimestepTables, index: int, span: slice, backend_name: str):
        super().__init__()
        self.plan, self.index, self.span = weights.plan, index, span
        self.prepared = backend(backend_name).prepare(weights)
        self.surroundings = Surroundings(weights.plan, weights.tensors)
        self._weights, self._floats = weights, None
        self.register_buffer("weight_scale", weights.scale, persistent=False)
        self._tables = [tables]

    @torch.no_grad()
    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Centred codes of x (integers, int8 where they fit), their zero-point, and the epilogue's activation scale.

        clamp(⌊x/s⌉ + z, low, high) − z is computed as clamp(⌊x/s⌉, low − z, high − z): the same integers, a pass less.
        """
        plan = self.plan
        scale, zero = self._tables[0].of(self.index)
        zero = zero_point(zero, plan)
        offset = 0 if zero is None else int(zero)
        low, high = plan.activation_range
        spatial = plan.site.kind == "conv"
        # What is written by rows below must lie in memory by rows: a linear's input may be another tensor's transpose.
        x = x.contiguous(memory_format=torch.channels_last if spatial else torch.contiguous_format)
        bounds = low - offset, high - offset
        if plan.transform.axis == "width":
            rotated = rotate_activation(x, plan.transform, spatial)
            centred = quantise(rotated, scale, None, *bounds, overwrite=True)
            return rotate_activation(centred, plan.transform, spatial, inverse=True), 0, scale / plan.transform.order
        centred = torch.empty_like(x, dtype=torch.int8 if high - low <= 127 or low < 0 else torch.int16)
        rows, codes = (value.movedim(1, -1) if spatial else value for value in (x, centred))
        rows, codes = rows.reshape(-1, x.shape[1 if spatial else -1]), codes.flatten(0, -2)
        for span in row_spans(*rows.shape, IN_CACHE):
            part = rows[span] if plan.transform.is_identity else rotate_last(rows[span], plan.transform)
            codes[span] = quantise(part, scale, None, *bounds, overwrite=not plan.transform.is_identity)
        return centred, offset, scale / plan.transform.order

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tables[0].each(x, self._at_one_timestep, self.plan.site.name)

    def _at_one_timestep(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() >= LARGE:
            give_back()
        moved, mean = self.surroundings.before(x)
        centred, zero, activation_scale = self.codes(moved)
        factor = self._tables[0].factors_of(self.span)
        weight_scale = self.weight_scale if factor is None else self.weight_scale * factor
        y = self.prepared(centred, zero, activation_scale, weight_scale)
        return self.surroundings.after(y, x, mean, self._folded, weight_scale)

    def _folded(self) -> torch.Tensor:
        """V in fp32, kept: what a dynamic centre is multiplied with, in floating point."""
        if self._floats is None:
            self._floats = self._weights.folded().float()
        return self._floats

    def forget(self) -> None:
        """Free the unpacked weights; a call unpacks them again."""
        self._floats = None
        self.prepared.forget()


def forget_weights(network: nn.Module) -> None:
    """Free the unpacked weights of a network's integer layers, for whatever comes next; a call unpacks them again."""
    layers = [module for module in network.modules() if isinstance(module, IntegerLayer)]
    for layer in layers:
        layer.forget()
    give_back(sum(math.prod(layer.plan.site.weight) for layer in layers))


def swap_in(
    network: nn.Module,
    plans: list[SitePlan],
    tables: TimestepTables,
    weights: dict[str, PackedWeights],
    backend_name: str,
    unit: float = 1.0,
) -> dict[str, IntegerLayer]:
    """Replace the planned layers of `network`, in place, by integer ones; the tables follow its timestep, times
    `unit`.
    """
    layers = {}
    divide(network, [plan.site for plan in plans])
    for index, (plan, span) in enumerate(zip(plans, output_spans(plans), strict=True)):
        name = plan.site.name
        layers[name] = IntegerLayer(weights[name], tables, index, span, backend_name)
        network.set_submodule(name, layers[name])
    shorten(network)
    network.timestep_tables = tables
    tables.follow(network, unit)
    return layers
