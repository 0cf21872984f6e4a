"""Disks that fill up or fail, rights that are missing, clocks that go backwards, processes that meet, and kills at any
file operation: the error names the file and the way out, and what was there before is still there.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_stages import checkpoint
from roads import make, tiny_store, tiny_student
from test_store import put

from hqdm_cli.app import main
from pipelines import runner
from pipelines.errors import FileFault, HqdmError
from pipelines.events import Report
from pipelines.gc import collect
from pipelines.sampling import Batches
from pipelines.stages import ROAD, load
from pipelines.states import read_state, write_state
from pipelines.workspace import drafts
from pipelines.workspace.artifacts import MANIFEST
from pipelines.workspace.seals import write_sealed
from pipelines.workspace.store import Store

FLIP = 0x41  # changes every byte to another, letters among them


class Told(Report):
    """Keeps the warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "ws")


def hashes(folder):
    """Every file that an artifact is made of, by content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def flipped(path, position):
    """The bytes of a file, one of them changed, which are written there."""
    data = bytearray(path.read_bytes())
    data[position] ^= FLIP
    path.write_bytes(data)
    return bytes(data)


# Kills at every file operation


def killed_at(number, work, root):
    """Run `work` in a child that kills itself at its number-th file operation below `root`; whether it came so far."""
    child = os.fork()
    if child == 0:
        counted = itertools.count()

        def audit(event, args):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock") and (
                event == "fcntl.flock" or str(root) in str(args[0])
            ):
                if next(counted) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -9)
    return status == -9


@pytest.mark.parametrize("begun", ["nothing", "an interrupted run", "a complete one, forced"])
def test_a_run_killed_at_any_of_its_file_operations_leaves_nothing_half_and_goes_on(fakes, tmp_path, begun):
    first = Store(tmp_path / "first")
    model = fakes["model"].with_hashes(fakes["model"].Config(path=str(tmp_path / "model.ckpt")))
    for stage in ("profile", "plan"):
        runner.make(first, "model", model) if stage == "profile" else None
        runner.make(first, stage, fakes[stage].Config())
    force, config = begun.endswith("forced"), fakes["distill"].Config()
    if begun == "an interrupted run":
        fakes["distill"].interrupt_at = 3
        with pytest.raises(KeyboardInterrupt):
            runner.make(first, "distill", config)
        fakes["distill"].interrupt_at = None
    elif force:
        runner.make(first, "distill", config)
    shutil.copytree(first.root, tmp_path / "calm")
    calm = runner.make(Store(tmp_path / "calm"), "distill", config, force=force).artifact
    for number in itertools.count():
        root = tmp_path / f"ws-{number}"
        shutil.copytree(first.root, root)
        before = hashes(root)
        store = Store(root)
        came_so_far = killed_at(number, lambda store=store: runner.make(store, "distill", config, force=force), root)
        assert before.items() <= hashes(root).items()
        assert [fault for artifact in store.artifacts() for fault in artifact.verify()] == []
        assert len(store.artifacts("distill")) - len(first.artifacts("distill")) in (0, 1)
        begun_anew = {path.parent.name for path in root.glob("distill/.draft-*/work/*")}
        again = runner.make(store, "distill", config)
        assert again.artifact.digest == calm.digest and again.artifact.verify() == []
        if begun == "nothing":
            assert again.artifact.id == calm.id
            assert not (begun_anew and again.ran) or again.artifact.figures["resumed"]
        assert {leftover.kind for leftover in collect(store).leftovers} <= {"leftover"}  # of a commit that was done
        assert {path.name for path in (root / "distill").glob(".*")} <= {".lock", ".current"}
        if not came_so_far:
            break
        shutil.rmtree(root)
    assert number > 25


def test_a_removal_killed_at_any_of_its_file_operations_leaves_whole_artifacts_and_goes_on(store, tmp_path):
    for text in ("1", "2"):
        put(store, "plan", {"a": text, "folder/b": text}, config={"edited_sha256": text})
    with store.begin("plan", "c" * 64, {}) as draft:
        (draft.work / "state").write_text("x")
    for number in itertools.count():
        root = tmp_path / f"ws-{number}"
        shutil.copytree(store.root, root)
        came_so_far = killed_at(number, lambda root=root: collect(Store(root), stale=True), root)
        assert [fault for artifact in Store(root).artifacts() for fault in artifact.verify()] == []
        collect(Store(root), stale=True)
        assert [artifact.id for artifact in Store(root).artifacts()] == ["plan/0002"]
        assert {path.name for path in (root / "plan").iterdir()} <= {"0002", ".lock", ".current"}
        if not came_so_far:
            break
    assert number > 8


# Signals


def test_sigterm_ends_a_command_cleanly_and_the_same_one_goes_on(hqdm, fakes):
    hqdm("profile", "model.ckpt")
    run, before = fakes["plan"].run, signal.getsignal(signal.SIGTERM)

    def terminated(config, inputs, out, report):
        (out.work / "1").write_text("done")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    fakes["plan"].run = terminated
    code, out, err = hqdm("plan", "--force")
    assert (code, out) == (143, "")
    assert err.splitlines()[-2:] == [
        "error: terminated",
        "hint: what was done is kept; the same command goes on: hqdm plan",
    ]
    assert signal.getsignal(signal.SIGTERM) == before
    fakes["plan"].run = run
    code, out, err = hqdm("plan")
    assert code == 0 and "plan: goes on: an interrupted run with this configuration is there" in err
    assert json.loads(hqdm("show", "plan", "--json")[1])["figures"]["resumed"]


# A full disk


def mount(*words):
    """Whether it may be done here."""
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@contextlib.contextmanager
def little_room(folder, room):
    """A folder on a disk with only so many bytes left for what comes: a small tmpfs or, where nothing may be mounted, a
    limit on the size of each file. Yields a function that makes room.
    """
    size = sum(path.stat().st_size + 4096 for path in folder.rglob("*"))
    copy = folder.with_name("moved")
    folder.rename(copy)
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={size + (64 << 20)}", "none", folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        if mounted:
            about = os.statvfs(folder)
            ballast = folder / ".ballast"
            ballast.write_bytes(b"x" * max(0, about.f_bavail * about.f_frsize - room))
            yield lambda: ballast.unlink()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)  # tensors are mapped from its files


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Every stage, made by the tiny model."""
    store = tiny_store(tmp_path_factory.mktemp("road") / "ws")
    tiny_student(store)
    made = {"export": make(store, "export")}
    for source in ("teacher", "int"):
        made[source] = make(store, "sample", source=source, count=3, batch=2, steps=2)
    made["score"] = make(store, "score", {"samples": made["int"].id}, extractor="none")
    return store


@pytest.mark.parametrize("room", [0, 50_000])
@pytest.mark.parametrize("stage", ["distill", "export", "sample"])
def test_a_disk_that_fills_up_is_named_and_with_room_the_same_command_goes_on(road, tmp_path, capsys, stage, room):
    words = {
        "distill": ["distill", "--trajectories", "1", "--batch", "2", "--save-every", "1"],
        "export": ["export", "--format", "int"],
        "sample": ["sample", "int", "--count", "300", "--batch", "150", "--steps", "1"],
    }[stage]
    words += ["-w", str(tmp_path / "ws")]
    shutil.copytree(road.root, tmp_path / "ws")
    if stage != "sample":
        shutil.rmtree(tmp_path / "ws" / stage)
    with little_room(tmp_path / "ws", room) as make_room:
        before = hashes(tmp_path / "ws")
        capsys.readouterr()
        assert main(words) == 1
        error, hint = capsys.readouterr().err.splitlines()[-2:]
        assert error.startswith(f"error: {tmp_path / 'ws'}/") and error.endswith(
            ("No space left on device", "File too large")
        )
        assert hint.startswith(("hint: make room (hqdm gc", "hint: raise the limit", "hint: see that the path"))
        assert hashes(tmp_path / "ws") == before
        if not room:  # what makes room works where there is none
            assert main(["gc", "-w", str(tmp_path / "ws")]) == 0
            assert hashes(tmp_path / "ws") == before
        make_room()
        assert main(words) == 0
        again = Store(tmp_path / "ws").current(stage)
    assert stage == "sample" or again.digest == road.current(stage).digest


def test_a_disk_that_is_full_where_the_last_word_is_written_is_named(fakes, monkeypatch, capsys):
    assert main(["profile", "model.ckpt"]) == main(["plan"]) == 0
    assert main(["plan", "--bits", "w3a3"]) == 0
    write = Path.write_text

    def full(self, *args, **options):
        if self.name == ".current.part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, which knows no name
        return write(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert main(["plan"]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == "error: workspace/plan/.current: No space left on device" and hint.startswith("hint: make room")
    assert main(["plan"]) == 0 and Store("workspace").current("plan").id == "plan/0001"


# Rights


@contextlib.contextmanager
def not_to_be_written(folder, how):
    """A mount that cannot be written, where mounting is permitted, or rights that forbid it; a function that runs
    another in a process which has no more rights than that.
    """
    mounted = how == "mount" and mount("--bind", folder, folder)
    if mounted and not mount("-o", "remount,ro,bind", folder):
        subprocess.run(["umount", folder], check=True)
        mounted = False
    if not mounted:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)

    def run(work):
        with tempfile.TemporaryFile("w+") as told:
            child = os.fork()
            if child == 0:
                code = 99
                try:
                    if os.getuid() == 0 and not mounted:
                        os.setuid(65534)  # whom rights hold
                    os.chdir(folder)  # again: what was opened before the mount lies below it
                    os.dup2(told.fileno(), 2)
                    sys.stderr = open(2, "w", closefd=False)
                    sys.stdout = open(os.devnull, "w")
                    code = work()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            told.seek(0)
            return code, told.read()

    try:
        yield run
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        else:
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("how", ["mount", "rights"])
def test_a_workspace_that_cannot_be_written_is_read_all_the_same_and_named_where_it_would_be(fakes, capsys, how):
    folder = Path(tempfile.mkdtemp(prefix="hqdm-rights-"))
    try:
        folder.chmod(0o755)
        checkpoint(folder)
        os.chdir(folder)
        for words in (["profile", "model.ckpt"], ["plan"]):
            assert main(words) == 0
        before = hashes(folder)
        with not_to_be_written(folder, how) as run:
            for words in (["status"], ["show", "plan"], ["verify"], ["gc", "--dry-run"], ["plan"]):
                code, told = run(lambda words=words: main(words))
                assert code == 0, told
            for words in (["distill"], ["plan", "--bits", "w3a3"], ["plan", "--force"]):
                code, told = run(lambda words=words: main(words))
                assert code == 1
                assert "error: workspace/" in told and ("Permission denied" in told or "Read-only file system" in told)
                assert "hint: see that the path, its rights" in told
        assert hashes(folder) == before
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


def test_a_file_where_a_stage_belongs_is_named(hqdm, tmp_path):
    hqdm("profile", "model.ckpt")
    (tmp_path / "workspace" / "plan").write_text("mine")
    code, _, err = hqdm("plan")
    assert code == 1 and "error: workspace/plan cannot be a folder: a file is in its way" in err and "hint:" in err
    assert (tmp_path / "workspace" / "plan").read_text() == "mine"


# Changed bytes


def test_verify_finds_a_flipped_byte_and_a_cut_one_of_every_file_of_the_whole_road(road, tmp_path):
    shutil.copytree(road.root, tmp_path / "ws")
    count = 0
    for artifact in Store(tmp_path / "ws").artifacts():
        for name in artifact.manifest["files"]:
            path = artifact.path / name
            data, about = path.read_bytes(), path.stat()
            for position in {0, len(data) // 2, len(data) - 1}:
                flipped(path, position)
                os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # as a failing disk leaves it
                assert artifact.verify() == [f"{name} is changed"]
                count += 1
                path.write_bytes(data)
            path.write_bytes(data[:-1])
            assert artifact.verify() == artifact.damage() == [f"{name} is cut: {len(data) - 1} of {len(data)} bytes"]
            path.write_bytes(data)
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert artifact.verify() == []
    assert {artifact.stage for artifact in road.artifacts()} == set(ROAD) and count > 60


def test_verify_names_every_manifest_of_the_road_with_a_flipped_byte(road, tmp_path, capsys):
    shutil.copytree(road.root, tmp_path / "ws")
    draw = np.random.default_rng(0)
    for artifact in road.artifacts():
        path = tmp_path / "ws" / artifact.id / MANIFEST
        data = path.read_bytes()
        for position in draw.integers(len(data), size=12):
            flipped(path, position)
            assert main(["verify", "-w", str(tmp_path / "ws"), "--json"]) == 1
            faults = json.loads(capsys.readouterr().out)
            assert [name for name, lines in faults.items() if lines] == [artifact.id]
            assert len(faults[artifact.id]) >= 1 and all(MANIFEST in line for line in faults[artifact.id][-1:])
        path.write_bytes(data)
    assert main(["verify", "-w", str(tmp_path / "ws")]) == 0


def test_verify_names_a_manifest_that_is_gone(store, capsys):
    for text in ("1", "2"):
        put(store, "plan", {"p": text}, config={"n": int(text)})
    (store.root / "plan" / "0001" / MANIFEST).unlink()
    assert main(["verify", "-w", str(store.root)]) == 1
    told, err = capsys.readouterr()
    assert f"plan/0001\t{store.root / 'plan' / '0001' / MANIFEST} is missing" in told.splitlines()
    assert "error: 1 of 2 artifacts are damaged: plan/0001" in err


@pytest.mark.parametrize("change", ["flip", "cut", "space"])
def test_no_byte_of_a_manifest_can_change_unseen(store, change):
    model = put(store, "model", {"w": "1"}, config={"bits": "w4a4"}, figures={"loss": 0.125, "names": ["a", None]})
    made = put(store, "plan", {"p": "1"}, inputs={"model": model}, config={"n": 11, "ema": True})
    path = made.path / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        if change == "flip":
            flipped(path, position)
        else:
            path.write_bytes(data[:position] + (data[position + 1 :] if change == "cut" else b" " + data[position:]))
        if path.read_bytes() == data:
            continue
        sound, broken = Store(store.root).survey("plan")
        assert len(sound) + len(broken) == 1
        told = [fault.what for fault in broken.values()] + [line for artifact in sound for line in artifact.verify()]
        assert told and all(MANIFEST in line for line in told[-1:]), (position, told)
        told = [fault.what for fault in broken.values()] + [line for artifact in sound for line in artifact.damage()]
        assert told  # so that no stage takes it for an input
    path.write_bytes(data)
    assert made.verify() == []


def test_no_byte_of_a_drafts_record_can_lose_its_work(fakes, tmp_path, capsys):
    store, config = Store(tmp_path / "ws"), fakes["profile"].Config()
    model = fakes["model"].with_hashes(fakes["model"].Config(path=str(tmp_path / "model.ckpt")))
    runner.make(store, "model", model)
    fakes["profile"].interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        runner.make(store, "profile", config)
    (draft,) = store.root.glob("profile/.draft-*")
    data = (draft / "draft.json").read_bytes()
    known, warned, positions = json.loads(data), 0, range(0, len(data), 5)
    for position in [*positions, None]:
        (draft / "draft.json").write_bytes(data[: len(data) // 2] if position is None else data)
        if position is not None:
            flipped(draft / "draft.json", position)
        told = Told()
        assert len(store.drafts()) == 1 and "interrupted run" in collect(store, dry_run=True).leftovers[0].why
        with pytest.raises(KeyboardInterrupt):
            runner.make(store, "profile", config, report=told)
        assert {path.name for path in (draft / "work").iterdir()} == {"1", "2"}
        state = json.loads((draft / "draft.json").read_bytes())
        assert state["key"] == known["key"] and state["request"] == known["request"] and state["seconds"] < 600
        if told.warnings:
            assert "draft.json is damaged: the run goes on" in told.warnings[0]
            warned += 1
        else:  # the word `seal`, without which a record is one of an older hqdm
            assert state["started"] == known["started"]
    assert warned > len(positions) - 5
    (draft / "draft.json").unlink()
    assert main(["status", "-w", str(store.root)]) == 0
    assert "unfinished: a run of profile" in capsys.readouterr().err
    fakes["profile"].interrupt_at = None
    assert runner.make(store, "profile", config).artifact.figures["resumed"]


def test_no_byte_of_what_was_asked_for_last_can_lead_to_another_artifact_than_the_newest(store, capsys):
    old, middle, new = (put(store, "plan", {"p": text}, key=text) for text in "123")
    store.mark_current(middle)
    path = store.root / "plan" / ".current"
    data = path.read_bytes()
    for position in range(len(data)):
        flipped(path, position)
        assert store.current("plan").id in (middle.id, new.id)
        assert (store.current("plan") == middle) is not store.current_is_damaged("plan")
        path.write_bytes(data)
    flipped(path, 2)
    assert main(["verify", "-w", str(store.root)]) == 0
    assert f"warning: {path} is damaged: the newest plan counts as asked for last" in capsys.readouterr().err
    store.mark_current(new)
    assert not store.current_is_damaged("plan") and store.current("plan") == new
    path.write_text("0001\n")  # as it was written before it had a check
    assert store.current("plan") == old


def test_a_byte_of_a_saved_state_that_changed_is_noticed_and_its_work_done_again(tmp_path):
    path, value = tmp_path / "state.pt", {"x": torch.arange(300.0), "done": 7, "losses": [0.5, 0.25]}
    write_state(path, value)
    data = path.read_bytes()
    assert read_state(path, Report())["done"] == 7
    seen = 0
    for position in range(0, len(data), 5):
        flipped(path, position)
        told = Told()
        read = read_state(path, told)
        if read is None:
            assert "state.pt is damaged" in told.warnings[0]
            seen += 1
        else:
            assert torch.equal(read["x"], value["x"]) and read["done"] == 7 and read["losses"] == value["losses"]
        path.write_bytes(data)
    assert seen > 0.95 * len(data) / 5
    path.write_bytes(data[:-1])
    assert torch.equal(read_state(path, Report())["x"], value["x"])


def test_a_byte_of_sampled_latents_that_changed_is_noticed_and_they_are_sampled_again(tmp_path):
    latents, told = np.arange(200, dtype=np.float32).reshape(2, 1, 10, 10), Told()
    batches = Batches(tmp_path, 2, 2, told)
    batches.keep("latents", 0, latents=latents, seconds=0.5)
    path, shape = batches.path("latents", 0), latents.shape[1:]
    data = path.read_bytes()
    for position in range(0, len(data), 4):
        flipped(path, position)
        told.warnings.clear()
        if batches.missing("latents", shape):
            assert path.name in told.warnings[0]
        else:
            assert np.array_equal(batches.read("latents", 0), latents)
        path.write_bytes(data[:position])
        assert batches.missing("latents", shape) == [0]
        path.write_bytes(data)
    assert batches.missing("latents", shape) == []


def test_damaged_latents_of_an_interrupted_run_do_not_stop_it(road, tmp_path, capsys):
    shutil.copytree(road.root, tmp_path / "ws")
    store, options = Store(tmp_path / "ws"), {"source": "int", "count": 4, "batch": 2, "steps": 2, "seed": 5}
    calm = make(store, "sample", **options)

    class Stops(Report):
        def advance(self, done, **figures):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.make(store, "sample", load("sample").Config(**options), {}, Stops(), force=True)
    (kept,) = store.root.glob("sample/.draft-*/work/latents-*.npz")
    flipped(kept, 300)
    told = Told()
    again = runner.make(store, "sample", load("sample").Config(**options), {}, told)
    assert any(kept.name in warning and "made again" in warning for warning in told.warnings)
    assert again.artifact.digest == calm.digest


# Missing inputs


@pytest.mark.parametrize(("change", "what"), [("cut", "is cut"), ("gone", "is missing"), ("other", "is changed")])
def test_a_missing_or_changed_input_is_named_and_nothing_runs(road, tmp_path, capsys, change, what):
    shutil.copytree(road.root, tmp_path / "ws")
    path = tmp_path / "ws" / "distill" / "0001" / "student.safetensors"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if change == "cut" else b"x"))
    before = hashes(tmp_path / "ws")
    capsys.readouterr()
    assert main(["export", "--format", "float", "-w", str(tmp_path / "ws")]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert str(path.parent) in error and f"student.safetensors {what}" in error
    assert hint == "hint: restore it, or: the distill stage makes it again with --force"
    assert hashes(tmp_path / "ws") == before


def test_an_input_that_is_gone_is_named(road, tmp_path, capsys):
    shutil.copytree(road.root, tmp_path / "ws")
    shutil.rmtree(tmp_path / "ws" / "model" / "0001")
    before = hashes(tmp_path / "ws")
    assert main(["distill", "--trajectories", "7", "-w", str(tmp_path / "ws")]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == "error: profile/0001 was made from model/0001, which is gone"
    assert hint == f"hint: restore {tmp_path / 'ws' / 'model/0001'}, or run the stages again from model"
    assert hashes(tmp_path / "ws") == before


# Clocks


def test_artifacts_keep_their_order_when_the_clock_goes_backwards(store, fakes, monkeypatch):
    clock = itertools.count(2_000_000_000, -86_400)
    monkeypatch.setattr(drafts.time, "time", lambda: next(clock))
    model = put(store, "model", {"w": "1"})
    plans = [put(store, "plan", {"p": text}, inputs={"model": model}, config={"edited_sha256": text}) for text in "12"]
    student = put(store, "distill", {"s": "1"}, inputs={"plan": plans[1]})
    times = [artifact.manifest["finished"] for artifact in (model, *plans, student)]
    assert times == sorted(times, reverse=True)
    assert [artifact.id for artifact in store.artifacts()] == ["model/0001", "plan/0001", "plan/0002", "distill/0001"]
    assert runner.stale(store) == {
        "model/0001": None, "plan/0001": "replaced by plan/0002", "plan/0002": None, "distill/0001": None,
    }  # fmt: skip
    with store.begin("export", "a" * 64, {}) as draft:
        (draft.work / "x").write_text("x")
    with store.begin("export", "a" * 64, {}) as draft:
        (draft.path / "x").write_text("x")
        assert draft.resumed and 0 <= draft.seconds < 60
        draft._state["session"] += 10**9  # as a kill leaves it before the clock goes back
        write_sealed(draft._folder / "draft.json", draft._state)
        assert draft._lost_seconds(draft._state) == 0
        assert 0 <= draft.commit({}).manifest["seconds"] < 60


# Processes that meet


def test_commits_of_many_processes_never_get_the_same_number(store):
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                done = 0
                while done < 5:
                    with contextlib.suppress(HqdmError):
                        put(Store(store.root), "plan", {"p": f"{child} {done}"}, key=f"{child}{done}" * 8)
                        done += 1
                    time.sleep(0.001 * child)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    made = store.artifacts("plan")
    assert [artifact.id for artifact in made] == [f"plan/{number:04d}" for number in range(1, 21)]
    assert len({artifact.digest for artifact in made}) == 20 and not any(artifact.verify() for artifact in made)


def test_what_another_process_is_at_is_left_alone_and_nothing_else_is(hqdm, fakes, tmp_path):
    hqdm("profile", "model.ckpt")
    fakes["plan"].interrupt_at = 2
    assert hqdm("plan")[0] == 130
    fakes["plan"].interrupt_at = None
    store = Store(tmp_path / "workspace")
    ((_, request),) = store.drafts()
    (folder,) = (store.root / "plan").glob(".draft-*")
    key = json.loads((folder / "draft.json").read_text())["key"]
    with store.begin("plan", key, request) as draft:
        code, _, err = hqdm("plan")
        assert code == 1 and f"process {os.getpid()} is making the same plan artifact" in err and "hint: wait" in err
        assert f"under way: a run of plan, by process {os.getpid()}" in hqdm("status")[2]
        assert hqdm("plan", "--bits", "w4a3")[0] == 0
        assert hqdm("profile", "--steps", "9", "model.ckpt")[0] == 0
        assert f"plan stays as it is: process {os.getpid()}" in hqdm("gc")[2]
        assert f"plan stays as it is: process {os.getpid()}" in hqdm("gc", "--stale", "--dry-run")[2]
        assert (draft.work / "1").exists()
    assert hqdm("profile", "model.ckpt")[0] == 0 and "goes on" in hqdm("plan")[2]


# Formats


def test_two_processes_that_ask_for_artifacts_at_the_same_moment_do_not_fail(store, monkeypatch):
    first, second = (put(store, "plan", {"a": text}, key=text) for text in "12")
    replace = Path.replace

    def overtaken(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        Store(store.root).mark_current(second)  # by the same name beside it
        return replace(self, target)

    store.mark_current(second)
    monkeypatch.setattr(Path, "replace", overtaken)
    store.mark_current(first)
    assert store.current("plan") in (first, second) and not store.current_is_damaged("plan")


def test_a_workspace_of_the_format_before_is_read_verified_and_gone_on_with(fakes, tmp_path):
    store = Store(tmp_path / "ws")
    model = fakes["model"].with_hashes(fakes["model"].Config(path=str(tmp_path / "model.ckpt")))
    made = runner.make(store, "model", model).artifact
    manifest = {name: value for name, value in made.manifest.items() if name != "seal"} | {"format": 1}
    for entry in manifest["files"].values():
        del entry["mtime_ns"]
    (made.path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    old = Store(store.root).get("model")
    assert old.verify() == old.damage() == []
    assert not runner.make(Store(store.root), "model", model).ran
    assert runner.make(Store(store.root), "profile", fakes["profile"].Config()).ran
    (made.path / "result.txt").write_text("other")
    assert old.damage() and old.verify()
    (made.path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}, indent=1))
    assert f"{MANIFEST} is changed" in Store(store.root).get("model").verify()


def test_a_newer_format_is_refused_by_name_and_stays_as_it_is(hqdm, tmp_path):
    hqdm("profile", "model.ckpt")
    path = tmp_path / "workspace" / "model" / "0001" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    before = hashes(tmp_path / "workspace")
    for words in (("status",), ("gc",), ("gc", "--stale"), ("profile", "model.ckpt")):
        code, _, err = hqdm(*words)
        assert code == 1 and "model/0001/manifest.json has format 99, newer than" in err and "update hqdm" in err
    code, out, _ = hqdm("verify")
    assert code == 1 and "model/0001/manifest.json has format 99" in out and "profile/0001\tas it was written" in out
    assert hashes(tmp_path / "workspace") == before


def test_an_interrupted_run_of_another_stage_version_is_neither_gone_on_with_nor_lost(fakes, tmp_path):
    store, config = Store(tmp_path / "ws"), fakes["profile"].Config()
    model = fakes["model"].with_hashes(fakes["model"].Config(path=str(tmp_path / "model.ckpt")))
    runner.make(store, "model", model)
    fakes["profile"].interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        runner.make(store, "profile", config)
    fakes["profile"].interrupt_at, fakes["profile"].VERSION = None, 2
    assert not runner.make(store, "profile", config).artifact.figures["resumed"]
    (left,) = collect(store, dry_run=True).leftovers
    assert left.kind == "draft" and (left.path / "work" / "1").exists()


def test_a_state_of_another_torch_is_gone_on_with_and_told(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "1.0")
        write_state(tmp_path / "state.pt", {"done": 7})
    told = Told()
    assert read_state(tmp_path / "state.pt", told) == {"done": 7}
    assert "torch 1.0" in told.warnings[0] and "last bits" in told.warnings[0]


def test_a_state_without_a_hash_as_it_was_written_before_is_read(tmp_path):
    about = {"value": {"done": 7}, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    torch.save(about, tmp_path / "state.pt")
    assert read_state(tmp_path / "state.pt", Report()) == {"done": 7}


def test_a_manifest_that_lacks_what_readers_count_on_is_named(store):
    made = put(store, "plan", {"a": "1"})
    for name in ("format", "files", "key", "config", "digest", "finished"):
        values = {key: value for key, value in made.manifest.items() if key != name}
        (made.path / MANIFEST).write_text(json.dumps(values))
        told = "is not the manifest of an artifact" if name == "format" else f"is damaged: its {name} is missing"
        with pytest.raises(FileFault, match=f"manifest.json {told}"):
            Store(store.root).artifacts()
