"""Activations that are still to be made: what a layer's quantiser can make of its input in the pass that quantises.

Fake and integer students take the same, so that their bits agree: a fake one as fp32 (`tensor`), an integer one within
its prologue, by the same lines of C++ (`pipelines/native/exact.cpp`).
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipelines import native


@dataclass(frozen=True)
class Normed:
    """x·factor + term by image and channel, then SiLU where `silu` says so.

    x: (N, C, H, W) fp32, channels-last, or (N, tokens, C). factors, terms: (N, C) fp32.
    """

    x: torch.Tensor
    factors: torch.Tensor
    terms: torch.Tensor
    silu: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, images: torch.Tensor) -> "Normed":
        x = self.x[images]
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
        return Normed(x, self.factors[images], self.terms[images], self.silu)

    def arguments(self) -> tuple[int | None, int | None, int, bool, bool]:
        """How kernels are told: factors, terms, rows of an image, whether SiLU follows, and whether x has gates."""
        return self.factors.data_ptr(), self.terms.data_ptr(), self.x.numel() // self.factors.numel(), self.silu, False

    def tensor(self) -> torch.Tensor:
        """The values, fp32 in the layout of x."""
        return _made(self, torch.empty_like(self.x), self.factors.shape[-1])


@dataclass(frozen=True)
class Gated:
    """Values times the exact GELU of their gates. x: (N, tokens, 2·C) contiguous fp32, a token's values before its
    gates.
    """

    x: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.x.shape[-1] // 2))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, images: torch.Tensor) -> "Gated":
        return Gated(self.x[images].contiguous())

    def arguments(self) -> tuple[int | None, int | None, int, bool, bool]:
        return None, None, 1, False, True

    def tensor(self) -> torch.Tensor:
        """The product, (N, tokens, C) fp32."""
        return _made(self, self.x.new_empty(self.shape), self.shape[-1])


Pending = Normed | Gated


def _made(pending: Pending, y: torch.Tensor, channels: int) -> torch.Tensor:
    fault = native.library().hqdm_made(
        pending.x.data_ptr(), y.data_ptr(), y.numel() // channels, channels, *pending.arguments(),
        torch.get_num_threads(),
    )  # fmt: skip
    if fault:
        raise ValueError(f"compiled kernels make no activations of {channels} channels, which can_pend tells")
    return y


def can_pend(x: torch.Tensor, channels: int) -> bool:
    """Whether compiled kernels can make activations of so many channels of x."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and channels % native.LANES == 0 and x.numel()
    return bool(fits) and not torch.is_grad_enabled() and native.library() is not None


def given_to(layer: nn.Module, x: torch.Tensor | Pending) -> torch.Tensor:
    """The layer's output, which takes what is pending as it is if it can."""
    if isinstance(x, Pending) and not getattr(layer, "takes_pending", False):
        x = x.tensor()
    return layer(x)
