"""Single files in the layouts in which models were first published, by a pipeline's folder of configurations or by the
YAML that they were published with.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.config import read_yaml
from pipelines.errors import FileFault, HqdmError
from pipelines.models.checkpoint import first_line
from pipelines.models.families import family_of
from pipelines.models.first_stage import FirstStage
from pipelines.models.folder import Parts, denoiser_of, first_stage_in
from pipelines.models.network import (
    at_most,
    blaming,
    check_bounds,
    check_numbers,
    checked,
    few,
    known_entries,
    skeleton_of,
)
from pipelines.models.schedule import LDM, ORIGINAL, check_walkable, read_schedule
from pipelines.models.source import (
    CONFIG,
    FIRST_STAGES,
    INDEX,
    SCHEDULER,
    bounded,
    components_of,
    read_json,
    weights_in,
)

# What a single file of a transformer can hold beside it.
_OTHERS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.")


def read_single(path: Path, state: dict[str, torch.Tensor], folder: Path, ema: bool) -> Parts:
    """A single file in the layout in which the model was first published, by a pipeline's folder of configurations.

    The first stage comes from the file where it is there, else from the folder, as do text encoders.
    """
    if not (folder / INDEX).is_file():
        raise FileFault(f"{folder}: no pipeline's folder ({INDEX})", "give the folder of a diffusers pipeline")
    components, pipeline, notes = components_of(folder)
    name, kind = denoiser_of(components, folder)
    family = family_of(kind, str(folder / INDEX))
    where = folder / name / CONFIG
    config, unused = checked(family, read_json(where), where, len(state))
    schedule = read_schedule(folder / "scheduler" / SCHEDULER, pipeline)
    skeleton = skeleton_of(kind, config, where, len(state), slack=8)
    network = _converted(kind, path, state, where, skeleton, extract_ema=ema, config=str(folder), subfolder=name)
    notes += unused
    stage = None
    vae = next((part for part in FIRST_STAGES if part in components), None)
    if vae is not None and any(key.startswith("first_stage_model.") for key in state):
        stage = _converted_first_stage(components[vae], path, state, folder / vae / CONFIG, str(folder), vae)
    elif vae is not None and weights_in(folder / vae):
        stage = first_stage_in(folder, components)
    elif vae is not None:
        notes.append(f"neither {path.name} nor {folder} has the first stage's weights: no images can be decoded")
    return Parts(family, config, network, schedule, pipeline, stage, folder, notes)


def _converted_first_stage(
    kind: str, path: Path, state: dict[str, torch.Tensor], where: Path, folder: str, name: str
) -> FirstStage:
    if kind != "AutoencoderKL":
        raise HqdmError(f"{where}: a {kind} cannot be read from a single file", "known: AutoencoderKL")
    config, _ = known_entries(kind, read_json(where))
    with blaming(where, kind):
        check_bounds(config, len(state))
    skeleton = skeleton_of(kind, config, where, len(state))
    options = dict(config=folder, subfolder=name)
    return FirstStage(_converted(kind, path, state, where, skeleton, "first_stage_model.", **options))


def read_original(path: Path, state: dict[str, torch.Tensor], yaml: Path, ema: bool) -> Parts:
    """A single file of Stable Diffusion by the YAML that it was published with."""
    where = str(yaml)
    values = read_yaml(yaml)
    with blaming(where, "UNet2DConditionModel"):
        bounded(values)
        params = values["model"]["params"]
        check_bounds((params.get("unet_config") or params["network_config"])["params"], len(state))
        schedule = dict(LDM)
        for key, kind, name in ORIGINAL:
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
    check_walkable(schedule, yaml)
    family = family_of("UNet2DConditionModel", where)
    network = _converted(family.network, path, state, yaml, None, extract_ema=ema, original_config=values)
    config, _ = checked(family, dict(network.config), yaml, len(state))
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
    with blaming(path, kind), at_most(8 * len(state) + 16):
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
            raise FileFault(f"{path}: does not fit {where}: {few('missing', empty)}", "check --config")
        check_numbers(tensors, path)
    return network.eval()
