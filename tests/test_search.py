"""The search of `hqdm` variant `auto`: what it says of a placement is what the layer then does."""

import math
import re
from dataclasses import replace

import pytest
import torch
from test_methods_scaling import CONV, TOKENS, Sampled, drawn
from torch.nn import functional as F

from pipelines.errors import UsageError
from pipelines.methods import auto, find
from pipelines.quant.affine import choose, dequantise, quantise
from pipelines.quant.candidates import measure
from pipelines.quant.hadamard import rotate_activation, rotate_weight
from pipelines.quant.search import SiteSearch
from pipelines.quant.spec import Bits, Site, SitePlan, Transform

POINTWISE = Site("pointwise", "conv", "residual", (24, 32, 1, 1), rank=4, positions=(8, 8))
ROTATED = Transform("channels", 8, 1)
PLACEMENTS = {
    "plain": {},
    "asymmetric": {"activation_quantiser": "asymmetric", "weight_quantiser": "asymmetric"},
    "single": {"transform": ROTATED, "inverse": "single"},
    "double": {"transform": ROTATED, "inverse": "double"},
    "centred": {"centring": "static"},
    "scaled": {"scaling": True},
    "all": {"transform": ROTATED, "inverse": "double", "centring": "static", "scaling": True},
    "width": {
        "transform": Transform("width", 8, 1), "inverse": "activation", "centring": "static", "scaling": True,
    },
}  # fmt: skip


def rounded(values, scale, zero, low, high):
    return dequantise(quantise(values, scale, zero, low, high), scale, zero)


def operands(plan, x, weight, constants):
    """(moved input, the same rounded, moved weight, the same rounded), all as the layer multiplies them.

    x: (N, C, H, W) or (N, tokens, C), of one timestep.
    """
    spatial = x.ndim == 4
    shape = (-1, 1, 1) if spatial else (-1,)
    if plan.centring == "static":
        x = x - constants["centre"].view(shape)
    if plan.scaling:
        x = x * constants["gain"].view(shape)
        weight = weight / constants["gain"].view(1, -1, *[1] * (weight.ndim - 2))
    x = rotate_activation(x, plan.transform, spatial)
    scale, zero, _ = measure(x.reshape(1, -1), plan.activation_bits, plan.activation_quantiser)
    coarse = rounded(x, scale, zero, *plan.activation_range)
    if plan.inverse == "double":
        weight = rotate_weight(weight, plan.transform)
    scale, zero = choose(weight.flatten(1), *plan.weight_range)
    by_row = (-1, *[1] * (weight.ndim - 1))
    back = rounded(weight, scale.view(by_row), zero.view(by_row), *plan.weight_range)
    if plan.inverse == "single":
        weight, back = (rotate_weight(each, plan.transform) for each in (weight, back))
    if plan.inverse == "activation":
        x, coarse = (rotate_activation(each, plan.transform, spatial, inverse=True) for each in (x, coarse))
    return x, coarse, weight / plan.transform.order, back / plan.transform.order


def images(site, seed=0):
    """(inputs of one timestep of a site, the same as a profile samples them, a weight)."""
    sample, weight = drawn(site, 1, 400, seed)
    if site.kind == "linear":
        return sample, sample, weight
    return sample[0].view(50, 8, site.channels, 8).transpose(1, 2).contiguous(), sample, weight


@pytest.mark.parametrize(
    "site, name",
    [(site, name) for site in (TOKENS, POINTWISE) for name in PLACEMENTS if site is POINTWISE or name != "width"],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_placements_cost_is_the_error_that_its_layer_makes(site, name):
    x, sample, weight = images(site)
    plan = SitePlan(site, weight_bits=3, activation_bits=4, **PLACEMENTS[name])
    constants = auto.constants(plan, weight, Sampled(sample, weight), None)
    cost = SiteSearch(sample, weight).cost(plan, constants.get("centre"), constants.get("gain"))
    moved, coarse, large, back = operands(plan, x, weight, constants)
    product = F.linear if site.kind == "linear" else F.conv2d
    energy = product(x, weight).square().mean()
    activation = (product(coarse - moved, large).square().mean() / energy).item()
    assert cost.activation == pytest.approx(activation, rel=1e-3)
    assert cost.weight == pytest.approx((product(moved, back - large).square().mean() / energy).item(), rel=1e-3)
    whole = (product(coarse, back) - product(moved, large)).square().mean() / energy
    assert cost.activation + cost.weight == pytest.approx(whole.item(), rel=0.2)  # e·fᵀ is left out


def test_a_centre_takes_the_mean_off_the_noise_of_the_weight():
    """c·Wᵀ is multiplied with the weight as it is."""
    sample = 3 + 0.3 * torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    search = SiteSearch(sample, weight)
    plain = SitePlan(TOKENS, weight_bits=3)
    centred = search.weight_noise(replace(plain, centring="static"), torch.full((64,), 3.0))
    assert centred < 0.02 * search.weight_noise(plain)


def test_what_all_places_of_a_kernel_share_adds_up_before_it_is_squared():
    """A symmetric quantiser clips the rare large values of inputs that are all positive: always downwards."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 32, 8, 8, generator=generator).log().neg()
    weight = 0.1 + 0.05 * torch.randn(CONV.weight, generator=generator)
    sample = x.transpose(1, 2).flatten(0, 1)[None].contiguous()
    plan = SitePlan(CONV, activation_bits=3)
    search = SiteSearch(sample, weight)
    moved, coarse, large, _ = operands(plan, x, weight, {})
    error = F.conv2d(coarse - moved, large).mean((0, 2, 3))  # inside the image
    assert search.cost(plan).bias * search.energy.item() == pytest.approx(error.square().sum().item(), rel=0.1)


@pytest.mark.parametrize("site", [TOKENS, CONV], ids=lambda site: site.name)
def test_the_placement_that_is_taken_costs_least_of_all_that_are_tried(site):
    sample, weight = drawn(site, 2, 60)
    measured = Sampled(sample, weight)
    _, _, variant = find("hqdm", "auto")
    chosen = auto.decide(site, Bits(4, 3), measured, variant)
    search = SiteSearch(sample, weight)

    def total(plan):
        constants = auto.constants(plan, weight, measured, variant)
        return search.cost(plan, constants.get("centre"), constants.get("gain")).total(variant.options["bias"])

    plain = SitePlan(site, weight_bits=4, activation_bits=3, weight_quantiser="asymmetric")
    tried = [total(plan) for plan in auto._placements(plain, variant)]
    assert len(tried) > 50 and total(chosen) == min(tried) < 0.8 * max(tried)


@pytest.mark.parametrize("asked, wrong", [
    ({"orders": "none"}, lambda plan: not plan.transform.is_identity),
    ({"orders": "32"}, lambda plan: plan.transform.order not in (1, 32)),
    ({"signs": "false"}, lambda plan: plan.transform.signs is not None),
    ({"double": "false"}, lambda plan: plan.inverse == "double"),
    ({"quantiser": "symmetric"}, lambda plan: plan.activation_quantiser != "symmetric"),
    ({"centring": "false"}, lambda plan: plan.centring != "none"),
    ({"scaling": "false"}, lambda plan: plan.scaling),
], ids=lambda asked: "-".join(*asked.items()) if isinstance(asked, dict) else "")  # fmt: skip
def test_a_search_without_a_part_tries_all_that_has_nothing_of_it(asked, wrong):
    plain = SitePlan(TOKENS, weight_bits=4, activation_bits=3)
    whole = [*auto._placements(plain, find("hqdm", "auto")[2])]
    without = [*auto._placements(plain, find("hqdm", "auto", asked)[2])]
    assert any(map(wrong, whole)) and without == [plan for plan in whole if not wrong(plan)]
    sample, weight = drawn(TOKENS, 2, 60)
    assert not wrong(auto.decide(TOKENS, Bits(4, 3), Sampled(sample, weight), find("hqdm", "auto", asked)[2]))


@pytest.mark.parametrize("site", [TOKENS, POINTWISE], ids=lambda site: site.name)
def test_a_placement_costs_the_same_whatever_was_priced_before_it(site):
    sample, weight = drawn(site, 2, 60)
    measured, variant = Sampled(sample, weight), find("hqdm", "auto", {"axis": "any"})[2]
    search, known = SiteSearch(sample, weight), {}
    for plan in auto._placements(SitePlan(site, weight_bits=3, activation_bits=4), variant):
        assert auto._cost(search, plan, measured, known) == auto._cost(SiteSearch(sample, weight), plan, measured, {})


def test_along_the_width_it_looks_where_it_is_told_to_and_takes_it_for_an_outlying_column():
    """A column of the image that stands out in every channel: a rotation along the channels leaves it as it is."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 60, 32, 8, generator=generator)
    sample[..., 3] *= 12
    weight = torch.randn(CONV.weight, generator=generator)
    measured = Sampled(sample, weight)
    taken = {
        axis: auto.decide(CONV, Bits(4, 3), measured, find("hqdm", "auto", {"axis": axis})[2])
        for axis in ("channels", "any")
    }
    assert taken["channels"].transform.axis != "width"
    assert taken["any"].transform.axis == "width" and taken["any"].inverse == "activation"


def test_what_8_bits_serve_badly_is_moved_where_8_are_asked_for_and_left_where_others_have_four():
    generator = torch.Generator().manual_seed(0)
    sample, weight = torch.rand(2, 200, 64, generator=generator) - 0.5, torch.randn(48, 64, generator=generator)
    even, outlying = Sampled(sample.clone(), weight), Sampled(sample, weight)
    sample[:, :, 0] *= 8  # 8 bits leave the output 33 dB, of even channels 43
    kept = replace(TOKENS, role="last")  # at 8 bits, whatever is asked for
    _, _, variant = find("hqdm", "auto")

    def placed(site, bits, measured):
        plan = auto.decide(site, bits, measured, variant)
        constants = auto.constants(plan, weight, measured, variant)
        cost = SiteSearch(measured.sample(site), weight).cost(plan, constants.get("centre"), constants.get("gain"))
        return plan.transform.is_identity and plan.centring == "none" and not plan.scaling, cost.total(3)

    assert placed(TOKENS, Bits(8, 8), even)[0]
    plain, much = placed(kept, Bits(4, 4), outlying)
    assert plain and 1e-4 < much < 1e-3
    for site in (TOKENS, kept):
        plain, little = placed(site, Bits(8, 8), outlying)
        assert not plain and little < 0.4 * much


def said_of(plan, measured):
    """Whether a plan's reason begins with what its placement costs at the bits that it has."""
    constants = auto.constants(plan, measured.weight(plan.site), measured, None)
    search = SiteSearch(measured.sample(plan.site), measured.weight(plan.site))
    cost = search.cost(plan, constants.get("centre"), constants.get("gain")).total(3)
    return plan.why.startswith(f"costs {10 * math.log10(cost):.1f} dB ")


@pytest.mark.parametrize("bits, least", [(4, "0.5"), (3, "0.6667"), (8, "0.25"), (2, "1")])
def test_a_budget_that_the_narrowest_weights_exceed_is_refused_with_the_least_that_can_be_had(bits, least):
    sample, weight = drawn(TOKENS, 2, 60)
    measured, bits, variant = Sampled(sample, weight), Bits(bits, 4), find("hqdm", "auto", {"budget": least})[2]
    plans = [auto.decide(TOKENS, bits, measured, variant)]
    assert auto.allocate(plans, bits, measured, variant)[0].weight_bits == 2
    with pytest.raises(UsageError, match="budget 0.2: ") as caught:  # before anything is searched
        auto.decide(TOKENS, bits, None, find("hqdm", "auto", {"budget": "0.2"})[2])
    assert f"--set budget={least} or more" in caught.value.hint


@pytest.mark.parametrize("site", [TOKENS, CONV], ids=lambda site: site.name)
def test_the_reason_says_what_the_choice_went_by(site):
    sample, weight = drawn(site, 2, 60)
    measured = Sampled(sample, weight)
    plan = auto.decide(site, Bits(4, 3), measured, find("hqdm", "auto")[2])
    taken, unrotated = map(float, re.findall(r"(-[0-9.]+) (?:dB)", plan.why))
    assert said_of(plan, measured) and taken < unrotated
    even = auto.decide(site, Bits(4, 8), Sampled(torch.rand_like(sample) - 0.5, 1e-9 * weight), find("hqdm", "auto")[2])
    assert even.transform.is_identity == ("unrotated" in even.why.split(",")[0])


def test_a_byte_budget_is_kept_and_spent_where_noise_is_dear():
    """One of two sites has a column that sets the range and says little. Layers that are kept at 8 bits stay."""
    generator = torch.Generator().manual_seed(0)
    names = ("even", "outlying", "last")
    sites = {name: replace(TOKENS, name=name, role="last" if name == "last" else "attention") for name in names}
    weights = {name: torch.randn(48, 64, generator=generator) for name in names}
    sample = torch.randn(2, 50, 64, generator=generator)
    weights["outlying"][:, 0] *= 20
    sample[:, :, 0] /= 20

    class Several(Sampled):
        def weight(self, site):
            return weights[site.name]

    measured = Several(sample)
    noise, sizes = [], []
    options = {"scaling": "false", "centring": "false"}
    for bits in (Bits(4, 4), Bits(8, 4)):
        plans = [auto.decide(site, bits, measured, find("hqdm", "auto", options)[2]) for site in sites.values()]
        for share in ("0.5", "1", "0.75"):
            _, _, variant = find("hqdm", "auto", options | {"budget": share})
            found = auto.allocate(plans, bits, measured, variant)
            even, outlying, last = found
            assert even.weight_bits + outlying.weight_bits <= float(share) * 2 * bits.weight
            assert outlying.weight_bits >= even.weight_bits and last == plans[2] and last.weight_bits == 8
            assert all((plan.weight_bits == 8) == (plan.weight_quantiser == "symmetric") for plan in found)
            assert all(said_of(plan, measured) for plan in found[:2])
            if bits.weight == 4:
                sizes.append(even.weight_bits + outlying.weight_bits)
                noise.append(sum(SiteSearch(sample, weights[plan.site.name]).weight_noise(plan) for plan in found))
    assert sizes[0] < sizes[2] <= sizes[1] and noise[0] > noise[2] >= noise[1]
