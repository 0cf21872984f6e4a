"""The table of families: a new one is its file and one line here. docs/families.md shows how."""

from collections.abc import Mapping
from typing import Any

from pipelines.errors import HqdmError, did_you_mean
from pipelines.models.families import dit, flux, pixart, sd3, unet, unet_condition
from pipelines.models.families.base import Family
from pipelines.models.first_stage import CLASSES

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        unet.FAMILY,
        unet_condition.FAMILY,
        dit.FAMILY,
        pixart.FAMILY,
        sd3.FAMILY,
        flux.FAMILY,
    )
}  # fmt: skip


# What diffusers called two of the classes when their files were published, with the kind of norm that tells them apart.
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}


def class_of(config: Mapping[str, Any]) -> str:
    """The diffusers class of a model's configuration, by its name of today."""
    name = config["_class_name"]
    return RENAMED.get((name, str(config.get("norm_type"))), name)


def family_of(network: str, where: str) -> Family:
    """The family of a diffusers class; HqdmError names those that are known."""
    for family in FAMILIES.values():
        if family.network == network:
            return family
    if network in CLASSES:
        raise HqdmError(f"{where}: a {network} is a first stage, no denoiser", "give the whole pipeline's folder")
    known = [family.network for family in FAMILIES.values()]
    hint = f"{did_you_mean(network, known)}; docs/families.md shows how to add one"
    raise HqdmError(f"{where}: a {network} is not supported", hint)
