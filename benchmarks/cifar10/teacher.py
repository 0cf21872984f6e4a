"""Write a trained teacher as hqdm takes it, and judge it.

    python -m benchmarks.cifar10.teacher unet                                 # to benchmarks/cifar10/unet/model.ckpt
    python -m benchmarks.cifar10.teacher dit                                  # to benchmarks/cifar10/dit/
    python -m benchmarks.cifar10.teacher unet --judge --data DATA --count 500 --steps 10,20 --guidance 1,1.5,2,3

`--judge` samples what training has so far, in full precision, and prints what the classifier and the test images say of
it. Training may go on meanwhile: its state is replaced in one piece.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.cifar10 import reference
from benchmarks.cifar10.train import NETWORKS
from benchmarks.options import listed, told
from pipelines import runner
from pipelines.cifar10 import CLASSES
from pipelines.digits.train import noise_schedule
from pipelines.events import Report
from pipelines.models.compvis_keys import CLASSES as EMBEDDING
from pipelines.models.compvis_keys import UNET, to_compvis
from pipelines.stages import load
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

HERE = Path(__file__).parent
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195,
    "beta_schedule": "scaled_linear", "clip_sample": True, "prediction_type": "v_prediction", "set_alpha_to_one": False,
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
KEYS = ("class_accuracy", "fd_cifar10", "sfd_cifar10", "is", "precision", "recall")
ROWS = 10  # images of each class in the grid


def averages(state: Path, network: str) -> tuple[torch.nn.Module, int]:
    """The moving averages of a training's state, in its network, and the number of steps behind them."""
    if not state.exists():
        raise SystemExit(f"{state}: no such training; begin it: python -m benchmarks.cifar10.train {network} --train …")
    kept = torch.load(state, weights_only=True, mmap=True, map_location="cpu")
    model = NETWORKS[network]()
    model.load_state_dict(kept["ema"])
    return model.eval(), kept["step"]


def write_unet(model: torch.nn.Module, step: int, folder: Path) -> Path:
    """The checkpoint that `model.yaml` describes, in half precision; its path."""
    attention = tuple("Attn" in kind for kind in model.unet.config.up_block_types)
    layers = model.unet.config.layers_per_block
    state = {
        UNET + to_compvis(name, layers, attention): value.half().contiguous()
        for name, value in model.unet.state_dict().items()
    }
    state[EMBEDDING] = model.embedding.weight.detach().half().clone()
    state["betas"], state["alphas_cumprod"] = noise_schedule()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": step}, folder / "model.ckpt")
    if folder != HERE / "unet":
        shutil.copyfile(HERE / "unet/model.yaml", folder / "model.yaml")
    return folder / "model.ckpt"


def write_dit(model: torch.nn.Module, step: int, folder: Path) -> Path:
    """A pipeline's folder with the transformer, in half precision, and its scheduler; its path."""
    index = {"_class_name": "DiTPipeline"}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "DiTTransformer2DModel"]}
    for part in ("transformer", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    model.dit.save_config(folder / "transformer")
    state = {name: value.half().contiguous() for name, value in model.dit.state_dict().items()}
    save_file(state, folder / "transformer/diffusion_pytorch_model.safetensors", {"format": "pt", "step": str(step)})
    for file, content in (("model_index.json", index), ("scheduler/scheduler_config.json", SCHEDULER)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


WRITERS = {"unet": write_unet, "dit": write_dit}


def save_labelled_grid(samples: Artifact, path: Path) -> None:
    """A picture with a row of ROWS samples for each class, the class's name before it."""
    import matplotlib.pyplot as plt
    import numpy as np

    with np.load(samples.file("samples.npz")) as kept:
        images, labels = kept["arr_0"], kept["arr_1"]
    figure, axes = plt.subplots(len(CLASSES), 1, figsize=(7, 7))
    for index, (name, axis) in enumerate(zip(CLASSES, axes, strict=True)):
        row = images[labels == index][:ROWS]
        blank = np.full((ROWS - len(row), *images.shape[1:]), 255, np.uint8)
        axis.imshow(np.concatenate([*row, *blank], axis=1), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(left=0.15, right=0.99, top=0.99, bottom=0.01, hspace=0.03)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def judge(model: Path, options: argparse.Namespace) -> None:
    """Print a row for each number of steps and strength of guidance, through hqdm's own stages."""
    against = reference.written(options.data, "test", options.work)
    store = Store(options.work / "judge")
    taken = runner.make(store, "model", runner.model_config(model), {}, Report()).artifact
    print(f"{options.count} images a row, seed {options.seed}; FD, sFD, precision, recall to {against}")
    print("| steps | guidance | class acc. | FD | sFD | IS | precision | recall | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for steps in options.steps:
        for guidance in options.guidance:
            values = dict(source="teacher", count=options.count, steps=steps, guidance=guidance, seed=options.seed)
            samples = runner.make(store, "sample", load("sample").Config(**values), {"source": taken.id}, Report())
            stage = load("score")
            asked = stage.Config(reference_path=str(against.absolute()), extractor="cifar10")
            chosen = {"samples": samples.artifact.id}
            score = runner.make(store, "score", stage.with_hashes(asked), chosen, Report()).artifact.figures
            picture = options.work / f"judge/{options.network}-steps{steps}-guidance{guidance:g}.png"
            save_labelled_grid(samples.artifact, picture)
            figures = (score[key] for key in KEYS)
            speed = samples.artifact.figures["images_per_second"]
            print(
                f"| {steps} | {guidance:g} | " + " | ".join(f"{v:.3f}" for v in figures) + f" | {speed:.1f} |",
                flush=True,
            )
    print(f"pictures: {options.work / 'judge'}/{options.network}-*.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="folder of the training's state")
    parser.add_argument("--out", type=Path, help="folder to write to; benchmarks/cifar10/NETWORK by default")
    parser.add_argument("--judge", action="store_true", help="write into WORK instead, sample and score")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images, for --judge")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=listed(int), default="20", help="with commas")
    parser.add_argument("--guidance", type=listed(float), default="1.5", help="with commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with told():
        take(options)


def take(options: argparse.Namespace) -> None:
    """Write the teacher and, where that is asked for, judge it."""
    model, step = averages(options.work / f"{options.network}.pt", options.network)
    out = options.out or (options.work / f"{options.network}-teacher" if options.judge else HERE / options.network)
    written = WRITERS[options.network](model, step, out)
    size = sum(
        file.stat().st_size for file in ([written] if written.is_file() else written.rglob("*")) if file.is_file()
    )
    print(f"wrote {written}: the averages after {step} steps, {size / 1e6:.1f} MB")
    if options.judge:
        judge(written, options)


if __name__ == "__main__":
    main()
