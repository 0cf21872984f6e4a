"""Every other file that is read, changed at random: plans, recipes, comparisons, images, archives, statistics, prompts,
embeddings, manifests, states of interrupted runs, students, exported models. Each is read or refused with a way out.
"""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import both, edited, edits, examples, framed, outcome, trees, unframed, written
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from roads import exported_store
from safetensors.torch import save_file

from pipelines import runner
from pipelines.cifar10 import CLASSES
from pipelines.cifar10.data import load_split
from pipelines.comparison.asked import OPTIONED, ask, read_recipe
from pipelines.config import from_dict, read_yaml, to_dict
from pipelines.events import Report
from pipelines.metrics.extractors import load_extractor
from pipelines.metrics.images import read_images
from pipelines.metrics.references import Statistics, read_reference, write_statistics
from pipelines.models.denoiser import load_denoiser, read_info
from pipelines.models.families import FAMILIES
from pipelines.models.prompts import read_embeddings, read_prompts
from pipelines.plans import read_plan, read_sites
from pipelines.quant.correction import Correction
from pipelines.states import read_state, write_state
from pipelines.students import load_fake, load_integer
from pipelines.workspace.store import Store


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: what a payload would write stands in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A workspace with a tiny model up to its exported integers; not to be written to."""
    return exported_store(tmp_path_factory.mktemp("road"))


# YAML


RECIPE = {
    "model": {"path": __file__, "ema": True}, "seed": 0, "profile": {"steps": 3, "batch": 2},
    "plan": {"method": "hqdm", "variant": "paper", "bits": "w4a4", "options": {"order": 16}}, "distill": None,
    "sample": [{"source": "teacher", "count": 2}, {"source": "int"}], "score": {"extractor": "none"},
}  # fmt: skip


def compared(path):
    read = read_recipe(path)
    options = {stage: dict(getattr(read, stage)) for stage in OPTIONED}
    ask(read.methods, read.bits or ["w4a4"], read.seeds or [0], options, None)


COMPARISON = {
    "model": "model.ckpt", "methods": ["hqdm", "hqdm/paper:order=16"], "bits": ["w4a4", "w4a3"], "seeds": [0, 1],
    "profile": {"steps": 3}, "distill": {"trajectories": 2, "batch": 2}, "sample": {"count": 8, "eta": 0.0},
    "score": {"extractor": "none", "reference_path": "images"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["plan", "recipe", "comparison"])
def test_a_yaml_file_changed_as_a_tree_or_as_bytes_is_read_or_refused(here, road, kind):
    path, seen = here / "given.yaml", Counter()
    sites = read_sites(road.current("model").file("sites.json"))
    if kind == "plan":
        tree, sites = read_yaml(road.current("plan").file("plan.yaml")), sites[:4]
        tree["sites"] = {site.name: tree["sites"][site.name] for site in sites}
    else:
        tree = RECIPE if kind == "recipe" else COMPARISON
    whole = json.dumps(tree, indent=1).encode()
    read = {
        "plan": lambda: read_plan(path, sites), "comparison": lambda: compared(path),
        "recipe": lambda: list(runner.run_recipe(road, read_yaml(path), Report(), dry_run=True, base=here)),
    }[kind]  # fmt: skip

    @examples(80)
    @given(st.one_of(trees(tree), trees(tree), edits([])))
    def change(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(read, also=OSError if kind == "recipe" else ())] += 1  # as for a name that is too long

    change()
    both(seen)


# Images, archives, arrays


def pictures(count=6, side=16):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(image, kind):
    place = io.BytesIO()
    Image.fromarray(image).save(place, kind)
    return place.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "PPM"])
def test_an_image_with_changed_bytes_is_read_or_refused(here, kind):
    whole, seen = encoded(pictures(1)[0], kind), Counter()
    for name in ("0.png", "1.png"):
        (here / name).write_bytes(whole)

    @examples(120)
    @given(edits([(0.0, 0.1)]))
    def change(changes):
        (here / "1.png").write_bytes(edited(whole, changes))
        seen[outcome(lambda: read_images(here))] += 1

    change()
    both(seen)


def archived(path, kind, names):
    members = [(name, encoded(image, "PNG")) for name, image in zip(names, pictures(len(names), 32), strict=True)]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
        return
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["zip", "", "gz", "xz", "bz2"])
def test_an_archive_with_changed_bytes_is_read_or_refused(here, kind):
    path, seen = here / "archive", Counter()
    archived(path, kind, [f"{CLASSES[index % 3]}/{index}.png" for index in range(4)])
    whole = path.read_bytes()
    structure = [(0.98, 1.0)] if kind == "zip" else [(0.0, 0.1)]

    @examples(100)
    @given(edits(structure))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: load_split(path))] += 1

    change()
    both(seen) if not kind or kind == "zip" else None
    assert seen["refused"]


def test_a_tar_whose_headers_say_other_things_is_read_or_refused(here):
    """Types, sizes and names of members change together with the header's checksum."""
    path, seen, names = here / "archive.tar", Counter(), ["cat/1.png", "cat/2.png", "dog/3.png"]
    data = [encoded(image, "PNG") for image in pictures(3, 32)]
    kinds = [bytes([code]) for code in b"0125LKxgSDV"]
    sizes = st.one_of(st.integers(0, 4000), st.sampled_from([2**20, 2**33, 2**62]))

    @examples(120)
    @given(st.lists(st.tuples(st.sampled_from(kinds), sizes, st.text(max_size=120)), min_size=3, max_size=3))
    def change(members):
        with open(path, "wb") as file:
            for name, content, (kind, size, linked) in zip(names, data, members, strict=True):
                about = tarfile.TarInfo(name)
                about.type, about.size, about.linkname = kind, size, linked
                file.write(about.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
                file.write(content + b"\0" * (-len(content) % 512))
        seen[outcome(lambda: read_images(path))] += 1

    change()
    assert seen["refused"]


def arrays(kind, path):
    if kind == "samples":
        np.savez(path, arr_0=pictures(), arr_1=np.arange(6))
    else:
        moments = Statistics(np.zeros(8), np.eye(8), 6)
        write_statistics(path, moments, moments, "digits", "0" * 64)


@pytest.mark.parametrize("kind", ["samples", "statistics"])
def test_an_npz_with_changed_bytes_is_read_or_refused(here, kind):
    path, seen = here / "given.npz", Counter()
    arrays(kind, path)
    whole = path.read_bytes()

    @examples(150)
    @given(edits([(0.0, 0.1), (0.85, 1.0)]))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: read_reference(path))] += 1

    change()
    both(seen)


_DTYPES = st.sampled_from([
    "|O", "|u1", "<f8", "<i8", "<f2", "<c16", "|b1", "<U9", "|S4", "|V2000000000", "<M8[s]", "<U400000000", "x", "",
    [("a", "<f8")], [("a", "|O")], 7, None,
])  # fmt: skip
_SHAPES = st.one_of(
    st.tuples(), st.lists(st.integers(-2, 40), max_size=5).map(tuple),
    st.sampled_from([(10**12,), (2**31, 2**31), (-1,), (10**30,), ("a",), (1.5,), None, [6], (True,), ((),)]),
)  # fmt: skip


def npy(dtype, shape, order, data):
    """A member of an .npz with a header of its own words."""
    text = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize("kind", ["samples", "statistics"])
def test_an_npz_whose_headers_say_other_things_is_read_or_refused_and_never_unpickled(here, kind):
    path, seen = here / "given.npz", Counter()
    arrays(kind, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    payload = pickle.dumps(Payload())

    @examples(200)
    @given(st.sampled_from(sorted(members)), _DTYPES, _SHAPES, st.sampled_from([True, False, 2, "x"]), st.booleans())
    def change(name, dtype, shape, order, pickled):
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in members.items():
                data = payload if pickled else content[128:]
                archive.writestr(other, npy(dtype, shape, order, data) if other == name else content)
        seen[outcome(lambda: read_reference(path))] += 1

    change()
    assert seen["refused"]


class Payload:
    def __reduce__(self):
        from fuzzing import CANARY

        return Path.write_text, (Path(CANARY), "run")


def test_weights_of_an_extractor_with_changed_bytes_are_refused(here):
    path, seen = here / "inception.pth", Counter()
    torch.save({"weight": torch.arange(12.0)}, path)
    whole, hostile = path.read_bytes(), pickle.dumps(Payload())

    @examples(40)
    @given(edits([(0.0, 0.4)]), st.booleans())
    def change(changes, pickled):
        path.write_bytes(edited(hostile if pickled else whole, changes))
        seen[outcome(lambda: load_extractor("inception", str(path)))] += 1

    change()
    assert seen["refused"] and not seen["read"]


# What prompts and embeddings a model is given


def test_prompts_with_changed_bytes_are_read_or_refused(here):
    path, seen = here / "prompts.txt", Counter()
    whole = "\n".join(["# words", "a cat", "ein Hügel", "", "two dogs on a hill"]).encode()

    @examples(200)
    @given(edits([]))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: read_prompts(path))] += 1

    change()
    both(seen)


def test_embeddings_changed_in_their_header_or_as_bytes_are_read_or_refused(here):
    path, seen, family = here / "embeddings.safetensors", Counter(), FAMILIES["unet-condition"]
    given_rows = {"encoder_hidden_states": torch.arange(3 * 4 * 8.0).view(3, 4, 8)}
    save_file(given_rows, path, metadata={"prompts": json.dumps(["a", "b"])})
    whole = path.read_bytes()
    header, data = unframed(whole)

    @examples(150)
    @given(st.one_of(trees(header), edits([(0.0, 0.6)])))
    def change(changed):
        path.write_bytes(framed(changed, data) if isinstance(changed, dict) else edited(whole, changed))
        seen[outcome(lambda: read_embeddings(family, {"cross_attention_dim": 8}, path))] += 1

    change()
    both(seen)


# The workspace


def workspace_of(store):
    """Everything that is said of a workspace without running a stage."""
    for artifact in store.artifacts():
        assert artifact.path.resolve().is_relative_to(store.root.resolve())
        for name in artifact.manifest["files"]:
            assert (artifact.path / name).resolve().is_relative_to(store.root.resolve())
        artifact.verify(), artifact.damage()
    runner.stale(store), runner.next_command(store), store.drafts()


def test_a_manifest_changed_as_a_tree_or_as_bytes_is_read_or_refused(here, road):
    root, seen = here / "workspace", Counter()
    for stage in ("model", "plan"):  # two, one made from the other; the files themselves need not be there
        (root / stage / "0001").mkdir(parents=True)
        shutil.copy(road.current(stage).path / "manifest.json", root / stage / "0001")
    path = root / "plan" / "0001" / "manifest.json"
    whole = path.read_bytes()

    @examples(200)
    @given(st.one_of(trees(json.loads(whole)), trees(json.loads(whole)), edits([])))
    def change(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(lambda: workspace_of(Store(root)))] += 1

    change()
    both(seen)


def test_the_record_of_an_unfinished_run_changed_as_a_tree_or_as_bytes_never_keeps_it_from_going_on(here):
    store, seen, key = Store(here / "workspace"), Counter(), "a" * 64
    with store.begin("distill", key, {"config": {"steps": 3}, "seed": 0}) as draft:
        (draft.work / "state").write_text("kept")
    path = next(store.root.glob("distill/.draft-*")) / "draft.json"
    whole = path.read_bytes()

    def go_on():
        store.drafts()
        with store.begin("distill", key, {"config": {}}) as draft:
            (draft.work / "state").write_text("kept")
        assert draft.seconds >= 0

    @examples(150)
    @given(st.one_of(trees(json.loads(whole)), trees(json.loads(whole)), edits([])))
    def change(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(go_on)] += 1

    change()
    assert set(seen) == {"read"}


_WORDS = st.lists(
    st.sampled_from(["..", ".", "/", "plan", "1", "0001", "model", "~", "\0", "\n", "\x1b[2J", "9" * 5000, "٣", ""]),
    max_size=6,
).map("".join)  # fmt: skip


def test_a_name_that_is_typed_is_an_artifact_of_the_workspace_or_refused(here, road):
    seen = Counter()
    outside = here / "5"
    shutil.copytree(road.current("plan").path, outside)
    store = Store(shutil.copytree(road.root, here / "workspace", ignore=lambda *_: ["distill", "export", "profile"]))

    def named(ident):
        assert store.get(ident).path.parent.parent == store.root

    @examples(300)
    @given(st.one_of(_WORDS, st.text(max_size=12)))
    def typed(ident):
        seen[outcome(lambda: named(ident))] += 1

    typed()
    both(seen)
    assert all(outcome(lambda ident=ident: named(ident)) == "refused" for ident in ("../5", "../../etc", "/etc/1"))


def test_the_state_of_an_interrupted_run_with_changed_bytes_is_read_or_made_again(here):
    path, seen = here / "state.pt", Counter()
    write_state(path, {"parameters": [torch.arange(8.0)], "done": 3})
    whole = path.read_bytes()

    class Listener(Report):
        def warn(self, message):
            seen["refused"] += "is damaged" in message

    @examples(150)
    @given(edits([(0.0, 0.3), (0.7, 1.0)]))
    def change(changes):
        path.write_bytes(edited(whole, changes))
        seen[outcome(lambda: read_state(path, Listener()))] += 1

    change()
    both(seen)


# Models, students and exports in the workspace


def run_once(denoiser):
    info = denoiser.info
    with torch.no_grad():
        denoiser.predict(torch.zeros(1, *info.shape), torch.tensor(1.0), torch.zeros(1, dtype=torch.int64), 1.5)


@pytest.mark.parametrize("name", ["model.json", "sites.json"])
def test_a_models_description_changed_as_a_tree_or_as_bytes_is_read_or_refused(here, road, name):
    path, seen = here / name, Counter()
    whole = road.current("model").file(name).read_bytes()
    tree = json.loads(whole)

    @examples(120)
    @given(st.one_of(trees(tree), edits([])))
    def change(changed):
        path.write_bytes(
            edited(whole, changed) if changed and isinstance(changed[0], tuple) else json.dumps(changed).encode()
        )
        seen[outcome(lambda: read_info(here) if name == "model.json" else read_sites(path))] += 1

    @examples(120)
    @given(st.one_of(trees(tree), trees(tree), edits([])))
    def change_mapping(changed):
        path.write_bytes(written(changed, whole))
        seen[outcome(lambda: read_info(here))] += 1

    change_mapping() if name == "model.json" else change()
    both(seen)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_exported_model_changed_as_a_tree_or_as_bytes_samples_or_is_refused(here, road, name):
    folder, seen = Path(shutil.copytree(road.current("export").path, here / "export")), Counter()
    path = folder / name
    whole = path.read_bytes()
    header, data = unframed(whole) if name == "model.safetensors" else (json.loads(whole), b"")

    @examples(40)
    @given(st.one_of(trees(header), trees(header), edits([(0.0, 0.05)])))
    def change(changed):
        is_tree = isinstance(changed, dict)
        path.write_bytes(framed(changed, data) if is_tree and data else written(changed, whole))
        seen[outcome(lambda: run_once(load_integer(folder, "cpu")))] += 1

    change()
    assert seen["refused"]


def test_a_students_tensors_changed_in_their_header_or_as_bytes_are_read_or_refused(here, road):
    path, seen = here / "student.safetensors", Counter()
    distilled = road.current("distill")
    whole = distilled.file("student.safetensors").read_bytes()
    teacher = load_denoiser(road.current("model").path)
    plan = read_plan(distilled.file("plan.yaml"), read_sites(road.current("model").file("sites.json")))
    header, data = unframed(whole)

    @examples(40)
    @given(st.one_of(trees(header), trees(header), edits([(0.0, 0.1)])))
    def change(changed):
        path.write_bytes(framed(changed, data) if isinstance(changed, dict) else edited(whole, changed))
        seen[outcome(lambda: run_once(load_fake(teacher, plan, path, freeze=False)))] += 1

    change()
    assert seen["refused"]


def test_what_was_measured_of_a_student_changed_in_its_header_is_read_or_refused(here):
    steps, seen = torch.arange(3, dtype=torch.float64), Counter()
    Correction(steps, torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), torch.tensor(1.5)).save(here)
    path = here / Correction.FILE
    whole = path.read_bytes()
    header, data = unframed(whole)

    @examples(100)
    @given(st.one_of(trees(header), edits([(0.0, 1.0)])))
    def change(changed):
        path.write_bytes(framed(changed, data) if isinstance(changed, dict) else edited(whole, changed))
        seen[outcome(lambda: Correction.load(here).rest(torch.tensor(1.0)))] += 1

    change()
    both(seen)


# Configurations, as manifests and recipes hold them


def test_a_stages_configuration_changed_as_a_tree_is_read_or_refused():
    from pipelines.stages import ROAD, load

    seen = Counter()

    @examples(200)
    @given(st.sampled_from(ROAD).flatmap(lambda stage: st.tuples(st.just(stage), trees(to_dict(load(stage).Config())))))
    def change(changed):
        seen[outcome(lambda: from_dict(load(changed[0]).Config, changed[1], "given"))] += 1

    change()
    both(seen)
