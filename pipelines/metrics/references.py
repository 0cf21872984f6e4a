"""What samples are measured against: a registered data set, images, or statistics that someone else computed.

Statistics are an .npz in guided-diffusion's layout: `mu` (D,), `sigma` (D, D) of the pool features, `mu_s`, `sigma_s`
of the spatial ones. They allow FID and sFID and nothing else, unless the file carries `arr_0` images too, as the
published reference batches do: those then serve KID, precision and recall, as in guided-diffusion's evaluator. Files
that this project writes also say n, the extractor and the hash of its weights, and are refused for another extractor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import FileFault, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.metrics.images import (
    ImageSet,
    hash_of_images,
    images_file,
    npz_arrays,
    pixels_hash,
    read_arrays,
    read_images,
)

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
AGAIN = "compute the statistics again: hqdm score writes them as statistics.npz"
LARGEST = 1e30  # of means and covariances: their products must stay finite


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), float64, of n images' features; n is None where a file does not say."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None


@dataclass(frozen=True)
class Reference:
    """Images, statistics or both."""

    name: str
    sha256: str
    images: ImageSet | None = None
    pool: Statistics | None = None  # given, not computed
    spatial: Statistics | None = None
    extractor: str | None = None  # what computed the statistics, where the file says so
    extractor_sha256: str | None = None


def registered_reference(name: str) -> Reference:
    """A data set that comes with the project; UsageError for a name that is not registered."""
    if name not in REFERENCES:
        raise UsageError(f"no reference is called {name!r}", did_you_mean(name, REFERENCES))
    found = REFERENCES[name]()
    return Reference(name, found.sha256, found)


def read_reference(path: str | Path, source: str | None = None, report: Report | None = None) -> Reference:
    """Statistics from an .npz that holds `mu` and `sigma`, images from anything else that read_images takes."""
    place, name = images_file(Path(path)), source or str(path)
    held = npz_arrays(place) if place.is_file() else None
    if held is None or "mu" not in held:
        found = read_images(path, source, report)
        return Reference(name, found.sha256, found)
    arrays = read_arrays(place, held & {*MOMENTS, "n", "extractor", "extractor_sha256"})
    n = _count(place, arrays["n"]) if "n" in arrays else None
    pool = _statistics(place, arrays, "mu", "sigma", n)
    spatial = _statistics(place, arrays, "mu_s", "sigma_s", n) if "mu_s" in arrays else None
    images = read_images(path, source, report) if "arr_0" in held else None
    extractor, weights = (
        _word(place, key, arrays[key]) if key in arrays else None for key in ("extractor", "extractor_sha256")
    )
    return Reference(name, hash_of_images(path), images, pool, spatial, extractor, weights)


def write_statistics(path: Path, pool: Statistics, spatial: Statistics, extractor: str, extractor_sha256: str) -> None:
    """Write what `read_reference` reads. The same statistics give the same bytes."""
    np.savez(path, mu=pool.mu, sigma=pool.sigma, mu_s=spatial.mu, sigma_s=spatial.sigma,
             n=np.int64(pool.n), extractor=np.str_(extractor), extractor_sha256=np.str_(extractor_sha256))  # fmt: skip


def _count(path: Path, value: np.ndarray) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or not 0 < value < 2**62:
        raise FileFault(f"{path}: n is {value.dtype} of shape {value.shape}, not how many images there were", AGAIN)
    return int(value)


def _word(path: Path, key: str, value: np.ndarray) -> str:
    if value.shape != () or value.dtype.kind != "U" or value.dtype.itemsize > 4 * 128:
        raise FileFault(f"{path}: {key} is {value.dtype} of shape {value.shape}, not a word", AGAIN)
    return str(value)


def _statistics(path: Path, arrays: dict[str, np.ndarray], mu: str, sigma: str, n: int | None) -> Statistics:
    if sigma not in arrays:
        raise FileFault(f"{path}: holds {mu} but no {sigma}", AGAIN)
    mean, covariance = arrays[mu], arrays[sigma]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FileFault(
            f"{path}: {mu} has shape {mean.shape} and {sigma} {covariance.shape}, not (D,) and (D, D)", AGAIN
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise FileFault(f"{path}: {mu} is {mean.dtype} and {sigma} {covariance.dtype}, not floats", AGAIN)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise FileFault(f"{path}: {mu} or {sigma} holds NaN or Inf", AGAIN)
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    largest = float(np.abs(covariance).max(initial=0))
    if max(largest, float(np.abs(mean).max(initial=0))) > LARGEST:
        raise FileFault(f"{path}: {mu} or {sigma} holds numbers beyond {LARGEST:g}, which no features have", AGAIN)
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-3 * largest) or (covariance.diagonal() < 0).any():
        raise FileFault(f"{path}: {sigma} is no covariance: not symmetric, or with negative variances", AGAIN)
    return Statistics(mean, covariance, n)


def _digits() -> ImageSet:
    """All 1,797 digits: what the embedded model learnt from, and the 360 it never saw."""
    from pipelines.diffusion import to_uint8
    from pipelines.digits.data import load_digits  # torch, which a look at the table must not wait for

    images, labels = load_digits()
    pixels, classes = to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()
    return ImageSet(pixels, classes, None, "digits", pixels_hash(pixels, classes))


REFERENCES: dict[str, Callable[[], ImageSet]] = {"digits": _digits}
