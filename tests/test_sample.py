"""Sampling as a stage: what it writes, that it goes on where it stopped, and what it says of other timesteps."""

import numpy as np
import pytest
from model_files import CHECKPOINT
from PIL import Image
from roads import STEPS, make, tiny_store, tiny_student

from pipelines import runner
from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.stages import load
from pipelines.workspace.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tiny_store(tmp_path_factory.mktemp("workspace"))
    make(store, "export", {"distill": tiny_student(store).id})
    return store


class Listener(Report):
    def __init__(self, stop_after=None):
        self.stop_after, self.warnings = stop_after, []

    def advance(self, done, **figures):
        if self.stop_after is not None and done >= self.stop_after:
            raise KeyboardInterrupt

    def warn(self, message):
        self.warnings.append(message)


class Followed(Report):
    """Tasks by name: how much of each was done when it ended."""

    def __init__(self):
        self.open, self.ended = [], {}

    def begin(self, task, total, done=0, unit="steps"):
        self.open.append([task, total, done])

    def advance(self, done, **figures):
        self.open[-1][2] = done

    def end(self):
        task, total, done = self.open.pop()
        self.ended[task] = (done, total)


def images(artifact):
    with np.load(artifact.file("samples.npz"), allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def test_intake_export_and_the_writing_of_images_show_how_far_they_are(store, tmp_path):
    report = Followed()
    runner.make(Store(tmp_path / "ws"), "model", runner.model_config(CHECKPOINT), report=report)
    export = runner.make(store, "export", load("export").Config(), report=report, force=True).artifact
    make(store, "sample", report=report, source="teacher", count=5, steps=STEPS, batch=2, seed=9)
    layers = sum(form for form in export.figures["forms"].values())
    assert report.open == [] and report.ended["write"] == (5, 5)
    assert report.ended["take in"] == (4, 4) and report.ended["pack"] == (layers, layers)


@pytest.mark.parametrize("source", ["teacher", "fake", "int"])
def test_pngs_and_npz_hold_the_same_images(store, source):
    artifact = make(store, "sample", source=source, count=5, steps=STEPS, batch=2)
    pixels, classes = images(artifact)
    assert pixels.shape == (5, 8, 8, 1) and pixels.dtype == np.uint8 and classes.shape == (5,)
    for index in range(5):
        assert np.array_equal(np.array(Image.open(artifact.file(f"images/{index:06d}.png"))), pixels[index, :, :, 0])
    assert artifact.figures["images_per_second"] > 0 and artifact.figures["bytes"] > 0
    assert Image.open(artifact.file("grid.png")).size[0] > 5 * 8


def test_fake_and_integer_samples_are_one_content(store):
    options = dict(count=4, steps=STEPS, batch=4)
    assert (
        make(store, "sample", source="fake", **options).digest == make(store, "sample", source="int", **options).digest
    )


def test_interrupted_sampling_goes_on_and_ends_with_the_same_files(store):
    options = dict(source="int", count=6, steps=STEPS, batch=2, seed=3)
    with pytest.raises(KeyboardInterrupt):
        make(store, "sample", report=Listener(stop_after=4), **options)
    kept = list(store.root.glob("sample/.draft-*/work/latents-*.npz"))
    assert len(kept) == 2
    resumed = make(store, "sample", **options)
    pixels, classes = images(resumed)
    whole = images(make(store, "sample", **(options | {"count": 8})))  # the same batches and one more
    assert np.array_equal(pixels, whole[0][:6]) and np.array_equal(classes, whole[1][:6])


def test_low_memory_draws_the_same_images(store):
    options = dict(source="int", count=4, steps=STEPS, batch=2, seed=5)
    usual = make(store, "sample", **options)
    sparing = runner.make(store, "sample", load("sample").Config(**options, low_memory=True), force=True)
    assert sparing.ran and sparing.artifact.digest == usual.digest


def test_another_seed_gives_other_images(store):
    first, second = (
        images(make(store, "sample", source="teacher", count=2, steps=STEPS, seed=seed))[0] for seed in (1, 2)
    )
    assert not np.array_equal(first, second)


def test_timesteps_that_were_not_learned_are_interpolated_and_said(store):
    listener = Listener()
    artifact = make(store, "sample", report=listener, source="int", count=2, steps=5)
    assert artifact.figures["interpolated_timesteps"] > 0
    assert any("interpolated" in warning for warning in listener.warnings)
    exact = make(store, "sample", source="int", count=2, steps=STEPS)
    assert exact.figures["interpolated_timesteps"] == 0


def test_the_reference_back_end_gives_the_same_images(store):
    options = dict(source="int", count=2, steps=STEPS, batch=2)
    assert make(store, "sample", backend="reference", **options).digest == make(store, "sample", **options).digest


def test_what_cannot_be_sampled_is_refused_with_the_way_out(store, tmp_path):
    with pytest.raises(UsageError, match="--backend chooses integer kernels"):
        make(store, "sample", source="teacher", backend="cpu")
    with pytest.raises(UsageError, match="is not what int samples from"):
        make(store, "sample", {"source": "model/1"}, source="int")
    with pytest.raises(UsageError, match="count cannot be 0"):
        make(store, "sample", count=0)
    empty = tiny_store(tmp_path)
    with pytest.raises(HqdmError, match="no export artifact") as caught:
        make(empty, "sample")
    assert caught.value.hint == "hqdm export --format int"


def test_a_float_export_is_not_taken_for_integers(store):
    distilled = store.current("distill")
    floats = make(store, "export", {"distill": distilled.id}, format="float")
    with pytest.raises(UsageError, match="is not what int samples from"):
        make(store, "sample", {"source": floats.id}, source="int")
    assert make(store, "sample", count=1, steps=STEPS).inputs["source"]["id"] != floats.id
