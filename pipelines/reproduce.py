"""The same bits again: an artifact's whole chain, run from its recorded configurations in another workspace."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import runner, stages
from pipelines.config import from_dict, to_dict
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.events import Report
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.seals import sha256_of_file
from pipelines.workspace.store import Store

MOST_THREADS = 4096


@dataclass(frozen=True)
class Reproduced:
    """One artifact of the chain beside its recorded self. `differences` between the two runs are the reasons that are
    known for files that are not the same.
    """

    recorded: Artifact
    made: Artifact
    files: list[str]  # that are not the same bits
    differences: list[str]

    @property
    def same(self) -> bool:
        return self.recorded.digest == self.made.digest


def chain(store: Store, artifact: Artifact) -> list[Artifact]:
    """Everything that an artifact was made from, inputs before what was made of them, itself last."""
    found: dict[str, Artifact] = {}

    def add(one: Artifact) -> None:
        if one.id not in found:
            for role in sorted(one.inputs):
                add(store.linked(one, role))
            found[one.id] = one

    add(artifact)
    return list(found.values())


def check(steps: list[Artifact]) -> None:
    """Refuse, before anything runs, what cannot be made again: another version of a stage, a figure of a machine, an
    outside file that is gone.
    """
    for artifact in steps:
        if artifact.stage not in stages.ROAD:
            what = "is a table of other artifacts" if artifact.stage == "compare" else "holds times of one machine"
            raise UsageError(f"{artifact.id} {what}", "name a score or a sample: hqdm status lists them")
        before, now = artifact.manifest["stage_version"], stages.version_of(artifact.stage)
        if before != now:
            raise HqdmError(
                f"{artifact.id} was made by version {before} of its stage, and this is version {now}",
                f"install the hqdm that made it (finished {artifact.manifest['finished'][:10]})",
            )
        for name, value in artifact.config.items():
            outside = name.rpartition("_")[2] in ("path", "edited", "prompts", "embeddings")
            if outside and value and not Path(value).exists():
                raise FileFault(f"{value} is gone, from which {artifact.id} was made", "put it back where it was")
        if (
            artifact.config.get("edited")
            and sha256_of_file(artifact.config["edited"]) != artifact.config["edited_sha256"]
        ):
            raise FileFault(f"{artifact.config['edited']} has changed since {artifact.id} was made of it", "restore it")
        module = stages.load(artifact.stage)
        config, hashed = _config_of(artifact), getattr(module, "with_hashes", None)
        if hashed is not None and (now := hashed(config)) != config:
            names = [name for name, value in to_dict(now).items() if value != to_dict(config)[name]]
            raise FileFault(
                f"files have changed since {artifact.id} was made of them: {', '.join(names)}",
                f"restore them: hqdm show {artifact.id} names them",
            )


def reproduce(
    store: Store, artifact: Artifact, fresh: Store, report: Report, force: bool = False
) -> Iterator[Reproduced]:
    """Make the chain in `fresh`, each stage with the number of threads that it had, and set each artifact beside the
    recorded one. What an earlier, interrupted call made there is taken as it is, unless `force`.
    """
    import torch

    if fresh.root.resolve() == store.root.resolve():
        raise UsageError(f"{fresh.root} is the workspace itself", "name another folder: --into")
    steps, made = chain(store, artifact), {}
    check(steps)
    threads = torch.get_num_threads()
    try:
        for step in steps:
            torch.set_num_threads(_threads(step) or threads)
            chosen = {role: made[link["id"]].id for role, link in step.inputs.items()}
            outcome = runner.make(fresh, step.stage, _config_of(step), chosen, report, force)
            made[step.id] = outcome.artifact
            yield _beside(step, outcome.artifact)
    finally:
        torch.set_num_threads(threads)


def _config_of(artifact: Artifact) -> Any:
    return from_dict(stages.load(artifact.stage).Config, artifact.config, f"{artifact.path / 'manifest.json'}")


def _threads(artifact: Artifact) -> int | None:
    """How many threads its stage computed with; None for a number that no machine has, with which torch crashes."""
    found = artifact.figures.get("threads") or artifact.manifest["machine"].get("threads")
    return found if type(found) is int and 1 <= found <= MOST_THREADS else None


def _beside(recorded: Artifact, made: Artifact) -> Reproduced:
    names = recorded.manifest["files"].keys() | made.manifest["files"].keys()
    files = [
        name for name in sorted(names)
        if _hash_of(recorded, name) != _hash_of(made, name)
    ]  # fmt: skip
    return Reproduced(recorded, made, files, list(_differences(_about(recorded), _about(made))))


def _hash_of(artifact: Artifact, name: str) -> str | None:
    return artifact.manifest["files"].get(name, {}).get("sha256")


def _about(artifact: Artifact) -> dict[str, Any]:
    """What a result's bits may hang on besides its configuration and inputs."""
    machine_ = artifact.manifest["machine"]
    known = dict(artifact.manifest["libraries"]) | {
        "cpu": machine_.get("cpu"),
        "device": artifact.figures.get("device") or machine_.get("device"),
    }
    return known | {
        "threads": _threads(artifact),
        "processes": artifact.figures.get("processes", 1),
        "inputs": ", ".join(sorted(artifact.inputs)),
    }


def _same_processor(one: str | None, other: str | None) -> bool:
    """Whether two names may be one processor's: older manifests have it without family and model."""
    short, long = sorted((one or "", other or ""), key=len)
    return long == short or long.startswith(f"{short} (family ")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if name == "cpu" and _same_processor(before.get(name), now.get(name)):
            continue
        if before.get(name) != now.get(name):
            yield f"{name} {before.get(name)} -> {now.get(name)}"
