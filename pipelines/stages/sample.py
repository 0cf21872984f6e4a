"""Sample images from the teacher, the fake-quantised student or the integer model.

Writes `images/000000.png` …, `samples.npz` (arr_0 uint8 NHWC, arr_1 the number of each one's class or prompt:
guided-diffusion's layout) and `grid.png`. The noise and condition of image i depend on the seed and i alone. Batches
are fixed by `batch`, which is part of the key, because the composition of a batch moves floating-point rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.kernels import ON_DEVICE
from pipelines.plans import read_plan, read_sites
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "sample"
VERSION = 6
MAKERS = {"teacher": "model", "fake": "distill", "int": "export"}  # source -> stage
MOST_IMAGES = 300_000  # whose names and hashes a manifest holds
FIRST = {"teacher": "hqdm profile model.ckpt", "fake": "hqdm distill --bits w4a4", "int": "hqdm export --format int"}


@dataclass(frozen=True)
class Config:
    source: Literal["teacher", "fake", "int"] = "int"
    count: int = 1000
    steps: int = 20
    eta: float = 0.0
    guidance: float | None = None  # the model's
    scheduler: str | None = None  # a name of diffusers; DDIM's, or flow matching's Euler
    seed: int = 0
    batch: int = 50
    backend: Literal["cpu", "reference", "cuda", "cuda-bf16"] | None = None  # of the integer model; cpu by default
    attention: Literal["fp32", "int8"] = "fp32"  # what a student's attention multiplies in
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"key": False})  # of teacher and fake student
    low_memory: bool = field(default=False, metadata={"key": False})  # takes longer; the images are the same

    def __post_init__(self):
        for name in ("count", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"sample: {name} cannot be {getattr(self, name)}", "it takes 1 or more")
        if self.count > MOST_IMAGES:
            raise UsageError(f"sample: count cannot be {self.count}", f"it takes {MOST_IMAGES} or less")
        if not 0 <= self.eta <= 1:
            raise UsageError(f"sample: eta cannot be {self.eta:g}", "it takes 0 (DDIM) … 1 (DDPM)")
        if self.attention != "fp32" and (self.backend in ON_DEVICE or self.device != "cpu"):
            raise UsageError(f"--attention {self.attention} is compiled for processors alone", "leave it out")
        if self.device != "cpu" and self.source == "int":
            raise UsageError(f"--device {self.device} is for teacher and fake student", f"--backend {self.device}")


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """What makes the images, and for a fake student its teacher."""
    stage = MAKERS[config.source]

    def fits(artifact: Artifact) -> bool:
        return artifact.stage == stage and artifact.config.get("format", "int") == "int"

    maker = store.get(chosen["source"]) if "source" in chosen else store.current(stage, fits)
    if maker is None:
        raise HqdmError(f"there is no {stage} artifact to sample from", FIRST[config.source])
    if not fits(maker):
        raise UsageError(
            f"{maker.id} is not what {config.source} samples from", f"name a {stage} artifact: --from {stage}/1"
        )
    if config.backend is not None and config.source != "int":
        raise UsageError(f"--backend chooses integer kernels, and {config.source} has none", "leave --backend out")
    if config.attention != "fp32" and config.source == "teacher":
        raise UsageError(f"--attention {config.attention} is for students, not for the teacher", "leave it out")
    return {"source": maker} | ({"model": store.ancestor(maker, "model")} if config.source == "fake" else {})


def shared(config: Config, inputs: Mapping[str, Artifact]) -> bool:
    """Several processes are dealt the batches."""
    return True


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Sample; figures: images per second (of the denoising loop, all batches; of one process), bytes of the model's
    files, source.
    """
    import torch

    from pipelines import native, processes
    from pipelines.diffusion import conditions_of, timesteps_of, walker
    from pipelines.kernels import cuda
    from pipelines.kernels.layers import forget_weights
    from pipelines.memory import return_freed_memory
    from pipelines.replay import ReplayedSteps
    from pipelines.report.grids import save_grid
    from pipelines.sampling import Batches, Walk, decode, draw

    maker = inputs["source"]
    device, divided = cuda.place_of(config.device), config.source != "int" and processes.divide_weights()
    model = _denoiser(config, inputs, device, divided, report)
    model.check_images()
    info = model.info
    guidance, scheduler = info.guidance_or(config.guidance), config.scheduler or walker(info.schedule)
    timesteps = timesteps_of(scheduler, info.schedule, config.steps)
    interpolated = _warn_of_other_work(model, timesteps, guidance, report)
    conditions = conditions_of(config.seed, list(range(config.count)), info.conditions)
    if config.low_memory:
        return_freed_memory()
    predictor = model
    if config.backend in ON_DEVICE:
        device = cuda.device()
        predictor = ReplayedSteps(model, timesteps, guidance, device)

    batches = Batches(out.work, config.count, config.batch, report)
    walk = Walk(scheduler, config.steps, guidance, config.eta, config.seed)
    report.begin(f"sample {config.source}", config.count, batches.done("latents"), unit="images")
    draw(model, predictor, batches, conditions, walk, device, report, divided)
    report.advance(config.count)
    report.end()

    # Decoding comes after all sampling, when a large model's weights have left memory, and the graphs that read them.
    if config.backend in ON_DEVICE:
        predictor.forget()
    forget_weights(model.network)
    shown = Report() if model.first_stage is None else report
    shown.begin("decode", config.count, unit="images")
    decode(model.decode, batches, device, shown)
    shown.end()
    if not processes.here().leads:
        return {}

    images = _gathered(batches, out.work / "images.npy")
    _write_pngs(images, out.path / "images", report)
    _write_npz(images, conditions.numpy(), out.path / "samples.npz")
    save_grid(images[:100], out.path / "grid.png")
    of_student = () if config.source == "teacher" else ("method", "variant", "bits")
    return {
        "source": config.source, "count": config.count, "scheduler": scheduler, "guidance": guidance,
        "images_per_second": config.count / batches.seconds(), "bytes": _bytes(config, inputs),
        "interpolated_timesteps": interpolated,
        "backend": config.backend or ("cpu" if config.source == "int" else None),
        "attention": config.attention, "compiled": native.library() is not None,
        "threads": torch.get_num_threads(), "device": cuda.name_of(device),
    } | {key: maker.figures.get(key) for key in of_student}  # fmt: skip


def _denoiser(config: Config, inputs: Mapping[str, Artifact], device, divided: bool, report: Report):
    """The model that is sampled from, where it computes. divided: whether its weights are, among processes."""
    from pipelines import native, processes
    from pipelines.kernels.attention import choose_products
    from pipelines.kernels.layers import shorten
    from pipelines.models.denoiser import load_denoiser, place
    from pipelines.students import freeze_weights, load_fake, load_integer

    maker, teacher = inputs["source"], None
    if config.source == "teacher":
        model = load_denoiser(maker.path, mapped=divided)
    elif config.source == "fake":
        plan = read_plan(maker.file("plan.yaml"), read_sites(inputs["model"].file("sites.json")))
        teacher = load_denoiser(inputs["model"].path, mapped=divided)
        model = load_fake(teacher, plan, maker.file("student.safetensors"), freeze=False)
    else:
        if processes.divides_weights():
            report.note("sample: packed integers stay whole at each process; FSDP divides floating-point weights")
        model = load_integer(maker.path, config.backend or "cpu")
        if native.library() is None and config.backend not in ON_DEVICE:
            report.warn(f"no compiled kernels, so this takes longer: {native.state().why_not}; see hqdm doctor")
    if divided:
        from pipelines.sharding import ShardedWeights, settings

        pair = (model, None) if config.source == "teacher" else (teacher, model)
        report.note(ShardedWeights(*pair, settings(), device).told())
        if config.source == "fake":  # as frozen ones are, whose bits it has
            shorten(model.network)
    if config.source != "int":
        place(device, model)
    if config.source == "fake" and not divided:
        freeze_weights(model)
    if config.source != "teacher":
        choose_products(model.network, config.attention)
    return model


def _bytes(config: Config, inputs: Mapping[str, Artifact]) -> int:
    """Of the files that hold the model's weights."""
    weights = inputs["model" if config.source == "fake" else "source"]
    names = {"int": "model.safetensors"}.get(config.source, "denoiser/diffusion_pytorch_model.safetensors")
    files = [weights.file(names)]
    if config.source == "fake":
        files.append(inputs["source"].file("student.safetensors"))
    return sum(file.stat().st_size for file in files)


def _warn_of_other_work(model, timesteps: list[float], guidance: float, report: Report) -> int:
    """Say where a student was made for other timesteps or guidance; how many of these timesteps are interpolated."""
    tables = getattr(model.network, "timestep_tables", None)
    interpolated = 0 if tables is None else sum(not tables.covers([step]) for step in timesteps)
    if interpolated:
        report.warn(
            f"the scales were learned at {len(tables.timesteps)} timesteps; "
            f"{interpolated} of these {len(timesteps)} are interpolated between them"
        )
    for what, kept in (("correction was measured", model.correction), ("student was distilled", model.guidance_shares)):
        known = None if kept is None or kept.guidance is None else kept.guidance.item()
        if known is not None and abs(known - guidance) > 1e-6:
            report.warn(f"the {what} at guidance {known:g}, and this is {guidance:g}")
    return interpolated


def _gathered(batches, path: Path):
    """All images, uint8 NHWC; in a file, since those of a large job would take all memory."""
    import numpy as np

    first = batches.read("images", batches.starts[0])
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (batches.count, *first.shape[1:]))
    for start in batches.starts:
        images[start : start + batches.size_of[start]] = batches.read("images", start)
    return images


def _write_pngs(images, folder, report: Report) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    report.begin("write", len(images), unit="images")
    for index, image in enumerate(images):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{index:06d}.png")
        report.advance(index + 1)
    report.end()


def _write_npz(images, classes, path) -> None:
    """A compressed .npz whose bytes depend on its content alone (numpy stamps no times into it)."""
    import numpy as np

    with open(path, "wb") as file:
        np.savez_compressed(file, arr_0=images, arr_1=classes)
