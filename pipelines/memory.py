"""How the process gets memory from the system."""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them in glibc's malloc.h


def reuse_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next operator instead of handing every large one back to the kernel.

    Activations of some megabytes are allocated and freed by every operator; by default each one is mapped anew and its
    pages are cleared one fault at a time, which cost a quarter of the embedded model's step. Returns False, and changes
    nothing, on a C library without mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
