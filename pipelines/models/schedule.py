"""Noise schedules of models' files: a scheduler's configuration, or what the papers trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.diffusion import check_schedule, completed
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models.network import blaming
from pipelines.models.source import read_json

# What the papers trained with, for a model's folder that comes without its scheduler's configuration.
_DDPM = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
             prediction_type="epsilon")  # fmt: skip
LDM = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
           prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
PUBLISHED = {
    "unet": ("DDPM", "DDPMScheduler"),
    "dit": ("DiT", "DDIMScheduler"),
    "pixart": ("PixArt", "DPMSolverMultistepScheduler"),
    "unet-condition": ("Stable Diffusion", None),
}
# A published YAML's keys, and what the schedule calls them.
ORIGINAL = (("timesteps", int, "num_train_timesteps"), ("linear_start", float, "beta_start"),
            ("linear_end", float, "beta_end"))  # fmt: skip
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def published_schedule(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Whose schedule a family's model is taken to have, the schedule, and what of it is to be said.

    Images, which have 1 or 3 channels, are clipped as DDPM clips them; latents are not.
    """
    import diffusers

    whose, kind = PUBLISHED[name]
    said = LDM
    if kind is not None:
        said = _DDPM | dict(clip_sample=name == "unet" and config["in_channels"] in (1, 3))
    schedule = said if kind is None else completed(said, getattr(diffusers, kind))
    return whose, dict(schedule), ", ".join(f"{key} {value}" for key, value in said.items())


def read_schedule(path: Path, pipeline: str | None = None) -> dict[str, Any]:
    """A scheduler's configuration as `ModelInfo` has it: its own entries, and its class's own defaults.

    `pipeline` is the class of the pipeline that it belongs to: Stable Diffusion's neither clips nor visits timestep 0,
    whatever the file says.
    """
    config = read_json(path)
    found = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    with blaming(path, "scheduler"):
        found = completed(found, _scheduler_class(config.get("_class_name"), "shift" in found))
    hint = "supported: schedulers on betas (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC) and of flow matching"
    if not found.keys() & {"beta_schedule", "trained_betas", "shift"} or "num_train_timesteps" not in found:
        raise HqdmError(f"{path}: a {config.get('_class_name')} is not supported", hint)
    if pipeline == "StableDiffusionPipeline" and "shift" not in found:
        found |= dict(clip_sample=False, steps_offset=1)
    check_walkable(found, path)
    return found


def _scheduler_class(name: Any, flow: bool) -> type:
    """The class of diffusers that a configuration names; the walker's where it names none that diffusers has."""
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        return kind
    return diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler


def check_walkable(found: Mapping[str, Any], path: Path) -> None:
    """FileFault for values of wrong types or out of bounds, and where the walker cannot run on them."""
    kinds = {"num_train_timesteps": int, "beta_schedule": str, "prediction_type": str, "trained_betas": list}
    numbers = ("beta_start", "beta_end", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for key, value in found.items():
        wanted = (int, float) if key in numbers else kinds.get(key, (bool, int, float, str, list))
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in _kinds(wanted)):
            raise FileFault(f"{path}: {key} cannot be {value!r}", "fetch the file again")
    if not 1 <= found["num_train_timesteps"] <= 100_000:
        raise FileFault(f"{path}: num_train_timesteps cannot be {found['num_train_timesteps']}", "1000 is usual")
    if found.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise HqdmError(
            f"{path}: prediction_type {found['prediction_type']!r} is not supported",
            f"supported: {', '.join(_PREDICTIONS)}",
        )
    if found.get("base_image_seq_len", 256) == found.get("max_image_seq_len", 4096):
        raise FileFault(f"{path}: base_image_seq_len and max_image_seq_len are the same", "256 and 4096 are usual")
    try:
        check_schedule({"mu": found.get("max_shift", 1.15), **found})
    except UsageError as error:
        raise FileFault(f"{path}: {error.what}", "fetch the file again, or state another schedule") from error


def _kinds(wanted: type | tuple[type, ...]) -> tuple[type, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def shifted(schedule: Mapping[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """A schedule of flow matching whose shift depends on the image's size gets that shift, `mu`."""
    if not schedule.get("use_dynamic_shifting"):
        return dict(schedule)
    small, large = schedule.get("base_image_seq_len", 256), schedule.get("max_image_seq_len", 4096)
    low, high = schedule.get("base_shift", 0.5), schedule.get("max_shift", 1.15)
    tokens = shape[1] * shape[2] // 4
    return {**schedule, "mu": low + (high - low) * (tokens - small) / (large - small)}
