"""Pictures of speed: steps of contenders beside each other, and where their time goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.report.pictures import COLOURS, figure_file, wrapped

NAMES = {"fp32": "fp32", "bf16": "bfloat16", "int": "integers", "int-bf16": "integers, bfloat16 around"}


def save_bench(table: Mapping[str, Any], path: Path) -> None:
    """Left, milliseconds for each image of a step by contender and batch, with the tenth and ninetieth percentile;
    right, the kinds of layer that they go to, at the smallest batch. `table` is that of `stages.bench`.
    """
    batches = list(dict.fromkeys(row["batch"] for row in table["steps"]))
    names = [name for name in NAMES if any(row["contender"] == name for row in table["steps"])]
    peaks, threads = table["peaks"], f", {table['threads']} threads" if table["device"] == "cpu" else ""
    narrow = f", {peaks['bf16_gflops']:.0f} in bfloat16" if peaks["bf16_gflops"] else ""
    caption = (
        f"{table['processor']}{threads}; a step at guidance {table['guidance']:g}. At best it makes "
        f"{peaks['fp32_gflops']:.0f} GFLOP/s in fp32{narrow} and {peaks['int8_gops']:.0f} GOP/s in int8."
    )
    with figure_file(path, 7.0, 2.9, "Time of a denoising step", wrapped(caption, 7.0)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            rows = {row["batch"]: row for row in table["steps"] if row["contender"] == name}
            for index, batch in enumerate(batches):
                ms = {key: value / batch for key, value in rows[batch]["ms"].items()}
                at = index + (place - (len(names) - 1) / 2) * width
                left.bar(at, ms["median"], width * 0.92, color=COLOURS[place], label=NAMES[name] if not index else None)
                error = [[ms["median"] - ms["p10"]], [ms["p90"] - ms["median"]]]
                left.errorbar(at, ms["median"], error, color="black", linewidth=0.7, capsize=1.5)
                times, digits = rows[batch]["times_as_fast_as_fp32"]["median"], 0 if ms["median"] >= 10 else 1
                left.annotate(
                    f"{ms['median']:.{digits}f}" + (f"\n{times:.1f}×" if name != "fp32" else ""), (at, ms["p90"]),
                    (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=6.5,
                )  # fmt: skip
        left.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        left.set_ylabel("ms for each image")
        left.margins(y=0.2)
        left.legend(loc="upper right")
        _shares(right, table["shares"], batches[0])


def _shares(axes, shares: Mapping[str, Mapping[str, float]], batch: int) -> None:
    names = [name for name in NAMES if name in shares]
    kinds = [kind for kind in shares[names[0]] if kind != "fraction_of_int8_peak"]
    for place, name in enumerate(names):
        start, whole = 0.0, sum(shares[name][kind] for kind in kinds)
        for index, kind in enumerate(kinds):
            share = 100 * shares[name][kind] / whole
            axes.barh(place, share, left=start, color=COLOURS[index], label=kind if not place else None, height=0.55)
            if share >= 7:
                axes.annotate(f"{share:.0f}", (start + share / 2, place), ha="center", va="center", color="white",
                              fontsize=6.5)  # fmt: skip
            start += share
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"% of the time, batch {batch}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.32), ncols=4, columnspacing=0.8, handlelength=0.9)


def save_scaling(results: Mapping[str, Any], path: Path) -> None:
    """Milliseconds of a step above and GB of its process below, against batch, side and width, on logarithmic axes with
    the fitted laws. `results` is what `benchmarks.scaling` keeps.
    """
    parts = {"batch": "images of a step", "side": "latents' side", "width": "channels of the first level"}
    parts = {part: label for part, label in parts.items() if results.get(part)}
    libraries = results["libraries_gb"]
    caption = (
        f"{results['machine']}. Lines: fitted powers, their exponents in the legends. Memory is without the "
        f"libraries' {libraries:.2f} GB."
    )
    with figure_file(
        path, 2.5 * len(parts), 4.6, "How a denoising step grows", wrapped(caption, 2.5 * len(parts))
    ) as figure:
        grid = figure.subplots(2, len(parts), squeeze=False)
        for column, (part, label) in enumerate(parts.items()):
            rows = results[part]
            values = [row[part] for row in rows]
            for what, axes, taken in (("ms", grid[0, column], 0.0), ("gb", grid[1, column], libraries)):
                for place, name in enumerate(NAMES):
                    if f"{name}_{what}" not in rows[0]:  # a contender of another device
                        continue
                    found = results["laws"].get(part, {}).get(what, {}).get(name)
                    shown = NAMES[name] + (f": {found['exponent']:.2f}" if found else "")
                    measured = [row[f"{name}_{what}"] - taken for row in rows]
                    axes.plot(values, measured, "o", markersize=3.5, color=COLOURS[place], label=shown)
                    if found:
                        fitted = [found["factor"] * value ** found["exponent"] for value in values]
                        axes.plot(values, fitted, color=COLOURS[place], linewidth=0.9)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(values, [str(value) for value in values])
                axes.minorticks_off()
                axes.legend(loc="upper left")
                axes.margins(y=0.6 if what == "gb" else 0.25)  # room for the legend above flat lines
            grid[1, column].set_xlabel(label)
        grid[0, 0].set_ylabel("ms of a step")
        grid[1, 0].set_ylabel("GB")
