"""Faults of numbers in real small runs: found where they arise, by name and timestep; what was good is kept."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawing import drawn
from roads import QUICK, STEPS, exported_store, make, tiny_store
from safetensors.torch import load_file, save_file
from tiny import tiny_denoiser

from pipelines import diffusion, runner
from pipelines.distillation.training import distill
from pipelines.errors import HqdmError, NumericalFault
from pipelines.events import Report
from pipelines.metrics import scores
from pipelines.models import denoiser as models
from pipelines.models.denoiser import WEIGHTS, Denoiser, check_finite, find_sites, load_denoiser
from pipelines.plans import Course, read_plan, read_sites
from pipelines.quant.affine import choose, quantise
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.layers import QuantLayer, quant_layers
from pipelines.quant.spec import IDENTITY, Site, SitePlan, Transform
from pipelines.quant.tables import TimestepTables
from pipelines.stages import load
from pipelines.students import load_fake

NAN, INF = float("nan"), float("inf")
SITE = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"


class Listener(Report):
    def __init__(self):
        self.heard = []

    def warn(self, message):
        self.heard.append(message)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A workspace up to exported integers."""
    return exported_store(tmp_path_factory.mktemp("numerical"))


def fault(call, *words):
    with pytest.raises(NumericalFault) as caught:
        call()
    assert caught.value.hint
    for word in words:
        assert word in caught.value.what, caught.value.what
    return caught.value.what


def spoilt(monkeypatch, name, where=0, value=NAN, after=0):
    """From its `after`-th call on, a layer of every network that is loaded gives a value that is none, of one image."""
    loaded, calls = models.load_denoiser, itertools.count()

    def load_spoilt(folder, **options):
        denoiser = loaded(folder, **options)

        def hook(_module, _args, output):
            if next(calls) >= after:
                output = output.clone()
                output[where] = value
            return output

        denoiser.network.get_submodule(name).register_forward_hook(hook)
        return denoiser

    monkeypatch.setattr(models, "load_denoiser", load_spoilt)


# Weights


def test_a_checkpoint_whose_weights_are_no_numbers_is_refused_by_the_tensors_name(tmp_path, monkeypatch):
    from pipelines.digits import CHECKPOINT
    from pipelines.models import source

    take = source.take

    def damaged(*args):
        denoiser, notes = take(*args)
        with torch.no_grad():
            denoiser.network.mid_block.resnets[0].conv1.weight[3, 2, 1, 0] = INF
        return denoiser, notes

    monkeypatch.setattr(source, "take", damaged)
    from pipelines.workspace.store import Store

    workspace = Store(tmp_path / "workspace")
    fault(lambda: runner.make(workspace, "model", runner.model_config(CHECKPOINT)), "mid_block.resnets.0.conv1.weight")
    assert workspace.artifacts() == []


def test_a_profile_names_the_tensor_of_a_model_that_was_taken_in_before(tmp_path):
    store = tiny_store(tmp_path)
    path = store.current("model").path / WEIGHTS
    tensors = load_file(path)
    tensors["time_embedding.linear_1.bias"][5] = INF
    save_file(tensors, path)
    with pytest.raises(HqdmError, match="is changed|is cut"):  # which any stage sees before it reads
        make(store, "profile", steps=STEPS + 1, batch=2)
    fault(lambda: check_finite(load_denoiser(store.current("model").path)), "tensor time_embedding.linear_1.bias")
    denoiser = tiny_denoiser(0)
    denoiser.conditions.encoder_hidden_states[2] = NAN
    fault(lambda: check_finite(denoiser), "tensor conditions.encoder_hidden_states")


# Activations


@pytest.mark.parametrize("value", [NAN, INF])
def test_activations_that_are_no_numbers_are_named_by_site_and_timestep(store, monkeypatch, value):
    spoilt(monkeypatch, "conv_in", value=value, after=1)
    timesteps = diffusion.timesteps_of("DDIMScheduler", tiny_denoiser(0).info.schedule, STEPS)
    said = fault(lambda: make(store, "profile", steps=STEPS, batch=1, seed=5), f"at timestep {timesteps[1]:g}")
    assert re.search(r"the input of \S+ holds NaN or Inf", said)


def test_a_prediction_that_is_no_number_is_named_even_at_the_last_step(store, monkeypatch):
    spoilt(monkeypatch, "conv_out", after=STEPS - 1)
    timesteps = diffusion.timesteps_of("DDIMScheduler", tiny_denoiser(0).info.schedule, STEPS)
    fault(lambda: make(store, "profile", steps=STEPS, batch=1, seed=6), "prediction", f"timestep {timesteps[-1]:g}")


# Scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e15, 1e20, 1e30])
def test_a_scale_is_a_positive_number_for_rows_of_any_size(symmetric, size):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * size
    low, high = (-7, 7) if symmetric else (0, 15)
    for norm in (2.0, 2.4):
        scale, zero = choose(x, low, high, norm=norm)
        assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero).all()
        codes = quantise(x, scale[:, None], zero[:, None], low, high)
        assert torch.isfinite(codes).all()
        if size >= 1e-30:
            assert ((codes - zero[:, None]) * scale[:, None] - x).abs().max() < x.abs().max()


def test_a_row_of_equal_values_keeps_its_scale():
    scale, zero = choose(torch.tensor([[0.0] * 8, [3.0] * 8, [-3.0] * 8]), 0, 15)
    assert scale[0] == 1 and torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero).all()


@pytest.mark.parametrize("value", [0.0, INF, NAN, -1.0])
def test_a_plans_scales_that_are_none_are_named_by_site_and_timestep(store, monkeypatch, value):
    from pipelines.measures import Measures

    found = Measures.activation_scales

    def broken(self, site, *args):
        scale, zero = found(self, site, *args)
        if site.site.name == SITE:
            scale[1] = value
        return scale, zero

    monkeypatch.setattr(Measures, "activation_scales", broken)
    second = sorted(diffusion.timesteps_of("DDIMScheduler", tiny_denoiser(0).info.schedule, STEPS))[1]
    fault(lambda: make(store, "plan", bits="w4a3"), f"site {SITE}", "activation_scale", f"timestep {second:g}")


# Dead layers


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A workspace whose model has a layer without weights and one without input, profiled; and what was warned of."""
    import json

    from pipelines.models.denoiser import save_denoiser
    from pipelines.quant.spec import site_to_dict
    from pipelines.workspace.store import Store

    store, listener = Store(tmp_path_factory.mktemp("dead")), Listener()
    denoiser = tiny_denoiser(0)
    with torch.no_grad():
        denoiser.network.get_submodule(SITE).weight.zero_()
        norm = denoiser.network.down_blocks[0].resnets[0].norm2
        norm.weight.zero_(), norm.bias.zero_()  # SiLU(0) = 0 is what conv2 reads
        denoiser.network.conv_in.weight[3] = 0.0  # one output alone
    request = {"stage_version": load("model").VERSION, "config": {"path": "tiny", "config_path": None, "ema": True}}
    with store.begin("model", "dead", request) as draft:
        save_denoiser(denoiser, draft.path)
        (draft.path / "sites.json").write_text(json.dumps([site_to_dict(site) for site in find_sites(denoiser)]))
        draft.commit({})
    with drawn():  # of channels without a maximum too
        make(store, "profile", steps=2, batch=2, report=listener)
    return store, listener.heard


def test_a_dead_layer_is_warned_of_by_name(dead):
    _, heard = dead
    assert f"site {SITE} is dead: all its weights are 0; their scales are set to 1" in heard
    named = (
        "site down_blocks.0.resnets.0.conv2 is dead: all its inputs are 0 at every timestep; its scales are set to 1"
    )
    assert named in heard and len(heard) == 2


@pytest.mark.parametrize(
    "method",
    ["hqdm", "efficientdm", "smoothquant", "outlier_suppression", "dmq", "hadanorm", "mpq_dm", "rtn"],
)
def test_a_dead_layer_has_scales_that_are_positive_numbers_by_every_kind_of_method(dead, method):
    plan = make(dead[0], "plan", method=method, bits="w4a4", options=QUICK.get(method, {}))
    for key, value in load_file(plan.file("scales.safetensors")).items():
        assert torch.isfinite(value).all() and ((value > 0).all() or not key.endswith("_scale")), key


def test_a_model_with_dead_layers_goes_the_whole_road(dead):
    store, _ = dead
    distilled = make(store, "distill", {"plan": make(store, "plan").id}, trajectories=2, batch=2)
    assert math.isfinite(distilled.figures["last_loss"])
    exported = make(store, "export", {"distill": distilled.id})
    fake = make(store, "sample", {"source": distilled.id}, source="fake", count=2, steps=2, batch=2)
    integer = make(store, "sample", {"source": exported.id}, source="int", count=2, steps=2, batch=2)
    assert fake.digest == integer.digest


# Distillation


def teacher_and_student(store):
    plan = store.current("plan")
    sites = read_sites(store.current("model").file("sites.json"))
    made = read_plan(plan.file("plan.yaml"), sites)
    from pipelines.students import new_student

    teacher = load_denoiser(store.current("model").path)
    return teacher, new_student(teacher, made, load_file(plan.file("scales.safetensors")), 0), made.recipe


def trained(store, path, spoil=None):
    """Two trajectories, a state every second update; `spoil(student, done)` comes before an update."""
    teacher, student, recipe = teacher_and_student(store)
    count, predict = itertools.count(), student.predict

    def predicts(*args):
        if spoil:
            spoil(teacher, student, next(count))
        return predict(*args)

    student.predict = predicts
    course = Course(2, STEPS, 2, 1.5, 1.0, 0)
    losses = distill(teacher, student, recipe, course, path, 2, Report())
    return losses, {name: value.detach() for name, value in student.named_parameters()}


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    return trained(store, tmp_path_factory.mktemp("undisturbed") / "state.pt")


def of_layer(student):
    return quant_layers(student.network)[SITE]


SPOILS = {
    "a loss": (lambda t, s, v: of_layer(s).bias.fill_(v), "a bias of site " + SITE),
    "a weight scale": (lambda t, s, v: of_layer(s).weight_scale.fill_(v), "the weight scale of site " + SITE),
    "an adapter": (lambda t, s, v: of_layer(s).lora_a.fill_(v), "an adapter of site " + SITE),
    "an activation scale": (
        lambda t, s, v: s.network.timestep_tables.scale[1].fill_(v), "the activation scale of site conv_in at timestep",
    ),
    "a zero-point": (
        lambda t, s, v: s.network.timestep_tables.zero[0].fill_(v),
        "the activation zero-point of site conv_in at timestep",
    ),
    "the teacher": (lambda t, s, v: t.network.conv_in.weight.fill_(v), "the teacher's prediction"),
}  # fmt: skip


@pytest.mark.parametrize(
    "what, value",
    [("a loss", NAN), ("a weight scale", INF), ("an adapter", NAN), ("an activation scale", NAN),
     ("an activation scale", 0.0), ("an activation scale", INF), ("a zero-point", NAN), ("the teacher", INF)],
)  # fmt: skip
def test_what_is_no_number_in_distillation_is_named_and_the_run_goes_on_from_its_last_good_state(
    store, undisturbed, tmp_path, what, value
):
    spoil, named = SPOILS[what]

    def at_the_third(teacher, student, done):
        if done == 3:
            with torch.no_grad():
                spoil(teacher, student, value)

    state = tmp_path / "state.pt"
    said = fault(lambda: trained(store, state, at_the_third), named)
    assert re.search(r"timestep \d+", said)
    kept = torch.load(state, weights_only=True)["value"]
    assert kept["done"] == 2 and all(torch.isfinite(part).all() for part in kept["parameters"])
    losses, parameters = trained(store, state)  # the cause is gone
    expected, values = undisturbed
    assert losses == expected and all(torch.equal(parameters[name], values[name]) for name in values)


@pytest.mark.parametrize("order", ["trajectory", "shuffled"])
def test_a_teacher_that_breaks_on_its_way_is_named_at_that_timestep_in_whatever_order_it_is_learned(
    store, tmp_path, order
):
    teacher, student, recipe = teacher_and_student(store)
    count, predict = itertools.count(), teacher.predict
    teacher.predict = lambda *args: predict(*args) * (1 if next(count) % STEPS < 1 else NAN)
    course, recipe = Course(2, STEPS, 2, 1.5, 1.0, 0), replace(recipe, order=order)
    visited = diffusion.timesteps_of("DDIMScheduler", teacher.info.schedule, STEPS)
    fault(
        lambda: distill(teacher, student, recipe, course, tmp_path / "state.pt", 2, Report()),
        f"the teacher's prediction holds NaN or Inf at timestep {visited[1]:g}",
    )


@pytest.mark.parametrize("measure", ["guidance", "correction"])
def test_what_is_measured_of_a_student_that_predicts_no_numbers_is_not_kept(store, tmp_path, measure):
    from pipelines.distillation.side_by_side import measure_correction, measure_guidance

    teacher, student, _ = teacher_and_student(store)
    with torch.no_grad():
        quant_layers(student.network)["conv_out"].weight_scale.fill_(NAN)
    course = Course(1, 2, 2, 1.5, 1.0, 0)
    if measure == "guidance":
        fault(lambda: measure_guidance(teacher, student, course, 1.5, tmp_path, Report()), "guidance", "timestep")
        assert not list(tmp_path.iterdir())
    else:
        fault(lambda: measure_correction(teacher, student, course, 2, Report()), "correction", "timestep")


# Export


@pytest.mark.parametrize("code", [-1, 16])
def test_codes_beyond_the_bits_are_not_packed(code):
    site = Site("s", "linear", "x", (2, 8))
    plan = SitePlan(site, weight_bits=4, weight_quantiser="asymmetric")
    centred = torch.zeros(2, 8, dtype=torch.int16)
    centred[1, 3] = code
    weights = IntegerWeights(plan, centred, torch.zeros(2, dtype=torch.int16), torch.ones(2), None)
    fault(weights.packed, "site s", "do not fit 4 bits")


@pytest.mark.parametrize(
    "what, value, named",
    [("weight_scale", NAN, "weight_scale"), ("weight_scale", 0.0, "weight_scale"), ("lora_a", INF, "lora_a"),
     ("weight_zero", 99.0, "weight_zero")],
)  # fmt: skip
def test_a_student_whose_tensors_are_no_numbers_is_not_exported(store, tmp_path, what, value, named):
    distilled = store.current("distill")
    tensors = load_file(distilled.file("student.safetensors"))
    tensors[f"{SITE}/{what}"].view(-1)[1] = value
    save_file(tensors, tmp_path / "student.safetensors")
    plan = read_plan(distilled.file("plan.yaml"), read_sites(store.current("model").file("sites.json")))
    teacher = load_denoiser(store.current("model").path)
    fault(lambda: load_fake(teacher, plan, tmp_path / "student.safetensors"), f"site {SITE}", named)


# Sampling


@pytest.mark.parametrize("source", ["teacher", "fake"])
def test_images_that_become_no_numbers_are_named_with_their_timestep_and_layer(store, monkeypatch, source):
    layer = "mid_block.attentions.0.transformer_blocks.0.norm1"
    spoilt(monkeypatch, layer, where=-1, after=1)  # of a batch of both halves, the last image
    timesteps = diffusion.timesteps_of("DDIMScheduler", tiny_denoiser(0).info.schedule, STEPS)
    said = fault(
        lambda: make(store, "sample", source=source, count=4, steps=STEPS, batch=4, seed=9),
        "images 3 hold NaN or Inf", f"first in {layer}",
    )  # fmt: skip
    assert any(f"timestep {step:g}," in said for step in timesteps)


def test_integers_name_site_timestep_and_images(store, monkeypatch):
    from pipelines import students

    load_integer = students.load_integer

    def damaged(*args):
        model = load_integer(*args)
        model.network.conv_norm_out.weight[0] = NAN
        return model

    monkeypatch.setattr(students, "load_integer", damaged)
    said = fault(lambda: make(store, "sample", source="int", count=2, steps=STEPS, batch=2, seed=9), "timestep")
    assert "conv_out" in said or "conv_norm_out" in said
    assert re.search(r"images 0(, 1| to 1)", said)


def test_batches_that_were_good_are_kept_and_the_run_goes_on_when_the_cause_is_gone(store, monkeypatch):
    options = dict(source="teacher", count=4, steps=STEPS, batch=2, seed=11)
    with monkeypatch.context() as broken:
        spoilt(broken, "conv_out", slice(None), after=STEPS + 1)  # the first batch, and the call that warms up
        fault(lambda: make(store, "sample", **options), "images 2, 3")
    kept = list(store.root.glob("sample/.draft-*/work/latents-*.npz"))
    assert len(kept) == 1 and np.isfinite(np.load(kept[0])["latents"]).all()
    listener = Listener()
    whole = make(store, "sample", report=listener, **options)
    other = make(store, "sample", **(options | {"seed": 11, "low_memory": True}))
    assert whole.digest == other.digest and not listener.heard


@pytest.mark.parametrize("damage", [b"half of", NAN, "shape"])
def test_a_damaged_batch_of_an_interrupted_run_is_said_and_made_again(store, monkeypatch, damage):
    options = dict(source="teacher", count=4, steps=2, batch=2, seed=12 + len(str(damage)))
    with monkeypatch.context() as broken:
        spoilt(broken, "conv_out", after=3)
        fault(lambda: make(store, "sample", **options))
    kept = max(store.root.glob("sample/.draft-*/work/latents-000000.npz"), key=lambda path: path.stat().st_mtime_ns)
    if isinstance(damage, bytes):
        kept.write_bytes(damage)
    else:
        latents = np.load(kept)["latents"]
        latents = np.full_like(latents, NAN) if damage is NAN else latents[:, :, :3]
        np.savez(kept, latents=latents, seconds=1.0)
    listener = Listener()
    made = make(store, "sample", report=listener, **options)
    assert any("made again" in line for line in listener.heard)
    assert np.load(made.file("samples.npz"))["arr_0"].shape == (4, 8, 8, 1)


def test_images_that_a_first_stage_turns_into_no_numbers_are_named(store, monkeypatch):
    monkeypatch.setattr(Denoiser, "decode", lambda self, latents: latents.index_fill(0, torch.tensor([1]), NAN))
    fault(
        lambda: make(store, "sample", source="teacher", count=4, steps=2, batch=2, seed=21), "images 1 hold", "decoded"
    )


# Scores


def test_constant_and_identical_images_are_scored_without_a_number_that_is_none(store, tmp_path):
    np.savez(tmp_path / "black.npz", arr_0=np.zeros((24, 16, 16, 1), np.uint8))
    options = load("score").with_hashes(
        load("score").Config(samples_path=str(tmp_path / "black.npz"), pair_path=str(tmp_path / "black.npz"),
                             reference="digits", splits=2, kid_subsets=2, kid_subset_size=8)
    )  # fmt: skip
    listener = Listener()
    figures = runner.make(store, "score", options, report=listener).artifact.figures
    assert figures["identical"] == 24 and figures["psnr_of_mean_mse"] is None
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))
    assert any("rank-deficient" in line for line in listener.heard)


def test_a_figure_that_is_no_number_is_named(store, tmp_path, monkeypatch):
    np.savez(tmp_path / "some.npz", arr_0=np.random.default_rng(0).integers(0, 255, (8, 16, 16, 1), dtype=np.uint8))
    monkeypatch.setattr(scores, "frechet_distance", lambda *_: NAN)
    options = load("score").with_hashes(
        load("score").Config(samples_path=str(tmp_path / "some.npz"), reference="digits", splits=2, kid_subsets=2,
                             kid_subset_size=4)
    )  # fmt: skip
    fault(lambda: runner.make(store, "score", options), "fid of", "some.npz")


# Sums beyond what fp32 holds exactly


@pytest.mark.parametrize("kind, inputs", [("linear", 4096), ("conv", 512)])
@pytest.mark.parametrize("quantiser", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("inverse", ["none", "single"])
def test_training_computes_the_integers_of_deployment_where_sums_pass_2_to_the_24(kind, inputs, quantiser, inverse):
    """Weights and inputs of one sign reach the largest sums; few and many images undo the transform on either side."""
    kernel = () if kind == "linear" else (3, 3)
    site = Site("s", kind, "x", (16, inputs, *kernel), padding=(1, 1) if kernel else (0, 0), rank=4 if kernel else 2)
    transform = IDENTITY if inverse == "none" else Transform("channels", 32)
    plan = SitePlan(site, True, transform, inverse, 8, 8, "symmetric", quantiser)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(site.weight, generator=generator) / 2 + 0.5
    scale = weight.flatten(1).amax(1) / 127
    tables = TimestepTables([1.0], torch.full((1, 1), 0.01 * transform.order**0.5), torch.zeros(1, 1))
    tables.set_timestep(1.0)
    layer = QuantLayer(plan, weight, None, scale, torch.zeros(16), tables, 0, slice(0, 16))
    for images in (2, 40):
        x = torch.rand((images, inputs, *((8, 8) if kernel else ())), generator=generator) * 2 + 0.1
        trained = layer(x.requires_grad_(True)).detach()
        with torch.no_grad():
            unfrozen = layer(x)
            layer.freeze()
            assert layer._frozen[1] == torch.float64  # so large that sampling takes fp64
            deployed = layer(x)
            layer._frozen = None
        assert torch.equal(trained, deployed) and torch.equal(unfrozen, deployed)
