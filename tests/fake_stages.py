"""Tiny stages of the real shape, for tests of what goes on around stages: each writes one text file."""

import sys
import types
from dataclasses import dataclass, field, replace

from pipelines import stages
from pipelines.errors import HqdmError
from pipelines.workspace.seals import sha256_of_file

# The commands after `hqdm profile model.ckpt`.
ROAD = (("plan",), ("distill", "--bits", "w4a4"), ("export", "--format", "int"), ("sample",), ("score",))
PARENTS = {"profile": "model", "plan": "profile", "distill": "plan", "export": "distill"}


@dataclass(frozen=True)
class ModelConfig:
    path: str = field(default="", metadata={"key": False})
    sha256: str = ""
    config_path: str | None = field(default=None, metadata={"key": False})
    config_sha256: str | None = None
    ema: bool = True


@dataclass(frozen=True)
class ProfileConfig:
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True)
class PlanConfig:
    method: str = "hqdm"
    variant: str = "ours"
    bits: str = "w4a4"
    edited: str | None = field(default=None, metadata={"key": False})
    edited_sha256: str | None = None


@dataclass(frozen=True)
class DistillConfig:
    trajectories: int = 4
    steps: int = 20
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True)
class ExportConfig:
    format: str = "int"


@dataclass(frozen=True)
class SampleConfig:
    source: str = "int"
    count: int = 8
    eta: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ScoreConfig:
    samples_path: str | None = field(default=None, metadata={"key": False, "path": True})
    samples_sha256: str | None = None
    reference: str = "digits"
    reference_path: str | None = field(default=None, metadata={"key": False, "path": True})
    extractor: str | None = None


CONFIGS = {
    "model": ModelConfig, "profile": ProfileConfig, "plan": PlanConfig, "distill": DistillConfig,
    "export": ExportConfig, "sample": SampleConfig, "score": ScoreConfig,
}  # fmt: skip


def _parent(name, config):
    if name == "sample":
        return {"teacher": "model", "fake": "distill", "int": "export"}[config.source], "source"
    if name == "score":
        return (None, None) if config.samples_path else ("sample", "samples")
    return PARENTS.get(name), None


def _fake(name):
    """A module with what the runner asks of a stage."""
    module = types.ModuleType(f"fake_{name}")
    module.NAME, module.VERSION, module.Config = name, 1, CONFIGS[name]
    module.interrupt_at = None  # a step at which the run is cut, as Ctrl-C would

    def inputs(config, store, chosen):
        parent, role = _parent(name, config)
        if parent is None:
            return {}
        role = role or parent
        artifact = store.get(chosen[role]) if role in chosen else store.current(parent)
        if artifact is None:
            raise HqdmError(f"there is no {parent} yet", f"hqdm {parent}")
        return {role: artifact}

    def run(config, inputs, out, report):
        report.begin(name, 3)
        for step in range(1, 4):
            if (out.work / str(step)).exists():
                continue
            if module.interrupt_at == step:
                raise KeyboardInterrupt
            (out.work / str(step)).write_text("done")
            report.advance(step, loss=1 / step)
        report.end()
        # Content follows configuration and inputs, as it would in a deterministic stage.
        made_of = sorted((role, artifact.digest) for role, artifact in inputs.items())
        (out.path / "result.txt").write_text(f"{name} {config} {made_of} {module.VERSION}\n")
        return {"loss": 1 / 3, "resumed": out.resumed}

    module.inputs, module.run = inputs, run
    if name == "model":
        module.with_hashes = _with_hashes
    if name == "score":
        module.with_hashes = lambda config: config
        module.sources = lambda store, samples, reference, pair: ({}, {"samples": store.get(samples).id})
    return module


def _with_hashes(config):
    yaml = config.config_path and sha256_of_file(config.config_path)
    return replace(config, sha256=sha256_of_file(config.path), config_sha256=yaml)


def install(monkeypatch):
    """Put the fake stages in the place of the real ones; returns them by name."""
    modules = {name: _fake(name) for name in CONFIGS}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(stages.STAGES, name, module.__name__)
    return modules


def checkpoint(tmp_path, text="weights"):
    """A file that stands for a checkpoint."""
    path = tmp_path / "model.ckpt"
    path.write_text(text)
    return path
