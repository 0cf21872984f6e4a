"""Checkpoints in the layout of CompVis latent-diffusion to a Denoiser that is told a class or nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipelines.errors import FileFault
from pipelines.models.checkpoint import read_tensors
from pipelines.models.compvis_config import (
    PREDICTIONS,
    SPACE,
    ClassConfig,
    Params,
    check_supported,
    find_config,
    first_stage_arguments,
    read_config,
    unet_arguments,
)
from pipelines.models.compvis_keys import CLASSES, FIRST_STAGE, Source, first_stage_sources, misfits, unet_sources
from pipelines.models.compvis_published import recognise
from pipelines.models.denoiser import Denoiser, ModelInfo
from pipelines.models.families import FAMILIES
from pipelines.models.families.base import CLASSIFIER_FREE, NONE
from pipelines.models.first_stage import FirstStage, SpaceToDepth

# Entries of a checkpoint that hold nothing a denoiser needs: the schedule's buffers, losses, the averages' counters.
_SCALE = "scale_factor"
_LEFTOVERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "model_ema.decay", "model_ema.num_updates", _SCALE,
)  # fmt: skip
_LOSSES = (FIRST_STAGE + "loss.", "loss.")
SCHEDULE_TOLERANCE = 1e-4  # of a cumulative alpha; files keep them in single precision
_ANOTHER = "give the configuration that the checkpoint was trained with: --config model.yaml"
GUIDANCE = 1.5  # LDM's own for classes


@dataclass(frozen=True)
class Fit:
    """Networks on the meta device, and where in a file each of their tensors is."""

    family: str
    options: dict[str, int]
    network: nn.Module
    sources: dict[str, Source]
    first_stage: nn.Module | None
    first_stage_sources: dict[str, Source]
    averaged: bool  # the moving averages, not the raw weights


def load_checkpoint(checkpoint: Path, config: Path | None = None, ema: bool = True) -> tuple[Denoiser, list[str]]:
    """The denoiser of a checkpoint, on the CPU, fp32, in evaluation mode, and what was left out of the file.

    The configuration is the one given, the YAML beside the file, or that of the published model whose tensors these
    are. `ema` takes the moving averages, which the published samples come from, unless the configuration says that
    the model keeps none. Tensors that are fp32 in the file stay views of it. Raises FileFault with the missing,
    unexpected and wrongly shaped names where the file does not fit its configuration, and where its own schedule is
    another one; HqdmError for a configuration that is not supported.
    """
    checkpoint = Path(checkpoint)
    state, left_out = read_tensors(checkpoint)
    config = Path(config) if config else find_config(checkpoint)
    if config is None:
        where, params = recognise(state, checkpoint)
        source = f"CompVis checkpoint, {where}"
    else:
        where, params, source = str(config), read_config(config), "CompVis checkpoint"
    fitted = fit(state, params, checkpoint, where, ema)
    _check_schedule(state, params, checkpoint, where)
    _fill(fitted.network, fitted.sources, state, checkpoint)
    first_stage = None
    if fitted.first_stage is not None:
        if not isinstance(fitted.first_stage, SpaceToDepth):
            _fill(fitted.first_stage, fitted.first_stage_sources, state, checkpoint)
            fitted.first_stage.register_to_config(scaling_factor=_scale_factor(state, params, checkpoint))
        first_stage = FirstStage(fitted.first_stage)
    conditions, rows = {}, 1
    if params.conditional:
        table = state[CLASSES].float()
        _check_finite({CLASSES: table}, checkpoint)
        conditions, rows = {"encoder_hidden_states": table[:, None]}, len(table)
    schedule = dict(
        num_train_timesteps=params.timesteps, beta_start=params.linear_start, beta_end=params.linear_end,
        beta_schedule="scaled_linear",
    )  # fmt: skip
    if params.parameterization != "eps":
        schedule["prediction_type"] = PREDICTIONS[params.parameterization]
    if isinstance(fitted.first_stage, SpaceToDepth):  # pixels, whose estimates are clipped to their range as DDPM does
        schedule["clip_sample"] = True
    info = ModelInfo(
        family=fitted.family, shape=(params.unet.in_channels, params.side, params.side), conditions=rows - 1,
        guidance=CLASSIFIER_FREE if conditions else NONE, strength=GUIDANCE if conditions else 1.0,
        schedule=schedule,
        source=f"{source}, {'moving averages' if fitted.averaged else 'raw weights'}", options=fitted.options,
    )  # fmt: skip
    return Denoiser(fitted.network, conditions, info, first_stage).eval(), left_out


def fit(state: Mapping[str, torch.Tensor], params: Params, checkpoint: Path, where: str, ema: bool) -> Fit:
    """The networks of a configuration and which of a file's tensors go where.

    Looks at names, shapes and kinds alone, so that a state dict on the meta device does. Every tensor of the networks
    must have its source, and every key of the file its use or a place among the known leftovers of training.
    """
    check_supported(params, where)
    if params.blocks > len(state):  # before anything is built of it
        raise FileFault(
            f"{checkpoint}: does not fit {where}: {len(state)} tensors in the file, more than {params.blocks} modules "
            "by the configuration",
            _ANOTHER,
        )
    averages = any(key.startswith("model_ema.diffusion_model") for key in state)
    if ema and not averages and params.use_ema:
        raise FileFault(f"{checkpoint}: holds no moving averages (model_ema.*)", "take the raw weights with --no-ema")
    family, arguments, options = unet_arguments(params)
    network = FAMILIES[family].build(arguments, options)
    averaged = ema and averages
    chosen, other = unet_sources(network, averaged), unet_sources(network, not averaged)
    first_stage = _build_first_stage(params)
    inside = first_stage_sources(first_stage) if first_stage is not None and first_stage.state_dict() else {}
    sources = [*chosen.values(), *inside.values()]
    missing, wrong = misfits(state, sources)
    known = {source.key for source in (*sources, *other.values())} | set(_LEFTOVERS)
    if params.conditional:
        known.add(CLASSES)
        table, across = state.get(CLASSES), params.unet.context_dim
        named = isinstance(params.cond_stage_config, ClassConfig) and params.cond_stage_config.params.n_classes
        if table is None:
            missing.append(CLASSES)
        elif table.ndim != 2 or len(table) < 2 or table.shape[1] != across or (named and len(table) != named):
            rows = named or "two or more"
            wrong.append(f"{CLASSES}: {tuple(table.shape)} in the file, ({rows}, {across}) by the configuration")
    if params.scale_by_std and _SCALE not in state:
        missing.append(_SCALE)
    unused = _LOSSES if params.conditional else (*_LOSSES, "cond_stage_model.")
    unexpected = sorted(key for key in state.keys() - known if not key.startswith(unused))
    if missing or unexpected or wrong:
        raise FileFault(
            f"{checkpoint}: does not fit {where}: {_few('missing', missing)}; {_few('unexpected', unexpected)}; "
            f"{_few('shapes', wrong)}",
            _ANOTHER,
        )
    return Fit(family, options, network, chosen, first_stage, inside, averaged)


def _build_first_stage(params: Params) -> nn.Module | None:
    """diffusers' autoencoder on the meta device, its scaling factor not known before the file is read; or
    SpaceToDepth.
    """
    import diffusers
    from accelerate import init_empty_weights

    wanted = first_stage_arguments(params)
    if wanted is None:
        return None
    name, arguments = wanted
    if name == SPACE:
        return SpaceToDepth(**arguments)
    with init_empty_weights(include_buffers=False):
        return getattr(diffusers, name)(**arguments)


def _fill(module: nn.Module, sources: dict[str, Source], state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    tensors = {name: source.read(state[source.key]) for name, source in sources.items()}
    _check_finite(tensors, checkpoint)
    module.load_state_dict(tensors, assign=True)


def _check_finite(tensors: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    bad = sorted(name for name, value in tensors.items() if not torch.isfinite(value).all())
    if bad:
        raise FileFault(f"{checkpoint}: NaN or Inf in {_few('weights', bad)}", "fetch the file again, or try --no-ema")


def _scale_factor(state: Mapping[str, torch.Tensor], params: Params, checkpoint: Path) -> float:
    """What latents are divided by before they are decoded: the checkpoint's own, or the configuration's."""
    if _SCALE not in state:
        return params.scale_factor
    found = state[_SCALE]
    if found.numel() != 1 or not torch.isfinite(found).all() or found.item() <= 0:
        what = found.item() if found.numel() == 1 else f"of shape {tuple(found.shape)}"
        raise FileFault(f"{checkpoint}: {_SCALE} cannot be {what}", "fetch the file again: it takes one number above 0")
    return found.item()


def _check_schedule(state: Mapping[str, torch.Tensor], params: Params, checkpoint: Path, where: str) -> None:
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
        f"{checkpoint}: its alphas_cumprod are not the schedule of {where}: {what}",
        "give the configuration that the checkpoint was trained with: timesteps, linear_start and linear_end",
    )


def _few(what: str, names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
    return f"{what}: {shown or 'none'}"
