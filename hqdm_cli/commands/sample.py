"""hqdm sample: draw images from the teacher, the fake-quantised or the integer student."""

from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import (
    WORKSPACE,
    Batch,
    Debug,
    Device,
    DryRun,
    Eta,
    Force,
    Guidance,
    Json,
    Processes,
    Scheduler,
    Seed,
    Steps,
    Workspace,
)  # fmt: skip
from hqdm_cli.skin import config_of, finish, shared_out

EXAMPLE = "hqdm sample\n  hqdm sample teacher fake int --count 1000 --steps 20 --seed 0"


def sample(
    context: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="teacher, fake, int: one artifact each. [default: int]", metavar="[SOURCE]..."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Images to draw.", metavar="N")] = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    batch: Batch = None,
    backend: Annotated[
        str | None, typer.Option(help="Who computes the integers: cpu, reference, cuda, cuda-bf16.", metavar="NAME")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="What a student's attention multiplies in.", metavar="fp32|int8")
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option("--low-memory", help="Return memory as soon as it is free: slower, the same images."),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Sample from this artifact, or from what it was made of; by default the newest.",
            metavar="ID",
        ),
    ] = None,
    device: Device = None,
    seed: Seed = None,
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw images from the teacher or a student.

    PNG files and one .npz. Image i depends on the seed and i alone, so that the images of the teacher and of its
    students can be compared one by one.
    """
    shared_out(context, processes, dry_run)
    from pipelines import runner, stages
    from pipelines.errors import UsageError, did_you_mean
    from pipelines.workspace.store import Store

    store = Store(workspace)
    chosen = store.get(origin) if origin else None
    for source in sources or []:
        if source not in runner.SOURCES:
            raise UsageError(f"there is no source {source!r}", did_you_mean(source, runner.SOURCES))
    # Only the integer student has back ends; beside it, teacher and fake are drawn without.
    beside_int = {"teacher", "fake"} if "int" in (sources or []) else set()
    asked = []
    for source in dict.fromkeys(sources or [None]):
        config = config_of(
            "sample", source=source, count=count, steps=steps, eta=eta, guidance=guidance, scheduler=scheduler,
            batch=batch, backend=None if source in beside_int else backend, low_memory=low_memory,
            attention=None if source == "teacher" and sources[1:] else attention,
            device=None if source == "int" and sources[1:] else device, seed=seed,
        )  # fmt: skip
        named = {"source": store.ancestor(chosen, runner.SOURCES[config.source]).id} if chosen else {}
        stages.load("sample").inputs(config, store, named)  # refuses now what would be refused after the first source
        asked.append((config, named))
    with console.Progress() as progress:
        outcomes = [runner.make(store, "sample", config, named, progress, force, dry_run) for config, named in asked]
    finish(workspace, outcomes, dry_run, as_json)
