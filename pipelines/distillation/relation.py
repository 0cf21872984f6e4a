"""MPQ-DM's relations between positions, and how the processes of a job share their features."""

import torch
from torch.nn import functional as F

from pipelines.errors import HqdmError
from pipelines.models.denoiser import Denoiser

MOST_POSITIONS = 1024  # that are compared with each other


class Relation:
    """MPQ-DM's second term: how alike positions are to each other in the last block's output, held to the teacher's.

    F̄ is the mean of two consecutive steps' features, normalised over channels, S = F̄ᵀF̄; at every second step
    weight·Σ KL(softmax S of the teacher ‖ softmax S of the student). The step before has no gradient: its graph is
    gone.
    """

    def __init__(self, teacher: Denoiser, student: Denoiser, weight: float):
        self.weight = weight
        self.before: list[torch.Tensor] | None = None
        self._now: list[torch.Tensor | None] = [None, None]

        def keeps(place: int):
            def hook(_module, _args, output):
                self._now[place] = output[-1] if isinstance(output, tuple) else output

            return hook

        self._handles = [
            _last_block(denoiser.network).register_forward_hook(keeps(place))
            for place, denoiser in enumerate((teacher, student))
        ]

    def term(self, step: int) -> torch.Tensor | float:
        """The term after both have predicted at a step; 0 at every first of two steps."""
        now = [_positions(features) for features in self._now]
        if step % 2 == 0:
            self.before = [features.detach() for features in now]
            return 0.0
        # A student that is not guided at a step computes the conditional half alone, which is the last.
        rows = min(map(len, [*now, *self.before]))
        unit = [F.normalize((a[-rows:] + b[-rows:]) / 2, dim=1) for a, b in zip(now, self.before, strict=True)]
        true, mine = (F.log_softmax(features.mT @ features, -1) for features in unit)
        return self.weight * F.kl_div(mine, true, reduction="sum", log_target=True)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _last_block(network: torch.nn.Module) -> torch.nn.Module:
    """What the last layers read; HqdmError where the network has no such list of blocks."""
    for name in ("up_blocks", "single_transformer_blocks", "transformer_blocks"):
        if len(blocks := getattr(network, name, ())):
            return blocks[-1]
    raise HqdmError(
        f"a {type(network).__name__} has no blocks whose relations could be distilled", "recipe: relation: 0"
    )


def _positions(features: torch.Tensor) -> torch.Tensor:
    """Features (N, C, H, W) or (N, tokens, C) as (N, C, positions), at most MOST_POSITIONS of them."""
    flat = features.flatten(2) if features.ndim == 4 else features.mT
    return F.adaptive_avg_pool1d(flat, min(flat.shape[2], MOST_POSITIONS))


def whole_batch(parts: list[torch.Tensor], batch: int) -> torch.Tensor:
    """The features of a whole batch from those of its parts by process: (k·n, …), where a guided network's rows are k
    = 2 halves of all images, those without conditions first.
    """
    halves = sum(map(len, parts)) // batch
    return torch.cat([part.unflatten(0, (halves, -1)) for part in parts], 1).flatten(0, 1)


def rows_of(mine: slice, whole: torch.Tensor, batch: int) -> torch.Tensor:
    """One process's part of what `whole_batch` put together."""
    return whole.unflatten(0, (-1, batch))[:, mine].flatten(0, 1)
