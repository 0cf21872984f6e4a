"""Signals that ask a command to stop. Python raises an exception where one arrives; a library in whose code that is may
make another of it, or none, so that the signal is remembered beside.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import Terminated

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_asked: type[BaseException] | None = None


@contextmanager
def heard(*numbers: signal.Signals) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and the first SIGTERM Terminated, those of them that are named; a second
    SIGTERM ends the process where it stands. What leaves is that exception, also where a library made another of it.

    A signal that whoever started the process had ignored stays ignored.
    """
    global _asked

    def stop(number: int, _frame: object) -> None:
        global _asked
        _asked = RAISED[signal.Signals(number)]
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
        raise _asked

    before = {}
    for number in numbers or RAISED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            try:
                before[number] = signal.signal(number, stop)
            except ValueError:  # not in the main thread, where alone signals arrive
                break
    _asked = None
    try:
        with unmasked():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


def check() -> None:
    """Raise what a signal asked for and a library kept to itself."""
    if _asked is not None:
        raise _asked


@contextmanager
def unmasked() -> Iterator[None]:
    """What a signal raised leaves, where a library made another exception of it."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, SystemExit, GeneratorExit):
        raise
    except BaseException as fault:  # Rust's panics are no Exception
        if _asked is not None:
            raise _asked from fault
        raise
