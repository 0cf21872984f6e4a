"""hqdm doctor: what this machine has for hqdm."""

from dataclasses import asdict

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm doctor"


def doctor(workspace: Workspace = WORKSPACE, as_json: Json = False, debug: Debug = False) -> None:
    """Try what this machine has: kernels, extractors, room.

    Each line is fine, slower (the same results, without what would make them quick) or without (something cannot be
    done here, and the hint says what would help). Exit code 1 where integers cannot be computed at all.
    """
    from pipelines import doctor as examine

    found = examine.findings(workspace)
    if as_json:
        console.print_json([asdict(finding) for finding in found])
    else:
        for line in console.table([{"what": f.what, "state": f.state, "found": f.found} for f in found]):
            console.out(line)
        for finding in found:
            if finding.hint:
                console.say(f"{finding.what}: {finding.hint}")
    if all(finding.state == "without" for finding in found if finding.what.startswith("integers")):
        raise typer.Exit(1)
