"""The table of everything scored: one row for each sample artifact, teacher first. Reads manifests alone, no torch."""

from typing import Any

from pipelines.quant.spec import Bits
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.store import Store

SOURCES = ("teacher", "fake", "int")
SAME_WORK = ("count", "steps", "seed", "scheduler", "guidance", "eta", "batch")
# column: (key of the score's figures, digits shown); {} is the extractor where the key or heading needs it
FIGURES = {
    "FD({})": ("fd_{}", 2),
    "FID": ("fid", 2),
    "sFD({})": ("sfd_{}", 2),
    "sFID": ("sfid", 2),
    "IS({})": ("is", 3),
    "IS": ("is", 3),
    "KD({})": ("kid", 4),
    "KID": ("kid", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "class acc.": ("class_accuracy", 4),
    "PSNR dB": ("psnr_of_mean_mse", 2),
}


def collect(store: Store) -> list[dict[str, Any]]:
    """One row for each sample artifact with its newest score; figures that were not computed are None."""
    # By content: the integer student's images are those of the fake one, so one score may belong to both.
    scores = {link["digest"]: score for score in store.artifacts("score") if (link := score.inputs.get("samples"))}
    pairs = [(sample, scores[sample.digest]) for sample in store.artifacts("sample") if sample.digest in scores]

    def place(pair: tuple[Artifact, Artifact]) -> tuple:
        config, about = pair[0].config, pair[0].figures
        bits = Bits.parse(about["bits"]) if about.get("bits") else Bits(32, 32)
        return (
            config["steps"], -bits.weight, -bits.activation, about.get("method") or "", about.get("variant") or "",
            SOURCES.index(config["source"]), pair[0].id,
        )  # fmt: skip

    rows = [_row(*pair) for pair in sorted(pairs, key=place)]
    columns = dict.fromkeys(column for row in rows for column in row)
    used = [column for column in columns if any(row.get(column) is not None for row in rows)]
    return [{column: row.get(column) for column in used} for row in rows]


def comparable(store: Store) -> dict[str, Artifact]:
    """source -> newest sample artifact, all of one work: the newest sample's steps, seed, scheduler, guidance and
    eta.
    """
    anchor = store.current("sample")
    if anchor is None:
        return {}
    model = store.ancestor(anchor, "model").digest

    def fits(artifact: Artifact, source: str) -> bool:
        config = artifact.config
        same = all(config[name] == anchor.config[name] for name in SAME_WORK)
        return config["source"] == source and same and store.ancestor(artifact, "model").digest == model

    found = {source: store.current("sample", lambda artifact, s=source: fits(artifact, s)) for source in SOURCES}
    return {source: artifact for source, artifact in found.items() if artifact}


def speed_up(store: Store) -> str | None:
    """How the newest integer samples compare with the teacher's of the same work: one sentence, or None without
    both.
    """
    found = comparable(store)
    if "int" not in found or "teacher" not in found:
        return None
    fast, slow = (found[source].figures["images_per_second"] for source in ("int", "teacher"))
    share = found["int"].figures["bytes"] / found["teacher"].figures["bytes"]
    return (
        f"integers sample {fast / slow:.2f} times as fast as the fp32 teacher ({fast:.1f} against {slow:.1f} images/s) "
        f"from {share:.2f} of its bytes"
    )


def equal_images(store: Store) -> list[tuple[str, str]]:
    """Pairs of sample artifacts, (fake, integer), whose images are the same bit for bit."""
    samples = store.artifacts("sample")
    return [
        (fake.id, integer.id)
        for fake in samples
        for integer in samples
        if fake.config["source"] == "fake" and integer.config["source"] == "int" and fake.digest == integer.digest
    ]


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
    extractor = figures.get("extractor") or "none"
    other = extractor != "inception"  # distances on other features than Inception's go by other names
    for heading, (key, digits) in FIGURES.items():
        if heading in ("IS", "KID", "IS({})", "KD({})") and ("{" in heading) != other:
            continue
        value = figures.get(key.format(extractor))
        row[heading.format(extractor)] = round(value, digits) if isinstance(value, float) else value
    interpolated = about.get("interpolated_timesteps") or None
    return row | {"interpolated": interpolated, "reference": figures.get("reference"), "samples": samples.id}
