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

EXAMPLE = "hqdm profile model.ckpt --config model.yaml --steps 20"


def profile(
    checkpoint: Annotated[Path, typer.Argument(help="A CompVis latent-diffusion checkpoint.", metavar="CHECKPOINT")],
    config: Annotated[
        Path | None, typer.Option(help="Its YAML; by default the one of its name beside it.", metavar="FILE")
    ] = None,
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
    """Read a checkpoint and measure each layer and timestep.

    What quantisation would cost is measured along teacher trajectories. Only tensors are read from the checkpoint;
    nothing in it runs.
    """
    from pipelines import runner
    from pipelines.store import Store

    store = Store(workspace)
    asked = config_of("profile", steps=steps, eta=eta, guidance=guidance, scheduler=scheduler, batch=batch, seed=seed)
    with console.Progress() as progress:
        model = runner.make(
            store, "model", runner.model_config(checkpoint, config, ema=ema), {}, progress, force, dry_run
        )
        outcomes = [model]
        if model.artifact is None:
            progress.note("profile: would run (its input model will be made first)")
        else:
            outcomes.append(
                runner.make(store, "profile", asked, {"model": model.artifact.id}, progress, force, dry_run)
            )
    finish(workspace, outcomes, dry_run, as_json)
