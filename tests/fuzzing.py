"""Files changed at random, for every test that reads such: what may happen, and the changes.

The examples are the same in every run (a fixed seed). Bytes are flipped, cut, inserted and overwritten, most of them
where a format keeps its structure; JSON and YAML also change as trees.
"""

import copy
import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from pipelines.errors import HqdmError
from pipelines.memory import peak_bytes, reset_peak

MOST_SECONDS, MOST_BYTES = 5.0, 1 << 30  # of the processor, so that a busy machine does not count
CANARY = "canary.txt"


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for a file's fault."""


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def within(seconds):
    def stop(_signal, _frame):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call, also=()):
    """The word read or refused; fails for any other exception, and for time, memory and code that no file may take.

    also: what else may be raised, of what a caller takes for a refusal itself.
    """
    reset_peak()
    before, start = peak_bytes(), time.process_time()
    try:
        with within(12 * MOST_SECONDS):
            call()
        result = "read"
    except HqdmError as error:
        assert error.what.strip() and error.hint.strip(), error
        result = "refused"
    except also:
        result = "refused"
    assert time.process_time() - start < MOST_SECONDS
    assert peak_bytes() - before < MOST_BYTES
    assert not Path(CANARY).exists()
    return result


def both(seen):
    """Neither everything was read nor everything refused: the changes reach what is read."""
    assert seen["read"] and seen["refused"], seen


# Changes of bytes

_BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"{", b'"', b"PK\x03\x04", b"PK\x05\x06", b"[" * 64]),
)


@st.composite
def edits(draw, structure):
    """Up to three edits as functions of bytes; `structure` are the ranges, as parts of the length, worth most edits."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        low, high = draw(st.sampled_from([*structure, *structure, (0.0, 1.0)]))
        place = low + (high - low) * draw(st.floats(0, 1))
        kind = draw(st.sampled_from(["flip", "write", "insert", "delete", "cut"]))
        found.append((kind, place, draw(_BYTES), draw(st.integers(0, 7))))
    return found


def edited(content, changes):
    content = bytearray(content)
    for kind, place, value, bit in changes:
        at = min(int(place * len(content)), max(len(content) - 1, 0))
        if kind == "flip" and content:
            content[at] ^= 1 << bit
        elif kind == "write":
            content[at : at + len(value)] = value
        elif kind == "insert":
            content[at:at] = value
        elif kind == "delete":
            del content[at : at + len(value)]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


# Changes of trees

_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([
        10**6, 10**9, 10**18, 10**40, -(10**9), "", "1", "os.system", "../../etc/passwd", "/dev/zero", "a" * 5000,
        "\ud800", [], {}, [[]], [0], [10**9] * 3, [1] * 1000, [[8, 8], [8]], {"a": {"b": []}}, [None, None],
        ["diffusers", "UNet2DModel"], ["os", "system"], "UNet2DConditionModel", "AutoencoderKL", "DownBlock2D",
    ]),
    st.text(max_size=8),
)  # fmt: skip


def places_of(tree, above=()):
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places_of(value, (*above, key))


@st.composite
def trees(draw, tree):
    """The tree with one to three values replaced, deleted, doubled or taken from elsewhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_of(tree))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        parent = tree
        for step in above:
            parent = parent[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "list", "elsewhere"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(_VALUES))  # the same lists are drawn again
        elif kind == "delete":
            del parent[key]
        elif kind == "list":
            parent[key] = [parent[key], parent[key]]
        else:
            other = tree
            for step in draw(st.sampled_from(places)):
                other = other[step]
            parent[key] = copy.deepcopy(other)
    return tree


def written(changed, whole):
    """The bytes of a file changed as bytes or as a tree."""
    if isinstance(changed, list) and all(isinstance(part, tuple) for part in changed):
        return edited(whole, changed)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def framed(header, data):
    """A safetensors file of a header's tree and the data."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def unframed(whole):
    """The header's tree and the data of a safetensors file."""
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]
