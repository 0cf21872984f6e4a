"""QuEST: of the weights only those train that low bits hurt: time embedding, attention and feed-forward layers.

The student follows its teacher's ε along teacher trajectories: weights and biases of the chosen layers learn, and every
activation scale does; all other weights stay rounded to the nearest. Timesteps in `groups` equal spans share scales,
where there are more of them than spans; on 20 timesteps or fewer each has its own.

    y ≈ Q_g(x)·Q(W)ᵀ + b,   min Σ_t ‖ε̂(x_t, t) − ε(x_t, t)‖²   over W and b of the chosen layers and all s_g

Source: Wang et al., "QuEST", ICCV 2025 (arXiv 2402.03666), and hatchetProject/QuEST. From the code: Adam at 1e-5 for
weights and biases, 1e-4 for activation scales, 20 groups of 10 timesteps; layers by name, not by a computed
sensitivity. Otherwise than in the code: one stage with the loss on the guided ε for all chosen layers, as the other
trained methods here have it, at rates that fall to 0 (there the time projections learn first, activation scales too at
1e-5, with their own outputs as a further target, and the loss is on the conditional and the unconditional ε as they
are, at constant rates); chosen layers without a bias get one; the weights start from the error search (there from
AdaRound); a span's scales hold for its timesteps and are not looked up by a fixed count; per-tensor activations at
every width (there per channel at 4 bits, which no integer product can use), asymmetric by least error (there symmetric
by range in its commands for LDM-4). All attention and time layers train (there, on ImageNet, to_q, self-attention's
to_k and to_v and the time projections, but no output projection, cross-attention's keys and values or time embedding).
Feed-forward layers are those of transformer blocks; in a network without any, attention and time layers are all that
trains. First, last and time layers at 8 bits, shortcut and downsampling convolutions in floating point: as for the
other methods here.
"""

from dataclasses import replace

from pipelines.methods.base import TUNED, Measured, Method, Option, Recipe, Variant
from pipelines.methods.equivalent import plan_of
from pipelines.quant.spec import Bits, Site, SitePlan

TIME = ("time", "time-projection", "modulation")  # what a transformer modulates its blocks by is its time projection
SENSITIVE = ("attention", "feed-forward")


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; the reason says whether the weight trains."""
    words = f"{site.role} weight trains" if site.role in variant.recipe.roles else f"{site.role} weight stays"
    return plan_of(site, bits, measured, "asymmetric", words)


def groups(measured: Measured, variant: Variant) -> list[int]:
    """Equal spans of the timesteps in sampling order; each its own where there are no more than groups."""
    count, most = len(measured.timesteps), variant.options["groups"]
    return [] if count <= most else [index * most // count for index in range(count)]


METHOD = Method(
    name="quest",
    summary="selective fine-tuning: time embedding, attention and feed-forward weights, and all activation scales",
    source="Wang et al., ICCV 2025 (arXiv 2402.03666); hatchetProject/QuEST",
    variants={
        "published": Variant(
            "one stage, the loss on ε",
            Recipe(
                trains=["weights", "biases", "activation_scales"],
                roles=[*TIME, *SENSITIVE],
                weight_rate=1e-5,
                bias_rate=1e-5,
                activation_scale_rate=1e-4,
            ),
        ),
        "tuned": Variant(
            "the same with what else `hqdm --variant auto` does, at rates for hundreds of updates",
            replace(
                TUNED,
                trains=["weights", "biases", "activation_scales"],
                roles=[*TIME, *SENSITIVE],
                weight_rate=1e-4,
            ),
            by_width=True,
        ),
    },
    default_variant="published",
    options={"groups": Option(20, "spans of timesteps that share activation scales; 1: static", least=1)},
    decide=decide,
    groups=groups,
)
