"""Complete artifacts: what a manifest holds, whether it can be one, and whether its files are as they were written."""

import heapq
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import strict_json
from pipelines.errors import FileFault, did_you_mean
from pipelines.workspace.seals import bytes_in, read_values, seal_holds, sha256_of_file, sha256_of_json

KIND = "hqdm artifact"
FORMAT = 2  # 1 had no seal and no times of files; it is still read
MANIFEST = "manifest.json"
STAGE = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
_IDENT = re.compile(STAGE + r"/[0-9]{1,9}")
_MANIFEST = {
    "stage_version": int, "key": str, "config": dict, "inputs": dict, "files": dict, "digest": str, "libraries": dict,
    "machine": dict, "started": str, "finished": str, "seconds": (int, float), "figures": dict,
}  # fmt: skip


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


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over the sorted (name, sha256) of an artifact's files: content only."""
    return sha256_of_json(sorted((name, entry["sha256"]) for name, entry in files.items()))


def links(inputs: Mapping[str, "Artifact"]) -> dict[str, dict[str, str]]:
    """Input artifacts as a manifest records them: role -> id and digest."""
    return {role: {"id": artifact.id, "digest": artifact.digest} for role, artifact in inputs.items()}


def key_of(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, "Artifact"]) -> str:
    """The address of a run: equal keys mean equal results. `config` holds the deciding values only."""
    digests = {role: artifact.digest for role, artifact in inputs.items()}
    return sha256_of_json({"stage": stage, "version": version, "config": dict(config), "inputs": digests})


def files_under(folder: Path) -> list[str]:
    """Every file below `folder` except its manifest, as sorted names with forward slashes."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


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

    def values(self, name: str) -> Any:
        """What one of its JSON files holds. FileFault as `file`, and where it cannot be read."""
        return read_values(self.file(name), self.redo)

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
        found = set(files_under(self.path))
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
        if digest_of(recorded) != self.digest or (sealed and not seal_holds(data)):
            faults.append(f"{MANIFEST} is changed")
        return faults


def _is_touched(file: os.stat_result, entry: Mapping[str, Any], manifest: os.stat_result) -> bool:
    """By the recorded time in both directions, since a clock may go backwards; format 1 recorded none."""
    if "mtime_ns" in entry:
        return file.st_mtime_ns != entry["mtime_ns"]
    return file.st_mtime_ns >= manifest.st_mtime_ns


def _unreadable(fault: OSError) -> str:
    return "is missing" if isinstance(fault, FileNotFoundError) else f"cannot be read: {fault.strerror}"


def numbered(folder: Path) -> list[Path]:
    """The folders of a stage's artifacts, by their numbers; some may lack a manifest."""
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((p for p in entries if p.name.isdecimal()), key=lambda p: int(p.name))


def read_artifact(path: Path) -> Artifact:
    """The artifact in the folder `path`. FileNotFoundError or NotADirectoryError without a manifest; FileFault for one
    that no commit of this version or an older one wrote.
    """
    file = path / MANIFEST
    try:
        manifest = strict_json(bytes_in(file).decode())
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND or type(manifest.get("format")) is not int:
            raise FileFault(f"{file} is not the manifest of an artifact", "keep other files out of the workspace")
        if manifest["format"] > FORMAT:
            raise FileFault(f"{file} has format {manifest['format']}, newer than {FORMAT}", "update hqdm to read it")
        _check_manifest(manifest)
    except (ValueError, RecursionError) as fault:
        raise FileFault(
            f"{file} is damaged: {fault}", f"restore it, or remove {path} and run that stage again"
        ) from fault
    return Artifact(f"{path.parent.name}/{path.name}", path.parent.name, path, manifest)


def in_order(rows: Iterable[list[Artifact]]) -> list[Artifact]:
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
