"""Model files changed at random: each is read, or refused with an error that a user can act on. Nothing runs, hangs or
grows. What changes them is in fuzzing.py; pickles also change by instructions here. The other readers: test_fuzz_files.
"""

import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from families import save_tiny
from fuzzing import CANARY, both, edited, edits, examples, framed, outcome, trees, unframed, written
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipelines.models.checkpoint import read_tensors
from pipelines.models.source import take

CHECKPOINT = Path(__file__).parents[1] / "pipelines" / "digits" / "model.ckpt"


# Files of tensors


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: what a payload would write stands in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors():
    return {f"block.{index}.weight": torch.arange(12.0).reshape(3, 4) + index for index in range(6)}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_file_of_tensors_with_changed_bytes_is_read_or_refused(here, kind):
    path, seen = here / f"model.{kind}", Counter()
    save_file(tensors(), path) if kind == "safetensors" else torch.save({"state_dict": tensors()}, path)
    whole = path.read_bytes()
    structure = [(0.0, 0.5)] if kind == "safetensors" else [(0.0, 0.25), (0.6, 1.0)]

    @examples(400)
    @given(edits(structure))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: [value.sum() for value in read_tensors(path)[0].values()])] += 1

    change()
    both(seen)


def test_a_safetensors_header_changed_as_a_tree_is_read_or_refused(here):
    path, seen = here / "model.safetensors", Counter()
    save_file(tensors(), path)
    whole = path.read_bytes()
    header, data = unframed(whole)

    @examples(300)
    @given(trees(header))
    def change(tree):
        path.write_bytes(framed(tree, data))
        seen[outcome(lambda: [value.sum() for value in read_tensors(path)[0].values()])] += 1

    change()
    both(seen)


COMMAND = f"echo run > {CANARY}"
_INSTRUCTIONS = st.sampled_from([
    b"cos\nsystem\nX" + len(COMMAND).to_bytes(4, "little") + COMMAND.encode() + b"\x85R0",
    b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R0", b"cposix\nsystem\n0", b"ctorch.hub\nload\n0",
    b"c__builtin__\nbytearray\n\x8a\x05\xff\xff\xff\xff\x7f\x85R0", b"c_codecs\nencode\nX\x01\x00\x00\x00aK\x01\x86R",
    b"(", b"}", b"]", b")", b".", b"0", b"2", b"R", b"b", b"Q", b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x87", b"N",
    b"K\x07", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8, b"h\x00", b"h\x05", b"q\x00", b"r\xff\xff\xff\x7f",
    b"\x81", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f", b"\x96\xff\xff\xff\xff\xff\xff\xff\x0f", b"I99999999999\n",
])  # fmt: skip


def test_a_pickle_with_other_instructions_is_read_or_refused_and_never_run(here):
    path, seen = here / "model.ckpt", Counter()
    torch.save({"state_dict": tensors()}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    whole = records[name]

    @examples(400)
    @given(st.lists(st.tuples(st.floats(0, 1), _INSTRUCTIONS, st.booleans()), min_size=1, max_size=3))
    def change(insertions):
        pickled = whole
        for place, instruction, over in insertions:
            at = int(place * len(pickled))
            pickled = pickled[:at] + instruction + pickled[at + (len(instruction) if over else 0) :]
        with zipfile.ZipFile(path, "w") as archive:
            for record, value in records.items():
                archive.writestr(record, pickled if record == name else value)
        seen[outcome(lambda: [value.sum() for value in read_tensors(path)[0].values()])] += 1

    change()
    assert seen["refused"] > 100


def test_the_payload_of_these_pickles_would_run_if_it_were_unpickled(here):
    import pickle

    pickle.loads(b"\x80\x02cos\nsystem\nX" + len(COMMAND).to_bytes(4, "little") + COMMAND.encode() + b"\x85R.")
    assert Path(CANARY).exists()


# Folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DDPM pipeline's folder, one with a first stage, and one whose weights are in shards."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("ddpm", "ldm-uncond", "dit"):
        save_tiny(name, root / name)
    sharded = Path(shutil.copytree(root / "ddpm", root / "sharded")) / "unet"
    whole = sharded / "diffusion_pytorch_model.safetensors"
    state, names = load_file(whole), {}
    for index, (name, value) in enumerate(state.items()):
        names.setdefault(f"part-{index % 2}.safetensors", {})[name] = value
    for name, part in names.items():
        save_file(part, sharded / name)
    places = {"weight_map": {key: name for name, part in names.items() for key in part}, "metadata": {"total_size": 9}}
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(places))
    whole.unlink()
    return root


CONFIGURATIONS = {
    "ddpm/model_index.json": 60,
    "ddpm/unet/config.json": 150,
    "ddpm/scheduler/scheduler_config.json": 80,
    "ldm-uncond/vqvae/config.json": 80,
    "dit/transformer/config.json": 100,
    "sharded/unet/diffusion_pytorch_model.safetensors.index.json": 40,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_folders_configuration_changed_as_a_tree_or_as_bytes_is_read_or_refused(here, saved, name):
    folder = Path(shutil.copytree(saved / name.split("/")[0], here / "model"))
    path, seen = folder / name.partition("/")[2], Counter()
    tree, whole = json.loads(path.read_text()), path.read_bytes()

    @examples(CONFIGURATIONS[name])
    @given(st.one_of(trees(tree), trees(tree), edits([])))
    def change(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(lambda: take(folder))] += 1

    change()
    both(seen)


def test_a_pipelines_weights_with_changed_bytes_are_read_or_refused(here, saved):
    folder = Path(shutil.copytree(saved / "ddpm", here / "model"))
    path, seen = folder / "unet" / "diffusion_pytorch_model.safetensors", Counter()
    whole = path.read_bytes()

    @examples(60)
    @given(edits([(0.0, 0.01)]))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: take(folder))] += 1

    change()
    both(seen)


# Checkpoints of latent diffusion


def test_a_latent_diffusion_yaml_changed_as_a_tree_or_as_bytes_is_read_or_refused(here):
    path, seen = here / "model.yaml", Counter()
    whole = CHECKPOINT.with_suffix(".yaml").read_bytes()
    tree = yaml.safe_load(whole)

    @examples(80)
    @given(st.one_of(trees(tree), trees(tree), edits([])))
    def change(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(lambda: take(CHECKPOINT, config=path))] += 1

    change()
    both(seen)


def test_a_latent_diffusion_checkpoint_with_changed_bytes_is_read_or_refused(here):
    path, seen = here / "model.ckpt", Counter()
    shutil.copy(CHECKPOINT.with_suffix(".yaml"), here)
    whole = CHECKPOINT.read_bytes()

    @examples(30)
    @given(edits([(0.0, 0.01), (0.99, 1.0)]))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: take(path, config=here / "model.yaml"))] += 1

    change()
    both(seen)
