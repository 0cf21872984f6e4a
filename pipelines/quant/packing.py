"""Packing of small integers into bytes: 2, 3, 4 and 8 bits, really packed.

Codes are unsigned after an offset, most significant bit first, rows one after another without gaps between values; the
last byte is filled with zero bits.
"""

import numpy as np

from pipelines.errors import FileFault, UsageError

_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # by bits: so many codes fill so many bytes


def _place(place: int, bits: int) -> tuple[int, int]:
    """The first byte of a group that a code has bits in, and by how much it is shifted up there; negative: down, and
    the rest is in the next byte.
    """
    first, start = divmod(place * bits, 8)
    return first, 8 - start - bits


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of any shape in [0, 2^bits) to a flat uint8 array of ⌈n·bits/8⌉ bytes."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise UsageError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits", f"0 to {2**bits - 1} do")
    flat = flat.astype(np.uint8, copy=False)
    group, size = _GROUPS[bits]
    words = np.zeros((-(-flat.size // group), size), np.uint8)
    for place in range(group):
        mine = flat[place::group]
        first, shift = _place(place, bits)
        words[: mine.size, first] |= (mine << shift if shift >= 0 else mine >> -shift).astype(np.uint8)
        if shift < 0:  # a code over two bytes
            words[: mine.size, first + 1] |= (mine << (8 + shift)).astype(np.uint8)
    return words.reshape(-1)[: (flat.size * bits + 7) // 8]


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: uint8 codes of the given shape. FileFault where the bytes cannot be those of `pack`."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != np.uint8 or packed.shape != ((count * bits + 7) // 8,):
        raise FileFault(
            f"packed weights: {packed.dtype} of shape {packed.shape} cannot hold {count} codes of {bits} bits",
            "the file is damaged or of another model: hqdm export --format int --force writes it anew",
        )
    group, size = _GROUPS[bits]
    words = np.zeros((-(-count // group), size), np.uint8)
    words.reshape(-1)[: packed.size] = packed
    codes = np.empty((len(words), group), np.uint8)
    for place in range(group):
        first, shift = _place(place, bits)
        byte = words[:, first]
        digits = byte >> shift if shift >= 0 else byte << -shift | words[:, first + 1] >> (8 + shift)
        np.bitwise_and(digits, 2**bits - 1, out=codes[:, place])
    return codes.reshape(-1)[:count].reshape(shape)
