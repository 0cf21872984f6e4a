"""The tables of docs/widths.md, those whose results are committed.

    python -m benchmarks.cifar10.widths              # every method by widths: PSNR and FD
    python -m benchmarks.cifar10.widths w4a4 w4a8    # every figure at these widths, ordered by FD

Taken are the cells of seed 0 and 1,000 images of the benchmark's UNet in `benchmarks/results/cifar10/`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cifar10.run import BITS, IMAGES, ROOT
from pipelines.report.comparison import layers_text

RESULTS = ROOT / "benchmarks/results/cifar10"
WIDTHS = sorted(BITS.split(","), key=lambda bits: (-int(bits[3]), -int(bits[1])))  # 8-bit activations first
FOLDERS = ("lsq", *BITS.split(","), "tuned", "seeds")  # the first that has a cell counts
MB = 1e6

# heading, key of a cell, decimals, and which is best: +1 the largest, -1 the least
FIGURES = (
    ("IS", "is", 3, 1), ("FD", "fid", 2, -1), ("sFD", "sfid", 2, -1), ("precision", "precision", 3, 1),
    ("recall", "recall", 3, 1), ("named right", "class_accuracy", 3, 1), ("PSNR of the mean error, dB", "psnr", 2, 1),
    ("MB", "bytes", 2, -1),
)  # fmt: skip
HEADS = ["method", "layers as asked/8/float", *(name for name, *_ in FIGURES)]
Cell = Mapping[str, Any]


def cells(results: Path = RESULTS) -> dict[tuple[str, str], Cell]:
    """(name of the method, bits) -> its cell; the teacher's bits are its own, fp32."""
    found: dict[tuple[str, str], Cell] = {}
    for folder in FOLDERS:
        if not (path := results / folder / "table.json").exists():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        for cell in table["cells"]:
            if cell["seed"] == 0 and table["about"]["n"] == IMAGES:
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


def rows(bits: str, found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The Markdown table of one width, ordered by FD, the best of each figure marked, of the digits shown."""
    students = sorted((cell["fid"], name) for (name, width), cell in found.items() if width == bits)
    named = {name: found[name, bits] for _, name in students}
    shown = [texts(cell) for cell in named.values()]
    for place, (_, _, _, sign) in enumerate(FIGURES):
        values = [float(row[place]) * sign for row in shown if row[place]]
        for row in shown:
            if row[place] and float(row[place]) * sign == max(values):
                row[place] = f"**{row[place]}**"
    lines = [HEADS, ["---"] * len(HEADS), ["teacher", "", *texts(found["teacher", "fp32"])]]
    for (name, cell), row in zip(named.items(), shown, strict=True):
        lines.append([name, layers_text(cell["layers"]), *row])
    return [f"| {' | '.join(line)} |" for line in lines]


def overview(found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The Markdown table of all widths: a row a method, ordered by PSNR at the fewest bits that have most methods."""
    methods = sorted({name for name, bits in found if bits != "fp32"})
    by = max(WIDTHS, key=lambda bits: (sum((name, bits) in found for name in methods), WIDTHS.index(bits)))

    def order(name: str) -> float:
        return found[name, by]["psnr"] if (name, by) in found else float("-inf")

    lines = [["dB · FD", *WIDTHS], ["---"] * (len(WIDTHS) + 1)]
    for name in sorted(methods, key=order, reverse=True):
        pairs = (found.get((name, bits)) for bits in WIDTHS)
        lines.append([name, *(f"{cell['psnr']:.2f} · {cell['fid']:.2f}" if cell else "" for cell in pairs)])
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bits", nargs="*", help=f"{', '.join(WIDTHS)}; without one, all beside each other")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(arguments)
    if unknown := [bits for bits in options.bits if bits not in WIDTHS]:
        parser.error(f"{unknown[0]}: no such width; it is one of {', '.join(WIDTHS)}")
    found = cells(options.results)
    for bits in options.bits:
        print(f"## {bits}\n\n" + "\n".join(rows(bits, found)) + "\n")
    if not options.bits:
        print("\n".join(overview(found)))


if __name__ == "__main__":
    main()
