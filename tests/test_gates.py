"""Feed-forwards with gates the short way: the gate in the pass that quantises, with the same bits."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward
from families import save_tiny
from roads import SAMPLE, make, tiny_student
from test_native import layer
from test_students import students
from torch.nn import functional as F

from pipelines import native, runner
from pipelines.errors import NumericalFault
from pipelines.kernels.gates import ShortFeedForward, shorten_gates
from pipelines.kernels.pending import Gated
from pipelines.kernels.prologue import Operand, Prologue
from pipelines.quant.spec import IDENTITY, Transform
from pipelines.quant.surroundings import Surroundings
from pipelines.workspace.store import Store

compiled = pytest.mark.skipif(native.library() is None, reason=native.state().why_not)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@compiled
@torch.no_grad()
def test_a_gate_is_that_of_torch_in_fp64():
    gates = torch.cat([torch.linspace(-15, 15, 10_000), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, torch.inf])])
    gates = torch.cat([gates, torch.zeros(-len(gates) % 16)]).view(1, -1, 16)
    values = noise(1, *gates.shape)
    found = Gated(torch.cat([values, gates], -1)).tensor()
    wanted = values.double() * F.gelu(gates.double())
    finite = wanted.isfinite()
    assert torch.equal(found[~finite].double(), wanted[~finite])
    assert ((found - wanted).abs() <= 3e-7 * (values * gates).abs())[finite].all()


@compiled
@torch.no_grad()
def test_neither_what_else_is_in_the_batch_nor_threads_change_a_bit():
    both = Gated(noise(1, 3, 7, 2 * 48))
    found = both.tensor()
    assert found.shape == both.shape == (3, 7, 48) and len(both) == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(both.tensor(), found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(both[torch.tensor([2, 0])].tensor(), found[[2, 0]])


@compiled
@pytest.mark.parametrize("order", [1, 16, 64])
@pytest.mark.parametrize("channels", [64, 192, 320])  # whole and broken numbers of vectors that are taken side by side
@pytest.mark.parametrize("around", ["", "cg"])
@torch.no_grad()
def test_a_gate_within_the_quantiser_gives_the_codes_of_a_gate_before_it(order, channels, around):
    transform = IDENTITY if order == 1 else Transform("channels", order, 2)
    surroundings = layer("linear", channels, transform, 4, "asymmetric", around)
    pending = Gated(noise(1, 2, 5, 2 * channels))
    for operand in (Operand(torch.uint8, 3), Operand(torch.uint8, 3, (3, 48, 0, 0)), Operand(torch.int8)):
        within, before = (Prologue(surroundings)(given, 0.05, 3, operand)[0] for given in (pending, pending.tensor()))
        assert torch.equal(within, before) and within.float().std() > 1
        assert within.shape == (2, 5, channels + len(operand.carried))


@compiled
@torch.no_grad()
def test_an_images_own_mean_is_that_of_what_comes_through_the_gate():
    surroundings = layer("linear", 64, Transform("channels", 16, 2), 4, "asymmetric", "")
    surroundings = Surroundings(replace(surroundings.plan, centring="dynamic"), {})
    pending = Gated(noise(1, 2, 5, 2 * 64))
    codes, mean = Prologue(surroundings)(pending, 0.05, 3, Operand(torch.uint8, 3))
    wanted, of_tensor = Prologue(surroundings)(pending.tensor(), 0.05, 3, Operand(torch.uint8, 3))
    assert torch.equal(codes, wanted) and torch.equal(mean, of_tensor)
    assert torch.equal(mean, pending.tensor().mean(1, keepdim=True))


@compiled
@pytest.mark.parametrize("at", [3, 64 + 3], ids=["value", "gate"])
@torch.no_grad()
def test_nan_before_a_gate_is_named_by_the_site_after_it(at):
    x = noise(1, 2, 5, 2 * 64)
    x[1, 2, at] = torch.nan
    with pytest.raises(NumericalFault, match="site layer: its input holds NaN"):
        Prologue(layer("linear", 64, IDENTITY, 4, "symmetric", ""))(Gated(x), 0.5, 0, Operand(torch.uint8, 8))


def feed_forward(width=24, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeedForward(width, **options).eval().requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"final_dropout": True}, {"width": 7}])  # 7: a gate of 28 channels
@torch.no_grad()
def test_a_feed_forward_the_short_way_gives_what_diffusers_gives(options):
    usual = feed_forward(**options)
    x = noise(1, 2, 5, options.get("width", 24))
    wanted = usual(x)
    shorten_gates(usual)
    assert isinstance(usual.forward, ShortFeedForward)
    assert torch.allclose(usual(x), wanted, atol=1e-6)
    assert torch.allclose(usual.double()(x.double()), wanted.double(), atol=1e-6)


def test_those_that_learn_or_have_another_gate_take_the_usual_way():
    x = noise(1, 2, 5, 24)
    for name in ("gelu", "gelu-approximate", "geglu-approximate", "swiglu"):
        other = feed_forward(activation_fn=name)
        shorten_gates(other)
        assert not isinstance(other.forward, ShortFeedForward)
    learning = feed_forward()
    wanted = learning(x)
    shorten_gates(learning)
    assert torch.equal(learning(x), wanted)  # with gradients on
    with torch.no_grad(), torch.random.fork_rng():
        dropping = feed_forward(dropout=0.5).train()
        shorten_gates(dropping)
        assert (dropping.net[1](torch.ones(99)) == 0).any() and not torch.equal(dropping(x), dropping(x))


@compiled
@torch.no_grad()
def test_a_student_gates_in_its_prologues_and_keeps_its_bits_where_timesteps_are_mixed(tmp_path, monkeypatch):
    folder, options = save_tiny("sd", tmp_path / "model")
    store = Store(tmp_path / "workspace")
    runner.make(store, "model", runner.model_config(folder, **options))
    make(store, "profile", steps=3, batch=1, sample=SAMPLE)
    fake, integer = students(store, tiny_student(store))
    taken, forward = [], Prologue.forward

    def seen(self, x, *given):
        taken.append(isinstance(x, Gated))
        return forward(self, x, *given)

    monkeypatch.setattr(Prologue, "forward", seen)
    x, rows = noise(3, 2, *integer.info.shape), torch.tensor([0, 1])
    for timesteps in (torch.tensor(500), torch.tensor([500, 20])):
        ours = integer.predict(x, timesteps, rows, 2.0)
        assert torch.equal(ours, fake.predict(x, timesteps, rows, 2.0))
    count = sum(type(module) is FeedForward for module in integer.network.modules())
    assert sum(taken) == 3 * count > 0  # timesteps that differ are taken one by one
