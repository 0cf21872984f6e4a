"""One truth: what is trained is what is exported and what the integer kernels compute, bit for bit, for every
method.
"""

import json

import pytest
import torch
from roads import STEPS, make, tiny_store, tiny_student
from safetensors.torch import load_file

from pipelines import diffusion
from pipelines.errors import FileFault
from pipelines.methods import METHODS
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import read_plan
from pipelines.quant.layers import quant_layers
from pipelines.quant.spec import site_from_dict
from pipelines.students import load_fake, load_integer

VARIANTS = [(name, variant) for name, method in METHODS.items() for variant in method.variants]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


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


@pytest.mark.parametrize("method, variant", VARIANTS)
@pytest.mark.parametrize("bits", ["w4a4", "w4a3", "w8a8"])
def test_images_from_integers_equal_those_of_fake_quantisation_bit_for_bit(store, method, variant, bits):
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


def test_training_computes_what_the_frozen_student_computes(store):
    """The unfrozen layers, with gradients on, and the frozen ones give one ε."""
    distilled = tiny_student(store, "hqdm", "code", "w4a4")
    fake, _ = students(store, distilled)
    x, classes = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        frozen = fake.predict(x, torch.tensor(1), classes, 1.5)
    for layer in quant_layers(fake.unet).values():
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


def test_the_float_export_is_a_diffusers_folder_with_the_quantised_weights(store):
    from diffusers import UNet2DConditionModel

    distilled = tiny_student(store, "efficientdm", None, "w4a4")
    exported = make(store, "export", {"distill": distilled.id}, format="float")
    unet = UNet2DConditionModel.from_pretrained(exported.path / "unet", local_files_only=True)
    fake, _ = students(store, distilled)
    for name, layer in quant_layers(fake.unet).items():
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
        load_denoiser(store.ancestor(distilled, "model").path).unet, distilled.path / "adapters"
    )
    merged = merged.merge_and_unload()
    for name, layer in quant_layers(fake.unet).items():
        assert layer.lora_b.abs().max() > 0
        assert torch.allclose(merged.get_submodule(name).weight, layer.merged_weight(), atol=1e-7)


def test_the_student_shares_its_teachers_frozen_weights(store):
    distilled = tiny_student(store, "hqdm", "ours", "w4a4")
    teacher = load_denoiser(store.ancestor(distilled, "model").path)
    fake = load_fake(teacher, plan_of(store, distilled), distilled.file("student.safetensors"))
    assert fake.unet.conv_norm_out.weight is teacher.unet.conv_norm_out.weight
    name, layer = next(iter(quant_layers(fake.unet).items()))
    assert layer.weight.data_ptr() == teacher.unet.get_submodule(name).weight.data_ptr()


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


@pytest.mark.parametrize("method, variant, bits", [("hqdm", "ours", "w4a4"), ("efficientdm", None, "w3a3")])
def test_epsilon_of_the_embedded_model_is_equal_at_every_timestep(tmp_path, method, variant, bits):
    from pipelines import runner
    from pipelines.digits import CHECKPOINT
    from pipelines.store import Store

    store = Store(tmp_path)
    runner.make(store, "model", runner.model_config(CHECKPOINT))
    make(store, "profile", steps=2, batch=1)
    plan = make(store, "plan", method=method, variant=variant, bits=bits)
    fake, integer = students(store, make(store, "distill", {"plan": plan.id}, trajectories=1, batch=1))
    x, classes = torch.randn(3, 1, 16, 16), torch.tensor([3, 1, 4])
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for timestep in diffusion.timesteps_of("DDIMScheduler", fake.info.schedule, 20)[:: 3 - threads]:
            with torch.no_grad():
                assert torch.equal(
                    *(model.predict(x, torch.tensor(timestep), classes, 1.5) for model in (fake, integer))
                )
