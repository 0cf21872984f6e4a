"""What Q-Diffusion, TFMQ-DM and PTQ4DM claim and declare."""

import pytest
import torch
from test_methods import Measures

from pipelines.errors import UsageError
from pipelines.methods import find
from pipelines.quant.affine import choose
from pipelines.quant.layers import Divided, QuantLayer
from pipelines.quant.spec import Bits, Site, SitePlan
from pipelines.quant.tables import TimestepTables

SHORTCUT = Site("up.conv_shortcut", "conv", "skip", (16, 48, 1, 1), rank=4, positions=(8, 8), joint=16)
MAIN = Site("up.conv1", "conv", "residual", (16, 48, 3, 3), padding=(1, 1), rank=4, positions=(8, 8), joint=16)


class Joined(Measures):
    """Halves as well as whole sites."""

    def sqnrs(self, site, quantiser, bits):
        return {"none": 20.0}


def decide(site, name, bits="w4a4", **options):
    method, _, variant = find(name, None, options)
    return method.decide(site, Bits.parse(bits), Joined(), variant)


def quantised(plan: SitePlan, weight: torch.Tensor, bias, x: torch.Tensor) -> QuantLayer:
    """A layer with quantisers of the least error, for x."""
    scale, zero = choose(x.reshape(1, -1), *plan.activation_range, norm=2.0)
    tables = TimestepTables([1.0], scale[None], zero[None])
    tables.set_timestep(1.0)
    return QuantLayer(plan, weight, bias, *choose(weight.flatten(1), *plan.weight_range), tables, 0, slice(0, 16))


def test_splitting_a_bimodal_joint_input_lowers_its_error():
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 8, 8, generator=noise)
    x[:, 16:] *= 25  # the skip connection's half is much wider
    weight = torch.randn(16, 48, 1, 1, generator=noise) / 7
    weight[:, :16] *= 25  # and the other half's weights make up for it
    bias = torch.randn(16, generator=noise)
    exact = torch.nn.functional.conv2d(x, weight, bias)
    first, second = decide(SHORTCUT, "q_diffusion")
    whole = SitePlan(SHORTCUT, weight_bits=4, activation_bits=4, weight_quantiser="asymmetric",
                     activation_quantiser="asymmetric")  # fmt: skip
    halves = Divided(
        quantised(first, weight[:, :16], bias, x[:, :16]), quantised(second, weight[:, 16:], None, x[:, 16:]), 16
    )
    with torch.no_grad():
        errors = [(layer(x) - exact).square().mean() for layer in (halves, quantised(whole, weight, bias, x))]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("name", ["q_diffusion", "tfmq"])
def test_a_shortcut_that_reads_a_concatenation_is_two_sites_of_the_bits_asked_for(name):
    halves = decide(SHORTCUT, name, "w3a4", shortcuts="asked")
    assert [half.site.name for half in halves] == ["up.conv_shortcut.first", "up.conv_shortcut.second"]
    assert all((half.weight_bits, half.activation_bits) == (3, 4) for half in halves)
    assert [half.site.bias for half in halves] == [True, False]
    eight = decide(SHORTCUT, name, "w3a4", shortcuts="eight")
    assert all((half.weight_bits, half.activation_bits) == (8, 8) for half in eight)
    assert not decide(SHORTCUT, name, shortcuts="float").quantised
    default = "asked" if name == "q_diffusion" else "float"
    assert decide(SHORTCUT, name) == decide(SHORTCUT, name, shortcuts=default)
    assert isinstance(decide(MAIN, name), SitePlan)
    with pytest.raises(UsageError, match="shortcuts"):
        decide(SHORTCUT, name, shortcuts="four")


def test_q_diffusion_splits_the_main_path_where_it_is_asked_to():
    assert len(decide(MAIN, "q_diffusion", split_main="true")) == 2
    assert decide(MAIN, "q_diffusion", quantiser="symmetric").activation_quantiser == "symmetric"


def test_ptq4dm_learns_nothing_unless_asked_to_and_is_symmetric():
    method, _, published = find("ptq4dm", None)
    assert published.recipe.reconstruction.spread == "normal" and not published.recipe.reconstruction.learns
    assert find("ptq4dm", "reconstructed")[2].recipe.reconstruction.learns
    plan = decide(MAIN, "ptq4dm")
    assert plan.activation_quantiser == plan.weight_quantiser == "symmetric"
    assert not decide(SHORTCUT, "ptq4dm").quantised


def test_scales_are_static_but_for_tfmq():
    for name in ("q_diffusion", "ptq4dm", "ptqd"):
        method, _, variant = find(name, None)
        assert set(method.groups(Measures(), variant)) == {0}
    assert find("tfmq", None)[0].groups is None
