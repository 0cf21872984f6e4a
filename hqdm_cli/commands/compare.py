"""hqdm compare: methods, bit widths and seeds on one model, as one table."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, DryRun, Force, Guidance, Json, Processes, Steps, Workspace
from hqdm_cli.skin import shared_out

# What an option of the command line is called where its name is not its stage's.
FLAGS = {"extractor_weights": "--weights"}
REFERENCE = ("reference", "reference_path", "reference_sha256")  # what --reference says of a score's configuration
EXAMPLE = """hqdm compare hqdm efficientdm --bits w4a4,w4a3 --seeds 0,1
  hqdm compare hqdm/paper:order=16 hqdm/paper:order=32 --bits w4a3 --trajectories 20 --count 1000
  hqdm compare --from comparison.yaml --dry-run"""


def compare(
    context: typer.Context,
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            help="method[/variant][:option=value,...]; `hqdm methods` lists them. [default: every method]",
            metavar="[METHOD]...",
        ),
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bit widths, with commas. [default: w4a4]", metavar="wXaY,…")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of distillation and images, with commas. [default: 0]", metavar="N,…")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint, a folder or a model artifact. [default: the current one]", metavar="FILE|ID"),
    ] = None,
    trajectories: Annotated[int | None, typer.Option(help="Teacher trajectories to train on.", metavar="N")] = None,
    count: Annotated[int | None, typer.Option(help="Images of each cell.", metavar="N")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What to measure against, as hqdm score takes it.", metavar="REFERENCE"),
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="Features to measure on, as hqdm score takes it.", metavar="NAME")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The extractor's weights, where it does not bring its own.", metavar="FILE")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of profile, distill, sample or score, for all cells: distill.batch=4. May be repeated.",
            metavar="STAGE.NAME=VALUE",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--from", help="Read it from a YAML file; what is typed goes before it.", metavar="FILE"),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, cells included.")] = False,
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods on one model and the same work.

    Every method at every bit width and seed. Each cell is a chain of artifacts from plan to score; what is there
    already is not made again, and what was interrupted goes on. A cell that fails leaves the others, and is listed at
    the end.
    """
    shared_out(context, processes, dry_run)
    from pipelines.comparison.asked import OPTIONED, Recipe, ask, read_recipe
    from pipelines.comparison.run import compare as make_all
    from pipelines.comparison.run import model_of
    from pipelines.errors import HqdmError, UsageError
    from pipelines.stages import load
    from pipelines.workspace.store import Store

    if sum((as_json, as_markdown, as_csv)) > 1:
        raise UsageError("--json, --markdown and --csv are three ways to print one table", "give one of them")
    if dry_run and (as_markdown or as_csv):
        raise UsageError(
            f"--{'csv' if as_csv else 'markdown'} prints a table, and --dry-run makes none",
            "leave one of them out; --json prints what would run as JSON",
        )
    store = Store(workspace)
    read = read_recipe(recipe) if recipe is not None else Recipe()
    options: dict[str, dict[str, Any]] = {stage: dict(getattr(read, stage)) for stage in OPTIONED}
    typed = {
        "profile": {"steps": steps, "guidance": guidance},
        "distill": {"trajectories": trajectories, "guidance": guidance},
        "sample": {"count": count, "steps": steps, "guidance": guidance},
        "score": {"extractor": extractor, "extractor_weights": weights and str(weights.absolute())},
    }
    given: dict[tuple[str, str], str] = {}  # stage and name: as they were typed
    for stage, values in typed.items():
        for name, value in values.items():
            if value is not None:
                options[stage][name], given[stage, name] = value, f"{FLAGS.get(name, f'--{name}')} {value}"
    chosen: dict[str, str] = {}
    if reference is not None:
        if not reference.strip():
            raise UsageError(
                f"--reference {reference!r} names nothing", "name digits, a folder, an .npz or a sample artifact"
            )
        found, chosen = load("score").sources(store, None, reference)
        options["score"] = {k: v for k, v in options["score"].items() if k not in REFERENCE} | found
        given |= {("score", name): f"--reference {reference}" for name in REFERENCE}
    for text in option or []:
        stage, name, value = _option(text)
        if before := given.get((stage, name)):
            raise UsageError(f"{stage}.{name} is given twice: {before} and --option {text}", "give it once")
        options.setdefault(stage, {})[name], given[stage, name] = value, f"--option {text}"
    asked = ask(
        methods or read.methods or (), _words("--bits", bits) if bits is not None else read.bits or ["w4a4"],
        _numbers(seeds) if seeds is not None else read.seeds or [0], options, chosen.get("reference"),
    )  # fmt: skip
    with console.Progress() as progress:
        taken = model_of(store, model if model is not None else read.model, progress, dry_run)
        result = make_all(store, asked, taken.artifact, progress, force, dry_run)
    if dry_run:
        _show_plan(result, as_json)
        return
    artifact = result.outcome.artifact
    if as_json or as_csv or as_markdown:
        name = "table.json" if as_json else "table.csv" if as_csv else "table.md"
        text = _with_workspace(artifact, name, workspace)
        console.out(console.plain_json(text) if as_json else text, end="")
    else:
        _show_table(artifact)
    console.say(f"{artifact.id}: {artifact.path / 'table.md'}, table.json, table.csv and pictures/")
    if result.failed:
        for cell in result.failed:
            console.say(f"failed: {cell.name}: {cell.failed}: {cell.error}")
        raise HqdmError(
            f"{len(result.failed)} of {len(result.cells)} cells failed: {', '.join(c.name for c in result.failed)}",
            "the others are in the table; the same command tries these again",
        )
    console.next_step(f"hqdm show {artifact.id}", workspace)


def _words(option: str, text: str) -> list[str]:
    """The words between commas; UsageError where there is none."""
    from pipelines.errors import UsageError

    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} {text!r} names nothing", f"write words with commas, or leave {option} out")
    if any(" " in word for word in words):
        commas = ",".join(text.replace(",", " ").split())
        raise UsageError(f"{option} {text!r} cannot be read", f"put commas between its words: {option} {commas}")
    return words


def _numbers(text: str) -> list[int]:
    from pipelines.errors import UsageError

    words = _words("--seeds", text)
    if not all(word.isdecimal() and len(word) < 20 for word in words):
        raise UsageError(
            f"--seeds {text!r} cannot be read", "write whole numbers of 0 or more with commas: --seeds 0,1,2"
        )
    return [int(word) for word in words]


def _option(text: str) -> tuple[str, str, Any]:
    """distill.batch=4 as stage, name and value; the value as YAML has it."""
    from pipelines.config import yaml_value
    from pipelines.errors import UsageError

    place, equals, value = text.partition("=")
    stage, dot, name = place.strip().partition(".")
    if not (equals and dot and name):
        raise UsageError(f"--option {text!r} cannot be read", "write it as distill.batch=4")
    return stage, name, yaml_value(value, f"--option {place.strip()}")


def _with_workspace(artifact: Any, name: str, workspace: Path) -> str:
    """A file of the comparison, its commands with the workspace that they are to be typed in."""
    import json

    from pipelines.report import comparison

    text = artifact.file(name).read_text(encoding="utf-8")
    added = console.in_workspace("", workspace)
    if not added:
        return text
    table = artifact.values("table.json")
    for entry in [*table["cells"], *table["failed"]]:
        if command := entry.get("command"):
            entry["command"] = command + added
            text = text.replace(f"\n{command}\n", f"\n{command}{added}\n")  # of table.md: a line each
    if name == "table.json":
        return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return comparison.csv_text(table) if name == "table.csv" else text


def _show_plan(result: Any, as_json: bool) -> None:
    """A dry run: every cell, what there is of it, what would run, and what speaks against it."""
    rows, faults = [], {cell.name: cell.error for cell in result.cells if cell.error}
    for cell in result.cells:
        missing = [] if cell.ended else [stage for stage in cell.road if stage not in cell.chain]
        there = cell.chain.get("score") or cell.chain.get("sample")
        rows.append({"cell": cell.name, "there": there.id if cell.ended else "", "would run": " ".join(missing)})
    if as_json:
        rows = [row | {"error": faults.get(row["cell"], "")} for row in rows]
        console.print_json({"cells": rows, "seconds": result.seconds})
        return
    for line in console.table(rows):
        console.out(line)
    missing = sum(not cell.ended for cell in result.cells)
    if not missing:
        console.say(f"all {len(rows)} cells are there")
    elif result.seconds is None:
        console.say(f"{missing} of {len(rows)} cells would be made; nothing like them was made yet to tell how long")
    else:
        console.say(f"{missing} of {len(rows)} cells would be made, in about {console.duration(result.seconds)}")
    for name, error in faults.items():
        console.say(f"would fail as it is: {name}: {error}")


def _show_table(artifact: Any) -> None:
    """On a terminal drawn tables as wide as it is, the best of each width in bold green; elsewhere aligned text with a
    star.
    """
    import sys

    from pipelines.report.comparison import note, shown, words_width

    table = artifact.values("table.json")
    view = shown(table)
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        terminal = Console()
        for part in view.parts(terminal.width):
            drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for heading, number in zip(part.headings, part.numbers, strict=True):
                drawn.add_column(
                    heading, justify="right" if number else "left", no_wrap=number, overflow="fold",
                    max_width=None if number else words_width(terminal.width),
                )  # fmt: skip
            for texts, best in zip(part.lines, part.best, strict=True):
                drawn.add_row(
                    *(Text(console.plain(t), "bold green" if b else "") for t, b in zip(texts, best, strict=True))
                )
            terminal.print(drawn)
    else:
        rows = [
            dict(zip(view.headings, (f"{t}*" if b else t for t, b in zip(texts, best, strict=True)), strict=True))
            for texts, best in zip(view.lines, view.best, strict=True)
        ]
        for line in console.table(rows):
            console.out(line)
    console.say(note(table))
