"""hqdm plan: decide every layer's transform, bits and scales from the profile."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Bits, Debug, DryRun, Force, Json, Method, Set, Variant, Workspace
from hqdm_cli.skin import config_of, finish, leave_out, pairs

EXAMPLE = """hqdm plan --method hqdm --bits w4a4
  hqdm plan --method hqdm --variant paper --set order=16
  hqdm plan --from edited.yaml"""


def plan(
    bits: Bits = None,
    method: Method = None,
    variant: Variant = None,
    options: Set = None,
    edited: Annotated[
        Path | None, typer.Option("--from", help="Take a plan edited by hand instead of making one.", metavar="FILE")
    ] = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decide every layer's transform, bits and scales.

    It says why, by measured errors. The plan is a YAML file in the artifact: copy it, edit it, and hand it back with
    --from.
    """
    from pipelines import runner
    from pipelines.errors import UsageError
    from pipelines.workspace.store import Store

    given = (("bits", bits), ("method", method), ("variant", variant), ("options", pairs(options)))
    asked = {name: value for name, value in given if value}
    if edited and asked:
        raise UsageError(f"--from {edited} says the {' and '.join(asked)} already", leave_out(asked))
    config = runner.edited_plan(edited) if edited else config_of("plan", **asked)
    with console.Progress() as progress:
        outcome = runner.make(Store(workspace), "plan", config, {}, progress, force, dry_run)
    finish(workspace, [outcome], dry_run, as_json)
