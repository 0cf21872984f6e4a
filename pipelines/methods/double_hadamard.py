"""Double Hadamard: activation and weight are both rotated before their quantisers, y ≈ Q(xH)·Q(W·H)ᵀ, HHᵀ = I.

Sources: QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456; spcl/QuaRot); Xi et al., NeurIPS 2023 (arXiv
2306.11987); HQ-DM (Mao et al.), which names the pair so and compares with it.

    quarot     post-training: the widest block that divides the channels (64 at most), every rank and convolutions,
               symmetric weights and activations of ±(2^(b−1) − 1) (QuaRot's codes begin one lower), ranges by least
               error, no signs. QuaRot's scales are those of each token and know no timesteps; here one static scale a
               tensor stands for them. A UNet's norms work on fixed groups of channels, so that no rotation can be
               carried along its residual stream: all are made before quantisers, as QuaRot's online ones are, which
               have no signs either. Its table of orders that are no powers of two is not used: blocks divide what it
               divides. GPTQ is not part of it here; its weights can be rounded to the nearest too (--w_rtn).
    distilled  HQ-DM's comparison: all as in `hqdm --variant code`, recipe and placement, with the weight rotated
               before its quantiser instead of after it. Adapters stay outside the rotation and learn as fast as
               there: the step that their rate is a share of counts in the weight's own coordinates. Nothing else is
               published about it.

Xi et al. train at blocks of 32 with LSQ's steps: `distilled` has blocks of 32 and learned scales, but adapters.
"""

from dataclasses import replace

from pipelines.methods import hqdm
from pipelines.methods.base import TUNED, Measured, Method, Option, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import plan_of, widest
from pipelines.quant.spec import ORDERS, Bits, Site, SitePlan

WIDEST = "widest"  # placement of `quarot`; the others have HQ-DM's rule


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Rotations on both sides; see the module's text for the variants."""
    if variant.options["placement"] == hqdm.RULE:
        plan = hqdm.decide(site, bits, measured, variant)
        return plan if plan.transform.is_identity else replace(plan, inverse="double", why=f"double {plan.why}")
    transform = widest(site, variant.options["order"])
    words = "no block divides its channels" if transform.is_identity else f"double {transform.name}"
    placement = {} if transform.is_identity else {"inverse": "double"}
    return plan_of(site, bits, measured, "symmetric", words, transform, "symmetric", **placement)


def groups(measured: Measured, variant: Variant) -> list[int]:
    """Timesteps share a scale, but for `distilled`, which learns one for each."""
    return [] if variant.options["placement"] == hqdm.RULE else one_for_all(measured, variant)


METHOD = Method(
    name="double_hadamard",
    summary="activations and weights both rotated before they are quantised (QuaRot; HQ-DM's comparison)",
    source="Ashkboos et al., NeurIPS 2024 (arXiv 2404.00456); Xi et al., NeurIPS 2023; Mao et al., HQ-DM",
    variants={
        "quarot": Variant(
            "post-training, the widest block, nothing trained",
            Recipe(updates="none", trains=[]),
            {"placement": WIDEST},
        ),
        "distilled": Variant(
            "HQ-DM's code with the weight rotated before its quantiser",
            Recipe(momentum="shared"),
            hqdm.CODE | {"order": hqdm.ORDER},
        ),
        "tuned": Variant(
            "`distilled` with the recipe of `hqdm --variant auto`",
            TUNED,
            hqdm.CODE | {"order": hqdm.ORDER},
            by_width=True,
        ),
    },
    default_variant="quarot",
    options={"order": Option(64, "largest Hadamard block; distilled and tuned start from 32", ORDERS)},
    decide=decide,
    groups=groups,
)
