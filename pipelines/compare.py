"""Every method, bit width and seed on one model: cells that are chains of artifacts, and the comparison made of them.

A cell is plan → distill → export → sample → score with its inputs named, so that what exists is found and what was
interrupted goes on. The profile is made once, the teacher's samples once a seed. A cell that fails is recorded, and the
others go on. Processes that compare in one workspace divide the cells: what another one is at is put aside, and found
when it is made.
"""

import dataclasses
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines import processes, runner, stages
from pipelines.config import from_dict, read_yaml, replace
from pipelines.errors import Busy, FileFault, HqdmError, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.methods.base import BY_WIDTH
from pipelines.quant.spec import Bits
from pipelines.report.comparison import FLOAT, TEACHER, role_of
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.locks import owner_of
from pipelines.workspace.store import Store

T = TypeVar("T")
COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # outside a list or a mapping
MODEL_FILES = (".ckpt", ".pt", ".pth", ".safetensors")
WAIT = 5.0  # seconds until what another process is at is looked at again
ROAD = ("plan", "distill", "export", "sample", "score")
FROM = {"plan": "profile", "distill": "plan", "export": "distill", "sample": "source", "score": "samples"}
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

    def cells(self) -> "list[Cell]":
        """The teacher's first, then seed by seed, so that a table of the first seed is there early."""
        scored = self.options.get("score", {}).get("extractor") != "none"
        cells = [Cell(None, FLOAT, seed, ("sample", "score") if scored else ("sample",)) for seed in self.seeds]
        return cells + [Cell(m, b, seed) for seed in self.seeds for b in self.bits for m in self.methods]


def comparison(
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


@dataclass
class Cell:
    """One method at one width and seed (without a method: the teacher), and what there is of it."""

    spec: MethodSpec | None
    bits: str
    seed: int
    road: tuple[str, ...] = ROAD  # the stages of its chain
    chain: dict[str, Artifact] = field(default_factory=dict)  # stage -> artifact, as far as it is made
    ended: bool = False  # whether the chain is whole
    waits_for: Path | None = None  # the draft that another process is at
    failed: str | None = None  # the stage that failed
    error: str = ""  # what it said, or what speaks against the cell before it is made

    @property
    def name(self) -> str:
        """`hqdm/paper:order=16 w4a4 seed 0`, `teacher seed 0`: its role in the comparison."""
        return role_of(TEACHER if self.spec is None else str(self.spec), self.bits, self.seed)

    @property
    def last(self) -> Artifact:
        """The score; of a teacher that is not scored by itself the samples."""
        return self.chain.get("score") or self.chain["sample"]


@dataclass(frozen=True)
class Result:
    """What `compare` did. `outcome` is None in a dry run; `seconds` is the time of what is missing, None if unknown."""

    outcome: runner.Outcome | None
    cells: list[Cell]
    seconds: float | None

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.failed]


def model_of(store: Store, text: str | None, report: Report | None = None, dry_run: bool = False) -> runner.Outcome:
    """The model to compare on: an artifact (`model/1`), a checkpoint's or a folder's path, or for None the current
    one.
    """
    if text is not None and not text.strip():
        raise UsageError(
            f"--model {text!r} names nothing", "hqdm compare --model model.ckpt; without it the last one is taken"
        )
    stage, _, number = (text or "model").strip("/").partition("/")
    if stage == "model" and (not number or number.isdecimal()) and not (number == "" and text and Path(text).exists()):
        if text is None and store.current("model") is None:
            raise HqdmError(f"{store.root} holds no model to compare on", "hqdm compare --model model.ckpt")
        artifact = store.get(text or "model")
        return runner.Outcome("model", artifact, False, "named" if text else "the current one", artifact.config)
    if not Path(text).exists():
        raise FileFault(
            f"--model {text}: neither a file or folder nor a model artifact", "hqdm compare --model model.ckpt"
        )
    config, report = runner.model_config(text), report or Report()
    return _patiently(report, lambda: runner.make(store, "model", config, {}, report, dry_run=dry_run))


def _patiently(report: Report, make: Callable[[], T]) -> T:
    """What `make` gives, as soon as no other process is at it."""
    while True:
        try:
            return make()
        except Busy as fault:
            report.note(f"waits: {fault.what}")
            time.sleep(WAIT)
            while fault.draft is not None and owner_of(fault.draft):
                time.sleep(WAIT)


def compare(
    store: Store, asked: Comparison, model: Artifact | None, report: Report | None = None,
    force: bool = False, dry_run: bool = False,
) -> Result:  # fmt: skip
    """Make what is missing of every cell, then the `compare` artifact.

    `force` makes students, samples and scores afresh; model, profile and the teacher's samples stay. A dry run makes
    nothing; `model` may then be None where it would be taken in first. What fails with the teacher or the profile is
    raised, what fails in a student's cell is kept in it.
    """
    return _Run(store, asked, model, report or Report(), force, dry_run).result()


class _Run:
    def __init__(
        self, store: Store, asked: Comparison, model: Artifact | None, report: Report, force: bool, dry_run: bool
    ):
        self.store, self.asked, self.model = store, asked, model
        self.report, self.force, self.dry_run = report, force, dry_run
        score = replace(stages.load("score").Config(), **asked.options.get("score", {}))
        # Once: hashing a reference of ten thousand images takes its time.
        self.score = stages.load("score").with_hashes(score)
        self.profile: Artifact | None = None
        self.teachers: dict[int, Cell] = {}
        self.planned: set[tuple[str, str]] = set()  # (method, bits) of the plans that this run has made

    def result(self) -> Result:
        cells = self.asked.cells()
        if self.model is not None:
            make = partial(
                runner.make, self.store, "profile", self._config("profile"), {"model": self.model.id}, self.report,
                dry_run=self.dry_run,
            )  # fmt: skip
            self.profile = _patiently(self.report, make).artifact
        for cell in cells:
            self._look(cell)
        if self.force:
            for cell in cells:
                if cell.spec is not None:
                    cell.chain, cell.ended = {}, False
        pace = _Pace(self.store, self.model, self.asked, self._units)
        if self.dry_run:
            return Result(None, cells, pace.left(cells))
        wanted = [cell for cell in cells if not cell.ended]
        done = len(cells) - len(wanted)
        report = _Depth(self.report)
        report.begin("cells", len(cells), done, unit="cells")
        while wanted:
            aside: list[Cell] = []
            for place, cell in enumerate(wanted):
                if cell.waits_for is not None and owner_of(cell.waits_for):
                    aside.append(cell)
                    continue
                left = pace.left([*wanted[place:], *aside])
                about = f" (about {_words(left)} for all that is left)" if left else ""
                report.note(f"cell {done + 1} of {len(cells)}: {cell.name}{about}")
                try:
                    self._make(cell, report, pace)
                except Busy as fault:
                    report.note(f"{fault.what}: {cell.name} is put aside")
                    cell.waits_for = fault.draft
                    aside.append(cell)
                    continue
                done += 1
                report.advance(done)
            if len(aside) == len(wanted):
                time.sleep(WAIT)
            wanted = aside
        report.end()
        return Result(_patiently(self.report, lambda: self._conclude(cells)), cells, 0.0)

    def _config(self, stage: str, cell: Cell | None = None) -> Any:
        """A stage's configuration for a cell: the comparison's options, then what the cell is."""
        if stage == "score":
            return self.score
        values = dict(self.asked.options.get(stage, {}))
        if stage == "plan":
            values |= {"method": cell.spec.method, "variant": cell.spec.variant, "bits": cell.bits}
            values |= {"options": dict(cell.spec.options)} if cell.spec.options else {}
        elif stage == "distill":
            values["seed"] = cell.seed
        elif stage == "sample":
            values |= {"seed": cell.seed, "source": "int" if cell.spec else "teacher"}
            if cell.spec is None:  # which has no integer kernels, and whose attention stays in floating point
                values.pop("backend", None)
                values.pop("attention", None)
        return replace(stages.load(stage).Config(), **values)

    def _chosen(self, stage: str, cell: Cell, above: Artifact) -> dict[str, str]:
        chosen = {FROM[stage]: above.id}
        if stage == "score":
            if cell.spec is not None:
                teacher = self.teachers[cell.seed]
                if "sample" not in teacher.chain:
                    raise Busy(f"the teacher's images of seed {cell.seed} are still made", draft=teacher.waits_for)
                chosen["pair"] = teacher.chain["sample"].id
            if self.asked.reference:
                chosen["reference"] = self.asked.reference
        return chosen

    def _steps(
        self, cell: Cell, report: Report, force: bool, dry_run: bool
    ) -> Iterator[tuple[str, runner.Outcome | None]]:
        """Make one stage of a cell after the other; each stage's name comes before its outcome does."""
        above = self.profile if cell.spec else self.model
        for stage in cell.road:
            if stage == "score" and cell.spec is None and not self._alone(above):
                cell.road = ("sample",)
                return
            yield stage, None
            again = force and stage not in cell.chain  # not once more where the cell was put aside
            if stage == "plan":  # which the seeds of a method share
                again = again and (str(cell.spec), cell.bits) not in self.planned
            outcome = runner.make(
                self.store, stage, self._config(stage, cell), self._chosen(stage, cell, above), report, again, dry_run
            )
            if outcome.ran and stage == "plan":
                self.planned.add((str(cell.spec), cell.bits))
            yield stage, outcome
            if outcome.artifact is None:
                return
            above = outcome.artifact

    def _alone(self, samples: Artifact) -> bool:
        """Whether a teacher's samples have something to be measured against."""
        against = self.asked.reference or self.score.reference or self.score.reference_path
        return runner.needs_no_pair(self.store, samples, against, self.score.extractor)

    def _look(self, cell: Cell) -> None:
        """Fill a cell with the artifacts that are there, and with what speaks against the rest."""
        if self.model is None or self.profile is None:
            return
        if cell.spec is not None and "sample" not in self.teachers[cell.seed].chain:
            road = cell.road[:-1]  # a score has the teacher's samples for its pair
        else:
            road = cell.road
        cell.ended = road == cell.road
        try:
            for stage, outcome in self._steps(cell, Report(), False, True):
                if outcome is None and stage not in road:
                    break
                if outcome is not None and outcome.artifact is None:
                    cell.ended = False
                elif outcome is not None:
                    cell.chain[stage] = outcome.artifact
        except HqdmError as fault:  # a damaged artifact, or a method that does not fit: a real run tries, and tells
            cell.ended, cell.error = False, _told(fault)
        if cell.spec is None:
            self.teachers[cell.seed] = cell

    def _make(self, cell: Cell, report: "_Depth", pace: "_Pace") -> None:
        """Make what is missing of a cell; a student's fault is kept in the cell."""
        depth, stage = report.depth, cell.road[0]
        try:
            begun = time.monotonic()
            for stage, outcome in self._steps(cell, report, self.force and cell.spec is not None, False):
                if outcome is None:
                    begun = time.monotonic()
                    continue
                cell.chain[stage] = outcome.artifact
                if outcome.ran:
                    pace.add(stage, cell, time.monotonic() - begun)
            cell.ended, cell.error = True, ""
        except Busy:
            report.unwind(depth)
            raise
        except processes.PeerLost:  # so are the cells after it
            raise
        except Exception as fault:  # whatever it is, the cells after it do not hang on it
            if cell.spec is None:
                raise
            if processes.asked() > processes.crew().count:  # the stage was shared, and the others left it
                raise HqdmError(
                    f"{cell.name} failed in {stage}, which ended a job of several processes: {_told(fault)}",
                    "the same command without --processes records it and makes the other cells",
                ) from fault
            cell.failed, cell.error = stage, _told(fault)
            report.unwind(depth)
            report.warn(f"{cell.name} failed in {stage}: {cell.error}")

    def _conclude(self, cells: Sequence[Cell]) -> runner.Outcome:
        failed = [
            {"spec": str(cell.spec), "bits": cell.bits, "seed": cell.seed, "stage": cell.failed, "error": cell.error}
            for cell in cells
            if cell.failed
        ]
        config = replace(
            stages.load("compare").Config(), methods=[str(spec) for spec in self.asked.methods],
            bits=list(self.asked.bits), seeds=list(self.asked.seeds),
            options={stage: dict(values) for stage, values in self.asked.options.items()}, failed=failed,
            reference=self.asked.reference,
        )  # fmt: skip
        chosen = {}
        for cell in cells:
            if cell.ended and not cell.failed:
                # Cells of equal integers share samples and score, which lead to the first of them alone.
                links = stages.load("compare").LINKED if cell.spec else ()
                chosen |= {cell.name: cell.last.id} | {f"{cell.name} {stage}": cell.chain[stage].id for stage in links}
        return runner.make(
            self.store, "compare", config, chosen | {"profile": self.profile.id}, self.report, force=self.force
        )

    def _units(self, stage: str) -> int:
        """What a stage's time grows with: updates of a distillation by their images, images of samples and scores, else
        one.
        """
        if stage == "distill":
            config, profile = self._config("distill", Cell(None, FLOAT, 0)), self._config("profile")
            return config.trajectories * (config.steps or profile.steps) * config.batch
        if stage in ("sample", "score"):
            return self._config("sample", Cell(None, FLOAT, 0)).count
        return 1


class _Pace:
    """Seconds per unit of every stage and method, of this model's earlier artifacts and of what this run makes.

    A distillation or reconstruction takes its time by trajectories × steps × images; what learns nothing takes a time
    of its own (CALIBRATE), which tells nothing of the others. A score takes its time by images, on one extractor.
    """

    CALIBRATE = "calibrate"

    def __init__(self, store: Store, model: Artifact | None, asked: Comparison, units: Any):
        self._units = units
        self._known: dict[tuple[str, str], list[float]] = {}
        if model is None:
            return
        made = {model.digest: TEACHER}  # digest of everything made from this model: its method and variant
        profiled: dict[str, int] = {}  # digest of a profile, and of what was made from it: the profile's steps
        for stage in ("profile", "plan", "distill", "export"):
            for artifact in store.artifacts(stage):
                figures, above = artifact.figures, [link["digest"] for link in artifact.inputs.values()]
                if not any(digest in made for digest in above):
                    continue
                made[artifact.digest] = method = f"{figures.get('method')}/{figures.get('variant')}"
                steps = next((profiled[digest] for digest in above if digest in profiled), 1)
                profiled[artifact.digest] = steps = artifact.config.get("steps") or steps
                kind, units = stage, 1
                if stage == "distill":
                    learns = bool(figures.get("updates") or figures.get("blocks"))
                    kind = stage if learns else self.CALIBRATE
                    given = artifact.config
                    units = given.get("trajectories", 1) * steps * given.get("batch", 1) if learns else 1
                self._known.setdefault((kind, method), []).append(artifact.manifest["seconds"] / units)
        drawn: dict[str, tuple[str, int]] = {}  # digest of samples: whose they are, and how many
        for sample in store.artifacts("sample"):
            method = made.get(sample.inputs.get("source", {}).get("digest"))
            rate = sample.figures.get("images_per_second")
            steps = asked.options.get("sample", {}).get("steps", sample.config.get("steps"))
            same = sample.config.get("steps") == steps and sample.config.get("source") != "fake"
            if method is not None and rate and same:
                self._known.setdefault(("sample", method), []).append(1 / rate)
            if method is not None:
                drawn[sample.digest] = method, sample.config.get("count", 1)
        extractor = asked.options.get("score", {}).get("extractor")
        for score in store.artifacts("score"):
            method, count = drawn.get(score.inputs.get("samples", {}).get("digest"), (None, 1))
            if method is not None and score.config.get("extractor") == extractor:
                self._known.setdefault(("score", method), []).append(score.manifest["seconds"] / count)

    def add(self, stage: str, cell: Cell, seconds: float) -> None:
        kind, method = self._kind(stage, cell), cell.spec.label if cell.spec else TEACHER
        self._known.setdefault((kind, method), []).append(seconds / self._units(kind))

    def _kind(self, stage: str, cell: Cell) -> str:
        return self.CALIBRATE if stage == "distill" and cell.spec and not cell.spec.learns else stage

    def of(self, stage: str, cell: Cell) -> float | None:
        """Seconds of a cell's stage, as the same method's were or, before it has any, as those of all others of its
        kind were; None if unknown.
        """
        kind, method = self._kind(stage, cell), cell.spec.label if cell.spec else TEACHER
        rates = self._known.get((kind, method)) or [
            rate for (known, other), values in self._known.items() if known == kind and other != TEACHER
            for rate in values
        ]  # fmt: skip
        return sum(rates) / len(rates) * self._units(kind) if rates else None

    def left(self, cells: Sequence[Cell]) -> float | None:
        """Seconds of all that is missing of those cells; None where a stage that takes long was never seen."""
        total, plans = 0.0, set()
        for cell in cells:
            if cell.ended:
                continue
            for stage in cell.road:
                plan = (str(cell.spec), cell.bits)
                if stage in cell.chain or (stage == "plan" and plan in plans):  # seeds share a plan
                    continue
                if stage == "plan":
                    plans.add(plan)
                seconds = self.of(stage, cell)
                if seconds is None and stage in ("distill", "sample"):
                    return None
                total += seconds or 0.0
        return total


class _Depth(Report):
    """Passes events on and counts open tasks, so that those of a stage that failed can be closed."""

    def __init__(self, report: Report):
        self._report, self.depth = report, 0
        self.advance, self.note, self.warn, self.made = report.advance, report.note, report.warn, report.made

    def begin(self, task: str, total: int, done: int = 0, unit: str = "steps") -> None:
        self.depth += 1
        self._report.begin(task, total, done, unit)

    def end(self) -> None:
        self.depth -= 1
        self._report.end()

    def unwind(self, depth: int) -> None:
        """End every task that was begun since."""
        while self.depth > depth:
            self.end()


def _told(fault: Exception) -> str:
    """A fault in one line: what a user can mend as it says it, anything else with its kind and place."""
    if isinstance(fault, HqdmError):
        return fault.what
    frame = traceback.extract_tb(fault.__traceback__)[-1]
    return f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]} ({Path(frame.filename).name}:{frame.lineno})"


def _words(seconds: float) -> str:
    """40 s, 12 min, 3.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
