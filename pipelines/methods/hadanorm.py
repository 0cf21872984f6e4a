"""HadaNorm: channels are centred and scaled alike, then rotated; what the centre contributes stays in floating point.

Source: Federici et al., 2025 (arXiv 2506.09932), of diffusion transformers' linears; no public code:

    Y·W + b = [(Y − 1μᵀ)·S⁻¹·H]·[Hᵀ·S·W] + 1·(μᵀW) + b

Both brackets are quantised. μ is dynamic, each image's mean over its tokens, and S static. The last product is with the
weight as it is quantised, μᵀ·S⁻¹·H·Q(Hᵀ·S·W), since an integer model has no W beside it for a μ that only sampling
tells; a static one meets W itself, once, when the plan is made. Where an image has one token, as the context of a
class-conditional LDM has, that token is its own mean, nothing is left in the first bracket, and its activation is not
rounded at all. Mixing channels makes them Gaussian only where they share mean and scale, hence the two.

The paper as far as it could be read does not give S, the granularity of activations or its blocks. Here S_j =
σ_j^α·(max|W_j|)^(α−1) with σ_j the deviation from each image's own mean in the profile's sample (α = 1: equal scales),
H has the widest blocks that divide the channels (64 at most), the activation is symmetric by tensor with one static
scale, the weight asymmetric per output channel; ranges are those of least error. Nothing is trained.

Linears whose input has no tokens take their channels' means over the profile, a constant. Convolutions are beyond the
paper: `plain` rounds them to the nearest as `rtn --variant search` does; `rotated` gives them a static centre, S and H
along their channels.
"""

from typing import TYPE_CHECKING

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import columns_max, plan_of, widest
from pipelines.quant.spec import ORDERS, Bits, Site, SitePlan

if TYPE_CHECKING:
    import torch


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Centre, scale and rotate linears; see the module's text."""
    options = variant.options
    if site.kind == "conv" and options["convolutions"] == "plain":
        return plan_of(site, bits, measured, "asymmetric", "a convolution, rounded to the nearest")
    centring = "dynamic" if site.kind == "linear" and site.rank >= 3 else "static"
    transform = widest(site, options["order"])
    placement = {"centring": centring, "scaling": True} | ({} if transform.is_identity else {"inverse": "double"})
    words = f"{centring} centre, scaled, {'no block fits' if transform.is_identity else transform.name}"
    return plan_of(site, bits, measured, "symmetric", words, transform, **placement)


def constants(
    plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant
) -> "dict[str, torch.Tensor]":
    """gain 1/S, and the centre where it is static."""
    import torch

    if not plan.scaling:
        return {}
    mine = {} if plan.centring == "dynamic" else {"centre": measured.statistic(plan.site, "mean").mean(0)}
    deviation = measured.moved(plan, mine).movedim(2, -1).square().flatten(0, -2).mean(0).sqrt()
    alpha = variant.options["alpha"]
    least = 1e-5 * deviation.max().clamp(min=1e-12)  # a channel that hardly moves would be blown up to noise
    scale = deviation.clamp(min=least) ** alpha * columns_max(weight).clamp(min=1e-5) ** (alpha - 1)
    return mine | {"gain": torch.where(deviation > 0, 1 / scale, torch.ones_like(scale))}


METHOD = Method(
    name="hadanorm",
    summary="linears centred by each image's own mean, scaled and rotated before they are quantised; nothing trained",
    source="Federici et al., ES-FoMo 2025 (arXiv 2506.09932)",
    variants={
        "published": Variant(
            "dynamic centre, static scale and double Hadamard of linears", Recipe(updates="none", trains=[])
        )
    },
    default_variant="published",
    options={
        "alpha": Option(0.5, "of S: 1 gives all channels one deviation, less spares the weight", least=0, most=1),
        "order": Option(64, "largest Hadamard block", ORDERS),
        "convolutions": Option("plain", "plain, or as linears with a static centre", ("plain", "rotated")),
    },
    decide=decide,
    constants=constants,
    groups=one_for_all,
)
