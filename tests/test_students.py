"""One truth: what is trained is what is exported and what the integer kernels compute, bit for bit, for every
method.
"""

import json
import shutil

import pytest
import torch
from roads import SAMPLE, STEPS, make, tiny_store, tiny_student
from safetensors.torch import load_file, save_file

from pipelines import diffusion
from pipelines.errors import FileFault, NumericalFault
from pipelines.methods import METHODS
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import read_plan
from pipelines.quant.layers import quant_layers
from pipelines.quant.spec import site_from_dict
from pipelines.students import load_fake, load_integer, new_student

VARIANTS = [(name, variant) for name, method in METHODS.items() for variant in method.variants]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"), levels=2)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("shallow"))


def plan_of(store, artifact):
    sites = [
        site_from_dict(entry) for entry in json.loads(store.ancestor(artifact, "model").file("sites.json").read_text())
    ]
    return read_plan(artifact.file("plan.yaml"), sites)


def students(store, distilled, backend="cpu"):
    """(fake, integer) denoisers of one distilled student."""
    teacher = load_denoiser(store.ancestor(distilled, "model").path)
    fake = load_fake(teacher, plan_of(store, distilled), distilled.file("student.safetensors"))
    exported = make(store, "export", {"distill": distilled.id})
    return fake, load_integer(exported.path, backend)


def refused_without(exported, name, folder):
    """A student that has a file beside its weights is refused by its name where that is missing, or cut."""
    for other in ("config.json", "model.safetensors", "conditions.safetensors"):
        (folder / other).write_bytes(exported.file(other).read_bytes())
    for content in (None, exported.file(name).read_bytes()[:40]):
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(FileFault, match=name):
            load_integer(folder, "cpu")


@pytest.mark.parametrize(
    "method, variant, bits",
    [(*pair, "w4a3") for pair in VARIANTS] + [("hqdm", "ours", "w8a8"), ("efficientdm", "published", "w8a8")],
)
def test_images_from_integers_equal_those_of_fake_quantisation_bit_for_bit(store, shallow, method, variant, bits):
    """Each method's default variant, and hqdm's all, with every kind of layer; the others with one level."""
    store = store if variant == METHODS[method].default_variant or method == "hqdm" else shallow
    distilled = tiny_student(store, method, variant, bits)
    fake, integer = students(store, distilled)
    classes = torch.tensor([0, 1, 2])
    images = [
        diffusion.sample(model, "DDIMScheduler", model.info.schedule, steps, (1, 8, 8), classes, 1.5, 0.0, 0, [0, 1, 2])
        for model in (fake, integer)
        for steps in (STEPS, 5)  # 5 steps lie between the learned ones
    ]
    assert torch.isfinite(images[0]).all()
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])


def test_epsilon_on_the_reference_back_end_equals_that_on_the_cpu(store):
    distilled = tiny_student(store, "hqdm", "ours", "w3a3")
    fake, fast = students(store, distilled)
    _, truth = students(store, distilled, "reference")
    x, classes = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        outputs = [model.predict(x, torch.tensor(334), classes, 1.5) for model in (fake, fast, truth)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "method, variant", [("hqdm", "ours"), ("hqdm", "paper"), ("hqdm", "tuned"), ("efficientdm", None)]
)
def test_a_batch_of_mixed_timesteps_is_predicted_as_its_images_alone(store, method, variant):
    """Between learned timesteps too. The layers in floating point round a batch as they round an image."""
    fake, integer = students(store, tiny_student(store, method, variant, "w4a4"))
    x, classes, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([1, 3, 0, 1]), torch.tensor([334, 1, 500, 334])
    with torch.no_grad():
        mixed = [model.predict(x, timesteps, classes, 1.5) for model in (fake, integer)]
        alone = [fake.predict(x[i : i + 1], timesteps[i], classes[i : i + 1], 1.5) for i in range(len(x))]
    assert torch.equal(mixed[0], mixed[1])
    assert torch.allclose(mixed[0], torch.cat(alone), atol=1e-4)


def test_training_computes_what_the_frozen_student_computes(store):
    """The unfrozen layers and the frozen ones give one ε, with the norms and the attention of training around both:
    inference has quicker ones, which round otherwise.
    """
    distilled = tiny_student(store, "hqdm", "code", "w4a4")
    fake, _ = students(store, distilled)
    x, classes = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    frozen = fake.predict(x, torch.tensor(1), classes, 1.5)
    assert torch.is_grad_enabled() and not frozen.requires_grad
    for layer in quant_layers(fake.network).values():
        layer._frozen = None
        layer.lora_a.requires_grad_(True)
        layer.weight_scale.requires_grad_(True)
    trained = fake.predict(x, torch.tensor(1), classes, 1.5)
    assert trained.requires_grad and torch.equal(trained.detach(), frozen)


def test_packed_weights_take_the_bytes_that_their_bits_say(store):
    distilled = tiny_student(store, "hqdm", "ours", "w4a4")
    exported = make(store, "export", {"distill": distilled.id})
    tensors = load_file(exported.file("model.safetensors"))
    for site in plan_of(store, distilled).quantised:
        count = torch.tensor(site.site.weight).prod().item()
        assert tensors[f"{site.site.name}.weight"].numel() == (count * site.weight_bits + 7) // 8


def test_factors_of_sites_take_no_more_bytes_than_the_activation_scales(store, tmp_path):
    exported = make(store, "export", {"distill": tiny_student(store, "hqdm", "tuned").id})
    tensors = load_file(exported.file("model.safetensors"))
    assert tensors["tables.factor"].shape == tensors["tables.scale"].shape and (tensors["tables.factor"] != 1).any()
    shutil.copytree(exported.path, tmp_path / "other")
    factor = tensors["tables.factor"]
    for spoiled, fault in ((factor[:, 1:], FileFault), (-factor, NumericalFault)):
        save_file(tensors | {"tables.factor": spoiled.contiguous()}, tmp_path / "other" / "model.safetensors")
        with pytest.raises(fault, match="factor"):
            load_integer(tmp_path / "other", "cpu")


def test_an_export_of_the_format_before_is_read(store, tmp_path):
    exported = make(store, "export", {"distill": tiny_student(store).id})
    shutil.copytree(exported.path, tmp_path / "older")
    config = json.loads(exported.file("config.json").read_text())
    (tmp_path / "older" / "config.json").write_text(json.dumps(config | {"version": 5}))
    x, classes, timestep = torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor(500)
    now, before = (
        load_integer(folder, "cpu").predict(x, timestep, classes, 1.5) for folder in (exported.path, tmp_path / "older")
    )
    assert torch.equal(now, before)


def test_the_float_export_is_a_diffusers_folder_with_the_quantised_weights(store):
    from diffusers import UNet2DConditionModel

    distilled = tiny_student(store, "efficientdm", None, "w4a4")
    exported = make(store, "export", {"distill": distilled.id}, format="float")
    unet = UNet2DConditionModel.from_pretrained(exported.path / "denoiser", local_files_only=True)
    fake, _ = students(store, distilled)
    for name, layer in quant_layers(fake.network).items():
        weights = layer.integers()
        assert torch.equal(unet.get_submodule(name).weight, weights.dequantised())
        assert len(weights.dequantised()[0].unique()) <= 2**layer.plan.weight_bits


def test_adapters_merged_by_peft_give_the_students_weight(store):
    """W + BA, and from it the very integers of the student."""
    from peft import PeftModel

    distilled = tiny_student(store, "hqdm", "ours", "w4a4", trajectories=2)
    teacher = load_denoiser(store.ancestor(distilled, "model").path)
    fake = load_fake(teacher, plan_of(store, distilled), distilled.file("student.safetensors"))
    merged = PeftModel.from_pretrained(
        load_denoiser(store.ancestor(distilled, "model").path).network, distilled.path / "adapters"
    )
    merged = merged.merge_and_unload()
    for name, layer in quant_layers(fake.network).items():
        assert layer.lora_b.abs().max() > 0
        assert torch.allclose(merged.get_submodule(name).weight, layer.merged_weight(), atol=1e-7)


@pytest.mark.parametrize("method", ["hqdm", "efficientdm"])
def test_a_student_has_no_copy_of_its_teachers_weights(store, method):
    """Where the adapters add to the dequantised weight it has the integers beside them, a byte each."""
    distilled = tiny_student(store, method, None, "w4a4")
    teacher = load_denoiser(store.ancestor(distilled, "model").path)
    plan = plan_of(store, distilled)
    fake = load_fake(teacher, plan, distilled.file("student.safetensors"), freeze=False)
    new = new_student(teacher, plan, load_file(store.ancestor(distilled, "plan").file("scales.safetensors")), 0)
    owned = {value.untyped_storage().data_ptr() for value in [*teacher.parameters(), *teacher.buffers()]}
    for student in (fake, new):
        assert student.network.conv_norm_out.weight is teacher.network.conv_norm_out.weight
        for name, layer in quant_layers(student.network).items():
            assert layer.weight.data_ptr() == teacher.network.get_submodule(name).weight.data_ptr()
            mine = [value for value in layer.buffers() if value.untyped_storage().data_ptr() not in owned]
            for value in mine:
                assert value.numel() <= layer.weight.shape[0] or value.dtype == torch.uint8, name
            assert (layer.base_codes is not None) == (method == "efficientdm")


def test_an_integer_model_is_loaded_without_unpacked_weights(store):
    distilled = tiny_student(store, "hqdm", "ours", "w4a4")
    fake, integer = students(store, distilled)
    layers = quant_layers(fake.network)
    quantised = sum(layer.weight.numel() for layer in layers.values())
    left = sum(value.numel() for value in integer.network.parameters() if value.dtype == torch.float32)
    tables = sum(value.numel() for value in integer.network.timestep_tables.parameters())
    assert left - tables == sum(value.numel() for value in fake.network.parameters()) - tables - sum(
        value.numel() for layer in layers.values() for value in layer.parameters()
    )
    packed = [integer.network.get_submodule(name).prepared.weights.tensors["weight"] for name in layers]
    assert sum(value.nbytes for value in packed) < quantised


def test_an_exported_model_that_was_cut_is_refused_by_name(store, tmp_path):
    distilled = tiny_student(store, "hqdm", "ours", "w4a4")
    exported = make(store, "export", {"distill": distilled.id})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(exported.file(name).read_bytes())
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(FileFault, match="model.safetensors"):
        load_integer(tmp_path, "cpu")
    (tmp_path / "config.json").write_text('{"format": "hqdm-int", "version": 99}')
    with pytest.raises(FileFault, match="version 99"):
        load_integer(tmp_path, "cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A workspace with the embedded model and its profile."""
    from pipelines import runner
    from pipelines.digits import CHECKPOINT
    from pipelines.workspace.store import Store

    store = Store(tmp_path_factory.mktemp("digits"))
    runner.make(store, "model", runner.model_config(CHECKPOINT))
    make(store, "profile", steps=2, batch=1, sample=SAMPLE)
    return store


@pytest.mark.parametrize("method, variant, bits", [("hqdm", "ours", "w4a4"), ("efficientdm", None, "w3a3")])
def test_epsilon_of_the_embedded_model_is_equal_at_every_timestep(digits, method, variant, bits):
    """And whatever the number of threads, which share a product's rows and no timestep's."""
    plan = make(digits, "plan", method=method, variant=variant, bits=bits)
    fake, integer = students(digits, make(digits, "distill", {"plan": plan.id}, trajectories=1, batch=1))
    x, classes = torch.randn(1, 1, 16, 16), torch.tensor([3])
    visited = diffusion.timesteps_of("DDIMScheduler", fake.info.schedule, 10)
    for threads, timesteps in ((2, visited[::4]), (1, visited)):
        torch.set_num_threads(threads)
        for timestep in timesteps:
            with torch.no_grad():
                assert torch.equal(
                    *(model.predict(x, torch.tensor(timestep), classes, 1.5) for model in (fake, integer))
                )
