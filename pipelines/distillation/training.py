"""The training loop: the student follows its teacher along the teacher's own trajectories, without data.

Source: HQ-DM, equation 12, and the public code of EfficientDM and HQ-DM: the teacher runs DDIM from noise, at every
step the student sees the same x_t, one optimiser step follows, and the teacher's ε carries the trajectory on. A recipe
may have the teacher go through the whole trajectory first, and its steps learned in an order of its own. The loss is
the squared error, summed, of the two guided ε: the teacher's as asked, the student's by its shares where it has
such.

Every draw is a function of (seed, trajectory, step), so the loop's whole state is its parameters, the optimiser's
moments and the x_t it stands at: saved now and then, and a run killed anywhere ends with the bits of one that was not.
Where the teacher goes ahead, it does so again from the trajectory's noise.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from pipelines import processes
from pipelines.diffusion import conditions_of, generator, noise_of, timesteps_of, trajectory, walker
from pipelines.distillation.checks import check_finite, check_teacher, told_of_signs
from pipelines.distillation.rates import parameter_groups
from pipelines.distillation.relation import Relation, rows_of, whole_batch
from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course, Recipe
from pipelines.states import read_state, write_state


def distill(
    teacher: Denoiser,
    student: Denoiser,
    recipe: Recipe,
    course: Course,
    state_file: Path,
    save_every: int,
    report: Report,
) -> list[float]:
    """Train in place and return the loss of every update, per image. Goes on from `state_file` where there is one.

    The processes of a job each take a part of every batch; the gradients are the sums over all of it, so that the
    parameters stay the same bits at each, and the leader alone writes the state.

    Raises NumericalFault at the first loss or scale that is not a number; the state file then holds the last good
    state.
    """
    training = _Training(teacher, student, recipe, course, state_file)
    training.go_on(report)
    report.begin("distill", course.updates, training.done, unit="updates")
    while training.done < course.updates:
        training.walk(save_every, report)
    report.end()
    training.conclude()
    if warning := told_of_signs(student):
        report.warn(warning)
    return training.losses


def steps_of(recipe: Recipe, course: Course, number: int) -> list[int]:
    """The sampler's steps in the order in which a recipe learns those of a trajectory."""
    if recipe.order == "trajectory":
        return list(range(course.steps))
    return torch.randperm(course.steps, generator=generator(course.seed, number, "order")).tolist()


class _Training:
    """What is trained, where it stands, and one update after the other."""

    def __init__(self, teacher: Denoiser, student: Denoiser, recipe: Recipe, course: Course, state_file: Path):
        self.teacher, self.student, self.recipe, self.course = teacher, student, recipe, course
        self.state_file, self.crew = state_file, processes.here()
        groups = parameter_groups(student, recipe)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise UsageError(
                "the recipe trains nothing: no rate is above 0 among what it trains",
                "name something in trains and roles, or set updates: none",
            )
        if self.crew.count > course.batch:
            raise UsageError(
                f"{self.crew.count} processes cannot share trajectories in batches of {course.batch}",
                f"take --batch {self.crew.count} or more, or fewer processes",
            )
        self.mine, self.device = self.crew.part(course.batch), self.parameters[0].device
        student.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(groups)
        self.scheduler = walker(teacher.info.schedule)
        self.timesteps = timesteps_of(self.scheduler, teacher.info.schedule, course.steps)
        tables = {id(parameter) for parameter in student.network.timestep_tables.parameters()}
        self.together = [p for p in self.parameters if id(p) in tables] if recipe.momentum == "shared" else []
        self.relation = Relation(teacher, student, recipe.relation) if recipe.relation else None
        self.done = 0
        self.losses: list[float] = []
        self.x: torch.Tensor | None = None  # this process's part of the batch, where the trajectory stands
        self.walked: list[tuple[int, torch.Tensor]] = []  # the teacher's ε by step, where it has gone ahead
        self.means: dict[int, float] = {}  # running means of the loss, by step
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if recipe.ema else []

    def go_on(self, report: Report) -> None:
        """Stand where the state file says, if there is one. HqdmError where processes stand at different updates."""
        if (state := read_state(self.state_file, report)) is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
            self.optimiser.load_state_dict(state["optimiser"])
            self.done, self.losses, self.x = state["done"], state["losses"], state["x"][self.mine].to(self.device)
            self.means, self.averages = state["means"], [average.to(self.device) for average in state["averages"]]
            if self.relation is not None and state["features"] is not None:
                self.relation.before = [
                    rows_of(self.mine, features, self.course.batch).to(self.device) for features in state["features"]
                ]
            report.note(f"goes on after update {self.done} of {self.course.updates}")
        if len(stand := set(self.crew.gathered(self.done))) > 1:  # sums of their gradients would be of different steps
            raise HqdmError(
                f"the processes of this job go on after different updates: {', '.join(map(str, sorted(stand)))}",
                "let all of them see, and read, the workspace in one file system",
            )

    def save(self) -> None:
        """Write the state, of all processes, as it is before an update."""
        before = self.relation and self.relation.before
        parts = self.crew.gathered((self.x.cpu(), before and [part.cpu() for part in before]))
        if not self.crew.leads:
            return
        features = before and [whole_batch([of[place] for _, of in parts], self.course.batch) for place in range(2)]
        write_state(self.state_file, {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimiser": self.optimiser.state_dict(), "done": self.done, "losses": self.losses,
            "x": torch.cat([x for x, _ in parts]), "means": self.means, "averages": self.averages,
            "features": features,
        })  # fmt: skip

    @torch.no_grad()  # inside the generator's frames; the student's own pass has gradients
    def walk(self, save_every: int, report: Report) -> None:
        """The rest of one trajectory of the teacher, with an update at each of its steps."""
        course = self.course
        number, first = divmod(self.done, course.steps)
        indices = list(range(number * course.batch, (number + 1) * course.batch))[self.mine]
        conditions = conditions_of(course.seed, indices, self.teacher.info.conditions)
        for step, timestep, x, target in self._visits(number, first, indices, conditions):
            self.x = x
            loss = self._loss(timestep, conditions, target)
            value = self._of_all(loss)
            saves = self.done % save_every == 0 and self.done > 0
            if not math.isfinite(value):
                for at, predicted in self.walked or [(step, target)]:
                    check_teacher(predicted, self.timesteps[at])
            if saves or not math.isfinite(value):
                check_finite(self.student, value, self.timesteps[step])
            if saves:
                self.save()  # the state before this update, which has just been seen to be good
            self._update(step, loss, value)
            report.advance(self.done, loss=value)

    def _visits(
        self, number: int, first: int, indices: list[int], conditions: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(step, timestep, x_t, the teacher's ε) of a trajectory's updates from the `first` on. Those of an order of
        its own are held all at once, since the teacher can only go its own way.
        """
        course, info = self.course, self.teacher.info
        shuffled = self.recipe.order == "shuffled"
        stands = 0 if shuffled else first
        if stands == 0:
            self.x = noise_of(course.seed, indices, info.shape, "distill").to(self.device)
        along = trajectory(
            self.teacher, self.scheduler, info.schedule, course.steps, self.x, conditions, course.guidance, course.eta,
            course.seed, indices, stands,
        )  # fmt: skip
        along = islice(along, course.steps - stands)  # without x_0, of which nothing is learned
        if not shuffled:
            return along
        visited = list(along)
        self.walked = [(step, target) for step, _, _, target in visited]
        return iter([visited[step] for step in steps_of(self.recipe, course, number)[first:]])

    @torch.enable_grad()
    def _loss(self, timestep: torch.Tensor, conditions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        difference = self.student.predict(self.x, timestep, conditions, self.course.guidance) - target
        return difference.square().sum()

    def _of_all(self, loss: torch.Tensor) -> float:
        """The loss of an image, over the parts of all processes."""
        total = loss.detach().clone()
        self.crew.add([total])
        return total.item() / self.course.batch

    @torch.enable_grad()
    def _update(self, step: int, loss: torch.Tensor, value: float) -> None:
        """One step of the optimiser, at a rate that falls linearly to 0."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * (1 - self.done / self.course.updates)
        if self.relation is not None:
            loss = loss + self.relation.term(step)
        if self.recipe.weighting == "timestep":  # of the relation too, whose weight is against the loss as it is
            self.means[step] = value if step not in self.means else 0.8 * self.means[step] + 0.2 * value
            loss = loss / max(self.means[step], 1e-12)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.crew.add([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        for parameter in self.together:  # of the other timesteps: no gradient, but the optimiser moves them on
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()
        self.done += 1
        if self.averages:
            decay = min(self.recipe.ema, (1 + self.done) / (10 + self.done))
            torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.losses.append(value)

    @torch.no_grad()
    def conclude(self) -> None:
        """Leave the student with its averages, where the recipe keeps such, and the networks without hooks."""
        if self.relation is not None:
            self.relation.remove()
        last = steps_of(self.recipe, self.course, self.course.trajectories - 1)[-1]
        check_finite(self.student, self.losses[-1], self.timesteps[last])
        for parameter, average in zip(self.parameters, self.averages, strict=bool(self.averages)):
            parameter.copy_(average)
