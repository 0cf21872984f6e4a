"""The digits classifier: judge of the embedded model's samples, and a feature extractor for their scores.

python -m pipelines.digits.classifier        trains it anew (a minute on 2 cores) and prints its held-out accuracy
"""

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pipelines.digits import CLASSIFIER
from pipelines.digits.data import CLASSES, held_out_split, train_split


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 16×16 grey images.

    `features` returns what scores are computed on: `spatial` (N, 8·4·4), `pool` (N, 64) and `logits` (N, 10).
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, 32), nn.GroupNorm(8, 64)
        self.hidden = nn.Linear(64 * 16, 64)
        self.head = nn.Linear(64, CLASSES)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: (N, 1, 16, 16) float in [-1, 1]."""
        h = F.silu(self.conv1(images))  # (N, 32, 16, 16)
        h = F.max_pool2d(F.silu(self.norm1(self.conv2(h))), 2)  # (N, 32, 8, 8)
        h = F.silu(self.conv3(h))  # (N, 64, 8, 8)
        h = F.max_pool2d(F.silu(self.norm2(self.conv4(h))), 2)  # (N, 64, 4, 4)
        # The first 8 maps with their positions, rows before channels: what sFID's 7 Inception maps are to Inception.
        spatial = h[:, :8].permute(0, 2, 3, 1).flatten(1)
        pool = F.silu(self.hidden(F.dropout(h.flatten(1), 0.3, self.training)))
        return {"spatial": spatial, "pool": pool, "logits": self.head(pool)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)["logits"]


def load_classifier() -> DigitsClassifier:
    """The shipped classifier, in evaluation mode."""
    model = DigitsClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(CLASSIFIER).items()})
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images (N, 1, 16, 16) that the classifier names right."""
    with torch.inference_mode():
        return (model(images).argmax(1) == labels).float().mean().item()


def train(epochs: int = 30, seed: int = 0) -> DigitsClassifier:
    """Train on the training split, with shifts of up to one pixel and a little noise."""
    torch.manual_seed(seed)
    images, labels = train_split()
    model = DigitsClassifier().train()
    steps = epochs * (len(images) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for batch in order[: len(images) // 64 * 64].split(64):
            dx, dy = (int(v) for v in torch.randint(-1, 2, (2,)))
            x = F.pad(images[batch], (1, 1, 1, 1), value=-1.0)[:, :, 1 + dy : 17 + dy, 1 + dx : 17 + dx]
            loss = F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    classifier = train()
    save_file({name: value.half() for name, value in classifier.state_dict().items()}, CLASSIFIER)
    images, labels = held_out_split()
    print(
        f"held-out accuracy {accuracy(load_classifier(), images, labels):.4f} on {len(labels)} digits; "
        f"wrote {CLASSIFIER}"
    )
