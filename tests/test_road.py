"""Every stage on every family: a tiny random model, as people have it on disk, to images drawn in integers and scored.

The table of docs/models.md names these tests.
"""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from drawing import drawn
from families import TINY, save_tiny
from ldm_reference import checkpoint_of
from roads import SAMPLE, make
from test_compvis_published import NAMES as COMPVIS
from test_compvis_published import random_model, reduced, written

from pipelines import runner
from pipelines.plans import read_plan
from pipelines.quant.spec import site_from_dict
from pipelines.workspace.store import Store

STEPS = 2
DRAWN = ("sd", "dit")  # whose profile draws its pictures, which take most of its time


def save_compvis(name, folder):
    """A checkpoint in the layout of a published latent-diffusion model, narrow and shallow, its YAML beside it."""
    params = reduced(name)
    params["unet_config"]["params"]["num_res_blocks"] = 1
    folder.mkdir()
    written(folder, params, checkpoint_of(random_model(params, 0), random_model(params, 1)))
    return folder / "model.ckpt", {}


@pytest.fixture(scope="module", params=[*sorted(TINY), *COMPVIS])
def road(request, tmp_path_factory):
    """The artifacts of one family's road by stage, made once."""
    folder = tmp_path_factory.mktemp(request.param)
    save = save_compvis if request.param in COMPVIS else save_tiny
    model, options = save(request.param, folder / "model")
    store = Store(folder / "workspace")
    made = {"model": runner.make(store, "model", runner.model_config(model, **options)).artifact}
    with drawn() if request.param in DRAWN else nullcontext():
        made["profile"] = make(store, "profile", steps=STEPS, batch=1, sample=SAMPLE)
    made["plan"] = make(store, "plan", bits="w4a4")
    made["distill"] = make(store, "distill", trajectories=2, batch=1)
    made["export"] = make(store, "export")
    for source in ("teacher", "fake", "int"):
        made[source] = make(store, "sample", source=source, count=2, batch=2, steps=STEPS)
    made["score"] = make(store, "score", {"samples": made["int"].id}, extractor="none")
    return made


def test_load(road):
    info = road["model"].figures["info"]
    assert road["model"].figures["sites"] > 10 and info["schedule"]["num_train_timesteps"] == 1000


def test_profile(road):
    measured = json.loads(road["profile"].file("profile.json").read_text())
    assert len(measured["timesteps"]) == STEPS
    assert len(measured["sites"]) == road["model"].figures["sites"]
    assert all(np.isfinite(site["mean"]["maximum"]) for site in measured["sites"].values())


def test_plan(road):
    """Every site is in the plan; one whose width no order divides is rotated by a smaller order or not at all."""
    sites = [site_from_dict(entry) for entry in json.loads(road["model"].file("sites.json").read_text())]
    plan = read_plan(road["plan"].file("plan.yaml"), sites)
    assert [planned.site.name for planned in plan.sites] == [site.name for site in sites]
    for planned in plan.sites:
        assert planned.why
        if planned.quantised and not planned.transform.is_identity:
            assert planned.site.channels % planned.transform.order == 0
        if not planned.quantised:
            assert planned.site.obstacle


def test_distill(road):
    assert road["distill"].figures["updates"] == 2 * STEPS
    assert np.isfinite(road["distill"].figures["last_loss"])


def test_export(road):
    assert road["export"].figures["bytes"] < 0.7 * road["model"].figures["bytes"]


def test_sample(road):
    """What was trained is what is deployed: the integers draw the fake-quantised student's images, bit for bit."""
    pixels = {source: np.load(road[source].file("samples.npz"))["arr_0"] for source in ("teacher", "fake", "int")}
    assert np.array_equal(pixels["fake"], pixels["int"])
    assert pixels["int"].shape[3] == 3 and pixels["int"].std() > 0
    assert not np.array_equal(pixels["teacher"], pixels["int"])


def test_score(road):
    assert road["score"].figures["psnr_of_mean_mse"] > 5
