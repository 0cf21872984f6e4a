"""Commands that are killed at random moments, and what has to be true after each kill and at the end."""

import fcntl
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from pipelines import runner
from pipelines.gc import collect
from pipelines.stages import ROAD, load
from pipelines.workspace.store import Store

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What a command gives that a signal ended, or that was done before it came. Python and the dynamic loader have their
# own ways before main() is reached.
CODES = {
    signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, -2, 0),
}  # fmt: skip
CLOCK = {"seconds", "images_per_second", "peak_memory_bytes", "plan_seconds", "distill_seconds", "seconds_per_update"}
# A comparison's columns that are made from those.
CLOCK |= {"plan s", "distillation s", "images/s", "peak MB", "s/update"}
PATIENCE = 600  # seconds that one command may take on a busy machine
# Of the embedded model at half its width and one resolution.
YAML = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {linear_start: 0.0015, linear_end: 0.0195, timesteps: 1000, first_stage_key: image, cond_stage_key: class_label,
     image_size: 16, channels: 1, cond_stage_trainable: true, conditioning_key: crossattn, use_ema: true,
     unet_config: {target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {
       image_size: 16, in_channels: 1, out_channels: 1, model_channels: 32, attention_resolutions: [],
       num_res_blocks: 1, channel_mult: [1], num_head_channels: 32, use_spatial_transformer: true,
       transformer_depth: 1, context_dim: 32}},
     first_stage_config: {target: ldm.models.autoencoder.IdentityFirstStage},
     cond_stage_config: {target: ldm.modules.encoders.modules.ClassEmbedder, params: {
       n_classes: 11, embed_dim: 32, key: class_label}}}
"""


def narrow_checkpoint(folder: Path) -> Path:
    """A narrow model with random weights that draws 16×16 digits: a CompVis checkpoint and its YAML beside it."""
    import torch
    from diffusers import UNet2DConditionModel

    from pipelines.digits.train import write_checkpoint

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,),
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            cross_attention_dim=32, attention_head_dim=1, norm_num_groups=32,
        )  # fmt: skip
        model = SimpleNamespace(unet=unet, embedding=torch.nn.Embedding(11, 32))
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model, model, 0, folder / "model.ckpt")
    (folder / "model.yaml").write_text(YAML)
    return folder / "model.ckpt"


def typed_in(folder: Path, recipe: str) -> None:
    """A folder with the checkpoint and a recipe in it."""
    narrow_checkpoint(folder)
    (folder / "recipe.yaml").write_text(recipe)


def profiled(folder: Path, **options) -> None:
    """The workspace of that folder up to the profile, without its pictures, which take most of its time."""
    store, profile = Store(folder / "workspace"), load("profile")
    runner.make(store, "model", runner.model_config(folder / "model.ckpt"))
    profile._draw = lambda *_: None
    runner.make(store, "profile", profile.Config(**options))


@dataclass(frozen=True)
class Command:
    """What is typed, behind `hqdm`, in a folder that has `workspace/` of what comes before."""

    name: str
    words: tuple[str, ...]


@dataclass
class Tally:
    """What was done and found, over all commands."""

    kills: Counter = field(default_factory=Counter)  # (stage or the moment between stages, signal) -> count
    late: int = 0  # signals that came when the command was done
    finished: int = 0  # runs that were compared with the undisturbed one

    def __str__(self) -> str:
        stages = sorted({stage for stage, _ in self.kills})
        rows = [f"{'killed in':>12}  " + "  ".join(f"{number.name:>7}" for number in SIGNALS)]
        for stage in stages:
            rows.append(f"{stage:>12}  " + "  ".join(f"{self.kills[stage, number]:7}" for number in SIGNALS))
        total = sum(self.kills.values())
        return "\n".join([*rows, f"{total} kills, {self.finished} runs to the end, {self.late} signals came too late"])


def _hears_signals() -> None:
    """A shell starts what runs in the background with Ctrl-C ignored, and children inherit it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Fresh:
    """A command is a new process: python -m hqdm_cli."""

    def start(self, words: tuple[str, ...], folder: Path) -> subprocess.Popen:
        with open(folder / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hqdm_cli", *words],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True, preexec_fn=_hears_signals,
            )  # fmt: skip


class Warm:
    """A command is a fork of a process that has the libraries loaded: what a kill costs is the work alone."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            preexec_fn=_hears_signals,
        )  # fmt: skip

    def ask(self, *question):
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, words: tuple[str, ...], folder: Path) -> "Forked":
        return Forked(self, self.ask("start", list(words), str(folder)))

    def prepare(self, folder: Path, recipe: str, **profile) -> None:
        """`typed_in` and `profiled`, in a fork too."""
        assert Forked(self, self.ask("prepare", str(folder), recipe, profile)).wait(PATIENCE) == 0

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(PATIENCE)


class Forked:
    """As much of a Popen as is used here."""

    def __init__(self, warm: Warm, pid: int):
        self._warm, self.pid, self._code = warm, pid, None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._warm.ask("poll", self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self._code


def serve() -> None:
    """Answer a Warm's questions until its pipe closes; a child leaves this function as a process of its own."""
    # What the stages import, so that no child does.
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import PIL.Image  # noqa: F401
    from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: F401

    import pipelines.digits.train  # noqa: F401
    import pipelines.models.source  # noqa: F401
    import pipelines.reconstruction.learning  # noqa: F401
    import pipelines.report.pictures  # noqa: F401
    import pipelines.students  # noqa: F401
    from hqdm_cli.app import main

    for stage in ROAD:
        load(stage)
    gc.freeze()
    for line in sys.stdin:
        question, *given = json.loads(line)
        if question == "poll":
            pid, status = os.waitpid(given[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                break
        print(json.dumps(answer), flush=True)
    else:
        os._exit(0)
    if question == "prepare":
        folder, recipe, profile = given
        typed_in(Path(folder), recipe)
        profiled(Path(folder), **profile)
        os._exit(0)
    words, folder = given
    os.setsid()
    os.chdir(folder)
    log, nothing = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for descriptor, end in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, end)
    code = main(words)
    sys.stdout.flush()
    os._exit(code)  # without taking down what the parent loaded, which costs more than many a command


def disturb(
    command: Command, base: Path, folder: Path, kills: list[signal.Signals], draw: random.Random, tally: Tally, starter
) -> None:
    """Run a command undisturbed in one copy of `base`; in others, kill it and type it again until every kill has hit.

    Asserts what has to hold after each kill and, of every run that came to its end, that it left what the undisturbed
    one did. `kills`: the signals, in their order.
    """
    calm = _copy(base, folder / "calm")
    duration = _undisturbed(command, calm, starter)
    expected = _left(calm / "workspace")
    kills, runs = list(kills), 0
    while kills:
        runs += 1
        killed = _copy(base, folder / f"killed-{runs}")
        done = False
        while kills and not done:
            # Over the whole of the run, and so that several kills hit one run on its way.
            delay = draw.random() * min(duration, 2.5 * duration / len(kills))
            done = _kill(command, killed, kills[0], delay, tally, starter)
            if not done:
                kills.pop(0)
            _check_sound(command, killed, expected)
        if not done:
            _undisturbed(command, killed, starter)
        _check_same(command, killed, expected)
        tally.finished += 1
        shutil.rmtree(killed)


def _copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)  # copy2: with the times that manifests record
    return folder


def _undisturbed(command: Command, folder: Path, starter) -> float:
    """Run to the end; seconds from the first sign in the workspace."""
    process = starter.start(command.words, folder)
    _await_first_sign(process, folder / "workspace")
    begun = time.monotonic()
    code = process.wait(PATIENCE)
    assert code == 0, (command.name, code, (folder / "log").read_text()[-3000:])
    return time.monotonic() - begun


def _signs(workspace: Path) -> dict[str, int]:
    """What begins or goes on changes: the records of drafts, by time."""
    found = {}
    for path in workspace.glob("*/.draft-*/draft.json"):
        try:
            found[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def _await_first_sign(process, workspace: Path) -> None:
    before = _signs(workspace)
    while process.poll() is None and _signs(workspace) == before:
        time.sleep(0.01)


def _kill(command: Command, folder: Path, number: signal.Signals, delay: float, tally: Tally, starter) -> bool:
    """Send the signal `delay` seconds after the command began to work; whether it was done before."""
    process = starter.start(command.words, folder)
    _await_first_sign(process, folder / "workspace")
    deadline = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(min(0.01, max(0.0, deadline - time.monotonic())))
    if process.poll() is not None:
        assert process.poll() == 0, (command.name, process.poll(), (folder / "log").read_text()[-3000:])
        tally.late += 1
        return True
    stage = _held(folder / "workspace") or "between"
    os.kill(process.pid, number)
    code = process.wait(PATIENCE)
    log = (folder / "log").read_text(errors="replace")
    assert code in CODES[number], (command.name, number.name, code, log[-3000:])
    if code > 0:
        words = {143: "terminated", 130: "interrupted"}
        assert f"error: {words[code]}\nhint: what was done is kept; the same command goes on: hqdm" in log
    if code == 0:
        tally.late += 1
        return True
    tally.kills[stage, number] += 1
    return False


def _held(workspace: Path) -> str | None:
    """The stage that a process is at."""
    for lock in sorted(workspace.glob("*/.lock")):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # runs share it
            except BlockingIOError:
                return lock.parent.name
    return None


def _left(workspace: Path) -> dict:
    """What stands in a workspace, by artifact; times, speeds and memory left out."""
    return {
        artifact.id: {
            "key": artifact.key, "config": _placeless(artifact.config), "inputs": artifact.inputs,
            "figures": _timeless(artifact.figures), "content": _content(artifact),
        }
        for artifact in Store(workspace).artifacts()
    }  # fmt: skip


def _placeless(config: dict) -> dict:
    """Without the files that were read, which lie in another folder each time; their hashes stay."""
    return {name: value for name, value in config.items() if name not in ("path", "config_path")}


def _content(artifact) -> dict:
    """name -> hash; the tables of a comparison hold seconds, so they are read."""
    content = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
    if artifact.stage == "compare":
        content = {name: value for name, value in content.items() if not name.startswith("table.")}
        content["table"] = _timeless(json.loads(artifact.file("table.json").read_text()))
    return content


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(entry) for name, entry in value.items() if name not in CLOCK}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def _check_sound(command: Command, folder: Path, expected: dict) -> None:
    """After a kill: nothing that is there is half, nothing is held, nobody is left, and what is left is found."""
    workspace = folder / "workspace"
    store = Store(workspace)
    assert _held(workspace) is None, command.name
    for name, entry in _left(workspace).items():
        assert entry["content"] == expected[name]["content"], (command.name, name)
    assert [fault for artifact in store.artifacts() for fault in artifact.verify()] == [], command.name
    known = {str(leftover.path) for leftover in collect(store, dry_run=True).leftovers}
    for path in workspace.glob("*/*"):
        ours = path.name.isdecimal() or path.name in (".lock", ".current")
        assert ours or str(path) in known, (command.name, path)


def _check_same(command: Command, folder: Path, expected: dict) -> None:
    """At the end: every artifact as the undisturbed run's, bit for bit, under the same number, and nothing beside."""
    left = _left(folder / "workspace")
    for name in sorted(left.keys() | expected.keys()):
        mine, theirs = left.get(name, {}), expected.get(name, {})
        for part in mine.keys() | theirs.keys():
            assert mine.get(part) == theirs.get(part), (command.name, name, part)
    assert {leftover.kind for leftover in collect(Store(folder / "workspace")).leftovers} <= {"leftover"}
    beside = [path for path in (folder / "workspace").glob("*/.*") if path.name not in (".lock", ".current")]
    assert beside == [], command.name


if __name__ == "__main__":
    serve()
