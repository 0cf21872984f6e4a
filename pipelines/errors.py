"""Errors that a user can mend, and the exit codes that go with them.

0    done
1    something a user can mend: HqdmError and its children below
2    usage: a wrong option, value or name (UsageError, and what the command line itself refuses)
130  interrupted by Ctrl-C; the same command goes on where it stopped
143  terminated by SIGTERM; likewise
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class HqdmError(Exception):
    """What is wrong, with which value, and the way out. `hint` may be empty, never a traceback."""

    exit_code = 1

    def __init__(self, what: str, hint: str = ""):
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(HqdmError):
    """A name, option or configuration key that does not exist, or a value outside its range."""

    exit_code = 2


class FileFault(HqdmError):
    """A file that is missing, unreadable, damaged or of the wrong kind; names the file."""


class Busy(HqdmError):
    """Another process is making the very same thing, or stands in its way; later it will not. draft: where it works."""

    def __init__(self, what: str, hint: str = "wait until it is done, or stop it", draft: Path | None = None):
        super().__init__(what, hint)
        self.draft = draft


class NumericalFault(HqdmError):
    """NaN, Inf or an integer bound that would be exceeded; names the site and, where there is one, the timestep."""


class Terminated(BaseException):
    """SIGTERM, as a batch system or a machine that shuts down sends it: what is open is closed as after Ctrl-C."""

    exit_code = 143


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, in whatever case it was typed, or lists them all."""
    known = sorted(known)
    folded = {word.casefold(): word for word in reversed(known)}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known: {', '.join(known)}"
