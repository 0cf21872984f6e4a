"""The blocks that are reconstructed: which sites they hold, what goes into them and what should come out.

A block is a module of the network, or TFMQ-DM's temporal block (Huang et al., CVPR 2024), which is no module. What a
module's calls bring may be gigabytes, and is then kept in mapped files.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.diffusion import conditions_of
from pipelines.errors import HqdmError
from pipelines.methods.base import EIGHT_BIT_ROLES
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course
from pipelines.quant.spec import Site
from pipelines.quant.tables import TimestepTables
from pipelines.reconstruction.calibration import Call, module_name, predict

IN_MEMORY = 2**30  # bytes of a block's inputs and targets; more of them are mapped files
TEMPORAL = "temporal block"


@dataclass(frozen=True)
class Block:
    """A module whose output is compared, and the sites in it that learn. TEMPORAL is no module; see `TemporalBlock`."""

    name: str
    sites: tuple[str, ...]


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
        layer = module_name(site.name)  # the halves of a divided layer are one block
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


class ModuleBlock:
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


class TemporalBlock:
    """TFMQ-DM's block, TIB(t) = (g₁(h(t)), …, g_n(h(t))): the time embedding h and each residual block's projection g
    of it. Its calls are all timesteps of the student's tables, whatever the calibration has.

    Where nothing projects the embedding outside of other blocks, as in transformers, the embedding itself is compared.
    Labels' and sizes' embeddings, which are added to h(t), are the teacher's.
    """

    def __init__(self, block: Block, teacher: Denoiser, student: Denoiser, course: Course):
        self.teacher, self.student, self.course = teacher, student, course
        layers = {name: teacher.network.get_submodule(module_name(name)) for name in block.sites}
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
                predict(self.teacher, call, self.course.guidance)
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
        predict(denoiser, call, guidance)
    except _Reached:
        return seen["given"], seen["outputs"]
    finally:
        handle.remove()
    raise HqdmError(f"the model never called its block {name}", "leave the block's sites in floating point in the plan")


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output, be it one, several or a named tuple."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]
