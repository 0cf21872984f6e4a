"""Measure a model's step here: full precision, bfloat16 and integers in turns, against what the machine can do.

On a CUDA device fp32 is called as it is; bfloat16 is compiled by torch and, as the integers, replayed as a CUDA graph.

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
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.machine import machine
from pipelines.workspace.store import Store

NAME = "bench"
VERSION = 1
FLOAT = ("fp32", "bf16")
INTEGER = {"int": "cuda", "int-bf16": "cuda-bf16"}  # contender on a device: back end
STEPS = 20  # of an image, as `hqdm sample` draws it unless told otherwise


@dataclass(frozen=True)
class Config:
    batch: str = "1,4"  # images of a step, with commas
    turns: int = 9
    guidance: float | None = None  # the model's; with 1 the network is called once a step
    device: Literal["cpu", "cuda"] = "cpu"
    attention: Literal["fp32", "int8"] = "fp32"  # what the integer model's attention multiplies in
    memory: bool = True  # whether each contender also runs in a process of its own, for its memory

    def __post_init__(self):
        if self.turns < 1:
            raise UsageError(f"bench: turns cannot be {self.turns}", "it takes 1 or more")
        if not all(word.strip().isdigit() and int(word) > 0 for word in self.batch.split(",")):
            raise UsageError(f"bench: batch cannot be {self.batch!r}", "write numbers with commas, as in 1,4")
        if self.attention != "fp32" and self.device != "cpu":
            raise UsageError(f"--attention {self.attention} is compiled for processors alone", "leave it out")

    @property
    def batches(self) -> list[int]:
        return [int(word) for word in self.batch.split(",")]

    def place(self):
        """The torch device; HqdmError where it is not there. Triton's interpreter is on the processor."""
        import torch

        from pipelines.kernels import cuda

        return cuda.device() if self.device == "cuda" else torch.device("cpu")


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
    from pipelines.kernels.cuda import name_of

    here, device = machine(), config.place()
    report.begin("the machine's best", 1, unit="measurements")
    peaks = speed.peaks(device)
    report.advance(1)
    report.end()
    floating = floats(device)
    if len(floating) < len(FLOAT):
        report.note("bf16 is left out: this processor has no instructions for it, and takes a hundred times as long")
    paths = {name: str(inputs["model"].path) for name in floating}
    if "export" in inputs:
        paths |= dict.fromkeys(INTEGER if config.device == "cuda" else ["int"], str(inputs["export"].path))
    steps = _steps(paths, config)
    rows, shares = [], {}
    report.begin("steps", len(config.batches) * (config.turns + speed.WARM_UP), unit="turns")
    for index, batch in enumerate(config.batches):
        runs = {name: step.of(batch) for name, step in steps.items()}
        done = index * (config.turns + speed.WARM_UP)
        taken = speed.in_turns(
            runs, config.turns, speed.clock_of(device), lambda turn, done=done: report.advance(done + turn)
        )
        for name, seconds in taken.items():
            ratios = {f"times_as_fast_as_{other}": speed.ratio(taken[other], seconds) for other in floating}
            rows.append({"contender": name, "batch": batch, "ms": speed.spread(seconds)} | ratios)
        if index == 0:
            shares = {name: _shares(step, batch, peaks) for name, step in steps.items() if name != "bf16"}
    report.end()
    memory = _memory(paths, config, report) if config.memory else {}
    table = {
        "steps": rows, "shares": shares, "peaks": peaks, "memory_gb": memory, "steps_of_an_image": STEPS,
        "guidance": steps["fp32"].guidance, "attention": config.attention,
        "processor": name_of(device) if device.type == "cuda" else here["cpu"], "device": config.device,
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


def floats(device) -> tuple[str, ...]:
    """Those of FLOAT that are worth measuring on a torch device."""
    from pipelines import speed

    return FLOAT if speed.multiplies_bfloat16(device) else FLOAT[:1]


class Step:
    """A contender's step: one guided prediction of a batch at the first timestep of its tables."""

    def __init__(self, kind: str, path: str, config: Config, timestep: float | None):
        import torch

        from pipelines import diffusion
        from pipelines.kernels import cuda
        from pipelines.kernels.attention import choose_products
        from pipelines.models.denoiser import load_denoiser
        from pipelines.students import load_integer

        self.device, self.recorded = config.place(), config.device == "cuda" and kind != "fp32"
        if config.device == "cuda":
            cuda.round_nothing()
        if kind in FLOAT:
            model = load_denoiser(Path(path)).to(self.device)
        else:
            model = load_integer(Path(path), INTEGER[kind] if config.device == "cuda" else "cpu")
        self.model = model.bfloat16() if kind == "bf16" else model
        self.dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        if kind == "bf16":
            model.dtype = self.dtype
        if kind == "bf16" and self.device.type == "cuda":
            model.network.compile(dynamic=False)
        if kind not in FLOAT:
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

    def of(self, batch: int, recorded: bool | None = None):
        """A call without arguments that makes one step. recorded: whether it replays a graph; None: as it is best."""
        import torch

        from pipelines.replay import ReplayedSteps

        generator = torch.Generator().manual_seed(0)
        x = torch.randn((batch, *self.model.info.shape), generator=generator)
        x = x.to(self.device, self.dtype, memory_format=torch.channels_last)
        classes = torch.zeros(batch, dtype=torch.int64, device=self.device)
        timestep, model = torch.tensor(self.timestep), self.model
        if self.recorded if recorded is None else recorded:
            model = ReplayedSteps(model, [self.timestep], self.guidance, self.device)

        def step():
            with torch.inference_mode():
                return model.predict(x, timestep, classes, self.guidance)

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

    call = step.of(batch, recorded=False)
    call()
    with speed.Shares(step.model.network, step.device) as shares:
        for _ in range(speed.TRIES):
            call()
    result: dict[str, Any] = {kind: seconds / speed.TRIES * 1e3 for kind, seconds in shares.seconds.items()}
    operations = sum(shares.operations.values())
    if operations and peaks["int8_gops"]:
        seconds = shares.seconds["convolutions"] + shares.seconds["linears"]
        result["fraction_of_int8_peak"] = operations / 1e9 / seconds / peaks["int8_gops"]
    return result


def _memory(paths: Mapping[str, str], config: Config, report: Report) -> dict[str, dict[str, float]]:
    """GB of each contender in a process of its own, libraries included: resident after three steps at the smallest
    batch, and at its peak, which loading may have been; `libraries` is theirs alone. Of a CUDA device: what torch keeps
    of its memory.
    """
    context = multiprocessing.get_context("spawn")
    contenders = ({"libraries": ""} if config.device == "cpu" else {}) | dict(paths)
    report.begin("memory", len(contenders), unit="processes")
    result = {}
    for index, (name, path) in enumerate(contenders.items()):
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
    from pipelines.memory import peak_bytes, resident_bytes, reuse_freed_memory, trim

    reuse_freed_memory()
    if path:
        step = Step(name, path, config, None)
        call = step.of(min(config.batches))
        call()
        trim()  # of what packing freed, as sampling does
        call()
        call()
        if step.device.type == "cuda":
            import torch

            sender.send({"resident": torch.cuda.memory_reserved(), "peak": torch.cuda.max_memory_reserved()})
            return
    else:
        from pipelines import students  # noqa: F401  (all that a step imports)
    sender.send({"resident": resident_bytes(), "peak": peak_bytes()})


def _picture(table: Mapping[str, Any], path: Path) -> None:
    from pipelines.report.speed_pictures import save_bench

    save_bench(table, path)
