"""Models as diffusers keeps them: a pipeline's folder, or a model's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models import first_stage as stages
from pipelines.models.checkpoint import read_tensors
from pipelines.models.denoiser import Denoiser, ModelInfo
from pipelines.models.families import class_of, family_of
from pipelines.models.families.base import CLASSIFIER_FREE, Family
from pipelines.models.first_stage import FirstStage
from pipelines.models.network import blaming, check_bounds, checked, few, filled, known_entries
from pipelines.models.schedule import PUBLISHED, published_schedule, read_schedule, shifted
from pipelines.models.source import (
    CONFIG,
    DENOISERS,
    FIRST_STAGES,
    INDEX,
    SCHEDULER,
    components_of,
    read_json,
    refuse_prompts,
    scheduler_of,
    sized,
    weights_in,
)


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
        strength=strength, schedule=shifted(family.schedule(parts.schedule), shape), source=parts.source,
        labels=tuple(labels),
    )  # fmt: skip
    return Denoiser(parts.network, conditions, info, parts.first_stage), parts.notes


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
    name, kind = denoiser_of(components, path)
    schedule = read_schedule(path / "scheduler" / SCHEDULER, pipeline)
    parts = read_model(path / name, schedule=schedule, kind=kind)
    parts.folder, parts.source = path, pipeline
    parts.first_stage = first_stage_in(path, components)
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
    config, notes = checked(family, config, where, len(state))
    network = filled(family.network, partial(family.build, options={}), config, state, where)
    if schedule is None:
        if (beside := scheduler_of(path)).is_file():
            inside = beside.parent == path
            schedule = read_schedule(beside, None if inside else read_json(path / ".." / INDEX).get("_class_name"))
        elif family.name in PUBLISHED:
            whose, schedule, said = published_schedule(family.name, config)
            notes.append(f"the folder has no {SCHEDULER}: {whose}'s schedule is taken, {said}")
        else:
            raise FileFault(
                f"{path}: has no {SCHEDULER}, and a {name} has no usual schedule",
                f"put the pipeline's scheduler/{SCHEDULER} into the folder, or give the whole pipeline's folder",
            )
    return Parts(family, config, network, dict(schedule), name, notes=notes)


def denoiser_of(components: Mapping[str, str], path: Path) -> tuple[str, str]:
    found = [name for name in DENOISERS if name in components]
    if not found:
        raise HqdmError(
            f"{path / INDEX}: none of its components is a denoiser: {', '.join(components) or 'it has none'}",
            f"it takes one called {' or '.join(DENOISERS)}",
        )
    return found[0], components[found[0]]


def first_stage_in(path: Path, components: Mapping[str, str]) -> FirstStage | None:
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
        config, _ = known_entries(kind, config)
        with blaming(part / CONFIG, kind):
            check_bounds(config, len(state))
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
            raise FileFault(f"{file}: {few('tensors of another shard', twice)}", "fetch the shards again")
        state |= part
    return state
