"""Q-Diffusion: calibration spread over the timesteps, split quantisers at shortcuts, block reconstruction.

Source: Li et al., "Q-Diffusion", ICCV 2023 (2302.04304), and Xiuyu-Li/q-diffusion. A layer that reads a concatenation
[h, skip] has an input of two distributions: X = [Q₁(X₁), Q₂(X₂)] and W = [Q₃(W₁), Q₄(W₂)], two layers whose outputs add
up. Calls of the teacher at evenly spread timesteps calibrate; AdaRound and learned activation scales follow, block by
block (`pipelines/reconstruction/`):

    min_V ‖block(x; Ŵ) − block(x; W)‖² + λ·Σ(1 − |2h(V) − 1|^β),   Ŵ = s·(clamp(⌊W/s⌋ + h(V) + z, 0, 2^b − 1) − z)
    h(V) = clamp(1.2·sigmoid(V) − 0.1, 0, 1),   then min Σ|block(x; Ŵ, s_a) − block(x; W)|^2.4 over scales s_a

Static: one activation scale s_a and zero-point for all timesteps.

From the public code: shortcut convolutions alone are split (`split_main` splits the main path's, too), by its commands
for CIFAR-10 and Stable Diffusion, not by those for LDM-4 and LDM-8. Weights per output channel, asymmetric, L2.4
search. Activations there are symmetric by range on CIFAR-10 and LDM-4 and asymmetric by error on LDM-8; the latter is
the default here (`quantiser`; symmetric ones are by error too), and the error counts by its square (there
|error|^2.4).
Different here: first and last layer, time embedding and conditions have 8 bits, as in the other methods of this table
(there: those of all others); shortcuts that read no concatenation and downsampling stay in floating point. Softmax and
the attention's products are not quantised. Fewer iterations: see `plans.Reconstruction`.

    published   as above
    tuned       shortcuts in floating point, and scales that start from the profile's sample, not from the calibration:
                at three bits of activations, where static scales are what fails, it ended nearer to the teacher
"""

from dataclasses import replace

from pipelines.methods.base import FLOAT_ROLES, Measured, Method, Option, Recipe, Variant, left_in_float, one_for_all
from pipelines.methods.equivalent import plain
from pipelines.plans import Reconstruction
from pipelines.quant.spec import QUANTISERS, Bits, Site, SitePlan

SHORTCUTS = ("asked", "eight", "float")
STATIC = ", each timestep measured by itself"  # which a static scale is not


def split(
    site: Site, bits: Bits, measured: Measured, shortcuts: str, main: bool, quantiser: str
) -> SitePlan | tuple[SitePlan, SitePlan]:
    """One site, or where its input is a concatenation and it is a shortcut (or `main`), its halves."""
    if site.obstacle:
        return left_in_float(site, site.obstacle)
    shortcut = site.role in FLOAT_ROLES
    if shortcut and (not site.joint or shortcuts == "float"):
        return left_in_float(site, f"{site.role} convolutions that read no concatenation stay in floating point"
                             if not site.joint else "shortcuts stay in floating point")  # fmt: skip
    if not site.joint or not (shortcut or main):
        return plain(site, bits, measured, quantiser, after=STATIC)
    mine = Bits(8, 8) if shortcut and shortcuts == "eight" else bits
    halves = zip(site.halves(), ("h", "skip"), strict=True)
    return tuple(plain(half, mine, measured, quantiser, f"{of} of [h, skip]: ", STATIC) for half, of in halves)


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan | tuple[SitePlan, SitePlan]:
    """No transform anywhere; see the module's text."""
    options = variant.options
    return split(site, bits, measured, options["shortcuts"], options["split_main"], options["quantiser"])


PUBLISHED = Recipe(
    updates="reconstruct", base_weight="float", trains=[], relative_scales=True, activation_scale_rate=5e-3,
    reconstruction=Reconstruction(rescale=True),
)  # fmt: skip
METHOD = Method(
    name="q_diffusion",
    summary="block reconstruction on calls spread over the timesteps, split shortcuts, static scales",
    source="Li et al., ICCV 2023 (arXiv 2302.04304); Xiuyu-Li/q-diffusion",
    variants={
        "published": Variant("rounding and activation scales are learned block by block", PUBLISHED),
        "tuned": Variant(
            "shortcuts in floating point, scales start from the profile's sample",
            replace(PUBLISHED, reconstruction=Reconstruction()),
            {"shortcuts": "float"},
        ),
    },
    default_variant="published",
    options={
        "shortcuts": Option("asked", "bits of shortcut convolutions that read [h, skip]: those asked for, 8, or float",
                            SHORTCUTS),
        "split_main": Option(False, "also split the main path's first convolution of such blocks"),
        "quantiser": Option("asymmetric", "of activations (the code: symmetric on CIFAR-10 and LDM-4)", QUANTISERS),
    },
    decide=decide,
    groups=one_for_all,
)  # fmt: skip
