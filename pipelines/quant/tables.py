"""Timestep tables: a quantiser's parameters for every timestep of a named schedule, looked up by timestep.

A table knows its timesteps, so it can answer for others: a model distilled at 20 steps samples at 50 by interpolation,
linear in the logarithm of a scale and linear in a zero-point (then rounded), constant beyond the ends. Nothing
counts calls.
"""

import torch
from torch import nn

from pipelines.errors import HqdmError
from pipelines.quant.affine import round_through


class TimestepTables(nn.Module):
    """Activation scales and zero-points of n sites at T timesteps, and optionally factors on their weight scales.

    One parameter a timestep and kind, not one a table: an update at one timestep then leaves the optimiser's state
    of the
    others alone, as separate quantisers would.

    scale, zero: (T, n) fp32. factor: (T, m) fp32 or None, where m is the sum of the sites' outputs; see `factors_of`.
    unit: (n,) fp32, what every scale is multiplied with when it is looked up; ones where it is None.
    """

    def __init__(
        self,
        timesteps: list[int],
        scale: torch.Tensor,
        zero: torch.Tensor,
        factor: torch.Tensor | None = None,
        unit: torch.Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("unit", unit, persistent=False)
        order = sorted(range(len(timesteps)), key=lambda index: timesteps[index])
        self.timesteps = [int(timesteps[index]) for index in order]
        self.scale = nn.ParameterList([nn.Parameter(scale[index].clone()) for index in order])
        self.zero = nn.ParameterList([nn.Parameter(zero[index].clone()) for index in order])
        self.factor = None
        if factor is not None:
            self.factor = nn.ParameterList([nn.Parameter(factor[index].clone()) for index in order])
        self._now: tuple[torch.Tensor, ...] | None = None

    @torch.no_grad()
    def raw(self) -> dict[str, torch.Tensor]:
        """`timesteps` (T,) int64, `scale` with the unit multiplied in, rounded `zero` (T, n), and `factor` where
        there is one.
        """
        scale = torch.stack([self._in_units(row) for row in self.scale])
        tensors = {"timesteps": torch.tensor(self.timesteps), "scale": scale}
        tensors["zero"] = torch.stack([row.round() for row in self.zero])
        if self.factor is not None:
            tensors["factor"] = torch.stack([row.detach() for row in self.factor])
        return tensors

    def _in_units(self, scale: torch.Tensor) -> torch.Tensor:
        return scale if self.unit is None else scale * self.unit

    def set_timestep(self, timestep: torch.Tensor | int | float) -> None:
        """Look up what the layers will read until the next call. `timestep` is a number or (N,) equal numbers."""
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
                raise HqdmError(
                    "a batch mixes timesteps, and each timestep has quantisers of its own",
                    "call the denoiser once for every timestep",
                )
            timestep = timestep.flatten()[0].item()
        scale = self._in_units(self._row(self.scale, timestep, log=True))
        zero = round_through(self._row(self.zero, timestep, log=False))
        factor = None if self.factor is None else self._row(self.factor, timestep, log=True)
        self._now = (scale, zero, factor)

    def _row(self, rows: nn.ParameterList, timestep: float, log: bool) -> torch.Tensor:
        above = next((index for index, known in enumerate(self.timesteps) if known >= timestep), None)
        if above is None:
            return rows[-1]
        if above == 0 or self.timesteps[above] == timestep:
            return rows[above]
        low, high = self.timesteps[above - 1], self.timesteps[above]
        share = (timestep - low) / (high - low)
        if log:
            return torch.exp(torch.lerp(rows[above - 1].log(), rows[above].log(), share))
        return torch.lerp(rows[above - 1], rows[above], share)

    def covers(self, timesteps: list[int]) -> bool:
        """Whether every timestep has a row of its own, so that nothing is interpolated."""
        return set(int(timestep) for timestep in timesteps) <= set(self.timesteps)

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero-point of site `index` at the current timestep, scalars."""
        if self._now is None:
            raise HqdmError("a quantised layer ran before its denoiser was called", "call the denoiser, not the layer")
        scale, zero, _ = self._now
        return scale[index], zero[index]

    def factors_of(self, span: slice) -> torch.Tensor | None:
        """Factors on the weight scales of the outputs in `span`, or None where the tables have none."""
        factor = self._now[2]
        return None if factor is None else factor[span]

    def follow(self, denoiser: nn.Module) -> None:
        """Set the timestep from the denoiser's own `timestep` argument at every call of it."""

        def before(_module, args, kwargs):
            self.set_timestep(kwargs["timestep"] if "timestep" in kwargs else args[1])

        denoiser.register_forward_pre_hook(before, with_kwargs=True)
