"""TFMQ-DM: what depends on the timestep alone is one block, reconstructed over all timesteps; scales per timestep.

Source: Huang et al., "TFMQ-DM", CVPR 2024 (2311.16503), and ModelTC/TFMQ-DM. The time embedding h and every residual
block's projection of it are the temporal information block TIB(t) = (g₁(h(t)), …, g_n(h(t))); AdaRound minimises
Σ‖ĝᵢ(ĥ(t)) − gᵢ(h(t))‖² over the finitely many t, first of all, and the residual blocks leave its rounding alone. All
other blocks are reconstructed as in Q-Diffusion, but that shortcut and downsampling convolutions stay in floating point
(its code, which keeps Q-Diffusion's splitting and never comes to it; `--set shortcuts=asked` quantises those that read
[h, skip] in two halves). Activation scales and zero-points are a timestep's own and calibrated, not learned.

The paper has scales per timestep in the temporal block, its public code in every layer; here in every layer, found by
the least squared error (the code: by |error|^2.4, then a moving average of ranges). First and last layer, time
embedding and conditions at 8 bits, as in the other methods of this table; time projections at those asked for. Networks
without such projections (transformers) have the embeddings alone in the block.

    published   rounding is learned, activation scales are as they were calibrated
    tuned       activation scales are learned, too, by a fifth of the iterations, as Q-Diffusion learns its static ones
"""

from pipelines.methods.base import Measured, Method, Option, Recipe, Variant
from pipelines.methods.q_diffusion import SHORTCUTS, split
from pipelines.plans import Reconstruction
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan | tuple[SitePlan, SitePlan]:
    """No transform anywhere; see the module's text."""
    return split(site, bits, measured, variant.options["shortcuts"], False, "asymmetric")


METHOD = Method(
    name="tfmq",
    summary="the temporal features as one block over all timesteps, block reconstruction, scales per timestep",
    source="Huang et al., CVPR 2024 (arXiv 2311.16503); ModelTC/TFMQ-DM",
    variants={
        "published": Variant(
            "rounding is learned block by block, the temporal block first",
            Recipe(updates="reconstruct", base_weight="float", trains=[],
                   reconstruction=Reconstruction(temporal_block=True, rounding_share=1.0, scale_share=0.0)),
        ),
        "tuned": Variant(
            "the same, and activation scales are learned, by a fifth of the iterations",
            Recipe(updates="reconstruct", base_weight="float", trains=[], relative_scales=True,
                   activation_scale_rate=5e-3, reconstruction=Reconstruction(temporal_block=True)),
        ),
    },
    default_variant="published",
    options={
        "shortcuts": Option("float", "bits of shortcut convolutions that read [h, skip]: those asked for, 8, or float",
                            SHORTCUTS),
    },
    decide=decide,
)  # fmt: skip
