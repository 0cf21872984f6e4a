"""What a file may claim: nothing grows beyond the file's own size, and no name in it leads out of its folder."""

import json
import pickle
import time
import zipfile

import pytest
import torch
from model_files import Claim, Store

from pipelines.errors import FileFault
from pipelines.memory import peak_bytes, reset_peak
from pipelines.models.checkpoint import read_tensors
from pipelines.models.source import components_of


class Record(Store):
    """A storage of `count` numbers in the record data/`key`."""

    def __init__(self, count, key, kind=torch.FloatStorage):
        super().__init__(count, kind)
        self.key = key


def forge(path, content, records):
    """An archive whose records begin at odd bytes, so that no number of theirs can be read in place."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", value.kind, value.key, "cpu", value.count) if isinstance(value, Record) else None

    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(content)
        for key, record in records.items():
            at = archive.fp.tell()
            name = f"archive/data/{key}"
            info = zipfile.ZipInfo(name)
            pad = (3 - (at + 30 + len(name))) % 4
            info.extra = b"\0\0" + pad.to_bytes(2, "little") + b"\0" * pad  # an empty field of that length
            archive.writestr(info, record)
    return path


def test_a_record_that_no_view_can_read_is_copied_once(tmp_path):
    record = torch.arange(250_000, dtype=torch.float32).numpy().tobytes()
    claims = {str(count): Claim(Record(count, "0"), (1,), (1,)) for count in range(249_000, 250_000)}
    path = forge(tmp_path / "many.ckpt", claims, {"0": record})
    reset_peak()
    before = peak_bytes()
    state, _ = read_tensors(path)
    assert len(state) == 1000 and peak_bytes() - before < 100 << 20  # a thousand copies take 1 GB
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == 1
    whole = {"a": Claim(Record(250_000, "0"), (250_000,), (1,))}
    state, _ = read_tensors(forge(tmp_path / "one.ckpt", whole, {"0": record}))
    assert torch.equal(state["a"], torch.arange(250_000, dtype=torch.float32))


def test_records_that_lie_over_one_another_are_not_copied_without_end(tmp_path):
    keys = [str(index) for index in range(100, 200)]
    claims = {key: Claim(Record(1000, key), (1,), (1,)) for key in keys}
    path = forge(tmp_path / "over.ckpt", claims, {key: b"\0" * (40_000 if key == "100" else 4000) for key in keys})
    state, _ = read_tensors(path)
    assert len(state) == 100
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/100").header_offset
    place = content.index(b"PK\x01\x02")
    for _ in range(101):  # every entry of the directory that is a record's now says the first one's place and size
        names = int.from_bytes(content[place + 28 : place + 30], "little")
        extra = int.from_bytes(content[place + 30 : place + 32], "little")
        if content[place + 46 : place + 46 + names].startswith(b"archive/data/"):
            content[place + 20 : place + 28] = (40_000).to_bytes(4, "little") * 2
            content[place + 42 : place + 46] = first.to_bytes(4, "little")
        place += 46 + names + extra
    path.write_bytes(content)
    with pytest.raises(FileFault, match="unaligned records claim more than the file's"):
        read_tensors(path)


def test_a_shape_of_very_many_dimensions_is_refused_at_once(tmp_path):
    size = (1,) * 65
    with pytest.raises(FileFault, match="at most 64 whole numbers"):
        read_tensors(forge(tmp_path / "a.ckpt", {"a": Claim(Record(4, "0"), size, size)}, {"0": b"\0" * 16}))
    size = (1 << 47,) * 500_000
    path = forge(tmp_path / "b.ckpt", {"a": Claim(Record(4, "0"), size, size)}, {"0": b"\0" * 16})
    start = time.process_time()
    with pytest.raises(FileFault, match="at most 64 whole numbers"):
        read_tensors(path)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", ["tokenizer/../../../../proc", "text_encoder\0", "unet/", "/etc", "vae ", ""])
def test_a_component_is_a_plain_name_before_it_is_a_folder(tmp_path, name):
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert components_of(tmp_path)[0] == {"unet": "UNet2DModel"}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {name: ["transformers", "CLIPTokenizer"]}))
    with pytest.raises(FileFault, match="is no plain name"):
        components_of(tmp_path)
