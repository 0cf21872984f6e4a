"""Compiled kernels: the bits of their definition in torch, built once, and never in silence left out."""

import json
import os
import platform
import pwd
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hqdm_cli.app import main
from pipelines import doctor, native
from pipelines.errors import NumericalFault
from pipelines.kernels import cpu, prologue
from pipelines.kernels.attention import PRODUCTS, attend
from pipelines.kernels.norms import ShortNorm
from pipelines.kernels.prologue import Operand, Prologue
from pipelines.quant import hadamard, layers, passes
from pipelines.quant.hadamard import matrix, rotate_last
from pipelines.quant.layers import QuantLayer
from pipelines.quant.spec import IDENTITY, QUANTISERS, Site, SitePlan, Transform
from pipelines.quant.surroundings import Surroundings
from pipelines.quant.tables import TimestepTables

built = pytest.mark.skipif(native.library() is None, reason=native.state().why_not)
ORDERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@pytest.fixture
def in_torch(monkeypatch):
    """A switch to torch's definition."""

    def switch():
        for module in (hadamard, passes, prologue):
            monkeypatch.setattr(module, "compiled_for", lambda *_: None)

    return switch


@built
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("signs", [None, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_compiled_rotation_has_the_bits_of_the_butterflies_in_torch(order, signs, inverse, in_torch):
    transform = Transform("channels", order, signs)
    x = torch.randn(5, 7, 256, generator=torch.Generator().manual_seed(order)) * 10
    compiled = rotate_last(x, transform, inverse)
    in_torch()
    assert torch.equal(compiled, rotate_last(x, transform, inverse))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inverse", [False, True])
def test_butterflies_are_the_product_with_the_matrix_and_their_gradient_is_its_transpose(order, inverse):
    transform = Transform("channels", order, 5)
    m = matrix(transform).double()
    m = m.T if inverse else m
    x = torch.randn(3, 512, requires_grad=True)
    y = rotate_last(x, transform, inverse)
    wanted = (x.detach().double().view(-1, order) @ m).view(3, 512)
    assert (y - wanted).abs().max() <= 1e-6 * order * x.abs().max()
    upstream = torch.randn(3, 512)
    (grad,) = torch.autograd.grad(y, x, upstream)
    wanted = (upstream.double().view(-1, order) @ m.T).view(3, 512)
    assert (grad - wanted).abs().max() <= 1e-6 * order * upstream.abs().max()


def layer(kind: str, channels: int, transform: Transform, bits: int, quantiser: str, around: str):
    site = Site("layer", kind, "residual", (4, channels) + ((3, 3) if kind == "conv" else ()), padding=(1, 1), rank=3)
    plan = SitePlan(
        site, True, transform, "none" if transform.is_identity else "single", 4, bits, "symmetric", quantiser,
        centring="static" if "c" in around else "none", scaling="g" in around,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(channels)
    tensors = {}
    if "c" in around:
        tensors["centre"] = torch.randn(channels, generator=generator)
    if "g" in around:
        tensors["gain"] = torch.rand(channels, generator=generator) + 0.5
    return Surroundings(plan, tensors)


@built
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_compiled_codes_have_the_integers_of_torch_for_any_layer(data):
    order = data.draw(st.sampled_from((1, 8, 16, 32, 64)))
    channels = order * data.draw(st.integers(1, 6))
    transform = IDENTITY if order == 1 else Transform("channels", order, data.draw(st.sampled_from([None, 2])))
    bits, quantiser = data.draw(st.sampled_from((3, 4, 8))), data.draw(st.sampled_from(("symmetric", "asymmetric")))
    kind, around = data.draw(st.sampled_from(("linear", "conv"))), data.draw(st.sampled_from(("", "c", "g", "cg")))
    surroundings = layer(kind, channels, transform, bits, quantiser, around)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (2, channels, 3, 5) if kind == "conv" else (2, 5, channels)
    x = torch.randn(shape, generator=generator) * 3
    scale = data.draw(st.sampled_from((0.0130000002682209, 0.5, 2.700000047683716)))
    x.view(-1)[:4] = torch.tensor([0.5, 1.5, -2.5, 1e30]) * scale  # ties, and far out of range
    low, high = surroundings.plan.activation_range
    zero = 0 if quantiser == "symmetric" else data.draw(st.integers(low, high))
    carried = data.draw(st.sampled_from(((), (3, 48, 0, 0), (255,))))
    operand = Operand(torch.uint8, zero if low == 0 else 2 ** (bits - 1), carried)
    compiled, _ = Prologue(surroundings)(x, scale, zero, operand)
    with pytest.MonkeyPatch.context() as patch:
        for module in (hadamard, prologue):
            patch.setattr(module, "compiled_for", lambda *_: None)
        wanted, _ = Prologue(surroundings)(x, scale, zero, operand)
    assert compiled.dtype == torch.uint8 and torch.equal(compiled, wanted)
    assert compiled.stride() == wanted.stride()


def weight_rows(data) -> passes.WeightRows:
    """Rows of any weight that a plan can have."""
    order = data.draw(st.sampled_from((1, 8, 16, 32, 64)))
    channels, positions = max(order, 16) * data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 3)))
    inverse = "none" if order == 1 else data.draw(st.sampled_from(("single", "double")))
    transform = IDENTITY if order == 1 else Transform("channels", order, data.draw(st.sampled_from([None, 2])))
    bits, quantiser = data.draw(st.sampled_from((2, 3, 4, 8))), data.draw(st.sampled_from(QUANTISERS))
    gained, mixed, coded = (data.draw(st.booleans()) for _ in range(3))
    site = Site("layer", "conv", "residual", (5, channels, 1, positions), rank=4)
    plan = SitePlan(site, True, transform, inverse, bits, 4, quantiser, scaling=gained, mixed=mixed)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensors = {"gain": torch.rand(channels, generator=generator) + 0.5} if gained else {}
    if mixed:
        tensors["row_bits"] = torch.tensor([2, 2, bits, bits, 2], dtype=torch.uint8)
    surroundings = Surroundings(plan, tensors)
    low, high = surroundings.bounds(slice(0, 5))
    size = float(2**bits) / 2
    base = (
        torch.randn((5, channels * positions), generator=generator) * size * (order**0.5 if inverse == "double" else 1)
    )
    zero = torch.zeros(5) if quantiser == "symmetric" else torch.tensor([0.0, 1, 2, 3, 1])
    scale = torch.rand(5, generator=generator) + 0.7
    if coded:
        base = torch.randint(0, 4, base.shape, generator=generator, dtype=torch.uint8)
    return passes.WeightRows(plan, surroundings, base, scale * 1.1 if coded else None, scale, zero, low, high)


@built
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_compiled_passes_over_a_weight_have_the_integers_and_gradients_of_torch(data):
    rows = weight_rows(data)
    generator = torch.Generator().manual_seed(0)
    added = data.draw(st.sampled_from([None, torch.randn(rows.base.shape, generator=generator)]))
    factor = data.draw(st.sampled_from([None, torch.rand(5, generator=generator)]))
    fold = rows.plan.inverse == "single" and data.draw(st.booleans())
    grad = torch.randn(rows.base.shape, generator=generator)

    def computed():
        rounded = torch.empty(rows.base.shape, dtype=torch.int8 if rows.plan.weight_bits < 8 else torch.int16)
        centred, through = torch.empty(rows.base.shape), grad.clone()
        rows.quantise(added, rounded, centred, fold, factor)
        sums = rows.gradient(rounded, through, fold)
        return rounded, centred, through, sums

    *mine, sums = computed()
    with pytest.MonkeyPatch.context() as patch:
        for module in (hadamard, passes):
            patch.setattr(module, "compiled_for", lambda *_: None)
        *wanted, wanted_sums = computed()
    assert all(torch.equal(*pair) for pair in zip(mine, wanted, strict=True))
    for mine, wanted in zip(sums, wanted_sums, strict=True):
        assert mine.dtype == torch.float64 and (mine - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max())


@built
def test_a_convolution_in_groups_learns_in_torch_and_some_outputs_after_others_the_same(in_torch, monkeypatch):
    """Its outputs have fewer inputs than it has, of which compiled passes take no part of a vector."""
    site = Site("grouped", "conv", "residual", (32, 4, 3, 3), padding=(1, 1), groups=4, rank=4)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in (site.weight, (2, 16, 5, 5)))
    tables = TimestepTables([1], torch.full((1, 1), 0.5), torch.zeros(1, 1))
    quantised = QuantLayer(
        SitePlan(site, True, weight_bits=4, activation_bits=4), weight, None, torch.full((32,), 0.3), torch.zeros(32),
        tables, 0, slice(0, 32),
    )  # fmt: skip
    quantised.train_weight()

    def learned():
        tables.set_timestep(1)
        given = x.clone().requires_grad_(True)
        y = quantised(given)
        return [y, *torch.autograd.grad(y.square().sum(), [given, quantised.weight, quantised.weight_scale])]

    compiled = learned()
    monkeypatch.setattr(layers, "A_PRODUCT", 16 * 4 * 9)
    in_torch()
    for mine, wanted in zip(compiled, learned(), strict=True):
        assert wanted.abs().max() > 0 and torch.allclose(mine, wanted, rtol=1e-5, atol=1e-4)


@built
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_compiled_passes_over_an_input_have_the_integers_and_gradients_of_torch(data):
    order = data.draw(st.sampled_from((1, 8, 16, 32, 64)))
    channels = max(order, 16) * data.draw(st.integers(1, 3))
    transform = IDENTITY if order == 1 else Transform("channels", order, data.draw(st.sampled_from([None, 2])))
    kind, quantiser = data.draw(st.sampled_from(("linear", "conv"))), data.draw(st.sampled_from(QUANTISERS))
    undone = order > 1 and data.draw(st.booleans())
    plan = layer(kind, channels, transform, data.draw(st.sampled_from((3, 4, 8))), quantiser, "").plan
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (2, channels, 3, 5) if kind == "conv" else (2, 5, channels)
    x, grad = torch.randn((2, *shape), generator=generator) * torch.tensor([3.0, 1]).view(2, *[1] * len(shape))
    x.view(-1)[:3] = torch.tensor([300.0, -300, 0.25])
    scale, zero = torch.tensor(0.5), None if quantiser == "symmetric" else torch.tensor(3.0)

    def computed():
        codes = passes.activation_codes(x, plan, scale, zero, undone)
        return codes, passes.activation_gradient(grad.clone(), x, plan, scale, zero, undone)

    codes, (mine, *sums) = computed()
    with pytest.MonkeyPatch.context() as patch:
        for module in (hadamard, passes):
            patch.setattr(module, "compiled_for", lambda *_: None)
        wanted_codes, (wanted, *wanted_sums) = computed()
    assert torch.equal(codes, wanted_codes) and torch.equal(mine, wanted)
    for mine, wanted in zip(sums, wanted_sums, strict=True):
        assert mine.dtype == torch.float64 and torch.isclose(mine, wanted, rtol=1e-9, atol=1e-9)


@built
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(
    "flags", [["-march=x86-64"], ["-march=x86-64-v3"], ["-march=native", "-DLANES=16"]], ids=lambda each: each[-1]
)
@torch.no_grad()
def test_narrower_and_wider_vectors_compute_the_same_bits(flags, monkeypatch, tmp_path):
    """Sixteen lanes are AVX-512's; a processor without it takes two halves."""
    surroundings = layer("conv", 96, Transform("channels", 32, 1), 4, "asymmetric", "cg")
    x = torch.randn(2, 96, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    q, k, v = torch.randn(3, 2, 50, 72, generator=torch.Generator().manual_seed(1))

    def computed():
        codes, _ = Prologue(surroundings)(x, 0.5, 3, Operand(torch.uint8, 3, (3, 48)))
        normed = ShortNorm(nn.GroupNorm(32, 96))(x, pending=True, silu=True).tensor()
        attended = [attend(q, k, v, 4, native.library(), products) for products in PRODUCTS]
        rotated = [rotate_last(x.flatten(1), Transform("channels", order, 2)) for order in ORDERS[:6]]
        return [*rotated, codes, normed], attended

    exact, attended = computed()
    others = [flag for flag in native.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(native, "FLAGS", [*others, *flags])
    monkeypatch.setenv("HQDM_CACHE", str(tmp_path / "cache"))
    built, _ = native._built.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: built)
    others = computed()
    for mine, other in zip(exact, others[0], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(attended, others[1], strict=True):
        assert (mine - other).abs().max() <= 1e-4  # floating point; and a tie of 8 bits may fall otherwise


@built
def test_nan_in_a_layers_input_is_named_by_its_site():
    surroundings = layer("linear", 64, Transform("channels", 32), 4, "symmetric", "")
    x = torch.randn(2, 5, 64)
    x[1, 3, 40] = torch.nan
    with pytest.raises(NumericalFault, match="site layer: its input holds NaN"):
        Prologue(surroundings)(x, 0.5, 0, Operand(torch.uint8, 8))


def said(environment: dict[str, str]) -> str:
    """What a process of its own says of its kernels."""
    code = "from pipelines import native; s = native.state(); print(s.path, '|', s.why_not)"
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "HQDM_NATIVE", "HQDM_CACHE")}
    run = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@built
def test_kernels_are_built_once_and_found_again(tmp_path):
    first = said({"HQDM_CACHE": str(tmp_path)})
    [library] = tmp_path.iterdir()
    assert str(library) in first
    made = library.stat().st_mtime_ns
    assert said({"HQDM_CACHE": str(tmp_path)}) == first and library.stat().st_mtime_ns == made


@pytest.mark.parametrize("left", [0, 7, 20])
def test_a_library_of_which_the_cache_has_a_part_is_built_again_and_not_loaded(left, tmp_path, monkeypatch):
    """Loaded it would end the process: its headers name pages that are not there."""
    made = []
    monkeypatch.setenv("HQDM_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_run", lambda command: "a compiler")
    monkeypatch.setattr(native, "_compile", lambda compiler, work, path, *_: made.append(path.write_bytes(b"library")))
    path = native._compiled("c++")
    whole = path.read_bytes()
    assert whole.startswith(b"library") and native._compiled("c++") == path and len(made) == 1
    path.write_bytes(whole[:left])
    assert native._compiled("c++") == path and path.read_bytes() == whole and len(made) == 2


def test_a_user_without_a_home_computes_without_kernels_and_is_told(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "HQDM_CACHE", "HQDM_NATIVE", "CXX"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(native.shutil, "which", lambda name: name)
    monkeypatch.setattr(native, "_run", lambda command: "a compiler")
    library, state = native._built.__wrapped__()
    assert library is None and "home" in state.why_not


@built
def test_kernels_of_a_compiler_without_openmp_are_said_to_run_on_one_thread(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    refuse = '[ "$word" = -fopenmp ] && echo "no -fopenmp" >&2 && exit 1'
    compiler.write_text(f'#!/bin/sh\nfor word; do {refuse}; done\nexec {native.state().compiler} "$@"\n')
    compiler.chmod(0o755)
    assert native.state().threaded and doctor._compiled().state == "fine"
    monkeypatch.setenv("HQDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    library, state = native._built.__wrapped__()
    assert library is not None and not state.threaded
    monkeypatch.setattr(native, "_built", lambda: (library, state))
    found = doctor._compiled()
    assert found.state == "slower" and "one thread" in found.found and str(state.path) in found.hint


def test_what_a_killed_build_left_goes_and_a_build_at_work_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HQDM_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_run", lambda command: "")
    monkeypatch.setattr(native, "_compile", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    for _ in range(2):
        if (child := os.fork()) == 0:
            native._compiled("c++")
        os.waitpid(child, 0)
    killed, at_work = tmp_path.iterdir()
    (killed / "exact.cpp.o").write_text("half")
    long_ago = time.time() - 3 * native.PATIENCE
    os.utime(killed, (long_ago, long_ago))
    monkeypatch.setattr(native, "_compile", lambda compiler, work, made, threads: made.touch())
    made = native._compiled("c++")
    assert set(tmp_path.iterdir()) == {made, at_work}


def test_doctor_tries_integers_and_says_how_to_get_what_is_missing(monkeypatch, tmp_path, capsys):
    def told() -> dict[str, dict]:
        assert main(["doctor", "--json", "-w", str(tmp_path / "not yet/there")]) == 0
        return {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}

    assert told()["integers (cpu)"]["state"] == "fine" and "GB free" in told()["workspace"]["found"]
    monkeypatch.setattr(native, "_built", lambda: (None, native.State(None, why_not="there is no C++ compiler")))
    monkeypatch.setattr(cpu.Prepared, "accumulators", lambda self, codes: torch.zeros(5, 16, dtype=torch.int32))
    found = told()
    assert found["compiled kernels"]["state"] == "slower" and "g++" in found["compiled kernels"]["hint"]
    assert found["integers (cpu)"]["found"] == "wrong sums" and found["integers (reference)"]["state"] == "fine"


def test_where_there_are_none_the_reason_is_told(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'kernels.cpp:1: no such thing' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    cache = {"HQDM_CACHE": str(tmp_path / "cache")}
    assert said({"HQDM_NATIVE": "0"}) == "None | HQDM_NATIVE is 0\n"
    assert "no C++ compiler" in said(cache | {"PATH": str(tmp_path)})
    assert "CXX names nothing-such, which is not there" in said(cache | {"CXX": "nothing-such"})
    assert "built no library: kernels.cpp:1: no such thing" in said(cache | {"CXX": str(broken)})
    assert not list((tmp_path / "cache").iterdir())
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert "others may write to it" in said({"HQDM_CACHE": str(shared)})
