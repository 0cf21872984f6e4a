"""Feature extractors: what turns an image into the numbers that scores compare. A new one is a row of EXTRACTORS.

| name | pool | spatial | logits |
| --- | --- | --- | --- |
| `digits` | 64, the classifier's last hidden layer | 128, its first 8 maps of 4×4 | 10 |
| `cifar10` | 192, the classifier's last maps, averaged | 512, the first 8 of its middle maps of 8×8 | 10 |
| `inception` | 2048 | 2023, the first 7 maps of 17×17 of Mixed_6d.branch1x1 (TensorFlow's mixed_6/conv) | 1008 |

`pool` is for the Fréchet distance (FID), KID, precision and recall; `spatial`, flattened rows, columns, channels as in
guided-diffusion's evaluator, is for sFID; `logits` (Inception's without their bias, as there) for the Inception score.
"""

import http.client
import pickle
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from pipelines import cifar10, digits, processes
from pipelines.cifar10.classifier import load_classifier as load_cifar10
from pipelines.digits.classifier import load_classifier as load_digits
from pipelines.digits.data import CLASSES, SIZE
from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.states import read_state, write_state
from pipelines.workspace.seals import sha256_of_file

BATCH = 64  # images a forward pass; fixed, because it moves float rounding
KEPT_TOGETHER = 8 * BATCH  # images whose features are one file of an interrupted run
ANSWER_SECONDS = 8  # how long to wait for a server that weights are fetched from
SPATIAL_MAPS = 7


class Features(NamedTuple):
    """What an extractor makes of N images: float32 on the CPU."""

    pool: torch.Tensor  # (N, D)
    spatial: torch.Tensor  # (N, H·W·maps), rows before columns before maps
    logits: torch.Tensor  # (N, classes)


@dataclass(frozen=True)
class Kind:
    """A row of the table: what an extractor is, before its weights are loaded."""

    name: str
    pool: int  # features
    spatial: int
    size: int | None  # the only height and width it takes; None where it resizes by itself
    classes: int | None  # how many classes its logits name, where they are the labels' classes
    file: Callable[[], Path]  # where its weights lie, or will once they are fetched
    url: str  # that they are fetched from; empty where they come with the project
    load: Callable[[Path], Callable[[torch.Tensor], Features]]  # -> images (N, 1 or 3, H, W) uint8 to features


@dataclass(frozen=True)
class Extractor:
    """An extractor with its weights."""

    kind: Kind
    sha256: str  # of the weights' file
    run: Callable[[torch.Tensor], Features]

    @property
    def name(self) -> str:
        return self.kind.name

    def features(
        self, images: np.ndarray, task: str = "features", report: Report | None = None, kept: Path | None = None
    ) -> Features:
        """images: (N, H, W, 1 or 3) uint8. Raises HqdmError where the extractor does not take their size.

        kept: a folder of these images and this extractor alone, which all processes of a job see. What is found there
        is not computed again, and the processes share the rest.
        """
        self.check_size(images)
        report = report or Report()
        if kept is None:
            report.begin(task, len(images), unit="images")
            parts = [self._of(images, 0, len(images), report)]
        else:
            crew = processes.here()
            files = {start: kept / f"{start:07d}.pt" for start in range(0, len(images), KEPT_TOGETHER)}
            missing = crew.once(lambda: [start for start, file in files.items() if read_state(file, report) is None])
            known = len(images) - sum(min(KEPT_TOGETHER, len(images) - start) for start in missing)
            report.begin(task, len(images), known, unit="images")
            for start in crew.dealt(missing):
                found = self._of(images, start, min(start + KEPT_TOGETHER, len(images)), report)
                write_state(files[start], dict(found._asdict()))
            crew.gathered(None)  # all of them are there
            parts = [Features(**read_state(file, Report())) for file in files.values()]
            report.advance(len(images))
        report.end()
        features = Features(*(torch.cat(values) for values in zip(*parts, strict=True)))
        for name, values in features._asdict().items():
            if not torch.isfinite(values).all():
                raise NumericalFault(f"{task}: the extractor {self.name!r} gives NaN or Inf among its {name} features",
                                     "its weights may be damaged")  # fmt: skip
        return features

    def _of(self, images: np.ndarray, first: int, end: int, report: Report) -> Features:
        """The features of images first … end - 1."""
        parts = []
        with torch.inference_mode():
            for start in range(first, end, BATCH):
                some = np.ascontiguousarray(images[start : min(start + BATCH, end)])
                parts.append(self.run(torch.from_numpy(some).permute(0, 3, 1, 2).contiguous()))
                report.advance(min(start + BATCH, end))
        return Features(*(torch.cat(values).float() for values in zip(*parts, strict=True)))

    def check_size(self, images: np.ndarray, source: str = "the images") -> None:
        """Raise HqdmError, naming `source`, unless the extractor takes images of this size."""
        height, width = images.shape[1:3]
        if self.kind.size not in (None, height) or self.kind.size not in (None, width):
            raise HqdmError(f"{source}: {width}×{height} pixels, but the extractor {self.name!r} takes only "
                            f"{self.kind.size}×{self.kind.size}", "--extractor inception takes any size")  # fmt: skip


class ClassifierExtractor(FeatureExtractorBase):
    """A shipped classifier as torch-fidelity sees extractors: (N, 1 or 3, H, W) uint8 to a tuple of features."""

    build: Callable[[], torch.nn.Module]  # of the classifier
    channels: int  # that it takes

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.classifier = type(self).build()

    @staticmethod
    def get_provided_features_list():
        return Features._fields

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "logits", "fid": "pool", "kid": "pool", "prc": "pool"}[metric]

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        # The mean is exact where the three channels are equal.
        images = images.float().mean(1, keepdim=True) if self.channels == 1 else images.float().expand(-1, 3, -1, -1)
        features = self.classifier.features(images / 127.5 - 1)
        return tuple(features[name] for name in self.features_list)


class DigitsExtractor(ClassifierExtractor):
    """The digits classifier, on (N, 1 or 3, 16, 16)."""

    build, channels = staticmethod(load_digits), 1


class Cifar10Extractor(ClassifierExtractor):
    """The CIFAR-10 classifier, on (N, 1 or 3, 32, 32)."""

    build, channels = staticmethod(load_cifar10), 3


register_feature_extractor("digits", DigitsExtractor)
register_feature_extractor("cifar10", Cifar10Extractor)


def load_extractor(name: str, weights: str | None = None) -> Extractor:
    """An extractor of the table with its weights: the file `weights`, or those it comes with or fetches."""
    kind = find_kind(name)
    file = _weights(kind, weights)
    return Extractor(kind, sha256_of_file(file), kind.load(file))


def find_kind(name: str) -> Kind:
    """A row of the table; UsageError for a name that is not there."""
    if name not in EXTRACTORS:
        raise UsageError(f"no extractor is called {name!r}", did_you_mean(name, [*EXTRACTORS, "none"]))
    return EXTRACTORS[name]


def _weights(kind: Kind, path: str | None) -> Path:
    """The given file, else the kind's own, fetched where it is not there yet."""
    if path is not None and not kind.url:
        raise UsageError(f"the extractor {kind.name!r} comes with its weights", "leave --weights away")
    if path is not None and not Path(path).is_file():
        raise FileFault(f"{path}: no such file of weights")
    file = kind.file() if path is None else Path(path)
    if not file.is_file():
        _fetch(kind.url, file)
    return file


def _classifier(name: str, kind: type[ClassifierExtractor]) -> Callable[[Path], Callable[[torch.Tensor], Features]]:
    def load(_: Path) -> Callable[[torch.Tensor], Features]:
        module = kind(name, list(Features._fields)).eval()
        return lambda images: Features(*module(images))

    return load


def _in_hub() -> Path:
    """torch-fidelity's own file, in torch's hub folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def _fetch(url: str, file: Path) -> None:
    """Download into a file, after making sure within seconds that the server answers: looking up a name can hang."""
    hint = (f"fetch {url} on a connected machine and pass the file as --weights, "
            f"or put it at {file}; without it: --extractor none compares with the teacher alone")  # fmt: skip
    problem = [f"no answer within {ANSWER_SECONDS} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
                problem.clear()
        except (OSError, http.client.HTTPException) as error:
            problem[0] = str(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if problem:
        raise HqdmError(f"the Inception weights are not on this machine and cannot be fetched: {problem[0]}", hint)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=False)  # writes beside and moves
    except (OSError, http.client.HTTPException) as error:
        raise HqdmError(f"fetching the Inception weights failed: {error}", hint) from error


def _load_inception(file: Path) -> Callable[[torch.Tensor], Features]:
    # torch-fidelity unpickles the file without restraint, so first see that it holds tensors and nothing that runs.
    try:
        torch.load(file, map_location="cpu", weights_only=True)
        module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(file)).eval()
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileFault(f"{file}: not the weights of torch-fidelity's Inception: {first_line}",
                        f"the right file is {URL_INCEPTION_V3}") from error  # fmt: skip
    seen = []
    module.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output))  # (N, 192, 17, 17)

    def run(images: torch.Tensor) -> Features:
        seen.clear()
        pool, logits = module(images.expand(-1, 3, -1, -1))
        return Features(pool, seen[0][:, :SPATIAL_MAPS].permute(0, 2, 3, 1).flatten(1), logits)

    return run


EXTRACTORS = {
    "digits": Kind(
        "digits", 64, 128, SIZE, CLASSES, lambda: digits.CLASSIFIER, "", _classifier("digits", DigitsExtractor)
    ),
    "cifar10": Kind(
        "cifar10", 192, 512, cifar10.SIZE, len(cifar10.CLASSES), lambda: cifar10.CLASSIFIER, "",
        _classifier("cifar10", Cifar10Extractor),
    ),
    "inception": Kind("inception", 2048, 2023, None, None, _in_hub, URL_INCEPTION_V3, _load_inception),
}  # fmt: skip
