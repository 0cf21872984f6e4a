"""Every cell of a comparison made, and the `compare` artifact of them.

A cell is plan → distill → export → sample → score with its inputs named, so that what exists is found and what was
interrupted goes on. The profile is made once, the teacher's samples once a seed. A cell that fails is recorded, and the
others go on. Processes that compare in one workspace divide the cells: what another one is at is put aside, and found
when it is made.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines import processes, runner, stages
from pipelines.comparison.asked import Comparison
from pipelines.comparison.cells import Cell, cells_of
from pipelines.comparison.pace import Pace, in_words
from pipelines.config import replace
from pipelines.errors import Busy, FileFault, HqdmError, UsageError
from pipelines.events import Report
from pipelines.report.comparison import FLOAT
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.locks import owner_of
from pipelines.workspace.store import Store

T = TypeVar("T")
WAIT = 5.0  # seconds until what another process is at is looked at again
FROM = {"plan": "profile", "distill": "plan", "export": "distill", "sample": "source", "score": "samples"}


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
        cells = cells_of(self.asked)
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
        pace = Pace(self.store, self.model, self.asked, self._units)
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
                about = f" (about {in_words(left)} for all that is left)" if left else ""
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

    def _make(self, cell: Cell, report: "_Depth", pace: Pace) -> None:
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
