"""What a method is: a declaration of how each site is quantised and how the student is trained; stages carry it out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import UsageError, did_you_mean
from pipelines.plans import Recipe, changed
from pipelines.quant.spec import Bits, Site, SitePlan, Transform

if TYPE_CHECKING:
    import torch

# Kept at 8/8 bits: the first three by EfficientDM and HQ-DM (their public code); what embeds labels, texts and sizes is
# to a text-conditional model what the time embedding is to theirs.
EIGHT_BIT_ROLES = ("first", "last", "time", "condition")
FLOAT_ROLES = ("skip", "downsample")  # left in floating point by both
NOT_AS_ASKED = EIGHT_BIT_ROLES + FLOAT_ROLES  # and of those that quantise them nevertheless: at 8 bits


KINDS = {bool: "true or false", int: "a whole number", float: "a number"}  # of options, as people say it
RECIPE = "recipe."  # in front of a key of the recipe, among a method's options
BY_WIDTH = frozenset(("lora_rate_divisor", "narrow_rate_divisors"))  # which `recipe_at` sets, where no user did


class Measured(Protocol):
    """What the profile measured, as methods ask for it; see `pipelines.measures.Measures`."""

    timesteps: Sequence[float]
    sites: Sequence[Site]

    def sqnr(self, site: Site, transform: Transform, quantiser: str, bits: int) -> float: ...

    def sqnrs(self, site: Site, quantiser: str, bits: int) -> dict[str, float]: ...

    def record(self, plan: SitePlan) -> dict[str, float]: ...

    def transforms(self, site: Site) -> list[Transform]: ...

    def sample(self, site: Site) -> "torch.Tensor": ...

    def statistic(self, site: Site, name: str) -> "torch.Tensor": ...

    def weight(self, site: Site) -> "torch.Tensor": ...

    def moved(self, plan: SitePlan, constants: Mapping[str, "torch.Tensor"]) -> "torch.Tensor": ...


@dataclass(frozen=True)
class Option:
    """A number or word that a user may set with --set NAME=VALUE; its type is its default's."""

    default: int | float | str | bool
    summary: str
    choices: tuple = ()
    variants: tuple[str, ...] = ()  # that it belongs to; empty: all
    least: float | None = None  # the smallest number that is taken …
    above: float | None = None  # … or the largest that is too small
    most: float | None = None
    quiet: bool = False  # left out of a plan at its default, so that older plans made again are the same file

    def parse(self, name: str, text: str) -> Any:
        """A value from a command line. UsageError where it is none."""
        kind = type(self.default)
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            words = ", ".join(map(str, self.choices)) or KINDS[kind]
            raise UsageError(f"option {name} cannot be {text!r}", f"it takes {words}: {self.summary}") from None
        if self.choices and value not in self.choices:
            raise UsageError(f"option {name} cannot be {text!r}", f"it takes {', '.join(map(str, self.choices))}")
        if kind in (int, float) and not self._fits(value):
            raise UsageError(f"option {name} cannot be {text!r}", f"it takes {self.takes}: {self.summary}")
        return value

    def _fits(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    @property
    def takes(self) -> str:
        """Its numbers in words: `0 … 1`, `1 or more`, `more than 0`."""
        if self.least is not None and self.most is not None:
            return f"{self.least:g} … {self.most:g}"
        words = [f"{self.least:g} or more"] if self.least is not None else []
        words += [f"more than {self.above:g}"] if self.above is not None else []
        words += [f"at most {self.most:g}"] if self.most is not None else []
        return " and ".join(words) or "a finite number"


@dataclass(frozen=True)
class Variant:
    """One reading of a method: a line for people, and what it fixes."""

    summary: str
    recipe: Recipe = Recipe()
    options: Mapping[str, Any] = field(default_factory=dict)  # read by the method's own functions
    given: frozenset[str] = frozenset()  # keys of the recipe that a user gave, the same at every width
    by_width: bool = False  # adapters learn more slowly where weights have three bits or two (`WIDE_STEPS`)

    def recipe_at(self, bits: Bits, plans: Sequence[SitePlan] = ()) -> Recipe:
        """The recipe at a width, of sites that may have others. Weights of three bits and two have steps so wide that
        adapters at the rate of `TUNED`, a share of the step, throw the student off.
        """
        if not self.by_width or "lora_rate_divisor" in self.given:
            return self.recipe
        recipe = replace(self.recipe, lora_rate_divisor=WIDE_STEPS.get(bits.weight, self.recipe.lora_rate_divisor))
        narrow = any(plan.quantised and plan.weight_bits < bits.weight for plan in plans)
        if not narrow or "narrow_rate_divisors" in self.given:
            return recipe
        narrow = {str(width): divisor for width, divisor in WIDE_STEPS.items() if width < bits.weight}
        return replace(recipe, narrow_rate_divisors=narrow)


@dataclass(frozen=True)
class Method:
    """A declaration.

    decide(site, bits, measured, variant): the plan of one site, or of its two halves (`Site.halves`).
    constants(plan, weight, measured, variant): tensors that the plan of one site needs beside its scales: `gain`,
        `centre` (C,), `row_bits` (out,) uint8. weight (out, in, …) is the teacher's.
    groups(measured, variant): which timesteps share one activation scale: a group number for each, in the profile's
        order. An empty list gives each its own.
    allocate(plans, bits, measured, variant): the plans again, with what can only be decided over all of them.
    """

    name: str
    summary: str
    source: str
    variants: Mapping[str, Variant]
    default_variant: str
    decide: Callable[[Site, Bits, Measured, Variant], SitePlan | tuple[SitePlan, SitePlan]]
    options: Mapping[str, Option] = field(default_factory=dict)
    constants: Callable[[SitePlan, "torch.Tensor", Measured, Variant], dict[str, "torch.Tensor"]] | None = None
    groups: Callable[[Measured, Variant], list[int]] | None = None
    allocate: Callable[[list[SitePlan], Bits, Measured, Variant], list[SitePlan]] | None = None

    def options_of(self, name: str) -> dict[str, Option]:
        """The options that belong to a variant."""
        return {key: option for key, option in self.options.items() if not option.variants or name in option.variants}

    def with_options(self, chosen: str, given: Mapping[str, str]) -> Variant:
        """A variant, by its name, with the method's defaults, its own options and those that a user gave, as values; of
        these `recipe.KEY` is a key of the recipe.

        UsageError for an option or a key that the method or this variant does not have, and for a value that it does
        not take.
        """
        variant, mine = self.variants[chosen], self.options_of(chosen)
        changes = {name.removeprefix(RECIPE): text for name, text in given.items() if name.startswith(RECIPE)}
        given = {name: text for name, text in given.items() if not name.startswith(RECIPE)}
        for name in given:
            if name not in self.options:
                hint = did_you_mean(name, self.options) if self.options else "it takes none"
                raise UsageError(f"method {self.name} has no option {name!r}", hint)
            if name not in mine:
                theirs = self.options[name].variants
                raise UsageError(
                    f"option {name} belongs to the variant{'s' if theirs[1:] else ''} {', '.join(theirs)} of "
                    f"{self.name}, not to {chosen}",
                    f"choose variant {theirs[0]}, or leave {name} out",
                )
        defaults = {name: option.default for name, option in mine.items()}
        parsed = {name: self.options[name].parse(name, text) for name, text in given.items()}
        options = {**defaults, **variant.options, **parsed}
        recipe = changed(variant.recipe, changes)
        return replace(variant, recipe=recipe, options=options, given=frozenset(changes))


# A recipe that was tried for `hqdm --variant auto`, and that every trained method may have: a comparison that tunes one
# side alone says little. LoRA learns 250 times as fast as published; activation scales by a share of themselves; biases
# learn too, and for each timestep a factor on a site's weights; a trajectory's timesteps come in an order drawn for it,
# and their losses count against their own means; the student is a moving average and guides by shares.
TUNED = Recipe(
    base_weight="float", relative_scales=True, activation_scale_rate=4e-3, bias_rate=2e-3, lora_rate_divisor=10.0,
    trains=["adapters", "weight_scales", "activation_scales", "zero_points", "biases"], weighting="timestep", ema=0.98,
    guidance_signal=1.5, site_factors=True, order="shuffled",
)  # fmt: skip
# lora_rate_divisor by bits of the weights. Over updates 40 to 80 the loss is a fifth lower than by 10 at w3a3; at w2a4,
# where 10 doubles it within ten updates, it falls.
WIDE_STEPS = {3: 20.0, 2: 30.0}


def enough_db(bits: Bits) -> float:
    """What a site has to keep as it is, in dB, for no transform to be tried. Below 8 bits no site at the width that was
    asked for keeps 30, and those that stay at 8 bits do; at 8 bits a well-behaved one keeps 40 to 45.
    """
    return 40.0 if bits.activation == 8 else 30.0


def left_in_float(site: Site, reason: str) -> SitePlan:
    """The plan of a site that stays as it is."""
    return SitePlan(site, quantised=False, why=reason)


def one_for_all(measured: Measured, variant: Variant) -> list[int]:
    """Groups of a static quantiser: all timesteps share it."""
    return [0] * len(measured.timesteps)
