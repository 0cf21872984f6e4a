"""hqdm status: what exists, what is stale and why, and the next command."""

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm status"


def status(workspace: Workspace = WORKSPACE, as_json: Json = False, debug: Debug = False) -> None:
    """List what exists, what is stale and why, what comes next.

    Unfinished runs are named too, with the process that is at one; the command that began one goes on with it.
    """
    from pipelines import runner
    from pipelines.workspace.store import Store

    store = Store(workspace)
    reasons = runner.stale(store)
    rows = [
        {"artifact": artifact.id, "made": artifact.manifest["finished"][:16].replace("T", " "),
         "seconds": round(artifact.manifest["seconds"]),
         "from": _origin([link["id"] for link in artifact.inputs.values()]),
         "state": reasons[artifact.id] or "current"}
        for artifact in store.artifacts()
    ]  # fmt: skip
    unfinished = store.workers()
    following = runner.next_command(store)
    if as_json:
        console.print_json({"artifacts": rows, "unfinished": [stage for stage, _ in unfinished], "next": following})
    elif rows:
        for line in console.table(rows):
            console.out(line)
    else:
        console.say(f"{workspace} holds no artifacts yet")
    for stage, owner in unfinished:
        if owner:
            console.say(f"under way: a run of {stage}, by process {owner}")
        else:
            console.say(f"unfinished: a run of {stage}; the command that began it goes on")
    console.next_step(following, workspace)


def _origin(ids: list[str]) -> str:
    """The artifacts that one was made from; of a comparison, which has many, the first."""
    return " ".join(ids) if len(ids) <= 4 else f"{' '.join(ids[:3])} and {len(ids) - 3} more"
