"""What the engine reports while it works. The engine never prints: a front end subclasses Report and shows what it
likes.
"""

from typing import Any


class Report:
    """Receives events and ignores them; the base class is what a library user gets."""

    def begin(self, task: str, total: int, done: int = 0, unit: str = "steps") -> None:
        """A long task of `total` units starts, `done` of them finished in an earlier, interrupted run."""

    def advance(self, done: int, **figures: float) -> None:
        """`done` units of the current task are finished; figures (loss, …) are the newest values."""

    def end(self) -> None:
        """The current task is finished."""

    def made(self, outcome: Any) -> None:
        """A stage's artifact is there, whole: the runner's Outcome."""

    def note(self, message: str) -> None:
        """Something worth a line: a decision, a file written."""

    def warn(self, message: str) -> None:
        """Something the user should know, that does not stop the work."""
