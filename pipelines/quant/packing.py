"""Packing of small integers into bytes: 2, 3, 4 and 8 bits, really packed.

Codes are unsigned after an offset, most significant bit first, rows one after another without gaps between values; the
last byte is filled with zero bits.
"""

import numpy as np

from pipelines.errors import UsageError


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of any shape in [0, 2^bits) to a flat uint8 array of ⌈n·bits/8⌉ bytes."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise UsageError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits")
    return np.packbits(((flat[:, None].astype(np.uint8) >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1).reshape(-1))


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: uint8 codes of the given shape."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.size != (count * bits + 7) // 8:
        raise UsageError(f"{packed.size} bytes cannot hold {count} codes of {bits} bits")
    digits = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    return (digits * weights).sum(1, dtype=np.uint8).reshape(shape)
