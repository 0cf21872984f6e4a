"""The integers of one quantised layer: what training ends with, what export packs and what kernels compute with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipelines.errors import FileFault, NumericalFault
from pipelines.memory import let_go
from pipelines.quant.hadamard import rotate_weight
from pipelines.quant.packing import pack, unpack
from pipelines.quant.spec import WEIGHT_BITS, SitePlan, largest_magnitude
from pipelines.quant.surroundings import NAMES, weight_bounds

AT_ONCE = 2**20  # weights that a pass over rows takes
# What a fake student's file can hold of a site, besides the surroundings.
LEARNED = (
    "weight_scale", "weight_zero", "base_scale", "weight_codes", "lora_a", "lora_b", "weight", "bias",
)  # fmt: skip
_AGAIN = "make the artifact again with --force"


def check_tensors(plan: SitePlan, tensors: Mapping[str, torch.Tensor], path: Path, needed: str = "") -> None:
    """FileFault for a site's tensors of other names, shapes or types than its plan's, NumericalFault for NaN and Inf,
    scales that are not positive and zero-points that are no codes. `path` is named; `needed` has to be there besides
    what the plan says. `students` says what there is.
    """
    site, where = plan.site, f"site {plan.site.name}"
    out, inputs = site.weight[0], math.prod(site.weight[1:])
    rank = len(tensors["lora_b"][0]) if "lora_b" in tensors and tensors["lora_b"].ndim == 2 and out else 0
    shapes = {
        "weight_scale": (out,), "weight_zero": (out,), "base_scale": (out,), "bias": (out,), "weight": site.weight,
        "weight_codes": (out, inputs), "lora_a": (rank, *site.weight[1:]), "lora_b": (out, rank), "row_bits": (out,),
        "gain": (site.channels,), "centre": (site.channels,), "taps": (out, *site.weight[2:]),
    }  # fmt: skip
    static = plan.centring == "static"
    asked = {"weight_scale": True, "gain": plan.scaling, "row_bits": plan.mixed, "centre": static, "taps": static}
    asked |= {needed: True} if needed else {}
    for name, other in (("lora_a", "lora_b"), ("lora_b", "lora_a"), ("weight_codes", "base_scale")):
        if name in tensors:
            asked[other] = True
    for name, wanted in asked.items():
        if wanted != (name in tensors):
            raise FileFault(f"{path}: {where} has {'no' if wanted else 'a'} {name}", _AGAIN)
    for name, value in tensors.items():
        bytes_ = name in ("weight_codes", "row_bits")
        if tuple(value.shape) != shapes.get(name) or value.dtype != (torch.uint8 if bytes_ else torch.float32):
            raise FileFault(f"{path}: {where}: {name} is {value.dtype} of shape {tuple(value.shape)}", _AGAIN)
        if name == "row_bits" and not set(value.tolist()) <= {bits for bits in WEIGHT_BITS if bits <= plan.weight_bits}:
            raise FileFault(f"{path}: {where}: row_bits are not widths up to {plan.weight_bits}", _AGAIN)
        if not bytes_ and not value.isfinite().all():
            raise NumericalFault(f"{where}: its {name} holds NaN or Inf", f"in {path}; {_AGAIN}")
        if name in ("weight_scale", "base_scale") and not (value > 0).all():
            raise NumericalFault(f"{where}: its {name} holds numbers that are not positive", f"in {path}; {_AGAIN}")
        low, high = plan.weight_range
        if name == "weight_zero" and not ((value >= low) & (value <= high) & (value == value.round())).all():
            raise NumericalFault(
                f"{where}: its weight_zero holds no codes from {low} to {high}", f"in {path}; {_AGAIN}"
            )
        if name == "gain" and not (value != 0).all():
            raise NumericalFault(f"{where}: its gain holds 0", f"in {path}; {_AGAIN}")


@dataclass(frozen=True)
class IntegerWeights:
    """A layer's weight as integers, with everything its epilogue needs.

    centred: code − zero-point, (out, in, …) int16. zero: (out,) int16, zeros for a symmetric quantiser.
    scale: (out,) fp32. bias: (out,) fp32 or None.
    """

    plan: SitePlan
    centred: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    surroundings: Mapping[str, torch.Tensor] = field(default_factory=dict)  # see `surroundings.Surroundings`

    def dequantised(self) -> torch.Tensor:
        """The weight (out, in, …) fp32 that these integers stand for, in the layer's own, unrotated coordinates."""
        weight = self.centred.float() * self.scale.view(-1, *[1] * (self.centred.ndim - 1))
        if self.plan.inverse == "double":
            weight = rotate_weight(weight, self.plan.transform, inverse=True) / self.plan.transform.order
        gain = self.surroundings.get("gain")
        return weight if gain is None else weight * gain.view(1, -1, *[1] * (weight.ndim - 2))

    def packed(self) -> "PackedWeights":
        """As a file holds them."""
        row_bits = self.surroundings.get("row_bits")
        codes = self.centred + self.zero.view(-1, *[1] * (self.centred.ndim - 1)) - _lowest(self.plan, row_bits)
        for bits, rows in _widths(self.plan, row_bits):
            low, high = (int(value) for value in codes[rows].aminmax())
            if low < 0 or high >= 2**bits:
                raise NumericalFault(
                    f"site {self.plan.site.name}: weight codes from {low} to {high} do not fit {bits} bits",
                    "its weights or scales are damaged: hqdm distill --force",
                )
        codes = codes.numpy().astype(np.uint8)
        packed = [pack(codes[rows], bits) for bits, rows in _widths(self.plan, row_bits)]
        tensors = dict(self.surroundings) | {
            "weight": torch.from_numpy(np.concatenate(packed)),
            "weight_scale": self.scale.clone(),
        }
        if self.plan.weight_quantiser == "asymmetric":
            tensors["weight_zero"] = torch.from_numpy(pack(self.zero.numpy().astype(np.uint8), self.plan.weight_bits))
        if self.bias is not None:
            tensors["bias"] = self.bias.clone()
        return PackedWeights(self.plan, tensors)


@dataclass(frozen=True)
class PackedWeights:
    """A layer's integers as a file holds them, maybe still in it: a mapped file's pages come and go with reading.

    tensors: `weight` packed uint8, `weight_scale` (out,) fp32, `weight_zero` packed uint8 (asymmetric only), `bias`,
    and those of `surroundings.Surroundings`. Where outputs have widths of their own (`row_bits`), `weight` holds the
    rows of the narrowest first, in their order, then those of the next width.
    """

    plan: SitePlan
    tensors: Mapping[str, torch.Tensor]

    def check(self, path: Path) -> None:
        """FileFault for tensors that are not the plan's, NumericalFault for scales that are not positive: kernels read
        as many values as the plan says.
        """
        packed = ("weight", "weight_zero")
        if any(name in self.tensors and self.tensors[name].dtype != torch.uint8 for name in packed):
            raise FileFault(f"{path}: site {self.plan.site.name}: its packed weights are not bytes", _AGAIN)
        check_tensors(self.plan, {name: v for name, v in self.tensors.items() if name not in packed}, path)

    @property
    def scale(self) -> torch.Tensor:
        return self.tensors["weight_scale"]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.tensors.get("bias")

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unsigned codes (out, in, …) uint8, and the zero-points (out,) int16. FileFault where the bytes cannot be the
        plan's.
        """
        plan, shape = self.plan, self.plan.site.weight
        packed, row_bits = self.tensors["weight"], self.tensors.get("row_bits")
        if row_bits is None:
            codes = torch.from_numpy(unpack(packed.numpy(), plan.weight_bits, shape))
        else:
            codes, start = torch.empty(shape, dtype=torch.uint8), 0
            for bits, rows in _widths(plan, row_bits):
                mine = (int(rows.sum()), *shape[1:])
                size = -(-int(np.prod(mine)) * bits // 8)
                codes[rows] = torch.from_numpy(unpack(packed[start : start + size].numpy(), bits, mine))
                start += size
        let_go(packed.data_ptr(), packed.nbytes)
        zero = torch.zeros(shape[0], dtype=torch.int16)
        if plan.weight_quantiser == "asymmetric":
            zero += torch.from_numpy(unpack(self.tensors["weight_zero"].numpy(), plan.weight_bits, (shape[0],)))
        return codes, zero

    def unpack(self) -> IntegerWeights:
        """The inverse of `IntegerWeights.packed`."""
        codes, zero = self._codes()
        centred = codes.to(torch.int16).add_(self._shift(zero))
        around = {name: self.tensors[name] for name in NAMES if name in self.tensors}
        return IntegerWeights(self.plan, centred, zero, self.scale, self.bias, around)

    def _shift(self, zero: torch.Tensor) -> torch.Tensor:
        """What makes unsigned codes centred ones, (out, 1, …)."""
        low = _lowest(self.plan, self.tensors.get("row_bits"))
        return (low - zero.view(-1, *[1] * (len(self.plan.site.weight) - 1))).to(torch.int16)

    def folded(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """V (out, in, …), what the quantised activation is multiplied with: W_int·M for `single`, W_int otherwise.

        dtype: one that is known to hold it; without it int16, or int32 where V might be wider.
        """
        plan = self.plan
        single = plan.inverse == "single"
        if dtype is None:
            largest = largest_magnitude(plan.weight_range) * (plan.transform.order if single else 1)
            dtype = torch.int16 if largest < 2**15 else torch.int32
        codes, zero = self._codes()
        shift = self._shift(zero)
        folded = torch.empty(codes.shape, dtype=dtype)
        step = max(1, AT_ONCE // codes[0].numel())
        for start in range(0, len(folded), step):
            rows = slice(start, start + step)
            centred = codes[rows] + shift[rows]
            folded[rows] = rotate_weight(centred.float(), plan.transform) if single else centred
        return folded


def _lowest(plan: SitePlan, row_bits: torch.Tensor | None) -> torch.Tensor | int:
    """The smallest weight code of each output, a number or (out, 1, …) int16."""
    if row_bits is None:
        return plan.weight_range[0]
    return weight_bounds(plan, row_bits)[0].to(torch.int16).view(-1, *[1] * (len(plan.site.weight) - 1))


def _widths(plan: SitePlan, row_bits: torch.Tensor | None) -> list[tuple[int, torch.Tensor | slice]]:
    """The widths of a site's weights, ascending, each with its rows."""
    if row_bits is None:
        return [(plan.weight_bits, slice(None))]
    return [(bits, row_bits == bits) for bits in sorted(set(row_bits.tolist()))]


def accumulator_bound(folded: torch.Tensor, activation_range: tuple[int, int], growth: int = 1) -> int:
    """The largest |accumulator| any input can reach: max|code − zero| · growth · max over outputs of Σ|V|.

    growth is the order for a transform that is undone on the activation's side, whose codes it enlarges.
    """
    step = max(1, AT_ONCE // max(1, folded[0].numel()))
    sums = [part.double().abs().flatten(1).sum(1).max().item() for part in folded.split(step)]
    return int(largest_magnitude(activation_range) * growth * max(sums))
