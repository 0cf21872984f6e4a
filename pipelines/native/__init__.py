"""Kernels in C++, built once for this machine by the compiler that is there and kept in a cache folder.

Rotations, quantisers and integer products (exact.cpp, training.cpp, products.cpp) are defined in torch, elsewhere, and
have the same bits here; attention, norms and gates are floating point, and take the place of torch's. Here is only how
they are built and called. Where there is no compiler `library` is None, and torch computes: slower, the same integers.
`state` says which it is and why. HQDM_NATIVE=0 leaves them out.

This is floor 0: numbers and addresses, no torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
# Contraction into fused multiply-adds would change bits where integers hang on them.
SOURCES = {
    "exact.cpp": "-ffp-contract=off", "training.cpp": "-ffp-contract=off", "attention.cpp": "-ffp-contract=fast",
    "attention8.cpp": "-ffp-contract=fast", "products.cpp": "-ffp-contract=off",
}  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
# errno and traps of rounding are of no use and cost vectors.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
THREADS = ("-fopenmp",)  # torch's own threads, where its OpenMP is the compiler's
LANES = 16  # of the widest vectors: what divides by max(order, 16) suits every machine
BUILDING = "building-"  # how folders begin in which a library is built
PATIENCE = 300  # seconds that a compiler may take


class Weight(ctypes.Structure):
    """Rows of a weight as training.cpp reads them; what each address holds is said there."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("base", "codes", "base_scale", "base_zero", "gain", "scale", "zero", "lows", "highs", "signs")
    ]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "columns", "channels")]
    _fields_ += [(name, ctypes.c_float) for name in ("low", "high")]
    _fields_ += [(name, ctypes.c_int32) for name in ("order", "turned", "folded")]


PRODUCT_DEPTH = 4  # inputs that products.cpp takes at a time


class Product(ctypes.Structure):
    """A layer as products.cpp knows it; what each address holds is said there."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "groups", "outputs", "inputs", "kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x",
            "dilation_y", "dilation_x", "words", "segments",
        )
    ]  # fmt: skip
    _fields_ += [(name, ctypes.c_void_p) for name in ("packed", "sums", "plan")]


@dataclass(frozen=True)
class State:
    """What became of the library: the file that is loaded, or why there is none. threaded: whether its compiler had
    OpenMP; else all of it runs on one thread.
    """

    path: Path | None
    compiler: str = ""
    why_not: str = ""
    threaded: bool = True


def cache_folder() -> Path:
    """Where built libraries are kept: HQDM_CACHE, or hqdm in the user's cache folder (XDG)."""
    named = os.environ.get("HQDM_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqdm"


@lru_cache(maxsize=1)
def _built() -> tuple[ctypes.CDLL | None, State]:
    if os.environ.get("HQDM_NATIVE") == "0":
        return None, State(None, why_not="HQDM_NATIVE is 0")
    named = os.environ.get("CXX")
    compiler = next((found for name in ([named] if named else COMPILERS) if (found := shutil.which(name))), None)
    if compiler is None:
        missing = f"there is no C++ compiler ({', '.join(COMPILERS)})"
        return None, State(None, why_not=f"CXX names {named}, which is not there" if named else missing)
    try:
        path = _compiled(compiler)
        found = _declared(ctypes.CDLL(str(path)))
        return found, State(path, compiler, threaded=bool(found.hqdm_threaded()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        reason = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
        return None, State(None, compiler, f"{compiler} built no library: {reason.splitlines()[0]}")


def library() -> ctypes.CDLL | None:
    """The kernels, built where they are not yet; None where they cannot be."""
    return _built()[0]


def state() -> State:
    """Which library is in use, or why none is; builds it where it is not yet."""
    return _built()[1]


def _machine() -> str:
    """What -march=native looks at: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.system()} {platform.machine()} {flags}"


def _compiled(compiler: str) -> Path:
    """The library's file, from the cache or built now. Two processes that build at once write the same file."""
    version = _run([compiler, "--version"])
    texts = [path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    parts = [*texts, *SOURCES.values(), *FLAGS, *THREADS, version, _machine()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:  # whoever can write there could have this process run code
        raise PermissionError(f"{folder} is somebody else's, or others may write to it")
    _sweep(folder)
    path = folder / f"kernels-{key}.so"
    if path.exists() and _is_whole(path):
        return path
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder) as work:
        made = Path(work) / path.name
        try:
            _compile(compiler, Path(work), made, THREADS)
        except subprocess.CalledProcessError:  # a compiler without OpenMP still gives one thread
            _compile(compiler, Path(work), made, ())
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())  # loaders read no further than the headers say
        made.replace(path)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was built: what a stopped machine or a full disk left of one would end the process."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed were building in. One at work adds a file at least every PATIENCE."""
    for left in folder.glob(f"{BUILDING}*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 2 * PATIENCE:
                shutil.rmtree(left, ignore_errors=True)


def _compile(compiler: str, work: Path, made: Path, threads: Sequence[str]) -> None:
    objects = []
    for name, contraction in SOURCES.items():
        objects.append(str(work / f"{name}.o"))
        _run([compiler, *FLAGS, *threads, contraction, "-c", str(FOLDER / name), "-o", objects[-1]])
    _run([compiler, "-shared", *threads, *objects, "-o", str(made)])


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, stderr=run.stderr)
    return run.stdout


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    count = ctypes.c_int64
    found.hqdm_rotate.argtypes = [address, address, count, number, address, number, number]
    found.hqdm_codes.argtypes = [
        address, address, count, count, number, address, address, address, real, real, real, ctypes.c_int32,
        ctypes.c_char_p, count, address, address, count, number, number, number,
    ]  # fmt: skip
    found.hqdm_made.argtypes = [address, address, count, count, address, address, count, number, number, number]
    found.hqdm_group_norm_scratch.argtypes = [count, count, count]
    found.hqdm_group_norm_scratch.restype = count
    found.hqdm_group_norm.argtypes = [
        address, address, address, count, count, count, count, address, address, address, ctypes.c_double, address,
        number,
    ]  # fmt: skip
    weight = ctypes.POINTER(Weight)
    found.hqdm_weight_codes.argtypes = [weight, address, address, address, number, address, number]
    found.hqdm_weight_gradient.argtypes = [weight, address, number, address, address, address, number]
    found.hqdm_activation.argtypes = [
        address, address, count, count, number, address, real, real, real, number, number
    ]  # fmt: skip
    found.hqdm_activation_gradient.argtypes = [
        address, address, address, count, count, number, address, real, real, real, number, number
    ]  # fmt: skip
    found.hqdm_attention_scratch.argtypes = [count, count, count, count, count, number]
    found.hqdm_attention_scratch.restype = count
    found.hqdm_attention.restype = None
    found.hqdm_attention.argtypes = [
        address, address, address, address, count, count, count, count, count, real, address, number
    ]  # fmt: skip
    found.hqdm_attention8.argtypes = [
        address, address, address, address, count, count, count, count, count, real, number
    ]  # fmt: skip
    product = ctypes.POINTER(Product)
    found.hqdm_product_size.argtypes = [product]
    found.hqdm_product_size.restype = count
    found.hqdm_product_pack.restype = None
    found.hqdm_product_pack.argtypes = [product, address, count, address, address, address]
    found.hqdm_product_scratch.argtypes = [product, count, count, count]
    found.hqdm_product_scratch.restype = count
    found.hqdm_product.argtypes = [
        product, address, count, count, count, ctypes.c_int32, address, address, address, address, number
    ]  # fmt: skip
    return found
