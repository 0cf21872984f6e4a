"""What a step of distillation costs: a layer at a time, and whole updates of every method, beside plain training.

    python -m benchmarks.training                        # both tables, on the embedded model
    python -m benchmarks.training --only layers
    python -m benchmarks.training --only updates --model model.ckpt --methods hqdm/ours,efficientdm/published

The first table is of layers in the shapes of LDM-4 ImageNet, forward and backward: in full precision with its weight
trained, as `QuantLayer` trains it, and as the public code of HQ-DM and EfficientDM does (`PublishedLayer`). The second
is of `hqdm distill`'s own loop against an update of all weights in full precision, on the same network, batch and
guidance. Whatever is compared runs in turns in one process; a ratio is the median over the turns, with its quartiles.
Seconds are the process's CPU time on one thread, so that other work on the machine does not count. Memory is the peak
of a process of its own, libraries included. `training.json` in the folder has every figure, and of each table the
settings and torch's version.
"""

import argparse
import gc
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.options import told
from pipelines import runner
from pipelines.digits import CHECKPOINT
from pipelines.distillation.rates import WEIGHT_DECAY
from pipelines.events import Report
from pipelines.memory import peak_bytes, reuse_freed_memory
from pipelines.methods import METHODS
from pipelines.models.denoiser import Denoiser, load_denoiser
from pipelines.quant.affine import choose
from pipelines.quant.hadamard import matrix, rotate_activation, rotate_weight
from pipelines.quant.layers import QuantLayer
from pipelines.quant.spec import IDENTITY, Site, SitePlan, Transform
from pipelines.quant.tables import TimestepTables
from pipelines.speed import WARM_UP, in_turns, ratio
from pipelines.stages import load
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

RANK = 32  # of the adapters, as published
BATCH = 4  # two images with guidance, as published
PLAIN = "full precision"
WORKSPACE = "training-workspace"  # made anew each time: no name that a user's own workspace has
# What decides each table's figures.
SETTINGS = {
    "layers": ("turns", "batch", "layers"),
    "updates": ("turns", "model", "methods", "bits", "steps", "batch_of_images"),
}  # fmt: skip


# The layers of LDM-4 ImageNet (192 channels times 1, 2, 3, 5; 768 of time; 512 of context).
def _conv(inputs: int, outputs: int, side: int) -> Site:
    return Site(f"conv 3×3 {inputs}→{outputs}, {side}×{side}", "conv", "residual", (outputs, inputs, 3, 3),
                padding=(1, 1), positions=(side, side), rank=4)  # fmt: skip


def _linear(what: str, inputs: int, outputs: int, tokens: int) -> Site:
    name = f"{what} {inputs}→{outputs}, " + (f"{tokens} tokens" if tokens else "rank 2")
    return Site(name, "linear", "attention", (outputs, inputs), rank=3 if tokens else 2)


SHAPES = [
    (_conv(192, 192, 64), 0), (_conv(384, 384, 32), 0), (_conv(576, 576, 16), 0), (_conv(960, 960, 8), 0),
    (_conv(1920, 960, 8), 0), (_linear("attention", 384, 384, 1024), 1024), (_linear("attention", 960, 960, 64), 64),
    (_linear("feed-forward", 576, 4608, 256), 256), (_linear("feed-forward", 3840, 960, 64), 64),
    (_linear("time", 768, 960, 0), 0),
]  # fmt: skip
HADAMARD = Transform("channels", 32)
# Transform, where its inverse goes, activation quantiser: HQ-DM's, the same with zero-points, EfficientDM's.
KINDS = {
    "single, symmetric": (HADAMARD, "single", "symmetric"),
    "single, asymmetric": (HADAMARD, "single", "asymmetric"),
    "none, asymmetric": (IDENTITY, "none", "asymmetric"),
}


class PublishedLayer(nn.Module):
    """A layer as the public code of HQ-DM and EfficientDM trains it, written anew from what that code does.

    One dense block-diagonal Hadamard matrix of the layer's whole width, in orthonormal coordinates, multiplied to the
    activation and, after its quantiser, again to go back; BA of a linear by sending the identity through both adapters,
    of a convolution as a product at every kernel position; fake quantisers of element-wise operations that autograd
    records, rounding straight through and clipping by two ReLUs.

    It is kinder than that code in two ways: the base weight is held as floats (published: packed integers that are
    unpacked by every forward pass), and convolutions take channels-last input, which their Hadamard need not copy.

    weight: (out, in, …) fp32 or fp64. scale, zero: the activation's, scalars, of the *raw* transform as `QuantLayer`
    has them; the parameters here are the orthonormal ones. weight_scale, weight_zero: (out,), the former raw as well
    for `double`, which the public code does not have and which rotates the weight before its quantiser.
    """

    def __init__(
        self, plan: SitePlan, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor,
        weight_zero: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, rank: int = RANK,
    ):  # fmt: skip
        super().__init__()
        site, root = plan.site, plan.transform.order**0.5
        self.plan, self.spatial = plan, site.kind == "conv"
        per_output = (-1, *[1] * (weight.ndim - 1))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight_scale = nn.Parameter((weight_scale / (root if plan.inverse == "double" else 1)).view(per_output))
        self.register_buffer("weight_zero", weight_zero.view(per_output))
        self.scale = nn.Parameter(scale / root)
        self.zero = nn.Parameter(zero.clone()) if plan.activation_quantiser == "asymmetric" else None
        if self.spatial:
            self.lora_a = nn.Conv2d(site.channels, rank, site.weight[2:], site.stride, site.padding, bias=False)
            self.lora_b = nn.Conv2d(rank, site.outputs, 1, bias=False)
        else:
            self.lora_a = nn.Linear(site.channels, rank, bias=False)
            self.lora_b = nn.Linear(rank, site.outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.register_buffer("hadamard", None)
        if not plan.transform.is_identity:
            blocks = site.channels // plan.transform.order
            self.hadamard = torch.block_diag(*[matrix(plan.transform) / root] * blocks)

    @staticmethod
    def _quantise(x, scale, zero, low: int, high: int):
        ratio = x / scale
        codes = (ratio.round() - ratio).detach() + ratio
        codes = codes if zero is None else codes + zero
        codes = codes + F.relu(low - codes)
        codes = codes - F.relu(codes - high)
        return (codes if zero is None else codes - zero) * scale

    def _merged(self) -> torch.Tensor:
        if self.spatial:
            by_position = self.lora_b.weight.flatten(1) @ self.lora_a.weight.permute(2, 3, 0, 1)
            return self.weight + by_position.permute(2, 3, 0, 1)
        identity = torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        return self.weight + self.lora_b(self.lora_a(identity)).T

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        if self.hadamard is None:
            return self._quantise(x, self.scale, self.zero, *plan.activation_range)
        rows = (x.permute(0, 2, 3, 1) if self.spatial else x).reshape(-1, plan.site.channels)
        rows = self._quantise(rows @ self.hadamard, self.scale, self.zero, *plan.activation_range)
        rows = rows @ self.hadamard.T if plan.inverse == "single" else rows
        if not self.spatial:
            return rows.view(x.shape)
        return rows.view(x.shape[0], *x.shape[2:], plan.site.channels).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan, site = self.plan, self.plan.site
        weight = self._merged()
        if plan.inverse == "double":
            weight = (weight.movedim(1, -1) @ self.hadamard).movedim(-1, 1)
        weight = self._quantise(weight, self.weight_scale, self.weight_zero, *plan.weight_range)
        x = self._activation(x)
        if not self.spatial:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, site.stride, site.padding, site.dilation)


def both_layers(plan: SitePlan, x: torch.Tensor, seed: int = 0, rank: int = RANK) -> tuple[QuantLayer, PublishedLayer]:
    """One random layer in both forms with equal parameters: scales fitted to x, (N, in, H, W) or (…, in), and no B of
    zeros.
    """
    site, generator = plan.site, torch.Generator().manual_seed(seed)
    weight = torch.randn(site.weight, generator=generator) / math.sqrt(math.prod(site.weight[1:]))
    if site.kind == "conv":
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(site.outputs, generator=generator)
    rotated = rotate_weight(weight, plan.transform) if plan.inverse == "double" else weight
    weight_scale, weight_zero = choose(rotated.flatten(1), *plan.weight_range, steps=4)
    seen = rotate_activation(x, plan.transform, site.kind == "conv").reshape(1, -1)[:, :100_000]
    scale, zero = choose(seen, *plan.activation_range, steps=4)
    tables = TimestepTables([1], scale[:, None], zero[:, None])
    tables.set_timestep(1)
    ours = QuantLayer(plan, weight, bias, weight_scale, weight_zero, tables, 0, slice(0, site.outputs))
    ours.add_lora(rank, generator)
    with torch.no_grad():
        ours.lora_b.copy_(torch.randn(site.outputs, rank, generator=generator) * weight.std() * 0.1)
    published = PublishedLayer(plan, weight, bias, weight_scale, weight_zero, scale[0], zero[0], rank)
    with torch.no_grad():
        published.lora_a.weight.copy_(ours.lora_a)
        published.lora_b.weight.copy_(ours.lora_b.view(published.lora_b.weight.shape))
    return ours, published


def plain_layer(site: Site) -> nn.Module:
    """The layer in full precision, its weight trained."""
    if site.kind == "linear":
        return nn.Linear(site.channels, site.outputs)
    layer = nn.Conv2d(site.channels, site.outputs, site.weight[2:], site.stride, site.padding, site.dilation)
    return layer.to(memory_format=torch.channels_last)


def layer_input(site: Site, tokens: int, batch: int, seed: int = 0) -> torch.Tensor:
    """Random, channels-last for a convolution, with a mean and one channel in 50 ten times the others'."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *([tokens] if tokens else []), site.channels)
    if site.kind == "conv":
        shape = (batch, *site.positions, site.channels)
    x = torch.randn(shape, generator=generator) + 0.3
    x[..., ::50] *= 10
    return x.permute(0, 3, 1, 2) if site.kind == "conv" else x


def seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def shown(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def pass_of(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass, gradients to x and to whatever of the layer is trained."""
    x = x.detach().requires_grad_(True)
    trained = [x, *layer.parameters()]
    if isinstance(layer, QuantLayer):
        trained += [layer._tables[0].scale[0], layer._tables[0].zero[0]]
    with torch.no_grad():
        upstream = torch.randn_like(layer(x))

    def run() -> None:
        if isinstance(layer, QuantLayer):
            layer._tables[0].set_timestep(1)
        layer(x).backward(upstream)
        for value in trained:
            value.grad = None

    return run


def layer_table(turns: int, batch: int, wanted: str) -> list[dict]:
    rows = []
    for site, tokens in SHAPES:
        if wanted not in site.name:
            continue
        x = layer_input(site, tokens, batch)
        for kind, (transform, inverse, quantiser) in KINDS.items():
            plan = SitePlan(site, True, transform, inverse, 4, 4, "asymmetric", quantiser)
            ours, published = both_layers(plan, x)
            layers = {"plain": plain_layer(site), "ours": ours, "published": published}
            passes = {name: pass_of(layer, x) for name, layer in layers.items()}
            taken = in_turns(passes, turns, time.process_time)
            rows.append(
                {"layer": site.name, "kind": kind}
                | {f"{name}_ms": statistics.median(values) * 1e3 for name, values in taken.items()}
                | {"published_over_ours": ratio(taken["published"], taken["ours"]),
                   "ours_over_plain": ratio(taken["ours"], taken["plain"])}
            )  # fmt: skip
            print(layer_row(rows[-1]), file=sys.stderr)
            del layers, ours, published
            gc.collect()
    return rows


def layer_row(row: dict) -> str:
    figures = " | ".join(f"{row[f'{name}_ms']:.1f}" for name in ("plain", "ours", "published"))
    return (
        f"| {row['layer']} | {row['kind']} | {figures} | {shown(row['published_over_ours'])} "
        f"| {shown(row['ours_over_plain'])} |"
    )


def print_layers(rows: list[dict], batch: int) -> None:
    print(f"\nOne layer forward and backward, batch {batch}, w4a4, LoRA rank {RANK}, one thread, ms of CPU time\n")
    print("| layer | transform, activation | full precision | ours | published | published / ours | ours / full |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(layer_row(row))
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            total = {name: sum(row[f"{name}_ms"] for row in mine) for name in ("plain", "ours", "published")}
            print(
                f"| all of them once | {kind} | {total['plain']:.0f} | {total['ours']:.0f} | {total['published']:.0f} "
                f"| {total['published'] / total['ours']:.2f} | {total['ours'] / total['plain']:.2f} |"
            )


# ------------------------------------------------------------------------------------------------- whole updates


class PlainTraining:
    """Full-precision training of all weights: AdamW on the squared error of the guided prediction, as distillation has
    it, with the same network, batch, conditions and guidance.
    """

    def __init__(self, denoiser: Denoiser, batch: int):
        self.denoiser, info = denoiser.requires_grad_(True), denoiser.info
        self.optimiser = torch.optim.AdamW(
            [value for value in denoiser.network.parameters() if value.requires_grad], 1e-5, weight_decay=WEIGHT_DECAY
        )
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn((batch, *info.shape), generator=generator)
        self.target = torch.randn((batch, *info.shape), generator=generator)
        self.conditions = torch.randint(0, max(1, info.conditions), (batch,), generator=generator)

    def update(self) -> None:
        with torch.enable_grad():
            info = self.denoiser.info
            predicted = self.denoiser.predict(self.x, torch.tensor(501), self.conditions, info.guidance_or(None))
            loss = (predicted - self.target).square().sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()


class Watch(Report):
    """Listens to the distillation loop, takes the time of each of its updates, and runs `between` after each."""

    def __init__(self, between: Callable[[], None] | None = None):
        self.between, self.taken, self.other, self.listening = between, [], [], False

    def begin(self, what, *args, **kwargs):
        self.listening = what == "distill"
        self.begun = time.process_time()

    def advance(self, done, **figures):
        if not self.listening:
            return
        self.taken.append(time.process_time() - self.begun)
        if self.between is not None:
            self.other.append(seconds(self.between))
        self.begun = time.process_time()

    def end(self):
        self.listening = False


def distil(store: Store, plan: Artifact, options: argparse.Namespace, watch: Watch) -> None:
    """The stage itself, for as many updates as are asked for."""
    steps = len(json.loads(store.ancestor(plan, "profile").file("profile.json").read_text())["timesteps"])
    trajectories = -(-(options.turns + WARM_UP) // steps)
    config = load("distill").Config(trajectories=trajectories, batch=options.batch_of_images)
    runner.make(store, "distill", config, {"plan": plan.id}, watch, force=True)


def plan_of(store: Store, method: str, bits: str) -> Artifact:
    name, _, variant = method.partition("/")
    return runner.make(store, "plan", load("plan").Config(method=name, variant=variant or None, bits=bits)).artifact


def child(options: argparse.Namespace) -> None:
    """In a process of its own: one method in turns with plain training (`pair`), or one of them for its memory."""
    store = Store(options.folder / WORKSPACE)
    reuse_freed_memory()
    what, name = options.child
    if what == "pair" or name == PLAIN:
        plain = PlainTraining(load_denoiser(store.current("model").path), options.batch_of_images)
    if name == PLAIN:
        for _ in range(3):  # the optimiser's moments are there from the second on
            plain.update()
        told = {}
    else:
        options.turns = options.turns if what == "pair" else 1
        watch = Watch(plain.update if what == "pair" else None)
        distil(store, plan_of(store, name, options.bits), options, watch)
        told = {"method": watch.taken[WARM_UP:], "plain": watch.other[WARM_UP:]}
    # The system's own figure for a child (ru_maxrss) has its parent's memory in it.
    (options.folder / "child.json").write_text(json.dumps(told | {"peak_gb": peak_bytes() / 1e9}))


def update_table(options: argparse.Namespace) -> list[dict]:
    taken = runner.model_config(options.model)
    shutil.rmtree(options.folder / WORKSPACE, ignore_errors=True)
    store = Store(options.folder / WORKSPACE)
    model = runner.make(store, "model", taken).artifact
    profile = load("profile").Config(steps=options.steps, batch=2)
    runner.make(store, "profile", profile, {"model": model.id})
    names = options.methods.split(",") if options.methods else [
        f"{name}/{variant}" for name, method in METHODS.items() for variant in method.variants
    ]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.training", "--folder", str(options.folder), "--bits", options.bits]
    command += ["--turns", str(options.turns), "--batch-of-images", str(options.batch_of_images), "--child"]

    def told(what: str, name: str) -> dict:
        file = options.folder / "child.json"
        file.unlink(missing_ok=True)
        subprocess.run([*command, what, name], check=True, stdout=sys.stderr)
        return json.loads(file.read_text())

    plain_peak = told("alone", PLAIN)["peak_gb"]
    rows = []
    for name in names:
        plan_of(store, name, options.bits)  # outside the child, whose memory is to be that of training
        row = {"method": name, "peak_gb": told("alone", name)["peak_gb"], "plain_peak_gb": plain_peak}
        times = told("pair", name)
        if times["method"]:
            row |= {"seconds": statistics.median(times["method"]), "plain_seconds": statistics.median(times["plain"]),
                    "over_plain": ratio(times["method"], times["plain"])}  # fmt: skip
        rows.append(row)
        print(update_row(row), file=sys.stderr)
    return rows


def update_row(row: dict) -> str:
    figures = "no updates | | "
    if "seconds" in row:
        figures = f"{row['seconds']:.3f} | {row['plain_seconds']:.3f} | {shown(row['over_plain'])}"
    return f"| {row['method']} | {figures} | {row['peak_gb']:.2f} | {row['peak_gb'] / row['plain_peak_gb']:.2f} |"


def print_updates(rows: list[dict], options: argparse.Namespace) -> None:
    print(
        f"\nOne update on {options.model.name}, {options.bits}, {options.batch_of_images} images with the model's "
        "guidance, one thread, seconds of CPU time; a method's includes its teacher's forward pass\n"
    )
    print("| method | update, s | full precision, s | ratio | peak memory, GB | times that of full precision |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(update_row(row))
    if rows:
        print(f"| {PLAIN} | | | | {rows[0]['plain_peak_gb']:.2f} | 1 |")


def with_settings(name: str, rows: list[dict], options: argparse.Namespace) -> dict:
    """A table as it is kept: tables of one file may be of different runs."""
    settings = {key: getattr(options, key) for key in SETTINGS[name]}
    settings |= {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    return {"torch": torch.__version__, "settings": settings, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("layers", "updates"))
    parser.add_argument("--folder", type=Path, default=Path("runs/training"))
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a layer's input, guidance included")
    parser.add_argument("--layers", default="", help="those with this in their names alone")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--methods", default="", help="method/variant with commas; all by default")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--steps", type=int, default=4, help="of the trajectories")
    parser.add_argument("--batch-of-images", type=int, default=8, help="of an update; guidance doubles it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with told():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure and print the tables that are asked for, and keep them beside those that are there."""
    torch.set_num_threads(1)
    if options.child:
        child(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    reuse_freed_memory()
    file = options.folder / "training.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    results = {name: table for name, table in kept.items() if isinstance(table, dict)}  # others say no settings
    if options.only != "updates":
        rows = layer_table(options.turns, options.batch, options.layers)
        print_layers(rows, options.batch)
        results["layers"] = with_settings("layers", rows, options)
    if options.only != "layers":
        rows = update_table(options)
        print_updates(rows, options)
        results["updates"] = with_settings("updates", rows, options)
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
