"""What a comparison is asked for: methods, bit widths, seeds and the stages' options, as words or as a YAML file;
all of it checked before anything runs.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import stages
from pipelines.config import from_dict, read_yaml, replace
from pipelines.errors import FileFault, UsageError, did_you_mean
from pipelines.methods.base import BY_WIDTH
from pipelines.quant.spec import Bits

COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # outside a list or a mapping
MODEL_FILES = (".ckpt", ".pt", ".pth", ".safetensors")
# Stages that take options for all cells, and what they may not say because the comparison does: name -> way out.
SEEDS, PAIRS = "leave it out; --seeds sets seeds", "leave it out; each cell brings its images and its teacher's"
OPTIONED: dict[str, dict[str, str]] = {
    "profile": {}, "distill": {"seed": SEEDS},
    "sample": {
        "seed": SEEDS, "source": "leave it out; the teacher and the integer students are sampled",
        "device": "leave it out; --option sample.backend=cuda samples the integer students on a device",
    },
    "score": dict.fromkeys(("samples_path", "samples_sha256", "pair_path", "pair_sha256"), PAIRS),
}  # fmt: skip


@dataclass(frozen=True)
class MethodSpec:
    """A method with its variant and options, written `method[/variant][:option=value[,option=value…]]`."""

    method: str
    variant: str | None = None  # the method's default
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "MethodSpec":
        """UsageError where the text cannot be read, or no such method, variant or option exists."""
        from pipelines.methods import METHODS, find

        head, colon, tail = text.strip().partition(":")
        method, slash, variant = head.partition("/")
        if (method not in METHODS or "," in head) and (way_out := _no_method(text)):
            raise UsageError(f"{text!r} is no method", way_out)
        pairs = [part.partition("=") for part in COMMAS.split(tail)] if colon else []
        names = [name.strip() for name, _, _ in pairs]
        if not method or (slash and not variant) or not all(n and e and v.strip() for n, (_, e, v) in
                                                            zip(names, pairs, strict=True)):  # fmt: skip
            raise UsageError(
                f"method {text!r} cannot be read", "write method/variant:option=value, as in hqdm/paper:order=16"
            )
        if len(set(names)) != len(names):
            raise UsageError(f"method {text!r} names an option twice", "give each option once")
        options = tuple(sorted((name, value.strip()) for name, (_, _, value) in zip(names, pairs, strict=True)))
        find(method, variant or None, dict(options))
        return cls(method, variant or None, options)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return self.method + (f"/{self.variant}" if self.variant else "") + (f":{options}" if options else "")

    def resolved(self) -> tuple:
        """Equal for specs that mean the same, whether or not default variant and options are spelled out."""
        _, variant, about = self._found()
        options = tuple(sorted(about.options.items(), key=lambda option: option[0]))
        return (self.method, variant, options, repr(about.recipe), about.given & BY_WIDTH)

    @property
    def label(self) -> str:
        """`hqdm/ours`: the method with its variant spelled out."""
        return f"{self.method}/{self._found()[1]}"

    @property
    def learns(self) -> bool:
        """Whether its students are distilled or reconstructed, or stay as they were calibrated."""
        recipe = self._found()[2].recipe
        return recipe.updates == "distill" or bool(recipe.reconstruction and recipe.reconstruction.learns)

    def _found(self) -> tuple:
        from pipelines.methods import find

        return find(self.method, self.variant, dict(self.options))


def _no_method(text: str) -> str:
    """The way out where something else was typed for a method: several at once, bits, or a model; empty otherwise."""
    from pipelines.methods import METHODS

    words = text.replace(",", " ").split()
    if len(words) > 1 and words[0].partition("/")[0].partition(":")[0] in METHODS:
        return f"put spaces between methods: {' '.join(words)}"
    if re.fullmatch(r"(w\d+a\d+,?)+", text.strip(), re.IGNORECASE):
        return f"bits have an option: --bits {text.strip()}"
    if text.strip() and (os.path.exists(text) or Path(text).suffix in MODEL_FILES):
        return f"a model has an option: --model {text}"
    return ""


@dataclass(frozen=True)
class Comparison:
    """What is compared. `options` are the stages' own, the same for every cell; `reference` is an artifact's id."""

    methods: tuple[MethodSpec, ...]
    bits: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: str | None = None


def ask(
    methods: Sequence[str], bits: Sequence[str], seeds: Sequence[int],
    options: Mapping[str, Mapping[str, Any]] | None = None, reference: str | None = None,
) -> Comparison:  # fmt: skip
    """A comparison, checked before anything runs; without methods every one of the table in its default variant.

    Raises UsageError for an unknown method, variant, bit width, stage, option or scheduler, for a value that a stage
    does not take, and for no seed or one that is negative or too large. Relative paths become absolute.
    """
    from pipelines.methods import METHODS

    specs = list({spec.resolved(): spec for spec in reversed([*map(MethodSpec.parse, methods or METHODS)])}.values())
    widths = list(dict.fromkeys(str(Bits.parse(text)) for text in bits))
    if not widths or not seeds:
        raise UsageError("there is nothing to compare", "give --bits w4a4,w4a3 and --seeds 0")
    if any(seed < 0 for seed in seeds):
        raise UsageError(f"seeds cannot be {', '.join(map(str, seeds))}", "they take whole numbers of 0 or more")
    for stage in ("distill", "sample"):  # the largest seed that they take
        replace(stages.load(stage).Config(), seed=max(seeds))
    given = {stage: dict(values) for stage, values in (options or {}).items() if values}
    for stage, values in given.items():
        if stage not in OPTIONED:
            raise UsageError(f"a comparison gives no options to {stage!r}", did_you_mean(stage, OPTIONED))
        for name, way_out in OPTIONED[stage].items():
            if name in values:
                raise UsageError(f"{stage}.{name} is what a comparison sets itself", way_out)
        given[stage] = _absolute(stage, values, Path())
        replace(stages.load(stage).Config(), **given[stage])
        if values.get("scheduler") is not None:
            _check_scheduler(stage, values["scheduler"])
    path = given.get("score", {}).get("reference_path")
    if reference is not None and path is not None:
        raise UsageError(f"a reference is given twice: {path} and {reference}", "leave one of them out")
    return Comparison(tuple(reversed(specs)), tuple(widths), tuple(dict.fromkeys(seeds)), given, reference)


def _absolute(stage: str, values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A stage's options with those that name a file as absolute paths, relative ones from `base`: what is recorded, and
    printed as a command, is to be found from any folder.
    """
    paths = {f.name for f in dataclasses.fields(stages.load(stage).Config) if f.metadata.get("path")}
    return {
        name: str((base / value).absolute()) if name in paths and isinstance(value, str) and value else value
        for name, value in values.items()
    }


def _check_scheduler(stage: str, name: str) -> None:
    """UsageError for one that no model has; whether a model's schedule takes it, sampling says."""
    from pipelines.diffusion import FLOW_SCHEDULERS, SCHEDULERS  # torch, for which only those who name one wait

    known = {*SCHEDULERS, *FLOW_SCHEDULERS}
    if name not in known:
        raise UsageError(f"{stage}: scheduler {name!r} does not exist", did_you_mean(name, known))


@dataclass(frozen=True)
class Recipe:
    """A comparison as a YAML file: the command's arguments, and a mapping of options for each stage."""

    model: str | None = None
    methods: list[str] | None = None  # every one of the table
    bits: list[str] | None = None
    seeds: list[int] | None = None
    profile: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)


def read_recipe(path: Path | str) -> Recipe:
    """A recipe, strictly: unknown keys are refused with the nearest known one, and so are lists of nothing, which would
    pass for everything. Paths in it start from its folder.
    """
    path = Path(path)
    values = read_yaml(path)
    if not values:
        raise FileFault(f"{path} is empty", "write what is compared, such as `methods: [hqdm, efficientdm]`")
    recipe = from_dict(Recipe, values, str(path))
    for name in ("methods", "bits", "seeds"):
        if getattr(recipe, name) == []:
            raise UsageError(f"{path}: {name} is empty", f"name some, or leave {name} out to get the usual ones")
    model = recipe.model
    if model and (path.parent / model).exists():
        model = str((path.parent / model).absolute())
    found = {stage: _absolute(stage, getattr(recipe, stage), path.parent) for stage in OPTIONED}
    return dataclasses.replace(recipe, model=model, **found)
