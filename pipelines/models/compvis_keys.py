"""Names of the CompVis latent-diffusion UNet and of its diffusers counterpart, one map for reading and for writing.

Source of the layout: CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py; of the other:
diffusers' UNet2DConditionModel. L is the number of residual blocks a level.

    diffusers                                   CompVis
    conv_in                                     input_blocks.0.0
    down_blocks.b.resnets.j / attentions.j      input_blocks.(1 + b(L+1) + j).0 / .1
    down_blocks.b.downsamplers.0.conv           input_blocks.(1 + b(L+1) + L).0.op
    mid_block.resnets.0 / attentions.0 / .1     middle_block.0 / .1 / .2
    up_blocks.b.resnets.j / attentions.j        output_blocks.(b(L+1) + j).0 / .1
    up_blocks.b.upsamplers.0.conv               output_blocks.(b(L+1) + L).(1, or 2 after an attention).conv
    conv_norm_out, conv_out                     out.0, out.2
"""

import re

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
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _inside(kind: str, rest: str) -> str:
    """The name inside a residual block; a spatial transformer's names are the same on both sides."""
    if kind != "resnets":
        return rest
    part, _, leaf = rest.rpartition(".")
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
    if kind == "downsamplers":
        return f"input_blocks.{1 + block * span + layers_per_block}.0.op.{leaf}"
    if kind == "upsamplers":
        return f"output_blocks.{block * span + layers_per_block}.{2 if attention_in_up_block[block] else 1}.conv.{leaf}"
    position = f"input_blocks.{1 + block * span + index}" if side == "down" else f"output_blocks.{block * span + index}"
    return f"{position}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest)}"


def ema_name(compvis_name: str) -> str:
    """The key of a parameter's moving average: LitEma drops the dots and keeps no `model.` in front."""
    return "model_ema." + f"diffusion_model.{compvis_name}".replace(".", "")
