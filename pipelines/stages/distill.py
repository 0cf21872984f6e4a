"""Train the quantised student against its full-precision teacher, without data.

Writes `student.safetensors` (scales, timestep tables, adapters: see pipelines/students.py), `plan.yaml` as it was used,
`adapters/` in peft's format, `losses.csv` and `loss.png`, and `guidance.safetensors` and `correction.safetensors` where
the recipe asks for them.
Where the recipe reconstructs blocks instead, `reconstruction.csv` has each block's error before and after.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from pipelines.config import read_yaml
from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.plans import Course, Plan, read_plan, read_sites, write_plan
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "distill"
VERSION = 9
MOST_SEED = 1 << 46  # each layer's adapters are drawn from 100,003 times as much, which torch takes up to 2⁶⁴
MOST = 1_000_000  # trajectories, and images of one: their numbers are held at once


@dataclass(frozen=True)
class Config:
    trajectories: int = 40
    steps: int | None = None  # of a trajectory; the plan's by default
    batch: int = 8  # images of a trajectory; guidance doubles what the denoisers see
    guidance: float | None = None  # the model's
    eta: float | None = None  # 1 where the scheduler has it; of a reconstruction's calibration 0, as in sampling
    seed: int = 0
    save_every: int = field(default=100, metadata={"key": False})  # updates between two saved states
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"key": False})  # like threads: the last bits

    def __post_init__(self):
        for name in ("trajectories", "steps", "batch", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"distill: {name} cannot be {value}", "it takes 1 or more")
        for name in ("trajectories", "batch"):
            if getattr(self, name) > MOST:
                raise UsageError(f"distill: {name} cannot be {getattr(self, name)}", f"it takes {MOST} or less")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UsageError(f"distill: eta cannot be {self.eta:g}", "it takes 0 (DDIM) … 1 (DDPM)")
        if self.seed > MOST_SEED:
            raise UsageError(f"distill: seed cannot be {self.seed}", f"it takes {MOST_SEED} or less")


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The plan, and the model it was made for."""
    plan = store.get(chosen["plan"]) if "plan" in chosen else store.current("plan")
    if plan is None:
        raise HqdmError("there is no plan to distill from", "hqdm plan")
    return {"plan": plan, "model": store.ancestor(plan, "model")}


def shared(config: Config, inputs: Mapping[str, Artifact]) -> bool:
    """Several processes share the trajectories; blocks are reconstructed by one."""
    recipe = read_yaml(inputs["plan"].file("plan.yaml"))["recipe"]
    return recipe["updates"] == "distill" and recipe["reconstruction"] is None


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Distill; figures: updates, first and last loss (means over the first and last trajectory), parameters trained,
    blocks reconstructed, mean share of the guidance that is kept.
    """
    import torch
    from safetensors.torch import load_file

    from pipelines import processes
    from pipelines.diffusion import eta_or, timesteps_of, walker
    from pipelines.distillation.side_by_side import measure_correction, measure_guidance
    from pipelines.distillation.training import distill, steps_of
    from pipelines.kernels import cuda
    from pipelines.models.denoiser import load_denoiser, place
    from pipelines.models.families.base import CLASSIFIER_FREE
    from pipelines.reconstruction.calibration import calibration, rescaled
    from pipelines.reconstruction.learning import reconstruct
    from pipelines.students import groups_at, new_student

    crew = processes.here()
    plan = read_plan(inputs["plan"].file("plan.yaml"), read_sites(inputs["model"].file("sites.json")))
    scales = load_file(inputs["plan"].file("scales.safetensors"))
    anew = plan.recipe.reconstruction
    _check_place(plan, config)
    divided, device = processes.divide_weights(), cuda.place_of(config.device)
    teacher = load_denoiser(inputs["model"].path, mapped=divided)
    steps = config.steps or len(plan.timesteps)
    scheduler = walker(teacher.info.schedule)
    timesteps = timesteps_of(scheduler, teacher.info.schedule, steps)
    guidance, eta = teacher.info.guidance_or(config.guidance), eta_or(config.eta, scheduler, 0.0 if anew else 1.0)
    scales = at_timesteps(scales, timesteps, bool(plan.groups))
    if sorted(timesteps) != sorted(plan.timesteps):
        report.note(f"the plan's scales are for {len(plan.timesteps)} timesteps; those of {steps} are interpolated")
    course = Course(config.trajectories, steps, config.batch, guidance, eta, config.seed)
    if anew:
        calls = calibration(teacher, anew, course, out.work, report)
        if anew.rescale:
            groups, by = groups_at(plan, scales["timesteps"].tolist()), plan.recipe.activation_scale_by
            scales = rescaled(teacher, plan.quantised, scales, groups, calls, course, by, plan.recipe.headroom)
    student = new_student(teacher, plan, scales, config.seed, based=not divided)
    sharded = _divide(teacher, student, plan, scales, device, report) if divided else None
    place(device, teacher.network, student.network, teacher.conditions, student.conditions)

    losses, blocks, learned = [], [], 0
    signal = plan.recipe.guidance_signal if teacher.info.guidance == CLASSIFIER_FREE else 0.0
    if signal and plan.recipe.updates == "distill":  # before, so that it learns to predict as it will sample
        measure = partial(measure_guidance, teacher, student, course, signal, out.work, report, divided)
        student.guidance_shares = crew.told(measure()) if divided else crew.once(measure)
    if plan.recipe.updates == "distill":
        losses = distill(teacher, student, plan.recipe, course, out.work / "state.pt", config.save_every, report)
        learned = sum(value.numel() for value in student.parameters() if value.requires_grad)
    elif anew and anew.learns:
        result = reconstruct(teacher, student, plan.recipe, course, calls, out.work, report)
        scales, blocks, learned = scales | result.codes, result.rows, result.parameters
    else:
        report.note(f"{plan.method} trains nothing: the student is as it was calibrated")
    correct = partial(measure_correction, teacher, student, course, plan.recipe.correction_images, report)
    correction = correct(together=True) if plan.recipe.correction and divided else None
    if not crew.leads:
        return {}

    if signal and plan.recipe.updates != "distill":
        student.guidance_shares = measure_guidance(teacher, student, course, signal, out.work, report)
    if plan.recipe.correction:
        (correction or correct()).save(out.path)
    _write_student(student, plan, scales, out.path)
    orders = [steps_of(plan.recipe, course, number) for number in range(len(losses) // steps)]
    _write_story(losses, orders, timesteps, blocks, out.path)
    return {
        "method": plan.method, "variant": plan.variant, "bits": str(plan.bits), "updates": len(losses),
        "first_loss": _mean(losses[:steps]), "last_loss": _mean(losses[-steps:]), "trained_parameters": learned,
        "blocks": len({row["block"] for row in blocks}),
        "guidance_share": _mean(student.guidance_shares.share.tolist()) if student.guidance_shares else None,
        "threads": torch.get_num_threads(), "device": cuda.name_of(device),
    } | (sharded.figures() if sharded else {})  # fmt: skip


def _check_place(plan: Plan, config: Config) -> None:
    """Refuse to reconstruct where that cannot be: on a device, and with divided weights."""
    from pipelines import processes

    if plan.recipe.updates != "distill" and processes.divides_weights():
        raise UsageError(
            f"{processes.FSDP} asks for weights that are divided among processes, and {plan.method} learns at one",
            "leave FSDP out, or take a method that distills",
        )
    if plan.recipe.updates == "reconstruct" and config.device != "cpu":
        raise UsageError(f"{plan.method} reconstructs blocks on the processor alone", "leave --device out")


def _divide(teacher, student, plan: Plan, scales: dict, device, report: Report):
    """Divide the frozen weights of both among the processes of the job; the student's are taken from its teacher's."""
    from pipelines.sharding import ShardedWeights, settings
    from pipelines.students import set_base

    sharded = ShardedWeights(
        teacher, student, settings(), device, lambda name, layer: set_base(name, layer, plan, scales)
    )
    report.note(sharded.told())
    return sharded


def _write_student(student, plan: Plan, scales: dict, folder: Path) -> None:
    """What export and sampling read, and the adapters as others do."""
    from safetensors.torch import save_file

    from pipelines.quant.layers import quant_layers
    from pipelines.students import student_tensors

    if student.guidance_shares is not None:
        student.guidance_shares.save(folder)
    save_file(student_tensors(student, plan, scales), folder / "student.safetensors")
    (folder / "plan.yaml").write_text(write_plan(plan))
    layers = quant_layers(student.network)
    if any(layer.lora_a is not None for layer in layers.values()):
        write_adapters(layers, plan.recipe.lora_rank, folder / "adapters")


def _write_story(
    losses: list[float], orders: list[list[int]], timesteps: list[float], blocks: list[dict], folder: Path
) -> None:
    """Losses by update, with their picture, and the errors of blocks. orders: the steps of each trajectory as they were
    learned.
    """
    from pipelines.report.curves import loss_curve

    sampled = [0.0] * len(losses)  # in the sampler's order
    with open(folder / "losses.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["update", "trajectory", "timestep", "loss_per_image"])
        for update, loss in enumerate(losses):
            trajectory, place = divmod(update, len(timesteps))
            step = orders[trajectory][place]
            sampled[update - place + step] = loss
            rows.writerow([update + 1, trajectory + 1, f"{timesteps[step]:g}", repr(loss)])
    if blocks:
        with open(folder / "reconstruction.csv", "w", newline="") as file:
            rows = csv.DictWriter(file, list(blocks[0]))
            rows.writeheader()
            rows.writerows(blocks)
    if losses:
        loss_curve({"student": sampled}, timesteps, folder / "loss.png")


def at_timesteps(scales: dict, timesteps: list[float], grouped: bool = False) -> dict:
    """A plan's scales at other timesteps, by the tables' own interpolation, or where timesteps share scales in groups
    those of the nearest.
    """
    import torch

    from pipelines.quant.tables import TimestepTables

    names = [key.removesuffix("/activation_scale") for key in scales if key.endswith("/activation_scale")]
    tables = TimestepTables(
        scales["timesteps"].tolist(),
        torch.stack([scales[f"{name}/activation_scale"] for name in names], 1),
        torch.stack([scales[f"{name}/activation_zero"] for name in names], 1),
    )
    wanted = sorted(timesteps)
    rows = []
    for timestep in wanted:
        tables.set_timestep(min(tables.timesteps, key=lambda known: abs(known - timestep)) if grouped else timestep)
        rows.append([tables.of(index) for index in range(len(names))])
    result = dict(scales) | {"timesteps": torch.tensor(wanted, dtype=torch.float64)}
    for index, name in enumerate(names):
        result[f"{name}/activation_scale"] = torch.stack([row[index][0] for row in rows]).detach()
        result[f"{name}/activation_zero"] = torch.stack([row[index][1] for row in rows]).detach()
    return result


def write_adapters(layers: Mapping, rank: int, folder: Path) -> None:
    """The adapters as peft writes them: merged into the base weight they give W + BA exactly (alpha = rank)."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        if layer.lora_a is None:
            continue
        a, b = layer.lora_a.detach().cpu(), layer.lora_b.detach().cpu()
        if layer.weight.ndim == 4:
            b = b[:, :, None, None]
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers), lora_dropout=0.0).save_pretrained(folder)
    # peft writes its set of names in the order of their hashes, which is another one in every process.
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"target_modules": sorted(written["target_modules"])}, indent=2) + "\n")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
