"""Training and sampling in floating point on a device: every tensor lies where it is used, and what comes out is the
processor's. No GPU takes part.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from roads import make, tiny_store

from pipelines.errors import HqdmError, UsageError
from pipelines.kernels import cuda
from pipelines.stages import load

ROOT = Path(__file__).parents[1]
METHODS = ["hqdm/tuned", "mpq_dm"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a process saw that has a device which is none."""
    folder = tmp_path_factory.mktemp("devices")
    tiny_store(folder / "workspace")
    command = [sys.executable, str(ROOT / "tests/placed.py"), str(folder / "workspace"), str(folder), *METHODS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_distilled_on_a_device_as_on_the_processor(seen, method):
    """To the bits at first; a bit that an update's sums differ in moves a quantiser's tie later on."""
    found = seen[f"distill {method.partition('/')[0]}"]
    assert found["device"] == "elsewhere" and len(found["here"]) == 3
    assert found["there"][0] == found["here"][0]
    assert found["there"] == pytest.approx(found["here"], rel=0.3)


@pytest.mark.parametrize("source", ["teacher", "fake"])
def test_images_drawn_on_a_device_are_those_of_the_processor(seen, source):
    assert seen[f"sample {source}"] == {"device": "elsewhere", "digest": True}


def test_a_tensor_that_is_left_on_the_processor_is_an_error_there(seen):
    """Or the tests above could not fail."""
    assert len(seen["mixed"]) == 3 and all("and on the processor" in said for said in seen["mixed"])


def test_a_device_that_is_not_there_or_does_not_fit_is_refused(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "workspace")
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: False)
    for stage, options in (("sample", {"source": "teacher", "count": 1, "steps": 1}), ("distill", {})):
        if stage == "distill":
            make(store, "plan", method="rtn")
        with pytest.raises(HqdmError, match="no CUDA device") as caught:
            make(store, stage, device="cuda", **options)
        assert "--device cpu" in caught.value.hint
    make(store, "plan", method="ptq4dm", variant="reconstructed")
    with pytest.raises(UsageError, match="reconstructs blocks on the processor alone"):
        make(store, "distill", device="cuda")


def test_integers_are_sent_to_a_device_by_their_back_end():
    with pytest.raises(UsageError, match="is for teacher and fake student") as caught:
        load("sample").Config(device="cuda")
    assert caught.value.hint == "--backend cuda"
