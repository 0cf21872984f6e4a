"""How the process gets memory from the system, and how much it has had."""

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them in glibc's malloc.h
_REUSED = 1 << 25  # bytes: larger blocks are mapped and returned
_APART = 1 << 17  # glibc's own bound at first
_WORTH = 1 << 21  # values, 8 MB in fp32
_scarce = False  # whether memory is scarcer than time
_reusing = False  # whether `reuse_freed_memory` is in force
_PAGEOUT = 21  # madvise's MADV_PAGEOUT in Linux's mman.h


def reuse_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next operator instead of handing every large one back to the kernel.

    Activations of some megabytes are allocated and freed by every operator; by default each one is mapped anew and its
    pages are cleared one fault at a time, which cost a quarter of the embedded model's step. Larger blocks are still
    mapped and returned: they come from large models, whose operators take far longer than the faults, and kept ones
    would make up most of the process. Returns False, and changes nothing, on a C library without mallopt.
    """
    global _scarce, _reusing
    _scarce = False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    _reusing = bool(mallopt(_MMAP_THRESHOLD, _REUSED)) and bool(mallopt(_TRIM_THRESHOLD, 1 << 28))
    return _reusing


@contextmanager
def lasting() -> Iterator[None]:
    """For making what is kept beside temporaries that are not: large blocks are mapped one by one, so that the small
    ones that are kept do not lie between holes. What was allocated in these later held a twentieth of a large model's
    memory.
    """
    if not _reusing:
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _REUSED)


def return_freed_memory() -> None:
    """For where memory is scarcer than time: `give_back` returns free pages every time, and pages of libraries that
    nothing has run since they were loaded leave memory. `reuse_freed_memory` ends it.
    """
    global _scarce
    _scarce = True
    gc.collect()
    give_back()
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in maps:
        addresses, rights, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/") and "w" not in rights:
            first, end = (int(address, 16) for address in addresses.split("-"))
            let_go(first, end - first)


def give_back(values: int = 0) -> None:
    """Return free pages to the system, after temporaries of so many fp32 values were freed. For few it is not worth the
    walk through the heap, unless memory is scarce.
    """
    if _scarce or values >= _WORTH:
        trim()


def trim() -> None:
    """Return free pages to the system now, after something large that happens once."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def reset_peak() -> None:
    """Forget the process's peak so far, where the system can: Linux does, and elsewhere nothing happens."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that the process has had resident since `reset_peak`, bytes; mapped files count while they are.

    Where the system cannot forget a peak it is that of the process's whole life.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The memory that the process has resident now, bytes; where the system does not say, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return peak_bytes()


def free_bytes() -> int | None:
    """The memory that a process could still have without others losing theirs, bytes; None where the system does not
    say.
    """
    try:
        about = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", about, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def let_go(address: int, length: int) -> None:
    """Tell Linux that some bytes of this process will not be read soon: the pages of a mapped file leave memory, and
    come back when they are read. Nothing is lost, whatever lies there; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    page = resource.getpagesize()
    first, end = -(-address // page) * page, (address + length) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _PAGEOUT)
