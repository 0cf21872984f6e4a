"""The products of bytes and int8 weights: exact wherever they are offered, with the largest operands there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import products
from pipelines import native, speed
from pipelines.errors import HqdmError
from pipelines.kernels import cpu, operators, reference
from pipelines.kernels.forms import INT8
from pipelines.kernels.operators import Compiled, OneDNN, Operators, available
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.spec import Bits, Site, SitePlan

STEPS = 128  # of products.cpp, LONGEST: the most between two widenings
compiled = pytest.mark.skipif(
    not any(isinstance(each, Compiled) for each in available()), reason="no kernels are compiled for AVX2 here"
)


def kernels() -> Compiled:
    return next(each for each in available() if isinstance(each, Compiled))


def check(each: Operators, site: Site, weight: torch.Tensor, codes: torch.Tensor, zero: int, largest: int) -> None:
    """Outputs with and without a bias against plain integers, bit for bit."""
    codes = codes.contiguous(memory_format=torch.channels_last) if site.kind == "conv" else codes
    generator = torch.Generator().manual_seed(0)
    scale, bias = (torch.rand(site.outputs, generator=generator) for _ in range(2))
    packed = each.pack(site, weight, tuple(codes.shape), largest)
    sums = reference.accumulate(codes.int() - zero, weight.int(), site).float()
    across = (1, -1, 1, 1) if site.kind == "conv" else (1, -1)
    expected = sums * scale.view(across) + bias.view(across)
    assert torch.equal(each.run(site, codes, zero, packed, scale, bias), expected), each.name
    assert torch.equal(each.run(site, codes, zero, packed, torch.ones_like(scale), None), sums), each.name


@st.composite
def layers(draw) -> tuple[Site, tuple[int, ...]]:
    """A layer and the shape of its codes."""
    inputs = draw(st.sampled_from([1, 3, 4, 17, 64, 130, 520]))
    outputs = draw(st.sampled_from([1, 4, 31, 32, 33, 70]))
    if draw(st.booleans()):
        return Site("layer", "linear", "", (outputs, inputs)), (draw(st.sampled_from([1, 2, 3, 6, 97, 200])), inputs)
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    groups, kernel = draw(st.sampled_from([1, 1, 2, 4])), draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*(st.integers(0, extent // 2) for extent in kernel)))
    site = Site(
        "layer", "conv", "", (outputs * groups, inputs, *kernel), draw(pairs), padding, draw(pairs), groups=groups
    )
    return site, (draw(st.integers(1, 3)), inputs * groups, draw(st.integers(5, 11)), draw(st.integers(5, 13)))


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_products_are_exact_for_layers_of_any_shape(layer, data):
    site, shape = layer
    largest, most = (data.draw(st.sampled_from(each)) for each in ([1, 7, 15, 63, 255], [1, 7, 64, INT8]))
    seed, zero = data.draw(st.integers(0, 2**16)), data.draw(st.integers(0, largest))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.uint8)
    for each in available():
        bound = min(most, each.largest_weight(largest))
        weight = torch.randint(-bound, bound + 1, site.weight, generator=generator, dtype=torch.int8)
        check(each, site, weight, codes, zero, largest)


@pytest.mark.parametrize("largest", [1, 7, 15, 127, 255])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_largest_codes_beside_the_largest_weights_saturate_nothing(largest, sign, kind):
    site = Site("layer", kind, "", (33, 600) if kind == "linear" else (33, 100, 3, 3), padding=(1, 1))
    codes = torch.full((5, 600) if kind == "linear" else (1, 100, 5, 5), largest, dtype=torch.uint8)
    for each in available():
        weight = torch.full(site.weight, sign * each.largest_weight(largest), dtype=torch.int8)
        check(each, site, weight, codes, 0, largest)


@pytest.mark.parametrize("inputs", [1, 2, 4, 24])
@pytest.mark.parametrize("groups, outputs", [(2, 33), (3, 48), (4, 70), (4, 1), (2, 32)])
def test_groups_have_all_their_zero_points(groups, outputs, inputs):
    """Which oneDNN leaves out of later groups that have many outputs."""
    site = Site("layer", "conv", "", (groups * outputs, inputs, 3, 3), padding=(1, 1), groups=groups)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (2, groups * inputs, 6, 6), generator=generator, dtype=torch.uint8)
    for each in available():
        weight = torch.randint(-7, 8, site.weight, generator=generator, dtype=torch.int8)
        check(each, site, weight, codes, 3, 15)


@pytest.mark.parametrize("stride, dilation", [((1, 2), (1, 2)), ((2, 1), (2, 1)), ((2, 2), (2, 2)), ((2, 1), (1, 2))])
@pytest.mark.parametrize("columns", [5, 6, 9])
def test_a_strided_kernel_reads_its_own_input_alone(stride, dilation, columns):
    """Where oneDNN with AMX reads others, into an output of one column."""
    site = Site("layer", "conv", "", (4, 3, 3, 3), stride, dilation=dilation)
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (2, 3, 7, columns), generator=generator, dtype=torch.uint8)
    for each in available():
        weight = torch.randint(-7, 8, site.weight, generator=generator, dtype=torch.int8)
        check(each, site, weight, codes, 3, 15)


@compiled
def test_sums_that_leave_32_bits_on_the_way_come_back_with_their_zero_point():
    """Σ u·V and z·ΣV are 3.2e9 each, their difference is small."""
    site = Site("layer", "linear", "", (3, 100_000))
    codes = torch.full((2, 100_000), 250, dtype=torch.uint8)
    codes[1, ::2] = 251
    weight = torch.full(site.weight, INT8, dtype=torch.int8)
    check(kernels(), site, weight, codes, 250, 255)


@pytest.mark.parametrize("kind, largest", [("linear", 15), ("linear", 255), ("conv", 15), ("conv", 255)])
def test_threads_share_nothing(kind, largest):
    site = Site("layer", kind, "", (256, 320) if kind == "linear" else (64, 64, 3, 3), padding=(1, 1))
    shape = (3000, 320) if kind == "linear" else (4, 64, 24, 24)
    generator, threads = torch.Generator().manual_seed(2), torch.get_num_threads()
    codes = torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.uint8)
    try:
        for each in available():
            most = min(20, each.largest_weight(largest))
            weight = torch.randint(-most, most + 1, site.weight, generator=generator, dtype=torch.int8)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                check(each, site, weight, codes, largest // 2, largest)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 64), (0, 64, 5, 5)])
def test_nothing_gives_nothing(shape):
    kind = "linear" if len(shape) == 2 else "conv"
    site = Site("layer", kind, "", (33, 64) if kind == "linear" else (33, 64, 3, 3), padding=(1, 1))
    codes, weight = torch.zeros(shape, dtype=torch.uint8), torch.ones(site.weight, dtype=torch.int8)
    if kind == "conv":
        codes = codes.contiguous(memory_format=torch.channels_last)
    for each in available():
        packed = each.pack(site, weight, (1, *shape[1:]), 15)
        assert each.run(site, codes, 3, packed, torch.ones(33), None).shape == (0, 33, *shape[2:])


@compiled
def test_what_the_compiled_kernels_would_misread_is_refused_by_the_sites_name():
    site = Site("layer", "conv", "", (8, 16, 3, 3), stride=(2, 2))
    packed = kernels().pack(site, torch.ones(site.weight, dtype=torch.int8), (1, 16, 5, 5), 15)

    def run(shape=(1, 16, 5, 5), dtype=torch.uint8, layout=torch.channels_last, scale=None, bias=None):
        codes = torch.ones(shape, dtype=dtype).contiguous(memory_format=layout)
        return kernels().run(site, codes, 0, packed, torch.ones(8) if scale is None else scale, bias)

    assert (run() == 144).all()
    doubled = torch.ones(16)
    doubled[1::2] = 7
    assert (run(scale=doubled[::2], bias=doubled[1::2]) == 151).all()
    for wrong in (
        dict(shape=(1, 16, 2, 2)), dict(shape=(1, 12, 5, 5)), dict(dtype=torch.float32),
        dict(layout=torch.contiguous_format), dict(scale=torch.ones(8).double()), dict(scale=torch.ones(1)),
        dict(bias=torch.ones(8).bfloat16()), dict(bias=torch.ones(7)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="site layer: "):
            run(**wrong)


def runs_of(weight: torch.Tensor, largest: int) -> list[tuple[int, int]] | None:
    """(First, last) step of what compiled kernels add up in 16 bits; None where they widen the operands."""
    site = Site("layer", "linear", "", tuple(weight.shape))
    packed = kernels().pack(site, weight, (1, weight.shape[1]), largest)
    if packed.product.words:
        return None
    runs, first = [], 0
    for _, start, steps, ends in packed.plan.tolist():
        if ends:
            runs.append((first, start + steps))
            first = start + steps
    return runs


@compiled
def test_sums_stay_in_16_bits_as_long_as_the_weights_prove_that_they_fit():
    weight = (torch.randn(70, 2000, generator=torch.Generator().manual_seed(1)) * 14).round().clamp(-INT8, INT8)
    weight[3, :400], weight[60, 1200:1300] = INT8, -INT8  # runs are short where all of an output have one sign
    runs = runs_of(weight.to(torch.int8), 15)
    assert [first for first, _ in runs[1:]] == [last for _, last in runs[:-1]] and runs[-1][1] == 500
    pairs = weight.view(70, 500, 2, 2)  # output, step, which of two sums, the two that one instruction adds

    def most(first: int, last: int) -> float:
        of_run = pairs[:, first:last]
        return 15 * float(max(of_run.clamp(min=0).sum((1, 3)).max(), -of_run.clamp(max=0).sum((1, 3)).min()))

    assert all(most(*run) < 2**15 for run in runs)
    assert all(last - first == STEPS or most(first, last + 1) >= 2**15 for first, last in runs[:-1])
    lengths = [last - first for first, last in runs]
    assert min(lengths) < 10 and max(lengths) > 50


@compiled
def test_operands_are_widened_where_sums_of_16_bits_would_end_at_every_step():
    weight = torch.full((32, 64), INT8, dtype=torch.int8)
    assert runs_of(weight, 255) is None  # one pair of products does not fit
    assert runs_of(weight, 100) is None  # one step fits, two do not
    assert runs_of(weight // 8, 100) is not None
    assert runs_of(weight, 15) == [(at, min(at + 8, 16)) for at in range(0, 16, 8)]


def test_the_fastest_that_are_exact_here_come_first(monkeypatch):
    def names() -> list[str]:
        return [each.name for each in available()]

    everywhere = names()
    assert everywhere[-1] == OneDNN(vnni=False).name
    monkeypatch.setattr(operators, "has_vnni", lambda: False)
    assert names()[-1] == OneDNN(vnni=False).name and OneDNN(vnni=True).name not in names()
    monkeypatch.setattr(native, "_built", lambda: (None, native.State(None, why_not="there is no C++ compiler")))
    assert names() == [OneDNN(vnni=False).name]


def test_where_there_are_none_layers_are_refused_and_a_float_model_is_still_measured(monkeypatch):
    monkeypatch.setattr(native, "_built", lambda: (None, native.State(None, why_not="there is no C++ compiler")))
    monkeypatch.setattr(operators, "has_onednn", lambda: False)
    site, zero = Site("layer", "linear", "", (4, 8)), torch.zeros(4, dtype=torch.int16)
    weights = IntegerWeights(SitePlan(site), torch.ones(4, 8).short(), zero, torch.ones(4), None).packed()
    with pytest.raises(HqdmError, match="no oneDNN int8 operators") as caught:
        cpu.prepare(weights)
    assert "--backend reference" in caught.value.hint
    monkeypatch.setattr(speed, "SIDE", 16)
    monkeypatch.setattr(speed, "multiplies_bfloat16", lambda device: False)
    found = speed.peaks()
    assert found["int8_gops"] == 0 and found["fp32_gflops"] > 0


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_benchmark_of_layers_has_figures_of_every_operator(kind, bits):
    weight = (8, 32) if kind == "linear" else (8, 32, 3, 3)
    site = Site("small", kind, "", weight, padding=(1, 1) if kind == "conv" else (0, 0), positions=(4, 4))
    name, width, *figures = (
        cell.strip() for cell in products.row_of(site, 5, Bits.parse(bits), 2).strip("|").split("|")
    )
    assert (name, width, len(figures)) == ("small", bits, 1 + 3 * len(available()))
    assert all(float(figure) >= 0 for figure in figures)
