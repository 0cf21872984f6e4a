"""Checkpoints in the CompVis layout: safe to read, complete, and equal to diffusers' own conversion."""

import pickle
import sys
import zipfile

import pytest
import torch
import yaml

from pipelines.digits import CHECKPOINT
from pipelines.errors import FileFault, HqdmError
from pipelines.models.checkpoint import read_checkpoint
from pipelines.models.compvis import load_checkpoint
from pipelines.models.compvis_config import find_config, read_config
from pipelines.quant.spec import Site


@pytest.fixture(scope="module")
def denoiser():
    return load_checkpoint(CHECKPOINT)[0]


def test_the_embedded_checkpoint_is_small_and_has_both_sets_of_weights():
    assert CHECKPOINT.stat().st_size <= 8_000_000
    state, _ = read_checkpoint(CHECKPOINT)
    raw = [key for key in state if key.startswith("model.diffusion_model.")]
    averaged = [key for key in state if key.startswith("model_ema.diffusion_model")]
    assert len(raw) == len(averaged) > 100
    assert state["cond_stage_model.embedding.weight"].shape == (11, 64)


def test_raw_and_averaged_weights_differ_and_each_can_be_chosen(denoiser):
    raw = load_checkpoint(CHECKPOINT, ema=False)[0]
    assert not torch.equal(raw.network.conv_in.weight, denoiser.network.conv_in.weight)


def test_epsilon_equals_that_of_diffusers_own_conversion():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = load_checkpoint(CHECKPOINT, ema=False)[0]
    state, _ = read_checkpoint(CHECKPOINT)
    state = {key: value.float() for key, value in state.items() if key.startswith("model.diffusion_model.")}
    theirs = UNet2DConditionModel.from_config(ours.network.config)
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, dict(theirs.config)))
    x, timestep, context = torch.randn(2, 1, 16, 16), torch.tensor(401), torch.randn(2, 1, 64)
    with torch.no_grad():
        mine = ours.network(x, timestep, encoder_hidden_states=context).sample
        reference = theirs.eval()(x, timestep, encoder_hidden_states=context).sample
    assert torch.allclose(mine, reference, atol=1e-5)


class Payload:
    def __reduce__(self):
        import os

        return (os.system, ("echo run > ran.txt",))


def test_a_pickle_that_names_code_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Payload()}, "evil.ckpt")
    with pytest.raises(FileFault, match="system"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran.txt").exists()


def test_known_wrappers_are_stubbed_and_named(tmp_path):
    path = tmp_path / "wrapped.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    pickled = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    # {"callbacks": ModelCheckpoint, **content}: the global is put into the dictionary that torch wrote.
    content = members[name]
    assert content.startswith(b"\x80\x02}")
    members[name] = b"\x80\x02}X\x09\x00\x00\x00callbacks" + pickled + b"s" + content[3:].replace(b"q\x00", b"q\x00", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for member, value in members.items():
            archive.writestr(member, value)
    state, left_out = read_checkpoint(path)
    assert list(state) == ["a"] and left_out == ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]


@pytest.mark.parametrize("cut", [0, 10, 1000, 100_000, -1])
def test_a_cut_or_foreign_file_is_named_with_the_way_out(tmp_path, cut):
    path = tmp_path / "model.ckpt"
    path.write_bytes(CHECKPOINT.read_bytes()[:cut])
    with pytest.raises(FileFault, match="model.ckpt") as caught:
        read_checkpoint(path)
    assert caught.value.hint


def test_a_plain_pickle_is_not_opened(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileFault, match="not a torch checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {"state_dict": {1: torch.ones(1)}}, [torch.ones(1)]])
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(FileFault, match="holds no tensors under names"):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "pickled", [b"", b".", b"\x80\x02X\x05\x00", b"\x80\x02K\x01K\x02\x86b.", b"\x80\x02]K\x01h\x07."]
)
def test_a_damaged_pickle_is_named_whatever_torch_makes_of_it(tmp_path, pickled):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else value)
    with pytest.raises(FileFault, match="damaged checkpoint: .") as caught:
        read_checkpoint(path)
    assert caught.value.hint


def changed_config(tmp_path, change):
    params = yaml.safe_load(find_config(CHECKPOINT).read_text())
    change(params["model"]["params"])
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


def test_a_configuration_of_another_model_lists_missing_and_unexpected_names(tmp_path):
    path = changed_config(tmp_path, lambda params: params["unet_config"]["params"].update(num_res_blocks=2))
    with pytest.raises(FileFault, match="missing: model_ema.*unexpected: ") as caught:
        load_checkpoint(CHECKPOINT, path)
    assert "--config" in caught.value.hint


def test_an_architecture_that_is_not_supported_is_refused_by_its_key(tmp_path):
    path = changed_config(tmp_path, lambda params: params["unet_config"]["params"].update(use_scale_shift_norm=True))
    with pytest.raises(HqdmError, match="use_scale_shift_norm: True"):
        load_checkpoint(CHECKPOINT, path)


def test_a_yaml_that_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(FileFault, match="not the configuration"):
        read_config(tmp_path / "other.yaml")


UNET = "model.params.unet_config.params"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda params: params["unet_config"]["params"].pop("channel_mult"), f"'{UNET}.channel_mult' is missing"),
        (lambda params: params["unet_config"]["params"].update(channel_mult=3), f"{UNET}.channel_mult cannot be 3"),
        (lambda params: params["unet_config"]["params"].update(channel_mult=[]), "channel_mult is empty"),
        (lambda params: params["unet_config"]["params"].update(context_dim="64"), f"{UNET}.context_dim cannot be '64'"),
        (lambda params: params["unet_config"]["params"].update(num_head_channels=0), "num_head_channels cannot be 0"),
        (lambda params: params["unet_config"]["params"].pop("num_head_channels"), "num_heads and num_head_channels"),
        (lambda params: params["unet_config"]["params"].update(model_channels=40), "= 40 does not divide by 32"),
        (lambda params: params.pop("linear_start"), "'model.params.linear_start' is missing"),
        (lambda params: params.update(linear_end=-1), "make no schedule"),
        (lambda params: params.update(first_stage_config="identity"), "model.params.first_stage_config cannot be 'id"),
    ],
)
def test_a_missing_or_wrong_key_is_named_with_its_file(tmp_path, change, what):
    path = changed_config(tmp_path, change)
    with pytest.raises(FileFault) as caught:
        read_config(path)
    assert what in caught.value.what and str(path) in caught.value.what and caught.value.hint


def test_numbers_are_read_as_people_write_them_and_a_key_given_twice_is_refused(tmp_path):
    text = find_config(CHECKPOINT).read_text()
    path = tmp_path / "model.yaml"
    path.write_text(text.replace("0.0015", "15e-4"))
    assert read_config(path).linear_start == 0.0015
    path.write_text(text.replace("timesteps: 1000", "timesteps: 1000\n    timesteps: 500"))
    with pytest.raises(FileFault, match="given twice"):
        read_config(path)


def test_a_model_that_predicts_something_else_than_noise_is_refused(tmp_path):
    with pytest.raises(HqdmError, match="parameterization: x0"):
        load_checkpoint(CHECKPOINT, changed_config(tmp_path, lambda params: params.update(parameterization="x0")))


def test_a_network_that_predicts_v_says_so_in_its_schedule(tmp_path):
    v = load_checkpoint(CHECKPOINT, changed_config(tmp_path, lambda params: params.update(parameterization="v")))[0]
    assert v.info.schedule["prediction_type"] == "v_prediction"
    assert "prediction_type" not in load_checkpoint(CHECKPOINT)[0].info.schedule


@pytest.mark.parametrize("schedule", [{"linear_end": 0.02}, {"timesteps": 500}])
def test_a_schedule_that_is_not_the_checkpoints_own_is_refused(tmp_path, schedule):
    with pytest.raises(FileFault, match="alphas_cumprod are not the schedule"):
        load_checkpoint(CHECKPOINT, changed_config(tmp_path, lambda params: params.update(schedule)))


@pytest.mark.parametrize("name", ["model.ckpt", "model.yaml"])
def test_a_file_that_changed_after_it_was_hashed_is_named(tmp_path, name):
    from pipelines import runner
    from pipelines.workspace.store import Store

    (tmp_path / "model.ckpt").write_bytes(CHECKPOINT.read_bytes())
    (tmp_path / "model.yaml").write_bytes(find_config(CHECKPOINT).read_bytes())
    config = runner.model_config(tmp_path / "model.ckpt")
    with open(tmp_path / name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(FileFault, match="model.ckpt, or a file that goes with it, was changed"):
        runner.make(Store(tmp_path / "ws"), "model", config)


def test_training_goes_on_only_with_the_options_it_began_with(tmp_path, monkeypatch):
    from pipelines.digits import train

    def typed(*options):
        monkeypatch.setattr(sys, "argv", ["train", "--work", str(tmp_path), "--batch", "2", *options])
        train.main()

    shipped = CHECKPOINT.read_bytes()
    typed("--steps", "1")
    assert (tmp_path / "model.ckpt").exists() and CHECKPOINT.read_bytes() == shipped
    for options, what in ((("--steps", "2"), "steps 1, not 2"), (("--steps", "1", "--seed", "5"), "seed 0, not 5")):
        with pytest.raises(SystemExit, match=what):
            typed(*options)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "seed"}, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="seed not known, not 0"):
        typed("--steps", "1")


def test_a_checkpoint_without_a_configuration_says_how_to_name_one(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(CHECKPOINT.read_bytes())
    with pytest.raises(FileFault, match="no configuration beside it"):
        load_checkpoint(path)


def test_the_sites_have_roles_ranks_and_positions(denoiser):
    from pipelines.models.denoiser import find_sites

    sites = find_sites(denoiser)
    assert len({site.role for site in sites}) == 11
    by_name = {site.name: site for site in sites}
    assert by_name["conv_in"].positions == (16, 16) and by_name["time_embedding.linear_1"].rank == 2
    assert by_name["mid_block.attentions.0.transformer_blocks.0.ff.net.2"].rank == 3


def test_the_samples_are_the_digits_that_were_asked_for(denoiser):
    from pipelines import diffusion
    from pipelines.digits.classifier import accuracy, load_classifier
    from pipelines.digits.data import held_out_split

    images, labels = held_out_split()
    judge = load_classifier()
    assert accuracy(judge, images, labels) >= 0.97
    indices = list(range(50))
    classes = diffusion.conditions_of(0, indices, 10)
    schedule = denoiser.info.schedule
    samples = diffusion.sample(denoiser, "DDIMScheduler", schedule, 20, (1, 16, 16), classes, 1.5, 0.0, 0, indices)
    assert accuracy(judge, denoiser.decode(samples), classes) >= 0.97


def test_the_embedded_models_four_bit_layers_take_at_most_0_14_of_their_fp32_bytes(denoiser):
    from pipelines.quant.affine import choose, quantise
    from pipelines.quant.integers import IntegerWeights
    from pipelines.quant.spec import SitePlan

    packed = floats = 0
    for name, module in denoiser.network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.shape[1] > 1:
            site = SitePlan(Site(name, "linear", "attention", tuple(module.weight.shape)), True, weight_bits=4,
                            weight_quantiser="asymmetric")  # fmt: skip
            scale, zero = choose(module.weight.flatten(1), *site.weight_range, steps=2)
            shape = (-1, *[1] * (module.weight.ndim - 1))
            codes = quantise(module.weight, scale.view(shape), zero.view(shape), *site.weight_range)
            centred = codes - zero.view(shape)
            tensors = IntegerWeights(site, centred.short(), zero.short(), scale, module.bias).packed().tensors
            packed += sum(value.numel() * value.element_size() for value in tensors.values()) + 2 * 4 * 20  # tables
            floats += 4 * (module.weight.numel() + (0 if module.bias is None else module.bias.numel()))
    assert packed / floats <= 0.14
