"""What can be taken out of a student's prediction afterwards: PTQD's correction, looked up by timestep.

Quantisation turns a prediction ε into ε̂ = (1 + k)·ε + b + r: a part that goes with ε (slope k ≥ 0), a bias b of each
channel and a rest r that is uncorrelated with ε. (ε̂ − b)/(1 + k) leaves r/(1 + k), whose deviation a stochastic sampler
takes off its own noise (`pipelines.diffusion.noise_left`).

Source: He et al., "PTQD", NeurIPS 2023, and ziplab/PTQD. Its code takes b from the whole error, and so counts k times
the mean of ε twice; here b is what the slope leaves.
"""

from dataclasses import dataclass

import torch

from pipelines.quant.tables import ByTimestep

FILE = "correction.safetensors"


@dataclass(frozen=True)
class Correction(ByTimestep):
    """Slopes (T,), biases (T, C) and the deviations of the rest (T,), fp32, at `timesteps` (T,) fp64, ascending.

    guidance: () fp32, the strength at which they were measured. Between timesteps all three are interpolated linearly;
    beyond the ends the end's hold.
    """

    FILE = FILE
    WHAT = "correction"

    slope: torch.Tensor
    bias: torch.Tensor
    deviation: torch.Tensor
    guidance: torch.Tensor

    def corrected(self, prediction: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """(ε̂ − b)/(1 + k) of ε̂ (N, C, H, W) at a timestep, a number or (N,)."""
        # On the processor, and then as tensors where the prediction is: dividing by a number takes a reciprocal there.
        bias, slope = (self.at(values, timestep).to(prediction.device) for values in (self.bias, self.slope))
        return (prediction - bias[..., None, None]) / (1 + slope.reshape(-1, 1, 1, 1))

    def rest(self, timestep: torch.Tensor) -> float:
        """The deviation of what is left of the error in a corrected prediction, at one timestep."""
        deviation, slope = (self.at(values, timestep) for values in (self.deviation, self.slope))
        return (deviation / (1 + slope)).item()


class Moments:
    """Sums over images, from which a timestep's correction is fitted: five moments of each channel, (5, C) fp64."""

    def __init__(self):
        self._sums: torch.Tensor | float = 0.0
        self._count = 0  # values of a channel

    def add(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Count two predictions (N, C, H, W) at the same x."""
        true, quantised = (value.double().transpose(0, 1).flatten(1) for value in (teacher, student))
        error = quantised - true
        moments = (true, error, true * true, true * error, error * error)
        self._sums = self._sums + torch.stack([moment.sum(1) for moment in moments]).cpu()
        self._count += true.shape[1]

    def fit(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slope (), bias (C,), deviation () fp32: the error's least-squares line on ε over all values, held above 0."""
        true, error, true2, cross, error2 = self._sums / self._count
        variance = true2.mean() - true.mean() ** 2
        slope = ((cross.mean() - true.mean() * error.mean()) / variance.clamp(min=1e-300)).clamp(min=0)
        bias = error - slope * true
        rest = error2 - 2 * slope * cross + slope**2 * true2 - bias**2
        return slope.float(), bias.float(), rest.mean().clamp(min=0).sqrt().float()
