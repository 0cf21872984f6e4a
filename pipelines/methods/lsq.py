"""LSQ: weights and step sizes train together, by the gradient of the loss through the quantiser.

v̂ = clamp(⌊v/s⌉, −Q, Q)·s with ∂v̂/∂s = ⌊v/s⌉ − v/s inside the range and its bound outside, ∂v̂/∂v = 1 inside and 0
outside. Symmetric, no zero-points, one static activation scale a layer for all timesteps.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153). It has no method for diffusion:
the loss is the distance to the teacher's ε along its trajectories, as for the other distilled methods here. Otherwise
than in the paper: codes are ±Q with Q = 2^(b−1) − 1, the paper's begin one lower, which is worth 0.4 dB of a Gaussian
weight at 4 bits and 1.1 dB at 2; weights have a step for each output channel, not one a layer; activations start where
the squared error is least, weights where Σ|error|^2.4 is (there 2·mean|v|/√Q both). The paper scales a step's gradient
by 1/√(N·Q) to bring its relative updates to those of the weights under SGD; AdamW divides every gradient by its own
size, so that the factor cancels, and the rates say it instead: activation steps learn by their logarithm, weight steps
at 1/3,000 of their layer's mean (`tuned`: 1/300). One rate for all layers drove the small steps of 8-bit weights below
zero; a step far below its layer's mean still can get there in many hundred updates, and training stops and names it.
Activations are signed (after SiLU), where the paper's are unsigned after ReLU. First, last and time layers at 8 bits;
shortcut and downsampling convolutions in floating point, as for the other methods here.
"""

from dataclasses import replace

from pipelines.methods.base import TUNED, Measured, Method, Recipe, Variant, one_for_all
from pipelines.methods.equivalent import plan_of
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """Symmetric on both sides, no transform."""
    return plan_of(site, bits, measured, "symmetric", "weight and steps train", weight_quantiser="symmetric")


METHOD = Method(
    name="lsq",
    summary="all weights and step sizes train; symmetric, one static activation scale a layer",
    source="Esser et al., ICLR 2020 (arXiv 1902.08153)",
    variants={
        "published": Variant(
            "the paper's quantiser, distilled",
            Recipe(
                trains=["weights", "biases", "weight_scales", "activation_scales"],
                relative_scales=True,
                weight_rate=1e-5,
                bias_rate=1e-5,
                weight_scale_rate_divisor=3000.0,
                activation_scale_rate=1e-3,
            ),
        ),
        "tuned": Variant(
            "the same with what else `hqdm --variant auto` does, at rates for hundreds of updates",
            replace(
                TUNED,
                trains=["weights", "biases", "weight_scales", "activation_scales"],
                weight_rate=1e-4,
                weight_scale_rate_divisor=300.0,
                site_factors=False,  # all timesteps share one, which the weight's scale is already
            ),
            by_width=True,
        ),
    },
    default_variant="published",
    decide=decide,
    groups=one_for_all,
)
