"""The CUDA kernels: the integers of the reference, the bits of the definition. On a CUDA device where there is one;
elsewhere in Triton's interpreter, which computes what the kernels say and knows nothing of tiles or layouts. What is
compiled for Hopper is looked at on any machine.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import kernels
from pipelines.errors import HqdmError, NumericalFault
from pipelines.kernels import cuda, reference
from pipelines.kernels.prologue import Operand, Prologue, centred_operand
from pipelines.quant.hadamard import hadamard
from pipelines.quant.integers import IntegerWeights, PackedWeights
from pipelines.quant.spec import IDENTITY, QUANTISERS, Site, SitePlan, Transform
from pipelines.quant.surroundings import Surroundings

pytest.importorskip("triton", reason="the CUDA kernels are written in Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are declared
    from pipelines.kernels import triton_ops

TILES = triton_ops._product.configs
if DEVICE == "cuda":  # one tile each: to try all for every shape would take hours
    triton_ops._product.configs, triton_ops._codes.configs = TILES[6:7], triton_ops._codes.configs[:1]

PLACEMENTS = [
    (IDENTITY, "none"),
    (Transform("channels", 16, 7), "single"),
    (Transform("channels", 32, 2), "double"),
    (Transform("width", 4, 5), "activation"),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def site(kind: str, channels=32, outputs=5, kernel=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1)) -> Site:
    if kind == "linear":
        return Site("layer", "linear", "attention", (outputs, channels), rank=3)
    return Site(
        "layer", "conv", "residual", (outputs, channels, kernel, kernel), stride, padding, dilation, positions=(4, 4)
    )


def random_weights(plan: SitePlan, seed: int = 0) -> PackedWeights:
    generator = torch.Generator().manual_seed(seed)
    low, high = plan.weight_range
    outputs, asymmetric = plan.site.outputs, plan.weight_quantiser == "asymmetric"
    zero = torch.randint(low, high + 1, (outputs,), generator=generator) if asymmetric else torch.zeros(outputs)
    codes = torch.randint(low, high + 1, plan.site.weight, generator=generator)
    centred = codes - zero.view(-1, *[1] * (codes.ndim - 1))
    scale, bias = torch.rand(outputs, generator=generator) + 0.1, torch.randn(outputs, generator=generator)
    return IntegerWeights(plan, centred.short(), zero.short(), scale, bias).packed()


def random_codes(plan: SitePlan, zero: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Centred codes; where the transform is undone on them, as wide as they become."""
    low, high = ((value - zero) * (plan.transform.order if plan.inverse == "activation" else 1)
                 for value in plan.activation_range)  # fmt: skip
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def in_fp32(value: float) -> float:
    return torch.tensor(value).item()


def shape_of(plan: SitePlan, size=(5, 3)) -> tuple[int, ...]:
    """Of an input: a convolution's height and width in `size`."""
    return (2, 7, plan.site.channels) if plan.site.kind == "linear" else (2, plan.site.channels, *size)


def lookup(plan: SitePlan, scale: float, zero: int) -> triton_ops.Lookup:
    return triton_ops.Lookup.of(scale, None if plan.activation_quantiser == "symmetric" else zero, torch.device(DEVICE))


def codes_of(x: torch.Tensor, surroundings: Surroundings, scale: float, zero: int) -> torch.Tensor:
    """Codes on the device, and back from there; NaN is an AssertionError."""
    at = lookup(surroundings.plan, scale, zero)
    codes, _ = cuda.DevicePrologue(surroundings.to(DEVICE))(x.to(DEVICE), at)
    surroundings.cpu()
    assert not at.fault.item(), "NaN"
    return codes.cpu()


def check(plan: SitePlan, weights: PackedWeights, seed: int = 0, size=(5, 3)) -> cuda.Prepared:
    """Assert that accumulators and outputs are the reference's, bit for bit and in the same memory order."""
    prepared, truth = cuda.prepare(weights), reference.prepare(weights)
    zero = 0 if plan.activation_quantiser == "symmetric" else seed % (plan.activation_range[1] + 1)
    centred = random_codes(plan, zero, shape_of(plan, size), seed)
    wanted = truth.accumulators(centred)
    found = prepared.accumulators(centred.to(DEVICE)).cpu()
    assert found.dtype == torch.int32 and torch.equal(found, wanted)
    scale, operand = in_fp32(0.0371), prepared.operand(zero)
    codes = (centred + operand.offset).to(DEVICE, operand.dtype)
    at = lookup(plan, scale * plan.transform.order, zero)
    result = prepared(codes, at, weights.scale.to(DEVICE)).cpu()
    output = truth(centred, centred_operand(plan), scale, weights.scale)
    assert torch.equal(result, output)
    assert [s for s, n in zip(result.stride(), result.shape, strict=True) if n > 1] == [
        s for s, n in zip(output.stride(), output.shape, strict=True) if n > 1
    ]
    return prepared


@pytest.mark.parametrize("weight_bits, activation_bits", [(2, 8), (3, 4), (4, 3), (4, 8), (8, 6), (8, 8)])
@pytest.mark.parametrize("activation", QUANTISERS)
def test_accumulators_and_outputs_are_the_references_for_bit_widths_quantisers_and_transforms(
    weight_bits, activation_bits, activation
):
    for kind in ("linear", "conv"):
        for (transform, inverse), weight in zip(PLACEMENTS, QUANTISERS * 2, strict=True):
            if site(kind).admits(transform):
                plan = SitePlan(site(kind), True, transform, inverse, weight_bits, activation_bits, weight, activation)
                check(plan, random_weights(plan), seed=83)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_accumulators_and_outputs_are_the_references_for_any_kernel_stride_padding_dilation_and_size(data):
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    kernel, dilation, padding = data.draw(st.sampled_from((1, 2, 3, 5))), pair(1, 2), pair(0, 2)
    needed = [max(1, d * (kernel - 1) + 1 - 2 * p) for d, p in zip(dilation, padding, strict=True)]
    size = tuple(least + data.draw(st.integers(0, 4)) for least in needed)
    channels, outputs = data.draw(st.sampled_from((1, 3, 8, 33, 64))), data.draw(st.sampled_from((1, 6, 40)))
    s = site("conv", channels, outputs, kernel, pair(1, 3), padding, dilation)
    bits, quantiser = data.draw(st.sampled_from((3, 8))), data.draw(st.sampled_from(QUANTISERS))
    plan = SitePlan(s, True, IDENTITY, "none", 4, bits, "symmetric", quantiser)
    check(plan, random_weights(plan), data.draw(st.integers(0, 999)), size)


def wide_weights(plan: SitePlan, wide: str) -> PackedWeights:
    """Integer weights whose V is wide: in one input channel, or along another Hadamard row for every output."""
    centred = torch.randint(-2, 3, plan.site.weight, generator=torch.Generator().manual_seed(1)).short()
    if wide == "channel":
        centred[:, 3] = 200
    elif wide == "rows":
        rows = plan.weight_range[1] * hadamard(32)[: plan.site.outputs].short()
        centred[:, :32] = rows.view(*rows.shape, *[1] * (centred.ndim - 2))
    outputs = plan.site.outputs
    zero = torch.full((outputs,), 2 if plan.weight_quantiser == "asymmetric" else 0, dtype=torch.int16)
    return IntegerWeights(plan, centred, zero, torch.rand(outputs) + 0.1, torch.randn(outputs)).packed()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("form, transform, weight_bits, weight, activation_bits, activation, wide", [
    ("one", Transform("channels", 8, 1), 3, "symmetric", 4, "symmetric", ""),
    ("columns", IDENTITY, 8, "asymmetric", 4, "symmetric", "channel"),
    ("columns", IDENTITY, 8, "asymmetric", 8, "asymmetric", "channel"),
    ("parity", Transform("channels", 32), 4, "symmetric", 4, "symmetric", "rows"),
    ("digits", Transform("channels", 32), 8, "symmetric", 4, "asymmetric", "rows"),
    ("digits", Transform("channels", 32), 8, "symmetric", 8, "asymmetric", "rows"),
])  # fmt: skip
def test_each_form_is_exact_where_it_is_chosen(
    kind, form, transform, weight_bits, weight, activation_bits, activation, wide
):
    inverse = "none" if transform.is_identity else "single"
    plan = SitePlan(
        site(kind, 64), True, transform, inverse, weight_bits, activation_bits, weight, activation
    )  # fmt: skip
    assert check(plan, wide_weights(plan, wide), seed=200).form == form


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one tile")
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_gives_the_same_integers(tile, monkeypatch):
    monkeypatch.setattr(triton_ops._product, "configs", [tile])
    for kind, quantiser in (("linear", "symmetric"), ("conv", "asymmetric")):
        plan = SitePlan(site(kind, 96, 80), True, Transform("channels", 32), "single", 8, 8, "symmetric", quantiser)
        check(plan, random_weights(plan), seed=100, size=(9, 15))


def test_digits_of_codes_and_of_weights_are_summed_in_one_accumulator():
    """Codes rotated back reach 4 · 255 and weights 255: two digits on both sides."""
    plan = SitePlan(site("conv"), True, Transform("width", 4), "activation", 8, 8, "asymmetric", "asymmetric")
    weights = random_weights(plan)
    prepared = check(plan, weights, seed=7)
    assert prepared.form == "digits" and prepared.code_digits == 2
    assert len(prepared._on(torch.device(DEVICE)).weight) == 2


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation_bits, activation", [(4, "symmetric"), (8, "asymmetric")])
def test_the_librarys_product_has_the_same_bits(kind, activation_bits, activation, monkeypatch):
    s = site(kind, 32, 8, 1, padding=(0, 0))
    plan = SitePlan(s, True, IDENTITY, "none", 3, activation_bits, "symmetric", activation)
    calls, wrapped = [], torch._int_mm
    monkeypatch.setattr(cuda, "int_mm_is_quicker", lambda key, ours, theirs: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.shape) or wrapped(a, b))
    check(plan, random_weights(plan), seed=100, size=(3, 4))
    assert bool(calls) == (kind == "conv")  # the linear's input has 14 rows, and it takes 17


def surrounded(plan: SitePlan, around: str) -> Surroundings:
    generator = torch.Generator().manual_seed(plan.site.channels)
    made = dict(c=("centre", torch.randn), g=("gain", torch.rand))
    tensors = {made[key][0]: made[key][1](plan.site.channels, generator=generator) + 0.5 for key in around}
    return Surroundings(plan, tensors)


@torch.no_grad()
def defined(surroundings: Surroundings, x: torch.Tensor, scale: float, zero: int, operand: Operand):
    return Prologue(surroundings)(x, scale, zero, operand)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values elsewhere in memory."""
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return torch.stack([x, x], -1)[..., 0] if layout == "apart" else x


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_codes_have_the_integers_of_the_definition_for_any_layer_layout_and_type(data):
    order = data.draw(st.sampled_from((1, 2, 8, 16, 64, 256)))
    transform = IDENTITY if order == 1 else Transform("channels", order, data.draw(st.sampled_from((None, 2))))
    channels = order * data.draw(st.integers(1, 3)) if order < 64 else order
    bits, quantiser = data.draw(st.sampled_from((3, 4, 8))), data.draw(st.sampled_from(QUANTISERS))
    plan = SitePlan(
        site(data.draw(st.sampled_from(("linear", "conv"))), channels), True, transform,
        "none" if order == 1 else "single", 4, bits, "symmetric", quantiser,
    )  # fmt: skip
    plan = replace(plan, site=replace(plan.site, rank=3))
    surroundings = surrounded(plan, data.draw(st.sampled_from(("", "c", "g", "cg"))))
    size = data.draw(st.sampled_from(((1, 1), (1, 4), (3, 1), (3, 5))))
    scale = in_fp32(data.draw(st.sampled_from((0.013, 0.5, 2.7))))
    x = torch.randn(shape_of(plan, size), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 3
    x.view(-1)[:4] = torch.tensor([0.5, 1.5, -2.5, 1e4][: x.numel()]) * scale  # ties, and far out of range
    x = x.to(data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))))
    x = laid_out(x, data.draw(st.sampled_from(("first", "last", "transposed", "apart"))))
    low, high = plan.activation_range
    zero = 0 if quantiser == "symmetric" else data.draw(st.integers(low, high))
    operand = Operand(torch.int8, zero - 128 if cuda.is_shifted(plan) else 0)
    wanted, _ = defined(surroundings, x.float(), scale, zero, operand)
    codes = codes_of(x, surroundings, scale, zero)
    assert codes.dtype == torch.int8 and torch.equal(codes, wanted)


def test_division_is_true_and_a_reciprocal_would_move_values_across_ties():
    plan = SitePlan(site("linear", 256), True, IDENTITY, "none", 4, 8)
    halves, moved = torch.arange(256.0) - 127.5, 0
    for scale in torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist():
        x = (halves * torch.tensor(scale))[None]
        wanted, _ = defined(surrounded(plan, ""), x, scale, 0, Operand(torch.int8))
        assert torch.equal(codes_of(x, surrounded(plan, ""), scale, 0), wanted)
        moved += ((x * (1 / torch.tensor(scale))).round().clamp(-127, 127) != wanted).sum()
    assert moved


def test_codes_along_the_width_have_the_integers_of_the_definition():
    for quantiser, zero in (("symmetric", 0), ("asymmetric", 11)):
        plan = SitePlan(site("conv"), True, Transform("width", 4, 3), "activation", 4, 4, "symmetric", quantiser)
        x, scale, surroundings = torch.randn(2, 32, 4, 4) * 3, in_fp32(0.37), surrounded(plan, "cg")
        wanted, _ = defined(surroundings, x, scale, zero, centred_operand(plan))
        assert torch.equal(codes_of(x, surroundings, scale, zero), wanted)


@pytest.mark.parametrize("bits, quantiser", [(4, "symmetric"), (4, "asymmetric"), (8, "asymmetric")])
@pytest.mark.parametrize("transform, inverse", [PLACEMENTS[1], PLACEMENTS[3]])
def test_scale_and_zero_point_are_read_from_the_tables_row_that_device_memory_names(
    bits, quantiser, transform, inverse
):
    """What a captured graph replays: the same calls on the same tensors, of which one says another timestep."""
    plan = SitePlan(site("conv"), True, transform, inverse, 4, bits, "symmetric", quantiser)
    weights, surroundings = random_weights(plan), surrounded(plan, "").to(DEVICE)
    prepared, truth = cuda.prepare(weights), reference.prepare(weights)
    scales, zeros = torch.tensor([[9.0, 0.7], [9.0, 0.3]]), torch.tensor([[0.0, 3.0], [0.0, 999.0]])
    symmetric = quantiser == "symmetric"
    row, fault = (torch.zeros(length, dtype=torch.int32, device=DEVICE) for length in (1, 2))
    at = triton_ops.Lookup(scales.to(DEVICE), None if symmetric else zeros.to(DEVICE), row, fault, 1)
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(1)) * 2
    for timestep in (0, 1):
        row.fill_(timestep)
        codes, _ = cuda.DevicePrologue(surroundings)(x.to(DEVICE), at)
        y = prepared(codes, at, weights.scale.to(DEVICE)).cpu()
        zero = 0 if symmetric else int(zeros[timestep, 1].clamp(*plan.activation_range))
        scale, operand = scales[timestep, 1].item(), centred_operand(plan)
        centred, _ = defined(surroundings.cpu(), x, scale, zero, operand)
        surroundings.to(DEVICE)
        assert torch.equal(y, truth(centred, operand, scale / transform.order, weights.scale))
    assert not fault.any()
    cuda.DevicePrologue(surroundings)(torch.full_like(x, torch.nan).to(DEVICE), at)
    assert fault.tolist() == [0, 1]  # the site's own


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_outputs_are_as_narrow_as_asked(kind):
    plan = SitePlan(site(kind), True, IDENTITY, "none", 4, 4)
    weights = random_weights(plan)
    prepared, scale = cuda.prepare(weights), in_fp32(0.0371)
    centred = random_codes(plan, 0, shape_of(plan))
    plain = reference.prepare(weights)(centred, centred_operand(plan), scale, weights.scale)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        codes = centred.to(DEVICE, torch.int8)
        y = prepared(codes, lookup(plan, scale, 0), weights.scale.to(DEVICE), dtype).cpu()
        wanted = plain.to(dtype)
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off where the instruction rounds
            assert ((y.view(torch.int16) - wanted.view(torch.int16)).abs() <= 1).all()
        else:
            assert torch.equal(y, wanted)


def test_operands_in_any_layout_give_the_same():
    plan = SitePlan(site("linear"), True, IDENTITY, "none", 4, 4)
    weights = random_weights(plan)
    centred = random_codes(plan, 0, (9, 32))
    wanted = reference.prepare(weights).accumulators(centred)
    assert torch.equal(cuda.prepare(weights).accumulators(centred.T.contiguous().T.to(DEVICE)).cpu(), wanted)
    with pytest.raises(ValueError, match="contiguous"):
        triton_ops.Lookup(torch.ones(3, 2).T, None, *torch.zeros(2, 1, dtype=torch.int32))


def test_a_product_of_many_tiles_is_whole():
    """Tiles are visited in groups, of which the last is not full."""
    for kind, channels in (("linear", 70), ("conv", 33)):
        plan = SitePlan(site(kind, channels, 70), True, IDENTITY, "none", 8, 8)
        prepared, truth = cuda.prepare(random_weights(plan)), reference.prepare(random_weights(plan))
        centred = random_codes(plan, 0, (1, 170, 70) if kind == "linear" else (1, 33, 13, 13))
        assert torch.equal(prepared.accumulators(centred.to(DEVICE)).cpu(), truth.accumulators(centred))


def test_a_forgotten_weight_is_unpacked_again():
    plan = SitePlan(site("linear"), True, IDENTITY, "none", 4, 4)
    prepared = cuda.prepare(random_weights(plan))
    centred = random_codes(plan, 0, shape_of(plan)).to(DEVICE)
    first = prepared.accumulators(centred)
    assert prepared._held
    prepared.forget()
    assert not prepared._held and torch.equal(prepared.accumulators(centred), first)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("transform, inverse", PLACEMENTS)
def test_nan_in_a_layers_input_is_found(value, transform, inverse):
    plan = SitePlan(site("conv"), True, transform, inverse, 4, 4)
    x = torch.randn(2, 32, 4, 4)
    around = surrounded(plan, "")
    codes_of(x, around, 0.5, 0)
    x[1, 30:, 3, 2:] = value  # two infinities of a block leave NaN where they are subtracted
    if transform.is_identity and value == torch.inf:
        assert codes_of(x, around, 0.5, 0).max() == 7
        return
    with pytest.raises(AssertionError, match="NaN"):
        codes_of(x, around, 0.5, 0)


def test_without_a_device_or_without_triton_it_says_so(monkeypatch):
    weights = random_weights(SitePlan(site("linear"), True, IDENTITY, "none", 4, 4))
    with monkeypatch.context() as patch:
        patch.setattr(triton_ops, "INTERPRETED", False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(HqdmError, match="no CUDA device") as caught:
            cuda.prepare(weights)
        assert "--backend cpu" in caught.value.hint
        prepared = cuda.Prepared(weights)
        with pytest.raises(HqdmError, match="site layer: its input is on cpu"):
            prepared.accumulators(torch.zeros(1, 32))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
        patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        with pytest.raises(HqdmError, match="an old one has compute capability 7.5"):
            cuda.prepare(weights)
    monkeypatch.delattr(kernels, "triton_ops")
    monkeypatch.setitem(sys.modules, "pipelines.kernels.triton_ops", None)
    with pytest.raises(HqdmError, match="Triton") as caught:
        cuda.prepare(weights)
    assert "pip install 'hqdm[cuda]'" in caught.value.hint


def test_sums_beyond_32_bits_and_convolutions_in_groups_are_refused_by_name():
    plan = SitePlan(site("linear", 2**18), True, IDENTITY, "none", 8, 8)
    centred = torch.full(plan.site.weight, 127, dtype=torch.int16)
    weights = IntegerWeights(plan, centred, torch.zeros(5, dtype=torch.int16), torch.ones(5), None).packed()
    with pytest.raises(NumericalFault, match="site layer: an accumulator can reach"):
        cuda.prepare(weights)
    plan = SitePlan(site("linear", 110_000), True, IDENTITY, "none", 8, 8, "asymmetric")
    centred = torch.full(plan.site.weight, 160, dtype=torch.int16)  # 160 = 32 + 128 · 1
    centred[:, ::2] = 100  # −28 + 128 · 1: its digits reach 156
    centred[:, 0] = 255  # too wide for a form without digits
    weights = IntegerWeights(plan, centred, torch.zeros(5, dtype=torch.int16), torch.ones(5), None).packed()
    reference.prepare(weights)
    with pytest.raises(NumericalFault, match="site layer: its digits' sums can reach"):
        cuda.prepare(weights)
    plan = SitePlan(replace(site("conv"), groups=2), True, IDENTITY, "none", 4, 4)
    with pytest.raises(HqdmError, match="site layer: a convolution in groups"):
        cuda.prepare(random_weights(plan))


COMPILED = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from pipelines.kernels import cuda, triton_ops
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.spec import Site, SitePlan, Transform
from pipelines.quant.surroundings import Surroundings

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

class Compiled:
    def __init__(self, tuned):
        self.tuned = tuned

    def __getitem__(self, grid):
        def launch(*args, **named):
            tried = self.tuned.configs if self.tuned.early_config_prune is None else triton_ops._worth_trying(
                self.tuned.configs, dict(rows=500, outputs=64))
            made = self.tuned.fn.warmup(*args, grid=(1,), **named, **tried[0].all_kwargs())
            found = re.findall(r"\\b((?:add|sub|mul|div|fma|wgmma|cvt)\\.[\\w.:]*)", made.asm["ptx"])
            floats = {name for name in found if "f32" in name or "s8" in name}
            print(made.metadata.name, tried[0].kwargs.get("BLOCK_N", 0), *sorted(floats))
        return launch

driver.set_active(Hopper())
triton_ops._codes, triton_ops._product = Compiled(triton_ops._codes), Compiled(triton_ops._product)
cuda.Prepared._check = lambda *_: None
site = Site("layer", "conv", "residual", (64, 64, 3, 3), padding=(1, 1))
plan = SitePlan(site, True, Transform("channels", 32, 1), "single", 4, 8, "symmetric", "asymmetric")
ones, none = torch.ones(64), torch.zeros(64, dtype=torch.int16)
weights = IntegerWeights(plan, torch.zeros(site.weight, dtype=torch.int16), none, ones, ones).packed()
table, row = torch.ones(5, 3), torch.zeros(1, dtype=torch.int32)
at = triton_ops.Lookup(table, table, row, torch.zeros(3, dtype=torch.int32), 1)
x = torch.zeros(2, 64, 16, 16)
codes, _ = cuda.DevicePrologue(Surroundings(plan, dict(centre=ones, gain=ones)))(x, at)
cuda.Prepared(weights)(codes, at, ones, torch.bfloat16)
"""


def test_compiled_for_hopper_every_float_operation_is_rounded_and_products_are_int8(tmp_path):
    """PTX never contracts `.rn` into fused multiply-adds, and divides as IEEE has it with `div.rn`."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (first, width, *codes), (second, n, *product) = (line.split() for line in run.stdout.splitlines())
    assert (first, second, width, int(n)) == ("_codes", "_product", "0", 64)
    assert set(codes) >= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert set(product) >= {"add.rn.f32", "mul.rn.f32", "cvt.rn.f32.s32", "cvt.rn.bf16x2.f32"}
    assert [name for name in product if name.startswith("wgmma")] == [
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"
    ]
    arithmetic = [name for name in (*codes, *product) if name.endswith("f32") and not name.startswith("cvt")]
    assert all(".rn." in name and not name.startswith("fma") for name in arithmetic), arithmetic
