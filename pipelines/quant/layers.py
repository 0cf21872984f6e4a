"""Fake quantisation as layers: integers held in floats, with gradients, in exactly the arithmetic of the integer
kernels.

A layer computes  y = ((q·V)·(s_t/order))·s_w + b  where q and V hold integers. Products of integer-valued fp32 operands
are exact below 2²⁴, so q·V has the very bits of the integer accumulator, and the epilogue is the kernels' epilogue,
operation for operation. What is trained is what is deployed.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.quant.affine import centred_codes, quantise
from pipelines.quant.hadamard import rotate_activation, rotate_weight
from pipelines.quant.integers import IntegerWeights, accumulator_bound
from pipelines.quant.spec import Site, SitePlan
from pipelines.quant.tables import TimestepTables

EXACT_FP32 = 2**24  # integers below it are exact in fp32, and so are sums that stay below it


def epilogue(
    accumulator: torch.Tensor, activation_scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(acc·s_x)·s_w[c] + b, each operation rounded to fp32: the order of oneDNN's fused epilogue."""
    shape = (-1, *[1] * (accumulator.ndim - 2)) if accumulator.ndim == 4 else (-1,)
    y = (accumulator * activation_scale) * weight_scale.view(shape)
    return y if bias is None else y + bias.view(shape)


def zero_point(zero: torch.Tensor, plan: SitePlan) -> torch.Tensor | None:
    """A table's zero-point as a site uses it: within its codes, which the integer bounds rely on; None where
    symmetric.
    """
    return None if plan.activation_quantiser == "symmetric" else zero.clamp(*plan.activation_range)


def product(codes: torch.Tensor, folded: torch.Tensor, site: Site) -> torch.Tensor:
    """q·V of a linear or convolution, without epilogue, in the operands' dtype.

    A convolution's result is channels-last, as the integer operators give it: torch decides otherwise for one input
    channel, and the next GroupNorm rounds differently in another layout.
    """
    if site.kind == "linear":
        return F.linear(codes, folded)
    result = F.conv2d(codes, folded, None, site.stride, site.padding, site.dilation, site.groups)
    return result.contiguous(memory_format=torch.channels_last)


class QuantLayer(nn.Module):
    """A linear or convolution with fake-quantised weight and activation, and low-rank adapters merged before Q(W + BA).

    weight: (out, in, …) fp32, frozen and shared with whoever gave it. lora_a: (r, in, …), lora_b: (out, r).
    `index` is the site's column in the timestep tables and `span` its outputs' columns in the tables' weight factors.
    """

    def __init__(
        self,
        plan: SitePlan,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_scale: torch.Tensor,
        weight_zero: torch.Tensor,
        tables: TimestepTables,
        index: int,
        span: slice,
    ):
        super().__init__()
        self.plan, self.index, self.span = plan, index, span
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.weight_scale = nn.Parameter(weight_scale.clone())
        self.register_buffer("weight_zero", weight_zero.clone())
        self.lora_a = self.lora_b = None
        self._tables = [tables]  # in a list, so that the shared tables are not a child of every layer
        self._frozen: tuple[torch.Tensor, torch.dtype] | None = None

    def add_lora(self, rank: int, generator: torch.Generator) -> None:
        """Adapters of the given rank: A Kaiming-uniform(a = √5), B zero, no alpha (Hu et al., 2022; EfficientDM)."""
        inputs = self.weight[0].numel()
        bound = 1 / math.sqrt(inputs)  # what kaiming_uniform with a = √5 comes to
        a = (torch.rand((rank, *self.weight.shape[1:]), generator=generator) * 2 - 1) * bound
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(self.weight.shape[0], rank))

    def merged_weight(self) -> torch.Tensor:
        """W + BA, (out, in, …)."""
        if self.lora_a is None:
            return self.weight
        return self.weight + (self.lora_b @ self.lora_a.flatten(1)).view_as(self.weight)

    def _per_output(self, value: torch.Tensor) -> torch.Tensor:
        return value.view(-1, *[1] * (self.weight.ndim - 1))

    def _to_quantiser(self, weight: torch.Tensor) -> torch.Tensor:
        """The coordinates in which the weight is quantised: rotated for `double`, its own otherwise."""
        return rotate_weight(weight, self.plan.transform) if self.plan.inverse == "double" else weight

    def folded(self) -> torch.Tensor:
        """V (out, in, …), integer-valued, differentiable: quantise W + BA, then fold the inverse transform in."""
        weight = self._to_quantiser(self.merged_weight())
        scale, zero = self._per_output(self.weight_scale), self._per_output(self.weight_zero)
        codes = centred_codes(weight, scale, zero, *self.plan.weight_range)
        return rotate_weight(codes, self.plan.transform) if self.plan.inverse == "single" else codes

    @torch.no_grad()
    def integers(self) -> IntegerWeights:
        """The integers that this layer computes with, by the same `quantise`."""
        weight = self._to_quantiser(self.merged_weight())
        scale, zero = self._per_output(self.weight_scale), self._per_output(self.weight_zero)
        centred = quantise(weight, scale, zero, *self.plan.weight_range) - zero
        bias = None if self.bias is None else self.bias.float().clone()
        return IntegerWeights(
            self.plan,
            centred.to(torch.int16),
            self.weight_zero.to(torch.int16),
            self.weight_scale.detach().clone(),
            bias,
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute V once, for sampling. Where the accumulator can leave fp32's exact range, products go through
        fp64.
        """
        folded = self.folded()
        growth = self.plan.transform.order if self.plan.inverse == "activation" else 1
        exact = accumulator_bound(folded, self.plan.activation_range, growth) < EXACT_FP32
        dtype = torch.float32 if exact else torch.float64
        memory = torch.channels_last if folded.ndim == 4 else torch.contiguous_format
        self._frozen = (folded.to(dtype).contiguous(memory_format=memory), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan, tables = self.plan, self._tables[0]
        scale, zero = tables.of(self.index)
        zero = zero_point(zero, plan)
        spatial = plan.site.kind == "conv"
        if spatial:
            x = x.contiguous(memory_format=torch.channels_last)
        rotated = rotate_activation(x, plan.transform, spatial)
        codes = centred_codes(rotated, scale, zero, *plan.activation_range)
        if plan.inverse == "activation":
            codes = rotate_activation(codes, plan.transform, spatial, inverse=True)
        if self._frozen is None:
            accumulator = product(codes, self.folded(), plan.site)
        else:
            folded, dtype = self._frozen
            accumulator = product(codes.to(dtype), folded, plan.site).to(torch.float32)
        factor = tables.factors_of(self.span)
        weight_scale = self.weight_scale if factor is None else self.weight_scale * factor
        return epilogue(accumulator, scale / plan.transform.order, weight_scale, self.bias)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The fake-quantised layers of a model by site name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def output_spans(plans: list[SitePlan]) -> list[slice]:
    """Where each site's outputs stand in a row of all outputs."""
    spans, start = [], 0
    for plan in plans:
        spans.append(slice(start, start + plan.site.outputs))
        start += plan.site.outputs
    return spans


def swap_in(
    denoiser: nn.Module,
    plans: list[SitePlan],
    tables: TimestepTables,
    weight_scale: dict[str, torch.Tensor],
    weight_zero: dict[str, torch.Tensor],
) -> dict[str, QuantLayer]:
    """Replace the planned layers of `denoiser`, in place, by quantised ones that share their weights.

    The plans are the quantised sites, in the tables' order. The tables follow the denoiser's timestep from here on.
    """
    layers = {}
    for index, (plan, span) in enumerate(zip(plans, output_spans(plans), strict=True)):
        name = plan.site.name
        original = denoiser.get_submodule(name)
        layers[name] = QuantLayer(
            plan, original.weight, original.bias, weight_scale[name], weight_zero[name], tables, index, span
        )
        denoiser.set_submodule(name, layers[name])
    denoiser.timestep_tables = tables
    tables.follow(denoiser)
    return layers
