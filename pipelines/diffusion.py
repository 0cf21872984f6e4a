"""Schedules, sampling and teacher trajectories. Samplers are diffusers' own; here are noise, classes and order.

The noise and class of image i depend on the seed and i alone: every draw has a generator seeded by (seed, i, purpose).
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from pipelines.errors import NumericalFault, UsageError, did_you_mean

_WRONG = "a student: distill again at lower rates; a teacher: see whether hqdm profile names the site"

# diffusers' names, with what makes each equal to its published form on LDM's schedule. A schedule that was read from a
# scheduler's configuration is `completed` and has its own word on all of these.
SCHEDULERS = {
    "DDIMScheduler": dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"),
    "DDPMScheduler": dict(clip_sample=False, steps_offset=1, timestep_spacing="leading"),
    "DPMSolverMultistepScheduler": dict(),
    "EulerDiscreteScheduler": dict(),
    "EulerAncestralDiscreteScheduler": dict(),
    "PNDMScheduler": dict(skip_prk_steps=True, steps_offset=1),
    "UniPCMultistepScheduler": dict(),
}
# Flow matching's velocities need schedulers of their own.
FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": dict(),
    "DPMSolverMultistepScheduler": dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
}


# The learned half of an output is cut off: DDPM takes the fixed variance that each of these is measured from.
_LEARNED = {"learned": "fixed_small", "learned_range": "fixed_large"}


def is_flow(schedule: Mapping) -> bool:
    """Whether a model's schedule is one of flow matching: those alone have a shift."""
    return "shift" in schedule


def walker(schedule: Mapping) -> str:
    """The scheduler that students are distilled on, and the usual one: its steps need nothing but x_t, so that a run
    can go on inside a trajectory.
    """
    return "FlowMatchEulerDiscreteScheduler" if is_flow(schedule) else "DDIMScheduler"


def eta_or(asked: float | None, name: str, usual: float) -> float:
    """The η asked for, or a stage's usual one where the scheduler knows η, else 0."""
    if asked is not None:
        return asked
    return usual if name == "DDIMScheduler" else 0.0


class Predicts(Protocol):
    """What sampling needs of a model."""

    def predict(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: torch.Tensor, guidance: float
    ) -> torch.Tensor: ...


def make_scheduler(name: str, schedule: Mapping, steps: int):
    """A diffusers scheduler set to `steps` timesteps on a model's schedule; UsageError where it cannot be.

    DDIM and PNDM step num_train_timesteps // steps down, which misses the next timestep where they are spaced from the
    last one to 0 ("linspace"): both take "trailing" for that, or "leading" where the schedule states an offset.
    """
    import diffusers

    known = FLOW_SCHEDULERS if is_flow(schedule) else SCHEDULERS
    if name not in known:
        what = "of flow matching " if name in SCHEDULERS and is_flow(schedule) else ""
        raise UsageError(f"scheduler {name!r} {what}does not exist", did_you_mean(name, known))
    train_steps = schedule["num_train_timesteps"]
    if not 1 <= steps <= train_steps:
        raise UsageError(f"steps {steps} is outside 1 … {train_steps}", "20 is usual")
    kind = getattr(diffusers, name)
    accepted = inspect.signature(kind.__init__).parameters
    own = {key: value for key, value in schedule.items() if key in accepted}
    if is_flow(schedule):
        own |= known[name]  # a velocity is predicted, whatever the schedule calls it
        if "flow_shift" in accepted:
            own["flow_shift"] = schedule["shift"]
    elif "timestep_spacing" not in schedule:  # LDM's
        own = known[name] | own
    if own.get("variance_type") in _LEARNED:
        own["variance_type"] = _LEARNED[own["variance_type"]]
    if name in ("DDIMScheduler", "PNDMScheduler") and own.get("timestep_spacing") == "linspace":
        own["timestep_spacing"] = "leading" if own.get("steps_offset") else "trailing"
    spacing: dict = {"num_inference_steps": steps}
    if name == "FlowMatchEulerDiscreteScheduler":
        if schedule.get("linear_sigmas"):  # Flux's pipeline
            spacing = {"sigmas": [1 - step / steps for step in range(steps)]}
        if schedule.get("use_dynamic_shifting"):
            spacing["mu"] = schedule["mu"]
    with _blaming(name):
        scheduler = kind(**own)
        scheduler.set_timesteps(**spacing)
    visited = scheduler.timesteps
    if visited.max() >= train_steps and not is_flow(schedule):  # steps_offset = 1 with all the steps
        raise UsageError(f"steps {steps} would visit timestep {train_steps}, which does not exist", "take fewer steps")
    if not (visited >= 0).all():
        raise UsageError(f"steps {steps} would visit timestep {float(visited.min()):g}", "check the model's schedule")
    return scheduler


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever diffusers raises in a scheduler is said of that scheduler."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"{name} does not work on the model's schedule: {reason}"
        raise UsageError(what, "try another --scheduler") from error


def completed(stated: Mapping, kind: type) -> dict:
    """A schedule from a scheduler's configuration, `stated` of the class `kind`, that leaves nothing to other classes:
    what is not stated is what `kind` itself would take.

    A class that knows no clipping does not clip; one that knows no `set_alpha_to_one` ends at a level of no noise; PNDM
    warms up with fewer calls unless it is the folder's own and says otherwise.
    """
    usual = {name: part.default for name, part in inspect.signature(kind.__init__).parameters.items()}
    said = {
        name: value
        for name, value in usual.items()
        if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    }
    schedule = {**said, **stated}
    if not is_flow(schedule):
        schedule = dict(clip_sample=False, set_alpha_to_one=True, skip_prk_steps=True) | schedule
    return schedule


def check_schedule(schedule: Mapping) -> None:
    """UsageError where the `walker` cannot be built, set up and run on a schedule, or leaves the finite numbers."""
    name, train_steps = walker(schedule), schedule["num_train_timesteps"]
    scheduler = make_scheduler(name, schedule, max(1, min(20, train_steps // 2)))
    with _blaming(name):
        levels = scheduler.sigmas if is_flow(schedule) else scheduler.alphas_cumprod
        if not ((levels >= 0) & (levels <= 1 + 1e-6)).all() or (not is_flow(schedule) and len(levels) != train_steps):
            raise ValueError("its levels of noise are no numbers from 0 to 1, one a timestep")
        for timestep in scheduler.timesteps:
            x = torch.full((1, 1, 1, 1), 0.5)
            if not torch.isfinite(scheduler.step(x, timestep, x).prev_sample).all():
                raise ValueError(f"its step at timestep {float(timestep):g} is NaN or Inf")


def timesteps_of(name: str, schedule: Mapping, steps: int) -> list[float]:
    """The timesteps that sampling visits, in sampling order; whole numbers but for flow matching and Euler's."""
    return [float(timestep) for timestep in make_scheduler(name, schedule, steps).timesteps]


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A generator for one purpose of one image."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def noise_of(seed: int, indices: list[int], shape: tuple[int, ...], purpose: str = "start") -> torch.Tensor:
    """Standard normal noise (N, *shape) fp32; row n belongs to image indices[n]."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index, purpose)) for index in indices])


def conditions_of(seed: int, indices: list[int], conditions: int, purpose: str = "classes") -> torch.Tensor:
    """Conditions (N,) int64, classes or prompts: a fresh permutation of all of them for every `conditions` images,
    neither sorted nor unbalanced. Zeros where there are none.
    """
    if conditions == 0:
        return torch.zeros(len(indices), dtype=torch.int64)
    rows = []
    for index in indices:
        order = torch.randperm(conditions, generator=generator(seed, index // conditions, purpose))
        rows.append(int(order[index % conditions]))
    return torch.tensor(rows)


def trajectory(
    model: Predicts,
    name: str,
    schedule: Mapping,
    steps: int,
    x: torch.Tensor,
    conditions: torch.Tensor,
    guidance: float,
    eta: float,
    seed: int,
    indices: list[int],
    first: int = 0,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a sampler and yield (step, timestep, x_t, ε) before each step and, last, (steps, timestep, x_0, ε).

    x: (N, C, H, W) noise; ε is the model's guided prediction at x_t, be it noise, v or a velocity. `first` goes on at
    a later step of a `walker`'s trajectory from the x of that step.
    """  # fmt: skip
    scheduler = make_scheduler(name, schedule, steps)
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise UsageError(f"{name} has no eta", "leave --eta out, or use --scheduler DDIMScheduler")
    if first == 0:
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    epsilon = torch.zeros_like(x)
    for step, timestep in enumerate(scheduler.timesteps):
        if step < first:
            continue
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        epsilon = model.predict(seen, timestep, conditions, guidance)
        yield step, timestep, x, epsilon
        extra = {}
        if eta:
            noise = noise_of(seed, indices, tuple(x.shape[1:]), f"step {step}").to(x.device)
            if (correction := getattr(model, "correction", None)) is not None:
                noise = noise * noise_left(scheduler, timestep, eta, correction.rest(timestep))
            extra = dict(eta=eta, variance_noise=noise)
        elif "generator" in accepted:
            extra = dict(generator=[generator(seed, index, f"step {step}") for index in indices])
        with _blaming(name):
            x = scheduler.step(epsilon, timestep, x, **extra).prev_sample
    yield steps, scheduler.timesteps[-1], x, epsilon


def noise_left(scheduler, timestep: torch.Tensor, eta: float, deviation: float) -> float:
    """σ'/σ, by how much a DDIM step's own noise shrinks where the prediction carries noise of some deviation s already.

    σ'² = σ² − c²·s², or 0, with c the prediction's factor in the step (PTQD; the direction to x_t keeps σ, with which
    c was derived). Both σ and c are asked of the scheduler: its step is affine in prediction and noise near zero.
    """
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    small = 1e-6  # nothing is clipped

    def step(prediction: float, noise: float) -> float:
        extra = dict(eta=eta, variance_noise=zero + noise)
        return scheduler.step(zero + prediction, timestep, zero, **extra).prev_sample.item() / small

    own, carried = abs(step(0.0, small)), abs(step(small, 0.0)) * deviation
    return math.sqrt(max(0.0, 1 - (carried / own) ** 2)) if own > 0 else 1.0


@torch.inference_mode()
def sample(
    model: Predicts,
    name: str,
    schedule: Mapping,
    steps: int,
    shape: tuple[int, ...],
    conditions: torch.Tensor,
    guidance: float,
    eta: float,
    seed: int,
    indices: list[int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Latents (N, *shape) of the images `indices`, on the device; the processor draws the noise. NumericalFault that
    names images, timestep and, where a layer made it, the layer, for the first NaN or Inf.
    """  # fmt: skip
    start = noise_of(seed, indices, shape).to(device)
    at_once = start.device.type == "cpu"  # asking a device at every step would make it wait
    seen = Checked(model, indices) if at_once else model
    for _, timestep, x, _ in trajectory(seen, name, schedule, steps, start, conditions, guidance, eta, seed, indices):
        if at_once:
            _check_images(x, indices, f"after the step before timestep {float(timestep):g}")
    _check_images(x, indices, "after the last step")
    return x


def _check_images(values: torch.Tensor, indices: list[int], where: str) -> None:
    bad = ~values.isfinite().flatten(1).all(1)
    if bad.any():
        named = ", ".join(str(index) for index, is_bad in zip(indices, bad.tolist(), strict=True) if is_bad)
        raise NumericalFault(f"images {named} hold NaN or Inf {where}", _WRONG)


class Checked:
    """A model whose predictions are checked, and whose layers are asked which was the first to go wrong."""

    def __init__(self, model: Predicts, indices: list[int]):
        self.model, self.indices = model, indices
        self.correction = getattr(model, "correction", None)

    def predict(self, x, timestep, conditions, guidance):
        at = f"at timestep {float(timestep):g}"
        try:
            predicted = self.model.predict(x, timestep, conditions, guidance)
        except NumericalFault as fault:  # of kernels, which know their site alone
            images = f"images {self.indices[0]} to {self.indices[-1]}"
            raise NumericalFault(f"{fault.what}, {at}, {images}", fault.hint) from fault
        if not predicted.isfinite().all():
            layer = first_fault(self.model, lambda: self.model.predict(x, timestep, conditions, guidance))
            _check_images(predicted, self.indices, f"{at}" + (f", first in {layer}" if layer else ""))
        return predicted


def first_fault(model: object, call: Callable[[], object]) -> str:
    """The innermost layer of `model.network` that first gives NaN or Inf during a call; empty where none does."""
    found: list[str] = []

    def watch(layer: str):
        def hook(_module, _args, output):
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(layer)

        return hook

    network = getattr(model, "network", None)
    layers = dict(network.named_modules()) if isinstance(network, torch.nn.Module) else {}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items() if name]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of any float dtype to uint8 in [0, 255], rounded to nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
