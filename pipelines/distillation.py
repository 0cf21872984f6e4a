"""The training loop: the student follows its teacher along the teacher's own trajectories, without data.

Source: HQ-DM, equation 12, and the public code of EfficientDM and HQ-DM: the teacher runs DDIM from noise, at every
step the student sees the same x_t, one optimiser step follows, and the teacher's ε carries the trajectory on. The loss
is the squared error, summed, of the two guided ε: the teacher's as asked, the student's by its shares where it has
such.

Every draw is a function of (seed, trajectory, step), so the loop's whole state is its parameters, the optimiser's
moments and the x_t it stands at: saved now and then, and a run killed anywhere ends with the bits of one that was not.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional as F

from pipelines import processes
from pipelines.diffusion import conditions_of, noise_of, timesteps_of, trajectory, walker
from pipelines.errors import HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.models.denoiser import Denoiser
from pipelines.plans import Course, Recipe
from pipelines.quant.absent import Absent
from pipelines.quant.correction import Correction, Moments
from pipelines.quant.guidance import Differences, GuidanceShares
from pipelines.quant.layers import quant_layers
from pipelines.quant.tables import TimestepTables
from pipelines.states import read_state, write_state

GUIDANCE_IMAGES = 32  # on which the shares of guidance are measured, at most
MOST_POSITIONS = 1024  # that are compared with each other
WEIGHT_DECAY = 0.01  # of the adapters; scales have none


def parameter_groups(student: Denoiser, recipe: Recipe) -> list[dict]:
    """Trained parameters with their peak learning rates (facts of the recipe; `rate` is what the decay multiplies).

    A layer's adapters learn at mean(weight scale)/divisor: scale-aware optimisation, EfficientDM.
    """
    layers = quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    chosen = [layer for layer in layers.values() if not recipe.roles or layer.plan.site.role in recipe.roles]
    groups: list[dict] = []
    if "adapters" in recipe.trains:
        groups += [
            {"params": [layer.lora_a, layer.lora_b], "weight_decay": WEIGHT_DECAY,
             "rate": layer.weight_scale.mean().item() / recipe.lora_rate_divisor}
            for layer in chosen
        ]  # fmt: skip
    if "weights" in recipe.trains:
        groups.append({"params": [layer.weight for layer in chosen], "rate": recipe.weight_rate})
    if "biases" in recipe.trains:
        groups.append({"params": [layer.bias for layer in chosen], "rate": recipe.bias_rate})
    if "weight_scales" in recipe.trains and recipe.weight_scale_rate_divisor:
        groups += [
            {"params": [layer.weight_scale],
             "rate": layer.weight_scale.mean().item() / recipe.weight_scale_rate_divisor}
            for layer in chosen
        ]  # fmt: skip
    elif "weight_scales" in recipe.trains:
        groups.append({"params": [layer.weight_scale for layer in chosen], "rate": recipe.weight_scale_rate})
    if "activation_scales" in recipe.trains:
        groups.append({"params": list(tables.scale), "rate": recipe.activation_scale_rate})
    if "zero_points" in recipe.trains:
        groups.append({"params": list(tables.zero), "rate": recipe.zero_point_rate})
    if tables.factor is not None:
        groups.append({"params": list(tables.factor), "rate": recipe.activation_scale_rate})
    return [{"weight_decay": 0.0, "lr": 0.0} | group for group in groups if group["rate"] > 0 and group["params"]]


class _Relation:
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


def check_finite(student: Denoiser, loss: float, timestep: float) -> None:
    """NumericalFault that names the timestep and, where a parameter is the cause, its site."""
    layers = quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    way_out = "distill with lower rates (the recipe in a plan edited by hand); the last good state is kept in the draft"
    bad = [
        f"{what} of site {name}"
        for name, layer in layers.items()
        for what, values, positive in (
            # Its backward pass carries NaN from an adapter or a weight to the scale: the cause comes first.
            ("an adapter", layer.lora_a, False),
            ("an adapter", layer.lora_b, False),
            ("a weight", layer.weight if layer.weight.requires_grad else None, False),
            ("a bias", layer.bias, False),
            ("the weight scale", layer.weight_scale, True),
        )
        if values is not None
        and not isinstance(values, Absent)  # divided among processes, and not gathered now
        and not bool(((values > 0) & (values < math.inf)).all() if positive else torch.isfinite(values).all())
    ]
    known_tensors = tables.raw()
    scale, names = known_tensors["scale"], list(layers)
    for what, good in (("scale", (scale > 0) & scale.isfinite()), ("zero-point", known_tensors["zero"].isfinite())):
        bad += [
            f"the activation {what} of site {names[column]} at timestep {tables.timesteps[row]:g}"
            for row, column in (~good).nonzero().tolist()
        ]
    factor = known_tensors.get("factor")
    if factor is not None and not bool(((factor > 0) & factor.isfinite()).all()):
        bad.append("a weight factor")
    if bad:
        what = f"{bad[0]} is not a positive number or not finite, found at timestep {timestep:g}"
        raise NumericalFault(what, way_out)
    if not math.isfinite(loss):
        raise NumericalFault(f"the loss is {loss} at timestep {timestep:g}", way_out)


def _check_teacher(target: torch.Tensor, timestep: float) -> None:
    """NumericalFault where it is the teacher that goes wrong."""
    if not target.isfinite().all():
        raise NumericalFault(
            f"the teacher's prediction holds NaN or Inf at timestep {timestep:g}",
            "profile with as many --steps, --guidance and --eta as this run has: it names the site",
        )


def _check_student(predicted: torch.Tensor, timestep: float, purpose: str) -> None:
    if not predicted.isfinite().all():
        raise NumericalFault(
            f"{purpose}: the student's prediction holds NaN or Inf at timestep {timestep:g}",
            "distill again at lower rates (the recipe in a plan edited by hand)",
        )


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
    schedule, info = teacher.info.schedule, teacher.info
    groups = parameter_groups(student, recipe)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UsageError(
            "the recipe trains nothing: no rate is above 0 among what it trains",
            "name something in trains and roles, or set updates: none",
        )
    crew = processes.here()
    if crew.count > course.batch:
        raise UsageError(
            f"{crew.count} processes cannot share trajectories in batches of {course.batch}",
            f"take --batch {crew.count} or more, or fewer processes",
        )
    mine, device = crew.part(course.batch), parameters[0].device
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups)
    scheduler = walker(schedule)
    timesteps = timesteps_of(scheduler, schedule, course.steps)
    done, losses, x = 0, [], None
    means: dict[int, float] = {}  # running means of the loss, by step
    relation = _Relation(teacher, student, recipe.relation) if recipe.relation else None
    averages = [parameter.detach().clone() for parameter in parameters] if recipe.ema else []
    state = read_state(state_file, report)
    if state is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimiser.load_state_dict(state["optimiser"])
        done, losses, x = state["done"], state["losses"], state["x"][mine].to(device)
        means, averages = state["means"], [average.to(device) for average in state["averages"]]
        if relation is not None and state["features"] is not None:
            relation.before = [_rows_of(mine, features, course.batch).to(device) for features in state["features"]]
        report.note(f"goes on after update {done} of {course.updates}")
    if len(stand := set(crew.gathered(done))) > 1:  # sums of their gradients would be of different steps
        raise HqdmError(
            f"the processes of this job go on after different updates: {', '.join(map(str, sorted(stand)))}",
            "let all of them see, and read, the workspace in one file system",
        )

    def save() -> None:
        parts = crew.gathered((x.cpu(), relation and relation.before and [part.cpu() for part in relation.before]))
        if not crew.leads:
            return
        features = relation and relation.before and [
            _whole([before[place] for _, before in parts], course.batch) for place in range(2)
        ]  # fmt: skip
        write_state(state_file, {
            "parameters": [parameter.detach() for parameter in parameters], "optimiser": optimiser.state_dict(),
            "done": done, "losses": losses, "x": torch.cat([x for x, _ in parts]), "means": means,
            "averages": averages, "features": features,
        })  # fmt: skip

    report.begin("distill", course.updates, done, unit="updates")
    while done < course.updates:
        number, first = divmod(done, course.steps)
        indices = list(range(number * course.batch, (number + 1) * course.batch))[mine]
        conditions = conditions_of(course.seed, indices, info.conditions)
        if first == 0:
            x = noise_of(course.seed, indices, info.shape, "distill").to(device)
        # No gradient inside the generator's frames; it is resumed under grad mode for the student's own pass.
        with torch.no_grad():
            steps = trajectory(
                teacher,
                scheduler,
                schedule,
                course.steps,
                x,
                conditions,
                course.guidance,
                course.eta,
                course.seed,
                indices,
                first,
            )
            for step, timestep, x, target in steps:
                if step == course.steps:
                    break
                with torch.enable_grad():
                    difference = student.predict(x, timestep, conditions, course.guidance) - target
                    loss = difference.square().sum()
                total = loss.detach().clone()
                crew.add([total])
                value = total.item() / course.batch
                saves = done % save_every == 0 and done > 0
                if not math.isfinite(value):
                    _check_teacher(target, timesteps[step])
                if saves or not math.isfinite(value):
                    check_finite(student, value, timesteps[step])
                if saves:
                    save()  # the state before this update, which has just been seen to be good
                for group in optimiser.param_groups:
                    group["lr"] = group["rate"] * (1 - done / course.updates)
                if recipe.weighting == "timestep":
                    means[step] = value if step not in means else 0.8 * means[step] + 0.2 * value
                    with torch.enable_grad():
                        loss = loss / max(means[step], 1e-12)
                if relation is not None:
                    with torch.enable_grad():
                        loss = loss + relation.term(step)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                crew.add([parameter.grad for parameter in parameters if parameter.grad is not None])
                optimiser.step()
                done += 1
                if averages:
                    decay = min(recipe.ema, (1 + done) / (10 + done))
                    torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
                losses.append(value)
                report.advance(done, loss=value)
    report.end()
    if relation is not None:
        relation.remove()
    check_finite(student, losses[-1], timesteps[-1])
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=bool(averages)):
            parameter.copy_(average)
    return losses


def _whole(parts: list[torch.Tensor], batch: int) -> torch.Tensor:
    """The features of a whole batch from those of its parts by process: (k·n, …), where a guided network's rows are k
    = 2 halves of all images, those without conditions first.
    """
    halves = sum(map(len, parts)) // batch
    return torch.cat([part.unflatten(0, (halves, -1)) for part in parts], 1).flatten(0, 1)


def _rows_of(mine: slice, whole: torch.Tensor, batch: int) -> torch.Tensor:
    """One process's part of what `_whole` put together."""
    return whole.unflatten(0, (-1, batch))[:, mine].flatten(0, 1)


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
                _check_teacher(target, float(timestep))
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
        _check_student(mine, float(timestep), "guidance")
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
        _check_student(predicted, float(timestep), "correction")
        moments.setdefault(float(timestep), Moments()).add(target, predicted)
    timesteps = sorted(moments)
    fitted = zip(*(moments[step].fit() for step in timesteps), strict=True)
    slope, bias, deviation = (torch.stack(values) for values in fitted)
    return Correction(
        torch.tensor(timesteps, dtype=torch.float64), slope, bias, deviation, torch.tensor(float(course.guidance))
    )
