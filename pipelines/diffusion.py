"""Schedules, sampling and teacher trajectories. Samplers are diffusers' own; here are noise, classes and order.

The noise and class of image i depend on the seed and i alone: every draw has a generator seeded by (seed, i, purpose).
"""

import hashlib
import inspect
from collections.abc import Iterator
from typing import Protocol

import torch

from pipelines.errors import UsageError, did_you_mean

# diffusers' names, with what makes each equal to its published form on an LDM schedule.
SCHEDULERS = {
    "DDIMScheduler": dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"),
    "DDPMScheduler": dict(clip_sample=False, steps_offset=1, timestep_spacing="leading"),
    "DPMSolverMultistepScheduler": dict(),
    "EulerDiscreteScheduler": dict(),
    "EulerAncestralDiscreteScheduler": dict(),
    "PNDMScheduler": dict(skip_prk_steps=True, steps_offset=1),
    "UniPCMultistepScheduler": dict(),
}

# What students are distilled on: its steps need nothing but x_t, so that a run can go on inside a trajectory.
SCHEDULER = "DDIMScheduler"


class Predicts(Protocol):
    """What sampling needs of a model."""

    def predict(
        self, x: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor, guidance: float
    ) -> torch.Tensor: ...


def make_scheduler(name: str, schedule: dict, steps: int):
    """A diffusers scheduler set to `steps` timesteps on a model's schedule."""
    import diffusers

    if name not in SCHEDULERS:
        raise UsageError(f"scheduler {name!r} does not exist", did_you_mean(name, SCHEDULERS))
    train_steps = schedule["num_train_timesteps"]
    if not 1 <= steps <= train_steps:
        raise UsageError(f"steps {steps} is outside 1 … {train_steps}", "20 is usual")
    scheduler = getattr(diffusers, name)(**schedule, **SCHEDULERS[name])
    scheduler.set_timesteps(steps)
    if scheduler.timesteps.max() >= train_steps:  # steps_offset = 1 puts them there when steps is all of them
        raise UsageError(f"steps {steps} would visit timestep {train_steps}, which does not exist", "take fewer steps")
    return scheduler


def timesteps_of(name: str, schedule: dict, steps: int) -> list[float]:
    """The timesteps that sampling visits, in sampling order."""
    return [timestep.item() for timestep in make_scheduler(name, schedule, steps).timesteps]


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A generator for one purpose of one image."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def noise_of(seed: int, indices: list[int], shape: tuple[int, ...], purpose: str = "start") -> torch.Tensor:
    """Standard normal noise (N, *shape) fp32; row n belongs to image indices[n]."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index, purpose)) for index in indices])


def classes_of(seed: int, indices: list[int], classes: int, purpose: str = "classes") -> torch.Tensor:
    """Classes (N,) int64: a fresh permutation of all classes for every `classes` images, neither sorted nor
    unbalanced.
    """
    labels = []
    for index in indices:
        order = torch.randperm(classes, generator=generator(seed, index // classes, purpose))
        labels.append(int(order[index % classes]))
    return torch.tensor(labels)


def trajectory(
    model: Predicts,
    name: str,
    schedule: dict,
    steps: int,
    x: torch.Tensor,
    classes: torch.Tensor,
    guidance: float,
    eta: float,
    seed: int,
    indices: list[int],
    first: int = 0,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a sampler and yield (step, timestep, x_t, ε) before each step and, last, (steps, timestep, x_0, ε).

    x: (N, C, H, W) noise; ε is the model's guided prediction at x_t. `first` goes on at a later step of a DDIM
    trajectory from the x of that step.
    """  # fmt: skip
    scheduler = make_scheduler(name, schedule, steps)
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise UsageError(f"{name} has no eta", "leave --eta out, or use --scheduler DDIMScheduler")
    if first == 0:
        x = x * scheduler.init_noise_sigma
    epsilon = torch.zeros_like(x)
    for step, timestep in enumerate(scheduler.timesteps):
        if step < first:
            continue
        epsilon = model.predict(scheduler.scale_model_input(x, timestep), timestep, classes, guidance)
        yield step, timestep, x, epsilon
        extra = {}
        if eta:
            extra = dict(eta=eta, variance_noise=noise_of(seed, indices, tuple(x.shape[1:]), f"step {step}"))
        elif "generator" in accepted:
            extra = dict(generator=[generator(seed, index, f"step {step}") for index in indices])
        x = scheduler.step(epsilon, timestep, x, **extra).prev_sample
    yield steps, scheduler.timesteps[-1], x, epsilon


@torch.inference_mode()
def sample(
    model: Predicts,
    name: str,
    schedule: dict,
    steps: int,
    shape: tuple[int, ...],
    classes: torch.Tensor,
    guidance: float,
    eta: float,
    seed: int,
    indices: list[int],
) -> torch.Tensor:
    """Latents (N, *shape) of the images `indices`."""  # fmt: skip
    start = noise_of(seed, indices, shape)
    *_, last = trajectory(model, name, schedule, steps, start, classes, guidance, eta, seed, indices)
    return last[2]


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of any float dtype to uint8 in [0, 255], rounded to nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
