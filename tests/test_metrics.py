"""Images from every source, feature extractors, and the figures against their definitions."""

import io
import pickle
import socket
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError
from pipelines.metrics import extractors, scores
from pipelines.metrics.extractors import Features, load_extractor
from pipelines.metrics.images import hash_of_images, read_images
from pipelines.metrics.references import Statistics, read_reference, registered_reference, write_statistics


@pytest.fixture(scope="module")
def torch_fidelity():
    """Imported only after `pipelines`, which mends what it imports."""
    import torch_fidelity

    return torch_fidelity


@pytest.fixture(scope="module")
def digits():
    """All digits, (1797, 16, 16, 1) uint8, with labels."""
    return registered_reference("digits").images


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def features(digits, extractor):
    return extractor.features(digits.images)


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def folder_of(path, images, name="{:06d}.png"):
    path.mkdir()
    for i, pixels in enumerate(images):
        (path / name.format(i)).write_bytes(png(pixels))
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def tar_of(path, members, mode):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# Reading


def test_every_source_gives_the_same_images(tmp_path, digits):
    images, labels = digits.images[:12], digits.labels[:12]
    members = [(f"{i}.png", png(pixels)) for i, pixels in enumerate(images)]
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    found = [
        read_images(folder_of(tmp_path / "padded", images)),
        read_images(folder_of(tmp_path / "unpadded", images, "{}.png")),
        read_images(zip_of(tmp_path / "a.zip", members[::-1])),
        read_images(tar_of(tmp_path / "a.tar", members[::-1], "w")),
        read_images(tar_of(tmp_path / "a.tar.gz", members[::-1], "w:gz")),
        read_images(tar_of(tmp_path / "a.tar.xz", members, "w:xz")),
        read_images(tmp_path / "a.npz"),
    ]
    for one in found:
        assert np.array_equal(one.images, images) and one.images.dtype == np.uint8
    assert np.array_equal(found[-1].labels, labels)
    assert found[2].names == tuple(f"{i}.png" for i in range(12))


def test_what_a_file_is_called_does_not_matter(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:3])
    (tmp_path / "a.npz").rename(tmp_path / "samples.bin")
    assert len(read_images(tmp_path / "samples.bin")) == 3


def test_the_hash_follows_the_content_of_a_folder(tmp_path, digits):
    a = folder_of(tmp_path / "a", digits.images[:3])
    b = folder_of(tmp_path / "b", digits.images[:3])
    assert read_images(a).sha256 == hash_of_images(a) == hash_of_images(b)
    (b / "000002.png").write_bytes(png(digits.images[3]))
    assert hash_of_images(a) != hash_of_images(b)
    (a / "notes.txt").write_text("not an image")
    assert hash_of_images(a) == read_images(a).sha256


def test_a_damaged_image_is_named_wherever_it_is_cut_or_changed(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:3])
    whole = (folder / "000001.png").read_bytes()
    pixels_end = len(whole) - 12  # an empty end marker follows
    broken = [whole[:place] for place in range(0, pixels_end, 9)]
    broken += [whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :] for place in range(0, pixels_end, 7)]
    for data in broken:
        (folder / "000001.png").write_bytes(data)
        with pytest.raises(FileFault, match="000001.png"):
            read_images(folder)
    archive = zip_of(tmp_path / "a.zip", [("x.png", whole), ("y.png", whole[:-20])])
    with pytest.raises(FileFault, match="a.zip: y.png"):
        read_images(archive)


def test_mixed_sizes_name_the_odd_file(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:3])
    (folder / "000002.png").write_bytes(png(np.zeros((8, 16, 1), np.uint8)))
    with pytest.raises(FileFault, match=r"000002.png: 16×8 pixels, but .*000000.png has 16×16"):
        read_images(folder)


def test_images_with_transparency_or_more_than_8_bits_are_refused(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:2])
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "deep.png")
    with pytest.raises(FileFault, match="deep.png: mode I;16"):
        read_images(folder)
    (folder / "deep.png").unlink()
    Image.fromarray(np.full((16, 16, 4), 128, np.uint8), "RGBA").save(folder / "clear.png")
    with pytest.raises(FileFault, match="clear.png: has transparent pixels"):
        read_images(folder)


def test_grey_among_colour_becomes_colour(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:2])
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (folder / "000001.png").write_bytes(png(colour))
    (folder / "000002.png").write_bytes(png(digits.images[2]))
    images = read_images(folder).images
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(images[1], colour)
    assert all((images[i] == digits.images[i]).all() for i in (0, 2))


def test_lossy_files_are_remarked(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:2])
    assert read_images(folder).remarks == ()
    Image.fromarray(digits.images[2, ..., 0]).save(folder / "z.jpg")
    assert "1 of 3 images are JPEG" in read_images(folder).remarks[0]


def test_too_few_images_are_refused(tmp_path, digits):
    folder = folder_of(tmp_path / "a", digits.images[:1])
    with pytest.raises(FileFault, match="holds 1 image,"):
        read_images(folder)
    (folder / "000000.png").unlink()
    with pytest.raises(FileFault, match="holds no images"):
        read_images(folder)
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:0])
    with pytest.raises(FileFault, match="holds 0 images"):
        read_images(tmp_path / "a.npz")
    with pytest.raises(FileFault, match="no such file or folder"):
        read_images(tmp_path / "nowhere")


class Bomb:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_nothing_is_unpickled(tmp_path, digits, capsys):
    np.savez(tmp_path / "a.npz", arr_0=np.array([Bomb(), Bomb()], dtype=object))
    with pytest.raises(FileFault, match="a.npz: arr_0"):
        read_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", arr_0=digits.images[:4], arr_1=np.array([Bomb()] * 4, dtype=object))
    with pytest.raises(FileFault, match="b.npz: arr_1"):
        read_images(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", mu=np.array([Bomb()], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(FileFault, match="c.npz: mu"):
        read_reference(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileFault, match="d.npz: neither"):
        read_images(tmp_path / "d.npz")
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pth")
    for name in ("weights.pth", "bomb.pth"):
        with pytest.raises(FileFault, match=f"{name}: not the weights"):
            load_extractor("inception", str(tmp_path / name))
    assert "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((4, 16, 16, 1), np.float32), "float32, not uint8"),
        (np.zeros((4, 3, 16, 16), np.uint8), "not (N, H, W, 1 or 3)"),
        (np.zeros((4, 16, 16), np.uint8), "not (N, H, W, 1 or 3)"),
    ],
)
def test_an_npz_of_another_layout_is_refused(tmp_path, array, complaint):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(FileFault) as error:
        read_images(tmp_path / "a.npz")
    assert complaint in error.value.what


def test_a_cut_or_changed_npz_is_named(tmp_path, digits):
    np.savez_compressed(tmp_path / "a.npz", arr_0=digits.images[:20])
    whole = (tmp_path / "a.npz").read_bytes()
    middle = len(whole) // 2
    for data in (b"", whole[:30], whole[:-40], whole[:middle] + bytes(8) + whole[middle + 8 :]):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(FileFault, match="a.npz"):
            read_images(tmp_path / "a.npz")


def test_labels_must_fit_the_images(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:4], arr_1=digits.labels[:3])
    with pytest.raises(FileFault, match="arr_1 has shape"):
        read_images(tmp_path / "a.npz")


def test_the_path_of_an_archive_member_does_no_harm(tmp_path, digits):
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    members = [("../escape.png", png(digits.images[0])), ("/abs/escape.png", png(digits.images[1]))]
    with tarfile.open(inside / "a.tar", "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    zip_of(inside / "a.zip", members)
    assert len(read_images(inside / "a.zip")) == len(read_images(inside / "a.tar")) == 2
    assert sorted(tmp_path.rglob("*")) == sorted([*before, inside / "a.tar", inside / "a.zip"])


def test_an_archive_member_beyond_the_limit_is_refused_before_it_fills_memory(tmp_path, monkeypatch, digits):
    monkeypatch.setattr("pipelines.metrics.images.MEMBER_BYTES", 1000)
    data = png(digits.images[0]) + bytes(5000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", data)
    tar_of(tmp_path / "a.tar.gz", [("big.png", data)], "w:gz")
    for name in ("a.zip", "a.tar.gz"):
        with pytest.raises(FileFault, match=f"{name}: big.png takes"):
            read_images(tmp_path / name)
    monkeypatch.setattr("pipelines.metrics.images.TOTAL_BYTES", 1000)
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:20])
    for source in (tmp_path / "a.npz", folder_of(tmp_path / "f", digits.images[:20])):
        with pytest.raises(FileFault, match="more than"):
            read_images(source)


# References


def test_statistics_go_to_a_file_and_back(tmp_path, features, extractor):
    pool, spatial = scores.statistics(features.pool), scores.statistics(features.spatial)
    write_statistics(tmp_path / "a.npz", pool, spatial, extractor.name, extractor.sha256)
    write_statistics(tmp_path / "b.npz", pool, spatial, extractor.name, extractor.sha256)
    found = read_reference(tmp_path / "a.npz")
    assert np.array_equal(found.pool.sigma, pool.sigma) and np.array_equal(found.spatial.mu, spatial.mu)
    assert (found.pool.n, found.extractor, found.extractor_sha256) == (1797, "digits", extractor.sha256)
    assert found.images is None
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_published_reference_batch_gives_its_statistics_and_its_images(tmp_path, digits):
    moments = {"mu": np.zeros(4, np.float32), "sigma": np.eye(4), "mu_s": np.zeros(6), "sigma_s": np.eye(6)}
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:5], **moments)
    found = read_reference(tmp_path / "a.npz")
    assert len(found.images) == 5 and found.pool.n is None and found.extractor is None
    assert found.pool.mu.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sigma": np.eye(3)}, "not (D,) and (D, D)"),
        ({"mu": np.full(4, np.nan)}, "NaN"),
        ({"mu": np.zeros(4, int)}, "not floats"),
        ({"sigma": None}, "no sigma"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, change, complaint):
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)} | change
    np.savez(tmp_path / "a.npz", **{name: value for name, value in moments.items() if value is not None})
    with pytest.raises(FileFault) as error:
        read_reference(tmp_path / "a.npz")
    assert complaint in error.value.what and "a.npz" in error.value.what


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError) as error:
        registered_reference("digit")
    assert error.value.hint == "did you mean 'digits'?"
    with pytest.raises(UsageError) as error:
        load_extractor("inceptoin")
    assert error.value.hint == "did you mean 'inception'?"


# Extractors


def test_the_digits_extractor_reads_the_digits(digits, features):
    assert features.pool.shape == (1797, 64) and features.spatial.shape == (1797, 128)
    assert scores.class_accuracy(features.logits, digits.labels) > 0.97


def test_grey_and_colour_give_the_same_features(digits, features, extractor):
    colour = extractor.features(np.repeat(digits.images[:64], 3, axis=3))
    for name in Features._fields:
        assert torch.equal(getattr(colour, name), getattr(features, name)[:64])


def test_the_digits_extractor_refuses_another_size(extractor):
    with pytest.raises(HqdmError, match="16×8 pixels, but the extractor 'digits' takes only 16×16"):
        extractor.features(np.zeros((2, 8, 16, 1), np.uint8))


def test_features_that_are_not_finite_are_refused(digits):
    nan = torch.full((4, 2), np.nan)
    broken = extractors.Extractor(extractors.find_kind("digits"), "", lambda _: Features(nan, nan, nan))
    with pytest.raises(NumericalFault, match="NaN or Inf among its pool features"):
        broken.features(digits.images[:4])


def test_torch_fidelity_agrees_through_its_own_interface(torch_fidelity, digits, features, extractor):
    class Images(Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    noise = np.random.default_rng(0).integers(-40, 40, (300, 16, 16, 1))
    noisy = np.clip(digits.images[:300] + noise, 0, 255).astype(np.uint8)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(noisy), input2=Images(digits.images), feature_extractor="digits",
        fid=True, isc=True, kid=True, prc=True, kid_subset_size=200, isc_splits=5, rng_seed=7,
        cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    mine = extractor.features(noisy)
    distance = scores.frechet_distance(scores.statistics(mine.pool), scores.statistics(features.pool))
    assert distance > 1
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    score = scores.inception_score(mine.logits, 5, 7)
    assert score["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    kernel = scores.kernel_distance(mine.pool, features.pool, 100, 200, 7)
    assert kernel["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    manifold = scores.precision_recall(mine.pool, features.pool, 3)
    assert manifold["precision"] == pytest.approx(theirs["precision"], abs=0.01)
    assert manifold["recall"] == pytest.approx(theirs["recall"], abs=0.01)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory, torch_fidelity):
    """A file of random weights in the layout of torch-fidelity's Inception."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3."
        patch.setattr(module + "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module + "FeatureExtractorInceptionV3.load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)
    return str(path)


def test_inceptions_spatial_features_are_seven_maps_with_channels_last(torch_fidelity, inception_weights, digits):
    found = load_extractor("inception", inception_weights)
    features = found.features(digits.images[:2])
    assert [tuple(values.shape) for values in features] == [(2, 2048), (2, 2023), (2, 1008)]

    plain = torch_fidelity.FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], inception_weights)
    maps = []
    plain.Mixed_6d.register_forward_hook(lambda _, __, output: maps.append(output[:, :7]))  # branch1x1 comes first
    pool, logits = plain(torch.from_numpy(digits.images[:2]).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))
    assert torch.equal(features.pool, pool) and torch.equal(features.logits, logits)
    assert features.spatial.std() > 0
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (3, 5, 2), (16, 16, 6)):
        assert torch.equal(features.spatial[:, (row * 17 + column) * 7 + channel], maps[0][:, channel, row, column])


def test_without_a_connection_inception_fails_at_once_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    started = time.monotonic()
    with pytest.raises(HqdmError, match="cannot be fetched") as error:
        load_extractor("inception")
    assert "--weights" in error.value.hint and error.value.exit_code == 1
    assert time.monotonic() - started < 5
    assert not list(tmp_path.rglob("*.pth"))


def test_a_server_that_never_answers_does_not_hang_inception(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(extractors, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(HqdmError, match="cannot be fetched"):
            load_extractor("inception")
        assert time.monotonic() - started < 5


def test_weights_that_are_missing_or_of_another_model_are_named(tmp_path):
    with pytest.raises(FileFault, match="nowhere.pth: no such file"):
        load_extractor("inception", str(tmp_path / "nowhere.pth"))
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(FileFault, match="other.pth: not the weights of torch-fidelity's Inception"):
        load_extractor("inception", str(tmp_path / "other.pth"))
    with pytest.raises(UsageError, match="comes with its weights"):
        load_extractor("digits", str(tmp_path / "other.pth"))


def test_reading_images_and_the_table_of_references_does_not_import_torch():
    code = "import sys, pipelines.metrics.references, pipelines.stages.score; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Figures


def test_the_distance_of_a_set_to_itself_is_zero(features):
    for values in (features.pool, features.spatial):
        own = scores.statistics(values)
        assert scores.frechet_distance(own, own) == pytest.approx(0, abs=1e-3)


def test_the_frechet_distance_is_its_formula(features):
    """Against the symmetric form: tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, whose eigenvalues are real."""
    a, b = features.pool[:900].double().numpy(), features.pool[900:].double().numpy() * 1.3 + 0.2
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(sigma_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma_b @ root).clip(0)).sum()
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace
    found = scores.frechet_distance(scores.statistics(torch.from_numpy(a)), scores.statistics(torch.from_numpy(b)))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_frechet_distance_of_known_gaussians():
    one = Statistics(np.zeros(3), np.eye(3), None)
    other = Statistics(np.full(3, 2.0), 4 * np.eye(3), None)
    assert scores.frechet_distance(one, other) == pytest.approx(3 * 4 + 3 * (1 + 4 - 2 * 2))


def test_the_inception_score_does_not_depend_on_the_order_of_classes():
    """Certain predictions of 10 classes: the score is 10, and in file order it would be 1."""
    logits = torch.nn.functional.one_hot(torch.arange(10).repeat_interleave(100), 10) * 100.0
    assert scores.inception_score(logits, 10, seed=0)["is"] == pytest.approx(10, rel=0.1)
    assert scores.inception_score(logits, 1, seed=0)["is"] == pytest.approx(10, rel=1e-6)
    assert scores.inception_score(logits, 10, seed=0) == scores.inception_score(logits, 10, seed=0)


def test_precision_and_recall_tell_damage_from_missing_variety():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(400, 8, generator=generator)
    narrow = torch.randn(400, 8, generator=generator) * 0.3
    found = scores.precision_recall(narrow, full, 3)
    assert found["precision"] > 0.9 > 0.3 > found["recall"]
    assert scores.precision_recall(full, full, 3) == {"precision": 1.0, "recall": 1.0}


def test_kid_is_near_zero_on_one_distribution_and_not_on_two():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 16, generator=generator), torch.randn(500, 16, generator=generator)
    near = scores.kernel_distance(a, b, 20, 400, seed=0)["kid"]
    assert abs(near) < 0.02 < 0.5 < scores.kernel_distance(a, b + 1, 20, 400, seed=0)["kid"]


def test_the_psnr_of_known_noise():
    images = np.full((3, 8, 8, 1), 100, np.uint8)
    noisy = images.copy()
    noisy[0] += 5  # MSE 25
    noisy[1] -= 10  # MSE 100
    found = scores.pair_figures(images, noisy)
    assert found["pair_mse"] == pytest.approx(125 / 3)
    assert found["psnr_of_mean_mse"] == pytest.approx(10 * np.log10(255**2 * 3 / 125))
    assert found["psnr_mean_per_image"] == pytest.approx(5 * np.log10(255**2 / 25) + 5 * np.log10(255**2 / 100))
    assert found["identical"] == 1
    assert scores.pair_figures(images, 255 - images)["pair_mse"] == 55**2  # no wrap-around


def test_identical_images_have_no_psnr_and_are_counted():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    assert scores.pair_figures(images, images) == {
        "psnr_of_mean_mse": None, "psnr_mean_per_image": None, "pair_mse": 0.0, "identical": 4, "contrast": None
    }  # fmt: skip


def test_class_order_is_seen_and_chance_is_not():
    random = np.random.default_rng(0).integers(0, 10, 1000)
    assert scores.in_class_order(np.sort(random))
    assert scores.in_class_order(np.where(np.random.default_rng(1).random(1000) < 0.1, random, np.sort(random)))
    assert not scores.in_class_order(random)
    assert not scores.in_class_order(np.arange(1000) % 10)
    assert not scores.in_class_order(np.zeros(1000, int))


def test_imbalance_is_seen_and_chance_is_not():
    equal = np.full(10, 0.1)
    for seed in range(20):
        assert scores.imbalance(np.random.default_rng(seed).integers(0, 10, 1000), equal) is None
    assert scores.imbalance(np.random.default_rng(0).integers(0, 9, 1000), equal).tolist()[9] == 0
    assert scores.imbalance(np.array([0, 1, 10]), equal) is not None
    assert scores.imbalance(np.arange(10), equal) is None


def test_distances_on_other_features_are_not_called_fid():
    assert [scores.figure_key(name, "inception") for name in ("fid", "sfid", "is")] == ["fid", "sfid", "is"]
    assert [scores.figure_key(name, "digits") for name in ("fid", "sfid", "is")] == ["fd_digits", "sfd_digits", "is"]
    labels = {scores.figure_label(name, "digits") for name in scores.LABELS}
    assert "FD(digits)" in labels and "sFD(digits)" in labels and not any("FID" in label for label in labels)
    assert scores.figure_label("sfid", "inception") == "sFID"
