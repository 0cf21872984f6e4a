"""What a layer learns: the gradients of the fused backward pass are those of the published, element-wise form.

`benchmarks.training.PublishedLayer` has that form, in fp64 and with autograd's own gradients. By design ours differ
from the public code in one place, which is outside the comparison: a zero-point is rounded, and kept within its codes,
before the layer uses it, where the public code adds it as it is.
"""

import itertools
import json
import math
import time

import pytest
import torch

from benchmarks import training
from benchmarks.training import PublishedLayer, both_layers, layer_input, plain_layer
from pipelines.quant import layers
from pipelines.quant.layers import QuantLayer
from pipelines.quant.products import times
from pipelines.quant.spec import IDENTITY, QUANTISERS, Site, SitePlan, Transform
from pipelines.speed import in_turns, ratio

TOLERANCE = 1e-5  # fp32 against fp64
PLACEMENTS = [
    (IDENTITY, "none"),
    (Transform("channels", 32), "single"),
    (Transform("channels", 16, 3), "single"),
    (Transform("channels", 32), "double"),
    (Transform("channels", 16, 3), "double"),
]
SITES = {
    "linear": (Site("linear", "linear", "attention", (24, 64), rank=3), 7),
    "time": (Site("time", "linear", "attention", (24, 64), rank=2), 0),
    "conv": (Site("conv", "conv", "residual", (24, 64, 3, 3), padding=(1, 1), positions=(6, 6)), 0),
    "strided": (Site("strided", "conv", "downsample", (24, 64, 3, 3), (2, 2), (1, 1), positions=(6, 6)), 0),
    "pointwise": (Site("pointwise", "conv", "skip", (24, 64, 1, 1), positions=(6, 6)), 0),
}


def gradients(ours: QuantLayer, published: PublishedLayer, x: torch.Tensor) -> dict[str, tuple]:
    """Output and gradients of both forms by what they are of, in our layer's coordinates, and the size that an error is
    held against: the largest entry, or for what is one sum over all activations the sum of its terms' absolute values,
    since they cancel. `published` is left in fp64.
    """
    published.double()
    mine, theirs = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    y, expected = ours(mine), published(theirs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    expected.backward(upstream.double())
    plan, tables = ours.plan, ours._tables[0]
    root = plan.transform.order**0.5  # the published parameters are the orthonormal ones, scale/root
    terms = theirs.grad.abs()
    pairs = {
        "output": (y, expected),
        "x": (mine.grad, theirs.grad),
        "activation scale": (tables.scale[0].grad[0], published.scale.grad / root,
                             (terms * x.abs()).sum() / tables.scale[0].detach().abs()),
        "weight scale": (ours.weight_scale.grad,
                         published.weight_scale.grad.flatten() / (root if plan.inverse == "double" else 1)),
        "A": (ours.lora_a.grad, published.lora_a.weight.grad),
        "B": (ours.lora_b.grad, published.lora_b.weight.grad.flatten(1)),
    }  # fmt: skip
    if published.zero is not None:
        pairs["zero-point"] = (tables.zero[0].grad[0], published.zero.grad, terms.sum() * published.scale)
    return {what: (*pair, pair[1].abs().max()) if len(pair) == 2 else pair for what, pair in pairs.items()}


def check(plan: SitePlan, x: torch.Tensor, change=lambda ours, published: None) -> None:
    ours, published = both_layers(plan, x, rank=4)
    with torch.no_grad():
        change(ours, published)
    ours._tables[0].set_timestep(1)  # reads the scales as they are now
    for what, (value, expected, size) in gradients(ours, published, x).items():
        assert expected.abs().max() > 0 and (value - expected).abs().max() <= TOLERANCE * size, what


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("transform, inverse", PLACEMENTS, ids=lambda value: getattr(value, "name", value))
def test_every_gradient_is_that_of_the_published_form(kind, transform, inverse):
    site, tokens = SITES[kind]
    for bits, (weight, activation) in itertools.product((3, 4), itertools.product(QUANTISERS, QUANTISERS)):
        plan = SitePlan(site, True, transform, inverse, bits, bits, weight, activation)
        check(plan, layer_input(site, tokens, 3 if tokens or site.kind == "conv" else 16))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation", QUANTISERS)
def test_where_most_values_are_clipped_the_gradients_are_still_those(kind, activation):
    """Scales of a third: half of activation and weight lie outside, and zero-points get gradients from both ends."""
    site, tokens = SITES[kind]

    def narrow(ours, published):
        for scale in (ours.weight_scale, ours._tables[0].scale[0], published.weight_scale, published.scale):
            scale.div_(3)

    plan = SitePlan(site, True, Transform("channels", 32), "single", 4, 4, "asymmetric", activation)
    check(plan, layer_input(site, tokens, 3), narrow)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_activation_scale_that_went_below_zero_learns_on_as_it_does_in_the_published_form(kind):
    """Which does not look at its sign: a symmetric quantiser is the same at both."""
    site, tokens = SITES[kind]

    def mirrored(ours, published):
        for scale in (ours._tables[0].scale[0], published.scale):
            scale.neg_()

    plan = SitePlan(site, True, Transform("channels", 32), "single", 4, 4, "asymmetric", "symmetric")
    check(plan, layer_input(site, tokens, 3), mirrored)


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise"])
@pytest.mark.parametrize("inverse", ["single", "double"])
def test_some_outputs_after_others_learn_the_same(kind, inverse, monkeypatch):
    """As a large layer's do: 16 outputs a product, and of those three a pass."""
    site, tokens = SITES[kind]
    columns = math.prod(site.weight[1:])
    monkeypatch.setattr(layers, "A_PRODUCT", 16 * columns)
    monkeypatch.setattr(layers, "AT_ONCE", 3 * columns)
    plan = SitePlan(site, True, Transform("channels", 32), inverse, 4, 4)
    check(plan, layer_input(site, tokens, 3))


def test_matrices_are_multiplied_fast_and_right_however_they_lie_in_memory():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 260, generator=generator), torch.randn(310, 260, generator=generator)
    wide, tall = torch.randn(300, 500, generator=generator), torch.randn(260, 400, generator=generator)

    def taken(left, right):
        begun = time.process_time()
        assert torch.allclose(times(left, right), (left.double() @ right.double().T).float(), atol=1e-4)
        return time.process_time() - begun

    taken(a, b)
    usual = min(taken(a, b) for _ in range(5))
    for left, right in ((a, tall[:, 20:60].T), (wide[:, 100:360], b), (wide[:, 100:360], tall[:, :7].T)):
        assert min(taken(left, right) for _ in range(3)) < 30 * usual  # oneDNN's reference: a thousand times
    assert times(a.view(3, 100, 260), b).shape == (3, 100, 310)


def test_a_zero_point_beyond_its_codes_is_used_within_them_and_learns_nothing():
    """By design: the integers' bounds rely on it, where the public code would go on with it."""
    site, tokens = SITES["linear"]
    plan = SitePlan(site, True, weight_bits=4, activation_bits=4, activation_quantiser="asymmetric")
    ours, _ = both_layers(plan, layer_input(site, tokens, 3), rank=4)
    with torch.no_grad():
        ours._tables[0].zero[0].fill_(16.0)
    ours._tables[0].set_timestep(1)
    ours(layer_input(site, tokens, 3)).sum().backward()
    assert ours._tables[0].zero[0].grad.item() == 0


@pytest.mark.parametrize("kind", SITES)
def test_at_many_bits_the_published_form_is_the_plain_layer(kind):
    """So that what ours is compared with is itself right."""
    site, tokens = SITES[kind]
    x = layer_input(site, tokens, 3)
    _, published = both_layers(SitePlan(site, True, Transform("channels", 32), "single", 8, 8), x, rank=4)
    plain = plain_layer(site)
    with torch.no_grad():
        plain.weight.copy_(published._merged())
        plain.bias.copy_(published.bias)
        assert (published(x) - plain(x)).abs().max() < 0.02 * plain(x).abs().max()


def test_turns_alternate_and_ratios_are_taken_within_them():
    heard = []
    taken = in_turns({"a": lambda: heard.append("a"), "b": lambda: heard.append("b")}, turns=3)
    assert "".join(heard) == "abbaabbaab" and len(taken["a"]) == len(taken["b"]) == 3
    assert ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.fixture
def threads(monkeypatch):
    """Let the benchmark say how many threads it wants, and the other tests keep theirs."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_the_benchmark_leaves_a_workspace_beside_it_alone(tmp_path, threads, monkeypatch):
    (tmp_path / "workspace/model").mkdir(parents=True)
    monkeypatch.setattr(training.runner, "make", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # as soon as its own workspace was cleared
        training.main(["--only", "updates", "--folder", str(tmp_path)])
    assert (tmp_path / "workspace/model").exists()


def test_a_benchmark_of_a_model_that_is_not_there_says_so_in_two_lines(tmp_path, threads):
    with pytest.raises(SystemExit, match="^error: .*nope does not exist\nhint: "):
        training.main(["--only", "updates", "--model", str(tmp_path / "nope"), "--folder", str(tmp_path)])


def test_each_table_is_kept_with_its_own_settings_and_version(tmp_path, threads, monkeypatch):
    file = tmp_path / "training.json"
    earlier = {"torch": "1.0", "settings": {"turns": 3}, "rows": []}
    file.write_text(json.dumps({"updates": earlier, "layers": [], "torch": "0.9"}))
    monkeypatch.setattr(training, "layer_table", lambda *_: [])
    training.main(["--only", "layers", "--turns", "5", "--layers", "conv", "--folder", str(tmp_path)])
    settings = {"turns": 5, "batch": training.BATCH, "layers": "conv"}
    assert json.loads(file.read_text()) == {
        "updates": earlier, "layers": {"torch": torch.__version__, "settings": settings, "rows": []}
    }  # fmt: skip
