"""EfficientDM, the baseline: per-tensor asymmetric activations with a learned scale and zero-point per timestep.

    y ≈ Q_t(x)·Q(W₀ + BA)ᵀ + b,   Q(v) = s·(clamp(⌊v/s⌉ + z, 0, 2^b − 1) − z)
    min Σ_t ‖ε̂(x_t, t) − ε(x_t, t)‖²   over A, B, the weights' s and the activations' s_t and z_t

with x_t of the teacher's own trajectories, both predictions guided; A and B learn at mean(s)/2500 of their layer.

Source: He et al., "EfficientDM", ICLR 2024, and ThisisBillhe/EfficientDM. No transform. Weights per output channel,
asymmetric; LoRA of rank 32 merged before the quantiser, on the dequantised base weight W₀ = Q(W). Scales and
zero-points of all timesteps share a momentum, as the code's one tensor of each layer does (`Recipe.momentum`).
Otherwise than in the code: all timesteps start there from one scale and one zero-point found on one calibration batch,
here each from its own, found by error on the profile's sample, so that this baseline is nearer to its end when training
begins (`--set recipe.activation_scale_from=trajectory` starts all from one); the error of an activation's range counts
by its square, there by |error|^2.4, as weights' do in both; its scripts write the integer weights by their largest
values, though its trainer is set to the L2.4 search, which is taken here; the zero-point is used unrounded there and
rounded here; scales and zero-points do not decay, there AdamW's default takes 4 % of an activation scale in its 16,000
updates (`distillation/rates.py`); the base weight stays as it was, there it is scaled with the weight's scale as that
is learned; and 8-bit layers, which have one static scale there and do not train, train here as all others do. HQ-DM's
variants train likewise.
Time embedding, first and last convolution at 8 bits; shortcut and downsampling convolutions in floating point.
"""

from pipelines.methods.base import TUNED, Measured, Method, Recipe, Variant
from pipelines.methods.equivalent import left_out, plain
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; see the module's text."""
    left = left_out(site, " (EfficientDM's code)")
    return left or plain(site, bits, measured, "asymmetric", "EfficientDM rotates nothing: ")


METHOD = Method(
    name="efficientdm",
    summary="asymmetric activations, LoRA, one learned scale per timestep; no rotation (the baseline)",
    source="He et al., ICLR 2024 (arXiv 2310.03270); ThisisBillhe/EfficientDM",
    variants={
        "published": Variant("as its public code does it", Recipe(momentum="shared")),
        "tuned": Variant("the same quantisers with the recipe of `hqdm --variant auto`", TUNED, by_width=True),
    },
    default_variant="published",
    decide=decide,
)
