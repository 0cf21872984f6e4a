"""Every method at every bit width on the CIFAR-10 teacher: the benchmark's table.

    python -m benchmarks.cifar10.run --data DATA
    python -m benchmarks.cifar10.run --count 500 --methods hqdm efficientdm --bits w4a4,w4a3

It is one comparison (`hqdm compare` in pipelines/comparison/) of the teacher that benchmarks.cifar10.train trains and
benchmarks.cifar10.teacher writes, scored by the classifier against CIFAR-10's 10,000 test images. Every cell is a chain
of artifacts in the workspace: what is there is not computed twice, so it can be stopped and gone on with at any moment,
and a table that is whole is only printed again. DATA is needed until WORK has the test images. The table, its pictures,
the machine and the versions go to RESULTS.
"""

import argparse
import fcntl
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from benchmarks.cifar10 import reference
from benchmarks.options import told
from hqdm_cli import console
from pipelines import methods
from pipelines.comparison.asked import ask, read_recipe
from pipelines.comparison.run import compare, model_of
from pipelines.errors import FileFault, HqdmError
from pipelines.report import comparison
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

HERE = Path(__file__).absolute().parent
ROOT = HERE.parents[1]
TEACHERS = {"unet": HERE / "unet/model.ckpt", "dit": HERE / "dit"}
METHODS = [*methods.METHODS, "hqdm/code", "hqdm/auto"]  # in default variants, and hqdm as published and searched
BITS = "w8a8,w4a8,w8a4,w4a4,w4a3,w3a3,w2a4"
IMAGES = 1000


def portable(value: Any, places: dict[str, str]) -> Any:
    """A table in which no text names a folder of this machine: each path of `places` as what stands for it."""
    if isinstance(value, str):
        for path, name in places.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {key: portable(entry, places) for key, entry in value.items()}
    return [portable(entry, places) for entry in value] if isinstance(value, list) else value


def _from_here(path: Path) -> str:
    """A path as it is typed in the project's folder; of one outside it the name."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if ROOT in path.parents else path.name


def write_results(table: dict, artifact: Artifact, folder: Path, options: argparse.Namespace) -> None:
    """The comparison's table and pictures with nothing in them that is true of this machine's folders alone: paths are
    as they are typed in the project's folder, and commands name the teacher and the workspace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(artifact.file("table.json")) as held:  # processes that divided the cells end at the same moment
        fcntl.flock(held, fcntl.LOCK_EX)
        _write_results(table, artifact, folder, options)


def _write_results(table: dict, artifact: Artifact, folder: Path, options: argparse.Namespace) -> None:
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    shutil.copytree(artifact.path / "pictures", folder / "pictures")
    about, teacher = table["about"], table["about"]["model_path"]
    workspace = f" -w {shlex.quote(_from_here(options.workspace))}"
    for cell in [*table["cells"], *table["failed"]]:
        if command := cell.get("command"):
            by_path = f"--model {shlex.quote(teacher)}"  # which makes the artifact wherever there is none
            cell["command"] = command.replace(f"--model {about['model']}", by_path) + workspace
    named = [teacher, about["options"]["score"]["reference_path"], str(options.workspace.absolute())]
    places = {path: _from_here(Path(path)) for path in sorted(named, key=len, reverse=True)}
    table = portable(table, places | {f"{ROOT}/": ""})
    about = table["about"]
    (folder / "table.csv").write_text(comparison.csv_text(table), encoding="utf-8")
    text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "table.json").write_text(text + "\n", encoding="utf-8")
    lines = ["# CIFAR-10", "", *comparison.markdown(table), ""]
    lines += [f"Libraries: {about['libraries']}. Options: {json.dumps(about['options'])}.", ""]
    if table["failed"]:
        lines += ["Cells without figures:", ""]
        lines += comparison.failures(table)
        lines.append("")
    for picture in sorted((folder / "pictures").iterdir()):
        lines += [f"![{picture.stem}](pictures/{picture.name})", ""]
    lines += ["`make benchmark-cifar10 DATA=FOLDER` makes all of it; docs/cifar10.md says what is measured.", ""]
    (folder / "table.md").write_text("\n".join(lines), encoding="utf-8")


def run(options: argparse.Namespace) -> None:
    """Compare, print the table and write it to the results' folder; HqdmError where cells failed."""
    teacher = TEACHERS.get(options.teacher, Path(options.teacher))
    if not teacher.exists():
        kind = options.teacher if options.teacher in TEACHERS else next(iter(TEACHERS))
        raise FileFault(
            f"{teacher}: no such teacher",
            f"train it, python -m benchmarks.cifar10.train {kind} --train DATA/train, and write it, "
            f"python -m benchmarks.cifar10.teacher {kind}; or name a checkpoint: --teacher model.ckpt",
        )
    against = reference.written(options.data, "test", options.work)
    drawn = {"steps": options.steps, "guidance": options.guidance}
    learned = {"trajectories": options.trajectories, "guidance": options.guidance}
    if options.images is not None:
        learned["batch"] = options.images
    asked = ask(
        methods_of(options), options.bits.split(","), options.seeds,
        {
            "profile": drawn,
            "distill": learned,
            "sample": drawn | {"count": options.count, "batch": options.batch},
            "score": {"extractor": "cifar10", "reference_path": str(against)},
        },
    )  # fmt: skip
    store = Store(options.workspace)
    with console.Progress() as progress:
        taken = model_of(store, str(teacher), progress, options.dry_run)
        result = compare(store, asked, taken.artifact, progress, dry_run=options.dry_run)
    if options.dry_run:
        missing = [cell.name for cell in result.cells if not cell.ended]
        print("\n".join(missing))
        left = f", about {console.duration(result.seconds)}" if missing and result.seconds else ""
        print(f"{len(missing)} of {len(result.cells)} cells would be made{left}")
        return
    artifact = result.outcome.artifact
    table = artifact.values("table.json")
    print("\n".join(comparison.markdown(table)))
    write_results(table, artifact, options.results, options)
    print(f"\n{options.results}/table.md, table.json, table.csv and pictures/")
    if result.failed:
        names = ", ".join(cell.name for cell in result.failed)
        raise HqdmError(f"{len(result.failed)} of {len(result.cells)} cells failed: {names}", "table.md says of what")


def parser() -> argparse.ArgumentParser:
    """What a comparison is told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images; not needed again where WORK has them")
    parser.add_argument("--teacher", default="unet", help=f"{', '.join(TEACHERS)}, or a checkpoint's path")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--methods", nargs="+", default=METHODS, help="method/variant:option=value …; all by default")
    which.add_argument("--from", dest="recipe", type=Path, help="take the methods of a file for hqdm compare --from")
    parser.add_argument("--bits", default=BITS, help="with commas")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of distillation and images")
    parser.add_argument("--count", type=int, default=IMAGES, help="images of each cell")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM, in distillation and sampling")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--trajectories", type=int, default=20, help="of each distillation")
    parser.add_argument("--images", type=int, help="of each update of a distillation; by default as hqdm distill")
    parser.add_argument("--batch", type=int, default=50, help="images sampled at a time")
    parser.add_argument("--work", type=Path, default=reference.WORK, help="folder for the test images")
    parser.add_argument("--workspace", type=Path, default=reference.WORK / "benchmark")
    parser.add_argument("--results", type=Path, default=reference.WORK / "results", help="folder of the table")
    parser.add_argument("--dry-run", action="store_true", help="say which cells are missing")
    return parser


def methods_of(options: argparse.Namespace) -> list[str]:
    """The methods asked for, by their names or by a recipe."""
    return read_recipe(options.recipe).methods if options.recipe else options.methods


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.images is not None and options.images < 1:
        parser().error(f"--images {options.images}: an update needs an image at least")
    with told():
        run(options)


if __name__ == "__main__":
    main()
