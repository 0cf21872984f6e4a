"""A signal stops a command wherever it arrives, also in a library that makes something else of it."""

import os
import signal

import pytest

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.fixture(autouse=True)
def heard():
    """A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def masking(number):
    """As safetensors does, whose loader raises a ValueError where a signal meets it at work."""
    try:
        os.kill(os.getpid(), number)
    except BaseException as fault:
        raise ValueError("could not determine the shape") from fault


class Panic(BaseException):
    """As Rust's, which is no Exception."""


def panicking(number):
    try:
        os.kill(os.getpid(), number)
    except BaseException as fault:
        raise Panic from fault


def swallowing(number):
    """As a callback of C does."""
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        return


def disturbed(stage, number, library):
    whole = stage.run

    def run(config, inputs, out, report):
        (out.work / "1").write_text("done")
        library(number)
        return whole(config, inputs, out, report)

    stage.run = run


@pytest.mark.parametrize("library", [masking, panicking, swallowing])
@pytest.mark.parametrize("number, code, word", SIGNALS, ids=["SIGINT", "SIGTERM"])
def test_a_signal_that_a_library_hides_stops_the_command_and_the_same_goes_on(
    hqdm, fakes, tmp_path, number, code, word, library
):
    whole = fakes["profile"].run
    disturbed(fakes["profile"], number, library)
    got, _, said = hqdm("profile", "model.ckpt")
    assert got == code and "Traceback" not in said
    assert f"error: {word}\nhint: what was done is kept; the same command goes on: hqdm profile model.ckpt" in said
    fakes["profile"].run = whole
    got, _, said = hqdm("profile", "model.ckpt")
    assert got == 0 and "goes on" in said


def test_handlers_are_what_they_were_when_a_command_has_ended(hqdm, fakes):
    before = [signal.getsignal(number) for number, *_ in SIGNALS]
    disturbed(fakes["profile"], signal.SIGTERM, masking)
    hqdm("profile", "model.ckpt")
    assert [signal.getsignal(number) for number, *_ in SIGNALS] == before


def test_a_signal_that_was_ignored_from_outside_stays_ignored(hqdm, fakes):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    disturbed(fakes["profile"], signal.SIGINT, masking)
    assert hqdm("profile", "model.ckpt")[0] == 0
