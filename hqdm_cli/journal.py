"""What a command leaves behind of its events: JSON lines for programs, TensorBoard for eyes.

`--log-json FILE` appends one JSON object a line, written at once, so that a run that was killed has told everything up
to then: `time` (ISO 8601, UTC), `event` and what belongs to it.

| event | with |
| --- | --- |
| `start` | `command` (the words typed), `libraries`, `machine`, `processes` |
| `begin`, `advance`, `end` | `task`, `done`, `total`, `unit`, at `advance` also `rate`, `seconds_left`, `figures` |
| `note`, `warn` | `message` |
| `artifact` | `id`, `path`, `ran`, `reason`, `config` (with its seed), `figures` |
| `error` | `what`, `hint` |
| `finish` | `seconds` and how it ended: `exit_code` |
"""

import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

ADVANCE_SECONDS = 5.0  # between two lines of one task
LogJson = Annotated[
    Path | None,
    typer.Option("--log-json", help="Append every event to this file, a JSON object a line.", metavar="FILE"),
]
TensorBoard = Annotated[
    Path | None, typer.Option("--tensorboard", help="Write losses and rates for TensorBoard here.", metavar="DIR")
]


class Journal:
    """One command's record; `current` is that of the command that runs, or one that keeps nothing."""

    def __init__(self, log: Path | None = None, tracker: Any = None):
        self._log, self._tracker = log, tracker
        self._told: dict[str, float] = {}  # task -> when its last line was written

    def event(self, event: str, **values: Any) -> None:
        if self._log is None:
            return
        from pipelines.workspace.machine import utc
        from pipelines.workspace.seals import finite

        line = finite({"time": utc(time.time()), "event": event, **values})
        try:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as fault:
            raise _unwritable(self._log, fault) from fault

    def advance(self, task: str, done: int, total: int, unit: str, rate: float | None, figures: Mapping) -> None:
        """A line now and then; TensorBoard takes every figure."""
        if self._tracker is not None and figures:
            self._tracker.log({f"{task}/{name}": value for name, value in figures.items()}, step=done)
        now = time.monotonic()
        if self._log is None or now - self._told.get(task, 0.0) < ADVANCE_SECONDS:
            return
        self._told[task] = now
        left = (total - done) / rate if rate else None
        self.event(
            "advance", task=task, done=done, total=total, unit=unit, rate=rate, seconds_left=left, figures=dict(figures)
        )

    def artifact(self, outcome: Any) -> None:
        """The runner's Outcome of a stage whose artifact is there."""
        artifact = outcome.artifact
        self.event(
            "artifact", id=artifact.id, path=str(artifact.path), ran=outcome.ran, reason=outcome.reason,
            config=outcome.config, figures=artifact.figures,
        )  # fmt: skip
        if self._tracker is not None:
            numbers = {
                f"{outcome.stage}/{name}": value
                for name, value in artifact.figures.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self._tracker.log(numbers, step=int(artifact.path.name))


current = Journal()


@contextmanager
def _kept(log: Path | None, board: Path | None, words: list[str]) -> Iterator[None]:
    """Inside, `current` keeps what is told to it."""
    global current
    from pipelines import processes, stops
    from pipelines.errors import FileFault, HqdmError, Terminated
    from pipelines.workspace.machine import LIBRARIES, libraries, machine

    if processes.asked() > 1:
        processes.crew()  # before the tracker asks Accelerate who is here, which then takes nobody else
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").close()
            if log.is_file():
                _end_line(log)
        except OSError as fault:
            raise _unwritable(log, fault) from fault
    tracker = _tracker(board) if board is not None else None
    current = Journal(log, tracker)
    current.event(
        "start",
        command=["hqdm", *words],
        libraries=libraries(LIBRARIES),
        machine=machine(),
        processes=processes.asked(),
    )
    begun, code = time.monotonic(), 1
    try:
        with stops.unmasked():
            yield
        code = 0
    except (typer.Exit, Terminated) as end:
        code = end.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except HqdmError as fault:
        code = fault.exit_code
        with suppress(FileFault):  # a log that cannot be written must not hide what went wrong before
            current.event("error", what=fault.what, hint=fault.hint)
        raise
    except Exception as fault:
        code = getattr(fault, "exit_code", 1)  # typer's own have one
        with suppress(FileFault):
            current.event("error", what=f"{type(fault).__name__}: {fault}", hint="")
        raise
    finally:
        try:
            with suppress(FileFault) if code else nullcontext():
                current.event("finish", seconds=round(time.monotonic() - begun, 3), exit_code=code)
        finally:
            if tracker is not None:
                tracker.finish()
            current = Journal()


def _end_line(log: Path) -> None:
    """End the line that a full disk or a power cut left half, so that what is appended is told apart from it."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _unwritable(log: Path, fault: OSError) -> Exception:
    from pipelines.errors import FileFault

    return FileFault(
        f"{log} cannot be written: {fault.strerror}",
        "make room there, or name another file: --log-json; the same command goes on",
    )


def _tracker(folder: Path) -> Any:
    """Accelerate's TensorBoard tracker, a new run in the folder. HqdmError where tensorboard is not installed."""
    import importlib.util

    from pipelines.errors import HqdmError

    if importlib.util.find_spec("tensorboard") is None:
        raise HqdmError("--tensorboard needs a package that is not installed", "pip install 'hqdm[tensorboard]'")
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(time.strftime("%Y%m%d-%H%M%S"), str(folder))
    tracker.start()
    return tracker


def journalled(command: Callable[..., None]) -> Callable[..., None]:
    """A command with --log-json and --tensorboard, which no command has to know of."""
    signature = inspect.signature(command)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in (("log_json", LogJson), ("tensorboard", TensorBoard))
    ]
    own = "context" in signature.parameters
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

    @functools.wraps(command)
    def keeping(*args: Any, log_json: Path | None = None, tensorboard: Path | None = None, **given: Any) -> None:
        words = given["context"].obj["args"]
        if not own:
            del given["context"]
        # Where it launches processes, the one that leads them keeps the journal.
        launches = (given.get("processes") or 1) > 1 and not given.get("dry_run")
        if launches or (log_json is None and tensorboard is None):
            command(*args, **given)
            return
        with _kept(log_json, tensorboard, words):
            command(*args, **given)

    mine = list(signature.parameters.values())
    keeping.__signature__ = signature.replace(parameters=([] if own else [context]) + mine + options)
    return keeping
