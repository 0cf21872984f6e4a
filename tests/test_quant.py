"""Quantisers, transforms, packing and timestep tables."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.quant import affine
from pipelines.quant.affine import centred_codes, choose, dequantise, quantise, sqnr
from pipelines.quant.hadamard import hadamard, matrix, rotate_activation, rotate_weight
from pipelines.quant.packing import pack, unpack
from pipelines.quant.spec import ACTIVATION_BITS, WEIGHT_BITS, Bits, Site, SitePlan, Transform, integer_range
from pipelines.quant.tables import TimestepTables

TRANSFORMS = [Transform("channels", order, signs) for order in (8, 16, 32, 64) for signs in (None, 1, 2)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.name}-{t.signs}")
def test_the_raw_transform_is_orthogonal_up_to_its_order(transform):
    m = matrix(transform)
    assert set(m.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(m @ m.T, transform.order * torch.eye(transform.order))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.name}-{t.signs}")
def test_rotating_activation_and_weight_leaves_the_product_unchanged(transform):
    x, w = torch.randn(5, 64), torch.randn(7, 64)
    rotated = rotate_activation(x, transform, spatial=False) @ rotate_weight(w, transform).T / transform.order
    assert torch.allclose(rotated, x @ w.T, atol=1e-5)


def test_rotating_a_convolution_along_its_channels_leaves_its_output_unchanged():
    transform = Transform("channels", 16, signs=3)
    x, w = torch.randn(2, 32, 8, 8), torch.randn(5, 32, 3, 3)
    rotated = torch.conv2d(rotate_activation(x, transform, True), rotate_weight(w, transform), stride=2, padding=1)
    assert torch.allclose(rotated / 16, torch.conv2d(x, w, stride=2, padding=1), atol=1e-4)


def test_a_transform_along_the_width_is_undone_by_its_inverse_exactly_on_integers():
    transform = Transform("width", 8, signs=5)
    codes = torch.randint(-7, 8, (2, 3, 4, 16)).float()
    there = rotate_activation(codes, transform, True)
    assert torch.equal(rotate_activation(there, transform, True, inverse=True), codes * 8)


def test_an_outlier_spreads_and_a_constant_gathers():
    assert torch.equal(hadamard(32)[0], torch.ones(32))  # paper, equation 19
    gathered = torch.ones(32) @ hadamard(32)  # paper, equation 20
    assert gathered[0] == 32 and not gathered[1:].any()


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 9), st.randoms())
def test_packing_is_exact_and_really_packed(bits, rows, columns, random):
    codes = np.array([random.randrange(2**bits) for _ in range(rows * columns)], np.uint8).reshape(rows, columns)
    packed = pack(codes, bits)
    assert packed.nbytes == (codes.size * bits + 7) // 8
    assert np.array_equal(unpack(packed, bits, codes.shape), codes)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="do not fit 3 bits"):
        pack(np.array([8]), 3)


@pytest.mark.parametrize("packed", [np.zeros(2, np.uint8), np.zeros((1, 3), np.uint8), np.zeros(3, np.float32)])
def test_bytes_that_are_not_those_of_the_codes_are_a_files_fault_with_a_way_out(packed):
    with pytest.raises(FileFault, match="cannot hold 8 codes of 3 bits") as caught:
        unpack(packed, 3, (8,))
    assert "--force" in caught.value.hint


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_are_never_worse_and_codes_stay_in_range(bits, symmetric):
    torch.manual_seed(0)
    x = torch.randn(3, 500) + 0.5
    low, high = integer_range(bits, symmetric)
    scale, zero = choose(x, low, high)
    codes = quantise(x, scale[:, None], zero[:, None], low, high)
    assert codes.min() >= low and codes.max() <= high
    wider = integer_range(bits + 1, symmetric)
    better = choose(x, *wider)
    error = sqnr(x, dequantise(codes, scale[:, None], zero[:, None]))
    finer = quantise(x, better[0][:, None], better[1][:, None], *wider)
    assert (sqnr(x, dequantise(finer, better[0][:, None], better[1][:, None])) > error).all()


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("columns", [1, 17, 300])
def test_trials_of_a_scale_that_are_made_together_choose_the_bits_of_one_after_another(norm, columns, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, columns) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e4])[:, None]
    for low, high in ((-7, 7), (0, 15)):
        monkeypatch.setattr(affine, "CACHED", 1 << 16)
        together = choose(x, low, high, norm=norm)
        for some in (1, 7 * x.numel()):  # one at a time, and a last few that are fewer
            monkeypatch.setattr(affine, "CACHED", some)
            assert all(map(torch.equal, together, choose(x, low, high, norm=norm)))


def test_a_row_of_zeros_gets_a_scale_and_stays_zero():
    scale, zero = choose(torch.zeros(1, 8), -7, 7)
    assert scale.item() > 0 and not dequantise(quantise(torch.zeros(8), scale, zero, -7, 7), scale, zero).any()


def test_gradients_are_straight_through_for_x_and_lsq_for_the_scale():
    x = torch.tensor([0.3, 1.26, 9.0, -9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    zero = torch.tensor(0.0, requires_grad=True)
    value = centred_codes(x, scale, zero, -7, 7) * scale
    value.backward(torch.ones(4))
    assert torch.equal(x.grad, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    inside = (round(0.6) - 0.6) + (round(2.52) - 2.52)
    assert scale.grad.item() == pytest.approx(inside + 7 - 7, abs=1e-6)  # the two clamped values give ±7
    assert zero.grad.item() == pytest.approx(-2 * 0.5)


def test_training_and_export_get_the_same_codes():
    x = torch.randn(1000) * 3
    scale, zero = torch.tensor(0.37, requires_grad=True), torch.tensor(6.0)
    assert torch.equal(centred_codes(x, scale, zero, 0, 15), quantise(x, scale.detach(), zero, 0, 15) - zero)


@pytest.mark.parametrize("weight", WEIGHT_BITS)
@pytest.mark.parametrize("activation", ACTIVATION_BITS)
def test_bits_are_read_as_they_are_written(weight, activation):
    assert (
        Bits.parse(f"W{weight}A{activation}") == Bits(weight, activation) == Bits.parse(str(Bits(weight, activation)))
    )


@pytest.mark.parametrize("text", ["w4", "w5a4", "w4a2", "4/4", ""])
def test_other_bits_are_refused_with_the_way_out(text):
    with pytest.raises(UsageError) as caught:
        Bits.parse(text)
    assert caught.value.hint


def test_an_order_that_does_not_divide_is_refused_and_nothing_is_padded():
    with pytest.raises(UsageError, match="order 64 does not divide its channels \\(96\\)"):
        SitePlan(Site("a", "linear", "attention", (8, 96)), transform=Transform("channels", 64), inverse="single")


def tables() -> TimestepTables:
    scale = torch.tensor([[1.0, 2.0], [4.0, 2.0], [16.0, 8.0]])
    return TimestepTables([901, 1, 401], scale, torch.tensor([[0.0, 8.0], [2.0, 8.0], [4.0, 8.0]]))


def test_a_table_is_looked_up_by_timestep_not_by_order_of_calls():
    table = tables()
    for timestep, expected in ((401, 16.0), (1, 4.0), (901, 1.0), (401, 16.0)):
        table.set_timestep(torch.tensor([timestep, timestep]))
        assert table.of(0)[0].item() == expected


def test_between_timesteps_scales_are_interpolated_in_their_logarithm_and_zero_points_are_whole():
    table = tables()
    table.set_timestep(201)  # half way from 1 to 401
    scale, zero = table.of(0)
    assert scale.item() == pytest.approx(8.0, rel=1e-6) and zero.item() == 3.0
    table.set_timestep(5000)
    assert table.of(0)[0].item() == 1.0
    assert table.covers([1, 401]) and not table.covers([1, 2])


def test_a_timestep_that_went_through_thousandths_in_fp32_has_its_row_and_none_other_has():
    known = [967.3245849609375, 0.12345, 500.0]
    table = TimestepTables(known, torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))
    for timestep, expected in zip(known, (1.0, 2.0, 3.0), strict=True):
        table.set_timestep(torch.tensor([timestep], dtype=torch.float64).float() / 1000 * 1000)
        assert table.of(0)[0].item() == expected
    assert table.covers([967.33, 500.0]) and not table.covers([967.4])
    assert table.raw()["timesteps"].tolist() == sorted(known)


@pytest.mark.parametrize("timestep", [1, 401, 150, 5000])
def test_a_factor_of_a_site_is_one_of_each_of_its_outputs(timestep):
    factors, outputs, ones = torch.tensor([[1.0, 2.0], [4.0, 0.5]]), [3, 2], torch.ones(2, 2)
    of_sites = TimestepTables([401, 1], ones, ones, factors, outputs=outputs)
    of_outputs = TimestepTables([401, 1], ones, ones, factors.repeat_interleave(torch.tensor(outputs), 1))
    for table in (of_sites, of_outputs):
        table.set_timestep(timestep)
    assert torch.equal(of_sites.factors_of(slice(0, 5)), of_outputs.factors_of(slice(0, 5)))
    assert torch.equal(of_sites.on(torch.device("cpu")).factor, of_outputs.on(torch.device("cpu")).factor)
    assert torch.equal(of_sites.raw()["factor"], factors.flip(0))  # ascending timesteps, and no wider than it came
    of_sites.factors_of(slice(0, 3)).sum().backward()
    reached = [parameter.grad for parameter in of_sites.factor if parameter.grad is not None]
    assert all(grad[0] > 0 and grad[1] == 0 for grad in reached) and reached


class Told(torch.nn.Module):
    def forward(self, x, conditions=None, timestep=None):
        return x


@pytest.mark.parametrize("call", [lambda m: m(1, 2, 0.401), lambda m: m(1, timestep=torch.tensor([0.401, 0.401]))])
def test_tables_follow_the_networks_own_timestep_argument_times_its_unit(call):
    table, network = tables(), Told()
    table.follow(network, unit=1000.0)
    call(network)
    assert table.of(0)[0].item() == 16.0


def test_a_network_called_without_a_timestep_is_refused():
    network = Told()
    tables().follow(network)
    with pytest.raises(HqdmError, match="a Told was called without a timestep"):
        network(1, 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_each_image_of_a_mixed_batch_is_computed_at_its_own_timestep_and_comes_back_in_its_place(rows):
    table, given = tables(), torch.tensor([401, 1, 901, 1])
    x = torch.randn(4 * rows, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    table.set_timestep(given)
    sizes = []

    def compute(part):
        sizes.append(len(part))
        return part * table.of(0)[0]

    mixed = table.each(x, compute, "layer")
    assert sizes == [rows, 2 * rows, rows] and mixed.is_contiguous(memory_format=torch.channels_last)
    for image, timestep in enumerate(given):
        table.set_timestep(timestep)
        mine = slice(image * rows, (image + 1) * rows)
        assert torch.equal(mixed[mine], table.each(x[mine], compute, "layer"))


def test_gradients_of_a_mixed_batch_reach_each_timesteps_own_row_and_no_other():
    table, x = tables(), torch.ones(3, 1)
    table.set_timestep(torch.tensor([901, 1, 901]))
    table.each(x, lambda part: part * table.of(1)[0], "layer").sum().backward()
    assert [None if row.grad is None else row.grad.tolist() for row in table.scale] == [[0.0, 1.0], None, [0.0, 2.0]]


def test_an_input_that_cannot_be_shared_out_to_the_images_is_refused_by_site_and_shape():
    table = tables()
    table.set_timestep(torch.tensor([901, 1]))
    with pytest.raises(HqdmError, match=r"site blocks.0: an input of shape \(3, 8\)"):
        table.each(torch.zeros(3, 8), lambda part: part, "blocks.0")


def test_equal_timesteps_are_one_group_and_the_batch_is_not_touched():
    table, x = tables(), torch.zeros(2, 8)
    table.set_timestep(torch.tensor([901, 901]))
    assert table.each(x, lambda part: part, "layer") is x
