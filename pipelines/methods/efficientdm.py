"""EfficientDM, the baseline: per-tensor asymmetric activations with a learned scale and zero-point per timestep.

Source: He et al., "EfficientDM", ICLR 2024, and ThisisBillhe/EfficientDM. No transform. Weights per output channel,
asymmetric, from the L2.4 search; LoRA of rank 32 merged before the quantiser, Q(W + BA), on the dequantised base
weight.
Otherwise than in the code, where all timesteps start from one scale and one zero-point found on one calibration batch
and the zero-point is used unrounded: here each timestep starts from its own, found by error on the profile's sample, so
that this baseline is nearer to its end when training begins. HQ-DM's variants start likewise.
At the published rate a zero-point moves by less than 0.1 in some hundred updates and is rounded, so the one that was
chosen by error stays in practice.
Time embedding, first and last convolution at 8 bits; shortcut and downsampling convolutions in floating point.
"""

from pipelines.methods.base import (
    EIGHT_BIT_ROLES,
    FLOAT_ROLES,
    TUNED,
    Measured,
    Method,
    Variant,
    left_in_float,
)  # fmt: skip
from pipelines.quant.spec import Bits, Site, SitePlan


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; see the module's text."""
    if site.obstacle:
        return left_in_float(site, site.obstacle)
    if site.role in FLOAT_ROLES:
        return left_in_float(site, f"{site.role} convolutions stay in floating point (EfficientDM's code)")
    weight, activation = (8, 8) if site.role in EIGHT_BIT_ROLES else (bits.weight, bits.activation)
    known = measured.sqnrs(site, "asymmetric", activation)
    return SitePlan(
        site, True, weight_bits=weight, activation_bits=activation, weight_quantiser="asymmetric",
        activation_quantiser="asymmetric", sqnr=known,
        why=f"EfficientDM rotates nothing: {known['none']:.1f} dB at {activation} bits",
    )  # fmt: skip


METHOD = Method(
    name="efficientdm",
    summary="asymmetric activations, LoRA, one learned scale per timestep; no rotation (the baseline)",
    source="He et al., ICLR 2024 (arXiv 2310.03270); ThisisBillhe/EfficientDM",
    variants={
        "published": Variant("as its public code does it"),
        "tuned": Variant("the same quantisers with the recipe of `hqdm --variant auto`", TUNED),
    },
    default_variant="published",
    decide=decide,
)
