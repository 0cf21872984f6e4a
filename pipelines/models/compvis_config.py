"""The YAML of a CompVis latent-diffusion model: found, read strictly, and turned into diffusers' words. No torch."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.config import from_dict, read_yaml
from pipelines.errors import FileFault, HqdmError, UsageError

_GROUPS = 32  # of every group norm in CompVis's UNet


@dataclass(frozen=True)
class _Unet:
    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    context_dim: int
    num_heads: int | None = None
    num_head_channels: int = -1  # -1: num_heads decides
    transformer_depth: int = 1
    use_spatial_transformer: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False


@dataclass(frozen=True)
class _UnetConfig:
    params: _Unet


@dataclass(frozen=True)
class _FirstStage:
    target: str


@dataclass(frozen=True)
class Params:
    """What a denoiser needs of `model.params`; the file's other keys are for training."""

    linear_start: float
    linear_end: float
    unet_config: _UnetConfig
    first_stage_config: _FirstStage
    timesteps: int = 1000
    conditioning_key: str | None = None
    parameterization: str = "eps"

    @property
    def unet(self) -> _Unet:
        return self.unet_config.params


@dataclass(frozen=True)
class _Model:
    params: Params


@dataclass(frozen=True)
class _File:
    model: _Model


def find_config(checkpoint: Path) -> Path:
    """The YAML beside a checkpoint: the same name, or the only one in the folder."""
    beside = Path(checkpoint).with_suffix(".yaml")
    if beside.is_file():
        return beside
    others = sorted(Path(checkpoint).parent.glob("*.yaml"))
    if len(others) == 1:
        return others[0]
    raise FileFault(
        f"{checkpoint}: no configuration beside it (looked for {beside.name})",
        "name the model's YAML: hqdm profile model.ckpt --config model.yaml",
    )


def _known(kind: Any, value: Any) -> Any:
    """`value` without the keys that `kind` has no field for, at every depth: training has many of its own."""
    if not (is_dataclass(kind) and isinstance(value, Mapping)):
        return value
    return {name: _known(inner, value[name]) for name, inner in typing.get_type_hints(kind).items() if name in value}


def read_config(path: Path) -> Params:
    """`model.params` of an LDM configuration; plain YAML, no tags. FileFault names the file and the key."""
    where = f"{path}: not the configuration of a latent-diffusion model"
    try:
        params = from_dict(_File, _known(_File, read_yaml(path)), where).model.params
    except UsageError as error:
        hint = f"{error.hint}; the file needs model.params.unet_config.params, as in CompVis latent-diffusion"
        raise FileFault(error.what, hint) from error
    unet = params.unet
    heads = "num_heads" if unet.num_head_channels == -1 else "num_head_channels"
    if getattr(unet, heads) is None:
        raise FileFault(f"{where}: num_heads and num_head_channels are missing", "one of them has to be there")
    names = ("image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "context_dim",
             "transformer_depth", heads)  # fmt: skip
    counts = {name: getattr(unet, name) for name in names}
    counts |= {f"channel_mult[{index}]": value for index, value in enumerate(unet.channel_mult)}
    for name, value in counts.items():
        if value < 1:
            raise FileFault(f"{where}: {name} cannot be {value}", "it takes 1 or more")
    if not unet.channel_mult:
        raise FileFault(f"{where}: channel_mult is empty", "it takes a whole number for each resolution")
    if params.timesteps < 1 or not 0 < params.linear_start <= params.linear_end < 1:
        raise FileFault(
            f"{where}: timesteps {params.timesteps}, linear_start {params.linear_start} and linear_end "
            f"{params.linear_end} make no schedule",
            "betas rise between 0 and 1: 1000, 0.0015 and 0.0195 are LDM's",
        )
    for multiplier in unet.channel_mult:
        width = unet.model_channels * multiplier
        if width % _GROUPS or width % counts[heads]:
            raise FileFault(
                f"{where}: model_channels · channel_mult = {width} does not divide by {_GROUPS} (groups of norms) "
                f"and {counts[heads]} ({heads})",
                f"check model_channels, channel_mult and {heads}",
            )
    return params


def unet_arguments(params: Params, path: Path) -> dict:
    """Arguments of diffusers' UNet2DConditionModel for an LDM UNet with spatial transformers."""
    unet = params.unet
    wanted = {"use_spatial_transformer": True, "use_scale_shift_norm": False, "resblock_updown": False}
    refused = [f"{key}: {getattr(unet, key)}" for key, value in wanted.items() if getattr(unet, key) != value]
    if params.conditioning_key != "crossattn":
        refused.append(f"conditioning_key: {params.conditioning_key}")
    if params.parameterization != "eps":
        refused.append(f"parameterization: {params.parameterization}")
    if "IdentityFirstStage" not in params.first_stage_config.target:
        refused.append(f"first_stage_config: {params.first_stage_config.target}")
    if refused:
        raise HqdmError(
            f"{path}: this configuration is not supported: {'; '.join(refused)}",
            "supported: a class-conditional UNet with spatial transformers, cross-attention, an identity first stage "
            "and ε as what it predicts",
        )
    channels = [unet.model_channels * multiplier for multiplier in unet.channel_mult]
    attention = [2**level in unet.attention_resolutions for level in range(len(channels))]
    heads = [width // unet.num_head_channels if unet.num_head_channels != -1 else unet.num_heads for width in channels]
    return dict(
        sample_size=unet.image_size, in_channels=unet.in_channels, out_channels=unet.out_channels,
        block_out_channels=tuple(channels), layers_per_block=unet.num_res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        cross_attention_dim=unet.context_dim, attention_head_dim=tuple(heads), norm_num_groups=_GROUPS,
        transformer_layers_per_block=unet.transformer_depth,
    )  # fmt: skip
