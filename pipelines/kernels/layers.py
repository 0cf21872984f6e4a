"""Layers that rotate, quantise and compute in integers. The prologue is training's, call for call; the rest is a
back end's.
"""

import torch
from torch import nn

from pipelines.kernels import backend
from pipelines.quant.affine import quantise
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.layers import output_spans, zero_point
from pipelines.quant.spec import SitePlan
from pipelines.quant.tables import TimestepTables


class IntegerLayer(nn.Module):
    """A linear or convolution in integer arithmetic, for inference: x fp32 to y fp32, integers in between."""

    def __init__(self, weights: IntegerWeights, tables: TimestepTables, index: int, span: slice, backend_name: str):
        super().__init__()
        self.plan, self.index, self.span = weights.plan, index, span
        self.prepared = backend(backend_name).prepare(weights)
        self.register_buffer("weight_scale", weights.scale)
        self._tables = [tables]

    @torch.no_grad()
    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Centred codes of x (integer-valued fp32), their zero-point, and the activation scale of the epilogue.

        clamp(⌊x/s⌉ + z, low, high) − z is computed as clamp(⌊x/s⌉, low − z, high − z): the same integers, a pass less.
        """
        plan = self.plan
        scale, zero = self._tables[0].of(self.index)
        zero = zero_point(zero, plan)
        offset = 0 if zero is None else int(zero)
        low, high = plan.activation_range
        spatial = plan.site.kind == "conv"
        if spatial:
            x = x.contiguous(memory_format=torch.channels_last)
        rotated = rotate_activation(x, plan.transform, spatial)
        mine = not plan.transform.is_identity  # a rotation's result belongs to nobody else
        centred = quantise(rotated, scale, None, low - offset, high - offset, overwrite=mine)
        if plan.inverse == "activation":
            centred, offset = rotate_activation(centred, plan.transform, spatial, inverse=True), 0
        return centred, offset, scale / plan.transform.order

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred, zero, activation_scale = self.codes(x)
        factor = self._tables[0].factors_of(self.span)
        weight_scale = self.weight_scale if factor is None else self.weight_scale * factor
        return self.prepared(centred, zero, activation_scale, weight_scale)


def swap_in(
    denoiser: nn.Module,
    plans: list[SitePlan],
    tables: TimestepTables,
    weights: dict[str, IntegerWeights],
    backend_name: str,
) -> dict[str, IntegerLayer]:
    """Replace the planned layers of `denoiser`, in place, by integer ones; the tables follow its timestep."""
    layers = {}
    for index, (plan, span) in enumerate(zip(plans, output_spans(plans), strict=True)):
        name = plan.site.name
        layers[name] = IntegerLayer(weights[name], tables, index, span, backend_name)
        denoiser.set_submodule(name, layers[name])
    denoiser.timestep_tables = tables
    tables.follow(denoiser)
    return layers
