"""hqdm gc: what interrupted runs left, listed and removed."""

from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm gc --dry-run\n  hqdm gc --stale"


def gc(
    stale: Annotated[
        bool,
        typer.Option("--stale", help="Also artifacts that a newer version replaced and nothing else was made from."),
    ] = False,
    workspace: Workspace = WORKSPACE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; remove nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove what interrupted runs left behind.

    Drafts, from which the command that began them would go on, and what a kill kept from being deleted. Artifacts stay,
    and so does everything of a stage at which a process is at work. --dry-run lists it all first.
    """
    from pipelines import gc as engine
    from pipelines import runner
    from pipelines.errors import FileFault
    from pipelines.workspace.store import Store

    store = Store(workspace)
    found = engine.collect(store, stale, dry_run)
    if as_json:
        console.print_json(
            {
                "removed": not dry_run,
                "bytes": found.bytes,
                "leftovers": [
                    {"path": str(left.path), "stage": left.stage, "kind": left.kind, "bytes": left.bytes,
                     "why": left.why}
                    for left in found.leftovers
                ],
                "busy": found.busy,
            }
        )  # fmt: skip
    else:
        for left in found.leftovers:
            console.out(f"{left.path}\t{console.size(left.bytes)}\t{left.kind}: {left.why}")
    for stage, holder in found.busy.items():
        console.say(f"{stage} stays as it is: {holder}")
    if not found.leftovers:
        console.say("nothing to remove")
    else:
        done = "would be removed" if dry_run else "removed"
        console.say(f"{len(found.leftovers)} things of {console.size(found.bytes)} {done}")
    if found.stuck:
        named = ", ".join(str(path) for path in found.stuck)
        raise FileFault(f"not all of it could be removed: {named}", "see the rights of what is in there")
    if dry_run and found.leftovers:
        console.next_step("hqdm gc --stale" if stale else "hqdm gc", workspace)
    else:
        console.next_step(runner.next_command(store), workspace)
