"""Centring, scaling, mixed widths and divided inputs: exact before quantisers, and the same bits fake and integer."""

import pytest
import torch
from test_kernels import input_for, layer_of, memory_order, site
from torch import nn
from torch.nn import functional as F

from pipelines.errors import UsageError
from pipelines.kernels.layers import IntegerLayer
from pipelines.quant.affine import choose
from pipelines.quant.layers import Divided, QuantLayer, divide
from pipelines.quant.spec import IDENTITY, Site, SitePlan, Transform
from pipelines.quant.surroundings import Surroundings, taps_of, weight_bounds
from pipelines.quant.tables import TimestepTables

TURNED = [(IDENTITY, "none"), (Transform("channels", 16, 1), "single"), (Transform("channels", 16), "double")]


def around(plan: SitePlan, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a placement needs, of random values."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    if plan.scaling:
        tensors["gain"] = torch.rand(plan.site.channels, generator=generator) + 0.5
    if plan.centring == "static":
        tensors["centre"] = torch.randn(plan.site.channels, generator=generator)
        tensors["taps"] = taps_of(tensors["centre"], weight, plan.site)
    if plan.mixed:
        tensors["row_bits"] = torch.tensor([2, 3, 4, 8, 4, 2], dtype=torch.uint8)
    return tensors


def placed(plan: SitePlan, x: torch.Tensor) -> QuantLayer:
    """`layer_of` with surroundings."""
    plain = layer_of(plan, x, 1)
    tensors = around(plan, plain.weight)
    layer = QuantLayer(
        plan, plain.weight, plain.bias, plain.weight_scale.detach(), plain.weight_zero, plain._tables[0], 0, plain.span,
        tensors,
    )  # fmt: skip
    if plan.mixed:
        low, high = weight_bounds(plan, tensors["row_bits"])
        for row, weight in enumerate(layer.weight):
            bounds = int(low[row]), int(high[row])
            scale, zero = choose(weight.reshape(1, -1), *bounds, steps=4)
            layer.weight_scale.data[row], layer.weight_zero[row] = scale[0], zero[0]
    return layer


@pytest.mark.parametrize("kind, stride", [("linear", 1), ("conv", 1), ("conv", 2)])
def test_centred_and_scaled_a_layer_computes_what_it_did_at_an_images_borders_too(kind, stride):
    plan = SitePlan(site(kind, 32, stride=stride), centring="static", scaling=True)
    x = input_for(plan.site, 2)
    weight = torch.randn(plan.site.weight, generator=torch.Generator().manual_seed(1)) * 0.1
    surroundings = Surroundings(plan, around(plan, weight))
    moved, mean = surroundings.before(x)
    divided = weight / surroundings.gain.view(1, -1, *[1] * (weight.ndim - 2))
    product = F.linear(moved, divided) if kind == "linear" else F.conv2d(moved, divided, None, stride, 1)
    expected = F.linear(x, weight) if kind == "linear" else F.conv2d(x, weight, None, stride, 1)
    assert (surroundings.after(product, x, mean, None, torch.ones(6)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("transform, inverse", TURNED)
@pytest.mark.parametrize(
    "kind, placement",
    [
        ("linear", dict(scaling=True)),
        ("conv", dict(scaling=True, centring="static")),
        ("linear", dict(centring="dynamic", scaling=True)),
        ("conv", dict(mixed=True, weight_bits=8)),
        ("linear", dict(mixed=True, weight_bits=8, weight_quantiser="asymmetric", centring="static")),
    ],
)
def test_fake_and_integer_layers_give_the_same_bits(transform, inverse, kind, placement):
    plan = SitePlan(site(kind, 32), True, transform, inverse, **dict(weight_bits=4, activation_bits=4) | placement)
    x = input_for(plan.site, 4)
    fake = placed(plan, x)
    with torch.no_grad():
        trained = fake(x)
        fake.freeze()
        expected = fake(x)
    weights = fake.integers().packed()
    assert torch.equal(weights.unpack().packed().tensors["weight"], weights.tensors["weight"])
    for name in ("reference", "cpu"):
        result = IntegerLayer(weights, fake._tables[0], 0, fake.span, name)(x)
        assert torch.equal(result, expected) and memory_order(result) == memory_order(expected), name
    assert torch.equal(trained, expected)


def test_centred_and_scaled_before_a_rotation_along_the_width_they_give_the_same_bits_too():
    plan = SitePlan(
        site("conv", 32), True, Transform("width", 8, 1), "activation", 4, 4, centring="static", scaling=True
    )
    x = input_for(plan.site, 4)
    fake = placed(plan, x)
    with torch.no_grad():
        fake.freeze()
        expected = fake(x)
    for name in ("reference", "cpu"):
        assert torch.equal(IntegerLayer(fake.integers().packed(), fake._tables[0], 0, fake.span, name)(x), expected)


def test_a_dynamic_centre_is_each_images_own_and_loses_nothing():
    plan = SitePlan(site("linear", 32), True, weight_bits=8, activation_bits=8, centring="dynamic")
    plain = SitePlan(site("linear", 32), True, weight_bits=8, activation_bits=8)
    x = input_for(plan.site, 5) + 40 * torch.arange(2).view(2, 1, 1)  # a far mean, of the second image alone
    layer = placed(plan, x - x.mean(1, keepdim=True))
    exact = F.linear(x, layer.integers().dequantised(), layer.bias)  # what is left is the activation's error
    with torch.no_grad():
        assert (layer(x) - exact).abs().max() < 0.5 * (placed(plain, x)(x) - exact).abs().max()


def test_rows_of_few_bits_take_their_own_bytes():
    plan = SitePlan(site("linear", 64), True, weight_bits=8, mixed=True)
    weights = placed(plan, input_for(plan.site, 6)).integers().packed()
    assert weights.tensors["weight"].numel() == 64 * (2 + 3 + 4 + 8 + 4 + 2) // 8


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_divided_layer_adds_its_halves_up_and_shares_its_weight(kind):
    whole = Site(**{**vars(site(kind, 48)), "name": "inner.layer", "joint": 32})
    network = nn.Module()
    network.inner = nn.Module()
    network.inner.layer = nn.Linear(48, 6) if kind == "linear" else nn.Conv2d(48, 6, 3, padding=1)
    x = input_for(whole, 7)
    with torch.no_grad():
        expected = network.inner.layer(x)
        weight = network.inner.layer.weight
        divide(network, list(whole.halves()))
        halves = network.inner.layer
        assert isinstance(halves, Divided) and (halves(x) - expected).abs().max() < 1e-5
    assert halves.first.weight.data_ptr() == weight.data_ptr() and halves.second.bias is None
    assert [half.channels for half in whole.halves()] == [32, 16]


def test_timesteps_of_a_group_share_one_parameter():
    scale, zero = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1)
    tables = TimestepTables([900, 500, 100], scale, zero, groups=[7, 7, 2])
    assert len(tables.scale) == 2
    tables.set_timestep(500)
    tables.of(0)[0].backward()
    assert tables.raw()["scale"].flatten().tolist() == [3.0, 2.0, 2.0]  # ascending timesteps
    assert sum(row.grad is not None for row in tables.scale) == 1
    assert tables.covers([900, 500, 100])


def test_relative_scales_begin_where_they_were_and_move_by_shares():
    tables = TimestepTables([1], torch.tensor([[0.01, 10.0]]), torch.zeros(1, 2), relative=True)
    assert torch.allclose(tables.raw()["scale"], torch.tensor([[0.01, 10.0]]))
    with torch.no_grad():
        tables.scale[0] += 0.1
    assert torch.allclose(tables.raw()["scale"] / torch.tensor([[0.01, 10.0]]), torch.tensor(1.1052), atol=1e-4)


def test_weights_and_biases_that_train_have_the_gradients_of_their_adapters_sum():
    """∂L/∂A = Bᵀ·∂L/∂W ties the weight's gradient to one that other tests hold against torch's own."""
    plan = SitePlan(site("conv", 16), True, Transform("channels", 16, 1), "single", 4, 4, "asymmetric", scaling=True)
    x = input_for(plan.site, 8)
    layer = placed(plan, x)
    layer.train_weight()
    layer.train_bias()
    layer.add_lora(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_b.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.01)
    layer._tables[0].set_timestep(1)
    y = layer(x)
    factor = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * factor).sum().backward()
    expected = torch.einsum("or,oikl->rikl", layer.lora_b.detach(), layer.weight.grad)
    assert torch.allclose(layer.lora_a.grad, expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(layer.bias.grad, factor.sum((0, 2, 3)), rtol=1e-4)


def test_a_mean_over_tokens_is_refused_where_there_are_none():
    with pytest.raises(UsageError, match="no tokens of an image"):
        SitePlan(site("conv", 32), centring="dynamic")
    with pytest.raises(UsageError, match="centring 'dynamical' does not exist"):
        SitePlan(site("conv", 32), centring="dynamical")
