"""Measure a model's step here: full precision, bfloat16 and integers in turns, against what the machine can do.

Writes `bench.json` and `bench.png`. A step is what `hqdm sample` does at one timestep for a batch of images. What is
measured is the machine as much as the model, so that nothing is ever taken as up to date: every call measures anew.
"""

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.store import Artifact, Draft, Store, machine

NAME = "bench"
VERSION = 1
FLOAT = ("fp32", "bf16")
STEPS = 20  # of an image, as `hqdm sample` draws it unless told otherwise


@dataclass(frozen=True)
class Config:
    batch: str = "1,4"  # images of a step, with commas
    turns: int = 9
    guidance: float | None = None  # the model's; with 1 the network is called once a step
    attention: Literal["fp32", "int8"] = "fp32"  # what the integer model's attention multiplies in
    memory: bool = True  # whether each contender also runs in a process of its own, for its memory

    def __post_init__(self):
        if self.turns < 1:
            raise UsageError(f"bench: turns cannot be {self.turns}", "it takes 1 or more")
        if not all(word.strip().isdigit() and int(word) > 0 for word in self.batch.split(",")):
            raise UsageError(f"bench: batch cannot be {self.batch!r}", "write numbers with commas, as in 1,4")

    @property
    def batches(self) -> list[int]:
        return [int(word) for word in self.batch.split(",")]


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The model, and its integers where there are such."""

    def fits(artifact: Artifact) -> bool:
        return artifact.config.get("format") == "int"

    for role, ident in chosen.items():
        if store.get(ident).stage != role:
            hint = "name an export or a model, as in export/1, or a checkpoint's file"
            raise UsageError(f"{ident} is no {role}, and has no step to measure", hint)
    if "model" in chosen:
        return {"model": store.get(chosen["model"])}
    export = store.get(chosen["export"]) if "export" in chosen else store.current("export", fits)
    if export is not None:
        return {"model": store.ancestor(export, "model"), "export": export}
    model = store.current("model")
    if model is None:
        raise HqdmError("there is no model to measure", "hqdm profile model.ckpt")
    return {"model": model}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Measure; figures: the ratio of fp32 to integers (or bf16) at each batch, and milliseconds."""
    from pipelines import speed

    here = machine()
    report.begin("the machine's best", 1, unit="measurements")
    peaks = speed.peaks()
    report.advance(1)
    report.end()
    paths = {name: str(inputs["model"].path) for name in FLOAT}
    if "export" in inputs:
        paths["int"] = str(inputs["export"].path)
    steps = _steps(paths, config)
    rows, shares = [], {}
    report.begin("steps", len(config.batches) * (config.turns + speed.WARM_UP), unit="turns")
    for index, batch in enumerate(config.batches):
        runs = {name: step.of(batch) for name, step in steps.items()}
        done = index * (config.turns + speed.WARM_UP)
        taken = speed.in_turns(runs, config.turns, after=lambda turn, done=done: report.advance(done + turn))
        for name, seconds in taken.items():
            rows.append(
                {"contender": name, "batch": batch, "ms": speed.spread(seconds),
                 "times_as_fast_as_fp32": speed.ratio(taken["fp32"], seconds)}
            )  # fmt: skip
        if index == 0:
            shares = {name: _shares(step, batch, peaks) for name, step in steps.items() if name != "bf16"}
    report.end()
    memory = _memory(paths, config, report) if config.memory else {}
    table = {
        "steps": rows, "shares": shares, "peaks": peaks, "memory_gb": memory, "steps_of_an_image": STEPS,
        "guidance": steps["fp32"].guidance, "attention": config.attention, "processor": here["cpu"],
        "threads": here["threads"],
    }  # fmt: skip
    text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
    (out.path / "bench.json").write_text(text + "\n", encoding="utf-8")
    _picture(table, out.path / "bench.png")
    flat = {f"{row['contender']}_batch{row['batch']}_ms": row["ms"]["median"] for row in rows}
    return flat | {
        f"{row['contender']}_batch{row['batch']}_times_fp32": row["times_as_fast_as_fp32"]["median"]
        for row in rows
        if row["contender"] != "fp32"
    }


class Step:
    """A contender's step: one guided prediction of a batch at the first timestep of its tables."""

    def __init__(self, kind: str, path: str, config: Config, timestep: float | None):
        import torch

        from pipelines import diffusion
        from pipelines.kernels.attention import choose_products
        from pipelines.models.denoiser import load_denoiser
        from pipelines.students import load_integer

        model = load_integer(Path(path), "cpu") if kind == "int" else load_denoiser(Path(path))
        self.model = model.bfloat16() if kind == "bf16" else model
        self.dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        if kind == "int":
            choose_products(model.network, config.attention)
        else:
            self.model.network.to(memory_format=torch.channels_last)
        self.guidance = model.info.guidance_or(config.guidance)
        tables = getattr(model.network, "timestep_tables", None)
        if timestep is None:
            schedule = model.info.schedule
            known = tables.timesteps if tables else diffusion.timesteps_of(diffusion.walker(schedule), schedule, STEPS)
            timestep = max(known)
        self.timestep = timestep

    def of(self, batch: int):
        """A call without arguments that makes one step."""
        import torch

        generator = torch.Generator().manual_seed(0)
        x = torch.randn((batch, *self.model.info.shape), generator=generator)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        classes, timestep = torch.zeros(batch, dtype=torch.int64), torch.tensor(self.timestep)

        def step():
            with torch.inference_mode():
                return self.model.predict(x, timestep, classes, self.guidance)

        return step


def _steps(paths: Mapping[str, str], config: Config) -> dict[str, Step]:
    """Every contender, all at the timestep of the integers."""
    steps, timestep = {}, None
    for name in sorted(paths, key=lambda name: name in FLOAT):
        steps[name] = Step(name, paths[name], config, timestep)
        timestep = steps[name].timestep
    return {name: steps[name] for name in paths}


def _shares(step: Step, batch: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Seconds by kind of layer, of a step, and of integers the fraction of the machine's best in their products."""
    from pipelines import speed

    call = step.of(batch)
    call()
    with speed.Shares(step.model.network) as shares:
        for _ in range(speed.TRIES):
            call()
    result: dict[str, Any] = {kind: seconds / speed.TRIES * 1e3 for kind, seconds in shares.seconds.items()}
    operations = sum(shares.operations.values())
    if operations and peaks["int8_gops"]:
        seconds = shares.seconds["convolutions"] + shares.seconds["linears"]
        result["fraction_of_int8_peak"] = operations / 1e9 / seconds / peaks["int8_gops"]
    return result


def _memory(paths: Mapping[str, str], config: Config, report: Report) -> dict[str, dict[str, float]]:
    """GB of each contender in a process of its own, libraries included: resident after two steps at the smallest batch,
    and at its peak, which loading may have been; `libraries` is theirs alone.
    """
    context = multiprocessing.get_context("spawn")
    report.begin("memory", len(paths) + 1, unit="processes")
    result = {}
    for index, (name, path) in enumerate({"libraries": "", **paths}.items()):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_peak, args=(sender, name, path, config))
        child.start()
        sender.close()
        try:
            result[name] = {what: held / 1e9 for what, held in receiver.recv().items()}
        except EOFError:
            report.warn(f"memory of {name}: its process ended with {child.exitcode}")
        child.join()
        report.advance(index + 1)
    report.end()
    return result


def _peak(sender, name: str, path: str, config: Config) -> None:
    from pipelines.memory import peak_bytes, resident_bytes, reuse_freed_memory

    reuse_freed_memory()
    if path:
        call = Step(name, path, config, None).of(min(config.batches))
        call()
        call()
    else:
        from pipelines import students  # noqa: F401  (all that a step imports)
    sender.send({"resident": resident_bytes(), "peak": peak_bytes()})


def _picture(table: Mapping[str, Any], path: Path) -> None:
    from pipelines.report.speed_pictures import save_bench

    save_bench(table, path)
