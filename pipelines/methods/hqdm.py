"""HQ-DM: the Single Hadamard transform, x̃ = xH quantised, the weight quantised unrotated, H folded into its integers.

With H of entries ±1 in blocks of the order n, so that H·Hᵀ = n·I, and Q_t symmetric at its timestep's scale:

    y ≈ Q_t(x·H)·(Q(W₀ + BA)·H/n)ᵀ + b              single, along the channels (equations 11, 14 and 15)
    y ≈ (Q_t(x·H)·Hᵀ/n) ⊛ Q(W₀ + BA) + b            a convolution along its width (16 to 18)
    min Σ_t ‖ε̂(x_t, t) − ε(x_t, t)‖²                over A, B and the scales, on the teacher's x_t (12)

Q(W)·H is of integers, and 1/n joins the scales: no value is rounded twice.

Source: Mao et al., "HQ-DM" (equations 11–18) and msz12345/HQ-DM; paper and code differ, so both are variants.

    paper   linears along the channels, convolutions along the width (undone on the activation's side, equation 18),
            order 32, learned weight factors per timestep; symmetric activations.
    code    convolutions along the channels, order 32, none where 32 does not divide them; linears of rank-2 inputs
            alone.
    ours    every site along its channels, at every rank; order, ±1 signs before it and the activation quantiser are the
            measured best of each site; shortcut and downsampling convolutions are quantised too, at 8 bits.
    tuned   `code` with the recipe of `auto`, which tells what that gives from what the placement gives.
    auto    the placement of each site that costs its output least (`methods/auto.py`), rates that were tried, and
            guidance by its signal at each timestep (`quant/guidance.py`).

Where the width is no multiple of 32 the paper's identity would leave most of a small model unrotated, so `paper` takes
the largest power of two up to 32 that divides it. A weight factor per timestep multiplies the epilogue and leaves the
integers alone; the paper's formula would need other integers at every timestep. It starts at 1 and learns at the rate
of activation scales, since the code's 1e-6 is for scales and would leave a factor where it is.

`code` and `paper` rotate no 8-bit layer: the time embedding, first and last convolution are exempt in the code (its
`special_module_count_list`), where the paper's text has H = I only for fewer channels than the order. Activation
scales start by least error at each timestep, where the code starts all timesteps from one δ out of a file, whose writer
is not in its repository (the trainer's quantiser is set to `max`, and finds nothing itself);
`--set recipe.activation_scale_from=trajectory` starts from one, by least error too. Scales do not decay, as they do
there (`distillation/rates.py`), and 8-bit layers train as all others do, which they do not there.
"""

from typing import TYPE_CHECKING

from pipelines.methods import auto
from pipelines.methods.base import (
    EIGHT_BIT_ROLES,
    FLOAT_ROLES,
    NOT_AS_ASKED,
    TUNED,
    Measured,
    Method,
    Option,
    Recipe,
    Variant,
    enough_db,
    left_in_float,
)  # fmt: skip
from pipelines.quant.spec import IDENTITY, ORDERS, QUANTISERS, Bits, Site, SitePlan, Transform, largest_block

if TYPE_CHECKING:
    import torch

ORDER = 32  # k = 5, the best of the paper's table 4
# What decides a site's placement: the published rule, the profile's SQNR of its input, or its output's error.
RULE, INPUT, OUTPUT = "rule", "input", "output"
CODE = {"placement": RULE, "axis": "channels", "ranks": (2,)}


def _inverse(transform: Transform) -> str:
    return {"none": "none", "channels": "single", "width": "activation"}[transform.axis]


def _published(site: Site, variant: Variant) -> Transform:
    """The transform of the `paper` and `code` variants."""
    if site.role in EIGHT_BIT_ROLES:
        return IDENTITY
    if site.kind == "conv" and variant.options["axis"] == "width":
        order = largest_block(site.positions[1], variant.options["order"])
        return Transform("width", order) if order > 1 else IDENTITY
    if site.kind == "linear" and site.rank not in variant.options["ranks"]:
        return IDENTITY
    whole = Transform("channels", variant.options["order"])
    return whole if site.admits(whole) else IDENTITY


def _best(site: Site, activation: int, measured: Measured, enough: float) -> tuple[Transform, str]:
    """The transform and activation quantiser with the highest measured SQNR; the identity where it is `enough` dB: a
    rotation that goes to the weight's side costs 8 bits a second int8 digit.
    """
    plain = max(QUANTISERS, key=lambda quantiser: measured.sqnr(site, IDENTITY, quantiser, activation))
    if measured.sqnr(site, IDENTITY, plain, activation) >= enough:
        return IDENTITY, plain
    pairs = [
        (transform, quantiser)
        for transform in measured.transforms(site)
        if transform.axis != "width"
        for quantiser in QUANTISERS
    ]
    return max(pairs, key=lambda pair: measured.sqnr(site, *pair, activation))


def constants(plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant) -> dict:
    """Of `auto` alone."""
    return auto.constants(plan, weight, measured, variant)


def allocate(plans: list[SitePlan], bits: Bits, measured: Measured, variant: Variant) -> list[SitePlan]:
    """Weight widths within a budget, of `auto` alone; the other variants keep the plans as they are."""
    return auto.allocate(plans, bits, measured, variant) if variant.options["placement"] == OUTPUT else plans


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """The plan of one site; see the module's text for the variants."""
    if site.obstacle:
        return left_in_float(site, site.obstacle)
    if variant.options["placement"] == OUTPUT:
        return auto.decide(site, bits, measured, variant)
    search = variant.options["placement"] == INPUT
    if site.role in FLOAT_ROLES and not search:
        return left_in_float(site, f"{site.role} convolutions stay in floating point (HQ-DM's code)")
    eight = site.role in NOT_AS_ASKED
    weight, activation = (8, 8) if eight else (bits.weight, bits.activation)
    if search:
        transform, quantiser = _best(site, activation, measured, enough_db(bits))
    else:
        transform, quantiser = _published(site, variant), "symmetric"
    plain, chosen = (measured.sqnr(site, candidate, quantiser, activation) for candidate in (IDENTITY, transform))
    if search and transform.is_identity:
        reason = "enough" if plain >= enough_db(bits) else "the best measured"
        why = f"{plain:.1f} dB unrotated at {activation} bits ({quantiser}), {reason}"
    elif search:
        why = f"the best measured: {chosen:.1f} dB at {activation} bits ({quantiser}), {plain:.1f} unrotated"
    else:
        why = f"{transform.name}: {chosen:.1f} dB at {activation} bits, {plain:.1f} unrotated"
    return SitePlan(
        site, True, transform, _inverse(transform), weight, activation,
        # A zero-point widens an 8-bit weight past int8 and buys nothing there.
        weight_quantiser="symmetric" if search and weight == 8 else "asymmetric",
        activation_quantiser=quantiser, why=why, sqnr=measured.sqnrs(site, quantiser, activation),
    )  # fmt: skip


METHOD = Method(
    name="hqdm",
    summary="Single Hadamard: activations rotated, weights quantised unrotated, the rotation folded into integers",
    source="Mao et al., HQ-DM; msz12345/HQ-DM",
    variants={
        "ours": Variant(
            "channels at every rank; order, signs and activation quantiser by measured SQNR",
            Recipe(base_weight="float"),
            {"placement": INPUT},
        ),
        "paper": Variant(
            "as printed: convolutions along the width, weight factors per timestep",
            Recipe(momentum="shared", weight_factors=True),
            {"placement": RULE, "axis": "width", "ranks": (2, 3, 4)},
        ),
        "auto": Variant(
            "every site's transform, signs, inverse, centring and gains by its output's error; guidance by its signal",
            TUNED,
            {"placement": OUTPUT},
            by_width=True,
        ),
        "code": Variant(
            "as published: channels of order 32, linears of rank 2 alone",
            Recipe(momentum="shared"),
            CODE,
        ),
        "tuned": Variant("`code` with the recipe of `auto`", TUNED, CODE, by_width=True),
    },
    default_variant="ours",
    options={"order": Option(ORDER, "Hadamard order (table 4: k = 3 … 6)", ORDERS, ("paper", "code", "tuned"))}
    | auto.OPTIONS,
    decide=decide,
    constants=constants,
    allocate=allocate,
)
