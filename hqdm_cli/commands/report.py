"""hqdm report: the table of everything scored, and the pictures beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Json, Workspace

EXAMPLE = "hqdm report --picture comparison.png\n  hqdm report --format markdown"
FORMATS = ("table", "markdown", "json", "csv")


def report(
    form: Annotated[str, typer.Option("--format", help="How to print the table.", metavar="|".join(FORMATS))] = "table",
    picture: Annotated[
        Path | None, typer.Option(help="Also write the samples side by side as a picture.", metavar="FILE")
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the table of all scored samples.

    Teacher and students with speed, size and scores; --picture puts their images beside each other.
    """
    import csv
    import io

    from pipelines import runner
    from pipelines.errors import UsageError, did_you_mean
    from pipelines.report.table import collect, equal_images, speed_up
    from pipelines.workspace.store import Store

    if form not in FORMATS:
        raise UsageError(f"there is no format {form!r}", did_you_mean(form, FORMATS))
    store = Store(workspace)
    rows = collect(store)
    if form == "json" or as_json:
        console.print_json(rows)
    elif form == "csv" and rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, console.columns_of(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        console.out(text.getvalue(), end="")
    elif rows:
        for line in console.table(rows) if form == "table" else console.markdown(rows):
            console.out(line)
        for fake, integer in equal_images(store):
            console.say(f"{fake} (fake-quantised) and {integer} (integers) hold the same images, bit for bit")
    if rows and (sentence := speed_up(store)):
        console.say(sentence)
    if picture:
        from pipelines.report.grids import side_by_side

        side_by_side(store, picture)
        console.say(f"wrote {picture}")
    if not rows:
        console.say(f"{workspace} holds nothing scored yet")
    following = runner.next_command(store)
    console.next_step(runner.another_road(store) if following == "hqdm report" else following, workspace)
