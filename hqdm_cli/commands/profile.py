"""hqdm profile: read a checkpoint into the workspace and measure its activations along teacher trajectories."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import (
    WORKSPACE,
    Batch,
    Debug,
    DryRun,
    Eta,
    Force,
    Guidance,
    Json,
    Scheduler,
    Seed,
    Steps,
    Workspace,
)  # fmt: skip
from hqdm_cli.skin import config_of, finish

EXAMPLE = """hqdm profile model.ckpt --config model.yaml --steps 20
  hqdm profile stable-diffusion/ --prompts prompts.txt"""


def profile(
    model: Annotated[
        Path,
        typer.Argument(help="A latent-diffusion checkpoint, a diffusers folder, or a single file.", metavar="MODEL"),
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="A checkpoint's YAML, or a single file's folder of configurations.", metavar="FILE|DIR"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="What to ask a model that reads prompts for: a text file, one a line.", metavar="FILE"),
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="The same as precomputed embeddings, in safetensors.", metavar="FILE")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side; by default the model's own.", metavar="N")] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Take the averaged weights, or the last ones.")
    ] = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    batch: Batch = None,
    seed: Seed = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a model and measure each layer and timestep.

    What quantisation would cost is measured along teacher trajectories. Only tensors are read from a checkpoint;
    nothing in it runs.
    """
    from pipelines import runner
    from pipelines.workspace.store import Store

    store = Store(workspace)
    asked = config_of("profile", steps=steps, eta=eta, guidance=guidance, scheduler=scheduler, batch=batch, seed=seed)
    with console.Progress() as progress:
        wanted = runner.model_config(model, config, ema=ema, prompts=prompts, embeddings=embeddings, size=size)
        taken = runner.make(store, "model", wanted, {}, progress, force, dry_run)
        outcomes = [taken]
        if taken.artifact is None:
            progress.note("profile: would run (its input model will be made first)")
        else:
            outcomes.append(
                runner.make(store, "profile", asked, {"model": taken.artifact.id}, progress, force, dry_run)
            )
    finish(workspace, outcomes, dry_run, as_json)
