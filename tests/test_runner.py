"""The runner: nothing is computed twice, and every run or skip has its reason."""

import pytest
import yaml
from fake_stages import checkpoint as weights
from fake_stages import install

from pipelines import runner
from pipelines.config import read_yaml
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.events import Report
from pipelines.workspace.artifacts import links
from pipelines.workspace.store import Store

ROAD = ("profile", "plan", "distill", "export", "sample", "score")


def checkpoint(tmp_path, text="weights"):
    """A checkpoint and its configuration."""
    (tmp_path / "model.yaml").write_text("unet_config: 0")
    return weights(tmp_path, text)


class Notes(Report):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


@pytest.fixture
def fakes(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def store(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    runner.make(store, "model", runner.model_config(checkpoint(tmp_path)))
    return store


def make(store, fakes, stage, chosen=None, force=False, dry_run=False, **options):
    return runner.make(store, stage, fakes[stage].Config(**options), chosen or {}, Report(), force, dry_run)


def make_road(store, fakes):
    return [make(store, fakes, stage) for stage in ROAD]


def test_the_first_run_says_so_and_the_second_is_up_to_date(store, fakes):
    first = make(store, fakes, "profile")
    assert (first.ran, first.reason, first.artifact.id) == (True, "runs: none yet", "profile/0001")
    second = make(store, fakes, "profile")
    assert not second.ran and second.artifact == first.artifact
    assert second.reason == "up to date: profile/0001 has the same configuration, inputs and stage version"


def test_the_reason_is_told_before_the_run(store, fakes):
    notes = Notes()
    runner.make(store, "profile", fakes["profile"].Config(), {}, notes)
    runner.make(store, "profile", fakes["profile"].Config(), {}, notes)
    runner.make(store, "profile", fakes["profile"].Config(steps=3), {}, notes, dry_run=True)
    assert notes.lines == [
        "profile: runs: none yet",
        "profile: up to date: profile/0001 has the same configuration, inputs and stage version",
        "profile: would run (runs: configuration changed since profile/0001: steps 20 -> 3)",
    ]


def test_a_changed_configuration_is_named_value_by_value(store, fakes):
    make(store, fakes, "profile")
    make(store, fakes, "plan")
    outcome = make(store, fakes, "plan", bits="w3a3")
    assert outcome.reason == "runs: configuration changed since plan/0001: bits w4a4 -> w3a3"


def test_the_reason_compares_with_the_artifact_most_alike(store, fakes):
    make_road(store, fakes)
    make(store, fakes, "sample", source="teacher")
    outcome = make(store, fakes, "sample", count=9)
    assert outcome.reason == "runs: configuration changed since sample/0001: count 8 -> 9"


def test_a_changed_input_is_named(store, fakes):
    make(store, fakes, "profile")
    make(store, fakes, "plan")
    make(store, fakes, "distill")
    make(store, fakes, "plan", bits="w3a3")
    assert make(store, fakes, "distill").reason == "runs: input plan changed (plan/0001 -> plan/0002)"
    assert make(store, fakes, "distill", chosen={"plan": "plan/1"}).artifact.id == "distill/0001"


def test_an_input_made_again_with_equal_content_changes_nothing(store, fakes):
    make(store, fakes, "profile")
    make(store, fakes, "plan")
    forced = make(store, fakes, "profile", force=True)
    assert forced.artifact.id == "profile/0002" and forced.reason == "runs: forced"
    assert not make(store, fakes, "plan").ran


def test_a_new_stage_version_runs_again(store, fakes):
    make(store, fakes, "profile")
    fakes["profile"].VERSION = 2
    assert make(store, fakes, "profile").reason == "runs: stage version changed since profile/0001: 1 -> 2"


def test_a_damaged_artifact_is_made_again_and_its_heirs_stay_up_to_date(store, fakes):
    first = make(store, fakes, "profile").artifact
    make(store, fakes, "plan")
    (first.path / "result.txt").write_text("other")
    again = make(store, fakes, "profile")
    assert again.reason.startswith("runs: profile/0001 is damaged (result.txt is cut: 5 of ")
    assert again.artifact.digest == first.digest
    assert not make(store, fakes, "plan").ran


def test_a_damaged_input_stops_the_run_and_is_named(store, fakes):
    profile = make(store, fakes, "profile").artifact
    (profile.path / "result.txt").unlink()
    with pytest.raises(FileFault, match="result.txt is missing") as fault:
        make(store, fakes, "plan")
    assert str(profile.path) in fault.value.what


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(store, fakes, tmp_path):
    fakes["profile"].interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        make(store, fakes, "profile")
    fakes["profile"].interrupt_at = None
    outcome = make(store, fakes, "profile")
    assert outcome.reason == "goes on: an interrupted run with this configuration is there"
    assert outcome.artifact.figures["resumed"] is True
    assert outcome.artifact.digest == make(store, fakes, "profile", force=True).artifact.digest


def test_an_interrupted_forced_run_goes_on_without_force(store, fakes):
    make(store, fakes, "profile")
    fakes["profile"].interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        make(store, fakes, "profile", force=True)
    fakes["profile"].interrupt_at = None
    assert make(store, fakes, "profile").artifact.id == "profile/0002"
    assert make(store, fakes, "profile").reason.startswith("up to date: profile/0002")


def test_what_another_process_has_made_meanwhile_is_taken_and_not_made_again(store, fakes, monkeypatch):
    begin = Store.begin

    def overtaken(self, *asked, **options):
        monkeypatch.setattr(Store, "begin", begin)
        make(Store(self.root), fakes, "profile")
        return begin(self, *asked, **options)

    monkeypatch.setattr(Store, "begin", overtaken)
    outcome = make(store, fakes, "profile")
    assert not outcome.ran and outcome.reason == "up to date: another process has just made profile/0001"


def test_what_was_there_is_taken_where_another_process_only_found_it_too(store, fakes, monkeypatch):
    """One that begins finds the artifact and drops its draft; until then it seems to be making it."""
    made = make(store, fakes, "profile").artifact
    monkeypatch.setattr(Store, "owner", lambda *asked: "4711")
    outcome = make(store, fakes, "profile")
    assert not outcome.ran and outcome.artifact.id == made.id and len(store.artifacts("profile")) == 1
    assert [artifact.id for artifact in store.artifacts("profile")] == ["profile/0001"] and not store.drafts()


def test_a_dry_run_leaves_nothing_behind(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    config = runner.model_config(checkpoint(tmp_path))
    outcome = runner.make(store, "model", config, dry_run=True)
    assert outcome.artifact is None and not outcome.ran and outcome.config["path"].endswith("model.ckpt")
    assert not (tmp_path / "ws").exists()


def test_the_model_is_known_by_its_content_and_its_yaml_is_found_beside_it(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    path = checkpoint(tmp_path)
    runner.make(store, "model", runner.model_config(path))
    moved = path.rename(tmp_path / "moved.ckpt")
    assert not runner.make(store, "model", runner.model_config(moved)).ran
    (tmp_path / "moved.yaml").write_text("a: 1")
    assert runner.model_config(moved).config_path == str(tmp_path / "moved.yaml")
    with pytest.raises(FileFault):
        runner.model_config(path)


def test_the_only_yaml_in_the_folder_belongs_to_the_run_as_one_of_the_same_name_does(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    path = weights(tmp_path)
    assert runner.model_config(path).config_path is None
    (tmp_path / "docker-compose.yaml").write_text("services: {}")
    (tmp_path / "cin.yaml").write_text("unet_config: 1")
    assert runner.model_config(path).config_path == str(tmp_path / "cin.yaml")
    runner.make(store, "model", runner.model_config(path))
    (tmp_path / "cin.yaml").write_text("unet_config: 2")
    assert "config_sha256" in runner.make(store, "model", runner.model_config(path)).reason


def test_an_edited_plan_is_recorded_with_its_own_method_variant_and_bits(tmp_path, fakes):
    path = tmp_path / "mine.yaml"
    path.write_text("{method: efficientdm, variant: paper, bits: w3a3}")
    config = runner.edited_plan(path)
    assert (config.method, config.variant, config.bits) == ("efficientdm", "paper", "w3a3")
    checkpoint(tmp_path)
    recipe = {"model": "model.ckpt", "profile": None, "plan": {"edited": "mine.yaml"}}
    assert list(runner.run_recipe(Store(tmp_path / "ws"), recipe, base=tmp_path))[-1].config["bits"] == "w3a3"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{method: hqdm, variant: ours}", "the key 'bits' is missing"),
        ("{method: hqdm, variant: ours, bits: 4}", "bits cannot be 4"),
        ("{method: hqdm, variant: ours, bits: w5}", "bits 'w5' cannot be read"),
        ("- 1", "not a mapping"),
    ],
)
def test_an_edited_plan_that_cannot_be_read_is_refused_before_the_stage(tmp_path, fakes, text, what):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(HqdmError, match=what) as fault:
        runner.edited_plan(tmp_path / "mine.yaml")
    assert fault.value.hint


def test_nothing_is_stale_after_the_whole_road(store, fakes):
    make_road(store, fakes)
    assert set(runner.stale(store).values()) == {None} and len(runner.stale(store)) == 7


def test_another_configuration_makes_nothing_stale(store, fakes):
    make_road(store, fakes)
    make(store, fakes, "plan", bits="w3a3")
    assert set(runner.stale(store).values()) == {None}


def test_a_newer_version_of_an_input_makes_its_heirs_stale(store, fakes, tmp_path):
    make_road(store, fakes)
    runner.make(store, "model", runner.model_config(checkpoint(tmp_path, "other weights")))
    reasons = runner.stale(store)
    assert reasons["model/0001"] == "replaced by model/0002"
    assert reasons["profile/0001"] == "input model has a newer version (model/0001 -> model/0002)"
    assert reasons["plan/0001"] == "input profile is stale: profile/0001"
    assert reasons["model/0002"] is None


def test_a_stage_version_and_a_changed_file_make_stale(store, fakes):
    make_road(store, fakes)
    fakes["export"].VERSION = 2
    (store.get("plan").path / "result.txt").unlink()
    reasons = runner.stale(store)
    assert reasons["export/0001"] == "stage version changed: 1 -> 2"
    assert reasons["plan/0001"] == "result.txt is missing"
    assert reasons["distill/0001"] == "input plan is stale: plan/0001"


def test_the_next_command_follows_the_road(tmp_path, fakes):
    store = Store(tmp_path / "ws")
    assert runner.next_command(store) == "hqdm profile model.ckpt"
    path = checkpoint(tmp_path)
    runner.make(store, "model", runner.model_config(path))
    commands = [
        f"hqdm profile {path}",
        "hqdm plan",
        "hqdm distill --bits w4a4",
        "hqdm export --format int",
        "hqdm sample",
    ]
    for stage, command in zip(ROAD, [*commands, "hqdm score"], strict=True):
        assert runner.next_command(store) == command
        make(store, fakes, stage)
    assert runner.next_command(store) == "hqdm report"
    make(store, fakes, "plan", bits="w3a3")
    assert runner.next_command(store) == "hqdm distill --bits w3a3"
    fakes["plan"].VERSION = 2
    assert runner.next_command(store) == "hqdm plan --method hqdm --variant ours --bits w3a3"


def test_the_samples_that_belong_together_are_those_of_one_student_and_its_teacher(store, fakes):
    for stage in ("profile", "plan", "distill", "export"):
        make(store, fakes, stage)
    for source in ("teacher", "fake", "int"):
        make(store, fakes, "sample", source=source)
    ids = [sample.id for sample in runner.samples_of_current_lineage(store)]
    assert ids == ["sample/0001", "sample/0002", "sample/0003"]
    make(store, fakes, "distill", trajectories=9)
    make(store, fakes, "export")
    make(store, fakes, "sample")
    make(store, fakes, "sample", force=True)
    ids = [sample.id for sample in runner.samples_of_current_lineage(store)]
    assert ids == ["sample/0001", "sample/0005"]


RECIPE = """
model: model.ckpt
seed: 5
profile:
plan: {bits: w4a3}
distill: {trajectories: 2}
export: null
sample: [{source: teacher}, {source: int, seed: 7}]
score: {reference: digits}
"""


def test_a_recipe_makes_the_whole_road_and_nothing_twice(tmp_path, fakes):
    checkpoint(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    store = Store(tmp_path / "ws")
    recipe = read_yaml(tmp_path / "recipe.yaml")
    outcomes = list(runner.run_recipe(store, recipe, base=tmp_path))
    made = ["model", "profile", "plan", "distill", "export", "sample", "sample", "score", "score"]
    assert [outcome.stage for outcome in outcomes] == made and all(outcome.ran for outcome in outcomes)
    assert store.get("plan").config["bits"] == "w4a3" and store.get("distill").config["seed"] == 5
    assert [sample.config["seed"] for sample in store.artifacts("sample")] == [5, 7]
    assert [score.inputs["samples"]["id"] for score in store.artifacts("score")] == ["sample/0001", "sample/0002"]
    assert not any(outcome.ran for outcome in runner.run_recipe(store, recipe, base=tmp_path))


def test_a_recipe_takes_its_own_artifacts_even_where_newer_ones_lie_there(tmp_path, fakes):
    checkpoint(tmp_path)
    store = Store(tmp_path / "ws")
    list(runner.run_recipe(store, yaml.safe_load(RECIPE), base=tmp_path))
    make(store, fakes, "plan", bits="w2a3")
    assert not any(outcome.ran for outcome in runner.run_recipe(store, yaml.safe_load(RECIPE), base=tmp_path))


def test_a_dry_run_of_a_recipe_says_what_waits_for_what(tmp_path, fakes):
    checkpoint(tmp_path)
    store = Store(tmp_path / "ws")
    outcomes = list(runner.run_recipe(store, yaml.safe_load(RECIPE), base=tmp_path, dry_run=True))
    assert [(outcome.stage, outcome.reason) for outcome in outcomes] == [
        ("model", "runs: none yet"),
        ("profile", "would run: its input model will be made first"),
        ("plan", "would run: its input profile will be made first"),
        ("distill", "would run: its input plan will be made first"),
        ("export", "would run: its input distill will be made first"),
        ("sample", "would run: its input model will be made first"),
        ("sample", "would run: its input export will be made first"),
        ("score", "would run: its input sample will be made first"),
    ]
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("recipe", "what", "hint"),
    [
        ({"model": "model.ckpt", "distil": {}}, "r.yaml: unknown key 'distil'", "did you mean 'distill'?"),
        ({"plan": {}}, "r.yaml: the key 'model' is missing or no path", "write `model: model.ckpt`"),
        ({"model": "model.ckpt", "seed": "1"}, "r.yaml: seed cannot be '1'", "it takes a whole number"),
        ({"model": "model.ckpt", "plan": [{}]}, "r.yaml: plan cannot be a list", "only sample and score can"),
        ({"model": "model.ckpt", "plan": {"bit": "w4a4"}}, "r.yaml: plan: unknown key 'bit'", "did you mean 'bits'?"),
        ({"model": {"path": "model.ckpt", "emma": 1}}, "r.yaml: unknown key 'model.emma'", "did you mean 'ema'?"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, fakes, recipe, what, hint):
    checkpoint(tmp_path)
    store = Store(tmp_path / "ws")
    with pytest.raises(UsageError) as fault:
        list(runner.run_recipe(store, recipe, base=tmp_path, where="r.yaml"))
    assert (fault.value.what, fault.value.hint) == (what, hint)
    assert not store.root.exists()


def test_a_missing_input_names_the_command_that_makes_it(store, fakes):
    with pytest.raises(HqdmError) as fault:
        make(store, fakes, "plan")
    assert fault.value.hint == "hqdm profile"


def test_a_teachers_images_are_scored_alone_only_where_there_is_something_to_measure_them_against(tmp_path):
    """The digits, or a reference that was named; the images of other models are there for their students'."""
    store = Store(tmp_path)

    def sampled(shape, source):
        with store.begin("model", f"{shape}", {}) as draft:
            model = draft.commit({"info": {"shape": shape}})
        request = {"config": {"source": source}, "inputs": links({"source": model})}
        with store.begin("sample", f"{shape}{source}", request) as draft:
            return draft.commit({})

    digits, latents = sampled([1, 16, 16], "teacher"), sampled([4, 8, 8], "teacher")
    assert runner.needs_no_pair(store, digits, None, None) and not runner.needs_no_pair(store, latents, None, None)
    assert runner.needs_no_pair(store, latents, "photographs/", None)
    assert not runner.needs_no_pair(store, digits, None, "none")
    assert runner.needs_no_pair(store, sampled([4, 8, 8], "int"), None, "none")
