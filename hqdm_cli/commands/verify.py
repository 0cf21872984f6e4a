"""hqdm verify: hash everything again."""

from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm verify\n  hqdm verify export/1"


def verify(
    ident: Annotated[str | None, typer.Argument(help="One artifact; by default all of them.", metavar="[ID]")] = None,
    workspace: Workspace = WORKSPACE,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hash every file again and name each damaged one.

    A file can be missing, added, cut or changed; exit code 1 if any is.
    """
    from pipelines.store import Store

    store = Store(workspace)
    artifacts = [store.get(ident)] if ident else store.artifacts()
    faults = {artifact.id: artifact.verify() for artifact in artifacts}
    if as_json:
        console.print_json(faults)
    else:
        for name, lines in faults.items():
            console.out("\n".join(f"{name}\t{line}" for line in lines or ["as it was written"]))
    damaged = [name for name, lines in faults.items() if lines]
    if damaged:
        hint = "restore those files, or run the stage again with --force"
        console.error(f"{len(damaged)} of {len(faults)} artifacts are damaged: {', '.join(damaged)}", hint)
        raise typer.Exit(1)
