"""Frozen weights divided among the processes of a job: FSDP as Accelerate is configured for it.

Distillation's teacher and student share their frozen weights. Here a network is cut into units, blocks of it; each
process keeps its part of a unit's bytes, and all parts are gathered where the unit runs: the teacher forward, the
student forward and backward. Gathering changes no bit of a weight, so the results are those of whole weights. What is
trained (adapters, scales, biases, or weights) stays whole at each process, and its gradients are summed as without.

torch's fully_shard (FSDP 2) divides, gathers and frees; Accelerate's plugin reads the configuration. What they leave to
be done here: a unit's tensors lie in one row of bytes, since FSDP wants contiguous parameters with one owner, and these
are channels-last, of two types, and each in two networks; and hooks gather and free without a node in the graph of
gradients, where FSDP's own would change the order in which gradients are added up.

Where a unit is not gathered its tensors are `Absent`: they have a shape, and computing with them is an error.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves

from pipelines import processes
from pipelines.errors import UsageError
from pipelines.memory import give_back, let_go
from pipelines.models.denoiser import Denoiser
from pipelines.quant.absent import Absent
from pipelines.quant.layers import QuantLayer

ALIGNED = 64  # bytes at which a tensor begins, as torch's own do: kernels choose their way by it
LARGEST, LEAST = 16, 512  # a unit has at most 1/16 of a network's weights, and what has less than 1/512 none of its own


@dataclass(frozen=True)
class Settings:
    """What Accelerate's configuration says of FSDP."""

    frees_after_forward: bool  # or keeps the student's units until their backward pass: more memory, less traffic
    policy: Callable[[nn.Module], Callable[[nn.Module], bool] | None] | None  # units; None: `_blocks` decides


def settings() -> Settings:
    """Accelerate's FSDP settings, as its own plugin reads them. UsageError for those that are none."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    processes.check_settings()
    try:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    except (ValueError, KeyError) as error:
        raise UsageError(f"Accelerate's FSDP configuration: {error}", "see accelerate config") from error

    def policy(network: nn.Module) -> Callable[[nn.Module], bool] | None:
        try:
            return fsdp2_prepare_auto_wrap_policy(plugin, network)
        except ValueError as error:
            raise UsageError(
                f"FSDP_TRANSFORMER_CLS_TO_WRAP: {error}",
                "leave --fsdp_transformer_layer_cls_to_wrap and --fsdp_auto_wrap_policy out: hqdm finds blocks",
            ) from error

    return Settings(
        bool(plugin.reshard_after_forward),
        policy if os.environ.get("FSDP_AUTO_WRAP_POLICY") else None,
    )


def _blocks(network: nn.Module) -> set[nn.Module]:
    """Units of a network of any family: from the top down, the first modules with at most 1/LARGEST of its weights."""
    sizes = {module: sum(value.numel() for value in module.parameters()) for module in network.modules()}
    found: set[nn.Module] = set()

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if sizes[child] * LEAST < sizes[network]:
                continue
            runs = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if runs and (sizes[child] * LARGEST <= sizes[network] or not list(child.children())):
                found.add(child)
            else:
                walk(child)

    walk(network)
    return found


def units_of(network: nn.Module, chosen: Settings) -> list[str]:
    """The names of modules that are units, an outer one before what is inside it; the network itself, "", is first."""
    policy = None
    if chosen.policy is None:
        policy = _blocks(network).__contains__
    else:
        policy = chosen.policy(network) or (lambda module: False)
    containers = (nn.ModuleList, nn.ModuleDict)  # nobody calls them
    named = [name for name, m in network.named_modules() if name and not isinstance(m, containers) and policy(m)]
    return ["", *named]


class _Holder(nn.Module):
    """What fully_shard divides: a unit's bytes, uint8."""

    def __init__(self, content: torch.Tensor):
        super().__init__()
        self.content = nn.Parameter(content, requires_grad=False)


@dataclass(frozen=True)
class _Slot:
    """A place of a module where a tensor of a unit is: all of it, or channels of it where a layer was divided."""

    place: dict[str, Any]  # a module's parameters or buffers
    name: str
    piece: int
    first: int = 0
    channels: int | None = None

    def part(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        piece = pieces[self.piece]
        return piece if self.channels is None else piece.narrow(1, self.first, self.channels)


@dataclass
class _Unit:
    """Tensors that are gathered and freed together; `name` is the module's in both networks."""

    name: str
    inside: tuple[str, ...]  # names of the units that this one is inside of
    sources: list[torch.Tensor] = field(default_factory=list)
    slots: list[_Slot] = field(default_factory=list)
    gathered: bool = False
    calls: int = 0  # that are going on
    number: int = 0  # of its last call among all units'

    def divide(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Take over what `sources` hold, which is not needed afterwards."""
        self._layout: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]] = []
        end = 0
        for source in self.sources:
            dense = torch.channels_last if source.ndim == 4 else torch.contiguous_format
            like = torch.empty_like(source, device="meta", memory_format=dense)
            self._layout.append((end, source.dtype, source.shape, like.stride()))
            end += -(-source.nbytes // ALIGNED) * ALIGNED
        content = torch.zeros(end, dtype=torch.uint8, device=device)
        for piece, source in zip(self._pieces(content), self.sources, strict=True):
            piece.copy_(source)
            let_go(source.data_ptr(), source.nbytes)  # of a mapped file
        self.bytes = sum(source.nbytes for source in self.sources)
        self.sources.clear()
        absent = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") for _, dtype, shape, stride in self._layout
        ]
        self._absent = [slot.part(absent).as_subclass(Absent) for slot in self.slots]
        self._holder = _Holder(content)
        del content
        fully_shard(self._holder, mesh=mesh, reshard_after_forward=False)
        self._known: torch.Tensor | None = None
        self.free()

    def _pieces(self, content: torch.Tensor) -> list[torch.Tensor]:
        pieces = []
        for start, dtype, shape, stride in self._layout:
            raw = content[start : start + shape.numel() * dtype.itemsize].view(dtype)
            pieces.append(raw.as_strided(shape, stride, raw.storage_offset()))
        return pieces

    @property
    def held(self) -> int:
        """Bytes that this process keeps of it while it is not gathered."""
        return self._holder.content.to_local().untyped_storage().nbytes()

    @torch.inference_mode(False)  # what is made while sampling is written to at other times too
    @torch.no_grad()
    def gather(self) -> bool:
        """Whether it was not there yet."""
        if self.gathered:
            return False
        with processes.peers():
            self._holder.unshard()
        if self._holder.content is not self._known:  # FSDP keeps one tensor, whose memory comes and goes
            self._known = self._holder.content
            pieces = self._pieces(self._known)
            self._whole = [slot.part(pieces) for slot in self.slots]
        self._show(self._whole)
        self.gathered = True
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def free(self) -> None:
        self._show(self._absent)
        self._holder.reshard()
        self.gathered = False

    def _show(self, values: list[torch.Tensor]) -> None:
        for slot, value in zip(self.slots, values, strict=True):
            slot.place[slot.name] = value


class ShardedWeights:
    """The frozen weights of a teacher and its student, this process's part of them, gathered by hooks in both networks.

    before: called with the name and layer of every quantised layer as long as its weight is there, for what is derived
    from it. gathered_bytes: how many bytes of other processes' parts have come since it was last set to 0.
    """

    def __init__(
        self, teacher: Denoiser, student: Denoiser | None, chosen: Settings, device: torch.device,
        before: Callable[[str, QuantLayer], None] = lambda name, layer: None,
    ):  # fmt: skip
        self.crew, self.chosen = processes.here(), chosen
        self.gathered_bytes = 0
        self._runs = 0
        self._in_backward = False
        mesh = self.crew.mesh(device)
        names = units_of(teacher.network, chosen)
        self.units = {
            name: _Unit(name, tuple(outer for outer in names if outer != name and _is_inside(name, outer)))
            for name in names
        }
        owners = self._owners(teacher.network)
        for name, unit in list(self.units.items()):
            self._take_in(unit, owners, teacher.network, student and student.network, before)
            if unit.sources:
                unit.divide(mesh, device)
                give_back(unit.bytes // 4)
            else:
                del self.units[name]
        for unit in self.units.values():
            self._watch(teacher.network, unit, learns=False)
            if student is not None:
                self._watch(student.network, unit, learns=True)

    @property
    def total(self) -> int:
        """Bytes of frozen weights, of all processes together."""
        return sum(unit.bytes for unit in self.units.values())

    @property
    def held(self) -> int:
        """Bytes that this process keeps of them between updates."""
        return sum(unit.held for unit in self.units.values())

    def told(self) -> str:
        """How weights are divided, for a person."""
        return (
            f"FSDP: {len(self.units)} units of frozen weights, {self.total / 1e6:,.1f} MB in all, of which each "
            f"process keeps {self.held / 1e6:,.1f}"
        )

    def figures(self) -> dict[str, int]:
        """For a manifest: bytes of frozen weights, bytes of them that this process keeps, bytes that came so far."""
        return {
            "frozen_bytes": self.total, "frozen_bytes_kept": self.held, "frozen_bytes_gathered": self.gathered_bytes,
            "units": len(self.units),
        }  # fmt: skip

    def _owners(self, network: nn.Module) -> dict[int, str]:
        """The unit that each tensor of the teacher belongs to, by its address: the innermost that it is used in, and
        the network itself for one that several use.
        """
        owners: dict[int, str] = {}
        for name, module in network.named_modules():
            mine = max((unit for unit in self.units if unit == name or _is_inside(name, unit)), key=len)
            for value in module._parameters.values():
                if value is not None and value.numel():
                    address = value.data_ptr()
                    owners[address] = mine if owners.get(address, mine) == mine else ""
        return owners

    def _take_in(
        self, unit: _Unit, owners: dict[int, str], teacher: nn.Module, student: nn.Module | None,
        before: Callable[[str, QuantLayer], None],
    ) -> None:  # fmt: skip
        """Find a unit's tensors and every place of both networks where one is."""
        known: dict[int, int] = {}
        for place, name, value in _places(teacher.get_submodule(unit.name)):
            if owners.get(value.data_ptr()) != unit.name:
                continue
            if value.data_ptr() not in known:
                known[value.data_ptr()] = len(unit.sources)
                unit.sources.append(value.detach())
            unit.slots.append(_Slot(place, name, known[value.data_ptr()]))
        if student is None:
            return
        starts = sorted(known)
        for name, module in student.get_submodule(unit.name).named_modules(prefix=unit.name):
            for place, key, value in _places(module, recurse=False):
                # A tensor's first address tells whose it is: a half of a divided layer begins inside the whole.
                start = starts[max(0, bisect_right(starts, value.data_ptr()) - 1)] if starts else 0
                source = unit.sources[known[start]] if starts else value
                offset = value.data_ptr() - start
                if not 0 <= offset < source.nbytes or not starts:
                    continue
                if value.shape == source.shape:
                    unit.slots.append(_Slot(place, key, known[start]))
                else:
                    first = offset // value.element_size() // source.stride(1)
                    unit.slots.append(_Slot(place, key, known[start], first, value.shape[1]))
                if isinstance(module, QuantLayer) and key == "weight":
                    before(name, module)
                    if module.base_codes is not None:
                        unit.slots.append(_Slot(module._buffers, "base_codes", len(unit.sources)))
                        unit.sources.append(module.base_codes)

    def _gather(self, unit: _Unit) -> None:
        if unit.gather():
            self.gathered_bytes += unit.bytes - unit.bytes // self.crew.count

    def _watch(self, network: nn.Module, unit: _Unit, learns: bool) -> None:
        """Gather a unit where its module is called, or a layer of it alone, as some networks do from outside."""

        def before(_module, _args, _kwargs):
            unit.calls += 1
            if unit.calls == 1:
                self._gather(unit)
                self._runs += 1
                unit.number = self._runs

        def after(_module, args, kwargs, output):
            unit.calls -= 1
            if unit.calls:
                return
            # An output that is an input as it came in was made elsewhere, and its gradient tells nothing of this unit.
            given = {id(value) for value in tree_leaves((args, kwargs))}
            made = [
                value
                for value in tree_leaves(output)
                if isinstance(value, torch.Tensor) and value.requires_grad and id(value) not in given
            ]
            for value in made:
                value.register_hook(lambda _grad: self._begin_backward(unit))
            if self.chosen.frees_after_forward or not (made and learns):
                unit.free()

        places = {id(slot.place) for slot in unit.slots}
        for name, module in network.get_submodule(unit.name).named_modules():
            if not name or id(module._parameters) in places or id(module._buffers) in places:
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(after, with_kwargs=True, always_call=True)

    def _begin_backward(self, unit: _Unit) -> None:
        """Gather what a backward pass comes to. Nodes of a graph run in the reverse order of their making, so that
        those of all units that ran after this one are done, but for those that it is inside of.
        """
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        for other in self.units.values():
            if other.gathered and other.number > unit.number and other.name not in unit.inside:
                other.free()
        self._gather(unit)

    def _end_backward(self) -> None:
        self._in_backward = False
        for unit in self.units.values():
            if unit.gathered:
                unit.free()


def _places(module: nn.Module, recurse: bool = True) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every place where a module holds a tensor, in the order of its modules."""
    for part in module.modules() if recurse else [module]:
        for place in (part._parameters, part._buffers):
            for name, value in list(place.items()):
                if value is not None and value.numel() and not value.is_meta:
                    yield place, name, value


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))
