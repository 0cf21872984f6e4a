"""What a person sees: progress, notes and errors on stderr; results on stdout, as text or JSON."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hqdm_cli import journal
from pipelines import stops
from pipelines.events import Report

QUIET_SECONDS = 10  # between two progress lines where stderr is no terminal
MOST_SHOWN = 4000  # characters of an error: a file can hold a name of any length


def plain(text: str, kept: str = "\n\t") -> str:
    """Text that a terminal shows and does not obey: what cannot be printed is written out, as in \\x1b.

    Names come from files, and files can hold escape sequences, characters that turn the line round, and halves of
    surrogate pairs, on which printing itself would fail. `kept`: what may stay besides.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def say(message: str) -> None:
    print(plain(message), file=sys.stderr, flush=True)


def out(text: str, end: str = "\n") -> None:
    """A result, on stdout."""
    print(plain(text), end=end, flush=True)


def error(what: str, hint: str = "") -> None:
    """One line each, whatever names they hold."""
    for word, text in (("error", what), ("hint", hint)):
        if text:
            text = text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} … {text[-MOST_SHOWN // 2 :]}"
            say(f"{word}: {plain(text, kept='')}")


def in_workspace(command: str, workspace: Path) -> str:
    """A command with the option that names the workspace, where it is not the one that is taken without."""
    if workspace not in (Path("workspace"), Path(os.environ.get("HQDM_WORKSPACE", "workspace"))):
        command += f" -w {shlex.quote(str(workspace))}"
    return command


def next_step(command: str, workspace: Path) -> None:
    """The last line of a command: what to type next, in the same workspace."""
    say(f"next: {in_workspace(command, workspace)}")


def duration(seconds: float) -> str:
    """7 s, 3:05, 1:02:03"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """512 B, 3.4 KB, 1.2 GB"""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["KB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def number(value: Any) -> str:
    """A figure in at most five digits; anything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


class _Task:
    """One task of a Report: what is done, and how fast."""

    def __init__(self, name: str, total: int, done: int, unit: str):
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.first, self.start, self.shown = done, time.monotonic(), 0.0
        self.figures: dict[str, float] = {}
        self.bar = None

    @property
    def rate(self) -> float | None:
        """Units a second; None before the first."""
        elapsed = time.monotonic() - self.start
        return (self.done - self.first) / elapsed if self.done > self.first and elapsed > 0 else None

    def state(self) -> str:
        """12.3 steps/s  loss 0.0123  3:05 left"""
        rate = self.rate
        words = [] if rate is None else [f"{rate:.3g} {self.unit}/s"]
        words += [f"{name} {number(value)}" for name, value in self.figures.items()]
        if rate is not None and self.done < self.total:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        return "  ".join(words)


class Progress(Report):
    """Shows the engine's events: a live bar on a terminal, else one plain line now and then. A context manager."""

    def __init__(self):
        self._tasks: list[_Task] = []  # innermost last
        self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *fault: object) -> None:
        if self._live is not None:
            self._live.stop()  # gives the cursor back, however the command ends
            self._live = None

    def begin(self, task: str, total: int, done: int = 0, unit: str = "steps") -> None:
        self._tasks.append(entry := _Task(task, total, done, unit))
        journal.current.event("begin", task=task, done=done, total=total, unit=unit)
        if done:
            self.note(f"{task}: goes on at {done} of {total} {unit}")
        if not sys.stderr.isatty():
            entry.shown = time.monotonic()
            return
        if self._live is None:
            from rich import progress
            from rich.console import Console

            columns = [
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=30),
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
                progress.TextColumn("{task.fields[state]}", markup=False),
            ]
            self._live = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
        entry.bar = self._live.add_task(plain(task, kept=""), total=total, completed=done, unit=unit, state="")

    def advance(self, done: int, **figures: float) -> None:
        stops.check()
        task = self._tasks[-1]
        task.done = done
        task.figures |= figures
        journal.current.advance(task.name, done, task.total, task.unit, task.rate, figures)
        if task.bar is not None:
            self._live.update(task.bar, completed=done, state=task.state())
        elif time.monotonic() - task.shown >= QUIET_SECONDS:
            task.shown = time.monotonic()
            say(f"{task.name}: {done}/{task.total} {task.unit}  {task.state()}")

    def end(self) -> None:
        task = self._tasks.pop()
        journal.current.event(
            "end", task=task.name, done=task.done, total=task.total, unit=task.unit, figures=task.figures
        )
        if task.bar is not None:
            self._live.remove_task(task.bar)
        worked = f"{task.done - task.first} {task.unit} in {duration(time.monotonic() - task.start)}"
        self._show(f"{task.name}: {worked}" + (f"  {task.state()}" if task.done > task.first else ""))

    def made(self, outcome: Any) -> None:
        journal.current.artifact(outcome)

    def note(self, message: str) -> None:
        journal.current.event("note", message=message)
        self._show(message)

    def _show(self, message: str) -> None:
        if self._live is not None:
            self._live.console.print(plain(message), markup=False, highlight=False, soft_wrap=True)
        else:
            say(message)

    def warn(self, message: str) -> None:
        journal.current.event("warn", message=message)
        self._show(f"warning: {message}")


def show_outcomes(outcomes: Sequence[Any], dry_run: bool, as_json: bool) -> None:
    """Outcomes of stages on stdout: `id <tab> path` a line; in a dry run their configurations; or a JSON list."""
    rows = [
        {
            "stage": outcome.stage,
            "id": outcome.artifact and outcome.artifact.id,
            "path": outcome.artifact and str(outcome.artifact.path),
            "ran": outcome.ran,
            "would_run": outcome.artifact is None,
            "reason": outcome.reason,
            "config": outcome.config,
            "figures": outcome.artifact and outcome.artifact.figures,
        }
        for outcome in outcomes
    ]
    if as_json:
        print_json(rows)
    elif dry_run:
        from pipelines.config import write_yaml

        for row in rows:
            out(f"# {row['stage']}: {row['reason']}")
            out(write_yaml({row["stage"]: row["config"]}), end="")
    else:
        for row in rows:
            out(f"{row['id']}\t{row['path']}")
            figures = {name: value for name, value in row["figures"].items() if not isinstance(value, dict | list)}
            if row["ran"] and figures:
                say(f"{row['id']}: " + ", ".join(f"{name} {number(value)}" for name, value in figures.items()))


def print_json(value: Any) -> None:
    print(plain_json(json.dumps(value, indent=2, ensure_ascii=False)))


def plain_json(text: str) -> str:
    """JSON in which what a terminal would obey is an escape of JSON's own."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key of the rows, in the order of first sight."""
    return list(dict.fromkeys(name for row in rows for name in row))


def table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Rows as aligned text, numbers to the right."""
    names = columns_of(rows)
    cells = [[number(row.get(name)) for name in names] for row in rows]
    right = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    for line in [names, *cells]:
        aligned = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True))
        yield "  ".join(aligned).rstrip()


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Rows as a Markdown table."""
    names = columns_of(rows)
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(number(row.get(name)).replace('|', '/') for name in names)} |"
