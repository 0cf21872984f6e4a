"""What methods claim that shift, scale or rotate channels before rounding them; and they change nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipelines.errors import FileFault, UsageError
from pipelines.measures import Measures as RealMeasures
from pipelines.methods import METHODS, auto, dmq, find
from pipelines.methods.equivalent import few, outputs
from pipelines.quant.affine import choose, cover, dequantise, quantise
from pipelines.quant.candidates import measure, rotated_rows
from pipelines.quant.hadamard import rotate_last, rotate_weight
from pipelines.quant.layers import QuantLayer, as_rows, from_rows
from pipelines.quant.spec import HALVES, Bits, Site, SitePlan, Transform, integer_range
from pipelines.quant.surroundings import taps_of
from pipelines.quant.tables import TimestepTables

TOKENS = Site("tokens", "linear", "attention", (48, 64), rank=3)
VECTORS = Site("vectors", "linear", "time-projection", (48, 64))
CONV = Site("conv", "conv", "residual", (24, 32, 3, 3), padding=(1, 1), rank=4, positions=(8, 8))
STRIDED = Site("strided", "conv", "residual", (24, 20, 3, 3), (2, 2), (1, 1), rank=4, positions=(8, 8))
SHORTCUT = Site("shortcut", "conv", "skip", (24, 48, 1, 1), rank=4, positions=(8, 8), joint=16)
QUICK = {"dmq": {"steps": "30"}, "outlier_suppression": {"thresholds": "20"}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Sampled:
    """A profile of one site whose sample is all that was ever seen: (T, rows, C) or (T, rows, C, W). Signs help."""

    def __init__(self, sample, weight=None):
        self._sample, self._weight, self.timesteps = sample, weight, list(range(len(sample), 0, -1))

    def _part(self, site):
        """The channels of a half, of what is the whole's."""
        channels = self._sample.shape[2]
        return slice(channels - site.channels, None) if site.name.endswith(HALVES[1]) else slice(site.channels)

    def sample(self, site):
        return self._sample[:, :, self._part(site)]

    def own_mean(self, site):
        return self.sample(site).mean(1, keepdim=True)

    def weight(self, site):
        return self._weight[:, self._part(site)]

    def statistic(self, site, name):
        values = self.sample(site).transpose(1, 2).flatten(2)
        return {"absmax": values.abs().amax(2), "low": values.amin(2), "high": values.amax(2)}.get(name, values.mean(2))

    def sqnrs(self, site, quantiser, bits):
        return {"none": 20.0}

    def sqnr(self, site, transform, quantiser, bits):
        return 20.0 + (transform.signs is not None)

    def transforms(self, site):
        return [Transform(), *(each for each in [Transform("channels", 16, 1)] if site.admits(each))]

    def record(self, plan):
        return {"none": 20.0}

    moved = RealMeasures.moved


def drawn(site, timesteps=3, rows=40, seed=0):
    """A random input of a site, of channels that differ in mean and in size; and a random weight."""
    generator = torch.Generator().manual_seed(seed)
    shape = (timesteps, rows, site.channels, *([8] if site.kind == "conv" else []))
    by_channel = (-1, 1) if site.kind == "conv" else (-1,)
    size = torch.randn(site.channels, generator=generator).exp().view(by_channel)
    mean = torch.randn(site.channels, generator=generator).view(by_channel)
    return torch.randn(shape, generator=generator) * size + mean, torch.randn(site.weight, generator=generator)


def decided(name, site, sample, weight, bits="w4a4", variant=None, **options):
    """(plans, profile, variant) of a site by a method: one plan, or those of its halves."""
    method, _, chosen = find(name, variant, QUICK.get(name, {}) | {key: str(value) for key, value in options.items()})
    measured = Sampled(sample, weight)
    made = method.decide(site, Bits.parse(bits), measured, chosen)
    return (made if isinstance(made, tuple) else (made,)), measured, chosen


def planned(name, site, sample, weight, bits="w4a4", variant=None, **options):
    """(plan, constants, profile, variant) of a site by a method."""
    (plan,), measured, chosen = decided(name, site, sample, weight, bits, variant, **options)
    constants = METHODS[name].constants(plan, weight, measured, chosen) if METHODS[name].constants else {}
    return plan, constants, measured, chosen


def in_quantiser(weight, plan, constants):
    """The weight as it is rounded: over the gain, and rotated where the plan says so."""
    if "gain" in constants:
        weight = weight / constants["gain"].view(1, -1, *[1] * (weight.ndim - 2))
    return rotate_weight(weight, plan.transform) if plan.inverse == "double" else weight


def rounded_error(name, site, sample, weight, at=None, search=cover, **options):
    """Relative squared error of the layer's outputs, quantised as a method plans it, activations by maxima or another
    `search`; of the timestep `at` alone where one is named.
    """
    plan, constants, measured, chosen = planned(name, site, sample, weight, **options)
    method = METHODS[name]
    rows = rotated_rows(measured.moved(plan, constants), plan.transform)
    static = bool(method.groups and method.groups(measured, chosen))
    scale, zero = search(rows.reshape(1, -1) if static else rows, *plan.activation_range)
    x = dequantise(quantise(rows, scale[:, None], zero[:, None], *plan.activation_range), scale[:, None], zero[:, None])
    large = in_quantiser(weight, plan, constants)
    turned = rotate_weight(large, plan.transform) if plan.inverse == "single" else large
    true = rows.view(len(sample), -1, large.shape[1]) @ turned.T
    scale, zero = choose(large, *plan.weight_range)
    large = dequantise(
        quantise(large, scale[:, None], zero[:, None], *plan.weight_range), scale[:, None], zero[:, None]
    )
    if plan.inverse == "single":
        large = rotate_weight(large, plan.transform)
    found = x.view(len(sample), -1, large.shape[1]) @ large.T
    before = sample @ weight.T  # a rotation multiplies the product with its order
    if at is not None:
        found, true, before = found[at], true[at], before[at]
    return ((found - true).square().sum() / plan.transform.order**2 / before.square().sum()).item()


def unrounded(plan, constants, weight):
    """(what the student's layer computes of a random input while nothing of either operand is rounded, what the
    teacher's did).
    """
    site, outputs = plan.site, len(weight)
    if "centre" in constants:
        constants["taps"] = taps_of(constants["centre"], weight, site)
    x = torch.randn((2, site.channels, 8, 8) if site.kind == "conv" else (2, *[5] * (site.rank - 2), site.channels)) + 3
    tables = TimestepTables([1.0], torch.tensor([[0.3]]), torch.tensor([[2.0]]))
    tables.set_timestep(1.0)
    bias, scale = torch.randn(outputs), torch.rand(outputs) + 0.5
    layer = QuantLayer(plan, weight, bias, scale, torch.zeros(outputs), tables, 0, slice(0, outputs), constants)
    codes = layer._rows(slice(0, outputs)).turned(as_rows(weight)) / scale[:, None]
    layer.float_inputs, layer.soft_codes = True, lambda: codes
    single = plan.inverse == "single"
    layer.folded = lambda: from_rows(rotate_last(codes, plan.transform) if single else codes, weight.shape)
    true = F.conv2d(x, weight, bias, site.stride, site.padding) if site.kind == "conv" else F.linear(x, weight, bias)
    with torch.no_grad():
        return layer(x), true


@pytest.mark.parametrize(
    "name, variant, options",
    [(name, variant, {}) for name, method in METHODS.items() for variant in method.variants]
    + [("hadanorm", None, {"convolutions": "rotated"})],
)
@pytest.mark.parametrize("site", [TOKENS, VECTORS, CONV, STRIDED, SHORTCUT], ids=lambda site: site.name)
def test_without_rounding_a_layer_computes_what_it_did(name, variant, options, site):
    sample, weight = drawn(site)
    made, measured, chosen = decided(name, site, sample, weight, variant=variant, **options)
    for plan in made:
        if plan.quantised:
            mine = measured.weight(plan.site)
            constants = METHODS[name].constants(plan, mine, measured, chosen) if METHODS[name].constants else {}
            found, true = unrounded(plan, constants, mine)
            assert (found - true).abs().max() < 1e-5 * true.abs().max()


@pytest.mark.parametrize("site", [TOKENS, STRIDED, CONV], ids=lambda site: site.name)
def test_without_rounding_no_placement_that_auto_tries_changes_what_a_layer_computes(site):
    sample, weight = drawn(site)
    measured, (_, _, variant) = Sampled(sample, weight), find("hqdm", "auto", {"axis": "any"})
    placements = list(auto._placements(SitePlan(site), variant))
    by_channels, by_width = (
        {"single", "double"} if site != STRIDED else set(),
        {"activation"} if site != TOKENS else set(),
    )
    assert {plan.inverse for plan in placements} == {"none"} | by_channels | by_width
    for plan in placements:
        found, true = unrounded(plan, auto.constants(plan, weight, measured, variant), weight)
        assert (found - true).abs().max() < 1e-5 * true.abs().max(), plan


def test_rounding_to_the_nearest_has_one_range_for_all_timesteps_and_nothing_around_it():
    sample, weight = drawn(TOKENS)
    plan, constants, measured, chosen = planned("rtn", TOKENS, sample, weight)
    assert not constants and not plan.scaling and plan.centring == "none" and plan.transform.is_identity
    assert set(METHODS["rtn"].groups(measured, chosen)) == {0} and chosen.recipe.updates == "none"


def test_rounding_by_maxima_clips_nothing_that_the_profile_saw_and_by_error_it_does():
    """An end of a range is half a step away at most, since zero is on the grid; the sample never saw the ends."""
    sample, weight = drawn(TOKENS)
    weight[:, 7] *= 5
    low, high = sample.amin(1) - 5.0, sample.amax(1) + 9.0
    measured = RealMeasures.__new__(RealMeasures)
    measured.timesteps, measured.sites = [3, 2, 1], [TOKENS]
    measured.statistic = lambda site, name: {"low": low, "high": high}[name]
    measured.sample = lambda site: sample
    furthest = {}
    for variant in ("max", "search"):
        method, _, chosen = find("rtn", variant)
        plan, recipe = method.decide(TOKENS, Bits(4, 4), Sampled(sample), chosen), chosen.recipe
        by, groups = recipe.activation_scale_by, method.groups(measured, chosen)
        scale, zero = measured.activation_scales(plan, {}, groups, by, recipe.headroom)
        assert scale.unique().numel() == 1
        rows = cover if recipe.weight_scale_by == "max" else choose
        operands = [
            (torch.stack([low.min(), high.max()])[None], scale[:1], zero[:1], plan.activation_range),
            (weight, *rows(weight, *plan.weight_range), plan.weight_range),
        ]
        furthest[variant] = []
        for values, step, shift, ends in operands:
            step, shift = step[:, None], shift[:, None]
            away = (dequantise(quantise(values, step, shift, *ends), step, shift) - values).abs() / step
            furthest[variant].append(away.max().item())
    assert max(furthest["max"]) < 0.5 + 1e-4 and min(furthest["search"]) > 0.6


def test_smoothing_shares_an_outlying_channel_with_the_weight_and_lowers_the_error():
    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample)
    sample[:, :, 5] *= 50
    plan, constants, measured, _ = planned("smoothquant", TOKENS, sample, weight)
    moved = measured.moved(plan, constants).abs().amax((0, 1))
    assert moved.max() / moved.median() < 0.2 * sample.abs().amax((0, 1)).max() / sample.abs().amax((0, 1)).median()
    columns = in_quantiser(weight, plan, constants).abs().amax(0)
    assert torch.allclose(moved, columns, rtol=1e-4)  # at α = 0.5 both have √(max|x|·max|w|)
    assert rounded_error("smoothquant", TOKENS, sample, weight) < 0.6 * rounded_error("rtn", TOKENS, sample, weight)


def test_a_smoothing_of_nought_leaves_the_weight_flat_and_of_one_the_activation():
    sample, weight = drawn(TOKENS)
    plan, constants, measured, _ = planned("smoothquant", TOKENS, sample, weight, alpha=1)
    assert torch.allclose(measured.moved(plan, constants).abs().amax((0, 1)), torch.ones(64))
    plan, constants, *_ = planned("smoothquant", TOKENS, sample, weight, alpha=0)
    assert torch.allclose(in_quantiser(weight, plan, constants).abs().amax(0), torch.ones(64))


def test_a_channel_that_is_always_zero_is_left_alone():
    sample, weight = drawn(TOKENS)
    sample[:, :, 3] = 0
    for name in ("smoothquant", "outlier_suppression", "hadanorm", "dmq"):
        _, constants, *_ = planned(name, TOKENS, sample, weight)
        assert torch.isfinite(constants["gain"]).all() and 0 < constants["gain"][3] < 100


def test_outlier_suppression_puts_a_lopsided_channel_in_the_middle_and_lowers_the_error():
    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample)
    sample[:, :, 7] = sample[:, :, 7] + 30
    plan, constants, measured, _ = planned("outlier_suppression", TOKENS, sample, weight)
    moved = measured.moved(plan, constants)
    assert torch.allclose(moved.amax((0, 1)), -moved.amin((0, 1)), atol=1e-4)
    assert moved[:, :, 7].abs().max() < 6 < sample[:, :, 7].abs().max()
    assert rounded_error("outlier_suppression", TOKENS, sample, weight) < 0.1 * rounded_error(
        "rtn", TOKENS, sample, weight
    )


def test_outlier_suppression_squeezes_outlying_channels_to_one_threshold_and_no_others():
    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample).clamp(-3, 3)
    sample[:, :, [2, 9]] *= torch.tensor([20.0, 40.0])
    plan, constants, measured, _ = planned("outlier_suppression", TOKENS, sample, weight, thresholds=100)
    largest = measured.moved(plan, constants).abs().amax((0, 1))
    squeezed = constants["gain"] < 1
    assert squeezed[[2, 9]].all() and torch.allclose(largest[squeezed], largest.max())
    assert (largest[~squeezed] <= largest.max()).all() and (constants["gain"][~squeezed] == 1).all()


def test_a_range_by_maxima_is_of_all_values_also_of_those_that_the_sample_has_not():
    """Of each channel, centred and scaled; rotated values are known of the sample alone."""
    sample, weight = drawn(TOKENS)
    measured = RealMeasures.__new__(RealMeasures)
    measured.timesteps = [3, 2, 1]
    seen = {"low": sample.amin(1) - 5.0, "high": sample.amax(1) + 9.0}
    measured.statistic = lambda site, name: seen[name]
    measured.sample = lambda site: sample
    constants = {"centre": torch.full((64,), 2.0), "gain": torch.linspace(0.5, 2, 64)}
    plan = SitePlan(
        TOKENS, activation_quantiser="asymmetric", activation_bits=8, weight_bits=8, centring="static", scaling=True
    )
    low, high = ((seen[name] - 2.0) * constants["gain"] for name in ("low", "high"))
    scale, zero = measured.activation_scales(plan, constants, [], "max", headroom=1.3)
    assert torch.allclose(scale, ((high.amax(1) - low.amin(1)) / 255).flip(0))  # timesteps ascend
    assert torch.allclose((0 - zero) * scale, low.amin(1).flip(0), atol=float(scale.max()))
    turned = SitePlan(TOKENS, transform=Transform("channels", 16), inverse="single")
    rows = rotated_rows(sample, turned.transform)
    wanted = cover(rows, *turned.activation_range)[0] * 1.3
    assert torch.equal(measured.activation_scales(turned, {}, [], "max", headroom=1.3)[0], wanted.flip(0))


def test_ranges_and_means_of_a_profile_are_those_of_a_sites_half_and_absent_ones_are_told(tmp_path):
    """Ranges of grouped timesteps take in all of the group."""
    low, high, mean = -torch.rand(3, 48), torch.rand(3, 48), torch.randn(3, 5, 48)
    save_file({"shortcut/low": low, "shortcut/high": high}, tmp_path / "statistics.safetensors")
    save_file({"shortcut": torch.randn(3, 5, 48), "shortcut/mean": mean}, tmp_path / "samples.safetensors")
    save_file({}, tmp_path / "candidates.safetensors")
    (tmp_path / "profile.json").write_text(
        json.dumps({"timesteps": [3, 2, 1], "sites": {"shortcut": {"candidates": []}}})
    )
    measured = RealMeasures(tmp_path, [SHORTCUT])
    first, second = SHORTCUT.halves()
    assert torch.equal(measured.own_mean(first), mean[:, :, :16])
    assert torch.equal(measured.own_mean(second), mean[:, :, 16:])
    plan = SitePlan(second, activation_quantiser="asymmetric")
    scale, _ = measured.activation_scales(plan, {}, [0, 0, 1], "max", headroom=1.3)
    width = (high[:, 16:].amax(1), low[:, 16:].amin(1))
    wide = torch.stack([width[0][:2].max() - width[1][:2].min(), width[0][2] - width[1][2]]) / 255
    assert torch.allclose(scale, wide[[1, 0, 0]])  # timesteps ascend
    with pytest.raises(FileFault, match="no shortcut/absmax") as told:
        measured.statistic(first, "absmax")
    assert told.value.hint == "hqdm profile --force"


def test_learned_scales_lower_the_layers_error_at_the_widths_they_were_learned_for():
    """And further than no updates do, which is rounding to the nearest."""
    sample, weight = drawn(TOKENS)
    sample[:, :, 5] *= 20
    errors = [rounded_error("dmq", TOKENS, sample, weight, steps=steps, variant="scaling") for steps in (0, 100)]
    assert errors[1] < 0.5 * errors[0]


def test_a_convolutions_scales_are_learned_too():
    sample, weight = drawn(CONV)
    sample[:, :, 5] *= 20
    plan, constants, measured, _ = planned("dmq", CONV, sample, weight, steps=60)
    gain = constants["gain"]
    assert gain.shape == (32,) and (gain > 0).all() and gain[5] < 0.5 * gain.median()


def test_scales_are_learned_for_the_range_that_the_layer_will_have_and_not_for_the_samples():
    """A channel whose outliers the sample missed is divided by more, since they set the activation's range."""

    class Wider(Sampled):
        def statistic(self, site, name):
            found = super().statistic(site, name).clone()
            found[:, 5] *= 20
            return found

    sample, weight = drawn(TOKENS)
    method, _, chosen = find("dmq", None, {"steps": 100})
    plan = method.decide(TOKENS, Bits(4, 4), Sampled(sample), chosen)
    gains = [method.constants(plan, weight, measured, chosen)["gain"] for measured in (Sampled(sample), Wider(sample))]
    assert gains[1][5] / gains[1].median() < 0.5 * gains[0][5] / gains[0].median()


def test_the_weighting_keeps_timesteps_of_large_error_from_ruling_the_scales():
    """One timestep has an outlier of its own, far larger than all else."""
    sample, weight = drawn(TOKENS, timesteps=8)
    sample = torch.randn_like(sample)
    sample[:7, :, 3] *= 8
    sample[7, :, 40] *= 400

    def error_elsewhere(power):
        plan, constants, *_ = planned("dmq", TOKENS, sample, weight, power=power, steps=100)
        few_steps = sample[:7]
        x = few_steps.flatten(0, 1)[None]
        low, high = x.amin(1), x.amax(1)
        return dmq.scaled_error(x, weight, 1 / constants["gain"], low, high, plan).square().mean().item()

    assert error_elsewhere(20.0) < error_elsewhere(0.0)


def shortcut_sample():
    """Channels of the whole range, of a half, a quarter and an eighth, and one that is small at two rows of three."""
    sample = torch.rand(4, 20, 5, 64) * 2 - 1
    sample[:, :, 0] *= 16
    sample[:, :, 0, 0] = 16
    sample[:, :, 1], sample[:, :, 2], sample[:, :, 3] = (sample[:, :, i] * f for i, f in ((1, 7.5), (2, 3.5), (3, 1.5)))
    sample[:, ::3, 4] *= 15
    return sample


def test_powers_of_two_are_voted_for_and_a_divided_vote_counts_for_none():
    site = Site("shortcut", "conv", "skip", (8, 5, 1, 1), rank=4, positions=(8, 8))
    plan = SitePlan(site, activation_bits=8, scaling=True)
    sample = shortcut_sample()
    ends = sample.amin((1, 3)), sample.amax((1, 3))
    assert dmq.powers(sample, *ends, plan, 0.85).tolist() == [0, 1, 2, 3, 0]
    assert dmq.powers(sample, *ends, plan, 0.6)[4] == 3


def test_a_shortcut_that_joins_two_inputs_is_divided_and_has_powers_of_two_alone():
    sample, weight = drawn(SHORTCUT)
    method, _, chosen = find("dmq", None, QUICK["dmq"])
    halves = method.decide(SHORTCUT, Bits(4, 4), Sampled(sample), chosen)
    assert [half.site.name for half in halves] == ["shortcut.first", "shortcut.second"]
    for half, span in zip(halves, (slice(16), slice(16, None)), strict=True):
        constants = method.constants(half, weight[:, span], Sampled(sample[:, :, span]), chosen)
        assert set(constants["gain"].tolist()) <= {1.0, 2.0, 4.0, 8.0} and len(constants["gain"]) == half.site.channels
        assert (half.weight_bits, half.activation_bits) == (8, 8)


def test_centring_before_a_hadamard_transform_pays_where_channels_have_large_means():
    """A mean of all channels goes into the first coordinate of every block, and sets the range there."""
    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample)
    sample[:, :, ::2] += 10
    errors = {
        name: rounded_error(name, TOKENS, sample, weight, bits="w8a4") for name in ("hadanorm", "double_hadamard")
    }
    assert errors["hadanorm"] < 0.1 * errors["double_hadamard"]


def test_hadanorm_centres_linears_by_image_and_leaves_convolutions_as_they_are_unless_told():
    measured = Sampled(drawn(TOKENS)[0])
    _, _, chosen = find("hadanorm", None)
    _, _, rotated = find("hadanorm", None, {"convolutions": "rotated"})
    decide = METHODS["hadanorm"].decide
    assert decide(TOKENS, Bits(4, 4), measured, chosen).centring == "dynamic"
    assert decide(VECTORS, Bits(4, 4), measured, chosen).centring == "static"
    plain, turned = (decide(CONV, Bits(4, 4), measured, variant) for variant in (chosen, rotated))
    assert plain.transform.is_identity and plain.centring == "none" and not plain.scaling
    assert turned.transform == Transform("channels", 32) and turned.inverse == "double" and turned.centring == "static"


def test_full_normalisation_gives_all_channels_one_deviation():
    sample, weight = drawn(TOKENS, rows=400)
    plan, constants, measured, _ = planned("hadanorm", TOKENS, sample, weight, alpha=1)
    assert torch.allclose(measured.moved(plan, constants).flatten(0, 1).std(0), torch.ones(64), atol=0.01)


def test_hqdm_spreads_an_outlying_channel_and_its_error_shrinks():
    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample)
    sample[:, :, 5] *= 10
    single = rounded_error("hqdm", TOKENS, sample, weight, variant="paper", bits="w8a4")
    assert single < 0.5 * rounded_error("efficientdm", TOKENS, sample, weight, bits="w8a4")


def test_hqdm_as_printed_spreads_an_outlying_column_of_an_image_and_its_error_shrinks():
    """Equations 16 to 18: rotated along the width, quantised, rotated back, then convolved."""
    x, (_, weight) = torch.randn(4, 32, 8, 8), drawn(CONV)
    x[..., 3] *= 10
    (plan,), *_ = decided("hqdm", CONV, drawn(CONV)[0], weight, "w8a4", "paper")
    assert (plan.transform, plan.inverse) == (Transform("width", 8), "activation")
    true, errors = F.conv2d(x, weight, None, padding=1), []
    for mine in (plan, replace(plan, transform=Transform(), inverse="none")):
        rows = rotated_rows(x.transpose(1, 2).flatten(0, 1)[None], mine.transform)  # (1, n) of (1, rows, C, W)
        scale, zero, _ = measure(rows, mine.activation_bits, mine.activation_quantiser)
        tables = TimestepTables([1.0], scale[:, None], zero[:, None])
        tables.set_timestep(1.0)
        layer = QuantLayer(mine, weight, None, *choose(weight.flatten(1), *mine.weight_range), tables, 0, slice(0, 24))
        with torch.no_grad():
            errors.append((layer(x) - true).square().mean() / true.square().mean())
    assert errors[0] < 0.5 * errors[1]


def test_efficientdm_follows_each_timestep_where_one_static_range_drowns_the_small_ones():
    sample, weight = drawn(TOKENS)
    sample = F.silu(torch.randn_like(sample)) * torch.tensor([1.0, 8.0, 64.0]).view(3, 1, 1)
    errors = {name: rounded_error(name, TOKENS, sample, weight, at=0) for name in ("efficientdm", "rtn")}
    assert errors["efficientdm"] < 0.05 * errors["rtn"]
    plan, *_ = planned("efficientdm", TOKENS, sample, weight)
    assert plan.activation_quantiser == "asymmetric"
    rows = sample.flatten(1)
    lopsided = []  # after SiLU a symmetric range spends almost half of its codes on nothing
    for quantiser in ("asymmetric", "symmetric"):
        low, high = integer_range(plan.activation_bits, quantiser == "symmetric")
        scale, zero = (value[:, None] for value in choose(rows, low, high, norm=2.0))
        lopsided.append((dequantise(quantise(rows, scale, zero, low, high), scale, zero) - rows).square().mean(1))
    assert (lopsided[0] < 0.7 * lopsided[1]).all()


def test_double_hadamard_amplifies_outliers_of_a_weight_that_single_hadamard_leaves_as_they_are():
    """HQ-DM's figure 3: a smooth row of one sign goes into one coordinate of each block, and sets the range."""
    sample, _ = drawn(VECTORS)
    weight = 1 + 0.2 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    outlying, error = {}, {}
    for name, variant in (("hqdm", "code"), ("double_hadamard", "distilled")):
        plan, constants, *_ = planned(name, VECTORS, sample, weight, "w3a8", variant)
        assert plan.transform == Transform("channels", 32)
        rows = in_quantiser(weight, plan, constants)
        outlying[variant] = (rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean()
        error[variant] = rounded_error(name, VECTORS, sample, weight, bits="w3a8", variant=variant)
    assert outlying["distilled"] > 3 * outlying["code"]
    assert error["distilled"] > 4 * error["code"]


def test_double_hadamard_distilled_is_the_published_code_but_for_the_side_of_the_inverse():
    measured = Sampled(drawn(CONV)[0])
    theirs, ours = find("hqdm", "code"), find("double_hadamard", "distilled")
    assert theirs[2].recipe == ours[2].recipe and not ours[0].groups(measured, ours[2])
    for site in (TOKENS, VECTORS, CONV, STRIDED, SHORTCUT):
        single, double = (method.decide(site, Bits(4, 4), measured, variant) for method, _, variant in (theirs, ours))
        assert (single.transform, single.weight_quantiser) == (double.transform, double.weight_quantiser)
        assert double.inverse == {"single": "double"}.get(single.inverse, single.inverse)


def test_quarot_takes_the_widest_block_that_divides_the_channels():
    measured = Sampled(drawn(CONV)[0])
    _, _, chosen = find("double_hadamard", "quarot")
    orders = [
        METHODS["double_hadamard"].decide(site, Bits(4, 4), measured, chosen).transform.order
        for site in (TOKENS, CONV, STRIDED)
    ]
    assert orders == [64, 32, 1]


def test_quarots_widest_block_spreads_an_outlying_channel_and_its_error_is_below_that_of_rounding():
    """Each with the ranges of its variant, those of least error."""

    def least(rows, low, high):
        return choose(rows, low, high, norm=2.0)

    sample, weight = drawn(TOKENS)
    sample = torch.randn_like(sample)
    sample[:, :, 5] *= 10
    double = rounded_error("double_hadamard", TOKENS, sample, weight, search=least, bits="w8a4", variant="quarot")
    assert double < 0.5 * rounded_error("rtn", TOKENS, sample, weight, search=least, bits="w8a4", variant="search")


def test_some_of_a_sample_is_spread_over_its_timesteps_and_outputs_are_the_layers_own():
    sample, weight = drawn(CONV)
    assert few(sample, 80).shape == (10, 32, 8) and few(sample, 10**6).shape == (120, 32, 8)
    flat = Site("flat", "conv", "residual", (24, 32, 1, 3), padding=(0, 1), rank=4, positions=(1, 8))
    rows = few(sample, 80)
    whole = F.conv2d(rows[:, :, None], weight[:, :, :1], None, padding=(0, 1))[:, :, 0]
    assert torch.allclose(outputs(rows, weight[:, :, :1], flat), whole, atol=1e-5)


@pytest.mark.parametrize(
    "name, option, value",
    [("smoothquant", "alpha", "1.5"), ("hadanorm", "alpha", "-1"), ("outlier_suppression", "thresholds", "0"),
     ("dmq", "rate", "0"), ("dmq", "steps", "-1"), ("dmq", "share", "2"), ("rtn", "quantiser", "odd")],
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused_with_what_it_takes(name, option, value):
    with pytest.raises(UsageError, match=f"{option} cannot be") as caught:
        method, _, chosen = find(name, None, {option: value})
        method.decide(TOKENS, Bits(4, 4), Sampled(drawn(TOKENS)[0]), chosen)
    assert caught.value.hint
