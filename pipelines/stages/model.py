"""Take a checkpoint into the workspace: read its tensors safely, convert them, keep them as safetensors.

Every later stage reads this artifact, so a run does not depend on the checkpoint staying where it was.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipelines.errors import FileFault
from pipelines.events import Report
from pipelines.store import Artifact, Draft, Store, sha256_of_file

NAME = "model"
VERSION = 1


@dataclass(frozen=True)
class Config:
    path: str = field(default="", metadata={"key": False})  # the checkpoint
    sha256: str = ""
    config_path: str | None = field(default=None, metadata={"key": False})  # its YAML
    config_sha256: str | None = None
    ema: bool = True  # the moving averages, not the raw weights


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """None: this stage reads a file from outside."""
    return {}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Write `unet/`, `condition.safetensors`, `model.json` and `sites.json`; figures: parameters and sites."""
    from pipelines.models.compvis import load_checkpoint
    from pipelines.models.denoiser import find_sites, save_denoiser
    from pipelines.quant.spec import site_to_dict

    for name, recorded in ((config.path, config.sha256), (config.config_path, config.config_sha256)):
        if name is not None and sha256_of_file(name) != recorded:
            raise FileFault(f"{name} was changed since this run began", "type the same command again")
    path = None if config.config_path is None else Path(config.config_path)
    denoiser, wrappers = load_checkpoint(Path(config.path), path, config.ema)
    if wrappers:
        report.note(f"left out of the pickle, not run: {', '.join(wrappers)}")
    save_denoiser(denoiser, out.path)
    sites = find_sites(denoiser)
    (out.path / "sites.json").write_text(json.dumps([site_to_dict(site) for site in sites], indent=1) + "\n")
    weights = out.path / "unet" / "diffusion_pytorch_model.safetensors"
    return {
        "parameters": sum(value.numel() for value in denoiser.unet.parameters()),
        "sites": len(sites),
        "bytes": weights.stat().st_size,
        "left_out": wrappers,
        "info": asdict(denoiser.info),
    }
