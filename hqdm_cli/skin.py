"""What every stage command does around the engine: options to a configuration, an outcome to lines."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from hqdm_cli import console


def config_of(stage: str, **options: Any) -> Any:
    """The stage's defaults with the options that were given (those that are not None)."""
    from pipelines import config, stages

    return config.replace(stages.load(stage).Config(), **options)


def pairs(given: Sequence[str] | None) -> dict[str, str] | None:
    """The words of --set NAME=VALUE; None where there are none."""
    from pipelines.errors import UsageError

    found: dict[str, str] = {}
    for word in given or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word} has no value", "write it as --set order=16; hqdm methods lists the options")
        if name in found:
            raise UsageError(f"--set {name} is given twice, {found[name]} and {value}", "give each option once")
        found[name] = value
    return found or None


def leave_out(asked: Iterable[str]) -> str:
    """The hint that names what was typed beside something that says it already, as it was typed."""
    return "leave out " + " and ".join("--set" if name == "options" else f"--{name}" for name in asked)


def named(store: Any, ident: str, stage: str) -> Any:
    """The artifact that an option names, which has to be of that stage."""
    from pipelines.errors import UsageError

    artifact = store.get(ident)
    if artifact.stage != stage:
        raise UsageError(f"{ident} is made by {artifact.stage}, not by {stage}", "hqdm status lists the artifacts")
    return artifact


def shared_out(context: typer.Context, count: int | None, dry_run: bool) -> None:
    """Where --processes asks for more than one, run this command in them and end with their exit code."""
    from pipelines import processes
    from pipelines.errors import UsageError

    if count is None:
        return
    if count < 1:
        raise UsageError(f"--processes cannot be {count}", "it takes 1 or more")
    if count > 1 and not dry_run:
        words = ["-m", "hqdm_cli", *_without(context.obj["args"], "--processes")]
        raise typer.Exit(processes.launch(count, words))


def _without(args: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    kept, words = [], iter(args)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def finish(workspace: Path, outcomes: Sequence[Any], dry_run: bool, as_json: bool) -> None:
    """The results on stdout and, after a real run, the next command on stderr."""
    from pipelines import runner
    from pipelines.workspace.store import Store

    console.show_outcomes(outcomes, dry_run, as_json)
    if not dry_run:
        console.next_step(runner.next_command(Store(workspace)), workspace)
