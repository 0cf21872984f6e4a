"""RTN, the floor: weights and activations rounded to the nearest, nothing trained, scaled or rotated.

    y ≈ Q(x)·Q(W)ᵀ + b,   Q(v) = s·(clamp(⌊v/s⌉ + z, 0, 2^b − 1) − z)
    max:  s = (h − l)/(2^b − 1),  z = −⌊l/s⌉   with l = min(min v, 0), h = max(max v, 0): 0 has a code of its own

One static activation scale and zero-point for all timesteps, by tensor; weights per output channel, asymmetric. There
is no paper: it is what every other paper calls naive or min-max quantisation. The frame (8-bit and floating-point
layers) is the other methods'.

    max     ranges cover all that the profile saw (activations) and the row (weights): nothing of it is clipped
    search  ranges with the least squared error (activations) and least L2.4 error (weights) on the same
"""

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import plan_of
from pipelines.quant.spec import QUANTISERS, Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Rounding alone; see the module's text."""
    return plan_of(site, bits, measured, variant.options["quantiser"], "rounded to the nearest")


METHOD = Method(
    name="rtn",
    summary="round to nearest: static ranges, nothing trained, moved or rotated (the floor)",
    source="min-max quantisation, as every paper's naive baseline",
    variants={
        "max": Variant(
            "ranges that cover what was seen",
            Recipe(updates="none", trains=[], activation_scale_by="max", weight_scale_by="max"),
        ),
        "search": Variant("ranges by least error", Recipe(updates="none", trains=[])),
    },
    default_variant="max",
    options={"quantiser": Option("asymmetric", "of activations", QUANTISERS)},
    decide=decide,
    groups=one_for_all,
)
