"""Attacks by hand, one for each thing that a file, a name or a link could be made to do; random ones: test_fuzz*.py.

What is promised is in SECURITY.md.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import CANARY, outcome
from model_files import Claim, Store, forge
from PIL import Image
from roads import exported_store
from safetensors.torch import load_file, save_file

from hqdm_cli import app, console
from pipelines import runner
from pipelines.config import read_yaml, strict_json
from pipelines.errors import FileFault, HqdmError, NumericalFault
from pipelines.events import Report
from pipelines.metrics import images as reader
from pipelines.metrics.images import read_images
from pipelines.metrics.references import read_reference
from pipelines.models.checkpoint import read_tensors
from pipelines.models.source import read_json
from pipelines.stages.sample import MOST_IMAGES
from pipelines.states import read_state
from pipelines.students import load_integer
from pipelines.workspace.seals import MOST_BYTES, sha256_of_file
from pipelines.workspace.store import Store as Workspace


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(call, *words, kind=HqdmError, seconds=5.0):
    """The error; it names all of `words` and a way out, and comes soon."""
    start = time.process_time()
    with pytest.raises(kind) as caught:
        call()
    assert time.process_time() - start < seconds and caught.value.hint
    for word in words:
        assert word in caught.value.what, caught.value.what
    return caught.value


# Pickles

COMMAND = f"echo run > {CANARY}"
_TEXT = b"X" + len(COMMAND).to_bytes(4, "little") + COMMAND.encode()
PICKLES = {
    "GLOBAL and REDUCE": b"\x80\x02cposix\nsystem\n" + _TEXT + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + _TEXT + b"\x85R.",
    "INST": b"(" + _TEXT + b"iposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + _TEXT + b"o.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + _TEXT + b"\x85\x81.",
    "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb" + _TEXT + b"b.",
    "eval by its other name": b"\x80\x02c__builtin__\neval\nX\x0a\x00\x00\x00__import__\x85R.",
    "an allowed name's attribute": b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93" + _TEXT + b"\x85R.",
    "a wrapper that is known": b"\x80\x02cpytorch_lightning.os\nsystem\n" + _TEXT + b"\x85R.",
    "EXT1": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("attack", PICKLES)
def test_a_pickle_that_would_run_a_command_runs_nothing_wherever_pickles_are_read(here, attack):
    torch.save({"state_dict": {"w": torch.ones(2)}}, here / "whole.ckpt")
    with zipfile.ZipFile(here / "whole.ckpt") as whole, zipfile.ZipFile(here / "model.ckpt", "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, PICKLES[attack] if name.endswith("data.pkl") else whole.read(name))
    refused(lambda: read_tensors(here / "model.ckpt"), "model.ckpt")
    (here / "bare.ckpt").write_bytes(PICKLES[attack])
    refused(lambda: read_tensors(here / "bare.ckpt"), "bare.ckpt")
    for name in ("model.ckpt", "bare.ckpt"):
        assert read_state(here / name, Report()) is None
    np.savez(here / "samples.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with zipfile.ZipFile(here / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", PICKLES[attack])
    refused(lambda: read_images(here / "samples.npz"), "samples.npz")
    assert not Path(CANARY).exists()


def test_those_pickles_do_run_it_where_they_are_unpickled(here):
    for attack in ("GLOBAL and REDUCE", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(PICKLES[attack])
        assert Path(CANARY).exists(), attack
        Path(CANARY).unlink()


def test_a_pickle_of_tensors_that_claim_more_than_the_file_is_refused(here):
    claims = {f"w{index}": Claim(Store(4), (1 << 40,), (0,)) for index in range(4)}
    refused(lambda: read_tensors(forge(here / "a.ckpt", claims)), "a.ckpt", kind=FileFault)


SAME_HASH = (1 << 61) - 1  # of whose multiples Python's hash is 0


def test_keys_of_one_hash_do_not_take_quadratic_time(here):
    def number(value):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    keys = range(SAME_HASH, 40_000 * SAME_HASH, SAME_HASH)
    assert len({hash(key) for key in keys}) == 1
    forge(here / "model.ckpt", b"\x80\x02}(" + b"".join(number(key) + b"N" for key in keys) + b"u.")
    refused(lambda: read_tensors(here / "model.ckpt"), "model.ckpt", "no tensors", kind=FileFault)
    (here / "given.yaml").write_text("a:\n" + "".join(f"  {key}: 1\n" for key in keys[:4000]))
    refused(lambda: read_yaml(here / "given.yaml"), "given.yaml, line 2", "too large a number", kind=FileFault)


def test_an_array_of_objects_is_never_unpickled(here):
    class Payload:
        def __reduce__(self):
            return os.system, (COMMAND,)

    np.savez(here / "given.npz", arr_0=np.array([Payload(), Payload()], dtype=object))
    refused(lambda: read_images(here / "given.npz"), "arr_0", kind=FileFault)
    np.savez(here / "given.npz", mu=np.array([Payload()], dtype=object), sigma=np.eye(1))
    refused(lambda: read_reference(here / "given.npz"), "mu", kind=FileFault)
    assert not Path(CANARY).exists()


def test_a_state_that_is_compressed_is_not_unpacked(here):
    torch.save({"value": torch.zeros(4 << 20), "threads": 1, "torch": "2"}, here / "whole.pt")
    with (
        zipfile.ZipFile(here / "whole.pt") as whole,
        zipfile.ZipFile(here / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    assert (here / "state.pt").stat().st_size < 1 << 20
    assert outcome(lambda: read_state(here / "state.pt", Report())) == "read"
    assert read_state(here / "state.pt", Report()) is None


# safetensors


def safetensors(path, header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, length",
    [
        ({"a": entry([2], 0, 8)}, 2**60), ({"a": entry([2], 0, 8)}, 2**63 + 5), ({"a": entry([2], 0, 8)}, 0),
        ({"a": entry([2**62, 4], 0, 64)}, None), ({"a": entry([2**40], 0, 2**42)}, None),
        ({"a": entry([16], 0, 64), "b": entry([16], 0, 64)}, None), ({"a": entry([8], 32, 64)}, None),
        ({"a": entry([16], 64, 0)}, None), ({"a": entry([-16], 0, 64)}, None), ({"a": entry([16.5], 0, 64)}, None),
        ({"a": entry([16], 0, 64, "os.system")}, None), ({"a": entry([1] * 5000, 0, 64)}, None),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None), (b"{" + b'"a":1,' * 9, None),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,64]}}', None),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}', None),
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies_is_refused_before_anything_is_allocated(here, header, length):
    path = safetensors(here / "m.safetensors", header, length=length)
    assert outcome(lambda: read_tensors(path)) == "refused"


# YAML and JSON


def bomb(levels, form):
    return "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} {form.format(*[f'*a{i - 1}'] * 9)}\n" for i in range(1, levels))


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['echo run > canary.txt']", "a: !!python/name:os.system",
        "a: !!python/object/new:os.system ['echo run > canary.txt']", "!!python/module:os : 1", "a: !ruby/object {}",
        "a: !!binary aGVsbG8=", "a: !!set {b, c}", "a: !!omap [b: 1]", "a: !!timestamp 2020-01-01", "a: !!map [1]",
        "a: !!int x", "a: !!float [1]", "a: .inf", "a: -.INF", "a: .nan", "a: 1e999", "a: " + "9" * 5000,
        "a: 1" + ":1" * 100_000, "a: 1" + ":1" * 100_000 + ".0", "a: 0x" + "f" * 100_000, "a: 1\na: 2", "{a: 1, a: 2}",
        bomb(12, "[{}, {}, {}, {}, {}, {}, {}, {}, {}]"), bomb(12, "{{b: {}, c: {}, d: {}, e: {}}}"),
        "a: &a [*a]", "a: &a {<<: *a}", "? [1, 2]\n: 3", "? {a: 1}\n: 3", "a: " + "[" * 50_000, "- " * 50_000,
        "a: " + "{a: " * 20_000, "\0", "\ud800".encode("utf-16", "surrogatepass"), "a: b\x1b[2Jc",
        "%YAML 9.9\n---\na: 1",
        "a: " + "x" * (5 << 20),
    ],
    ids=range(36),
)  # fmt: skip
def test_yaml_holds_plain_finite_values_alone_and_takes_no_time_or_memory(here, text):
    path = here / "given.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    assert outcome(lambda: read_yaml(path)) == "refused"


@pytest.mark.parametrize(
    "stage, values",
    [("profile", {"batch": 10**12}), ("distill", {"trajectories": 10**12}), ("distill", {"batch": 10**12}),
     ("sample", {"count": 10**12}), ("score", {"kid_subsets": 10**12}), ("score", {"seed": 2**32}),
     *((stage, {"seed": 10**30}) for stage in ("profile", "distill", "sample", "score"))],
)  # fmt: skip
def test_a_recipe_that_asks_for_numbers_beyond_use_is_refused_before_anything_runs(here, stage, values):
    (here / "model.ckpt").write_bytes(b"not looked at")
    recipe = {"model": "model.ckpt", stage: values}
    (name,) = values
    fault = refused(lambda: next(runner.run_recipe(Workspace(here / "ws"), recipe, base=here)), f"{name} cannot be")
    assert fault.exit_code == 2 and not (here / "ws").exists()


def test_a_manifest_can_hold_as_many_images_as_are_sampled():
    entry = {"sha256": "0" * 64, "bytes": 10**9, "mtime_ns": 10**19}
    assert 1.2 * MOST_IMAGES * len(json.dumps({f"images/{10**6}.png": entry}, indent=3)) < MOST_BYTES


def test_a_date_in_yaml_is_text_and_a_time_of_day_a_number(here):
    (here / "a.yaml").write_text("a: 2020-01-01\nb: 1:30\nc: true\n")
    assert read_yaml(here / "a.yaml") == {"a": "2020-01-01", "b": 90, "c": True}


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 50_000, '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": -1e999}',
     '{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 2}}', '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud8"}', "\ufeff{}", "",
     "[1]",
     '{"a": ' + "9" * 300 + "}"],
    ids=range(14),
)  # fmt: skip
def test_json_that_is_deep_infinite_or_says_a_key_twice_is_refused(here, text):
    (here / "config.json").write_text(text, encoding="utf-8")
    assert outcome(lambda: read_json(here / "config.json")) == "refused"


def test_a_number_that_json_reads_as_infinite_is_said_to_be_so():
    with pytest.raises(ValueError, match="1e999 is larger than any number"):
        strict_json("[1e999]")


@pytest.mark.parametrize("read", [read_yaml, sha256_of_file, read_tensors, read_images])
def test_a_pipe_or_a_device_is_not_waited_for(here, read):
    os.mkfifo(here / "pipe")
    assert outcome(lambda: read(here / "pipe")) == "refused"
    assert outcome(lambda: read(Path("/dev/zero"))) == "refused"


# Images and archives


def png(width, height, data=b""):
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", data or zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [50_000, 8193, 2**31 - 1])
def test_an_image_that_claims_more_pixels_than_any_has_is_refused_before_it_is_decoded(here, side):
    for name in ("0.png", "1.png"):
        (here / name).write_bytes(png(side, side))
    assert outcome(lambda: read_images(here)) == "refused"


def test_text_in_an_image_is_not_unpacked_without_end(here):
    text = b"Comment\0\0" + zlib.compress(b"a" * (100 << 20))
    whole = png(4, 4, zlib.compress(b"\0" * 52))
    at = whole.index(b"IDAT") - 4
    chunk = len(text).to_bytes(4, "big") + b"zTXt" + text + zlib.crc32(b"zTXt" + text).to_bytes(4, "big")
    for name in ("0.png", "1.png"):
        (here / name).write_bytes(whole[:at] + chunk + whole[at:])
    assert outcome(lambda: read_images(here)) == "refused"


def test_an_npz_that_would_unpack_to_more_than_is_free_is_refused_unread(here, monkeypatch):
    monkeypatch.setattr(reader, "free_bytes", lambda: 64 << 20)
    np.savez_compressed(here / "bomb.npz", arr_0=np.zeros((100, 512, 512, 3), np.uint8))
    assert (here / "bomb.npz").stat().st_size < 1 << 20
    refused(lambda: read_images(here / "bomb.npz"), "bomb.npz", "more than 0.1 GiB", kind=FileFault)
    for index in range(30):
        (here / f"{index}.png").write_bytes(png(1024, 1024, zlib.compress(b"\0" * 1024 * 3073)))
    (here / "bomb.npz").unlink()
    refused(lambda: read_images(here), "30 images of 1024×1024", "more than 0.1 GiB", kind=FileFault)


def test_labels_of_absurd_classes_are_refused_before_they_are_counted(here):
    np.savez(here / "s.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.array([0, 2**60]))
    refused(lambda: read_images(here / "s.npz"), "no classes", kind=FileFault)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_compressed_tar_is_not_unpacked_without_end(here, kind, monkeypatch):
    monkeypatch.setattr(reader, "UNPACKED_BYTES", 32 << 20)
    monkeypatch.setattr(reader, "MEMBER_BYTES", 8 << 20)
    with tarfile.open(here / "bomb.tar", f"w:{kind}") as archive:
        for index in range(10):
            about = tarfile.TarInfo(f"{index}.txt")
            about.size = 8 << 20
            archive.addfile(about, io.BytesIO(b"\0" * about.size))
    assert (here / "bomb.tar").stat().st_size < 200_000
    refused(lambda: read_images(here / "bomb.tar"), "unpacks to more than", kind=FileFault)


def test_a_zip_whose_members_are_the_same_bytes_again_and_again_is_not_unpacked_without_end(here, monkeypatch):
    monkeypatch.setattr(reader, "UNPACKED_BYTES", 32 << 20)
    image = png(4, 4, zlib.compress(b"\0" * 52)) + b"\0" * (4 << 20)
    with zipfile.ZipFile(here / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", image)
        entry = archive.infolist()[0]
        archive.filelist += [entry] * 19  # the directory alone says that they are there
    assert (here / "bomb.zip").stat().st_size < 20_000
    refused(lambda: read_images(here / "bomb.zip"), "bomb.zip", "unpacks to more than", kind=FileFault)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded(here):
    file = io.BytesIO()
    Image.new("L", (4096, 4096), 128).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    assert 5 < reader._scans(whole) < 20
    (here / "a.jpg").write_bytes(whole[:-2] + scan * 2000 + whole[-2:])
    assert (here / "a.jpg").stat().st_size < 200_000
    refused(lambda: reader.decode_image((here / "a.jpg").read_bytes(), "a.jpg"), "a.jpg", "scans", kind=FileFault)


def test_what_a_jpeg_carries_beside_its_scans_does_not_count():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", comment=b"\xff\xda" * 500)
    data = file.getvalue()
    assert reader._scans(data) == reader._scans(data + b"\xff\xda" * 500) == 1
    assert reader.decode_image(data + b"\xff\xda" * 500, "a.jpg")[0].shape == (8, 8, 3)


def test_a_header_of_a_tar_that_claims_gigabytes_is_not_read(here):
    about = tarfile.TarInfo("././@PaxHeader")
    about.type, about.size = tarfile.XHDTYPE, 8 << 30
    (here / "a.tar").write_bytes(about.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048)
    assert outcome(lambda: read_images(here / "a.tar")) == "refused"


def test_nothing_that_an_archive_names_leaves_it(here):
    outside = here / "outside"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "secret.png")
    content = (outside / "secret.png").read_bytes()
    names = ["../out.png", "/tmp/hqdm-out.png", "a/../../out.png", "ok.png"]
    inside = here / "inside"
    inside.mkdir()
    with tarfile.open(inside / "a.tar", "w") as archive:
        for name in names:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            about = tarfile.TarInfo("link.png")
            about.type, about.linkname = kind, str(outside / "secret.png")
            archive.addfile(about)
    found = read_images(inside / "a.tar")
    assert sorted(found.names) == sorted(names)  # read in memory; the links are passed over
    assert sorted(path.name for path in here.rglob("*.png")) == ["secret.png"]


@pytest.mark.parametrize("name", ["1" * 5000 + ".png", "²1.png", "x" * 60_000 + ".png", "\u0661.png", "a\nb\x1b.png"])
def test_any_name_in_an_archive_has_its_place_in_the_order(here, name):
    with zipfile.ZipFile(here / "a.zip", "w") as archive:
        for other in (name, "2.png", "10.png"):
            archive.writestr(other, png(4, 4, zlib.compress(b"\0" * 52)))
    found = read_images(here / "a.zip").names
    assert found.index("2.png") < found.index("10.png") and name in found


@pytest.mark.parametrize(
    "change",
    [dict(n=np.int64(-1)), dict(n=np.array([1, 2])), dict(n=np.float64(np.nan)), dict(n=np.str_("x")),
     dict(extractor=np.array(["a", "b"])), dict(extractor=np.str_("x" * 10**6)), dict(sigma=-np.eye(4)),
     dict(sigma=np.triu(np.ones((4, 4)))), dict(mu=np.full(4, 1e300)), dict(sigma=np.full((4, 4), 1e200)),
     dict(mu=np.zeros(4, complex)), dict(mu=np.zeros(())), dict(sigma=np.zeros((4, 5)))],
    ids=range(13),
)  # fmt: skip
def test_statistics_that_no_images_have_are_refused(here, change):
    np.savez(here / "s.npz", **(dict(mu=np.zeros(4), sigma=np.eye(4)) | change))
    refused(lambda: read_reference(here / "s.npz"), "s.npz", kind=FileFault)


# The workspace


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exported_store(tmp_path_factory.mktemp("made"))


@pytest.fixture
def store(made, here):
    return Workspace(shutil.copytree(made.root, here / "workspace"))


def rewrite(artifact, change):
    path = artifact.path / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/../../b", "", "a\0b", ".."])
def test_a_manifest_that_names_files_elsewhere_is_refused_and_nothing_elsewhere_is_hashed(store, name):
    plan = store.current("plan")
    rewrite(plan, lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    refused(lambda: Workspace(store.root).get("plan"), "manifest.json", kind=FileFault)


@pytest.mark.parametrize("ident", ["../../outside/0001", "/etc/1", "..", "plan", "plan/../model/1", "plan/1\n"])
def test_a_manifest_whose_input_is_elsewhere_is_refused(store, ident):
    rewrite(store.current("plan"), lambda values: values["inputs"]["profile"].update({"id": ident}))
    refused(lambda: Workspace(store.root).get("plan"), "is no artifact", kind=FileFault)


@pytest.mark.parametrize("words", [["show"], ["verify"], ["sample", "teacher", "--from"], ["distill", "--plan"]])
@pytest.mark.parametrize("ident", ["../../etc", "../outside/1", "/etc/1", "..", "plan/" + "9" * 5000, "\x1b[2J/1"])
def test_a_name_that_is_typed_leads_nowhere_else(store, capsys, words, ident):
    shutil.copytree(store.current("plan").path, store.root.parent / "outside" / "1")
    assert app.main([*words, ident, "-w", str(store.root)]) in (1, 2)
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "hint: " in said.err and "\x1b" not in said.err and not said.out


def test_nothing_is_written_through_a_link_in_a_workspace(store, here):
    secret = here / "secret"
    secret.write_text("kept")
    for name in (".lock", ".current.part"):
        (store.root / "sample").mkdir(exist_ok=True)
        (store.root / "sample" / name).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        store.begin("sample", "k" * 64, {})
    (store.root / "sample" / ".lock").unlink()
    made = []
    for key in "kl":
        with store.begin("sample", key * 64, {}) as draft:
            made.append(draft.commit({}))
    store.mark_current(made[0])
    with store.begin("plan", "k" * 64, {}) as draft:
        (draft.path / "plan.yaml").symlink_to(secret)
    refused(lambda: store.begin("plan", "k" * 64, {}), "is a link", kind=FileFault)
    shutil.rmtree(draft.path)
    draft.path.symlink_to(here)
    refused(lambda: store.begin("plan", "k" * 64, {}), "is a link", kind=FileFault)
    assert secret.read_text() == "kept" and store.current("sample") == made[0]


def test_a_stage_that_is_a_link_to_elsewhere_is_not_written_through(here):
    (here / "outside").mkdir()
    store = Workspace(here / "ws")
    store.root.mkdir()
    (store.root / "export").symlink_to(here / "outside")
    refused(lambda: store.begin("export", "k" * 64, {}), "export is a link", kind=FileFault)
    assert list((here / "outside").iterdir()) == []
    (here / "outside" / ".lock").touch()
    (here / "outside" / ".draft-0123456789abcdef" / "work").mkdir(parents=True)
    assert app.main(["gc", "-w", str(store.root)]) == 0
    assert (here / "outside" / ".draft-0123456789abcdef" / "work").is_dir()


def test_pipes_and_odd_bytes_in_a_workspace_are_refused_or_passed_over(store):
    (store.root / "plan" / ".current").write_bytes(b"\xff\xfe" * 40)
    assert store.current("plan").id == "plan/0001"
    (store.root / "plan" / ".current").unlink()
    os.mkfifo(store.root / "plan" / ".current")
    assert outcome(lambda: store.current("plan")) == "read"
    (store.root / "plan" / "0001" / "manifest.json").unlink()
    os.mkfifo(store.root / "plan" / "0001" / "manifest.json")
    assert outcome(lambda: Workspace(store.root).artifacts()) == "refused"


def test_a_command_that_is_to_be_typed_next_is_quoted(store):
    rewrite(store.current("model"), lambda values: values["config"].update(path="a'; touch canary.txt; '"))
    for stage, values in (("plan", {"method": "x; touch canary.txt", "bits": "$(touch canary.txt)"}), ("distill", {})):
        rewrite(store.current(stage), lambda found, values=values: found["config"].update(values))
    for stage in ("export", "distill", "plan", "profile"):
        command = runner.next_command(Workspace(store.root))
        os.system(f"hqdm() {{ :; }}; {command}")
        assert not Path(CANARY).exists(), command
        shutil.rmtree(store.root / stage)


# What a terminal is shown

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\r\u202e\u2066\u2028\ud800\nerror: forged"


def test_no_escape_sequence_reaches_the_terminal(capsys):
    console.error(f"{ESCAPES}: not there", f"name {ESCAPES}")
    console.say(f"note {ESCAPES}")
    console.out(f"row\t{ESCAPES}")
    console.print_json({"name": ESCAPES})
    with console.Progress() as progress:
        progress.begin(f"task {ESCAPES}", 2)
        progress.warn(ESCAPES)
        progress.end()
    said = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\t" for c in said.err + said.out)
    first = r"error: \x1b[2J\x1b]0;title\x07\x9b31m\x7f\r\u202e\u2066\u2028\ud800\nerror: forged: not there"
    assert said.err.splitlines()[0] == first
    assert said.err.splitlines()[1].startswith("hint: name ")
    assert json.loads(said.out[said.out.index("{") :]) == {"name": ESCAPES}
    console.error("x" * 10**7)
    assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize("words", [["show", "plan"], ["show", "plan", "--json"], ["status"], ["verify"], ["report"]])
def test_a_workspace_that_holds_escape_sequences_is_shown_without_them(store, capsys, words):
    rewrite(store.current("plan"), lambda values: values["config"].update(method=ESCAPES))
    rewrite(store.current("plan"), lambda values: values["figures"].update({ESCAPES: ESCAPES}))
    app.main([*words, "-w", str(store.root)])
    said = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\t" for c in said.err + said.out) and (said.out or said.err)


# An exported model


@pytest.fixture
def exported(made, here):
    return Path(shutil.copytree(made.current("export").path, here / "export"))


def site_of(folder, kind="linear"):
    config = json.loads((folder / "config.json").read_text())
    return next(entry["site"]["name"] for entry in config["sites"] if entry["site"]["kind"] == kind)


@pytest.mark.parametrize(
    "what, change, kind",
    [
        ("weight_scale", lambda v: v[:1], FileFault), ("weight_scale", lambda v: v.double(), FileFault),
        ("weight_scale", lambda v: v * 0, NumericalFault), ("weight_scale", lambda v: v * float("nan"), NumericalFault),
        ("weight_scale", lambda v: -v, NumericalFault), ("weight", lambda v: v[:3], FileFault),
        ("weight", lambda v: v.float(), FileFault), ("bias", lambda v: v[:1], FileFault),
        ("bias", lambda v: v + float("inf"), NumericalFault),
    ],
)  # fmt: skip
def test_a_kernel_is_given_no_tensor_of_another_shape_and_no_scale_that_is_none(exported, what, change, kind):
    path, name = exported / "model.safetensors", site_of(exported, "conv")
    tensors = load_file(path)
    save_file(tensors | {f"{name}.{what}": change(tensors[f"{name}.{what}"]).contiguous()}, path)
    error = refused(lambda: load_integer(exported, "cpu"), kind=kind)
    assert name in error.what or "packed weights" in error.what


def test_tensors_that_a_plan_does_not_speak_of_are_refused(exported):
    path, name = exported / "model.safetensors", site_of(exported)
    tensors = load_file(path)
    save_file(tensors | {f"{name}.gain": torch.ones(3)}, path)
    refused(lambda: load_integer(exported, "cpu"), name, "gain", kind=FileFault)


def test_scales_of_timesteps_are_named_by_site_and_timestep(exported):
    path = exported / "model.safetensors"
    tensors = load_file(path)
    tensors["tables.scale"][1, 2] = 0.0
    save_file(tensors, path)
    name = json.loads((exported / "config.json").read_text())["sites"][2]["site"]["name"]
    refused(lambda: load_integer(exported, "cpu"), name, f"{tensors['tables.timesteps'][1]:g}", kind=NumericalFault)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["network"].update(layers_per_block=10**9),
        lambda c: c["network"].update(block_out_channels=[32] * 10**4),
        lambda c: c["network"].update(cross_attention_dim=10**12),
        lambda c: c["network"].update(num_class_embeds=10**9),
        lambda c: c["network"].update(down_block_types=["os.system"] * 2), lambda c: c["model"].update(family="os"),
        lambda c: c["model"].update(shape=[10**6] * 3), lambda c: c["model"].update(conditions=10**9),
        lambda c: c["sites"][3]["site"].update(weight=[10**6] * 2), lambda c: c["sites"][3]["site"].update(name="../x"),
        lambda c: c["sites"][3]["site"].update(kind="os.system"), lambda c: c["sites"][3].update(weight_bits=True),
        lambda c: c["sites"][3].update(activation_bits=999), lambda c: c["sites"][5]["site"].update(stride=[0, 0]),
        lambda c: c["sites"].append(c["sites"][0]), lambda c: c.update(sign_diagonals=[[1] * 10**5]),
    ],
    ids=range(16),
)  # fmt: skip
def test_an_exports_configuration_that_asks_for_more_than_its_tensors_is_refused(exported, change):
    path = exported / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    assert outcome(lambda: load_integer(exported, "cpu")) == "refused"
