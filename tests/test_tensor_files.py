"""Files of tensors and of configurations: read as they were written, and every fault names the file and the way out."""

import json
import zipfile

import numpy as np
import pytest
import torch
from model_files import CHECKPOINT, Claim, Store, forge, mapped_regions, refused
from safetensors.torch import save_file

from pipelines.models import checkpoint
from pipelines.models.checkpoint import read_checkpoint, read_tensors
from pipelines.models.source import read_json


def test_a_checkpoint_reads_as_torch_reads_it_without_a_copy():
    state, left_out = read_checkpoint(CHECKPOINT)
    theirs = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert state.keys() == {key for key, value in theirs.items() if isinstance(value, torch.Tensor)} and not left_out
    for key, value in state.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    regions = mapped_regions(CHECKPOINT.name)
    assert all(any(low <= value.data_ptr() < high for low, high in regions) for value in state.values())


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
