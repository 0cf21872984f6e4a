"""Sample images from the teacher, the fake-quantised student or the integer model.

Writes `images/000000.png` …, `samples.npz` (arr_0 uint8 NHWC, arr_1 the number of each one's class or prompt:
guided-diffusion's layout) and `grid.png`. The noise and condition of image i depend on the seed and i alone. Batches
are fixed by `batch`, which is part of the key, because the composition of a batch moves floating-point rounding.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.kernels import ON_DEVICE
from pipelines.plans import read_plan, read_sites
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "sample"
VERSION = 5
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
    if config.attention != "fp32" and (config.backend in ON_DEVICE or config.device != "cpu"):
        raise UsageError(f"--attention {config.attention} is compiled for processors alone", "leave it out")
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
    import numpy as np
    import torch

    from pipelines import diffusion, native, processes
    from pipelines.kernels import cuda
    from pipelines.kernels.attention import choose_products
    from pipelines.kernels.layers import check_inputs, forget_weights, shorten
    from pipelines.memory import return_freed_memory, trim
    from pipelines.models.denoiser import load_denoiser, place
    from pipelines.replay import ReplayedSteps
    from pipelines.report.grids import save_grid
    from pipelines.students import freeze_weights, load_fake, load_integer

    maker, crew = inputs["source"], processes.here()
    plan = None
    divided = config.source != "int" and processes.divide_weights()
    device = cuda.place_of(config.device)
    if config.source == "teacher":
        model = load_denoiser(maker.path, mapped=divided)
        size = maker.file("denoiser/diffusion_pytorch_model.safetensors").stat().st_size
    elif config.source == "fake":
        sites = read_sites(inputs["model"].file("sites.json"))
        plan = read_plan(maker.file("plan.yaml"), sites)
        teacher = load_denoiser(inputs["model"].path, mapped=divided)
        model = load_fake(teacher, plan, maker.file("student.safetensors"), freeze=False)
        weights = inputs["model"].file("denoiser/diffusion_pytorch_model.safetensors")
        size = weights.stat().st_size + maker.file("student.safetensors").stat().st_size
    else:
        if processes.divides_weights():
            report.note("sample: packed integers stay whole at each process; FSDP divides floating-point weights")
        model = load_integer(maker.path, config.backend or "cpu")
        if native.library() is None and config.backend not in ON_DEVICE:
            report.warn(f"no compiled kernels, so this takes longer: {native.state().why_not}; see hqdm doctor")
        size = maker.file("model.safetensors").stat().st_size
    if divided:
        from pipelines.sharding import ShardedWeights, settings

        pair = (model, None) if config.source == "teacher" else (teacher, model)
        sharded = ShardedWeights(*pair, settings(), device)
        report.note(sharded.told())
        if config.source == "fake":  # as frozen ones are, whose bits it has
            shorten(model.network)
    if config.source != "int":
        place(device, model)
    if config.source == "fake" and not divided:
        freeze_weights(model)
    if config.source != "teacher":
        choose_products(model.network, config.attention)
    model.check_images()
    info = model.info
    guidance, scheduler = info.guidance_or(config.guidance), config.scheduler or diffusion.walker(info.schedule)
    timesteps = diffusion.timesteps_of(scheduler, info.schedule, config.steps)
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

    starts = list(range(0, config.count, config.batch))
    conditions = diffusion.conditions_of(config.seed, list(range(config.count)), info.conditions)
    if config.low_memory:
        return_freed_memory()
    predictor = model
    if config.backend in ON_DEVICE:
        device = cuda.device()
        predictor = ReplayedSteps(model, timesteps, guidance, device)
    latents_of, images_of = (_files(out.work, what, starts) for what in ("latents", "images"))
    size_of = {start: min(config.batch, config.count - start) for start in starts}
    shapes = {start: (size, *info.shape) for start, size in size_of.items()}
    missing = crew.once(lambda: [s for s in starts if not _is_kept(latents_of[s], shapes[s], report)])
    report.begin(f"sample {config.source}", config.count, _images_in(latents_of, size_of), unit="images")
    warm: set[int] = set()
    # Where weights are divided nobody samples alone: whoever has no batch left draws the last one with the others.
    spare = [(start, False) for start in missing[-1:]] * (-len(missing) % crew.count if divided else 0)
    for start, keeps in crew.dealt([*((start, True) for start in missing), *spare]):
        indices = list(range(start, start + size_of[start]))
        mine = conditions[indices]
        try:
            if len(indices) not in warm and not divided:  # packing for a new batch size is not sampling
                with torch.inference_mode():
                    for timestep in _of_each_size(model, timesteps, guidance):
                        zeros = torch.zeros(shapes[start], device=device)
                        diffusion.Checked(predictor, indices).predict(zeros, torch.tensor(timestep), mine, guidance)
                trim()
                warm.add(len(indices))
            begun = time.perf_counter()
            latents = diffusion.sample(
                predictor, scheduler, info.schedule, config.steps, info.shape, mine, guidance, config.eta,
                config.seed, indices, device,
            ).cpu()  # fmt: skip
            taken = time.perf_counter() - begun
        except NumericalFault:
            check_inputs(model.network)  # a device's kernels know the site
            raise
        check_inputs(model.network)
        if keeps:
            _keep(latents_of[start], latents=latents.numpy(), seconds=taken)
        report.advance(_images_in(latents_of, size_of))
    crew.gathered(None)  # all latents are there
    report.advance(config.count)
    report.end()

    # Decoding comes after all sampling, when a large model's weights have left memory, and the graphs that read them.
    if config.backend in ON_DEVICE:
        predictor.forget()
    forget_weights(model.network)
    if model.first_stage is not None:
        report.begin("decode", config.count, unit="images")
    undecoded = crew.once(lambda: [s for s in starts if not _is_kept(images_of[s], (size_of[s],), report)])
    for start in crew.dealt(undecoded):
        latents = torch.from_numpy(np.load(latents_of[start])["latents"])
        decoded = model.decode(latents.to(device)).cpu()
        bad = (~decoded.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            named = ", ".join(str(start + index) for index in bad.tolist())
            raise NumericalFault(f"images {named} hold NaN or Inf once decoded", "see the model's first stage (vae)")
        _keep(images_of[start], images=diffusion.to_uint8(decoded).permute(0, 2, 3, 1).numpy())
        if model.first_stage is not None:
            report.advance(_images_in(images_of, size_of))
    crew.gathered(None)
    if model.first_stage is not None:
        report.end()
    if not crew.leads:
        return {}

    first = np.load(images_of[0])["images"]
    # In a file, since those of a large job would take all memory.
    images = np.lib.format.open_memmap(out.work / "images.npy", "w+", np.uint8, (config.count, *first.shape[1:]))
    for start in starts:
        images[start : start + size_of[start]] = np.load(images_of[start])["images"]
    seconds = sum(float(np.load(latents_of[start])["seconds"]) for start in starts)
    _write_pngs(images, out.path / "images", report)
    _write_npz(images, conditions.numpy(), out.path / "samples.npz")
    save_grid(images[:100], out.path / "grid.png")
    about = (
        {key: maker.figures.get(key) for key in ("method", "variant", "bits")} if plan or config.source == "int" else {}
    )
    return {
        "source": config.source, "count": config.count, "scheduler": scheduler, "guidance": guidance,
        "images_per_second": config.count / seconds, "bytes": size,
        "interpolated_timesteps": interpolated,
        "backend": config.backend or ("cpu" if config.source == "int" else None),
        "attention": config.attention, "compiled": native.library() is not None,
        "threads": torch.get_num_threads(), "device": cuda.name_of(device), **about,
    }  # fmt: skip


def _of_each_size(model, timesteps: list[float], guidance: float) -> list[float]:
    """The first timestep, and the first of those at which the unconditional half is not computed: half the batch."""
    import torch

    if (shares := model.guidance_shares) is None:
        return timesteps[:1]
    halved = [step for step in timesteps if shares.strength(guidance, torch.tensor(step)) == 1]
    return list(dict.fromkeys([timesteps[0], *halved[:1]]))


def _files(folder: Path, what: str, starts: list[int]) -> dict[int, Path]:
    """Where the arrays of each batch are kept, by its first image."""
    return {start: folder / f"{what}-{start:06d}.npz" for start in starts}


def _images_in(files: Mapping[int, Path], size_of: Mapping[int, int]) -> int:
    """How many images of all processes are kept."""
    return sum(size_of[start] for start, file in files.items() if file.exists())


def _is_kept(path: Path, shape: tuple[int, ...], report: Report) -> bool:
    """Whether the arrays of a batch are there, images or latents of a shape that begins so; what is there and is not
    them is told, and made again.
    """
    import numpy as np

    from pipelines.metrics.images import npz_arrays, read_arrays

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


def _keep(path: Path, **arrays) -> None:
    """Write what a run that goes on later finds; the file is whole or not there."""
    import numpy as np

    from pipelines.states import in_one_piece

    with in_one_piece(path) as file:
        np.savez(file, **arrays)


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
