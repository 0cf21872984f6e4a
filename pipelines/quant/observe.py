"""What goes into every site at every timestep: statistics of all values, and a bounded sample to measure errors on."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from pipelines.errors import HqdmError, NumericalFault
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.spec import Site, Transform
from pipelines.quant.tables import SAME_TIMESTEP, timestep_argument

SAMPLE_VALUES = 4096  # kept of each site and timestep; at least one image row or token
OUTLIER = 6.0  # standard deviations (Dettmers et al., 2022, call a value of 6 an outlier where the deviation is near 1)


class SiteObserver:
    """The inputs of one site, by timestep (T rows). All values count, except in `sample`.

    low, high, absmax (T, C): least and largest x and largest |x| of each input channel; `rotated[name]` (T, C) the
        last after an orthonormal transform, by coordinate for one along the channels, by channel for one along the
        width.
    powers (T, 4): sums of (x − pivot)^k, k = 1…4, fp64, from which mean, deviation and kurtosis follow. The pivot is
        the mean of a timestep's first call: powers about 0 would cancel where the mean is large against the deviation.
    outliers (T,): values farther than OUTLIER standard deviations from the mean, both of the call that they came in.
    channel_sums (T, C): fp64.
    sample: T entries, (rows, C, W) of a convolution (whole image rows, so that every transform can be measured) or
        (rows, C) of a linear: the same places at every timestep, drawn without replacement; (T, …) by `stacked_sample`.
    own_mean: T entries, (rows, C): the mean over all tokens of the image that each token of the sample is of; None
        where inputs have no tokens; (T, …) by `stacked_mean`.
    """

    def __init__(
        self, site: Site, timesteps: int, transforms: Sequence[Transform], seed: int, values: int = SAMPLE_VALUES
    ):
        self.site, self.transforms, self.values = site, tuple(transforms), values
        self.count = torch.zeros(timesteps, dtype=torch.float64)
        self.pivot = torch.zeros(timesteps, dtype=torch.float64)
        self.powers = torch.zeros(timesteps, 4, dtype=torch.float64)
        self.outliers = torch.zeros(timesteps, dtype=torch.float64)
        self.low = torch.full((timesteps, site.channels), float("inf"))
        self.high = torch.full((timesteps, site.channels), float("-inf"))
        self.rotated = {transform.name: torch.zeros(timesteps, site.channels) for transform in transforms}
        self.channel_sums = torch.zeros(timesteps, site.channels, dtype=torch.float64)
        self.sample: list[torch.Tensor | None] = [None] * timesteps
        self.own_mean: list[torch.Tensor | None] = [None] * timesteps
        self._generator = torch.Generator().manual_seed(seed)
        self._places: torch.Tensor | None = None

    def add(self, row: int, x: torch.Tensor) -> None:
        """One input of the layer: (…, C) of a linear, (N, C, H, W) of a convolution."""
        spatial = self.site.kind == "conv"
        tokens = _tokens(x, spatial)  # (n, C)
        low, high = tokens.amin(0), tokens.amax(0)  # many times faster than `aminmax` along a dimension
        torch.minimum(self.low[row], low, out=self.low[row])
        torch.maximum(self.high[row], high, out=self.high[row])
        self._add_moments(row, tokens.double())
        for transform in self.transforms:
            rotated = _tokens(rotate_activation(x, transform, spatial), spatial)
            largest = torch.maximum(rotated.amax(0), -rotated.amin(0)) / transform.order**0.5
            torch.maximum(self.rotated[transform.name][row], largest, out=self.rotated[transform.name][row])
        if self.sample[row] is None:
            self.sample[row] = self._drawn(x, tokens, spatial)
            if not spatial and x.ndim > 2:
                per_image = x.flatten(1, -2).mean(1)
                self.own_mean[row] = per_image[self._places // (len(tokens) // len(x))]

    def _add_moments(self, row: int, tokens: torch.Tensor) -> None:
        mean = tokens.mean()
        centred = tokens - mean
        self.outliers[row] += (centred.abs() > OUTLIER * centred.square().mean().sqrt()).sum()
        self.channel_sums[row] += tokens.sum(0)
        if self.count[row] == 0:
            self.pivot[row] = mean
        else:
            centred = tokens - self.pivot[row]
        self.count[row] += tokens.numel()
        power = centred
        for exponent in range(4):
            self.powers[row, exponent] += power.sum()
            power = power * centred

    def _drawn(self, x: torch.Tensor, tokens: torch.Tensor, spatial: bool) -> torch.Tensor:
        candidates = x.permute(0, 2, 1, 3).flatten(0, 1) if spatial else tokens  # (N·H, C, W) or (n, C)
        if self._places is None:
            rows = max(1, self.values // candidates[0].numel())
            self._places = torch.randperm(len(candidates), generator=self._generator)[:rows].sort().values
        return candidates[self._places].clone()

    @property
    def mean(self) -> torch.Tensor:
        """Of each channel (T, C), fp32."""
        return (self.channel_sums / (self.count[:, None] / self.site.channels)).float()

    @property
    def absmax(self) -> torch.Tensor:
        """(T, C); zeros where nothing was seen."""
        return torch.maximum(self.high, -self.low).clamp(min=0)

    @property
    def kurtosis(self) -> torch.Tensor:
        """Fourth central moment over the squared variance (T,), fp32: 3 for a normal distribution, 0 for a constant."""
        m1, m2, m3, m4 = (self.powers / self.count[:, None]).unbind(1)
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return torch.where(variance > 0, fourth / variance**2, 0.0).float()

    @property
    def outlier_share(self) -> torch.Tensor:
        """(T,), fp32, 0 … 1."""
        return (self.outliers / self.count).float()

    def stacked_sample(self) -> torch.Tensor:
        """(T, rows, C, W) or (T, rows, C), fp32."""
        return torch.stack(self.sample)

    def stacked_mean(self) -> torch.Tensor | None:
        """(T, rows, C), fp32, or None."""
        return None if self.own_mean[0] is None else torch.stack(self.own_mean)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Everything but the sample, by name, fp32."""
        named = {
            "minimum": self.low.amin(1),
            "maximum": self.high.amax(1),
            "kurtosis": self.kurtosis,
            "outliers": self.outlier_share,
            "low": self.low,
            "high": self.high,
            "absmax": self.absmax,
            "mean": self.mean,
        }
        return named | {f"absmax/{name}": value for name, value in self.rotated.items()}


def _tokens(x: torch.Tensor, spatial: bool) -> torch.Tensor:
    """A layer's input as (n, C); nothing is copied where a convolution's is channels-last."""
    return x.movedim(1, -1).flatten(0, -2) if spatial else x.flatten(0, -2)


class Observer:
    """Watches the site layers of a denoiser while it is used as a context manager.

    The row of a call is looked up by the timestep that the network itself was called with, times `unit`. A timestep
    that a sampler visits twice has one row.
    """

    def __init__(
        self,
        network: nn.Module,
        sites: Sequence[Site],
        timesteps: Sequence[float],
        transforms: Callable[[Site], Sequence[Transform]],
        seed: int,
        unit: float = 1.0,
        values: int = SAMPLE_VALUES,
    ):
        self.network, self.unit = network, unit
        self.rows = {timestep: row for row, timestep in enumerate(timesteps)}
        self.sites: Mapping[str, SiteObserver] = {
            site.name: SiteObserver(site, len(timesteps), transforms(site), seed * 1_000_003 + index, values)
            for index, site in enumerate(sites)
        }
        self._now: tuple[float, int] | None = None  # timestep and its row
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Observer":
        self._handles.append(self.network.register_forward_pre_hook(self._at_timestep, with_kwargs=True))
        for name, observer in self.sites.items():
            layer = self.network.get_submodule(name)
            self._handles.append(layer.register_forward_pre_hook(self._into(observer)))
        return self

    def __exit__(self, *fault: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _at_timestep(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = torch.as_tensor(timestep_argument(self.network, args, kwargs)).flatten()
        timestep = float(given[0]) * self.unit
        known = min(self.rows, key=lambda row: abs(row - timestep))
        if abs(known - timestep) > SAME_TIMESTEP:
            raise HqdmError(
                f"timestep {timestep:g} is not one of the observed schedule's", "observe the steps that are run"
            )
        self._now = known, self.rows[known]

    def _into(self, observer: SiteObserver):
        def hook(_module: nn.Module, args: tuple) -> None:
            timestep, row = self._now
            x = args[0].detach()
            if not x.isfinite().all():
                raise NumericalFault(
                    f"the input of {observer.site.name} holds NaN or Inf at timestep {timestep:g}",
                    "check the checkpoint and its configuration: the full-precision model itself goes wrong there",
                )
            observer.add(row, x)

        return hook
