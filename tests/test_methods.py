"""The contract that every method and variant keeps, and what each one claims."""

import math
from dataclasses import replace

import pytest
import torch
from roads import quick_search

from pipelines.errors import UsageError
from pipelines.measures import Measures as RealMeasures
from pipelines.methods import METHODS, find
from pipelines.methods.base import EIGHT_BIT_ROLES, FLOAT_ROLES
from pipelines.plans import Plan, Recipe, read_plan, write_plan
from pipelines.quant.spec import IDENTITY, Bits, Site, Transform

VARIANTS = [(name, variant) for name, method in METHODS.items() for variant in method.variants]
SITES = [
    Site("conv_in", "conv", "first", (64, 1, 3, 3), padding=(1, 1), rank=4, positions=(16, 16)),
    Site("time.1", "linear", "time", (256, 64)),
    Site("proj", "linear", "time-projection", (64, 256)),
    Site("conv", "conv", "residual", (64, 96, 3, 3), padding=(1, 1), rank=4, positions=(16, 16)),
    Site("odd", "conv", "residual", (64, 21, 3, 3), padding=(1, 1), rank=4, positions=(15, 15)),
    Site("skip", "conv", "skip", (64, 96, 1, 1), rank=4, positions=(16, 16)),
    Site("down", "conv", "downsample", (64, 64, 3, 3), (2, 2), (1, 1), rank=4, positions=(16, 16)),
    Site("query", "linear", "attention", (64, 64), rank=3),
    Site(
        "grouped",
        "conv",
        "residual",
        (64, 2, 3, 3),
        padding=(1, 1),
        groups=32,
        rank=4,
        positions=(16, 16),
        obstacle="32 groups",
    ),
    Site("conv_out", "conv", "last", (1, 64, 3, 3), padding=(1, 1), rank=4, positions=(16, 16)),
]


class Measures:
    """Signs help, a larger order helps, and asymmetric helps by a little. Two timesteps; one channel stands out."""

    timesteps, sites = [951, 1], SITES

    def transforms(self, site):
        every = [Transform("channels", order, signs) for order in (8, 16, 32, 64) for signs in (None, 1)]
        every += [Transform("width", 16)]
        return [IDENTITY, *(transform for transform in every if site.admits(transform))]

    def sample(self, site):
        shape = (2, 4, site.channels, *([16] if site.kind == "conv" else []))
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(len(site.name)))
        sample[:, :, 0] = sample[:, :, 0] * 20 + 5
        return sample

    def weight(self, site):
        return torch.randn(site.weight, generator=torch.Generator().manual_seed(1))

    def statistic(self, site, name):
        values = self.sample(site).transpose(1, 2).flatten(2)  # (T, C, n)
        return {"absmax": values.abs().amax(2), "low": values.amin(2), "high": values.amax(2)}.get(name, values.mean(2))

    def own_mean(self, site):
        return self.sample(site).mean(1, keepdim=True)

    def record(self, plan):
        return RealMeasures.record(self, plan)

    def moved(self, plan, constants):
        return RealMeasures.moved(self, plan, constants)

    def sqnrs(self, site, quantiser, bits):
        return {transform.name: self.sqnr(site, transform, quantiser, bits) for transform in self.transforms(site)}

    def sqnr(self, site, transform, quantiser, bits):
        if not site.admits(transform):
            return -math.inf
        gain = math.log2(transform.order) + (transform.signs is not None) + 0.1 * (quantiser == "asymmetric")
        return 5.0 * bits + gain - 3.0


@pytest.fixture(autouse=True)
def quick():
    with quick_search():
        yield


def decide(name, variant, bits="w4a4"):
    method, _, chosen = find(name, variant)
    made = (method.decide(site, Bits.parse(bits), Measures(), chosen) for site in SITES)
    plans = [part for plan in made for part in (plan if isinstance(plan, tuple) else (plan,))]
    return {plan.site.name: plan for plan in plans}


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_method_decides_every_site_and_says_why(name, variant):
    for plan in decide(name, variant).values():
        assert plan.why
    assert METHODS[name].summary and METHODS[name].source and METHODS[name].variants[variant].summary


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_first_last_and_time_layers_have_eight_bits_and_the_others_those_asked_for(name, variant):
    for plan in decide(name, variant, "w3a4").values():
        if plan.quantised and plan.site.role in EIGHT_BIT_ROLES + FLOAT_ROLES:
            assert (plan.weight_bits, plan.activation_bits) == (8, 8)
        elif plan.quantised:  # with widths by output the widest is more; tests of the method bound their mean
            assert plan.activation_bits == 4 and (plan.mixed or plan.weight_bits == 3)


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_plan_survives_its_file(name, variant, tmp_path):
    method, chosen, about = find(name, variant)
    plan = Plan(name, chosen, Bits(4, 4), about.recipe, [951, 1], list(decide(name, variant).values()))
    (tmp_path / "plan.yaml").write_text(write_plan(plan))
    assert read_plan(tmp_path / "plan.yaml", SITES) == plan


def test_a_key_that_older_plans_did_not_have_is_in_no_file_that_does_not_use_it():
    """Such a plan made again is the same file, and its students stay up to date."""
    files = [
        write_plan(Plan("hqdm", "code", Bits(4, 4), recipe, [1], []))
        for recipe in (Recipe(), Recipe(activation_scale_from="trajectory", momentum="shared"))
    ]
    for key in ("activation_scale_from", "momentum"):
        assert key not in files[0] and key in files[1]
    later = ("axis", "orders", "signs", "double", "quantiser")
    assert all(METHODS["hqdm"].options[key].quiet for key in later)


@pytest.mark.parametrize("name", METHODS)
def test_an_options_default_is_one_that_it_takes_and_its_variants_are_the_methods(name):
    method = METHODS[name]
    for key, option in method.options.items():
        assert set(option.variants) <= set(method.variants)
        assert option.parse(key, str(option.default)) == option.default


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_variant_takes_its_own_options_and_refuses_those_of_others(name, variant):
    method = METHODS[name]
    mine = method.options_of(variant)
    for key, option in method.options.items():
        word = str(option.default)
        if key in mine:
            assert find(name, variant, {key: word})[2].options[key] == option.default
        else:
            with pytest.raises(UsageError, match=f"option {key} belongs to the variant") as fault:
                find(name, variant, {key: word})
            assert fault.value.hint.endswith(f"or leave {key} out")


@pytest.mark.parametrize(
    "name, variant, option, values",
    [
        ("hqdm", "auto", "budget", ("nan", "-0.5", "2", "inf")),
        ("hqdm", "auto", "bias", ("nan", "-1")),
        ("quest", None, "groups", ("0", "-3", "2.5")),
        ("apq_dm", None, "groups", ("0",)),
        ("smoothquant", "search", "alpha", ("1.5", "-0.1", "nan")),
        ("hadanorm", None, "alpha", ("2",)),
        ("dmq", None, "rate", ("0", "inf")),
        ("dmq", "scaling", "share", ("0", "1.1")),
        ("dmq", None, "power", ("-1",)),
        ("outlier_suppression", None, "thresholds", ("0",)),
    ],
)
def test_a_number_that_an_option_cannot_have_is_refused_with_what_it_takes(name, variant, option, values):
    for value in values:
        with pytest.raises(UsageError, match=f"option {option} cannot be") as fault:
            find(name, variant, {option: value})
        assert fault.value.hint.startswith("it takes ")


@pytest.mark.parametrize("option, text, takes", [
    ("signs", "no", "true or false"), ("bias", "much", "a number"), ("orders", "12", "any, none, 8, 16, 32, 64"),
])  # fmt: skip
def test_a_word_that_an_option_cannot_have_is_refused_in_a_users_words(option, text, takes):
    with pytest.raises(UsageError, match=f"option {option} cannot be '{text}'") as fault:
        find("hqdm", "auto", {option: text})
    assert fault.value.hint.partition(":")[0] == f"it takes {takes}"


def test_a_byte_budget_is_a_matter_of_auto_alone():
    """`allocate` of the other variants gives back the plans it was given."""
    for variant in ("ours", "paper", "code"):
        method, _, chosen = find("hqdm", variant)
        plans = list(decide("hqdm", variant).values())
        assert method.allocate(plans, Bits.parse("w4a4"), Measures(), chosen) is plans


def test_a_plans_options_are_words_however_they_were_written():
    from pipelines.config import from_dict, key_dict
    from pipelines.stages.plan import Config

    written = from_dict(Config, {"variant": "auto", "options": {"budget": 0.5, "centring": True, "bias": 3}}, "recipe")
    typed = Config(variant="auto", options={"budget": "0.5", "centring": "true", "bias": "3"})
    assert key_dict(written) == key_dict(typed) and written == typed
    assert from_dict(Config, {"variant": "paper", "options": {"order": 16}}, "recipe").options == {"order": "16"}
    with pytest.raises(UsageError, match=r"recipe: options.order cannot be \[16\]"):
        from_dict(Config, {"variant": "paper", "options": {"order": [16]}}, "recipe")


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_recipes_are_the_same_at_all_widths_but_for_tuned_adapters_at_three_bits_and_two(name, variant):
    about = find(name, variant)[2]
    assert about.recipe_at(Bits(4, 3)) == about.recipe_at(Bits(8, 8)) == about.recipe
    tuned = variant in ("auto", "tuned") and about.recipe.updates == "distill"
    for bits, divisor in ((2, 30), (3, 20), (4, 10), (8, 10)):
        wanted = divisor if tuned else about.recipe.lora_rate_divisor
        assert about.recipe_at(Bits(bits, 4)).lora_rate_divisor == wanted
    narrower = [replace(plan, weight_bits=3) for plan in decide("hqdm", "ours").values() if plan.quantised]
    own = {"3": 20, "2": 30} if tuned else None
    assert about.recipe_at(Bits(4, 4), narrower).narrow_rate_divisors == own
    assert about.recipe_at(Bits(3, 4), narrower).narrow_rate_divisors is None


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_recipe_names_what_trains_where_a_student_is_distilled_and_nothing_elsewhere(name, variant):
    """Reconstruction learns rounding and scales by its own settings."""
    recipe = METHODS[name].variants[variant].recipe
    assert bool(recipe.trains) == (recipe.updates == "distill")


def test_a_key_of_the_recipe_is_set_as_an_option_is_and_holds_at_every_width():
    plain, given = find("hqdm", "auto")[2], find("hqdm", "auto", {"recipe.ema": "0", "bias": "1"})[2]
    assert given.recipe == replace(plain.recipe, ema=0.0) and given.options == plain.options | {"bias": 1.0}
    for divisor in ("10", "40"):  # of which 10 is what is in force at four bits and more
        about = find("hqdm", "auto", {"recipe.lora_rate_divisor": divisor})[2]
        assert {about.recipe_at(Bits(bits, 3)).lora_rate_divisor for bits in (2, 3, 4, 8)} == {float(divisor)}
    trains = find("lsq", None, {"recipe.trains": "[weights, biases]"})[2].recipe.trains
    assert trains == ["weights", "biases"]
    settings = find("q_diffusion", None, {"recipe.reconstruction.images": "4"})[2].recipe.reconstruction
    assert settings == replace(find("q_diffusion", None)[2].recipe.reconstruction, images=4)
    with pytest.raises(UsageError, match="option order belongs to"):
        find("hqdm", "auto", {"recipe.ema": "0", "order": "16"})


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_of_a_recipe_placements_hang_on_the_roles_that_train_alone(name, variant):
    """For the plan stage finds them once for recipes that differ otherwise."""
    method, _, about = find(name, variant)
    other = Recipe(
        lora_rank=3, lora_rate_divisor=7, base_weight="float", momentum="shared", step="quantiser", site_factors=True,
        updates="none", trains=["biases"], roles=about.recipe.roles, activation_scale_by="max", headroom=2, ema=0.5,
        activation_scale_from="trajectory", weight_scale_by="max", guidance_signal=3, correction=True,
    )  # fmt: skip
    measured = Measures()
    with quick_search():
        for site in SITES:
            found = [method.decide(site, Bits(3, 4), measured, each) for each in (about, replace(about, recipe=other))]
            assert found[0] == found[1]


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("emma", "0", "unknown key 'emma'"),
        ("ema", "2", "ema cannot be 2.0"),
        ("ema.x", "2", "ema of this recipe has no keys inside"),
        ("ema", "fast", "ema cannot be 'fast'"),
        ("order", "backwards", "no choice"),
        ("trains", "[adapters", "recipe.trains cannot be"),
        ("reconstruction.images", "4", "reconstruction of this recipe has no keys inside"),
        ("reconstruction.", "4", "reconstruction of this recipe has no keys inside"),
        ("", "4", "unknown key ''"),
    ],
)
def test_a_recipe_that_there_cannot_be_is_refused_with_a_way_out(key, value, what):
    with pytest.raises(UsageError, match=what.replace("[", "\\[")) as fault:
        find("hqdm", "code", {f"recipe.{key}": value})
    assert fault.value.hint


def test_efficientdm_rotates_nothing_and_is_asymmetric():
    for plan in decide("efficientdm", None).values():
        if plan.quantised:
            assert plan.transform.is_identity and plan.activation_quantiser == plan.weight_quantiser == "asymmetric"


def test_hqdm_as_printed_rotates_convolutions_along_the_width_and_linears_along_channels():
    plans = decide("hqdm", "paper")
    assert plans["conv"].transform == Transform("width", 16) and plans["conv"].inverse == "activation"
    assert plans["query"].transform == Transform("channels", 32) and plans["query"].inverse == "single"
    assert plans["odd"].transform.is_identity  # no power of two divides 15


def test_hqdm_as_published_rotates_channels_and_leaves_rank_3_linears_alone():
    plans = decide("hqdm", "code")
    assert plans["conv"].transform == Transform("channels", 32)
    assert plans["query"].transform.is_identity and not plans["proj"].transform.is_identity
    assert plans["odd"].transform.is_identity and plans["conv"].activation_quantiser == "symmetric"


def test_ours_takes_the_best_measured_transform_of_each_site():
    plans = decide("hqdm", "ours")
    assert (
        plans["query"].transform == Transform("channels", 64, 1) and plans["query"].activation_quantiser == "asymmetric"
    )
    assert plans["conv"].transform == Transform("channels", 32, 1)  # 64 does not divide 96
    assert plans["skip"].quantised and not plans["grouped"].quantised
    assert plans["conv_in"].transform.is_identity


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_site_with_an_obstacle_stays_as_it_is_and_the_plan_says_why(name, variant):
    plan = decide(name, variant)["grouped"]
    assert not plan.quantised and plan.why == "32 groups"


@pytest.mark.parametrize(
    "width, order",
    [(672, 32), (1152, 64), (1344, 64), (1440, 32), (2688, 64), (1280, 64), (72, 8), (36, None), (75, None)],
)
def test_every_width_is_offered_each_block_order_that_divides_it_and_never_another(width, order):
    """672, 1344, 1440 and 2688 fail under QuaRot's table; blocks of powers of two divide them. Nothing is padded."""
    from pipelines.quant.candidates import candidates

    site = Site("wide", "linear", "attention", (64, width), rank=3)
    offered = [candidate.transform.order for candidate in candidates(site) if candidate.transform.axis == "channels"]
    assert max(offered, default=None) == order
    assert all(width % each == 0 for each in offered)
    assert candidates(site)[0].transform.is_identity


def test_an_unknown_method_or_variant_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError) as caught:
        find("hqmd", None)
    assert caught.value.hint == "did you mean 'hqdm'?"
    with pytest.raises(UsageError):
        find("hqdm", "theirs")


def edited(tmp_path, change):
    import yaml

    method, chosen, about = find("hqdm", "code")
    plan = Plan("hqdm", chosen, Bits(4, 4), about.recipe, [951, 1], list(decide("hqdm", "code").values()))
    values = yaml.safe_load(write_plan(plan))
    change(values)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["sites"]["conv"].update(weight_bit=4), "weight_bit"),
        (lambda v: v["sites"]["conv"].update(weight_bits=5), "5/4 bits"),
        (lambda v: v["sites"]["conv"]["transform"].update(order=64), "order 64 does not divide"),
        (lambda v: v["sites"]["conv"]["transform"].update(axis="width", order=16), "inverse 'single' does not fit"),
        (lambda v: v["sites"].pop("conv"), "no entry for site 'conv'"),
        (lambda v: v["sites"].update(konv={"quantised": False}), "no site 'konv'"),
        (lambda v: v.update(format=9), "format 9"),
        (lambda v: v["recipe"].update(lora_rnk=4), "lora_rnk"),
    ],
)
def test_a_plan_edited_wrongly_is_refused_with_its_file_and_key(tmp_path, change, message):
    from pipelines.errors import HqdmError

    with pytest.raises(HqdmError, match=message) as caught:
        read_plan(edited(tmp_path, change), SITES)
    assert "plan.yaml" in str(caught.value) or "site conv" in str(caught.value)
    assert caught.value.hint


def test_a_plan_edited_rightly_is_taken(tmp_path):
    plan = read_plan(edited(tmp_path, lambda v: v["sites"]["conv"].update(inverse="double", activation_bits=6)), SITES)
    conv = next(site for site in plan.sites if site.site.name == "conv")
    assert (conv.inverse, conv.activation_bits) == ("double", 6)
