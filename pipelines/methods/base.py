"""What a method is: a declaration of how each site is quantised and how the student is trained. No torch, no loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.plans import Recipe
from pipelines.quant.spec import Bits, Site, SitePlan, Transform

# Kept at 8/8 bits: the first three by EfficientDM and HQ-DM (their public code); what embeds labels, texts and sizes is
# to a text-conditional model what the time embedding is to theirs.
EIGHT_BIT_ROLES = ("first", "last", "time", "condition")
FLOAT_ROLES = ("skip", "downsample")  # left in floating point by both


class Measured(Protocol):
    """What the profile measured, as methods ask for it."""

    def sqnr(self, site: str, transform: Transform, quantiser: str, bits: int) -> float:
        """dB, mean over the timesteps; −inf where it was not measured."""

    def transforms(self, site: str) -> list[Transform]:
        """The transforms that were measured with scales."""


@dataclass(frozen=True)
class Variant:
    """One reading of a method: a line for people, and what it fixes."""

    summary: str
    recipe: Recipe = Recipe()
    options: Mapping[str, object] = field(default_factory=dict)  # read by the method's own `decide`


@dataclass(frozen=True)
class Method:
    """A declaration. `decide(site, bits, measured, variant)` gives the plan of one site."""

    name: str
    summary: str
    source: str
    variants: Mapping[str, Variant]
    default_variant: str
    decide: Callable[[Site, Bits, Measured, Variant], SitePlan]


def left_in_float(site: Site, reason: str) -> SitePlan:
    """The plan of a site that stays as it is."""
    return SitePlan(site, quantised=False, why=reason)


def measured_sqnr(site: Site, measured: Measured, quantiser: str, bits: int) -> dict[str, float]:
    """Mean SQNR in dB of every measured transform by name, for the plan's record."""
    return {
        transform.name: round(measured.sqnr(site.name, transform, quantiser, bits), 2)
        for transform in measured.transforms(site.name)
    }
