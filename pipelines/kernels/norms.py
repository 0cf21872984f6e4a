"""Group norms for inference: one pass for an image's moments, and the norm itself, with the SiLU after it, in the pass
that quantises.

Fake and integer students take the same, so that their bits agree: a fake one as fp32 (`Normed.tensor`), an integer one
within its prologue, by the same lines of C++. Where there are no compiled kernels, or they do not take the shape, torch
computes both.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipelines import native


@dataclass(frozen=True)
class Normed:
    """An activation that is still to be normed: x·factor + term by image and channel, then SiLU where `silu` says so.

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

    def tensor(self) -> torch.Tensor:
        """The values, fp32 in the layout of x."""
        y, (images, channels) = torch.empty_like(self.x), self.factors.shape
        rows = self.x.numel() // channels
        native.library().hqdm_normed(
            self.x.data_ptr(), y.data_ptr(), rows, channels, self.factors.data_ptr(), self.terms.data_ptr(),
            rows // images, self.silu, torch.get_num_threads(),
        )  # fmt: skip
        return y


class ShortNorm:
    """The forward pass of a `GroupNorm`, by compiled kernels where they take its input."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm, self.usual = norm, norm.forward

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `pending` can be asked for x."""
        channels = self.norm.num_channels
        fits = x.device.type == "cpu" and x.dtype == torch.float32 and channels % native.LANES == 0 and x.numel()
        return bool(fits) and not torch.is_grad_enabled() and native.library() is not None

    def __call__(self, x: torch.Tensor, pending: bool = False, **given) -> torch.Tensor | Normed:
        """The norm of x (N, C, H, W), in torch wherever a shorter way does not apply; `pending` as `Normed`, of what
        `takes` takes.
        """
        if pending:
            return self._pending(x, **given)
        return self._pending(x).tensor() if x.ndim == 4 and self.takes(x) else self.usual(x)

    def _pending(self, x: torch.Tensor, shift: torch.Tensor | None = None, silu: bool = False) -> Normed:
        """The norm of x + shift. x: (N, C, H, W) or, channels last, (N, tokens, C); shift: (N, C) or None."""
        norm, library = self.norm, native.library()
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
        images, channels = len(x), norm.num_channels
        rows = x.numel() // (images * channels)
        factors, terms = x.new_empty((images, channels)), x.new_empty((images, channels))
        scratch = x.new_empty(library.hqdm_group_norm_scratch(images, rows, channels))
        given = None if shift is None else shift.contiguous()
        library.hqdm_group_norm(
            x.data_ptr(), factors.data_ptr(), terms.data_ptr(), images, rows, channels, norm.num_groups,
            norm.weight.data_ptr(), norm.bias.data_ptr(), None if given is None else given.data_ptr(), norm.eps,
            scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return Normed(x, factors, terms, silu)


class ShortResidual:
    """The forward pass of a diffusers `ResnetBlock2D` without the activations between its norms and its convolutions:
    a time embedding moves the moments of the second norm, and the convolutions quantise what is still to be normed.
    """

    def __init__(self, block: nn.Module):
        self.block, self.usual = block, block.forward

    def __call__(self, x: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs) -> torch.Tensor:
        block = self.block
        norms = block.norm1.forward, block.norm2.forward
        short = all(isinstance(norm, ShortNorm) and norm.takes(x) for norm in norms)
        unprojected = block.time_emb_proj is None and temb is not None
        if args or kwargs or block.training or unprojected or not short:
            return self.usual(x, temb, *args, **kwargs)
        hidden = given_to(block.conv1, block.norm1(x, pending=True, silu=True))
        shift = None
        if block.time_emb_proj is not None:
            shift = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        hidden = given_to(block.conv2, block.norm2(hidden, pending=True, shift=shift, silu=True))
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
        hidden = hidden.add_(x)
        return hidden if block.output_scale_factor == 1 else hidden / block.output_scale_factor


def given_to(layer: nn.Module, x: torch.Tensor | Normed) -> torch.Tensor:
    """The layer's output, which takes what is pending as it is if it can."""
    if isinstance(x, Normed) and not getattr(layer, "takes_pending", False):
        x = x.tensor()
    return layer(x)


def shorten_norms(network: nn.Module) -> None:
    """Give the group norms and residual blocks of a network the shorter forward pass, in place."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in network.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.forward = ShortNorm(module)
    for module in network.modules():
        if (
            type(module) is ResnetBlock2D and type(module.nonlinearity) is nn.SiLU
            and module.upsample is None and module.downsample is None and module.time_embedding_norm == "default"
        ):  # fmt: skip
            module.forward = ShortResidual(module)
