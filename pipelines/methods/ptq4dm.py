"""PTQ4DM: a calibration whose timesteps are normally distributed, nearer the image than the noise; static scales.

Source: Shang et al., "Post-training Quantization on Diffusion Models", CVPR 2023 (2211.15736), and 42Shawn/PTQ4DM.
NDTC: tᵢ ~ Normal(μ, σ) clamped to the trajectory; x at tᵢ comes from the teacher's own trajectory from noise. μ and σ
are 0.4 of it, counted from the image (the code's values; the paper: μ ≤ T/2). Symmetric quantisers, ±(2^(b−1) − 1)
where the code has all 2^b levels; weights per output channel, activations per tensor by the least squared error on the
calibration (there |error|^2.4).

Variant `published` learns nothing, as the published scripts do not; `reconstructed` adds AdaRound and learned scales,
as the code's option does: min ‖block(x; Ŵ) − block(x; W)‖² by blocks, the equations in `q_diffusion` (QDrop's random
dropping of quantisers is not built).
Different here: the code compares the drawn t with a counter that begins at the noise, so that t and x belong to
opposite ends; they belong together here. It quantises layers' outputs, here inputs are quantised; its scales are moving
averages of ranges found on batches. Where a tensor has one sign its range has one side there, [0, m] of all levels;
here it is ±m whatever the tensor. First and last layer, time embedding and conditions at 8 bits; shortcut and
downsampling convolutions in floating point, as in the other methods of this table.
"""

from pipelines.methods.base import Measured, Method, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import left_out, plain
from pipelines.methods.q_diffusion import STATIC
from pipelines.plans import Reconstruction
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; see the module's text."""
    return left_out(site, "") or plain(site, bits, measured, "symmetric", "", STATIC, "symmetric")


def _recipe(**shares: float) -> Recipe:
    settings = Reconstruction(spread="normal", rescale=True, **shares)
    return Recipe(updates="reconstruct", base_weight="float", trains=[], relative_scales=True,
                  activation_scale_rate=5e-3, reconstruction=settings)  # fmt: skip


METHOD = Method(
    name="ptq4dm",
    summary="static scales calibrated at normally distributed timesteps",
    source="Shang et al., CVPR 2023 (arXiv 2211.15736); 42Shawn/PTQ4DM",
    variants={
        "published": Variant("calibrated, nothing is learned", _recipe(rounding_share=0.0, scale_share=0.0)),
        "reconstructed": Variant("then rounding and activation scales are learned block by block", _recipe()),
    },
    default_variant="published",
    decide=decide,
    groups=one_for_all,
)
