"""benchmarks.others and benchmarks.scaling: others' quantisers in turns with hqdm, and how a step grows."""

import json
import os
import time

import numpy as np
import pytest
from drawing import drawn
from fake_contenders import Fake, Prepared
from roads import make, tiny_store, tiny_student

from benchmarks import others, scaling
from benchmarks.others import Ours, Place, Rounds
from benchmarks.size import shape_of
from pipelines.config import to_dict, write_yaml
from pipelines.errors import HqdmError
from pipelines.models.compvis_config import read_config
from pipelines.report.speed_pictures import save_scaling

OWN = [Fake("fp32"), Fake("hqdm w4a4", "all, w4a4", error=0.01)]


def measured(tmp_path, own, baselines, batches=(1, 2), turns=2, timestep=None, model=""):
    rounds, kept = Rounds(), []
    place = Place(model, str(tmp_path), timestep, 1)
    others.measure(own, baselines, place, batches, turns, rounds, lambda now: kept.append(list(now.failed)), str)
    assert kept == [list(rounds.failed)[: index + 1] for index in range(len(baselines))]  # after each of them
    return rounds


def test_every_round_is_paired_and_what_it_costs_stands_beside_it(tmp_path, capfd):
    rounds = measured(tmp_path, OWN, [Fake("one", error=0.1), Prepared("another")])
    assert set(rounds.seconds) == {"one", "another"} and not any(rounds.failed.values())
    for name, batches in rounds.seconds.items():
        for taken in batches.values():
            assert {each: len(seconds) for each, seconds in taken.items()} == {"fp32": 2, "hqdm w4a4": 2, name: 2}
    assert rounds.sqnr["one"] == pytest.approx({"1": 20, "2": 20}, abs=1e-4)
    assert rounds.sqnr["hqdm w4a4"]["2"] == pytest.approx(40, abs=1e-3) and rounds.sqnr["another"]["1"] is None
    assert all(0 < held["resident"] <= held["peak"] < 1e9 for held in rounds.memory.values())
    assert (tmp_path / "made").read_text() != str(os.getpid()) and list(rounds.prepared) == ["another"]
    assert capfd.readouterr().out == ""  # what libraries print is not in the table
    again = Rounds(**json.loads(json.dumps(vars(rounds))))
    lines = others.lines_of(again, "hqdm w4a4")
    assert lines == others.lines_of(rounds, "hqdm w4a4")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["fp32"] * 2 + ["hqdm w4a4"] * 2 + ["one"] * 2 + ["another"] * 2
    assert rows[2][1:3] == ["all, w4a4", "1"] and rows[2][6] == "40.0" and rows[4][6] == "20.0" and rows[0][6] == ""
    assert rows[2][5] == "1.00 (1.00–1.00)" == rows[0][4]


def test_what_fails_or_is_not_installed_says_so_in_the_table_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(others.PACKAGES, "no_such_module", "no-such-package")
    baselines = [
        Fake("missing", needs=("no_such_module",)), Fake("broken", fault="load"), Fake("dead", fault="dies"),
        Fake("large", fault="batch 2"), Fake("alone", fault="sees others"),
    ]  # fmt: skip
    rounds = measured(tmp_path, OWN, baselines)
    assert rounds.failed["missing"]["load"] == f"not installed: {others.INSTALL} no-such-package"
    assert rounds.failed["broken"]["load"] == "ValueError: cannot | load"
    assert rounds.failed["dead"]["load"] == "its process ended with 3"
    assert rounds.failed["large"]["batch 2"] == "MemoryError: without a word" and list(rounds.seconds["large"]) == ["1"]
    assert rounds.failed["alone"] == {}
    text = "\n".join(others.lines_of(rounds, "hqdm w4a4"))
    assert "ValueError: cannot \\| load" in text and "| large | none | 2 | MemoryError" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1  # every row has every cell
    rounds.forget("large")
    assert "large" not in "\n".join(others.lines_of(rounds, "hqdm w4a4"))


def test_a_process_that_does_not_answer_is_ended(tmp_path):
    begun = time.perf_counter()
    with others.Process(Fake("slow", fault="slow"), Place("", "", None, 1), patience=15) as process:
        process.answer()
        process._patience = 0.2
        with pytest.raises(others.Failed, match="no answer in 0.2 s"):
            process.ask("batch", 1)
    assert not process._process.is_alive() and time.perf_counter() - begun < 50


def test_one_of_its_own_that_fails_ends_the_benchmark(tmp_path):
    with pytest.raises(HqdmError, match="fp32: ValueError: cannot"):
        measured(tmp_path, [Fake("fp32", fault="load")], [])


def test_hqdms_own_contenders_make_the_step_of_hqdm_bench(tmp_path):
    store = tiny_store(tmp_path)
    export = make(store, "export", {"distill": tiny_student(store, "hqdm", "ours", "w4a4").id})
    own = [Ours("fp32"), Ours("hqdm w4a4", kind="int", export=str(export.path))]
    timestep = others._latest_timestep(export.file("model.safetensors"))
    assert timestep == max(json.loads(store.current("profile").file("profile.json").read_text())["timesteps"])
    rounds = measured(tmp_path, own, [Fake("numbers")], (1,), 1, timestep, str(store.current("model").path))
    assert rounds.failed == {"numbers": {"batch 1": "predicts (1,) instead of (1, 1, 8, 8)"}}
    assert 5 < rounds.sqnr["hqdm w4a4"]["1"] < 60 and rounds.sqnr["fp32"]["1"] is None


def test_every_package_that_a_baseline_needs_is_in_the_line_that_installs_them():
    line = next(line for line in others.__doc__.splitlines() if others.INSTALL in line)
    assert sorted(line.split(others.INSTALL)[1].split()) == sorted(others.PACKAGES.values())
    needed = {name for contender in (*others.BASELINES, others.COMPILED) for name in contender.needs}
    assert needed == set(others.PACKAGES)
    names = [contender.name for contender in (*others.BASELINES, others.COMPILED)]
    assert len(set(names)) == len(names)


def test_a_reason_is_the_first_cause_in_one_line():
    fault = RuntimeError("\x1b[96mstep 1\x1b[0m failed")
    assert others._reason(fault) == "RuntimeError: step 1 failed"
    fault.__cause__ = ValueError("Exception from core.cpp:117:\nthe shapes do not fit\nat all")
    assert others._reason(fault) == "ValueError: the shapes do not fit"


def test_an_error_in_db_is_that_of_the_field():
    exact = np.array([3.0, 4.0], np.float32)
    assert others.sqnr_db(exact, exact) is None
    assert others.sqnr_db(exact, exact * np.float32(0.9)) == pytest.approx(20, abs=1e-4)


def grown(part, values, time_exponent, memory_exponent):
    return [
        {part: value, "int_times_fp32": 2.0}
        | {f"{name}_ms": 7.0 * value**time_exponent for name in scaling.CONTENDERS}
        | {f"{name}_gb": 0.5 + 0.1 * value**memory_exponent for name in scaling.CONTENDERS}
        for value in values
    ]


def test_a_law_is_the_exponent_of_what_grows_as_a_power(tmp_path):
    found = scaling.law([1, 2, 4], [5.0, 10.0, 20.0])
    assert found == pytest.approx({"exponent": 1, "factor": 5, "r2": 1})
    assert scaling.law([1, 2, 4], [1.0, 1.0, 1.0]) == pytest.approx({"exponent": 0, "factor": 1, "r2": 1})
    assert 0 < scaling.law([1, 2, 4, 8], [1.0, 3.0, 2.0, 9.0])["r2"] < 1
    width = [row | {"parameters": 4e8, "hadamard_share": 0.007} for row in grown("width", [64, 128], 1.5, 1.0)]
    results = {"machine": "a machine", "libraries_gb": 0.5, "batch": grown("batch", [1, 2, 8], 0.9, 0.5)}
    results |= {"side": grown("side", [32, 64], 2, 1), "width": width}
    results["laws"] = scaling.laws_of(results)
    assert results["laws"]["width"]["ms"]["int"]["exponent"] == pytest.approx(1.5)
    assert results["laws"]["batch"]["gb"]["fp32"]["exponent"] == pytest.approx(0.5)
    text = "\n".join(scaling.lines_of(results))
    assert "| batch | 0.90 | 0.90 | 0.90 | 0.50 | 0.50 | 0.50 |" in text and "| 400.0 | 0.7 |" in text
    with drawn():
        save_scaling(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    results["side"][0]["int_gb"] = 0.4  # less than the libraries: no law, rather than a logarithm of nothing
    results["laws"] = scaling.laws_of(results)
    assert "int" not in results["laws"]["side"]["gb"] and "fp32" in results["laws"]["side"]["gb"]
    with drawn():
        save_scaling(results, tmp_path / "scaling.png")


def test_memory_is_that_of_a_process_which_makes_the_step(tmp_path):
    model = str(tiny_store(tmp_path).current("model").path)
    libraries = scaling.memory_of("", "", None, 1, None)
    assert 0.1 < libraries < scaling.memory_of("fp32", model, 999.0, 1, 128)  # GB


def test_another_width_of_a_published_model_is_read_back_from_its_configuration(tmp_path):
    params = shape_of("cin256-v2", 64)
    assert params.unet.widths == (64, 128, 192, 320) and shape_of("cin256-v2").unet.widths[0] == 192
    file = tmp_path / "model.yaml"
    file.write_text(write_yaml({"model": {"params": to_dict(params)}}))
    assert read_config(file) == params
