"""Each family calls its network as its diffusers pipeline does, tells it what the pipeline tells it, and knows what
each of its layers is for.
"""

import collections
import json
import sys

import diffusers
import pytest
import torch
from families import TINY, clip, save_tiny, t5, t5_tokenizer
from safetensors.torch import load_file, save_file

from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models.denoiser import Denoiser, ModelInfo, find_sites, load_denoiser, ready, save_denoiser
from pipelines.models.families import FAMILIES, class_of, family_of
from pipelines.models.families.base import CLASSIFIER_FREE
from pipelines.models.prompts import conditions_of, read_embeddings, read_prompts
from pipelines.models.source import take


def network_in(folder):
    """The network of a pipeline's folder or of a model's, and its family."""
    index = folder / "model_index.json"
    part = "" if not index.exists() else "unet" if "unet" in json.loads(index.read_text()) else "transformer"
    kind = json.loads((folder / part / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder / part).eval(), family_of(kind, str(folder))


def denoiser_in(folder, options) -> Denoiser:
    network, family = network_in(folder)
    conditions = family.conditions(network.config)
    if conditions is None:
        conditions, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    guidance, strength = family.guidance(network.config)
    channels, *sides = family.shape(network.config)
    shape = (channels, *(side if "size" not in options else options["size"] // 2 for side in sides))
    rows = len(next(iter(conditions.values()))) - (guidance == CLASSIFIER_FREE) if conditions else 0
    return ready(Denoiser(network, conditions, ModelInfo(family.name, shape, rows, guidance, strength, {})))


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, tmp_path_factory):
    """A row of TINY: its name, folder and denoiser."""
    folder, options = save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    return request.param, folder, denoiser_in(folder, options)


def noise(denoiser, count=2):
    return torch.randn(count, *denoiser.info.shape, generator=torch.Generator().manual_seed(1))


# Sites by role. Each block of a DiT has a timestep embedder of its own, and the output calls block 0's once more.
ROLES = {
    "ddpm": dict(
        first=1, last=1, time=2, residual=16, skip=5, downsample=1, upsample=1, attention=16, **{"time-projection": 8}
    ),
    "dit": dict(first=1, last=1, time=4, modulation=3, attention=8, **{"feed-forward": 4}),
    "pixart": dict(first=1, last=1, time=2, condition=2, modulation=1, attention=16, **{"feed-forward": 4}),
    "sd3": dict(first=1, last=1, time=2, condition=3, modulation=5, attention=19, **{"feed-forward": 6}),
    "flux": dict(first=1, last=1, time=2, condition=5, modulation=4, attention=11, projection=1, **{"feed-forward": 5}),
    "flux-schnell": dict(
        first=1, last=1, time=2, condition=3, modulation=4, attention=11, projection=1, **{"feed-forward": 5}
    ),
}


def test_every_linear_and_convolution_is_one_site_with_its_role(tiny):
    name, _, denoiser = tiny
    sites = find_sites(denoiser)
    layers = {
        key for key, part in denoiser.network.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert sorted(site.name for site in sites) == sorted(layers)
    roles = {site.name: site.role for site in sites}
    assert not any(site.obstacle for site in sites)
    for site in sites:
        if site.role == "residual":
            assert site.weight[2:] == (3, 3) and ".resnets." in site.name
        if "attentions." in site.name or "transformer_blocks." in site.name:
            assert site.role in ("attention", "feed-forward", "projection", "modulation", "time")
    ends = [site for site in sites if site.role in ("first", "last")]
    assert [site.role for site in sorted(ends, key=lambda site: site.role)] == ["first", "last"]
    if name in ROLES:
        assert collections.Counter(roles.values()) == ROLES[name]


def test_no_network_reads_a_layer_past_its_forward(tiny):
    """Quantised layers have no weight to read: with every site hidden behind a module that has only a forward, the
    network answers as before.
    """
    _, _, denoiser = tiny

    class Hidden(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = [inner]

        def forward(self, x):
            return self.inner[0](x)

    network, x, rows = denoiser.network, noise(denoiser), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        expected = denoiser.predict(x, torch.tensor(7.5), rows, 2.0)
        hidden = {site.name: network.get_submodule(site.name) for site in find_sites(denoiser)}
        for name, layer in hidden.items():
            network.set_submodule(name, Hidden(layer))
        try:
            found = denoiser.predict(x, torch.tensor(7.5), rows, 2.0)
        finally:
            for name, layer in hidden.items():
                network.set_submodule(name, layer)
    assert torch.equal(found, expected)


def test_a_saved_denoiser_predicts_the_same_of_one_timestep_and_of_each_images_own(tiny, tmp_path):
    _, _, denoiser = tiny
    save_denoiser(denoiser, tmp_path)
    again = load_denoiser(tmp_path)
    x, rows = noise(denoiser), torch.arange(2) % max(denoiser.info.conditions, 1)
    with torch.no_grad():
        expected = denoiser.predict(x, torch.tensor(400.25), rows, 2.0)
        assert torch.equal(again.predict(x, torch.tensor(400.25), rows, 2.0), expected)
        each = again.predict(x, torch.tensor([400.25, 400.25]), rows, 2.0)
        other = again.predict(x, torch.tensor([400.25, 20.0]), rows, 2.0)
    assert expected.shape == x.shape and expected.std() > 0
    assert torch.allclose(each, expected, atol=1e-6)
    assert torch.allclose(other[0], expected[0], atol=1e-5) and not torch.allclose(other[1], expected[1], atol=1e-4)


PROMPTS = ["a red fox", "a blue house by the sea"]
CALLS = {
    "ddpm": dict(batch_size=2),
    "ldm-uncond": dict(batch_size=2),
    "sd": dict(prompt=PROMPTS, guidance_scale=6.0),
    "sd2": dict(prompt=PROMPTS, guidance_scale=6.0),
    "sdxl": dict(prompt=PROMPTS, guidance_scale=6.0),
    "dit": dict(class_labels=[0, 1], guidance_scale=6.0),
    "pixart": dict(prompt=PROMPTS, guidance_scale=6.0, use_resolution_binning=False),
    "sd3": dict(prompt=PROMPTS, guidance_scale=6.0),
    "flux": dict(prompt=PROMPTS, guidance_scale=6.0, height=16, width=16),
    "flux-schnell": dict(prompt=PROMPTS, guidance_scale=0.0, height=16, width=16),
}


def heard(pipeline, **call):
    """What a pipeline's network is given (positional and by name) and what its scheduler is, at each step."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    given, predicted, step = [], [], pipeline.scheduler.step

    def recorded(output, *args, **kwargs):
        predicted.append(output)
        return step(output, *args, **kwargs)

    hook = network.register_forward_pre_hook(lambda _, args, named: given.append((args, named)), with_kwargs=True)
    pipeline.scheduler.step = recorded
    pipeline.set_progress_bar_config(disable=True)
    if "prompt" in call:
        call["output_type"] = "latent"
    pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)
    hook.remove()
    return given, predicted


def agrees(denoiser, given, predicted, guidance):
    """The denoiser predicts at each step what the pipeline's scheduler was given."""
    flux = denoiser.info.family == "flux"

    def image(tokens):
        side = denoiser.info.shape[1]
        return diffusers.FluxPipeline._unpack_latents(tokens, side, side, 1) if flux else tokens

    assert len(given) == len(predicted) >= 2
    with torch.no_grad():
        for (args, named), output in zip(given, predicted, strict=True):
            x = args[0] if args else named["hidden_states"]
            timestep = args[1] if len(args) > 1 else named["timestep"]
            timestep = timestep.flatten()[0] * denoiser.family.timestep_unit
            found = denoiser.predict(image(x[:2]), timestep, torch.arange(2), guidance)
            expected = image(output[:2, : output.shape[1] if flux else denoiser.info.shape[0]])
            assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
            assert not torch.allclose(found[0], found[1], atol=1e-3)
    return True


def test_a_denoiser_predicts_what_the_pipeline_does(tiny):
    name, folder, denoiser = tiny
    if name == "adm":
        x, rows = noise(denoiser), torch.tensor([1, 3])
        with torch.no_grad():
            expected = denoiser.network(x, 5, class_labels=rows).sample
            assert expected.shape[1] == 6
            assert torch.equal(denoiser.predict(x, torch.tensor(5), rows, 1.0), expected[:, :3])
        return
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    given, predicted = heard(pipeline, **CALLS[name])
    assert agrees(denoiser, given, predicted, CALLS[name].get("guidance_scale", 1.0))


def test_ddim_and_sigma_pipelines_are_called_as_their_elders(tmp_path):
    folder, options = save_tiny("ddpm", tmp_path / "ddpm")
    network = network_in(folder)[0]
    given, predicted = heard(diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()), batch_size=2)
    assert agrees(denoiser_in(folder, options), given, predicted, 1.0)

    folder, options = save_tiny("pixart", tmp_path / "pixart")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "PixArtSigmaPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    denoiser = denoiser_in(folder, options)
    assert denoiser.conditions.encoder_hidden_states.shape == (3, 300, 40)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == "PixArtSigmaPipeline"
    assert agrees(denoiser, *heard(pipeline, **CALLS["pixart"]), 6.0)


@pytest.mark.parametrize("name", [name for name in sorted(CALLS) if "prompt" in CALLS[name]])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(name, tmp_path):
    folder, options = save_tiny(name, tmp_path / name, seed=3)
    network, family = network_in(folder)
    found, labels = conditions_of(family, network.config, folder, options["prompts"], None)
    assert labels == tuple(PROMPTS) == tuple(read_prompts(options["prompts"]))
    given, _ = heard(diffusers.DiffusionPipeline.from_pretrained(folder), **CALLS[name])
    told = {**given[0][1], **(given[0][1].get("added_cond_kwargs") or {})}
    null = family.guidance(network.config)[0] == CLASSIFIER_FREE
    order = [2, 2, 0, 1] if null else [0, 1]
    assert set(found) == set(family.wanted(network.config))
    for key, value in found.items():
        assert value.dtype == torch.float32 and len(value) == 2 + null
        assert all(b in (None, a) for a, b in zip(value.shape[1:], family.wanted(network.config)[key], strict=True))
        assert torch.allclose(value[order], told[key].float(), atol=1e-5), key
    assert not torch.allclose(found["encoder_hidden_states"][0], found["encoder_hidden_states"][1], atol=1e-2)


def test_sdxl_without_zeros_encodes_the_empty_prompt(tmp_path):
    folder, options = save_tiny("sdxl", tmp_path / "sdxl")
    network, family = network_in(folder)
    with_zeros, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    assert not with_zeros["encoder_hidden_states"][-1].any() and not with_zeros["text_embeds"][-1].any()
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    without, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    assert without["encoder_hidden_states"][-1].any() and without["text_embeds"][-1].any()
    assert without["time_ids"].tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 3


def test_sd3_without_t5_reads_zeros_in_its_place(tmp_path):
    folder, options = save_tiny("sd3", tmp_path / "sd3")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "without")
    network, family = network_in(folder)
    found, _ = conditions_of(family, network.config, tmp_path / "without", options["prompts"], None)
    states = found["encoder_hidden_states"]
    assert states.shape == (3, 24 + 256, 48) and not states[:, 24:].any() and states[:, :24].any()
    told = heard(pipeline, **CALLS["sd3"])[0][0][1]
    assert torch.allclose(states[[2, 2, 0, 1]], told["encoder_hidden_states"], atol=1e-5)


def test_pixart_of_1024_pixels_is_told_the_size_that_its_pipeline_says():
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=1, sample_size=128,
        patch_size=16, cross_attention_dim=24, caption_channels=16,
    ).eval()  # fmt: skip
    eight = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipeline = diffusers.PixArtAlphaPipeline(t5_tokenizer(), t5(16), eight, network, scheduler)
    given, predicted = heard(pipeline, prompt=PROMPTS, guidance_scale=3.0)
    assert given[0][1]["added_cond_kwargs"]["resolution"].tolist() == [[1024.0, 1024.0]] * 4
    family = FAMILIES["pixart"]
    assert family.refusals(network.config) == []
    conditions = family.encode(pipeline, PROMPTS)
    info = ModelInfo("pixart", family.shape(network.config), 2, CLASSIFIER_FREE, 4.5, {})
    denoiser = ready(Denoiser(network, {name: value.detach() for name, value in conditions.items()}, info))
    assert agrees(denoiser, given, predicted, 3.0)
    roles = {site.name: site.role for site in find_sites(denoiser)}
    assert {role for name, role in roles.items() if "resolution" in name or "ratio" in name} == {"condition"}


def test_guidance_and_null_conditions_are_the_pipelines_own():
    usual = {name: FAMILIES[name].guidance({}) for name in ("dit", "pixart", "sd3", "unet-condition", "flux")}
    assert usual == {
        "dit": ("classifier-free", 4.0), "pixart": ("classifier-free", 4.5), "sd3": ("classifier-free", 7.0),
        "unet-condition": ("classifier-free", 7.5), "flux": ("none", 1.0),
    }  # fmt: skip
    assert FAMILIES["flux"].guidance({"guidance_embeds": True}) == ("embedded", 3.5)
    assert FAMILIES["dit"].conditions({"num_embeds_ada_norm": 10})["class_labels"].tolist() == list(range(11))
    for name in ("pixart", "sd3", "flux", "unet-condition"):
        assert FAMILIES[name].conditions({}) is None


REFUSED = {
    "unet": [
        (dict(class_embed_type="timestep"), "class_embed_type: timestep"),
        (dict(time_embedding_type="fourier"), "time_embedding_type: fourier"),
        (dict(in_channels=3, out_channels=4), "in_channels: 3 with out_channels: 4"),
        (dict(sample_size=None), "sample_size: None"),
    ],
    "unet-condition": [
        (dict(in_channels=9), "in_channels: 9 with out_channels: 4 (an image beside the noise)"),
        (dict(addition_embed_type="image"), "addition_embed_type: image"),
        (dict(class_embed_type="projection"), "class_embed_type: projection"),
    ],
    "dit": [
        (dict(norm_type="layer_norm"), "norm_type: layer_norm"),
        (dict(out_channels=5), "in_channels: 4 with out_channels: 5"),
        (dict(sample_size=15), "sample_size: 15 with patch_size: 2"),
        (dict(patch_size=0), "sample_size: 8 with patch_size: 0"),
        (dict(sample_size=[8, 16]), "sample_size: [8, 16] with patch_size: 2"),
    ],
    "pixart": [
        (dict(norm_type="ada_norm_zero"), "norm_type: ada_norm_zero"),
        (dict(attention_type="gated"), "attention_type: gated"),
        (dict(in_channels=9), "in_channels: 9 with out_channels: 8"),
    ],
    "sd3": [(dict(in_channels=33), "in_channels: 33 with out_channels: 4")],
    "flux": [
        (dict(in_channels=24, out_channels=16), "in_channels: 24 with out_channels: 16 (an image beside the noise)"),
        (dict(in_channels=18), "in_channels: 18, which is not four times the latents' channels"),
        (dict(in_channels="many"), "in_channels: many, which is not four times the latents' channels"),
        (dict(patch_size=2), "patch_size: 2"),
    ],
}


def test_every_family_names_what_it_does_not_cover_and_takes_the_tiny_one(tiny):
    name, _, denoiser = tiny
    config = dict(denoiser.network.config)
    assert denoiser.family.refusals(config) == []
    for change, message in REFUSED[denoiser.info.family]:
        if name != "adm" or "out_channels" not in change:
            assert message in denoiser.family.refusals({**config, **change})


def test_classes_that_diffusers_renamed_are_known_by_their_norm():
    names = {
        norm: class_of({"_class_name": "Transformer2DModel", "norm_type": norm}) for norm in ("ada_norm_zero", "x")
    }
    assert names == {"ada_norm_zero": "DiTTransformer2DModel", "x": "Transformer2DModel"}
    assert class_of({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}) == "PixArtTransformer2DModel"
    assert class_of({"_class_name": "UNet2DModel"}) == "UNet2DModel"
    with pytest.raises(HqdmError, match="config.json: a Transformer2DModel is not supported"):
        family_of("Transformer2DModel", "config.json")


@pytest.mark.parametrize(("name", "norm"), [("dit", "ada_norm_zero"), ("pixart", "ada_norm_single")])
def test_a_folder_that_states_the_old_class_is_taken_as_the_new_one(name, norm, tmp_path):
    folder, options = save_tiny(name, tmp_path / name)
    expected, _ = take(folder, None, True, options.get("prompts"), None, None)
    config, index = folder / "transformer" / "config.json", folder / "model_index.json"
    assert json.loads(config.read_text())["norm_type"] == norm
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}))
    old = {"transformer": ["diffusers", "Transformer2DModel"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | old))
    found, _ = take(folder, None, True, options.get("prompts"), None, None)
    assert found.info == expected.info
    again = expected.network.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in found.network.state_dict().items())


SDXL = dict(
    cross_attention_dim=40, addition_embed_type="text_time", projection_class_embeddings_input_dim=72,
    addition_time_embed_dim=8,
)  # fmt: skip


def embeddings(**changes):
    """Rows for three prompts and the empty one, as SDXL above wants them."""
    found = {
        "encoder_hidden_states": torch.ones(4, 7, 40), "text_embeds": torch.ones(4, 24), "time_ids": torch.ones(4, 6)
    }  # fmt: skip
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def test_embeddings_come_from_a_file_in_any_precision(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    given = embeddings(text_embeds=torch.randn(4, 24).bfloat16(), time_ids=torch.ones(4, 6, dtype=torch.int64))
    save_file(given, path, metadata={"prompts": json.dumps(["a", "b", "c"])})
    found, labels = conditions_of(FAMILIES["unet-condition"], SDXL, None, None, path)
    assert labels == ("a", "b", "c") and set(found) == set(given)
    assert all(
        value.dtype == torch.float32 and torch.equal(value, given[name].float()) for name, value in found.items()
    )
    save_file(given, path)
    assert conditions_of(FAMILIES["unet-condition"], SDXL, None, None, path)[1] == ()


def test_a_model_whose_guidance_needs_no_null_prompt_is_not_asked_for_it(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    given = {"encoder_hidden_states": torch.randn(4, 7, 24), "pooled_projections": torch.randn(4, 16)}
    save_file(given, path)
    for guided in (False, True):
        config = dict(joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=guided)
        found, _ = conditions_of(FAMILIES["flux"], config, None, None, path)
        assert set(found) == set(given) and all(torch.equal(found[name], given[name][:3]) for name in given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text_embeds=None), "has no text_embeds"),
        (dict(mask=torch.ones(4)), "a UNet2DConditionModel is not told mask"),
        (dict(text_embeds=torch.ones(4, 32)), r"text_embeds is float32 \(4, 32\)"),
        (dict(text_embeds=torch.ones(4, 1, 24)), r"text_embeds is float32 \(4, 1, 24\)"),
        (dict(text_embeds=torch.tensor(1.0)), r"text_embeds is float32 \(\)"),
        (dict(encoder_hidden_states=torch.ones(4, 0, 40)), r"encoder_hidden_states is float32 \(4, 0, 40\)"),
        (dict(text_embeds=torch.ones(4, 24, dtype=torch.complex64)), r"text_embeds is complex64 \(4, 24\)"),
        (dict(text_embeds=torch.ones(3, 24)), "text_embeds has 3 rows where 4 were expected"),
        (dict(time_ids=torch.full((4, 6), float("nan"))), "time_ids holds NaN or Inf"),
    ],
)
def test_faults_of_an_embeddings_file_say_what_was_wanted(changes, message, tmp_path):
    path = tmp_path / "embeddings.safetensors"
    save_file(embeddings(**changes), path)
    with pytest.raises(FileFault, match=message) as caught:
        read_embeddings(FAMILIES["unet-condition"], SDXL, path)
    assert str(path) in caught.value.what
    wanted = "encoder_hidden_states (n + 1, any, 40), text_embeds (n + 1, 24), time_ids (n + 1, 6)"
    assert wanted in caught.value.hint or "NaN" in message


def test_a_mask_is_as_long_as_what_it_masks(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    config = dict(caption_channels=40)
    save_file({"encoder_hidden_states": torch.ones(2, 7, 40), "encoder_attention_mask": torch.ones(2, 8)}, path)
    with pytest.raises(FileFault, match="encoder_attention_mask masks 8 tokens of 7"):
        read_embeddings(FAMILIES["pixart"], config, path)
    save_file({"encoder_hidden_states": torch.ones(2, 7, 40), "encoder_attention_mask": torch.ones(2, 7)}, path)
    assert set(read_embeddings(FAMILIES["pixart"], config, path)[0]) == set(FAMILIES["pixart"].wanted(config))


def test_an_embeddings_file_holds_a_prompt_beside_the_empty_one_and_names_them_all(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    one = {name: value[:1].contiguous() for name, value in embeddings().items()}
    save_file(one, path)
    with pytest.raises(FileFault, match="encoder_hidden_states has 1 rows where 2 were expected"):
        read_embeddings(FAMILIES["unet-condition"], SDXL, path)
    for names in ("[", '{"a": 1}', '["a", 2, "c"]', '["a"]'):
        save_file(embeddings(), path, metadata={"prompts": names})
        with pytest.raises(FileFault, match="the metadata's prompts are not a JSON list of 3 strings"):
            read_embeddings(FAMILIES["unet-condition"], SDXL, path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(FileFault, match="embeddings.safetensors"):
        read_embeddings(FAMILIES["unet-condition"], SDXL, path)
    with pytest.raises(FileFault, match="missing.safetensors"):
        read_embeddings(FAMILIES["unet-condition"], SDXL, tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n# none\n", "holds no prompt"),
        (b"a\n\xff\xfe\n", "line 2 is not UTF-8"),
        (b"a\n" + b"b" * 10_001, "line 2 is longer than 10000 bytes"),
        (b"#\n" + b"a\n" * 10_001, "line 10002 is prompt 10001 of at most 10000"),
    ],
)
def test_faults_of_a_prompts_file_name_the_line(content, message, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(FileFault, match=message):
        read_prompts(path)
    with pytest.raises(FileFault, match="No such file"):
        read_prompts(tmp_path / "missing.txt")


def test_prompts_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Füchslein\r\n\r\n  two  words \n#three\nno newline".encode())
    assert read_prompts(path) == ["ein Füchslein", "two  words", "no newline"]


def test_neither_prompts_nor_embeddings_says_both_ways_out_and_both_is_refused(tmp_path):
    family = FAMILIES["sd3"]
    with pytest.raises(HqdmError, match="a SD3Transformer2DModel reads prompts, and none were given") as caught:
        conditions_of(family, {}, tmp_path, None, None)
    assert "--prompts prompts.txt" in caught.value.hint and "--embeddings file.safetensors" in caught.value.hint
    with pytest.raises(UsageError, match="exclude each other"):
        conditions_of(family, {}, tmp_path, tmp_path / "a.txt", tmp_path / "b.safetensors")


@pytest.fixture
def sd(tmp_path):
    """A folder of Stable Diffusion, what `conditions_of` needs to read its prompts, and how to edit its index."""
    folder, options = save_tiny("sd", tmp_path / "sd")
    network, family = network_in(folder)

    def encode(at=folder, **changes):
        index = json.loads((folder / "model_index.json").read_text()) | changes
        (folder / "model_index.json").write_text(json.dumps(index))
        return conditions_of(family, network.config, at, options["prompts"], None)

    return folder, encode


def test_a_model_without_its_pipeline_has_no_text_encoders(sd):
    folder, encode = sd
    for at in (folder / "unet", None):
        with pytest.raises(HqdmError, match="no pipeline's folder, so it has no text encoders") as caught:
            encode(at)
        assert "--embeddings" in caught.value.hint
    with pytest.raises(HqdmError, match="the pipeline has no text encoders"):
        encode(text_encoder=[None, None])


def test_text_encoders_of_other_libraries_are_refused_before_anything_is_imported(sd, monkeypatch, tmp_path):
    _, encode = sd
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HqdmError, match="the component text_encoder is Encoder of 'elsewhere'"):
        encode(text_encoder=["elsewhere", "Encoder"])
    assert "elsewhere" not in sys.modules


def test_a_text_encoders_configuration_cannot_name_code_to_fetch(sd):
    folder, encode = sd
    expected, _ = encode()
    config = folder / "text_encoder" / "config.json"
    named = {"attn_implementation": "somebody/kernel", "auto_map": {"AutoModel": "code.Model"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    (folder / "text_encoder" / "code.py").write_text("raise SystemExit('imported')")
    found, _ = encode()
    assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text_encoder=["transformers", "pipeline"]), "transformers has no text encoder or tokenizer pipeline"),
        (dict(text_encoder=["transformers", "Nothing"]), "transformers has no text encoder or tokenizer Nothing"),
        (dict(text_encoder="CLIPTextModel"), "the pipeline has no text encoders"),
        (dict(text_encoder=["transformers"]), "the component 'text_encoder' is"),
        (dict(text_encoder=["diffusers", "AutoencoderKL"]), "transformers has no text encoder or tokenizer Autoenc"),
        (dict(_class_name="DDPMPipeline"), "DDPMPipeline is no pipeline of diffusers that encodes prompts"),
        (dict(_class_name="AutoencoderKL"), "AutoencoderKL is no pipeline of diffusers that encodes prompts"),
        (dict(_class_name=["mine", "MyPipeline"]), "is .'mine', 'MyPipeline'., not a class of diffusers"),
        ({"tokenizer/../../elsewhere": ["transformers", "CLIPTokenizer"]}, "elsewhere' is no plain name"),
    ],
)
def test_a_pipelines_index_that_names_something_else_is_refused(sd, changes, message):
    with pytest.raises(HqdmError, match=message):
        sd[1](**changes)


def test_text_encoders_in_pickles_and_damaged_tokenizers_are_refused(sd):
    folder, encode = sd
    weights = folder / "text_encoder" / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(FileFault, match="text_encoder: .*model.safetensors") as caught:
        encode()
    assert "--embeddings" in caught.value.hint
    weights.write_bytes(kept[:100])
    with pytest.raises(FileFault, match="text_encoder/model.safetensors: damaged safetensors: .*cut short"):
        encode()
    weights.write_bytes(kept)
    for path in (folder / "tokenizer").iterdir():
        path.write_text("{")
    with pytest.raises(FileFault, match="tokenizer_config.json: "):
        encode()
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(FileFault, match="tokenizer: "):
        encode()


def test_text_encoders_that_go_with_another_network_or_tokenizer_are_refused(sd, tmp_path):
    folder, encode = sd
    clip(32).save_pretrained(folder / "text_encoder")
    with pytest.raises(FileFault, match=r"encoder_hidden_states is float32 \(3, 24, 32\)") as caught:
        encode()
    assert "encoder_hidden_states (n + 1, any, 40)" in caught.value.hint
    with pytest.raises(FileFault, match="its text encoders failed: "):
        encode(tokenizer=[None, None])


def test_text_encoders_of_half_precision_are_computed_in_fp32(sd):
    folder, encode = sd
    weights = folder / "text_encoder" / "model.safetensors"
    half = {name: value.half() for name, value in load_file(weights).items()}
    save_file({name: value.float() for name, value in half.items()}, weights, metadata={"format": "pt"})
    expected, _ = encode()
    weights.unlink()
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    save_file(half, folder / "text_encoder" / "model.fp16.safetensors", metadata={"format": "pt"})
    found, _ = encode()
    assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_text_encoder_is_never_filled_at_random(sd):
    folder, encode = sd
    weights = folder / "text_encoder" / "model.safetensors"
    whole = load_file(weights)
    lost = next(name for name in whole if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({name: value for name, value in whole.items() if name != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(FileFault, match=r"text_encoder: 1 missing tensors: .*layers\.1\.mlp\.fc1\.weight"):
        encode()
    save_file(whole | {lost: whole[lost][:, :-1].contiguous()}, weights, metadata={"format": "pt"})
    with pytest.raises(FileFault, match="text_encoder: ") as caught:
        encode()
    assert "--embeddings" in caught.value.hint


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_tied_weights_that_stand_once_in_a_file_are_not_missing(kept, tmp_path):
    folder, options = save_tiny("pixart", tmp_path)
    network, family = network_in(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    expected, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    state = load_file(weights)
    assert "shared.weight" in state and "encoder.embed_tokens.weight" not in state
    save_file(state | {kept: state.pop("shared.weight")}, weights, metadata={"format": "pt"})
    found, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000 where the weights have 36 tensors"),
        (dict(intermediate_size=4000), "asks for .* numbers where the weights have"),
        (dict(max_position_embeddings=10**9), "max_position_embeddings is 1000000000"),
        (dict(num_labels=10**7), "num_labels is 10000000"),
        (dict(num_hidden_layers=3), "16 missing tensors"),
        (dict(configuration_files=["../config.4.0.0.json"]), "configuration_files is not supported"),
        (dict(transformers_weights="../model.safetensors"), "transformers_weights is not supported"),
        (dict(quantization_config={"quant_method": "x"}), "quantization_config is not supported"),
    ],
)
def test_a_text_encoders_configuration_asks_for_no_more_than_its_weights_hold(sd, changes, message):
    folder, encode = sd
    edit(folder / "text_encoder" / "config.json", **changes)
    with pytest.raises(FileFault, match=message) as caught:
        encode()
    assert "--embeddings" in caught.value.hint


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "absent.safetensors"])
def test_a_text_encoders_shards_lie_in_its_folder(sd, name):
    folder, encode = sd
    expected, _ = encode()
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    weights.rename(folder / "elsewhere.safetensors")
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
    with pytest.raises(FileFault, match="model.safetensors.index.json: "):
        encode()
    save_file(state, folder / "text_encoder" / "one.safetensors", metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "one.safetensors")}))
    assert torch.equal(encode()[0]["encoder_hidden_states"], expected["encoder_hidden_states"])


def test_an_adapter_beside_a_text_encoder_is_not_followed(sd):
    folder, encode = sd
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(FileFault, match="adapter_config.json: adapters are not supported"):
        encode()


def test_a_tokenizers_configuration_names_no_other_files(sd):
    folder, encode = sd
    edit(folder / "tokenizer" / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    with pytest.raises(FileFault, match="fast_tokenizer_files is not supported"):
        encode()
    edit(folder / "tokenizer" / "tokenizer_config.json", padding=" " * (10 << 20))
    with pytest.raises(FileFault, match="tokenizer_config.json: more than 10485760 bytes"):
        encode()


@pytest.mark.parametrize("length", [10**9, int(1e30)])
def test_a_tokenizer_pads_to_no_more_than_its_encoder_reads(sd, length):
    folder, encode = sd
    expected, _ = encode()
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert torch.equal(encode()[0]["encoder_hidden_states"], expected["encoder_hidden_states"])


@pytest.mark.parametrize("length", [0, -5, "long", True, [77]])
def test_a_tokenizers_length_that_is_none_is_refused(sd, length):
    folder, encode = sd
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(FileFault, match="tokenizer: ") as caught:
        encode()
    assert "--embeddings" in caught.value.hint


def test_an_autoencoder_is_not_built_to_read_prompts(tmp_path):
    folder, options = save_tiny("sdxl", tmp_path)
    network, family = network_in(folder)
    path = folder / "vae" / "config.json"
    edit(path, layers_per_block=10**9, block_out_channels=[8] * 3)
    found, _ = conditions_of(family, network.config, folder, options["prompts"], None)
    assert found["time_ids"][0].tolist() == [32, 32, 0, 0, 32, 32]
    edit(path, block_out_channels=[8] * 17)
    with pytest.raises(FileFault, match="block_out_channels is no list of at most 16"):
        conditions_of(family, network.config, folder, options["prompts"], None)
