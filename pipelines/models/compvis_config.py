"""The YAML of a CompVis latent-diffusion model: found, read strictly, and turned into diffusers' words. No torch."""

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.config import from_dict, read_yaml
from pipelines.errors import FileFault, HqdmError, UsageError

_GROUPS = 32  # of every group norm in CompVis's networks
_MOST = 1 << 16  # of any count, width or side: what is larger is a slip, and would take memory before it is refused
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # parameterization, in diffusers' words
UNCONDITIONAL = "__is_unconditional__"  # what stands in cond_stage_config's place
# First stages, by their class. The last is this project's own.
IDENTITY, VQ, KL, SPACE = "IdentityFirstStage", "VQModelInterface", "AutoencoderKL", "SpaceToDepth"
_UNET_AS_BUILT = {
    "dims": 2, "num_classes": None, "conv_resample": True, "use_new_attention_order": False, "n_embed": None,
    "use_linear_in_transformer": False,
}  # fmt: skip


@dataclass(frozen=True)
class Unet:
    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    context_dim: int | None = None
    num_heads: int | None = None
    num_head_channels: int = -1  # -1: num_heads decides
    transformer_depth: int = 1
    use_spatial_transformer: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    # Read only to refuse what they would change.
    dims: int = 2
    num_classes: int | None = None
    conv_resample: bool = True
    num_heads_upsample: int = -1
    use_new_attention_order: bool = False
    n_embed: int | None = None
    use_linear_in_transformer: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.model_channels * multiplier for multiplier in self.channel_mult)

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether a level has attention, from the finest."""
        return tuple(2**level in self.attention_resolutions for level in range(len(self.channel_mult)))


@dataclass(frozen=True)
class UnetConfig:
    params: Unet


@dataclass(frozen=True)
class Autoencoder:
    z_channels: int
    resolution: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    double_z: bool = True
    attn_resolutions: tuple[int, ...] = ()
    attn_type: str = "vanilla"

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.ch * multiplier for multiplier in self.ch_mult)


@dataclass(frozen=True)
class FirstStageParams:
    embed_dim: int | None = None
    n_embed: int | None = None  # of a vector quantiser
    ddconfig: Autoencoder | None = None
    remap: str | None = None
    block: int | None = None  # pixels a side that SpaceToDepth puts into the channels


@dataclass(frozen=True)
class FirstStageConfig:
    target: str
    params: FirstStageParams = FirstStageParams()

    @property
    def kind(self) -> str:
        """The last word of the target."""
        return self.target.rpartition(".")[2]


@dataclass(frozen=True)
class ClassParams:
    n_classes: int | None = None


@dataclass(frozen=True)
class ClassConfig:
    target: str
    params: ClassParams = ClassParams()


@dataclass(frozen=True)
class Params:
    """What a denoiser needs of `model.params`; the file's other keys are for training."""

    linear_start: float
    linear_end: float
    unet_config: UnetConfig
    first_stage_config: FirstStageConfig
    cond_stage_config: str | ClassConfig
    timesteps: int = 1000
    image_size: int | None = None  # the UNet's own by default
    conditioning_key: str | None = None
    concat_mode: bool = True
    parameterization: str = "eps"
    beta_schedule: str = "linear"
    scale_factor: float = 1.0
    scale_by_std: bool = False  # then the scale factor is a tensor of the checkpoint
    use_ema: bool = True

    @property
    def unet(self) -> Unet:
        return self.unet_config.params

    @property
    def blocks(self) -> int:
        """At least so many modules with weights does the configuration speak of."""
        inner = self.first_stage_config.params.ddconfig
        unet = self.unet.num_res_blocks * len(self.unet.channel_mult) + self.unet.transformer_depth
        return unet + (inner.num_res_blocks * len(inner.ch_mult) if inner else 0)

    @property
    def conditional(self) -> bool:
        return self.cond_stage_config != UNCONDITIONAL

    @property
    def conditioning(self) -> str | None:
        """How the condition is given, as LatentDiffusion settles it."""
        if not self.conditional:
            return None
        return self.conditioning_key or ("concat" if self.concat_mode else "crossattn")

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        return self.image_size or self.unet.image_size


@dataclass(frozen=True)
class _Model:
    params: Params


@dataclass(frozen=True)
class _File:
    model: _Model


def find_config(checkpoint: Path) -> Path | None:
    """The YAML beside a checkpoint: of its name, or the only one in the folder that speaks of a UNet; None where there
    is none.
    """
    beside = Path(checkpoint).with_suffix(".yaml")
    if beside.is_file():
        return beside
    others = sorted(path for path in Path(checkpoint).parent.glob("*.yaml") if _speaks_of_a_unet(path))
    return others[0] if len(others) == 1 else None


def _speaks_of_a_unet(path: Path) -> bool:
    """Whether a file could be a latent-diffusion model's configuration; others lie beside checkpoints too."""
    try:
        with open(path, "rb") as file:
            return b"unet_config" in file.read(1 << 20)
    except OSError:
        return False


def _known(kind: Any, value: Any) -> Any:
    """`value` without the keys that `kind` has no field for, at every depth: training has many of its own."""
    kind = next((part for part in (kind, *typing.get_args(kind)) if is_dataclass(part)), None)
    if kind is None or not isinstance(value, Mapping):
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
    _check_unet(params.unet, where)
    _check_first_stage(params.first_stage_config, where)
    if not 1 <= params.timesteps <= _MOST or not 0 < params.linear_start <= params.linear_end < 1:
        raise FileFault(
            f"{where}: timesteps {params.timesteps}, linear_start {params.linear_start} and linear_end "
            f"{params.linear_end} make no schedule",
            "betas rise between 0 and 1: 1000, 0.0015 and 0.0195 are LDM's",
        )
    _check_counts({"image_size": params.side}, where)
    if params.scale_factor <= 0:
        raise FileFault(f"{where}: scale_factor cannot be {params.scale_factor}", "it takes a number above 0")
    return params


def _check_counts(counts: dict[str, int | None], where: str) -> None:
    for name, value in counts.items():
        if value is None:
            raise FileFault(f"{where}: {name} is missing", "it takes a whole number")
        if not 1 <= value <= _MOST:
            raise FileFault(f"{where}: {name} cannot be {value}", f"it takes 1 to {_MOST}")


def _check_unet(unet: Unet, where: str) -> None:
    heads = "num_heads" if unet.num_head_channels == -1 else "num_head_channels"
    if getattr(unet, heads) is None:
        raise FileFault(f"{where}: num_heads and num_head_channels are missing", "one of them has to be there")
    names = ["image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", heads]
    names += ["context_dim", "transformer_depth"] if unet.use_spatial_transformer else []
    counts = {name: getattr(unet, name) for name in names}
    _check_counts(counts | {f"channel_mult[{index}]": value for index, value in enumerate(unet.channel_mult)}, where)
    if not unet.channel_mult:
        raise FileFault(f"{where}: channel_mult is empty", "it takes a whole number for each resolution")
    for width in unet.widths:
        _check_counts({"model_channels · channel_mult": width}, where)
        if width % _GROUPS or width % counts[heads]:
            raise FileFault(
                f"{where}: model_channels · channel_mult = {width} does not divide by {_GROUPS} (groups of norms) "
                f"and {counts[heads]} ({heads})",
                f"check model_channels, channel_mult and {heads}",
            )


def _check_first_stage(config: FirstStageConfig, where: str) -> None:
    if config.kind == SPACE:
        _check_counts({"first_stage_config.params.block": config.params.block}, where)
    if config.kind not in (VQ, KL):
        return
    params = config.params
    inner = params.ddconfig
    if inner is None:
        raise FileFault(f"{where}: first_stage_config.params.ddconfig is missing", f"a {config.kind} needs it")
    counts = {"embed_dim": params.embed_dim} | ({"n_embed": params.n_embed} if config.kind == VQ else {})
    names = ("z_channels", "resolution", "in_channels", "out_ch", "ch", "num_res_blocks")
    counts |= {f"ddconfig.{name}": getattr(inner, name) for name in names}
    counts |= {f"ddconfig.ch_mult[{index}]": value for index, value in enumerate(inner.ch_mult)}
    _check_counts(counts, where)
    _check_counts({f"ddconfig.ch · ch_mult[{index}]": width for index, width in enumerate(inner.widths)}, where)
    if not inner.ch_mult or any(width % _GROUPS for width in inner.widths):
        raise FileFault(
            f"{where}: ddconfig.ch {inner.ch} with ch_mult {list(inner.ch_mult)} makes no widths that divide by "
            f"{_GROUPS} (groups of norms)",
            "check ch and ch_mult",
        )


def check_supported(params: Params, where: str) -> None:
    """HqdmError names every key that says something else than what is built here."""
    unet, first, inner = params.unet, params.first_stage_config, params.first_stage_config.params.ddconfig
    found = {key: (getattr(unet, key), value) for key, value in _UNET_AS_BUILT.items()}
    found["use_spatial_transformer"] = unet.use_spatial_transformer, params.conditional
    if params.conditional:
        found["use_scale_shift_norm"] = unet.use_scale_shift_norm, False
        found["resblock_updown"] = unet.resblock_updown, False
        found["conditioning_key"] = params.conditioning, "crossattn"
    refused = [f"{key}: {value}" for key, (value, wanted) in found.items() if value != wanted]
    if params.conditional:
        condition = params.cond_stage_config
        target = condition if isinstance(condition, str) else condition.target
        if not target.endswith("ClassEmbedder"):
            refused.append(f"cond_stage_config: {target}")
    if unet.num_heads_upsample not in (-1, unet.num_heads):
        refused.append(f"num_heads_upsample: {unet.num_heads_upsample}")
    if unet.in_channels != unet.out_channels:
        refused.append(f"in_channels: {unet.in_channels} with out_channels: {unet.out_channels}")
    for key, known in (("parameterization", PREDICTIONS), ("beta_schedule", ("linear",))):
        if getattr(params, key) not in known:
            refused.append(f"{key}: {getattr(params, key)}")
    if first.kind not in (IDENTITY, VQ, KL, SPACE):
        refused.append(f"first_stage_config: {first.target}")
    elif first.kind in (IDENTITY, SPACE):
        if params.scale_factor != 1.0 or params.scale_by_std:
            refused.append(f"{first.kind} with a scale_factor")
        block = first.params.block
        if first.kind == SPACE and unet.in_channels not in (block**2, 3 * block**2):
            refused.append(f"block: {block} with in_channels: {unet.in_channels}")
    else:
        found = {key: getattr(inner, key) for key in ("double_z", "attn_resolutions", "attn_type")}
        wanted = {"double_z": first.kind == KL, "attn_resolutions": (), "attn_type": "vanilla"}
        refused += [f"ddconfig.{key}: {value}" for key, value in found.items() if value != wanted[key]]
        embedded = first.params.embed_dim
        if embedded != unet.in_channels:
            refused.append(f"embed_dim: {embedded} with in_channels: {unet.in_channels}")
        if first.kind == KL and embedded != inner.z_channels:
            refused.append(f"embed_dim: {embedded} with z_channels: {inner.z_channels}")
        if first.params.remap is not None:
            refused.append(f"remap: {first.params.remap}")
    if refused:
        raise HqdmError(
            f"{where}: this configuration is not supported: {'; '.join(refused)}",
            "supported: a class-conditional UNet with spatial transformers and cross-attention, or an unconditional "
            f"one with attention blocks; {IDENTITY}, {VQ}, {KL} or {SPACE} as first stage; ε or v as what it predicts",
        )


def unet_arguments(params: Params) -> tuple[str, dict[str, Any], dict[str, int]]:
    """The family of an LDM UNet, the arguments of its class in diffusers, and `ModelInfo.options`."""
    unet, attention = params.unet, params.unet.attention
    common = dict(
        sample_size=params.side, in_channels=unet.in_channels, out_channels=unet.out_channels,
        block_out_channels=unet.widths, layers_per_block=unet.num_res_blocks, norm_num_groups=_GROUPS, norm_eps=1e-5,
        flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
    )  # fmt: skip
    if params.conditional:
        across = unet.num_head_channels
        heads = [unet.num_heads if across == -1 else width // across for width in unet.widths]
        return "unet-condition", common | dict(
            down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
            cross_attention_dim=unet.context_dim, transformer_layers_per_block=unet.transformer_depth,
            attention_head_dim=tuple(heads),  # of this class, and by this name, the numbers of heads
        ), {}  # fmt: skip
    plain = "Resnet{}sampleBlock2D" if unet.resblock_updown else "{}Block2D"
    resampling = "resnet" if unet.resblock_updown else "conv"
    # One number of heads at every width is what UNet2DModel cannot be told: its layers are built with a size of head
    # that all the widths divide by, and the family sets the heads.
    by_size = unet.num_head_channels != -1
    return "unet", common | dict(
        down_block_types=tuple("AttnDownBlock2D" if has else plain.format("Down") for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else plain.format("Up") for has in reversed(attention)),
        attention_head_dim=unet.num_head_channels if by_size else math.gcd(*unet.widths) // unet.num_heads,
        attn_norm_num_groups=_GROUPS, downsample_type=resampling, upsample_type=resampling,
        resnet_time_scale_shift="scale_shift" if unet.use_scale_shift_norm else "default",
    ), {} if by_size else {"heads": unet.num_heads}  # fmt: skip


def first_stage_arguments(params: Params) -> tuple[str, dict[str, Any]] | None:
    """The class of diffusers, or SpaceToDepth, and its arguments for the first stage; None for one that does
    nothing.
    """
    first = params.first_stage_config
    if first.kind == IDENTITY:
        return None
    if first.kind == SPACE:
        return SPACE, dict(block=first.params.block)
    inner = first.params.ddconfig
    arguments = dict(
        in_channels=inner.in_channels, out_channels=inner.out_ch, block_out_channels=inner.widths,
        down_block_types=("DownEncoderBlock2D",) * len(inner.widths),
        up_block_types=("UpDecoderBlock2D",) * len(inner.widths), layers_per_block=inner.num_res_blocks,
        latent_channels=inner.z_channels, sample_size=inner.resolution, norm_num_groups=_GROUPS,
    )  # fmt: skip
    if first.kind == KL:
        return "AutoencoderKL", arguments
    return "VQModel", arguments | dict(num_vq_embeddings=first.params.n_embed, vq_embed_dim=first.params.embed_dim)
