"""MPQ-DM: weights of different widths by output channel, the heavy-tailed ones wider, at the same mean width.

Channels are smoothed first, x/s and W·s with s = √(max|x|/max|w|) (SmoothQuant, α = 0.5). Of each output's smoothed
weights the kurtosis is taken: the k largest get a wider quantiser, and as many of the smallest a narrower one as keep
the layer's mean width. k, from none to all that can be paid for, has the least error of the layer's output on samples
of its input, which is not quantised in this search. Then the student is distilled as EfficientDM's (adapters, scales
and zero-points, one activation scale per timestep), but on the float weight:

    y ≈ Q_t(x/s)·Q_{b(j)}((W + BA)·s)ᵀ + b,   κ_j = mean((W_j·s − μ_j)⁴)/σ_j⁴ orders the outputs j,   Σ_j b(j) ≤ N·J
    min_k ‖x/s·(Q_{b(k)}(W·s) − W·s)ᵀ‖²,   then   min Σ_t ‖ε̂ − ε‖² + λ·KL(softmax F̄ᵀF̄ ‖ softmax F̂ᵀF̂)

Source: Feng et al., "MPQ-DM", AAAI 2025 (arXiv 2412.11549), and cantbebetter2/MPQ-DM. There k channels get N + 1 bits
and k get N − 1, with k of 0 or a tenth. Integers here have 2, 3, 4 or 8 bits: at N = 3 that is 4 and 2; at N = 4 one
output of 8 bits is paid for by four of 3; at N = 2 there is no narrower width and at N = 8 no wider one, so that all
outputs have as many (there 1 and 3, 7 and 9). The search for k has weight ranges by least L2.4 error, as the student
has them (there by maxima); activation ranges are those of least squared error (there of |error|^2.4). There every place
of a kernel has a B of its own, r of rank for each; here one B serves all places, as EfficientDM's, which is a ninth of
the parameters of a 3×3 kernel's. As in its code adapters learn at a share of the smoothed weight's scale, which on the
CIFAR-10 teacher is about 5 times the weight's (`Recipe.step`), but of its mean alone: there 0.01 is added to the mean,
the placeholders of each output in the quantisers of the other two widths. In `tuned` they learn at a share of the
weight's own, as with all who share that recipe. Weight zero-points stay (there they learn at 1e-6), and scales do not
decay (`distillation/rates.py`). Relations are of at most 1,024 positions, which larger features are averaged to.
Time-smoothed relation distillation (TRD) is `Recipe.relation`: similarities between positions of the last block's
features, mean of two consecutive steps, are held to the teacher's by KL divergence. In the public code its features are
detached and it has no gradient; here it has one, and the code's weight of 100 against the squared error's sum. Where
`tuned` divides that by its mean, the relations are divided by the same.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.errors import UsageError
from pipelines.methods.base import TUNED, Measured, Method, Option, Recipe, Variant
from pipelines.methods.equivalent import by_column, columns_max, few, outputs, plan_of
from pipelines.methods.smoothquant import smoothing
from pipelines.quant.spec import Bits, Site, SitePlan, integer_range

if TYPE_CHECKING:
    import torch

LADDER = {3: (4, 2, 1), 4: (8, 3, 4)}  # bits: the wider width, the narrower, and how many of these pay for one of those
SHARES = 10  # of the outputs that could be wider: how finely k is searched
TOKENS = 256  # of a layer's input, for the search
STEPS = 16  # of the search for a row's scale while k is searched


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Smoothing everywhere but at 8-bit layers, and widths of their own where integers can be narrower."""
    mixed = bits.weight in LADDER and variant.options["mixed"]
    words = f"smoothed, outputs {bits.weight} bits in the mean" if mixed else "smoothed"
    plan = plan_of(site, bits, measured, "asymmetric", words, scaling=True, mixed=mixed)
    widest = LADDER[bits.weight][0] if plan.quantised and plan.mixed else plan.weight_bits
    return replace(plan, weight_bits=widest)


def kurtosis(rows: "torch.Tensor") -> "torch.Tensor":
    """E[(w − μ)⁴]/σ⁴ of each row (n, m): (n,)."""
    centred = rows - rows.mean(1, keepdim=True)
    return (centred**4).mean(1) / centred.square().mean(1).square().clamp(min=1e-30)


def row_bits(weight: "torch.Tensor", x: "torch.Tensor", site: Site, bits: int) -> "torch.Tensor":
    """The width of each output (out,) uint8 of a smoothed weight (out, C, …), whose mean is `bits` at the most.

    x: some of the smoothed input, (rows, C, W) or (rows, C).
    """
    import torch

    from pipelines.quant.affine import choose, dequantise, quantise

    wide, narrow, price = LADDER[bits]
    rows = weight.flatten(1)
    errors = {}
    for width in (narrow, bits, wide):
        low, high = integer_range(width, False)
        scale, zero = (value[:, None] for value in choose(rows, low, high, STEPS))
        difference = dequantise(quantise(rows, scale, zero, low, high), scale, zero) - rows
        noise = outputs(x, difference.view(weight.shape), site).square()  # (…, out) or (rows, out·kh, W')
        by_output = noise.sum((0, 2)) if noise.ndim == 3 else noise.sum(0)
        errors[width] = by_output.view(len(rows), -1).sum(1)
    order = kurtosis(rows).argsort(descending=True, stable=True)
    most = len(rows) // (1 + price)
    best, result = float("inf"), None
    for count in sorted({round(most * share / SHARES) for share in range(SHARES + 1)}):
        widths = torch.full((len(rows),), bits, dtype=torch.uint8)
        widths[order[:count]] = wide
        widths[order[len(rows) - price * count :]] = narrow
        error = sum(values[widths == width].sum().item() for width, values in errors.items())
        if error < best:
            best, result = error, widths
    return result


def constants(
    plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant
) -> "dict[str, torch.Tensor]":
    """The gain 1/s, and the width of each output."""
    if not plan.scaling:
        return {}
    gain = smoothing(measured.statistic(plan.site, "absmax").amax(0), columns_max(weight), 0.5)
    if not plan.mixed:
        return {"gain": gain}
    x = few(measured.sample(plan.site), TOKENS)
    x = x * (gain[:, None] if x.ndim == 3 else gain)
    bits = next((bits for bits, (wide, *_) in LADDER.items() if wide == plan.weight_bits), None)
    if bits is None:
        raise UsageError(
            f"site {plan.site.name}: outputs of mixed widths cannot have {plan.weight_bits} bits at most",
            f"weight_bits: {' or '.join(str(wide) for wide, *_ in LADDER.values())}, or mixed: false",
        )
    return {"gain": gain, "row_bits": row_bits(by_column(weight, 1 / gain), x, plan.site, bits)}


METHOD = Method(
    name="mpq_dm",
    summary="smoothed channels, weight widths by output from their kurtosis at the same mean, distilled",
    source="Feng et al., AAAI 2025 (arXiv 2412.11549); cantbebetter2/MPQ-DM",
    variants={
        "published": Variant(
            "with relation distillation",
            Recipe(base_weight="float", momentum="shared", step="quantiser", relation=100.0),
        ),
        "tuned": Variant(
            "the same with the recipe of `hqdm --variant auto`, in the sampler's order, which relations need",
            replace(TUNED, relation=100.0, order="trajectory"),
            by_width=True,
        ),
    },
    default_variant="published",
    options={"mixed": Option(True, "widths by output; false: all outputs as asked")},
    decide=decide,
    constants=constants,
)
