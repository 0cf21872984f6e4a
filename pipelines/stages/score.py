"""Score images against a reference and, image by image, against their pairs.

| role or path | what | unless given |
| --- | --- | --- |
| samples | a sample artifact, or `samples_path` | the newest sample artifact |
| reference | a registered data set, `reference_path` (images or statistics), or a sample artifact | see below |
| pair | images to compare with one by one: a sample artifact, or `pair_path` | the teacher's samples, see below |

The pair of a student's sample artifact is the newest one of the same model's teacher with the same count, steps, seed,
scheduler, eta and guidance, where there is one. Images of the digits' size are measured against the digits on their
classifier; all others against their pair, which says how far the student went from its teacher, on Inception. Images
of CIFAR-10's size may be of anything, so that its classifier, `cifar10`, is only taken where it is asked for. The
extractor `none` leaves the figures that need no features: those of the pair.

Writes `scores.json` (every figure with its n, its reference and extractor and their hashes; the warnings) and
`statistics.npz` (mu, sigma, mu_s, sigma_s of the samples), which can be a later run's reference.

Importing this module does not import torch: only `run` needs it, and "up to date" should not wait for it.
"""

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import cifar10, digits, processes
from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.metrics.images import ImageSet, hash_of_images, read_images
from pipelines.metrics.references import (
    REFERENCES,
    Reference,
    Statistics,
    read_reference,
    registered_reference,
    write_statistics,
)  # fmt: skip
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.seals import sha256_of_file
from pipelines.workspace.store import Store

if TYPE_CHECKING:
    from pipelines.metrics.extractors import Extractor, Features

NAME = "score"
VERSION = 3

ROLES = ("samples", "reference", "pair")
SAME_IN_A_PAIR = ("count", "steps", "seed", "scheduler", "eta", "guidance")  # what makes image i of both the same draw
FEW_PER_FEATURE = 5  # images per pool feature below which a Fréchet distance is mostly bias (Inception: 10,240)
DIGITS = (16, 16, 1)  # height, width and channels of the embedded model's images
SHIPPED = {"digits": digits.CLASSIFIER, "cifar10": cifar10.CLASSIFIER}  # extractors that bring their weights
EXTRACTORS = (*SHIPPED, "inception")  # of pipelines.metrics.extractors, which loads torch
MOST_SUBSETS = 1_000_000  # of KID, whose figures are held in memory; 100 are usual
MOST_KEPT = 64 << 20  # bytes of a reference's features; 10,000 of CIFAR-10's take 28 MB, of Inception 200
_KEPT: dict[tuple[str, str], "Features"] = {}  # of one reference, by the hashes of its images and of the weights
SMALL = 75  # pixels a side, a quarter of what Inception works on
FEW_PER_CLASS = 5  # images per class and split below which the Inception score is cut off

PATH = {"key": False, "path": True}  # the hash beside it decides, not where the file lies


@dataclass(frozen=True)
class Config:
    samples_path: str | None = field(default=None, metadata=PATH)
    samples_sha256: str | None = None
    reference: str | None = None  # a registered data set; a reference_path or artifact goes before it
    reference_path: str | None = field(default=None, metadata=PATH)
    reference_sha256: str | None = None
    pair_path: str | None = field(default=None, metadata=PATH)
    pair_sha256: str | None = None
    extractor: str | None = None  # by the images' size; "none" for the pair's figures alone
    extractor_weights: str | None = field(default=None, metadata=PATH)
    extractor_sha256: str | None = None
    splits: int = 10  # of the Inception score
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # images; fewer where there are fewer
    neighbours: int = 3  # k of precision and recall
    seed: int = 0  # of the shuffle before the splits, and of KID's subsets

    def __post_init__(self):
        for name, least in (("splits", 1), ("kid_subsets", 1), ("kid_subset_size", 2), ("neighbours", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"score: {name} cannot be {getattr(self, name)}", f"it takes {least} or more")
        for name, most in (("kid_subsets", MOST_SUBSETS), ("seed", 2**32 - 1)):  # the seed is numpy's
            if getattr(self, name) > most:
                raise UsageError(f"score: {name} cannot be {getattr(self, name)}", f"it takes {most} or less")
        if self.extractor not in (None, "none", *EXTRACTORS):
            raise UsageError(
                f"no extractor is called {self.extractor!r}", did_you_mean(self.extractor, (*EXTRACTORS, "none"))
            )
        if self.extractor_weights is not None and self.extractor in SHIPPED:
            raise UsageError(f"the extractor {self.extractor!r} comes with its weights", "leave --weights away")
        if self.extractor_weights is not None and self.extractor == "none":
            raise UsageError("the extractor 'none' has no features and takes no weights", "leave --weights away")
        if self.reference is not None and self.reference not in REFERENCES:
            raise UsageError(f"no reference is called {self.reference!r}", did_you_mean(self.reference, REFERENCES))


def sources(
    store: Store, samples: str | None = None, reference: str | None = None, pair: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """What a user typed for each role, told apart: (values for Config, role -> artifact id for `inputs`).

    A registered reference's name, the path of an artifact in this workspace, another path, or an artifact's id.
    """
    options, chosen = {}, {}
    for role, text in zip(ROLES, (samples, reference, pair), strict=True):
        if text is None:
            continue
        path = Path(text)
        inside = path.resolve().relative_to(store.root.resolve()) if _is_inside(path, store.root) else None
        if role == "reference" and text in REFERENCES:
            options["reference"] = text
        elif inside is not None and len(inside.parts) == 2 and (path / "manifest.json").is_file():
            chosen[role] = _sample(store, role, inside.as_posix()).id
        elif path.exists():
            options[f"{role}_path"] = str(path.absolute())
        else:
            chosen[role] = _sample(store, role, _artifact_or_fault(store, role, text).id).id
    return options, chosen


def with_hashes(config: Config) -> Config:
    """The configuration with the hash of every file it names, which is what decides whether a run is the same run."""
    found: dict[str, str] = {}
    for role in ROLES:
        path = getattr(config, f"{role}_path")
        if path is not None:
            found[f"{role}_sha256"] = hash_of_images(path)
    if config.extractor_weights is not None:
        found["extractor_sha256"] = sha256_of_file(config.extractor_weights)
    elif (config.extractor or "digits") in SHIPPED:
        found["extractor_sha256"] = sha256_of_file(SHIPPED[config.extractor or "digits"])
    return dataclasses.replace(config, **found)


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """Its sample artifacts: `samples` unless they have a path; `reference` and `pair` where there are any."""
    for role in chosen:
        if role not in ROLES:
            raise UsageError(f"score has no input {role!r}", did_you_mean(role, ROLES))
        if getattr(config, f"{role}_path") is not None:
            raise UsageError(
                f"{role} is given twice: {getattr(config, f'{role}_path')} and {chosen[role]}", "leave one of them out"
            )
    found = {role: _sample(store, role, ident) for role, ident in chosen.items()}
    if config.samples_path is None and "samples" not in found:
        newest = store.current("sample")
        if newest is None:
            raise HqdmError(f"{store.root} holds no samples", "hqdm sample, or name images: hqdm score samples/")
        found["samples"] = newest
    if "samples" in found and "pair" not in found and config.pair_path is None:
        pair = _teacher_pair(store, found["samples"])
        if pair is not None:
            found["pair"] = pair
    return found


def shared(config: Config, inputs: Mapping[str, Artifact]) -> bool:
    """Several processes are dealt the images whose features are extracted."""
    return config.extractor != "none"


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict[str, Any]:
    """Compute every figure that samples, reference and pair allow. Returns the figures' values by key."""
    from pipelines.metrics import scores

    warnings: list[str] = []

    def warn(message: str) -> None:
        warnings.append(message)
        report.warn(message)

    samples = _images("samples", config.samples_path, config.samples_sha256, inputs, report)
    pair = None
    if "pair" in inputs or config.pair_path is not None:
        pair = _images("pair", config.pair_path, config.pair_sha256, inputs, report)
        _check_pair(samples, pair, warn)
    for remark in samples.remarks:
        warn(remark)
    found: _Measured | None = None
    if config.extractor != "none":
        extracted = _extract(config, inputs, samples, pair, out.work, warn, report)
        if not processes.here().leads:  # the figures take seconds
            return {}
        found = _measure(config, samples, extracted, warn, report)
    elif pair is None:
        raise HqdmError(
            f"{samples.source} has no pair, and without an extractor there is nothing else to compare",
            "sample the teacher at the same seeds: hqdm sample teacher, or name images: --pair",
        )
    values = dict(found.values) if found else {}
    if pair is not None:
        values |= scores.pair_figures(samples.images, pair.images)

    records = {}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericalFault(
                f"{name} of {samples.source} is {value}",
                "see whether the images, or the reference's statistics, are what they should be",
            )
        extractor = found.extractor.name if found else "none"
        record: dict[str, Any] = {"label": scores.figure_label(name, extractor), "value": value, "n": len(samples)}
        if name in scores.OF_PAIRS:
            record["pair"] = {"name": pair.source, "sha256": pair.sha256, "n": len(pair)}
        else:
            record["extractor"] = {"name": found.extractor.name, "sha256": found.extractor.sha256}
        if found and name in found.counts:
            against = {"name": found.reference.name, "sha256": found.reference.sha256}
            record["reference"] = against | {"n": found.counts[name]}
        records[scores.figure_key(name, extractor)] = record
    document = {
        "figures": records,
        "samples": {"name": samples.source, "sha256": samples.sha256, "n": len(samples), "size": list(samples.size)},
        "settings": found.settings if found else {},
        "torch_fidelity": importlib.metadata.version("torch-fidelity"),
        "warnings": warnings,
    }  # fmt: skip
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (out.path / "scores.json").write_text(text + "\n", encoding="utf-8")
    about = {"n": len(samples), "samples": samples.source, "pair": pair.source if pair else None}
    if found:
        write_statistics(
            out.path / "statistics.npz", found.pool, found.spatial, found.extractor.name, found.extractor.sha256
        )
        about |= {
            "reference": found.reference.name, "reference_n": found.counts["fid"], "extractor": found.extractor.name
        }  # fmt: skip
    return {key: record["value"] for key, record in records.items()} | about | {"warnings": len(warnings)}


@dataclass(frozen=True)
class _Measured:
    """The figures on an extractor's features, and what they were measured with. counts: the reference's n by figure."""

    extractor: "Extractor"
    reference: Reference
    values: dict[str, Any]
    counts: dict[str, int | None]
    settings: dict[str, int]
    pool: Statistics
    spatial: Statistics


@dataclass(frozen=True)
class _Extracted:
    """What samples and reference look like to an extractor. theirs: None where the reference is statistics."""

    extractor: "Extractor"
    reference: Reference
    features: "Features"
    theirs: "Features | None"


def _extract(
    config: Config, inputs: Mapping[str, Artifact], samples: ImageSet, pair: ImageSet | None, work: Path,
    warn: Callable[[str], None], report: Report,
) -> _Extracted:  # fmt: skip
    """The features of the samples and of the reference, kept in `work` until the run is done."""
    from pipelines.metrics.extractors import load_extractor

    usual = "digits" if samples.images.shape[1:] == DIGITS and not config.extractor_weights else "inception"
    extractor = load_extractor(config.extractor or usual, config.extractor_weights)
    if extractor.name in SHIPPED or config.extractor_weights:
        _expect("the extractor's weights", config.extractor_sha256, extractor.sha256)
    extractor.check_size(samples.images, samples.source)
    reference = _reference(config, inputs, samples, pair, report)
    _check_reference(reference, extractor)
    if reference.images is not None:
        extractor.check_size(reference.images.images, reference.images.source)
    for remark in reference.images.remarks if reference.images else ():
        warn(remark)
    kept = work / "samples" / extractor.sha256[:16]
    features = extractor.features(samples.images, f"features of {samples.source}", report, kept)
    theirs = _features_of(reference, extractor, work, report) if reference.images is not None else None
    return _Extracted(extractor, reference, features, theirs)


def _measure(
    config: Config, samples: ImageSet, extracted: _Extracted, warn: Callable[[str], None], report: Report
) -> _Measured:
    """Every figure that samples, reference and extractor allow."""
    from pipelines.metrics import scores

    extractor, reference, features, theirs = (
        extracted.extractor, extracted.reference, extracted.features, extracted.theirs
    )  # fmt: skip
    pool, spatial = scores.statistics(features.pool), scores.statistics(features.spatial)
    their_pool, their_spatial = reference.pool, reference.spatial
    if theirs is not None:
        their_pool = their_pool or scores.statistics(theirs.pool)
        their_spatial = their_spatial or scores.statistics(theirs.spatial)
    for message in _cautions(samples, reference, features, extractor, config):
        warn(message)

    splits = max(1, min(config.splits, len(samples) // 2))
    if splits != config.splits:
        warn(f"{len(samples)} images are too few for {config.splits} splits; IS is over {splits}")
    subset_size = min(config.kid_subset_size, len(samples), len(theirs.pool) if theirs else len(samples))
    report.note(f"scoring {len(samples)} images of {samples.source} against {reference.name} with {extractor.name}")
    values = {"fid": scores.frechet_distance(pool, their_pool)}
    if their_spatial is not None:
        values["sfid"] = scores.frechet_distance(spatial, their_spatial)
    counts = dict.fromkeys(values, their_pool.n)
    values |= scores.inception_score(features.logits, splits, config.seed)
    if theirs is not None:
        against = scores.kernel_distance(features.pool, theirs.pool, config.kid_subsets, subset_size, config.seed)
        if min(len(samples), len(theirs.pool)) > config.neighbours:
            against |= scores.precision_recall(features.pool, theirs.pool, config.neighbours)
        else:
            warn(f"precision and recall need more than {config.neighbours} images on both sides; left out")
        values |= against
        counts |= dict.fromkeys(against, len(theirs.pool))
    if samples.labels is not None and extractor.kind.classes is not None:
        if 0 <= samples.labels.min() and samples.labels.max() < extractor.kind.classes:
            values["class_accuracy"] = scores.class_accuracy(features.logits, samples.labels)
        else:
            warn(f"{samples.source}: labels outside 0…{extractor.kind.classes - 1}; class accuracy is left out")
    settings = {"splits": splits, "kid_subsets": config.kid_subsets, "kid_subset_size": subset_size,
                "neighbours": config.neighbours, "seed": config.seed}  # fmt: skip
    return _Measured(extractor, reference, values, counts, settings, pool, spatial)


def _features_of(reference: Reference, extractor: "Extractor", work: Path, report: Report) -> "Features":
    """The features of a reference's images, kept for the next run of this process where they are few bytes: students
    are scored one after another against the same reference.
    """
    key = reference.sha256, extractor.sha256
    if key not in _KEPT:
        kept = work / "reference" / extractor.sha256[:16]
        found = extractor.features(reference.images.images, f"features of {reference.name}", report, kept)
        _KEPT.clear()
        if sum(values.nbytes for values in found) > MOST_KEPT:
            return found
        _KEPT[key] = found
    return _KEPT[key]


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _artifact_or_fault(store: Store, role: str, text: str) -> Artifact:
    try:
        return store.get(text)
    except UsageError as error:
        hint = error.hint
        if role == "reference":  # which is more than an artifact: those of the store alone would mislead
            hint = f"it takes {', '.join(REFERENCES)}, a folder or an archive of images, an .npz, or a sample artifact"
        raise UsageError(f"{role}: {text!r} is neither a file or folder nor an artifact", hint) from error


def _sample(store: Store, role: str, ident: str) -> Artifact:
    artifact = store.get(ident)
    if artifact.stage != "sample":
        raise UsageError(f"{role}: {artifact.id} holds no images", "name a sample artifact, such as sample/0001")
    return artifact


def _teacher_pair(store: Store, samples: Artifact) -> Artifact | None:
    """The newest samples of the same model's teacher that were drawn from the same noise in the same way."""
    if samples.config.get("source") == "teacher":
        return None
    model = _model_of(store, samples)
    if model is None:
        return None

    def fits(other: Artifact) -> bool:
        if other.config.get("source") != "teacher":
            return False
        if any(_drawn(other, name) != _drawn(samples, name) for name in SAME_IN_A_PAIR):
            return False
        return _model_of(store, other) == model

    return store.current("sample", fits)


def _drawn(samples: Artifact, name: str) -> Any:
    """How samples were drawn: the configuration leaves to the model what its figures then say."""
    return samples.figures.get(name, samples.config.get(name))


def _model_of(store: Store, samples: Artifact) -> str | None:
    """The digest of the model behind samples; None where it is gone, since then nobody knows whose they were."""
    try:
        return store.ancestor(samples, "model").digest
    except HqdmError:
        return None


def _images(
    role: str, path: str | None, sha256: str | None, inputs: Mapping[str, Artifact], report: Report
) -> ImageSet:
    if path is None:
        return read_images(inputs[role].file("samples.npz"), inputs[role].id, report)
    found = read_images(path, path, report)
    _expect(path, sha256, found.sha256)
    return found


def _reference(
    config: Config, inputs: Mapping[str, Artifact], samples: ImageSet, pair: ImageSet | None, report: Report
) -> Reference:
    if "reference" in inputs:
        return read_reference(inputs["reference"].file("samples.npz"), inputs["reference"].id, report)
    if config.reference_path is not None:
        found = read_reference(config.reference_path, config.reference_path, report)
        _expect(config.reference_path, config.reference_sha256, found.sha256)
        return found
    if config.reference is not None or samples.images.shape[1:] == DIGITS:
        return registered_reference(config.reference or "digits")
    if pair is None:
        raise HqdmError(
            f"{samples.source} has nothing to be measured against",
            "name real images: --reference FOLDER, or sample the teacher at the same seeds: hqdm sample teacher",
        )
    return Reference(pair.source, pair.sha256, pair)


def _expect(what: str, wanted: str | None, found: str) -> None:
    """Refuse a file that is not the one this run's key was computed from."""
    if wanted is not None and wanted != found:
        raise FileFault(f"{what}: changed since this run was set up (sha256 {found[:12]}, not {wanted[:12]})",
                        "type the command again")  # fmt: skip


def _check_pair(samples: ImageSet, pair: ImageSet, warn: Callable[[str], None]) -> None:
    if samples.images.shape != pair.images.shape:
        raise HqdmError(f"{samples.source} holds images of {samples.images.shape}, its pair {pair.source} of "
                        f"{pair.images.shape} (N, H, W, C)", "pairs are compared image by image")  # fmt: skip
    if samples.labels is not None and pair.labels is not None and (samples.labels != pair.labels).any():
        raise HqdmError(f"{samples.source} and its pair {pair.source} are of different classes, first at image "
                        f"{int((samples.labels != pair.labels).argmax())}", "draw both with the same seed")  # fmt: skip
    if samples.names and pair.names and [Path(n).stem for n in samples.names] != [Path(n).stem for n in pair.names]:
        warn(f"{samples.source} and its pair {pair.source} name their files differently; paired in the files' order")


def _check_reference(reference: Reference, extractor: "Extractor") -> None:
    """Refuse statistics of other features than this extractor's."""
    if reference.pool is None:
        return
    if reference.extractor not in (None, extractor.name):
        raise HqdmError(f"{reference.name}: statistics of the extractor {reference.extractor!r}, "
                        f"not of {extractor.name!r}", f"--extractor {reference.extractor}")  # fmt: skip
    if reference.extractor_sha256 not in (None, extractor.sha256):
        raise HqdmError(f"{reference.name}: statistics of {extractor.name!r} with other weights "
                        f"(sha256 {reference.extractor_sha256[:12]}, not {extractor.sha256[:12]})",
                        "compute the reference's statistics again")  # fmt: skip
    for wanted, given in ((extractor.kind.pool, reference.pool), (extractor.kind.spatial, reference.spatial)):
        if given is not None and len(given.mu) != wanted:
            raise HqdmError(f"{reference.name}: statistics of {len(given.mu)} features, but {extractor.name!r} has "
                            f"{wanted}", "Inception has 2048 and 2023: --extractor inception")  # fmt: skip


def _cautions(
    samples: ImageSet, reference: Reference, features: "Features", extractor: "Extractor", config: Config
) -> list[str]:
    """What to know before believing the figures."""
    from pipelines.metrics.scores import imbalance, in_class_order

    said = []
    pool, spatial, n = features.pool.shape[1], features.spatial.shape[1], len(samples)
    counts = {samples.source: n}
    given = reference.pool.n if reference.pool is not None else len(reference.images)
    if given is not None:
        counts[reference.name] = given
    for name, count in counts.items():
        short = [f"{width} {kind}" for kind, width in (("pool", pool), ("spatial", spatial)) if count <= width]
        if short:
            said.append(f"{name}: {count} images for {' and '.join(short)} features: the covariance is rank-deficient")
    if min(counts.values()) < FEW_PER_FEATURE * pool:
        said.append(f"{min(counts.values())} images are few for a Fréchet distance on {pool} features: it is biased "
                    f"upwards, compare it at equal n only ({FEW_PER_FEATURE * pool} would do)")  # fmt: skip
    classes = features.logits.shape[1]
    if n // config.splits < FEW_PER_CLASS * classes:
        said.append(f"{n} images in {config.splits} splits are few for an Inception score over {classes} classes: "
                    "it is cut off, compare it at equal n and splits only")  # fmt: skip

    labels = samples.labels if samples.labels is not None else features.logits.argmax(1).numpy()
    if in_class_order(labels):
        said.append(f"{samples.source}: sorted by class; shuffled here before the Inception score is split, but tools "
                    "that split in file order would report a far lower one")  # fmt: skip
    if samples.labels is not None and samples.labels.min() >= 0:
        theirs = reference.images.labels if reference.images is not None else None
        if theirs is not None:
            shares = np.bincount(theirs) / len(theirs)
        else:
            shares = np.full(int(samples.labels.max()) + 1, 1 / (int(samples.labels.max()) + 1))
        odd, like = imbalance(samples.labels, shares), reference.name if theirs is not None else "equal shares"
        if odd is not None:
            said.append(f"{samples.source}: classes are unbalanced ({odd.min()} to {odd.max()} images a class, unlike "
                        f"{like}), which moves every score")  # fmt: skip
    if extractor.kind.size is None and reference.images is not None and reference.images.size != samples.size:
        said.append(f"{samples.source} has {samples.size[1]}×{samples.size[0]} pixels, {reference.name} "
                    f"{reference.images.size[1]}×{reference.images.size[0]}: both are resized to the extractor's size, "
                    "which moves every score")  # fmt: skip
    elif extractor.kind.size is None and min(samples.size) < SMALL:
        said.append(f"{samples.source}: {samples.size[1]}×{samples.size[0]} pixels are enlarged to 299×299, where "
                    "Inception sees little")  # fmt: skip
    return said
