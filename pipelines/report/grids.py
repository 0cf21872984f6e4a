"""Grids of sampled images, alone and side by side."""

from pathlib import Path

import numpy as np

from pipelines.errors import HqdmError, UsageError
from pipelines.report.table import comparable
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

SCALE_TO = 64  # pixels; small images are enlarged by a whole factor, without smoothing
SHOWN = 10  # images a row
GAP = 3  # white pixels between images
NAMES = {"teacher": "teacher, fp32", "fake": "student, fake-quantised", "int": "student, integers"}


def _enlarged(images: np.ndarray) -> np.ndarray:
    factor = max(1, SCALE_TO // images.shape[1])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (N, H, W, C) uint8 to one image (rows, columns, 3) with white lines between them."""
    missing = -len(images) % columns
    padded = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)])
    padded = np.pad(padded, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows = padded.reshape(-1, columns, *padded.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, C)
    grid = rows.reshape(rows.shape[0] * rows.shape[1], -1, images.shape[3])
    return np.broadcast_to(grid, (*grid.shape[:2], 3)) if grid.shape[2] == 1 else grid


def save_grid(images: np.ndarray, path: Path) -> None:
    """Images (N, H, W, 1 or 3) uint8 as one PNG, ten to a row."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(tiled(_enlarged(images), min(SHOWN, len(images))))).save(path)


def side_by_side(store: Store, path: Path) -> list[Artifact]:
    """The first images of the newest samples of each source, same seeds in one column, with labels; returns what is
    shown.

    HqdmError where there are no samples.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or path.is_dir():
        raise UsageError(f"{path} is no name for a picture", "give it a file's name that ends in .png")
    from PIL import Image, ImageDraw, ImageFont

    shown = list(comparable(store).values())
    if not shown:
        raise HqdmError("there are no samples to show", "hqdm sample teacher fake int")
    bands = []
    for artifact in shown:
        with np.load(artifact.file("samples.npz"), allow_pickle=False) as file:
            bands.append(tiled(_enlarged(file["arr_0"][: 2 * SHOWN]), SHOWN))
    margin, gap = 22, 10
    height = sum(band.shape[0] + margin for band in bands) + gap * (len(bands) - 1)
    canvas = Image.new("RGB", (max(band.shape[1] for band in bands), height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    top = 0
    for artifact, band in zip(shown, bands, strict=True):
        about = " ".join(artifact.figures[key] for key in ("method", "bits") if artifact.figures.get(key))
        label = NAMES[artifact.config["source"]] + (f" ({about})" if about else "")
        draw.text((4, top + 3), f"{label} · {artifact.figures['images_per_second']:.0f} images/s", "black", font)
        canvas.paste(Image.fromarray(np.ascontiguousarray(band)), (0, top + margin))
        top += margin + band.shape[0] + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return shown
