"""The integers of one quantised layer: what training ends with, what export packs and what kernels compute with."""

from dataclasses import dataclass

import numpy as np
import torch

from pipelines.quant.hadamard import rotate_weight
from pipelines.quant.packing import pack, unpack
from pipelines.quant.spec import SitePlan


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

    def folded(self) -> torch.Tensor:
        """V, what the quantised activation is multiplied with: W_int·M for `single`, W_int otherwise. fp32,
        integer-valued.
        """
        weight = self.centred.float()
        return rotate_weight(weight, self.plan.transform) if self.plan.inverse == "single" else weight

    def dequantised(self) -> torch.Tensor:
        """The weight (out, in, …) fp32 that these integers stand for, in the layer's own, unrotated coordinates."""
        weight = self.centred.float() * self.scale.view(-1, *[1] * (self.centred.ndim - 1))
        if self.plan.inverse == "double":
            weight = rotate_weight(weight, self.plan.transform, inverse=True) / self.plan.transform.order
        return weight

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors for a file: `weight` packed uint8, `weight_scale`, `weight_zero` (uint8, asymmetric only), `bias`."""
        low, _ = self.plan.weight_range
        codes = (self.centred + self.zero.view(-1, *[1] * (self.centred.ndim - 1)) - low).numpy().astype(np.uint8)
        tensors = {
            "weight": torch.from_numpy(pack(codes, self.plan.weight_bits)),
            "weight_scale": self.scale.clone(),
        }
        if self.plan.weight_quantiser == "asymmetric":
            tensors["weight_zero"] = torch.from_numpy(pack(self.zero.numpy().astype(np.uint8), self.plan.weight_bits))
        if self.bias is not None:
            tensors["bias"] = self.bias.clone()
        return tensors

    @classmethod
    def from_tensors(cls, plan: SitePlan, tensors: dict[str, torch.Tensor]) -> "IntegerWeights":
        """The inverse of `to_tensors`."""
        shape, (low, _) = plan.site.weight, plan.weight_range
        codes = unpack(tensors["weight"].numpy(), plan.weight_bits, shape).astype(np.int16) + low
        zero = np.zeros(shape[0], np.int16)
        if plan.weight_quantiser == "asymmetric":
            zero = unpack(tensors["weight_zero"].numpy(), plan.weight_bits, (shape[0],)).astype(np.int16)
        centred = codes - zero.reshape(-1, *[1] * (len(shape) - 1))
        return cls(
            plan, torch.from_numpy(centred), torch.from_numpy(zero), tensors["weight_scale"], tensors.get("bias")
        )


def accumulator_bound(folded: torch.Tensor, activation_range: tuple[int, int], growth: int = 1) -> int:
    """The largest |accumulator| any input can reach: max|code − zero| · growth · max over outputs of Σ|V|.

    growth is the order for a transform that is undone on the activation's side, whose codes it enlarges.
    """
    low, high = activation_range
    largest = max(abs(low), abs(high), high - low if low == 0 else 0)
    return int(largest * growth * folded.double().abs().flatten(1).sum(1).max().item())
