"""Runs under way or interrupted: what they keep, what the next one goes on from, and how they become artifacts."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import strict_json
from pipelines.workspace.artifacts import FORMAT, KIND, MANIFEST, Artifact, digest_of, files_under, numbered
from pipelines.workspace.disks import raise_disk_fault
from pipelines.workspace.machine import LIBRARIES, libraries, machine, utc
from pipelines.workspace.seals import bytes_in, finite, seal_holds, sha256_of_file, sync, write_sealed

DRAFT, GONE = ".draft-", ".gone-"


def holds_files(folder: Path) -> bool:
    """Whether there is any file below; another process may be removing them meanwhile."""
    return any(files for _, _, files in os.walk(folder))


def remove(folder: Path) -> bool:
    """Delete a folder of the workspace: out of its place in one step, then file by file. Its stage has to be locked, or
    the draft owned. False where something of it could not be deleted.
    """
    gone = folder.with_name(GONE + folder.name.removeprefix(DRAFT).removeprefix(GONE))
    if gone != folder:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    return not gone.exists()


def state_of(draft: Path) -> dict[str, Any]:
    """What an unfinished run recorded of itself; empty where it was stopped before it could, or the file is damaged.

    Nothing hangs on it but the time at work: a draft is known by its folder, and a run brings its own request.
    """
    try:
        data = bytes_in(draft / "draft.json")
        state = strict_json(data.decode())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(state, dict) or ("seal" in state and not seal_holds(data)):
        return {}
    kinds = {"key": str, "request": dict, "seconds": int | float, "started": str, "session": int | float | None}
    known = all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    made_from = state["request"].get("inputs", {}) if known else {}
    known &= isinstance(made_from, dict) and all(
        isinstance(link, dict) and isinstance(link.get("id"), str) for link in made_from.values()
    )
    return state if known and state["seconds"] >= 0 and (state.get("session") or 0) >= 0 else {}


class Draft:
    """A run under way. `path` takes the final files, `work` the state to resume from; `work` goes at the commit.

    A run that goes on finds `work` as it was and `path` empty: libraries write through temporary files, which a kill
    leaves there. Use it as a context manager: whatever happens inside, its locks go; without a commit the draft stays.
    """

    def __init__(self, folder: Path, key: str, request: Mapping[str, Any], locks: Sequence[int], resumed: bool):
        """locks: descriptors that are held for it and closed with it."""
        self._folder, self._key, self._locks = folder, key, locks
        self._stage, self._ended = folder.parent.name, False
        self.path = self._folder / "out"
        self.work = self._folder / "work"
        self.resumed = resumed
        state = state_of(self._folder) if resumed else {}
        #: What the user should know of a run that goes on.
        self.warning = ""
        if self.resumed and not state:
            about = self._folder / "draft.json"
            self.warning = f"{about} is damaged: the run goes on, and its time at work until now is not known"
        now = time.time()
        self._begun = time.monotonic()
        self._seconds = state.get("seconds", 0.0) + self._lost_seconds(state)
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self._state = {
            "key": key,
            "request": {"stage_version": 1, "config": {}, "inputs": {}, "seed": None} | dict(request),
            "started": state.get("started") or utc(now),
            "seconds": self._seconds,
            "session": now,
        }
        write_sealed(self._folder / "draft.json", self._state)

    def _lost_seconds(self, state: Mapping[str, Any]) -> float:
        """How long a killed run had worked: it could not write its seconds down, but its newest file tells."""
        if not isinstance(state.get("session"), int | float):
            return 0.0
        times = [path.stat().st_mtime for part in (self.path, self.work) for path in part.rglob("*") if path.is_file()]
        return max(0.0, max(times, default=0.0) - state["session"])

    @property
    def seconds(self) -> float:
        """Time at work so far, over all resumes."""
        return self._seconds + time.monotonic() - self._begun

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        try:
            if not self._ended:
                write_sealed(self._folder / "draft.json", self._state | {"seconds": self.seconds, "session": None})
        except OSError:
            if fault is None:
                raise
        finally:
            for lock in self._locks:
                os.close(lock)
        raise_disk_fault(fault, self._folder)

    def drop(self) -> None:
        """Leave nothing of the run."""
        self._ended = True
        remove(self._folder)

    def commit(self, figures: Mapping[str, Any]) -> Artifact:
        """Seal the files in `path` as the stage's next artifact."""
        names = files_under(self.path)
        files = {}
        for name in names:
            sync(self.path / name)
            about = (self.path / name).stat()
            files[name] = {
                "sha256": sha256_of_file(self.path / name),
                "bytes": about.st_size,
                "mtime_ns": about.st_mtime_ns,
            }
        for folder in (path for path in self.path.rglob("*") if path.is_dir()):
            sync(folder)
        request = self._state["request"]
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "stage": self._stage,
            "stage_version": request["stage_version"],
            "key": self._key,
            "config": request["config"],
            "inputs": request["inputs"],
            "files": files,
            "digest": digest_of(files),
            "seed": request["seed"],
            "libraries": libraries(LIBRARIES),
            "machine": machine(),
            "started": self._state["started"],
            "finished": utc(time.time()),
            "seconds": round(self.seconds, 3),
            "figures": finite(dict(figures)),
        }
        manifest = write_sealed(self.path / MANIFEST, manifest)
        parent, home = self._folder.parent, None
        while home is None:
            number = 1 + max((int(path.name) for path in numbered(parent)), default=0)
            try:
                home = self.path.rename(parent / f"{number:04d}")
            except OSError as fault:  # another process's commit was as quick
                if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync(parent)
        with contextlib.suppress(OSError):  # the artifact is there: what is left, the next run or hqdm gc removes
            self.drop()
        return Artifact(f"{self._stage}/{home.name}", self._stage, home, manifest)
