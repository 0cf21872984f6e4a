"""Models as diffusers keeps them: every form gives the same network, every fault names the file and the way out; and
what their schedules become.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from model_files import CHECKPOINT, WEIGHTS, change, mapped_regions, refused, same_weights
from safetensors.torch import load_file, save_file

from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models import network
from pipelines.models.schedule import read_schedule
from pipelines.models.source import files_of, take


def test_a_pipelines_folder_says_what_its_model_is(saved):
    denoiser, notes = take(saved("ddpm")[0])
    assert denoiser.info.source == "DDPMPipeline" and denoiser.info.family == "unet" and notes == []
    assert denoiser.info.shape == (3, 16, 16) and denoiser.info.conditions == 0
    schedule = denoiser.info.schedule
    assert schedule["num_train_timesteps"] == 1000 and schedule["beta_end"] == 0.02 and schedule["clip_sample"] is True
    assert None not in schedule.values() and not any(key.startswith("_") for key in schedule)


def test_weights_in_single_precision_stay_mapped(ddpm):
    denoiser, _ = take(ddpm)
    regions = mapped_regions("diffusion_pytorch_model.safetensors")
    values = list(denoiser.network.parameters())
    assert all(any(low <= value.data_ptr() < high for low, high in regions) for value in values)


def as_shards(folder, state):
    half = len(state) // 2
    names = sorted(state)
    parts = {"one.safetensors": names[:half], "two.safetensors": names[half:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    places = {key: file for file, keys in parts.items() for key in keys}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "write",
    [
        as_shards,
        lambda folder, state: torch.save(state, folder / "diffusion_pytorch_model.bin"),
        lambda folder, state: save_file(state, folder / "diffusion_pytorch_model.bf16.safetensors"),
    ],
    ids=["shards", "bin", "variant"],
)
def test_weights_are_the_same_in_every_form_that_diffusers_writes(ddpm, write):
    whole, _ = take(ddpm)
    state = load_file(ddpm / WEIGHTS)
    (ddpm / WEIGHTS).unlink()
    write(ddpm / "unet", state)
    assert same_weights(take(ddpm)[0], whole)


def test_half_precision_becomes_single(ddpm):
    state = {name: value.half() for name, value in load_file(ddpm / WEIGHTS).items()}
    (ddpm / WEIGHTS).unlink()
    save_file(state, ddpm / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    found = take(ddpm)[0].network.state_dict()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], state[name].float()) for name in state)


def test_whole_precision_goes_before_half_and_safetensors_before_a_pickle(ddpm):
    state = load_file(ddpm / WEIGHTS)
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    save_file(zeros, ddpm / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(zeros, ddpm / "unet" / "diffusion_pytorch_model.bin")
    assert torch.equal(take(ddpm)[0].network.conv_in.weight, state["conv_in.weight"])


def test_attention_under_its_old_names_is_known(ddpm):
    whole, _ = take(ddpm)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(ddpm / WEIGHTS).items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        state[name] = value
    assert any(".proj_attn." in name for name in state)
    save_file(state, ddpm / WEIGHTS)
    assert same_weights(take(ddpm)[0], whole)


def test_a_models_own_folder_takes_the_published_schedule_and_says_so(saved):
    folder, _ = saved("adm")
    denoiser, notes = take(folder)
    assert denoiser.info.conditions == 5 and denoiser.info.source == "UNet2DModel"
    assert denoiser.info.schedule["beta_end"] == 0.02
    assert "no scheduler_config.json" in notes[0] and "beta_end 0.02" in notes[0]
    assert "taken for the images themselves" in notes[1] and len(notes) == 2


def test_a_weight_file_with_its_configuration_beside_it_is_its_folder(ddpm):
    shutil.copy(ddpm / "scheduler" / "scheduler_config.json", ddpm / "unet")
    denoiser, notes = take(ddpm / WEIGHTS)
    assert same_weights(denoiser, take(ddpm)[0]) and ["no first stage" in note for note in notes] == [True]
    assert denoiser.info.schedule == take(ddpm)[0].info.schedule


def test_a_transformer_without_a_schedule_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved("sd3")[0] / "transformer", tmp_path / "bare")
    refused(lambda: take(Path(folder)), "bare", "has no scheduler_config.json")


def test_the_size_asked_for_is_counted_in_the_first_stages_latents(saved):
    assert take(saved("ldm-uncond")[0], size=32)[0].info.shape == (3, 16, 16)
    refused(lambda: take(saved("ldm-uncond")[0], size=15), "size 15 is no multiple of 2", kind=UsageError)
    refused(lambda: take(saved("ldm-uncond")[0], size=0), "size 0", kind=UsageError)


def test_fluxs_shift_follows_the_images_size(saved):
    folder, options = saved("flux")
    mu = [take(folder, prompts=options["prompts"], size=size)[0].info.schedule["mu"] for size in (64, 256)]
    assert mu[0] == pytest.approx(0.5)  # 256 tokens
    assert mu[1] == pytest.approx(1.15)  # 4096
    assert "mu" not in take(saved("flux-schnell")[0], prompts=options["prompts"])[0].info.schedule


@pytest.mark.parametrize("option", ["prompts", "embeddings"])
@pytest.mark.parametrize("model", ["ddpm", "digits"])
def test_a_model_that_reads_no_prompts_is_given_none(saved, option, model):
    path = CHECKPOINT if model == "digits" else saved(model)[0]
    refused(lambda: take(path, **{option: Path("words.txt")}), f"--{option} words.txt", kind=UsageError)


SPOILT = {
    "unet/config.json": [
        (dict(layers_per_block="1"), "not the configuration of a UNet2DModel"),
        (dict(block_out_channels=7), "not the configuration of a UNet2DModel"),
        (dict(block_out_channels=[24, 24.5]), "not the configuration of a UNet2DModel"),
        (dict(down_block_types=["DownBlock2D", "os.system"]), "not the configuration of a UNet2DModel"),
        (dict(act_fn="eval"), "not the configuration of a UNet2DModel"),
        (dict(norm_num_groups=0), "not the configuration of a UNet2DModel"),
        (dict(layers_per_block=10**6), "layers_per_block 1000000 is more than the file's"),
        (dict(block_out_channels=[8] * 1000), "block_out_channels has 1000 entries"),
        (dict(sample_size=10**6), "channels, height and width (3, 1000000, 1000000)"),
        (dict(sample_size=-4), "channels, height and width (3, -4, -4)"),
        (dict(sample_size=[4096, 4096]), "are too large"),
        (dict(in_channels=..., out_channels=9), "in_channels: 3 with out_channels: 9"),
        (dict(class_embed_type="timestep"), "class_embed_type: timestep"),
        (dict(block_out_channels=[24, 48]), "shapes: "),
        (dict(layers_per_block=2), "missing: "),
        (dict(layers_per_block=60), "more parameters than the file has tensors"),
        (dict(down_block_types=["DownBlock2D", "DownBlock2D"]), "unexpected: "),
        (dict(_class_name="UNetUnheardOf"), "a UNetUnheardOf, where the pipeline's index has a UNet2DModel"),
        (dict(_class_name=["a", "b"]), "says no class"),
        (dict(quantization_config={}), "quantised already"),
    ],
    "model_index.json": [
        (dict(_class_name=["my_pipeline", "MyPipeline"]), "not a class of diffusers"),
        (dict(unet=["my_unet", "UNet2DModel"]), "the component unet is UNet2DModel of 'my_unet'"),
        (dict(unet=["diffusers", 3]), "the component 'unet'"),
        (dict(unet=["diffusers", "../../x"]), "the component 'unet'"),
        (dict(unet=...), "none of its components is a denoiser: scheduler"),
    ],
    "scheduler/scheduler_config.json": [
        (dict(beta_schedule=..., trained_betas=..., _class_name="EDMEulerScheduler"), "a EDMEulerScheduler"),
        (dict(num_train_timesteps=0), "num_train_timesteps cannot be 0"),
        (dict(num_train_timesteps="1000"), "num_train_timesteps cannot be '1000'"),
        (dict(beta_start=[1]), "beta_start cannot be [1]"),
        (dict(beta_end=True), "beta_end cannot be True"),
        (dict(clip_sample={}), "clip_sample cannot be {}"),
        (dict(prediction_type="image"), "prediction_type 'image' is not supported"),
    ],
}


@pytest.mark.parametrize(
    "name, values, fault", [(name, values, fault) for name, faults in SPOILT.items() for values, fault in faults]
)
def test_a_configuration_that_does_not_hold_is_refused_before_anything_is_built(ddpm, name, values, fault):
    change(ddpm / name, **values)
    refused(lambda: take(ddpm), name, fault, kind=HqdmError)


@pytest.mark.parametrize(
    "component, fault",
    [
        (dict(unet=["diffusers", "UNetUnheardOf"]), "a UNet2DModel, where the pipeline's index has a UNetUnheardOf"),
        (dict(vae=["diffusers", "AutoencoderKL"]), "vae/config.json: there is no such file"),
    ],
)
def test_an_index_and_its_folders_must_agree(ddpm, component, fault):
    change(ddpm / "model_index.json", **component)
    refused(lambda: take(ddpm), fault)


def test_an_entry_that_the_class_has_no_argument_for_is_noted(ddpm):
    change(ddpm / "unet" / "config.json", of_my_own=3)
    assert any("not used by UNet2DModel: of_my_own" in note for note in take(ddpm)[1])


def test_tables_that_a_configuration_asks_for_are_counted_before_they_are_computed(saved, monkeypatch):
    monkeypatch.setattr(network, "MOST_TABLES", 1000)
    refused(lambda: take(saved("dit")[0]), "transformer/config.json", "its tables would take 1536 bytes (at most 1000)")


def test_missing_unexpected_and_wrong_tensors_are_listed_eight_at_most(ddpm):
    state = load_file(ddpm / WEIGHTS)
    state = {f"model.{name}": value for name, value in state.items()}
    save_file(state, ddpm / WEIGHTS)
    message = refused(lambda: take(ddpm), "unet/config.json", "missing: conv_in.bias, ", f"({len(state)} in all)")
    assert message.count("model.") == 8


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda value: value.fill_(float("nan")), "NaN or Inf in weights: conv_in.bias"),
        (lambda value: value.to(torch.int8), "no floating-point numbers: conv_in.bias: torch.int8"),
        (lambda value: value[:3].clone(), "conv_in.bias: (3,) in the file, (24,) by the configuration"),
    ],
)
def test_weights_that_are_none_are_named(ddpm, spoil, fault):
    state = load_file(ddpm / WEIGHTS)
    state["conv_in.bias"] = spoil(state["conv_in.bias"].clone())
    save_file(state, ddpm / WEIGHTS)
    refused(lambda: take(ddpm), "unet/config.json", fault)


@pytest.mark.parametrize(
    "places, fault",
    [
        ({"conv_in.bias": "../../secret.safetensors"}, "names '../../secret.safetensors'"),
        ({"conv_in.bias": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"conv_in.bias": "weights.bin"}, "names 'weights.bin'"),
        ({"conv_in.bias": 3}, "names 3"),
        ({"conv_in.bias": "three.safetensors"}, "the file 'three.safetensors' is not there"),
        ({"conv_in.bias": "a" * 5000 + ".safetensors"}, "is not there"),
        ({"conv_in.bias": "a\0.safetensors"}, "is not there"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_a_shards_index_names_files_of_its_folder_alone(ddpm, places, fault):
    as_shards(ddpm / "unet", load_file(ddpm / WEIGHTS))
    (ddpm / WEIGHTS).unlink()
    index = ddpm / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    refused(lambda: take(ddpm), index.name, fault)


def test_a_tensor_in_two_shards_is_refused(ddpm):
    state = load_file(ddpm / WEIGHTS)
    as_shards(ddpm / "unet", state)
    (ddpm / WEIGHTS).unlink()
    save_file(state, ddpm / "unet" / "two.safetensors")
    refused(lambda: take(ddpm), "two.safetensors", "tensors of another shard")


def test_a_folder_without_weights_or_configuration_says_what_is_missing(ddpm, tmp_path):
    (ddpm / WEIGHTS).unlink()
    refused(lambda: take(ddpm), "unet", "has no weights")
    refused(lambda: take(tmp_path), str(tmp_path), "neither a pipeline's folder (model_index.json) nor a model's")
    refused(lambda: take(ddpm, config=tmp_path / "model.yaml"), "model.yaml", kind=UsageError)


@pytest.mark.parametrize(
    "values, fault, kind",
    [
        (dict(_class_name="AutoencoderOobleck"), "a AutoencoderOobleck is not supported", HqdmError),
        (dict(scaling_factor="big"), "scaling_factor cannot be 'big'", FileFault),
        (dict(latent_channels=5), "shapes: ", FileFault),
        (dict(layers_per_block=10**7), "layers_per_block 10000000", FileFault),
    ],
)
def test_a_first_stage_is_checked_when_the_model_is_taken_in(saved, tmp_path, values, fault, kind):
    folder = Path(shutil.copytree(saved("ldm-uncond")[0], tmp_path / "ldm"))
    change(folder / "vqvae" / "config.json", **values)
    refused(lambda: take(folder), "vqvae/config.json", fault, kind=kind)


def test_code_beside_a_model_is_never_imported(ddpm, monkeypatch):
    (ddpm / "my_unet.py").write_text("from pathlib import Path\nPath('ran.txt').write_text('')\nUNet2DModel = None\n")
    monkeypatch.chdir(ddpm)
    monkeypatch.syspath_prepend(str(ddpm))
    change(ddpm / "model_index.json", unet=["my_unet", "UNet2DModel"])
    refused(lambda: take(ddpm), "'my_unet'", kind=HqdmError)
    assert not (ddpm / "ran.txt").exists() and "my_unet" not in sys.modules


# What decides whether a run is the same run


def test_the_files_that_reading_can_use_are_those_that_decide_a_run(saved, ddpm):
    (ddpm / "README.md").write_text("words")
    (ddpm / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not used")
    names = [path.relative_to(ddpm).as_posix() for path in files_of(ddpm)]
    assert names == ["model_index.json", "scheduler/scheduler_config.json", WEIGHTS.replace(
        "diffusion_pytorch_model.safetensors", "config.json"), WEIGHTS]  # fmt: skip
    assert files_of(CHECKPOINT) == [CHECKPOINT]
    folder, _ = saved("sd")
    names = {path.relative_to(folder).as_posix() for path in files_of(folder)}
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"} <= names
    assert "prompts.txt" not in names


def test_finding_those_files_loads_no_torch(saved):
    code = (
        "import sys; from pathlib import Path; from pipelines.models.source import files_of; "
        f"assert len(files_of(Path({str(saved('ddpm')[0])!r}))) == 4; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_side_that_the_networks_levels_or_patches_cut_is_refused_before_it_runs(saved):
    """ldm-uncond has two levels and two pixels a latent; sd3 has patches of two latents."""
    refused(lambda: take(saved("ldm-uncond")[0], size=30), "do not divide by 2", kind=UsageError)
    folder, options = saved("sd3")
    refused(lambda: take(folder, prompts=options["prompts"], size=30), "do not divide by 2", kind=UsageError)


def test_a_denoiser_of_latents_without_its_first_stage_says_so_before_anything_is_sampled(saved, tmp_path):
    folder, options = saved("sd")
    text = tmp_path / "embeddings.safetensors"
    given, _ = take(folder, prompts=options["prompts"])
    save_file({"encoder_hidden_states": given.conditions.encoder_hidden_states.contiguous()}, text)
    bare, notes = take(folder / "unet", embeddings=text)
    assert any("no images can be made" in note for note in notes)
    with pytest.raises(HqdmError, match="came without a first stage"):
        bare.check_images()
    refused(lambda: take(folder / "unet", embeddings=text, size=64), "without a first stage", kind=UsageError)


def test_means_and_deviations_of_latents_are_undone_before_they_are_decoded(saved, tmp_path):
    folder = shutil.copytree(saved("sd")[0], tmp_path / "sd")
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    plain = take(folder, prompts=folder / "prompts.txt")[0].first_stage
    path.write_text(json.dumps(config | {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 2.0, 2.0, 2.0]}))
    moved = take(folder, prompts=folder / "prompts.txt")[0].first_stage
    x, mean = torch.randn(1, 4, 4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1, 1)
    assert torch.allclose(moved.decode(x), plain.decode(2 * x + mean * config["scaling_factor"]), atol=1e-5)


def test_what_is_no_model_is_told_by_what_it_is(saved, tmp_path):
    """A decoder, the weights of a LoRA, a folder's description."""
    refused(lambda: take(saved("sd")[0] / "vae"), "is a first stage, no denoiser", kind=HqdmError)
    save_file({"unet.down.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    refused(lambda: take(tmp_path / "adapter.safetensors"), "adapter.safetensors", "weights of a LoRA")
    refused(lambda: take(saved("ddpm")[0] / "model_index.json"), "a folder's description", kind=UsageError)


# Schedules


SCHEDULE = "scheduler/scheduler_config.json"


def test_a_schedule_that_states_little_is_what_diffusers_makes_of_it(ddpm):
    (ddpm / SCHEDULE).write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_end": 0.03}))
    schedule = take(ddpm)[0].info.schedule
    theirs = DDPMScheduler.from_pretrained(ddpm / "scheduler").config
    said = {name: value for name, value in theirs.items() if not name.startswith("_") and value is not None}
    assert said["beta_end"] == 0.03 and said["clip_sample"] is True and said["steps_offset"] == 0
    assert said.items() <= schedule.items()


def test_latents_are_not_clipped_where_their_scheduler_knows_no_clipping(saved):
    folder, options = saved("sd")
    assert "clip_sample" not in json.loads((folder / SCHEDULE).read_text())
    assert read_schedule(folder / SCHEDULE)["clip_sample"] is False
    assert take(folder, prompts=options["prompts"])[0].info.schedule["clip_sample"] is False


def test_stable_diffusions_pipeline_corrects_old_schedules_and_so_does_reading_it(saved, tmp_path):
    folder = Path(shutil.copytree(saved("sd2")[0], tmp_path / "sd2"))
    change(folder / SCHEDULE, clip_sample=..., steps_offset=...)
    config = DiffusionPipeline.from_pretrained(folder, local_files_only=True).scheduler.config
    schedule = take(folder, prompts=folder / "prompts.txt")[0].info.schedule
    found = schedule["clip_sample"], schedule["steps_offset"]
    assert found == (config.clip_sample, config.steps_offset) == (False, 1)


def test_a_pipelines_denoiser_alone_has_its_pipelines_schedule(ddpm, monkeypatch):
    change(ddpm / SCHEDULE, prediction_type="v_prediction")
    denoiser, notes = take(ddpm / "unet")
    assert not any("schedule is taken" in note for note in notes)
    assert denoiser.info.schedule == take(ddpm)[0].info.schedule
    assert denoiser.info.schedule["prediction_type"] == "v_prediction"
    assert take(ddpm / WEIGHTS)[0].info.schedule == denoiser.info.schedule
    for given in (ddpm / "unet", ddpm / WEIGHTS):
        assert (ddpm / SCHEDULE).resolve() in [path.resolve() for path in files_of(given)]
    monkeypatch.chdir(ddpm / "unet")
    assert take(Path())[0].info.schedule == denoiser.info.schedule

    (ddpm / "model_index.json").unlink()
    denoiser, notes = take(ddpm / "unet")
    assert denoiser.info.schedule["prediction_type"] == "epsilon"
    assert denoiser.info.schedule["clip_sample"] is True and denoiser.info.schedule["steps_offset"] == 0
    assert any("prediction_type epsilon" in note and "clip_sample True" in note for note in notes)
    assert not any(path.name == "scheduler_config.json" for path in files_of(ddpm / "unet"))


def test_latents_without_a_schedule_are_not_taken_to_be_clipped(saved, tmp_path):
    folder = Path(shutil.copytree(saved("dit")[0] / "transformer", tmp_path / "alone"))
    denoiser, notes = take(folder)
    assert denoiser.info.schedule["clip_sample"] is False
    assert any("DiT's schedule is taken" in note and "clip_sample False" in note for note in notes)


@pytest.mark.parametrize(
    "values, fault",
    [
        (dict(beta_schedule="sigmoid"), "sigmoid is not implemented for"),
        (dict(beta_schedule="of my own"), "of my own is not implemented for"),
        (dict(beta_start=5.0, beta_end=9.0), "levels of noise"),
        (dict(beta_start=-1.0), "levels of noise"),
        (dict(beta_start=0.0, beta_end=0.0), "is NaN or Inf"),
        (dict(trained_betas=[0.1, 0.2]), "levels of noise"),
        (dict(trained_betas=["a", "b"]), "DDIMScheduler does not work on the model's schedule"),
        (dict(timestep_spacing="of my own"), "of my own is not supported"),
        (dict(steps_offset=5000), "would visit timestep"),
        (dict(steps_offset=-3), "would visit timestep -3"),
        (dict(steps_offset=0.5), "DDIMScheduler does not work on the model's schedule"),
        (dict(prediction_type="flow_prediction"), "flow_prediction"),
    ],
)
def test_a_schedule_that_cannot_be_walked_is_refused_when_the_model_is_taken_in(ddpm, values, fault):
    change(ddpm / SCHEDULE, **values)
    refused(lambda: take(ddpm), SCHEDULE, fault)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_makes_no_schedule_is_refused(saved, tmp_path, shift):
    path = tmp_path / "scheduler_config.json"
    path.write_text((saved("sd3")[0] / SCHEDULE).read_text())
    assert read_schedule(path)["shift"] == 3.0
    change(path, shift=shift)
    refused(lambda: read_schedule(path), "scheduler_config.json")
