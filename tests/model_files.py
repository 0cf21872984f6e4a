"""What tests of model files share: a forger of torch archives, and what an error of a file must say."""

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from pipelines.errors import FileFault

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


def mapped_regions(name):
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    return [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]


def change(path, **values):
    """Set the keys of a JSON file; ... deletes one."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    path.write_text(json.dumps(content))


def same_weights(one, other):
    one, other = one.network.state_dict(), other.network.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
