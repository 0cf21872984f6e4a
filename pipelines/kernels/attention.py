"""Cross-attention to one token, as of class-conditional models, without its queries and keys.

The softmax over one key is 1, so whatever the query, attention gives that token's value: o(v(c)), once for an image
instead of once for each of its positions. The bits are those of the whole computation.
"""

import torch
from torch import nn


class OneToken:
    """A processor of diffusers' `Attention` that takes the short way where it is one, and else the `usual` one."""

    def __init__(self, usual):
        self.usual = usual

    def __call__(
        self, attention: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None, *args, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        context = encoder_hidden_states
        if context is None or context.shape[1] != 1 or attention_mask is not None or hidden_states.ndim != 3:
            return self.usual(attention, hidden_states, context, attention_mask, temb, *args, **kwargs)
        if attention.norm_cross:
            context = attention.norm_encoder_hidden_states(context)
        out = attention.to_out[0](attention.to_v(context))
        out = attention.to_out[1](out).expand(-1, hidden_states.shape[1], -1)
        if attention.residual_connection:
            out = out + hidden_states
        return out / attention.rescale_output_factor


def shorten(network: nn.Module) -> None:
    """Give the attentions of a network that have diffusers' own processor the short way, in place."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for module in network.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0:
            module.set_processor(OneToken(module.processor))
