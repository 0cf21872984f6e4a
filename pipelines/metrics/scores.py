"""The figures: features or pixels in, numbers out. Nothing here reads a file or knows where images come from.

FID, KID, the Inception score, precision and recall are torch-fidelity's own functions on features. sFID is the same
Fréchet distance on spatial features. On another extractor's features than Inception's the distances are no FID and are
not called so: LABELS is the one place that says what each figure is called.
"""

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from pipelines.metrics.references import Statistics

PRC_BATCH = 1000  # rows of the distance matrix held at once: 1.4 GB instead of 40 GB at 50,000 images

# key: what it is called on Inception's features, what on another extractor's ({} is the extractor)
LABELS = {
    "fid": ("FID", "FD({})"),
    "sfid": ("sFID", "sFD({})"),
    "is": ("IS", "IS({})"),
    "is_std": ("IS, standard deviation over the splits", "IS({}), standard deviation over the splits"),
    "kid": ("KID", "KD({})"),
    "kid_std": ("KID, standard deviation over the subsets", "KD({}), standard deviation over the subsets"),
    "precision": ("precision", "precision({})"),
    "recall": ("recall", "recall({})"),
    "class_accuracy": ("class accuracy", "class accuracy({})"),
    "psnr_of_mean_mse": ("PSNR of the mean MSE, dB", None),
    "psnr_mean_per_image": ("mean PSNR of the images that differ, dB", None),
    "pair_mse": ("MSE to the paired images, grey levels²", None),
    "identical": ("images equal to their pair", None),
    "contrast": ("RMS contrast, of the paired images'", None),
}
OF_PAIRS = ("psnr_of_mean_mse", "psnr_mean_per_image", "pair_mse", "identical", "contrast")  # of no extractor


def figure_key(name: str, extractor: str) -> str:
    """The key of a figure of LABELS: `fid` and `sfid` are `fd_<extractor>` and `sfd_<extractor>` off Inception."""
    if extractor != "inception" and name in ("fid", "sfid"):
        return f"{name[:-3]}fd_{extractor}"
    return name


def figure_label(name: str, extractor: str) -> str:
    """What a figure of LABELS is called in a table."""
    inception, other = LABELS[name]
    return inception if extractor == "inception" or other is None else other.format(extractor)


def statistics(features: torch.Tensor) -> Statistics:
    """features: (N, D), N ≥ 2. In float64, so that a mean of 50,000 features keeps its digits."""
    found = fid_features_to_statistics(features.double())
    return Statistics(found["mu"], found["sigma"], len(features))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)."""
    moments = ({"mu": side.mu, "sigma": side.sigma} for side in (first, second))
    return fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: torch.Tensor, splits: int, seed: int) -> dict[str, float]:
    """logits: (N, classes). Shuffled before they are split: on class-sorted images splits in file order collapse it."""
    found = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return {"is": found[KEY_METRIC_ISC_MEAN], "is_std": found[KEY_METRIC_ISC_STD]}


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, subsets: int, subset_size: int, seed: int
) -> dict[str, float]:
    """KID's squared MMD with the kernel (x·y/D + 1)³, over random subsets; subset_size ≤ both counts."""
    found = kid_features_to_metric(samples, reference, kid_subsets=subsets, kid_subset_size=subset_size,
                                   kid_kernel="poly", rng_seed=seed, verbose=False)  # fmt: skip
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD]}


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, neighbours: int) -> dict[str, float]:
    """Share of the samples within the reference's manifold, and the other way round; both counts > neighbours."""
    found = prc_features_to_metric(samples, reference, prc_neighborhood=neighbours, prc_batch_size=PRC_BATCH,
                                   save_cpu_ram=True, verbose=False)  # fmt: skip
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def class_accuracy(logits: torch.Tensor, labels: np.ndarray) -> float:
    """The share of images (N, classes) that the classifier names as labelled (N,)."""
    return (logits.argmax(1) == torch.from_numpy(labels)).float().mean().item()


def pair_figures(images: np.ndarray, pairs: np.ndarray) -> dict[str, float | int | None]:
    """The distance of two (N, H, W, C) uint8 arrays, image by image.

    An image equal to its pair has an infinite PSNR, which no mean survives and JSON does not know. So `identical`
    counts those, `psnr_mean_per_image` is the mean over the others, `psnr_of_mean_mse` is over all, and both are None
    when all are identical. PSNR is 10·log10(255² / MSE) in dB. `contrast` is the images' RMS contrast as a share of
    their pairs', None where these have none: Fréchet distances to photographs and the Inception score reward more of it
    than the pairs have, PSNR does not (docs/comparison.md).
    """
    errors = np.array([np.square(a.astype(np.int32) - b).mean() for a, b in zip(images, pairs, strict=True)])
    differing = errors[errors > 0]
    return {
        "psnr_of_mean_mse": float(10 * np.log10(255**2 / errors.mean())) if len(differing) else None,
        "psnr_mean_per_image": float((10 * np.log10(255**2 / differing)).mean()) if len(differing) else None,
        "pair_mse": float(errors.mean()),
        "identical": int((errors == 0).sum()),
        "contrast": rms_contrast(images) / theirs if (theirs := rms_contrast(pairs)) else None,
    }


def rms_contrast(images: np.ndarray) -> float:
    """The mean over (N, H, W, C) uint8 images of the standard deviation of an image's pixels, which are of [-1, 1]."""
    return float(np.mean([(image.astype(np.float32) / 127.5).std() for image in images]))


def in_class_order(classes: np.ndarray) -> bool:
    """Whether neighbours in (N,) classes share their class far more often than chance, as in a class-sorted file."""
    if len(classes) < 20:
        return False
    by_chance = np.square(np.unique(classes, return_counts=True)[1] / len(classes)).sum()
    together = (classes[1:] == classes[:-1]).mean()
    return bool(by_chance < 0.9 and together > (1 + by_chance) / 2)


def imbalance(labels: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """Counts per class of labels (N,) where chance cannot explain how they differ from expected shares (classes,).

    Pearson's χ² against four standard deviations of its distribution; None where the labels are as expected.
    """
    counts = np.bincount(labels, minlength=len(expected)).astype(np.float64)
    shares = np.pad(expected, (0, len(counts) - len(expected)))
    if counts[shares == 0].any():
        return counts.astype(np.int64)
    kept = shares > 0
    freedom = max(int(kept.sum()) - 1, 1)
    wanted = shares[kept] * len(labels)
    statistic = (np.square(counts[kept] - wanted) / wanted).sum()
    return counts.astype(np.int64) if statistic > freedom + 4 * np.sqrt(2 * freedom) else None
