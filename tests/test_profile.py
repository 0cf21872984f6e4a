"""Observers, candidate transforms and the profile stage, against their definitions."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from drawing import drawn
from safetensors.torch import load_file
from tiny import tiny_denoiser

from pipelines import runner
from pipelines.errors import HqdmError, NumericalFault
from pipelines.events import Report
from pipelines.models.denoiser import find_sites, save_denoiser
from pipelines.quant.affine import choose, dequantise, quantise, sqnr
from pipelines.quant.candidates import SIGN_SEED, candidates, centred_rows, measure, rotated_rows, shown
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.observe import Observer, SiteObserver
from pipelines.quant.spec import IDENTITY, Site, Transform, integer_range, site_to_dict
from pipelines.stages import profile
from pipelines.workspace.store import Store

LINEAR = Site("linear", "linear", "attention", (8, 64), rank=3)
CONV = Site("conv", "conv", "residual", (8, 64, 3, 3), padding=(1, 1), positions=(16, 16))
HADAMARD, SIGNED = Transform("channels", 32), Transform("channels", 32, SIGN_SEED)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 0) -> torch.Tensor:
    return normal(6, 64, 16, 16, seed=seed).contiguous(memory_format=torch.channels_last)


def ratio(sample: torch.Tensor, transform: Transform, bits: int = 4) -> float:
    return float(measure(rotated_rows(sample, transform), bits, "symmetric")[2].mean())


# ------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("transform", [HADAMARD, SIGNED])
def test_an_outlier_channels_sqnr_rises_under_a_hadamard_transform(transform):
    sample = normal(2, 64, 64)
    sample[:, :, 5] *= 30
    assert ratio(sample, transform, 3) > ratio(sample, IDENTITY, 3) + 1
    assert ratio(sample, transform) > ratio(sample, IDENTITY) + 1


def test_a_plain_hadamard_gathers_a_positive_mean_and_signs_spread_it():
    sample = torch.nn.functional.silu(1 + normal(2, 64, 64))  # what most convolutions read
    plain, signed = (
        rotated_rows(sample, transform).view(2, 64, 2, 32).mean((0, 1, 2)).abs() for transform in (HADAMARD, SIGNED)
    )
    assert plain[0] > 20 * plain[1:].max()
    assert signed.max() < plain[0] / 2
    assert ratio(sample, SIGNED) > ratio(sample, HADAMARD) + 0.3


@pytest.mark.parametrize("transform", [HADAMARD, SIGNED, Transform("channels", 8), Transform("width", 16)])
def test_sqnr_in_the_rotated_domain_is_that_of_the_activation_rotated_back_with_the_layers_own_scale(transform):
    sample = normal(3, 4, 64, 16)
    scale, zero, measured = measure(rotated_rows(sample, transform), 4, "asymmetric")
    for row in range(3):
        x = sample[row][:, :, None]  # (rows, C, 1, W), an image of height 1
        codes = quantise(rotate_activation(x, transform, True), scale[row], zero[row], *integer_range(4, False))
        back = rotate_activation(codes - zero[row], transform, True, inverse=True) * (scale[row] / transform.order)
        assert sqnr(x.flatten(), back.flatten()) == pytest.approx(float(measured[row]), abs=1e-3)


def test_centring_counts_the_noise_against_the_whole_activation():
    sample = 10 + normal(2, 64, 64)
    rows, mean = rotated_rows(sample, HADAMARD), sample.mean(1)
    centred = centred_rows(rows, mean, sample, HADAMARD)
    scale, zero, measured = measure(centred, 4, "symmetric", rows)
    back = dequantise(quantise(centred, scale[:, None], zero[:, None], -7, 7), scale[:, None], zero[:, None])
    noise = (back - centred).double().square().sum(1) / HADAMARD.order
    expected = 10 * torch.log10(sample.double().square().sum((1, 2)) / noise)
    torch.testing.assert_close(measured.double(), expected, atol=1e-2, rtol=0)


def test_a_row_of_zeros_is_quantised_without_error():
    scale, zero, measured = measure(torch.zeros(2, 64), 4, "asymmetric")
    assert scale.tolist() == [1, 1] and zero.tolist() == [0, 0] and measured.tolist() == [200, 200]


def test_the_square_gives_the_scales_of_the_norm_two():
    x = normal(4, 512)
    for low, high in ((-7, 7), (0, 15)):
        square, almost = choose(x, low, high, norm=2), choose(x, low, high, norm=2.0000001)
        assert torch.equal(square[0], almost[0]) and torch.equal(square[1], almost[1])


def test_a_site_is_offered_only_what_its_shape_admits():
    names = [candidate.name for candidate in candidates(CONV)]
    assert names[:3] == ["none", "channels-8", "channels-8-signs"] and "channels-64-signs" in names
    assert names[-3:] == ["width-16", "centred", "centred-channels-32"]
    first = Site("conv_in", "conv", "first", (64, 1, 3, 3), positions=(12, 12))
    assert [candidate.name for candidate in candidates(first)] == ["none", "width-4", "centred"]
    assert [transform.name for transform in shown(LINEAR)] == ["channels-32", "channels-32-signs"]
    time = Site("time", "linear", "time", (64, 24))
    assert [candidate.name for candidate in candidates(time)] == ["none", "channels-8", "channels-8-signs"]


# -------------------------------------------------------------------------------------------------------- observers


def test_the_kurtosis_is_scipys_also_over_several_calls_far_from_zero():
    observer = SiteObserver(LINEAR, 1, (), 0)
    parts = [50 + normal(4, 10, 64, seed=seed) ** 3 for seed in range(3)]
    for part in parts:
        observer.add(0, part)
    expected = scipy.stats.kurtosis(torch.cat(parts).double().flatten().numpy(), fisher=False)
    assert float(observer.kurtosis[0]) == pytest.approx(expected, rel=1e-5)


def test_the_statistics_are_those_of_all_values():
    x = image()
    x[0, 3, 2, 1] = 100.0
    observer = SiteObserver(CONV, 2, shown(CONV), 0)
    observer.add(1, x)
    found = observer.statistics()
    assert found["minimum"][1] == x.min() and found["maximum"][1] == 100
    assert torch.equal(found["absmax"][1], x.abs().amax((0, 2, 3)))
    assert torch.equal(found["low"][1], x.amin((0, 2, 3))) and torch.equal(found["high"][1], x.amax((0, 2, 3)))
    torch.testing.assert_close(found["mean"][1], x.mean((0, 2, 3)))
    assert float(found["outliers"][1]) == pytest.approx(1 / x.numel())
    for transform in shown(CONV):
        rotated = rotate_activation(x, transform, True) / transform.order**0.5
        torch.testing.assert_close(found[f"absmax/{transform.name}"][1], rotated.abs().amax((0, 2, 3)))


def test_a_sample_is_whole_image_rows_or_tokens_bounded_and_the_same_places_at_every_timestep():
    observer = SiteObserver(CONV, 2, (), 0)
    for row in range(2):
        observer.add(row, image() + row)
    sample = observer.stacked_sample()
    assert sample.shape == (2, 4, 64, 16)
    rows = image().permute(0, 2, 1, 3).flatten(0, 1)
    assert all(any(torch.equal(entry, row) for row in rows) for entry in sample[0])
    torch.testing.assert_close(sample[1], sample[0] + 1)
    tokens = SiteObserver(LINEAR, 1, (), 0)
    tokens.add(0, normal(50, 4, 64))
    assert tokens.stacked_sample().shape == (1, 64, 64)


def test_a_token_of_the_sample_comes_with_the_mean_of_its_own_image():
    observer = SiteObserver(LINEAR, 1, (), 0)
    x = normal(50, 4, 64) + 10 * torch.arange(50.0)[:, None, None]
    observer.add(0, x)
    sample, mean = observer.stacked_sample()[0], observer.stacked_mean()[0]
    for token, own in zip(sample, mean, strict=True):
        image = next(index for index in range(50) if any(torch.equal(token, other) for other in x[index]))
        assert torch.allclose(own, x[image].mean(0))
    vectors = SiteObserver(LINEAR, 1, (), 0)
    vectors.add(0, normal(50, 64))
    assert vectors.stacked_mean() is None


def test_the_observer_looks_rows_up_by_the_denoisers_own_timestep_and_leaves_no_hooks():
    denoiser = tiny_denoiser(0)
    sites = find_sites(denoiser)
    x, classes = normal(2, 1, 8, 8), torch.tensor([0, 3])
    with Observer(denoiser.network, sites, [901, 401], shown, 0) as observer, torch.no_grad():
        denoiser.predict(x, torch.tensor(401), classes, 1.5)
        denoiser.predict(2 * x, torch.tensor(901), classes, 1.5)
        with pytest.raises(HqdmError, match="timestep 500"):
            denoiser.predict(x, torch.tensor(500), classes, 1.5)
        with pytest.raises(NumericalFault, match="conv_in.* 401"):
            denoiser.predict(x / 0, torch.tensor(401), classes, 1.5)
    first = observer.sites["conv_in"]
    assert first.high.amax(1).tolist() == [2 * x.max(), x.max()]
    denoiser.predict(x, torch.tensor(500), classes, 1.5)


# ------------------------------------------------------------------------------------------------------------ stage


CONFIG = profile.Config(steps=3, batch=2)


def store_with_model(root, seed: int = 0) -> Store:
    store, denoiser = Store(root), tiny_denoiser(seed, levels=1)
    with store.begin("model", "key", {}) as draft:
        save_denoiser(denoiser, draft.path)
        sites = [site_to_dict(site) for site in find_sites(denoiser)]
        (draft.path / "sites.json").write_text(json.dumps(sites))
        draft.commit({})
    return store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = store_with_model(tmp_path_factory.mktemp("workspace"))
    with drawn():
        return store, runner.make(store, "profile", CONFIG).artifact


def test_the_same_profile_twice_has_identical_bytes_pictures_included(made):
    store, artifact = made
    with drawn():
        again = runner.make(store, "profile", CONFIG, force=True).artifact
    assert again.id != artifact.id
    assert {name: entry["sha256"] for name, entry in again.manifest["files"].items()} == {
        name: entry["sha256"] for name, entry in artifact.manifest["files"].items()
    }


def test_every_candidate_has_scales_for_every_timestep_and_centred_ones_only_sqnr(made):
    _, artifact = made
    described = json.loads(artifact.file("profile.json").read_text())
    tensors = load_file(artifact.file("candidates.safetensors"))
    assert described["timesteps"] == [667, 334, 1]
    for site, entry in described["sites"].items():
        for candidate in entry["candidates"]:
            assert Transform(**candidate["transform"]).name in candidate["name"] or candidate["centred"]
            for quantiser in described["quantisers"]:
                for bits in described["bits"]:
                    key = f"{site}/{candidate['name']}/{quantiser}/{bits}"
                    assert tensors.pop(f"{key}/sqnr").shape == (3,)
                    if not candidate["centred"]:
                        assert (tensors.pop(f"{key}/scale") > 0).all()
                        zero = tensors.pop(f"{key}/zero")
                        assert torch.equal(zero, zero.round())
    assert not tensors


def test_statistics_have_one_row_a_timestep(made):
    _, artifact = made
    tensors = load_file(artifact.file("statistics.safetensors"))
    assert tensors["conv_out/kurtosis"].shape == (3,) and tensors["conv_out/absmax"].shape == (3, 32)
    assert tensors["conv_out/absmax/width-8"].shape == (3, 32)
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_more_bits_mean_a_higher_sqnr(made):
    _, artifact = made
    described = json.loads(artifact.file("profile.json").read_text())
    for entry in described["sites"].values():
        for by_quantiser in entry["sqnr"].values():
            for by_bits in by_quantiser.values():
                assert by_bits["3"] <= by_bits["4"] <= by_bits["6"] <= by_bits["8"]


def test_the_pictures_show_the_worst_site_of_every_part(made):
    _, artifact = made
    names = {name for name in artifact.manifest["files"] if name.startswith("pictures/")}
    parts = {"input-block", "middle", "output-block", "feed-forward"}
    assert names == {
        "pictures/outliers.png", "pictures/sqnr-gain.png", "pictures/sqnr-over-time.png",
        *(f"pictures/outliers-{part}.png" for part in parts),
    }  # fmt: skip
    sites = [Site(f"down_blocks.0.conv{n}", "conv", "residual", (8, 64, 3, 3), positions=(8, 8)) for n in range(2)]
    maxima = {site.name: {"absmax": np.ones((2, 64)), "absmax/width-8": np.ones((2, 64))} for site in sites}
    maxima["down_blocks.0.conv1"]["absmax"][:, 7] = 9
    assert {part: site.name for part, site in profile.chosen_sites(sites, maxima).items()} == {
        "input block": "down_blocks.0.conv1"
    }


def test_a_profile_needs_a_model_and_says_how_to_make_one(tmp_path):
    with pytest.raises(HqdmError) as fault:
        profile.inputs(profile.Config(), Store(tmp_path), {})
    assert "hqdm profile model.ckpt" in fault.value.hint


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_schedulers_that_visit_a_timestep_twice_or_between_whole_numbers_are_observed_too(scheduler):
    config = profile.Config(steps=3, batch=1, guidance=1.0, eta=0.0, scheduler=scheduler)
    denoiser = tiny_denoiser(0)
    observer = profile.observe(config, denoiser, find_sites(denoiser), Report())
    assert len(observer.rows) == 3
    assert (observer.sites["conv_in"].count > 0).all()
