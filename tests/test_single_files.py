"""Single files in the layouts in which models were first published: each gives its folder's network."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from families import unet_condition
from model_files import refused, same_weights
from safetensors.torch import save_file

from pipelines.errors import HqdmError
from pipelines.models.compvis_keys import first_stage_to_compvis, to_compvis
from pipelines.models.denoiser import Denoiser, ModelInfo
from pipelines.models.first_stage import FirstStage
from pipelines.models.single import read_original
from pipelines.models.source import take


def published(denoiser, path):
    """Stable Diffusion's single file of a denoiser and its first stage."""
    config, state = denoiser.network.config, {"cond_stage_model.transformer.position": torch.zeros(2)}
    attention = tuple("CrossAttn" in kind for kind in config.up_block_types)
    for name, value in denoiser.network.state_dict().items():
        if name.startswith("add_embedding."):
            name = name.replace("add_embedding.linear_1", "label_emb.0.0").replace(
                "add_embedding.linear_2", "label_emb.0.2"
            )
        else:
            name = to_compvis(name, config.layers_per_block, attention)
        state[f"model.diffusion_model.{name}"] = value.clone()
    vae = denoiser.first_stage.module()
    for name, value in vae.state_dict().items():
        name = first_stage_to_compvis(name, len(vae.config.block_out_channels))
        if ".attn_1." in name and value.ndim == 2:
            value = value[..., None, None]
        state[f"first_stage_model.{name}"] = value.clone()
    save_file(state, path)
    return state


@pytest.mark.parametrize("model", ["sd", "sd2", "sdxl"])
def test_a_single_file_of_stable_diffusion_is_its_folder(saved, tmp_path, model):
    folder, options = saved(model)
    whole, _ = take(folder, prompts=options["prompts"])
    path = tmp_path / "single.safetensors"
    published(whole, path)
    single, notes = take(path, config=folder, prompts=options["prompts"])
    assert same_weights(single, whole) and notes == [] and single.info == whole.info
    one, other = single.first_stage.module().state_dict(), whole.first_stage.module().state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_single_file_of_stable_diffusion_is_read_by_the_yaml_it_was_published_with(tmp_path):
    network = unet_condition(
        block_out_channels=(32, 64), norm_num_groups=32, attention_head_dim=4, cross_attention_dim=40
    )  # fmt: skip
    stage = AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    info = ModelInfo("unet-condition", (4, 8, 8), 1, "classifier-free", 7.5, {})
    whole = Denoiser(network, {}, info, FirstStage(stage))
    published(whole, tmp_path / "single.safetensors")
    unet = dict(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], attention_resolutions=[1], num_heads=4,
        num_res_blocks=1, context_dim=40, transformer_depth=1,
    )  # fmt: skip
    decoder = dict(ch=32, ch_mult=[1, 2], in_channels=3, out_ch=3, z_channels=4, num_res_blocks=1)
    params = dict(
        linear_start=0.001, linear_end=0.02, timesteps=900, parameterization="v", unet_config=dict(params=unet),
        first_stage_config=dict(params=dict(ddconfig=decoder)),
    )  # fmt: skip
    (tmp_path / "model.yaml").write_text(json.dumps({"model": {"params": params}}))
    save_file({"encoder_hidden_states": torch.randn(2, 5, 40)}, tmp_path / "words.safetensors")
    options = dict(config=tmp_path / "model.yaml", embeddings=tmp_path / "words.safetensors")
    single, _ = take(tmp_path / "single.safetensors", **options)
    assert same_weights(single, whole)
    one, other = single.first_stage.module().state_dict(), stage.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    schedule = single.info.schedule
    assert (schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"]) == (0.001, 0.02, 900)
    assert schedule["prediction_type"] == "v_prediction" and schedule["beta_schedule"] == "scaled_linear"
    unet["model_channels"] = 64
    (tmp_path / "model.yaml").write_text(json.dumps({"model": {"params": params}}))
    refused(lambda: take(tmp_path / "single.safetensors", **options), "single.safetensors", "does not fit")


# Stable Diffusion 3's own names, from its published code: diffusers' name, and the published one
SD3_NAMES = (
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_(q|k)", r"joint_blocks.\1.x_block.\2.ln_\3"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)", r"joint_blocks.\1.context_block.attn.ln_\2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
)


SD3_JOINT = (  # q, k and v are one there
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_q", r"joint_blocks.\1.x_block.\2.qkv", ("to_q", "to_k", "to_v")),
    (r"transformer_blocks\.(\d+)\.(attn)\.add_q_proj", r"joint_blocks.\1.context_block.\2.qkv",
     ("add_q_proj", "add_k_proj", "add_v_proj")),
)  # fmt: skip


def published_sd3(network, prefix):
    mine, state, used = network.state_dict(), {}, set()
    last = f"transformer_blocks.{len(network.transformer_blocks) - 1}.norm1_context."
    for name, value in mine.items():
        for pattern, there, parts in SD3_JOINT:
            if match := re.fullmatch(pattern + r"\.(weight|bias)", name):
                names = [name.replace(parts[0], part) for part in parts]
                state[f"{match.expand(there)}.{name.rpartition('.')[2]}"] = torch.cat([mine[part] for part in names])
                used.update(names)
        for pattern, there in SD3_NAMES:
            if match := re.fullmatch(pattern + r"(\.weight|\.bias|)", name):
                if name.startswith(("norm_out.", last)):  # shift before scale there
                    value = torch.cat(value.chunk(2)[::-1])
                state[match.expand(there) + match[match.re.groups]] = value.clone()
                used.add(name)
    rest = mine.keys() - used
    state |= {name: mine[name].clone() for name in rest}
    assert rest == {"context_embedder.weight", "context_embedder.bias"}
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_of_stable_diffusion_3_is_its_folder(saved, tmp_path, prefix):
    folder, options = saved("sd3")
    whole, _ = take(folder, prompts=options["prompts"])
    save_file(published_sd3(whole.network, prefix), tmp_path / "single.safetensors")
    single, _ = take(tmp_path / "single.safetensors", config=folder, prompts=options["prompts"])
    assert same_weights(single, whole) and single.info == whole.info
    refused(lambda: take(tmp_path / "single.safetensors"), "a single file of a transformer")


def test_a_single_file_that_does_not_say_its_configuration_asks_for_it(saved, tmp_path):
    folder, options = saved("sd")
    path = tmp_path / "single.safetensors"
    published(take(folder, prompts=options["prompts"])[0], path)
    refused(lambda: take(path), "single.safetensors", "does not say its configuration")
    save_file({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2)}, path)
    refused(lambda: take(path), "single.safetensors", "a single file of a transformer")
    save_file({"encoder.weight": torch.zeros(2)}, path)
    refused(lambda: take(path), "its 1 tensors (encoder.weight, …) are of no layout that is known")


def test_a_single_file_of_another_architecture_does_not_fit(saved, tmp_path):
    folder, options = saved("sd")
    path = tmp_path / "single.safetensors"
    published(take(folder, prompts=options["prompts"])[0], path)
    refused(lambda: take(path, config=saved("sd2")[0], prompts=options["prompts"]), "single.safetensors")
    refused(lambda: take(path, config=tmp_path), "no pipeline's folder")


@pytest.mark.parametrize(
    "values, fault",
    [
        (dict(parameterization="x0"), "parameterization 'x0' is not supported"),
        (dict(beta_schedule="cosine"), "beta_schedule 'cosine' is not supported"),
        (dict(timesteps=10**9), "num_train_timesteps cannot be 1000000000"),
        (dict(timesteps=0), "num_train_timesteps cannot be 0"),
        (dict(linear_start=5.0), "levels of noise"),
        (dict(linear_end=9.0), "levels of noise"),
        (dict(linear_start="none"), "ValueError"),
    ],
)
def test_a_published_yamls_schedule_is_checked_as_a_folders_is(tmp_path, values, fault):
    params = dict(linear_start=0.00085, linear_end=0.012, unet_config=dict(params={})) | values
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps({"model": {"params": params}}))
    refused(lambda: read_original(path, {}, path, True), "model.yaml", fault, kind=HqdmError)
