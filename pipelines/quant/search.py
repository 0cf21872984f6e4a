"""What a placement costs at a site's output: quantisation noise of both operands, through the weight and the input.

With y = (x − c)·Wᵀ + c·Wᵀ, of which the second product stays in floating point, x̂ = x + e and Ŵ = W + f, the error of
y is e·Wᵀ + (x − c)·fᵀ + e·fᵀ; the last is small and left out. A convolution is the sum of such products over the places
of its kernel. Their noises are taken for uncorrelated, so that their energies add up; what is the same for all tokens
is the same at every place, so that it adds up as it is: ē·Σ_p W_pᵀ.

Shares are of ‖x·Wᵀ‖², of a convolution of Σ_p ‖x·W_pᵀ‖². Where neighbouring places of x have much in common the output
is larger than that, several times in a smooth image: a convolution's shares are overstated then. They rank placements
of one site all the same; between sites, and beside a threshold, a convolution counts for more than it costs.
"""

from dataclasses import dataclass

import torch

from pipelines.quant.affine import choose, dequantise, quantise
from pipelines.quant.candidates import measure, rotated_rows
from pipelines.quant.hadamard import rotate_last, rotate_weight
from pipelines.quant.spec import SitePlan, Transform, integer_range


@dataclass(frozen=True)
class Cost:
    """Shares of the output's energy, means over the timesteps: `activation` and `weight` noise, and of the former what
    is the same for all tokens (`bias`): all of it where there is one token, or all are alike.
    """

    activation: float
    weight: float
    bias: float

    def total(self, bias_weight: float) -> float:
        return self.activation + self.weight + bias_weight * self.bias


class SiteSearch:
    """One site's sample and weight, ready to price placements.

    sample: (T, rows, C, W) or (T, rows, C), before anything is done to it. weight: (out, C, …), the teacher's.
    """

    def __init__(self, sample: torch.Tensor, weight: torch.Tensor):
        self.sample, self.weight = sample, weight.detach()
        tokens = sample.transpose(2, 3).flatten(1, 2) if sample.ndim == 4 else sample
        self.tokens = tokens  # (T, n, C)
        self.rows = _by_place(self.weight)
        self.together = self.weight.sum((2, 3)) if weight.ndim == 4 else self.weight  # (out, C), inside the image
        self.energy = self._energy(tokens, self.rows).clamp(min=1e-12)  # (T,)
        self._weights: dict[tuple, float] = {}
        self._errors: dict[tuple, torch.Tensor] = {}  # by placement of the weight, the last two
        self._activations: dict[tuple, tuple[float, float]] = {}

    def cost(self, plan: SitePlan, centre: torch.Tensor | None = None, gain: torch.Tensor | None = None) -> Cost:
        """The cost of a placement with a quantiser for each timestep, scales by least error. A site has one centre, and
        one gain with and one without it.
        """
        key = (plan.transform, plan.activation_quantiser, plan.activation_bits, plan.centring, gain is not None)
        if key not in self._activations:  # the same for an inverse that goes elsewhere
            self._activations[key] = self._activation(plan, centre, gain)
        activation, bias = self._activations[key]
        return Cost(activation, self.weight_noise(plan, centre, gain), bias)

    def _activation(self, plan: SitePlan, centre, gain) -> tuple[float, float]:
        shape = (1, 1, -1, 1) if self.sample.ndim == 4 else (1, 1, -1)
        moved = self.sample if centre is None else self.sample - centre.view(shape)
        moved = moved if gain is None else moved * gain.view(shape)
        rows = rotated_rows(moved, plan.transform)
        bits, quantiser = plan.activation_bits, plan.activation_quantiser
        scale, zero, _ = measure(rows, bits, quantiser)
        low, high = integer_range(bits, quantiser == "symmetric")
        error = (
            dequantise(quantise(rows, scale[:, None], zero[:, None], low, high), scale[:, None], zero[:, None]) - rows
        )
        error = self._back(error, plan.transform)  # (T, n, C), as the input's own coordinates have it
        if gain is not None:
            error = error / gain
        noise = self._energy(error, self.rows)
        count = error.shape[1]
        bias = self._energy(error.mean(1, keepdim=True), self.together)
        chance = self._energy(error, self.together)  # a mean of few tokens is mostly noise
        bias = (count * bias - chance).clamp(min=0) / max(count - 1, 1)
        return (noise / self.energy).mean().item(), (bias / self.energy).mean().item()

    def _back(self, rows: torch.Tensor, transform: Transform) -> torch.Tensor:
        """The inverse of `rotated_rows`: (T, rows·positions·C) to tokens (T, n, C)."""
        timesteps, channels = len(rows), self.tokens.shape[2]
        if self.sample.ndim == 4:
            width = self.sample.shape[3]
            laid = rows.view(timesteps, -1, channels, width)
            if transform.axis == "width":
                laid = rotate_last(laid.contiguous(), transform, inverse=True) / transform.order
            tokens = laid.transpose(2, 3).flatten(1, 2)
        else:
            tokens = rows.view(timesteps, -1, channels)
        if transform.axis == "channels":
            tokens = rotate_last(tokens.contiguous(), transform, inverse=True) / transform.order
        return tokens

    def weight_noise(
        self, plan: SitePlan, centre: torch.Tensor | None = None, gain: torch.Tensor | None = None
    ) -> float:
        """The weight's part of the cost."""
        double = plan.inverse == "double"
        key = (double and plan.transform, plan.weight_quantiser, plan.weight_bits, plan.centring, gain is not None)
        if key not in self._weights:
            placed = (*key[:3], gain is not None and key[3:])  # without a gain a centre leaves the weight alone
            if placed not in self._errors:
                if len(self._errors) > 1:
                    del self._errors[next(iter(self._errors))]
                self._errors[placed] = self._weight_error(plan, gain)
            tokens = self.tokens if centre is None else self.tokens - centre
            self._weights[key] = (self._energy(tokens, self._errors[placed]) / self.energy).mean().item()
        return self._weights[key]

    def _weight_error(self, plan: SitePlan, gain: torch.Tensor | None) -> torch.Tensor:
        """What rounding does to the weight, in the input's own coordinates: the products of `_by_place`."""
        weight = self.weight
        if gain is not None:
            weight = weight / gain.view(1, -1, *[1] * (weight.ndim - 2))
        double = plan.inverse == "double"
        turned = rotate_weight(weight, plan.transform) if double else weight
        low, high = plan.weight_range
        scale, zero = choose(turned.flatten(1), low, high)
        shape = (-1, *[1] * (weight.ndim - 1))
        codes = quantise(turned, scale.view(shape), zero.view(shape), low, high)
        error = dequantise(codes, scale.view(shape), zero.view(shape)) - turned
        if double:
            error = rotate_weight(error, plan.transform, inverse=True) / plan.transform.order
        if gain is not None:
            error = error * gain.view(1, -1, *[1] * (weight.ndim - 2))
        return _by_place(error)

    @staticmethod
    def _energy(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens of ‖x·rowsᵀ‖²: (T, n, C), (r, C) to (T,)."""
        return torch.stack([(mine @ rows.T).square().sum() / len(mine) for mine in tokens])


def _by_place(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, C, kh, kw) as (kh·kw·out, C), the products of a convolution; (out, C) as it is."""
    return weight.flatten(2).movedim(2, 1).flatten(0, 1) if weight.ndim == 4 else weight
