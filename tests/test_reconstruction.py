"""Block reconstruction: it starts at the teacher, beats rounding to the nearest, and goes on with the same bits."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from roads import STEPS, make, tiny_store
from safetensors.torch import load_file
from test_distill import Stop
from test_students import plan_of

from pipelines import runner
from pipelines.errors import NumericalFault, UsageError
from pipelines.events import Report
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import Course, Recipe, Reconstruction, read_plan, write_plan
from pipelines.quant.affine import dequantise, quantise
from pipelines.quant.layers import as_rows, quant_layers
from pipelines.quant.spec import site_from_dict
from pipelines.quant.tables import TimestepTables
from pipelines.reconstruction import blocks as block_file
from pipelines.reconstruction.blocks import TEMPORAL, ModuleBlock, TemporalBlock, find_blocks
from pipelines.reconstruction.calibration import _normal_place, calibration, rescaled
from pipelines.reconstruction.learning import Rounding, _check_scales, _learning, distance, reconstruct
from pipelines.students import load_fake, new_student, student_tensors

COURSE = Course(trajectories=8, steps=STEPS, batch=4, guidance=1.5, eta=0.0, seed=0)
RESIDUAL = "up_blocks.1.resnets.0"  # reads a concatenation


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"), levels=2)


@pytest.fixture(scope="module")
def plans(store):
    return {(method, bits): make(store, "plan", method=method, bits=bits)
            for method, bits in (("q_diffusion", "w3a8"), ("tfmq", "w3a8"), ("ptq4dm", "w4a4"))}  # fmt: skip


def alone(store, artifact, chosen, **settings):
    """A plan that quantises the chosen sites alone, with its tensors and the teacher."""
    plan = plan_of(store, artifact)
    sites = [site if chosen(site.site) else replace(site, quantised=False) for site in plan.sites]
    recipe = replace(plan.recipe, reconstruction=replace(plan.recipe.reconstruction, images=4, **settings))
    teacher = load_denoiser(store.ancestor(artifact, "model").path)
    return teacher, replace(plan, sites=sites, recipe=recipe), load_file(artifact.file("scales.safetensors"))


def in_residual(site):
    return site.name.startswith(f"{RESIDUAL}.")


def in_time(site):
    return site.role.startswith("time")


def learned(store, artifact, chosen, folder, **settings):
    """(teacher, plan, student, result, calls) of a reconstruction of the chosen sites."""
    teacher, plan, scales = alone(store, artifact, chosen, **settings)
    calls = calibration(teacher, plan.recipe.reconstruction, COURSE, folder, Report())
    student = new_student(teacher, plan, scales, 0)
    return teacher, plan, student, reconstruct(teacher, student, plan.recipe, COURSE, calls, folder, Report()), calls


def test_a_soft_student_starts_as_its_teacher(store, plans, tmp_path):
    teacher, plan, scales = alone(store, plans["q_diffusion", "w3a8"], in_residual)
    calls = calibration(teacher, plan.recipe.reconstruction, COURSE, tmp_path, Report())
    student = new_student(teacher, plan, scales, 0)
    layers = quant_layers(student.network)
    (block,) = find_blocks(student.network, [layer.plan.site for layer in layers.values()], False)
    source = ModuleBlock(block, teacher, student, calls[:2], 1.5, tmp_path / "inputs")
    with _learning(layers, float_inputs=True) as codes, torch.no_grad():
        exact, nearest = [], []
        for timestep, given, targets in source.items(own_inputs=False):
            student.network.timestep_tables.set_timestep(timestep)
            nearest.append(distance(source.outputs(given), targets).item())
            with_nearest = dict(codes)
            # A weight beyond the range that was chosen for it is clipped, softly too: those are left out of the claim.
            for name, layer in layers.items():
                rounding = Rounding(layer)
                rounding.low, rounding.high = rounding.low - 100, rounding.high + 100
                codes[name] = rounding.soft()
            exact.append(distance(source.outputs(given), targets).item())
            codes |= with_nearest
    assert max(exact) < 1e-8 < 1e-3 < min(nearest)


def test_learned_rounding_lowers_a_blocks_error_below_rounding_to_the_nearest(store, plans, tmp_path):
    _, _, student, result, _ = learned(store, plans["q_diffusion", "w3a8"], in_residual, tmp_path, scale_share=0.0)
    (row,) = result.rows
    assert row["block"] == RESIDUAL and row["kept"] == "learned"
    assert row["error_after"] < 0.8 * row["error_before"]
    changed = 0
    for name, layer in quant_layers(student.network).items():
        near = as_rows(layer.weight) / layer.weight_scale[:, None]
        codes = as_rows(layer.integers().centred)
        low, high = layer.plan.weight_range
        zero = layer.weight_zero[:, None]
        away = (codes - near.clamp(low - zero, high - zero)).abs()
        assert away.max() < 1 + 1e-4  # up or down, and nothing else
        changed += (away > 0.5 + 1e-4).sum()
        stored = result.codes[f"{name}/weight_codes"]
        assert torch.equal(stored.float() + low - zero, codes.float())
    assert changed > 0


def test_learned_scales_lower_a_blocks_error(store, plans, tmp_path):
    _, _, student, result, _ = learned(
        store, plans["ptq4dm", "w4a4"], lambda site: site.role == "feed-forward" and site.name.startswith("mid"),
        tmp_path, rounding_share=0.0, scale_share=1.0,
    )  # fmt: skip
    assert [row["what"] for row in result.rows] == ["scales"] and not result.codes
    assert result.rows[0]["kept"] == "learned" and result.rows[0]["error_after"] < result.rows[0]["error_before"]
    scale = student.network.timestep_tables.raw()["scale"]
    assert torch.equal(scale, scale[:1].expand_as(scale))  # static still


def test_tuned_tfmq_learns_a_scale_of_each_timestep_where_the_published_leaves_them_calibrated(store, tmp_path):
    def chosen(site):
        return site.role == "feed-forward" and site.name.startswith("mid")

    moved, kinds = {}, {}
    for variant in ("published", "tuned"):
        artifact = make(store, "plan", method="tfmq", variant=variant, bits="w4a4")
        settings = {"rounding_share": 0.25, "scale_share": 1.0} if variant == "tuned" else {}  # so few iterations
        _, _, student, result, _ = learned(store, artifact, chosen, tmp_path / variant, **settings)
        first = new_student(*alone(store, artifact, chosen), 0)
        now, was = (each.network.timestep_tables.raw()["scale"] for each in (student, first))
        moved[variant], kinds[variant] = now / was, [row["what"] for row in result.rows]
    assert kinds == {"published": ["rounding"], "tuned": ["rounding", "scales"]}
    assert (moved["published"] == 1).all()
    assert (moved["tuned"] != 1).all() and len(moved["tuned"].unique()) > STEPS


def test_a_time_projections_scales_are_learned_with_the_temporal_block_alone(store, tmp_path):
    """And not a second time with the residual block that it belongs to."""
    artifact = make(store, "plan", method="tfmq", variant="tuned", bits="w4a4")
    found = {}
    for name, chosen in (("time", in_time), ("both", lambda site: in_time(site) or in_residual(site))):
        _, plan, student, result, _ = learned(
            store, artifact, chosen, tmp_path / name, rounding_share=0.0, scale_share=1.0
        )
        scale = student.network.timestep_tables.raw()["scale"]
        found[name] = {site.site.name: scale[:, column] for column, site in enumerate(plan.quantised)}
    assert [(row["block"], row["kept"]) for row in result.rows] == [(TEMPORAL, "learned"), (RESIDUAL, "learned")]
    for name, scale in found["time"].items():
        assert torch.equal(found["both"][name], scale), name
    assert result.parameters == STEPS * len(found["both"])


def test_the_temporal_block_is_first_and_nearer_the_teacher_at_every_timestep(store, plans, tmp_path):
    teacher, _, student, result, _ = learned(store, plans["tfmq", "w3a8"], in_time, tmp_path)
    assert [row["block"] for row in result.rows] == [TEMPORAL]
    layers = quant_layers(student.network)
    blocks = find_blocks(student.network, [layer.plan.site for layer in layers.values()], True)
    source = TemporalBlock(blocks[0], teacher, student, COURSE)
    errors = {}
    for which in ("learned", "nearest"):
        for layer in layers.values():
            layer.float_inputs = True
            if which == "nearest":
                layer.base_codes = None
                layer.freeze()
        with torch.no_grad():
            items = source.items(True)
            for timestep, given, targets in items:
                student.network.timestep_tables.set_timestep(timestep)
                errors.setdefault(which, []).append(distance(source.outputs(given), targets).item())
    assert len(items) == STEPS
    assert all(now < was for now, was in zip(errors["learned"], errors["nearest"], strict=True))


def test_the_temporal_block_takes_the_projections_out_of_the_residual_blocks(store, plans):
    plan = plan_of(store, plans["tfmq", "w3a8"])
    student = new_student(load_denoiser(store.ancestor(plans["tfmq", "w3a8"], "model").path), plan,
                          load_file(plans["tfmq", "w3a8"].file("scales.safetensors")), 0)  # fmt: skip
    sites = [site.site for site in plan.quantised]
    together, apart = (find_blocks(student.network, sites, temporal) for temporal in (True, False))
    assert together[0].name == TEMPORAL and len(together[0].sites) == 10  # two of the embedding, eight projections
    assert not any("time" in site for block in together[1:] for site in block.sites)
    residual = next(block for block in apart if block.name == RESIDUAL)
    assert [site.removeprefix(f"{RESIDUAL}.") for site in residual.sites] == [
        "conv1", "time_emb_proj", "conv2",
    ]  # fmt: skip
    names = [block.name for block in apart]
    assert "conv_in" not in names and "up_blocks.0.upsamplers.0.conv" in names
    assert names.index("mid_block.resnets.0") < names.index("up_blocks.0.resnets.0")  # depth order


def some_sites(store, artifact, tmp_path):
    """A plan artifact made from a file that leaves all but two blocks in floating point."""
    plan = plan_of(store, artifact)
    kept = ("mid_block.resnets.0.", "mid_block.resnets.1.")
    sites = [site if site.site.name.startswith(kept) else replace(site, quantised=False, why="") for site in plan.sites]
    path = tmp_path / "some.yaml"
    path.write_text(write_plan(replace(plan, sites=sites)))
    chosen = {"profile": store.ancestor(artifact, "profile").id}
    return runner.make(store, "plan", runner.edited_plan(str(path)), chosen).artifact


@pytest.mark.parametrize("after, blocks", [(3, 0), (11, 2)])  # in the first block's rounding, and in its scales
def test_interrupted_and_started_again_it_ends_with_the_same_bits(
    store, plans, tmp_path, after, blocks, monkeypatch
):  # fmt: skip
    short = replace(COURSE, trajectories=2)

    def run(folder, report):
        teacher, plan, scales = alone(
            store, plans["q_diffusion", "w3a8"], lambda site: site.name.startswith("mid_block.resnets.")
        )
        calls = calibration(teacher, plan.recipe.reconstruction, short, folder, report)
        student = new_student(teacher, plan, scales, 0)
        result = reconstruct(teacher, student, plan.recipe, short, calls, folder, report)
        return student_tensors(student, plan, scales | result.codes), result.rows

    tensors, rows = run(tmp_path / "whole", Report())
    assert [row["what"] for row in rows] == ["rounding", "rounding", "scales", "scales"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "other", Stop(after))
    kept = sorted((tmp_path / "other").glob("0*.pt"))
    assert len(kept) == blocks
    for path in kept[1:]:  # what a power cut left half of is made again
        path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(block_file, "IN_MEMORY", 0)  # whatever lies in memory or in files
    again, other_rows = run(tmp_path / "other", Report())
    assert not (tmp_path / "other/inputs").exists()
    assert other_rows == rows and again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_the_learned_codes_survive_their_file(store, plans, tmp_path):
    plan = some_sites(store, plans["q_diffusion", "w3a8"], tmp_path)
    artifact = make(store, "distill", {"plan": plan.id}, trajectories=2, batch=2)
    assert "reconstruction.csv" in artifact.manifest["files"] and artifact.figures["blocks"] == 2
    tensors = load_file(artifact.file("student.safetensors"))
    codes = {name for name in tensors if name.endswith("/weight_codes")}
    assert codes
    teacher = load_denoiser(store.ancestor(artifact, "model").path)
    student = load_fake(teacher, plan_of(store, artifact), artifact.file("student.safetensors"))
    for name in codes:
        layer = quant_layers(student.network)[name.removesuffix("/weight_codes")]
        found = as_rows(layer.integers().centred) + layer.weight_zero[:, None] - layer.plan.weight_range[0]
        assert torch.equal(found.to(torch.uint8), tensors[name])


def test_a_calibration_spread_evenly_sees_every_timestep_and_a_normal_one_leans_to_the_image(store, plans, tmp_path):
    teacher, plan, _ = alone(store, plans["ptq4dm", "w4a4"], in_time)
    even = calibration(teacher, Reconstruction(images=4), COURSE, tmp_path / "even", Report())
    assert sorted({call.timestep for call in even}) == sorted(plan.timesteps) and len(even) == STEPS * 4
    kept = calibration(teacher, Reconstruction(images=4), COURSE, tmp_path / "even", Report())
    assert all(torch.equal(one.x, other.x) for one, other in zip(even, kept, strict=True))
    long = replace(COURSE, steps=100)
    places = torch.tensor([99 - _normal_place(Reconstruction(spread="normal"), long, index) for index in range(400)])
    inner = places[(places > 0) & (places < 99)].float()  # from the image
    assert places.float().mean() < 45 and inner.std() > 20 and (places == 0).sum() > 20


def test_a_normal_calibration_fits_late_timesteps_better_than_an_even_one_and_early_ones_worse(store, plans, tmp_path):
    """PTQ4DM's, by the numbers of its code; seen where the trajectory goes in, whose size changes most along it."""
    teacher, plan, scales = alone(store, plans["ptq4dm", "w4a4"], lambda site: site.name == "conv_in")
    (site,) = (replace(site, activation_bits=4) for site in plan.quantised)
    course, seen = replace(COURSE, steps=20), {}
    for spread in ("even", "normal"):
        settings = replace(plan.recipe.reconstruction, spread=spread, images=8)
        calls = calibration(teacher, settings, course, tmp_path / spread, Report())
        found = rescaled(teacher, [site], scales, [0] * STEPS, calls, course, "error", 1.0)
        seen[spread] = [found[f"conv_in/activation_{what}"][0] for what in ("scale", "zero")]
    assert seen["even"][0] != seen["normal"][0]
    others = replace(course, seed=9)
    judged = calibration(teacher, Reconstruction(images=8), others, tmp_path / "judged", Report())

    def error(spread, chosen):
        values = torch.cat([call.x for call in judged if chosen(call.timestep)])
        codes = quantise(values, *seen[spread], *site.activation_range)
        return (dequantise(codes, *seen[spread]) - values).square().mean()

    assert error("normal", lambda timestep: timestep < 200) < 0.9 * error("even", lambda timestep: timestep < 200)
    assert error("normal", lambda timestep: timestep > 800) > 1.01 * error("even", lambda timestep: timestep > 800)


def test_static_ranges_cover_whatever_the_calibration_brings(store, plans, tmp_path):
    teacher, plan, scales = alone(store, plans["ptq4dm", "w4a4"], in_residual)
    calls = calibration(teacher, plan.recipe.reconstruction, COURSE, tmp_path, Report())
    found = rescaled(teacher, plan.quantised, scales, [0] * STEPS, calls, COURSE, "max", 1.0)
    scale = found[f"{RESIDUAL}.conv1/activation_scale"]
    assert torch.equal(scale, scale[:1].expand(STEPS))
    largest = []
    handle = teacher.network.get_submodule(f"{RESIDUAL}.conv1").register_forward_pre_hook(
        lambda _module, args: largest.append(args[0].abs().max())
    )
    with torch.no_grad():
        for call in calls:
            teacher.predict(call.x, torch.tensor(call.timestep), call.conditions, COURSE.guidance)
    handle.remove()
    torch.testing.assert_close(scale[0] * 7, max(largest))


def test_at_eight_bits_ranges_found_anew_have_headroom_as_a_plans_have(store, plans, tmp_path):
    teacher, plan, scales = alone(store, plans["ptq4dm", "w4a4"], lambda site: site.name == "conv_in")
    calls = calibration(teacher, plan.recipe.reconstruction, COURSE, tmp_path, Report())
    plain, wide = (
        rescaled(teacher, plan.quantised, scales, [0] * STEPS, calls, COURSE, "max", headroom)[
            "conv_in/activation_scale"
        ]
        for headroom in (1.0, 1.3)
    )
    torch.testing.assert_close(wide, plain * 1.3)


def test_a_loss_that_is_no_number_stops_it_by_its_block(store, plans, tmp_path):
    teacher, plan, scales = alone(store, plans["ptq4dm", "w4a4"], in_residual, rounding_share=0.0, scale_share=1.0)
    calls = calibration(teacher, plan.recipe.reconstruction, COURSE, tmp_path, Report())
    student = new_student(teacher, plan, scales, 0)
    recipe = replace(plan.recipe, activation_scale_rate=1e4)
    with pytest.raises(NumericalFault, match=RESIDUAL):
        reconstruct(teacher, student, recipe, COURSE, calls, tmp_path, Report())


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"images": 0}, {"warm_up": 1.5}, {"beta_first": 1.0}, {"rounding_rate": -1.0}):
        with pytest.raises(UsageError) as caught:
            Reconstruction(**wrong)
        assert caught.value.hint
    with pytest.raises(UsageError, match="which takes no reconstruction"):
        Recipe(reconstruction=Reconstruction())
    assert Recipe(updates="reconstruct").reconstruction == Reconstruction()


def test_a_plan_with_a_reconstruction_survives_its_file(store, plans, tmp_path):
    artifact = plans["tfmq", "w3a8"]
    plan = plan_of(store, artifact)
    assert plan.recipe.reconstruction.temporal_block
    (tmp_path / "plan.yaml").write_text(write_plan(plan))
    sites = json.loads(store.ancestor(artifact, "model").file("sites.json").read_text())
    assert read_plan(tmp_path / "plan.yaml", [site_from_dict(site) for site in sites]).recipe == plan.recipe


def test_a_scale_that_learning_took_below_zero_ends_a_reconstruction_by_its_name():
    tables = TimestepTables([1, 401], torch.ones(2, 2), torch.zeros(2, 2))
    layers = {"first": SimpleNamespace(index=0), "second": SimpleNamespace(index=1)}
    _check_scales(layers, tables)
    with torch.no_grad():
        tables.scale[1][1] = -0.5
    with pytest.raises(NumericalFault, match="the activation scale of site second at timestep 401"):
        _check_scales(layers, tables)
