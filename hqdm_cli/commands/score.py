"""hqdm score: measure images against a reference."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, DryRun, Force, Json, Processes, Seed, Workspace
from hqdm_cli.skin import finish, shared_out

EXAMPLE = "hqdm score\n  hqdm score samples/ --reference statistics.npz --extractor inception --weights inception.pth"


def score(
    context: typer.Context,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, .npz files, archives or sample artifacts."
            " [default: every sample of the newest student and its teacher]",
            metavar="[IMAGES]...",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What to measure against: a name, folder, archive, .npz or artifact.", metavar="REFERENCE"),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="Features to measure on: inception, digits, cifar10, or none for pairs alone.", metavar="NAME"
        ),
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(help="Images to compare one by one (PSNR): folder, .npz or artifact.", metavar="IMAGES"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The extractor's weights, where it does not bring its own.", metavar="FILE")
    ] = None,
    seed: Seed = None,
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score images: FID, sFID, IS, KID, precision, recall, PSNR.

    Every figure carries the number of images, the reference, and the extractor with the hash of its weights.
    """
    shared_out(context, processes, dry_run)
    from pipelines import config, runner, stages
    from pipelines.errors import HqdmError
    from pipelines.workspace.store import Store

    store, stage = Store(workspace), stages.load("score")
    found = runner.samples_of_current_lineage(store)
    alone = [artifact for artifact in found if runner.needs_no_pair(store, artifact, reference, extractor)]
    jobs = what or [artifact.id for artifact in alone or found]
    if not jobs:
        raise HqdmError(f"{workspace} has no samples to score", "hqdm sample, or name images: hqdm score samples/")
    asked = []
    for word in jobs:
        options, chosen = stage.sources(store, word, reference, pair)
        options |= {"extractor": extractor, "extractor_weights": weights and str(weights), "seed": seed}
        asked.append((stage.with_hashes(config.replace(stage.Config(), **options)), chosen))
    with console.Progress() as progress:
        outcomes = [runner.make(store, "score", values, chosen, progress, force, dry_run) for values, chosen in asked]
    finish(workspace, outcomes, dry_run, as_json)
