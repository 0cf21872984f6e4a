"""How an integer V that may exceed int8 is multiplied with int8 operators, exactly. Pure integer algebra, no operators.

A *form* rewrites Σ q·V as a sum of products m·Σ q'·V' with q' and V' in 8 bits:

    one       V fits int8: q' = q, V' = V.
    columns   |V| ≤ 254: the input channels that hold |V| > 127 are given twice, V split over the two. One product.
    parity    inside one Hadamard block all entries of a row of V = W_int·M have one parity, so V = 2Z + P with P in
    {0, 1}
              constant per (output, block, kernel position). q' = [2q | partial sums of q over the block],
              V' = [Z | P, …]. One product, wider by a small share. Symmetric activations only.
    digits    V = V₀ + 128·V₁, and where q itself exceeds 8 bits (a transform undone on the activation) q = q₀ + 128·q₁:
              one product for every pair of digits.

The choice is made per layer from the integers themselves (`one` or `digits` where a convolution has groups). Forms with
one product keep the fused epilogue. Where an operator adds two products in 16 bits before it goes on in 32, V' has to
stay below a bound less than 127 beside large codes: columns are given twice and digits are taken from there on, and
parity, whose bytes use all of 8 bits, is left alone.

Codes are stored as bytes u = q + z. Operators that subtract z themselves sum up the weights for it in every call, which
took three quarters of a convolution of 960 channels at 8×8. `Carried` channels do it in the product: beside u they hold
the constant z, and V' holds −ΣV at each place of the kernel, so that Σ u·V − z·ΣV = Σ q·V, at the border too.
"""

from dataclasses import dataclass

import torch

from pipelines.quant.spec import SitePlan

INT8 = 127  # −128 is left alone: its negation does not fit
PARTIAL_OFFSET = 128  # codes that use all of [−127, 127] are stored as u8 with this zero-point


@dataclass(frozen=True)
class Term:
    """One int8 product: `weight` (out, in', …) int8, of activation digit `digit`, times `factor` in the sum."""

    weight: torch.Tensor
    digit: int = 0
    factor: int = 1


@dataclass(frozen=True)
class Form:
    """The rewriting of one layer. `repeated` are the channels given twice (columns); `group` the width of a partial
    sum.
    """

    name: str
    terms: tuple[Term, ...]
    repeated: torch.Tensor | None = None
    group: int = 0

    @property
    def fused(self) -> bool:
        return len(self.terms) == 1


CARRY = 16  # the second and later carried channels hold z times this, where a byte holds that
GROUP = 4  # channels that one instruction takes


@dataclass(frozen=True)
class Carried:
    """Constant channels that take a zero-point out of a sum: `count` of them hold z, then z·unit each; the rest 0."""

    count: int
    unit: int

    @property
    def width(self) -> int:
        return -(-self.count // GROUP) * GROUP

    def values(self, zero: int) -> tuple[int, ...]:
        """What the channels hold."""
        used = (zero, *[zero * self.unit] * (self.count - 1))
        return (*used, *[0] * (self.width - self.count))

    def weights(self, folded: torch.Tensor) -> torch.Tensor:
        """Their part of V', (out, width, kh, kw) int8, with Σ values·weights = −z·ΣV. folded: V (out, in, kh, kw)."""
        left = -folded.sum(1, dtype=torch.int32)
        result = folded.new_zeros((len(folded), self.width, *folded.shape[2:]), dtype=torch.int8)
        half = self.unit // 2
        first = (left + half) % self.unit - half if self.unit > 1 else left.clamp(-INT8, INT8)
        left = (left - first) // self.unit
        result[:, 0] = first
        for place in range(1, self.count):
            result[:, place] = left.clamp(-INT8, INT8)
            left = left - result[:, place]
        return result


def carried(folded: torch.Tensor, most: int) -> Carried | None:
    """The channels that carry zero-points up to `most` for V (out, in, kh, kw); None where it would take too many."""
    largest = int(folded.sum(1, dtype=torch.int32).abs().max())
    if most * CARRY <= 255:
        found = Carried(1 + -(-(largest + CARRY) // (CARRY * INT8)), CARRY)
    else:
        found = Carried(max(1, -(-largest // INT8)), 1)
    return found if found.width <= max(GROUP, folded.shape[1] // 16) else None


def low_digit(values: torch.Tensor) -> torch.Tensor:
    """v₀ in [−64, 63] with v = v₀ + 128·v₁; works on integer-valued floats and on integers."""
    return (values + 64) % 128 - 64


def weight_digits(folded: torch.Tensor, most: int = INT8) -> list[torch.Tensor]:
    """V = Σ 128^i · V_i, as int8 of magnitudes up to `most`, which is 64 or more."""
    values, digits = folded.to(torch.int32), []
    while True:
        if int(values.abs().max()) <= most:
            return [*digits, values.to(torch.int8)]
        low = low_digit(values)
        digits.append(low.to(torch.int8))
        values = (values - low) // 128


def choose_form(folded: torch.Tensor, plan: SitePlan, most: int = INT8, parity: bool = True) -> Form:
    """The cheapest exact form of a layer. folded: V (out, in, …), int16 or int32. most: what |V'| may be, 64 to 127;
    parity: whether it may be INT8 beside bytes that use all of 8 bits.
    """
    largest = max(map(abs, (int(value) for value in folded.aminmax())))
    if plan.inverse == "activation":
        return _digits_form(folded, most)
    if largest <= most:
        return Form("one", (Term(folded.to(torch.int8)),))
    if largest <= 2 * most and plan.site.groups == 1:
        inputs = folded.movedim(1, 0).abs().flatten(1).amax(1)  # (in,)
        wide = (inputs > most).nonzero().flatten()
        group = partial_sum_width(plan) if parity else 0
        parity_cost = folded.shape[1] // group if group else folded.shape[1]
        if len(wide) <= parity_cost:
            first = folded.clamp(-most, most)
            both = torch.cat([first, (folded - first).index_select(1, wide)], 1)
            return Form("columns", (Term(both.to(torch.int8)),), repeated=wide)
        if group:
            odd = folded & 1
            halves = (folded - odd) // 2
            first_of_block = odd[:, :: plan.transform.order]
            sums = first_of_block.repeat_interleave(plan.transform.order // group, 1)
            return Form("parity", (Term(torch.cat([halves, sums], 1).to(torch.int8)),), group=group)
    return _digits_form(folded, most)


def partial_sum_width(plan: SitePlan) -> int:
    """How many codes a partial sum of the parity form may add and stay within int8; 0 where the form does not apply."""
    _, top = plan.activation_range
    if plan.inverse != "single" or plan.activation_quantiser != "symmetric" or 2 * top > INT8:
        return 0
    group = plan.transform.order
    while group * top > INT8:
        group //= 2
    return group


def _digits_form(folded: torch.Tensor, most: int) -> Form:
    return Form("digits", tuple(Term(weight, 0, 128**i) for i, weight in enumerate(weight_digits(folded, most))))
