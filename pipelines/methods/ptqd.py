"""PTQD: what quantisation does to ε, measured at every timestep after training and taken out again.

ε̂ = (1 + k_t)·ε + b_t + r: a correlated part with slope k_t ≥ 0, a bias b_t of each channel and an uncorrelated rest of
deviation s_t. Sampling uses (ε̂ − b_t)/(1 + k_t), and takes the rest off its own noise where it adds some (η > 0):
σ'² = σ² − c²·(s_t/(1 + k_t))², or 0. The correction is measured along teacher trajectories at the guidance of the
distillation, is an artifact of its own (`correction.safetensors`), and works alike in fake and integer arithmetic.

Source: He et al., "PTQD", NeurIPS 2023 (arXiv 2305.10657), and ziplab/PTQD. Otherwise than in the code: b_t is what the
slope leaves (there k_t·mean(ε) is counted twice); s_t is over all images, once their channels' biases are out (there
the mean of each image's deviation, biases still in it); the direction to x_t keeps σ, with which c was derived; weights
have a scale for each output channel (there one a tensor). Mixed precision by SNR is in no public code and not built:
activations have one width at all timesteps. Both linears of the time embedding have 8 bits (there the first alone). The
reconstruction is BRECQ's, as there; here activation scales begin as the profile's sample has them, by least squared
error (there |error|^2.4 on a batch), and learn at 5e-4 (there 4e-4), where those of `q_diffusion` begin on the
calibration and learn at half a per cent of themselves.

    published   below the correction: AdaRound by blocks, static activation scales learned by blocks, as BRECQ does it
    distilled   the correction on EfficientDM's student: adapters and one scale per timestep, distilled
    tuned       the same with the recipe of `hqdm --variant auto`
"""

from dataclasses import replace

from pipelines.methods.base import TUNED, Measured, Method, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import plan_of
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; see the module's text."""
    return plan_of(site, bits, measured, "asymmetric", "nothing is done here, ε is corrected")


def groups(measured: Measured, variant: Variant) -> list[int]:
    """One static scale, or each timestep its own where the student is distilled."""
    return one_for_all(measured, variant) if variant.options["static"] else []


METHOD = Method(
    name="ptqd",
    summary="slope and bias of ε's error measured and taken out, its rest taken off the sampler's noise",
    source="He et al., NeurIPS 2023 (arXiv 2305.10657); ziplab/PTQD",
    variants={
        "published": Variant(
            "on AdaRound by blocks with static scales",
            Recipe(updates="reconstruct", trains=[], correction=True),
            {"static": True},
        ),
        "distilled": Variant("on EfficientDM's student", Recipe(momentum="shared", correction=True), {"static": False}),
        "tuned": Variant(
            "`distilled` with the recipe of `hqdm --variant auto`",
            replace(TUNED, correction=True),
            {"static": False},
            by_width=True,
        ),
    },
    default_variant="published",
    decide=decide,
    groups=groups,
)
