"""Tensors that an interrupted run goes on from: a file of its draft, whole or not there.

torch reads a changed byte of a tensor as another number, so the file ends with a hash of what stands before it.
"""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_map_only

from pipelines.events import Report

# What torch and the archive's reader raise on bytes that are not what was written.
_DAMAGE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
           MemoryError, ArithmeticError, pickle.UnpicklingError, zipfile.BadZipFile)  # fmt: skip


def _check_size(path: Path) -> None:
    """ValueError for an archive that torch did not write: compressed, or claiming more than the file holds."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it claims more than it holds")


_MARK = b"hqdm sha256 "  # before the hash; torch finds its own end of the file in spite of both
_CHUNK = 1 << 20  # bytes


def _hash_of_first(path: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.digest()


def _is_changed(path: Path) -> bool:
    """Whether the file's end is the hash of something else; one without a hash is of an older hqdm."""
    before = path.stat().st_size - len(_MARK) - hashlib.sha256().digest_size
    if before <= 0:
        return False
    with open(path, "rb") as file:
        file.seek(before)
        end = file.read()
    return end.startswith(_MARK) and end[len(_MARK) :] != _hash_of_first(path, before)


@contextmanager
def in_one_piece(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when it has been written and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_state(path: Path, value: Any) -> None:
    """Replace `path` in one piece by `value`: tensors, wherever they are, and plain values in nested tuples, lists and
    mappings. They are read on the processor.
    """
    value = tree_map_only(torch.Tensor, torch.Tensor.cpu, value)
    with in_one_piece(path) as file:
        torch.save({"value": value, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}, file)
        file.flush()
        file.write(_MARK + _hash_of_first(Path(file.name), file.tell()))


def read_state(path: Path, report: Report) -> Any | None:
    """What was written, or None where nothing was or a power cut left half of it; says so, and where another number of
    threads or version of torch goes on.
    """
    if not path.exists():
        return None
    try:
        if _is_changed(path):
            raise ValueError("its content does not have the hash that it ends with")
        _check_size(path)
        kept = torch.load(path, weights_only=True)
        if not isinstance(kept, dict) or kept.keys() != {"value", "threads", "torch"}:
            raise ValueError("it is not what was written")
    except _DAMAGE as error:
        report.warn(f"{path} is damaged ({error or type(error).__name__}); what it held is made again")
        return None
    threads = torch.get_num_threads()
    if (kept["threads"], kept["torch"]) != (threads, str(torch.__version__)):
        report.warn(
            f"{path.name} was made with {kept['threads']} threads of torch {kept['torch']}, going on with {threads} of "
            f"{torch.__version__}: the result will differ in its last bits from an undisturbed run's"
        )
    return kept["value"]
