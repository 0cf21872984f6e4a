"""Pictures are drawn in tests that look at them. In the others a profile has none, since no stage reads them, and what
other pictures are in holds two words: drawing takes longer than most stages on a tiny model.
"""

from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipelines.stages import profile

_SAVEFIG, _DRAW = Figure.savefig, profile._draw


@contextmanager
def _with(savefig, draw):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", savefig)
        patched.setattr(profile, "_draw", draw)
        yield


def drawn():
    """A context in which pictures are drawn."""
    return _with(_SAVEFIG, _DRAW)


def undrawn():
    """A context in which they are not."""
    return _with(lambda _figure, path, **options: Path(path).write_bytes(b"not drawn\n"), lambda *_: None)
