"""What QuEST, LSQ, APQ-DM and MPQ-DM claim, each by itself."""

import json
import shutil

import pytest
import torch
from roads import make, tiny_store, tiny_student
from safetensors.torch import load_file
from test_methods import Measures, decide

from pipelines.errors import UsageError
from pipelines.events import Report
from pipelines.methods import apq_dm, find, mpq_dm, quest
from pipelines.models.denoiser import WEIGHTS, load_denoiser
from pipelines.plans import Recipe, read_plan
from pipelines.quant.affine import choose, dequantise, quantise
from pipelines.quant.spec import Site, integer_range, site_from_dict
from pipelines.quant.surroundings import weight_bounds
from pipelines.workspace.store import Store

SITE = Site("query", "linear", "attention", (64, 32), rank=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(store, method, bits="w4a4"):
    """(what was learned, the plan's scales, the teacher's tensors) of a student of some updates."""
    distilled = tiny_student(store, method, trajectories=2, bits=bits)
    scales = load_file(store.ancestor(distilled, "plan").file("scales.safetensors"))
    teacher = load_file(store.ancestor(distilled, "model").file(WEIGHTS))
    return load_file(distilled.file("student.safetensors")), scales, teacher


def test_lsq_moves_every_weight_every_step_and_every_activation_scale(store):
    tensors, scales, teacher = learned(store, "lsq")
    names = [key.removesuffix("/weight_scale") for key in scales if key.endswith("/weight_scale")]
    assert names
    for column, name in enumerate(names):
        assert not torch.equal(tensors[f"{name}/weight"], teacher[f"{name}.weight"]), name
        assert not torch.equal(tensors[f"{name}/weight_scale"], scales[f"{name}/weight_scale"]), name
        activation = tensors["tables/scale"][:, column]
        assert not torch.allclose(activation, scales[f"{name}/activation_scale"], rtol=1e-6), name
        assert activation.unique().numel() == 1  # one for all timesteps
        assert not tensors["tables/zero"][:, column].any()


def test_lsqs_weight_steps_move_faster_where_it_is_tuned(store):
    found = {}
    for variant in ("published", "tuned"):
        distilled = tiny_student(store, "lsq", variant, trajectories=2)
        scales = load_file(store.ancestor(distilled, "plan").file("scales.safetensors"))
        tensors = load_file(distilled.file("student.safetensors"))
        names = [name for name in scales if name.endswith("/weight_scale")]
        found[variant] = sum(((tensors[name] / scales[name]).log().abs().mean().item()) for name in names) / len(names)
    assert found["tuned"] > 3 * found["published"] > 0


def test_lsqs_weight_steps_of_any_width_move_by_a_small_share_of_their_layers_mean(store):
    """At one rate for all of them the small steps of 8-bit weights fell below zero."""
    for bits in ("w8a8", "w3a8"):
        tensors, scales, _ = learned(store, "lsq", bits)
        for place in scales:
            if place.endswith("/weight_scale"):
                moved = (tensors[place] - scales[place]).abs() / scales[place].mean()
                assert 1e-5 < moved.max() < 5e-3, (bits, place)
    published = make(store, "plan", method="efficientdm", bits="w8a8").file("plan.yaml").read_text()
    assert "weight_scale_rate:" in published and "weight_scale_rate_divisor" not in published
    with pytest.raises(UsageError, match="weight_scale_rate_divisor cannot be -1"):
        Recipe(weight_scale_rate_divisor=-1.0)


def test_quest_trains_the_layers_that_low_bits_hurt_and_leaves_other_weights_as_they_were(store):
    tensors, scales, teacher = learned(store, "quest")
    trained = {key.removesuffix("/weight") for key in tensors if key.endswith("/weight")}
    roles = {site.name: site.role for site in sites_of(store)}
    wanted = {name for name, role in roles.items() if role in (*quest.TIME, *quest.SENSITIVE)}
    assert trained == wanted
    assert {"time", "time-projection", "attention", "feed-forward"} <= {roles[name] for name in trained}
    for name in trained:
        assert not torch.equal(tensors[f"{name}/weight"], teacher[f"{name}.weight"]), name
    for key in scales:
        if key.endswith("/weight_scale"):
            assert torch.equal(tensors[key], scales[key])  # steps of weights are not among what trains
    places = [f"{name}/activation_scale" for name in roles if f"{name}/activation_scale" in scales]
    moved = tensors["tables/scale"] - torch.stack([scales[place] for place in places], 1)
    assert (moved != 0).float().mean() > 0.95  # a step can be less than what a large scale can hold


def sites_of(store):
    return [site_from_dict(entry) for entry in json.loads(store.current("model").file("sites.json").read_text())]


def test_quests_spans_are_equal_and_each_timestep_has_its_own_scale_where_there_are_few():
    measured = Measures()
    _, _, variant = find("quest", None, {"groups": "4"})
    measured.timesteps = list(range(10, 0, -1))
    assert quest.groups(measured, variant) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    measured.timesteps = [3, 2, 1]
    assert quest.groups(measured, variant) == []


def drift(sizes):
    """Inputs (T, rows, C) of a site at timesteps of different sizes."""
    return torch.stack([noise(32, 16, seed=index) * size for index, size in enumerate(sizes)])


def total(noise, groups):
    """What a grouping costs, in the units of `apq_dm.errors`. noise: (sites, T, candidates)."""
    belongs = torch.tensor(groups)
    return sum(noise[:, belongs == group].sum(1).amin(1).sum().item() for group in set(groups))


def test_apq_groups_beat_equal_spans_on_inputs_that_drift_unevenly():
    sizes = [1.0] * 9 + [8.0, 20.0, 50.0]
    each = torch.stack([apq_dm.errors(drift(sizes)), apq_dm.errors(drift([size**0.5 for size in sizes]))])
    found, spans = apq_dm.grouped(each, 4), [index * 4 // 12 for index in range(12)]
    assert found == [0] * 9 + [1, 2, 3]
    assert total(each, found) < 0.6 * total(each, spans)


@pytest.mark.parametrize("channel", [0, 1, 17])
def test_apq_sees_whichever_channel_stands_out_in_a_sample_as_large_as_a_profiles(channel):
    sample = noise(12, 128, 32)
    for timestep, size in zip((9, 10, 11), (8.0, 20.0, 50.0), strict=True):
        sample[timestep, :, channel] *= size
    assert apq_dm.grouped(apq_dm.errors(sample)[None], 4)[9:] == [1, 2, 3]


def test_apq_groups_need_not_be_neighbours():
    """Where inputs swing back a timestep shares with those that it is like, wherever they are."""
    each = apq_dm.errors(drift([1.0, 30.0] * 4))[None]
    assert apq_dm.grouped(each, 2) == [0, 1] * 4


def test_apq_groups_are_at_most_those_asked_for_and_more_cost_less():
    each = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    costs = []
    for most in range(1, 12):
        found = apq_dm.grouped(each, most)
        assert sorted(set(found)) == list(range(len(set(found)))) and len(set(found)) <= most
        costs.append(total(each, found))
    assert costs[0] > costs[4] > costs[-1]
    with pytest.raises(UsageError, match="groups cannot be '0'"):
        find("apq_dm", None, {"groups": "0"})


def test_apq_takes_its_groups_into_the_plan(store):
    plan = make(store, "plan", method="apq_dm", options={"groups": "2"})
    read = read_plan(plan.file("plan.yaml"), sites_of(store))
    assert len(read.groups) == len(read.timesteps) == 3 and set(read.groups) == {0, 1}
    scales = load_file(plan.file("scales.safetensors"))
    for key, values in scales.items():
        if key.endswith("/activation_scale"):
            assert values.unique().numel() <= 2


def heavy_tailed():
    """A weight (64, 32) with 8 outputs that have few, large entries, among others that are nearly uniform."""
    weight = (noise(64, 32).sign() * (1 + 0.05 * noise(64, 32, seed=1))) * 0.1
    weight[:8] = 0.2 * noise(8, 32, seed=2)
    weight[:8, ::8] *= 12
    return weight


def quantised(weight, widths):
    """The weight rounded at the widths (out,) of its outputs."""
    result = torch.empty_like(weight)
    for width in widths.unique().tolist():
        low, high = integer_range(width, False)
        rows = weight[widths == width]
        scale, zero = (value[:, None] for value in choose(rows, low, high))
        result[widths == width] = dequantise(quantise(rows, scale, zero, low, high), scale, zero)
    return result


@pytest.mark.parametrize("bits", [3, 4])
def test_mpq_gives_heavy_tailed_outputs_more_bits_and_their_error_shrinks_at_equal_bytes(bits):
    weight, x = heavy_tailed(), noise(128, 32, seed=3)
    widths = mpq_dm.row_bits(weight, x, SITE, bits)
    assert (widths[:8] == mpq_dm.LADDER[bits][0]).all() and widths.float().mean() <= bits
    errors = [
        ((quantised(weight, chosen) - weight) @ x.T).square().sum(1)
        for chosen in (widths, torch.full_like(widths, bits))
    ]
    assert errors[0][:8].sum() < errors[1][:8].sum() / 2
    assert errors[0].sum() < errors[1].sum()


def test_mpq_leaves_all_outputs_alike_where_none_stands_out():
    widths = mpq_dm.row_bits(noise(64, 32), noise(128, 32, seed=3), SITE, 4)
    assert (widths == 4).all()


@pytest.mark.parametrize(
    "bits, widest, mixed", [("w2a4", 2, False), ("w3a4", 4, True), ("w4a4", 8, True), ("w8a8", 8, False)]
)
def test_mpq_mixes_widths_where_integers_can_be_narrower(bits, widest, mixed):
    plan = decide("mpq_dm", None, bits)["query"]
    assert (plan.weight_bits, plan.mixed, plan.scaling) == (widest, mixed, True)


@pytest.mark.parametrize("bits", ["w2a4", "w3a4", "w4a4", "w8a8"])
def test_mpq_smooths_by_both_maxima_and_keeps_the_mean_width(bits):
    _, _, variant = find("mpq_dm", None)
    for name in ("query", "conv"):
        plan = decide("mpq_dm", None, bits)[name]
        weight = noise(*plan.site.weight)
        constants = mpq_dm.constants(plan, weight, Measures(), variant)
        largest = Measures().statistic(plan.site, "absmax").amax(0), weight.abs().movedim(1, 0).flatten(1).amax(1)
        assert torch.allclose(constants["gain"], (largest[1] / largest[0]).sqrt())
        assert ("row_bits" in constants) == plan.mixed
        if plan.mixed:
            assert constants["row_bits"].float().mean() <= int(bits[1])
            assert weight_bounds(plan, constants["row_bits"])[1].max() <= 2**plan.weight_bits - 1


def test_the_term_of_relations_draws_the_students_towards_the_teachers(store):
    """And its two steps survive an interruption between them."""
    from pipelines.distillation.relation import Relation

    model = load_denoiser(store.current("model").path)
    other = load_denoiser(store.current("model").path)
    with torch.no_grad():
        other.network.conv_in.weight += 0.1 * noise(*other.network.conv_in.weight.shape)
    other.network.conv_in.weight.requires_grad_(True)
    x, classes = noise(2, 1, 8, 8), torch.tensor([0, 1])

    def term(relation, step):
        with torch.no_grad():
            model.predict(x, torch.tensor(500 - step), classes, 1.5)
        other.predict(x, torch.tensor(500 - step), classes, 1.5)
        return relation.term(step)

    relation = Relation(model, other, 100.0)
    losses = []
    for _ in range(6):
        assert term(relation, 0) == 0
        loss = term(relation, 1)
        losses.append(loss.item())
        (grad,) = torch.autograd.grad(loss, other.network.conv_in.weight)
        with torch.no_grad():
            other.network.conv_in.weight -= 2e-3 * grad / grad.abs().max()
    assert 0 < losses[-1] < losses[0]
    relation.remove()
    same = Relation(model, model, 100.0)
    assert term(same, 0) == 0 and abs(term(same, 1).item()) < 1e-3


def test_relations_keep_their_weight_against_a_loss_that_counts_by_its_mean(store, monkeypatch):
    """Where the squared error is divided by its mean, relations are divided by the same."""
    from pipelines.distillation import relation, training

    marked, seen = torch.zeros((), requires_grad=True), []

    def update(self, step, loss, value, own=training._Training._update):
        marked.grad = None
        own(self, step, loss, value)
        seen.append((marked.grad.item(), value))

    monkeypatch.setattr(relation.Relation, "term", lambda self, step: 7.0 * marked)
    monkeypatch.setattr(training._Training, "_update", update)
    tiny_student(store, "mpq_dm", "published", "w3a4")
    assert len(seen) == 3 and all(gradient == 7.0 for gradient, _ in seen)
    seen.clear()
    tiny_student(store, "mpq_dm", "tuned", "w3a4")
    assert [gradient for gradient, _ in seen] == pytest.approx([7.0 / value for _, value in seen])


class Stop(Report):
    def advance(self, done, **figures):
        if "loss" in figures and done == 4:
            raise KeyboardInterrupt


def test_a_run_with_relations_goes_on_inside_a_pair_of_steps_with_the_same_bits(store, tmp_path):
    plan = make(store, "plan", method="mpq_dm", bits="w3a4")
    other = Store(shutil.copytree(store.root, tmp_path / "other"))
    whole = tiny_student(store, "mpq_dm", bits="w3a4", trajectories=2)
    options = dict(trajectories=2, batch=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        make(other, "distill", {"plan": plan.id}, Stop(), **options)
    again = make(other, "distill", {"plan": plan.id}, **options)
    one, two = (load_file(artifact.file("student.safetensors")) for artifact in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_mixed_widths_take_no_more_bytes_than_one_width_would(store):
    distilled = tiny_student(store, "mpq_dm", bits="w3a4", trajectories=2)
    exported = make(store, "export", {"distill": distilled.id})
    tensors = load_file(exported.file("model.safetensors"))
    mixed = [plan for plan in read_plan(distilled.file("plan.yaml"), sites_of(store)).quantised if plan.mixed]
    assert mixed and exported.figures["shares"]["mixed"]["layers"] == len(mixed)
    for plan in mixed:
        count = torch.tensor(plan.site.weight).prod().item()
        assert tensors[f"{plan.site.name}.weight"].numel() <= count * 3 / 8 + 3  # each width fills its last byte
