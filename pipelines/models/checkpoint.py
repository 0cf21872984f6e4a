"""Reading of tensors from files that nobody vouches for: torch's zip archives and safetensors.

Nothing in a file runs and nothing that a file merely claims is allocated. A torch archive's pickle is not unpickled: a
small machine reads its instructions as data, so that the few names which describe tensors mean something, known
wrappers of training frameworks mean nothing, and all others are refused. Tensors are views of the mapped file.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pipelines.config import LARGEST_KEY
from pipelines.errors import FileFault

MOST_PICKLE = 16 << 20  # bytes; 100,000 tensors take as many
MOST_INSTRUCTIONS = 1_500_000  # of it; a tensor takes 40
MOST_HEADER = 16 << 20  # of a safetensors file
_ALIASES = 2  # times the file's size that its tensors may claim: tied weights stand there once
_MOST_DIMENSIONS = 64  # torch's own limit

# Wrappers that training frameworks leave beside the tensors. Anything else that is not a tensor's is refused.
_KNOWN_WRAPPERS = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype",
)  # fmt: skip
# Plain values that stand beside tensors; none of them is of use here.
_PLAIN = (
    "collections.Counter", "torch.Size", "torch.device", "torch.nn.parameter.Parameter", "_codecs.encode",
    "builtins.set", "__builtin__.set", "builtins.complex", "__builtin__.complex",
)  # fmt: skip
_ORDERED = "collections.OrderedDict"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = tuple(f"torch.{str(dtype).removeprefix('torch.')}" for dtype in _STORAGES.values())

# What zipfile, struct, torch and safetensors raise on bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile, struct.error, SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError,
    AttributeError, LookupError, AssertionError, OverflowError, MemoryError, NotImplementedError,
)  # fmt: skip

_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch before 1.6 begins a file
_AGAIN = "fetch the file again"
_KINDS = (
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself", "fetch it with git lfs pull"),
    (b"<", "a web page or XML", "fetch the file itself, not the page that shows it"),
    (b"GGUF", "a GGUF file", "give the model's safetensors, from before its conversion"),
    (b"\x89HDF", "an HDF5 file", "give the model's safetensors or its torch checkpoint"),
    (_TORCH_LEGACY, "a checkpoint of torch before 1.6", "save it anew by a newer torch, or as safetensors"),
)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The named tensors of a torch archive or a safetensors file, told apart by what is in it, not by its name; and
    the qualified names of the wrapper objects that were left out.

    The tensors are on the CPU, of the file's dtypes, views of the mapped file where its alignment allows. Raises
    FileFault for a file that is missing, of another kind, damaged, cut short, or that claims more than it holds.
    """
    path = Path(path)
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return read_checkpoint(path)
    if head[8:9] == b"{":
        return _read_safetensors(path, head), []
    _refuse_kind(path, head)
    if _is_archive(path):
        return read_checkpoint(path)
    raise FileFault(
        f"{path}: neither a torch checkpoint (a zip archive that torch.save writes) nor safetensors, or cut short",
        f"{_AGAIN}, or save the state dict as safetensors",
    )


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of a .ckpt/.pt/.bin file and the qualified names of the wrapper objects that were left out.

    Raises FileFault for a file that is missing, no torch archive, damaged, without tensors, that names code other
    than the known wrappers, or whose tensors are larger than what it holds.
    """
    path = Path(path)
    _refuse_kind(path, _head(path))
    if not _is_archive(path):
        raise FileFault(
            f"{path}: not a torch checkpoint (a zip archive that torch.save writes), or cut short",
            f"{_AGAIN}; a checkpoint of torch before 1.6 must be saved anew by a newer torch",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = _Records(path, archive)
            machine = _Machine(records.storage, _ALIASES * records.size)
            refused = machine.refused(records.pickled)
            if special := [name for name in refused if name.startswith("torch.")]:
                raise FileFault(
                    f"{path}: holds tensors that are not plain numbers: {', '.join(sorted(special))}",
                    "sparse, quantised and complex tensors are not read; save the state dict in fp32 or half precision",
                )
            if refused:
                raise FileFault(
                    f"{path}: the pickle names code that tensors do not need: {', '.join(sorted(refused))}",
                    "nothing was run; save the state dict alone, or as safetensors, where you trust the file",
                )
            content = machine.run(records.pickled)
    except _DAMAGE as error:
        raise FileFault(f"{path}: damaged checkpoint: {first_line(error)}", _AGAIN) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    entries = state.items() if isinstance(state, dict) else ()
    state = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not state:
        raise FileFault(f"{path}: holds no tensors under names", "give a checkpoint with a state dict")
    return state, sorted(machine.left_out)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _head(path: Path) -> bytes:
    """The first bytes of a regular file."""
    try:
        if path.is_dir():
            raise FileFault(f"{path}: a folder, not a file", "name a file in it")
        if not path.is_file():
            raise FileFault(f"{path}: there is no such file", "give the path of a checkpoint, for example model.ckpt")
        with path.open("rb") as file:
            return file.read(64)
    except (OSError, ValueError) as error:
        raise FileFault(f"{path}: cannot be read: {first_line(error)}", "check its permissions") from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except _DAMAGE:  # of an archive in several parts, say
        return False


def _refuse_kind(path: Path, head: bytes) -> None:
    """FileFault for kinds of files that are often taken for a checkpoint."""
    if not head:
        raise FileFault(f"{path}: not a torch checkpoint: the file is empty", _AGAIN)
    for magic, what, hint in _KINDS:
        if head.startswith(magic):
            raise FileFault(f"{path}: not a torch checkpoint or safetensors, but {what}", hint)


def _read_safetensors(path: Path, head: bytes) -> dict[str, torch.Tensor]:
    size, header = path.stat().st_size, int.from_bytes(head[:8], "little")
    if header > MOST_HEADER:
        raise FileFault(
            f"{path}: damaged safetensors: its header claims {header} bytes (at most {MOST_HEADER})", _AGAIN
        )
    if header + 8 > size:
        raise FileFault(
            f"{path}: damaged safetensors: its header claims {header} bytes, the file has {size}: cut short", _AGAIN
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except _DAMAGE as error:
        raise FileFault(f"{path}: damaged safetensors: {first_line(error)}", _AGAIN) from error
    if not state:
        raise FileFault(f"{path}: holds no tensors under names", "give a file with a model's weights")
    return state


class _Storage(NamedTuple):
    """A record of the archive as numbers of one dtype."""

    numbers: torch.Tensor


class _Records:
    """The records of a torch archive: its pickle, read, and its storages, mapped."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive, self.size = path, archive, path.stat().st_size
        self._mapped: torch.Tensor | None = None
        self._copies: dict[str, torch.Tensor] = {}  # of records that no view can read, by key
        self._copied = 0  # bytes
        names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"{len(names) or 'no'} record data.pkl, so torch.save did not write it")
        self.folder = names[0].removesuffix("data.pkl")
        if f"{self.folder}constants.pkl" in archive.namelist():
            raise ValueError("a TorchScript program, not a state dict")
        if f"{self.folder}byteorder" in archive.namelist() and self._read("byteorder", 16) != b"little":
            raise ValueError("big-endian numbers; save it on a little-endian machine")
        self.pickled = self._read("data.pkl", MOST_PICKLE)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self.archive.getinfo(f"{self.folder}{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"the record {name} is compressed or encrypted, which torch.save never does")
        if entry.file_size > self.size:
            raise ValueError(f"the record {name} claims {entry.file_size} bytes, the file has {self.size}")
        return entry

    def _read(self, name: str, most: int) -> bytes:
        entry = self._entry(name)
        if entry.file_size > most:
            raise ValueError(f"the record {name} has {entry.file_size} bytes (at most {most})")
        return self.archive.read(entry)

    def storage(self, dtype: torch.dtype, key: str, count: int) -> _Storage:
        """`count` numbers of the record data/`key`."""
        entry = self._entry(f"data/{key}")
        nbytes = count * dtype.itemsize
        if not 0 <= nbytes <= entry.file_size:
            raise ValueError(f"a storage claims {nbytes} bytes, its record data/{key} has {entry.file_size}")
        with self.path.open("rb") as file:  # the central directory does not say where a record's bytes begin
            file.seek(entry.header_offset)
            header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"the record data/{key} is not where the archive says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > self.size:
            raise ValueError(f"the record data/{key} ends beyond the file's end")
        if self._mapped is None:
            self._mapped = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        if start % dtype.itemsize == 0:
            return _Storage(self._mapped[start : start + nbytes].view(dtype))
        return _Storage(self._copy(key, self._mapped[start : start + entry.file_size])[:nbytes].view(dtype))

    def _copy(self, key: str, record: torch.Tensor) -> torch.Tensor:
        """A record's bytes, aligned; made once. Records that lie over one another would otherwise grow without end."""
        if key not in self._copies:
            self._copied += len(record)
            if self._copied > self.size:
                raise ValueError(f"its unaligned records claim more than the file's {self.size} bytes")
            self._copies[key] = record.clone()
        return self._copies[key]


class _Name(NamedTuple):
    """What the pickle names; it is never looked up."""

    name: str


class _Opaque:
    """Stands for every value that is neither a tensor nor a plain value; it keeps nothing."""


class _Machine:
    """Reads a pickle of protocol 2 as torch.save writes it, and makes mappings, lists, plain values and tensors.

    storage: what a persistent id stands for. most: bytes that all tensors together may claim.
    """

    def __init__(self, storage: Callable[[torch.dtype, str, int], _Storage], most: int):
        self.storage, self.most, self.claimed = storage, most, 0
        self.stored: dict[tuple, _Storage] = {}
        self.left_out: set[str] = set()

    def refused(self, pickled: bytes) -> set[str]:
        """The names in the pickle that are neither a tensor's nor a known wrapper's; nothing else is looked at."""
        found = set()
        for number, (code, arg, _) in enumerate(pickletools.genops(pickled)):
            if code.name == "GLOBAL":
                found.add(arg.replace(" ", ".", 1))
            if number > MOST_INSTRUCTIONS:
                raise ValueError(f"a pickle of more than {MOST_INSTRUCTIONS} instructions")
        self.left_out = {name for name in found if name.startswith(_KNOWN_WRAPPERS)}
        return found - self.left_out - {*_PLAIN, *_DTYPES, *_STORAGES, _ORDERED, _TENSOR, _PARAMETER}

    def run(self, pickled: bytes) -> Any:
        """What the pickle describes; ValueError, TypeError or LookupError for one that makes no sense."""
        stack: list[Any] = []
        marks: list[int] = []  # heights of the stack
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            height = marks.pop()
            values = stack[height:]
            del stack[height:]
            return values

        for code, arg, _ in pickletools.genops(pickled):
            match code.name:
                case "PROTO":
                    pass
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                    stack.append(arg)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(code.name[-1])
                    values = tuple(stack[-count:])
                    if len(values) < count:
                        raise ValueError("a tuple of nothing")
                    stack[-count:] = [values]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "MARK":
                    marks.append(len(stack))
                case "APPEND" | "APPENDS":
                    values = [stack.pop()] if code.name == "APPEND" else since_mark()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(values)
                    elif not isinstance(stack[-1], _Opaque):
                        raise ValueError("an entry of what is no list")
                case "SETITEM" | "SETITEMS":
                    if code.name == "SETITEM":
                        marks.append(len(stack) - 2)
                    values = since_mark()
                    if isinstance(stack[-1], dict):
                        self._set(stack[-1], values)
                    elif not isinstance(stack[-1], _Opaque):
                        raise ValueError("an item of what is no mapping")
                case "GLOBAL":
                    stack.append(_Name(arg.replace(" ", ".", 1)))
                case "REDUCE" | "NEWOBJ":
                    args = stack.pop()
                    stack.append(self._made(stack.pop(), args))
                case "BUILD":
                    stack.pop()  # attributes: nothing here has any
                case "BINPERSID":
                    stack.append(self._stored(stack.pop()))
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(f"the pickle's instruction {code.name}, which torch.save does not write")
        raise EOFError("the pickle has no end")

    @staticmethod
    def _set(mapping: dict, values: list[Any]) -> None:
        """Pairs whose keys are words or small numbers; others (deeply nested, say) are of no use here and left out.
        Large whole numbers can be chosen to have one hash, and a mapping of such takes quadratic time.
        """
        for key, value in zip(values[::2], values[1::2], strict=True):
            if key is None or isinstance(key, str | float) or (isinstance(key, int) and abs(key) < LARGEST_KEY):
                mapping[key] = value

    def _made(self, maker: Any, args: Any) -> Any:
        if not isinstance(maker, _Name) or not isinstance(args, tuple):
            raise ValueError("an object of no class")
        if maker.name == _ORDERED:
            return {}
        if maker.name == _TENSOR:
            return self._tensor(*args[:4])
        if maker.name == _PARAMETER:
            return args[0]
        return _Opaque()

    def _stored(self, identity: Any) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) < 5 or not isinstance(identity[1], _Name):
            raise ValueError("a storage without a type")
        _, kind, key, _, count = identity[:5]
        if kind.name not in _STORAGES or not isinstance(key, str) or not _whole(count):
            raise ValueError(f"a storage of type {kind.name}")
        if (kind, key, count) not in self.stored:
            self.stored[kind, key, count] = self.storage(_STORAGES[kind.name], key, count)
        return self.stored[kind, key, count]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        """A view, once it is known to lie within its storage and to be no larger."""
        if not isinstance(storage, _Storage) or not _whole(offset):
            raise ValueError("a tensor without a storage")
        if not isinstance(size, tuple) or len(size) > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor whose shape is not one of at most {_MOST_DIMENSIONS} whole numbers")
        for values in (size, stride):
            if not isinstance(values, tuple) or len(values) != len(size) or not all(map(_whole, values)):
                raise ValueError("a tensor whose shape and strides are not whole numbers")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        held = len(storage.numbers)
        if count and (last >= held or count > held):
            raise ValueError(f"a tensor of shape {size} with strides {stride} in a storage of {held} numbers")
        self.claimed += count * storage.numbers.itemsize
        if self.claimed > self.most:
            raise ValueError(f"its tensors claim more than {self.most} bytes, {_ALIASES} times the file's size")
        return storage.numbers.as_strided(size, stride, storage.numbers.storage_offset() + (offset if count else 0))


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48
