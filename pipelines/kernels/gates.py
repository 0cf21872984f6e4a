"""Feed-forwards with gates for inference: an integer layer makes x·gelu(g) in the pass that quantises it, and writes it
nowhere (`pending.Gated`). Where there are no compiled kernels, or they do not take the shape, torch computes it.
"""

import torch
from torch import nn

from pipelines.kernels.pending import Gated, can_pend, given_to


class ShortFeedForward:
    """The forward pass of a diffusers `FeedForward` whose first layer is a `GEGLU`."""

    def __init__(self, feed_forward: nn.Module):
        self.feed_forward, self.usual = feed_forward, feed_forward.forward

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        gate, _, after = self.feed_forward.net[:3]
        if args or kwargs or self.feed_forward.training or torch.is_grad_enabled():
            return self.usual(x, *args, **kwargs)
        both = gate.proj(x)
        if not can_pend(both, both.shape[-1] // 2):
            values, gates = both.chunk(2, -1)
            return after(values * gate.gelu(gates))
        return given_to(after, Gated(both.contiguous()))


def shorten_gates(network: nn.Module) -> None:
    """Give the feed-forwards of a network that have gates the shorter forward pass, in place."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import FeedForward

    for module in network.modules():
        if type(module) is FeedForward and type(module.net[0]) is GEGLU:
            module.forward = ShortFeedForward(module)
