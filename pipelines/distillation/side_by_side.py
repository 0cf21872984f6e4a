"""What is measured of teacher and student at the same x_t: shares of guidance before training, a correction after."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipelines import processes
from pipelines.diffusion import conditions_of, noise_of, timesteps_of, trajectory, walker
from pipelines.distillation.checks import check_student, check_teacher
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course
from pipelines.quant.correction import Correction, Moments
from pipelines.quant.guidance import Differences, GuidanceShares
from pipelines.quant.layers import quant_layers
from pipelines.states import read_state, write_state

GUIDANCE_IMAGES = 32  # on which the shares of guidance are measured, at most


@contextmanager
def _frozen(student: Denoiser, together: bool) -> Iterator[None]:
    """Inside, the student's layers compute their weights' integers once, as in sampling; the same at every call where
    weights are divided, since integers kept would be whole.
    """
    layers = () if together else quant_layers(student.network).values()
    for layer in layers:
        layer.freeze()
    try:
        yield
    finally:
        for layer in layers:
            layer._frozen = None


def _side_by_side(
    teacher: Denoiser, student: Denoiser, course: Course, images: int, purpose: str, report: Report, together: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(x_t, timestep, conditions, the teacher's prediction) along trajectories of the teacher without noise after the
    start, as in sampling; noise and conditions are the purpose's own. course.batch images stand in memory at once.
    """
    info, scheduler = teacher.info, walker(teacher.info.schedule)
    device = next(student.network.timestep_tables.parameters()).device
    starts = range(0, images, course.batch)
    report.begin(purpose, len(starts) * course.steps)
    with _frozen(student, together):
        for done, start in enumerate(starts):
            indices = list(range(start, min(start + course.batch, images)))
            x = noise_of(course.seed, indices, info.shape, purpose).to(device)
            conditions = conditions_of(course.seed, indices, info.conditions, f"{purpose} classes")
            for step, timestep, x_t, target in trajectory(
                teacher, scheduler, info.schedule, course.steps, x, conditions, course.guidance, 0.0, course.seed,
                indices,
            ):  # fmt: skip
                if step == course.steps:
                    break
                check_teacher(target, float(timestep))
                yield x_t, timestep, conditions, target
                report.advance(done * course.steps + step + 1)
    report.end()


@torch.no_grad()
def measure_guidance(
    teacher: Denoiser, student: Denoiser, course: Course, signal: float, folder: Path, report: Report,
    together: bool = False,
) -> GuidanceShares:  # fmt: skip
    """What share of the guidance the student, as it is, keeps at every timestep of the course.

    Both predict under the condition and under none at the same x_t of trajectories of the teacher: GUIDANCE_IMAGES, or
    a fifth of what is distilled on. signal: the recipe's `guidance_signal`. Kept in `folder`.
    together: whether every process of the job measures all of it, as where weights are divided and each gathers them.

    All of it where the course is not guided: what the student does not learn to make up for is not taken from it.
    """
    asked = torch.tensor(float(course.guidance))
    if course.guidance <= 1:
        schedule = teacher.info.schedule
        timesteps = sorted(timesteps_of(walker(schedule), schedule, course.steps))
        return GuidanceShares(torch.tensor(timesteps, dtype=torch.float64), torch.ones(len(timesteps)), asked)
    crew = processes.here() if together else processes.ALONE
    if (kept := crew.once(lambda: read_state(folder / "guidance.pt", report))) is not None:
        return GuidanceShares(*kept)
    differences: dict[float, Differences] = {}
    images = min(GUIDANCE_IMAGES, max(course.batch, course.trajectories * course.batch // 5))
    for x, timestep, conditions, _ in _side_by_side(teacher, student, course, images, "guidance", report, together):
        null = torch.full_like(conditions, teacher.info.conditions)
        true, mine = (
            model.predict(x, timestep, conditions, 1.0) - model.predict(x, timestep, null, 1.0)
            for model in (teacher, student)
        )
        check_student(mine, float(timestep), "guidance")
        differences.setdefault(float(timestep), Differences()).add(true, mine)
    timesteps = sorted(differences)
    shares = torch.tensor([differences[step].share(signal) for step in timesteps])
    shown = ", ".join(f"{step:g}: {share:.2f}" for step, share in zip(timesteps, shares.tolist(), strict=True))
    report.note(f"share of the guidance that is kept, by timestep: {shown}")
    result = torch.tensor(timesteps, dtype=torch.float64), shares, asked
    if crew.leads:
        write_state(folder / "guidance.pt", result)
    return GuidanceShares(*result)


@torch.no_grad()
def measure_correction(
    teacher: Denoiser, student: Denoiser, course: Course, images: int, report: Report, together: bool = False
) -> Correction:
    """What can be taken out of a trained student's predictions at every timestep of the course.

    Both predict at the same x_t of `images` trajectories of the teacher (η = 0, as PTQD's code). `together` as above.
    """
    moments: dict[float, Moments] = {}
    for x, timestep, conditions, target in _side_by_side(
        teacher, student, course, images, "correction", report, together
    ):
        predicted = student.predict(x, timestep, conditions, course.guidance)
        check_student(predicted, float(timestep), "correction")
        moments.setdefault(float(timestep), Moments()).add(target, predicted)
    timesteps = sorted(moments)
    fitted = zip(*(moments[step].fit() for step in timesteps), strict=True)
    slope, bias, deviation = (torch.stack(values) for values in fitted)
    return Correction(
        torch.tensor(timesteps, dtype=torch.float64), slope, bias, deviation, torch.tensor(float(course.guidance))
    )
