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

from pipelines.diffusion import conditions_of, generator, noise_of, timesteps_of, trajectory, walker
from pipelines.errors import HqdmError, NumericalFault
from pipelines.events import Report
from pipelines.methods.base import EIGHT_BIT_ROLES
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course, Recipe, Reconstruction
from pipelines.quant.affine import NORM
from pipelines.quant.candidates import initial
from pipelines.quant.hadamard import rotate_activation, rotate_last
from pipelines.quant.layers import QuantLayer, as_rows, quant_layers
from pipelines.quant.spec import HALVES, Site, SitePlan
from pipelines.quant.surroundings import Surroundings
from pipelines.quant.tables import TimestepTables
from pipelines.states import read_state, write_state

STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches 0 and 1 (AdaRound's γ and ζ)
MIXED = 4  # calls of an iteration
VALUES = 4096  # that a call gives to the search for a site's activation scale
IN_MEMORY = 2**30  # bytes of a block's inputs and targets; more of them are mapped files
TEMPORAL = "temporal block"
ROUNDING, SCALES = "rounding", "scales"


@dataclass(frozen=True)
class Call:
    """Some images of the calibration at one timestep: x (N, C, H, W), conditions (N,) int64."""

    timestep: float
    x: torch.Tensor
    conditions: torch.Tensor


@dataclass(frozen=True)
class Block:
    """A module whose output is compared, and the sites in it that learn. TEMPORAL is no module; see `_Temporal`."""

    name: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Reconstructed:
    """What came of it."""

    codes: dict[str, torch.Tensor]  # <site>/weight_codes, where rounding was learned, for `student.safetensors`
    rows: list[dict[str, Any]]  # of reconstruction.csv, two a block
    parameters: int  # learned


# Calibration


@torch.no_grad()
def calibration(
    teacher: Denoiser, settings: Reconstruction, course: Course, folder: Path, report: Report
) -> list[Call]:
    """Calls at timesteps spread over the teacher's trajectories: evenly, or normally (PTQ4DM: one draw a call).

    As many as there are timesteps × images in the settings; an image is seen at several timesteps. Kept in `folder`.
    """
    if (kept := read_state(folder / "calibration.pt", report)) is not None:
        return [Call(*parts) for parts in kept]
    schedule, info = teacher.info.schedule, teacher.info
    scheduler = walker(schedule)
    timesteps = timesteps_of(scheduler, schedule, course.steps)
    count = min(settings.images, course.trajectories * course.batch)
    visited: list[list[torch.Tensor]] = [[] for _ in timesteps]  # by step
    every = list(range(count))
    conditions = conditions_of(course.seed, every, info.conditions)
    report.begin("calibration", count, unit="trajectories")
    for start in range(0, count, course.batch):
        mine = every[start : start + course.batch]
        steps = trajectory(
            teacher, scheduler, schedule, course.steps, noise_of(course.seed, mine, info.shape, "calibration"),
            conditions[mine], course.guidance, course.eta, course.seed, mine,
        )  # fmt: skip
        for step, _, x, _ in steps:
            if step < course.steps:
                visited[step].append(x)
        report.advance(start + len(mine))
    report.end()
    rows = max(1, course.batch // MIXED)
    parts = [every[start : start + rows] for start in range(0, count, rows)]
    number = min(settings.timesteps, course.steps)
    if settings.spread == "even":
        places = [index * course.steps // number for index in range(number) for _ in parts]
    else:
        places = [_normal_place(settings, course, index) for index in range(number * len(parts))]
    calls = []
    for index, place in enumerate(places):
        part = parts[index % len(parts)]
        calls.append(Call(timesteps[place], torch.cat(visited[place])[part], conditions[part]))
    write_state(folder / "calibration.pt", [(call.timestep, call.x, call.conditions) for call in calls])
    return calls


def _normal_place(settings: Reconstruction, course: Course, index: int) -> int:
    """A step of the trajectory, normally distributed around a mean that is counted from the image (PTQ4DM)."""
    draw = torch.randn((), generator=generator(course.seed, index, "calibration timestep")).item()
    from_image = round((settings.normal_mean + settings.normal_deviation * draw) * course.steps)
    return course.steps - 1 - min(max(from_image, 0), course.steps - 1)


@torch.no_grad()
def rescaled(
    teacher: Denoiser,
    plans: Sequence[SitePlan],
    scales: Mapping[str, torch.Tensor],
    groups: Sequence[int] | None,
    calls: Sequence[Call],
    course: Course,
    by: str,
    headroom: float,
) -> dict[str, torch.Tensor]:
    """A plan's tensors with activation scales and zero-points found on the calibration instead of on the profile.

    groups: of each of the tensors' timesteps, ascending; None: each its own. A group that no call is of keeps what it
    has. by, headroom: as `candidates.initial` takes them.
    """  # fmt: skip
    timesteps = scales["timesteps"].tolist()
    groups = list(range(len(timesteps))) if groups is None else groups
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    readers: dict[str, list[tuple[SitePlan, Surroundings]]] = {}
    for plan in plans:
        tensors = {
            name: scales[f"{plan.site.name}/{name}"]
            for name in ("gain", "centre")
            if f"{plan.site.name}/{name}" in scales
        }
        readers.setdefault(_module_name(plan.site.name), []).append((plan, Surroundings(plan, tensors)))
    number = group = 0

    def reads(plans: list[tuple[SitePlan, Surroundings]]):
        def hook(_module, args):
            for plan, surroundings in plans:
                values = _values(_part(args[0], plan.site), plan, surroundings)
                places = torch.randint(len(values), (VALUES,), generator=generator(course.seed, number, plan.site.name))
                kept = values if len(values) <= VALUES else values[places]
                seen.setdefault((plan.site.name, group), []).append(
                    torch.cat([kept, values.aminmax().min[None], values.max()[None]]) if by == "max" else kept
                )

        return hook

    handles = [
        teacher.network.get_submodule(name).register_forward_pre_hook(reads(mine)) for name, mine in readers.items()
    ]
    for number, call in enumerate(calls):  # noqa: B007 the hooks read it
        row = min(range(len(timesteps)), key=lambda row: abs(timesteps[row] - call.timestep))
        group = groups[row]
        _predict(teacher, call, course.guidance)
    for handle in handles:
        handle.remove()
    result = dict(scales)
    for plan in plans:
        name = plan.site.name
        scale, zero = (scales[f"{name}/activation_{what}"].clone() for what in ("scale", "zero"))
        for group in set(groups):
            if (name, group) not in seen:
                continue
            mine = torch.tensor([other == group for other in groups])
            found = initial(torch.cat(seen[name, group])[None], plan, by, headroom)
            scale[mine], zero[mine] = (value[0] for value in found)
        result |= {f"{name}/activation_scale": scale, f"{name}/activation_zero": zero}
    return result


def _module_name(site: str) -> str:
    """The teacher's layer of a site or of a half of one."""
    whole, _, last = site.rpartition(".")
    return whole if last in HALVES else site


def _part(x: torch.Tensor, site: Site) -> torch.Tensor:
    """The site's channels of its layer's input."""
    channel = 1 if site.kind == "conv" else -1
    start = x.shape[channel] - site.channels if site.name.endswith(f".{HALVES[1]}") else 0
    return x.narrow(channel, start, site.channels)


def _values(x: torch.Tensor, plan: SitePlan, surroundings: Surroundings) -> torch.Tensor:
    """What a site's activation quantiser sees, flat."""
    return rotate_activation(surroundings.before(x)[0], plan.transform, plan.site.kind == "conv").flatten()


# Blocks


def find_blocks(network: nn.Module, sites: Sequence[Site], temporal: bool) -> list[Block]:
    """The blocks in which sites learn, in the order in which a forward pass reaches them.

    A block is the outermost residual, transformer or attention block around a site, else the layer itself, a divided
    one whole. temporal: the time embedding and all projections of it are one block, the first.
    """
    holders = [name for name, module in network.named_modules() if _is_block(module)]
    found: dict[str, list[Site]] = {}
    for site in sites:
        if temporal and site.role.startswith("time"):
            found.setdefault(TEMPORAL, []).append(site)
            continue
        layer = _module_name(site.name)  # the halves of a divided layer are one block
        found.setdefault(next((name for name in holders if layer.startswith(f"{name}.")), layer), []).append(site)
    blocks = [
        Block(name, tuple(site.name for site in mine))
        for name, mine in found.items()
        if name == TEMPORAL or not all(site.role in EIGHT_BIT_ROLES for site in mine)
    ]
    return sorted(blocks, key=lambda block: block.name != TEMPORAL)


def _is_block(module: nn.Module) -> bool:
    """diffusers' residual blocks, transformer blocks, and attentions that stand alone."""
    residual = hasattr(module, "conv1") and hasattr(module, "conv_shortcut")
    return residual or any(hasattr(module, name) for name in ("attn", "attn1", "to_q"))


class _Items(Sequence):
    """What a block's calls bring, which at 64×64 is gigabytes: the first IN_MEMORY bytes of it in memory, the rest in
    files of `folder`, mapped while they are read.
    """

    def __init__(self, folder: Path):
        self.folder, self.kept, self.size = folder, [], 0
        shutil.rmtree(folder, ignore_errors=True)  # of the block before, or of a run that was killed

    def append(self, item: tuple[float, Any, list[torch.Tensor]]) -> None:
        self.size += _bytes(item)
        if self.size > IN_MEMORY:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{len(self.kept)}.pt"
            torch.save(item, path)
            item = path
        self.kept.append(item)

    def __getitem__(self, place: int) -> tuple[float, Any, list[torch.Tensor]]:
        item = self.kept[place]
        return torch.load(item, mmap=True, weights_only=True) if isinstance(item, Path) else item

    def __len__(self) -> int:
        return len(self.kept)


def _bytes(value: Any) -> int:
    """Of all tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return sum(_bytes(part) for part in parts)


class _Module:
    """A block that is a module: its calls are those of the calibration, and what goes in is seen in the network."""

    def __init__(
        self, block: Block, teacher: Denoiser, student: Denoiser, calls: Sequence[Call], guidance: float, folder: Path
    ):
        self.name, self.teacher, self.student = block.name, teacher, student
        self.calls, self.guidance, self.folder = calls, guidance, folder

    @torch.no_grad()
    def items(self, own_inputs: bool) -> _Items:
        """(timestep, inputs, the teacher's outputs) of every call. own_inputs: as the student so far gives them."""
        items = _Items(self.folder)
        for call in self.calls:
            given, targets = _stopped(self.teacher, self.name, call, self.guidance)
            if own_inputs:
                given, _ = _stopped(self.student, self.name, call, self.guidance, before=True)
            items.append((call.timestep, given, targets))
        return items

    def outputs(self, given: Any) -> list[torch.Tensor]:
        args, kwargs = given
        return _tensors(self.student.network.get_submodule(self.name)(*args, **kwargs))


class _Temporal:
    """TFMQ-DM's block, TIB(t) = (g₁(h(t)), …, g_n(h(t))): the time embedding h and each residual block's projection g
    of it. Its calls are all timesteps of the student's tables, whatever the calibration has.

    Where nothing projects the embedding outside of other blocks, as in transformers, the embedding itself is compared.
    Labels' and sizes' embeddings, which are added to h(t), are the teacher's.
    """

    def __init__(self, block: Block, teacher: Denoiser, student: Denoiser, course: Course):
        self.teacher, self.student, self.course = teacher, student, course
        layers = {name: teacher.network.get_submodule(_module_name(name)) for name in block.sites}
        self.embeddings = list(dict.fromkeys(n.rpartition(".")[0] for n in layers if not n.endswith("time_emb_proj")))
        self.projecting = [name.rpartition(".")[0] for name in layers if name.endswith("time_emb_proj")]

    @torch.no_grad()
    def items(self, own_inputs: bool) -> list[tuple[float, Any, list[torch.Tensor]]]:
        """(timestep, (inputs of the embeddings, what else is added to h), the teacher's outputs)."""
        tables: TimestepTables = self.student.network.timestep_tables
        info = self.teacher.info
        indices = list(range(min(self.course.batch, max(1, info.conditions))))
        conditions = conditions_of(self.course.seed, indices, info.conditions)
        items = []
        for timestep in tables.timesteps:
            inputs: dict[str, tuple] = {}
            seen: dict[str, torch.Tensor] = {}

            def hook(name, inputs=inputs, seen=seen):
                def embeds(_module, args, kwargs, output):
                    inputs[name], seen[name] = (args, kwargs), output

                def receives(_module, args, kwargs, _output):
                    seen[name] = kwargs["temb"] if "temb" in kwargs else args[1]

                return embeds if name in self.embeddings else receives

            network = self.teacher.network
            handles = [
                network.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
                for name in (*self.embeddings, *self.projecting)
            ]
            try:
                call = Call(timestep, torch.zeros(len(indices), *info.shape), conditions)
                _predict(self.teacher, call, self.course.guidance)
            finally:
                for handle in handles:
                    handle.remove()
            embedded = seen[self.embeddings[0]] if self.embeddings else 0
            added = {name: seen[name] - embedded for name in self.projecting}
            given = inputs, added
            items.append((timestep, given, self._run(network, given)))
        return items

    def outputs(self, given: Any) -> list[torch.Tensor]:
        return self._run(self.student.network, given)

    def _run(self, network: nn.Module, given: Any) -> list[torch.Tensor]:
        inputs, added = given
        embedded = {n: network.get_submodule(n)(*args, **kwargs) for n, (args, kwargs) in inputs.items()}
        outputs = []
        for name, other in added.items():
            residual = network.get_submodule(name)
            h = embedded[self.embeddings[0]] + other if self.embeddings else other
            outputs.append(residual.time_emb_proj(h if residual.skip_time_act else residual.nonlinearity(h)))
        return outputs or list(embedded.values())


class _Reached(Exception):
    """Leaves a forward pass at the block that was looked for."""


def _stopped(
    denoiser: Denoiser, name: str, call: Call, guidance: float, before: bool = False
) -> tuple[tuple[tuple, dict], list[torch.Tensor]]:
    """What goes into a module, and what comes out of it unless it is stopped `before` it."""
    seen: dict[str, Any] = {}

    def hook(_module, args, kwargs, output=None):
        seen["given"], seen["outputs"] = (args, kwargs), [] if before else _tensors(output)
        raise _Reached

    module = denoiser.network.get_submodule(name)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook, with_kwargs=True)
    try:
        _predict(denoiser, call, guidance)
    except _Reached:
        return seen["given"], seen["outputs"]
    finally:
        handle.remove()
    raise HqdmError(f"the model never called its block {name}", "leave the block's sites in floating point in the plan")


def _predict(denoiser: Denoiser, call: Call, guidance: float) -> torch.Tensor:
    return denoiser.predict(call.x, torch.tensor(call.timestep), call.conditions, guidance)


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output, be it one, several or a named tuple."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


# Learning


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
            source = _Temporal(block, teacher, student, course)
        else:
            source = _Module(block, teacher, student, calls, course.guidance, folder / "inputs")

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
                    "lower the recipe's rates in a plan edited by hand; finished blocks are kept in the draft",
                )
            report.advance(done, loss=value)

        if kind == ROUNDING:
            learned = {name: layers[name] for name in block.sites}
            result = _learn_rounding(source, mine, learned, tables, settings, lengths[kind], draw, advanced, layers)
        else:
            result = _learn_scales(source, mine, tables, recipe.activation_scale_rate, lengths[kind], draw, advanced)
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
    source, mine: Mapping[str, QuantLayer], tables: TimestepTables, rate: float, length: int, draw: Callable,
    advanced: Callable,
) -> dict[str, Any]:  # fmt: skip
    """Activation scales of a block's layers, by LSQ; as they were where that is better."""
    items = source.items(own_inputs=False)
    parameters = list(tables.scale)
    columns = [layer.index for layer in mine.values()]
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
            optimiser.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        _check_scales(mine, tables)
        after = _mean_error(source, items, tables)
    kept = after < before
    scales = [(now if kept else was)[columns].clone() for now, was in zip(parameters, first, strict=True)]
    for parameter, was in zip(parameters, first, strict=True):
        parameter.copy_(was)
    return {"codes": {}, "columns": columns, "scales": scales, "row": _row(before, after, kept)}


def _check_scales(layers: Mapping[str, QuantLayer], tables: TimestepTables) -> None:
    for name, layer in layers.items():
        for row, timestep in enumerate(tables.timesteps):
            if not bool(tables.scale_at(row)[layer.index] > 0):  # NaN is not above zero either
                raise NumericalFault(
                    f"the activation scale of site {name} at timestep {timestep:g} is not a positive number",
                    "lower activation_scale_rate in a plan edited by hand; finished blocks are kept in the draft",
                )


def _row(before: float, after: float, kept: bool) -> dict[str, Any]:
    return {"error_before": before, "error_after": after, "kept": "learned" if kept else "as it was"}
