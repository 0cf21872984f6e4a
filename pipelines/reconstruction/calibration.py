"""What reconstruction learns on: calls of the teacher's denoiser on its own trajectories, each at one timestep.

Spread over the timesteps evenly (Q-Diffusion) or normally (PTQ4DM, Shang et al., CVPR 2023). Static scales can be found
anew on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.diffusion import conditions_of, generator, noise_of, timesteps_of, trajectory, walker
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course, Reconstruction
from pipelines.quant.candidates import initial
from pipelines.quant.hadamard import rotate_activation
from pipelines.quant.spec import HALVES, Site, SitePlan
from pipelines.quant.surroundings import Surroundings
from pipelines.states import read_state, write_state

MIXED = 4  # calls of an iteration
VALUES = 4096  # that a call gives to the search for a site's activation scale


@dataclass(frozen=True)
class Call:
    """Some images of the calibration at one timestep: x (N, C, H, W), conditions (N,) int64."""

    timestep: float
    x: torch.Tensor
    conditions: torch.Tensor


@torch.no_grad()
def calibration(
    teacher: Denoiser, settings: Reconstruction, course: Course, folder: Path, report: Report
) -> list[Call]:
    """Calls at timesteps spread over the teacher's trajectories: evenly, or normally (PTQ4DM: one draw a call).

    As many as there are timesteps × images in the settings; an image is seen at several timesteps. Kept in `folder`.
    """
    if (kept := read_state(folder / "calibration.pt", report)) is not None:
        return [Call(*parts) for parts in kept]
    schedule, info = teacher.info.schedule, teacher.info
    scheduler = walker(schedule)
    timesteps = timesteps_of(scheduler, schedule, course.steps)
    count = min(settings.images, course.trajectories * course.batch)
    visited: list[list[torch.Tensor]] = [[] for _ in timesteps]  # by step
    every = list(range(count))
    conditions = conditions_of(course.seed, every, info.conditions)
    report.begin("calibration", count, unit="trajectories")
    for start in range(0, count, course.batch):
        mine = every[start : start + course.batch]
        steps = trajectory(
            teacher, scheduler, schedule, course.steps, noise_of(course.seed, mine, info.shape, "calibration"),
            conditions[mine], course.guidance, course.eta, course.seed, mine,
        )  # fmt: skip
        for step, _, x, _ in steps:
            if step < course.steps:
                visited[step].append(x)
        report.advance(start + len(mine))
    report.end()
    rows = max(1, course.batch // MIXED)
    parts = [every[start : start + rows] for start in range(0, count, rows)]
    number = min(settings.timesteps, course.steps)
    if settings.spread == "even":
        places = [index * course.steps // number for index in range(number) for _ in parts]
    else:
        places = [_normal_place(settings, course, index) for index in range(number * len(parts))]
    calls = []
    for index, place in enumerate(places):
        part = parts[index % len(parts)]
        calls.append(Call(timesteps[place], torch.cat(visited[place])[part], conditions[part]))
    write_state(folder / "calibration.pt", [(call.timestep, call.x, call.conditions) for call in calls])
    return calls


def _normal_place(settings: Reconstruction, course: Course, index: int) -> int:
    """A step of the trajectory, normally distributed around a mean that is counted from the image (PTQ4DM)."""
    draw = torch.randn((), generator=generator(course.seed, index, "calibration timestep")).item()
    from_image = round((settings.normal_mean + settings.normal_deviation * draw) * course.steps)
    return course.steps - 1 - min(max(from_image, 0), course.steps - 1)


@torch.no_grad()
def rescaled(
    teacher: Denoiser,
    plans: Sequence[SitePlan],
    scales: Mapping[str, torch.Tensor],
    groups: Sequence[int] | None,
    calls: Sequence[Call],
    course: Course,
    by: str,
    headroom: float,
) -> dict[str, torch.Tensor]:
    """A plan's tensors with activation scales and zero-points found on the calibration instead of on the profile.

    groups: of each of the tensors' timesteps, ascending; None: each its own. A group that no call is of keeps what it
    has. by, headroom: as `candidates.initial` takes them.
    """  # fmt: skip
    timesteps = scales["timesteps"].tolist()
    groups = list(range(len(timesteps))) if groups is None else groups
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    readers: dict[str, list[tuple[SitePlan, Surroundings]]] = {}
    for plan in plans:
        tensors = {
            name: scales[f"{plan.site.name}/{name}"]
            for name in ("gain", "centre")
            if f"{plan.site.name}/{name}" in scales
        }
        readers.setdefault(module_name(plan.site.name), []).append((plan, Surroundings(plan, tensors)))
    number = group = 0

    def reads(plans: list[tuple[SitePlan, Surroundings]]):
        def hook(_module, args):
            for plan, surroundings in plans:
                values = _values(_part(args[0], plan.site), plan, surroundings)
                places = torch.randint(len(values), (VALUES,), generator=generator(course.seed, number, plan.site.name))
                kept = values if len(values) <= VALUES else values[places]
                seen.setdefault((plan.site.name, group), []).append(
                    torch.cat([kept, values.aminmax().min[None], values.max()[None]]) if by == "max" else kept
                )

        return hook

    handles = [
        teacher.network.get_submodule(name).register_forward_pre_hook(reads(mine)) for name, mine in readers.items()
    ]
    for number, call in enumerate(calls):  # noqa: B007 the hooks read it
        row = min(range(len(timesteps)), key=lambda row: abs(timesteps[row] - call.timestep))
        group = groups[row]
        predict(teacher, call, course.guidance)
    for handle in handles:
        handle.remove()
    result = dict(scales)
    for plan in plans:
        name = plan.site.name
        scale, zero = (scales[f"{name}/activation_{what}"].clone() for what in ("scale", "zero"))
        for group in set(groups):
            if (name, group) not in seen:
                continue
            mine = torch.tensor([other == group for other in groups])
            found = initial(torch.cat(seen[name, group])[None], plan, by, headroom)
            scale[mine], zero[mine] = (value[0] for value in found)
        result |= {f"{name}/activation_scale": scale, f"{name}/activation_zero": zero}
    return result


def module_name(site: str) -> str:
    """The teacher's layer of a site or of a half of one."""
    whole, _, last = site.rpartition(".")
    return whole if last in HALVES else site


def _part(x: torch.Tensor, site: Site) -> torch.Tensor:
    """The site's channels of its layer's input."""
    channel = 1 if site.kind == "conv" else -1
    start = x.shape[channel] - site.channels if site.name.endswith(f".{HALVES[1]}") else 0
    return x.narrow(channel, start, site.channels)


def _values(x: torch.Tensor, plan: SitePlan, surroundings: Surroundings) -> torch.Tensor:
    """What a site's activation quantiser sees, flat."""
    return rotate_activation(surroundings.before(x)[0], plan.transform, plan.site.kind == "conv").flatten()


def predict(denoiser: Denoiser, call: Call, guidance: float) -> torch.Tensor:
    return denoiser.predict(call.x, torch.tensor(call.timestep), call.conditions, guidance)
