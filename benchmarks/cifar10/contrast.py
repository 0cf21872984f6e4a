"""What contrast alone does to the benchmark's figures: the same images, paler and stronger.

    python -m benchmarks.cifar10.contrast runs/cifar10/benchmark/sample/0001 --contrast 0.95,1,1.05,1.1,1.2

IMAGES are a sample artifact, or what `hqdm score` takes. Each image's pixels are moved from (or to) the image's own
mean by a factor, rounded and clipped, and every figure of the benchmark is taken again. Beside a student whose images
have more contrast than its teacher's, the teacher's own at that contrast say how much of a distance to photographs is
owed to contrast alone. PSNR is to the images as they were.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import reference
from pipelines.metrics.images import read_arrays, read_images

COLUMNS = ("contrast", "deviation", "FD", "sFD", "IS", "precision", "recall", "named right", "PSNR, dB")


def with_contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Each of `images` (n, height, width, channels; uint8) with its pixels' distance to its mean times `factor`."""
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    return np.clip(np.rint(means + (images - means) * factor), 0, 255).astype(np.uint8)


def row(images: np.ndarray, labels: np.ndarray | None, factor: float, extractor, against) -> list[str]:
    """The figures of `images` at one contrast, in the order of COLUMNS; `against` are the reference's features."""
    from pipelines.metrics import scores

    changed = with_contrast(images, factor)
    features = extractor.features(changed)
    fd, sfd, precision, recall = reference.apart(features, against)
    named = "" if labels is None else f"{scores.class_accuracy(features.logits, labels):.3f}"
    psnr = scores.pair_figures(changed, images)["psnr_of_mean_mse"]
    return [
        f"{factor:g}", f"{scores.rms_contrast(changed):.3f}", f"{fd:.2f}", f"{sfd:.2f}",
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
    parser.add_argument("--contrast", type=factors, default="0.95,1,1.05,1.1,1.2", help="factors, with commas")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images; not needed again where WORK has them")
    parser.add_argument("--work", type=Path, default=reference.WORK, help="folder for the test images")
    options = parser.parse_args(arguments)
    with reference.told():
        from pipelines.metrics.extractors import load_extractor

        path = reference.written(options.data, "test", options.work)
        samples = read_images(options.images)
        extractor = load_extractor("cifar10")
        against = extractor.features(read_arrays(path, ["arr_0"])["arr_0"])
        print(f"{len(samples)} images of {samples.source} against {path}; deviation: of an image's pixels, of [-1, 1]")
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        for factor in options.contrast:
            print(f"| {' | '.join(row(samples.images, samples.labels, factor, extractor, against))} |", flush=True)


if __name__ == "__main__":
    main()
