"""The UCI handwritten digits that scikit-learn carries, as 16×16 images.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998); 1,797 images of 8×8 in 17 grey
levels. They are upsampled to 16×16 (bicubic, clamped), the size the embedded model works at.
"""

import numpy as np
import torch
from torch.nn import functional as F

SIZE = 16
CLASSES = 10
HELD_OUT = 360  # images that neither the teacher nor the classifier sees in training


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 digits, in a fixed shuffled order: images (N, 1, 16, 16) float32 in [-1, 1] and labels (N,) int64."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32))[:, None] / 16  # (N, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=SIZE, mode="bicubic", align_corners=False).clamp_(0, 1) * 2 - 1
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return images[order], labels[order]


def train_split() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,437 digits that training may see."""
    images, labels = load_digits()
    return images[HELD_OUT:], labels[HELD_OUT:]


def held_out_split() -> tuple[torch.Tensor, torch.Tensor]:
    """The 360 digits that training never sees."""
    images, labels = load_digits()
    return images[:HELD_OUT], labels[:HELD_OUT]
