"""CUDA, through Triton: int8 codes and weights, int32 accumulators, and the epilogue in the same kernel.

Codes are int8: centred where they fit, so that a convolution pads with zeros; asymmetric 8-bit codes as code − 128,
padded with the zero-point likewise, and Σ V times that is taken off the accumulator: exact. Every form is one product:
digits are summed by Horner's rule in the accumulator itself. Weights lie on the device as (outputs, kh, kw, C).

`Prepared.at` and `codes_at` read scale and zero-point on the device and wait for nothing, so a CUDA graph can hold
them; `Prepared.__call__` takes numbers as the other back ends do. The integers are the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels.forms import INT8, choose_form, low_digit
from pipelines.kernels.prologue import Operand, centred_operand
from pipelines.memory import give_back
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.integers import PackedWeights, accumulator_bound
from pipelines.quant.layers import epilogue
from pipelines.quant.spec import SitePlan, largest_magnitude
from pipelines.quant.surroundings import Surroundings

if TYPE_CHECKING:  # Triton may be missing
    from pipelines.kernels.triton_ops import Lookup

SHIFT = 128  # asymmetric 8-bit codes are stored as code − 128: centred they would take nine bits
ALIGNED = 16  # bytes that a load takes at once: channels of widened codes are a multiple of it
LEAST_CAPABILITY = (8, 0)  # int8 products of Triton


def _ops():
    """The kernels' module; HqdmError where there is no Triton."""
    try:
        from pipelines.kernels import triton_ops
    except ImportError as error:
        raise HqdmError(
            f"the CUDA kernels are written in Triton, which cannot be imported: {error}",
            "pip install triton, or use --backend cpu",
        ) from error
    return triton_ops


def check_device() -> None:
    """HqdmError where the kernels cannot run: no other way is taken in silence."""
    if _ops().INTERPRETED:
        return
    if not torch.cuda.is_available():
        raise HqdmError(
            "there is no CUDA device, or this build of torch has no CUDA",
            "use --backend cpu; TRITON_INTERPRET=1 in the environment checks the kernels without a device, slowly",
        )
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        raise HqdmError(
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; the kernels need 8.0",
            "use --backend cpu",
        )


def is_shifted(plan: SitePlan) -> bool:
    """Whether a site's codes are stored as code − 128: centred they need nine bits."""
    low, high = plan.activation_range
    return plan.inverse != "activation" and low == 0 and high > 127


@torch.no_grad()
def codes_at(
    x: torch.Tensor, surroundings: Surroundings, at: "Lookup", fault: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `Prologue` gives them, with scale and zero-point from a table, and nothing waits for the device.

    fault: (1,) int32 on the device, set to 1 where the input holds NaN, for whoever reads it afterwards.
    """
    plan = surroundings.plan
    if plan.inverse == "activation":  # its result is wider than int8, and other axes' butterflies are not compiled
        moved, mean = surroundings.before(x.float().contiguous(memory_format=torch.channels_last))
        low, high = plan.activation_range
        scale, zero = at.now()
        zero = 0 if zero is None else zero.clamp(low, high)
        rounded = torch.div(rotate_activation(moved, plan.transform, True), scale).round_()
        torch.maximum(fault, rounded.isnan().any().to(torch.int32), out=fault)
        return rotate_activation(rounded.clamp_(low - zero, high - zero), plan.transform, True, inverse=True), mean
    x, mean = surroundings.without_mean(x)
    return _ops().codes(x, plan, at, is_shifted(plan), fault, surroundings.centre, surroundings.gain), mean


def codes_of(
    x: torch.Tensor, surroundings: Surroundings, scale: float, zero: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`Prologue` on the device, for the operand of `Prepared`. scale: what fp32 holds. NumericalFault where the input
    holds NaN, for which it waits.
    """
    plan = surroundings.plan
    at = _ops().Lookup.of(scale, None if plan.activation_quantiser == "symmetric" else zero, x.device)
    fault = torch.zeros(1, dtype=torch.int32, device=x.device)
    codes, mean = codes_at(x, surroundings, at, fault)
    if fault.item():
        raise NumericalFault(f"site {plan.site.name}: its input holds NaN", "distill again at lower rates")
    return codes, mean


@dataclass(frozen=True)
class _Held:
    """What one layer has on a device: (digits, outputs, kh, kw, C') int8, Σ V (outputs,) int32, and the like."""

    weight: torch.Tensor
    sums: torch.Tensor | None
    bias: torch.Tensor | None
    repeated: torch.Tensor | None


class Prepared:
    """One layer: the packed weights that it was given, and once it was called the unpacked ones on the device.

    int_mm: multiply with torch._int_mm (cuBLASLt) where its conditions hold, and let torch do the epilogue.
    """

    def __init__(self, weights: PackedWeights, int_mm: bool = False):
        plan = weights.plan
        self.plan, self.site, self.weights, self.int_mm = plan, plan.site, weights, int_mm
        if self.site.groups != 1:
            raise HqdmError(f"site {self.site.name}: a convolution in groups", "use --backend cpu or reference")
        folded = weights.folded()
        growth = plan.transform.order if plan.inverse == "activation" else 1
        bound = accumulator_bound(folded, plan.activation_range, growth)
        if bound >= 2**31:
            raise NumericalFault(
                f"site {self.site.name}: an accumulator can reach {bound}, more than 32 bits hold",
                "give the site fewer bits, or leave it in floating point (quantised: false in the plan)",
            )
        form = choose_form(folded, plan)
        self.form, self.group = form.name, form.group
        self.shifted, self.code_digits = is_shifted(plan), 1
        largest = INT8 if self.group else largest_magnitude(plan.activation_range) * growth
        if plan.inverse == "activation":
            while largest > 127 * 128 ** (self.code_digits - 1) - 1:
                self.code_digits += 1
        # Instructions of 16 rows saturate, so sums on the way must fit too. Digits have signs of their own: those of q
        # reach |q| + 128 + 128² + …, of V as they are.
        largest += sum(128**digit for digit in range(1, self.code_digits))
        terms = [(term.factor, term.weight.double().abs().flatten(1).sum(1)) for term in form.terms]
        bound = int(largest * sum(factor * each for factor, each in terms).max())
        if bound >= 2**31:
            raise NumericalFault(
                f"site {self.site.name}: its digits' sums can reach {bound} on the way, more than 32 bits hold",
                "use --backend cpu, or give the site fewer bits",
            )
        self._held: dict[torch.device, _Held] = {}

    def operand(self, zero: int) -> Operand:
        """Centred codes, int8 but for those that are rotated back; code − 128 where they do not fit."""
        return Operand(torch.int8, zero - SHIFT) if self.shifted else centred_operand(self.plan)

    def forget(self) -> None:
        """Free the unpacked weights; the next call unpacks them again."""
        self._held.clear()

    def _on(self, device: torch.device) -> _Held:
        if device not in self._held:
            folded, bias = self.weights.folded(), self.weights.bias
            form = choose_form(folded, self.plan)
            kernel = (1, 1) if self.site.kind == "linear" else self.site.weight[2:]
            terms = [term.weight.view(*term.weight.shape[:2], *kernel).movedim(1, -1) for term in form.terms]
            weight = torch.stack(terms)
            if self._widens:
                weight = F.pad(weight, (0, -weight.shape[-1] % ALIGNED))
            sums = folded.flatten(1).sum(1).to(device, torch.int32) if self.shifted else None
            self._held[device] = _Held(
                weight.contiguous().to(device),
                sums,
                None if bias is None else bias.to(device),
                None if form.repeated is None else form.repeated.to(device),
            )
            give_back(folded.numel())
        return self._held[device]

    @property
    def _widens(self) -> bool:
        return self.form in ("columns", "parity")

    def _operands(self, codes: torch.Tensor, held: _Held) -> torch.Tensor:
        """(digits, positions, C') int8 of codes as `operand` has them."""
        rows = codes.movedim(1, -1) if self.site.kind == "conv" else codes
        rows = rows.reshape(-1, rows.shape[-1]).contiguous()
        if self.plan.inverse == "activation":
            digits = []
            for _ in range(self.code_digits - 1):
                digits.append(low_digit(rows))
                rows = (rows - digits[-1]) / 128
            return torch.stack([*digits, rows]).to(torch.int8)
        if not self._widens:
            return rows[None]
        if self.group:
            sums = rows.unflatten(-1, (-1, self.group)).sum(-1, dtype=torch.int8)
            rows = torch.cat([rows * 2, sums], 1)
        else:
            rows = torch.cat([rows, rows.index_select(1, held.repeated)], 1)
        return F.pad(rows, (0, -rows.shape[1] % ALIGNED))[None]

    def _shaped(self, rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Rows of outputs as the layer gives them: channels-last for a convolution."""
        if self.site.kind == "linear":
            return rows.view(*codes.shape[:-1], -1)
        size = _ops().output_size(self.site, *codes.shape[-2:])
        return rows.view(len(codes), *size, -1).permute(0, 3, 1, 2)

    def _check(self, codes: torch.Tensor) -> None:
        if not (_ops().INTERPRETED or codes.is_cuda):
            raise HqdmError(f"site {self.site.name}: its input is on {codes.device}", "move the denoiser to the device")

    def _product(
        self, codes: torch.Tensor, at: "Lookup | None", weight_scale=None, residual=None, share=1.0, dtype=torch.float32
    ) -> torch.Tensor:  # fmt: skip
        self._check(codes)
        held = self._on(codes.device)
        operands = self._operands(codes, held)
        size = codes.shape[-2:] if self.site.kind == "conv" else (1, operands.shape[1])
        if residual is not None:
            last = residual.movedim(1, -1) if self.site.kind == "conv" else residual
            residual = last.reshape(-1, self.site.outputs).contiguous()
        if self._may_int_mm(operands, held):
            rows = self._int_mm(operands[0], held, at)
            if weight_scale is not None:
                rows = epilogue(rows.float(), at.now()[0] * share, weight_scale, held.bias)
                rows = (rows if residual is None else rows + residual).to(dtype)
        else:
            rows = _ops().product(
                operands, held.weight, self.plan, size, at, weight_scale, held.bias, held.sums, residual, share, dtype
            )
        return self._shaped(rows, codes)

    def _may_int_mm(self, operands: torch.Tensor, held: _Held) -> bool:
        """torch._int_mm: one product of more than 16 rows, both widths multiples of 8."""
        digits, outputs, kh, kw, channels = held.weight.shape
        plain = self.site.stride == (1, 1) and self.site.padding == (0, 0) and kh == kw == 1
        return (
            self.int_mm and plain and digits == len(operands) == 1 and operands.shape[1] > 16
            and outputs % 8 == 0 and channels % 8 == 0
        )  # fmt: skip

    def _int_mm(self, rows: torch.Tensor, held: _Held, at: "Lookup | None") -> torch.Tensor:
        total = torch._int_mm(rows, held.weight.view(self.site.outputs, -1).T)
        if held.sums is None:
            return total
        low, high = self.plan.activation_range
        return total - (at.now()[1].clamp(low, high) - SHIFT).to(torch.int32) * held.sums

    def accumulators(self, centred: torch.Tensor) -> torch.Tensor:
        """int32 accumulators of centred codes, of any type."""
        low, _ = self.plan.activation_range
        # Asymmetric codes are unsigned: any zero-point that fits will do.
        zero = max(0, int(-centred.min())) if low == 0 else 0
        operand = self.operand(zero)
        stored = (centred.float() + operand.offset).to(operand.dtype)
        return self._product(stored, _ops().Lookup.of(1.0, zero, centred.device) if self.shifted else None)

    def at(
        self, codes: torch.Tensor, at: "Lookup", weight_scale: torch.Tensor, residual: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:  # fmt: skip
        """((acc·(s/order))·s_w + b) + residual, each operation rounded to fp32, then to `dtype` (fp32, fp16, bf16).

        codes: as `codes_at` gives them. residual: of the output's shape, any float type.
        """
        return self._product(codes, at, weight_scale, residual, 1 / self.plan.transform.order, dtype)

    def __call__(
        self, codes: torch.Tensor, operand: Operand, activation_scale: float, weight_scale: torch.Tensor
    ) -> torch.Tensor:
        """codes: as `operand` has them. activation_scale: s/order, what fp32 holds."""
        at = _ops().Lookup.of(activation_scale, operand.offset + SHIFT if self.shifted else None, codes.device)
        return self._product(codes, at, weight_scale)


def prepare(weights: PackedWeights, int_mm: bool = False) -> Prepared:
    """Choose the exact form and check every bound; unpacking waits for the first call. HqdmError where there is no
    device to run on.
    """
    check_device()
    return Prepared(weights, int_mm)
