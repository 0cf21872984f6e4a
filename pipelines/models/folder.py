"""Models as diffusers keeps them: a pipeline's folder, a model's folder, or a single file with configurations.

A configuration is not trusted: before anything is allocated its numbers are bounded, and a network built on the meta
device must have exactly the file's tensors, by name and shape.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipelines.config import read_yaml
from pipelines.diffusion import check_schedule, completed
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models import first_stage as stages
from pipelines.models.checkpoint import first_line, read_tensors
from pipelines.models.denoiser import MOST_SIDE, Denoiser, ModelInfo
from pipelines.models.families import class_of, family_of
from pipelines.models.families.base import CLASSIFIER_FREE, Family
from pipelines.models.first_stage import FirstStage
from pipelines.models.source import (
    CONFIG,
    DENOISERS,
    FIRST_STAGES,
    INDEX,
    SCHEDULER,
    bounded,
    components_of,
    read_json,
    refuse_prompts,
    scheduler_of,
    sized,
    weights_in,
)

MOST_TABLES = 256 << 20  # bytes of what a network computes for itself, such as embeddings of positions
MOST_LATENTS = 1 << 24  # of what is denoised
_MOST_ENTRIES = 256  # of a list in a configuration

# What the papers trained with, for a model's folder that comes without its scheduler's configuration.
_DDPM = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
             prediction_type="epsilon")  # fmt: skip
_LDM = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
_PUBLISHED = {
    "unet": ("DDPM", "DDPMScheduler"),
    "dit": ("DiT", "DDIMScheduler"),
    "pixart": ("PixArt", "DPMSolverMultistepScheduler"),
    "unet-condition": ("Stable Diffusion", None),
}
# A published YAML's keys, and what the schedule calls them.
_ORIGINAL = (("timesteps", int, "num_train_timesteps"), ("linear_start", float, "beta_start"),
             ("linear_end", float, "beta_end"))  # fmt: skip
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")

# What a single file of a transformer can hold beside it.
_OTHERS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.")

# diffusers once called an attention's linears otherwise.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Parts:
    """What was read, before anybody said what to ask of it."""

    family: Family
    config: dict[str, Any]
    network: nn.Module
    schedule: dict[str, Any]
    source: str
    first_stage: FirstStage | None = None
    folder: Path | None = None  # the pipeline's, for its text encoders
    notes: list[str] = field(default_factory=list)


def assemble(
    parts: Parts, prompts: Path | None, embeddings: Path | None, size: int | None
) -> tuple[Denoiser, list[str]]:
    """A Denoiser of the parts, and the notes. Prompts are embedded here, by the pipeline's text encoders."""
    family, config = parts.family, parts.config
    shape = sized(tuple(family.shape(config)), size, parts.first_stage)
    multiple = family.multiple(config)
    if shape[1] % multiple or shape[2] % multiple:
        raise UsageError(
            f"height and width {shape[1]} and {shape[2]} of what is denoised do not divide by {multiple}",
            "give another --size",
        )
    kind, strength = family.guidance(config)
    conditions, labels = family.conditions(config), ()
    if conditions is None:
        from pipelines.models.prompts import conditions_of

        # SDXL is told the image's size.
        asked = {**config, "sample_size": shape[1]} if size and "sample_size" in config else config
        conditions, labels = conditions_of(family, asked, parts.folder, prompts, embeddings)
    else:
        refuse_prompts(prompts, embeddings, f"a {family.network}")
    rows = len(next(iter(conditions.values()))) if conditions else 0
    if parts.first_stage is None and shape[0] not in (1, 3):
        parts.notes.append(f"no first stage came with it: no images can be made of latents of {shape[0]} channels")
    elif parts.first_stage is None and parts.folder is None:
        parts.notes.append("no first stage came with it: what is denoised is taken for the images themselves")
    info = ModelInfo(
        family=family.name, shape=shape, conditions=rows - (kind == CLASSIFIER_FREE) if rows else 0, guidance=kind,
        strength=strength, schedule=_shifted(family.schedule(parts.schedule), shape), source=parts.source,
        labels=tuple(labels),
    )  # fmt: skip
    return Denoiser(parts.network, conditions, info, parts.first_stage), parts.notes


def _shifted(schedule: Mapping[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """A schedule of flow matching whose shift depends on the image's size gets that shift, `mu`."""
    if not schedule.get("use_dynamic_shifting"):
        return dict(schedule)
    small, large = schedule.get("base_image_seq_len", 256), schedule.get("max_image_seq_len", 4096)
    low, high = schedule.get("base_shift", 0.5), schedule.get("max_shift", 1.15)
    tokens = shape[1] * shape[2] // 4
    return {**schedule, "mu": low + (high - low) * (tokens - small) / (large - small)}


def read_folder(path: Path) -> Parts:
    """A pipeline's folder (model_index.json) or a model's (config.json and weights)."""
    if not (path / INDEX).is_file():
        if not (path / CONFIG).is_file():
            raise FileFault(
                f"{path}: neither a pipeline's folder ({INDEX}) nor a model's ({CONFIG})",
                "give the folder that diffusers' save_pretrained wrote, or a checkpoint file",
            )
        return read_model(path)
    components, pipeline, notes = components_of(path)
    name, kind = _denoiser_of(components, path)
    schedule = read_schedule(path / "scheduler" / SCHEDULER, pipeline)
    parts = read_model(path / name, schedule=schedule, kind=kind)
    parts.folder, parts.source = path, pipeline
    parts.first_stage = _first_stage_in(path, components)
    parts.notes = notes + parts.notes
    return parts


def read_model(
    path: Path, state: dict[str, torch.Tensor] | None = None, schedule: dict | None = None, kind: str | None = None
) -> Parts:
    """A model's folder; `state` are its tensors where they were read already, `kind` the class that is expected."""
    where = path / CONFIG
    config = read_json(where)
    name = config.get("_class_name", kind)
    if not isinstance(name, str):
        raise FileFault(f"{where}: says no class (_class_name)", "give a diffusers model's folder")
    if kind is not None and name != kind:
        raise FileFault(f"{where}: a {name}, where the pipeline's index has a {kind}", "fetch the folder again")
    family = family_of(class_of({**config, "_class_name": name}), str(where))
    if state is None:
        state = read_weights(path)
    config, notes = _completed(family, config, where, len(state))
    network = filled(family.network, partial(family.build, options={}), config, state, where)
    if schedule is None:
        if (beside := scheduler_of(path)).is_file():
            inside = beside.parent == path
            schedule = read_schedule(beside, None if inside else read_json(path / ".." / INDEX).get("_class_name"))
        elif family.name in _PUBLISHED:
            whose, schedule, said = _published(family.name, config)
            notes.append(f"the folder has no {SCHEDULER}: {whose}'s schedule is taken, {said}")
        else:
            raise FileFault(
                f"{path}: has no {SCHEDULER}, and a {name} has no usual schedule",
                f"put the pipeline's scheduler/{SCHEDULER} into the folder, or give the whole pipeline's folder",
            )
    return Parts(family, config, network, dict(schedule), name, notes=notes)


def _published(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Whose schedule a family's model is taken to have, the schedule, and what of it is to be said.

    Images, which have 1 or 3 channels, are clipped as DDPM clips them; latents are not.
    """
    import diffusers

    whose, kind = _PUBLISHED[name]
    said = _LDM
    if kind is not None:
        said = _DDPM | dict(clip_sample=name == "unet" and config["in_channels"] in (1, 3))
    schedule = said if kind is None else completed(said, getattr(diffusers, kind))
    return whose, dict(schedule), ", ".join(f"{key} {value}" for key, value in said.items())


def _denoiser_of(components: Mapping[str, str], path: Path) -> tuple[str, str]:
    found = [name for name in DENOISERS if name in components]
    if not found:
        raise HqdmError(
            f"{path / INDEX}: none of its components is a denoiser: {', '.join(components) or 'it has none'}",
            f"it takes one called {' or '.join(DENOISERS)}",
        )
    return found[0], components[found[0]]


def read_schedule(path: Path, pipeline: str | None = None) -> dict[str, Any]:
    """A scheduler's configuration as `ModelInfo` has it: its own entries, and its class's own defaults.

    `pipeline` is the class of the pipeline that it belongs to: Stable Diffusion's neither clips nor visits timestep 0,
    whatever the file says.
    """
    config = read_json(path)
    found = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    with _blaming(path, "scheduler"):
        found = completed(found, _scheduler_class(config.get("_class_name"), "shift" in found))
    hint = "supported: schedulers on betas (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC) and of flow matching"
    if not found.keys() & {"beta_schedule", "trained_betas", "shift"} or "num_train_timesteps" not in found:
        raise HqdmError(f"{path}: a {config.get('_class_name')} is not supported", hint)
    if pipeline == "StableDiffusionPipeline" and "shift" not in found:
        found |= dict(clip_sample=False, steps_offset=1)
    _check_schedule(found, path)
    return found


def _scheduler_class(name: Any, flow: bool) -> type:
    """The class of diffusers that a configuration names; the walker's where it names none that diffusers has."""
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        return kind
    return diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler


def _check_schedule(found: Mapping[str, Any], path: Path) -> None:
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


def _first_stage_in(path: Path, components: Mapping[str, str]) -> FirstStage | None:
    """A pipeline's decoder, checked and left in its folder until it is wanted."""
    for name in FIRST_STAGES:
        if name not in components:
            continue
        part = path / name
        config = read_json(part / CONFIG)
        kind = config.get("_class_name", components[name])
        if kind not in stages.CLASSES:
            raise HqdmError(
                f"{part / CONFIG}: a {kind} is not supported", f"first stages known: {', '.join(stages.CLASSES)}"
            )
        state = read_weights(part)
        config, _ = _known(kind, config)
        with _blaming(part / CONFIG, kind):
            _bound(config, len(state))
            for key in ("scaling_factor", "shift_factor"):
                if not isinstance(config.get(key), float | int | None) or config.get("scaling_factor") == 0:
                    raise ValueError(f"{key} cannot be {config[key]!r}")
        return FirstStage(filled(kind, partial(stages.build, kind), config, state, part / CONFIG))
    return None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A model folder's tensors, views of mapped files."""
    files = weights_in(path)
    if not files:
        raise FileFault(
            f"{path}: has no weights (diffusion_pytorch_model.safetensors, its .fp16 or sharded form, or .bin)",
            "fetch the weights too, or name the folder that has them",
        )
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".json":
            continue
        part, _ = read_tensors(file)
        if twice := sorted(part.keys() & state.keys()):
            raise FileFault(f"{file}: {_few('tensors of another shard', twice)}", "fetch the shards again")
        state |= part
    return state


def _known(kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the defaults of its diffusers class, and the keys that the class has no argument for."""
    import diffusers

    arguments = dict(inspect.signature(getattr(diffusers, kind).__init__).parameters)
    arguments.pop("self")
    defaults = {name: part.default for name, part in arguments.items() if part.default is not part.empty}
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return {**defaults, **{k: v for k, v in own.items() if k in arguments}}, sorted(own.keys() - arguments.keys())


def _completed(
    family: Family, config: Mapping[str, Any], where: Path, tensors: int
) -> tuple[dict[str, Any], list[str]]:
    """A configuration complete, bounded and of the kind that the family supports; notes on what was not used."""
    if "quantization_config" in config:
        raise HqdmError(f"{where}: the model is quantised already", "give the model in fp32 or half precision")
    config, unused = _known(family.network, config)
    with _blaming(where, family.network):
        _bound(config, tensors)
        refusals = family.refusals(config)
        if refusals:
            raise HqdmError(
                f"{where}: this configuration is not supported: {'; '.join(refusals)}",
                "docs/models.md lists what is refused; an own family can cover it: docs/families.md",
            )
    _check_shape(family, config, where)
    return config, [f"{where}: not used by {family.network}: {', '.join(unused)}"] if unused else []


def _bound(config: Mapping[str, Any], tensors: int) -> None:
    """ValueError for lists too long, and for more layers than the file has tensors."""
    bounded(config)

    def look(key: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            if len(value) > _MOST_ENTRIES:
                raise ValueError(f"{key} has {len(value)} entries (at most {_MOST_ENTRIES})")
            for part in value:
                look(key, part)
        layers = any(word in key for word in ("layer", "block", "depth")) and "channels" not in key
        if layers and isinstance(value, int) and value > tensors:
            raise ValueError(f"{key} {value} is more than the file's {tensors} tensors")

    for key, value in config.items():
        look(key, value)


def _check_shape(family: Family, config: Mapping[str, Any], where: Path) -> None:
    with _blaming(where, family.network):
        shape = tuple(family.shape(config))
        if len(shape) != 3 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in shape):
            raise ValueError(f"channels, height and width {shape} are not three numbers from 1 to {MOST_SIDE}")
        if shape[0] * shape[1] * shape[2] > MOST_LATENTS:
            raise ValueError(f"channels, height and width {shape} are too large")


def check_saved(kind: str, config: Mapping[str, Any], where: Path, tensors: int) -> None:
    """FileFault for a saved network's configuration that describes more than the `tensors` of its file; nothing is
    allocated.
    """
    with _blaming(where, kind):
        _bound(config, tensors)
    _skeleton(kind, config, where, tensors)


@contextmanager
def _blaming(where: Path | str, kind: str) -> Iterator[None]:
    """Whatever a constructor raises on an untrusted configuration is that configuration's fault."""
    try:
        yield
    except HqdmError:
        raise
    except Exception as error:
        raise FileFault(
            f"{where}: not the configuration of a {kind}: {type(error).__name__}: {first_line(error)}",
            "fetch the file again, or give the configuration that the weights belong to",
        ) from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """ValueError once a network under construction has more parameters than that; only counts, allocates nothing."""
    seen = 0

    def count(_module, _name, _value):
        nonlocal seen
        seen += 1
        if seen > parameters:
            raise ValueError("it describes more parameters than the file has tensors")

    handle = register_module_parameter_registration_hook(count)
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        handle.remove()
        logging.getLogger("diffusers").setLevel(level)


def _skeleton(kind: str, config: Mapping[str, Any], where: Path, tensors: int, slack: int = 2) -> nn.Module:
    """The network with parameters and buffers on the meta device: names and shapes, and nothing allocated."""
    import diffusers

    with _blaming(where, kind), _at_most(slack * tensors + 16), torch.device("meta"):
        network = getattr(diffusers, kind).from_config(dict(config))
        kept = network.state_dict()
        tables = sum(value.numel() * value.itemsize for name, value in network.named_buffers() if name not in kept)
        if tables > MOST_TABLES:
            raise ValueError(f"its tables would take {tables} bytes (at most {MOST_TABLES})")
    return network


def _renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that diffusers has today."""

    def new(name: str) -> str:
        match = _OLD_ATTENTION.fullmatch(name)
        return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name

    return {new(name): value for name, value in state.items()}


def _check_fit(network: nn.Module, state: Mapping[str, torch.Tensor], where: Path) -> None:
    """FileFault with the missing, unexpected and wrongly shaped tensors."""
    wanted = network.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} by the configuration"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or wrong:
        raise FileFault(
            f"{where}: the weights do not fit it: {_few('missing', missing)}; {_few('unexpected', unexpected)}; "
            f"{_few('shapes', wrong)}",
            "give the configuration and weights that belong together",
        )
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    odd = sorted(f"{n}: {v.dtype}" for n, v in state.items() if v.dtype not in kinds and wanted[n].is_floating_point())
    if odd:
        raise FileFault(
            f"{where}: {_few('weights that are no floating-point numbers', odd)}",
            "give the model in fp32 or half precision",
        )


def filled(
    kind: str, build: Callable[[Mapping[str, Any]], nn.Module], config: dict[str, Any],
    state: Mapping[str, torch.Tensor], where: Path,
) -> nn.Module:  # fmt: skip
    """The network with the file's tensors: fp32, which stay mapped where they were fp32, in evaluation mode."""
    state = _renamed(state)
    skeleton = _skeleton(kind, config, where, len(state))
    _check_fit(skeleton, state, where)
    with _blaming(where, kind), _at_most(2 * len(state) + 16):
        network = build(config)
        network.load_state_dict(_in_fp32(state, where), assign=True)
    return network.eval()


def _in_fp32(state: Mapping[str, torch.Tensor], where: Path) -> dict[str, torch.Tensor]:
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    _check_finite(tensors, where)
    return tensors


def _check_finite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    if bad := sorted(name for name, value in tensors.items() if not torch.isfinite(value).all()):
        raise FileFault(f"{where}: {_few('NaN or Inf in weights', bad)}", "fetch the weights again")


def _few(what: str, names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
    return f"{what}: {shown or 'none'}"


def read_single(path: Path, state: dict[str, torch.Tensor], folder: Path, ema: bool) -> Parts:
    """A single file in the layout in which the model was first published, by a pipeline's folder of configurations.

    The first stage comes from the file where it is there, else from the folder, as do text encoders.
    """
    if not (folder / INDEX).is_file():
        raise FileFault(f"{folder}: no pipeline's folder ({INDEX})", "give the folder of a diffusers pipeline")
    components, pipeline, notes = components_of(folder)
    name, kind = _denoiser_of(components, folder)
    family = family_of(kind, str(folder / INDEX))
    where = folder / name / CONFIG
    config, unused = _completed(family, read_json(where), where, len(state))
    schedule = read_schedule(folder / "scheduler" / SCHEDULER, pipeline)
    skeleton = _skeleton(kind, config, where, len(state), slack=8)
    network = _converted(kind, path, state, where, skeleton, extract_ema=ema, config=str(folder), subfolder=name)
    notes += unused
    stage = None
    vae = next((part for part in FIRST_STAGES if part in components), None)
    if vae is not None and any(key.startswith("first_stage_model.") for key in state):
        stage = _converted_first_stage(components[vae], path, state, folder / vae / CONFIG, str(folder), vae)
    elif vae is not None and weights_in(folder / vae):
        stage = _first_stage_in(folder, components)
    elif vae is not None:
        notes.append(f"neither {path.name} nor {folder} has the first stage's weights: no images can be decoded")
    return Parts(family, config, network, schedule, pipeline, stage, folder, notes)


def _converted_first_stage(
    kind: str, path: Path, state: dict[str, torch.Tensor], where: Path, folder: str, name: str
) -> FirstStage:
    if kind != "AutoencoderKL":
        raise HqdmError(f"{where}: a {kind} cannot be read from a single file", "known: AutoencoderKL")
    config, _ = _known(kind, read_json(where))
    with _blaming(where, kind):
        _bound(config, len(state))
    skeleton = _skeleton(kind, config, where, len(state))
    options = dict(config=folder, subfolder=name)
    return FirstStage(_converted(kind, path, state, where, skeleton, "first_stage_model.", **options))


def read_original(path: Path, state: dict[str, torch.Tensor], yaml: Path, ema: bool) -> Parts:
    """A single file of Stable Diffusion by the YAML that it was published with."""
    where = str(yaml)
    values = read_yaml(yaml)
    with _blaming(where, "UNet2DConditionModel"):
        bounded(values)
        params = values["model"]["params"]
        _bound((params.get("unet_config") or params["network_config"])["params"], len(state))
        schedule = dict(_LDM)
        for key, kind, name in _ORIGINAL:
            if key in params:
                schedule[name] = kind(params[key])
        parameterization, betas = params.get("parameterization", "eps"), params.get("beta_schedule", "linear")
        schedule["prediction_type"] = {"eps": "epsilon", "v": "v_prediction"}.get(parameterization)
    if schedule["prediction_type"] is None:
        raise HqdmError(f"{where}: parameterization {parameterization!r} is not supported", "supported: eps and v")
    if betas != "linear":
        raise HqdmError(
            f"{where}: beta_schedule {betas!r} is not supported", "supported: linear, which is linear in √β there"
        )
    _check_schedule(schedule, yaml)
    family = family_of("UNet2DConditionModel", where)
    network = _converted(family.network, path, state, yaml, None, extract_ema=ema, original_config=values)
    config, _ = _completed(family, dict(network.config), yaml, len(state))
    stage = None
    if any(key.startswith("first_stage_model.") for key in state):
        stage = FirstStage(
            _converted("AutoencoderKL", path, state, yaml, None, "first_stage_model.", original_config=values)
        )
    return Parts(family, config, network, schedule, path.name, stage)


def _converted(
    kind: str, path: Path, state: dict[str, torch.Tensor], where: Path, skeleton: nn.Module | None,
    prefix: str = "model.diffusion_model.", **options: Any,
) -> nn.Module:  # fmt: skip
    """A diffusers class's own reading of a published layout, after which nothing may be missing or left over.

    diffusers does not say what it left over: as many numbers as the file has below `prefix` must have arrived.
    """
    import diffusers

    own = [value for name, value in state.items() if name.startswith(prefix)]
    own = own or [value for name, value in state.items() if not name.startswith(_OTHERS)]
    held = sum(value.numel() for value in own)

    def check(network: nn.Module) -> None:
        wanted = sum(value.numel() for value in network.state_dict().values())
        if wanted != held:
            raise FileFault(
                f"{path}: does not fit {where}: {held} numbers in the file, {wanted} by the configuration",
                "give the configurations of the model's own architecture with --config",
            )

    if skeleton is not None:
        check(skeleton)
    with _blaming(path, kind), _at_most(8 * len(state) + 16):
        try:
            network = getattr(diffusers, kind).from_single_file(
                dict(state), local_files_only=True, torch_dtype=torch.float32, **options
            )
        except ValueError as error:  # of a shape, say; what follows are diffusers' options
            reason = first_line(error).partition(" If you")[0]
            raise FileFault(f"{path}: does not fit {where}: {reason}", "check --config") from error
        check(network)
        tensors = network.state_dict()
        if empty := sorted(name for name, value in tensors.items() if value.is_meta):
            raise FileFault(f"{path}: does not fit {where}: {_few('missing', empty)}", "check --config")
        _check_finite(tensors, path)
    return network.eval()
