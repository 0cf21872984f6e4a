"""Checkpoints in the layout of CompVis latent-diffusion, class-conditional, to a Denoiser."""

from pathlib import Path

import torch

from pipelines.errors import FileFault
from pipelines.models.checkpoint import read_checkpoint
from pipelines.models.compvis_config import Params, find_config, read_config, unet_arguments
from pipelines.models.compvis_keys import ema_name, to_compvis
from pipelines.models.denoiser import Denoiser, ModelInfo, ready

# Entries of a checkpoint that hold nothing a denoiser needs: buffers, a first stage, losses, averages' counters.
_IGNORED = ("first_stage_model.", "model_ema.decay", "model_ema.num_updates", "loss.", "logvar", "scale_factor")
_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights",
)  # fmt: skip
SCHEDULE_TOLERANCE = 1e-4  # of a cumulative alpha; files keep them in single precision


def load_checkpoint(checkpoint: Path, config: Path | None = None, ema: bool = True) -> tuple[Denoiser, list[str]]:
    """The denoiser of a checkpoint and what was left out of the file.

    `ema` takes the moving averages, which the published samples come from. Raises FileFault with the missing and
    unexpected names where the file does not fit its configuration, and where its own schedule is another one.
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
            f"{checkpoint}: does not fit {config}: {_few('missing', missing)}; {_few('unexpected', unexpected)}; "
            f"{_few('shapes', wrong)}",
            "give the configuration that the checkpoint was trained with: --config model.yaml",
        )
    tensors = {name: state[key].float().clone() for name, key in wanted.items()}
    bad = sorted(name for name, value in tensors.items() if not torch.isfinite(value).all())
    if bad:
        raise FileFault(f"{checkpoint}: NaN or Inf in {_few('weights', bad)}", "fetch the file again, or try --no-ema")
    _check_schedule(state, params, checkpoint, config)
    unet.load_state_dict(tensors, assign=True)
    schedule = dict(
        num_train_timesteps=params.timesteps, beta_start=params.linear_start, beta_end=params.linear_end,
        beta_schedule="scaled_linear",
    )  # fmt: skip
    table = state[embedding].float().clone()
    info = ModelInfo("compvis-ldm", params.unet.in_channels, params.unet.image_size, table.shape[0] - 1, schedule)
    return ready(Denoiser(unet, table, info)), wrappers


def _check_schedule(state: dict[str, torch.Tensor], params: Params, checkpoint: Path, config: Path) -> None:
    """The checkpoint's own cumulative alphas, where it has them, against LDM's "linear" schedule, linear in √β."""
    found = state.get("alphas_cumprod")
    if found is None:
        return
    ends = params.linear_start**0.5, params.linear_end**0.5
    wanted = torch.cumprod(1 - torch.linspace(*ends, params.timesteps, dtype=torch.float64) ** 2, 0)
    if found.shape != wanted.shape:
        what = f"{tuple(found.shape)} in the file, {tuple(wanted.shape)} by the configuration"
    else:
        largest = (found.double() - wanted).abs().max().item()
        if largest <= SCHEDULE_TOLERANCE:  # not with NaN
            return
        what = f"they differ by up to {largest:.2g}"
    raise FileFault(
        f"{checkpoint}: its alphas_cumprod are not the schedule of {config}: {what}",
        "give the configuration that the checkpoint was trained with: timesteps, linear_start and linear_end",
    )


def _few(what: str, names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
    return f"{what}: {shown or 'none'}"
