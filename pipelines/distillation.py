"""The training loop: the student follows its teacher along the teacher's own trajectories, without data.

Source: HQ-DM, equation 12, and the public code of EfficientDM and HQ-DM: the teacher runs DDIM from noise, at every step
the student sees the same x_t, one optimiser step follows, and the teacher's ε carries the trajectory on. The loss is the
squared error, summed, of the two guided ε.

Every draw is a function of (seed, trajectory, step), so the loop's whole state is its parameters, the optimiser's
moments and the x_t it stands at: saved now and then, and a run killed anywhere ends with the bits of one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.diffusion import classes_of, noise_of, timesteps_of, trajectory
from pipelines.errors import NumericalFault
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Recipe
from pipelines.quant.layers import quant_layers
from pipelines.quant.tables import TimestepTables

SCHEDULER = "DDIMScheduler"  # its steps need nothing but x_t, so a run can go on inside a trajectory
WEIGHT_DECAY = 0.01  # of the adapters; scales have none


@dataclass(frozen=True)
class Course:
    """How long and on what the student trains."""

    trajectories: int
    steps: int
    batch: int  # images of a trajectory; guidance doubles what the denoisers see
    guidance: float
    eta: float
    seed: int

    @property
    def updates(self) -> int:
        return self.trajectories * self.steps


def parameter_groups(student: Denoiser, recipe: Recipe) -> list[dict]:
    """Trained parameters with their peak learning rates (facts of the recipe; `rate` is what the decay multiplies).

    A layer's adapters learn at mean(weight scale)/divisor: scale-aware optimisation, EfficientDM.
    """
    layers = quant_layers(student.unet)
    tables: TimestepTables = student.unet.timestep_tables
    groups = [
        {"params": [layer.lora_a, layer.lora_b], "rate": layer.weight_scale.mean().item() / recipe.lora_rate_divisor,
         "weight_decay": WEIGHT_DECAY}
        for layer in layers.values()
    ]  # fmt: skip
    groups.append({"params": [layer.weight_scale for layer in layers.values()], "rate": recipe.weight_scale_rate})
    groups.append({"params": list(tables.scale), "rate": recipe.activation_scale_rate})
    groups.append({"params": list(tables.zero), "rate": recipe.zero_point_rate})
    if tables.factor is not None:
        groups.append({"params": list(tables.factor), "rate": recipe.activation_scale_rate})
    return [{"weight_decay": 0.0, "lr": 0.0} | group for group in groups if group["rate"] > 0]


def check_finite(student: Denoiser, loss: float, timestep: int) -> None:
    """NumericalFault that names the timestep and, where a scale is the cause, the site."""
    layers = quant_layers(student.unet)
    tables: TimestepTables = student.unet.timestep_tables
    row = tables.timesteps.index(timestep)
    scale = tables.scale[row].detach()
    names = [name for name, value in zip(layers, scale, strict=True) if not value > 0]
    names += [name for name, layer in layers.items() if not bool((layer.weight_scale > 0).all())]
    if names:
        raise NumericalFault(
            f"a scale of site {names[0]} is not positive at timestep {timestep}",
            "lower the scales' rates in the plan's recipe; the last good state is kept and the same command goes on from it",
        )
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericalFault(
            f"the loss is {loss} at timestep {timestep}",
            "lower the rates in the plan's recipe; the last good state is kept and the same command goes on from it",
        )


def distill(
    teacher: Denoiser,
    student: Denoiser,
    recipe: Recipe,
    course: Course,
    state_file: Path,
    save_every: int,
    report: Report,
    after: Callable[[int], None] = lambda update: None,
) -> list[float]:
    """Train in place and return the loss of every update, per image. Goes on from `state_file` where there is one.

    Raises NumericalFault at the first loss or scale that is not a number; the state file then holds the last good state.
    `after` is called after each update with the number of updates done.
    """
    schedule, info = teacher.info.schedule, teacher.info
    groups = parameter_groups(student, recipe)
    parameters = [parameter for group in groups for parameter in group["params"]]
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups)
    timesteps = timesteps_of(SCHEDULER, schedule, course.steps)
    done, losses, x = 0, [], None
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimiser.load_state_dict(state["optimiser"])
        done, losses, x = state["done"], state["losses"], state["x"]
        report.note(f"goes on after update {done} of {course.updates}")

    def save() -> None:
        part = state_file.with_suffix(".part")
        values = [parameter.detach() for parameter in parameters]
        torch.save({"parameters": values, "optimiser": optimiser.state_dict(), "done": done, "losses": losses, "x": x}, part)
        part.replace(state_file)

    report.begin("distill", course.updates, done, unit="updates")
    while done < course.updates:
        number, first = divmod(done, course.steps)
        indices = list(range(number * course.batch, (number + 1) * course.batch))
        classes = classes_of(course.seed, indices, info.classes)
        if first == 0:
            x = noise_of(course.seed, indices, (info.channels, info.size, info.size), "distill")
        # No gradient inside the generator's frames; it is resumed under grad mode for the student's own pass.
        with torch.no_grad():
            steps = trajectory(
                teacher, SCHEDULER, schedule, course.steps, x, classes, course.guidance, course.eta, course.seed, indices, first
            )
            for step, timestep, x, target in steps:
                if step == course.steps:
                    break
                if done % save_every == 0 and done:
                    save()
                with torch.enable_grad():
                    difference = student.predict(x, timestep, classes, course.guidance) - target
                    loss = difference.square().sum()
                value = loss.item() / course.batch
                check_finite(student, value, timesteps[step])
                for group in optimiser.param_groups:
                    group["lr"] = group["rate"] * (1 - done / course.updates)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                done += 1
                losses.append(value)
                report.advance(done, loss=value)
                after(done)
    report.end()
    return losses
