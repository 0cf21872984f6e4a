"""FSDP: frozen weights divided among processes give the bits of whole ones in half the memory, whatever the method and
family, and go on where whole ones stopped; what Accelerate is asked for beside that is refused.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import TINY, save_tiny
from roads import make, tiny_store
from sharded_peers import COURSE, METHODS, ON

from pipelines import processes, runner
from pipelines.errors import HqdmError, UsageError
from pipelines.models.denoiser import load_denoiser
from pipelines.sharding import ShardedWeights, settings, units_of
from pipelines.workspace.store import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two processes at all of it, once: the workspaces, and what each process saw."""
    folder = tmp_path_factory.mktemp("sharded")
    for method, variant in METHODS.items():
        whole = tiny_store(folder / f"{method}-whole", levels=2)
        make(whole, "plan", method=method, variant=variant)
        stopped = ["stopped-whole", "stopped-divided"] if method == "hqdm" else []
        for name in [f"{method}-divided", *stopped]:
            shutil.copytree(whole.root, folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", str(ROOT / "tests/sharded_peers.py"), str(folder), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


def student(folder, name):
    return Store(folder / name).current("distill")


@pytest.mark.parametrize("method", METHODS)
def test_divided_weights_give_the_bits_of_whole_ones_in_half_the_memory(job, method):
    folder, seen = job
    whole, divided = student(folder, f"{method}-whole"), student(folder, f"{method}-divided")
    assert divided.digest == whole.digest and divided.id and "frozen_bytes" not in whole.figures
    total = divided.figures["frozen_bytes"]
    assert total > 1e6 and divided.figures["frozen_bytes_kept"] < 0.51 * total
    for one in seen:  # of all tensors that a process has between two updates
        saved = one[f"{method} False"] - one[f"{method} True"]
        assert 0.97 * total / 2 < saved < 1.03 * total / 2


@pytest.mark.parametrize("way", ["stopped-whole", "stopped-divided"])
def test_a_run_goes_on_with_weights_divided_otherwise_to_the_same_bits(job, way):
    folder, _ = job
    assert student(folder, way).digest == student(folder, "hqdm-whole").digest


def test_one_process_goes_on_where_two_with_divided_weights_stopped(job):
    folder, _ = job
    store, notes = Store(folder / "stopped-alone"), []
    report = runner.Report()
    report.note = notes.append
    made = make(store, "distill", report=report, **COURSE)
    assert any("goes on after update 2" in note for note in notes)
    assert made.figures["last_loss"] == pytest.approx(student(folder, "hqdm-whole").figures["last_loss"], rel=1e-3)


def test_images_of_teacher_and_student_are_those_of_whole_weights(job):
    folder, _ = job
    divided, whole = Store(folder / "hqdm-divided"), Store(folder / "hqdm-whole")
    for source in ("teacher", "fake"):
        mine = divided.current("sample", lambda sample, source=source: sample.config["source"] == source)
        assert mine.digest == make(whole, "sample", source=source, count=5, batch=2, steps=3).digest


def test_no_thread_waits_for_processes_that_are_gone(job):
    assert not [name for _, seen in [job] for one in seen for name in one["threads"] if "gloo" in name]


class Alone(processes.Processes):
    """One process in a group of its own."""

    def mesh(self, device):
        return dist.device_mesh.init_device_mesh("cpu", (1,))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    for name, value in ON.items():
        monkeypatch.setenv(name, value)
    with processes.sharing(Alone()):
        yield monkeypatch
    dist.destroy_process_group()


@pytest.mark.parametrize("family", TINY)
def test_every_family_predicts_from_units_that_come_and_go(alone, family, tmp_path):
    folder, options = save_tiny(family, tmp_path / "model")
    store = Store(tmp_path / "workspace")
    model = runner.make(store, "model", runner.model_config(folder, **options)).artifact
    whole, divided = load_denoiser(model.path), load_denoiser(model.path, mapped=True)
    sharded = ShardedWeights(divided, None, settings(), torch.device("cpu"))
    assert len(sharded.units) > 3 and sharded.total >= 4 * sum(value.numel() for value in whole.network.parameters())
    x = torch.randn(2, *whole.info.shape, generator=torch.Generator().manual_seed(0))
    told = torch.tensor(500), torch.tensor([0, max(0, whole.info.conditions - 1)]), whole.info.strength
    with torch.inference_mode():
        assert torch.equal(divided.predict(x, *told), whole.predict(x, *told))
    assert all(value.is_meta for value in divided.network.parameters())  # nothing stays gathered


def test_units_are_those_that_accelerate_was_told(alone, tmp_path):
    network = load_denoiser(tiny_store(tmp_path / "workspace").current("model").path).network
    by_size = units_of(network, settings())
    alone.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    alone.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "ResnetBlock2D")
    kinds = {type(network.get_submodule(name)).__name__ for name in units_of(network, settings())[1:]}
    assert kinds == {"ResnetBlock2D"} and len(by_size) > 10
    alone.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    assert units_of(network, settings()) == [""]
    alone.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    alone.setenv("FSDP_MIN_NUM_PARAMS", "100000")
    for name in units_of(network, settings())[1:]:
        assert sum(value.numel() for value in network.get_submodule(name).parameters()) > 100_000
    alone.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    alone.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaLayer")
    with pytest.raises(UsageError, match="LlamaLayer") as caught:
        units_of(network, settings())
    assert "hqdm finds blocks" in caught.value.hint


@pytest.mark.parametrize(
    ("variable", "value", "said", "way_out"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed", "--use_fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron", "--use_fsdp"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism", "--use_parallelism_config"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision", "--mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "torch.compile", "--dynamo_backend no"),
        ("FSDP_VERSION", "1", "FSDP 2 alone", "--fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "kept on the processor", "--fsdp_offload_params false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "computed again", "--fsdp_activation_checkpointing false"),
        ("FSDP_IGNORED_MODULES", "conv_in", "stay whole", "fsdp_ignored_modules"),
        ("FSDP_FORWARD_PREFETCH", "true", "ahead", "--fsdp_forward_prefetch false"),
    ],
)
def test_what_accelerate_is_asked_for_and_hqdm_does_not_do_is_refused_by_name(
    monkeypatch, capsys, tmp_path, variable, value, said, way_out
):
    from hqdm_cli.app import main

    for name, usual in ON.items():
        monkeypatch.setenv(name, usual)
    processes.check_settings()  # what accelerate launch sets of itself passes
    monkeypatch.setenv(variable, value)
    assert main(["status", "-w", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{variable}={value}" in error and said in error and way_out in error


def test_weights_that_cannot_be_divided_are_refused(monkeypatch, tmp_path):
    store = tiny_store(tmp_path / "workspace")
    for name, value in ON.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="there is one") as caught:
        make(store, "sample", source="teacher", count=1, steps=1)
    assert "--num_processes 2" in caught.value.hint
    plan = make(store, "plan", method="rtn")
    with pytest.raises(UsageError, match="rtn learns at one"):
        make(store, "distill", {"plan": plan.id})
    with pytest.raises(UsageError, match="FSDP configuration"):
        monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "BY_HAND")
        settings()


def test_a_weight_that_is_read_outside_its_layers_call_is_an_error_and_no_garbage(alone, tmp_path):
    model = tiny_store(tmp_path / "workspace").current("model")
    denoiser = load_denoiser(model.path, mapped=True)
    ShardedWeights(denoiser, None, settings(), torch.device("cpu"))
    layer = denoiser.network.time_embedding.linear_1
    x = torch.ones(1, layer.weight.shape[1])
    assert layer(x).isfinite().all()
    for read in (lambda: torch.nn.functional.linear(x, layer.weight), lambda: x @ layer.weight.T):
        with pytest.raises(HqdmError, match="outside the call of its layer") as caught:
            read()
        assert "leave FSDP out" in caught.value.hint
