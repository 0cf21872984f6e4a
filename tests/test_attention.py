"""Cross-attention to one token, the short way: the same bits, without queries and keys."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from roads import tiny_store, tiny_student
from test_students import students

from pipelines.kernels.attention import OneToken, shorten


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
def test_more_tokens_and_masked_ones_take_the_usual_way():
    usual, short = both()
    x = noise(1, 3, 50, 64)
    several, mask = noise(2, 3, 2, 24), torch.zeros(3, 1)
    assert torch.equal(usual(x, several), short(x, several))
    assert torch.equal(usual(x, several[:, :1], mask), short(x, several[:, :1], mask))
    own = Attention(64, heads=4, dim_head=16).eval()
    expected = own(x)
    shorten(own)
    assert torch.equal(own(x), expected)


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
    assert any(isinstance(getattr(m, "processor", None), OneToken) for m in integer.network.modules())
