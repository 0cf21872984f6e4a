"""Layers on the CPU: codes as bytes, weights in a form that fits 8 bits, the fastest products that are exact here.

The operators' epilogue is given s_x·s_w[c] as the one scale that it multiplies with, and rounds every operation to
fp32, which is `quant.layers.epilogue`. Where a form needs several products their accumulators are read back through
fp32 (exact below 2²⁴, checked when the layer is prepared), added as int32, and the epilogue follows in torch.
"""

from typing import Any

import torch

from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels.forms import INT8, PARTIAL_OFFSET, Form, Term, carried, choose_form, low_digit
from pipelines.kernels.operators import OneDNN, Operators, available
from pipelines.kernels.prologue import Operand, centred_operand
from pipelines.memory import give_back
from pipelines.quant.integers import PackedWeights, accumulator_bound
from pipelines.quant.layers import EXACT_FP32, epilogue

BYTE = 255
SHAPES = 2  # input shapes for which a layer keeps its weights: a batch's rest is one, and half a batch without guidance


class Prepared:
    """One layer: the packed weights that it was given, and for the last input shapes those in the operators' layout."""

    def __init__(self, weights: PackedWeights, chosen: Operators):
        plan, self.operators = weights.plan, chosen
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
        self._largest_code = BYTE if plan.inverse == "activation" else high + self.offset
        form = self._form(folded)
        self.form, self.fused = form.name, form.fused
        self.repeated, self.group = form.repeated, form.group
        self.carried = None
        convolves = plan.site.kind == "conv" and plan.site.groups == 1
        if chosen.carries and convolves and form.name in ("one", "columns"):
            self.carried = carried(folded, high + self.offset if low == 0 else self.offset)
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
        self._ones = torch.ones(self.outputs)
        self._packed: dict[tuple[int, ...], list[tuple[int, int, Any]]] = {}

    def _form(self, folded: torch.Tensor) -> Form:
        """The exact form, with as many terms as there are pairs of digits where the activation has several."""
        most = self.operators.largest_weight(self._largest_code)
        form = choose_form(folded, self.plan, most, parity=self.operators.largest_weight(BYTE) == INT8)
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

    def _terms(self, shape: torch.Size) -> list[tuple[int, int, Any]]:
        """The terms' digits, factors and weights, packed for an input shape where the operators ask for one.

        The integers are unpacked for this alone and freed. The shapes used longest ago are forgotten.
        """
        key = tuple(shape) if self.operators.by_shape else ()
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
        largest_code = BYTE if self.group else self._largest_code
        for term in terms:
            weight = term.weight.contiguous()
            made = self.operators.pack(site, weight, tuple(shape), largest_code)
            packed.append((term.digit, term.factor, made))
        self._packed[key] = packed
        give_back(weight.numel())
        return packed

    def forget(self) -> None:
        """Free the weights in the operators' layout; the next call unpacks them again."""
        self._packed.clear()

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
            last = codes.movedim(channel, -1)  # in which they lie in memory
            codes = torch.cat([last, last.index_select(-1, self.repeated)], -1).movedim(-1, channel)
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
            part = self.operators.run(self.site, operands[digit], u8_zero, packed, self._ones, None).to(torch.int32)
            total = part * factor if total is None else total + part * factor
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
            packed, scale = self._terms(u8.shape)[0][2], weight_scale * activation_scale
            y = self.operators.run(self.site, u8, u8_zero, packed, scale, self.bias)
        else:
            y = epilogue(self._sum(codes, operand).float(), torch.tensor(activation_scale), weight_scale, self.bias)
        return y if self.site.kind == "conv" else y.view(*lead, self.outputs)


def form_of(weights: PackedWeights) -> str:
    """The exact form in which this back end computes the layer where weights use all of 8 bits, every bound checked;
    see `forms`.
    """
    return Prepared(weights, OneDNN(vnni=True)).form


def prepare(weights: PackedWeights) -> Prepared:
    """Choose the form that is exact on this processor and check every bound; packing waits for the first input.
    HqdmError where there are no operators.
    """
    if not (found := available()):
        raise HqdmError(
            "this build of torch has no oneDNN int8 operators, and none could be compiled for AVX2",
            "sample with --backend reference",
        )
    return Prepared(weights, found[0])
