"""hqdm reproduce: make an artifact's whole chain again, elsewhere, and compare the bits."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Processes, Workspace
from hqdm_cli.skin import shared_out

EXAMPLE = "hqdm reproduce sample/3\n  hqdm reproduce score --into elsewhere/"


def reproduce(
    context: typer.Context,
    ident: Annotated[
        str, typer.Argument(help="As sample/3, score (the newest), or a digest's beginning.", metavar="ID")
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="The workspace to make it in. [default: WORKSPACE-reproduced]", metavar="DIR"),
    ] = None,
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Annotated[bool, typer.Option("--force", help="Make again what an earlier call made there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an artifact's whole chain again, and compare the bits.

    Every stage runs from its recorded configuration in another workspace, from the checkpoint on. What is not the same
    is named, with what differs in libraries, machine, threads and processes; exit code 1 if anything is not.
    """
    shared_out(context, processes, dry_run=False)
    from pipelines.reproduce import reproduce as engine
    from pipelines.workspace.store import Store

    store = Store(workspace)
    artifact = store.get(ident)
    folder = into or workspace.with_name(f"{workspace.name}-reproduced")
    rows = []
    with console.Progress() as progress:
        for step in engine(store, artifact, Store(folder), progress, force):
            rows.append(step)
            if not as_json:
                about = "the same bits" if step.same else f"{len(step.files)} files differ: {', '.join(step.files[:3])}"
                console.out(f"{step.recorded.id}\t{step.made.id}\t{about}")
    if as_json:
        console.print_json([
            {"recorded": row.recorded.id, "made": row.made.id, "same": row.same, "files": row.files,
             "differences": row.differences}
            for row in rows
        ])  # fmt: skip
    first = next((row for row in rows if not row.same), None)
    if first is None:
        console.say(f"all {len(rows)} artifacts are the same bits in {folder}")
        return
    why = (
        ", ".join(first.differences) or "nothing that is recorded: libraries, machine, threads and processes are alike"
    )
    other = sum(not row.same for row in rows)
    console.error(
        f"{first.recorded.id} is not the same bits again ({other} of {len(rows)} artifacts)", f"what differs: {why}"
    )
    raise typer.Exit(1)
