"""Pictures are laid out in every test and drawn in those that look at them: drawing takes longer than most stages."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

_SAVEFIG = Figure.savefig


def _empty(figure, path, **options):
    Path(path).write_bytes(b"")


@contextmanager
def _saving(save):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", save)
        yield


def drawn():
    """A context in which pictures are drawn."""
    return _saving(_SAVEFIG)


def undrawn():
    """A context in which the files of pictures are there, and empty."""
    return _saving(_empty)
