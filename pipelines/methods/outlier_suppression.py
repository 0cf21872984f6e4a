"""Outlier Suppression+: channels are shifted to the middle of their range, then outlying ones are squeezed.

Source: Wei et al., EMNLP 2023 (arXiv 2304.09145), and ModelTC/Outlier_Suppression_Plus:

    X' = X − z,  z_j = (max X_j + min X_j)/2          s_j = max(1, max|X'_j| / t)
    Y = (X'/s)·(W·s)ᵀ + z·Wᵀ,  with the t of the least ‖Q(X'/s)·Q(W·s)ᵀ − X'·Wᵀ‖²

so that one number t, the threshold of an outlier, is searched for each layer: a grid from the largest half-range down,
at the layer's own widths, ranges by maxima. Nothing is trained.

Differences: the public grid ends at the constant 1.0, which says nothing of inputs below 1; here it ends at the
smallest half-range, under which all channels would be squeezed alike. The paper's error is that of attention as a whole
for q, k and v; here it is each layer's own, on some of the profile's sample; of a convolution each kernel row's, since
the sample has single image rows. At a convolution's border, z·Wᵀ counts the places that lie inside the image. z, s and
the activation's range are static, over all that the profile saw at all timesteps. Weights: asymmetric per output
channel, ranges by least L2.4 error once t is found, as in the other methods. Variant `search` takes the activation
ranges of least squared error in place of maxima, once t is found.
"""

from typing import TYPE_CHECKING

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import by_column, extremes, few, outputs, plan_of
from pipelines.quant.spec import Bits, Site, SitePlan

if TYPE_CHECKING:
    import torch

TOKENS = 512  # of the sample that a threshold is judged on


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Shift and scale everywhere but at 8-bit layers; see the module's text."""
    words = "shifted to the middle of the range, squeezed to a searched threshold"
    return plan_of(site, bits, measured, "asymmetric", words, scaling=True, centring="static")


def constants(
    plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant
) -> "dict[str, torch.Tensor]":
    """centre z and gain 1/s."""
    if not plan.scaling:
        return {}
    low, high = extremes(plan.site, measured)
    centre, half = (high + low) / 2, (high - low) / 2
    x = few(measured.sample(plan.site), TOKENS)
    x = x - (centre[:, None] if x.ndim == 3 else centre)
    return {"centre": centre, "gain": 1 / squeeze(x, weight, half, plan, variant.options["thresholds"])}


def squeeze(x: "torch.Tensor", weight: "torch.Tensor", half: "torch.Tensor", plan: SitePlan, steps: int):
    """s (C,) of the best threshold. x: shifted inputs (rows, C[, W]); half: the largest |x'| of each channel (C,)."""
    import torch

    from pipelines.quant.affine import cover, dequantise, quantise

    true = outputs(x, weight, plan.site)
    best, chosen = float("inf"), torch.ones_like(half)
    for threshold in torch.linspace(half.max().item(), half.min().item(), steps + 1)[:-1].clamp(min=1e-12):
        scale = (half / threshold).clamp(min=1)
        small = x / (scale[:, None] if x.ndim == 3 else scale)
        step, zero = cover(torch.stack([-threshold, threshold])[None], *plan.activation_range)
        small = dequantise(quantise(small, step, zero, *plan.activation_range), step, zero)
        rows = by_column(weight, scale).flatten(1)
        step, zero = (value[:, None] for value in cover(rows, *plan.weight_range))
        rows = dequantise(quantise(rows, step, zero, *plan.weight_range), step, zero)
        error = (outputs(small, rows.view(weight.shape), plan.site) - true).square().mean().item()
        if error < best:
            best, chosen = error, scale
    return chosen


METHOD = Method(
    name="outlier_suppression",
    summary="OS+: channels shifted to the middle of their range, outlying ones squeezed; static, nothing trained",
    source="Wei et al., EMNLP 2023 (arXiv 2304.09145); ModelTC/Outlier_Suppression_Plus",
    variants={
        "published": Variant(
            "its shift and searched scale on every layer's own input",
            Recipe(updates="none", trains=[], activation_scale_by="max"),
        ),
        "search": Variant("the same with activation ranges by least error", Recipe(updates="none", trains=[])),
    },
    default_variant="published",
    options={"thresholds": Option(100, "thresholds that are tried (public code: at least 100)", least=1)},
    decide=decide,
    constants=constants,
    groups=one_for_all,
)
