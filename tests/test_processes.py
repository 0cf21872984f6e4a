"""Several processes at one job: the same images and features as one process, gradients that are its sums, one writer of
artifacts, and a job that ends when a process of it is killed and goes on in another number of them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import features_of, gradients_of, one_update
from roads import STEPS, make, tiny_store, tiny_student
from safetensors.torch import load_file

from pipelines import processes, runner
from pipelines.distillation.relation import rows_of, whole_batch
from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.stages import load

ROOT = Path(__file__).parents[1]
TWO = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def run(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, **options)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tiny_store(tmp_path_factory.mktemp("workspace"))
    make(store, "export", {"distill": tiny_student(store).id})
    return store


def apart(mine, theirs, places):
    """How far gradients are from others, as a share of their length."""
    first, second = (
        torch.cat([values[place].double().flatten() for place in sorted(places)]) for values in (mine, theirs)
    )
    return float((first - second).norm() / second.norm())


def test_gradients_are_those_of_one_process_and_features_its_very_bits(store, tmp_path):
    """Under torchrun, with a batch of 5 that two processes cannot halve."""
    other = tiny_store(tmp_path / "other")
    for workspace in (store, other):
        make(workspace, "plan", method="hqdm", variant="tuned")
    done = run(*TWO, ROOT / "tests/peers.py", other.root, tmp_path)
    assert done.returncode == 0, done.stderr
    alone = gradients_of(lambda: one_update(store))
    both = [load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in range(2)]
    assert len(alone) > 100 and alone.keys() == both[0].keys()
    assert all(torch.equal(both[0][place], both[1][place]) for place in alone)  # or the students would part
    adapters = [place for place, gradient in alone.items() if gradient.ndim == 2]
    assert apart(both[0], alone, adapters) < 1e-5  # fp32 sums in another order: 2e-6 where a processor has AMX
    # Those of scales and zero-points are sums over whole activations whose terms all but cancel.
    assert apart(both[0], alone, alone.keys() - set(adapters)) < 5e-5
    assert len(other.artifacts("distill")) == 1  # one writer
    assert other.current("distill").figures["processes"] == 2
    whole = features_of(tmp_path / "alone")
    for rank in range(2):
        mine = load_file(tmp_path / f"features-{rank}.safetensors")
        assert all(torch.equal(mine[name], values) for name, values in whole.items())


def test_images_are_the_same_whatever_the_number_of_processes(store, tmp_path):
    other = tiny_store(tmp_path / "other")
    for name in ("plan", "distill", "export"):
        artifact = store.current(name)
        (other.root / name).mkdir()
        (other.root / artifact.id).symlink_to(artifact.path)
    options = ["--count", "11", "--batch", "2", "--steps", STEPS, "-w", other.root]
    journal = ["--log-json", other.root / "log.jsonl", "--tensorboard", other.root / "board"]
    done = run("-m", "hqdm_cli", "sample", "teacher", "int", "--processes", "3", *options, *journal)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (other.root / "log.jsonl").read_text().splitlines()]
    assert [line["id"] for line in told if line["event"] == "artifact"] == ["sample/0001", "sample/0002"]
    assert told[0]["processes"] == 3 and len(list((other.root / "board").rglob("events.*"))) == 1
    for source in ("teacher", "int"):
        alone = make(store, "sample", source=source, count=11, batch=2, steps=STEPS)
        shared = other.current("sample", lambda sample, source=source: sample.config["source"] == source)
        assert shared.digest == alone.digest and shared.figures["processes"] == 3


def kill_one_of(command, folder, pattern):
    """Start a job, kill its second process once files of `pattern` lie in a folder, and return how the job ended."""
    job = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert job.poll() is None and time.monotonic() < until, job.stderr.read()
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    followers = [int(pid) for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(followers[0], signal.SIGKILL)
    said = job.communicate(timeout=300)[1]
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists()  # no process works on unseen
    return job.returncode, said


def test_a_killed_process_ends_the_job_and_one_process_goes_on_where_it_stopped(store, tmp_path):
    """mpq_dm, whose state holds features of the whole batch."""
    other = tiny_store(tmp_path / "other")
    make(other, "plan", method="mpq_dm")
    command = ["-m", "hqdm_cli", "distill", "--trajectories", "6", "--batch", "3", "--save-every", "1"]
    command += ["-w", other.root, "--method", "mpq_dm"]
    code, said = kill_one_of([*command, "--processes", "2"], other.root, "distill/.draft-*/work/state.pt")
    assert code == 128 + signal.SIGKILL, said
    assert other.current("distill") is None
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "goes on after update" in done.stderr
    figures = other.current("distill").figures
    assert figures["updates"] == 6 * STEPS and figures["last_loss"] > 0 and "processes" not in figures


def test_a_cell_that_fails_in_a_shared_stage_ends_the_comparison_with_the_way_out(store, monkeypatch):
    """What a leader sees whose stage failed: the others have left it."""
    from pipelines import runner
    from pipelines.comparison.asked import ask
    from pipelines.comparison.run import compare

    stages = {"profile": {"steps": STEPS, "batch": 2}, "sample": {"count": 2, "steps": STEPS}}
    asked = ask(["rtn"], ["w4a4"], [0], stages | {"score": {"extractor": "none"}})
    model = store.current("model")
    monkeypatch.setattr(processes, "asked", lambda: 2)
    monkeypatch.setattr(processes, "_crew", processes.ALONE)
    made = runner.make

    def fails(store, stage, *args, **kwargs):
        if stage == "distill":
            raise NumericalFault("the loss is nan")
        return made(store, stage, *args, **kwargs)

    monkeypatch.setattr(runner, "make", fails)
    with pytest.raises(HqdmError, match="rtn w4a4 seed 0 failed in distill, which ended a job") as caught:
        compare(store, asked, model)
    assert "without --processes" in caught.value.hint


def test_a_process_that_lost_its_leader_tells_only_those_who_would_restart_it(monkeypatch):
    from hqdm_cli import app

    def lost():
        raise processes.PeerLost("another process of this job ended")

    monkeypatch.setattr(runner, "follow", lost)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert app._follow(debug=False) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert app._follow(debug=False) == 0


@pytest.mark.parametrize("ends", [None, processes.PeerLost("gone"), KeyboardInterrupt(), HqdmError("failed")])
def test_a_process_leaves_the_others_however_it_ends(monkeypatch, ends):
    """Or the interpreter's end meets gloo's threads and aborts, now and then, a process whose work is whole."""
    from hqdm_cli import app

    def follow():
        if ends is not None:
            raise ends

    left = []
    monkeypatch.setattr(runner, "follow", follow)
    monkeypatch.setattr(processes, "part_company", lambda: left.append(True))
    app._follow(debug=False)
    assert left == [True]


def test_what_cannot_be_shared_is_refused_with_the_way_out(store, tmp_path, monkeypatch):
    plan, pair = make(store, "plan", method="hqdm", variant="tuned"), processes.Processes()
    pair.count = 2
    with processes.sharing(pair), pytest.raises(UsageError, match="2 processes cannot share .* batches of 1") as caught:
        load("distill").run(
            load("distill").Config(batch=1, trajectories=1, steps=STEPS),
            {"plan": plan, "model": store.current("model")}, SimpleNamespace(work=tmp_path, path=tmp_path), Report(),
        )  # fmt: skip
    assert "--batch 2" in caught.value.hint
    with pytest.raises(UsageError, match="--processes cannot be 0"):
        processes.launch(0, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="inside a job of 2 processes"):
        processes.launch(2, [])


def test_processes_that_go_on_after_different_updates_are_refused(store, tmp_path, monkeypatch):
    """As where one of them cannot read what was saved and would begin again, beside gradients of other steps."""
    plan, pair = make(store, "plan", method="hqdm", variant="ours"), processes.Processes()
    pair.count = 2
    monkeypatch.setattr(pair, "gathered", lambda value: [value, 4])
    with processes.sharing(pair), pytest.raises(HqdmError, match="after different updates: 0, 4") as caught:
        load("distill").run(
            load("distill").Config(batch=2, trajectories=1, steps=1),
            {"plan": plan, "model": store.current("model")}, SimpleNamespace(work=tmp_path, path=tmp_path), Report(),
        )  # fmt: skip
    assert "in one file system" in caught.value.hint


@pytest.mark.parametrize("code", [0, 3])
def test_processes_that_were_launched_leave_nothing_in_the_temporary_folder(tmp_path, monkeypatch, code):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert processes.launch(2, ["-c", f"raise SystemExit({code})"]) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("halves", [1, 2])
def test_parts_of_a_batch_go_together_and_apart_again(halves):
    whole = torch.from_numpy(np.arange(halves * 5 * 2).reshape(halves * 5, 2))
    crews = []
    for rank in range(3):
        crew = processes.Processes()
        crew.rank, crew.count = rank, 3
        crews.append(crew)
    parts = [rows_of(crew.part(5), whole, 5) for crew in crews]
    assert sum(map(len, parts)) == len(whole) and torch.equal(whole_batch(parts, 5), whole)
    assert sorted(item for crew in crews for item in crew.dealt(range(7))) == list(range(7))


def test_a_large_jobs_plan_counts_what_a_layer_has_and_does():
    from benchmarks.budget import RANK, Size

    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 7))
    size = Size.of(layer.to("meta"), torch.empty(1, 3, 8, 8, device="meta"))
    assert size.parameters == 5 * 27 + 5 + 64 * 7 + 7 and size.weights == 5 * 27 + 64 * 7
    assert size.operations == 2 * (64 * 5 * 27 + 5 * 64 * 7)
    assert size.adapters == RANK * (27 + 5 + 64 + 7)
    assert size.packed(4) == size.weights / 2 + 4 * 12
    assert size.unit == 64 * 7 + 7 and size.rest == 0  # two layers, and each is a unit
    assert size.divided(4) == 4 * (size.parameters / 4 + 2 * size.unit) + 20 * size.adapters


def test_a_process_that_sees_another_artifact_than_the_leading_one_refuses_to_work_with_it(store, monkeypatch):
    """As on a machine with a workspace of its own, in which an artifact has the same number."""
    model, pair = store.current("model"), processes.Processes()
    links = {"model": {"id": model.id, "digest": "of another"}}
    told = runner._Job("sample", load("sample").Config(), links, store.root, store.root, store.root, 1)
    monkeypatch.setattr(pair, "told", lambda job: told)
    monkeypatch.setattr(processes, "crew", lambda: pair)
    with pytest.raises(FileFault, match=f"{model.path} is not what the leading process has there") as caught:
        runner.follow()
    assert "one workspace" in caught.value.hint
