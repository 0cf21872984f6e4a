"""What a model is read from: every format gives the same network, every fault names the file and the way out."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from families import save_tiny, unet_condition
from safetensors.torch import load_file, save_file

from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models import checkpoint
from pipelines.models import folder as reader
from pipelines.models.checkpoint import read_checkpoint, read_tensors
from pipelines.models.compvis_keys import first_stage_to_compvis, to_compvis
from pipelines.models.denoiser import Denoiser, ModelInfo
from pipelines.models.first_stage import FirstStage
from pipelines.models.source import files_of, read_json, take

CHECKPOINT = Path(__file__).parents[1] / "pipelines" / "digits" / "model.ckpt"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refused(call, *names, kind=FileFault):
    """The message of the error that `call` raises; it must name all of `names` and a way out."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint
    for name in names:
        assert name in caught.value.what
    return caught.value.what


# Torch archives


class Store:
    """A storage of `count` numbers in the record data/0."""

    def __init__(self, count, kind=torch.FloatStorage):
        self.count, self.kind = count, kind


class Claim:
    """A tensor as a pickle describes it, true or not."""

    def __init__(self, store, size, stride, offset=0):
        self.args = (store, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


def forge(path, content, record=b"\0" * 16, compress=zipfile.ZIP_STORED, **others):
    """An archive as torch.save writes one, with a pickle of `content` and one record of data."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", value.kind, "0", "cpu", value.count) if isinstance(value, Store) else None

    with zipfile.ZipFile(path, "w", compress) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                Pickler(file, protocol=2).dump(content)
        archive.writestr("archive/data/0", record)
        for name, value in others.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", value)
    return path


def test_a_checkpoint_reads_as_torch_reads_it_without_a_copy():
    state, left_out = read_checkpoint(CHECKPOINT)
    theirs = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert state.keys() == {key for key, value in theirs.items() if isinstance(value, torch.Tensor)} and not left_out
    for key, value in state.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    regions = mapped_regions(CHECKPOINT.name)
    assert all(any(low <= value.data_ptr() < high for low, high in regions) for value in state.values())


def mapped_regions(name):
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    return [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]


def test_every_dtype_stride_offset_and_tie_of_a_state_dict_is_kept(tmp_path):
    base = torch.arange(24.0)
    kinds = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    content = {kind: torch.arange(6).to(getattr(torch, kind)).reshape(2, 3) for kind in kinds}
    content |= {"view": base[4:20].view(4, 4).t()[1:], "tied": base, "again": base, "none": torch.zeros(0, 3)}
    content["parameter"] = torch.nn.Parameter(torch.randn(3, 1, 2))
    torch.save(content, tmp_path / "all.pt")
    state, _ = read_tensors(tmp_path / "all.pt")
    assert state.keys() == content.keys()
    for name, value in content.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value.detach()), name


def test_files_are_told_apart_by_what_is_in_them_not_by_their_names(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "one.ckpt")
    torch.save({"a": torch.ones(3)}, tmp_path / "two.safetensors")
    for name in ("one.ckpt", "two.safetensors"):
        state, _ = read_tensors(tmp_path / name)
        assert torch.equal(state["a"], torch.ones(3))


@pytest.mark.parametrize(
    "content, fault",
    [
        ({"a": Claim(Store(4), (1 << 40,), (0,))}, "a tensor of shape (1099511627776,) with strides (0,)"),
        ({"a": Claim(Store(4), (2, 2), (0, 1)), "b": Claim(Store(4), (2, 4), (0, 1))}, "a tensor of shape (2, 4)"),
        ({"a": Claim(Store(4), (4,), (2,))}, "in a storage of 4 numbers"),
        ({"a": Claim(Store(4), (4,), (1,), offset=1)}, "in a storage of 4 numbers"),
        ({"a": Claim(Store(4), (-4,), (1,))}, "not whole numbers"),
        ({"a": Claim(Store(4), (4, 1), (1,))}, "not whole numbers"),
        ({"a": Claim(Store(1 << 40), (4,), (1,))}, "a storage claims 4398046511104 bytes"),
        ({"a": Claim(Store(5), (4,), (1,))}, "a storage claims 20 bytes, its record data/0 has 16"),
    ],
)  # fmt: skip
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, content, fault):
    refused(lambda: read_tensors(forge(tmp_path / "big.ckpt", content)), "big.ckpt", "damaged checkpoint", fault)


def test_one_storage_under_many_names_is_refused(tmp_path):
    claims = {str(index): Claim(Store(10_000), (10_000,), (1,)) for index in range(5)}
    refused(lambda: read_tensors(forge(tmp_path / "a.ckpt", claims, b"\0" * 40_000)), "its tensors claim more than")


def test_the_forger_can_also_write_a_true_archive(tmp_path):
    state, _ = read_tensors(forge(tmp_path / "good.ckpt", {"a": Claim(Store(4), (2, 2), (2, 1))}, byteorder=b"little"))
    assert torch.equal(state["a"], torch.zeros(2, 2))


def test_a_compressed_record_is_refused_before_it_grows(tmp_path):
    claim = {"a": Claim(Store(1 << 22), (1 << 22,), (1,))}
    path = forge(tmp_path / "bomb.ckpt", claim, b"\0" * (1 << 24), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 17
    refused(lambda: read_tensors(path), "bomb.ckpt", "compressed or encrypted")


@pytest.mark.parametrize(
    "others, fault", [({"byteorder": b"big"}, "big-endian"), ({"constants_pkl": b"."}, "TorchScript")]
)
def test_archives_that_need_more_than_reading_are_refused(tmp_path, others, fault):
    path = forge(tmp_path / "other.pt", {"a": Claim(Store(4), (4,), (1,))}, **others)
    refused(lambda: read_tensors(path), "other.pt", fault)


def test_an_archive_that_says_it_is_one_part_of_several_is_refused(tmp_path):
    path = forge(tmp_path / "part.ckpt", {"a": Claim(Store(4), (4,), (1,))})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + (1).to_bytes(4, "little") + (0).to_bytes(8, "little") + (9).to_bytes(4, "little")
    path.write_bytes(content[:end] + locator + content[end:])
    refused(lambda: read_tensors(path), "part.ckpt", "not a torch checkpoint")


def test_a_pickle_too_large_to_be_a_checkpoints_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_PICKLE", 1000)
    refused(lambda: read_tensors(forge(tmp_path / "long.ckpt", b"N" * 1001)), "data.pkl has 1001 bytes (at most 1000)")


@pytest.mark.parametrize(
    "pickled, fault",
    [
        (b"\x80\x02" + b"N0" * 1_000_000 + b".", "more than 1500000 instructions"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "no tensors"),  # a list in a list in …
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "no tensors"),  # a deep tuple as a key
        (b"\x80\x02}r\xff\xff\xff\xff.", "no tensors"),  # a place in the memo that would take 32 GB as a table
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x00.", "expected"),  # bytes that are not there
        (b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00}.", "the pickle's instruction FRAME"),
        (b"\x80\x02}q\x00q\x01", ""),
        (b"\x80\x02h\x05.", "5"),
        (b"\x80\x02a.", ""),
    ],
)  # fmt: skip
def test_a_pickle_made_to_crash_its_reader_is_an_error_like_any_other(tmp_path, pickled, fault):
    refused(lambda: read_tensors(forge(tmp_path / "odd.ckpt", pickled)), "odd.ckpt", fault)


@pytest.mark.parametrize(
    "tensor, name",
    [
        (lambda: torch.ones(2, 2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (lambda: torch._empty_affine_quantized(2, scale=1.0, zero_point=0, dtype=torch.qint8), "_rebuild_qtensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, tensor, name):
    torch.save({"a": tensor(), "b": torch.ones(1)}, tmp_path / "special.pt")
    refused(lambda: read_tensors(tmp_path / "special.pt"), "special.pt", "not plain numbers", name)


def test_a_trainers_numpy_scalars_are_left_out_by_name(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "best": np.float64(0.5)}, tmp_path / "trained.ckpt")
    state, left_out = read_tensors(tmp_path / "trained.ckpt")
    assert list(state) == ["a"] and "numpy.dtype" in left_out


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.hub.load", "torch.storage._load_from_bytes"])
def test_code_that_a_pickle_names_is_refused_by_its_name(tmp_path, name):
    module, _, function = name.rpartition(".")
    pickled = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X\x01\x00\x00\x00a\x85R."
    refused(lambda: read_tensors(forge(tmp_path / "code.ckpt", pickled)), "code.ckpt", name)


# Other files


def safetensors(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**change):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}}


@pytest.mark.parametrize(
    "content, fault",
    [
        ((1 << 60).to_bytes(8, "little") + b"{}", "its header claims 1152921504606846976 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "cut short"),
        (safetensors(entry())[:-1], "damaged safetensors"),
        (safetensors(b"{not json"), "damaged safetensors"),
        (safetensors(b"{" + b'"a":{' * 100_000), "damaged safetensors"),
        (safetensors(entry(shape=[1 << 40])), "damaged safetensors"),
        (safetensors(entry(shape=[1 << 62, 1 << 62])), "damaged safetensors"),
        (safetensors(entry(dtype="WORDS")), "damaged safetensors"),
        (safetensors(entry(data_offsets=[0, 1 << 50])), "damaged safetensors"),
        (safetensors(entry() | {"b": entry()["a"]}), "damaged safetensors"),
        (safetensors({}, b""), "holds no tensors under names"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"", "the file is empty"),
        (b"RIFF and so on, no model at all", "neither a torch checkpoint"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_named_with_its_fault(tmp_path, content, fault):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    refused(lambda: read_tensors(path), "weights.safetensors", fault)


def test_a_checkpoint_of_old_torch_is_named_with_the_way_out(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(lambda: read_tensors(tmp_path / "old.pt"), "a checkpoint of torch before 1.6")


def test_a_folder_and_a_missing_file_are_no_files_of_tensors(tmp_path):
    refused(lambda: read_tensors(tmp_path), "a folder")
    refused(lambda: read_tensors(tmp_path / "none.ckpt"), "there is no such file")


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"{", "not a configuration in JSON"), (b"[1]", "holds a list at its top"), (b"\xff{}", "utf-8"),
        (b'{"a": NaN}', "NaN is no number"), (b'{"a": 1e999}', "is larger than any number"),
        (b'{"a": 123456789012345678901234567890}', "a number too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a configuration in JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "more than 32 deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a configuration in JSON"),
        (b'{"a": [' + b"0," * 600_000 + b"0]}", "more than 500000 values"),
        (b'{"a": "' + b"a" * (10 << 20) + b'"}', "too many for a configuration"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_named_with_its_fault(tmp_path, content, fault):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(lambda: read_json(path), "config.json", fault)


# Folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each tiny model that a test asks for, written once."""
    root, known = tmp_path_factory.mktemp("saved"), {}

    def folder(name):
        if name not in known:
            known[name] = save_tiny(name, root / name)
        return known[name]

    return folder


@pytest.fixture
def ddpm(saved, tmp_path):
    """A copy of a DDPM pipeline's folder, to be spoiled."""
    return Path(shutil.copytree(saved("ddpm")[0], tmp_path / "ddpm"))


def change(path, **values):
    """Set the keys of a JSON file; ... deletes one."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    path.write_text(json.dumps(content))


def same_weights(one, other):
    one, other = one.network.state_dict(), other.network.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    monkeypatch.setattr(reader, "MOST_TABLES", 1000)
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


# Single files in the layouts in which models were first published


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
    assert reader.read_schedule(folder / SCHEDULE)["clip_sample"] is False
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
    assert reader.read_schedule(path)["shift"] == 3.0
    change(path, shift=shift)
    refused(lambda: reader.read_schedule(path), "scheduler_config.json")


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
    refused(lambda: reader.read_original(path, {}, path, True), "model.yaml", fault, kind=HqdmError)
