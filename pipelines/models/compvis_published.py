"""The published CompVis latent-diffusion models: their configurations, and how to know them by their tensors alone.

Source: the YAML files of CompVis/latent-diffusion: configs/latent-diffusion/cin256-v2.yaml and models/ldm/
lsun_beds256 and lsun_churches256.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pipelines.errors import FileFault
from pipelines.models.compvis_config import (
    IDENTITY,
    KL,
    UNCONDITIONAL,
    VQ,
    Autoencoder,
    ClassConfig,
    ClassParams,
    FirstStageConfig,
    FirstStageParams,
    Params,
    Unet,
    UnetConfig,
)
from pipelines.models.compvis_keys import CLASSES, FIRST_STAGE, UNET

_VQ_F4 = FirstStageConfig(
    f"ldm.models.autoencoder.{VQ}",
    FirstStageParams(
        embed_dim=3, n_embed=8192,
        ddconfig=Autoencoder(z_channels=3, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=(1, 2, 4),
                             num_res_blocks=2, double_z=False),
    ),
)  # fmt: skip
_KL_F8 = FirstStageConfig(
    f"ldm.models.autoencoder.{KL}",
    FirstStageParams(
        embed_dim=4,
        ddconfig=Autoencoder(z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=(1, 2, 4, 4),
                             num_res_blocks=2),
    ),
)  # fmt: skip

PUBLISHED = {
    "cin256-v2": Params(
        linear_start=0.0015, linear_end=0.0195, image_size=64, conditioning_key="crossattn", use_ema=False,
        unet_config=UnetConfig(Unet(
            image_size=64, in_channels=3, out_channels=3, model_channels=192, attention_resolutions=(8, 4, 2),
            num_res_blocks=2, channel_mult=(1, 2, 3, 5), num_heads=1, use_spatial_transformer=True, context_dim=512,
        )),
        first_stage_config=_VQ_F4,
        cond_stage_config=ClassConfig("ldm.modules.encoders.modules.ClassEmbedder", ClassParams(1001)),
    ),
    "lsun_beds256": Params(
        linear_start=0.0015, linear_end=0.0195, image_size=64, concat_mode=False,
        unet_config=UnetConfig(Unet(
            image_size=64, in_channels=3, out_channels=3, model_channels=224, attention_resolutions=(8, 4, 2),
            num_res_blocks=2, channel_mult=(1, 2, 3, 4), num_head_channels=32,
        )),
        first_stage_config=_VQ_F4,
        cond_stage_config=UNCONDITIONAL,
    ),
    "lsun_churches256": Params(
        linear_start=0.0015, linear_end=0.0155, image_size=32, concat_mode=False, scale_by_std=True,
        unet_config=UnetConfig(Unet(
            image_size=32, in_channels=4, out_channels=4, model_channels=192, attention_resolutions=(1, 2, 4, 8),
            num_res_blocks=2, channel_mult=(1, 2, 2, 4, 4), num_heads=8, use_scale_shift_norm=True,
            resblock_updown=True,
        )),
        first_stage_config=_KL_F8,
        cond_stage_config=UNCONDITIONAL,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """What the shapes of a checkpoint's tensors say of it, and what a configuration says of the same."""

    channels: tuple[int, int]  # in and out
    widths: tuple[int, ...]
    residual_blocks: int  # a level
    attention_levels: tuple[int, ...]  # 0 is the finest
    transformers: tuple[int, int] | None  # depth and width of the context; None: attention blocks
    scale_shift: bool
    resampling_blocks: bool
    classes: tuple[int, int] | None  # rows and width of the class embedding
    first_stage: tuple | None  # kind, widths, residual blocks, latent and embedded channels, codes

    def __str__(self) -> str:
        return ", ".join(f"{entry.name} {getattr(self, entry.name)}" for entry in fields(self))


def structure_of(params: Params) -> Structure:
    """Of a configuration."""
    unet, first = params.unet, params.first_stage_config
    condition, inner = params.cond_stage_config, first.params.ddconfig
    return Structure(
        (unet.in_channels, unet.out_channels), unet.widths, unet.num_res_blocks,
        tuple(level for level, has in enumerate(unet.attention) if has),
        (unet.transformer_depth, unet.context_dim) if unet.use_spatial_transformer else None,
        unet.use_scale_shift_norm, unet.resblock_updown,
        (condition.params.n_classes, unet.context_dim) if isinstance(condition, ClassConfig) else None,
        None if first.kind == IDENTITY else
        (first.kind, inner.widths, inner.num_res_blocks, inner.z_channels, first.params.embed_dim,
         first.params.n_embed),
    )  # fmt: skip


def structure_in(state: Mapping[str, torch.Tensor]) -> Structure | None:
    """Of a checkpoint's tensors, by their names and shapes alone; None where there is no UNet of CompVis's.

    The decoding half has what is wanted: each level ends there with a resampling that cannot be mistaken, where in the
    encoding half one by residual block looks like any other residual block.
    """

    def size(key: str, dimension: int = 0) -> int:
        shape = state[key].shape if key in state else ()
        return shape[dimension] if dimension < len(shape) else 0

    def count(pattern: str) -> int:
        return len({match.group(1) for key in state if (match := re.match(pattern, key))})

    outputs = UNET + "output_blocks."
    blocks = count(re.escape(outputs) + r"(\d{1,4})\.0\.in_layers\.0\.weight$")
    if UNET + "input_blocks.0.0.weight" not in state or not blocks:
        return None
    resampling = re.compile(re.escape(outputs) + r"(\d{1,4})\.[12]\.(conv|in_layers\.0)\.weight$")
    ends = sorted((int(match.group(1)), match.group(2)) for key in state if (match := resampling.match(key)))
    span = ends[0][0] + 1 if ends else blocks
    levels = range(0, blocks, span)
    middle = f"{UNET}middle_block.1.transformer_blocks."
    attended = [
        len(levels) - 1 - index
        for index, place in enumerate(levels)
        if state.keys() & {f"{outputs}{place}.1.{layer}.weight" for layer in ("qkv", "proj_in")}
    ]
    encoder, decoder = FIRST_STAGE + "encoder.", FIRST_STAGE + "decoder."
    depth = count(re.escape(encoder) + r"down\.(\d{1,4})\.block\.0\.conv1\.weight$")
    codes = size(FIRST_STAGE + "quantize.embedding.weight")
    first_stage = (
        VQ if codes else KL,
        tuple(size(f"{encoder}down.{level}.block.0.conv1.weight") for level in range(depth)),
        count(re.escape(encoder) + r"down\.0\.block\.(\d{1,4})\."),
        size(decoder + "conv_in.weight", 1),
        size(FIRST_STAGE + "post_quant_conv.weight", 1),
        codes or None,
    )
    mixing = f"{outputs}0.0."
    return Structure(
        (size(UNET + "input_blocks.0.0.weight", 1), size(UNET + "out.2.weight")),
        tuple(size(f"{outputs}{place}.0.out_layers.3.weight") for place in reversed(levels)),
        span - 1,
        tuple(reversed(attended)),
        (count(re.escape(middle) + r"(\d{1,4})\."), size(middle + "0.attn2.to_k.weight", 1))
        if any(key.startswith(middle) for key in state) else None,
        size(mixing + "emb_layers.1.weight") == 2 * size(mixing + "out_layers.3.weight"),
        bool(ends) and ends[0][1] != "conv",
        (size(CLASSES), size(CLASSES, 1)) if CLASSES in state else None,
        first_stage if depth else None,
    )  # fmt: skip


def recognise(state: Mapping[str, torch.Tensor], checkpoint: Path) -> tuple[str, Params]:
    """The published model whose structure the tensors have; FileFault says what was read from them where none has."""
    found = structure_in(state)
    if found is None:
        few = ", ".join(sorted(state)[:3])
        raise FileFault(
            f"{checkpoint}: no configuration beside it, and no UNet of CompVis latent-diffusion in it "
            f"({UNET}input_blocks, output_blocks); it holds {few}, …",
            "name the model's YAML (hqdm profile model.ckpt --config model.yaml), or give a folder of diffusers",
        )
    for name, params in PUBLISHED.items():
        if structure_of(params) == found:
            return name, params
    raise FileFault(
        f"{checkpoint}: no configuration beside it (looked for {checkpoint.with_suffix('.yaml').name}), and its "
        f"tensors are those of no published model ({', '.join(PUBLISHED)}): {found}",
        "name the model's YAML: hqdm profile model.ckpt --config model.yaml",
    )
