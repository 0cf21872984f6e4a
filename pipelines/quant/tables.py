"""Timestep tables: a quantiser's parameters for every timestep of a named schedule, looked up by timestep.

A table knows its timesteps, so it can answer for others: a model distilled at 20 steps samples at 50 by interpolation,
linear in the logarithm of a scale and linear in a zero-point (then rounded), constant beyond the ends. Nothing
counts calls. A batch may mix timesteps: every image is then quantised with the row of its own.
"""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.errors import FileFault, HqdmError
from pipelines.quant.affine import round_through

SAME_TIMESTEP = 1e-2  # nearer timesteps are one: a pipeline may pass t/1000 in fp32 and multiply it again


@dataclass(frozen=True)
class ByTimestep:
    """What was measured of a student at `timesteps` (T,) fp64, ascending: tensors that make up a file of their own."""

    FILE: ClassVar[str]
    WHAT: ClassVar[str]

    timesteps: torch.Tensor

    def at(self, values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Rows of values (T, …) at timesteps `wanted`, (N,) or a number: (N, …) or (1, …).

        Linear between two timesteps; beyond the ends the end's row holds.
        """
        at = wanted.double().reshape(-1)
        above = torch.searchsorted(self.timesteps, at).clamp(max=len(self.timesteps) - 1)
        below = (above - 1).clamp(min=0)
        span = (self.timesteps[above] - self.timesteps[below]).clamp(min=1e-9)
        share = ((at - self.timesteps[below]) / span).clamp(0, 1).float()
        return torch.lerp(values[below], values[above], share.view(-1, *[1] * (values.ndim - 1)))

    def save(self, folder: Path) -> None:
        """Write FILE into a folder."""
        known = {name: value.contiguous() for name, value in vars(self).items() if value is not None}
        save_file(known, Path(folder) / self.FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The inverse of `save`. FileFault where the file is missing, damaged or holds something else."""
        path = Path(folder) / cls.FILE
        try:
            found = load_file(path)
            timesteps = found.get("timesteps", torch.zeros(0))
            if timesteps.shape != (timesteps.numel(),) or timesteps.dtype != torch.float64 or not len(timesteps):
                raise ValueError("no timesteps")
            for name, value in found.items():
                if value.ndim and len(value) != len(timesteps) or not value.isfinite().all():
                    raise ValueError(f"{name} is of shape {tuple(value.shape)}, or holds NaN or Inf")
            return cls(**found)
        except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise FileFault(f"{path}: no {cls.WHAT}: {error}", "make the artifact again with --force") from error


@lru_cache(maxsize=64)
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def timestep_argument(network: nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor | float:
    """The `timestep` of a call network(*args, **kwargs), wherever the network's own signature has it."""
    found = kwargs.get("timestep")
    if found is None:
        found = _signature(type(network)).bind_partial(network, *args, **kwargs).arguments.get("timestep")
    if found is None:
        raise HqdmError(
            f"a {type(network).__name__} was called without a timestep, by which its quantisers are looked up",
            "pass its argument `timestep`",
        )
    return found


@dataclass(frozen=True)
class Rows:
    """Rows of the tables in a device's memory, where kernels read them, and there too which of them is in force.

    scale, zero: (T, n) fp32, contiguous. factor: (T, m) fp32 or None. row: (1,) int32. fault: (n,) int32, of which a
    site's entry becomes 1 where its input holds NaN.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    factor: torch.Tensor | None
    row: torch.Tensor
    fault: torch.Tensor

    def factors_of(self, span: slice) -> torch.Tensor | None:
        """Factors (outputs,) of the row in force on the weight scales in `span`, or None where there are none."""
        return None if self.factor is None else self.factor[:, span].index_select(0, self.row)[0]


@dataclass
class _Row:
    """What the layers read at one timestep: scales and zero-points of all sites (n,), factors (m,) or None."""

    scale: torch.Tensor
    zero: torch.Tensor
    factor: torch.Tensor | None
    on_device: Rows | None = None  # the same there, made once

    @cached_property
    def numbers(self) -> tuple[list[float], list[int]]:
        """Scales and zero-points as numbers, read once for all sites."""
        return self.scale.tolist(), [int(value) for value in self.zero.tolist()]


class TimestepTables(nn.Module):
    """Activation scales and zero-points of n sites at T timesteps, and optionally factors on their weight scales.

    One parameter a timestep and kind, not one a table, so that an update at one timestep can leave the optimiser's
    state of the others alone; a recipe's `momentum` says whether it does.

    timesteps: those of the schedule, in any order; kept sorted. Not whole numbers where the schedule's are not.
    scale, zero: (T, n) fp32. factor: fp32 or None; of every output (T, m), where m is the sum of the sites' outputs, or
        with `outputs`, how many each site has, of every site (T, n); see `factors_of`.
    unit: (n,) fp32, what every scale is multiplied with when it is looked up; ones where it is None.
    groups: for each timestep as given, which group it is in; timesteps of a group share one parameter, whose value is
        that of the group's smallest timestep. None: every timestep has its own.
    relative: what is trained is log(scale / initial scale), so that one rate suits scales of every size.
    """

    def __init__(
        self,
        timesteps: list[float],
        scale: torch.Tensor,
        zero: torch.Tensor,
        factor: torch.Tensor | None = None,
        unit: torch.Tensor | None = None,
        groups: Sequence[int] | None = None,
        relative: bool = False,
        outputs: Sequence[int] | None = None,
    ):
        super().__init__()
        self._outputs = None if outputs is None else torch.tensor(outputs)
        self.register_buffer("unit", unit, persistent=False)
        order = sorted(range(len(timesteps)), key=lambda index: timesteps[index])
        self.timesteps = [float(timesteps[index]) for index in order]
        sorted_groups = list(range(len(order))) if groups is None else [groups[index] for index in order]
        first: dict[int, int] = {}
        for group, index in zip(sorted_groups, order, strict=True):
            first.setdefault(group, index)
        self._place = [list(first).index(group) for group in sorted_groups]  # of each timestep's parameter
        heads = list(first.values())
        self.relative = relative
        initial = torch.stack([scale[index] for index in heads]) if relative else None
        self.register_buffer("initial", initial, persistent=False)
        self.scale = nn.ParameterList(
            [nn.Parameter(torch.zeros_like(scale[index]) if relative else scale[index].clone()) for index in heads]
        )
        self.zero = nn.ParameterList([nn.Parameter(zero[index].clone()) for index in heads])
        self.factor = None
        if factor is not None:
            self.factor = nn.ParameterList([nn.Parameter(factor[index].clone()) for index in heads])
        self._now: _Row | None = None
        self._mixed: tuple[int, list[tuple[_Row, list[int]]]] | None = None
        self._fixed: Rows | None = None
        self._faults: dict[torch.device, torch.Tensor] = {}

    @property
    def site_factors(self) -> bool:
        """Whether there are factors, and one of each belongs to a site, not to one of its outputs."""
        return self.factor is not None and self._outputs is not None

    @torch.no_grad()
    def raw(self) -> dict[str, torch.Tensor]:
        """`timesteps` (T,) fp64, `scale` with the unit multiplied in, rounded `zero` (T, n), and `factor` where
        there is one.
        """
        every = range(len(self.timesteps))
        scale = torch.stack([self._in_units(self.scale_at(row)) for row in every])
        tensors = {"timesteps": torch.tensor(self.timesteps, dtype=torch.float64), "scale": scale}
        tensors["zero"] = torch.stack([self._zero_at(row).round() for row in every])
        if self.factor is not None:
            tensors["factor"] = torch.stack([self._factor_at(row).detach() for row in every])
        return tensors

    def scale_at(self, row: int) -> torch.Tensor:
        """The scales of the row-th timestep (n,), without the unit.

        One that updates took below zero counts by its magnitude. To a symmetric quantiser that is the same, and so it
        is what the public code of HQ-DM does, which goes on with whatever sign an update leaves. An asymmetric one
        keeps its zero-point here, and has its range mirrored there.
        """
        place = self._place[row]
        return self.scale[place].exp() * self.initial[place] if self.relative else self.scale[place].abs()

    def below_zero(self) -> list[tuple[float, int]]:
        """(timestep, site's index) of every scale that is below zero as it is learned; the first timestep of a group
        stands for it.
        """
        if self.relative:
            return []
        first = [self.timesteps[self._place.index(place)] for place in range(len(self.scale))]
        signs = [(scale < 0).nonzero().flatten().tolist() for scale in self.scale]
        return [(timestep, site) for timestep, sites in zip(first, signs, strict=True) for site in sites]

    def _zero_at(self, row: int) -> torch.Tensor:
        return self.zero[self._place[row]]

    def _factor_at(self, row: int) -> torch.Tensor:
        return self.factor[self._place[row]]

    def _of_outputs(self, factor: torch.Tensor) -> torch.Tensor:
        """The factors of a row for every output (m,)."""
        return factor if self._outputs is None else factor.repeat_interleave(self._outputs.to(factor.device))

    def _in_units(self, scale: torch.Tensor) -> torch.Tensor:
        return scale if self.unit is None else scale * self.unit

    def set_timestep(self, timestep: torch.Tensor | float) -> None:
        """Look up what the layers will read until the next call, at a number or at (N,), one for each image."""
        self._now = self._mixed = None
        if isinstance(timestep, torch.Tensor):
            given = timestep.flatten().tolist()
            if len(set(given)) > 1:
                images: dict[float, list[int]] = {}
                for image, value in enumerate(given):
                    images.setdefault(value, []).append(image)
                self._mixed = len(given), [(self._at(value), mine) for value, mine in images.items()]
                return
            timestep = given[0]
        self._now = self._at(float(timestep))

    def _at(self, timestep: float) -> _Row:
        scale = self._in_units(self._row(self.scale_at, timestep, log=True))
        zero = round_through(self._row(self._zero_at, timestep, log=False))
        if self.factor is None:
            return _Row(scale, zero, None)
        return _Row(scale, zero, self._of_outputs(self._row(self._factor_at, timestep, log=True)))

    def _nearest(self, timestep: float) -> int | None:
        """The row that is this timestep's own, or None."""
        above = bisect_left(self.timesteps, timestep)
        near = [row for row in (above - 1, above) if 0 <= row < len(self.timesteps)]
        row = min(near, key=lambda row: abs(self.timesteps[row] - timestep))
        return row if abs(self.timesteps[row] - timestep) <= SAME_TIMESTEP else None

    def _row(self, at: Callable[[int], torch.Tensor], timestep: float, log: bool) -> torch.Tensor:
        if (own := self._nearest(timestep)) is not None:
            return at(own)
        above = bisect_left(self.timesteps, timestep)
        if above in (0, len(self.timesteps)):
            return at(min(above, len(self.timesteps) - 1))
        low, high = self.timesteps[above - 1], self.timesteps[above]
        share = (timestep - low) / (high - low)
        if log:
            return torch.exp(torch.lerp(at(above - 1).log(), at(above).log(), share))
        return torch.lerp(at(above - 1), at(above), share)

    def covers(self, timesteps: list[float]) -> bool:
        """Whether every timestep has a row of its own, so that nothing is interpolated."""
        return all(self._nearest(timestep) is not None for timestep in timesteps)

    def each(self, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor], site: str) -> torch.Tensor:
        """compute(x), or where the batch mixes timesteps, compute of each timestep's images, put back in order.

        x: (k·N, …) for N timesteps: k rows, one after another, belong to each image. HqdmError for another length.
        """
        if self._mixed is None:
            return compute(x)
        count, groups = self._mixed
        if len(x) % count:
            raise HqdmError(
                f"site {site}: an input of shape {tuple(x.shape)} cannot be shared out to {count} images "
                "of different timesteps",
                "call the denoiser once for every timestep",
            )
        rows = torch.arange(len(x)).view(count, -1)
        parts, places = [], []
        try:
            for self._now, images in groups:
                places.append(rows[images].flatten())
                parts.append(compute(x[places[-1]]))
        finally:
            self._now = None
        result = torch.cat(parts)[torch.cat(places).argsort()]
        return result.contiguous(memory_format=torch.channels_last) if result.ndim == 4 else result

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero-point of site `index` at the current timestep, scalars that have gradients."""
        now = self._current()
        return now.scale[index], now.zero[index]

    def numbers_of(self, index: int) -> tuple[float, int]:
        """The same as plain numbers, for where nothing is learned."""
        scales, zeros = self._current().numbers
        return scales[index], zeros[index]

    @torch.inference_mode(False)  # what is made while sampling is written to at other times too
    @torch.no_grad()
    def rows(self, timesteps: Sequence[float], device: torch.device) -> Rows:
        """A row for each of some timesteps, in their order, in a device's memory; the first is in force."""
        return self._on_device([self._at(float(timestep)) for timestep in timesteps], device)

    def _on_device(self, found: list[_Row], device: torch.device) -> Rows:
        scale, zero = (torch.stack([getattr(row, name) for row in found]) for name in ("scale", "zero"))
        factor = None if self.factor is None else torch.stack([row.factor for row in found]).to(device)
        if device not in self._faults:
            self._faults[device] = torch.zeros(scale.shape[1], dtype=torch.int32, device=device)
        row = torch.zeros(1, dtype=torch.int32, device=device)
        return Rows(scale.to(device), zero.to(device), factor, row, self._faults[device])

    @contextmanager
    def reading(self, rows: Rows) -> Iterator[None]:
        """While it is entered layers read these rows, and a call of the network asks for no timestep's number: what a
        CUDA graph is recorded of.
        """
        before, self._fixed, self._mixed = self._fixed, rows, None
        try:
            yield
        finally:
            self._fixed = before

    @torch.inference_mode(False)
    @torch.no_grad()
    def on(self, device: torch.device) -> Rows:
        """What layers on a device read: the rows of `reading`, or one of the current timestep."""
        if self._fixed is not None:
            return self._fixed
        now = self._current()
        if now.on_device is None or now.on_device.row.device != device:
            now.on_device = self._on_device([now], device)
        return now.on_device

    def faults(self) -> list[int]:
        """The sites whose input has held NaN on a device since this was asked last. It waits for the device."""
        found: set[int] = set()
        for fault in self._faults.values():
            found |= set(fault.nonzero().flatten().tolist())
            fault.zero_()
        return sorted(found)

    def _current(self) -> _Row:
        if self._now is None:
            raise HqdmError("a quantised layer ran before its denoiser was called", "call the denoiser, not the layer")
        return self._now

    def factors_of(self, span: slice) -> torch.Tensor | None:
        """Factors on the weight scales of the outputs in `span`, or None where the tables have none."""
        factor = self._now.factor
        return None if factor is None else factor[span]

    def follow(self, network: nn.Module, unit: float = 1.0) -> None:
        """Set the timestep from the network's own `timestep` argument, times `unit`, at every call of it."""

        def before(_module, args, kwargs):
            if self._fixed is None:
                self.set_timestep(timestep_argument(network, args, kwargs) * unit)

        network.register_forward_pre_hook(before, with_kwargs=True)
