"""Methods × bit widths × seeds as one table: means and deviations over seeds, the best of each width, and text.

Takes plain cells (a mapping of COLUMNS' keys for every method, width and seed) and knows no artifacts.
"""

import csv
import io
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEACHER = "teacher"
FLOAT = "fp32"


@dataclass(frozen=True)
class Column:
    """One figure: its key in a cell, its heading ({} is the extractor), what it is multiplied with, digits shown.

    of: the stage whose artifact it was measured on, where several seeds have one in common.
    """

    key: str
    heading: str
    digits: int
    better: int = 0  # 1: the higher, -1: the lower, 0: no merit of its own
    scale: float = 1.0
    of: str = ""


COLUMNS = (
    Column("plan_seconds", "plan s", 0, of="plan"),
    Column("updates", "updates", 0),
    Column("distill_seconds", "distillation s", 0, -1),
    Column("seconds_per_update", "s/update", 3, -1),
    Column("peak_memory_bytes", "peak MB", 0, -1, 1e-6),
    Column("bytes", "MB", 2, -1, 1e-6),
    Column("images_per_second", "images/s", 1, 1),
    Column("fid", "FD({})", 2, -1),
    Column("sfid", "sFD({})", 2, -1),
    Column("is", "IS({})", 3, 1),
    Column("precision", "precision", 3, 1),
    Column("recall", "recall", 3, 1),
    Column("class_accuracy", "class acc.", 3, 1),
    Column("psnr", "PSNR dB", 2, 1),
    Column("contrast", "contrast", 2),
    Column("last_loss", "last loss", 4),
)
QUALITY = ("psnr", "fid", "sfid", "is", "precision", "recall", "class_accuracy")
COST = ("distill_seconds", "seconds_per_update", "peak_memory_bytes")  # of a distillation, as its device lets it be
INCEPTION = {"fid": "FID", "sfid": "sFID", "is": "IS"}  # distances on other features go by other names
LAYERS = "asked/8/float"  # heading of the layers at the bits asked, at 8 bits and in floating point
IDS = ("plan", "distill", "export", "sample", "score")


def role_of(spec: str, bits: str, seed: int) -> str:
    """What a cell is called: `hqdm/paper:order=16 w4a4 seed 0`; the teacher's has no bits, `teacher seed 0`."""
    return f"{TEACHER} seed {seed}" if spec == TEACHER else f"{spec} {bits} seed {seed}"


def heading(column: Column, extractor: str) -> str:
    """FD(digits), or FID where the features are Inception's."""
    if extractor == "inception" and column.key in INCEPTION:
        return INCEPTION[column.key]
    return column.heading.format(extractor)


def csv_name(column: Column, extractor: str) -> str:
    """`fd_digits`, or `fid` where the features are Inception's, as a score's figures have it."""
    of_others = extractor not in ("inception", "none") and column.key in ("fid", "sfid")
    return f"{column.key.removesuffix('fid')}fd_{extractor}" if of_others else column.key


def mean_and_deviation(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """Mean and sample standard deviation (n − 1; None for fewer than two, or where one is infinite); None of nothing.

    An infinite PSNR (equal images) makes an infinite mean.
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    finite = all(map(math.isfinite, known))
    mean = statistics.fmean(known) if finite else sum(known) / len(known)
    return {"mean": mean, "sd": statistics.stdev(known) if finite and len(known) > 1 else None}


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and width, in the order of first sight: every figure as mean and deviation over seeds.

    A cell is {spec, method, bits, seed, …figures}; `method` is the label shown, `spec` what was asked for.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["bits"], cell["spec"]), []).append(cell)
    return [
        {
            "method": mine[0]["method"], "spec": spec, "bits": bits, "seeds": [cell["seed"] for cell in mine],
            "options": mine[0].get("options") or {}, "variant": mine[0].get("variant"),
            "layers": mine[0].get("layers"),
            "devices": list(dict.fromkeys(cell["device"] for cell in mine if cell.get("device"))),
            **{column.key: mean_and_deviation(_measurements(mine, column)) for column in COLUMNS},
        }
        for (bits, spec), mine in groups.items()
    ]  # fmt: skip


def _measurements(cells: Sequence[Mapping[str, Any]], column: Column) -> list[float | None]:
    """A figure of every cell, but one of an artifact that several share: copies of it have no deviation to tell."""
    measured = {cell.get(column.of) or place: cell.get(column.key) for place, cell in enumerate(cells)}
    return list(measured.values())


def short_rows(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that lack seeds, whose cells failed: their means are over other images than those of the others."""
    return [row for row in table["rows"] if set(row["seeds"]) < set(table["about"]["seeds"])]


def best_of(table: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """(bits, spec, key) of the best mean of each width, as it is shown, ties included; students alone, two or more.

    Rows that lack seeds are not ranked, nor is the cost of students that were made on different devices.
    """
    found, short = set(), short_rows(table)
    whole = [row for row in table["rows"] if row["spec"] != TEACHER and row not in short]
    for bits in dict.fromkeys(row["bits"] for row in whole):
        rows = [row for row in whole if row["bits"] == bits]
        devices = {device for row in rows for device in row.get("devices") or ()}
        for column in (column for column in COLUMNS if column.better):
            if len(devices) > 1 and column.key in COST:
                continue
            mine = {
                row["spec"]: round(float(row[column.key]["mean"]) * column.scale, column.digits)
                for row in rows
                if row[column.key] is not None
            }
            if len(mine) < 2 or len(set(mine.values())) == 1:
                continue
            top = max(mine.values()) if column.better > 0 else min(mine.values())
            found |= {(bits, spec, column.key) for spec, value in mine.items() if value == top}
    return found


def _text(column: Column, figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    text = f"{float(figure['mean']) * column.scale:.{column.digits}f}"
    return text if not figure["sd"] else f"{text} ± {figure['sd'] * column.scale:.{column.digits}f}"


def words_width(width: int) -> int:
    """The most characters of a column of words in a table of `width`: longer ones fold, so that figures have room."""
    return max(width // 3 - 2, 1)


@dataclass(frozen=True)
class Shown:
    """A table for people: headings, lines of texts, which of them are the best, which headings hold numbers, and the
    figures' keys (empty of words).
    """

    headings: list[str]
    lines: list[list[str]]
    best: list[list[bool]]
    numbers: list[bool]
    keys: list[str]

    def part(self, places: Sequence[int]) -> "Shown":
        """Some of its columns, in that order."""
        pick = operator.itemgetter(*places)
        return Shown(
            [*pick(self.headings)], [[*pick(line)] for line in self.lines], [[*pick(line)] for line in self.best],
            [*pick(self.numbers)], [*pick(self.keys)],
        )  # fmt: skip

    def parts(self, width: int) -> "list[Shown]":
        """As tables of at most `width` characters, where columns allow it: quality first, then cost, each with the
        bits and the method.
        """
        head = [place for place, name in enumerate(self.headings) if name in ("bits", "method")]
        rest = [place for place in range(len(self.headings)) if place not in head]
        rest.sort(key=lambda place: self.keys[place] not in (*QUALITY, "contrast"))
        room = [max(map(len, [name, *(line[place] for line in self.lines)])) + 2 for place, name in
                enumerate(self.headings)]  # fmt: skip
        for place in head:
            room[place] = min(room[place], words_width(width) + 2)
        parts: list[list[int]] = []
        for place in rest:
            if not parts or sum(room[each] for each in (*head, *parts[-1], place)) > width:
                parts.append([])
            parts[-1].append(place)
        return [self.part(head + part) for part in parts] or [self]


def shown(table: Mapping[str, Any]) -> Shown:
    """The rows of a table, or of its JSON (in which infinity is a word), as texts; columns without any figure are left
    out, and seeds where there is one.
    """
    rows, extractor = table["rows"], table["about"]["extractor"]
    used = [column for column in COLUMNS if any(row[column.key] is not None for row in rows)]
    several = len(table["about"]["seeds"]) > 1
    winners = best_of(table)
    layers = any(row.get("layers") for row in rows)
    words = ["bits", "method", *([LAYERS] if layers else []), *(["seeds"] if several else [])]
    headings = [*words, *(heading(column, extractor) for column in used)]
    lines, best = [], []
    for row in rows:
        head = [row["bits"], row["method"]]
        head += [layers_text(row.get("layers"))] if layers else []
        head += [str(len(row["seeds"]))] if several else []
        lines.append(head + [_text(column, row[column.key]) for column in used])
        best.append([False] * len(head) + [(row["bits"], row["spec"], column.key) in winners for column in used])
    numbers = [name not in ("bits", "method", LAYERS) for name in headings]
    return Shown(headings, lines, best, numbers, [""] * len(words) + [column.key for column in used])


def layers_text(counts: Mapping[str, int] | None) -> str:
    """48/6/12: layers at the bits asked, at 8 bits, in floating point; empty of a teacher."""
    return "/".join(str(counts[kind]) for kind in ("asked", "eight", "float")) if counts else ""


def note(table: Mapping[str, Any]) -> str:
    """What the figures were measured with, in a few sentences."""
    about, short = table["about"], short_rows(table)
    seeds = about["seeds"]
    sentences = [f"n = {about['n']} images of {about['steps']} steps, guidance {about['guidance']}."]
    if about["reference"]:
        of = f" (n = {about['reference_n']})" if about["reference_n"] else ""
        sentences.append(f"Reference: {about['reference']}{of}; extractor: {about['extractor']}.")
    else:
        sentences.append("No reference and no features: the pairs of the same seeds alone.")
    if about["extractor"] not in ("inception", "none"):
        sentences.append(f"FD and sFD are Fréchet distances on the features of {about['extractor']}: they are not FID.")
    sentences.append("PSNR is to the teacher's images of the same seeds, contrast a share of theirs (1.00: as theirs).")
    if len(seeds) > 1:
        sentences.append(
            f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))} of distillation and images."
        )
    else:
        sentences.append(f"One seed ({seeds[0]}).")
    sentences.append(
        "Seconds are of the whole stage, loading included (rows that differ in their recipe alone may share a search, "
        "which the first of them waits for); peak MB is the largest resident memory of the process while "
        "it distilled, with what earlier cells left; MB is the weights' files, those of the export and the teacher's "
        "own; last loss is the squared error of the guided prediction, per image over the last trajectory. The best of "
        "each width is marked, of the digits shown."
    )
    if about.get("layers"):
        sentences.append(
            f"{LAYERS} counts the layers at the bits asked (or widths around them), at 8/8 bits, and in floating "
            "point; one whose input is divided counts as two."
        )
    if about.get("untrained"):
        sentences.append("Methods of 0 updates are not distilled: their seconds are of calibration and reconstruction.")
    if short:
        named = (f"{row['method']} {row['bits']} ({', '.join(map(str, row['seeds']))})" for row in short)
        sentences.append(f"Not ranked, since they lack seeds (in brackets those they have): {', '.join(named)}.")
    if about["machine"]:
        sentences.append(f"Machine: {about['machine']}.")
    devices = about.get("devices") or ["cpu"]
    if devices != ["cpu"]:
        sentences.append(f"Distilled on: {', '.join(devices)}.")
    if len(devices) > 1:
        sentences.append("What a distillation took is not ranked where rows of a width differ in it.")
    return " ".join(sentences)


def markdown(table: Mapping[str, Any], marked: bool = True) -> list[str]:
    """The table and its note as Markdown lines, the best of each width in bold."""
    view = shown(table)
    lines = [
        f"| {' | '.join(view.headings)} |",
        "|" + "".join(" --: |" if number else " --- |" for number in view.numbers),
    ]
    for texts, best in zip(view.lines, view.best, strict=True):
        cells = [f"**{t}**" if b and marked else t.replace("|", "/") for t, b in zip(texts, best, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", note(table)]


def failures(table: Mapping[str, Any]) -> list[str]:
    """The cells that failed as Markdown lines: at which stage, and what it said."""
    return [f"- {role_of(f['spec'], f['bits'], f['seed'])}: {f['stage']}: {f['error']}" for f in table["failed"]]


def csv_text(table: Mapping[str, Any]) -> str:
    """Every row (kind `mean`, each figure followed by its deviation) and every cell (kind `cell`; stage and error are
    those of a failure), in one CSV.
    """
    about = table["about"]
    names = {column.key: csv_name(column, about["extractor"]) for column in COLUMNS}
    figures = [word for name in names.values() for word in (name, f"{name}_sd")]
    work = {name: about[name] for name in ("n", "reference", "extractor")}
    fields = ["kind", "spec", "method", "bits", "seed", "seeds", *work, "device", "layers", *figures]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*fields, *IDS, "command", "stage", "error"], lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    for row in table["rows"]:
        line = {"kind": "mean"} | work | {key: row[key] for key in ("spec", "method", "bits")}
        line |= {"seeds": " ".join(map(str, row["seeds"])), "layers": layers_text(row.get("layers"))}
        line["device"] = ", ".join(row.get("devices") or ())
        for key, name in names.items():
            if (figure := row.get(key)) is not None:
                line |= {name: figure["mean"], f"{name}_sd": figure["sd"]}
        writer.writerow(line)
    for cell in table["cells"]:
        measured = {name: cell.get(key) for key, name in names.items()}
        writer.writerow({"kind": "cell"} | work | dict(cell) | measured | {"layers": layers_text(cell.get("layers"))})
    for failed in table["failed"]:
        writer.writerow({"kind": "cell"} | work | dict(failed))
    return text.getvalue()
