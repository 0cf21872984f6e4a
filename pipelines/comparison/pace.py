"""How long what is missing of a comparison will take, by what was made before."""

from collections.abc import Callable, Sequence

from pipelines.comparison.asked import Comparison
from pipelines.comparison.cells import Cell
from pipelines.report.comparison import TEACHER
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store


class Pace:
    """Seconds per unit of every stage and method, of this model's earlier artifacts and of what this run makes.

    A distillation or reconstruction takes its time by trajectories × steps × images; what learns nothing takes a time
    of its own (CALIBRATE), which tells nothing of the others. A score takes its time by images, on one extractor.
    """

    CALIBRATE = "calibrate"

    def __init__(self, store: Store, model: Artifact | None, asked: Comparison, units: Callable[[str], int]):
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


def in_words(seconds: float) -> str:
    """40 s, 12 min, 3.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
