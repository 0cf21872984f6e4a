"""All of a workspace: which artifacts and drafts are there, which was asked for last, who is at work."""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import Busy, FileFault, HqdmError, UsageError, did_you_mean
from pipelines.workspace.artifacts import MANIFEST, STAGE, Artifact, in_order, numbered, read_artifact
from pipelines.workspace.disks import raise_disk_fault
from pipelines.workspace.drafts import DRAFT, GONE, Draft, holds_files, remove, state_of
from pipelines.workspace.locks import OWNER, holder_of, own, owner_of, refuse_links, take_lock

CURRENT = ".current"


def _regular(path: str, flags: int) -> int:
    """For `open`: does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


class Store:
    """The artifacts below one folder. Reading creates nothing; the folder appears with the first run."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        # Manifests never change, and those of many images take milliseconds to parse: kept while the file is the same.
        self._known: dict[Path, tuple[tuple[int, ...], Artifact]] = {}

    def _folders(self, stage: str) -> list[Path]:
        return numbered(self.root / stage) if re.fullmatch(STAGE, stage) else []  # a name, no path that leads elsewhere

    def _read(self, path: Path) -> Artifact | None:
        try:
            about = (path / MANIFEST).stat()
            identity = about.st_mtime_ns, about.st_size, about.st_ino
            if path not in self._known or self._known[path][0] != identity:
                self._known[path] = identity, read_artifact(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._known[path][1]

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """The complete ones, oldest first: of one stage in the order of their numbers, of all in the order of time, as
        far as the clock was right: none comes before its inputs, or before a smaller number of its stage.
        """
        if stage is not None:
            return [artifact for path in self._folders(stage) if (artifact := self._read(path))]
        return in_order([self.artifacts(name) for name in self.stages()])

    def stages(self) -> list[str]:
        """Names of the folders that artifacts and drafts lie in, sorted; a folder may hold neither."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))

    def survey(self, stage: str) -> tuple[list[Artifact], dict[str, FileFault]]:
        """As `artifacts(stage)`, and by id what is wrong with those whose manifests cannot be read or are gone."""
        sound, broken = [], {}
        for path in self._folders(stage):
            try:
                if artifact := self._read(path):
                    sound.append(artifact)
                elif holds_files(path):
                    raise FileFault(f"{path / MANIFEST} is missing", f"restore it, or remove {path}")
            except FileFault as fault:
                broken[f"{stage}/{path.name}"] = fault
        return sound, broken

    def current(self, stage: str, where: Callable[[Artifact], bool] | None = None) -> Artifact | None:
        """The artifact of a stage that was asked for last, if `where` holds for it, or else the newest for which it
        does.

        Asking for an older configuration again finds its artifact up to date, and the stages after it go on from there.
        """
        last = self._asked_last(stage)
        for path in sorted(self._folders(stage), key=lambda path: (path.name == last, int(path.name)), reverse=True):
            artifact = self._read(path)
            if artifact and (where is None or where(artifact)):
                return artifact
        return None

    def _asked_last(self, stage: str) -> str | None:
        """The number that `.current` names; None where there is none, or it is damaged (the newest counts then)."""
        try:
            with open(self.root / stage / CURRENT, encoding="utf-8", opener=_regular) as file:
                words = file.read(128).split()
        except (OSError, ValueError):
            return None
        if len(words) == 1 and words[0].isdecimal():  # as it was written before it had a check
            return words[0]
        return words[0] if len(words) == 2 and words[1] == _check_of(stage, words[0]) else None

    def current_is_damaged(self, stage: str) -> bool:
        """Whether `.current` is there and says nothing that can be trusted. Nothing is lost with it."""
        return (self.root / stage / CURRENT).exists() and self._asked_last(stage) is None

    def get(self, ident: str) -> Artifact:
        """`distill/0003`, `distill/3`, `distill` (the newest), or at least four digits of one artifact's digest."""
        stage, _, number = ident.strip().strip("/").partition("/")
        if not number and (artifact := self.current(stage)):
            return artifact
        if number.isdecimal() and len(number) < 10:
            for path in self._folders(stage):
                if int(path.name) == int(number) and (artifact := self._read(path)):
                    return artifact
        everything = self.artifacts()
        if len(ident) >= 4 and (alike := [artifact for artifact in everything if artifact.digest.startswith(ident)]):
            if len({artifact.digest for artifact in alike}) == 1:
                return alike[-1]
            raise UsageError(f"{ident!r} begins the digest of {len(alike)} artifacts", "give more of its digits")
        if not everything:
            raise UsageError(f"there is no artifact {ident!r}: {self.root} holds none", "hqdm profile model.ckpt")
        known = [artifact.id for artifact in everything] + sorted({artifact.stage for artifact in everything})
        raise UsageError(f"there is no artifact {ident!r} in {self.root}", did_you_mean(ident, known))

    def mark_current(self, artifact: Artifact) -> None:
        """Remember that this one was asked for last. Not part of any artifact: without it the newest counts."""
        path, number = self.root / artifact.stage / CURRENT, artifact.path.name
        if self.current(artifact.stage) != artifact or self.current_is_damaged(artifact.stage):
            part = path.with_name(path.name + ".part")
            try:
                part.unlink(missing_ok=True)  # what is written here must not go through a link to somewhere else
                part.write_text(f"{number} {_check_of(artifact.stage, number)}\n", encoding="utf-8")
                with contextlib.suppress(FileNotFoundError):  # another process was as quick, and its word stands
                    part.replace(path)
            except OSError as fault:
                raise_disk_fault(fault, path)
                raise

    def find(self, stage: str, key: str) -> Artifact | None:
        """The newest artifact of that key."""
        return self.current(stage, lambda artifact: artifact.key == key)

    def linked(self, artifact: Artifact, role: str) -> Artifact:
        """The input that `artifact` was made from, checked by its digest. HqdmError if gone or changed."""
        link = artifact.inputs[role]
        stage, _, number = link["id"].partition("/")
        found = self._read(self.root / stage / number)
        if found is None:
            raise HqdmError(
                f"{artifact.id} was made from {link['id']}, which is gone",
                f"restore {self.root / link['id']}, or run the stages again from {stage}",
            )
        if found.digest != link["digest"]:
            raise HqdmError(
                f"{artifact.id} was made from another {link['id']} than the one that is there now",
                f"restore it (digest {link['digest'][:12]}), or run the stages after {stage} again",
            )
        return found

    def ancestor(self, artifact: Artifact, stage: str) -> Artifact:
        """The nearest artifact of `stage` that `artifact` (itself included) was made from, over its inputs' inputs."""
        row, seen = [artifact], {artifact.id}
        while row:
            for found in row:
                if found.stage == stage:
                    return found
            below = [self.linked(found, role) for found in row for role in found.inputs]
            row = []
            for found in below:
                if found.id not in seen:
                    seen.add(found.id)
                    row.append(found)
        raise HqdmError(f"{artifact.id} was made without any {stage} artifact", "choose one that was")

    def _draft_folder(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{DRAFT}{key[:16]}"

    def interrupted(self, stage: str, key: str) -> bool:
        """Whether an unfinished run of that key lies there."""
        return self.is_unfinished(self._draft_folder(stage, key))

    def is_unfinished(self, draft: Path) -> bool:
        """Whether a draft's folder holds any of a run's files, and not only what a commit did not come to remove."""
        if not any(holds_files(draft / part) for part in ("out", "work")):
            return False
        if (draft / "out").is_dir():
            return True
        # A commit takes out/ away. Where no such artifact is there, something else did, and work/ is as good as ever.
        begin = draft.name.removeprefix(DRAFT)
        return not any(artifact.key.startswith(begin) for artifact in self.artifacts(draft.parent.name))

    def drafts(self) -> list[tuple[str, dict[str, Any]]]:
        """(stage, recorded request) of every unfinished run, under way or interrupted; {} where its record is lost."""
        return [(folder.parent.name, state_of(folder).get("request", {})) for folder in self._unfinished()]

    def workers(self) -> list[tuple[str, str | None]]:
        """(stage, number of the process that is at it) of every unfinished run; None where it was interrupted."""
        return [(folder.parent.name, owner_of(folder)) for folder in self._unfinished()]

    def _unfinished(self) -> list[Path]:
        folders = sorted(self.root.glob(f"*/{DRAFT}*")) if self.root.is_dir() else []
        return [folder for folder in folders if self.is_unfinished(folder) or owner_of(folder)]

    def begin(self, stage: str, key: str, request: Mapping[str, Any], afresh: bool = False) -> Draft:
        """A run of `stage` with that key; an unfinished one goes on, unless it is to be made `afresh`.

        `request` goes into the manifest: stage_version, config, inputs (as `links` gives them), seed. Runs of other
        keys may be under way beside it. Busy where another process is at this one, or removes artifacts of the stage or
        of those of its inputs; HqdmError where an input has gone.
        """
        folder = self.root / stage
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as fault:
            raise FileFault(
                f"{folder} cannot be a folder: a file is in its way", "choose another --workspace"
            ) from fault
        inputs = [link["id"] for link in request.get("inputs", {}).values()]
        locks, asked = [self.lock(stage, shared=True)], []
        try:
            for name in sorted({ident.partition("/")[0] for ident in inputs}):
                asked.append(self.lock(name, shared=True))  # until the draft says what it needs, nobody may remove that
            if gone := [ident for ident in inputs if not (self.root / ident / MANIFEST).is_file()]:
                raise HqdmError(f"{gone[0]} has gone from {self.root}", "give the command again, which makes it")
            for left in folder.glob(f"{GONE}*"):
                remove(left)
            draft = self._draft_folder(stage, key)
            locks.append(own(draft))
            refuse_links(draft.rglob("*"), draft)
            resumed = not afresh and self.is_unfinished(draft)
            if not resumed and any(entry.name != OWNER for entry in draft.iterdir()):
                remove(draft)  # in one step, and the lock with it
                os.close(locks.pop())
                locks.append(own(draft))
            return Draft(draft, key, request, locks, resumed)
        except BaseException as fault:
            for lock in locks:
                os.close(lock)
            raise_disk_fault(fault, folder)
            raise
        finally:
            for lock in asked:
                os.close(lock)

    def owner(self, stage: str, key: str) -> str | None:
        """The number of the process that is at the run of that key; None where there is none."""
        return owner_of(self._draft_folder(stage, key))

    def worker(self, stage: str) -> str | None:
        """The number of a process that is at a stage; None where there is none."""
        owners = (owner_of(draft) for draft in sorted((self.root / stage).glob(f"{DRAFT}*")))
        return next((owner for owner in owners if owner), None)

    def lock(self, stage: str, shared: bool = False) -> int:
        """The descriptor that holds a stage, alone or beside others who share it, to be closed; its folder has to be
        there. Busy where another process is in the way, FileFault for a folder that lies elsewhere.
        """
        if (self.root / stage).is_symlink():
            raise FileFault(
                f"{self.root / stage} is a link, through which a run would write elsewhere",
                "put a folder in its place; --workspace may be on any disk",
            )
        lock = take_lock(self.root / stage / ".lock", fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if lock is not None:
            return lock
        removes = holder_of(self.root / stage / ".lock")
        if shared:
            raise Busy(f"process {removes or 'unknown'} is removing what is not needed of {stage} in {self.root}")
        raise Busy(f"process {self.worker(stage) or removes or 'unknown'} is working on {stage} in {self.root}")


def _check_of(stage: str, number: str) -> str:
    """What stands behind the number in `.current`, so that another number is not taken for it."""
    return hashlib.sha256(f"{stage}/{number}".encode()).hexdigest()[:16]
