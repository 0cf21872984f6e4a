"""hqdm bench: contenders in turns, where their time goes, and what the machine can do."""

import json

import pytest
import torch
from drawing import drawn
from roads import make, tiny_store, tiny_student
from torch import nn

from benchmarks import speed as benchmark
from hqdm_cli.app import main
from pipelines import speed
from pipelines.errors import UsageError
from pipelines.events import Report
from pipelines.kernels.prologue import Prologue
from pipelines.stages import bench, load


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What the machine can do at best is measured on matrices that take a moment, bfloat16 wherever the tests run."""
    monkeypatch.setattr(speed, "SIDE", 512)
    monkeypatch.setattr(speed, "EMULATED", 1e9)
    speed.multiplies_bfloat16.cache_clear()
    yield
    speed.multiplies_bfloat16.cache_clear()


def test_each_turn_begins_with_another_and_warm_turns_are_not_counted():
    called, clock = [], iter(range(1000))
    runs = {name: lambda name=name: called.append(name) for name in ("a", "b", "c")}
    taken = speed.in_turns(runs, 2, clock=lambda: next(clock))
    assert called == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert taken == {"a": [1, 1], "b": [1, 1], "c": [1, 1]}


def test_a_ratio_is_the_median_of_those_within_turns():
    assert speed.ratio([2, 30, 4], [1, 10, 1])["median"] == 3  # a slow turn is slow for both
    assert speed.spread([0.001 * n for n in range(1, 102)]) == pytest.approx({"median": 51, "p10": 10.2, "p90": 91.8})


def test_a_networks_time_goes_to_the_layers_that_took_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    class Slow(nn.Conv2d):
        def forward(self, x):
            clock[0] += 3
            return super().forward(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Slow(1, 1, 1), nn.GroupNorm(1, 1)

        def forward(self, x):
            clock[0] += 1
            return self.norm(self.conv(x))

    network = nn.Sequential(Block(), nn.SiLU())
    with speed.Shares(network) as shares, torch.no_grad():
        network(torch.zeros(1, 1, 2, 2))
    assert {kind: seconds for kind, seconds in shares.seconds.items() if seconds} == {"convolutions": 3, "the rest": 1}
    assert not any(module._forward_hooks for module in network.modules())


def test_the_table_has_every_contender_and_what_the_machine_can_do(tmp_path, capsys, monkeypatch):
    store = tiny_store(tmp_path)
    make(store, "export", {"distill": tiny_student(store, "hqdm", "ours", "w4a4").id})
    workspace = ["-w", str(store.root)]
    options = ["--batch", "1,2", "--turns", "2", "--guidance", "1"]
    held = {"resident": 0.5, "peak": 0.75}  # which the next test is about
    monkeypatch.setattr(bench, "_memory", lambda paths, config, report: dict.fromkeys(paths, held))
    with drawn():
        assert main(["bench", *options, "--json", *workspace]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [(row["contender"], row["batch"]) for row in table["steps"]] == [
        (name, batch) for batch in (1, 2) for name in ("fp32", "bf16", "int")
    ]
    assert all(row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"] for row in table["steps"])
    assert table["shares"]["int"]["quantisers"] > 0 and table["shares"]["fp32"]["quantisers"] == 0
    assert 0 < table["shares"]["int"]["fraction_of_int8_peak"] < 1
    assert all(value > 0 for value in table["peaks"].values())
    assert table["memory_gb"] == dict.fromkeys(("fp32", "bf16", "int"), held)
    kept = store.current("bench")
    assert json.loads(kept.file("bench.json").read_text()) == table
    assert kept.file("bench.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "--batch", "1", "--turns", "1", "--no-memory", *workspace]) == 0  # always anew
    shown = capsys.readouterr().out
    assert "times fp32" in shown and store.current("bench").id != kept.id


def test_bfloat16_is_left_out_where_the_processor_has_no_instructions_for_it(tmp_path, capsys, monkeypatch):
    """It would take hours there."""
    store = tiny_store(tmp_path)
    monkeypatch.setattr(speed, "EMULATED", 0)
    options = ["--batch", "1", "--turns", "1", "--guidance", "1", "--no-memory", "--json"]
    with drawn():
        assert main(["bench", *options, "-w", str(store.root)]) == 0
    shown = capsys.readouterr()
    table = json.loads(shown.out)
    assert [row["contender"] for row in table["steps"]] == ["fp32"] and table["peaks"]["bf16_gflops"] == 0
    assert "bf16 is left out: this processor has no instructions for it" in shown.err
    text = "\n".join(benchmark.lines_of({"machine": "a machine", "steps": {"tiny": {"fp32": table}}}))
    assert "| fp32 | 1 |" in text and "bf16 | 1" not in text


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    model = tiny_store(tmp_path).current("model")
    memory = bench._memory({"fp32": str(model.path)}, bench.Config(batch="1"), Report())
    assert set(memory) == {"libraries", "fp32"}
    assert memory["libraries"]["resident"] <= memory["fp32"]["resident"] <= memory["fp32"]["peak"]


def test_what_has_no_step_is_refused_by_name(tmp_path, capsys):
    store = tiny_store(tmp_path)
    for asked, said, code in (
        ("profile/0001", "error: profile/0001 is no model, and has no step to measure", 2),
        ("missing.ckpt", "error: missing.ckpt does not exist", 1),
        ("export/9", "error: there is no artifact 'export/9'", 2),
    ):
        assert main(["bench", asked, "-w", str(store.root)]) == code
        assert said in capsys.readouterr().err
    assert store.current("bench") is None


@pytest.mark.parametrize("values", [{"batch": "1,x"}, {"batch": "0"}, {"batch": ""}, {"turns": 0}])
def test_what_cannot_be_measured_is_refused(values):
    with pytest.raises(UsageError, match="bench: "):
        load("bench").Config(**values)


def test_the_benchmark_measures_rotations_on_a_steps_inputs_and_scales_batch_and_side(tmp_path, monkeypatch):
    store = tiny_store(tmp_path)
    export = make(store, "export", {"distill": tiny_student(store, "hqdm", "code", "w4a4").id})
    rotations = []
    monkeypatch.setattr(Prologue, "forward", lambda self, *args, own=Prologue.forward: (
        rotations.append(self.plan.transform.is_identity), own(self, *args))[1])  # fmt: skip
    row = benchmark.hadamard_of(export, 1)
    assert row["step_ms"] > 0 and row["rotated_ms"] > 0 and row["plain_ms"] > 0
    assert 0 < rotations.count(False) < rotations.count(True)  # each turn without rotations has none
    monkeypatch.setattr(benchmark, "BATCHES", (1, 2))
    monkeypatch.setattr(benchmark, "SIDES", (8, 16))
    rows = benchmark.scaling_of(store.current("model"), export, 1)
    assert [row.get("batch", row.get("side")) for row in rows] == [1, 2, 8, 16]
    results = {"machine": "a machine", "hadamard": {"tiny": row}, "scaling": rows}
    text = "\n".join(benchmark.lines_of(results))
    assert "| batch | int_ms | fp32_ms | bf16_ms | int_times_fp32 |" in text and "Rotations in a step of tiny" in text
