"""The table of everything scored: one row for each sample artifact, teacher first. Reads manifests alone, no torch."""

from typing import Any

from pipelines.store import Artifact, Store

SOURCES = ("teacher", "fake", "int")
# column: (key of the score's figures, digits shown); {} is the extractor where the key or heading needs it
FIGURES = {
    "FD({})": ("fd_{}", 2),
    "FID": ("fid", 2),
    "sFD({})": ("sfd_{}", 2),
    "sFID": ("sfid", 2),
    "IS": ("is", 3),
    "KID": ("kid", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "class acc.": ("class_accuracy", 4),
    "PSNR dB": ("psnr_of_mean_mse", 2),
}


def collect(store: Store) -> list[dict[str, Any]]:
    """One row for each sample artifact with its newest score; figures that were not computed are None."""
    newest: dict[str, tuple[Artifact, Artifact]] = {}
    for score in store.artifacts("score"):
        if "samples" in score.inputs:  # scores of images from elsewhere belong to no artifact
            samples = store.linked(score, "samples")
            newest[samples.id] = (samples, score)

    def place(pair: tuple[Artifact, Artifact]) -> tuple:
        samples = pair[0]
        about = samples.figures
        return (
            SOURCES.index(samples.config["source"]) > 0,
            about.get("method") or "", about.get("variant") or "", about.get("bits") or "",
            samples.config["steps"], SOURCES.index(samples.config["source"]), samples.id,
        )  # fmt: skip

    rows = [_row(*pair) for pair in sorted(newest.values(), key=place)]
    columns = dict.fromkeys(column for row in rows for column in row)
    used = [column for column in columns if any(row.get(column) is not None for row in rows)]
    return [{column: row.get(column) for column in used} for row in rows]


def _row(samples: Artifact, score: Artifact) -> dict[str, Any]:
    about, figures = samples.figures, score.figures
    method = about.get("method")
    row: dict[str, Any] = {
        "model": samples.config["source"],
        "method": f"{method} ({about['variant']})" if method else None,
        "bits": about.get("bits") or "fp32",
        "steps": samples.config["steps"],
        "n": figures.get("n"),
        "images/s": round(about["images_per_second"], 1),
        "bytes": about["bytes"],
    }
    extractor = figures["extractor"]
    for heading, (key, digits) in FIGURES.items():
        value = figures.get(key.format(extractor))
        row[heading.format(extractor)] = round(value, digits) if isinstance(value, float) else value
    return row | {"samples": samples.id}
