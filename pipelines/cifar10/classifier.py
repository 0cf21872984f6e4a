"""The CIFAR-10 classifier: judge of samples of CIFAR-10, and a feature extractor for their scores.

`python -m benchmarks.cifar10.classifier` trains it anew.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pipelines.cifar10 import CLASSES, CLASSIFIER

SPATIAL = 8  # maps of the middle level whose positions are features: what sFID's 7 maps are to Inception


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        h = F.silu(self.norm1(self.conv1(x)))
        return x + F.silu(self.norm2(self.conv2(h)))


class _Down(nn.Sequential):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class Cifar10Classifier(nn.Module):
    """A small residual network for (N, 3, 32, 32) images in [-1, 1].

    `features` returns what scores are computed on: `spatial` (N, 8·8·8), `pool` (N, 192) and `logits` (N, 10).
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(12, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.SiLU())
        self.down1 = _Down(48, 96)  # 8×8
        self.mid = _Residual(96)
        self.down2 = _Down(96, 192)  # 4×4
        self.last = _Residual(192)
        self.first = _Residual(48)  # at 16×16
        self.head = nn.Linear(192, len(CLASSES))

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: (N, 3, 32, 32) float in [-1, 1]."""
        h = self.first(self.stem(F.pixel_unshuffle(images, 2)))  # (N, 48, 16, 16)
        middle = self.mid(self.down1(h))  # (N, 96, 8, 8)
        h = self.last(self.down2(middle))  # (N, 192, 4, 4)
        pool = h.mean((2, 3))
        # Rows and columns before channels: the order in which sFID flattens Inception's maps.
        spatial = middle[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        return {"spatial": spatial, "pool": pool, "logits": self.head(F.dropout(pool, 0.2, self.training))}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)["logits"]


def load_classifier(path: Path = CLASSIFIER) -> Cifar10Classifier:
    """The shipped classifier, in evaluation mode."""
    model = Cifar10Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as fp32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
