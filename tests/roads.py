"""The first stages of the road on a tiny random model, for tests of the later ones."""

import atexit
import json
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from tiny import tiny_denoiser

from pipelines import runner
from pipelines.methods import auto
from pipelines.models.denoiser import find_sites, save_denoiser
from pipelines.quant.spec import site_to_dict
from pipelines.stages import load
from pipelines.workspace.store import Store

STEPS = 3
SAMPLE = 256  # values of a site and timestep; the default's 4,096 take longer to search
# Options under which a method's search takes a moment; its own take longer than a test should.
QUICK = {"dmq": {"steps": "3"}, "outlier_suppression": {"thresholds": "8"}}


def tiny_store(root: Path, seed: int = 0, levels: int = 1) -> Store:
    """A workspace with the tiny model and its profile, made once in a process and copied. With two levels it has every
    kind of layer, and two and a half times as many.
    """
    shutil.copytree(_made(seed, levels), root, dirs_exist_ok=True)
    return Store(root)


def exported_store(root: Path) -> Store:
    """The same with a plan, a student (w4a4, six updates) and its exported integers."""
    shutil.copytree(_exported(), root, dirs_exist_ok=True)
    return Store(root)


@cache
def _exported() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hqdm-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = tiny_store(folder)
    make(store, "export", {"distill": tiny_student(store, trajectories=2).id})
    return folder


@cache
def _made(seed: int, levels: int) -> Path:
    folder = tempfile.mkdtemp(prefix="hqdm-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = Store(Path(folder))
    denoiser = tiny_denoiser(seed, levels)
    config = {"path": "tiny.ckpt", "config_path": None, "ema": True}
    request = {"stage_version": load("model").VERSION, "config": config}
    with store.begin("model", f"tiny-{seed}-{levels}", request) as draft:
        save_denoiser(denoiser, draft.path)
        sites = [site_to_dict(site) for site in find_sites(denoiser)]
        (draft.path / "sites.json").write_text(json.dumps(sites))
        draft.commit({})
    make(store, "profile", steps=STEPS, batch=2, sample=SAMPLE)
    return Path(folder)


def make(store: Store, stage: str, chosen: dict | None = None, report=None, **options):
    """One stage with some options; the artifact."""
    extra = {} if report is None else {"report": report}
    return runner.make(store, stage, load(stage).Config(**options), chosen or {}, **extra).artifact


@contextmanager
def quick_search():
    """The search of hqdm's `auto` tries rotations of one order, where its own are dozens."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(auto, "ORDERS", (32,))
        patched.setattr(auto, "SIGNS", (1,))
        yield


def tiny_student(store: Store, method="hqdm", variant=None, bits="w4a4", trajectories=1, **options):
    """Plan and distill; the distill artifact."""
    with quick_search():
        plan = make(store, "plan", method=method, variant=variant, bits=bits, options=QUICK.get(method, {}))
    return make(store, "distill", {"plan": plan.id}, trajectories=trajectories, batch=2, save_every=2, **options)
