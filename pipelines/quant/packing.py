"""Packing of small integers into bytes: 2, 3, 4 and 8 bits, really packed.

Codes are unsigned after an offset, most significant bit first, rows one after another without gaps between values; the
last byte is filled with zero bits.
"""

import numpy as np

from pipelines.errors import FileFault, UsageError


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of any shape in [0, 2^bits) to a flat uint8 array of ⌈n·bits/8⌉ bytes."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise UsageError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits", f"0 to {2**bits - 1} do")
    places = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return np.packbits(((flat[:, None].astype(np.uint8) >> places) & 1).reshape(-1))


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: uint8 codes of the given shape. FileFault where the bytes cannot be those of `pack`."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != np.uint8 or packed.shape != ((count * bits + 7) // 8,):
        raise FileFault(
            f"packed weights: {packed.dtype} of shape {packed.shape} cannot hold {count} codes of {bits} bits",
            "the file is damaged or of another model: hqdm export --format int --force writes it anew",
        )
    digits = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    return (digits * weights).sum(1, dtype=np.uint8).reshape(shape)
