"""Attention the short ways: to one token without queries and keys, to more through compiled kernels."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from roads import tiny_store, tiny_student
from test_students import students

from pipelines import native
from pipelines.kernels.attention import Short, attend, shorten


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(**options):
    """(the attention as diffusers has it, the same one shortened)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = Attention(64, 24, heads=4, dim_head=16, **options).eval()
    short = Attention(64, 24, heads=4, dim_head=16, **options).eval()
    short.load_state_dict(usual.state_dict())
    shorten(short)
    return usual, short


@pytest.mark.parametrize("options", [{}, {"residual_connection": True, "rescale_output_factor": 1.5, "bias": True}])
@torch.no_grad()
def test_one_token_has_the_value_that_any_query_finds(options):
    usual, short = both(**options)
    x, context = noise(1, 3, 50, 64), noise(2, 3, 1, 24)
    # A product of one row may round otherwise than one of fifty; integers do not round.
    assert torch.allclose(usual(x, context), short(x, context), atol=1e-6)


@torch.no_grad()
def test_masked_ones_and_those_that_learn_take_the_usual_way():
    usual, short = both()
    x, context, mask = noise(1, 3, 50, 64), noise(2, 3, 1, 24), torch.zeros(3, 1)
    assert torch.equal(usual(x, context, mask), short(x, context, mask))
    several = noise(2, 3, 2, 24)
    with torch.enable_grad():
        assert torch.equal(usual(x, several), short(x, several))


@pytest.mark.skipif(native.library() is None, reason=native.state().why_not)
@pytest.mark.parametrize("images, queries, keys, heads, width", [
    (2, 64, 64, 4, 32), (1, 100, 77, 8, 40), (3, 9, 1, 2, 8), (1, 33, 19, 5, 160), (2, 7, 300, 1, 72), (1, 99, 65, 3, 3)
])  # fmt: skip
def test_compiled_attention_is_softmax_of_products(images, queries, keys, heads, width):
    q, k, v = noise(1, images, queries, heads * width), *(noise(s, images, keys, heads * width) for s in (2, 3))
    q = q * 4  # so that some softmax is nearly one key's
    split = [value.double().view(images, -1, heads, width).transpose(1, 2) for value in (q, k, v)]
    wanted = (torch.softmax(split[0] @ split[1].transpose(-1, -2) / width**0.5, -1) @ split[2]).transpose(1, 2)
    found = attend(q, k, v, heads, native.library())
    assert (found - wanted.flatten(2)).abs().max() <= 1e-5
    alone = attend(q[-1:], k[-1:], v[-1:], heads, native.library())
    assert torch.equal(found[-1:], alone)  # whatever else is in the batch


@pytest.mark.skipif(native.library() is None, reason=native.state().why_not)
@torch.no_grad()
def test_more_tokens_take_compiled_kernels_and_give_what_diffusers_gives():
    usual, short = both()
    assert isinstance(short.forward, Short)
    x, several = noise(1, 3, 50, 64), noise(2, 3, 2, 24)
    assert torch.allclose(usual(x, several), short(x, several), atol=1e-6)
    own = Attention(64, heads=4, dim_head=16).eval()
    expected = own(x)
    shorten(own)
    assert torch.allclose(own(x), expected, atol=1e-6)


@torch.no_grad()
def test_an_integer_model_leaves_out_what_cannot_matter_and_keeps_its_bits(tmp_path):
    store = tiny_store(tmp_path)
    fake, integer = students(store, tiny_student(store, "hqdm", "ours", "w4a3"))
    reached = []
    for name, module in integer.network.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_q")):
            module.register_forward_hook(lambda *_, name=name: reached.append(name))
    x, classes = noise(3, 2, 1, 8, 8), torch.tensor([0, 3])
    ours = integer.predict(x, torch.tensor(500), classes, 1.5)
    assert torch.equal(ours, fake.predict(x, torch.tensor(500), classes, 1.5))
    assert any(name.endswith("attn2.to_v") for name in reached) and any("attn1.to_q" in name for name in reached)
    assert not any(name.endswith(("attn2.to_q", "attn2.to_k")) for name in reached)
    assert any(isinstance(vars(module).get("forward"), Short) for module in integer.network.modules())
