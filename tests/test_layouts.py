"""Blocks that lay activations out anew, the short way: channels stay last, with the same values."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from families import save_tiny
from roads import SAMPLE, make, tiny_student
from test_students import students
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import native, runner
from pipelines.kernels.layouts import ShortTransformer, ShortUpsampling, shorten_layouts
from pipelines.kernels.norms import shorten_norms
from pipelines.workspace.store import Store


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *given, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*given, **options).eval().requires_grad_(False)


def transformer(linear=False, **options):
    given = dict(num_attention_heads=2, attention_head_dim=16, in_channels=32, cross_attention_dim=8)
    return made(Transformer2DModel, **given | dict(norm_num_groups=8, use_linear_projection=linear) | options)


def shortened(module):
    module = copy.deepcopy(module)
    shorten_norms(module)
    shorten_layouts(module)
    return module


class Copies(TorchDispatchMode):
    """Counts copies of tensors as large as `numel` while it is entered."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        self.count += copies and result.numel() >= self.numel
        return result


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linears"])
@torch.no_grad()
def test_a_transformer_the_short_way_gives_what_diffusers_gives_and_copies_no_activation(linear):
    usual = transformer(linear)
    short = shortened(usual)
    assert isinstance(short.forward, ShortTransformer)
    x, context = noise(1, 2, 32, 6, 5).contiguous(memory_format=torch.channels_last), noise(2, 2, 3, 8)
    kept, wanted = x.clone(), usual(x, context, return_dict=False)[0]
    found = short(x, encoder_hidden_states=context, return_dict=False)[0]
    assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(x, kept)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(short(x.contiguous(), context, return_dict=False)[0], wanted, atol=1e-5)
    with Copies(x.numel()) as of_usual:
        usual(x, context, return_dict=False)
    with Copies(x.numel()) as of_short:
        short(x, context, return_dict=False)
    assert of_short.count < of_usual.count


@torch.no_grad()
def test_a_transformer_that_is_asked_for_more_takes_the_usual_way():
    usual = transformer()
    short = shortened(usual)
    x, context, mask = noise(1, 2, 32, 4, 4), noise(2, 2, 3, 8), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    masked = short(x, context, encoder_attention_mask=mask, return_dict=False)[0]
    assert torch.allclose(masked, usual(x, context, encoder_attention_mask=mask, return_dict=False)[0], atol=1e-5)
    assert not torch.allclose(masked, short(x, context, return_dict=False)[0], atol=1e-3)
    assert torch.allclose(short(x, context).sample, usual(x, context).sample, atol=1e-5)
    patched = dict(patch_size=2, sample_size=8, norm_type="ada_norm_zero", num_embeds_ada_norm=10)
    patches = transformer(cross_attention_dim=None, **patched)
    assert not isinstance(shortened(patches).forward, ShortTransformer)
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        assert short(given, context, return_dict=False)[0].requires_grad


@pytest.mark.parametrize("images", [2, 64])
@torch.no_grad()
def test_an_upsampling_gives_what_diffusers_gives_and_copies_no_activation(images):
    usual = made(Upsample2D, 8, use_conv=True)
    short = shortened(usual)
    assert isinstance(short.forward, ShortUpsampling)
    x = noise(1, images, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    for size in (None, (5, 9)):
        assert torch.allclose(short(x, size), usual(x, size), atol=1e-6)
    with Copies(x.numel()) as of_short:
        found = short(x)
    assert of_short.count == 0 and found.is_contiguous(memory_format=torch.channels_last)


def test_upsamplings_that_are_built_otherwise_take_the_usual_way():
    for options in ({"use_conv_transpose": True}, {}, {"use_conv": True, "norm_type": "ln_norm"}):
        assert not isinstance(shortened(made(Upsample2D, 8, **options)).forward, ShortUpsampling)


@pytest.mark.skipif(native.library() is None, reason=native.state().why_not)
@torch.no_grad()
def test_a_student_keeps_its_bits_and_is_asked_for_its_transformers_the_short_way(tmp_path):
    folder, options = save_tiny("sd", tmp_path / "model")
    store = Store(tmp_path / "workspace")
    runner.make(store, "model", runner.model_config(folder, **options))
    make(store, "profile", steps=3, batch=1, sample=SAMPLE)
    fake, integer = students(store, tiny_student(store))
    x, rows = noise(3, 2, *integer.info.shape), torch.tensor([0, 1])
    ours = integer.predict(x, torch.tensor(500), rows, 2.0)  # and its weights are packed
    assert torch.equal(ours, fake.predict(x, torch.tensor(500), rows, 2.0))
    with Copies(1) as copies:
        integer.predict(x, torch.tensor(500), rows, 2.0)
    for module in integer.network.modules():  # as diffusers has it
        if isinstance(vars(module).get("forward"), ShortTransformer | ShortUpsampling):
            del module.forward
    with Copies(1) as usual:
        integer.predict(x, torch.tensor(500), rows, 2.0)
    assert copies.count < usual.count
