"""CIFAR-10's images as a reference of scores, and figures of real images for scale.

    python -m benchmarks.cifar10.reference --data DATA

DATA is a folder with `train/` and `test/`, or `cifar10-train.tar.xz` and `cifar10-test.tar.xz`. Writes the 10,000 test
images as an .npz, which `hqdm score --reference` takes, and prints what the classifier says of real images: how many of
them it names right, and how far 10,000 training images are from the test images, of which no model is to be expected
to come closer. The classifier has seen the training images, so a part of that distance is its own.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.options import told
from pipelines.cifar10 import CLASSES
from pipelines.cifar10.data import find_split, load_split
from pipelines.errors import UsageError
from pipelines.metrics.images import hash_of_images, read_arrays

if TYPE_CHECKING:
    from pipelines.metrics.extractors import Features

WORK = Path("runs/cifar10")


def written(data: Path | None, split: str, work: Path = WORK) -> Path:
    """The images of `split`, "train" or "test", as an .npz in guided-diffusion's layout, made where it is not there or
    of other images. Without `data` the one that is there is taken; UsageError where there is none.
    """
    path = work / f"cifar10-{split}.npz"
    if data is None:
        if not path.exists():
            raise UsageError(
                "the images of CIFAR-10 do not come with the project, and nothing says where they are",
                "name a folder with cifar10-train.tar.xz and cifar10-test.tar.xz: --data FOLDER, or make … DATA=FOLDER",
            )
        return path
    source = find_split(data, split)
    found = hash_of_images(source)
    if path.exists() and str(read_arrays(path, ["source_sha256"])["source_sha256"]) == found:
        return path
    images = load_split(source)
    work.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, arr_0=images.images, arr_1=images.labels, source_sha256=np.str_(found))
    part.replace(path)
    return path


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """The places of the first `count` images with equally many of each class, in the order of the files."""
    each = count // len(CLASSES)
    return np.sort(np.concatenate([np.flatnonzero(labels == name)[:each] for name in range(len(CLASSES))]))


def apart(one: "Features", other: "Features") -> tuple[float, float, float, float]:
    """FD, sFD, precision and recall of the images of `one` against those of `other`."""
    from pipelines.metrics import scores

    fd, sfd = (
        scores.frechet_distance(*(scores.statistics(getattr(of, name)) for of in (one, other)))
        for name in ("pool", "spatial")
    )
    near = scores.precision_recall(one.pool, other.pool, 3)
    return fd, sfd, near["precision"], near["recall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images; not needed again where WORK has them")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the .npz files")
    parser.add_argument("--count", type=int, default=10_000, help="training images to measure")
    options = parser.parse_args()
    with told():
        from pipelines.metrics import scores
        from pipelines.metrics.extractors import load_extractor

        extractor = load_extractor("cifar10")
        held, shares = {}, {}
        for split in ("test", "train"):
            path = written(options.data, split, options.work)
            arrays = read_arrays(path, ["arr_0", "arr_1"])
            images, labels = arrays["arr_0"], arrays["arr_1"]
            if split == "train":
                chosen = balanced(labels, options.count)
                images, labels = images[chosen], labels[chosen]
            held[split] = features = extractor.features(images)
            shares[split] = scores.class_accuracy(features.logits, labels)
            print(f"{path}: {len(images)} {split} images, named right {shares[split]:.4f}, "
                  f"IS {scores.inception_score(features.logits, 10, 0)['is']:.3f}")  # fmt: skip
        test, train = held["test"], held["train"]
        even, odd = (type(test)(*(values[start::2] for values in test)) for start in (0, 1))
        pairs = ((f"{len(train.pool)} training images to the test images", train, test),
                 ("every other test image to those between", odd, even))  # fmt: skip
        for what, one, other in pairs:
            fd, sfd, precision, recall = apart(one, other)
            print(f"{what}: FD(cifar10) {fd:.3f}, sFD(cifar10) {sfd:.3f}, "
                  f"precision {precision:.3f}, recall {recall:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
