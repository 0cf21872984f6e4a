"""The three published CompVis models: equal to an independent implementation, and every key of theirs accounted for."""

import copy

import pytest
import torch
import yaml
from ldm_reference import LatentDiffusion, checkpoint_of

from pipelines.errors import FileFault, HqdmError
from pipelines.models.compvis import fit, load_checkpoint
from pipelines.models.compvis_config import read_config
from pipelines.models.compvis_published import PUBLISHED, recognise

VQ_F4 = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        },
    },
}  # fmt: skip
KL_F8 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        },
    },
}  # fmt: skip
UNCONDITIONAL = "__is_unconditional__"
# `model.params` of the published YAML files, without what is for training alone.
CONFIGS = {
    "cin256-v2": {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 64, "channels": 3,
        "conditioning_key": "crossattn", "use_ema": False,
        "unet_config": {"params": {
            "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192,
            "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 5], "num_heads": 1,
            "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512,
        }},
        "first_stage_config": VQ_F4,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"},
        },
    },
    "lsun_beds256": {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 64, "channels": 3,
        "concat_mode": False,
        "unet_config": {"params": {
            "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224,
            "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4],
            "num_head_channels": 32,
        }},
        "first_stage_config": VQ_F4,
        "cond_stage_config": UNCONDITIONAL,
    },
    "lsun_churches256": {
        "linear_start": 0.0015, "linear_end": 0.0155, "timesteps": 1000, "image_size": 32, "channels": 4,
        "concat_mode": False, "scale_by_std": True,
        "unet_config": {"params": {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192,
            "attention_resolutions": [1, 2, 4, 8], "num_res_blocks": 2, "channel_mult": [1, 2, 2, 4, 4],
            "num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True,
        }},
        "first_stage_config": KL_F8,
        "cond_stage_config": UNCONDITIONAL,
    },
}  # fmt: skip
NAMES = list(CONFIGS)
SIDE = 16  # of the reduced models' latents: halved four times, one pixel is left


def reduced(name):
    """The structure of a published configuration, narrow."""
    params = copy.deepcopy(CONFIGS[name])
    unet, first = params["unet_config"]["params"], params["first_stage_config"]["params"]
    params["image_size"] = SIDE
    unet["model_channels"] = first["ddconfig"]["ch"] = 32
    if "n_embed" in first:
        first["n_embed"] = 64
    if params["cond_stage_config"] != UNCONDITIONAL:
        unet["context_dim"] = params["cond_stage_config"]["params"]["embed_dim"] = 48
        params["cond_stage_config"]["params"]["n_classes"] = 11
    return params


def random_model(params, seed):
    """Every weight random: those that begin as ones and zeros too."""
    torch.manual_seed(seed)
    model = LatentDiffusion(params).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn(value.shape))
        if hasattr(model.first_stage_model, "quantize"):
            model.first_stage_model.quantize.embedding.weight.normal_()
    return model


def written(folder, params, state):
    """model.ckpt with its YAML beside it."""
    torch.save({"state_dict": state, "global_step": 1}, folder / "model.ckpt")
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return folder / "model.ckpt"


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    """A reduced model: its configuration, its raw and averaged selves in double precision, and the file of both."""
    params = reduced(request.param)
    raw, averaged = random_model(params, 0), random_model(params, 1)
    path = written(tmp_path_factory.mktemp("reduced"), params, checkpoint_of(raw, averaged))
    averaged.first_stage_model = raw.first_stage_model  # there are no averages of these
    if hasattr(raw, "cond_stage_model"):
        averaged.cond_stage_model = raw.cond_stage_model
    return params, {False: raw.double(), True: averaged.double()}, path


@pytest.mark.parametrize("ema", [True, False])
@torch.no_grad()
def test_epsilon_and_images_are_those_of_the_architecture_by_its_definition(model, ema):
    params, models, path = model
    denoiser, left_out = load_checkpoint(path, ema=ema)
    channels = params["channels"]
    torch.manual_seed(2)
    x = torch.randn(2, channels, SIDE, SIDE)
    conditional = params["cond_stage_config"] != UNCONDITIONAL
    assert denoiser.info.shape == x.shape[1:] and left_out == []
    found = {}
    for timestep in (17, 801):
        for row in (3, 10) if conditional else (0,):  # 10 is the null class
            rows, times = torch.full((2,), row), torch.full((2,), timestep)
            found[timestep, row] = denoiser.predict(x, torch.tensor(timestep), rows, 1.0)
            wanted = models[ema].predict(x.double(), times, rows if conditional else None)
            other = models[not ema].predict(x.double(), times, rows if conditional else None)
            assert (found[timestep, row] - wanted).abs().max() <= 1e-5
            assert (wanted - other).abs().max() > 0.1  # the raw weights and their averages are two models
    values = list(found.values())
    assert all((values[0] - value).abs().max() > 1e-3 for value in values[1:])
    images = denoiser.first_stage.decode(x)
    assert (images - models[ema].decode(x.double())).abs().max() <= 2e-5 and images.std() > 0.05
    assert images.shape[-1] == SIDE * denoiser.first_stage.factor


@torch.no_grad()
def test_the_first_stages_encoder_is_the_checkpoints_too(model):
    params, models, path = model
    module = load_checkpoint(path)[0].first_stage.module()
    torch.manual_seed(3)
    images = torch.randn(1, 3, 32, 32)
    encoded = module.encode(images)
    moments = encoded.latent_dist.parameters if "latent_dist" in encoded else encoded.latents
    assert (moments - models[False].first_stage_model.moments(images.double())).abs().max() <= 1e-5


@torch.no_grad()
def test_a_saved_model_is_the_one_that_was_loaded(model, tmp_path):
    from pipelines.models.denoiser import load_denoiser, save_denoiser

    params, _, path = model
    denoiser = load_checkpoint(path)[0]
    save_denoiser(denoiser, tmp_path)
    again = load_denoiser(tmp_path)
    x, rows = torch.randn(1, params["channels"], SIDE, SIDE), torch.zeros(1, dtype=torch.int64)
    assert again.info == denoiser.info
    before, after = (one.predict(x, torch.tensor(301), rows, 1.0) for one in (denoiser, again))
    assert torch.allclose(before, after, rtol=0, atol=1e-5)
    assert torch.equal(again.first_stage.decode(x), denoiser.first_stage.decode(x))


def test_what_a_model_can_be_told_and_guided_by(model):
    params, _, path = model
    info = load_checkpoint(path)[0].info
    if params["cond_stage_config"] == UNCONDITIONAL:
        assert (info.family, info.conditions, info.guidance, info.strength) == ("unet", 0, "none", 1.0)
    else:
        assert (info.family, info.conditions) == ("unet-condition", 10)
        assert (info.guidance, info.strength) == ("classifier-free", 1.5)
    assert info.schedule["beta_end"] == params["linear_end"] and info.source.endswith("moving averages")


def test_weights_that_are_single_precision_stay_where_the_file_is_mapped(model):
    _, _, path = model
    denoiser = load_checkpoint(path, ema=False)[0]
    state = torch.load(path, mmap=True, weights_only=True)["state_dict"]
    # A mapped file's storages lie in it one after the other; copies would lie anywhere.
    mine = denoiser.network.conv_in.weight.data_ptr() - denoiser.first_stage.module().quant_conv.weight.data_ptr()
    theirs = (
        state["model.diffusion_model.input_blocks.0.0.weight"].data_ptr()
        - state["first_stage_model.quant_conv.weight"].data_ptr()
    )
    assert mine == theirs


def full(name):
    """A state dict at the published width that takes no memory."""
    with torch.device("meta"):
        model = LatentDiffusion(CONFIGS[name])
        return checkpoint_of(model, model)


COUNTS = {  # parameters of the UNet and of the first stage
    "cin256-v2": (400_920_579, 55_322_782),
    "lsun_beds256": (274_056_163, 55_322_782),
    "lsun_churches256": (294_966_916, 83_653_863),
}


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_at_full_width_every_key_is_used_and_every_parameter_filled(tmp_path, name, ema):
    state = full(name)
    fitted = fit(state, PUBLISHED[name], tmp_path / "model.ckpt", name, ema)
    assert fitted.averaged == ema
    used = set()
    for module, sources in ((fitted.network, fitted.sources), (fitted.first_stage, fitted.first_stage_sources)):
        values = module.state_dict()
        assert set(sources) == set(values)
        for target, source in sources.items():
            assert source.read(state[source.key]).shape == values[target].shape, target
        used |= {source.key for source in sources.values()}
    prefix = "model_ema.diffusion_model" if ema else "model.diffusion_model."
    weights = {key for key in state if key.startswith((prefix, "first_stage_model."))}
    assert used == weights - {"first_stage_model.loss.logvar"}
    counted = tuple(sum(value.numel() for value in one.parameters()) for one in (fitted.network, fitted.first_stage))
    assert counted == COUNTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_is_known_by_its_tensors_and_its_yaml_says_the_same(tmp_path, name):
    assert recognise(full(name), tmp_path / "model.ckpt") == (name, PUBLISHED[name])
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": CONFIGS[name]}}))
    assert read_config(tmp_path / "model.yaml") == PUBLISHED[name]


def test_a_structure_that_is_not_known_is_told_as_it_was_read(model, tmp_path):
    params, _, path = model
    bare = tmp_path / "model.ckpt"
    bare.symlink_to(path)
    with pytest.raises(FileFault, match="no configuration beside it .*of no published model") as caught:
        load_checkpoint(bare)
    unet = params["unet_config"]["params"]
    widths = tuple(32 * multiplier for multiplier in unet["channel_mult"])
    levels = tuple(sorted(resolution.bit_length() - 1 for resolution in unet["attention_resolutions"]))
    assert f"widths {widths}, residual_blocks 2, attention_levels {levels}" in caught.value.what
    assert "--config" in caught.value.hint
    assert load_checkpoint(bare, path.with_suffix(".yaml"))[0].info.shape == (params["channels"], SIDE, SIDE)


def test_a_model_that_is_known_by_its_tensors_needs_no_yaml(model, tmp_path, monkeypatch):
    params, _, path = model
    bare = tmp_path / "model.ckpt"
    bare.symlink_to(path)
    monkeypatch.setitem(PUBLISHED, "narrow", read_config(path.with_suffix(".yaml")))
    info, told = load_checkpoint(bare)[0].info, load_checkpoint(path)[0].info
    assert info.source == "CompVis checkpoint, narrow, moving averages"
    assert (info.shape, info.schedule, info.options) == (told.shape, told.schedule, told.options)


def test_a_file_without_a_compvis_unet_says_what_it_holds(tmp_path):
    torch.save({"transformer.weight": torch.ones(2)}, tmp_path / "model.ckpt")
    with pytest.raises(FileFault, match="no UNet of CompVis latent-diffusion.*transformer.weight"):
        load_checkpoint(tmp_path / "model.ckpt")


SPOILED = {
    "missing: model_ema.diffusion_modelout0bias;": lambda state: state.pop("model_ema.diffusion_modelout0bias"),
    "missing: first_stage_model.decoder.conv_in.bias;": lambda state: state.pop(
        "first_stage_model.decoder.conv_in.bias"
    ),
    "unexpected: model.diffusion_model.label_emb.weight;": lambda state: state.update(
        {"model.diffusion_model.label_emb.weight": torch.ones(1)}
    ),
    "unexpected: first_stage_model.decoder.extra;": lambda state: state.update(
        {"first_stage_model.decoder.extra": torch.ones(1)}
    ),
    "shapes: model_ema.diffusion_modelout0bias: (3,) in the file, (32,) by the configuration": lambda state: (
        state.update({"model_ema.diffusion_modelout0bias": torch.ones(3)})
    ),
    "shapes: first_stage_model.decoder.mid.attn_1.q.weight: (2,) in the file": lambda state: state.update(
        {"first_stage_model.decoder.mid.attn_1.q.weight": torch.ones(2)}
    ),
    "shapes: model_ema.diffusion_modelout0bias: torch.int64 in the file": lambda state: state.update(
        {"model_ema.diffusion_modelout0bias": torch.ones(32, dtype=torch.int64)}
    ),
}


@pytest.mark.parametrize("model", ["lsun_beds256"], indirect=True)
@pytest.mark.parametrize("told", SPOILED)
def test_a_key_that_is_missing_unexpected_or_of_another_shape_is_listed(model, tmp_path, told):
    params, _, path = model
    state = torch.load(path, weights_only=True)["state_dict"]
    SPOILED[told](state)
    with pytest.raises(FileFault) as caught:
        load_checkpoint(written(tmp_path, params, state))
    assert told in caught.value.what and "model.yaml" in caught.value.what


NAMELESS = {
    "cin256-v2": ("cond_stage_model.embedding.weight", torch.ones(11, 5)),
    "lsun_beds256": ("first_stage_model.quantize.embedding.weight", torch.full((64, 3), torch.nan)),
    "lsun_churches256": ("scale_factor", torch.tensor(0.0)),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_cannot_be_is_refused_by_its_key(tmp_path, name):
    params, (key, value) = reduced(name), NAMELESS[name]
    model = random_model(params, 0)
    state = checkpoint_of(model, model) | {key: value}
    with pytest.raises(FileFault, match=key.removeprefix("first_stage_model.")):
        load_checkpoint(written(tmp_path, params, state))


def test_a_scale_factor_that_the_configuration_promises_is_missed(tmp_path):
    params = reduced("lsun_churches256")
    model = random_model(params, 0)
    state = checkpoint_of(model, model)
    del state["scale_factor"]
    with pytest.raises(FileFault, match="missing: scale_factor"):
        load_checkpoint(written(tmp_path, params, state))


def test_the_only_weights_of_a_model_that_keeps_no_averages_are_taken(tmp_path):
    params = reduced("cin256-v2")
    state = random_model(params, 0).state_dict()
    denoiser = load_checkpoint(written(tmp_path, params, state))[0]
    assert torch.equal(denoiser.network.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"])
    assert denoiser.info.source.endswith("raw weights")
    with pytest.raises(FileFault, match="holds no moving averages"):
        load_checkpoint(written(tmp_path, params | {"use_ema": True}, state))


def test_half_precision_becomes_single(tmp_path):
    params = reduced("lsun_churches256")
    state = checkpoint_of(random_model(params, 0), random_model(params, 1))
    halves = {key: value.half() if value.ndim else value for key, value in state.items() if "alphas" not in key}
    denoiser = load_checkpoint(written(tmp_path, params, halves))[0]
    modules = denoiser.network, denoiser.first_stage.module()
    assert {value.dtype for module in modules for value in module.parameters()} == {torch.float32}


def change(params, place, values):
    for name in place:
        params = params[name]
    params.update(values)


UNET, FIRST = ("unet_config", "params"), ("first_stage_config", "params")
INNER = (*FIRST, "ddconfig")
REFUSED = [
    ("lsun_beds256", UNET, {"use_spatial_transformer": True, "context_dim": 32}, "use_spatial_transformer: True"),
    ("lsun_beds256", UNET, {"use_new_attention_order": True}, "use_new_attention_order: True"),
    ("lsun_beds256", UNET, {"conv_resample": False}, "conv_resample: False"),
    ("lsun_beds256", UNET, {"num_classes": 10}, "num_classes: 10"),
    ("lsun_beds256", UNET, {"in_channels": 6}, "in_channels: 6 with out_channels: 3"),
    ("lsun_beds256", (), {"beta_schedule": "cosine"}, "beta_schedule: cosine"),
    ("lsun_beds256", INNER, {"attn_resolutions": [32]}, "ddconfig.attn_resolutions: (32,)"),
    ("lsun_beds256", INNER, {"double_z": True}, "ddconfig.double_z: True"),
    ("lsun_beds256", FIRST, {"embed_dim": 8}, "embed_dim: 8 with in_channels: 3"),
    ("lsun_beds256", FIRST, {"remap": "used.npy"}, "remap: used.npy"),
    ("lsun_churches256", UNET, {"num_heads_upsample": 4}, "num_heads_upsample: 4"),
    ("lsun_churches256", INNER, {"z_channels": 8}, "embed_dim: 4 with z_channels: 8"),
    ("lsun_churches256", ("first_stage_config",), {"target": "a.VQModel"}, "first_stage_config: a.VQModel"),
    ("cin256-v2", (), {"conditioning_key": "concat"}, "conditioning_key: concat"),
    ("cin256-v2", (), {"conditioning_key": None}, "conditioning_key: concat"),  # as LatentDiffusion settles it
    ("cin256-v2", ("cond_stage_config",), {"target": "a.BERTEmbedder"}, "cond_stage_config: a.BERTEmbedder"),
    ("cin256-v2", (), {"first_stage_config": {"target": "IdentityFirstStage"}, "scale_factor": 0.5}, "a scale_factor"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "values", "told"), REFUSED)
def test_what_the_architecture_does_not_cover_is_refused_by_its_key(tmp_path, name, place, values, told):
    params = reduced(name)
    change(params, place, values)
    path = written(tmp_path, params, {"a": torch.ones(1)})
    with pytest.raises(HqdmError, match="not supported") as caught:
        load_checkpoint(path)
    assert told in caught.value.what


@pytest.mark.parametrize(
    ("place", "values", "told"),
    [
        (FIRST, {"n_embed": None}, "n_embed is missing"),
        (FIRST, {"ddconfig": None}, "ddconfig is missing"),
        (INNER, {"ch": 40}, "ddconfig.ch 40"),
        (INNER, {"ch_mult": []}, "ddconfig.ch 32"),
        (INNER, {"num_res_blocks": 0}, "ddconfig.num_res_blocks cannot be 0"),
        ((), {"image_size": -1}, "image_size cannot be -1"),
        ((), {"image_size": 1 << 40}, "image_size cannot be 1099511627776"),
        ((), {"timesteps": 1 << 40}, "make no schedule"),
        ((), {"scale_factor": 0}, "scale_factor cannot be 0"),
        (UNET, {"channel_mult": [1, 1 << 12]}, "model_channels · channel_mult cannot be 131072"),
        (UNET, {"num_res_blocks": 1 << 12}, "1 tensors in the file, more than 16391 modules"),
        (("cond_stage_config",), {"params": 3}, "cond_stage_config.params cannot be 3"),
    ],
)
def test_a_first_stage_or_size_that_cannot_be_is_named(tmp_path, place, values, told):
    params = reduced("cin256-v2")
    change(params, place, values)
    path = written(tmp_path, params, {"a": torch.ones(1)})
    with pytest.raises(FileFault) as caught:
        load_checkpoint(path)
    assert told in caught.value.what and "model.yaml" in caught.value.what and caught.value.hint
