"""A tiny random model of every family, saved as people have it: a pipeline's folder, or the model's folder alone.

Each is a few hundred thousand parameters at most, with widths that no power of two divides well (24, 40, 72).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

PROMPTS = "a red fox\n\n# the last one\na blue house by the sea\n"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Tiny:
    """What makes the pipeline or model, and what a user types beside its folder."""

    make: Callable[[], object]
    prompts: bool = False  # a file of prompts is written into the folder and given
    size: int | None = None  # pixels a side, where the configuration states none


def save_tiny(name: str, folder: Path, seed: int = 0) -> tuple[Path, dict]:
    """Build a row of TINY with random weights and save it; the folder, and options of `runner.model_config`."""
    tiny, folder = TINY[name], Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = tiny.make()
        for module in made.components.values() if hasattr(made, "components") else [made]:
            if isinstance(module, torch.nn.Module):
                _spread(module)
    made.save_pretrained(folder)
    options = {} if tiny.size is None else {"size": tiny.size}
    if tiny.prompts:
        options["prompts"] = folder / "prompts.txt"
        options["prompts"].write_text(PROMPTS, encoding="utf-8")
    return folder, options


def _spread(module: torch.nn.Module) -> None:
    """Biases and norms that a constructor leaves at 0 and 1 get values, so that leaving one out shows."""
    for value in module.parameters():
        if value.ndim == 1:
            value.data += 0.1 * torch.randn_like(value)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Letters and specials, no merges, 24 tokens at most."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *[f"{letter}</w>" for letter in LETTERS]]
    vocab = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def clip(width: int, projection: int | None = None) -> transformers.PreTrainedModel:
    """CLIP's text encoder, with a projection of its pooled output where one is asked for."""
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=projection or width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return kind(config).eval()


def t5_tokenizer() -> transformers.T5Tokenizer:
    """Letters with and without a space before them, and specials."""
    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *[f"▁{letter}" for letter in LETTERS]]
    vocab = [(word, -float(index)) for index, word in enumerate(words)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(width: int) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=56, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2, tie_word_embeddings=False
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def vae(**options) -> diffusers.AutoencoderKL:
    """Two pixels a latent, along one side."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


def unet(**options) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        **{
            "sample_size": 16, "block_out_channels": (24, 40), "layers_per_block": 1, "norm_num_groups": 8,
            "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **options,
        }
    )  # fmt: skip


def unet_condition(**options) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (24, 40),
            "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 40,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **options,
        }
    )  # fmt: skip


SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def ddpm():
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())


def adm():
    """Told a class, with a learned variance; the model's folder alone."""
    return unet(num_class_embeds=5, out_channels=6, resnet_time_scale_shift="scale_shift")


def ldm_uncond():
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, num_vq_embeddings=20,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.LDMPipeline(vqvae, unet(sample_size=8), diffusers.DDIMScheduler(**SCALED, clip_sample=False))


def sd(scheduler=None, **options):
    return diffusers.StableDiffusionPipeline(
        unet=unet_condition(**options), vae=vae(), text_encoder=clip(40), tokenizer=clip_tokenizer(),
        scheduler=scheduler or diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd2():
    scheduler = diffusers.DDIMScheduler(
        **SCALED, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return sd(scheduler, use_linear_projection=True, attention_head_dim=(3, 5))


def sdxl():
    network = unet_condition(
        block_out_channels=(16, 24), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        unet=network, vae=vae(), text_encoder=clip(16), tokenizer=clip_tokenizer(), text_encoder_2=clip(24, 24),
        tokenizer_2=clip_tokenizer(), scheduler=diffusers.EulerDiscreteScheduler(**SCALED, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def dit():
    """A thousand classes: the pipeline takes no other null class than 1000."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(network, vae(), diffusers.DDIMScheduler(clip_sample=False))


def pixart():
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=72, caption_channels=40,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        t5_tokenizer(), t5(40), vae(), network, diffusers.DPMSolverMultistepScheduler(beta_end=0.02)
    )


def sd3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=24, pooled_projection_dim=40, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=network, vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(16, 16), tokenizer=clip_tokenizer(), text_encoder_2=clip(24, 24),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(48), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(guided: bool = True):
    """The distilled one is told how strongly to be guided, and its schedule's shift depends on the image's size."""
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=20, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 8, 8),
    )  # fmt: skip
    shifts = dict(shift=3.0, use_dynamic_shifting=True, max_shift=1.15) if guided else dict(shift=1.0)
    return diffusers.FluxPipeline(
        transformer=network, vae=vae(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False),
        text_encoder=clip(16), tokenizer=clip_tokenizer(), text_encoder_2=t5(24), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifts),
    )  # fmt: skip


TINY = {
    "ddpm": Tiny(ddpm),
    "adm": Tiny(adm),
    "ldm-uncond": Tiny(ldm_uncond),
    "sd": Tiny(sd, prompts=True),
    "sd2": Tiny(sd2, prompts=True),
    "sdxl": Tiny(sdxl, prompts=True),
    "dit": Tiny(dit),
    "pixart": Tiny(pixart, prompts=True),
    "sd3": Tiny(sd3, prompts=True),
    "flux": Tiny(flux, prompts=True, size=16),
    "flux-schnell": Tiny(lambda: flux(guided=False), prompts=True, size=16),
}
