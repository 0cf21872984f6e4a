"""The transforms of `spec.Transform` on tensors.

Everything here is *raw*: entries ±1 and no 2^(−k/2). A raw transform maps integers to integers exactly, and the factor
that undoes it, 1/order, is a power of two: dividing a scale by it rounds nothing.
"""

import hashlib
from functools import lru_cache

import torch

from pipelines.quant.spec import Transform

NARROW = 16  # a product with a smaller matrix takes twice as long; several blocks are one matrix then, with equal sums


def hadamard(order: int) -> torch.Tensor:
    """Sylvester's ±1 matrix H_raw (order, order), fp32 (paper, equation 7, without the 1/√2)."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def sign_diagonal(order: int, seed: int | None) -> torch.Tensor:
    """The diagonal of D (order,), ±1 in fp32; all ones without a seed.

    The signs are the bits of SHA-256("hqdm signs <seed>"), at most 256 of them: exports are decoded with them, so they
    may not hang on the random numbers of some library's version.
    """
    if seed is None:
        return torch.ones(order)
    digest = hashlib.sha256(f"hqdm signs {seed}".encode()).digest()
    return torch.tensor([1.0 if digest[index // 8] >> (index % 8) & 1 else -1.0 for index in range(order)])


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a cached tensor made while sampling could not take part in a backward pass later
def _matrix(transform: Transform) -> torch.Tensor:
    return sign_diagonal(transform.order, transform.signs)[:, None] * hadamard(transform.order)


def matrix(transform: Transform) -> torch.Tensor:
    """M = D·H_raw (order, order), fp32, with M·Mᵀ = order·I."""
    return _matrix(transform)


def rotate_last(x: torch.Tensor, transform: Transform, inverse: bool = False) -> torch.Tensor:
    """x·blockdiag(M, …) along the last dimension; with `inverse`, x·blockdiag(Mᵀ, …), which is order times the
    inverse.
    """
    small = matrix(transform)
    if transform.order < NARROW and x.shape[-1] % NARROW == 0:
        small = torch.block_diag(*[small] * (NARROW // transform.order))
    small = small.to(x.device, x.dtype)
    blocks = x.reshape(-1, small.shape[0])
    return (blocks @ (small.T if inverse else small)).view(x.shape)


def rotate_activation(x: torch.Tensor, transform: Transform, spatial: bool, inverse: bool = False) -> torch.Tensor:
    """Rotate a layer's input along the transform's axis: (…, C) of a linear, (N, C, H, W) of a convolution (`spatial`).

    A convolution's result is channels-last in memory, and so should its input be: then the channels are already the
    last
    dimension and nothing is copied.
    """
    if transform.is_identity:
        return x
    if not spatial:
        return rotate_last(x, transform, inverse)
    if transform.axis == "width":
        return rotate_last(x.contiguous(), transform, inverse).contiguous(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return rotate_last(last, transform, inverse).permute(0, 3, 1, 2)


def rotate_weight(weight: torch.Tensor, transform: Transform, inverse: bool = False) -> torch.Tensor:
    """Rotate a weight (out, in) or (out, in, kh, kw) along its input channels: W·M block by block (W·Mᵀ with
    `inverse`).

    With x̃ = x·M this satisfies x̃·(W·M)ᵀ = order · x·Wᵀ.
    """
    if weight.ndim == 2:
        return rotate_last(weight, transform, inverse)
    return rotate_last(weight.movedim(1, -1).contiguous(), transform, inverse).movedim(-1, 1).contiguous()
