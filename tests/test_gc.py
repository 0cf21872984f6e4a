"""hqdm gc: what interrupted runs left is listed and removed, and nothing that anybody needs."""

import json

import pytest
from test_store import put

from hqdm_cli.app import main
from hqdm_cli.console import size
from pipelines.workspace.store import Store


@pytest.fixture
def interrupted(hqdm, fakes):
    """A workspace in which a distillation was stopped."""
    hqdm("profile", "model.ckpt")
    hqdm("plan")
    fakes["distill"].interrupt_at = 3
    assert hqdm("distill")[0] == 130
    fakes["distill"].interrupt_at = None
    return Store("workspace")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_dry_run_lists_what_would_go_and_touches_nothing(hqdm, interrupted):
    before = files(interrupted.root)
    code, out, err = hqdm("gc", "--dry-run")
    (line,) = out.splitlines()
    path, bytes_, why = line.split("\t")
    assert code == 0 and path.startswith("workspace/distill/.draft-") and bytes_.endswith(" B")
    assert why.startswith("draft: an interrupted run of 20") and why.endswith("from plan/0001; its command goes on")
    assert err.splitlines()[0].startswith("1 things of ") and err.splitlines()[0].endswith("would be removed")
    assert err.splitlines()[-1] == "next: hqdm gc"
    assert files(interrupted.root) == before


def test_it_removes_drafts_and_leaves_every_artifact(hqdm, interrupted):
    artifacts = interrupted.artifacts()
    code, out, err = hqdm("gc")
    assert code == 0 and ".draft-" in out and "removed" in err
    assert interrupted.drafts() == [] and Store("workspace").artifacts() == artifacts
    assert hqdm("gc")[1:] == ("", "nothing to remove\nnext: hqdm distill --bits w4a4\n")
    code, _, err = hqdm("distill")
    assert code == 0 and "distill: runs: none yet" in err


def test_json_says_the_same(hqdm, interrupted):
    listed = json.loads(hqdm("gc", "--dry-run", "--json")[1])
    (left,) = listed["leftovers"]
    assert not listed["removed"] and listed["bytes"] == left["bytes"] > 0 and listed["busy"] == {}
    assert (left["stage"], left["kind"]) == ("distill", "draft")
    assert json.loads(hqdm("gc", "--json")[1]) == listed | {"removed": True}


def test_what_is_not_hqdms_stays(hqdm, interrupted, tmp_path):
    root = tmp_path / "workspace"
    mine = ["notes.txt", "distill/.draft-mine/a", "distill/.gone-by/a", "distill/notes.part", "mine/.draft-0123/out/a"]
    mine += ["distill/.draft-0123456789abcdef/thesis.tex", "distill/0007/half"]
    for name in mine:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    hqdm("gc", "--stale")
    assert [name for name in mine if not (root / name).exists()] == []


def test_what_a_kill_kept_from_being_deleted_goes(hqdm, interrupted, tmp_path):
    stage = tmp_path / "workspace" / "plan"
    for name in (".gone-0123456789abcdef/work/state.pt", ".gone-0004/result.txt", ".draft-00000000000000aa/work/x"):
        (stage / name).parent.mkdir(parents=True)
        (stage / name).write_text("left")
    (stage / ".current.part").write_text("00")
    kinds = [left["kind"] for left in json.loads(hqdm("gc", "--json")[1])["leftovers"]]
    assert sorted(kinds) == ["draft", "draft", "leftover", "leftover", "leftover"]
    assert {path.name for path in stage.glob(".*")} == {".lock"}


def test_replaced_artifacts_go_only_if_asked_and_only_those_that_nothing_was_made_from(tmp_path, fakes):
    store = Store(tmp_path / "workspace")
    model = put(store, "model", {"w": "1"}, config={"path": "model.ckpt", "config_path": None, "ema": True})
    old, used, new = (
        put(store, "plan", {"p": text}, key=text, inputs={"model": model}, config={"edited_sha256": text})
        for text in "123"
    )
    student = put(store, "distill", {"s": "1"}, inputs={"plan": used})
    store.mark_current(new)
    assert main(["gc"]) == 0 and len(store.artifacts()) == 5
    assert main(["gc", "--stale", "--dry-run"]) == 0 and len(store.artifacts()) == 5
    assert main(["gc", "--stale"]) == 0
    assert {artifact.id for artifact in store.artifacts()} == {model.id, used.id, new.id, student.id}
    newer = put(store, "distill", {"s": "2"}, key="another", inputs={"plan": used})
    assert main(["gc", "--stale"]) == 0  # the older student goes, the plan that the newer one is of stays
    assert {artifact.id for artifact in store.artifacts()} == {model.id, used.id, new.id, newer.id}


def test_what_was_asked_for_last_or_is_needed_by_a_run_under_way_stays(tmp_path, fakes):
    store = Store(tmp_path / "workspace")
    old, needed, asked, new = (
        put(store, "plan", {"p": text}, key=text, config={"edited_sha256": text}) for text in "1234"
    )
    store.mark_current(asked)
    request = {"inputs": {"plan": {"id": needed.id, "digest": needed.digest}}}
    with store.begin("distill", "a" * 64, request) as draft:  # which has written nothing yet
        assert main(["gc", "--stale"]) == 0
        assert {artifact.id for artifact in store.artifacts()} == {needed.id, asked.id, new.id}
        assert draft.work.exists()


def test_an_empty_workspace_has_nothing_to_remove_and_is_not_made(hqdm, tmp_path):
    code, out, err = hqdm("gc", "--stale")
    assert (code, out) == (0, "") and "nothing to remove" in err
    assert not (tmp_path / "workspace").exists()


def test_sizes_are_told_in_words():
    assert [size(count) for count in (0, 999, 1000, 1234, 999_600, 2_500_000, 3 * 10**9, 10**15)] == [
        "0 B", "999 B", "1 KB", "1.23 KB", "1 MB", "2.5 MB", "3 GB", "1e+03 TB",
    ]  # fmt: skip
