"""Hashes of files and values, and records of JSON that end with a hash of themselves."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config import strict_json
from pipelines.errors import FileFault

MOST_BYTES = 64 << 20  # of a record; the manifest of 100,000 images has 15 million
_CHUNK = 1 << 20  # bytes
_UNSEALED = "0" * 64  # what stands in the seal's place while it is computed
_SEAL = re.compile(rb'\n "seal": "([0-9a-f]{64})"\n}\n\Z')
# What a disk can do to any write, whichever library was writing.


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


def sha256_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def bytes_in(path: Path) -> bytes:
    """The content of a regular file of JSON. ValueError for anything else that is there: a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return data


def read_values(path: Path, way_out: str, constants: tuple[str, ...] = ()) -> Any:
    """The values in a JSON file that hqdm wrote, as `strict_json` reads them. FileFault, with the way out as its hint,
    where somebody or something has made another file of it.
    """
    try:
        return strict_json(bytes_in(path).decode(), constants)
    except (OSError, ValueError) as fault:
        raise FileFault(f"{path} is damaged: {getattr(fault, 'strerror', None) or fault}", way_out) from fault


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(value: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is the SHA-256 of all its bytes, taken with zeros in the seal's place."""
    text = json.dumps({**value, "seal": _UNSEALED}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_UNSEALED)
    return f"{before}{hashlib.sha256(text.encode()).hexdigest()}{after}".encode()


def seal_holds(data: bytes) -> bool:
    """Whether these are the bytes that `_sealed` wrote."""
    found = _SEAL.search(data)
    if found is None:
        return False
    unsealed = data[: found.start(1)] + _UNSEALED.encode() + data[found.end(1) :]
    return hashlib.sha256(unsealed).hexdigest().encode() == found[1]


def write_sealed(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write beside, sync, rename: the file is the old one or the new one, never a part. What a reader will find."""
    part, data = path.with_name(path.name + ".part"), _sealed(value)
    part.write_bytes(data)
    sync(part)
    part.replace(path)
    sync(path.parent)
    return json.loads(data)


def finite(value: Any) -> Any:
    """JSON has no infinity (the PSNR of equal images) and no NaN: they become the words "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value
