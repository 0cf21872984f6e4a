"""Models on space-to-depth latents, the CIFAR-10 judge, and what the benchmark writes and reads."""

import io
import itertools
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from roads import make
from torch.nn import functional as F

from benchmarks import options as benchmark_options
from benchmarks.cifar10 import classifier, contrast, reference, run, tables, teacher, train, widths
from pipelines import cifar10, diffusion, runner
from pipelines.cifar10.data import find_split, load_split
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.metrics import scores
from pipelines.metrics.extractors import load_extractor
from pipelines.models import source
from pipelines.models.compvis import load_checkpoint
from pipelines.models.denoiser import load_denoiser, save_denoiser
from pipelines.models.first_stage import FirstStage, SpaceToDepth
from pipelines.report import comparison
from pipelines.stages import load, profile
from pipelines.workspace.store import Store

STEPS, BLOCK = 2, 2


class Narrow(torch.nn.Module):
    """The teacher's UNet, narrow."""

    def __init__(self):
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=12, out_channels=12, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=(1, 2), norm_num_groups=32,
        )  # fmt: skip
        self.embedding = torch.nn.Embedding(11, 64)


def narrow():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Narrow().eval().requires_grad_(False)


def tiny_checkpoint(folder, **changes):
    """The narrow UNet as the benchmark writes its teacher; `changes` to the first stage's parameters."""
    path = teacher.write_unet(narrow(), 7, folder)
    config = yaml.safe_load((folder / "model.yaml").read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"]["model_channels"] = 32
    params["first_stage_config"]["params"].update(changes)
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The benchmark's arguments on the tiny checkpoint and six images that stand for CIFAR-10's, after it has run."""
    folder = tmp_path_factory.mktemp("cifar10")
    as_folder(folder / "data/test", photographs(6))
    words = ["--teacher", str(tiny_checkpoint(folder / "model")), "--data", str(folder / "data")]
    words += ["--work", str(folder), "--workspace", str(folder / "workspace"), "--results", str(folder / "results")]
    words += ["--methods", "hqdm", "--bits", "w4a4", "--count", "5", "--batch", "3", "--steps", str(STEPS)]
    words += ["--trajectories", "1", "--guidance", "1.5"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profile, "_draw", lambda *_: None)
        run.main(words)
    return folder, words


@pytest.fixture(scope="module")
def road(bench):
    """Artifacts of the benchmark's one student by stage, the samples by source."""
    store = Store(bench[0] / "workspace")
    made = {stage: store.current(stage) for stage in ("model", "profile", "plan", "distill", "export", "score")}
    with np.load(store.current("sample").file("samples.npz")) as drawn:
        count = len(drawn["arr_0"])
    made["fake"] = make(store, "sample", source="fake", count=count, batch=3, steps=STEPS, guidance=1.5)
    return made | {sample.config["source"]: sample for sample in store.artifacts("sample")}


def images_of(artifact):
    return np.load(artifact.file("samples.npz"))["arr_0"]


def test_space_to_depth_is_undone_exactly_and_loses_nothing():
    images = torch.rand(2, 3, 8, 6) * 2 - 1
    stage = SpaceToDepth(BLOCK)
    latents = stage.encode(images)
    assert latents.shape == (2, 12, 4, 3) and torch.equal(stage.decode(latents), images)
    # Channel c·4 + 2·y + x is image channel c at row y and column x of every block.
    assert torch.equal(latents[:, 1 * 4 + 2 * 1 + 0], images[:, 1, 1::2, 0::2])


def test_a_model_on_space_to_depth_goes_from_checkpoint_to_scored_integers(road):
    assert road["model"].figures["info"]["shape"] == [12, 16, 16]
    drawn = {name: images_of(road[name]) for name in ("teacher", "fake", "int")}
    assert drawn["int"].shape == (5, 32, 32, 3) and drawn["int"].std() > 0
    assert np.array_equal(drawn["fake"], drawn["int"]) and not np.array_equal(drawn["teacher"], drawn["int"])
    assert road["score"].figures["psnr_of_mean_mse"] > 5


def test_the_benchmarks_table_is_its_scores_and_names_no_place_of_this_machine(bench, road):
    results = bench[0] / "results"
    table = json.loads((results / "table.json").read_text())
    teachers, students = table["rows"]
    assert (teachers["method"], students["bits"]) == ("teacher", "w4a4")
    assert students["fid"]["mean"] == road["score"].figures["fd_cifar10"]
    assert table["about"]["n"] == 5 and table["about"]["reference_n"] == 6 and table["about"]["machine"]
    for kind in ("md", "csv", "json"):
        text = (results / f"table.{kind}").read_text()
        assert str(bench[0]) not in text and str(run.ROOT) not in text
    assert table["about"]["model_path"] == "model.ckpt"
    assert table["about"]["options"]["score"]["reference_path"] == "cifar10-test.npz"
    command = next(cell["command"] for cell in table["cells"] if "command" in cell)
    assert "--model model.ckpt " in command and command.endswith(" -w workspace")
    pictures = {file.name for file in (results / "pictures").iterdir()}
    assert "samples-w4a4.png" in pictures
    assert all(f"(pictures/{name})" in (results / "table.md").read_text() for name in pictures)


def test_a_benchmark_that_is_whole_is_only_printed_again(bench, road, capsys):
    store = Store(bench[0] / "workspace")
    before = [artifact.id for stage in ("plan", "distill", "sample", "score") for artifact in store.artifacts(stage)]
    run.main(bench[1])
    assert "| w4a4 | hqdm" in capsys.readouterr().out
    after = [artifact.id for stage in ("plan", "distill", "sample", "score") for artifact in store.artifacts(stage)]
    assert after == before
    run.main([*bench[1], "--dry-run"])
    assert "0 of 2 cells would be made" in capsys.readouterr().out


def test_a_benchmark_without_its_teacher_or_images_says_what_to_type(tmp_path):
    with pytest.raises(SystemExit, match="no such teacher(?s:.*)cifar10.train unet(?s:.*)cifar10.teacher unet"):
        run.main(["--teacher", str(tmp_path / "model.ckpt")])
    with pytest.raises(SystemExit, match="--data FOLDER"):
        run.main(["--teacher", str(tiny_checkpoint(tmp_path)), "--work", str(tmp_path)])


def test_trainings_without_their_images_say_so_in_two_lines(tmp_path):
    nowhere, work = str(tmp_path / "nowhere"), ["--work", str(tmp_path)]
    for main, words in (
        (train.main, ["unet", "--train", nowhere]), (classifier.main, ["--train", nowhere, "--test", nowhere])
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="^error: .*nowhere"):
            main([*words, *work])


def test_steps_that_are_no_numbers_are_refused_as_they_are_typed(capsys):
    for words in (["--steps", "a"], ["--guidance", "1,b"]):
        with pytest.raises(SystemExit):
            teacher.main(["unet", "--judge", *words])
        assert f"{words[1]!r}: give " in capsys.readouterr().err


def test_a_training_goes_on_to_another_end_only_before_its_rate_has_begun_to_fall(tmp_path):
    asked = {"network": "unet", "seed": 0, "batch": 64, "steps": 100, "fall": 20}
    for step in (0, 81):  # the last of 81 steps still had the whole rate
        train.check_going_on(asked | {"step": step}, asked | {"steps": 200}, tmp_path)
    for step, change in ((82, {"steps": 200}), (100, {"steps": 200}), (82, {"fall": 10}), (60, {"steps": 70})):
        with pytest.raises(UsageError, match=f"at step {step} of 100 with a fall over the last 20: too late") as fault:
            train.check_going_on(asked | {"step": step}, asked | change, tmp_path)
        assert "--steps 100 --fall 20" in fault.value.hint
    train.check_going_on(asked | {"step": 100}, asked, tmp_path)
    with pytest.raises(UsageError, match="of another run: batch 64, not 32"):
        train.check_going_on(asked | {"step": 1}, asked | {"batch": 32}, tmp_path)


def test_the_written_teacher_predicts_what_was_trained(tmp_path):
    trained, denoiser = narrow(), load_checkpoint(tiny_checkpoint(tmp_path))[0]
    for value in trained.parameters():
        value.copy_(value.half())  # as the file has it
    x, classes = torch.randn(2, 12, 16, 16), torch.tensor([3, 10])  # the last is the null class
    context = trained.embedding(classes)[:, None]
    with torch.no_grad():
        theirs = trained.unet(x, torch.tensor(401), encoder_hidden_states=context).sample
        assert torch.allclose(denoiser.predict(x, torch.tensor(401), classes, 1.0), theirs, atol=1e-5)


def test_its_images_are_its_latents_rearranged(road):
    denoiser = load_denoiser(road["model"].path)
    latents = torch.randn(2, 12, 16, 16)
    assert torch.equal(denoiser.decode(latents), F.pixel_shuffle(latents, BLOCK).clamp(-1, 1))


def test_the_estimated_image_is_clipped_to_the_range_of_pixels_at_every_step(road):
    info = load_denoiser(road["model"].path).info
    scheduler = diffusion.make_scheduler("DDIMScheduler", info.schedule, STEPS)
    far = torch.full((1, 12, 16, 16), 3.0)
    estimate = scheduler.step(torch.zeros_like(far), scheduler.timesteps[0], far).pred_original_sample
    assert torch.equal(estimate, torch.ones_like(far))


def test_a_first_stage_without_weights_is_saved_as_a_configuration_alone(road, tmp_path):
    for artifact in (road["model"], road["export"]):
        folder = artifact.path / "first_stage"
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        assert json.loads((folder / "config.json").read_text()) == {"_class_name": "SpaceToDepth", "block": BLOCK}
        assert FirstStage.load(artifact.path).factor == BLOCK
    save_denoiser(load_denoiser(road["model"].path), tmp_path)
    assert FirstStage.load(tmp_path).module().block == BLOCK


@pytest.mark.parametrize("block", [0, -2, "2", 2.0, True, None])
def test_a_saved_block_that_cannot_be_is_a_fault_of_its_folder(tmp_path, block):
    (tmp_path / "first_stage").mkdir()
    config = {"_class_name": "SpaceToDepth", "block": block}
    (tmp_path / "first_stage/config.json").write_text(json.dumps(config))
    with pytest.raises(FileFault, match="no first stage can be read"):
        FirstStage.load(tmp_path).module()


def test_the_size_asked_for_is_counted_in_blocks():
    stage = FirstStage(SpaceToDepth(BLOCK))
    assert source.sized((12, 4, 4), 16, stage) == (12, 8, 8)
    with pytest.raises(UsageError, match="15 is no multiple of 2"):
        source.sized((12, 4, 4), 15, stage)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"block": None}, FileFault, "first_stage_config.params.block is missing"),
        ({"block": 0}, FileFault, "first_stage_config.params.block cannot be 0"),
        ({"block": 1 << 20}, FileFault, "first_stage_config.params.block cannot be 1048576"),
        ({"block": "two"}, FileFault, "block cannot be 'two'"),
        ({"block": 3}, HqdmError, "block: 3 with in_channels: 12"),
        ({"block": 4}, HqdmError, "block: 4 with in_channels: 12"),
    ],
)
def test_a_block_that_does_not_fit_the_denoiser_is_refused_by_its_key(tmp_path, changes, kind, told):
    path = tiny_checkpoint(tmp_path, **changes)
    with pytest.raises(kind) as caught:
        load_checkpoint(path)
    assert told in caught.value.what and "model.yaml" in caught.value.what and caught.value.hint


def test_a_scale_factor_is_refused_where_nothing_would_be_scaled(tmp_path):
    path = tiny_checkpoint(tmp_path)
    config = yaml.safe_load((tmp_path / "model.yaml").read_text())
    config["model"]["params"]["scale_factor"] = 0.5
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(HqdmError, match="SpaceToDepth with a scale_factor"):
        load_checkpoint(path)


def test_first_stage_tensors_have_no_place_in_a_file_without_one(tmp_path):
    path = tiny_checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["first_stage_model.decoder.conv_in.weight"] = torch.ones(1)
    torch.save(content, path)
    with pytest.raises(FileFault, match="unexpected: first_stage_model.decoder.conv_in.weight"):
        load_checkpoint(path)


# Two classes are enough for what is read; colours stand for them.
def photographs(count=4):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_folder(folder, images, names=("truck", "bird")):
    for index, image in enumerate(images):
        file = folder / names[index % len(names)] / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return folder


def as_archive(path, folder):
    with tarfile.open(path, "w:xz") as archive:
        archive.add(folder, ".")
    return path


def test_a_folder_and_an_archive_give_the_same_images_with_their_folders_as_labels(tmp_path):
    images = photographs()
    folder = as_folder(tmp_path / "test", images)
    archive = as_archive(tmp_path / "cifar10-test.tar.xz", folder)
    for found in (load_split(folder), load_split(archive)):
        assert found.labels.tolist() == [2, 2, 9, 9]  # bird, truck
        assert np.array_equal(found.images, images[[1, 3, 0, 2]])


@pytest.mark.parametrize(
    ("images", "names", "told"),
    [
        (photographs(), ("truck", "cow"), "cow/0001.png is in no class's folder"),
        (photographs()[:, :16, :16], ("truck",), "holds 16×16 images of 3 channels"),
        (photographs()[..., 0], ("truck",), "holds 32×32 images of 1 channels"),
    ],
)
def test_images_that_are_not_cifar10s_are_refused(tmp_path, images, names, told):
    with pytest.raises(FileFault) as caught:
        load_split(as_folder(tmp_path / "test", images, names))
    assert told in caught.value.what and "airplane" in caught.value.hint


def test_images_that_are_not_where_they_are_looked_for_are_named(tmp_path):
    with pytest.raises(FileFault, match="train images are looked for, and there are no images") as caught:
        find_split(tmp_path, "train")
    assert "cifar10-train.tar.xz" in caught.value.hint
    for ending in ("tar", "zip"):
        (tmp_path / f"cifar10-train.{ending}").write_bytes(b"")
    with pytest.raises(FileFault, match="2 archives"):
        find_split(tmp_path, "train")


def test_the_reference_is_written_once_and_again_for_other_images(tmp_path):
    data, work = tmp_path / "data", tmp_path / "work"
    as_folder(data / "test", photographs())
    path = reference.written(data, "test", work)
    first = path.read_bytes()
    moment = path.stat().st_mtime_ns
    assert reference.written(data, "test", work) == reference.written(None, "test", work) == path
    assert path.stat().st_mtime_ns == moment
    as_folder(data / "test", photographs(6))
    assert reference.written(data, "test", work).read_bytes() != first
    assert np.load(path)["arr_1"].tolist() == [2, 2, 2, 9, 9, 9]


def test_nothing_says_where_the_images_are_until_somebody_does(tmp_path):
    with pytest.raises(UsageError) as caught:
        reference.written(None, "test", tmp_path)
    assert "--data FOLDER" in caught.value.hint
    with pytest.raises(SystemExit, match="error: .*\nhint: "), benchmark_options.told():
        reference.written(None, "test", tmp_path)


def test_a_balanced_choice_has_equally_many_of_each_class():
    labels = np.repeat(np.arange(10), 7)
    assert np.bincount(labels[reference.balanced(labels, 50)]).tolist() == [5] * 10


def test_the_judge_brings_its_weights_and_says_its_widths():
    extractor = load_extractor("cifar10")
    images = photographs()
    features = extractor.features(images)
    kind = extractor.kind
    assert (kind.pool, kind.spatial, kind.classes, kind.size) == (192, 512, 10, 32)
    assert [values.shape for values in features] == [(4, 192), (4, 512), (4, 10)]
    assert cifar10.CLASSIFIER.stat().st_size < 4_000_000
    again = extractor.features(images[:1])
    assert torch.allclose(again.pool, features.pool[:1], atol=1e-5)
    with pytest.raises(UsageError, match="'cifar10' comes with its weights"):
        load_extractor("cifar10", "other.pth")
    with pytest.raises(HqdmError, match="takes only 32×32"):
        extractor.features(images[:, :16])


def test_samples_are_scored_against_an_archive_by_the_judge_with_their_classes(tmp_path):
    """Random pixels stand for both sides: what is scored is that the figures are there and the reference counted."""
    images = photographs(24)
    archive = as_archive(tmp_path / "cifar10-test.tar.xz", as_folder(tmp_path / "test", images[12:]))
    np.savez(tmp_path / "samples.npz", arr_0=images[:12], arr_1=np.arange(12) % 10)
    stage, store = load("score"), Store(tmp_path / "workspace")
    asked = dict(samples_path=str(tmp_path / "samples.npz"), extractor="cifar10")
    against = {
        name: str(path) for name, path in (("tar", archive), ("npz", reference.written(tmp_path, "test", tmp_path)))
    }
    found = {}
    for name, path in against.items():
        config = stage.with_hashes(stage.Config(reference_path=path, **asked))
        found[name] = runner.make(store, "score", config, {}).artifact.figures
    for name in ("fd_cifar10", "sfd_cifar10", "precision", "recall", "class_accuracy"):
        assert np.isfinite(found["tar"][name]) and found["tar"][name] == found["npz"][name]
    assert found["npz"]["reference_n"] == 12


@pytest.mark.parametrize("folder", tables.TABLES)
def test_a_committed_table_holds_what_its_words_ask_for(folder, monkeypatch):
    monkeypatch.chdir(run.ROOT)
    options = run.parser().parse_args(tables.words_of(folder))
    table = json.loads((widths.RESULTS / folder / "table.json").read_text(encoding="utf-8"))
    about, cells = table["about"], table["cells"]
    assert about["bits"] == options.bits.split(",") and about["seeds"] == options.seeds and not table["failed"]
    assert about["model_path"] == str(run.TEACHERS[options.teacher].relative_to(run.ROOT))
    drawn, learned = about["options"]["sample"], about["options"]["distill"]
    assert (drawn["count"], drawn["steps"], drawn["guidance"]) == (options.count, options.steps, options.guidance)
    assert (learned["trajectories"], learned.get("batch")) == (options.trajectories, options.images)
    wanted = {frozenset(re.split("[:,]", spec)) for spec in run.methods_of(options)}  # options in any order
    found = {
        (frozenset(re.split("[:,]", cell["spec"])), cell["bits"], cell["seed"])
        for cell in cells if cell["spec"] != "teacher"
    }  # fmt: skip
    assert found == set(itertools.product(wanted, about["bits"], about["seeds"]))
    shown = (widths.RESULTS / folder / "table.csv").read_text(encoding="utf-8")
    assert shown == comparison.csv_text(table) and ",fd_cifar10," in shown


def test_every_committed_folder_is_one_of_the_tables_that_can_be_made_again():
    assert {path.name for path in widths.RESULTS.iterdir() if path.is_dir()} == set(tables.TABLES)


def test_without_the_images_the_committed_tables_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tables.main([])
    said = capsys.readouterr().out
    assert "\n".join(widths.overview(widths.cells())) in said and "--data FOLDER" in said


def test_the_pages_show_what_the_command_of_widths_prints_of_the_committed_tables():
    found, large = widths.cells(), widths.cells(count=10_000)
    page = (run.ROOT / "docs/widths.md").read_text(encoding="utf-8")
    assert "\n".join(widths.overview(found)) in page.split("\n## ")[0]
    sections = {section.split("\n")[0]: section for section in page.split("\n## ")[1:]}
    assert set(sections) == set(widths.WIDTHS)
    for bits, section in sections.items():
        assert "\n".join(["", *widths.rows(bits, found), ""]) in section
        assert len([name for name, width in found if width == bits]) >= len(run.METHODS)
        if len([name for name, width in large if width == bits]) > 3:  # the three close calls are in docs/comparison.md
            assert "\n".join(["", *widths.rows(bits, large), ""]) in section
    other = (run.ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert "\n".join(["", *widths.rows("w4a4", widths.cells(count=500, teacher="dit")), ""]) in other
    assert "\n".join(["", *widths.tuned(found), ""]) in other
    named = {name.split(" ")[0] for name in widths.TUNED}
    assert named == set(run.methods.METHODS), "a tuned baseline is owed to every method"


# heading -> key of a row, decimals, which is best
KEYS = {heading: figure for heading, *figure in widths.FIGURES}
KEYS |= {"weights, MB": KEYS["MB"], "contrast": ("contrast", 2, 0)}


def shown_in(section: str) -> list[tuple[str, str, dict[str, str]]]:
    """(width, method, heading -> text) of the rows of the first table in a section of docs/comparison.md."""
    page = (run.ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    lines = re.split("\n##+ ", page.partition(f"\n## {section}\n")[2], maxsplit=1)[0].splitlines()
    table = [[word.strip() for word in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = [(*row[0].split(" ", 1), dict(zip(table[0][1:], row[1:], strict=True))) for row in table[2:]]
    return [row for row in rows if row[0] in widths.WIDTHS]


@pytest.mark.parametrize("section, folders", [
    ("With 10,000 images", ("large", "large-widths")), ("Against tuned baselines", ("tuned", "seeds"))
])  # fmt: skip
def test_the_tables_of_the_comparisons_page_are_the_committed_ones_with_the_best_marked(section, folders):
    held = [json.loads((widths.RESULTS / folder / "table.json").read_text())["rows"] for folder in folders]
    figures = {(row["bits"], row["method"]): row for rows in held for row in rows}
    shown = shown_in(section)
    assert len(shown) > 15
    for bits in {row[0] for row in shown}:
        mine = [(named.replace(": as published", ""), told) for width, named, told in shown if width == bits]
        for heading in mine[0][1]:
            key, digits, better = KEYS[heading]
            scale = 1e-6 if key == "bytes" else 1
            means = {name: figures[bits, name][key] for name, _ in mine}
            best = max(round(figure["mean"] * scale, digits) * better for figure in means.values())
            for name, told in mine:
                mean, sd = means[name]["mean"] * scale, means[name]["sd"]
                text = f"{mean:.{digits}f}" + (f" ± {sd * scale:.{digits}f}" if sd is not None else "")
                text = f"**{text}**" if better and round(mean, digits) * better == best else text
                assert told[heading] == text, (bits, name, heading)


def test_a_page_of_widths_marks_the_best_and_refuses_a_width_that_is_none(capsys):
    widths.main(["w4a4"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    head, students = rows[0], rows[3:]
    for place, (name, _, _, sign) in enumerate(widths.FIGURES, 2):
        marked = {float(row[place].strip("*")) for row in students if row[place].startswith("**")}
        assert marked == {max(float(row[place].strip("*")) * sign for row in students) * sign}, name
    distances = [float(row[head.index("FD")].strip("*")) for row in students]
    assert distances == sorted(distances)
    with pytest.raises(SystemExit):
        widths.main(["w4a5"])
    assert "it is one of w8a8" in capsys.readouterr().err
    for asked in (["w8a8"], []):
        with pytest.raises(SystemExit):
            widths.main([*asked, "--count", "7"])
        assert f"no table of unet, 7 images, has {(*asked, 'fp32')[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        widths.main(["--tuned", "--count", "10000"])
    assert "no table of unet, 10000 images, has hqdm (tuned) at w4a3" in capsys.readouterr().err


def test_the_picture_of_widths_prints_what_the_tables_hold(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **options: drawn.update({path: figure})
    )
    widths.main(["--picture", str(tmp_path / "widths.png")])
    panels, found = drawn[tmp_path / "widths.png"].axes, widths.cells()
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert [panel.get_title(loc="left")[:-2] for panel in panels] == list(widths.PICTURED)
    for panel, (key, decimals) in zip(panels, (("psnr", 2), ("fid", 2), ("precision", 3)), strict=True):
        printed = {}
        for text in panel.texts:
            column, row = text.get_position()
            printed[names[int(row)], panel.get_xticklabels()[int(column)].get_text()] = text.get_text()
        counts = Counter(bits for _, bits in found)
        students = {place: cell for place, cell in found.items() if counts[place[1]] > 1}  # no teacher either
        assert printed == {place: f"{cell[key]:.{decimals}f}" for place, cell in students.items()}


def test_contrast_is_about_an_images_own_mean_and_measured_as_its_deviation():
    images = photographs(3) // 4 + 96  # so that nothing is clipped
    stronger = contrast.with_contrast(images, 1.5)
    assert np.array_equal(contrast.with_contrast(images, 1), images)
    assert np.allclose(stronger.mean(axis=(1, 2, 3)), images.mean(axis=(1, 2, 3)), atol=0.25)
    assert scores.pair_figures(stronger, images)["contrast"] == pytest.approx(1.5, rel=2e-3)


def test_sharpness_is_about_a_pixels_neighbours_and_leaves_what_is_even_alone():
    images = photographs(3) // 4 + 96
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 4, (1, 32, 32, 3))
    assert np.array_equal(contrast.with_sharpness(images, 1), images)
    assert np.array_equal(contrast.with_sharpness(ramp, 3)[:, 1:-1], ramp[:, 1:-1])
    assert contrast.detail(ramp[:, 1:-1]) < contrast.detail(images)
    levels = [contrast.detail(contrast.with_sharpness(images, factor)) for factor in (0.5, 1, 1.5)]
    assert levels == sorted(levels)
    one = np.zeros((1, 3, 3, 1), np.uint8)
    one[0, 1, 1, 0] = 80  # 80 from its neighbours, of which each has a quarter of it
    assert contrast.with_sharpness(one, 1.5)[0, :, :, 0].tolist() == [[0, 0, 0], [0, 100, 0], [0, 0, 0]]


def test_figures_at_the_contrast_that_is_there_are_the_scores_of_the_images(tmp_path, capsys):
    images = photographs(24)
    as_folder(tmp_path / "test", images[12:])
    np.savez(tmp_path / "samples.npz", arr_0=images[:12], arr_1=np.arange(12) % 10)
    words = [str(tmp_path / "samples.npz"), "--contrast", "1,0.5", "--data", str(tmp_path), "--work", str(tmp_path)]
    contrast.main(words)
    same, paler = (row.split(" | ") for row in capsys.readouterr().out.splitlines()[-2:])
    stage = load("score")
    asked = stage.Config(
        samples_path=str(tmp_path / "samples.npz"), extractor="cifar10",
        reference_path=str(reference.written(None, "test", tmp_path)),
    )  # fmt: skip
    score = runner.make(Store(tmp_path / "workspace"), "score", stage.with_hashes(asked), {}).artifact.figures
    keys = {3: "fd_cifar10", 4: "sfd_cifar10", 6: "precision", 7: "recall", 8: "class_accuracy"}
    assert {place: float(same[place]) for place in keys} == pytest.approx(
        {place: score[key] for place, key in keys.items()}, abs=6e-3
    )
    assert same[9].strip(" |") == "" and float(paler[9].strip(" |")) > 0
    assert float(paler[1]) < float(same[1])
    contrast.main([words[0], "--sharpness", "1,0.5", *words[3:]])
    as_they_are, softer = (row.split(" | ") for row in capsys.readouterr().out.splitlines()[-2:])
    assert as_they_are == same and float(softer[2]) < float(same[2])
    for wrong in ("", "much", "1,-2", "nan"):
        with pytest.raises(SystemExit):
            contrast.main([*words[:1], "--contrast", wrong])
        assert "give numbers of 0 or more" in capsys.readouterr().err


def test_a_classifier_is_not_taken_for_images_just_because_of_their_size(tmp_path):
    """32×32 in colour may be of anything: without a name the extractor is Inception."""
    stage = load("score")
    assert (
        stage.with_hashes(stage.Config()).extractor_sha256
        != stage.with_hashes(stage.Config(extractor="cifar10")).extractor_sha256
    )


def test_the_dit_is_written_as_a_folder_that_is_taken_with_its_null_class_last(tmp_path):
    from diffusers import DiTTransformer2DModel

    class NarrowDiT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = DiTTransformer2DModel(
                sample_size=8, patch_size=4, in_channels=3, out_channels=3, num_layers=1, num_attention_heads=2,
                attention_head_dim=16, num_embeds_ada_norm=10,
            )  # fmt: skip

    model = NarrowDiT().eval().requires_grad_(False)
    for value in model.parameters():
        value.copy_(value.half())  # as the file has it
    folder = teacher.write_dit(model, 3, tmp_path / "dit")
    denoiser, _ = source.take(folder)
    assert denoiser.info.conditions == 10 and denoiser.info.shape == (3, 8, 8)
    assert denoiser.conditions.class_labels.tolist() == list(range(11))
    x, classes = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    theirs = model.dit(x, timestep=torch.tensor([5, 5]), class_labels=classes).sample
    with torch.no_grad():
        assert torch.allclose(denoiser.predict(x, torch.tensor(5), classes, 1.0), theirs, atol=1e-5)
