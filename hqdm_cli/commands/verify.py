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

    A file can be missing, added, cut, changed or unreadable; exit code 1 if any is. Manifests are checked too.
    """
    from pipelines.workspace.store import CURRENT, Store

    store = Store(workspace)
    if ident:
        artifact = store.get(ident)
        faults = {artifact.id: artifact.verify()}
    else:
        faults = {}
        for stage in store.stages():
            sound, broken = store.survey(stage)
            faults |= {name: [fault.what] for name, fault in broken.items()}
            faults |= {artifact.id: artifact.verify() for artifact in sound}
            if store.current_is_damaged(stage):
                where = store.root / stage / CURRENT
                console.say(f"warning: {where} is damaged: the newest {stage} counts as asked for last")
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
