"""Pictures as PNG files, with one shared style.

Every function takes plain arrays, draws one figure and writes one file; equal arrays give equal bytes. matplotlib is
imported when the first picture is drawn, and pyplot never: there is no global state and no display.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MUTED = "#555555"


@contextmanager
def figure_file(path: Path, width: float, height: float, title: str, caption: str = ""):
    """A figure of that size in inches, with its title above and its caption below, written to `path` at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        if caption:
            figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color=MUTED)
        yield figure
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Without the entry that names matplotlib's version, so that the bytes depend on the picture alone.
        figure.savefig(path, metadata={"Software": None})


def wrapped(text: str, width: float) -> str:
    """A caption broken into lines that fit a figure `width` inches wide at the caption's size."""
    import textwrap

    return "\n".join(textwrap.wrap(text, int(width * 19.5)))


@dataclass(frozen=True)
class Panel:
    """One plot of a grid: largest |x| of each channel (C,), under a title, which may be empty."""

    title: str
    maxima: np.ndarray
    colour: int = 0  # index into COLOURS


def channel_maxima(
    path: Path, title: str, caption: str, rows: Sequence[tuple[str, Sequence[Panel | None]]], share: str = "all"
) -> None:
    """A grid of per-channel absolute maxima (paper, figures 2 and 5 to 10): labelled rows of panels.

    share: "all" gives every panel the same vertical axis, "row" only those of one row. None leaves a panel out.
    """
    columns = max(len(panels) for _, panels in rows)
    width = 0.9 + 2.35 * columns
    with figure_file(path, width, 0.75 + 1.35 * len(rows), title, wrapped(caption, width)) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False)
        top = max(float(panel.maxima.max()) for _, panels in rows for panel in panels if panel)
        for (label, panels), line in zip(rows, axes, strict=True):
            row_top = max((float(panel.maxima.max()) for panel in panels if panel), default=1.0)
            for column, ax in enumerate(line):
                panel = panels[column] if column < len(panels) else None
                if panel is None:
                    ax.set_axis_off()
                    continue
                _bars(ax, panel, 1.18 * ((top if share == "all" else row_top) or 1.0))
                if column == 0:
                    ax.set_ylabel(label)
        for line in axes[-1]:
            line.set_xlabel("channel")


def _bars(ax, panel: Panel, top: float) -> None:
    colour = COLOURS[panel.colour]
    edges = np.arange(len(panel.maxima) + 1) - 0.5
    ax.stairs(panel.maxima, edges, fill=True, color=colour, linewidth=0)
    peak, middle = float(panel.maxima.max()), float(np.median(panel.maxima))
    ax.axhline(peak, color=colour, linewidth=0.6, linestyle=(0, (4, 3)))
    ax.text(
        1.0, peak / top + 0.02, f"max {peak:.3g} = {peak / middle:.1f} × median" if middle > 0 else f"max {peak:.3g}",
        transform=ax.transAxes, ha="right", va="bottom", fontsize=6.5, color=colour,
    )  # fmt: skip
    ax.set_ylim(0, top)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_title(panel.title, loc="left")


def heat_map(
    path: Path,
    title: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Mapping[str, np.ndarray],
    unit: str,
    limit: float,
) -> None:
    """Signed values (rows, columns), one panel each, white at 0 and full colour at ±`limit`; NaN is grey."""
    from matplotlib.colors import TwoSlopeNorm

    width = 2.6 + 0.34 * len(columns) * len(panels) + 0.6
    with figure_file(path, width, 1.9 + 0.125 * len(rows), title, wrapped(caption, width)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (name, values) in zip(axes, panels.items(), strict=True):
            ax.set_facecolor("#e4e4e4")
            image = ax.imshow(
                np.ma.masked_invalid(values), aspect="auto", cmap="RdBu", interpolation="nearest",
                norm=TwoSlopeNorm(0.0, -limit, limit),
            )  # fmt: skip
            ax.set_title(name, loc="left")
            ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=6.5)
            ax.set_yticks(range(len(rows)), rows, fontsize=5.5)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(image, ax=list(axes), shrink=0.35, aspect=30, pad=0.02, extend="both")
        bar.set_label(unit)
        bar.outline.set_linewidth(0.5)


@dataclass(frozen=True)
class Line:
    """Values (T,) over a shared horizontal axis."""

    name: str
    values: np.ndarray
    colour: int = 0


def lines(
    path: Path,
    title: str,
    caption: str,
    x: Sequence[float],
    x_label: str,
    y_label: str,
    panels: Sequence[Sequence[tuple[str, Sequence[Line]]]],
    falling: bool = False,
) -> None:
    """A grid of line plots with one legend; a row shares its vertical axis. `falling` draws x from high to low."""
    columns = max(len(row) for row in panels)
    width = 0.8 + 2.1 * columns
    with figure_file(path, width, 0.9 + 2.1 * len(panels), title, wrapped(caption, width)) as figure:
        axes = figure.subplots(len(panels), columns, squeeze=False, sharex=True, sharey="row")
        entries = {}
        for row, line_of_axes in zip(panels, axes, strict=True):
            for ax, (name, curves) in zip(line_of_axes, row, strict=True):
                for curve in curves:
                    (drawn,) = ax.plot(x, curve.values, color=COLOURS[curve.colour])
                    entries.setdefault(curve.name, drawn)
                ax.set_title(name, loc="left")
                ax.grid(axis="y", linewidth=0.4, color="#dddddd")
            line_of_axes[0].set_ylabel(y_label)
        for ax in axes[-1]:
            ax.set_xlabel(x_label)
        if falling:
            axes[0, 0].invert_xaxis()
        # Right of the title, where it costs no room.
        figure.legend(list(entries.values()), list(entries), loc="upper right", ncols=len(entries))
