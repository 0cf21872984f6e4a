"""Shared by all tests: no hub, one thread, torchvision mended before any library asks for it; syncs and the drawing of
pictures left out; the command line on stages that take a moment; and models' folders.
"""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models here are tiny: more threads gain nothing, and beside other work they wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest  # noqa: E402
from drawing import undrawn  # noqa: E402
from fake_stages import ROAD, checkpoint, install  # noqa: E402

import pipelines  # noqa: E402, F401  (mends torchvision before any library imports it)
from hqdm_cli.app import main  # noqa: E402

import torch  # noqa: E402  isort: skip

if not torch.cuda.is_available():  # read when the CUDA kernels are declared, whichever test does it first
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Without syncs, which make no difference to a process that is killed, and without drawing pictures
    (`drawing.drawn` brings it back). Other processes have both.
    """
    with pytest.MonkeyPatch.context() as patched, undrawn():
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HQDM_WORKSPACE", raising=False)
    checkpoint(tmp_path)
    (tmp_path / "model.yaml").write_text("model: {}")
    return install(monkeypatch)


@pytest.fixture
def hqdm(fakes, capsys):
    """Type a command: exit code, stdout and stderr."""

    def type_command(*words):
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return type_command


@pytest.fixture
def road(hqdm):
    """A workspace in which every stage is done."""
    for words in (("profile", "model.ckpt"), *ROAD):
        assert hqdm(*words)[0] == 0
    return hqdm


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of each tiny model that a test asks for, written once."""
    from families import save_tiny

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


# A file is one process's: with these before the others none waits long for the last.
LONGEST = [
    "students", "road", "distill", "processes", "sharding", "cuda_network", "native", "others", "crash", "numerical",
    "devices", "methods_trained", "faults", "bench", "fuzz", "correction", "profile", "compvis_published", "fuzz_files",
    "guidance", "hostile",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_addoption(parser):
    parser.addoption("--crash-seed", type=int, help="decides when tests/test_crash.py kills; drawn and printed without")
