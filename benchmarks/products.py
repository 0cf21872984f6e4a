"""How fast single layers are multiplied here, in fp32 and by every integer operator that is exact on this processor.

    python -m benchmarks.products                            # LDM-4 ImageNet's shapes, w4a4 and w8a8, batch 1
    python -m benchmarks.products --bits w4a4 --turns 31

Layers have Gaussian integer weights; those of 4 bits are folded with a Hadamard transform of order 32, as `hqdm` does.
Codes are given, so that quantising is not counted; forms that give channels twice or take two products are. Everything
that is compared runs in turns in one process; a figure is the median, a ratio the median of the ratios within turns.
"""

import argparse
import statistics

import torch
from torch import nn

from benchmarks.training import HADAMARD, SHAPES
from pipelines.errors import UsageError
from pipelines.kernels.cpu import Prepared
from pipelines.kernels.operators import available
from pipelines.memory import reuse_freed_memory
from pipelines.quant.integers import IntegerWeights, PackedWeights
from pipelines.quant.spec import IDENTITY, Bits, Site, SitePlan
from pipelines.speed import in_turns, ratio

SPREAD = 3  # standard deviations of the weights that their range holds


def weights_of(site: Site, bits: Bits) -> PackedWeights:
    """Random integers of a layer, with zero-points on the activation's side."""
    rotated = bits.weight < 8 and site.channels % HADAMARD.order == 0
    placed = (HADAMARD, "single") if rotated else (IDENTITY, "none")
    plan = SitePlan(site, True, *placed, bits.weight, bits.activation, "symmetric", "asymmetric")
    low, high = plan.weight_range
    generator = torch.Generator().manual_seed(0)
    centred = (torch.randn(site.weight, generator=generator) * high / SPREAD).round().clamp(low, high).short()
    outputs = site.outputs
    zero = torch.zeros(outputs, dtype=torch.int16)
    return IntegerWeights(plan, centred, zero, torch.full((outputs,), 0.01), torch.zeros(outputs)).packed()


def plain_of(site: Site) -> nn.Module:
    """The layer in fp32, channels-last."""
    if site.kind == "linear":
        return nn.Linear(site.channels, site.outputs)
    layer = nn.Conv2d(site.channels, site.outputs, site.weight[2:], site.stride, site.padding)
    return layer.to(memory_format=torch.channels_last)


@torch.inference_mode()
def row_of(site: Site, tokens: int, bits: Bits, turns: int) -> str:
    """A layer's line of the table."""
    conv = site.kind == "conv"
    shape = (1, site.channels, *site.positions) if conv else (max(1, tokens), site.channels)
    layout = torch.channels_last if conv else torch.contiguous_format
    weights, zero = weights_of(site, bits), 2 ** (bits.activation - 1)
    x = torch.randn(shape).contiguous(memory_format=layout)
    codes = torch.randint(-zero, zero, shape)
    plain = plain_of(site)
    runs = {"fp32": lambda: plain(x)}
    for each in available():
        prepared = Prepared(weights, each)
        operand = prepared.operand(zero)
        given = operand.of(codes, 1 if conv else -1).contiguous(memory_format=layout)
        runs[each.name] = lambda run=prepared, given=given, operand=operand: run(given, operand, 0.1, weights.scale)
    taken = in_turns(runs, turns)
    rounds = (shape[2] // site.stride[0]) * (shape[3] // site.stride[1]) if conv else shape[0]
    operations = 2e-9 * weights.folded().numel() * rounds
    cells = [f"{statistics.median(taken['fp32']) * 1e3:.2f}"]
    for each in available():
        seconds = statistics.median(taken[each.name])
        times = ratio(taken["fp32"], taken[each.name])["median"]
        cells.append(f"{seconds * 1e3:.2f} | {times:.2f} | {operations / seconds:.0f}")
    return f"| {site.name} | {bits} | " + " | ".join(cells) + " |"


def widths(text: str) -> list[Bits]:
    """What --bits names."""
    try:
        return [Bits.parse(word) for word in text.split(",")]
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.hint}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=widths, default="w4a4,w8a8", help="with commas")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    reuse_freed_memory()
    print(f"{torch.get_num_threads()} threads\n")
    names = "".join(f" {each.name}, ms | times fp32 | GOP/s |" for each in available())
    print(f"| layer | bits | fp32, ms |{names}\n|---|---|--:|" + "--:|" * 3 * len(available()))
    for bits in options.bits:
        for site, tokens in SHAPES:
            print(row_of(site, tokens, bits, options.turns), flush=True)


if __name__ == "__main__":
    main()
