"""How fast things are here: contenders in turns, what the machine can do at best, and where a network's time goes.

Whatever is compared runs in turns in one process, so that a change in the machine's speed meets all of it; a ratio is
the median of the ratios within turns.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation

from pipelines.kernels.layers import IntegerLayer
from pipelines.kernels.operators import available
from pipelines.kernels.prologue import Prologue
from pipelines.quant.spec import Site

WARM_UP = 2  # turns that are not counted: oneDNN makes its kernels in the first
SIDE = 2048  # of the matrices by which the machine's best is measured: 17 GFLOP, far beyond the caches
DEVICE_SIDE = 8192  # the same on a GPU: 1100 GFLOP
TRIES = 5
EMULATED = 10  # times as slow as in fp32: products of a type that a processor has no instructions for
CPU = torch.device("cpu")

# What a layer is, in the order in which shares are told.
KINDS = ("convolutions", "linears", "quantisers", "attention", "norms", "activations", "the rest")


def in_turns(
    runs: Mapping[str, Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter,
    after: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every run in every turn; each turn starts with another of them. `after` is told each turn."""
    names, taken = list(runs), {name: [] for name in runs}
    for turn in range(WARM_UP + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = clock()
            runs[name]()
            if turn >= WARM_UP:
                taken[name].append(clock() - begun)
        if after is not None:
            after(turn + 1)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within turns."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the median, and the tenth and ninetieth percentile (the extremes of fewer than ten)."""
    values = sorted(value * 1e3 for value in seconds)
    if len(values) < 10:
        return {"median": statistics.median(values), "p10": values[0], "p90": values[-1]}
    tenths = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds on a clock that is read when a CUDA device has done all that it was given."""

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read if device.type == "cuda" else time.perf_counter


def _best(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least of some times, in seconds."""
    run()
    found = []
    for _ in range(TRIES):
        begun = clock()
        run()
        found.append(clock() - begun)
    return min(found)


@cache
@torch.inference_mode()
def multiplies_bfloat16(device: torch.device = CPU) -> bool:
    """Whether bfloat16 is worth measuring: a processor without instructions for it takes a hundred times as long as in
    fp32, hours for a large network. By small products, which take a moment there too; found out once.
    """
    x = torch.randn(512, 512, device=device)
    narrow, clock = x.bfloat16(), clock_of(device)
    return _best(lambda: narrow @ narrow, clock) < EMULATED * _best(lambda: x @ x, clock)


@torch.inference_mode()
def peaks(device: torch.device = CPU) -> dict[str, float]:
    """What this machine or a device of it does at best, by the operators that networks are made of: fp32 and bf16
    products in GFLOP/s (0 in bf16 where the processor has no instructions), products of 4-bit codes in 8-bit
    instructions in GOP/s (0 where there are no operators), and a copy in GB/s, read and written.
    """
    side, clock = DEVICE_SIDE if device.type == "cuda" else SIDE, clock_of(device)
    operations = 2 * side**3 / 1e9
    x, y = (torch.randn(side, side, device=device) for _ in range(2))
    result = {"fp32_gflops": operations / _best(lambda: x @ y, clock)}
    narrow = x.bfloat16(), y.bfloat16()
    result |= {"bf16_gflops": 0.0, "int8_gops": 0.0}
    if multiplies_bfloat16(device):
        result["bf16_gflops"] = operations / _best(lambda: narrow[0] @ narrow[1], clock)
    if device.type == "cuda":
        left, right = (torch.randint(-7, 8, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        result["int8_gops"] = operations / _best(lambda: torch._int_mm(left, right.T), clock)
    elif found := available():
        codes = torch.randint(0, 16, (SIDE, SIDE), dtype=torch.uint8)
        site, operators = Site("square", "linear", "", (SIDE, SIDE)), found[0]
        weight = torch.randint(-7, 8, site.weight, dtype=torch.int8)
        packed, ones = operators.pack(site, weight, tuple(codes.shape), 15), torch.ones(SIDE)
        result["int8_gops"] = operations / _best(lambda: operators.run(site, codes, 8, packed, ones, None), clock)
    large = torch.randn(2**26, device=device)
    into = torch.empty_like(large)
    result["copy_gb_per_s"] = 2 * large.numel() * 4 / 1e9 / _best(lambda: into.copy_(large), clock)
    return result


def kind_of(module: nn.Module) -> str:
    """Which of KINDS a module's own time counts as, without that of the modules in it."""
    if isinstance(module, IntegerLayer):
        return "convolutions" if module.plan.site.kind == "conv" else "linears"
    if isinstance(module, Prologue):
        return "quantisers"
    if isinstance(module, nn.Conv2d):
        return "convolutions"
    if isinstance(module, nn.Linear):
        return "linears"
    name = type(module).__name__
    if "Norm" in name:
        return "norms"
    if type(module).__module__ == activation.__name__ or "activations" in type(module).__module__:
        return "activations"
    return "attention" if "Attention" in name and "Block" not in name else "the rest"


class Shares:
    """Where the time of a network's calls goes, by kind of layer, while it is entered.

    seconds: of each of KINDS. operations: of the integer layers' products, two for a multiplication and its addition.
    On a CUDA device every layer is waited for, which leaves launches and the time between them in its share.
    """

    def __init__(self, network: nn.Module, device: torch.device = CPU):
        self.network, self.device = network, device
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.operations = {"convolutions": 0, "linears": 0}
        self._open: list[list[float]] = []  # when each module that runs was called, and the seconds of those in it

    def __enter__(self) -> "Shares":
        self._clock = clock_of(self.device)
        self._handles = []
        for module in self.network.modules():
            self._handles.append(module.register_forward_pre_hook(self._begin))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *fault: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._open.append([self._clock(), 0.0])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        begun, within = self._open.pop()
        taken = self._clock() - begun
        if self._open:
            self._open[-1][1] += taken
        kind = kind_of(module)
        self.seconds[kind] += taken - within
        if isinstance(module, IntegerLayer):
            weight = module.plan.site.weight
            self.operations[kind] += 2 * output.numel() * torch.Size(weight[1:]).numel()
