"""Group norms for inference: one pass for an image's moments, and the norm itself, with the SiLU after it, in the pass
that quantises (`pending.Normed`). Where there are no compiled kernels, or they do not take the shape, torch computes
both.
"""

import torch
from torch import nn

from pipelines import native
from pipelines.kernels.pending import Normed, can_pend, given_to


class ShortNorm:
    """The forward pass of a `GroupNorm`, by compiled kernels where they take its input."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm, self.usual = norm, norm.forward

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `pending` can be asked for x."""
        return can_pend(x, self.norm.num_channels)

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


def normed(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor | Normed:
    """The norm of x, (N, C, H, W) or (N, tokens, C): pending, where a `ShortNorm` takes it."""
    if isinstance(norm.forward, ShortNorm) and norm.forward.takes(x):
        return norm(x, pending=True)
    return norm(x) if x.ndim == 4 else norm(x.transpose(1, 2)).transpose(1, 2)


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
