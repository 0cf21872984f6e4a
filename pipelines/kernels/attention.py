"""Attention in floating point, for inference: one pass over the scores, and nothing computed that cannot matter.

Where the context is one token, as of class-conditional models, the softmax over one key is 1: whatever the query,
attention gives that token's value, o(v(c)), once for an image instead of once for each of its positions, with the bits
of the whole computation. Elsewhere compiled kernels take softmax(QKᵀ/√d)·V, where there are such; fake and integer
students take the same, so that their bits agree. Those products can be of 8-bit integers (`choose_products`): rows of q
and k and columns of v have a scale of their own each, as in SageAttention (Zhang et al., ICLR 2025), weights 16 bits.
"""

import torch
from torch import nn

from pipelines import native
from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels.norms import normed
from pipelines.kernels.pending import given_to

PRODUCTS = ("fp32", "int8")
NOT_FINITE = 2  # what hqdm_attention8 returns where it saw NaN or Inf


class Short:
    """The forward pass of a diffusers `Attention`, which takes the `usual` one wherever a shorter does not apply."""

    def __init__(self, attention: nn.Module):
        self.attention, self.usual = attention, attention.forward
        self.products = PRODUCTS[0]

    def __call__(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        attention, context, kernels = self.attention, encoder_hidden_states, native.library()
        one = context is not None and context.shape[1] == 1
        compiled = kernels is not None and hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
        if attention_mask is not None or torch.is_grad_enabled() or not (one or compiled):
            return self.usual(hidden_states, context, attention_mask, temb=temb, **kwargs)
        x = hidden_states
        if x.ndim == 4:
            x = x.view(*x.shape[:2], -1).transpose(1, 2)
        if attention.group_norm is not None:
            x = normed(attention.group_norm, x)
        if context is not None and attention.norm_cross:
            context = attention.norm_encoder_hidden_states(context)
        source = x if context is None else context
        if one:
            out = attention.to_v(source)
        else:
            q = given_to(attention.to_q, x)
            k, v = (given_to(layer, source) for layer in (attention.to_k, attention.to_v))
            out = attend(q, k, v, attention.heads, kernels, self.products)
        out = attention.to_out[1](attention.to_out[0](out)).expand(-1, x.shape[1], -1)
        if hidden_states.ndim == 4:
            out = out.transpose(-1, -2).reshape(hidden_states.shape)
        if attention.residual_connection:
            out = out + hidden_states
        return out / attention.rescale_output_factor if attention.rescale_output_factor != 1 else out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kernels, products: str = PRODUCTS[0]
) -> torch.Tensor:
    """softmax(QKᵀ/√d)·V of every head: (N, tokens, heads·d) fp32 from q and (N, keys, heads·d) k and v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (images, queries, channels), keys, threads = q.shape, k.shape[1], torch.get_num_threads()
    width, out = channels // heads, torch.empty_like(q)
    pointers = [value.data_ptr() for value in (q, k, v, out)]
    shape = images, queries, keys, heads, width, width**-0.5
    if products == "int8":
        fault = kernels.hqdm_attention8(*pointers, *shape, threads)
        if fault == NOT_FINITE:
            raise NumericalFault(
                "attention in 8-bit integers: q, k or v holds NaN or Inf", "distill again at lower rates"
            )
        if fault:
            what = f"attention of {keys} keys in heads of {width} is too large for products of 8-bit integers"
            raise HqdmError(what, "leave --attention out")
        return out
    scratch = torch.empty(kernels.hqdm_attention_scratch(images, queries, keys, heads, width, threads))
    kernels.hqdm_attention(*pointers, *shape, scratch.data_ptr(), threads)
    return out


def choose_products(network: nn.Module, products: str) -> None:
    """What a student's attentions multiply in: "fp32" (the network's own type), or "int8". HqdmError where int8 cannot
    be.
    """
    if products == "int8" and native.library() is None:
        raise HqdmError(f"attention in 8-bit integers needs compiled kernels: {native.state().why_not}", "hqdm doctor")
    for module in network.modules():
        if isinstance(short := vars(module).get("forward"), Short):
            short.products = products


def shorten_attention(network: nn.Module) -> None:
    """Give the attentions of a network that are as diffusers makes them the shorter forward pass, in place."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for module in network.modules():
        if not isinstance(module, Attention) or type(module.processor) is not AttnProcessor2_0:
            continue
        others = ("spatial_norm", "norm_q", "norm_k", "add_k_proj")
        same_width = module.inner_kv_dim == module.inner_dim
        if same_width and all(getattr(module, name, None) is None for name in others):
            module.forward = Short(module)
