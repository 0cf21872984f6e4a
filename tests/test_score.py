"""The score stage: what it takes, what it writes down, and what it warns of."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipelines.config import key_dict, to_dict
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.events import Report
from pipelines.metrics.references import registered_reference
from pipelines.stages import score
from pipelines.stages.score import Config, sources, with_hashes
from pipelines.workspace.artifacts import key_of, links
from pipelines.workspace.store import Store

DRAWN = {"count": 200, "steps": 20, "seed": 0, "scheduler": "DDIMScheduler", "eta": 0.0, "guidance": 1.5}


class Heard(Report):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def digits():
    return registered_reference("digits").images


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "workspace")


def add(store, stage, config, inputs, write):
    key = key_of(stage, 1, config, inputs)
    with store.begin(stage, key, {"stage_version": 1, "config": config, "inputs": links(inputs), "seed": 0}) as draft:
        write(draft.path)
        return draft.commit({})


def add_model(store, text="model"):
    return add(store, "model", {"sha256": text}, {}, lambda folder: (folder / "model.txt").write_text(text))


def add_samples(store, model, source, images, labels=None, **config):
    def write(folder):
        (folder / "images").mkdir()
        Image.fromarray(images[0, ..., 0]).save(folder / "images" / "000000.png")
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(folder / "grid.png")
        np.savez(folder / "samples.npz", arr_0=images, **({} if labels is None else {"arr_1": labels}))

    return add(store, "sample", DRAWN | {"source": source} | config, {"model": model}, write)


def run_score(store, config=None, chosen=None):
    """The artifact, its scores.json and the warnings that were reported."""
    config = with_hashes(config or Config())
    inputs = score.inputs(config, store, chosen or {})
    key = key_of("score", score.VERSION, key_dict(config), inputs)
    request = {"stage_version": 1, "config": to_dict(config), "inputs": links(inputs), "seed": config.seed}
    heard = Heard()
    with store.begin("score", key, request) as draft:
        artifact = draft.commit(score.run(config, inputs, draft, heard))
    return artifact, json.loads(artifact.file("scores.json").read_text()), heard.warnings


def noisy(images, amplitude=20):
    noise = np.random.default_rng(0).integers(-amplitude, amplitude + 1, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def folder_of(path, images):
    path.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels[..., 0]).save(path / f"{i:06d}.png")
    return path


def test_every_figure_says_what_it_was_measured_with(store, digits):
    model = add_model(store)
    images, labels = digits.images[:400], digits.labels[:400]
    teacher = add_samples(store, model, "teacher", images, labels)
    student = add_samples(store, model, "int", noisy(images), labels)
    artifact, written, _ = run_score(store)
    assert set(written["figures"]) == {
        "fd_digits", "sfd_digits", "is", "is_std", "kid", "kid_std", "precision", "recall", "class_accuracy",
        "psnr_of_mean_mse", "psnr_mean_per_image", "pair_mse", "identical", "contrast",
    }  # fmt: skip
    for key, record in written["figures"].items():
        assert record["n"] == 400 and record["label"] and artifact.figures[key] == record["value"]
        if "pair" in record:
            assert record["pair"]["name"] == teacher.id and len(record["pair"]["sha256"]) == 64
        else:
            assert record["extractor"]["name"] == "digits" and len(record["extractor"]["sha256"]) == 64
        if key in ("fd_digits", "sfd_digits", "kid", "precision", "recall"):
            assert record["reference"] == {"name": "digits", "sha256": digits.sha256, "n": 1797}
    assert written["samples"]["name"] == student.id
    assert written["torch_fidelity"]
    figures = artifact.figures
    assert figures["class_accuracy"] > 0.95 and 25 < figures["psnr_of_mean_mse"] < 35
    assert figures["fd_digits"] > 0 and figures["precision"] > 0.5


def test_scoring_twice_gives_the_same_bytes(store, digits):
    add_samples(store, add_model(store), "int", digits.images[:100], digits.labels[:100])
    first, _, _ = run_score(store)
    second, _, _ = run_score(store)
    assert first.id != second.id and first.digest == second.digest


def test_folder_npz_archive_and_artifact_of_the_same_images_score_the_same(store, tmp_path, digits):
    images = noisy(digits.images[:100])
    folder = folder_of(tmp_path / "folder", images)
    np.savez(tmp_path / "a.npz", arr_0=images)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"../{file.name}")
    artifact = add_samples(store, add_model(store), "int", images)
    found = [run_score(store, Config(samples_path=str(tmp_path / name)))[0] for name in ("folder", "a.npz", "a.zip")]
    found.append(run_score(store, Config(samples_path=str(artifact.path)))[0])
    found.append(run_score(store)[0])
    assert len({artifact.digest for artifact in found}) == 5  # they say where the images came from
    figures = [{k: v for k, v in artifact.figures.items() if k not in ("samples", "warnings")} for artifact in found]
    assert all(one == figures[0] for one in figures)


def test_written_statistics_serve_a_later_run_as_its_reference(store, tmp_path, digits):
    np.savez(tmp_path / "all.npz", arr_0=digits.images)
    np.savez(tmp_path / "some.npz", arr_0=noisy(digits.images[:300]))
    first, _, _ = run_score(store, Config(samples_path=str(tmp_path / "all.npz")))
    by_images, _, _ = run_score(store, Config(samples_path=str(tmp_path / "some.npz")))
    config = Config(samples_path=str(tmp_path / "some.npz"), reference_path=str(first.file("statistics.npz")))
    by_statistics, written, _ = run_score(store, config)
    for key in ("fd_digits", "sfd_digits", "is"):
        assert by_statistics.figures[key] == by_images.figures[key]
    assert "kid" not in by_statistics.figures and "precision" not in by_statistics.figures
    assert written["figures"]["fd_digits"]["reference"]["n"] == 1797


def test_statistics_of_another_extractor_are_refused(store, tmp_path, digits):
    np.savez(tmp_path / "some.npz", arr_0=digits.images[:50])
    config = Config(samples_path=str(tmp_path / "some.npz"), reference_path=str(tmp_path / "ref.npz"))
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "ref.npz", **moments)
    with pytest.raises(HqdmError, match="statistics of 2048 features, but 'digits' has 64") as error:
        run_score(store, config)
    assert "--extractor inception" in error.value.hint
    moments = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(tmp_path / "ref.npz", **moments, extractor=np.str_("digits"), extractor_sha256=np.str_("0" * 64))
    with pytest.raises(HqdmError, match="with other weights"):
        run_score(store, config)
    np.savez(tmp_path / "ref.npz", **moments, extractor=np.str_("other"))
    with pytest.raises(HqdmError, match="statistics of the extractor 'other'"):
        run_score(store, config)
    np.savez(tmp_path / "ref.npz", **moments)
    assert "sfd_digits" not in run_score(store, config)[0].figures


def test_the_pair_is_the_same_models_teacher_drawn_in_the_same_way(store, digits):
    images = digits.images[:50]
    model, other = add_model(store), add_model(store, "another")
    student = add_samples(store, model, "int", images)

    def pair():
        return score.inputs(Config(), store, {"samples": student.id}).get("pair")

    assert pair() is None
    add_samples(store, model, "teacher", images, steps=50)
    add_samples(store, other, "teacher", images)
    add_samples(store, model, "fake", images)
    assert pair() is None
    teacher = add_samples(store, model, "teacher", images)
    assert pair() == teacher
    assert "pair" not in score.inputs(Config(), store, {"samples": teacher.id})
    assert "pair" not in score.inputs(Config(pair_path="elsewhere"), store, {"samples": student.id})
    model.path.rename(store.root / "moved")
    assert pair() is None


def test_pairs_of_other_shape_or_class_are_refused(store, tmp_path, digits):
    images, labels = digits.images[:50], digits.labels[:50]
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    np.savez(tmp_path / "b.npz", arr_0=images[:40])
    np.savez(tmp_path / "c.npz", arr_0=images, arr_1=np.roll(labels, 1))
    for name, complaint in (("b.npz", "compared image by image"), ("c.npz", "same seed")):
        config = Config(samples_path=str(tmp_path / "a.npz"), pair_path=str(tmp_path / name))
        with pytest.raises(HqdmError) as error:
            run_score(store, config)
        assert complaint in error.value.hint
    config = Config(samples_path=str(tmp_path / "a.npz"), pair_path=str(tmp_path / "a.npz"))
    figures = run_score(store, config)[0].figures
    assert figures["identical"] == 50 and figures["psnr_of_mean_mse"] is None


def test_a_sample_artifact_can_be_the_reference(store, digits):
    model = add_model(store)
    teacher = add_samples(store, model, "teacher", digits.images[:300], digits.labels[:300])
    student = add_samples(store, model, "int", digits.images[:300], digits.labels[:300])
    artifact, written, _ = run_score(store, None, {"samples": student.id, "reference": teacher.id})
    assert artifact.figures["fd_digits"] == pytest.approx(0, abs=1e-3)
    assert written["figures"]["fd_digits"]["reference"]["name"] == teacher.id


def warnings_for(store, tmp_path, images, labels=None, **options):
    np.savez(tmp_path / "w.npz", arr_0=images, **({} if labels is None else {"arr_1": labels}))
    _, written, heard = run_score(store, Config(samples_path=str(tmp_path / "w.npz"), **options))
    assert written["warnings"] == heard
    return " | ".join(heard)


def test_good_samples_are_not_warned_of(store, tmp_path, digits):
    assert warnings_for(store, tmp_path, digits.images[:1000], digits.labels[:1000]) == ""


def test_class_sorted_images_are_warned_of_with_and_without_labels(store, tmp_path, digits):
    order = np.argsort(digits.labels[:1000], kind="stable")
    images, labels = digits.images[:1000][order], digits.labels[:1000][order]
    assert "sorted by class" in warnings_for(store, tmp_path, images, labels)
    assert "sorted by class" in warnings_for(store, tmp_path, images)


def test_the_inception_score_is_nearly_the_same_for_sorted_images(store, tmp_path, digits):
    order = np.argsort(digits.labels[:600], kind="stable")
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:600])
    np.savez(tmp_path / "b.npz", arr_0=digits.images[:600][order])
    a, b = (run_score(store, Config(samples_path=str(tmp_path / name)))[0] for name in ("a.npz", "b.npz"))
    assert a.figures["is"] == pytest.approx(b.figures["is"], rel=0.1) and b.figures["is"] > 7


def test_unbalanced_classes_are_warned_of(store, tmp_path, digits):
    kept = (digits.labels != 3) | (np.arange(1797) % 5 == 0)
    assert "unbalanced" in warnings_for(store, tmp_path, digits.images[kept], digits.labels[kept])


def test_too_few_images_are_warned_of(store, tmp_path, digits):
    said = warnings_for(store, tmp_path, digits.images[:50], digits.labels[:50])
    assert "rank-deficient" in said and "biased upwards" in said and "few for an Inception score" in said
    said = warnings_for(store, tmp_path, digits.images[:3], digits.labels[:3])
    assert "too few for 10 splits" in said and "left out" in said


def test_labels_that_the_classifier_does_not_know_are_warned_of(store, tmp_path, digits):
    labels = digits.labels[:1000].copy()
    labels[5] = 10
    assert "labels outside 0…9" in warnings_for(store, tmp_path, digits.images[:1000], labels)


def test_fewer_than_two_images_and_wrong_sizes_are_errors_that_name_the_file(store, tmp_path, digits):
    np.savez(tmp_path / "one.npz", arr_0=digits.images[:1])
    with pytest.raises(FileFault, match="one.npz: holds 1 image"):
        run_score(store, Config(samples_path=str(tmp_path / "one.npz")))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(HqdmError, match="large.npz: 32×32 pixels"):
        run_score(store, Config(samples_path=str(tmp_path / "large.npz"), extractor="digits"))


def coloured(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


def test_without_an_extractor_the_figures_to_the_teacher_are_left_and_need_it(store):
    model = add_model(store)
    teacher = add_samples(store, model, "teacher", coloured(20, 0))
    student = add_samples(store, model, "int", coloured(20, 1))
    scored, _, _ = run_score(store, Config(extractor="none"), {"samples": student.id})
    figures = scored.figures
    assert figures["pair"] == teacher.id and figures["psnr_of_mean_mse"] > 0
    assert not {"fid", "is", "extractor", "reference"} & figures.keys()
    with pytest.raises(HqdmError, match="has no pair") as caught:
        run_score(store, Config(extractor="none"), {"samples": teacher.id})
    assert "hqdm sample teacher" in caught.value.hint


def test_images_that_are_no_digits_are_measured_on_inception_and_it_says_how_to_do_without(store, monkeypatch):
    from pipelines.metrics import extractors

    def offline(url, file):
        raise HqdmError("the Inception weights are not on this machine")

    monkeypatch.setattr(extractors, "_fetch", offline)
    monkeypatch.setattr(extractors.torch.hub, "get_dir", lambda: "/nowhere")
    model = add_model(store)
    add_samples(store, model, "teacher", coloured(20, 0))
    student = add_samples(store, model, "int", coloured(20, 1))
    with pytest.raises(HqdmError, match="Inception weights"):
        run_score(store, Config(), {"samples": student.id})


def test_a_corrupt_image_is_named(store, tmp_path, digits):
    folder = folder_of(tmp_path / "folder", digits.images[:5])
    file = folder / "000003.png"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(FileFault, match="000003.png"):
        run_score(store, Config(samples_path=str(folder)))


def test_the_key_follows_what_a_path_holds_and_not_where_it_lies(store, tmp_path, digits):
    for name, count in (("a.npz", 5), ("b.npz", 5), ("c.npz", 6)):
        np.savez(tmp_path / name, arr_0=digits.images[:count])
    keys = [key_dict(with_hashes(Config(samples_path=str(tmp_path / name)))) for name in ("a.npz", "b.npz", "c.npz")]
    assert keys[0] == keys[1] != keys[2]
    config = with_hashes(Config(samples_path=str(tmp_path / "a.npz")))
    np.savez(tmp_path / "a.npz", arr_0=digits.images[5:10])
    with store.begin("score", "k" * 64, {}) as draft, pytest.raises(FileFault, match="changed since this run"):
        score.run(config, {}, draft, Report())


def test_what_a_user_types_is_told_apart(store, tmp_path, digits, monkeypatch):
    artifact = add_samples(store, add_model(store), "int", digits.images[:5])
    folder = folder_of(tmp_path / "samples", digits.images[:5])
    monkeypatch.chdir(tmp_path)
    assert sources(store) == ({}, {})
    assert sources(store, "samples/") == ({"samples_path": str(folder)}, {})
    assert sources(store, "sample/1") == ({}, {"samples": "sample/0001"})
    assert sources(store, "workspace/sample/0001/") == ({}, {"samples": "sample/0001"})
    assert sources(store, str(artifact.path / "samples.npz"))[0] == {"samples_path": str(artifact.path / "samples.npz")}
    assert sources(store, None, "digits", "sample") == ({"reference": "digits"}, {"pair": "sample/0001"})
    with pytest.raises(UsageError, match="samples: 'smaples' is neither a file or folder nor an artifact"):
        sources(store, "smaples")
    with pytest.raises(UsageError, match="is given twice"):
        score.inputs(Config(samples_path="x"), store, {"samples": artifact.id})
    with pytest.raises(UsageError, match="model/0001 holds no images"):
        score.inputs(Config(), store, {"samples": "model"})
    with pytest.raises(UsageError, match="score has no input 'sampels'"):
        score.inputs(Config(), store, {"sampels": "sample"})


@pytest.mark.parametrize("name", ["splits", "kid_subsets", "kid_subset_size", "neighbours", "seed"])
def test_values_out_of_range_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} cannot be -1"):
        Config(**{name: -1})


def test_an_empty_workspace_says_what_to_type(store):
    with pytest.raises(HqdmError, match="holds no samples") as error:
        score.inputs(Config(), store, {})
    assert "hqdm sample" in error.value.hint


def test_the_reference_digits_is_what_scikit_learn_carries(digits):
    from sklearn.datasets import load_digits

    assert len(digits) == 1797 and digits.size == (16, 16)
    assert np.array_equal(np.bincount(digits.labels), np.bincount(load_digits().target))
