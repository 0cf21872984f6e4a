"""Group norms the short way: compiled moments, and the norm in the pass that quantises, with the same bits."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from roads import exported_store, make
from test_native import layer
from test_students import students
from torch import nn
from torch.nn import functional as F

from pipelines import native
from pipelines.errors import NumericalFault
from pipelines.kernels.norms import ShortNorm, ShortResidual, shorten_norms
from pipelines.kernels.pending import Normed
from pipelines.kernels.prologue import Operand, Prologue
from pipelines.quant.spec import IDENTITY, Transform

compiled = pytest.mark.skipif(native.library() is None, reason=native.state().why_not)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(channels, groups, seed=0):
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    norm.weight.data, norm.bias.data = noise(seed, channels), noise(seed + 1, channels)
    return norm


@compiled
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "images, channels, groups, side", [(2, 224, 32, 9), (1, 48, 16, 1), (3, 80, 5, 13), (2, 64, 1, 8)]
)
@torch.no_grad()
def test_a_compiled_norm_is_that_of_torch_in_fp64(images, channels, groups, side, silu):
    """Channels far from zero, where squares of what is summed would cancel."""
    norm, shift = norm_of(channels, groups), noise(5, images, channels)
    x = noise(2, images, channels, side, side) * noise(3, channels, 1, 1) + 100 * noise(4, channels, 1, 1)
    found = ShortNorm(norm)(x, pending=True, shift=shift, silu=silu).tensor()
    wanted = copy.deepcopy(norm).double()((x + shift[:, :, None, None]).double())
    wanted = F.silu(wanted) if silu else wanted
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() <= 2e-5 * max(1.0, wanted.abs().max().item())
    tokens = x.flatten(2).transpose(1, 2)
    pending = ShortNorm(norm)(tokens, pending=True, shift=shift, silu=silu)
    assert torch.equal(pending.tensor(), found.permute(0, 2, 3, 1).flatten(1, 2))
    # Neither what else is in the batch nor the number of threads changes a bit.
    alone = ShortNorm(norm)(x[-1:], pending=True, shift=shift[-1:], silu=silu)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ShortNorm(norm)(x, pending=True, shift=shift, silu=silu).tensor(), found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.tensor(), found[-1:]) and torch.equal(
        pending[torch.tensor([images - 1])].tensor(), pending.tensor()[-1:]
    )


@compiled
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("transform", [IDENTITY, Transform("channels", 32, 2)], ids=lambda t: t.name)
@pytest.mark.parametrize("around", ["", "cg"])
@torch.no_grad()
def test_a_norm_within_the_quantiser_gives_the_codes_of_a_norm_before_it(kind, transform, around):
    channels = 96
    surroundings = layer(kind, channels, transform, 4, "asymmetric", around)
    x = noise(1, 2, channels, 3, 8) if kind == "conv" else noise(1, 2, 5, channels)
    pending = ShortNorm(norm_of(channels, 32))(x, pending=True, shift=noise(2, 2, channels), silu=True)
    for operand in (Operand(torch.uint8, 3, (3, 48)), Operand(torch.uint8, 3), Operand(torch.float32)):
        within, before = (Prologue(surroundings)(given, 0.05, 3, operand)[0] for given in (pending, pending.tensor()))
        assert torch.equal(within, before) and within.float().std() > 1


@compiled
@torch.no_grad()
def test_nan_before_a_norm_is_named_by_the_site_after_it():
    x = noise(1, 2, 64, 4, 4)
    x[1, 3, 2, 2] = torch.nan
    pending = ShortNorm(norm_of(64, 32))(x, pending=True, silu=True)
    with pytest.raises(NumericalFault, match="site layer: its input holds NaN"):
        Prologue(layer("conv", 64, IDENTITY, 4, "symmetric", ""))(pending, 0.5, 0, Operand(torch.uint8, 8))


def block_of(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = dict(in_channels=64, out_channels=96, temb_channels=32, groups=16, eps=1e-6) | options
        return ResnetBlock2D(**given).eval().requires_grad_(False)


@compiled
@pytest.mark.parametrize("options", [
    {}, {"out_channels": 64, "output_scale_factor": 1.5}, {"temb_channels": None}, {"skip_time_act": True}
])  # fmt: skip
@torch.no_grad()
def test_a_residual_block_the_short_way_gives_what_diffusers_gives(options):
    block = block_of(**options)
    x, temb = noise(1, 2, 64, 6, 5), None if block.time_emb_proj is None else noise(2, 2, 32)
    wanted, kept = block(x, temb), x.clone()
    shorten_norms(block)
    assert isinstance(block.forward, ShortResidual)
    assert torch.allclose(block(x, temb), wanted, atol=1e-5) and torch.equal(x, kept)


def test_blocks_that_learn_or_are_built_otherwise_take_the_usual_way():
    x, temb = noise(1, 2, 64, 6, 6), noise(2, 2, 32)
    for options in ({"up": True}, {"down": True}, {"time_embedding_norm": "scale_shift"}, {"non_linearity": "gelu"}):
        block = block_of(**options)
        wanted = block(x, temb)
        shorten_norms(block)
        assert not isinstance(block.forward, ShortResidual) and torch.equal(block(x, temb), wanted)
    for options, dtype in (({"groups": 8, "in_channels": 24, "out_channels": 24}, torch.float32), ({}, torch.float64)):
        block, given = block_of(**options).to(dtype), noise(1, 2, options.get("in_channels", 64), 6, 6).to(dtype)
        with torch.no_grad():
            wanted = block(given, temb.to(dtype))
            shorten_norms(block)
            assert torch.equal(block(given, temb.to(dtype)), wanted)
    block = block_of()
    wanted = block(x, temb)
    shorten_norms(block)
    assert torch.equal(block(x, temb), wanted)  # with gradients on


@compiled
@torch.no_grad()
def test_a_student_norms_in_its_prologues_and_keeps_its_bits_where_timesteps_are_mixed(tmp_path, monkeypatch):
    store = exported_store(tmp_path)
    fake, integer = students(store, store.current("distill"))
    blocks = [module for module in integer.network.modules() if isinstance(vars(module).get("forward"), ShortResidual)]
    assert len(blocks) == sum(type(module) is ResnetBlock2D for module in integer.network.modules()) > 0
    taken, forward = [], Prologue.forward

    def seen(self, x, *given):
        taken.append(isinstance(x, Normed))
        return forward(self, x, *given)

    monkeypatch.setattr(Prologue, "forward", seen)
    x, classes = noise(3, 2, 1, 8, 8), torch.tensor([0, 3])
    for timesteps in (torch.tensor(500), torch.tensor([500, 20])):
        ours = integer.predict(x, timesteps, classes, 1.5)
        assert torch.equal(ours, fake.predict(x, timesteps, classes, 1.5))
    assert sum(taken) >= 2 * len(blocks)


def test_images_do_not_hang_on_the_back_end(tmp_path):
    store = exported_store(tmp_path)
    made = [make(store, "sample", source="int", backend=backend, count=2, steps=2) for backend in ("cpu", "reference")]
    assert made[0].digest == made[1].digest
