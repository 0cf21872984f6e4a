"""Distillation: it learns, it goes on after a kill with the same bits, and it stops at the first number that is
none.
"""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawing import drawn
from roads import STEPS, make, quick_search, tiny_store, tiny_student
from safetensors.torch import load_file

from pipelines.distillation.rates import parameter_groups
from pipelines.distillation.training import distill
from pipelines.errors import NumericalFault, UsageError
from pipelines.events import Report
from pipelines.methods import METHODS
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import Course, Recipe, read_plan, read_sites
from pipelines.quant.layers import quant_layers
from pipelines.quant.spec import ACTIVATION_BITS, WEIGHT_BITS
from pipelines.students import new_student


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


class Stop(Report):
    """Raises as Ctrl-C does after some updates."""

    def __init__(self, after: int):
        self.after = after

    def advance(self, done, **figures):
        if "loss" in figures and done == self.after:
            raise KeyboardInterrupt


def digests(artifact):
    return {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}


@pytest.mark.parametrize(
    "method, variant, after",  # on the update that is saved, and one later, inside another trajectory
    [("hqdm", "ours", 2), ("hqdm", "ours", 5), ("hqdm", "paper", 5), ("hqdm", "tuned", 5), ("efficientdm", None, 5)],
)
def test_interrupted_and_started_again_it_ends_with_the_same_bits(store, tmp_path, method, variant, after):
    whole = tiny_student(store, method, variant, trajectories=3)
    other = tiny_store(tmp_path / "other")
    plan = make(other, "plan", method=method, variant=variant)
    options = dict(trajectories=3, batch=2, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        make(other, "distill", {"plan": plan.id}, Stop(after), **options)
    assert other.current("distill") is None
    assert digests(make(other, "distill", {"plan": plan.id}, **options)) == digests(whole)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bits(store, tmp_path):
    with drawn():  # as other processes do
        whole = tiny_student(store, "hqdm", "code", trajectories=4)
    other = tiny_store(tmp_path / "other")
    make(other, "plan", method="hqdm", variant="code")
    command = [
        sys.executable,
        "-m",
        "hqdm_cli",
        "distill",
        "-w",
        str(other.root),
        "--trajectories",
        "4",
        "--batch",
        "2",
    ]
    command += ["--save-every", "2"]
    root = Path(__file__).parents[1]
    child = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(other.root.glob("distill/.draft-*/work/state.pt")):
        assert child.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert other.current("distill") is None
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stderr
    assert digests(other.current("distill")) == digests(whole)


@contextmanager
def at_rest(order: str):
    """A recipe of rates so small that nothing moves, which learns timesteps in some order."""
    still = dict.fromkeys(
        ("weight_scale_rate", "activation_scale_rate", "zero_point_rate", "bias_rate", "weight_rate"), 1e-30
    )
    recipe = Recipe(order=order, lora_rate_divisor=1e30, **still)
    variants = METHODS["hqdm"].variants
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(variants, "code", replace(variants["code"], recipe=recipe))
        yield


def losses_of(distilled) -> list[list[tuple[float, float]]]:
    """(timestep, loss) of every update, by trajectory."""
    with open(distilled.file("losses.csv"), newline="") as file:
        rows = [(float(row["timestep"]), float(row["loss_per_image"])) for row in csv.DictReader(file)]
    return [rows[start : start + STEPS] for start in range(0, len(rows), STEPS)]


def test_a_shuffled_order_learns_every_timestep_of_the_same_trajectories_once(tmp_path):
    found = {}
    for order in ("trajectory", "shuffled"):
        with at_rest(order):
            distilled = tiny_student(tiny_store(tmp_path / order), "hqdm", "code", trajectories=6, eta=1.0)
        found[order] = losses_of(distilled)
    visited = [[timestep for timestep, _ in rows] for rows in found["shuffled"]]
    assert len({tuple(timesteps) for timesteps in visited}) > 1  # drawn anew for each
    assert [sorted(rows, reverse=True) for rows in found["shuffled"]] == found["trajectory"]


def untrained(store, method, variant, **options):
    """A fresh student of a method's plan, and its recipe."""
    with quick_search():
        plan = make(store, "plan", method=method, variant=variant, options=options)
    model = store.ancestor(plan, "model")
    teacher, made = load_denoiser(model.path), read_plan(plan.file("plan.yaml"), read_sites(model.file("sites.json")))
    return new_student(teacher, made, load_file(plan.file("scales.safetensors")), 0), made.recipe


def test_a_weight_that_is_rotated_before_its_quantiser_learns_as_fast_as_one_that_is_rotated_after_it(store):
    """Its scale is √order times as large, since the transform is not orthonormal: that is no reason to hurry."""
    rates, orders = {}, {}
    for method, variant in (("hqdm", "code"), ("double_hadamard", "distilled")):
        student, recipe = untrained(store, method, variant)
        layers = quant_layers(student.network)
        groups = parameter_groups(student, recipe)
        of = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
        rates[method] = {name: (of[id(layer.lora_b)], of[id(layer.weight_scale)]) for name, layer in layers.items()}
        doubles = {name: layer.plan for name, layer in layers.items() if layer.plan.inverse == "double"}
        orders[method] = {name: plan.transform.order for name, plan in doubles.items()}
    assert orders["double_hadamard"] and not orders["hqdm"]
    for name, (adapters, scales) in rates["double_hadamard"].items():
        root = orders["double_hadamard"].get(name, 1) ** 0.5
        assert 0.5 < adapters / rates["hqdm"][name][0] < 2  # rotated weights have longer tails
        assert scales == pytest.approx(rates["hqdm"][name][1] * root)


def test_gains_count_in_the_rate_of_tuned_adapters_and_not_in_that_of_mpq_dm_as_published(store):
    """Its code counts the smoothed weight's scale; the recipe that tunes all methods counts the weight's own."""
    found = {}
    for variant in ("published", "tuned"):
        student, recipe = untrained(store, "mpq_dm", variant)
        groups = parameter_groups(student, recipe)
        of = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
        for name, layer in quant_layers(student.network).items():
            share = of[id(layer.lora_b)] * recipe.lora_rate_divisor / layer.weight_scale.mean().item()
            gain = layer.surroundings.gain
            found.setdefault(name, []).append((share, 1.0 if gain is None else gain.log().mean().exp().item()))
    assert any(gain < 0.9 for _, (_, gain) in found.values())
    for (published, _), (tuned, gain) in found.values():
        assert published == pytest.approx(1) and tuned == pytest.approx(gain)


def rates_of(store, *names, **options):
    """Of the adapters of a student that begins: name of its site -> (rate, its layer)."""
    student, recipe = untrained(store, *names, **options)
    of = {id(parameter): group["rate"] for group in parameter_groups(student, recipe) for parameter in group["params"]}
    return {name: (of[id(layer.lora_b)], layer) for name, layer in quant_layers(student.network).items()}


def test_tuned_adapters_learn_by_the_width_of_each_site_within_a_budget(store):
    """Or those of the narrowest, whose steps are several times as wide, would be thrown off."""
    uniform = rates_of(store, "hqdm", "auto", centring="false", scaling="false")
    mixed = rates_of(store, "hqdm", "auto", centring="false", scaling="false", budget="0.75")
    narrow = {name: layer.plan.weight_bits for name, (_, layer) in mixed.items() if layer.plan.weight_bits < 4}
    assert {2, 3} >= set(narrow.values()) and narrow
    for name, (rate, layer) in mixed.items():
        longer = layer.plan.transform.order**0.5 if layer.plan.inverse == "double" else 1
        divisor = {3: 20, 2: 30}.get(narrow.get(name), 10)
        assert rate == pytest.approx(layer.weight_scale.mean().item() / longer / divisor)
        if name not in narrow and layer.plan.weight_bits == uniform[name][1].plan.weight_bits:
            assert rate == pytest.approx(uniform[name][0])


@pytest.mark.parametrize("divisors", [{"5": 20.0}, {"3": 0.0}, {"3": -20.0}])
def test_divisors_of_widths_that_weights_do_not_have_or_that_are_not_positive_are_refused(divisors):
    (bits, divisor), *_ = divisors.items()
    with pytest.raises(UsageError, match=f"narrow_rate_divisors cannot be {bits}: {divisor:g}") as caught:
        Recipe(narrow_rate_divisors=divisors)
    assert "positive numbers by bits of weights (2, 3, 4, 8)" in caught.value.hint


@pytest.mark.parametrize("momentum", ["shared", "own"])
def test_scales_of_other_timesteps_move_on_at_an_update_where_all_share_a_momentum(tmp_path, monkeypatch, momentum):
    """As those of one tensor do, which the public code has; a momentum of their own leaves them where they are."""
    from pipelines.distillation import training

    variants, update, moved = METHODS["hqdm"].variants, training._Training._update, []

    def watched(self, *given):
        scales = [scale.detach().clone() for scale in self.student.network.timestep_tables.scale]
        update(self, *given)
        now = self.student.network.timestep_tables.scale
        moved.append(sum(not torch.equal(one, other) for one, other in zip(scales, now, strict=True)))

    monkeypatch.setitem(variants, "code", replace(variants["code"], recipe=Recipe(momentum=momentum)))
    monkeypatch.setattr(training._Training, "_update", watched)
    tiny_student(tiny_store(tmp_path), "hqdm", "code", trajectories=2)
    assert moved == ([1, 2, 3, 3, 3, 3] if momentum == "shared" else [1] * 6)


@pytest.mark.parametrize(
    "method, variant, bits, trajectories",
    [
        ("hqdm", "ours", "w2a8", 12),
        ("lsq", "published", "w3a8", 4),
        ("lsq", "tuned", "w3a8", 4),
        ("quest", "tuned", "w3a8", 4),
    ],
)
def test_the_loss_falls(store, monkeypatch, method, variant, bits, trajectories):
    """On one trajectory that is walked again and again, so that nothing but learning can move the loss."""
    from pipelines.distillation import training

    noise_of, conditions_of = training.noise_of, training.conditions_of
    monkeypatch.setattr(training, "noise_of", lambda seed, indices, *rest: noise_of(seed, [0, 1], *rest))
    monkeypatch.setattr(training, "conditions_of", lambda seed, indices, count: conditions_of(seed, [0, 1], count))
    distilled = tiny_student(store, method, variant, bits, trajectories=trajectories, eta=0.0)
    assert distilled.figures["last_loss"] < distilled.figures["first_loss"]


@pytest.mark.parametrize(
    "weight, activation", [*zip(WEIGHT_BITS, ACTIVATION_BITS, strict=True), (WEIGHT_BITS[0], ACTIVATION_BITS[-1])]
)
def test_every_bit_width_trains(store, weight, activation):
    distilled = tiny_student(store, "hqdm", "ours", f"w{weight}a{activation}")
    assert distilled.figures["updates"] == STEPS and math.isfinite(distilled.figures["last_loss"])


def test_a_parameter_that_is_no_number_stops_it_by_name_with_the_last_good_state_kept(store, monkeypatch):
    plan = make(store, "plan", bits="w4a6")
    taken = []
    step = torch.optim.AdamW.step

    def poisoned(self, *args, **kwargs):
        step(self, *args, **kwargs)
        taken.append(1)
        if len(taken) == 4:  # after the update that the next state would be saved behind
            self.param_groups[0]["params"][1].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(NumericalFault, match="an adapter of site conv_in is .* not finite"):
        make(store, "distill", {"plan": plan.id}, trajectories=2, batch=2, save_every=2)
    kept = next(iter(store.root.glob("distill/.draft-*/work/state.pt")))
    state = torch.load(kept, weights_only=True)["value"]
    assert state["done"] == 2 and all(torch.isfinite(value).all() for value in state["parameters"])


def test_a_damaged_state_is_said_and_not_trusted(store, tmp_path):
    from pipelines.states import read_state

    class Listener(Report):
        heard = ""

        def warn(self, message):
            self.heard = message

    (tmp_path / "state.pt").write_bytes(b"half of")
    listener = Listener()
    assert read_state(tmp_path / "state.pt", listener) is None and "is damaged" in listener.heard


def test_a_scale_that_is_not_positive_is_named_by_its_site(store):
    from test_students import plan_of

    from pipelines.distillation.checks import check_finite
    from pipelines.students import load_fake

    distilled = tiny_student(store)
    student = load_fake(load_denoiser(store.ancestor(distilled, "model").path), plan_of(store, distilled),
                        distilled.file("student.safetensors"))  # fmt: skip
    with torch.no_grad():
        student.network.timestep_tables.scale[0][3] = float("nan")
    name = plan_of(store, distilled).quantised[3].site.name
    with pytest.raises(NumericalFault, match=name):
        check_finite(student, 1.0, student.network.timestep_tables.timesteps[0])


def test_a_scale_that_an_update_takes_below_zero_counts_by_its_magnitude_and_is_told_of(store, tmp_path):
    class Listener(Report):
        heard = ""

        def warn(self, message):
            self.heard = message

    student, recipe = untrained(store, "hqdm", "code")
    tables = student.network.timestep_tables
    smallest = min(scale.min().item() for scale in tables.scale)
    teacher = load_denoiser(store.current("model").path)
    with torch.no_grad():
        tables.scale[1][3] = -smallest / 100  # so small that every value is clipped, and its site says nothing
    listener, course = Listener(), Course(1, STEPS, 2, 1.5, 0.0, 0)
    losses = distill(teacher, student, recipe, course, tmp_path / "state.pt", 2, listener)
    scale, name = tables.raw()["scale"], list(quant_layers(student.network))[3]
    assert all(map(math.isfinite, losses)) and (scale > 0).all()
    assert torch.equal(scale[1, 3], tables.scale[1][3].abs() * (1.0 if tables.unit is None else tables.unit[3]))
    assert f"left below zero, and that count by their magnitude: 1, the first that of site {name} at" in listener.heard


def test_trained_at_other_steps_than_profiled_it_interpolates_the_scales(store):
    plan = make(store, "plan")
    distilled = make(store, "distill", {"plan": plan.id}, trajectories=1, batch=2, steps=STEPS + 2)
    assert distilled.figures["updates"] == STEPS + 2


@pytest.mark.parametrize(
    "recipe, what",
    [
        (dict(relation=100.0, order="shuffled"), "consecutive timesteps"),
        (dict(weight_factors=True, site_factors=True), "weight_factors and site_factors"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_with_the_way_out(recipe, what):
    with pytest.raises(UsageError, match=what) as caught:
        Recipe(**recipe)
    assert caught.value.hint


def test_the_recipe_is_the_published_one_unless_a_variant_says_otherwise():
    assert Recipe() == Recipe(
        lora_rank=32, lora_rate_divisor=2500.0, narrow_rate_divisors=None, weight_scale_rate=1e-6,
        activation_scale_rate=5e-4, zero_point_rate=5e-4, base_weight="quantised", momentum="own", step="weight",
        weight_factors=False,
    )  # fmt: skip
