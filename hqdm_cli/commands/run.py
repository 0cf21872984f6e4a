"""hqdm run: the whole road from one recipe file."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, DryRun, Force, Json, Processes, Workspace
from hqdm_cli.skin import finish, shared_out

EXAMPLE = "hqdm run recipe.yaml --dry-run"


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file with `model` and one key per stage.", metavar="RECIPE")],
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make everything that a recipe names.

    What is there already is not made again. Keys: model (a path), seed, and profile, plan, distill, export, sample,
    score, each with that stage's options or null; sample and score also take a list. Relative paths start from the
    recipe's folder.
    """
    shared_out(context, processes, dry_run)
    from pipelines import runner
    from pipelines.config import read_yaml
    from pipelines.workspace.store import Store

    steps = read_yaml(recipe)
    with console.Progress() as progress:
        outcomes = list(
            runner.run_recipe(Store(workspace), steps, progress, dry_run, force, recipe.parent, str(recipe))
        )
    finish(workspace, outcomes, dry_run, as_json)
