"""The transforms of `spec.Transform` on tensors.

Everything here is *raw*: entries ±1 and no 2^(−k/2). A raw transform maps integers to integers exactly, and the factor
that undoes it, 1/order, is a power of two: dividing a scale by it rounds nothing.
"""

import hashlib
from functools import lru_cache

import torch

from pipelines import native
from pipelines.quant.spec import Transform


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
def signs_of(transform: Transform, device: torch.device | None = None) -> torch.Tensor | None:
    """The diagonal of D (order,) fp32, or None where there is none; on the processor unless a device is named, to which
    it is sent once.
    """
    return None if transform.signs is None else sign_diagonal(transform.order, transform.signs).to(device)


def matrix(transform: Transform) -> torch.Tensor:
    """M = D·H_raw (order, order), fp32, with M·Mᵀ = order·I."""
    return sign_diagonal(transform.order, transform.signs)[:, None] * hadamard(transform.order)


def rotate_last(x: torch.Tensor, transform: Transform, inverse: bool = False) -> torch.Tensor:
    """x·blockdiag(M, …) along the last dimension; with `inverse`, x·blockdiag(Mᵀ, …), which is order times the
    inverse.

    Defined as D, where there are signs, and log₂(order) stages of butterflies: values 1, 2, 4, … apart within a block
    become a + b and a − b (`inverse`: the butterflies, then D). Additions in a fixed order have the same bits on every
    machine, which matrix products have not. fp32 on a processor takes compiled butterflies where there are such.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotated.apply(x, transform, inverse)
    return _rotated(x.contiguous(), transform, inverse)


def _rotated(x: torch.Tensor, transform: Transform, inverse: bool) -> torch.Tensor:
    compiled = compiled_for(x, x.numel(), transform.order)
    if compiled is None:
        return _butterflies(x, transform, inverse)
    y, signs = torch.empty_like(x), signs_of(transform)
    compiled.hqdm_rotate(
        x.data_ptr(), y.data_ptr(), x.numel(), transform.order, None if signs is None else signs.data_ptr(), inverse,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Rotated(torch.autograd.Function):
    """The gradient of x·M is that of x, times Mᵀ."""

    @staticmethod
    def forward(ctx, x, transform, inverse):
        ctx.transform, ctx.inverse = transform, inverse
        return _rotated(x.contiguous(), transform, inverse)

    @staticmethod
    def backward(ctx, grad):
        return rotate_last(grad, ctx.transform, not ctx.inverse), None, None


def compiled_for(x: torch.Tensor, length: int, order: int):
    """The compiled kernels, where they take what x holds in rows of `length`; else None."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and length % max(order, native.LANES) == 0
    return native.library() if fits else None


def _butterflies(x: torch.Tensor, transform: Transform, inverse: bool) -> torch.Tensor:
    order, signs = transform.order, signs_of(transform, x.device)
    signs = None if signs is None else signs.to(x.dtype)
    y = x.reshape(-1, order)
    if signs is not None and not inverse:
        y = y * signs
    half = 1
    while half < order:
        a, b = y.view(-1, order // (2 * half), 2, half).unbind(2)
        y = torch.stack([a + b, a - b], 2)
        half *= 2
    y = y.view(-1, order)
    if signs is not None and inverse:
        y = y * signs
    return y.view(x.shape)


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
