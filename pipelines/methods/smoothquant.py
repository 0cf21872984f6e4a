"""SmoothQuant: each input channel is divided by s before the activation's quantiser, the weight multiplied with it.

Source: Xiao et al., ICML 2023 (arXiv 2211.10438), and mit-han-lab/smoothquant:

    Y = (X·diag(s)⁻¹)·(diag(s)·Wᵀ),   s_j = max|X_j|^α / max|W_j|^(1−α), at least 1e-5

with maxima over all that the profile saw, at all timesteps. Nothing is trained.

It is a method of language models. Here s is a gain of the layer's own input instead of a factor of the norm before it,
so that convolutions and layers that follow no norm are smoothed too, each by itself and not together with those that
share its input. The paper's activations are symmetric, which --set quantiser=symmetric gives; the default is asymmetric
as in the baselines, since inputs after SiLU are lopsided. Activation scales are static and cover all that the profile
saw (its O3); weights are asymmetric per output channel (there symmetric, by their largest value) with ranges by least
L2.4 error, as in the other methods. The paper's width is 8 bits, on language models; at few bits a range that covers
everything costs more than what it saves, so that variant `search` takes the activation ranges of least squared error.
"""

from typing import TYPE_CHECKING

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import columns_max, plan_of
from pipelines.quant.spec import QUANTISERS, Bits, Site, SitePlan

if TYPE_CHECKING:
    import torch

LEAST = 1e-5  # of s, and of a column's maximum (public code)


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Scaling everywhere but at 8-bit layers; see the module's text."""
    words = f"smoothed with α = {variant.options['alpha']:g}"
    return plan_of(site, bits, measured, variant.options["quantiser"], words, scaling=True)


def smoothing(activation: "torch.Tensor", column: "torch.Tensor", alpha: float) -> "torch.Tensor":
    """1/s (C,) of channels' maxima |x| and of columns' maxima |w|; 1 where a channel is always zero."""
    import torch

    factor = (activation**alpha / column.clamp(min=LEAST) ** (1 - alpha)).clamp(min=LEAST)
    return torch.where(activation > 0, 1 / factor, torch.ones_like(factor))


def constants(
    plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant
) -> "dict[str, torch.Tensor]":
    """The gain 1/s."""
    if not plan.scaling:
        return {}
    activation = measured.statistic(plan.site, "absmax").amax(0)
    return {"gain": smoothing(activation, columns_max(weight), variant.options["alpha"])}


METHOD = Method(
    name="smoothquant",
    summary="channels divided by √(max|x|/max|w|) before quantising, weights multiplied; static, nothing trained",
    source="Xiao et al., ICML 2023 (arXiv 2211.10438); mit-han-lab/smoothquant",
    variants={
        "published": Variant(
            "its formula on every layer's own input", Recipe(updates="none", trains=[], activation_scale_by="max")
        ),
        "search": Variant("the same with activation ranges by least error", Recipe(updates="none", trains=[])),
    },
    default_variant="published",
    options={
        "alpha": Option(0.5, "share of the range that goes to the weight (paper: 0.5, up to 0.9)", least=0, most=1),
        "quantiser": Option("asymmetric", "of activations; the paper's is symmetric", QUANTISERS),
    },
    decide=decide,
    constants=constants,
    groups=one_for_all,
)
