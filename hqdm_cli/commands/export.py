"""hqdm export: write the student in a form that other programs and the integer back ends load."""

from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, DryRun, Force, Json, Workspace
from hqdm_cli.skin import config_of, finish, named

EXAMPLE = "hqdm export --format int"


def export(
    form: Annotated[
        str | None,
        typer.Option("--format", help="int: packed integers; float: a diffusers folder.", metavar="int|float"),
    ] = None,
    student: Annotated[
        str | None, typer.Option("--from", help="The distilled artifact; by default the newest.", metavar="ID")
    ] = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the student as packed integers or as floats.

    Adapters are merged first; the integers come from the very function that training used.
    """
    from pipelines import runner
    from pipelines.workspace.store import Store

    store = Store(workspace)
    chosen = {"distill": named(store, student, "distill").id} if student else {}
    with console.Progress() as progress:
        outcome = runner.make(store, "export", config_of("export", format=form), chosen, progress, force, dry_run)
    finish(workspace, [outcome], dry_run, as_json)
