"""CUDA, through Triton: int8 codes and weights, int32 accumulators, and the epilogue in the same kernel.

Codes are int8: centred where they fit, so that a convolution pads with zeros; asymmetric 8-bit codes as code − 128,
padded with the zero-point likewise, and Σ V times that is taken off the accumulator: exact. Every form is one product:
digits are summed by Horner's rule in the accumulator itself. Weights lie on the device as (outputs, kh, kw, C).

Scales and zero-points are read on the device, in the tables' row that a tensor there names, and nothing waits for the
host, so that a CUDA graph can hold a whole step (`pipelines/replay.py`). Where something is off: `hqdm doctor`
multiplies through these kernels and compares with plain sums; `tests/test_cuda.py` runs on the device where there is
one, every tile of the product by itself; `--backend reference` says what is right.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels.forms import INT8, choose_form, low_digit
from pipelines.kernels.prologue import Operand, Prologue, centred_operand
from pipelines.memory import give_back
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.integers import PackedWeights, accumulator_bound
from pipelines.quant.layers import epilogue
from pipelines.quant.spec import SitePlan, largest_magnitude
from pipelines.quant.tables import Rows

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
            "pip install 'hqdm[cuda]' (Linux; CUDA builds of torch bring Triton), or use --backend cpu",
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


def device() -> torch.device:
    """Where the kernels run; HqdmError where they cannot. The interpreter's place is the processor; processes of a job
    are dealt the devices of their machine.
    """
    check_device()
    if _ops().INTERPRETED:
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def place_of(name: str) -> torch.device:
    """Where floating point is computed, `cpu` or `cuda`; HqdmError where there is no such device. Processes of a job
    are dealt the GPUs of their machine, and fp32 stays fp32.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HqdmError(
            "there is no CUDA device, or this build of torch has no CUDA",
            "use --device cpu; pip install a CUDA build of torch where there is a GPU (hqdm doctor)",
        )
    round_nothing()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """What a device is called: a GPU by its name, the processor cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def round_nothing() -> None:
    """Let fp32 be fp32: cuDNN takes an fp32 convolution's operands as TF32, of 10 bits, unless it is told otherwise."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def is_shifted(plan: SitePlan) -> bool:
    """Whether a site's codes are stored as code − 128: centred they need nine bits."""
    low, high = plan.activation_range
    return plan.inverse != "activation" and low == 0 and high > 127


class DevicePrologue(Prologue):
    """The same codes where scale and zero-point are on the device. A fault is left there, for whoever asks later."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, at: "Lookup") -> tuple[torch.Tensor, torch.Tensor | None]:
        """The codes of x (fp32, fp16, bf16) in its own shape, as `Prepared.operand` says, channels-last for a
        convolution, and the mean that a dynamic centre subtracted, in fp32.

        The site's entry of at.fault becomes 1 where a value to be rounded is NaN.
        """
        plan, surroundings = self.plan, self.surroundings
        if plan.inverse == "activation":  # its result is wider than int8, and other axes' butterflies are not compiled
            moved, mean = surroundings.before(x.float().contiguous(memory_format=torch.channels_last))
            low, high = plan.activation_range
            scale, zero = at.now()
            zero = 0 if zero is None else zero.clamp(low, high)
            rounded = torch.div(rotate_activation(moved, plan.transform, True), scale).round_()
            fault = at.fault[at.site]
            torch.maximum(fault, rounded.isnan().any().to(torch.int32), out=fault)
            return rotate_activation(rounded.clamp_(low - zero, high - zero), plan.transform, True, inverse=True), mean
        x, mean = surroundings.without_mean(x.float() if plan.centring == "dynamic" else x)
        return _ops().codes(x, plan, at, is_shifted(plan), surroundings.centre, surroundings.gain), mean


@dataclass(frozen=True)
class _Held:
    """What one layer has on a device: (digits, outputs, kh, kw, C') int8, Σ V (outputs,) int32, and the like."""

    weight: torch.Tensor
    sums: torch.Tensor | None
    bias: torch.Tensor | None
    repeated: torch.Tensor | None


_measured: dict[tuple, bool] = {}


def int_mm_is_quicker(key: tuple, ours: Callable[[], object], theirs: Callable[[], object]) -> bool:
    """Whether torch._int_mm (cuBLASLt) and torch's epilogue take less time than the kernel that has both in it, found
    out once for each kind of product. Only a device can tell; the interpreter is never asked.
    """
    if _ops().INTERPRETED:
        return False
    if key not in _measured:
        from triton.testing import do_bench

        _measured[key] = do_bench(theirs, warmup=5, rep=20) < do_bench(ours, warmup=5, rep=20)
    return _measured[key]


class Prepared:
    """One layer: the packed weights that it was given, and once it was called the unpacked ones on the device."""

    def __init__(self, weights: PackedWeights):
        plan = weights.plan
        self.plan, self.site, self.weights = plan, plan.site, weights
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
        self, codes: torch.Tensor, at: "Lookup | None", weight_scale=None, dtype=torch.float32
    ) -> torch.Tensor:  # fmt: skip
        self._check(codes)
        held = self._on(codes.device)
        operands = self._operands(codes, held)
        size = codes.shape[-2:] if self.site.kind == "conv" else (1, operands.shape[1])
        share = 1 / self.plan.transform.order

        def ours():
            return _ops().product(
                operands, held.weight, self.plan, size, at, weight_scale, held.bias, held.sums, share, dtype
            )

        def theirs():
            rows = self._int_mm(operands[0], held, at)
            if weight_scale is None:
                return rows
            return epilogue(rows.float(), at.now()[0] * share, weight_scale, held.bias).to(dtype)

        if self._may_int_mm(operands, held):
            # Rows by powers of two, as tiles are chosen: one measurement for what is nearly the same.
            key = (operands.shape[1].bit_length(), *held.weight.shape, self.shifted, weight_scale is None, dtype)
            return self._shaped(theirs() if int_mm_is_quicker(key, ours, theirs) else ours(), codes)
        return self._shaped(ours(), codes)

    def _may_int_mm(self, operands: torch.Tensor, held: _Held) -> bool:
        """torch._int_mm: one product of more than 16 rows, both widths multiples of 8."""
        digits, outputs, kh, kw, channels = held.weight.shape
        plain = self.site.stride == (1, 1) and self.site.padding == (0, 0) and kh == kw == 1
        return (
            plain and digits == len(operands) == 1 and operands.shape[1] > 16
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

    def lookup(self, rows: Rows, site: int) -> "Lookup":
        """Where the kernels find a site's scale and zero-point among the tables' rows on a device."""
        zero = None if self.plan.activation_quantiser == "symmetric" else rows.zero
        return _ops().Lookup(rows.scale, zero, rows.row, rows.fault, site)

    def __call__(
        self, codes: torch.Tensor, at: "Lookup", weight_scale: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """acc·((s/order)·s_w) + b, each operation rounded to fp32, then to `dtype` (fp32, fp16, bf16).

        codes: as `DevicePrologue` gives them. weight_scale: (outputs,) fp32.
        """
        return self._product(codes, at, weight_scale, dtype)


def prepare(weights: PackedWeights) -> Prepared:
    """Choose the exact form and check every bound; unpacking waits for the first call. HqdmError where there is no
    device to run on.
    """
    check_device()
    return Prepared(weights)
