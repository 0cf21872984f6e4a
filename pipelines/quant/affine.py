"""Uniform quantisation as three pure functions: choose the parameters, quantise, dequantise.

Everything that holds integers calls `quantise`: training, export and every kernel's activation side. Rounding is to the
nearest even and division is a true division, in fp32; a reciprocal would move values across a tie.
"""

import math

import torch

SHRINK_STEPS = 80  # EfficientDM's search for a weight scale
TINY = 1e-36  # 100 times fp32's smallest normal number
NORM = 2.4  # the exponent of the error that the search minimises
CACHED = 1 << 16  # values that the search for a scale tries at once


def quantise(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int, overwrite: bool = False
) -> torch.Tensor:
    """Codes: clamp(⌊x / scale⌉ + zero, low, high), integer-valued, in x's dtype (paper, equation 3).

    zero None is 0, and saves a pass. `overwrite` writes over x, which saves an integer layer its largest allocation.
    """
    codes = torch.div(x, scale, out=x if overwrite else None).round_()
    return (codes if zero is None else codes.add_(zero)).clamp_(low, high)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(codes − zero)·scale (paper, equation 4)."""
    return (codes - zero) * scale


class _CentredCodes(torch.autograd.Function):
    """codes − zero, with the straight-through estimator for x and LSQ's gradient for the scale.

    Inside the range d/dx = 1/scale and d/dscale = −x/scale²; outside both vanish and d/dzero = −1. Multiplied by
    the scale
    in the layer's epilogue this gives LSQ (Esser et al., 2020, equation 3): ⌊x/s⌉ − x/s inside, the bound outside.
    """

    @staticmethod
    def forward(ctx, x, scale, zero, low, high):
        codes = torch.div(x, scale).round_()
        if zero is not None:
            codes.add_(zero)
        inside = (codes >= low) & (codes <= high)
        codes.clamp_(low, high)
        if zero is not None:
            codes.sub_(zero)
        ctx.save_for_backward(x, scale, zero, inside)
        return codes

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero, inside = ctx.saved_tensors
        through = torch.where(inside, grad, 0.0).div_(scale)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            grad_scale = _sum_to((through * x).div_(scale).neg_(), scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = _sum_to(torch.where(inside, 0.0, grad).neg_(), zero.shape)
        return through, grad_scale, grad_zero, None, None


def _sum_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum out what broadcasting expanded."""
    return value.sum_to_size(shape) if shape else value.sum()


def centred_codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int) -> torch.Tensor:
    """codes − zero, differentiable in x, scale and zero; x ≈ scale·centred_codes.

    The forward values are those of `quantise(…) − zero`, which is what runs when no gradient is wanted.
    """
    learned = (x, scale) if zero is None else (x, scale, zero)
    if torch.is_grad_enabled() and any(value.requires_grad for value in learned):
        return _CentredCodes.apply(x, scale, zero, low, high)
    codes = quantise(x, scale, zero, low, high)
    return codes if zero is None else codes.sub_(zero)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer; the gradient passes unchanged."""
    return _RoundThrough.apply(x)


def choose(
    x: torch.Tensor, low: int, high: int, steps: int = SHRINK_STEPS, norm: float = NORM
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point of each row of x (rows, n) that minimise Σ|x − x̂|^norm over a shrinking range.

    The range is ±max|x| for a symmetric grid (low = −high) and [min(x, 0), max(x, 0)] otherwise, shrunk in `steps`
    equal steps (EfficientDM). Returns fp32 (rows,) and integer-valued fp32 (rows,). A row of zeros, or nearly, gets
    scale 1; one so large that fp32 does not hold its error gets the scale that covers it.
    """
    x = x.float()
    symmetric = low == -high
    if symmetric:
        top = x.abs().amax(1)
        bottom = -top
    else:
        top, bottom = x.amax(1).clamp(min=0), x.amin(1).clamp(max=0)
    width = top - bottom
    # A width whose step fp32 holds with fewer digits, or not at all, is none: dividing by it would give Inf.
    width = torch.where(width > (high - low) * TINY, width, torch.full_like(width, float(high - low)))
    shares = torch.tensor([1.0 - step / (steps + 1) for step in range(steps)], device=x.device)[:, None]
    trials = width * shares / (high - low)  # (steps, rows)
    shifts = torch.zeros_like(trials) if symmetric else (-bottom * shares / trials).round_().clamp_(low, high)
    errors = []
    # Of small x several trials at once, in as many calls as one; more than a cache holds would be slower together.
    at_once = max(1, CACHED // max(1, x.numel()))
    for some, moved in zip(trials[..., None].split(at_once), shifts[..., None].split(at_once), strict=True):
        error = dequantise(quantise(x, some, moved, low, high), some, moved).sub_(x)
        errors.append((error.square_() if norm == 2 else error.abs_().pow_(norm)).sum(2))
    # The first of the least; an error that fp32 does not hold is none, and without any the whole range stays.
    best = torch.cat(errors).nan_to_num_(nan=math.inf, posinf=math.inf).argmin(0, keepdim=True)
    return trials.gather(0, best)[0], shifts.gather(0, best)[0]


def cover(x: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point of each row of x (rows, n) whose range covers the row's: nothing is clipped."""
    return choose(x, low, high, steps=1)


def sqnr(x: torch.Tensor, approximation: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Signal-to-quantisation-noise ratio in dB along `dim`: 10·log₁₀(Σx² / Σ(x − x̂)²), at most 200."""
    signal = x.double().square().sum(dim)
    noise = (x.double() - approximation.double()).square().sum(dim)
    return (10 * torch.log10(signal / noise.clamp(min=1e-300))).clamp(max=200.0)
