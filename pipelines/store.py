"""The workspace: immutable, versioned, hash-linked artifacts. Never imports torch.

    <root>/<stage>/<NNNN>/manifest.json     a complete artifact; without a manifest there is none
    <root>/<stage>/.draft-<key>/            a run under way or interrupted: draft.json, out/ (final files), work/
    <root>/<stage>/.gone-<name>/            what was being removed; the next run of the stage, or `hqdm gc`, ends that
    <root>/<stage>/.current                 the number of the artifact that was asked for last
    <root>/<stage>/.lock                    held with flock during a run; the kernel drops it with the process

A commit hashes and syncs every file, writes the manifest last and renames out/ to its number, so that a reader sees the
whole artifact or none of it; what goes is renamed before it is deleted. Nothing is inferred from the name of a file.
manifest.json and draft.json end with a seal, a hash of the rest of them.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import heapq
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import strict_json
from pipelines.errors import FileFault, HqdmError, UsageError, did_you_mean

KIND = "hqdm artifact"
FORMAT = 2  # 1 had no seal and no times of files; it is still read
MANIFEST = "manifest.json"
CURRENT = ".current"
DRAFT, GONE = ".draft-", ".gone-"
LIBRARIES = ("torch", "diffusers", "peft", "safetensors", "triton")
MOST_BYTES = 64 << 20  # of a manifest; one of 100,000 images has 15 million
_CHUNK = 1 << 20  # bytes
_STAGE = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
_IDENT = re.compile(_STAGE + r"/[0-9]{1,9}")
_MANIFEST = {
    "stage_version": int, "key": str, "config": dict, "inputs": dict, "files": dict, "digest": str, "libraries": dict,
    "machine": dict, "started": str, "finished": str, "seconds": (int, float), "figures": dict,
}  # fmt: skip
_UNSEALED = "0" * 64  # what stands in the seal's place while it is computed
_SEAL = re.compile(rb'\n "seal": "([0-9a-f]{64})"\n}\n\Z')
# What a disk can do to any write, whichever library was writing.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def sha256_of_file(path: Path | str) -> str:
    """The hexadecimal SHA-256 of a file's content. FileFault where it cannot be read."""
    digest = hashlib.sha256()
    if (given := Path(path)).exists() and not given.is_file() and not given.is_dir():
        raise FileFault(f"{path} is a pipe or a device, which may never end", "save it to a file first")
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as fault:
        raise FileFault(f"{path} does not exist", "check the path") from fault
    except IsADirectoryError as fault:
        raise FileFault(f"{path} is a folder, not a file", "name a file in it") from fault
    return digest.hexdigest()


def _sha256_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_in(path: Path) -> bytes:
    """The content of a regular file of JSON. ValueError for anything else that is there: a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return data


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """ValueError for a manifest that no commit wrote: a value missing or of another type, a file or an input that would
    lie outside the workspace.
    """
    for name, kind in _MANIFEST.items():
        if not isinstance(manifest.get(name), kind) or isinstance(manifest[name], bool):
            raise ValueError(f"its {name} is missing or of another type")
    for name, entry in manifest["files"].items():
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"it names the file {name[:80]!r}, which is none of its folder's")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("bytes")) is not int
        ):
            raise ValueError(f"its file {name[:80]!r} has no hash or no size")
    for role, link in manifest["inputs"].items():
        known = isinstance(link, dict) and isinstance(link.get("id"), str) and isinstance(link.get("digest"), str)
        if not known or not _IDENT.fullmatch(link["id"]):
            raise ValueError(f"its input {role[:80]!r} is no artifact")


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over the sorted (name, sha256) of an artifact's files: content only."""
    return _sha256_of_json(sorted((name, entry["sha256"]) for name, entry in files.items()))


def links(inputs: Mapping[str, "Artifact"]) -> dict[str, dict[str, str]]:
    """Input artifacts as a manifest records them: role -> id and digest."""
    return {role: {"id": artifact.id, "digest": artifact.digest} for role, artifact in inputs.items()}


def key_of(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, "Artifact"]) -> str:
    """The address of a run: equal keys mean equal results. `config` holds the deciding values only."""
    digests = {role: artifact.digest for role, artifact in inputs.items()}
    return _sha256_of_json({"stage": stage, "version": version, "config": dict(config), "inputs": digests})


def _files_under(folder: Path) -> list[str]:
    """Every file below `folder` except its manifest, as sorted names with forward slashes."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(path: str, flags: int) -> int:
    """For `open`: does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _sealed(value: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is the SHA-256 of all its bytes, taken with zeros in the seal's place."""
    text = json.dumps({**value, "seal": _UNSEALED}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_UNSEALED)
    return f"{before}{hashlib.sha256(text.encode()).hexdigest()}{after}".encode()


def _seal_holds(data: bytes) -> bool:
    """Whether these are the bytes that `_sealed` wrote."""
    found = _SEAL.search(data)
    if found is None:
        return False
    unsealed = data[: found.start(1)] + _UNSEALED.encode() + data[found.end(1) :]
    return hashlib.sha256(unsealed).hexdigest().encode() == found[1]


def _write_sealed(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write beside, sync, rename: the file is the old one or the new one, never a part. What a reader will find."""
    part, data = path.with_name(path.name + ".part"), _sealed(value)
    part.write_bytes(data)
    _sync(part)
    part.replace(path)
    _sync(path.parent)
    return json.loads(data)


def _holds_files(folder: Path) -> bool:
    """Whether there is any file below; another process may be removing them meanwhile."""
    return any(files for _, _, files in os.walk(folder))


def remove(folder: Path) -> bool:
    """Delete a folder of the workspace: out of its place in one step, then file by file. Its stage has to be locked.
    False where something of it could not be deleted.
    """
    gone = folder.with_name(GONE + folder.name.removeprefix(DRAFT).removeprefix(GONE))
    if gone != folder:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    return not gone.exists()


@dataclass(frozen=True)
class Artifact:
    """What a stage left: a folder of files and the manifest that describes them. Never changed after its commit."""

    id: str  # "distill/0003"
    stage: str
    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """role -> {"id", "digest"}"""
        return self.manifest["inputs"]

    @property
    def figures(self) -> dict[str, Any]:
        return self.manifest["figures"]

    @property
    def redo(self) -> str:
        return f"the {self.stage} stage makes it again with --force"

    def file(self, name: str) -> Path:
        """The path of one of its files. FileFault where the manifest lacks it or the disk does."""
        if name not in self.manifest["files"]:
            raise FileFault(f"{self.id} has no file {name!r}", did_you_mean(name, self.manifest["files"]))
        path = self.path / name
        if not path.exists():
            raise FileFault(f"{path} is missing, though {self.id} was complete", f"restore it, or: {self.redo}")
        return path

    def verify(self) -> list[str]:
        """One line for every file, the manifest included, that is missing, added, cut, changed or unreadable; empty
        where all are as they were written.
        """
        return self._faults(lambda file, entry, manifest: True)

    def damage(self) -> list[str]:
        """As `verify`, but hashes only the files whose time is not the one that was recorded: quick enough for every
        run.
        """
        return self._faults(_is_touched)

    def _faults(self, must_hash: Callable[[os.stat_result, Mapping[str, Any], os.stat_result], bool]) -> list[str]:
        recorded: dict[str, dict[str, Any]] = self.manifest["files"]
        try:
            data, about = (self.path / MANIFEST).read_bytes(), (self.path / MANIFEST).stat()
        except OSError as fault:
            return [f"{MANIFEST} {_unreadable(fault)}"]
        found = set(_files_under(self.path))
        faults = []
        for name, entry in recorded.items():
            path = self.path / name
            if name not in found:
                faults.append(f"{name} is missing")
                continue
            try:
                file = path.stat()
                if file.st_size < entry["bytes"]:
                    faults.append(f"{name} is cut: {file.st_size} of {entry['bytes']} bytes")
                elif file.st_size != entry["bytes"] or (
                    must_hash(file, entry, about) and sha256_of_file(path) != entry["sha256"]
                ):
                    faults.append(f"{name} is changed")
            except OSError as fault:
                faults.append(f"{name} {_unreadable(fault)}")
        faults += [f"{name} is added" for name in sorted(found - recorded.keys())]
        sealed = "seal" in self.manifest or self.manifest["format"] > 1
        if _digest(recorded) != self.digest or (sealed and not _seal_holds(data)):
            faults.append(f"{MANIFEST} is changed")
        return faults


def _is_touched(file: os.stat_result, entry: Mapping[str, Any], manifest: os.stat_result) -> bool:
    """By the recorded time in both directions, since a clock may go backwards; format 1 recorded none."""
    if "mtime_ns" in entry:
        return file.st_mtime_ns != entry["mtime_ns"]
    return file.st_mtime_ns >= manifest.st_mtime_ns


def _unreadable(fault: OSError) -> str:
    return "is missing" if isinstance(fault, FileNotFoundError) else f"cannot be read: {fault.strerror}"


def _way_out_of(artifact: Path) -> str:
    return f"restore it, or remove {artifact} and run that stage again"


class Store:
    """The artifacts below one folder. Reading creates nothing; the folder appears with the first run."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        # Manifests never change, and those of many images take milliseconds to parse: kept while the file is the same.
        self._known: dict[Path, tuple[tuple[int, ...], Artifact]] = {}

    def _folders(self, stage: str) -> list[Path]:
        if not re.fullmatch(_STAGE, stage):  # a name, and no path that leads elsewhere
            return []
        try:
            entries = list((self.root / stage).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((p for p in entries if p.name.isdecimal()), key=lambda p: int(p.name))

    def _read(self, path: Path) -> Artifact | None:
        file = path / MANIFEST
        try:
            about = file.stat()
            identity = about.st_mtime_ns, about.st_size, about.st_ino
            if path in self._known and self._known[path][0] == identity:
                return self._known[path][1]
            manifest = strict_json(_bytes_in(file).decode())
            if (
                not isinstance(manifest, dict)
                or manifest.get("kind") != KIND
                or type(manifest.get("format")) is not int
            ):
                raise FileFault(f"{file} is not the manifest of an artifact", "keep other files out of the workspace")
            if manifest["format"] > FORMAT:
                raise FileFault(
                    f"{file} has format {manifest['format']}, newer than {FORMAT}", "update hqdm to read it"
                )
            _check_manifest(manifest)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError) as fault:
            raise FileFault(f"{file} is damaged: {fault}", _way_out_of(path)) from fault
        artifact = Artifact(f"{path.parent.name}/{path.name}", path.parent.name, path, manifest)
        self._known[path] = identity, artifact
        return artifact

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """The complete ones, oldest first: of one stage in the order of their numbers, of all in the order of time, as
        far as the clock was right: none comes before its inputs, or before a smaller number of its stage.
        """
        if stage is not None:
            return [artifact for path in self._folders(stage) if (artifact := self._read(path))]
        return _in_order([self.artifacts(name) for name in self.stages()])

    def stages(self) -> list[str]:
        """Names of the folders that artifacts and drafts lie in, sorted; a folder may hold neither."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))

    def survey(self, stage: str) -> tuple[list[Artifact], dict[str, FileFault]]:
        """As `artifacts(stage)`, and by id what is wrong with those whose manifests cannot be read at all."""
        sound, broken = [], {}
        for path in self._folders(stage):
            try:
                sound += [artifact] if (artifact := self._read(path)) else []
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
            part.unlink(missing_ok=True)  # what is written here must not go through a link to somewhere else
            part.write_text(f"{number} {_check_of(artifact.stage, number)}\n", encoding="utf-8")
            part.replace(path)

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
        if not any(_holds_files(draft / part) for part in ("out", "work")):
            return False
        if (draft / "out").is_dir():
            return True
        # A commit takes out/ away. Where no such artifact is there, something else did, and work/ is as good as ever.
        begin = draft.name.removeprefix(DRAFT)
        return not any(artifact.key.startswith(begin) for artifact in self.artifacts(draft.parent.name))

    def drafts(self) -> list[tuple[str, dict[str, Any]]]:
        """(stage, recorded request) of every unfinished run, under way or interrupted; {} where its record is lost."""
        folders = sorted(self.root.glob(f"*/{DRAFT}*")) if self.root.is_dir() else []
        return [(f.parent.name, state_of(f).get("request", {})) for f in folders if self.is_unfinished(f)]

    def begin(self, stage: str, key: str, request: Mapping[str, Any], afresh: bool = False) -> "Draft":
        """A run of `stage` with that key; an unfinished one goes on, unless it is to be made `afresh`.

        `request` goes into the manifest: stage_version, config, inputs (as `links` gives them), seed. HqdmError where
        another process is at this stage.
        """
        folder = self.root / stage
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as fault:
            raise FileFault(
                f"{folder} cannot be a folder: a file is in its way", "choose another --workspace"
            ) from fault
        lock = self.lock(stage)
        try:
            for left in folder.glob(f"{GONE}*"):
                remove(left)
            return Draft(self, stage, key, request, lock, afresh)
        except BaseException as fault:
            os.close(lock)
            _raise_disk_fault(fault, folder)
            raise

    def lock(self, stage: str) -> int:
        """The descriptor that holds a stage, to be closed; its folder has to be there. HqdmError where another process
        is at work.
        """
        lock = os.open(self.root / stage / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # a full disk takes no name, and holds the lock all the same
                os.ftruncate(lock, 0)
                os.write(lock, f"{os.getpid()}\n".encode())
        except BlockingIOError as fault:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise HqdmError(
                f"process {holder} is working on {stage} in {self.root}",
                "wait until it is done, stop it, or use another --workspace",
            ) from fault
        except BaseException:
            os.close(lock)
            raise
        return lock


def _check_of(stage: str, number: str) -> str:
    """What stands behind the number in `.current`, so that another number is not taken for it."""
    return hashlib.sha256(f"{stage}/{number}".encode()).hexdigest()[:16]


def _in_order(rows: Iterable[list[Artifact]]) -> list[Artifact]:
    """Artifacts by when they were finished, each behind its inputs and behind those before it in its row."""
    rows = list(rows)
    by_id = {artifact.id: artifact for row in rows for artifact in row}
    behind: dict[str, list[str]] = {ident: [] for ident in by_id}
    waits = dict.fromkeys(by_id, 0)
    for row in rows:
        for place, artifact in enumerate(row):
            before = {row[place - 1].id} if place else set()
            for ident in before | {link["id"] for link in artifact.inputs.values()} & by_id.keys():
                behind[ident].append(artifact.id)
                waits[artifact.id] += 1
    ready = [(by_id[ident].manifest["finished"], ident) for ident, count in waits.items() if not count]
    heapq.heapify(ready)
    ordered: list[Artifact] = []
    while ready:
        _, ident = heapq.heappop(ready)
        ordered.append(by_id[ident])
        for heir in behind[ident]:
            waits[heir] -= 1
            if not waits[heir]:
                heapq.heappush(ready, (by_id[heir].manifest["finished"], heir))
    # Inputs that go in a circle are a damaged manifest's: `verify` tells, and nothing is left out here.
    there = {artifact.id for artifact in ordered}
    return ordered + [artifact for row in rows for artifact in row if artifact.id not in there]


def state_of(draft: Path) -> dict[str, Any]:
    """What an unfinished run recorded of itself; empty where it was stopped before it could, or the file is damaged.

    Nothing hangs on it but the time at work: a draft is known by its folder, and a run brings its own request.
    """
    try:
        data = _bytes_in(draft / "draft.json")
        state = strict_json(data.decode())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(state, dict) or ("seal" in state and not _seal_holds(data)):
        return {}
    kinds = {"key": str, "request": dict, "seconds": int | float, "started": str, "session": int | float | None}
    known = all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    made_from = state["request"].get("inputs", {}) if known else {}
    known &= isinstance(made_from, dict) and all(
        isinstance(link, dict) and isinstance(link.get("id"), str) for link in made_from.values()
    )
    return state if known and state["seconds"] >= 0 and (state.get("session") or 0) >= 0 else {}


def _raise_disk_fault(fault: BaseException | None, folder: Path) -> None:
    """Raise FileFault in the place of what a library made of a full or broken disk, which seldom names a file."""
    if not isinstance(fault, Exception) or isinstance(fault, HqdmError):
        return
    link, seen = fault, set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        rust = re.search(r"\(os error (\d+)\)", str(link))
        number = link.errno if isinstance(link, OSError) else int(rust[1]) if rust else None
        if number in _DISK:
            where = getattr(link, "filename", None) or folder
            hint = "see that the path, its rights and its disk are right; the same command goes on"
            if number in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room (hqdm gc --dry-run lists what can go); the same command goes on"
            elif number == errno.EFBIG:
                hint = "raise the limit on the size of files (ulimit -f); the same command goes on"
            raise FileFault(f"{where}: {os.strerror(number)}", hint) from fault
        link = link.__cause__ or link.__context__


class Draft:
    """A run under way. `path` takes the final files, `work` the state to resume from; `work` goes at the commit.

    A run that goes on finds `work` as it was and `path` empty: libraries write through temporary files, which a kill
    leaves there. Use it as a context manager: whatever happens inside, the lock goes; without a commit the draft stays.
    """

    def __init__(self, store: Store, stage: str, key: str, request: Mapping[str, Any], lock: int, afresh: bool):
        self._store, self._stage, self._key, self._lock = store, stage, key, lock
        self._folder = store._draft_folder(stage, key)
        self.path = self._folder / "out"
        self.work = self._folder / "work"
        if links := [path for path in (self._folder, *self._folder.rglob("*")) if path.is_symlink()]:
            raise FileFault(
                f"{links[0]} is a link, through which a run would write elsewhere", f"remove {self._folder}"
            )
        self.resumed = not afresh and store.is_unfinished(self._folder)
        if not self.resumed and self._folder.exists():
            remove(self._folder)
        state = state_of(self._folder)
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
        _write_sealed(self._folder / "draft.json", self._state)

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
            if self._folder.exists():
                _write_sealed(self._folder / "draft.json", self._state | {"seconds": self.seconds, "session": None})
        except OSError:
            if fault is None:
                raise
        finally:
            os.close(self._lock)
        _raise_disk_fault(fault, self._folder)

    def commit(self, figures: Mapping[str, Any]) -> Artifact:
        """Seal the files in `path` as the stage's next artifact."""
        names = _files_under(self.path)
        files = {}
        for name in names:
            _sync(self.path / name)
            about = (self.path / name).stat()
            files[name] = {
                "sha256": sha256_of_file(self.path / name),
                "bytes": about.st_size,
                "mtime_ns": about.st_mtime_ns,
            }
        for folder in (path for path in self.path.rglob("*") if path.is_dir()):
            _sync(folder)
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
            "digest": _digest(files),
            "seed": request["seed"],
            "libraries": libraries(LIBRARIES),
            "machine": machine(),
            "started": self._state["started"],
            "finished": utc(time.time()),
            "seconds": round(self.seconds, 3),
            "figures": finite(dict(figures)),
        }
        manifest = _write_sealed(self.path / MANIFEST, manifest)
        parent = self._folder.parent
        number = 1 + max((int(path.name) for path in self._store._folders(self._stage)), default=0)
        home = parent / f"{number:04d}"
        self.path.rename(home)
        _sync(parent)
        with contextlib.suppress(OSError):  # the artifact is there: what is left, the next run or hqdm gc removes
            remove(self._folder)
        return Artifact(f"{self._stage}/{home.name}", self._stage, home, manifest)


def finite(value: Any) -> Any:
    """JSON has no infinity (the PSNR of equal images) and no NaN: they become the words "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="microseconds")


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Versions of python and of those named packages that are installed; none is imported."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """The CPU's name and the threads in use; torch is asked only where it is loaded already."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:  # not Linux
        pass
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cpu": cpu, "threads": os.cpu_count(), "device": "cpu"}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "device": "cpu"}
