"""What a large job takes, before it is begun: 50,000 images, and distilling a transformer of 12 billion parameters.

    python -m benchmarks.budget
    python -m benchmarks.budget --images 10000 --steps 50 --processes 1 16

The constants are measured ones: milliseconds of a step and the machine's best from `make bench` (RESULTS/speed.json),
seconds of an update from `python -m benchmarks.training` at LDM-4's size. Operations are counted on networks without
memory (torch's counter, meta tensors). For a GPU nothing is measured: its times are what it takes if it reaches the
share of its data sheet's operations that this machine reaches of its measured best; read them as a bound to plan with.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.models.compvis_config import unet_arguments
from pipelines.models.compvis_published import PUBLISHED
from pipelines.models.families import FAMILIES
from pipelines.sharding import Settings, units_of
from pipelines.workspace.machine import machine

RESULTS = Path(__file__).parent / "results" / "speed" / "speed.json"
RANK = 32
UPDATE_SECONDS, UPDATE_IMAGES = (
    18.1,
    2,
)  # measured, one thread: LDM-4 ImageNet, one image with guidance (docs/training.md)
PASSES = 4  # of an update: teacher, student, and backward to activations and to weights
GATHERS = 3  # of every weight in an update, under FSDP: teacher, student, and backward
WHOLE = Settings(frees_after_forward=True, policy=None)
BYTES_TRAINED = 20  # a trained value: itself, its gradient, two moments, its moving average
# Dense int8 and bf16 operations a second of the makers' data sheets, and bytes of memory.
DEVICES = {
    "A100, 80 GB": (624e12, 312e12, 80e9),
    "H100 SXM, 80 GB": (1979e12, 989e12, 80e9),
    "H200, 141 GB": (1979e12, 989e12, 141e9),
}


@dataclass(frozen=True)
class Size:
    """A network without its memory. operations: of a step of one image, two for each multiplication with addition."""

    parameters: int
    operations: int
    weights: int  # of linears and convolutions
    adapters: int  # parameters of LoRA
    unit: int  # parameters of the largest unit that FSDP gathers
    rest: int  # and of what belongs to none, which stays gathered while the network runs

    @staticmethod
    def of(network: nn.Module, *args, **kwargs) -> "Size":
        layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            network(*args, **kwargs)
        units = dict.fromkeys(units_of(network, WHOLE), 0)
        for name, value in network.named_parameters():
            units[max((unit for unit in units if not unit or name.startswith(f"{unit}.")), key=len)] += value.numel()
        return Size(
            sum(value.numel() for value in network.parameters()), counted.get_total_flops(),
            sum(layer.weight.numel() for layer in layers),
            sum(RANK * (layer.weight[0].numel() + layer.weight.shape[0]) for layer in layers),
            max(units.values()), units[""],
        )  # fmt: skip

    def packed(self, bits: int) -> float:
        """Bytes of an export: weights in `bits`, the rest in fp32."""
        return self.weights * bits / 8 + 4 * (self.parameters - self.weights)

    @property
    def distilling(self) -> float:
        """Bytes that distillation holds besides activations: the weights that both share, and what is trained."""
        return 4 * self.parameters + BYTES_TRAINED * self.adapters

    def divided(self, processes: int) -> float:
        """The same of each of several processes under FSDP, at the moment that it holds most: its part of the weights,
        what belongs to no unit, the unit that runs and the message in which it came.
        """
        return 4 * (self.parameters / processes + self.rest + 2 * self.unit) + BYTES_TRAINED * self.adapters


def ldm4() -> Size:
    """LDM-4 ImageNet, 256×256 pixels: latents of 64×64."""
    family, arguments, options = unet_arguments(PUBLISHED["cin256-v2"])
    network = FAMILIES[family].build(arguments, options)
    with torch.device("meta"):
        context = torch.empty(1, 1, network.config.cross_attention_dim)
        return Size.of(network.to("meta"), torch.empty(1, 3, 64, 64), torch.empty(1), context)


def flux() -> Size:
    """diffusers' FluxTransformer2DModel as it is by default, 1024×1024 pixels: 4,096 tokens beside 512 of text."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
        return Size.of(
            network, hidden_states=torch.empty(1, 4096, 64), encoder_hidden_states=torch.empty(1, 512, 4096),
            pooled_projections=torch.empty(1, 768), timestep=torch.empty(1), img_ids=torch.empty(4096, 3),
            txt_ids=torch.empty(512, 3), guidance=torch.empty(1),
        )  # fmt: skip


def measured() -> dict[str, float]:
    """Operations a second of an integer step here, the share of the measured int8 best, and of a distillation update,
    on one thread.
    """
    steps = json.loads(RESULTS.read_text(encoding="utf-8"))["steps"]["cin256-v2"]["int8"]
    row = next(row for row in steps["steps"] if row["contender"] == "int" and row["batch"] == 4)
    size = ldm4()
    rate = 4 * size.operations / (row["ms"]["median"] / 1000)
    trained = PASSES * UPDATE_IMAGES * size.operations / UPDATE_SECONDS
    return {
        "seconds": row["ms"]["median"] / 4000, "rate": rate, "share": rate / (steps["peaks"]["int8_gops"] * 1e9),
        "resident": steps["memory_gb"]["int"]["resident"] * 1e9, "threads": steps["threads"], "trained": trained,
        "trained_share": trained / (steps["peaks"]["fp32_gflops"] * 1e9 / steps["threads"]),
    }  # fmt: skip


def told(seconds: float) -> str:
    """Hours from one hour on."""
    return (
        f"{seconds / 3600:,.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.2g} s"
    )


def images_table(known: dict[str, float], options: argparse.Namespace) -> Iterator[str]:
    steps = options.steps * (2 if options.guided else 1)
    size = ldm4()
    yield f"**{options.images:,} images** of LDM-4 ImageNet, 256×256, {options.steps} steps" + (
        " with guidance" if options.guided else "") + ", w4a4, attention in int8:"  # fmt: skip
    yield ""
    yield "| processes | denoising | memory of each | model read | latents and images meanwhile |"
    yield "| --- | --- | --- | --- | --- |"
    kept = options.images * (3 * 64 * 64 * 4 + 3 * 256 * 256)
    for count in options.processes:
        seconds = options.images * steps * known["seconds"] / count
        yield (
            f"| {count} × this machine's {known['threads']:.0f} cores | {told(seconds)} | "
            f"{known['resident'] / 1e9:.2f} GB | {size.packed(4) / 1e6:.0f} MB each | {kept / 1e9:.1f} GB |"
        )
    for name, (int8, _, _) in DEVICES.items():
        seconds = options.images * steps * size.operations / (int8 * known["share"])
        yield f"| 1 × {name}, at this machine's share of the peak | {told(seconds)} | | | |"


def transformer_table(known: dict[str, float], options: argparse.Namespace) -> Iterator[str]:
    size = flux()
    yield (
        f"**A transformer of {size.parameters / 1e9:.1f} billion parameters** (Flux, 1024×1024): "
        f"{size.operations / 1e12:.0f} tera-operations a step and image; weights {4 * size.parameters / 1e9:.0f} GB in "
        f"fp32, {2 * size.parameters / 1e9:.0f} in bf16, {size.packed(4) / 1e9:.1f} in packed 4 bits; adapters of rank "
        f"{RANK}: {size.adapters / 1e6:.0f} million."
    )
    yield ""
    yield "| | a step of an image, int8 | an update of an image, bf16 | distilling holds, without activations |"
    yield "| --- | --- | --- | --- |"
    here, share = size.operations / known["rate"], known["trained_share"]
    held = f"{size.distilling / 1e9:.0f} GB"
    alone = PASSES * size.operations / known["trained"]
    cores = f"{known['threads']:.0f} cores (an update: one, in fp32)"
    yield f"| this machine, {cores} | {told(here)} | {told(alone)} | {held} |"
    for name, (int8, bf16, memory) in DEVICES.items():
        fits = "fits" if size.distilling < memory else "does not fit"
        step, update = size.operations / (int8 * known["share"]), PASSES * size.operations / (bf16 * share)
        yield f"| {name}, at this machine's shares | {told(step)} | {told(update)} | {held}: {fits} |"
    yield ""
    yield (
        "| processes | a process sends an update | at 10 GB/s | with FSDP it holds, without activations "
        "| and gets an update, besides | at 10 GB/s |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for count in options.processes:
        sent = 2 * (count - 1) / count * 4 * size.adapters  # fp32, around a ring
        row = f"| {count} | {sent / 1e9:.2f} GB | {told(sent / 10e9)} |"
        if count > 1:
            got = GATHERS * 4 * size.parameters * (count - 1) / count
            row += f" {size.divided(count) / 1e9:.1f} GB | {got / 1e9:.0f} GB | {told(got / 10e9)} |"
        yield row if count > 1 else f"{row} | | |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guided", action="store_true", help="two predictions a step")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args(arguments)
    known = measured()
    print("\n".join(images_table(known, options)), "\n")
    print("\n".join(transformer_table(known, options)), "\n")
    print(
        f"Measured on {machine()['cpu']}: an integer step runs {known['rate'] / 1e9:,.0f} giga-operations a second, "
        f"{known['share']:.0%} of the best of its int8 products; an update {known['trained'] / 1e9:.0f} on one thread, "
        f"{known['trained_share']:.0%} of that thread's best in fp32."
    )


if __name__ == "__main__":
    main()
