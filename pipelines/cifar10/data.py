"""CIFAR-10 from image files, one folder a class, in a folder or an archive."""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.cifar10 import CLASSES, SIZE
from pipelines.errors import FileFault
from pipelines.events import Report
from pipelines.metrics.images import ImageSet, read_images

LAYOUT = f"it takes {SIZE}×{SIZE} images in folders named {', '.join(CLASSES)}, in a folder or an archive"


def find_split(data: Path, name: str) -> Path:
    """Where `data` has the images of `name`, "train" or "test": a folder of that name, or an archive cifar10-NAME.*."""
    data = Path(data)
    if (data / name).is_dir():
        return data / name
    archives = sorted(path for path in data.glob(f"cifar10-{name}.*") if path.is_file())
    if len(archives) == 1:
        return archives[0]
    what = f"{len(archives)} archives of them" if archives else "no images of them"
    raise FileFault(
        f"{data}: CIFAR-10's {name} images are looked for, and there are {what}",
        f"name a folder with {name}/ or one cifar10-{name}.tar.xz; {LAYOUT}",
    )


def load_split(source: Path, report: Report | None = None) -> ImageSet:
    """All images of a folder or archive, (N, 32, 32, 3) uint8 with labels (N,) int64, in the order of their names.

    Raises FileFault for what `read_images` refuses, for images of another size and for a file in no class's folder.
    """
    found = read_images(source, report=report)
    if found.size != (SIZE, SIZE) or found.images.shape[3] != 3:
        height, width, channels = found.images.shape[1:]
        raise FileFault(f"{source}: holds {width}×{height} images of {channels} channels, not CIFAR-10's", LAYOUT)
    if found.labels is not None:
        return found
    folders = [PurePosixPath(name).parent.name for name in found.names]
    strange = next((name for name, folder in zip(found.names, folders, strict=True) if folder not in CLASSES), None)
    if strange is not None:
        raise FileFault(f"{source}: {strange} is in no class's folder", LAYOUT)
    return replace(found, labels=np.array([CLASSES.index(folder) for folder in folders], dtype=np.int64))
