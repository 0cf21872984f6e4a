"""The command line: help at once, data on stdout, everything else on stderr, and errors with a way out."""

import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from fake_stages import ROAD

from hqdm_cli.app import main
from hqdm_cli.console import duration
from pipelines.methods import METHODS, find
from pipelines.methods.base import Option
from pipelines.plans import Recipe

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "profile", "plan", "distill", "export", "sample", "score", "compare", "run", "status", "show", "verify", "gc",
    "methods", "report", "reproduce", "bench", "doctor",
)  # fmt: skip


def test_every_command_is_in_the_help_with_a_summary_that_is_not_cut(hqdm):
    code, out, err = hqdm("--help")
    assert code == 0 and err == ""
    for command in COMMANDS:
        assert f"\n  {command} " in out
    assert "..." not in out.split("Commands:")[1]
    assert hqdm()[1] == out == hqdm("-h")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_of_its_own_command(hqdm, command):
    code, out, _ = hqdm(command, "--help")
    examples = [line.strip() for line in out.split("Example:\n")[1].strip().splitlines()]
    assert code == 0 and examples
    assert all(line.split()[:2] == ["hqdm", command] for line in examples)
    assert "--debug" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_every_example_exist(hqdm, command):
    out = hqdm(command, "--help")[1]
    options, examples = out.split("Example:\n")
    for word in examples.split():
        if word.startswith("--"):
            assert f"{word} " in options


def test_help_and_usage_errors_never_import_torch_numpy_or_rich():
    code = (
        "import sys; from hqdm_cli.app import main; main(['plan', '--help']); main(['plam'])\n"
        "sys.exit(bool({'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_status_show_and_verify_never_import_torch(tmp_path):
    for words in (["status"], ["show", "plan"], ["verify"]):
        code = f"import sys; from hqdm_cli.app import main; main({words}); sys.exit('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_python_m_hqdm_cli_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "hqdm_cli", "plam"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No such command 'plam'. Did you mean 'plan'?\nhint: hqdm --help\n"


def test_the_six_commands_go_the_whole_road_and_each_names_the_next(hqdm):
    typed = [("profile", "model.ckpt"), *ROAD]
    following = ["hqdm plan", "hqdm distill --bits w4a4", "hqdm export --format int", "hqdm sample", "hqdm score"]
    for words, command in zip(typed, [*following, "hqdm report"], strict=True):
        code, out, err = hqdm(*words)
        assert code == 0
        assert out.splitlines()[-1] == f"{words[0]}/0001\tworkspace/{words[0]}/0001"
        assert err.splitlines()[-1] == f"next: {command}"
        assert f"{words[0]}: runs: none yet" in err.splitlines()


def test_a_second_time_everything_is_up_to_date_and_says_why(road):
    for words in (("profile", "model.ckpt"), *ROAD):
        code, out, err = road(*words)
        name = words[0]
        assert code == 0 and out.splitlines()[-1].startswith(f"{name}/0001\t")
        assert f"{name}: up to date: {name}/0001 has the same configuration, inputs and stage version" in err
    assert road("plan", "--force")[1].startswith("plan/0002\t")


def test_the_workspace_is_an_option_or_an_environment_variable(hqdm, monkeypatch):
    code, out, err = hqdm("profile", "model.ckpt", "-w", "else where")
    assert out.splitlines()[0] == "model/0001\telse where/model/0001"
    assert err.splitlines()[-1] == "next: hqdm plan -w 'else where'"
    monkeypatch.setenv("HQDM_WORKSPACE", "else where")
    code, out, err = hqdm("plan")
    assert (code, out) == (0, "plan/0001\telse where/plan/0001\n")
    assert err.splitlines()[-1] == "next: hqdm distill --bits w4a4"


def test_json_is_all_there_is_on_stdout(road):
    for words in (("plan", "--bits", "w3a3"), ("plan",), ("sample", "teacher", "fake"), ("score",)):
        outcomes = json.loads(road(*words, "--json")[1])
        assert all(outcome["id"] and outcome["config"] and outcome["reason"] for outcome in outcomes)
    assert json.loads(road("status", "--json")[1])["artifacts"][0]["artifact"] == "model/0001"
    assert json.loads(road("show", "plan/2", "--json")[1])["config"]["bits"] == "w3a3"
    assert json.loads(road("verify", "--json")[1])["plan/0002"] == []


def test_a_dry_run_prints_the_configuration_and_the_reason_and_makes_nothing(hqdm, tmp_path):
    code, out, err = hqdm("profile", "model.ckpt", "--dry-run")
    assert code == 0 and out.startswith("# model: runs: none yet\nmodel:\n  path: ")
    assert "profile: would run (its input model will be made first)" in err
    assert not (tmp_path / "workspace").exists()
    hqdm("profile", "model.ckpt")
    code, out, err = hqdm("distill", "--bits", "w3a3", "--trajectories", "7", "--dry-run")
    assert "bits: w3a3" in out and "distill: would run (its input plan will be made first)" in err


def test_distill_takes_the_newest_plan_if_it_fits_and_else_makes_the_one_asked_for(road):
    road("plan", "--bits", "w3a3", "--method", "efficientdm")
    assert "distill/0002" in road("distill", "--bits", "w3a3")[1]
    assert json.loads(road("show", "distill/2", "--json")[1])["inputs"]["plan"]["id"] == "plan/0002"
    err = road("distill", "--bits", "w8a8")[2]
    assert "plan: runs: configuration changed since plan/0001: bits w4a4 -> w8a8" in err
    assert json.loads(road("show", "distill", "--json")[1])["inputs"]["plan"]["id"] == "plan/0003"
    assert road("distill", "--plan", "plan/1")[1].startswith("distill/0001\t")


def test_plan_auto_is_the_search_and_takes_no_other_method(road):
    road("distill", "--plan", "auto", "--bits", "w3a3")
    plan = json.loads(road("show", "plan", "--json")[1])["config"]
    assert (plan["method"], plan["variant"], plan["bits"]) == ("hqdm", "auto", "w3a3")
    code, _, err = road("distill", "--plan", "auto", "--method", "efficientdm")
    assert code == 2 and "--plan auto is method hqdm, not efficientdm" in err and "leave out --method" in err


def test_a_hand_edited_plan_is_taken_in_and_distilled(road, tmp_path):
    edited = tmp_path / "edited.yaml"
    edited.write_text("{method: hqdm, variant: paper, bits: w3a3}")
    assert road("plan", "--from", "edited.yaml")[1].startswith("plan/0002\t")
    assert not json.loads(road("plan", "--from", "edited.yaml", "--json")[1])[0]["ran"]
    assert json.loads(road("show", "plan", "--json")[1])["config"]["bits"] == "w3a3"
    edited.write_text("{method: hqdm, variant: paper, bits: w4a3}")
    assert road("distill", "--plan", "edited.yaml")[0] == 0
    assert json.loads(road("show", "distill", "--json")[1])["inputs"]["plan"]["id"] == "plan/0003"


def test_an_edited_plan_and_options_that_it_decides_are_not_mixed(road, tmp_path):
    (tmp_path / "edited.yaml").write_text("{method: hqdm, variant: paper, bits: w3a3}")
    assert road("plan", "--from", "edited.yaml", "--bits", "w4a4") == (
        2, "", "error: --from edited.yaml says the bits already\nhint: leave out --bits\n",
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("model: model.ckpt\nplan: {edited: edited.yaml, bits: w4a4}\n")
    assert "plan: edited says the bits already" in road("run", "recipe.yaml")[2]


def test_what_an_edited_plan_decides_is_named_as_it_was_typed(hqdm):
    hint = "hint: leave out --bits and --set\n"
    assert hint in hqdm("plan", "--from", "mine.yaml", "--bits", "w4a4", "--set", "order=16")[2]
    assert hint in hqdm("distill", "--plan", "plan/1", "--bits", "w4a4", "--set", "order=16")[2]


def test_an_option_given_twice_is_refused(hqdm):
    code, _, err = hqdm("plan", "--set", "order=16", "--set", "order=32")
    assert code == 2 and "--set order is given twice, 16 and 32" in err


@pytest.mark.parametrize("command", ["plan", "distill"])
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--method", "hqmd"), "method 'hqmd' does not exist"),
        (("--variant", "papre"), "has no variant 'papre'"),
        (("--bits", "w5a4"), "not supported"),
        (("--set", "order=16"), "option order belongs to the variants paper, code"),
        (("--variant", "paper", "--set", "order=33"), "option order cannot be '33'"),
        (("--variant", "auto", "--set", "budget=nan"), "option budget cannot be 'nan'"),
    ],
)
def test_a_dry_run_refuses_what_the_real_one_would(tmp_path, monkeypatch, capsys, command, words, what):
    monkeypatch.chdir(tmp_path)
    code = main([command, *words, "--dry-run"])
    err = capsys.readouterr().err
    assert code == 2 and what in err and "hint: " in err


@pytest.mark.parametrize("word", ["typo.yaml", "plans/typo", "./typo"])
def test_a_plan_file_that_is_not_there_is_called_a_file_and_no_artifact(road, tmp_path, word):
    missing = f"error: {tmp_path / word} does not exist\nhint: check the path\n"
    assert road("distill", "--plan", word) == (1, "", missing)
    assert "there is no artifact 'plna/3'" in road("distill", "--plan", "plna/3")[2]


def test_sample_from_one_artifact_takes_for_each_source_what_that_was_made_of(road):
    road("distill", "--trajectories", "9")
    road("export")
    assert road("sample", "teacher", "fake", "int", "--from", "export/1")[0] == 0
    made = [json.loads(road("show", f"sample/{number}", "--json")[1])["inputs"] for number in (2, 3, 1)]
    assert [inputs["source"]["id"] for inputs in made] == ["model/0001", "distill/0001", "export/0001"]


def test_sample_refuses_a_source_before_it_draws_from_another(road):
    before = road("status")[1]
    code, _, err = road("sample", "teacher", "int", "--count", "9", "--from", "distill/1")
    assert code == 1 and "distill/0001 was made without any export artifact" in err
    assert road("status")[1] == before


def test_sample_makes_one_artifact_for_each_source(road):
    out = road("sample", "teacher", "fake", "int", "--count", "9")[1]
    assert [line.split("\t")[0] for line in out.splitlines()] == ["sample/0002", "sample/0003", "sample/0004"]


def test_score_without_a_word_scores_all_samples_of_the_newest_student(road):
    road("sample", "teacher", "fake")
    out = road("score")[1]
    assert [line.split("\t")[0] for line in out.splitlines()] == ["score/0001", "score/0002", "score/0003"]


def test_a_recipe_runs_the_road(hqdm, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: model.ckpt\nprofile:\nplan: {bits: w4a3}\ndistill:\n")
    code, out, err = hqdm("run", "recipe.yaml")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        "model/0001", "profile/0001", "plan/0001", "distill/0001",
    ]  # fmt: skip
    assert err.splitlines()[-1] == "next: hqdm export --format int"


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("plam",), 2, "error: No such command 'plam'. Did you mean 'plan'?\nhint: hqdm --help\n"),
        (
            ("plan", "--bitz", "w4a4"),
            2,
            "error: No such option: --bitz (Possible options: --bits)\nhint: hqdm plan --help\n",
        ),
        (("profile",), 2, "error: Missing argument 'MODEL'.\nhint: hqdm profile --help\n"),
        (("sample", "tacher"), 2, "error: there is no source 'tacher'\nhint: did you mean 'teacher'?\n"),
        (
            ("show", "plan/9"),
            2,
            "error: there is no artifact 'plan/9': workspace holds none\nhint: hqdm profile model.ckpt\n",
        ),
        (("plan", "--xyz", "3"), 2, "error: No such option: --xyz\nhint: hqdm plan --help\n"),
        (
            ("export", "--from", "plan"),
            2,
            "error: there is no artifact 'plan': workspace holds none\nhint: hqdm profile model.ckpt\n",
        ),
        (("plan",), 1, "error: there is no profile yet\nhint: hqdm profile\n"),
        (
            ("score",),
            1,
            "error: workspace has no samples to score\nhint: hqdm sample, or name images: hqdm score samples/\n",
        ),
        (("run", "none.yaml"), 1, "error: none.yaml does not exist\nhint: check the path\n"),
        (
            ("methods", "hqdm/paper"),
            2,
            "error: hqdm methods takes a method's name alone, and 'hqdm/paper' says more\n"
            "hint: hqdm methods hqdm tells of all its variants and options\n",
        ),
        (("report", "--format", "cvs"), 2, "error: there is no format 'cvs'\nhint: did you mean 'csv'?\n"),
    ],
)
def test_an_error_is_one_line_with_a_hint_and_stdout_stays_empty(hqdm, monkeypatch, words, code, expected):
    for name, offered in (("table", ("collect", "speed_up", "equal_images")), ("grids", ("side_by_side",))):
        module = types.ModuleType(f"pipelines.report.{name}")
        for function in offered:
            setattr(module, function, lambda store: [])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert hqdm(*words) == (code, "", expected)


def test_debug_shows_the_traceback_before_the_error(hqdm):
    code, out, err = hqdm("plan", "--debug")
    assert code == 1 and out == ""
    assert err.startswith("Traceback") and err.endswith("error: there is no profile yet\nhint: hqdm profile\n")


def test_an_error_of_the_system_is_named_without_a_traceback(hqdm, fakes):
    def full(config, inputs, out, report):
        raise OSError(28, "No space left on device", "weights.safetensors")

    fakes["model"].run = full
    code, out, err = hqdm("profile", "model.ckpt")
    assert (code, out) == (1, "")
    assert "error: weights.safetensors: No space left on device\nhint: " in err and "Traceback" not in err


@pytest.mark.parametrize("fault", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate it"),
], ids=["Python's", "torch's"])  # fmt: skip
def test_memory_that_is_not_enough_is_named_with_the_way_out(hqdm, fakes, fault):
    def full(config, inputs, out, report):
        raise fault

    fakes["profile"].run = full
    code, _, err = hqdm("profile", "model.ckpt")
    assert code == 1 and "error: out of memory" in err and "smaller --batch" in err and "Traceback" not in err


def test_a_fault_of_the_program_is_not_hidden(hqdm, fakes):
    fakes["model"].run = lambda *args: {}["missing"]
    with pytest.raises(KeyError):
        hqdm("profile", "model.ckpt")


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(hqdm, fakes):
    fakes["model"].interrupt_at = 2
    code, out, err = hqdm("profile", "model.ckpt", "--force")
    assert (code, out) == (130, "")
    assert err.endswith(
        "error: interrupted\nhint: what was done is kept; the same command goes on: hqdm profile model.ckpt\n"
    )
    assert "unfinished: a run of model" in hqdm("status")[2]
    fakes["model"].interrupt_at = None
    assert "model: goes on: an interrupted run with this configuration is there" in hqdm("profile", "model.ckpt")[2]


def test_status_lists_what_is_stale_and_why(road, fakes):
    fakes["plan"].VERSION = 2
    code, out, err = road("status")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and lines["profile/0001"].endswith("current")
    assert lines["plan/0001"].endswith("stage version changed: 1 -> 2")
    assert lines["distill/0001"].endswith("input plan is stale: plan/0001")
    assert err == "next: hqdm plan --method hqdm --variant ours --bits w4a4\n"


def test_show_prints_what_a_person_asks_of_an_artifact(road):
    out = road("show", "distill")[1]
    for word in ("artifact: distill/0001", "state: current", "plan: plan/0001", "trajectories: 4", "result.txt"):
        assert word in out


def test_verify_names_a_damaged_file_and_fails(road, tmp_path):
    assert road("verify", "plan") == (0, "plan/0001\tas it was written\n", "")
    (tmp_path / "workspace/plan/0001/result.txt").unlink()
    code, out, err = road("verify")
    assert code == 1 and "plan/0001\tresult.txt is missing\n" in out
    assert err.startswith("error: 1 of 7 artifacts are damaged: plan/0001\nhint: ")


def test_methods_and_report_print_what_the_engine_has(hqdm, monkeypatch, tmp_path):
    method = types.SimpleNamespace(summary="rotates", source="a paper", default_variant="ours", variants={})
    order = Option(32, "of the matrix", (16, 32), ("paper",))
    best, share = Option(True, "the best or all"), Option(0.5, "of the bytes", least=0, most=1)
    method.options = {"order": order, "best": best, "share": share}
    method.variants = {
        name: types.SimpleNamespace(summary=line, recipe=Recipe())
        for name, line in (("ours", "signs"), ("paper", "width"))
    }
    table, grids = types.ModuleType("pipelines.report.table"), types.ModuleType("pipelines.report.grids")
    table.collect = lambda store: [
        {"source": "teacher", "fid": 1.23456789},
        {"source": "int", "fid": 2.5, "psnr": 30.0},
    ]
    table.speed_up = lambda store: "integers are faster"
    table.equal_images = lambda store: [("sample/0002", "sample/0003")]
    grids.side_by_side = lambda store, path: Path(path).write_text("picture")
    monkeypatch.setitem(sys.modules, "pipelines.methods", types.ModuleType("pipelines.methods"))
    fake = sys.modules["pipelines.methods"]
    fake.METHODS, fake.find, fake.text_of = {"hqdm": method}, lambda *_: (method,), lambda _: "equations"
    monkeypatch.setitem(sys.modules, table.__name__, table)
    monkeypatch.setitem(sys.modules, grids.__name__, grids)
    assert hqdm("methods")[1].splitlines() == [
        "hqdm: rotates", "  source: a paper", "  --variant ours   signs (default)", "  --variant paper  width",
        "  --set order=32   of the matrix (16, 32; variant paper)", "  --set best=true  the best or all",
        "  --set share=0.5  of the bytes (0 … 1)",
    ]  # fmt: skip
    listed = json.loads(hqdm("methods", "--json")[1])["hqdm"]
    assert listed["variants"]["ours"] == "signs"
    free = {"least": None, "above": None, "most": None}
    order = {"default": 32, "summary": "of the matrix", "choices": [16, 32], "variants": ["paper"]}
    assert listed["options"]["order"] == order | free
    assert listed["options"]["share"]["variants"] == ["ours", "paper"] and listed["options"]["share"]["most"] == 1
    assert hqdm("report")[1] == "source      fid  psnr\nteacher  1.2346\nint         2.5    30\n"
    assert hqdm("report", "--format", "markdown")[1].splitlines()[2] == "| teacher | 1.2346 |  |"
    assert hqdm("report", "--format", "csv")[1].splitlines()[1] == "teacher,1.23456789,"
    assert json.loads(hqdm("report", "--json")[1])[1]["psnr"] == 30.0
    assert "\nwrote out.png\n" in hqdm("report", "--picture", "out.png")[2] and (tmp_path / "out.png").exists()


def test_a_method_that_is_named_is_told_with_its_equations_and_what_its_recipes_set(hqdm):
    code, out, _ = hqdm("methods", "quest", "hqdm")
    quest, rotating = out.split("\n\nhqdm: ")
    assert code == 0 and "min Σ_t ‖ε̂(x_t, t) − ε(x_t, t)‖²" in quest and "W₀ + BA" in rotating
    lines = quest.splitlines()
    at = lines.index("recipe of published: the defaults, but")
    assert "  --set 'recipe.trains=[weights,biases,activation_scales]'" in lines[at:]
    assert "recipe.lora_rate_divisor=10.0  (30 at 2 bits of weights, 20 at 3 bits of weights)" in rotating
    assert "\nrecipe of code: " in rotating
    listed = json.loads(hqdm("methods", "dmq", "--json")[1])
    assert list(listed) == ["dmq"] and listed["dmq"]["recipes"]["scaling"]["updates"] == "none"
    assert "LES" in listed["dmq"]["text"]
    code, _, err = hqdm("methods", "hadanom")
    assert code == 2 and "did you mean 'hadanorm'?" in err


def test_what_methods_says_of_a_recipe_can_be_typed_as_it_stands(hqdm):
    """Every `--set recipe.…` line of every variant, given to that variant, is the recipe that it has."""
    for name, method in METHODS.items():
        for block in hqdm("methods", name)[1].split("\nrecipe of ")[1:]:
            variant = block.partition(":")[0]
            typed = [shlex.split(line)[1] for line in block.splitlines()[1:] if "--set" in line]
            words = (word.partition("=") for word in typed)
            given = {key: value for key, _, value in words}
            assert find(name, variant, given)[2].recipe == method.variants[variant].recipe


def test_a_reader_that_leaves_early_is_no_error(road, tmp_path):
    code = "from hqdm_cli.app import main; import sys; sys.exit(main(['show', 'plan', '--json']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.close()
    assert child.stderr.read() == b""
    child.wait()


def test_times_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (7, 185, 3723)] == ["7 s", "3:05", "1:02:03"]
