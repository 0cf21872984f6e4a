"""Names of a CompVis latent-diffusion checkpoint and of its diffusers counterparts, for reading and for writing.

Source of the layout: CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py (the UNet) and model.py (the
autoencoders); of the other: diffusers' UNet2DConditionModel, UNet2DModel, VQModel and AutoencoderKL. L is the number of
residual blocks a level, n the number of levels.

    diffusers, UNet                             CompVis, below model.diffusion_model.
    conv_in                                     input_blocks.0.0
    down_blocks.b.resnets.j / attentions.j      input_blocks.(1 + b(L+1) + j).0 / .1
    down_blocks.b.downsamplers.0                input_blocks.(1 + b(L+1) + L).0, a residual block or .op
    mid_block.resnets.0 / attentions.0 / .1     middle_block.0 / .1 / .2
    up_blocks.b.resnets.j / attentions.j        output_blocks.(b(L+1) + j).0 / .1
    up_blocks.b.upsamplers.0                    output_blocks.(b(L+1) + L).1 (.2 after an attention), likewise or .conv
    attentions.j.to_q, to_k, to_v               .qkv, rows in the order [head][q, k, v][channel], a convolution
    conv_norm_out, conv_out                     out.0, out.2

    diffusers, first stage                      CompVis, below first_stage_model.
    encoder.down_blocks.b.resnets.j             encoder.down.b.block.j
    decoder.up_blocks.b.resnets.j               decoder.up.(n - 1 - b).block.j
    mid_block.resnets.0 / attentions.0 / .1     mid.block_1 / attn_1 / block_2; the attention's linears are convolutions
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_AUTOENCODER = (
    (re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."), r"encoder.down.\1.block.\2."),
    (re.compile(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\."), r"encoder.down.\1.downsample."),
    (re.compile(r"mid_block\.resnets\.0\."), "mid.block_1."),
    (re.compile(r"mid_block\.resnets\.1\."), "mid.block_2."),
    (re.compile(r"mid_block\.attentions\.0\."), "mid.attn_1."),
    (re.compile(r"attn_1\.group_norm\."), "attn_1.norm."),
    (re.compile(r"attn_1\.to_([qkv])\."), r"attn_1.\1."),
    (re.compile(r"attn_1\.to_out\.0\."), "attn_1.proj_out."),
    (re.compile(r"conv_shortcut\."), "nin_shortcut."),
    (re.compile(r"conv_norm_out\."), "norm_out."),
)
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """Where a tensor of a network comes from."""

    key: str  # in the file
    shape: tuple[int, ...]  # that it must have there
    wanted: tuple[int, ...]  # that the network gives it
    part: int | None = None  # of a joint q, k, v: 0, 1 or 2
    heads: int = 1  # by which a joint q, k, v is ordered

    def read(self, value: Any) -> Any:
        """The network's tensor from the file's, fp32; a view wherever the file's values lie as they are wanted."""
        value = value.float()
        if self.part is not None:
            value = value.unflatten(0, (self.heads, 3, -1))[:, self.part]
        return value.reshape(self.wanted)


def _inside(kind: str, rest: str) -> str:
    """The name inside a residual block, a resampling or an attention; a spatial transformer's names are the same on
    both sides.
    """
    part, _, leaf = rest.rpartition(".")
    if kind == "attentions":
        return f"{_ATTENTION.get(part, part)}.{leaf}"
    if part == "conv":  # a resampling without a residual block
        return f"{'op' if kind == 'downsamplers' else 'conv'}.{leaf}"
    return f"{_RESNET[part]}.{leaf}"


def to_compvis(name: str, layers_per_block: int, attention_in_up_block: tuple[bool, ...]) -> str:
    """The CompVis name (below `model.diffusion_model.`) of a diffusers parameter.

    `layers_per_block` is L, `attention_in_up_block` says of each up block, in order, whether it has attention.
    """
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    span = layers_per_block + 1
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match.groups()
        position = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{position}.{_inside(kind, rest)}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise KeyError(name)
    side, block, kind, index, rest = match.groups()
    block, index = int(block), int(index)
    place = layers_per_block if kind in ("downsamplers", "upsamplers") else index
    position = f"input_blocks.{1 + block * span + place}" if side == "down" else f"output_blocks.{block * span + place}"
    within = {"attentions": 1, "upsamplers": 2 if attention_in_up_block[block] else 1}.get(kind, 0)
    return f"{position}.{within}.{_inside(kind, rest)}"


def first_stage_to_compvis(name: str, levels: int) -> str:
    """The CompVis name (below `first_stage_model.`) of a parameter of diffusers' autoencoder with so many levels."""
    if match := _UP.match(name):
        block, kind, index = match.groups()
        place = f"block.{index}" if kind == "resnets" else "upsample"
        name = f"decoder.up.{levels - 1 - int(block)}.{place}.{name[match.end() :]}"
    for pattern, there in _AUTOENCODER:
        name = pattern.sub(there, name)
    return name


def ema_name(compvis_name: str) -> str:
    """The key of a parameter's moving average: LitEma drops the dots and keeps no `model.` in front."""
    return "model_ema." + f"diffusion_model.{compvis_name}".replace(".", "")


def unet_sources(network: Any, averaged: bool) -> dict[str, Source]:
    """Of each tensor of a diffusers UNet: where a CompVis checkpoint has it, among the moving averages or not."""
    config = network.config
    attention = tuple("Attn" in kind for kind in config.up_block_types)
    found = {}
    for name, value in network.state_dict().items():
        compvis = to_compvis(name, config.layers_per_block, attention)
        key = ema_name(compvis) if averaged else UNET + compvis
        shape, part, heads = tuple(value.shape), None, 1
        module, _, leaf = compvis.rpartition(".")
        block, _, last = module.rpartition(".")
        joint = last == "qkv"
        if joint or (last == "proj_out" and len(shape) == 2):  # an attention block, whose linears are convolutions
            shape += (1,) if leaf == "weight" else ()
        if joint:
            attending = name.rpartition(".to_")[0]
            part, heads = "qkv".index(name[len(attending) + 4]), network.get_submodule(attending).heads
            shape = (3 * shape[0], *shape[1:])
        found[name] = Source(key, shape, tuple(value.shape), part, heads)
    return found


def first_stage_sources(module: Any) -> dict[str, Source]:
    """Of each tensor of a diffusers autoencoder: where a CompVis checkpoint has it."""
    levels = len(module.config.block_out_channels)
    found = {}
    for name, value in module.state_dict().items():
        shape = tuple(value.shape)
        convolution = ".attentions." in name and len(shape) == 2
        key = FIRST_STAGE + first_stage_to_compvis(name, levels)
        found[name] = Source(key, (*shape, 1, 1) if convolution else shape, shape)
    return found


def misfits(state: Mapping[str, Any], sources: list[Source]) -> tuple[list[str], list[str]]:
    """The keys that are missing from a file, and those whose shape or kind is wrong, in words. Looks at no values."""
    missing = sorted({source.key for source in sources if source.key not in state})
    wrong = {}
    for source in sources:
        if (value := state.get(source.key)) is None:
            continue
        if tuple(value.shape) != source.shape:
            wrong[source.key] = f"{tuple(value.shape)} in the file, {source.shape} by the configuration"
        elif not value.dtype.is_floating_point:
            wrong[source.key] = f"{value.dtype} in the file"
    return missing, [f"{key}: {what}" for key, what in sorted(wrong.items())]
