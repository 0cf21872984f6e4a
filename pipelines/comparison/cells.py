"""A comparison's cells, and what there is of each."""

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.comparison.asked import Comparison, MethodSpec
from pipelines.report.comparison import FLOAT, TEACHER, role_of
from pipelines.workspace.artifacts import Artifact

ROAD = ("plan", "distill", "export", "sample", "score")


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


def cells_of(asked: Comparison) -> list[Cell]:
    """The teacher's first, then seed by seed, so that a table of the first seed is there early."""
    scored = asked.options.get("score", {}).get("extractor") != "none"
    cells = [Cell(None, FLOAT, seed, ("sample", "score") if scored else ("sample",)) for seed in asked.seeds]
    return cells + [Cell(m, b, seed) for seed in asked.seeds for b in asked.bits for m in asked.methods]
