"""What can go from a workspace: what runs left behind that are not under way, and on request replaced artifacts.

Removed is only what hqdm itself writes, known by its place and form, and never anything of a stage whose lock a process
holds. Never imports torch.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import runner
from pipelines.errors import HqdmError
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import DRAFT, GONE, remove, state_of
from pipelines.workspace.locks import OWNER
from pipelines.workspace.store import CURRENT, Store

_DRAFT_NAME = re.compile(re.escape(DRAFT) + r"[0-9a-f]{1,16}\Z")
_GONE_NAME = re.compile(re.escape(GONE) + r"([0-9a-f]{1,16}|\d{4,})\Z")
_IN_DRAFT = {OWNER, "draft.json", "draft.json.part", "out", "work"}


@dataclass(frozen=True)
class Leftover:
    """Something that can go."""

    path: Path
    stage: str
    kind: str  # draft, leftover or replaced
    bytes: int
    why: str


@dataclass
class Found:
    """What `collect` saw."""

    leftovers: list[Leftover] = field(default_factory=list)
    busy: dict[str, str] = field(default_factory=dict)  # stage -> the process that holds it, whose things stay
    stuck: list[Path] = field(default_factory=list)  # of which something could not be removed

    @property
    def bytes(self) -> int:
        return sum(leftover.bytes for leftover in self.leftovers)


def collect(store: Store, stale: bool = False, dry_run: bool = False) -> Found:
    """Find what can go and, unless it is a dry run, remove it; the smallest parts of the work first.

    stale: also artifacts that a newer version replaced and that nothing which stays was made from. The one that was
    asked for last stays, and so do the inputs of a run under way.
    """
    found = Found()
    with ExitStack() as held:
        free = []
        for stage in _stages(store):
            try:
                held.enter_context(_reading(store, stage) if dry_run else _holding(store, stage))
                free.append(stage)
            except HqdmError as fault:
                found.busy[stage] = fault.what
        for stage in free:
            found.leftovers += _left_by_runs(store, stage)
        if stale:
            found.leftovers += [
                Leftover(artifact.path, artifact.stage, "replaced", _size(artifact.path), why)
                for artifact, why in _replaced(store, set(found.busy))
            ]
        if not dry_run:
            for leftover in found.leftovers:
                if not leftover.path.is_dir():
                    leftover.path.unlink(missing_ok=True)  # a command that ends meanwhile may have moved it
                elif not remove(leftover.path):
                    found.stuck.append(leftover.path)
    return found


def _stages(store: Store) -> list[str]:
    """Folders in which a run has ever been: they have a lock. Others are somebody else's."""
    return [stage for stage in store.stages() if (store.root / stage / ".lock").is_file()]


def _holding(store: Store, stage: str) -> Any:
    """The stage's lock. HqdmError where another process holds it."""
    lock = store.lock(stage)
    return closing(os.fdopen(lock))


@contextmanager
def _reading(store: Store, stage: str) -> Iterator[None]:
    """Whether a run is at the stage, asked of a workspace in which nothing can be or is written."""
    if holder := store.worker(stage):
        raise HqdmError(f"process {holder} is working on {stage} in {store.root}")
    yield


def _left_by_runs(store: Store, stage: str) -> Iterator[Leftover]:
    """Drafts, what commits and removals did not come to delete, and a half-written `.current`."""
    for path in sorted((store.root / stage).iterdir()):
        if _GONE_NAME.match(path.name) and path.is_dir():
            yield Leftover(path, stage, "leftover", _size(path), "was being removed")
        elif path.name == f"{CURRENT}.part" and path.is_file():
            yield Leftover(path, stage, "leftover", path.stat().st_size, "was being written")
        elif _DRAFT_NAME.match(path.name) and path.is_dir() and {entry.name for entry in path.iterdir()} <= _IN_DRAFT:
            if store.is_unfinished(path):
                yield Leftover(path, stage, "draft", _size(path), _told(state_of(path)))
            else:
                yield Leftover(path, stage, "leftover", _size(path), "holds nothing that a run could go on from")


def _told(state: dict[str, Any]) -> str:
    """An interrupted run in words: when it was begun, how long it worked as far as it could write that down."""
    if not state:
        return "an interrupted run, its record is lost"
    made_from = ", ".join(link["id"] for link in list(state["request"].get("inputs", {}).values())[:3])
    worked = f", {state['seconds'] / 60:.0f} min of work" if state["seconds"] >= 60 else ""
    begun = state["started"][:16].replace("T", " ")
    return f"an interrupted run of {begun}{f' from {made_from}' if made_from else ''}{worked}; its command goes on"


def _replaced(store: Store, busy: set[str]) -> Iterator[tuple[Artifact, str]]:
    """Artifacts with a newer version, from which nothing was made but what goes too; and why."""
    reasons = runner.stale(store)
    artifacts = store.artifacts()
    by_id = {artifact.id: artifact for artifact in artifacts}
    current = {asked.id for stage in store.stages() if (asked := store.current(stage)) is not None}
    needed = {
        link["id"] for stage, request in store.drafts() if stage in busy for link in request.get("inputs", {}).values()
    }
    going = {
        ident
        for ident, why in reasons.items()
        if (why or "").startswith("replaced by") and by_id[ident].stage not in busy and ident not in current | needed
    }
    for artifact in reversed(artifacts):  # heirs before what they were made from
        if artifact.id not in going:
            going -= {link["id"] for link in artifact.inputs.values()}
    for artifact in artifacts:
        if artifact.id in going:
            yield artifact, reasons[artifact.id]


def _size(folder: Path) -> int:
    """Bytes of all files below; another process may be writing there."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
    return total
