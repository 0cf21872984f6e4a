"""Attention the short ways: to one token without queries and keys, to more through compiled kernels."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from roads import make, tiny_store, tiny_student
from test_students import students

from pipelines import native
from pipelines.errors import HqdmError, NumericalFault, UsageError
from pipelines.kernels.attention import Short, attend, choose_products, shorten_attention

compiled = pytest.mark.skipif(native.library() is None, reason=native.state().why_not)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(**options):
    """(the attention as diffusers has it, the same one shortened)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = Attention(64, 24, heads=4, dim_head=16, **options).eval()
    short = Attention(64, 24, heads=4, dim_head=16, **options).eval()
    short.load_state_dict(usual.state_dict())
    shorten_attention(short)
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


@compiled
@pytest.mark.parametrize("images, queries, keys, heads, width", [
    (2, 64, 64, 4, 32), (1, 100, 77, 8, 40), (3, 9, 1, 2, 8), (1, 33, 19, 5, 160), (2, 7, 300, 1, 72), (1, 99, 65, 3, 3)
])  # fmt: skip
def test_compiled_attention_is_softmax_of_products(images, queries, keys, heads, width):
    q, k, v = noise(1, images, queries, heads * width), *(noise(s, images, keys, heads * width) for s in (2, 3))
    q = q * 4  # so that some softmax is nearly one key's
    found = attend(q, k, v, heads, native.library())
    assert (found - attended(q, k, v, heads)).abs().max() <= 1e-5
    alone = attend(q[-1:], k[-1:], v[-1:], heads, native.library())
    assert torch.equal(found[-1:], alone)  # whatever else is in the batch


def attended(q, k, v, heads):
    """In fp64."""
    images, _, channels = q.shape
    split = [x.double().view(images, -1, heads, channels // heads).transpose(1, 2) for x in (q, k, v)]
    weights = torch.softmax(split[0] @ split[1].transpose(-1, -2) / (channels // heads) ** 0.5, -1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


@compiled
@pytest.mark.parametrize("images, queries, keys, heads, width", [
    (2, 64, 64, 4, 32), (1, 100, 77, 8, 40), (3, 9, 2, 2, 8), (1, 33, 19, 5, 160), (1, 9, 65, 3, 3), (1, 8, 99, 1, 960)
])  # fmt: skip
def test_attention_in_integers_rounds_rows_of_q_and_k_and_columns_of_v_and_no_more(images, queries, keys, heads, width):
    q, k, v = noise(1, images, queries, heads * width), *(noise(s, images, keys, heads * width) for s in (2, 3))
    k = k + 5  # which shifts all scores of a query alike
    found = attend(q, k, v, heads, native.library(), "int8").double()

    def rounded(x, dim):
        step = x.abs().amax(dim, keepdim=True) / 127
        return (x / step).round() * step

    # Each in its own way: q and k by rows, k without its mean, v by columns.
    q8, k8, v8 = (x.double().view(images, -1, heads, width) for x in (q, k, v))
    q8, k8, v8 = rounded(q8, -1), rounded(k8 - k8.mean(1, keepdim=True), -1), rounded(v8, 1)
    same = attended(*(x.flatten(2) for x in (q8, k8, v8)), heads)
    exact = attended(q, k, v, heads)
    assert (found - same).norm() <= 1e-3 * same.norm()  # a tie may be rounded the other way
    assert (found - exact).norm() <= 0.02 * exact.norm()


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 7), (0, 4, 11)])
def test_what_is_no_number_is_found_before_it_is_an_integer(value, which, place):
    given = [noise(seed, 2, 5, 12) for seed in (1, 2, 3)]
    given[which][place] = value
    with pytest.raises(NumericalFault, match="NaN or Inf"):
        attend(*given, 2, native.library(), "int8")


@compiled
def test_many_small_weights_beside_a_large_one_count_in_integers_too():
    """One key of weight 1 and two thousand of 1/1000 each: in 8 bits all of these would be nothing."""
    q, k = torch.ones(1, 1, 4), torch.zeros(1, 2001, 4)
    k[0, 0] = torch.tensor(1000.0).log() / 2
    v = torch.ones(1, 2001, 4)
    v[0, 0] = 0
    found = attend(q, k, v, 1, native.library(), "int8")
    assert torch.allclose(found, torch.full((1, 1, 4), 2 / 3), atol=0.01)


@compiled
@torch.no_grad()
def test_more_tokens_take_compiled_kernels_and_give_what_diffusers_gives():
    usual, short = both()
    assert isinstance(short.forward, Short)
    x, several = noise(1, 3, 50, 64), noise(2, 3, 2, 24)
    assert torch.allclose(usual(x, several), short(x, several), atol=1e-6)
    own = Attention(64, heads=4, dim_head=16).eval()
    expected = own(x)
    shorten_attention(own)
    assert torch.allclose(own(x), expected, atol=1e-6)
    block = Attention(64, heads=4, dim_head=16, norm_num_groups=8, residual_connection=True, bias=True).eval()
    image = noise(3, 2, 64, 6, 5)
    for laid in (image, image.contiguous(memory_format=torch.channels_last)):
        expected = block(laid)
        again = copy.deepcopy(block)
        shorten_attention(again)
        assert isinstance(again.forward, Short) and torch.allclose(again(laid), expected, atol=1e-6)


@torch.no_grad()
def test_an_integer_model_leaves_out_what_cannot_matter_and_keeps_its_bits(tmp_path):
    store = tiny_store(tmp_path)
    fake, integer = students(store, tiny_student(store, "hqdm", "ours", "w4a3"))
    reached = []
    for name, module in integer.network.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_q")):
            module.register_forward_hook(lambda *_, name=name: reached.append(name))
    x, classes = noise(3, 2, 1, 8, 8), torch.tensor([0, 3])
    if native.library() is not None:
        in_floats = integer.predict(x, torch.tensor(500), classes, 1.5)
        for student in (fake, integer):
            choose_products(student.network, "int8")
        ours = integer.predict(x, torch.tensor(500), classes, 1.5)
        assert torch.equal(ours, fake.predict(x, torch.tensor(500), classes, 1.5)) and not torch.equal(ours, in_floats)
        for student in (fake, integer):
            choose_products(student.network, "fp32")
        reached.clear()
    ours = integer.predict(x, torch.tensor(500), classes, 1.5)
    assert torch.equal(ours, fake.predict(x, torch.tensor(500), classes, 1.5))
    assert any(name.endswith("attn2.to_v") for name in reached) and any("attn1.to_q" in name for name in reached)
    assert not any(name.endswith(("attn2.to_q", "attn2.to_k")) for name in reached)
    assert any(isinstance(vars(module).get("forward"), Short) for module in integer.network.modules())


def test_attention_in_integers_is_refused_where_it_cannot_be(monkeypatch, tmp_path):
    store = tiny_store(tmp_path)
    with pytest.raises(UsageError, match="--attention int8 is for students"):
        make(store, "sample", source="teacher", attention="int8", count=1, steps=1)
    monkeypatch.setattr(native, "_built", lambda: (None, native.State(None, why_not="there is no C++ compiler")))
    with pytest.raises(HqdmError, match="needs compiled kernels: there is no C"):
        choose_products(Attention(64), "int8")
