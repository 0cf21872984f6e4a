"""How fast integers are on this machine, at the size of published models: random weights, real integers.

    python -m benchmarks.speed                              # steps and hadamard
    python -m benchmarks.speed --only steps --models cin256-v2
    python -m benchmarks.speed --only scaling hadamard
    python -m benchmarks.speed --device cuda                # the steps on an NVIDIA GPU

Steps: `hqdm bench` of each model (profiled, planned, distilled for two updates and exported by hqdm's own stages, in a
workspace that is kept), with attention in fp32 and in 8-bit integers. Hadamard: the same quantisers with and without
their rotations, on the inputs that a step gives them. Scaling, where it is asked for: a step against the batch and
against the size of the image; `python -m benchmarks.scaling` adds the width, memory and a picture. Memory is each
process's peak, libraries included. Everything that is compared runs in turns in one process. The table, its JSON, the
machine and the versions go to RESULTS.

On a GPU: LDM-4's shape at batches of 1 to 64. fp32 is called as it is, without TF32; bfloat16 is compiled by torch,
channels-last, and replayed as a CUDA graph, as are the integers. nvidia-smi tells clocks, power and driver before and
after. Minutes pass before the first figure of a batch: torch compiles, and Triton tries its tiles on every shape.
"""

import argparse
import copy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import add_step_options, keep, kept_results
from hqdm_cli import console
from pipelines import runner, speed
from pipelines.doctor import findings
from pipelines.kernels.prologue import Prologue
from pipelines.memory import reuse_freed_memory
from pipelines.quant.spec import IDENTITY
from pipelines.stages import load
from pipelines.stages.bench import FLOAT, Config, Step, floats
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

MODELS = ("cin256-v2", "lsun_beds256")
PARTS = ("steps", "hadamard", "scaling")
ON_DEVICE = dict(models=["cin256-v2"], only=["steps"], batches="1,8,16,32,64")  # where nothing else is asked for
ON_PROCESSOR = dict(models=list(MODELS), only=["steps", "hadamard"], batches="1,4")
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
BATCHES, SIDES = (1, 2, 4, 8), (32, 48, 64, 96)  # latents of 64×64 are images of 256×256


def export_of(
    store: Store, checkpoint: Path, model: str, options: argparse.Namespace, progress, channels: int | None = None
) -> Artifact:
    """The integers of a model with random weights, in a published shape or, with `channels`, another width of it."""
    if not checkpoint.exists():
        written = [sys.executable, "-m", "benchmarks.size", "--write", str(checkpoint), "--published", model]
        subprocess.run(written + (["--channels", str(channels)] if channels else []), check=True)

    def made(stage: str, chosen: dict[str, str], **values: Any) -> Artifact:
        return runner.make(store, stage, load(stage).Config(**values), chosen, progress).artifact

    taken = runner.make(store, "model", runner.model_config(checkpoint, ema=False), {}, progress).artifact
    profile = made("profile", {"model": taken.id}, steps=2, batch=1)
    plan = made("plan", {"profile": profile.id}, method=options.method, bits=options.bits)
    student = made("distill", {"plan": plan.id}, trajectories=1, batch=1, guidance=1.0)
    return made("export", {"distill": student.id})


def steps_of(store: Store, export: Artifact, options: argparse.Namespace, progress) -> dict[str, dict]:
    """The tables of `hqdm bench`, by what attention multiplies in."""
    tables = {}
    for attention in ("fp32", "int8") if options.device == "cpu" else ("fp32",):
        config = Config(
            batch=options.batches, turns=options.turns, guidance=1.0, attention=attention, device=options.device
        )
        artifact = runner.make(store, "bench", config, {"export": export.id}, progress, force=True).artifact
        tables[attention] = artifact.values("bench.json")
        shutil.copyfile(artifact.file("bench.png"), options.results / f"{export.path.parents[1].name}-{attention}.png")
    return tables


@torch.inference_mode()
def hadamard_of(export: Artifact, turns: int) -> dict[str, float]:
    """What the rotations of a step's quantisers take, in ms and as a share of the step, at batch 1."""
    step = Step("int", str(export.path), Config(guidance=1.0), None)
    call, seen = step.of(1), []
    with_rotation = [module for module in step.model.network.modules() if isinstance(module, Prologue)]
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, args))) for module in with_rotation
    ]
    call()
    for handle in handles:
        handle.remove()
    plain = {}
    for module in with_rotation:
        plain[module] = copy.copy(module)
        plain[module].plan = replace(module.plan, transform=IDENTITY, inverse="none")

    def rotated():
        for module, args in seen:
            module(*args)

    def unrotated():
        for module, args in seen:
            plain[module](*args)

    taken = speed.in_turns({"step": call, "rotated": rotated, "plain": unrotated}, turns)
    median = {name: speed.spread(seconds)["median"] for name, seconds in taken.items()}
    cost = median["rotated"] - median["plain"]
    return {f"{name}_ms": value for name, value in median.items()} | {"hadamard_share": cost / median["step"]}


def scaling_of(model: Artifact, export: Artifact, turns: int) -> list[dict[str, Any]]:
    """Seconds of a step against the batch at 64×64 latents, and against the latents' side at batch 1."""
    steps = contenders_of(model, export)
    return [
        timed(steps, what, value, turns) for what, values in (("batch", BATCHES), ("side", SIDES)) for value in values
    ]


def contenders_of(model: Artifact, export: Artifact) -> dict[str, Step]:
    """Integers, fp32 and, where it is worth measuring, bfloat16, all at the timestep of the integers."""
    config = Config(guidance=1.0)
    steps = {"int": Step("int", str(export.path), config, None)}
    for name in floats(config.place()):
        steps[name] = Step(name, str(model.path), config, steps["int"].timestep)
    return steps


def timed(steps: Mapping[str, Step], what: str, value: int, turns: int) -> dict[str, Any]:
    """A row: milliseconds of contenders in turns with one thing, their `batch` or `side`, changed from batch 1 at their
    own side, and how many times as fast as fp32 the integers are. Any other `what` changes nothing, and is a name.
    """
    shape = steps["int"].model.info.shape
    side = value if what == "side" else shape[1]
    for step in steps.values():
        step.model.info = replace(step.model.info, shape=(shape[0], side, side))
    runs = {name: step.of(value if what == "batch" else 1) for name, step in steps.items()}
    taken = speed.in_turns(runs, turns)
    for step in steps.values():
        step.model.info = replace(step.model.info, shape=shape)
    row = {what: value, **{f"{name}_ms": speed.spread(times)["median"] for name, times in taken.items()},
           "int_times_fp32": speed.ratio(taken["fp32"], taken["int"])["median"]}  # fmt: skip
    print(row, file=sys.stderr)
    return row


def lines_of(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    lines = ["# Speed", "", f"{results['machine']}", ""]
    for model, tables in results.get("steps", {}).items():
        lines += [f"## A step of {model}", ""]
        lines += ["| contender | batch | ms | ms an image | times fp32 | times bf16 | resident, GB | peak, GB |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
        for attention, table in tables.items():
            for row in table["steps"]:
                if attention != "fp32" and row["contender"] != "int":
                    continue
                name = row["contender"] + (", attention in int8" if attention == "int8" else "")
                memory, ms = table["memory_gb"].get(row["contender"]), row["ms"]["median"]
                held = f"{memory['resident']:.2f} | {memory['peak']:.2f}" if memory else "|"
                ratios = [row.get(f"times_as_fast_as_{other}") for other in FLOAT]
                times = " | ".join(
                    "{median:.2f} ({low:.2f}–{high:.2f})".format(**each) if each else "" for each in ratios
                )
                lines.append(f"| {name} | {row['batch']} | {_ms(ms)} | {_ms(ms / row['batch'])} | {times} | {held} |")
        lines += ["", "| ms at the smallest batch | " + " | ".join(speed.KINDS) + " | of the int8 peak |"]
        lines.append("|---|" + "--:|" * (len(speed.KINDS) + 1))
        for attention, table in tables.items():
            for name, mine in table["shares"].items():
                if attention == "int8" and name != "int":
                    continue
                share = mine.get("fraction_of_int8_peak")
                label = name + (", attention in int8" if attention == "int8" else "")
                cells = [_ms(mine[kind]) for kind in speed.KINDS] + [f"{share:.0%}" if share else ""]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    for model, row in results.get("hadamard", {}).items():
        cost, share = row["rotated_ms"] - row["plain_ms"], row["hadamard_share"]
        lines += [f"Rotations in a step of {model}: {cost:.1f} of {row['step_ms']:.0f} ms, {share:.1%}.", ""]
    for what in ("batch", "side"):
        rows = [row for row in results.get("scaling", []) if what in row]
        if rows:
            names = list(rows[0])
            lines += [f"| {' | '.join(names)} |", "|" + "--:|" * len(names)]
            lines += ["| " + " | ".join(f"{row[name]:.2f}" if "times" in name else f"{row[name]:.0f}" for name in names)
                      + " |" for row in rows]  # fmt: skip
            lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="steps and hadamard, if not given; on a GPU steps")
    parser.add_argument("--models", nargs="+", help="published models whose shape is taken")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batches", help="images of a step, with commas")
    add_step_options(parser, turns=9, kept="workspaces: 8 GB")
    options = parser.parse_args()
    for name, usual in (ON_DEVICE if options.device == "cuda" else ON_PROCESSOR).items():
        setattr(options, name, getattr(options, name) or usual)
    if options.device == "cuda" and set(options.only) != {"steps"}:
        parser.error("--device cuda measures steps alone")
    file, results = kept_results(options, "speed" if options.device == "cpu" else "speed-cuda")
    told = {finding.what: finding.found for finding in findings(options.folder)}
    results["machine"] = f"{told['processor']}; {told['libraries']}; compiled kernels: {_compiler(told)}"
    if options.device == "cuda":
        Config(device="cuda").place()  # says now what is missing, and not after the export
        results["machine"] += f"; CUDA {torch.version.cuda}; before: {clocks()}"
    reuse_freed_memory()
    with console.Progress() as progress:
        for index, model in enumerate(options.models):
            store = Store(options.folder / model)
            export = export_of(store, options.folder / f"{model}.ckpt", model, options, progress)
            if "steps" in options.only:
                results.setdefault("steps", {})[model] = steps_of(store, export, options, progress)
            if "hadamard" in options.only:
                results.setdefault("hadamard", {})[model] = hadamard_of(export, options.turns)
            if "scaling" in options.only and not index:
                results["scaling"] = scaling_of(store.ancestor(export, "model"), export, max(3, options.turns // 3))
            keep(file, results)
    if options.device == "cuda":
        results["machine"] += f"; after: {clocks()}"
        keep(file, results)
    lines = lines_of(results)
    file.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def clocks() -> str:
    """What nvidia-smi says of the GPUs' clocks, power and driver."""
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvidia-smi does not say: {error}"
    return f"{CLOCKS}: {' / '.join(run.stdout.strip().splitlines())}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.2f}"


def _compiler(told: dict[str, str]) -> str:
    """Which compiler built the kernels, without the folder that they lie in."""
    found = told["compiled kernels"]
    return found if found.startswith("none") else found.rpartition(", by ")[2].rpartition("/")[2]


if __name__ == "__main__":
    main()
