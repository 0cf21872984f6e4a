"""Integer layers: every form, every back end and the definition give the same integers, and training gives the same
bits.
"""

import itertools
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from emulated import everywhere, with_vnni
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import NumericalFault, UsageError
from pipelines.kernels import backend, cpu, forms
from pipelines.kernels.layers import IntegerLayer, forget_weights
from pipelines.kernels.operators import OneDNN
from pipelines.kernels.prologue import IN_CACHE, Prologue, centred_operand
from pipelines.quant.affine import centred_codes, choose, dequantise, quantise
from pipelines.quant.hadamard import hadamard, rotate_activation, rotate_weight
from pipelines.quant.integers import IntegerWeights, PackedWeights
from pipelines.quant.layers import QuantLayer, epilogue, exact_product, is_narrow, product, zero_point
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


def layer_of(plan: SitePlan, x: torch.Tensor, seed: int, timesteps: int = 1) -> QuantLayer:
    """A fake-quantised layer of random weights with scales fitted to x at timestep 1, and a tenth wider at each next
    one.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(plan.site.weight, generator=generator) * 0.1
    rotated = rotate_weight(weight, plan.transform) if plan.inverse == "double" else weight
    weight_scale, weight_zero = choose(rotated.flatten(1), *plan.weight_range, steps=4)
    seen = rotate_activation(x, plan.transform, plan.site.kind == "conv").reshape(1, -1)
    scale, zero = choose(seen, *plan.activation_range, steps=4)
    wider = 1.1 ** torch.arange(timesteps)[:, None]
    tables = TimestepTables(list(range(1, timesteps + 1)), scale * wider, zero.expand(timesteps, 1))
    tables.set_timestep(1)
    bias = torch.randn(plan.site.outputs, generator=generator)
    return QuantLayer(plan, weight, bias, weight_scale, weight_zero, tables, 0, slice(0, plan.site.outputs))


def by_definition(centred: torch.Tensor, plan: SitePlan, weights: PackedWeights) -> torch.Tensor:
    """int64 accumulators from the equation Σ q·V, through fp64 convolution (exact below 2⁵³)."""
    v, q = weights.folded().double(), centred.double()
    s = plan.site
    if s.kind == "linear":
        return (q @ v.T).long()
    return torch.conv2d(q, v, None, s.stride, s.padding).long()


def check(plan: SitePlan, x: torch.Tensor, seed: int) -> None:
    """Assert all equalities for one layer."""
    fake = layer_of(plan, x, seed)
    with torch.no_grad():
        trained = fake(x)
        fake.freeze()
        expected = fake(x)
    weights = fake.integers().packed()
    tables = fake._tables[0]
    layers = {"reference": IntegerLayer(weights, tables, 0, fake.span, "reference")}
    for operators in everywhere():
        layers[operators.name] = IntegerLayer(weights, tables, 0, fake.span, "cpu")
        layers[operators.name].prepared = cpu.Prepared(weights, operators)
    scale, zero = tables.numbers_of(0)
    zero = 0 if plan.activation_quantiser == "symmetric" else max(0, min(plan.activation_range[1], zero))
    centred, _ = Prologue(fake.surroundings)(x.clone(), scale, zero, centred_operand(plan))
    accumulators = by_definition(centred, plan, weights)
    for name, layer in layers.items():
        assert torch.equal(layer.prepared.accumulators(centred).long(), accumulators), name
        result = layer(x)
        assert torch.equal(result, expected), name
        assert memory_order(result) == memory_order(expected), name
    assert torch.equal(trained, expected)


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


def wide_weights(plan: SitePlan, wide: str) -> PackedWeights:
    """Integer weights whose V is wide: in one input channel, or along another Hadamard row for every output."""
    centred = torch.randint(-2, 3, plan.site.weight, generator=torch.Generator().manual_seed(1)).short()
    if wide == "channel":
        centred[:, 3] = 200
    elif wide == "rows":
        _, high = plan.weight_range
        rows = high * hadamard(32)[: plan.site.outputs].short()
        centred[:, :32] = rows.view(*rows.shape, *[1] * (centred.ndim - 2))
    outputs = plan.site.outputs
    zero = torch.full((outputs,), 2 if plan.weight_quantiser == "asymmetric" else 0, dtype=torch.int16)
    return IntegerWeights(plan, centred, zero, torch.rand(outputs) + 0.1, torch.randn(outputs)).packed()


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
    centred = torch.randint(-7, 8, (2, 5, 64) if kind == "linear" else (2, 64, 8, 8))
    assert cpu.form_of(weights) == form
    scale = 0.0371
    truth = backend("reference").prepare(weights)(centred, centred_operand(plan), scale, weights.scale)
    for operators in everywhere():  # in another form where weights have to be smaller
        prepared = cpu.Prepared(weights, operators)
        assert torch.equal(prepared.accumulators(centred).long(), by_definition(centred, plan, weights)), operators.name
        operand = prepared.operand(0)
        codes = operand.of(centred, 1 if kind == "conv" else -1)
        assert torch.equal(prepared(codes, operand, scale, weights.scale), truth), operators.name


@pytest.mark.parametrize("bits, quantiser", [(4, "symmetric"), (4, "asymmetric"), (3, "asymmetric"), (8, "symmetric")])
@pytest.mark.parametrize("value", [-7, 7, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_constant_channels_carry_the_largest_zero_points_and_sums(bits, quantiser, value, stride):
    """Every weight of one sign, so that the sums that they take out are as large as they can be."""
    plan = SitePlan(site("conv", channels=256, stride=stride), True, IDENTITY, "none", 4, bits, "symmetric", quantiser)
    centred = torch.full(plan.site.weight, value, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, torch.zeros(6, dtype=torch.int16), torch.rand(6), torch.randn(6)).packed()
    prepared = cpu.Prepared(weights, with_vnni())
    assert prepared.carried is not None
    low, high = plan.activation_range
    for zero in (low, high) if quantiser == "asymmetric" else (0,):
        codes = torch.randint(low - zero, high - zero + 1, (2, 256, 8, 8), generator=torch.Generator().manual_seed(1))
        operand = prepared.operand(zero)
        assert len(operand.carried) == prepared.carried.width and max(operand.carried) <= 255
        truth = backend("reference").prepare(weights)(codes, centred_operand(plan), 0.05, weights.scale)
        assert torch.equal(prepared(operand.of(codes, 1), operand, 0.05, weights.scale), truth)
    assert cpu.Prepared(weights, OneDNN(vnni=False)).carried is None


@pytest.mark.parametrize("widest", [3, 100, 127, 205])
@pytest.mark.parametrize("groups", [2, 4, 16])
def test_convolutions_in_groups_are_exact_in_every_form(widest, groups):
    s = Site("layer", "conv", "residual", (16, 32 // groups, 3, 3), (1, 1), (1, 1), groups=groups, positions=(8, 8))
    plan = SitePlan(s, True, weight_quantiser="asymmetric", activation_quantiser="asymmetric")
    centred = torch.randint(-3, 4, s.weight, generator=torch.Generator().manual_seed(groups)).short()
    centred[0, -1], centred[-1, 0] = widest, -50
    zero = torch.full((16,), 50, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, zero, torch.rand(16), None).packed()
    codes = torch.randint(-30, 226, (2, 32, 8, 8), generator=torch.Generator().manual_seed(1))
    truth = torch.conv2d(codes.double(), weights.folded().double(), None, 1, 1, 1, groups).long()
    for operators in everywhere():
        prepared = cpu.Prepared(weights, operators)
        assert torch.equal(prepared.accumulators(codes).long(), truth), (operators.name, prepared.form)


def test_entries_of_a_folded_block_have_one_parity():
    plan = SitePlan(site("linear", channels=64), True, Transform("channels", 32, 9), "single", 4, 4)
    weights = wide_weights(plan, "rows")
    parity = (weights.folded().int() & 1).unflatten(1, (-1, 32))
    assert torch.equal(parity, parity[..., :1].expand_as(parity))


@pytest.mark.parametrize("weight_bits, activation_bits", list(itertools.product(WEIGHT_BITS, ACTIVATION_BITS)))
def test_no_pair_of_products_saturates_on_a_processor_without_vnni_and_the_integers_are_the_same(
    weight_bits, activation_bits
):
    """Which adds two products of a byte and a weight in 16 bits; with the largest weights and codes there are."""
    for kind, place, weight, activation in itertools.product(("linear", "conv"), PLACEMENTS, QUANTISERS, QUANTISERS):
        s = site(kind)
        if not s.admits(place[0]):
            continue
        plan = SitePlan(s, True, *place, weight_bits, activation_bits, weight, activation)
        low, high = plan.weight_range
        generator = torch.Generator().manual_seed(weight_bits)
        centred = torch.randint(0, 2, s.weight, generator=generator).short() * (high - low) + low
        zero = torch.full((s.outputs,), (low + high) // 2, dtype=torch.int16)
        zero = zero if weight == "asymmetric" else zero * 0
        centred = centred - zero.view(-1, *[1] * (centred.ndim - 1))
        weights = IntegerWeights(plan, centred, zero, torch.rand(s.outputs), torch.randn(s.outputs)).packed()
        prepared = cpu.Prepared(weights, OneDNN(vnni=False))
        _, top = plan.activation_range
        whole_bytes = plan.inverse == "activation" or prepared.group
        largest_code = 255 if whole_bytes else top + prepared.offset
        for term in prepared._form(weights.folded()).terms:
            assert 2 * largest_code * int(term.weight.int().abs().max()) < 2**15
        low, high = plan.activation_range
        codes = torch.randint(0, 2, (2, 5, 64) if kind == "linear" else (2, 64, 8, 8), generator=generator)
        codes = (codes * (high - low) + low).float()
        if plan.inverse == "activation":
            codes = rotate_activation(codes, plan.transform, kind == "conv", inverse=True)
        assert torch.equal(prepared.accumulators(codes).long(), by_definition(codes, plan, weights))


LIMITED = """
import torch
torch.cpu.get_capabilities = lambda: {"avx512_vnni": True}
from pipelines.kernels import cpu
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.spec import Site, SitePlan

for site in Site("layer", "linear", "attention", (4, 64)), Site("layer", "conv", "residual", (4, 64, 3, 3)):
    plan = SitePlan(site, True, weight_bits=8, activation_bits=8)
    centred = torch.full(site.weight, 127, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, torch.zeros(4, dtype=torch.int16), torch.ones(4), None).packed()
    codes = torch.full((1, 64) if site.kind == "linear" else (1, 64, 3, 3), 127)
    assert (cpu.prepare(weights).accumulators(codes) == centred[0].numel() * 127**2).all(), site.kind
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's int8 operators are for x86-64")
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_operators_that_are_told_to_leave_vnni_out_give_the_same_integers(compiled):
    """A processor that says it has VNNI, and oneDNN limited to AVX2, where pairs of the largest products saturate."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "HQDM_NATIVE": compiled}
    folder = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", LIMITED], env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_accumulator_beyond_32_bits_is_refused_by_name():
    plan = SitePlan(site("linear", channels=2**18), True, IDENTITY, "none", 8, 8)
    centred = torch.full(plan.site.weight, 127, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, torch.zeros(6, dtype=torch.int16), torch.ones(6), None).packed()
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


PLANS = [
    SitePlan(site(kind), True, transform, inverse, 4, 4, weight, activation)
    for kind in ("linear", "conv")
    for transform, inverse in PLACEMENTS
    for weight, activation in (("asymmetric", "symmetric"), ("symmetric", "asymmetric"))
    if site(kind).admits(transform)
]
each_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: f"{plan.site.kind}-{plan.inverse}-{plan.transform.name}-{plan.activation_quantiser}"
)


def trained_layer(plan: SitePlan, x: torch.Tensor, timesteps: int = 1) -> QuantLayer:
    """A layer with adapters that are not zero and scales so narrow that inputs leave the range of codes."""
    layer = layer_of(plan, x, 5, timesteps)
    for row in layer._tables[0].scale:
        row.data *= 0.6
    layer._tables[0].set_timestep(1)
    generator = torch.Generator().manual_seed(0)
    layer.add_lora(4, generator)
    layer.lora_b.data = torch.randn(layer.lora_b.shape, generator=generator) * 0.02
    return layer


def learned(layer: QuantLayer) -> list[torch.nn.Parameter]:
    tables = layer._tables[0]
    zeros = tables.zero if layer.plan.activation_quantiser == "asymmetric" else []
    return [layer.lora_a, layer.lora_b, layer.weight_scale, *tables.scale, *zeros]


def written_out(layer: QuantLayer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer's equation in operations that torch derives by itself."""
    plan, spatial = layer.plan, layer.plan.site.kind == "conv"
    scale, zero, weight_scale, weight_zero, weight, a, b, bias = (
        None if value is None else value.to(dtype)
        for value in (*layer._tables[0].of(0), layer.weight_scale, layer.weight_zero, layer.weight, layer.lora_a,
                      layer.lora_b, layer.bias)
    )  # fmt: skip
    rotated = rotate_activation(x.to(dtype), plan.transform, spatial)
    codes = centred_codes(rotated, scale, zero_point(zero, plan), *plan.activation_range)
    if plan.inverse == "activation":
        codes = rotate_activation(codes, plan.transform, spatial, inverse=True)
    weight = weight + (b @ a.flatten(1)).view_as(weight)
    if plan.inverse == "double":
        weight = rotate_weight(weight, plan.transform)
    by_output = (-1, *[1] * (weight.ndim - 1))
    folded = centred_codes(weight, weight_scale.view(by_output), weight_zero.view(by_output), *plan.weight_range)
    if plan.inverse == "single":
        folded = rotate_weight(folded, plan.transform)
    return epilogue(product(codes, folded, plan.site), scale / plan.transform.order, weight_scale, bias)


@each_plan
def test_gradients_that_are_recomputed_are_those_of_the_equation_written_out(plan):
    """Its gradients in fp64: in fp32 they are further from the truth, at a scale where terms cancel, than ours."""
    x = input_for(plan.site, 3)
    layer = trained_layer(plan, x)

    def of(compute, *options):
        layer._tables[0].set_timestep(1)
        given = x.clone().requires_grad_(True)
        y = compute(given, *options)
        into = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return y.detach(), torch.autograd.grad(y, [given, *learned(layer)], into)

    def equation(x, dtype):
        return written_out(layer, x, dtype)

    y, found = of(layer)
    assert torch.equal(y, of(equation, torch.float32)[0])
    for mine, wanted in zip(found, of(equation, torch.float64)[1], strict=True):
        assert wanted.abs().max() > 0
        assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_training_keeps_nothing_of_a_weights_size_for_the_backward_pass():
    plan = PLANS[2]
    x = input_for(plan.site, 3).requires_grad_(True)
    layer = trained_layer(plan, x.detach())
    layer._tables[0].set_timestep(1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    known = {value.untyped_storage().data_ptr() for value in (x, *learned(layer))}
    new = [value for value in kept if value.untyped_storage().data_ptr() not in known]
    assert y.requires_grad and len(kept) > len(new)
    assert all(value.numel() <= plan.site.outputs for value in new)


def test_a_parameter_that_was_written_to_before_the_backward_pass_is_noticed():
    plan = PLANS[0]
    x = input_for(plan.site, 3)
    layer = trained_layer(plan, x)
    y = layer(x)
    with torch.no_grad():
        layer.lora_b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_plan
def test_a_mixed_batch_gives_the_bits_of_one_call_for_each_image_in_training_and_in_integers(plan):
    x = input_for(plan.site, 3, batch=3)
    fake = trained_layer(plan, x, timesteps=2)
    tables, given = fake._tables[0], torch.tensor([2, 1, 2])
    layers = {name: IntegerLayer(fake.integers().packed(), tables, 0, fake.span, name) for name in ("reference", "cpu")}
    results = {}
    for name, layer in {"fake": fake, **layers}.items():
        tables.set_timestep(given)
        together = layer(x)
        for image in range(3):
            tables.set_timestep(given[image])
            assert torch.equal(together[image : image + 1], layer(x[image : image + 1])), (name, image)
        results[name] = together.detach()
        assert memory_order(together) == memory_order(layer(x))
    assert torch.equal(results["fake"], results["cpu"]) and torch.equal(results["fake"], results["reference"])
    tables.set_timestep(1)
    assert not torch.equal(results["fake"], fake(x))  # the timestep makes a difference


@each_plan
def test_gradients_of_a_mixed_batch_are_the_sums_of_those_of_its_images(plan):
    x = input_for(plan.site, 3, batch=3)
    layer = trained_layer(plan, x, timesteps=2)
    tables, given = layer._tables[0], torch.tensor([2, 1, 2])
    tables.set_timestep(given)
    together = torch.autograd.grad(layer(x).square().sum(), learned(layer))
    total = 0.0
    for image in range(3):
        tables.set_timestep(given[image])
        total = total + layer(x[image : image + 1]).square().sum()
    for mine, wanted in zip(together, torch.autograd.grad(total, learned(layer)), strict=True):
        assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@each_plan
def test_a_base_weight_held_as_integers_is_the_weight_quantised_and_dequantised(plan):
    layer = layer_of(plan, input_for(plan.site, 3), 5)
    scale = layer.weight_scale.detach() * 1.3
    columns = [value.view(-1, *[1] * (layer.weight.ndim - 1)) for value in (scale, layer.weight_zero)]
    rotated = rotate_weight(layer.weight, plan.transform) if plan.inverse == "double" else layer.weight
    wanted = dequantise(quantise(rotated, *columns, *plan.weight_range), *columns)
    if plan.inverse == "double":
        wanted = rotate_weight(wanted, plan.transform, inverse=True) / plan.transform.order
    shared = layer.weight
    layer.set_base(scale)
    assert layer.base_codes.dtype == torch.uint8 and layer.weight is shared
    assert torch.equal(layer.merged_weight(), wanted) and not torch.equal(wanted, layer.weight)


@each_plan
def test_an_integer_layer_holds_its_packed_bytes_and_no_wider_weight(plan):
    x = input_for(plan.site, 3)
    fake = layer_of(plan, x, 5)
    layer = IntegerLayer(fake.integers().packed(), fake._tables[0], 0, fake.span, "cpu")
    layer(x)
    held = [*layer.buffers(), *layer.parameters(), *layer.prepared.weights.tensors.values()]
    held += [value for value in vars(layer.prepared).values() if isinstance(value, torch.Tensor)]
    wide = [value for value in held if value.numel() > plan.site.outputs and value.dtype != torch.uint8]
    assert [value.numel() for value in wide if value is not layer.prepared.repeated] == []
    assert layer.prepared.weights.tensors["weight"].numel() == fake.weight.numel() // 2


@pytest.mark.parametrize("operators", everywhere(), ids=lambda each: each.name)
def test_weights_are_kept_for_the_last_input_shapes_and_unpacked_again_for_another(operators):
    plan = PLANS[0]
    fake = layer_of(plan, input_for(plan.site, 3), 5)
    layer = IntegerLayer(fake.integers().packed(), fake._tables[0], 0, fake.span, "cpu")
    layer.prepared = cpu.Prepared(layer.prepared.weights, operators)
    inputs = [input_for(plan.site, 3, batch) for batch in (1, 2, 3)]
    first = layer(inputs[0])
    [(_, _, packed)] = next(iter(layer.prepared._packed.values()))
    forgotten = weakref.ref(packed)
    del packed
    layer(inputs[1])
    assert forgotten() is not None
    layer(inputs[2])
    if operators.by_shape:
        assert forgotten() is None and len(layer.prepared._packed) == 2
    else:
        assert forgotten() is not None and len(layer.prepared._packed) == 1
    assert torch.equal(layer(inputs[0]), first)
    forget_weights(torch.nn.Sequential(layer))
    assert not layer.prepared._packed and torch.equal(layer(inputs[0]), first)


@each_plan
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_an_input_in_any_layout_gives_the_bits_of_training(plan, name):
    """An attention's linears read the transpose of a convolution's output, and a channel may be one of several."""
    x = input_for(plan.site, 5, batch=2)
    fake = trained_layer(plan, x)
    integer = IntegerLayer(fake.integers().packed(), fake._tables[0], 0, fake.span, name)
    fake._tables[0].set_timestep(1)
    with torch.no_grad():
        wanted = fake(x)
        for other in (x.transpose(1, -1).contiguous().transpose(1, -1), torch.stack([x, x], -1)[..., 0]):
            assert torch.equal(other, x) and torch.equal(integer(other), wanted) and torch.equal(fake(other), wanted)


@torch.no_grad()
def test_an_input_larger_than_a_pass_of_the_prologue_gives_the_bits_of_training():
    plan = SitePlan(site("linear", channels=96), True, Transform("channels", 32, 1), "single", 4, 4)
    x = torch.randn(3 * IN_CACHE // 96 + 7, 96, generator=torch.Generator().manual_seed(1))
    fake = layer_of(plan, x, 0)
    integer = IntegerLayer(fake.integers().packed(), fake._tables[0], 0, fake.span, "cpu")
    assert torch.equal(integer(x), fake(x))


@pytest.mark.parametrize("order, weight_bits, activation_bits, narrow", [
    (32, 4, 4, True), (64, 4, 4, False), (64, 3, 4, True), (1, 8, 8, True), (32, 4, 8, True),
])  # fmt: skip
def test_products_in_bfloat16_are_taken_where_they_are_exact(order, weight_bits, activation_bits, narrow):
    """The largest V that the plan allows, of both signs, as torch multiplies it and in int64."""
    transform, inverse = (Transform("channels", order), "single") if order > 1 else (IDENTITY, "none")
    whole = site("linear", channels=512, outputs=160)
    plan = SitePlan(whole, True, transform, inverse, weight_bits, activation_bits)
    assert is_narrow(plan, "weight") == narrow
    generator = torch.Generator().manual_seed(0)
    (low, high), (smallest, largest) = plan.weight_range, plan.activation_range
    folded = torch.randint(low * order, high * order + 1, (160, 512), generator=generator).float()
    codes = torch.randint(smallest, largest + 1, (256, 512), generator=generator).float()
    folded[0], codes[0] = low * order, smallest
    exact = (codes.long() @ folded.long().T).float()
    assert torch.equal(product(codes, folded, whole, narrow), exact)
    assert torch.equal(product(codes, folded, whole), exact)


def test_a_product_in_which_one_channel_passes_what_fp32_holds_is_exact_and_ends():
    """A row of V that is the transform's own row reaches 64·127 at one channel, nine times in a 3×3 kernel."""
    s = Site("s", "conv", "residual", (1, 64, 3, 3), padding=(1, 1), positions=(3, 3))
    plan = SitePlan(s, True, Transform("channels", 64), "single", 8, 8, "symmetric", "asymmetric")
    codes, folded = torch.zeros(1, 64, 3, 3), torch.zeros(1, 64, 3, 3)
    codes[:, 0], folded[:, 0] = 255, 64 * 127
    codes[0, 0, 0, 0] = 254
    expected = torch.conv2d(codes.double(), folded.double(), padding=1)
    assert expected.max() > 2**24
    assert torch.equal(exact_product(codes, folded, plan, False), expected.float())
