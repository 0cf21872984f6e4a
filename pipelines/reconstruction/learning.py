"""Block reconstruction: each block's rounding, then its activation scales, are learned against the teacher's block.

Sources: AdaRound (Nagel et al., 2020) and BRECQ (Li et al., 2021), as the public code of Q-Diffusion has them. A weight
is ⌊W/s⌋ + h(V) with h = clamp(sigmoid(V)·1.2 − 0.1, 0, 1), which starts at W/s itself. Minimised is the squared error
of the block's output (summed over channels, meant over the rest) plus λ·Σ(1 − |2h − 1|^β), which drives h to 0 or 1.
Meanwhile inputs are not rounded; they come from the student so far, the targets from the teacher. Then
the activation scales learn (LSQ) on the error to the power of 2.4, inputs and targets being the teacher's.

Calibration is a set of calls of the teacher's denoiser on its own trajectories, each at one timestep; an iteration
takes several of them, so that it mixes timesteps. Different from the public code: learned rounding or scales that leave
a block worse than it was are dropped, and first and last layer, time embedding and conditions (8 bits) stay rounded to
the nearest, except in a temporal block or inside another.

Every draw is a function of (seed, block, iteration), and each block's result is a file of its own: a run killed
anywhere repeats one block at most, and ends with the bits of one that was not.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.diffusion import generator
from pipelines.errors import NumericalFault
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course, Recipe, Reconstruction
from pipelines.quant.affine import NORM
from pipelines.quant.hadamard import rotate_last
from pipelines.quant.layers import QuantLayer, as_rows, quant_layers
from pipelines.quant.tables import TimestepTables
from pipelines.reconstruction.blocks import TEMPORAL, Block, ModuleBlock, TemporalBlock, find_blocks
from pipelines.reconstruction.calibration import MIXED, Call
from pipelines.states import read_state, write_state

STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches 0 and 1 (AdaRound's γ and ζ)
ROUNDING, SCALES = "rounding", "scales"


@dataclass(frozen=True)
class Reconstructed:
    """What came of it."""

    codes: dict[str, torch.Tensor]  # <site>/weight_codes, where rounding was learned, for `student.safetensors`
    rows: list[dict[str, Any]]  # of reconstruction.csv, two a block
    parameters: int  # learned


class Rounding(nn.Module):
    """A layer's weights as ⌊W/s⌋ + h(V), in its quantiser's coordinates; V (out, …·in) fp32 learns, s and z do not."""

    def __init__(self, layer: QuantLayer):
        super().__init__()
        rows = layer.surroundings.to_quantiser(as_rows(layer.weight.detach()))
        if layer.plan.inverse == "double":
            rows = rotate_last(rows, layer.plan.transform)
        relative = rows / layer.weight_scale.detach()[:, None]
        low, high = layer.surroundings.bounds(slice(None))
        zero = layer.weight_zero[:, None]
        self.low, self.high = low - zero, high - zero
        self.floor = relative.floor()
        below, above = STRETCH
        share = (relative - self.floor - below) / (above - below)
        self.value = nn.Parameter(share.logit())

    def share(self) -> torch.Tensor:
        """h(V), 0 … 1."""
        below, above = STRETCH
        return (self.value.sigmoid() * (above - below) + below).clamp(0, 1)

    def soft(self) -> torch.Tensor:
        """Codes − zero-points, (out, …·in), differentiable."""
        return torch.minimum(torch.maximum(self.floor + self.share(), self.low), self.high)

    @torch.no_grad()
    def hard(self) -> torch.Tensor:
        """The same with every h at 0 or 1, whichever is nearer."""
        return torch.minimum(torch.maximum(self.floor + (self.value >= 0), self.low), self.high)

    def stored(self, hard: torch.Tensor) -> torch.Tensor:
        """`hard` as `QuantLayer.set_codes` takes it: uint8, from each row's smallest code."""
        return (hard - self.low).round().to(torch.uint8)

    def undecided(self, beta: float) -> torch.Tensor:
        """Σ(1 − |2h − 1|^β), a scalar."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()


def distance(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], power: float = 2.0) -> torch.Tensor:
    """Σ over channels and mean over the rest of |output − target|^power, added up over a block's outputs: a scalar."""
    total = torch.zeros(())
    for output, target in zip(outputs, targets, strict=True):
        difference = output - target
        error = difference.square() if power == 2 else difference.abs().clamp(min=1e-12).pow(power)
        total = total + error.sum(1 if output.ndim == 4 else -1).mean()
    return total


@contextmanager
def _learning(layers: Mapping[str, QuantLayer], float_inputs: bool) -> Iterator[dict[str, Callable | None]]:
    """Layers that compute through torch's own gradients, with the codes they have; the mapping replaces them."""
    fixed = {name: as_rows(layer.integers().centred).float() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.soft_codes, layer.float_inputs = (lambda name=name: fixed[name]), float_inputs
    try:
        yield fixed
    finally:
        for layer in layers.values():
            layer.soft_codes, layer.float_inputs = None, False


def reconstruct(
    teacher: Denoiser,
    student: Denoiser,
    recipe: Recipe,
    course: Course,
    calls: Sequence[Call],
    folder: Path,
    report: Report,
) -> Reconstructed:
    """Reconstruct the student's blocks in place, in depth order: all blocks' rounding, then all blocks' scales.

    Goes on behind the last block of which `folder` has the result. Raises NumericalFault at the first loss or scale
    that is not a number. The student is left frozen.
    """  # fmt: skip
    settings = recipe.reconstruction
    layers = quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    student.requires_grad_(False)
    for layer in layers.values():
        layer.freeze()
    depth = sorted(layers.values(), key=lambda layer: layer.index)  # the plan has the sites in forward order
    blocks = find_blocks(student.network, [layer.plan.site for layer in depth], settings.temporal_block)
    lengths = {
        ROUNDING: math.ceil(course.updates * settings.rounding_share),
        SCALES: math.ceil(course.updates * settings.scale_share),
    }
    units = [(kind, block) for kind, length in lengths.items() if length for block in blocks]
    total, done = sum(lengths[kind] for kind, _ in units), 0
    codes: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []

    def settle(result: Mapping[str, Any]) -> None:
        rows.append(result["row"])
        for name, value in result["codes"].items():
            codes[f"{name}/weight_codes"] = value
            layers[name].set_codes(value, layers[name].weight_scale.detach())
            layers[name].freeze()
        with torch.no_grad():
            for parameter, values in zip(tables.scale, result["scales"], strict=False):
                parameter[result["columns"]] = values

    for index in range(len(units)):
        kept = read_state(folder / f"{index:04d}.pt", report)
        if kept is None:
            break
        settle(kept)
    start = len(rows)
    if start:
        report.note(f"goes on after block {start} of {len(units)}")
    report.begin("reconstruct", total, sum(lengths[kind] for kind, _ in units[:start]), unit="iterations")
    done = sum(lengths[kind] for kind, _ in units[:start])
    for index, (kind, block) in enumerate(units[start:], start):
        mine = {name: layer for name, layer in layers.items() if _within(name, block)}
        if block.name == TEMPORAL:
            source = TemporalBlock(block, teacher, student, course)
        else:
            source = ModuleBlock(block, teacher, student, calls, course.guidance, folder / "inputs")

        def draw(iteration: int, count: int, index=index) -> list[int]:
            order = torch.randperm(count, generator=generator(course.seed, iteration, f"block {index}"))
            return order[:MIXED].tolist()

        def advanced(loss: torch.Tensor, block=block) -> None:
            nonlocal done
            done += 1
            value = loss.item()
            if not math.isfinite(value):
                raise NumericalFault(
                    f"the loss of block {block.name} is {value}",
                    "plan a lower --set recipe.reconstruction.rounding_rate=…; finished blocks are kept in the draft",
                )
            report.advance(done, loss=value)

        # A residual block holds its time projection, and does not teach it where the temporal block has done that.
        learned = {name: layers[name] for name in block.sites}
        if kind == ROUNDING:
            result = _learn_rounding(source, mine, learned, tables, settings, lengths[kind], draw, advanced, layers)
        else:
            rate = recipe.activation_scale_rate
            result = _learn_scales(source, mine, learned, tables, rate, lengths[kind], draw, advanced)
        result["row"] = {"block": block.name, "what": kind, "sites": len(block.sites)} | result["row"]
        write_state(folder / f"{index:04d}.pt", result)
        settle(result)
    shutil.rmtree(folder / "inputs", ignore_errors=True)
    report.end()
    return Reconstructed(codes, rows, sum(value.numel() for value in codes.values()) + _scales_learned(rows, tables))


def _within(name: str, block: Block) -> bool:
    return name in block.sites or name == block.name or name.startswith(f"{block.name}.")


def _scales_learned(rows: Sequence[Mapping[str, Any]], tables: TimestepTables) -> int:
    return sum(row["sites"] for row in rows if row["what"] == SCALES) * len(tables.scale)


def _mean_error(source, items: Sequence, tables: TimestepTables, power: float = 2.0) -> float:
    """The block's error over all of its calls."""
    total = 0.0
    with torch.no_grad():
        for timestep, given, targets in items:
            tables.set_timestep(timestep)
            total += distance(source.outputs(given), targets, power).item()
    return total / len(items)


def _mixed_loss(source, items: Sequence, chosen: Sequence[int], tables: TimestepTables, power: float) -> torch.Tensor:
    loss = torch.zeros(())
    for place in chosen:
        timestep, given, targets = items[place]
        tables.set_timestep(timestep)
        loss = loss + distance(source.outputs(given), targets, power)
    return loss / len(chosen)


def _learn_rounding(
    source, mine: Mapping[str, QuantLayer], learned: Mapping[str, QuantLayer], tables: TimestepTables,
    settings: Reconstruction, length: int, draw: Callable, advanced: Callable, every: Mapping[str, QuantLayer],
) -> dict[str, Any]:  # fmt: skip
    """Codes of the layers that learn; none where rounding to the nearest is better."""
    for layer in every.values():
        layer.float_inputs = True
    items = source.items(own_inputs=True)
    for layer in every.values():
        layer.float_inputs = False
    roundings = {name: Rounding(layer) for name, layer in learned.items()}
    with _learning(mine, float_inputs=True) as codes:
        before = _mean_error(source, items, tables)
        optimiser = torch.optim.Adam([rounding.value for rounding in roundings.values()], settings.rounding_rate)
        for iteration in range(length):
            codes |= {name: rounding.soft() for name, rounding in roundings.items()}
            loss = _mixed_loss(source, items, draw(iteration, len(items)), tables, 2.0)
            advanced(loss.detach())
            progress = (iteration / length - settings.warm_up) / max(1e-9, 1 - settings.warm_up)
            if progress >= 0:
                beta = settings.beta_last + (settings.beta_first - settings.beta_last) * (1 - progress)
                undecided = sum(rounding.undecided(beta) for rounding in roundings.values())
                loss = loss + settings.rounding_weight * undecided
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        hard = {name: rounding.hard() for name, rounding in roundings.items()}
        codes |= hard
        after = _mean_error(source, items, tables)
    kept = after < before
    stored = {name: rounding.stored(hard[name]) for name, rounding in roundings.items()} if kept else {}
    return {"codes": stored, "columns": [], "scales": [], "row": _row(before, after, kept)}


def _learn_scales(
    source, mine: Mapping[str, QuantLayer], learned: Mapping[str, QuantLayer], tables: TimestepTables, rate: float,
    length: int, draw: Callable, advanced: Callable,
) -> dict[str, Any]:  # fmt: skip
    """Activation scales of the layers that learn, by LSQ; as they were where that is better."""
    items = source.items(own_inputs=False)
    parameters = list(tables.scale)
    columns = [layer.index for layer in learned.values()]
    learns = torch.zeros_like(parameters[0]).index_fill(0, torch.tensor(columns), 1.0)
    first = [parameter.detach().clone() for parameter in parameters]
    with _learning(mine, float_inputs=False):
        before = _mean_error(source, items, tables)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser = torch.optim.Adam(parameters, rate)
        for iteration in range(length):
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * iteration / length))
            loss = _mixed_loss(source, items, draw(iteration, len(items)), tables, NORM)
            advanced(loss.detach())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad *= learns
            optimiser.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        _check_scales(learned, tables)
        after = _mean_error(source, items, tables)
    kept = after < before
    scales = [(now if kept else was)[columns].clone() for now, was in zip(parameters, first, strict=True)]
    for parameter, was in zip(parameters, first, strict=True):
        parameter.copy_(was)
    return {"codes": {}, "columns": columns, "scales": scales, "row": _row(before, after, kept)}


def _check_scales(layers: Mapping[str, QuantLayer], tables: TimestepTables) -> None:
    names = {layer.index: name for name, layer in layers.items()}
    bad = [(timestep, site) for timestep, site in tables.below_zero() if site in names]
    for row, timestep in enumerate(tables.timesteps):
        scale = tables.scale_at(row)
        bad += [(timestep, site) for site in names if not bool(scale[site] > 0)]  # NaN is not above zero either
    if bad:
        timestep, site = bad[0]
        raise NumericalFault(
            f"the activation scale of site {names[site]} at timestep {timestep:g} is not a positive number",
            "plan a lower rate (--set recipe.activation_scale_rate=…); finished blocks are kept in the draft",
        )


def _row(before: float, after: float, kept: bool) -> dict[str, Any]:
    return {"error_before": before, "error_after": after, "kept": "learned" if kept else "as it was"}
