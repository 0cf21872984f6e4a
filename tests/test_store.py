"""The workspace: what is committed is whole, what is interrupted goes on, what is changed is noticed."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines.errors import Busy, FileFault, HqdmError, UsageError
from pipelines.workspace import locks
from pipelines.workspace.artifacts import key_of, links
from pipelines.workspace.drafts import remove
from pipelines.workspace.machine import processor
from pipelines.workspace.store import Store


def put(store, stage, files, key=None, inputs=None, config=None, figures=None):
    """Commit an artifact of those files (name -> text)."""
    inputs = inputs or {}
    key = key or key_of(stage, 1, config or files, inputs)
    with store.begin(stage, key, {"stage_version": 1, "config": config or {}, "inputs": links(inputs)}) as draft:
        for name, text in files.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_text(text)
        return draft.commit(figures or {})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "ws")


def test_an_artifact_is_found_by_every_name_it_has(store):
    made = put(store, "plan", {"plan.yaml": "a: 1"}, key="k")
    assert made.id == "plan/0001"
    for ident in ("plan/0001", "plan/1", "plan", made.digest[:8], made.digest):
        assert store.get(ident) == made
    assert store.find("plan", "k") == store.current("plan") == made
    assert store.artifacts() == store.artifacts("plan") == [made]


def test_an_unknown_artifact_is_answered_with_the_nearest(store):
    put(store, "distill", {"a": "1"})
    with pytest.raises(UsageError) as fault:
        store.get("distil/1")
    assert fault.value.hint == "did you mean 'distill'?" or fault.value.hint == "did you mean 'distill/0001'?"
    with pytest.raises(UsageError):
        store.get("distill/2")
    with pytest.raises(UsageError, match="holds none"):
        Store(store.root / "empty").get("plan")


def test_reading_creates_nothing(tmp_path):
    store = Store(tmp_path / "ws")
    assert store.artifacts() == [] and store.current("plan") is None and store.drafts() == []
    assert not (tmp_path / "ws").exists()


def test_the_digest_is_of_content_alone(store):
    first, second = (put(store, "plan", {"a/b.txt": "same", "c": "x"}, key=key) for key in "12")
    assert first.id != second.id and first.digest == second.digest
    assert put(store, "plan", {"a/b.txt": "other", "c": "x"}, key="3").digest != first.digest
    assert put(store, "plan", {"a/c.txt": "same", "c": "x"}, key="4").digest != first.digest


def test_the_manifest_says_what_made_it(store):
    made = put(store, "plan", {"a": "1"}, config={"bits": "w4a4"}, figures={"loss": 0.5, "psnr": float("inf")})
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert set(manifest) >= {
        "kind", "format", "stage", "stage_version", "key", "config", "inputs", "files", "digest", "seed", "libraries",
        "machine", "started", "seconds", "figures",
    }  # fmt: skip
    assert manifest["config"] == {"bits": "w4a4"}
    assert manifest["figures"] == {"loss": 0.5, "psnr": "inf"}
    assert manifest["files"]["a"]["bytes"] == 1
    assert manifest["libraries"]["python"]


def test_an_interrupted_run_is_resumed_by_its_key_and_keeps_its_scratch_until_the_commit(store):
    with pytest.raises(KeyboardInterrupt), store.begin("distill", "k", {}) as draft:
        assert not draft.resumed
        (draft.work / "state").write_text("step 7")
        raise KeyboardInterrupt
    assert store.artifacts() == [] and store.interrupted("distill", "k")
    assert [stage for stage, _ in store.drafts()] == ["distill"]
    with store.begin("distill", "other", {}) as draft:
        assert not draft.resumed and not list(draft.work.iterdir())
    with store.begin("distill", "k", {}) as draft:
        assert draft.resumed and (draft.work / "state").read_text() == "step 7"
        (draft.path / "weights").write_text("w")
        made = draft.commit({})
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "weights"]
    assert not store.interrupted("distill", "k") and store.drafts() == []


def test_afresh_forgets_the_interrupted_run(store):
    with store.begin("distill", "k", {}) as draft:
        (draft.work / "state").write_text("step 7")
    with store.begin("distill", "k", {}, afresh=True) as draft:
        assert not draft.resumed and not list(draft.work.iterdir())


def test_the_time_at_work_is_summed_over_resumes(store):
    with store.begin("distill", "k", {}) as draft:
        (draft.work / "state").write_text("x")
        draft._begun -= 100
    with store.begin("distill", "k", {}) as draft:
        assert draft.seconds >= 100
        (draft.path / "a").write_text("x")
        assert draft.commit({}).manifest["seconds"] >= 100


def run_child(store, body):
    """Start a process that begins distill with key k, prints `ready` and runs `body`."""
    code = f"""
        import os, sys, time
        from pipelines.workspace.store import Store
        with Store({str(store.root)!r}).begin("distill", "k", {{}}) as draft:
            (draft.work / "state").write_text("x")
            print("ready", flush=True)
            {body}
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_second_process_is_told_which_one_is_at_work(store):
    child = run_child(store, "sys.stdin.read(); time.sleep(30)")
    try:
        for _ in range(2):  # who looks takes nothing
            with pytest.raises(Busy) as fault:
                store.begin("distill", "k", {})
            assert f"process {child.pid} is making the same distill artifact" in fault.value.what
        with pytest.raises(Busy, match=f"process {child.pid} is working on distill"):
            store.lock("distill")  # as what removes artifacts asks
        assert store.workers() == [("distill", str(child.pid))]
        assert put(store, "distill", {"a": "1"}, key="other").id == "distill/0001"  # beside it
    finally:
        child.kill()
        child.wait()


def test_while_artifacts_are_removed_nobody_begins(store):
    put(store, "plan", {"a": "1"})
    held, plan = store.lock("plan"), {"inputs": {"plan": {"id": "plan/0001"}}}
    for stage, request in ("plan", {}), ("distill", plan):
        with pytest.raises(Busy, match=f"process {os.getpid()} is removing what is not needed of plan"):
            store.begin(stage, "k", request)
    os.close(held)
    shutil.rmtree(store.root / "plan" / "0001")
    with pytest.raises(HqdmError, match="plan/0001 has gone"):
        store.begin("distill", "k", plan)
    with store.begin("plan", "k", {}) as draft:
        draft.drop()
    assert not list((store.root / "plan").glob(".draft-*"))


def test_a_lock_of_a_draft_that_is_gone_is_not_taken_for_that_of_the_next(tmp_path, monkeypatch):
    draft, flock = tmp_path / ".draft-k", fcntl.flock
    held = locks.own(draft)

    def ended_meanwhile(file, kind):
        monkeypatch.setattr(fcntl, "flock", flock)
        remove(draft)
        os.close(held)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", ended_meanwhile)
    again = locks.own(draft)
    assert os.path.samestat(os.fstat(again), (draft / locks.OWNER).stat())
    with pytest.raises(Busy, match=f"process {os.getpid()} is making"):
        locks.own(draft)
    os.close(again)


@pytest.mark.parametrize("what", ["a file", "a folder as owner", "a pipe as owner", "a link as owner"])
def test_what_is_no_draft_in_a_drafts_place_is_refused_by_its_name(tmp_path, what):
    draft = tmp_path / ".draft-k"
    if what == "a file":
        draft.write_text("mine")
    else:
        draft.mkdir()
        make = {"a folder": os.mkdir, "a pipe": os.mkfifo, "a link": lambda path: path.symlink_to(tmp_path)}
        make[what.removesuffix(" as owner")](draft / "owner")
    with pytest.raises(FileFault, match="draft-k") as fault:
        locks.own(draft)
    assert fault.value.hint == f"remove {draft}" and locks.owner_of(draft) is None


def test_the_lock_dies_with_its_process_and_the_draft_outlives_it(store):
    child = run_child(store, "time.sleep(30)")
    child.kill()
    child.wait()
    assert store.interrupted("distill", "k")
    with store.begin("distill", "k", {}) as draft:
        assert draft.resumed


def test_a_run_killed_inside_the_commit_leaves_no_artifact_and_goes_on(store):
    body = "(draft.path / 'a').write_text('x'); type(draft.path).rename = lambda *a: os.kill(os.getpid(), 9)"
    child = run_child(store, body + "; draft.commit({})")
    assert child.wait() == -9
    assert store.artifacts() == [] and store.interrupted("distill", "k")
    with store.begin("distill", "k", {}) as draft:
        assert draft.resumed and (draft.work / "state").read_text() == "x"
        assert not list(draft.path.iterdir())  # what libraries began to write there may be half of it
        (draft.path / "b").write_text("y")
        made = draft.commit({})
    assert list(made.manifest["files"]) == ["b"] and made.verify() == []


def test_all_that_a_commit_writes_is_on_the_disk_before_its_number_is(store, monkeypatch):
    synced, rename = set(), Path.rename

    def renamed(self, target):
        if str(target).endswith("plan/0001"):
            told.update(synced & {path.stat().st_ino for path in [self, *self.rglob("*")]})
        return rename(self, target)

    told = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", renamed)
    made = put(store, "plan", {"a": "1", "folder/b": "2"})
    assert told == {path.stat().st_ino for path in [made.path, *made.path.rglob("*")]}
    assert (store.root / "plan").stat().st_ino in synced


def test_a_folder_without_a_manifest_is_no_artifact_and_its_number_is_not_reused(store):
    (store.root / "plan" / "0001").mkdir(parents=True)
    assert store.artifacts() == []
    assert put(store, "plan", {"a": "1"}).id == "plan/0002"


def test_verify_names_every_missing_added_cut_and_changed_file(store):
    made = put(store, "plan", {"same": "1", "gone": "1", "cut": "12345", "changed": "12345", "longer": "1"})
    assert made.verify() == made.damage() == []
    (made.path / "gone").unlink()
    (made.path / "cut").write_text("123")
    (made.path / "changed").write_text("12354")
    (made.path / "longer").write_text("12")
    (made.path / "added").write_text("")
    expected = [
        "gone is missing",
        "cut is cut: 3 of 5 bytes",
        "changed is changed",
        "longer is changed",
        "added is added",
    ]
    assert sorted(made.verify()) == sorted(made.damage()) == sorted(expected)


def test_a_changed_file_is_seen_by_another_time_than_it_was_written_at_also_an_older_one(store):
    made = put(store, "plan", {"a": "12345"})
    about = (made.path / "a").stat()
    (made.path / "a").write_text("12354")
    for time in (1, about.st_mtime_ns - 10**9, about.st_mtime_ns + 10**9):
        os.utime(made.path / "a", ns=(time, time))
        assert made.damage() == made.verify() == ["a is changed"]
    os.utime(made.path / "a", ns=(about.st_atime_ns, about.st_mtime_ns))  # as a failing disk leaves it
    assert made.damage() == [] and made.verify() == ["a is changed"]
    (made.path / "a").write_text("12345")
    assert made.damage() == made.verify() == []


def test_a_manifest_whose_hashes_were_edited_is_noticed(store):
    made = put(store, "plan", {"a": "1"})
    made.manifest["files"]["a"]["bytes"] = 1
    made.manifest["files"]["a"]["sha256"] = "0" * 64
    assert "manifest.json is changed" in made.verify()


def test_a_file_that_is_asked_for_and_not_there_is_named(store):
    made = put(store, "plan", {"plan.yaml": "1"})
    assert made.file("plan.yaml").read_text() == "1"
    with pytest.raises(FileFault) as fault:
        made.file("plan.yml")
    assert fault.value.hint == "did you mean 'plan.yaml'?"
    (made.path / "plan.yaml").unlink()
    with pytest.raises(FileFault, match="plan.yaml is missing"):
        made.file("plan.yaml")


@pytest.mark.parametrize(
    "text, what",
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("{", "Expecting"),
        ("[" * 99999, "too deep"),
    ],
)
def test_values_of_a_file_that_somebody_changed_are_refused_by_its_name(store, text, what):
    made = put(store, "score", {"scores.json": '{"a": 1}'})
    assert made.values("scores.json") == {"a": 1}
    (made.path / "scores.json").write_text(text)
    with pytest.raises(FileFault, match="scores.json is damaged") as fault:
        made.values("scores.json")
    assert what in fault.value.what and "--force" in fault.value.hint
    (made.path / "scores.json").unlink()
    os.mkfifo(made.path / "scores.json")
    with pytest.raises(FileFault, match="no regular file"):
        made.values("scores.json")


def test_an_ancestor_is_found_over_inputs_and_checked(store):
    model = put(store, "model", {"w": "1"})
    plan = put(store, "plan", {"p": "1"}, inputs={"model": model})
    student = put(store, "distill", {"s": "1"}, inputs={"plan": plan})
    assert store.ancestor(student, "model").id == model.id
    assert store.ancestor(student, "distill").id == student.id
    with pytest.raises(HqdmError, match="without any export"):
        store.ancestor(student, "export")
    manifest = plan.path / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"digest": "0" * 64}))
    with pytest.raises(HqdmError, match="made from another plan/0001"):
        store.ancestor(student, "model")
    manifest.unlink()
    with pytest.raises(HqdmError, match="plan/0001, which is gone"):
        store.ancestor(student, "model")


def test_the_key_follows_version_configuration_and_input_content(store):
    first, same, other = (
        put(store, "plan", {"p": text}, key=key) for text, key in (("1", "a"), ("1", "b"), ("2", "c"))
    )
    base = key_of("distill", 1, {"n": 1, "m": 2}, {"plan": first})
    assert base == key_of("distill", 1, {"m": 2, "n": 1}, {"plan": same})
    others = [
        key_of("distill", 2, {"n": 1, "m": 2}, {"plan": first}),
        key_of("distill", 1, {"n": 2, "m": 2}, {"plan": first}),
        key_of("distill", 1, {"n": 1, "m": 2}, {"plan": other}),
        key_of("export", 1, {"n": 1, "m": 2}, {"plan": first}),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "is damaged"), ("[]", "is not the manifest"), ('{"kind": "hqdm artifact", "format": 99}', "has format 99")],
)
def test_a_broken_manifest_is_named(store, text, what):
    made = put(store, "plan", {"a": "1"})
    (made.path / "manifest.json").write_text(text)
    with pytest.raises(FileFault, match=what) as fault:
        store.artifacts()
    assert str(made.path) in fault.value.what


def test_a_workspace_that_is_a_file_is_named(tmp_path):
    (tmp_path / "ws").write_text("")
    with pytest.raises(FileFault, match="a file is in its way"):
        Store(tmp_path / "ws").begin("plan", "k", {})


def test_the_workspace_never_imports_torch():
    code = "import sys, pipelines.runner, pipelines.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_processor_is_told_by_its_generation_where_the_system_says_it(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 18\n")
    assert processor(file) == "AMD EPYC (family 25, model 17)"
    file.write_text("processor : 0\nmodel name : ARMv8\n")  # which has no such numbers
    assert processor(file) == "ARMv8"
    assert processor(tmp_path / "none") == (platform.processor() or platform.machine())
