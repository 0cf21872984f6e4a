"""oneDNN's int8 operators as torch ships them for x86-64: u8 activations with a zero-point, s8 weights, s32
accumulators.

The fused epilogue is given s_x·s_w[c] as the one scale that it multiplies with, and rounds every operation to fp32,
which is `quant.layers.epilogue`. Where a form needs several products their accumulators are read back through fp32
(exact below 2²⁴, checked when the layer is prepared), added as int32, and the epilogue follows in torch.
"""

from functools import lru_cache

import torch

from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels.forms import INT8, PARTIAL_OFFSET, Form, Term, carried, choose_form, low_digit
from pipelines.kernels.prologue import Operand, centred_operand
from pipelines.memory import give_back
from pipelines.quant.integers import PackedWeights, accumulator_bound
from pipelines.quant.layers import EXACT_FP32, epilogue


@lru_cache(maxsize=1)
def has_vnni() -> bool:
    """Whether the operators sum u8·s8 products in 32 bits; without VNNI pairs saturate at 16.

    Tried where the processor says that it can: oneDNN may take other instructions (ONEDNN_MAX_CPU_ISA).
    """
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")):
        return False
    channels, zeros = 32, torch.zeros(16, dtype=torch.int8)
    for side in (0, 1, 3):  # of a kernel; 0: a linear
        shape = (1, channels, 8, 8) if side else (8, channels)
        codes = torch.full(shape, 255, dtype=torch.uint8)
        weight = torch.full((16, channels, side, side) if side else (16, channels), INT8, dtype=torch.int8)
        ones, around = torch.ones(16), ((1, 1), (0, 0), (1, 1), 1)
        if side:
            codes = codes.contiguous(memory_format=torch.channels_last)
            packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *around, list(shape))
            sums = torch.ops.onednn.qconv_pointwise(
                codes, 1.0, 0, packed, ones, zeros, None, *around, 1.0, 0, torch.float32, "none", [], None
            )
        else:
            packed = torch.ops.onednn.qlinear_prepack(weight, list(shape))
            sums = torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
        if not (sums == weight[0].numel() * 255 * INT8).all():
            return False
    return True


def largest_weight(largest_code: int, vnni: bool) -> int:
    """The largest |V'| beside codes up to that one. Without VNNI a processor adds two u8·s8 products in 16 bits, which
    saturate (vpmaddubsw): 64 beside 255, INT8 beside codes of up to 7 bits.
    """
    return INT8 if vnni else min(INT8, (2**15 - 1) // (2 * largest_code))


SHAPES = 2  # input shapes for which a layer keeps its weights: a batch's rest is one, and half a batch without guidance


class Prepared:
    """One layer: the packed weights that it was given, and for the last input shapes those in oneDNN's own layout."""

    def __init__(self, weights: PackedWeights, vnni: bool):
        plan = weights.plan
        self.plan, self.site, self.bias, self.weights = plan, plan.site, weights.bias, weights
        folded = weights.folded()
        self.growth = plan.transform.order if plan.inverse == "activation" else 1
        bound = accumulator_bound(folded, plan.activation_range, self.growth)
        if bound >= 2**31:
            raise NumericalFault(
                f"site {plan.site.name}: an accumulator can reach {bound}, more than 32 bits hold",
                "give the site fewer bits, or leave it in floating point (quantised: false in the plan)",
            )
        low, high = plan.activation_range
        self.offset = 0 if low == 0 else 2 ** (plan.activation_bits - 1)
        if plan.inverse == "activation":
            largest = self.growth * max(abs(low), high)
            count = 1
            while largest > 127 * 128 ** (count - 1) - 1:
                count += 1
            self.activation_digits = count
        else:
            self.activation_digits = 1
        self._most = largest_weight(255 if plan.inverse == "activation" else high + self.offset, vnni)
        form = self._form(folded)
        self.form, self.fused = form.name, form.fused
        self.repeated, self.group = form.repeated, form.group
        # Constant channels are large codes beside large weights: without VNNI pairs of these products saturate.
        convolves = plan.site.kind == "conv" and form.name in ("one", "columns")
        self.carried = carried(folded, high + self.offset if low == 0 else self.offset) if vnni and convolves else None
        if not form.fused:
            per_term = 127 if plan.inverse == "activation" else max(abs(low), high)
            for term in form.terms:
                bound = accumulator_bound(term.weight, (-per_term, per_term))
                if bound >= EXACT_FP32:
                    raise NumericalFault(
                        f"site {plan.site.name}: a digit's accumulator can reach {bound}, more than fp32 holds exactly",
                        "sample with --backend reference, or give the site fewer bits",
                    )
        self.outputs = plan.site.outputs
        give_back(folded.numel())
        self._no_zero = torch.zeros(self.outputs, dtype=torch.int8)
        self._ones = torch.ones(self.outputs)
        self._packed: dict[tuple[int, ...], list[tuple[int, int, torch.Tensor]]] = {}

    def _form(self, folded: torch.Tensor) -> Form:
        """The exact form, with as many terms as there are pairs of digits where the activation has several."""
        form = choose_form(folded, self.plan, self._most)
        if self.plan.inverse != "activation":
            return form
        return Form(
            "digits",
            tuple(
                Term(term.weight, digit, term.factor * 128**digit)
                for term in form.terms
                for digit in range(self.activation_digits)
            ),
        )

    def _terms(self, shape: torch.Size) -> list[tuple[int, int, torch.Tensor]]:
        """The terms' digits, factors and weights packed for an input shape; without the shape oneDNN runs at half
        speed.

        The integers are unpacked for this alone and freed. The shapes used longest ago are forgotten.
        """
        key = tuple(shape)
        if key in self._packed:
            self._packed[key] = self._packed.pop(key)
            return self._packed[key]
        while len(self._packed) >= SHAPES:
            del self._packed[next(iter(self._packed))]
        site, packed = self.site, []
        one = self.form == "one" and self.activation_digits == 1  # V itself, known to fit
        folded = self.weights.folded(torch.int8 if one else None)
        terms = (Term(folded),) if one else self._form(folded).terms
        if self.carried is not None:  # after V's own channels, and before those that are given twice
            (term,), own = terms, folded.shape[1]
            parts = [term.weight[:, :own], self.carried.weights(folded), term.weight[:, own:]]
            terms = (Term(torch.cat(parts, 1)),)
        for term in terms:
            weight = term.weight.contiguous()
            if site.kind == "linear":
                made = torch.ops.onednn.qlinear_prepack(weight, list(key))
            else:
                made = torch.ops.onednn.qconv_prepack(
                    weight, self._ones, 1.0, 0, site.stride, site.padding, site.dilation, site.groups, list(key)
                )
            packed.append((term.digit, term.factor, made))
        self._packed[key] = packed
        give_back(weight.numel())
        return packed

    def forget(self) -> None:
        """Free the weights in oneDNN's layout; the next call unpacks them again."""
        self._packed.clear()

    def _run(self, u8, zero: int, packed, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One fused product: fp32 acc·scale + b."""
        site = self.site
        if site.kind == "linear":
            return torch.ops.onednn.qlinear_pointwise(
                u8,
                1.0,
                zero,
                packed,
                scale,
                self._no_zero,
                bias,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
        return torch.ops.onednn.qconv_pointwise(
            u8, 1.0, zero, packed, scale, self._no_zero, bias, site.stride, site.padding,
            site.dilation, site.groups, 1.0, 0, torch.float32, "none", [], None,
        )  # fmt: skip

    def operand(self, zero: int) -> Operand:
        """Bytes with their zero-point, where the operators take them as they are; else centred codes."""
        if self.group or self.plan.inverse == "activation":
            return centred_operand(self.plan)
        stored = zero + self.offset
        return Operand(torch.uint8, stored, self.carried.values(stored) if self.carried else ())

    def _operands(self, codes: torch.Tensor, operand: Operand) -> tuple[list[torch.Tensor], int]:
        """u8 operands, one for each activation digit, and their common zero-point."""
        channel = 1 if self.site.kind == "conv" else -1
        if self.plan.inverse == "activation":
            rest, digits = codes, []
            for _ in range(self.activation_digits - 1):
                low = low_digit(rest)
                digits.append(low)
                rest = (rest - low) / 128
            return [(digit + PARTIAL_OFFSET).to(torch.uint8) for digit in [*digits, rest]], PARTIAL_OFFSET
        if self.group:
            sums = codes.unflatten(channel, (-1, self.group)).sum(2 if self.site.kind == "conv" else -1)
            both = torch.cat([codes * 2, sums], channel)
            return [(both + PARTIAL_OFFSET).to(torch.uint8)], PARTIAL_OFFSET
        if self.repeated is not None:
            codes = torch.cat([codes, codes.index_select(channel, self.repeated)], channel)
        return [codes], 0 if operand.carried else operand.offset

    def accumulators(self, centred: torch.Tensor) -> torch.Tensor:
        """int32 accumulators of centred codes, of any type, read through the operators themselves."""
        low, _ = self.plan.activation_range
        # Asymmetric codes are unsigned: any zero-point that fits will do.
        operand = self.operand(max(0, int(-centred.min())) if low == 0 else 0)
        total = self._sum(operand.of(centred, 1 if self.site.kind == "conv" else -1), operand)
        return total if self.site.kind == "conv" else total.view(*centred.shape[:-1], self.outputs)

    def _sum(self, codes: torch.Tensor, operand: Operand) -> torch.Tensor:
        """The accumulators of all terms, int32."""
        operands, u8_zero = self._operands(codes, operand)
        operands = [self._layout(value) for value in operands]
        total = None
        for digit, factor, packed in self._terms(operands[0].shape):
            part = self._run(operands[digit], u8_zero, packed, self._ones, None).to(torch.int32) * factor
            total = part if total is None else total + part
        return total

    def _layout(self, operand: torch.Tensor) -> torch.Tensor:
        if self.site.kind == "conv":
            return operand.contiguous(memory_format=torch.channels_last)
        return operand.reshape(-1, operand.shape[-1])

    def __call__(
        self, codes: torch.Tensor, operand: Operand, activation_scale: float, weight_scale: torch.Tensor
    ) -> torch.Tensor:
        """codes: as `operand` has them."""
        lead = codes.shape[:-1]
        if self.fused:
            operands, u8_zero = self._operands(codes, operand)
            u8 = self._layout(operands[0])
            y = self._run(u8, u8_zero, self._terms(u8.shape)[0][2], weight_scale * activation_scale, self.bias)
        else:
            y = epilogue(self._sum(codes, operand).float(), torch.tensor(activation_scale), weight_scale, self.bias)
        return y if self.site.kind == "conv" else y.view(*lead, self.outputs)


def form_of(weights: PackedWeights) -> str:
    """The exact form in which this back end computes the layer on a processor with VNNI, every bound checked; see
    `forms`.
    """
    return Prepared(weights, vnni=True).form


def prepare(weights: PackedWeights) -> Prepared:
    """Choose the form that is exact on this processor and check every bound; packing waits for the input's shape."""
    if not hasattr(torch.ops.onednn, "qconv_pointwise") or not torch.backends.mkldnn.is_available():
        raise HqdmError("this build of torch has no oneDNN int8 operators", "sample with --backend reference")
    return Prepared(weights, has_vnni())
