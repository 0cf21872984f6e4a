"""How a step's time and memory grow with the batch, the image and the network's width: fp32, bfloat16 and integers.

    python -m benchmarks.scaling                            # the shape of LDM-4 ImageNet, widths of 64 to 256 channels
    python -m benchmarks.scaling --parts width              # one of batch, side and width; the others stay as they were
    python -m benchmarks.scaling --channels 32 --widths 32 64 --sides 32 48 --turns 1   # to see that everything runs

Time is taken in turns in one process; memory is the most that a process of its own has while it makes two steps, after
its model was loaded. A law is the slope of a straight line through logarithms: time ∝ batch^a, memory less that of the
libraries ∝ batch^a. The width is that of the UNet's first level, all others being multiples of it; each takes a model
of its own with random weights, which is removed afterwards unless it was there before or --keep is given. Of each width
the share of the rotations in the step is measured too. Rows, laws and a picture go to RESULTS.
"""

import argparse
import math
import multiprocessing
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.options import add_step_options, keep, kept_results
from pipelines.errors import HqdmError

MODEL, CHANNELS = "cin256-v2", 192
PARTS = ("batch", "side", "width")
WIDTHS = (64, 96, 128, 192, 256)
CONTENDERS = ("fp32", "bf16", "int")


def law(values: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """measured ≈ factor · value^exponent by least squares of the logarithms, and the share of their variance that it
    explains (1 where there is none).
    """
    x, y = [math.log(value) for value in values], [math.log(value) for value in measured]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    exponent = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    left = sum((b - level - exponent * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    all_of_it = sum((b - level) ** 2 for b in y)
    factor = math.exp(level - exponent * middle)
    return {"exponent": exponent, "factor": factor, "r2": 1 - left / all_of_it if all_of_it else 1.0}


def laws_of(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The laws of each part with two values or more: part → `ms` or `gb` → contender."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for part in PARTS:
        rows = results.get(part, [])
        if len(rows) < 2:
            continue
        values = [row[part] for row in rows]
        found[part] = {"ms": {}, "gb": {}}
        for name in _measured(rows):
            found[part]["ms"][name] = law(values, [row[f"{name}_ms"] for row in rows])
            above = [row[f"{name}_gb"] - results["libraries_gb"] for row in rows]
            if min(above) > 0:  # a model so small that it is lost in the libraries' own changes has no law
                found[part]["gb"][name] = law(values, above)
    return found


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in CONTENDERS if f"{name}_ms" in rows[0]]


def lines_of(results: Mapping[str, Any]) -> list[str]:
    """The results as Markdown."""
    lines = ["# Scaling", "", results["machine"], ""]
    for part in PARTS:
        rows = results.get(part, [])
        if not rows:
            continue
        names = _measured(rows)
        extra = ["parameters, millions", "rotations, % of the step"] if part == "width" else []
        heads = [part, *(f"{name}, ms" for name in names), "times fp32", *(f"{name}, GB" for name in names)]
        lines += [f"| {' | '.join([*heads, *extra])} |", "|" + "--:|" * (len(heads) + len(extra))]
        for row in rows:
            cells = [str(row[part]), *(f"{row[f'{name}_ms']:.0f}" for name in names)]
            cells += [f"{row['int_times_fp32']:.2f}", *(f"{row[f'{name}_gb']:.2f}" for name in names)]
            if part == "width":
                cells += [f"{row['parameters'] / 1e6:.1f}", f"{row['hadamard_share']:.1%}".rstrip("%")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["| exponent of | " + " | ".join(f"time, {name}" for name in CONTENDERS) + " | "
              + " | ".join(f"memory, {name}" for name in CONTENDERS) + " |", "|---|" + "--:|" * 6]  # fmt: skip
    for part, both in laws_of(results).items():
        told = [
            f"{both[what][name]['exponent']:.2f}" if name in both[what] else "" for what in both for name in CONTENDERS
        ]
        lines.append(f"| {part} | {' | '.join(told)} |")
    return [
        *lines,
        "",
        f"Libraries alone: {results['libraries_gb']:.2f} GB, taken off before the exponents of memory.",
        "",
    ]


def memory_of(kind: str, path: str, timestep: float | None, batch: int, side: int | None) -> float:
    """GB that a process of its own has at most while it makes two steps; with no `kind`, of the libraries alone."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_held, args=(sender, kind, path, timestep, batch, side))
    child.start()
    sender.close()
    try:
        return receiver.recv() / 1e9
    except EOFError as fault:
        child.join()
        raise HqdmError(
            f"the memory of {kind or 'the libraries'} at batch {batch}: its process ended with {child.exitcode}",
            "the largest values take several GB",
        ) from fault
    finally:
        child.join()


def _held(sender, kind: str, path: str, timestep: float | None, batch: int, side: int | None) -> None:
    from pipelines import students  # noqa: F401  (all that a step imports)
    from pipelines.memory import peak_bytes, reset_peak, reuse_freed_memory
    from pipelines.stages.bench import Config, Step

    reuse_freed_memory()
    if kind:
        step = Step(kind, path, Config(guidance=1.0), timestep)
        shape = step.model.info.shape
        step.model.info = replace(step.model.info, shape=(shape[0], side or shape[1], side or shape[2]))
        call = step.of(batch)
        reset_peak()
        call()
        call()
    else:
        reset_peak()
    sender.send(peak_bytes())


def with_memory(row: dict[str, Any], part: str, paths: Mapping[str, str], timestep: float) -> dict[str, Any]:
    """A row of times with the memory of each contender."""
    batch, side = row[part] if part == "batch" else 1, row[part] if part == "side" else None
    return row | {f"{name}_gb": memory_of(name, path, timestep, batch, side) for name, path in paths.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--channels", type=int, default=CHANNELS, help="the width at which batch and side change")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 48, 64, 96], help="of the latents")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="channels, multiples of 32")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--keep", action="store_true", help="leave the workspaces of other widths there")
    add_step_options(parser, turns=5, kept="workspaces: 17 GB")
    options = parser.parse_args()
    if wrong := [width for width in (*options.widths, options.channels) if width < 32 or width % 32]:
        parser.error(f"a width cannot be {wrong[0]}: its norms have 32 groups")

    from benchmarks import speed
    from hqdm_cli import console
    from pipelines.doctor import findings
    from pipelines.memory import reuse_freed_memory
    from pipelines.report.speed_pictures import save_scaling
    from pipelines.workspace.store import Store

    file, results = kept_results(options, "scaling")
    told = {finding.what: finding.found for finding in findings(options.folder)}
    results["machine"] = (
        f"{told['processor']}; {told['libraries']}; {MODEL}, {options.channels} channels, random weights"
    )
    results["libraries_gb"] = memory_of("", "", None, 1, None)
    reuse_freed_memory()
    widths = set(options.widths) if "width" in options.parts else set()
    if {"batch", "side"} & set(options.parts):
        widths.add(options.channels)
    for part in options.parts:
        results[part] = []
    with console.Progress() as progress:
        for width in sorted(widths):
            published = width == CHANNELS  # then it is the model that other benchmarks measure
            name = MODEL if published else f"{MODEL}-{width}"
            checkpoint, workspace = options.folder / f"{name}.ckpt", options.folder / name
            passing = not (published or options.keep or checkpoint.exists() or workspace.exists())
            store = Store(workspace)
            export = speed.export_of(store, checkpoint, MODEL, options, progress, None if published else width)
            model = store.ancestor(export, "model")
            steps = speed.contenders_of(model, export)
            parameters = sum(each.numel() for each in steps["fp32"].model.network.parameters())
            timestep, names = steps["int"].timestep, list(steps)
            mine: list[tuple[str, int]] = []
            if width == options.channels:
                mine += [("batch", value) for value in options.batches if "batch" in options.parts]
                mine += [("side", value) for value in options.sides if "side" in options.parts]
            if "width" in options.parts and width in options.widths:
                mine.append(("width", width))
            rows = [(part, speed.timed(steps, part, value, options.turns)) for part, value in mine]
            del steps  # the memory is other processes'
            paths = {name: str((export if name == "int" else model).path) for name in names}
            for part, row in rows:
                row = with_memory(row, part, paths, timestep)
                if part == "width":
                    row |= {"parameters": parameters} | speed.hadamard_of(export, options.turns)
                results[part].append(row)
                print(row, file=sys.stderr)
            keep(file, results)
            if passing:
                shutil.rmtree(workspace)
                checkpoint.unlink()
                checkpoint.with_suffix(".yaml").unlink()
    results["laws"] = laws_of(results)
    keep(file, results)
    save_scaling(results, options.results / "scaling.png")
    lines = lines_of(results)
    file.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
