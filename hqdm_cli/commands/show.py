"""hqdm show: one artifact, as its manifest has it."""

from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm show distill/1\n  hqdm show plan --json"
FILES_SHOWN = 12


def show(
    ident: Annotated[
        str, typer.Argument(help="As distill/3, distill (the newest), or a digest's beginning.", metavar="ID")
    ],
    workspace: Workspace = WORKSPACE,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show one artifact: its origin, figures and files.

    With --json the whole manifest.
    """
    from pipelines import runner
    from pipelines.config import write_yaml
    from pipelines.workspace.store import Store

    store = Store(workspace)
    artifact = store.get(ident)
    stale = runner.stale(store)[artifact.id]
    if as_json:
        console.print_json({"id": artifact.id, "path": str(artifact.path), "stale": stale, **artifact.manifest})
        return
    manifest = artifact.manifest
    files = [f"{name} ({entry['bytes']} bytes)" for name, entry in manifest["files"].items()]
    if len(files) > FILES_SHOWN:
        files[FILES_SHOWN:] = [f"and {len(files) - FILES_SHOWN} more"]
    shown = {
        "artifact": artifact.id,
        "path": str(artifact.path),
        "state": stale or "current",
        "made": f"{manifest['finished'][:19]} UTC in {console.duration(manifest['seconds'])}",
        "digest": artifact.digest,
        "inputs": {role: link["id"] for role, link in artifact.inputs.items()},
        "config": artifact.config,
        "libraries": manifest["libraries"],
        "machine": manifest["machine"],
        "figures": artifact.figures,
        "files": files,
    }
    console.out(write_yaml(shown), end="")
