"""Pictures of a comparison: figures against widths and orders, losses, weight outliers, samples.

Functions of plain arrays that write one file each, as in pictures.py. A method keeps its colour in all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.comparison import COLUMNS, QUALITY, TEACHER, Column, heading
from pipelines.report.grids import GAP, SCALE_TO
from pipelines.report.pictures import COLOURS, MUTED, figure_file, wrapped

LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHOWN = 10  # images a row
MOST_BANDS = 6
LIGHT = 2.5  # a kurtosis between those of a uniform (1.8) and a normal distribution (3)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a line and a marker for each name: 30 that can be told apart."""
    colours = COLOURS[1:]
    return {
        name: {"color": colours[i % len(colours)], "linestyle": LINES[i // len(colours) % len(LINES)],
               "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "linewidth": 1.2}
        for i, name in enumerate(names)
    }  # fmt: skip


def _legend(figure, names: Sequence[str], styles: Mapping[str, Mapping[str, Any]], caption: str) -> None:
    """One legend of all methods below the panels, under the picture's caption."""
    from matplotlib.lines import Line2D

    width = figure.get_size_inches()[0]
    legend = figure.legend(
        [Line2D([], [], **styles[name]) for name in names], names, loc="outside lower left",
        ncols=_per_line(names, width), title=wrapped(caption, width), title_fontsize=7, alignment="left",
        borderaxespad=0.2,
    )  # fmt: skip
    legend.get_title().set_color(MUTED)


def _per_line(names: Sequence[str], width: float) -> int:
    """Methods in one line of a legend under a picture of that many inches."""
    return max(1, int(width / max(1.8, 0.4 + 0.045 * max(map(len, names), default=0))))


def _legend_height(names: Sequence[str], width: float) -> float:
    return 0.4 + 0.16 * -(-len(names) // _per_line(names, width))  # inches


def _finite(figure: Mapping[str, float | None] | None) -> tuple[float, float]:
    """Mean and deviation, NaN (which is not drawn) where there is none or it is infinite; no deviation is 0."""
    if figure is None or not np.isfinite(figure["mean"]):
        return np.nan, 0.0
    return figure["mean"], figure["sd"] or 0.0


def _columns(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Column]:
    """The columns of those keys that some student's row has."""
    by_key = {column.key: column for column in COLUMNS}
    mine = [row for row in rows if row["spec"] != TEACHER]
    return [by_key[key] for key in keys if any(np.isfinite(_finite(row[key])[0]) for row in mine)]


def _title(column: Column, extractor: str) -> str:
    return heading(column, extractor) + {1: " ↑", -1: " ↓", 0: ""}[column.better]


def against_widths(path: Path, table: Mapping[str, Any]) -> bool:
    """Figures of quality against bit widths, one line a method; False where no figure is there to draw."""
    return _against(
        path, table, "Image quality against bit widths",
        [row for row in table["rows"] if row["spec"] != TEACHER],
        lambda row: row["bits"], lambda row: row["method"], list(table["about"]["bits"]), "bits",
    )  # fmt: skip


def against_orders(path: Path, table: Mapping[str, Any]) -> bool:
    """PSNR and Fréchet distance against the Hadamard order (paper, table 4), one line for each method and width that
    was asked for with several `order=`; False where none was.
    """
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in table["rows"]:
        if row["options"].get("order", "").isdecimal():
            families.setdefault(order_family(row), []).append(row)
    rows = [row for mine in families.values() if len({row["options"]["order"] for row in mine}) > 1 for row in mine]
    orders = sorted({int(row["options"]["order"]) for row in rows})
    return bool(rows) and _against(
        path, table, "Image quality against the Hadamard order",
        rows, lambda row: int(row["options"]["order"]), order_family, orders, "order", ("psnr", "fid", "is"),
    )  # fmt: skip


def order_family(row: Mapping[str, Any]) -> str:
    """What rows that differ in `order` alone have in common, as a legend says it."""
    others = [f"{name}={value}" for name, value in row["options"].items() if name != "order"]
    variant = ", ".join([*([row["variant"]] if row["variant"] else []), *others])
    return f"{row['spec'].partition(':')[0].partition('/')[0]}{f' ({variant})' if variant else ''} {row['bits']}"


def _against(path, table, title, rows, place, name_of, places, label, keys=QUALITY) -> bool:
    extractor = table["about"]["extractor"]
    columns = _columns(rows, keys)
    if not columns:
        return False
    names = list(dict.fromkeys(map(name_of, rows)))
    styles = _styles(names)
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    teacher = next((row for row in table["rows"] if row["spec"] == TEACHER), None)
    caption = []
    if teacher and any(np.isfinite(_finite(teacher[column.key])[0]) for column in columns):
        caption.append("Dashed grey: the fp32 teacher.")
    if len(table["about"]["seeds"]) > 1:
        caption.append("Bars: ± one standard deviation over the seeds.")
    width = max(5.6, 0.5 + 2.3 * across)
    with figure_file(path, width, 0.7 + 2.0 * down + _legend_height(names, width), title) as figure:
        axes = figure.subplots(down, across, squeeze=False)
        barred = len(names) > 1 and len(table["about"]["seeds"]) > 1
        spread = np.linspace(-0.16, 0.16, len(names)) if barred else np.zeros(len(names))  # bars beside each other
        for axis, column in zip(axes.flat, columns, strict=False):
            for shift, name in zip(spread, names, strict=True):
                mine = sorted((places.index(place(row)), *_finite(row[column.key])) for row in rows
                              if name_of(row) == name)  # fmt: skip
                x, mean, sd = (np.array(values) for values in zip(*mine, strict=True))
                axis.errorbar(x + shift, mean * column.scale, sd * column.scale, capsize=1.5, elinewidth=0.7,
                              **styles[name])  # fmt: skip
            if teacher and np.isfinite(level := _finite(teacher[column.key])[0]):
                axis.axhline(level * column.scale, color=COLOURS[0], linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_title(_title(column, extractor), loc="left")
            axis.set_xticks(range(len(places)), list(map(str, places)))
            axis.set_xlim(-0.4, len(places) - 0.6)
            axis.set_xlabel(label)
            axis.grid(axis="y", linewidth=0.4, color="#dddddd")
        for axis in list(axes.flat)[len(columns) :]:
            axis.set_axis_off()
        _legend(figure, names, styles, " ".join(caption))
    return True


def losses(path: Path, curves: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> None:
    """Losses over updates: width -> method -> one (trajectories, steps) for each seed.

    Above, the mean of each trajectory; below, the last timestep of sampling alone, which is the paper's figure 4. A
    band is ± one standard deviation over the seeds; where more methods than MOST_BANDS would hide each other, none.
    """
    names = list(dict.fromkeys(name for named in curves.values() for name in named))
    styles = {name: style | {"marker": None} for name, style in _styles(names).items()}
    width = max(5.6, 0.6 + 2.4 * len(curves))
    several = any(len(runs) > 1 for named in curves.values() for runs in named.values())
    banded = len(names) <= MOST_BANDS
    caption = "Squared error of guided predictions."
    if several:
        caption += " Bands: ± one standard deviation over the seeds." if banded else " Means over the seeds."
    with figure_file(path, width, 4.6 + _legend_height(names, width), "Distillation loss over updates") as figure:
        axes = figure.subplots(2, len(curves), squeeze=False, sharex="col")
        for column, (bits, named) in enumerate(curves.items()):
            for line, reduce in ((0, lambda table: table.mean(1)), (1, lambda table: table[:, -1])):
                axis = axes[line, column]
                for name, runs in named.items():
                    shortest = min(map(len, runs))
                    values = np.stack([reduce(run[:shortest]) for run in runs])  # (seeds, trajectories)
                    updates = (np.arange(shortest) + 1) * runs[0].shape[1]
                    style = styles[name]
                    axis.plot(updates, values.mean(0), **style)
                    if len(values) > 1 and banded:
                        low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
                        axis.fill_between(updates, low, high, color=style["color"], alpha=0.18, linewidth=0)
                axis.set_title(bits if line == 0 else f"{bits}, last timestep of sampling", loc="left")
                axis.set_ylim(bottom=0)
                axis.grid(axis="y", linewidth=0.4, color="#dddddd")
            axes[1, column].set_xlabel("updates")
            axes[1, column].xaxis.get_major_locator().set_params(integer=True)
        for line in axes:
            line[0].set_ylabel("loss per image")
        _legend(figure, names, styles, caption)


def weight_outliers(path: Path, layers: Sequence[Mapping[str, float]], order: str) -> None:
    """What the weight quantiser sees of every layer: W (single) against HᵀW (double); paper, figure 3c.

    layers: {"peak", "peak_rotated": largest |w| over the standard deviation, "kurtosis", "kurtosis_rotated"}, in the
    model's order.
    """
    count = np.arange(len(layers))
    caption = (
        f"Order {order}. A rotation spreads the outliers of a heavy-tailed weight. It makes the harder one of a weight "
        "that is still as uniform as it was initialised (kurtosis 1.8), since a mixture is nearer to a normal one (3, "
        "grey), and of one whose columns have a sign in common, which it gathers in each block's first coordinate."
    )
    higher = [layer["peak_rotated"] > layer["peak"] for layer in layers]
    light = [layer["kurtosis"] < LIGHT for layer in layers]
    split = [sum(h for h, flat in zip(higher, light, strict=True) if flat == kind) for kind in (True, False)]
    with figure_file(path, 7.4, 3.5, "Outliers in the weights", wrapped(caption, 7.4)) as figure:
        axes = figure.subplots(1, 2)
        for axis, key, label in (
            (axes[0], "peak", "largest |w| / standard deviation"), (axes[1], "kurtosis", "kurtosis")
        ):  # fmt: skip
            before = np.array([layer[key] for layer in layers])
            after = np.array([layer[f"{key}_rotated"] for layer in layers])
            axis.vlines(count, before, after, color="#cccccc", linewidth=0.8, zorder=1)
            axis.scatter(count, before, s=9, color=COLOURS[1], label="W, as single quantises it", zorder=2)
            axis.scatter(count, after, s=9, color=COLOURS[2], marker="^", label="HᵀW, as double does", zorder=2)
            axis.set_xlabel("layer")
            axis.set_ylabel(label)
            if max(before.max(), after.max()) > 20 * max(1e-9, np.median(before)):
                axis.set_yscale("log")
        axes[0].set_title(f"HᵀW has the larger peak in {sum(higher)} of {len(layers)} layers", loc="left")
        parts = f"{split[0]} of {sum(light)} of kurtosis below {LIGHT}, {split[1]} of {len(layers) - sum(light)} above"
        axes[1].set_title(parts, loc="left")
        axes[1].axhline(3.0, color=COLOURS[0], linewidth=0.6, linestyle=(0, (4, 3)))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", ncols=2)


def sample_rows(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """Images (N, H, W, 1 or 3) uint8 of each label in one row, the same seeds below each other."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    side = int(max(font.getlength(label) for label, _ in rows)) + 12
    factor = max(1, SCALE_TO // rows[0][1].shape[1])
    _, height, width = (factor * size for size in rows[0][1].shape[:3])
    shown = min(SHOWN, min(len(images) for _, images in rows))
    canvas = Image.new("RGB", (side + shown * (width + GAP), len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (label, images) in enumerate(rows):
        top = line * (height + GAP)
        draw.text((4, top + height // 2 - 8), label, "black", font)
        for column in range(shown):
            image = Image.fromarray(images[column][:, :, 0] if images.shape[3] == 1 else images[column])
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (side + column * (width + GAP), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
