"""The plan stage: scales that are the profile's, a file that can be edited and handed back."""

import json

import pytest
import yaml
from roads import STEPS, make, tiny_store
from safetensors.torch import load_file

from pipelines import runner
from pipelines.workspace.seals import sha256_of_file


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


def test_scales_are_positive_one_for_each_timestep_and_output(store):
    plan = make(store, "plan", bits="w3a4")
    scales = load_file(plan.file("scales.safetensors"))
    values = yaml.safe_load(plan.file("plan.yaml").read_text())
    assert scales["timesteps"].tolist() == sorted(values["timesteps"]) and len(values["timesteps"]) == STEPS
    sites = {site["name"]: site for site in json.loads(store.ancestor(plan, "model").file("sites.json").read_text())}
    for name, entry in values["sites"].items():
        if entry["quantised"]:
            assert (
                scales[f"{name}/activation_scale"].shape == (STEPS,) and (scales[f"{name}/activation_scale"] > 0).all()
            )
            assert scales[f"{name}/weight_scale"].shape == (sites[name]["weight"][0],)


def test_the_reason_of_every_site_is_a_measured_number(store):
    values = yaml.safe_load(make(store, "plan").file("plan.yaml").read_text())
    for entry in values["sites"].values():
        assert "dB" in entry["why"] and entry["sqnr"]["none"] == pytest.approx(entry["sqnr"]["none"])


def test_a_plan_edited_by_hand_is_handed_back_and_used(store, tmp_path):
    values = yaml.safe_load(make(store, "plan").file("plan.yaml").read_text())
    name = next(name for name, entry in values["sites"].items() if entry["role"] == "residual")
    values["sites"][name] |= {"activation_bits": 8, "weight_bits": 8, "why": "by hand"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    edited = runner.make(store, "plan", runner.edited_plan(path)).artifact
    again = yaml.safe_load(edited.file("plan.yaml").read_text())
    assert again["sites"][name]["weight_bits"] == 8 and again["sites"][name]["why"] == "by hand"
    assert edited.config["edited_sha256"] == sha256_of_file(path)


def test_a_transform_that_was_not_profiled_is_measured_on_the_profiles_sample(store, tmp_path):
    """A diagonal of other signs has another name's scales otherwise."""
    first = make(store, "plan", variant="code")
    values = yaml.safe_load(first.file("plan.yaml").read_text())
    name = next(name for name, entry in values["sites"].items() if entry.get("inverse") == "single")
    values["sites"][name]["transform"]["signs"] = 99
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    edited = runner.make(store, "plan", runner.edited_plan(path)).artifact
    before, after = (load_file(plan.file("scales.safetensors"))[f"{name}/activation_scale"] for plan in (first, edited))
    assert (before != after).all()
    values["sites"][name]["transform"]["signs"] = 1
    path.write_text(yaml.safe_dump(values))
    profiled = runner.make(store, "plan", runner.edited_plan(path)).artifact
    assert (load_file(profiled.file("scales.safetensors"))[f"{name}/activation_scale"] != after).all()
