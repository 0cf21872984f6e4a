"""The plan stage: scales that are the profile's, a file that can be edited and handed back."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from roads import QUICK, STEPS, make, quick_search, tiny_store
from safetensors.torch import load_file
from test_students import plan_of

from pipelines import runner
from pipelines.methods import METHODS
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


def test_all_timesteps_may_start_from_one_scale_and_learn_apart(store):
    """As EfficientDM's code does, whose one calibration batch gives every timestep the same scale."""
    options = {"recipe.activation_scale_from": "trajectory"}
    one = make(store, "plan", method="efficientdm", bits="w4a4", options=options)
    static = make(store, "plan", method="rtn", variant="search", bits="w4a4")
    mine, theirs = (load_file(plan.file("scales.safetensors")) for plan in (one, static))
    names = [key for key in mine if key.endswith("/activation_scale")]
    assert names and all(torch.equal(mine[key], theirs[key]) for key in names)  # what all timesteps' sample gives
    plan = yaml.safe_load(one.file("plan.yaml").read_text())
    assert plan["groups"] == []  # so that each learns by itself
    assert plan["recipe"]["activation_scale_from"] == "trajectory"


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "dmq"])
def test_ranges_by_least_error_are_never_wider_than_those_by_maxima_below_eight_bits(store, method):
    with quick_search():
        plans = [make(store, "plan", method=method, variant=variant, bits="w4a4", options=QUICK.get(method, {}))
                 for variant in (None, "search")]  # fmt: skip
    widest, found = (load_file(plan.file("scales.safetensors")) for plan in plans)
    sites = [site.site.name for site in plan_of(store, plans[0]).quantised if site.activation_bits == 4]
    shares = torch.stack([found[f"{name}/activation_scale"] / widest[f"{name}/activation_scale"] for name in sites])
    assert len(sites) > 10 and (shares < 1.001).all() and shares.median() < 0.9


def test_plans_that_differ_in_the_recipe_alone_are_searched_for_once(store, monkeypatch):
    asked = []

    def decide(site, bits, *rest):
        asked.append((site.name, bits))
        return METHODS["efficientdm"].decide(site, bits, *rest)

    monkeypatch.setitem(METHODS, "hqdm", replace(METHODS["hqdm"], decide=decide))
    plans = []
    for bits, options in (("w3a4", {}), ("w3a4", {"recipe.ema": "0.9"}), ("w3a3", {"recipe.ema": "0.9"})):
        plans.append(make(store, "plan", bits=bits, options=options, variant="code"))
    assert len(asked) == len(set(asked)) and {str(bits) for _, bits in asked} == {"w3a4", "w3a3"}
    first, second = (yaml.safe_load(plan.file("plan.yaml").read_text()) for plan in plans[:2])
    assert first["sites"] == second["sites"] and second["recipe"] == first["recipe"] | {"ema": 0.9}


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
