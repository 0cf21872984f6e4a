"""--log-json and --tensorboard: what a run left overnight tells in the morning."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pipelines.errors import NumericalFault, Terminated


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(path):
    return [line["event"] for line in lines(path)]


def test_the_log_tells_the_whole_story_of_a_command(hqdm, tmp_path):
    log = tmp_path / "logs" / "run.jsonl"
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 0
    told = lines(log)
    assert told[0]["event"] == "start" and told[0]["command"][:3] == ["hqdm", "profile", "model.ckpt"]
    assert told[0]["libraries"]["python"] and told[0]["machine"]["cpu"] and told[0]["processes"] == 1
    assert {"begin", "note", "end", "artifact"} <= set(events(log))
    assert [line["id"] for line in told if line["event"] == "artifact"] == ["model/0001", "profile/0001"]
    made = [line for line in told if line["event"] == "artifact"][-1]
    assert made["id"] == "profile/0001" and made["config"]["seed"] == 0 and made["figures"]["loss"] == 1 / 3
    ended = next(line for line in told if line["event"] == "end")
    assert ended["done"] == ended["total"] == 3 and ended["figures"]["loss"] == 1 / 3
    assert told[-1]["event"] == "finish" and told[-1]["exit_code"] == 0


def test_a_second_command_appends_and_an_error_is_told_with_its_hint(road, tmp_path):
    log = tmp_path / "run.jsonl"
    assert road("export", "--log-json", str(log))[0] == 0
    assert road("sample", "bogus", "--log-json", str(log))[0] == 2
    assert events(log).count("start") == events(log).count("finish") == 2
    fault, end = lines(log)[-2:]
    assert "no source 'bogus'" in fault["what"] and fault["hint"] and end["exit_code"] == 2


def test_an_interrupted_run_is_told_too(hqdm, fakes, tmp_path):
    fakes["model"].interrupt_at = 2
    log = tmp_path / "run.jsonl"
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 130
    assert events(log)[-1] == "finish" and lines(log)[-1]["exit_code"] == 130
    assert "advance" in events(log)


def test_a_run_that_fails_has_told_of_what_it_made_before(hqdm, fakes, tmp_path):
    fakes["profile"].interrupt_at = 2
    log = tmp_path / "run.jsonl"
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 130
    assert [line["id"] for line in lines(log) if line["event"] == "artifact"] == ["model/0001"]


def test_sigterm_and_an_unknown_value_are_told_with_their_exit_codes(hqdm, fakes, tmp_path):
    def terminated(*_):
        raise Terminated

    fakes["model"].run = terminated
    log = tmp_path / "run.jsonl"
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 143
    assert lines(log)[-1]["exit_code"] == 143


def test_a_signal_that_a_library_hides_outside_a_stage_is_told_as_what_it_was(hqdm, fakes, tmp_path):
    def masking(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as fault:
            raise ValueError("could not determine the shape") from fault

    fakes["profile"].inputs = masking
    log = tmp_path / "run.jsonl"
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 143
    assert "error" not in events(log) and lines(log)[-1]["exit_code"] == 143


def test_a_log_that_cannot_be_written_is_refused_before_anything_runs(hqdm, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, said = hqdm("profile", "model.ckpt", "--log-json", str(tmp_path / "file" / "run.jsonl"))
    assert code == 1 and "cannot be written" in said and "--log-json" in said
    assert not (tmp_path / "workspace").exists()


def test_a_log_on_a_full_disk_is_named_and_does_not_hide_what_went_wrong(hqdm, fakes, tmp_path, monkeypatch):
    code, _, said = hqdm("profile", "model.ckpt", "--log-json", "/dev/full")
    assert code == 1 and "error: /dev/full cannot be written: No space left on device\nhint: make room" in said

    log = tmp_path / "run.jsonl"

    def fails(*_):
        log.unlink()
        log.symlink_to("/dev/full")  # from now on
        raise NumericalFault("site conv_in at timestep 7: NaN", "see the model")

    with monkeypatch.context() as patched:
        patched.setattr(fakes["profile"], "run", fails)
        code, _, said = hqdm("profile", "model.ckpt", "--log-json", str(log))
    assert code == 1 and said.endswith("error: site conv_in at timestep 7: NaN\nhint: see the model\n")
    log.unlink()
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 0 and events(log)[-1] == "finish"


def test_a_line_that_was_cut_spoils_no_other(hqdm, tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text('{"event": "finish"}\n{"event": "adv')
    assert hqdm("profile", "model.ckpt", "--log-json", str(log))[0] == 0
    first, cut, *others = log.read_text().splitlines()
    assert cut == '{"event": "adv' and json.loads(others[0])["event"] == "start"


def test_tensorboard_reads_the_losses_that_were_written(road, tmp_path):
    pytest.importorskip("tensorboard")
    assert road("distill", "--force", "--tensorboard", str(tmp_path / "board"))[0] == 0
    code = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n"
        "run = E(sys.argv[1]); run.Reload(); print([scalar.value for scalar in run.Scalars('distill/loss')])"
    )
    run = next((tmp_path / "board").iterdir())
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[:3] == pytest.approx([1, 1 / 2, 1 / 3])


def test_tensorboard_that_is_not_installed_is_refused_with_the_way_out(hqdm, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    code, _, said = hqdm("profile", "model.ckpt", "--tensorboard", str(tmp_path / "board"))
    assert code == 1 and "pip install 'hqdm[tensorboard]'" in said
