"""Blocks of diffusers that lay their activations out by channels and back, for inference: channels stay last, as every
layer here takes them. The values are the same.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.kernels.norms import normed
from pipelines.kernels.pending import given_to


class ShortTransformer:
    """The forward pass of a diffusers `Transformer2DModel` over a UNet's activations: tokens are a view of them, and
    the norm before the first layer is made in the pass that quantises.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer, self.usual = transformer, transformer.forward

    def __call__(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args,
        return_dict: bool = True, **others,
    ) -> tuple[torch.Tensor] | object:  # fmt: skip
        transformer = self.transformer
        asked = args or return_dict or any(value is not None for value in others.values())
        if asked or transformer.training or torch.is_grad_enabled():
            return self.usual(hidden_states, encoder_hidden_states, *args, return_dict=return_dict, **others)
        x = hidden_states.contiguous(memory_format=torch.channels_last)
        images, _, height, width = x.shape
        linear = transformer.use_linear_projection
        hidden = given_to(transformer.proj_in, normed(transformer.norm, _tokens(x) if linear else x))
        hidden = hidden if linear else _tokens(hidden)
        for block in transformer.transformer_blocks:
            hidden = block(hidden, encoder_hidden_states=encoder_hidden_states)
        if linear:
            hidden = transformer.proj_out(hidden)
        image = hidden.reshape(images, height, width, -1).permute(0, 3, 1, 2)
        return ((image if linear else transformer.proj_out(image)) + x,)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, H·W, C) of x (N, C, H, W): a view where channels lie last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class ShortUpsampling:
    """The forward pass of a diffusers `Upsample2D`, which lays out 64 images or more by channels, for the sake of
    devices; processors repeat channels that lie last, of as many images as there are.
    """

    def __init__(self, upsampling: nn.Module):
        self.upsampling, self.usual = upsampling, upsampling.forward

    def __call__(self, hidden_states: torch.Tensor, output_size=None, *args, **kwargs) -> torch.Tensor:
        x, factor = hidden_states, {"scale_factor": 2.0} if output_size is None else {"size": tuple(output_size)}
        sides = (2 * x.shape[-2], 2 * x.shape[-1]) if output_size is None else output_size
        large = math.prod((*x.shape[:2], *sides)) >= 2**31  # where channels-last indices overflow
        if args or kwargs or large or x.device.type != "cpu" or torch.is_grad_enabled():
            return self.usual(x, output_size, *args, **kwargs)
        return self.upsampling.conv(F.interpolate(x.contiguous(memory_format=torch.channels_last), **factor))


def shorten_layouts(network: nn.Module) -> None:
    """Give the transformers and upsamplings of a network the shorter forward pass, in place."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    for module in network.modules():
        if type(module) is Transformer2DModel and module.is_input_continuous:
            module.forward = ShortTransformer(module)
        if type(module) is Upsample2D and _repeats_then_convolves(module):
            module.forward = ShortUpsampling(module)


def _repeats_then_convolves(upsampling: nn.Module) -> bool:
    plain = upsampling.norm is None and upsampling.interpolate and upsampling.name == "conv"
    return plain and upsampling.use_conv and not upsampling.use_conv_transpose
