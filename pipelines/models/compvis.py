"""Checkpoints in the layout of CompVis latent-diffusion, class-conditional, to a Denoiser."""

from pathlib import Path

import torch
import yaml

from pipelines.errors import FileFault, HqdmError
from pipelines.models.checkpoint import read_checkpoint
from pipelines.models.compvis_keys import ema_name, to_compvis
from pipelines.models.denoiser import Denoiser, ModelInfo, ready

# Entries of a checkpoint that hold nothing a denoiser needs: schedule buffers, a first stage, losses, averages' counters.
_IGNORED = ("first_stage_model.", "model_ema.decay", "model_ema.num_updates", "loss.", "logvar", "scale_factor")
_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights",
)  # fmt: skip


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


def read_config(path: Path) -> dict:
    """`model.params` of an LDM configuration; plain YAML, no tags."""
    try:
        params = yaml.safe_load(Path(path).read_text())["model"]["params"]
        params["unet_config"]["params"]["model_channels"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FileFault(
            f"{path}: not the configuration of a latent-diffusion model ({type(error).__name__}: {error})",
            "it needs model.params.unet_config.params, as in CompVis latent-diffusion",
        ) from error
    return params


def unet_arguments(params: dict, path: Path) -> dict:
    """Arguments of diffusers' UNet2DConditionModel for an LDM UNet with spatial transformers."""
    unet = params["unet_config"]["params"]
    refused = [
        f"{key}: {unet[key]}"
        for key, wanted in {"use_spatial_transformer": True, "use_scale_shift_norm": False, "resblock_updown": False}.items()
        if unet.get(key, False) != wanted
    ]
    if params.get("conditioning_key") != "crossattn":
        refused.append(f"conditioning_key: {params.get('conditioning_key')}")
    if "IdentityFirstStage" not in str(params.get("first_stage_config", {}).get("target")):
        refused.append(f"first_stage_config: {params.get('first_stage_config', {}).get('target')}")
    if refused:
        raise HqdmError(
            f"{path}: this configuration is not supported: {'; '.join(refused)}",
            "supported: a class-conditional UNet with spatial transformers, cross-attention and an identity first stage",
        )
    multipliers = unet["channel_mult"]
    channels = [unet["model_channels"] * multiplier for multiplier in multipliers]
    attention = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    heads = [
        width // unet["num_head_channels"] if unet.get("num_head_channels", -1) != -1 else unet["num_heads"]
        for width in channels
    ]
    return dict(
        sample_size=unet["image_size"], in_channels=unet["in_channels"], out_channels=unet["out_channels"],
        block_out_channels=tuple(channels), layers_per_block=unet["num_res_blocks"],
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        cross_attention_dim=unet["context_dim"], attention_head_dim=tuple(heads), norm_num_groups=32,
        transformer_layers_per_block=unet.get("transformer_depth", 1),
    )  # fmt: skip


def load_checkpoint(checkpoint: Path, config: Path | None = None, ema: bool = True) -> tuple[Denoiser, list[str]]:
    """The denoiser of a checkpoint and what was left out of the file.

    `ema` takes the moving averages, which the published samples come from. Raises FileFault with the missing and
    unexpected names where the file does not fit its configuration.
    """
    from diffusers import UNet2DConditionModel

    checkpoint = Path(checkpoint)
    state, wrappers = read_checkpoint(checkpoint)
    config = Path(config) if config else find_config(checkpoint)
    params = read_config(config)
    arguments = unet_arguments(params, config)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**arguments)
    attention = tuple("Attn" in kind for kind in arguments["up_block_types"])
    names = {name: to_compvis(name, arguments["layers_per_block"], attention) for name in unet.state_dict()}
    raw = {name: f"model.diffusion_model.{compvis}" for name, compvis in names.items()}
    averaged = {name: ema_name(compvis) for name, compvis in names.items()}
    if ema and not any(key in state for key in averaged.values()):
        raise FileFault(f"{checkpoint}: holds no moving averages (model_ema.*)", "take the raw weights with --no-ema")
    wanted = averaged if ema else raw
    embedding = "cond_stage_model.embedding.weight"
    known = {*raw.values(), *averaged.values(), embedding, *_BUFFERS}
    missing = sorted({*wanted.values(), embedding} - state.keys())
    unexpected = sorted(key for key in state.keys() - known if not key.startswith(_IGNORED))
    wrong = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} by the configuration"
        for name, value in unet.state_dict().items()
        if (key := wanted[name]) in state and state[key].shape != value.shape
    ]
    if missing or unexpected or wrong:
        raise FileFault(
            f"{checkpoint}: does not fit {config}: {_few('missing', missing)}; {_few('unexpected', unexpected)}; {_few('shapes', wrong)}",
            "give the configuration that the checkpoint was trained with: --config model.yaml",
        )
    tensors = {name: state[key].float().clone() for name, key in wanted.items()}
    bad = sorted(name for name, value in tensors.items() if not torch.isfinite(value).all())
    if bad:
        raise FileFault(f"{checkpoint}: NaN or Inf in {_few('weights', bad)}", "fetch the file again, or try --no-ema")
    unet.load_state_dict(tensors, assign=True)
    schedule = dict(
        num_train_timesteps=params.get("timesteps", 1000), beta_start=params["linear_start"],
        beta_end=params["linear_end"], beta_schedule="scaled_linear",
    )  # fmt: skip
    table = state[embedding].float().clone()
    unet_params = params["unet_config"]["params"]
    info = ModelInfo("compvis-ldm", unet_params["in_channels"], unet_params["image_size"], table.shape[0] - 1, schedule)
    return ready(Denoiser(unet, table, info)), wrappers


def _few(what: str, names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
    return f"{what}: {shown or 'none'}"
