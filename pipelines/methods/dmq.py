"""DMQ: channel scales learned against the layer's error, weighted over timesteps; powers of two where shortcuts join.

Source: Lee et al., ICCV 2025 (arXiv 2507.12933), and LeeDongYeun/dmq. LES, learned equivalent scaling, γ of each input
channel, by Adam from 1, straight through both quantisers (ranges by maxima):

    min_γ Σ_t λ_t·‖Q(x_t/γ)·Q(γW)ᵀ − x_t·Wᵀ‖²,  λ_t = (1 − Λ_t/ΣΛ)^r,  Λ ← 0.95·Λ + 0.05·(error at t)

PTS, power-of-two scaling, of the shortcut convolutions: channel k has the step Δ·2^(−p_k), p_k ∈ {0, 1, 2, 3}. Every
row of the sample votes for the p of its least error; the mode counts where it has 85 % of the votes, otherwise p = 0.
Inputs that join h and a skip connection are divided there. Scales of activations: one for each timestep, by maxima of
all that the profile saw (theirs: a moving average of the calibration batches' maxima).

Differences: log γ is learned, which keeps γ positive, in 100 updates of rate 0.05 instead of 6,000 of 0.001, each
timestep with the range that it will have (theirs, by the --dynamic of its commands: with the range of the batch, which
mixes timesteps); the error of a k×k convolution counts its kernel's rows apart, since the sample has single image rows.
r is for 20 timesteps as there, and is taken in proportion for others. One vote holds for all timesteps (their code: for
each), so that there is one weight, and a channel whose values outside the sample are more than its p leaves room for
widens the step of all; W·2^(−p) is quantised, whereas DMQ shifts after the weight's quantiser: a column of p has 8 − p
bits. Shortcuts have 8/8 bits and no γ here, since the other methods leave them in floating point. Time projections are
quantised as in the other methods (theirs: floating point).

    published  AdaRound of the weights block by block follows, with activations as they were calibrated
    search     activation ranges by least error, which clip; γ is learned for those by maxima all the same
    scaling    weights are rounded to the nearest: what the scaling does by itself
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant
from pipelines.methods.equivalent import by_column, outputs, plan_of
from pipelines.plans import Reconstruction
from pipelines.quant.spec import Bits, Site, SitePlan

if TYPE_CHECKING:
    import torch

POWERS = (0, 1, 2, 3)
SHORTCUT = "skip"  # the role of a residual block's shortcut convolution
DECAY = 0.95  # of Λ
TIMESTEPS = 20  # that r is meant for
TOKENS = 64  # of each timestep that an update sees


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan | tuple[SitePlan, SitePlan]:
    """Learned scaling everywhere but at 8-bit layers, powers of two at shortcuts; see the module's text."""
    if site.obstacle or site.role != SHORTCUT:
        return plan_of(site, bits, measured, "asymmetric", "scales learned by the layer's error", scaling=True)
    plans = tuple(
        SitePlan(
            part, weight_quantiser="asymmetric", activation_quantiser="asymmetric", scaling=True,
            sqnr=measured.sqnrs(part, "asymmetric", 8), why="a shortcut: steps by powers of two, voted for",
        )
        for part in (site.halves() if site.joint else (site,))
    )  # fmt: skip
    return plans if site.joint else plans[0]


def constants(
    plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant
) -> "dict[str, torch.Tensor]":
    """The gain: 1/γ, or 2^p of a shortcut."""
    if not plan.scaling:
        return {}
    sample, (low, high) = measured.sample(plan.site), (measured.statistic(plan.site, end) for end in ("low", "high"))
    if plan.site.role == SHORTCUT:
        return {"gain": 2.0 ** powers(sample, low, high, plan, variant.options["share"])}
    return {"gain": 1 / learned_scale(sample, low, high, weight, plan, variant)}


def powers(
    sample: "torch.Tensor", least: "torch.Tensor", largest: "torch.Tensor", plan: SitePlan, share: float
) -> "torch.Tensor":
    """p (C,) int64 by vote; every row at every timestep has one. least, largest: as low and high of `scaled_error`."""
    import torch

    from pipelines.quant.affine import cover, dequantise, quantise

    low, high = plan.activation_range
    along = (-1, *[1] * (sample.ndim - 1))
    ends = torch.stack([least.amin(1), largest.amax(1)], 1)
    step, zero = (value.view(along) for value in cover(ends, low, high))
    errors = []
    for power in POWERS:
        back = dequantise(quantise(sample * 2**power, step, zero, low, high), step, zero) / 2**power
        error = (back - sample).square()
        errors.append(error.mean(-1) if sample.ndim == 4 else error)  # (T, rows, C)
    votes = torch.stack(errors).argmin(0).flatten(0, 1)  # (T·rows, C)
    counts = torch.stack([(votes == power).float().mean(0) for power in POWERS])  # (powers, C)
    most, winner = counts.max(0)
    return torch.where(most >= share, winner, 0)


def learned_scale(
    sample: "torch.Tensor", low: "torch.Tensor", high: "torch.Tensor", weight: "torch.Tensor", plan: SitePlan,
    variant: Variant,
) -> "torch.Tensor":  # fmt: skip
    """γ (C,) after the updates; ones where there are none. low, high: as `scaled_error` takes them, of all that the
    profile saw: by narrower ones a channel would be scaled for a range that the layer will not have.
    """
    import torch

    options, count = variant.options, len(sample)
    generator = torch.Generator().manual_seed(0)
    rows = max(1, TOKENS // (sample.shape[3] if sample.ndim == 4 else 1))
    logarithm = torch.zeros(sample.shape[2], requires_grad=True)
    optimiser = torch.optim.Adam([logarithm], lr=options["rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, options["steps"]))
    running = torch.zeros(count)
    for _ in range(options["steps"]):
        x = sample[:, torch.randint(sample.shape[1], (rows,), generator=generator)]
        with torch.enable_grad():
            difference = scaled_error(x, weight, logarithm.exp(), low, high, plan)
            by_timestep = difference.square().flatten(2).mean(2).sum(1)
            running = DECAY * running + (1 - DECAY) * by_timestep.detach()
            part = (running / running.sum().clamp(min=1e-30)).clamp(max=1 - 1e-6)
            # In logarithms, and relative to the largest: few timesteps and a large r would leave nothing to learn from.
            weights = torch.softmax(options["power"] * count / TIMESTEPS * torch.log1p(-part), 0)
            loss = (weights * by_timestep).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return logarithm.detach().exp()


def scaled_error(
    x: "torch.Tensor", weight: "torch.Tensor", scale: "torch.Tensor", low: "torch.Tensor", high: "torch.Tensor",
    plan: SitePlan,
) -> "torch.Tensor":  # fmt: skip
    """Q(x/γ)·Q(γW)ᵀ − x·Wᵀ, (T, rows, outputs[, W']), differentiable in γ (C,), relative to the outputs' size.

    x: (T, rows, C[, W]). low, high: the channels' extremes at each timestep (T, C), by which the activation's ranges
    are set, before the division.
    """
    along = (-1, 1) if x.ndim == 4 else (-1,)
    by_timestep = (-1, *[1] * (x.ndim - 1))
    small = _rounded(
        x / scale.view(along), (low / scale).amin(1).view(by_timestep), (high / scale).amax(1).view(by_timestep),
        plan.activation_bits,
    )  # fmt: skip
    rows = by_column(weight, scale).flatten(1)
    large = _rounded(rows, rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), plan.weight_bits).view(weight.shape)
    true = outputs(x.flatten(0, 1), weight, plan.site)
    difference = outputs(small.flatten(0, 1), large, plan.site) - true
    return (difference / true.square().mean().sqrt().clamp(min=1e-12)).unflatten(0, x.shape[:2])


def _rounded(x: "torch.Tensor", low: "torch.Tensor", high: "torch.Tensor", bits: int) -> "torch.Tensor":
    """x on the asymmetric grid of a range, straight through the rounding; the range has a gradient too."""
    from pipelines.quant.affine import round_through

    most = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low).clamp(min=1e-12) / most
    zero = (-low / step).round().detach()
    return ((round_through(x / step) + zero).clamp(0, most) - zero) * step


PUBLISHED = Recipe(
    updates="reconstruct",
    trains=[],
    activation_scale_by="max",
    reconstruction=Reconstruction(rounding_share=1.0, scale_share=0.0),
)
METHOD = Method(
    name="dmq",
    summary="channel scales learned by the layer's error, weighted over timesteps; powers of two at shortcuts",
    source="Lee et al., ICCV 2025 (arXiv 2507.12933); LeeDongYeun/dmq",
    variants={
        "published": Variant(
            "learned scales and voted powers of two, then learned rounding by blocks",
            PUBLISHED,
        ),
        "search": Variant(
            "the same with activation ranges by least error", replace(PUBLISHED, activation_scale_by="error")
        ),
        "scaling": Variant(
            "`published`, weights rounded to the nearest", Recipe(updates="none", trains=[], activation_scale_by="max")
        ),
    },
    default_variant="published",
    options={
        "steps": Option(100, "updates of a layer's scales (published: 6000 at rate 0.001)", least=0),
        "rate": Option(0.05, "of Adam on log γ; a cosine to 0", above=0),
        "power": Option(20.0, "r, how little timesteps of large error count (published: 20 or 25)", least=0),
        "share": Option(0.85, "of the votes that a power of two needs", above=0, most=1),
    },
    decide=decide,
    constants=constants,
)
