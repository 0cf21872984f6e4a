"""What every stage command does around the engine: options to a configuration, an outcome to lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqdm_cli import console


def config_of(stage: str, **options: Any) -> Any:
    """The stage's defaults with the options that were given (those that are not None)."""
    from pipelines import config, stages

    return config.replace(stages.load(stage).Config(), **options)


def pairs(given: Sequence[str] | None) -> dict[str, str] | None:
    """The words of --set NAME=VALUE; None where there are none."""
    from pipelines.errors import UsageError

    for word in given or ():
        if "=" not in word:
            raise UsageError(f"--set {word} has no value", "write it as --set order=16; hqdm methods lists the options")
    return {name: value for name, _, value in (word.partition("=") for word in given)} if given else None


def named(store: Any, ident: str, stage: str) -> Any:
    """The artifact that an option names, which has to be of that stage."""
    from pipelines.errors import UsageError

    artifact = store.get(ident)
    if artifact.stage != stage:
        raise UsageError(f"{ident} is made by {artifact.stage}, not by {stage}", "hqdm status lists the artifacts")
    return artifact


def finish(workspace: Path, outcomes: Sequence[Any], dry_run: bool, as_json: bool) -> None:
    """The results on stdout and, after a real run, the next command on stderr."""
    from pipelines import runner
    from pipelines.store import Store

    console.show_outcomes(outcomes, dry_run, as_json)
    if not dry_run:
        console.next_step(runner.next_command(Store(workspace)), workspace)
