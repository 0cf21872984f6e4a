"""What a family of denoisers is to the stages: how it is called, what it is told, and what its layers are for.

A family is one file: a subclass of `Family` and its instance FAMILY; one line in the table of `families/__init__.py`
makes it known. docs/families.md takes a reader through adding one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipelines.errors import HqdmError

NONE, CLASSIFIER_FREE, EMBEDDED = "none", "classifier-free", "embedded"  # kinds of guidance


class Family:
    """The defaults are those of a class of diffusers with `sample_size` and `in_channels` and no condition."""

    name = ""  # the row of FAMILIES, and what a model's description calls it
    network = ""  # the class in diffusers
    component = "transformer"  # its folder in a pipeline
    timestep_unit = 1.0  # the network's `timestep` argument times this is the schedule's timestep
    roles: tuple[tuple[str, str], ...] = ()  # (part of a site's name, role); the first that fits wins
    other_role = "residual"

    def refusals(self, config: Mapping[str, Any]) -> list[str]:
        """What of a configuration is not supported, as `key: value`; empty where all of it is."""
        return []

    def shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Channels, height and width of what the network denoises."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    def multiple(self, config: Mapping[str, Any]) -> int:
        """What height and width must divide by."""
        if "block_out_channels" in config:
            return 2 ** (len(config["block_out_channels"]) - 1)
        return config.get("patch_size") or 1

    def schedule(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler's configuration and what the pipeline's own code adds to it; see `diffusion.make_scheduler`."""
        return dict(stated)

    def conditions(self, config: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """What the network is told, by name, where its configuration says it: tensors (n, …), or (n + 1, …) with the
        null condition last, for guidance that is classifier-free. {} is an unconditional network, None one that reads
        prompts.
        """
        return {}

    def wanted(self, config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
        """What embeddings of prompts must look like: shapes by name without the first dimension, None for any
        length.
        """
        return {}

    def guidance(self, config: Mapping[str, Any]) -> tuple[str, float]:
        """The kind of guidance and its usual strength."""
        return NONE, 1.0

    def build(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
        """The network with its parameters on the meta device and its buffers filled. `options` are `ModelInfo`'s."""
        import diffusers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return getattr(diffusers, self.network).from_config(dict(config))

    def call(
        self, network: nn.Module, x: torch.Tensor, timestep: torch.Tensor, given: Mapping[str, torch.Tensor],
        guidance: float,
    ) -> torch.Tensor:  # fmt: skip
        """What the network predicts of x (N, C, H, W) at the schedule's timestep, a number or (N,), told `given`.

        given: the rows of `conditions` or of the prompts' embeddings, (N, …) each. `guidance` is of interest to
        embedded guidance alone.
        """
        raise NotImplementedError

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Embeddings of prompts by a diffusers pipeline's text encoders, fp32, the empty prompt's last: (n + 1, …)."""
        raise HqdmError(f"{self.name} reads no prompts", "leave out --prompts")

    def role(self, name: str) -> str:
        """The role of a site, from its module's name."""
        return next((role for part, role in self.roles if part in name), self.other_role)


def per_image(timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A timestep (or N of them) as (N,)."""
    return timestep.to(x.device).expand(len(x)) if timestep.ndim == 0 else timestep


def half_if_learned(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The prediction of an output (N, C or 2C, H, W): a network that also learns its variance gives it second."""
    return output[:, : x.shape[1]]


def unsupported(config: Mapping[str, Any], supported: Mapping[str, tuple]) -> list[str]:
    """`key: value` for each key whose value is none of those supported; an absent key counts as None."""
    return [f"{key}: {config.get(key)}" for key, values in supported.items() if config.get(key) not in values]
