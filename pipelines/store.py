"""The workspace: immutable, versioned, hash-linked artifacts. Never imports torch.

    <root>/<stage>/<NNNN>/manifest.json     a complete artifact; without a manifest there is none
    <root>/<stage>/.draft-<key>/            a run under way or interrupted: draft.json, out/ (final files), work/
    <root>/<stage>/.current                 the number of the artifact that was asked for last
    <root>/<stage>/.lock                    held with flock during a run; the kernel drops it with the process

A commit hashes and syncs every file, writes the manifest last and renames out/ to its number, so that a reader sees the
whole artifact or none of it. Nothing is inferred from the name of a file.
"""

import datetime
import fcntl
import hashlib
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
FORMAT = 1
MANIFEST = "manifest.json"
CURRENT = ".current"
LIBRARIES = ("torch", "diffusers", "peft", "safetensors")
MOST_TEXT = 64 << 20  # characters of a manifest; one of 100,000 images has 15 million
_CHUNK = 1 << 20  # bytes
_STAGE = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
_IDENT = re.compile(_STAGE + r"/[0-9]{1,9}")
_MANIFEST = {
    "stage_version": int, "key": str, "config": dict, "inputs": dict, "files": dict, "digest": str, "libraries": dict,
    "machine": dict, "started": str, "finished": str, "seconds": (int, float), "figures": dict,
}  # fmt: skip


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


def _json_in(path: Path) -> Any:
    """The JSON of a regular file. ValueError for anything else that is there: a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with open(path, encoding="utf-8") as file:
        text = file.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"it has more than {MOST_TEXT} characters")
    return strict_json(text)


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


def _write_json(path: Path, value: Any) -> None:
    """Write beside, sync, rename: the file is the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


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
        """One line for every file that is missing, added, cut or changed; empty where all are as they were written."""
        return self._faults(lambda path, manifest_time: True)

    def damage(self) -> list[str]:
        """As `verify`, but hashes only the files touched since the manifest was written: quick enough for every run."""
        return self._faults(lambda path, manifest_time: path.stat().st_mtime_ns >= manifest_time)

    def _faults(self, must_hash: Callable[[Path, int], bool]) -> list[str]:
        recorded: dict[str, dict[str, Any]] = self.manifest["files"]
        found = set(_files_under(self.path))
        manifest_time = (self.path / MANIFEST).stat().st_mtime_ns
        faults = []
        for name, entry in recorded.items():
            path = self.path / name
            if name not in found:
                faults.append(f"{name} is missing")
            elif (size := path.stat().st_size) < entry["bytes"]:
                faults.append(f"{name} is cut: {size} of {entry['bytes']} bytes")
            elif size != entry["bytes"] or (must_hash(path, manifest_time) and sha256_of_file(path) != entry["sha256"]):
                faults.append(f"{name} is changed")
        faults += [f"{name} is added" for name in sorted(found - recorded.keys())]
        if _digest(recorded) != self.digest:
            faults.append(f"{MANIFEST} is changed")
        return faults


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
            manifest = _json_in(file)
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
        except ValueError as fault:
            raise FileFault(
                f"{file} is damaged: {fault}", f"restore it, or remove {path} and run that stage again"
            ) from fault
        artifact = Artifact(f"{path.parent.name}/{path.name}", path.parent.name, path, manifest)
        self._known[path] = identity, artifact
        return artifact

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """The complete ones, oldest first: of one stage in the order of their numbers, of all in the order of time."""
        if stage is not None:
            return [artifact for path in self._folders(stage) if (artifact := self._read(path))]
        stages = sorted(p.name for p in self.root.iterdir() if p.is_dir()) if self.root.is_dir() else []
        found = [artifact for name in stages if not name.startswith(".") for artifact in self.artifacts(name)]
        return sorted(found, key=lambda artifact: artifact.manifest["finished"])

    def current(self, stage: str, where: Callable[[Artifact], bool] | None = None) -> Artifact | None:
        """The artifact of a stage that was asked for last, if `where` holds for it, or else the newest for which it
        does.

        Asking for an older configuration again finds its artifact up to date, and the stages after it go on from there.
        """
        folders = self._folders(stage)
        try:
            with open(self.root / stage / CURRENT, encoding="utf-8", opener=_regular) as file:
                last = file.read(64).strip()
        except (OSError, ValueError):  # a hint, without which the newest counts
            last = ""
        for path in sorted(folders, key=lambda path: (path.name == last, int(path.name)), reverse=True):
            artifact = self._read(path)
            if artifact and (where is None or where(artifact)):
                return artifact
        return None

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
        path = self.root / artifact.stage / CURRENT
        if self.current(artifact.stage) != artifact:
            part = path.with_name(path.name + ".part")
            part.unlink(missing_ok=True)  # what is written here must not go through a link to somewhere else
            part.write_text(artifact.path.name + "\n", encoding="utf-8")
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
        return self.root / stage / f".draft-{key[:16]}"

    def interrupted(self, stage: str, key: str) -> bool:
        """Whether an unfinished run of that key lies there."""
        folder = self._draft_folder(stage, key)
        return _holds_work(folder) and _state_of(folder).get("key") == key

    def drafts(self) -> list[tuple[str, dict[str, Any]]]:
        """(stage, recorded request) of every unfinished run, under way or interrupted."""
        folders = sorted(self.root.glob("*/.draft-*")) if self.root.is_dir() else []
        return [(folder.parent.name, _state_of(folder)["request"]) for folder in folders if _holds_work(folder)]

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
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise HqdmError(
                f"process {holder} is working on {stage} in {self.root}",
                "wait until it is done, stop it, or use another --workspace",
            ) from fault
        try:
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
            return Draft(self, stage, key, request, lock, afresh)
        except BaseException:
            os.close(lock)
            raise


def _state_of(folder: Path) -> dict[str, Any]:
    """What an unfinished run recorded; empty where it was stopped before it could."""
    try:
        state = _json_in(folder / "draft.json")
        known = isinstance(state, dict) and isinstance(state.get("key"), str) and isinstance(state.get("request"), dict)
        numbers = (state[name] for name in ("seconds", "session") if state.get(name) is not None) if known else ()
        if not known or not all(isinstance(value, int | float) and value >= 0 for value in numbers):
            raise ValueError("it is not what a run records of itself")
        return state
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as fault:
        raise FileFault(
            f"{folder / 'draft.json'} is damaged: {fault}", f"remove {folder}, its run starts again"
        ) from fault


def _holds_work(folder: Path) -> bool:
    """Whether anything of the run is left: a state and at least one file beside it."""
    if not (folder / "draft.json").exists():
        return False
    return any(True for part in ("out", "work") for path in (folder / part).rglob("*") if path.is_file())


class Draft:
    """A run under way. `path` takes the final files, `work` the state to resume from; `work` goes at the commit.

    Use it as a context manager: whatever happens inside, the lock goes; without a commit the draft stays.
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
        state = _state_of(self._folder)
        self.resumed = not afresh and state.get("key") == key and _holds_work(self._folder)
        if not self.resumed:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            state = {}
        self.path.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        for left in (self.path / MANIFEST, self.path / (MANIFEST + ".part")):  # of a commit that was cut short
            left.unlink(missing_ok=True)
        now = time.time()
        self._begun = time.monotonic()
        self._seconds = state.get("seconds", 0.0) + self._lost_seconds(state)
        self._state = {
            "key": key,
            "request": {"stage_version": 1, "config": {}, "inputs": {}, "seed": None} | dict(request),
            "started": state.get("started") or utc(now),
            "seconds": self._seconds,
            "session": now,
        }
        _write_json(self._folder / "draft.json", self._state)

    def _lost_seconds(self, state: Mapping[str, Any]) -> float:
        """How long a killed run had worked: it could not write its seconds down, but its newest file tells."""
        if state.get("session") is None:
            return 0.0
        times = [path.stat().st_mtime for part in (self.path, self.work) for path in part.rglob("*") if path.is_file()]
        return max(0.0, max(times, default=0.0) - state["session"])

    @property
    def seconds(self) -> float:
        """Time at work so far, over all resumes."""
        return self._seconds + time.monotonic() - self._begun

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *fault: object) -> None:
        try:
            if self._folder.exists():
                _write_json(self._folder / "draft.json", self._state | {"seconds": self.seconds, "session": None})
        finally:
            os.close(self._lock)

    def commit(self, figures: Mapping[str, Any]) -> Artifact:
        """Seal the files in `path` as the stage's next artifact."""
        names = _files_under(self.path)
        files = {}
        for name in names:
            _sync(self.path / name)
            files[name] = {"sha256": sha256_of_file(self.path / name), "bytes": (self.path / name).stat().st_size}
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
        _write_json(self.path / MANIFEST, manifest)
        parent = self._folder.parent
        number = 1 + max((int(path.name) for path in self._store._folders(self._stage)), default=0)
        home = parent / f"{number:04d}"
        self.path.rename(home)
        _sync(parent)
        shutil.rmtree(self._folder)
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
