"""CIFAR-10 as training takes it: uint8 channels first, decoded once."""

from pathlib import Path

import numpy as np
import torch

from pipelines.cifar10.data import load_split

BLOCK = 2  # pixels that space-to-depth puts into the channels, along one side


def tensors(source: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a folder or archive: (N, 3, 32, 32) uint8 and labels (N,) int64, sorted by class and name.

    `cache`: an .npz to read instead where it exists, and to write otherwise.
    """
    if not cache.exists():
        found = load_split(source)
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, images=found.images.transpose(0, 3, 1, 2), labels=found.labels)
        part.replace(cache)
    with np.load(cache, allow_pickle=False) as kept:
        return torch.from_numpy(kept["images"]), torch.from_numpy(kept["labels"])
