"""hqdm reproduce: the same bits again, or the name of what is not and why; nothing in the workspace moves."""

import json

import pytest
from fake_stages import checkpoint

from pipelines.workspace.seals import write_sealed
from pipelines.workspace.store import Store


def rows(out):
    return [line.split("\t") for line in out.splitlines()]


def test_the_whole_chain_is_made_again_in_another_workspace_with_the_same_bits(road, tmp_path):
    code, out, said = road("reproduce", "score")
    assert code == 0 and "all 7 artifacts are the same bits" in said
    assert [row[0].split("/")[0] for row in rows(out)] == [
        "model", "profile", "plan", "distill", "export", "sample", "score"
    ]  # fmt: skip
    again, first = Store(tmp_path / "workspace-reproduced"), Store(tmp_path / "workspace")
    assert again.current("score").digest == first.current("score").digest
    assert len(first.artifacts()) == 7


def test_what_is_not_the_same_is_named_with_what_differs(road, fakes, tmp_path, monkeypatch):
    run = fakes["distill"].run

    def other(config, inputs, out, report):
        figures = run(config, inputs, out, report)
        (out.path / "result.txt").write_text("other bits")
        return figures | {"threads": 7}

    monkeypatch.setattr(fakes["distill"], "run", other)
    code, out, said = road("reproduce", "export", "--into", "elsewhere")
    told = {row[0]: row[2] for row in rows(out)}
    assert code == 1 and "distill/0001 is not the same bits again (2 of 5 artifacts)" in said
    assert "threads" in said and "-> 7" in said
    assert told["plan/0001"] == "the same bits" and told["distill/0001"] == "1 files differ: result.txt"
    code, out, _ = road("reproduce", "export", "--into", "elsewhere", "--json")
    assert code == 1 and [row["same"] for row in json.loads(out)] == [True, True, True, False, False]


def test_an_interrupted_reproduction_goes_on(road, fakes):
    fakes["plan"].interrupt_at = 2
    assert road("reproduce", "plan")[0] == 130
    fakes["plan"].interrupt_at = None
    code, _, said = road("reproduce", "plan")
    assert code == 0 and "profile: up to date" in said and "goes on" in said


@pytest.mark.parametrize("gone", ["checkpoint", "its bits", "version", "self"])
def test_what_cannot_be_made_again_is_refused_before_anything_runs(road, fakes, tmp_path, gone):
    words = ["reproduce", "plan"]
    if gone == "checkpoint":
        (tmp_path / "model.ckpt").unlink()
        expected = "model.ckpt is gone"
    elif gone == "its bits":
        checkpoint(tmp_path, "other weights")
        expected = "files have changed since model/0001 was made of them: sha256"
    elif gone == "version":
        fakes["profile"].VERSION = 2
        expected = "profile/0001 was made by version 1 of its stage, and this is version 2"
    else:
        words += ["--into", "workspace"]
        expected = "is the workspace itself"
    code, out, said = road(*words)
    assert code in (1, 2) and expected in said and out == ""
    assert not (tmp_path / "workspace-reproduced").exists()


@pytest.mark.parametrize("threads", [10**6, -1, "many", [2], True])
def test_a_manifest_that_claims_threads_which_no_machine_has_does_not_crash_it(road, tmp_path, threads):
    made = Store(tmp_path / "workspace").current("plan")
    write_sealed(made.path / "manifest.json", {**made.manifest, "figures": {"threads": threads}})
    code, out, _ = road("reproduce", "plan")
    assert code == 0 and rows(out)[-1][2] == "the same bits"
