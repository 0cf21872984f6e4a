"""Take a model into the workspace: read its tensors safely, convert them, keep them as safetensors.

A checkpoint of CompVis latent diffusion, a diffusers folder or a single file; what a model that reads prompts is asked
for is embedded here, once. Every later stage reads this artifact, so a run does not depend on the files staying where
they were.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipelines.errors import FileFault, HqdmError
from pipelines.events import Report
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.seals import sha256_of_file
from pipelines.workspace.store import Store

NAME = "model"
VERSION = 3


@dataclass(frozen=True)
class Config:
    path: str = field(default="", metadata={"key": False})  # a checkpoint or a folder
    sha256: str = ""  # of everything there that is read
    config_path: str | None = field(default=None, metadata={"key": False})  # a YAML, or a folder of configurations
    config_sha256: str | None = None
    ema: bool = True  # the moving averages, not the raw weights, where the file has both
    prompts: str | None = field(default=None, metadata={"key": False, "path": True})  # a text file, one a line
    prompts_sha256: str | None = None
    embeddings: str | None = field(default=None, metadata={"key": False, "path": True})  # of prompts, in safetensors
    embeddings_sha256: str | None = None
    size: int | None = None  # pixels a side; the model's own by default


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """None: this stage reads files from outside."""
    return {}


def with_hashes(config: Config) -> Config:
    """The configuration with the hashes of all the files that will be read, which decide whether a run is the same."""
    from pipelines.models.source import files_of

    hashes = {"sha256": _hash(files_of(Path(config.path)), Path(config.path))}
    if config.config_path is not None:
        given = Path(config.config_path)
        hashes["config_sha256"] = _hash(files_of(given) if given.is_dir() else [given], given)
    for name in ("prompts", "embeddings"):
        if getattr(config, name) is not None:
            hashes[f"{name}_sha256"] = sha256_of_file(getattr(config, name))
    return replace(config, **hashes)


def _hash(files: list[Path], base: Path) -> str:
    """Of one file its own; of a folder's files one over their names in the folder and their hashes."""
    if files == [base]:
        return sha256_of_file(base)
    folder = base if base.is_dir() else base.parent
    named = sorted((path.relative_to(folder).as_posix(), sha256_of_file(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Write `denoiser/`, `conditions.safetensors`, `first_stage/`, `model.json` and `sites.json`; figures: parameters,
    sites, bytes and what the model is.
    """
    from pipelines.models.denoiser import WEIGHTS, check_finite, find_sites, save_denoiser
    from pipelines.models.source import take
    from pipelines.quant.spec import site_to_dict

    report.begin("take in", 4, unit="parts")
    if with_hashes(config) != config:
        raise FileFault(
            f"{config.path}, or a file that goes with it, was changed since this run began",
            "type the same command again",
        )
    report.advance(1)
    paths = [None if name is None else Path(name) for name in (config.config_path, config.prompts, config.embeddings)]
    denoiser, notes = take(Path(config.path), paths[0], config.ema, paths[1], paths[2], config.size)
    for note in notes:
        report.note(note)
    report.advance(2)
    check_finite(denoiser)
    try:
        sites = find_sites(denoiser)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # an odd configuration may fit its weights
        first = str(error).partition("\n")[0]
        raise HqdmError(
            f"{config.path}: the model does not run on {denoiser.info.shape} (channels, height, width): {first}",
            "check its configuration, or give another --size",
        ) from error
    report.advance(3)
    save_denoiser(denoiser, out.path)
    report.advance(4)
    report.end()
    (out.path / "sites.json").write_text(json.dumps([site_to_dict(site) for site in sites], indent=1) + "\n")
    return {
        "parameters": sum(value.numel() for value in denoiser.network.parameters()),
        "sites": len(sites),
        "bytes": (out.path / WEIGHTS).stat().st_size,
        "notes": notes,
        "info": asdict(denoiser.info),
    }
