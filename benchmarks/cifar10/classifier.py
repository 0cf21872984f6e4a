"""The CIFAR-10 classifier: judge of the benchmark's samples, and the extractor of their scores' features.

    python -m benchmarks.cifar10.classifier --train cifar10-train.tar.xz --test cifar10-test.tar.xz

trains it anew, prints its accuracy on the test images and writes the weights in half precision.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from benchmarks.cifar10.data import tensors
from benchmarks.options import told
from pipelines.cifar10 import CLASSIFIER
from pipelines.cifar10.classifier import Cifar10Classifier, as_floats, load_classifier

BATCH, PEAK_RATE, SMOOTHING, DECAY = 128, 2e-3, 0.1, 0.05


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of uint8 images (N, 3, 32, 32) that the classifier names right."""
    with torch.inference_mode():
        right = [
            (model(as_floats(part)).argmax(1) == names).sum()
            for part, names in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(right).item() / len(labels)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrored at random, and shifted by up to three pixels, every image by its own."""
    count, shift = len(images), 3
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    offsets = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows = offsets[0][:, None] + torch.arange(32)
    columns = offsets[1][:, None] + torch.arange(32)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> Cifar10Classifier:
    """AdamW, a rate that rises and falls once, label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Cifar10Classifier().to(memory_format=torch.channels_last).train()
    steps = epochs * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, pct_start=0.2)
    start, done = time.monotonic(), 0
    for epoch in range(epochs):
        order, right = torch.randperm(len(images), generator=generator), 0
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            x = augmented(as_floats(images[batch]), generator).contiguous(memory_format=torch.channels_last)
            logits = model(x)
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            right += (logits.argmax(1) == labels[batch]).sum().item()
            done += 1
        left = (time.monotonic() - start) / done * (steps - done) / 60
        share = right / (len(images) // BATCH * BATCH)
        print(f"epoch {epoch + 1}/{epochs}  training accuracy {share:.4f}  {left:.1f} min left", flush=True)
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="folder or archive of the training images")
    parser.add_argument("--test", type=Path, required=True, help="folder or archive of the test images")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="folder for the decoded images")
    parser.add_argument("--out", type=Path, default=CLASSIFIER)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with told():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Train, write the weights and say how many test images they name right; FileFault where images are missing."""
    model = train(*tensors(options.train, options.work / "train.npz"), options.epochs, options.seed)
    whole = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in whole.items()}, options.out)
    images, labels = tensors(options.test, options.work / "test.npz")
    share = accuracy(load_classifier(options.out), images, labels)
    print(f"test accuracy {share:.4f} on {len(labels)} images; wrote {options.out}")


if __name__ == "__main__":
    main()
