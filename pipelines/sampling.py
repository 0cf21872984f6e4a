"""Images drawn in batches, each kept once it is drawn, so that a run goes on where it stopped and processes share them.

The noise and the condition of image i depend on the seed and i alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines import diffusion, processes
from pipelines.errors import FileFault, NumericalFault
from pipelines.events import Report
from pipelines.kernels.layers import check_inputs
from pipelines.memory import trim
from pipelines.metrics.images import npz_arrays, read_arrays
from pipelines.models.denoiser import Denoiser
from pipelines.states import in_one_piece


@dataclass(frozen=True)
class Walk:
    """How noise becomes images. scheduler: a name of diffusers."""

    scheduler: str
    steps: int
    guidance: float
    eta: float
    seed: int


class Batches:
    """The images of a run, `size` at a time: the composition of a batch moves floating-point rounding. Their latents,
    and then their pixels, are files in `folder`.
    """

    def __init__(self, folder: Path, count: int, size: int, report: Report):
        self.count, self._report = count, report
        self.starts = list(range(0, count, size))
        self.size_of = {start: min(size, count - start) for start in self.starts}
        self._folder = folder

    def path(self, what: str, start: int) -> Path:
        """Of the `latents` or `images` of the batch whose first image that is."""
        return self._folder / f"{what}-{start:06d}.npz"

    def indices(self, start: int) -> list[int]:
        return list(range(start, start + self.size_of[start]))

    def done(self, what: str) -> int:
        """How many images of all processes are kept."""
        return sum(self.size_of[start] for start in self.starts if self.path(what, start).exists())

    def missing(self, what: str, shape: tuple[int, ...] = ()) -> list[int]:
        """Batches that are not kept; shape: of an image's latents."""
        return [
            start for start in self.starts
            if not _is_kept(self.path(what, start), (self.size_of[start], *shape), self._report)
        ]  # fmt: skip

    def keep(self, what: str, start: int, **arrays: np.ndarray | float) -> None:
        """Write what a run that goes on later finds; the file is whole or not there."""
        with in_one_piece(self.path(what, start)) as file:
            np.savez(file, **arrays)

    def read(self, what: str, start: int) -> np.ndarray:
        return np.load(self.path(what, start))[what]

    def seconds(self) -> float:
        """What drawing took, of all batches."""
        return sum(float(np.load(self.path("latents", start))["seconds"]) for start in self.starts)


def draw(
    model: Denoiser, predictor: Denoiser, batches: Batches, conditions: torch.Tensor, walk: Walk, device: torch.device,
    report: Report, divided: bool = False,
) -> None:  # fmt: skip
    """Draw the latents that are missing, together with the other processes of a job.

    conditions: (count,). predictor: what predicts, the model itself or its steps on a device. divided: whether the
    processes hold a part of the weights each, and predict together. NumericalFault names the images, or the site.
    """
    crew, info = processes.here(), model.info
    missing = crew.once(lambda: batches.missing("latents", info.shape))
    # Where weights are divided nobody samples alone: whoever has no batch left draws the last one with the others.
    spare = [(start, False) for start in missing[-1:]] * (-len(missing) % crew.count if divided else 0)
    warm: set[int] = set()
    for start, keeps in crew.dealt([*((start, True) for start in missing), *spare]):
        indices = batches.indices(start)
        try:
            if len(indices) not in warm and not divided:
                _warm_up(model, predictor, indices, conditions[indices], walk, device)
                warm.add(len(indices))
            begun = time.perf_counter()
            latents = diffusion.sample(
                predictor, walk.scheduler, info.schedule, walk.steps, info.shape, conditions[indices], walk.guidance,
                walk.eta, walk.seed, indices, device,
            ).cpu()  # fmt: skip
            taken = time.perf_counter() - begun
        except NumericalFault:
            check_inputs(model.network)  # a device's kernels know the site
            raise
        check_inputs(model.network)
        if keeps:
            batches.keep("latents", start, latents=latents.numpy(), seconds=taken)
        report.advance(batches.done("latents"))
    crew.gathered(None)  # all latents are there


def _warm_up(
    model: Denoiser, predictor: Denoiser, indices: list[int], conditions: torch.Tensor, walk: Walk, device: torch.device
) -> None:
    """Predict once at each size of a batch: packing weights for a new one is not sampling."""
    info = model.info
    timesteps = diffusion.timesteps_of(walk.scheduler, info.schedule, walk.steps)
    zeros = torch.zeros((len(indices), *info.shape), device=device)
    with torch.inference_mode():
        for timestep in _of_each_size(model, timesteps, walk.guidance):
            diffusion.Checked(predictor, indices).predict(zeros, torch.tensor(timestep), conditions, walk.guidance)
    trim()


def _of_each_size(model: Denoiser, timesteps: list[float], guidance: float) -> list[float]:
    """The first timestep, and the first of those at which the unconditional half is not computed: half the batch."""
    if (shares := model.guidance_shares) is None:
        return timesteps[:1]
    halved = [step for step in timesteps if shares.strength(guidance, torch.tensor(step)) == 1]
    return list(dict.fromkeys([timesteps[0], *halved[:1]]))


def decode(
    decoder: Callable[[torch.Tensor], torch.Tensor], batches: Batches, device: torch.device, report: Report
) -> None:
    """Latents to uint8 images, NHWC, of the batches that are missing. NumericalFault names the images."""
    crew = processes.here()
    missing = crew.once(lambda: batches.missing("images"))
    for start in crew.dealt(missing):
        decoded = decoder(torch.from_numpy(batches.read("latents", start)).to(device)).cpu()
        bad = (~decoded.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            named = ", ".join(str(start + index) for index in bad.tolist())
            raise NumericalFault(f"images {named} hold NaN or Inf once decoded", "see the model's first stage (vae)")
        batches.keep("images", start, images=diffusion.to_uint8(decoded).permute(0, 2, 3, 1).numpy())
        report.advance(batches.done("images"))
    crew.gathered(None)


def _is_kept(path: Path, shape: tuple[int, ...], report: Report) -> bool:
    """Whether the arrays of a batch are there, images or latents of a shape that begins so; what is there and is not
    them is told, and made again.
    """
    if not path.exists():
        return False
    try:
        names = {"latents", "seconds"} if path.name.startswith("latents") else {"images"}
        if npz_arrays(path) != names:
            raise FileFault(f"{path}: holds something else")
        found = read_arrays(path, names)
        values = found.get("latents", found.get("images"))
        kind, seconds = ("f4" if "latents" in found else "u1"), found.get("seconds", np.ones(()))
        whole = values.dtype == kind and values.ndim == 4 and values.shape[: len(shape)] == shape
        if not whole or not np.isfinite(values).all() or seconds.shape != () or not 0 < seconds < np.inf:
            raise FileFault(f"{path}: is not what was kept")
    except FileFault as fault:
        report.warn(f"{fault.what}; it is made again")
        return False
    return True
