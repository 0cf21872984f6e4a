"""How much of its guidance a student keeps at each timestep: a share of it, by the signal that it still carries.

Classifier-free guidance, p_c + (g − 1)·d, multiplies the difference of two predictions, d = p_c − p_∅. Where little
noise is left the two are nearly alike, and what is multiplied in a quantised model is mostly the noise of its
quantisers. A student's difference is d̂ = k·d + n, with n uncorrelated with d. Of all shares w of g − 1, the one that
keeps

    λ·(1 − w·k)²·‖d‖² + w²·‖n‖²

least, lost signal against noise, is w = λk/(λk² + ‖n‖²/‖d‖²). It is held between 0 and 1, and is 0 below `LEAST`: there
the unconditional half is not computed at all, which saves half the step.

Source: hqdm's own. That guidance at low levels of noise can be left out of a model in full precision is from
Kynkäänniemi et al., "Applying Guidance in a Limited Interval", NeurIPS 2024.
"""

from dataclasses import dataclass

import torch

from pipelines.quant.tables import ByTimestep

FILE = "guidance.safetensors"
LEAST = 0.1


@dataclass(frozen=True)
class GuidanceShares(ByTimestep):
    """Shares (T,) fp32 of g − 1 at `timesteps` (T,) fp64, ascending; linear between them, the ends' beyond.

    guidance: () fp32, the strength that the student learned to make up for; None in files that do not say it.
    """

    FILE = FILE
    WHAT = "shares of guidance"

    share: torch.Tensor
    guidance: torch.Tensor | None = None

    def strength(self, guidance: float, timestep: torch.Tensor) -> float | torch.Tensor:
        """g at a timestep: a number, or for timesteps (N,) that differ (N, 1, 1, 1) fp32.

        A strength of at most 1 adds nothing to the conditional prediction, and is as asked.
        """
        if guidance <= 1:
            return guidance
        # In fp64 for one timestep and for several, so that an image has the same strength in either batch.
        strength = 1.0 + (guidance - 1.0) * self.at(self.share, timestep).double()
        if bool((strength == strength[0]).all()):
            return strength[0].item()
        return strength.float().view(-1, 1, 1, 1)


class Differences:
    """Sums over images, from which a timestep's share is found: ⟨d, d⟩, ⟨d, d̂⟩ and ⟨d̂, d̂⟩ in fp64."""

    def __init__(self):
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Count two differences (N, C, H, W) at the same x."""
        true, mine = teacher.double(), student.double()
        self._sums += torch.stack([(true * true).sum(), (true * mine).sum(), (mine * mine).sum()]).cpu()

    def share(self, signal: float) -> float:
        """w for a weight λ = `signal` of what is lost; 0 where the teacher's difference is nothing or turned round."""
        true, cross, mine = self._sums.tolist()
        if true <= 0 or cross <= 0:
            return 0.0
        slope = cross / true
        noise = max(mine / true - slope**2, 0.0)
        kept = min(signal * slope / (signal * slope**2 + noise), 1.0)
        return kept if kept >= LEAST else 0.0
