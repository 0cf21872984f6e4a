"""What contrast alone does to the benchmark's figures: the same images, paler and stronger; and what sharpness does.

    python -m benchmarks.cifar10.contrast runs/cifar10/benchmark/sample/0001 --contrast 0.95,1,1.05,1.1,1.2
    python -m benchmarks.cifar10.contrast runs/cifar10/benchmark/sample/0001 --sharpness 0.9,1,1.1

IMAGES are a sample artifact, or what `hqdm score` takes. Each image's pixels are moved from (or to) the image's own
mean by a factor, or from the mean of their neighbourhood, rounded and clipped, and every figure of the benchmark is
taken again. Beside a student whose images have more contrast than its teacher's, the teacher's own at that contrast say
how much of a distance to photographs is owed to contrast alone. PSNR is to the images as they were.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import reference
from benchmarks.options import told
from pipelines.metrics.images import read_arrays, read_images

COLUMNS = ("deviation", "detail", "FD", "sFD", "IS", "precision", "recall", "named right", "PSNR, dB")


def with_contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Each of `images` (n, height, width, channels; uint8) with its pixels' distance to its mean times `factor`."""
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    return np.clip(np.rint(means + (images - means) * factor), 0, 255).astype(np.uint8)


def neighbours(images: np.ndarray) -> np.ndarray:
    """The mean of each pixel's four neighbours, (n, height, width, channels) float32; an edge's are continued."""
    padded = np.pad(images.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]) / 4


def with_sharpness(images: np.ndarray, factor: float) -> np.ndarray:
    """Each pixel x of `images` (as above) with its distance to (x + n)/2 times `factor`, n its neighbours' mean."""
    means = (images + neighbours(images)) / 2
    return np.clip(np.rint(means + (images - means) * factor), 0, 255).astype(np.uint8)


def detail(images: np.ndarray) -> float:
    """The root mean square of the pixels' distance to their neighbours' mean, of [-1, 1]."""
    return float(np.sqrt(np.square(images - neighbours(images)).mean()) / 127.5)


CHANGES = {"contrast": with_contrast, "sharpness": with_sharpness}


def row(images: np.ndarray, changed: np.ndarray, labels: np.ndarray | None, extractor, against) -> list[str]:
    """The figures of `changed`, as in COLUMNS; `images` are as they were, `against` the reference's features."""
    from pipelines.metrics import scores

    features = extractor.features(changed)
    fd, sfd, precision, recall = reference.apart(features, against)
    named = "" if labels is None else f"{scores.class_accuracy(features.logits, labels):.3f}"
    psnr = scores.pair_figures(changed, images)["psnr_of_mean_mse"]
    return [
        f"{scores.rms_contrast(changed):.3f}", f"{detail(changed):.4f}", f"{fd:.2f}", f"{sfd:.2f}",
        f"{scores.inception_score(features.logits, 10, 0)['is']:.3f}", f"{precision:.3f}", f"{recall:.3f}", named,
        "" if psnr is None else f"{psnr:.2f}",
    ]  # fmt: skip


def factors(text: str) -> list[float]:
    """`0.95,1,1.05` as numbers, for argparse."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= factor < float("inf") for factor in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of 0 or more, with commas")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a sample artifact, or images as hqdm score takes them")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--contrast",
        type=factors,
        default="0.95,1,1.05,1.1,1.2",
        help="factors of a pixel's distance to its image's mean",
    )
    which.add_argument(
        "--sharpness", type=factors, help="factors of its distance to the mean of itself and its neighbours' mean"
    )
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images; not needed again where WORK has them")
    parser.add_argument("--work", type=Path, default=reference.WORK, help="folder for the test images")
    options = parser.parse_args(arguments)
    with told():
        from pipelines.metrics.extractors import load_extractor

        path = reference.written(options.data, "test", options.work)
        samples = read_images(options.images)
        extractor = load_extractor("cifar10")
        against = extractor.features(read_arrays(path, ["arr_0"])["arr_0"])
        print(f"{len(samples)} images of {samples.source} against {path}; deviation: of an image's pixels, of [-1, 1];")
        print("detail: of a pixel from the mean of its four neighbours")
        what = "sharpness" if options.sharpness else "contrast"
        print(f"| {what} | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}", flush=True)
        for factor in options.sharpness or options.contrast:
            changed = CHANGES[what](samples.images, factor)
            figures = row(samples.images, changed, samples.labels, extractor, against)
            print(f"| {factor:g} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
