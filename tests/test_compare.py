"""Comparisons: every method at every width and seed on the same work, and a table that says what the scores say."""

import csv
import dataclasses
import io
import json
import math
import os
import shlex
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from drawing import drawn
from fake_stages import PlanConfig, checkpoint, install

from hqdm_cli.app import main
from pipelines import runner
from pipelines.comparison.asked import MethodSpec, ask
from pipelines.comparison.cells import cells_of
from pipelines.comparison.pace import Pace
from pipelines.comparison.run import _Run, compare, model_of
from pipelines.config import from_dict, to_dict, yaml_text, yaml_value
from pipelines.errors import Busy, FileFault, HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.report import comparison, comparison_pictures
from pipelines.stages import compare as stage
from pipelines.stages import score as score_stage
from pipelines.workspace.store import Store

DRAW = stage._draw
PSNR = {("efficientdm", "w4a4"): 25.0, ("hqdm", "w4a4"): 24.5, ("efficientdm", "w4a3"): 21.0, ("hqdm", "w4a3"): 24.0}


@dataclasses.dataclass(frozen=True)
class OptionedPlanConfig(PlanConfig):
    variant: str | None = None
    options: dict[str, str] = dataclasses.field(default_factory=dict)


@pytest.fixture
def fakes(monkeypatch):
    """The fake stages, with the figures and files of which a comparison is made; PSNR by method, width and seed."""
    modules = install(monkeypatch)
    modules["plan"].Config = OptionedPlanConfig
    monkeypatch.setattr(stage, "_draw", lambda *_: {})  # which takes most of the time
    for name in ("plan", "distill", "export", "sample", "score"):
        _tell(modules[name], name)
    return modules


def _tell(module, name):
    run = module.run

    def told(config, inputs, out, report):
        about = {}
        for artifact in inputs.values():
            about |= {key: artifact.figures[key] for key in ("method", "bits", "seed") if key in artifact.figures}
        if name == "plan":
            about = {"method": config.method, "variant": config.variant or "usual", "bits": config.bits}
        if name == "distill" and module.__dict__.get("fails_at") == (about["method"], about["bits"]):
            report.begin("distill", 3)
            raise NumericalFault("the loss is nan at timestep 951", "distill with lower rates")
        figures = run(config, inputs, out, report) | about
        if name == "distill":
            (out.path / "losses.csv").write_text(
                "update,trajectory,timestep,loss_per_image\n1,1,501,4.0\n2,1,1,1.0\n3,2,1,0.5\n4,2,501,3.0\n"
            )
            device = module.__dict__.get("devices", {}).get(about["method"], "cpu")
            figures |= {"updates": 4, "last_loss": 1.75, "seed": config.seed, "device": device}
        if name == "export":
            figures |= {"bytes": 1000}
        if name == "sample":
            np.savez(out.path / "samples.npz", arr_0=np.full((4, 8, 8, 1), 40 + config.seed, np.uint8))
            figures |= {"images_per_second": 10.0, "bytes": 4000, "guidance": 1.5, "seed": config.seed}
        if name == "score":
            figures |= {"extractor": "digits", "reference": "digits", "reference_n": 1797, "n": 8, "fd_digits": 1.25}
            if "method" in about:
                figures["psnr_of_mean_mse"] = PSNR[about["method"], about["bits"]] + about["seed"]
        return figures

    module.run = told


@pytest.fixture
def store(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    runner.make(store, "model", runner.model_config(checkpoint(tmp_path)))
    return store


def asked(methods=("hqdm", "efficientdm"), bits=("w4a4", "w4a3"), seeds=(0, 1), options=None):
    return ask(methods, bits, seeds, options)


def made(store, *arguments, **options):
    return compare(store, asked(*arguments, **options), store.current("model"))


def table_of(result):
    return json.loads(result.outcome.artifact.file("table.json").read_text())


def csv_of(result):
    return list(csv.DictReader(io.StringIO(result.outcome.artifact.file("table.csv").read_text())))


def ids(store):
    return [artifact.id for artifact in store.artifacts()]


def test_a_method_is_written_with_its_variant_and_options():
    spec = MethodSpec.parse("hqdm/paper: order = 16")
    assert (spec.method, spec.variant, dict(spec.options)) == ("hqdm", "paper", {"order": "16"})
    assert str(spec) == "hqdm/paper:order=16" and str(MethodSpec.parse("hqdm")) == "hqdm"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("hqdn", "did you mean 'hqdm'?"),
        ("hqdm/papre", "did you mean 'paper'?"),
        ("hqdm:ordre=16", "did you mean 'order'?"),
        ("hqdm/", "write method/variant:option=value, as in hqdm/paper:order=16"),
        ("hqdm:order", "write method/variant:option=value, as in hqdm/paper:order=16"),
        ("hqdm:order=", "write method/variant:option=value, as in hqdm/paper:order=16"),
        ("hqdm:order=1,order=2", "give each option once"),
        ("hqdm:order=16", "choose variant paper, or leave order out"),
        ("hqdm/auto:budget=2", "it takes 0 … 1"),
        ("HQDM", "did you mean 'hqdm'?"),
        ("hqdm,efficientdm", "put spaces between methods: hqdm efficientdm"),
        ("hqdm/paper,efficientdm", "put spaces between methods: hqdm/paper efficientdm"),
        ("w4a4", "bits have an option: --bits w4a4"),
        ("w4a4,w4a3", "bits have an option: --bits w4a4,w4a3"),
        ("folder/model.ckpt", "a model has an option: --model folder/model.ckpt"),
    ],
)
def test_a_method_that_cannot_be_read_is_refused_with_a_way_out(text, hint):
    with pytest.raises(UsageError) as fault:
        MethodSpec.parse(text)
    assert fault.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"bits": ("w5a4",)}, "not supported"),
        ({"bits": ()}, "nothing to compare"),
        ({"seeds": (-1,)}, "seeds cannot be -1"),
        ({"options": {"export": {"format": "int"}}}, "no options to 'export'"),
        ({"options": {"distill": {"trajectorys": 2}}}, "no option 'trajectorys'"),
        ({"options": {"distill": {"seed": 2}}}, "distill.seed is what a comparison sets itself"),
        ({"methods": ("hqdm/auto:bias=nan",)}, "option bias cannot be 'nan'"),
        ({"seeds": (2**63,)}, "seed cannot be 9223372036854775808"),
        ({"options": {"sample": {"device": "cuda"}}}, "sample.device is what a comparison sets itself"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_runs(store, wrong, what):
    with pytest.raises(UsageError, match=what) as fault:
        asked(**wrong)
    assert fault.value.hint and ids(store) == ["model/0001"]


def test_without_methods_every_one_of_the_table_is_compared():
    from pipelines.methods import METHODS

    assert [str(spec) for spec in asked(methods=()).methods] == list(METHODS)


def test_a_method_named_twice_in_other_words_is_one():
    assert [str(spec) for spec in asked(methods=("hqdm", "hqdm/ours", "efficientdm")).methods] == [
        "hqdm",
        "efficientdm",
    ]


def test_a_key_of_the_recipe_makes_another_method_and_a_list_may_hold_commas():
    text = "hqdm/auto:recipe.ema=0,recipe.trains=[biases,adapters]"
    spec = MethodSpec.parse(text)
    assert dict(spec.options) == {"recipe.ema": "0", "recipe.trains": "[biases,adapters]"} and str(spec) == text
    assert spec._found()[2].recipe.trains == ["biases", "adapters"]
    methods = ("hqdm/auto", "hqdm/auto:recipe.ema=0", "hqdm/auto:recipe.ema=0.0")
    assert len(ask(methods, ["w4a4"], [0]).methods) == 2
    same = ("hqdm/code", "hqdm/code:recipe.ema=0", "hqdm/auto:recipe.lora_rate_divisor=10", "hqdm/auto")
    assert len(ask(same, ["w3a3"], [0]).methods) == 3  # of auto 10 is in force at four bits alone
    assert not MethodSpec.parse("hqdm/auto:recipe.updates=none").learns


def test_an_option_spelled_out_at_its_default_is_no_other_method():
    same = ("hqdm/paper", "hqdm/paper:order=32", "hqdm/paper:order=16")
    assert [str(spec) for spec in asked(methods=same).methods] == ["hqdm/paper", "hqdm/paper:order=16"]


def test_an_extractor_that_there_is_none_of_is_refused_before_anything_runs():
    from pipelines.metrics.extractors import EXTRACTORS
    from pipelines.stages import score

    assert set(score.EXTRACTORS) == set(EXTRACTORS)
    with pytest.raises(UsageError, match="no extractor is called 'incepton'") as fault:
        asked(options={"score": {"extractor": "incepton"}})
    assert fault.value.hint == "did you mean 'inception'?"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"score": {"reference": "digitz"}}, "no reference is called 'digitz'"),
        ({"score": {"extractor": "digits", "extractor_weights": "x.pth"}}, "'digits' comes with its weights"),
        ({"score": {"extractor": "none", "extractor_weights": "x.pth"}}, "'none' has no features"),
        ({"sample": {"eta": 1.5}}, "sample: eta cannot be 1.5"),
        ({"profile": {"eta": -1}}, "profile: eta cannot be -1"),
        ({"distill": {"eta": 2}}, "distill: eta cannot be 2"),
        ({"sample": {"scheduler": "DDIM"}}, "sample: scheduler 'DDIM' does not exist"),
        ({"profile": {"scheduler": "DDIM"}}, "profile: scheduler 'DDIM' does not exist"),
        ({"sample": {"attention": "int8", "backend": "cuda"}}, "compiled for processors alone"),
    ],
)
def test_what_a_stage_would_refuse_after_images_were_drawn_is_refused_before(options, what):
    with pytest.raises(UsageError, match=what) as fault:
        asked(options=options)
    assert fault.value.hint


def test_a_seed_is_refused_where_a_students_adapters_could_not_be_drawn_from_it():
    assert asked(seeds=(2**46,)).seeds == (2**46,)
    with pytest.raises(UsageError, match="distill: seed cannot be") as fault:
        asked(seeds=(2**46 + 1,))
    assert fault.value.hint == f"it takes {2**46} or less"


def test_what_is_the_students_alone_is_not_asked_of_the_teachers_samples(tmp_path):
    work = asked(options={"sample": {"attention": "int8", "backend": "reference"}})
    run = _Run(Store(tmp_path / "ws"), work, None, Report(), False, True)
    drawn = {cell.spec is None: run._config("sample", cell) for cell in cells_of(work)}
    assert (drawn[True].source, drawn[True].attention, drawn[True].backend) == ("teacher", "fp32", None)
    assert (drawn[False].source, drawn[False].attention, drawn[False].backend) == ("int", "int8", "reference")


def test_a_file_that_an_option_names_is_kept_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = asked(options={"score": {"reference_path": "images.npz"}}).options["score"]["reference_path"]
    assert kept == str(tmp_path / "images.npz")


def test_a_reference_is_an_artifact_or_a_file_and_not_both(tmp_path):
    with pytest.raises(UsageError, match="a reference is given twice: /real.npz and sample/0001") as fault:
        ask(["hqdm"], ["w4a4"], [0], {"score": {"reference_path": "/real.npz"}}, "sample/0001")
    assert fault.value.hint == "leave one of them out"


def test_cells_of_equal_integers_share_a_score_and_keep_their_own_names_students_and_costs(store, fakes):
    run = fakes["export"].run

    def same(config, inputs, out, report):
        figures = run(config, inputs, out, report)
        (out.path / "result.txt").write_text("the same integers")
        return figures

    fakes["export"].run = same
    table = table_of(made(store, ("hqdm/paper:order=8", "hqdm/paper:order=16"), ("w4a4",), (0,)))
    first, second = (cell for cell in table["cells"] if cell["spec"] != "teacher")
    assert first["score"] == second["score"] and first["sample"] == second["sample"]
    assert (first["method"], second["method"]) == ("hqdm (paper, order=8)", "hqdm (paper, order=16)")
    assert first["options"] == {"order": "8"} and second["options"] == {"order": "16"}
    for cell in (first, second):
        assert store.get(cell["distill"]).inputs["plan"]["id"] == cell["plan"]
        assert store.get(cell["export"]).inputs["distill"]["id"] == cell["distill"]
        for paid in ("plan", "distill"):
            assert cell[f"{paid}_seconds"] == store.get(cell[paid]).manifest["seconds"]
    assert first["distill"] != second["distill"]


def test_layers_are_counted_at_the_bits_asked_at_eight_and_in_float(store, fakes):
    run = fakes["plan"].run
    sites = {
        "a": {"quantised": True, "weight_bits": 4, "activation_bits": 4, "mixed": False},
        "b": {"quantised": True, "weight_bits": 8, "activation_bits": 4, "mixed": True},
        "c": {"quantised": True, "weight_bits": 8, "activation_bits": 8, "mixed": False},
        "d": {"quantised": False},
    }

    def planned(config, inputs, out, report):
        (out.path / "plan.yaml").write_text(json.dumps({"method": config.method, "sites": sites}))
        return run(config, inputs, out, report)

    fakes["plan"].run = planned
    artifact = made(store, ("hqdm",), ("w4a4",), (0,)).outcome.artifact
    table = json.loads(artifact.file("table.json").read_text())
    assert table["rows"][1]["layers"] == {"asked": 2, "eight": 1, "float": 1}
    page = artifact.file("table.md").read_text()
    assert "| w4a4 | hqdm (usual) | 2/1/1 |" in page and "asked/8/float counts the layers" in page
    rows = list(csv.DictReader(io.StringIO(artifact.file("table.csv").read_text())))
    assert {row["layers"] for row in rows if row["bits"] == "w4a4"} == {"2/1/1"}


def test_the_tables_cells_are_the_scores_figures(store, fakes):
    table = table_of(made(store))
    students = [cell for cell in table["cells"] if cell["spec"] != "teacher"]
    assert len(students) == 8
    for cell in students:
        score = store.get(cell["score"])
        assert cell["psnr"] == score.figures["psnr_of_mean_mse"] == PSNR[cell["spec"], cell["bits"]] + cell["seed"]
        assert cell["fid"] == 1.25 and cell["updates"] == 4 and cell["bytes"] == 1000 and cell["last_loss"] == 1.75
        for above, below in (("sample", "score"), ("export", "sample"), ("distill", "export"), ("plan", "distill")):
            assert cell[above] in [link["id"] for link in store.get(cell[below]).inputs.values()]
        for paid in ("plan", "distill"):
            assert cell[f"{paid}_seconds"] == store.get(cell[paid]).manifest["seconds"]


def test_a_row_is_the_mean_and_the_deviation_over_the_seeds(store, fakes):
    rows = {(row["spec"], row["bits"]): row for row in table_of(made(store))["rows"]}
    assert rows["hqdm", "w4a3"]["psnr"] == {"mean": 24.5, "sd": pytest.approx(math.sqrt(0.5))}
    assert rows["hqdm", "w4a3"]["seeds"] == [0, 1] and rows["teacher", "fp32"]["psnr"] is None
    one = {(row["spec"], row["bits"]): row for row in table_of(made(store, seeds=(1,)))["rows"]}
    assert one["hqdm", "w4a3"]["psnr"] == {"mean": 25.0, "sd": None}


def test_a_deviation_is_the_sample_deviation_and_an_infinite_figure_has_none():
    assert comparison.mean_and_deviation([1.0, None, 3.0]) == {"mean": 2.0, "sd": math.sqrt(2)}
    assert comparison.mean_and_deviation([math.inf, 3.0]) == {"mean": math.inf, "sd": None}
    assert comparison.mean_and_deviation([None, None]) is None


def test_images_equal_to_the_teachers_have_an_infinite_psnr_in_every_form_of_the_table(store, fakes, monkeypatch):
    monkeypatch.setitem(PSNR, ("hqdm", "w4a4"), math.inf)
    artifact = made(store, seeds=(0,)).outcome.artifact
    read = json.loads(artifact.file("table.json").read_text())
    assert read["rows"][1]["psnr"] == {"mean": "inf", "sd": None}
    assert "**inf**" in artifact.file("table.md").read_text() and "**inf**" in "".join(comparison.markdown(read))


def test_the_best_of_each_width_is_marked_and_a_tie_marks_none(store, fakes):
    result = made(store)
    assert {bits: best["PSNR dB"] for bits, best in result.outcome.artifact.figures["best"].items()} == {
        "w4a4": ["efficientdm (usual)"], "w4a3": ["hqdm (usual)"]
    }  # fmt: skip
    assert "FD(digits)" not in result.outcome.artifact.figures["best"]["w4a4"]
    page = result.outcome.artifact.file("table.md").read_text()
    assert "**25.50 ± 0.71**" in page and "**25.00 ± 0.71**" not in page


def test_a_method_that_lacks_a_seed_is_not_ranked_and_named(store, fakes, monkeypatch):
    """Its one seed would be the best of w4a4: means over different seeds are of different images."""
    monkeypatch.setitem(PSNR, ("rtn", "w4a4"), 20.0)
    run = fakes["distill"].run

    def first_seed_fails(config, inputs, out, report):
        if config.seed == 0 and inputs["plan"].figures["method"] == "efficientdm":
            raise NumericalFault("the loss is nan", "distill with lower rates")
        return run(config, inputs, out, report)

    fakes["distill"].run = first_seed_fails
    result = made(store, ("hqdm", "efficientdm", "rtn"), ("w4a4",))
    table = table_of(result)
    assert {row["spec"]: row["seeds"] for row in table["rows"]}["efficientdm"] == [1]
    assert table["best"]["w4a4"]["PSNR dB"] == ["hqdm (usual)"]
    page = result.outcome.artifact.file("table.md").read_text()
    assert "lack seeds (in brackets those they have): efficientdm (usual) w4a4 (1)." in page
    row = next(row for row in csv_of(result) if row["spec"] == "efficientdm" and row["kind"] == "mean")
    assert row["seeds"] == "1"


def test_what_a_plan_took_has_no_deviation_over_the_seeds_that_share_it(store, fakes):
    row = table_of(made(store))["rows"][1]
    assert row["plan_seconds"]["sd"] is None and row["distill_seconds"]["sd"] is not None


def test_costs_on_different_devices_are_told_and_not_ranked(store, fakes):
    alike = comparison.best_of(timed(table_of(made(store, seeds=(0,), bits=("w4a4",)))))
    assert ("w4a4", "hqdm", "distill_seconds") in alike
    fakes["distill"].devices = {"hqdm": "NVIDIA H200"}
    result = made(store, ("hqdm", "efficientdm"), ("w4a4",), (1,))
    table = table_of(result)
    assert {cell["spec"]: cell["device"] for cell in table["cells"][1:]} == {
        "hqdm": "NVIDIA H200", "efficientdm": "cpu"
    }  # fmt: skip
    assert table["about"]["devices"] == ["NVIDIA H200", "cpu"]
    ranked = {key for _, _, key in comparison.best_of(timed(table))}
    assert "psnr" in ranked and not ranked & set(comparison.COST)
    page = result.outcome.artifact.file("table.md").read_text()
    assert "Distilled on: NVIDIA H200, cpu." in page
    assert {row["device"] for row in csv_of(result) if row["spec"] == "hqdm"} == {"NVIDIA H200"}


def timed(table):
    """A table in which students took different seconds."""
    for place, row in enumerate(table["rows"]):
        row["distill_seconds"] = {"mean": 10.0 + place, "sd": None}
    return table


def test_the_csv_says_what_was_measured_against_what_and_names_distances_by_their_features(store, fakes):
    fakes["distill"].fails_at = ("hqdm", "w4a3")
    rows = csv_of(made(store))
    assert {(row["n"], row["reference"], row["extractor"]) for row in rows} == {("8", "digits", "digits")}
    assert "fid" not in rows[0] and "sfid" not in rows[0]
    (mean,) = [row for row in rows if (row["kind"], row["spec"], row["bits"]) == ("mean", "hqdm", "w4a4")]
    assert (mean["seeds"], mean["fd_digits"], mean["fd_digits_sd"]) == ("0 1", "1.25", "0.0")
    assert {row["fd_digits"] for row in rows if row["kind"] == "cell" and row["fd_digits"]} == {"1.25"}
    assert [(row["seed"], row["stage"]) for row in rows if row["error"]] == [("0", "distill"), ("1", "distill")]
    fid, *_ = [column for column in comparison.COLUMNS if column.key == "fid"]
    assert comparison.csv_name(fid, "inception") == "fid"


def test_a_terminal_gets_tables_as_narrow_as_it_is_quality_first_and_every_column_once(store, fakes):
    view = comparison.shown(table_of(made(store)))
    for width in (60, 80, 120, 400):
        parts = view.parts(width)
        head, rest = ["bits", "method"], [name for part in parts for name in part.headings[2:]]
        assert all(part.headings[:2] == head for part in parts) and sorted(head + rest) == sorted(view.headings)
        quality = [key in (*comparison.QUALITY, "contrast") for part in parts for key in part.keys[2:]]
        assert quality == sorted(quality, reverse=True)
        for part in parts:
            columns = zip(part.headings, *part.lines, strict=True)
            room = [max(map(len, column)) + 2 for column in columns]
            assert len(part.headings) == 3 or sum(room) <= width  # two between columns, and an edge on both sides
            at = view.headings.index(part.headings[2])
            assert [line[2] for line in part.lines] == [line[at] for line in view.lines]
            assert [best[2] for best in part.best] == [best[at] for best in view.best]


def test_profile_and_teacher_are_made_once_whatever_is_compared(store, fakes):
    made(store)
    made(store, ("hqdm/paper",))
    assert len(store.artifacts("profile")) == 1
    assert [s.config["seed"] for s in store.artifacts("sample") if s.config["source"] == "teacher"] == [0, 1]


def test_a_second_time_nothing_is_made(store, fakes):
    first = made(store)
    before = ids(store)
    second = made(store)
    assert ids(store) == before and second.outcome.artifact == first.outcome.artifact and not second.outcome.ran


def test_a_wider_comparison_makes_only_what_is_new(store, fakes):
    made(store, seeds=(0,))
    before = len(store.artifacts("distill"))
    made(store, seeds=(0, 1))
    assert (before, len(store.artifacts("distill"))) == (4, 8) and len(store.artifacts("plan")) == 4


def test_an_interrupted_comparison_goes_on_where_it_stopped(store, fakes, tmp_path):
    whole = Store(tmp_path / "whole")
    runner.make(whole, "model", runner.model_config(tmp_path / "model.ckpt"))
    undisturbed = table_of(made(whole))
    made(store, seeds=(0,), bits=("w4a4",))
    fakes["distill"].interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        made(store)
    fakes["distill"].interrupt_at = None
    assert [stage for stage, _ in store.drafts()] == ["distill"] and len(store.artifacts("distill")) == 2
    result = made(store)
    assert store.get("distill/3").figures["resumed"] is True and not result.failed
    same = [[{k: v for k, v in cell.items() if k in ("spec", "bits", "seed", "psnr", "fid")} for cell in table["cells"]]
            for table in (table_of(result), undisturbed)]  # fmt: skip
    assert same[0] == same[1]


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(store, fakes):
    fakes["distill"].fails_at = ("hqdm", "w4a3")
    result = made(store)
    assert [(cell.name, cell.failed) for cell in result.failed] == [
        ("hqdm w4a3 seed 0", "distill"), ("hqdm w4a3 seed 1", "distill")
    ]  # fmt: skip
    table = table_of(result)
    assert len(table["cells"]) == 2 + 6 and len(table["failed"]) == 2
    assert table["failed"][0]["error"] == "the loss is nan at timestep 951"
    assert "hqdm w4a3 seed 0: distill: the loss is nan" in result.outcome.artifact.file("table.md").read_text()
    fakes["distill"].fails_at = None
    again = made(store)
    assert not again.failed and len(table_of(again)["cells"]) == 10 and len(store.artifacts("distill")) == 8


def test_a_fault_of_the_program_is_kept_with_its_kind_and_place(store, fakes):
    def broken(config, inputs, out, report):
        raise ValueError("shapes do not fit\nat all")

    fakes["export"].run = broken
    failed = made(store, ("hqdm",), ("w4a4",), (0,)).failed
    assert failed[0].error.startswith("ValueError: shapes do not fit (test_compare.py:")


def test_a_comparison_of_which_a_score_is_missing_is_not_made(store, fakes):
    made(store)
    config = runner.stages.load("compare").Config(["hqdm"], ["w4a4"], [0])
    with pytest.raises(HqdmError, match="5 are missing") as fault:
        runner.make(store, "compare", config)
    assert fault.value.hint == "hqdm compare makes them first"
    chosen = {role: link["id"] for role, link in store.current("compare").inputs.items() if role != "profile"}
    with pytest.raises(HqdmError, match="of one profile's students, and none is named"):
        stage.inputs(runner.stages.load("compare").Config(["hqdm", "efficientdm"], ["w4a4", "w4a3"], [0, 1]), store,
                     {role: ident for role, ident in chosen.items() if role != "model"})  # fmt: skip


def test_a_newer_model_makes_the_comparison_stale(store, fakes, tmp_path):
    result = made(store)
    assert set(runner.stale(store).values()) == {None}
    runner.make(store, "model", runner.model_config(checkpoint(tmp_path, "other weights")))
    assert runner.stale(store)[result.outcome.artifact.id].startswith("input ")


def test_a_dry_run_tells_what_is_missing_and_makes_nothing(store, fakes):
    made(store, seeds=(0,))
    before = ids(store)
    result = compare(store, asked(), store.current("model"), dry_run=True)
    assert ids(store) == before and result.outcome is None
    assert [cell.name for cell in result.cells if not cell.ended] == [
        "teacher seed 1", "hqdm w4a4 seed 1", "efficientdm w4a4 seed 1", "hqdm w4a3 seed 1", "efficientdm w4a3 seed 1"
    ]  # fmt: skip
    assert set(result.cells[-1].chain) == {"plan"} and result.seconds >= 0


def test_a_dry_run_of_a_forced_comparison_counts_the_students_that_it_would_make(store, fakes):
    made(store)
    before = ids(store)
    result = compare(store, asked(), store.current("model"), force=True, dry_run=True)
    assert ids(store) == before
    assert [cell.spec is None for cell in result.cells if cell.ended] == [True, True]
    assert not any(cell.chain for cell in result.cells if cell.spec) and result.seconds > 0


def test_a_dry_run_tells_what_speaks_against_a_cell(store, fakes):
    result = made(store, seeds=(0,))
    inputs = fakes["plan"].inputs

    def misfit(config, store, chosen):
        if config.method == "hqdm":
            raise HqdmError("hqdm does not fit this model", "take another method")
        return inputs(config, store, chosen)

    fakes["plan"].inputs = misfit
    result = compare(store, asked(seeds=(0,)), store.current("model"), dry_run=True)
    told = {cell.name: cell.error for cell in result.cells if cell.error}
    assert told == dict.fromkeys(("hqdm w4a4 seed 0", "hqdm w4a3 seed 0"), "hqdm does not fit this model")


def test_force_makes_the_plan_that_seeds_share_once(store, fakes):
    made(store)
    assert len(store.artifacts("plan")) == 4
    compare(store, asked(), store.current("model"), force=True)
    assert [len(store.artifacts(name)) for name in ("plan", "distill", "export")] == [8, 16, 16]


def test_scores_that_are_there_tell_how_long_the_next_take(store, fakes):
    made(store, seeds=(0,))
    for artifact in store.artifacts("score"):
        manifest = json.loads((artifact.path / "manifest.json").read_text())
        (artifact.path / "manifest.json").write_text(json.dumps(manifest | {"seconds": 4.0}))
    more = asked(seeds=(1,), options={"sample": {"count": 16}})  # twice as many images
    model = store.current("model")
    pace = Pace(store, model, more, _Run(store, more, model, Report(), False, True)._units)
    assert [pace.of("score", cell) for cell in cells_of(more)] == pytest.approx([8.0] * 5)
    other = asked(options={"score": {"extractor": "none"}})
    pace = Pace(store, model, other, _Run(store, other, model, Report(), False, True)._units)
    assert {pace.of("score", cell) for cell in cells_of(other)} == {None}


def test_what_learns_nothing_is_not_charged_the_time_of_what_does(store, fakes):
    """Nor the other way round: a distillation's time is its trajectories, steps and images, a calibration's its own."""
    profile = runner.make(store, "profile", runner.stages.load("profile").Config()).artifact
    model = store.current("model")
    for method, updates in (("hqdm", 80), ("rtn", 0)):
        figures = {"method": method, "variant": {"hqdm": "ours", "rtn": "max"}[method]}
        with store.begin("plan", method, {"config": {}, "inputs": compare_links(profile=profile)}) as draft:
            (draft.path / "plan.txt").write_text(method)
            plan = draft.commit(figures)
        request = {"config": {"trajectories": 4, "steps": 20, "batch": 4}, "inputs": compare_links(plan=plan)}
        with store.begin("distill", method, request) as draft:
            (draft.path / "student.txt").write_text(method)
            draft.commit(figures | {"updates": updates})
    timed = {"hqdm": 8.0, "rtn": 2.0}
    for artifact in store.artifacts("distill"):
        manifest = json.loads((artifact.path / "manifest.json").read_text())
        (artifact.path / "manifest.json").write_text(
            json.dumps(manifest | {"seconds": timed[artifact.figures["method"]]})
        )
    longer = asked(("hqdm", "efficientdm", "rtn", "smoothquant"), options={"distill": {"trajectories": 40}})
    run = _Run(store, longer, model, Report(), False, True)
    pace = Pace(store, model, longer, run._units)
    times = {cell.spec.method: pace.of("distill", cell) for cell in cells_of(longer) if cell.spec}
    assert times == pytest.approx({"hqdm": 160.0, "efficientdm": 160.0, "rtn": 2.0, "smoothquant": 2.0})


def compare_links(**inputs):
    return {role: {"id": artifact.id, "digest": artifact.digest} for role, artifact in inputs.items()}


@pytest.fixture
def hqdm(fakes, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HQDM_WORKSPACE", raising=False)
    checkpoint(tmp_path)

    def type_command(*words):
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return type_command


WORDS = ("compare", "hqdm", "efficientdm", "--bits", "w4a4,w4a3", "--seeds", "0,1", "--count", "4")


def test_the_command_takes_a_model_and_prints_one_table(hqdm):
    code, out, err = hqdm(*WORDS, "--model", "model.ckpt")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + 5 and lines[0].split()[:3] == ["bits", "method", "seeds"]
    assert "25.50 ± 0.71*" in out and "cell 10 of 10: efficientdm w4a3 seed 1" in err
    assert err.splitlines()[-1] == "next: hqdm show compare/0001"
    assert hqdm("show", "compare")[0] == 0 and hqdm("status")[1].count("\ncompare/0001") == 1


def test_json_markdown_and_csv_are_the_artifacts_files(hqdm):
    hqdm(*WORDS, "--model", "model.ckpt")
    table = json.loads(hqdm(*WORDS, "--json")[1])
    rows = list(csv.DictReader(io.StringIO(hqdm(*WORDS, "--csv")[1])))
    assert len([row for row in rows if row["kind"] == "mean"]) == len(table["rows"]) == 5
    assert [float(row["psnr"]) for row in rows if row["kind"] == "cell" and row["psnr"]] == [
        cell["psnr"] for cell in table["cells"] if cell["psnr"]
    ]
    assert "| w4a3 | hqdm (usual) |" in hqdm(*WORDS, "--markdown")[1]
    assert hqdm(*WORDS, "--json", "--csv")[0] == 2


def test_every_cells_command_finds_that_cell(hqdm, tmp_path):
    hqdm(*WORDS, "--model", "model.ckpt", "--option", "distill.trajectories=7")
    store = Store(tmp_path / "workspace")
    before = len(store.artifacts("distill"))
    cells = json.loads(store.get("compare").file("table.json").read_text())["cells"]
    command = next(cell["command"] for cell in cells if (cell["spec"], cell["seed"]) == ("hqdm", 1))
    code, _, err = hqdm(*shlex.split(command)[1:])
    assert code == 0 and "cells: goes on at 2 of 2 cells" in err
    assert before == 4 + 4 == len(store.artifacts("distill"))


@pytest.mark.parametrize(
    "value", [1e-05, 0.5, 1e16, "1e-05", "0", "null", "", " a: b", "/x/my #1/ä 'é'.npz", "[x", "😀 #"]
)
def test_a_value_is_written_as_it_is_read(value):
    text = yaml_text(value)
    assert "\n" not in text and yaml_value(text, "it") == value and type(yaml_value(text, "it")) is type(value)


def test_a_printed_command_keeps_small_numbers_and_odd_paths_whatever_folder_it_is_typed_in(
    hqdm, tmp_path, monkeypatch
):
    words = ("compare", "hqdm", "--model", "model.ckpt", "-w", str(tmp_path / "ws"), "--json")
    options = ("--option", "sample.eta=1e-05", "--option", "score.reference_path='my #1/a.npz'")
    table = json.loads(hqdm(*words, *options)[1])
    kept = {"sample": {"eta": 1e-05}, "score": {"reference_path": str(tmp_path / "my #1/a.npz")}}
    assert table["about"]["options"] == kept
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = hqdm(*shlex.split(table["cells"][1]["command"])[1:])
    assert code == 0 and "compare: up to date" in err


@pytest.mark.parametrize("form", ["--markdown", "--csv", "--json"])
def test_in_another_workspace_the_commands_name_it_and_the_artifact_does_not(hqdm, tmp_path, form):
    words = ("compare", "hqdm", "--model", "model.ckpt", "-w", "my place")
    out = hqdm(*words, form)[1]
    if form == "--json":
        command = json.loads(out)["cells"][1]["command"]
    elif form == "--csv":
        command = [row["command"] for row in csv.DictReader(io.StringIO(out)) if row["command"]][0]
    else:
        command = next(line for line in out.splitlines() if line.startswith("hqdm compare"))
    assert command.endswith(" -w 'my place'")
    code, _, err = hqdm(*shlex.split(command)[1:])
    assert code == 0 and "compare: up to date" in err
    files = Store(tmp_path / "my place").get("compare")
    assert not any("my place" in files.file(f"table.{kind}").read_text() for kind in ("md", "csv", "json"))


def test_a_failed_cell_ends_the_command_with_1_and_the_list(hqdm, fakes):
    fakes["distill"].fails_at = ("hqdm", "w4a3")
    code, out, err = hqdm(*WORDS, "--model", "model.ckpt")
    assert code == 1 and "24.50" not in out and "25.50 ± 0.71" in out
    assert "error: 2 of 10 cells failed: hqdm w4a3 seed 0, hqdm w4a3 seed 1" in err
    assert "failed: hqdm w4a3 seed 0: distill: the loss is nan at timestep 951" in err


def test_the_dry_run_of_the_command_lists_the_cells(hqdm, tmp_path):
    code, out, err = hqdm(*WORDS, "--model", "model.ckpt", "--dry-run")
    assert code == 0 and "hqdm w4a4 seed 0" in out and not (tmp_path / "workspace").exists()
    assert "10 of 10 cells would be made; nothing like them was made yet to tell how long" in err


def test_force_makes_the_students_afresh_and_nothing_above_them(hqdm, tmp_path):
    hqdm("compare", "hqdm", "--model", "model.ckpt")
    hqdm("compare", "hqdm", "--force")
    store = Store(tmp_path / "workspace")
    assert [len(store.artifacts(stage)) for stage in ("model", "profile", "plan", "distill", "sample")] == [
        1,
        1,
        2,
        2,
        3,
    ]


def test_a_recipe_is_the_same_comparison_and_what_is_typed_goes_before_it(hqdm, tmp_path):
    (tmp_path / "there").mkdir()
    checkpoint(tmp_path / "there")
    recipe = tmp_path / "there" / "comparison.yaml"
    recipe.write_text(
        "{model: model.ckpt, methods: [hqdm, efficientdm], bits: [w4a4, w4a3], seeds: [0, 1], sample: {count: 4}}"
    )
    hqdm(*WORDS, "--model", "model.ckpt")
    assert "compare: up to date" in hqdm("compare", "--from", str(recipe))[2]
    assert json.loads(hqdm("compare", "--from", str(recipe), "--bits", "w4a4", "--json")[1])["about"]["bits"] == [
        "w4a4"
    ]
    recipe.write_text("{method: [hqdm]}")
    code, _, err = hqdm("compare", "--from", str(recipe))
    assert code == 2 and "unknown key 'method'" in err and "did you mean 'methods'?" in err


@pytest.mark.parametrize(
    ("text", "exits", "what"),
    [
        ("", 1, "comparison.yaml is empty"),
        ("{}", 1, "comparison.yaml is empty"),
        ("methods: []", 2, "methods is empty"),
        ("bits: []", 2, "bits is empty"),
        ("seeds: []", 2, "seeds is empty"),
        ("seeds: [a]", 2, "seeds[0] cannot be 'a'\nhint: it takes a whole number\n"),
        ('{methods: [hqdm], model: ""}', 2, "--model '' names nothing"),
    ],
)
def test_a_recipe_that_names_nothing_is_refused_and_does_not_stand_for_everything(hqdm, tmp_path, text, exits, what):
    recipe = tmp_path / "comparison.yaml"
    recipe.write_text(text)
    code, _, err = hqdm("compare", "--from", str(recipe), "--dry-run")
    assert code == exits and what in err and "hint: " in err


def test_a_reference_under_two_paths_is_named_once():
    def score(name, digest=None):
        return SimpleNamespace(figures={"reference": name}, config={"reference_sha256": digest})

    alike = [score("runs/test.npz", "ab"), score("/home/me/runs/test.npz", "ab"), score("digits"), score("digits")]
    assert stage._references(alike) == ["runs/test.npz", "digits"]
    assert stage._references([score("test.npz", "ab"), score("test.npz", "cd")]) == ["test.npz"] * 2


def test_a_reference_that_is_typed_goes_before_whatever_reference_a_recipe_names(hqdm, fakes, tmp_path):
    fakes["score"].sources = score_stage.sources
    (tmp_path / "real.npz").write_bytes(b"images")
    recipe = tmp_path / "comparison.yaml"
    recipe.write_text("{model: model.ckpt, methods: [hqdm], score: {reference_path: real.npz}}")
    words = ("compare", "--from", str(recipe), "--json")
    read = json.loads(hqdm(*words)[1])
    assert read["about"]["options"]["score"] == {"reference_path": str(tmp_path / "real.npz")}
    typed = json.loads(hqdm(*words, "--reference", "digits")[1])
    assert typed["about"]["options"]["score"] == {"reference": "digits"}
    other = json.loads(hqdm(*words, "--reference", "sample/1")[1])
    assert not other["about"]["options"].get("score") and "--reference sample/0001" in other["cells"][1]["command"]
    for wrong, what in (("model/1", "reference: model/0001 holds no images"), ("nope", "reference: 'nope' is neither")):
        code, _, err = hqdm(*words, "--reference", wrong)
        assert code == 2 and what in err
    assert "hint: it takes digits, a folder or an archive of images, an .npz, or a sample artifact" in err


@pytest.mark.parametrize(
    ("words", "exits", "what"),
    [
        (("--seeds", "0,x"), 2, "--seeds '0,x' cannot be read"),
        (("--seeds", "-1"), 2, "--seeds '-1' cannot be read\nhint: write whole numbers of 0 or more"),
        (("--seeds", ""), 2, "--seeds '' names nothing"),
        (("--seeds", ","), 2, "--seeds ',' names nothing"),
        (("--bits", ","), 2, "--bits ',' names nothing"),
        (("--bits", "w4a4 w4a3"), 2, "hint: put commas between its words: --bits w4a4,w4a3"),
        (("--option", "batch=4"), 2, "--option 'batch=4' cannot be read"),
        (("--option", "distill.bach=4"), 2, "has no option 'bach'"),
        (("--option", "sample.count=2", "--option", "sample.count=3"), 2, "sample.count is given twice"),
        (("--count", "4", "--option", "sample.count=5"), 2, "--count 4 and --option sample.count=5"),
        (("--reference", ""), 2, "--reference '' names nothing"),
        (("--model", ""), 2, "--model '' names nothing"),
        (("--processes", "0", "--dry-run"), 2, "--processes cannot be 0"),
        (("--csv", "--dry-run"), 2, "--csv prints a table, and --dry-run makes none"),
        (("--model", "nowhere.ckpt"), 1, "--model nowhere.ckpt: neither a file or folder nor a model artifact"),
        ((), 1, "workspace holds no model to compare on"),
    ],
)
def test_what_is_typed_wrongly_is_named_with_a_way_out(hqdm, words, exits, what):
    code, _, err = hqdm("compare", "hqdm", *words)
    assert code == exits and "error: " in err and what in err and "hint: " in err


def test_a_model_is_a_file_or_an_artifact_and_never_mistaken_for_a_method(store, tmp_path):
    checkpoint(tmp_path, "other weights")
    other = model_of(store, str(tmp_path / "model.ckpt")).artifact
    assert (other.id, model_of(store, "model/1").artifact.id) == ("model/0002", "model/0001")
    assert model_of(store, None).artifact.id == "model/0002"
    with pytest.raises(FileFault):
        model_of(store, str(tmp_path / "elsewhere"))


def test_pictures_are_drawn_of_what_there_is(store, fakes, monkeypatch):
    monkeypatch.setattr(stage, "_draw", DRAW)
    with drawn():
        artifact = made(store, ("hqdm/paper:order=16", "hqdm/paper:order=32")).outcome.artifact
    pictures = {name for name in artifact.manifest["files"] if name.startswith("pictures/")}
    wanted = {f"pictures/{name}.png" for name in ("widths", "orders", "loss", "samples-w4a4", "samples-w4a3")}
    assert pictures == wanted  # no picture of weights: the fake model has none
    page = artifact.file("table.md").read_text()
    assert all(f"({name})" in page for name in wanted)
    assert all(artifact.file(name).read_bytes().startswith(b"\x89PNG") for name in wanted)


def test_losses_are_drawn_as_the_sampler_visits_timesteps_in_whatever_order_they_were_learned(
    store, fakes, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(stage, "_draw", DRAW)
    monkeypatch.setattr(comparison_pictures, "losses", lambda path, curves: drawn.update(curves))
    made(store, ["hqdm"], ["w4a4"])
    (curve, _) = drawn["w4a4"]["hqdm (usual)"]
    assert curve.tolist() == [[4.0, 1.0], [3.0, 0.5]]  # a row a trajectory, the last timestep last


def test_orders_are_drawn_only_where_methods_differ_in_nothing_else(store, fakes, tmp_path):
    table = table_of(made(store, ("hqdm/code:order=16", "hqdm/paper:order=32")))
    assert comparison_pictures.against_orders(tmp_path / "orders.png", table) is False
    assert not (tmp_path / "orders.png").exists()


def test_the_weights_picture_is_of_the_models_weights_and_their_rotation(tmp_path):
    import torch
    from tiny import tiny_denoiser

    from pipelines.models.denoiser import find_sites, save_denoiser
    from pipelines.quant.hadamard import rotate_weight
    from pipelines.quant.spec import Transform, site_to_dict

    store, denoiser = Store(tmp_path), tiny_denoiser(0)
    sites = find_sites(denoiser)
    with store.begin("model", "tiny", {}) as draft:
        save_denoiser(denoiser, draft.path)
        (draft.path / "sites.json").write_text(json.dumps([site_to_dict(site) for site in sites]))
        model = draft.commit({})
    layers = stage._weights(model)
    fit = [site for site in sites if not site.obstacle and site.channels % 2 == 0]
    assert len(layers) == len(fit) > 20
    weight = denoiser.network.get_submodule(fit[0].name).weight.detach()
    order = min(32, fit[0].channels & -fit[0].channels)
    rotated = rotate_weight(weight, Transform("channels", order)) / math.sqrt(order)
    assert layers[0]["peak_rotated"] == pytest.approx(
        (rotated.abs().max() / rotated.std(correction=0)).item(), rel=1e-4
    )
    assert layers[0]["peak"] == pytest.approx((weight.abs().max() / weight.std(correction=0)).item(), rel=1e-4)
    normal = stage._shape_of(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert normal["kurtosis"] == pytest.approx(3.0, abs=0.1)


def test_the_configuration_reads_back_from_its_manifest(store, fakes):
    fakes["distill"].fails_at = ("hqdm", "w4a4")
    artifact = made(store, ("hqdm",), ("w4a4",), (0,)).outcome.artifact
    cls = runner.stages.load("compare").Config
    assert to_dict(from_dict(cls, artifact.config, "manifest")) == artifact.config


# Side by side


class Heard(Report):
    def __init__(self):
        self.notes, self.ran = [], []

    def note(self, message):
        self.notes.append(message)

    def made(self, outcome):
        if outcome.ran:
            self.ran.append(outcome.stage)


def until(there, seconds=60):
    """Wait for a file that another process makes."""
    end = time.monotonic() + seconds
    while not there.exists():
        assert time.monotonic() < end, f"{there} did not come"
        time.sleep(0.01)


def test_processes_that_compare_in_one_workspace_divide_the_cells_and_make_none_twice(tmp_path, fakes, monkeypatch):
    """From nothing: the model, the profile and the teacher's images are made once as well."""
    monkeypatch.setattr("pipelines.comparison.run.WAIT", 0.01)
    store, path = Store(tmp_path / "ws"), str(checkpoint(tmp_path))
    run = fakes["distill"].run
    fakes["distill"].run = lambda *given: time.sleep(0.2) or run(*given)
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                until(tmp_path / "go")
                heard = Heard()
                model = model_of(store, path, heard).artifact
                result = compare(store, asked(), model, heard)
                made = heard.ran.count("distill")
                aside = sum(note.endswith("is put aside") for note in heard.notes)
                (tmp_path / f"child-{child}").write_text(f"{made} {aside} {len(heard.notes)} {len(result.failed)}")
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    (tmp_path / "go").touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 3
    told = [[int(word) for word in (tmp_path / f"child-{child}").read_text().split()] for child in range(3)]
    made, aside, notes, failed = zip(*told, strict=True)
    assert sum(made) == 8 and sum(map(bool, made)) >= 2 and sum(aside) >= 1 and not any(failed)
    assert max(notes) < 200  # who waits says so once
    assert len({artifact.key for artifact in store.artifacts()}) == len(store.artifacts())
    assert len(store.artifacts("distill")) == 8 and len(store.artifacts("compare")) == 1 and not store.drafts()
    before = ids(store)
    table = table_of(compare(store, asked(), store.current("model")))
    assert ids(store) == before and len(table["cells"]) == 10 and table["failed"] == []


def test_the_cell_of_a_process_that_is_killed_is_gone_on_with_by_another(store, fakes, monkeypatch):
    monkeypatch.setattr("pipelines.comparison.run.WAIT", 0.05)
    work, ready = asked(("hqdm",), ("w4a4",), (0, 1)), store.root.parent / "ready"
    pid = os.fork()
    if pid == 0:

        def killed(config, inputs, out, report):
            (out.work / "1").write_text("done")
            ready.touch()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

        fakes["distill"].run = killed
        try:
            compare(store, work, store.current("model"))
        finally:
            os._exit(1)
    until(ready)
    heard = Heard()
    result = compare(store, work, store.current("model"), heard)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    what = f"process {pid} is making the same distill artifact in {store.root}"
    assert f"{what}: hqdm w4a4 seed 0 is put aside" in heard.notes
    assert any(note.startswith("distill: goes on") for note in heard.notes)
    assert not result.failed and not store.drafts() and len(store.artifacts("distill")) == 2


def test_students_are_made_while_another_process_draws_their_teachers_images(store, fakes, monkeypatch):
    monkeypatch.setattr("pipelines.comparison.run.WAIT", 0.01)
    make, times = runner.make, iter(range(2))

    def at_it(store, stage, config, chosen, report, force=False, dry_run=False):
        if stage == "sample" and config.source == "teacher" and config.seed == 0 and not dry_run:
            if next(times, None) is not None:
                raise Busy("process 7 is making the same sample artifact in ws")
        return make(store, stage, config, chosen, report, force, dry_run)

    monkeypatch.setattr(runner, "make", at_it)
    heard = Heard()
    result = compare(store, asked(("hqdm",), ("w4a4",)), store.current("model"), heard)
    aside = [note for note in heard.notes if note.endswith("is put aside")]
    assert aside == [
        "process 7 is making the same sample artifact in ws: teacher seed 0 is put aside",
        "the teacher's images of seed 0 are still made: hqdm w4a4 seed 0 is put aside",
        "process 7 is making the same sample artifact in ws: teacher seed 0 is put aside",
        "the teacher's images of seed 0 are still made: hqdm w4a4 seed 0 is put aside",
    ]
    assert not result.failed and all(cell.ended for cell in result.cells)


def test_what_was_made_again_by_force_is_not_made_once_more_after_it_was_put_aside(store, fakes, monkeypatch):
    monkeypatch.setattr("pipelines.comparison.run.WAIT", 0.01)
    made(store, ("hqdm",), ("w4a4",), (0,))
    make, times = runner.make, iter(range(3))

    def at_it(store, stage, *given, **options):
        if stage == "distill" and next(times, None) is not None:
            raise Busy("process 7 is making the same distill artifact in ws")
        return make(store, stage, *given, **options)

    monkeypatch.setattr(runner, "make", at_it)
    work = asked(("hqdm",), ("w4a4",), (0,))
    assert not compare(store, work, store.current("model"), force=True).failed
    assert [len(store.artifacts(name)) for name in ("plan", "distill", "export")] == [2, 2, 2]
