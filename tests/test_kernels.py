"""Integer layers: every form, every back end and the definition give the same integers, and training gives the same
bits.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import NumericalFault, UsageError
from pipelines.kernels import backend, cpu, forms
from pipelines.kernels.layers import IntegerLayer
from pipelines.quant.affine import choose
from pipelines.quant.hadamard import hadamard, rotate_activation, rotate_weight
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.layers import QuantLayer
from pipelines.quant.spec import ACTIVATION_BITS, IDENTITY, QUANTISERS, WEIGHT_BITS, Site, SitePlan, Transform
from pipelines.quant.tables import TimestepTables

PLACEMENTS = [
    (IDENTITY, "none"),
    (Transform("channels", 8), "single"),
    (Transform("channels", 16, 7), "single"),
    (Transform("channels", 64, 1), "single"),
    (Transform("channels", 32, 2), "double"),
    (Transform("width", 8, 5), "activation"),
]


def site(kind: str, channels=64, outputs=6, kernel=3, stride=1, size=8) -> Site:
    if kind == "linear":
        return Site("layer", "linear", "attention", (outputs, channels), rank=3)
    padding = (kernel // 2, kernel // 2)
    return Site(
        "layer",
        "conv",
        "residual",
        (outputs, channels, kernel, kernel),
        (stride, stride),
        padding,
        positions=(size, size),
    )


def layer_of(plan: SitePlan, x: torch.Tensor, seed: int) -> QuantLayer:
    """A fake-quantised layer of random weights with scales fitted to x, at its only timestep."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(plan.site.weight, generator=generator) * 0.1
    rotated = rotate_weight(weight, plan.transform) if plan.inverse == "double" else weight
    weight_scale, weight_zero = choose(rotated.flatten(1), *plan.weight_range, steps=4)
    seen = rotate_activation(x, plan.transform, plan.site.kind == "conv").reshape(1, -1)
    scale, zero = choose(seen, *plan.activation_range, steps=4)
    tables = TimestepTables([1], scale[:, None], zero[:, None])
    tables.set_timestep(1)
    bias = torch.randn(plan.site.outputs, generator=generator)
    return QuantLayer(plan, weight, bias, weight_scale, weight_zero, tables, 0, slice(0, plan.site.outputs))


def by_definition(centred: torch.Tensor, plan: SitePlan, weights: IntegerWeights) -> torch.Tensor:
    """int64 accumulators from the equation Σ q·V, through fp64 convolution (exact below 2⁵³)."""
    v, q = weights.folded().double(), centred.double()
    s = plan.site
    if s.kind == "linear":
        return (q @ v.T).long()
    return torch.conv2d(q, v, None, s.stride, s.padding).long()


def check(plan: SitePlan, x: torch.Tensor, seed: int) -> str:
    """Assert all equalities for one layer and return the form the cpu back end chose."""
    fake = layer_of(plan, x, seed)
    with torch.no_grad():
        trained = fake(x)
        fake.freeze()
        expected = fake(x)
    weights = IntegerWeights.from_tensors(plan, fake.integers().to_tensors())  # through the file's packing
    tables = fake._tables[0]
    layers = {name: IntegerLayer(weights, tables, 0, fake.span, name) for name in ("reference", "cpu")}
    centred, _, _ = layers["reference"].codes(x.clone())
    accumulators = by_definition(centred, plan, weights)
    for name, layer in layers.items():
        assert torch.equal(layer.prepared.accumulators(centred).long(), accumulators), name
        result = layer(x)
        assert torch.equal(result, expected), name
        assert memory_order(result) == memory_order(expected), name
    if accumulators.abs().max() < 2**24:
        assert torch.equal(trained, expected)
    return layers["cpu"].prepared.form


def memory_order(x: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have more than one entry: the next layer's rounding may depend on them."""
    return [stride for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1]


def input_for(s: Site, seed: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 5, s.channels) if s.kind == "linear" else (batch, s.channels, *s.positions)
    return torch.randn(shape, generator=generator) * torch.rand(1, generator=generator) * 3 + 0.4


@pytest.mark.parametrize("weight_bits, activation_bits", list(itertools.product(WEIGHT_BITS, ACTIVATION_BITS)))
@pytest.mark.parametrize("weight, activation", list(itertools.product(QUANTISERS, QUANTISERS)))
def test_accumulators_and_outputs_agree_for_every_bit_width_and_quantiser(
    weight_bits, activation_bits, weight, activation
):
    for kind, (transform, inverse) in itertools.product(("linear", "conv"), PLACEMENTS):
        s = site(kind)
        if s.admits(transform):
            plan = SitePlan(s, True, transform, inverse, weight_bits, activation_bits, weight, activation)
            check(plan, input_for(s, 3), 5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_accumulators_and_outputs_agree_for_any_shape(data):
    kind = data.draw(st.sampled_from(["linear", "conv"]))
    s = site(
        kind,
        channels=data.draw(st.sampled_from([1, 3, 8, 32, 64, 96])),
        outputs=data.draw(st.integers(1, 9)),
        kernel=data.draw(st.sampled_from([1, 3, 5])),
        stride=data.draw(st.integers(1, 3)),
        size=data.draw(st.sampled_from([1, 4, 7, 8])),
    )
    transform, inverse = data.draw(st.sampled_from([place for place in PLACEMENTS if s.admits(place[0])]))
    bits = data.draw(st.sampled_from(WEIGHT_BITS)), data.draw(st.sampled_from(ACTIVATION_BITS))
    quantisers = data.draw(st.sampled_from(QUANTISERS)), data.draw(st.sampled_from(QUANTISERS))
    plan = SitePlan(s, True, transform, inverse, *bits, *quantisers)
    seed = data.draw(st.integers(0, 2**16))
    check(plan, input_for(s, seed, data.draw(st.integers(1, 3))), seed)


def wide_weights(plan: SitePlan, wide: str) -> IntegerWeights:
    """Integer weights whose V is wide: in one input channel, or along another Hadamard row for every output."""
    centred = torch.randint(-2, 3, plan.site.weight, generator=torch.Generator().manual_seed(1)).short()
    if wide == "channel":
        centred[:, 3] = 200
    elif wide == "rows":
        _, high = plan.weight_range
        rows = high * hadamard(32)[: plan.site.outputs].short()
        centred[:, :32] = rows.view(*rows.shape, *[1] * (centred.ndim - 2))
    outputs = plan.site.outputs
    return IntegerWeights(
        plan, centred, torch.zeros(outputs, dtype=torch.int16), torch.rand(outputs) + 0.1, torch.randn(outputs)
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    "form, transform, weight_bits, weight_quantiser, wide",
    [
        ("columns", IDENTITY, 8, "asymmetric", "channel"),
        ("parity", Transform("channels", 32), 4, "symmetric", "rows"),
        ("digits", Transform("channels", 32), 8, "symmetric", "rows"),
        ("one", Transform("channels", 8, 1), 3, "symmetric", ""),
    ],
)
def test_each_form_is_exact_where_it_is_chosen(kind, form, transform, weight_bits, weight_quantiser, wide):
    inverse = "none" if transform.is_identity else "single"
    plan = SitePlan(site(kind, channels=64), True, transform, inverse, weight_bits, 4, weight_quantiser, "symmetric")
    weights = wide_weights(plan, wide)
    centred = torch.randint(-7, 8, (2, 5, 64) if kind == "linear" else (2, 64, 8, 8)).float()
    prepared = cpu.prepare(weights)
    assert prepared.form == form
    assert torch.equal(prepared.accumulators(centred).long(), by_definition(centred, plan, weights))
    scale = torch.tensor(0.0371)
    truth = backend("reference").prepare(weights)(centred, 0, scale, weights.scale)
    assert torch.equal(prepared(centred.clone(), 0, scale, weights.scale), truth)


def test_entries_of_a_folded_block_have_one_parity():
    plan = SitePlan(site("linear", channels=64), True, Transform("channels", 32, 9), "single", 4, 4)
    weights = wide_weights(plan, "rows")
    parity = (weights.folded().int() & 1).unflatten(1, (-1, 32))
    assert torch.equal(parity, parity[..., :1].expand_as(parity))


def test_a_processor_without_vnni_is_refused_where_it_would_saturate_and_only_there():
    heavy = torch.full((1, 1), 127, dtype=torch.int8)
    cpu.check_saturation("layer", 15, heavy, vnni=False)
    cpu.check_saturation("layer", 255, heavy, vnni=True)
    with pytest.raises(NumericalFault, match="site layer: .* lacks VNNI"):
        cpu.check_saturation("layer", 255, heavy, vnni=False)


def test_an_accumulator_beyond_32_bits_is_refused_by_name():
    plan = SitePlan(site("linear", channels=2**18), True, IDENTITY, "none", 8, 8)
    centred = torch.full(plan.site.weight, 127, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, torch.zeros(6, dtype=torch.int16), torch.ones(6), None)
    for name in ("reference", "cpu"):
        with pytest.raises(NumericalFault, match="site layer: an accumulator can reach"):
            backend(name).prepare(weights)


def test_an_unknown_back_end_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError) as caught:
        backend("cpuu")
    assert caught.value.hint == "did you mean 'cpu'?"


@pytest.mark.parametrize("values", [[-300, -65, -64, -1, 0, 63, 64, 127, 128, 5000]])
def test_digits_add_up(values):
    folded = torch.tensor([values])
    total = sum(digit.int() * 128**i for i, digit in enumerate(forms.weight_digits(folded)))
    assert torch.equal(total, folded.int())
