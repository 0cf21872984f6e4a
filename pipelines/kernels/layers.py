"""Layers that rotate, quantise and compute in integers: the prologue, a back end's product, the surroundings."""

import math

import torch
from torch import nn

from pipelines.errors import NumericalFault
from pipelines.kernels import ON_DEVICE, backend
from pipelines.kernels.attention import shorten_attention
from pipelines.kernels.cuda import DevicePrologue
from pipelines.kernels.gates import shorten_gates
from pipelines.kernels.layouts import shorten_layouts
from pipelines.kernels.norms import shorten_norms
from pipelines.kernels.pending import Pending
from pipelines.kernels.prologue import Prologue
from pipelines.memory import give_back
from pipelines.quant.integers import PackedWeights
from pipelines.quant.layers import divide, output_spans
from pipelines.quant.spec import SitePlan
from pipelines.quant.surroundings import Surroundings
from pipelines.quant.tables import TimestepTables

LARGE = 2**18  # values of an input before whose layer free pages are returned, where memory is scarce


class IntegerLayer(nn.Module):
    """A linear or convolution in integer arithmetic, for inference: x fp32 to y fp32, integers in between."""

    takes_pending = True  # in the place of x, which would have its shape

    def __init__(self, weights: PackedWeights, tables: TimestepTables, index: int, span: slice, backend_name: str):
        super().__init__()
        self.plan, self.index, self.span = weights.plan, index, span
        self.prepared = backend(backend_name).prepare(weights)
        self.surroundings = Surroundings(weights.plan, weights.tensors)
        self.prologue = Prologue(self.surroundings)
        self._weights, self._floats = weights, None
        self.register_buffer("weight_scale", weights.scale, persistent=False)
        self._tables = [tables]

    def forward(self, x: torch.Tensor | Pending) -> torch.Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(x)
        return self._tables[0].each(x, self._at_one_timestep, self.plan.site.name)

    def _at_one_timestep(self, x: torch.Tensor | Pending) -> torch.Tensor:
        if x.shape.numel() >= LARGE:
            give_back()
        tables = self._tables[0]
        scale, zero = tables.numbers_of(self.index)
        zero = self._zero_within(zero)
        operand = self.prepared.operand(zero)
        codes, mean = self.prologue(x, scale, zero, operand)
        factor = tables.factors_of(self.span)
        weight_scale = self.weight_scale if factor is None else self.weight_scale * factor
        y = self.prepared(codes, operand, scale / self.plan.transform.order, weight_scale)
        return self.surroundings.after(y, x, mean, self._folded, weight_scale)

    def _zero_within(self, zero: int) -> int:
        """A table's zero-point as the site uses it: `quant.layers.zero_point` as a number."""
        low, high = self.plan.activation_range
        return 0 if self.plan.activation_quantiser == "symmetric" else max(low, min(high, zero))

    def _folded(self) -> torch.Tensor:
        """V in fp32, kept: what a dynamic centre is multiplied with, in floating point."""
        if self._floats is None:
            self._floats = self._weights.folded().float()
        return self._floats

    def forget(self) -> None:
        """Free the unpacked weights; a call unpacks them again."""
        self._floats = None
        self.prepared.forget()


class DeviceLayer(IntegerLayer):
    """The same on a device: x fp32, fp16 or bf16 to y of its type. Nothing in it waits for the device or tells it a
    number, so that the row of the tables in force can change between two replays of one CUDA graph.
    """

    takes_pending = False

    def __init__(self, *given):
        super().__init__(*given)
        self.prologue = DevicePrologue(self.surroundings)

    def _at_one_timestep(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._tables[0].on(x.device)
        at = self.prepared.lookup(rows, self.index)
        codes, mean = self.prologue(x, at)
        factor = rows.factors_of(self.span)
        weight_scale = self.weight_scale if factor is None else self.weight_scale * factor
        if mean is None and self.surroundings.taps is None:
            return self.prepared(codes, at, weight_scale, x.dtype)
        y = self.prepared(codes, at, weight_scale)  # what is added is fp32, and is rounded with it once
        return self.surroundings.after(y, x, mean, self._folded, weight_scale).to(x.dtype)

    def _folded(self) -> torch.Tensor:
        if self._floats is None:
            self._floats = super()._folded().to(self.weight_scale.device)
        return self._floats


def shorten(network: nn.Module) -> None:
    """Give what lies between a student's quantised layers, fake or integer, the ways that inference alone can take."""
    shorten_attention(network)
    shorten_norms(network)
    shorten_gates(network)
    shorten_layouts(network)


def check_inputs(network: nn.Module) -> None:
    """NumericalFault where a layer's input has held NaN on a device since this was asked last; it waits for the device.

    Codes are integers, in which a NaN is not seen any more.
    """
    layers = {layer.index: layer for layer in network.modules() if isinstance(layer, DeviceLayer)}
    if layers and (faults := network.timestep_tables.faults()):
        name = layers[faults[0]].plan.site.name
        raise NumericalFault(f"site {name}: its input holds NaN", "distill again at lower rates")


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
    layers, kind = {}, DeviceLayer if backend_name in ON_DEVICE else IntegerLayer
    divide(network, [plan.site for plan in plans])
    for index, (plan, span) in enumerate(zip(plans, output_spans(plans), strict=True)):
        name = plan.site.name
        layers[name] = kind(weights[name], tables, index, span, backend_name)
        network.set_submodule(name, layers[name])
    shorten(network)
    network.timestep_tables = tables
    tables.follow(network, unit)
    return layers
