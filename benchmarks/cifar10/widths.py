"""The tables of docs/widths.md and of the transformer in docs/comparison.md, of the results that are committed.

    python -m benchmarks.cifar10.widths              # every method by widths: PSNR and FD
    python -m benchmarks.cifar10.widths w4a4 w4a8    # every figure at these widths, ordered by FD
    python -m benchmarks.cifar10.widths w4a3 --count 10000
    python -m benchmarks.cifar10.widths w4a4 --teacher dit --count 500
    python -m benchmarks.cifar10.widths --tuned      # every method as published and as it was tuned
    python -m benchmarks.cifar10.widths --picture docs/pictures/cifar10-widths.png   # PSNR, FD and precision, coloured

Taken are the cells of seed 0 in `benchmarks/results/cifar10/`, of the benchmark's UNet and of 1,000 images where
nothing else is asked for.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar10.run import BITS, IMAGES, ROOT
from pipelines.report.comparison import layers_text
from pipelines.report.pictures import figure_file, wrapped

RESULTS = ROOT / "benchmarks/results/cifar10"
WIDTHS = sorted(BITS.split(","), key=lambda bits: (-int(bits[3]), -int(bits[1])))  # 8-bit activations first
# The first that has a cell counts. `mended` is of methods that were changed after the tables of other widths were made.
FOLDERS = {
    "unet": (
        "w4a4", "w4a3", "w3a3", "mended", "w8a8", "w4a8", "w8a4", "w2a4", "variants", "variants-w3a3", "tuned",
        "tuned-others", "w3a3-more", "large", "large-widths", "large-w4a3", "large-w4a3-more", "large-w4a4",
    ),
    "dit": ("dit", "dit-tuned"),
}  # fmt: skip
MB = 1e6

# heading, key of a cell, decimals, and which is best: +1 the largest, -1 the least
FIGURES = (
    ("IS", "is", 3, 1), ("FD", "fid", 2, -1), ("sFD", "sfid", 2, -1), ("precision", "precision", 3, 1),
    ("recall", "recall", 3, 1), ("named right", "class_accuracy", 3, 1), ("PSNR of the mean error, dB", "psnr", 2, 1),
    ("MB", "bytes", 2, -1),
)  # fmt: skip
# Each method as published, and as its own options were tuned, or with the recipe of `auto` where it trains.
TUNED = {
    "hqdm (code)": "hqdm (tuned)", "efficientdm": "efficientdm (tuned)", "mpq_dm": "mpq_dm (tuned)",
    "double_hadamard (distilled)": "double_hadamard (tuned)", "quest": "quest (tuned)", "lsq": "lsq (tuned)",
    "ptqd": "ptqd (tuned)", "dmq": "dmq (search)", "tfmq": "tfmq (tuned)", "q_diffusion": "q_diffusion (tuned)",
    "ptq4dm": "ptq4dm (reconstructed)", "apq_dm": "apq_dm (published, groups=10)",
    "hadanorm": "hadanorm (published, convolutions=rotated)", "smoothquant": "smoothquant (search)",
    "outlier_suppression": "outlier_suppression (search)", "rtn (max)": "rtn (search)",
}  # fmt: skip
TUNED_AT = ("w4a4", "w4a3", "w3a3")
PICTURED = ("PSNR of the mean error, dB", "FD", "precision")
HEADS = ["method", "layers as asked/8/float", *(name for name, *_ in FIGURES)]
Cell = Mapping[str, Any]


def cells(results: Path = RESULTS, count: int = IMAGES, teacher: str = "unet") -> dict[tuple[str, str], Cell]:
    """(name of the method, bits) -> its cell of `count` images; the teacher's bits are its own, fp32."""
    found: dict[tuple[str, str], Cell] = {}
    for folder in FOLDERS[teacher]:
        if not (path := results / folder / "table.json").exists():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        for cell in table["cells"]:
            if cell["seed"] == 0 and table["about"]["n"] == count:
                name = cell["method"].removesuffix(" (published)")  # the only variant of most
                found.setdefault((name, cell["bits"]), cell)
    return found


def texts(cell: Cell) -> list[str]:
    """The figures of a cell as FIGURES orders and rounds them, empty where it has none."""
    found = []
    for _, key, decimals, _ in FIGURES:
        value = cell.get(key)
        found.append("" if value is None else f"{value / MB if key == 'bytes' else value:.{decimals}f}")
    return found


def marked(column: list[str], better: int) -> list[str]:
    """A column of figures, empty ones among them, with the best marked, of the digits shown."""
    best = max((float(value) * better for value in column if value), default=None)
    return [f"**{value}**" if value and float(value) * better == best else value for value in column]


def rows(bits: str, found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The Markdown table of one width, ordered by FD, the best of each figure marked."""
    students = sorted((cell["fid"], name) for (name, width), cell in found.items() if width == bits)
    named = {name: found[name, bits] for _, name in students}
    columns = zip(*map(texts, named.values()), strict=True)
    shown = zip(
        *(marked(list(column), figure[3]) for column, figure in zip(columns, FIGURES, strict=True)), strict=True
    )
    lines = [HEADS, ["---"] * len(HEADS), ["teacher", "", *texts(found["teacher", "fp32"])]]
    for (name, cell), row in zip(named.items(), shown, strict=True):
        lines.append([name, layers_text(cell["layers"]), *row])
    return [f"| {' | '.join(line)} |" for line in lines]


def ordered(found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The methods, by PSNR at the fewest bits that have most of them."""
    methods = sorted({name for name, bits in found if bits != "fp32"})
    by = max(WIDTHS, key=lambda bits: (sum((name, bits) in found for name in methods), WIDTHS.index(bits)))
    return sorted(methods, key=lambda name: found.get((name, by), {"psnr": float("-inf")})["psnr"], reverse=True)


def overview(found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The Markdown table of all widths, PSNR and FD: a row a method, the best of each width marked."""
    names, columns = ordered(found), []
    for bits in WIDTHS:
        mine = [found.get((name, bits)) for name in names]
        nearest = marked([f"{cell['psnr']:.2f}" if cell else "" for cell in mine], 1)
        least = marked([f"{cell['fid']:.2f}" if cell else "" for cell in mine], -1)
        columns.append([f"{psnr} · {fd}" if psnr else "" for psnr, fd in zip(nearest, least, strict=True)])
    lines = [["dB · FD", *WIDTHS], ["---"] * (len(WIDTHS) + 1), *zip(names, *columns, strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


def tuned(found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The Markdown table of TUNED: PSNR and FD as published → tuned, ordered by the latter's PSNR at three bits of
    activations, and those of `auto`.
    """

    def told(name: str, bits: str) -> str:
        cell = found.get((name, bits))
        return f"{cell['psnr']:.2f} · {cell['fid']:.2f}" if cell else ""

    names = sorted(TUNED, key=lambda name: found[TUNED[name], "w4a3"]["psnr"], reverse=True)
    lines = [["dB · FD", *TUNED_AT], ["---"] * (len(TUNED_AT) + 1)]
    lines.append(["hqdm (auto)", *(told("hqdm (auto)", bits) for bits in TUNED_AT)])
    for name in names:
        pairs = [(told(name, bits), told(TUNED[name], bits)) for bits in TUNED_AT]
        lines.append([f"{name} → {TUNED[name]}", *(f"{was} → {now}" if now else was for was, now in pairs)])
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(path: Path, found: Mapping[tuple[str, str], Cell]) -> None:
    """The widths that have several methods as a picture, with precision: a panel a figure, in print the value."""
    names, shown = ordered(found), [figure for figure in FIGURES if figure[0] in PICTURED]
    among = [bits for bits in WIDTHS if sum((name, bits) in found for name in names) > 1]
    shown.sort(key=lambda figure: PICTURED.index(figure[0]))
    width = 2.2 + 0.46 * len(among) * len(shown)
    teacher = texts(found["teacher", "fp32"])
    its = [f"{figure[0]} {teacher[FIGURES.index(figure)]}" for figure in shown if teacher[FIGURES.index(figure)]]
    caption = "Darker is better, at each width from its worst to its best; white: in no committed table."
    caption += f" The teacher has {', '.join(its)}."
    title = "Every method by bit widths: weights w, activations a"
    with figure_file(path, width, 1.0 + 0.21 * len(names), title, wrapped(caption, width)) as figure:
        for axis, (name, key, decimals, better) in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
            values = np.array(
                [[found[row, bits][key] if (row, bits) in found else np.nan for bits in among] for row in names]
            )
            # Distances grow without bound where a student fails: by their logarithm good ones can be told too.
            good = better * (np.log(values) if better < 0 else values)
            good -= np.nanmin(good, axis=0)
            good /= np.nanmax(good, axis=0).clip(1e-9)
            axis.imshow(np.ma.masked_invalid(good), aspect="auto", cmap="YlGnBu", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    axis.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", fontsize=5.5,
                              color="white" if good[row, column] > 0.6 else "black")  # fmt: skip
            axis.set_title(name + (" ↑" if better > 0 else " ↓"), loc="left")
            axis.set_xticks(range(len(among)), among)
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bits", nargs="*", help=f"{', '.join(WIDTHS)}; without one, all beside each other")
    parser.add_argument("--count", type=int, default=IMAGES, help="images of each cell")
    parser.add_argument("--teacher", default="unet", choices=FOLDERS, help="whose students")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--tuned", action="store_true", help="every method as published and as it was tuned")
    parser.add_argument("--picture", type=Path, help="file for the picture of all widths")
    options = parser.parse_args(arguments)
    if unknown := [bits for bits in options.bits if bits not in WIDTHS]:
        parser.error(f"{unknown[0]}: no such width; it is one of {', '.join(WIDTHS)}")
    found = cells(options.results, options.count, options.teacher)
    known = {bits for _, bits in found}
    lacking = f"{options.results}: no table of {options.teacher}, {options.count} images, has"
    if missing := [bits for bits in options.bits or ["fp32"] if bits not in known]:
        parser.error(f"{lacking} {missing[0]}")
    if options.tuned and (missing := [name for name in TUNED.values() if (name, "w4a3") not in found]):
        parser.error(f"{lacking} {missing[0]} at w4a3")
    for bits in options.bits:
        print(f"## {bits}\n\n" + "\n".join(rows(bits, found)) + "\n")
    if options.tuned:
        print("\n".join(tuned(found)))
    elif options.picture:
        draw(options.picture, found)
    elif not options.bits:
        print("\n".join(overview(found)))


if __name__ == "__main__":
    main()
