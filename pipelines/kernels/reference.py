"""The truth: int32 accumulators from plain torch integer operations, then the epilogue of training.

Slow, exact, and without any condition on the processor.
"""

import torch

from pipelines.errors import NumericalFault
from pipelines.kernels.prologue import Operand, centred_operand
from pipelines.quant.integers import PackedWeights, accumulator_bound
from pipelines.quant.layers import epilogue
from pipelines.quant.spec import Site


def accumulate(codes: torch.Tensor, folded: torch.Tensor, site: Site) -> torch.Tensor:
    """Σ q·V in the operands' integer dtype: (…, in) or (N, in, H, W) with (out, in/groups, …) to (…, out), (N, out,
    H', W').
    """
    if site.kind == "linear":
        return codes @ folded.T
    (sh, sw), (ph, pw), (dh, dw) = site.stride, site.padding, site.dilation
    out, inside, kh, kw = folded.shape
    n, channels, height, width = codes.shape
    padded = codes.new_zeros((n, channels, height + 2 * ph, width + 2 * pw))
    padded[:, :, ph : ph + height, pw : pw + width] = codes
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    result = codes.new_zeros((n, site.groups, out // site.groups, rows * columns))
    weight = folded.view(site.groups, out // site.groups, inside, kh, kw)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dh, j * dw
            patch = padded[:, :, top : top + (rows - 1) * sh + 1 : sh, left : left + (columns - 1) * sw + 1 : sw]
            result += weight[..., i, j] @ patch.reshape(n, site.groups, inside, rows * columns)
    return result.view(n, out, rows, columns).contiguous(memory_format=torch.channels_last)


class Prepared:
    """One layer, ready to run: (codes, operand, s_x, s_w) to fp32 outputs. V is unpacked again for every call."""

    form = "int32"

    def __init__(self, weights: PackedWeights):
        plan = weights.plan
        growth = plan.transform.order if plan.inverse == "activation" else 1
        bound = accumulator_bound(weights.folded(), plan.activation_range, growth)
        if bound >= 2**31:
            raise NumericalFault(
                f"site {plan.site.name}: an accumulator can reach {bound}, more than 32 bits hold",
                "give the site fewer bits, or leave it in floating point (quantised: false in the plan)",
            )
        self.plan, self.bias, self.weights = plan, weights.bias, weights

    def forget(self) -> None:
        """Nothing is held."""

    def operand(self, zero: int) -> Operand:
        """Centred codes, whatever the zero-point."""
        return centred_operand(self.plan)

    def accumulators(self, centred: torch.Tensor) -> torch.Tensor:
        """int32 accumulators of centred codes, of any type."""
        folded = self.weights.folded().to(torch.int32)
        return accumulate(centred.to(torch.int32), folded, self.plan.site)

    def __call__(
        self, codes: torch.Tensor, operand: Operand, activation_scale: float, weight_scale: torch.Tensor
    ) -> torch.Tensor:
        """codes: as `operand` has them."""
        return epilogue(self.accumulators(codes).float(), torch.tensor(activation_scale), weight_scale, self.bias)


def prepare(weights: PackedWeights) -> Prepared:
    """Check the accumulator's bound."""
    return Prepared(weights)
