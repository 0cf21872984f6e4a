"""Set methods, bit widths and seeds beside each other: table and pictures of scores that were made on the same work.

Its inputs are the scores (`<method> <bits> seed <n>`, and `teacher seed <n>`: the teacher's samples where they have no
score of their own), each student's own plan, distillation and export (`<score's role> <stage>`), which a score does not
lead to where several students have equal integers and share it, the model and its profile. Writes
`table.json` (rows over seeds, cells with their artifacts and the command that makes each again, failures), `table.csv`,
`table.md` and `pictures/`.

Importing this module does not import torch: only the picture of the weights needs it.
"""

import csv
import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import read_yaml, yaml_text
from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.plans import read_sites
from pipelines.quant.spec import Site, Transform, largest_block
from pipelines.report import comparison, comparison_pictures
from pipelines.report.comparison import FLOAT, IDS, TEACHER, role_of
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "compare"
VERSION = 7

ORDER = 32  # of the rotated weights in the picture, or less where 32 does not divide them
WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
# column of the comparison: key of a score's figures, {} is the extractor
SCORES = {
    "fid": "fd_{}", "sfid": "sfd_{}", "is": "is", "precision": "precision", "recall": "recall",
    "class_accuracy": "class_accuracy", "psnr": "psnr_of_mean_mse", "contrast": "contrast",
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A cell without a score: the stage that failed, and what it said."""

    spec: str
    bits: str
    seed: int
    stage: str
    error: str


@dataclass(frozen=True)
class Config:
    methods: list[str] = field(default_factory=list)  # method[/variant][:option=value,…], rows in this order
    bits: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # stage -> its options, the same for all cells
    reference: str | None = field(default=None, metadata={"key": False})  # an artifact; every score names it too
    failed: list[Failure] = field(default_factory=list)


LINKED = ("plan", "distill", "export")  # stages of a student that are inputs beside its score


def command_of(config: Config, spec: str, bits: str, seed: int, model: str) -> str:
    """The command that makes one cell again in its workspace, or finds it up to date. It names no workspace: where that
    is not the default one, who prints the command adds it.
    """
    words = ["hqdm", "compare", spec, "--bits", bits, "--seeds", str(seed), "--model", model]
    for stage, values in config.options.items():
        for name, value in values.items():
            words += ["--option", f"{stage}.{name}={yaml_text(value)}"]
    if config.reference:
        words += ["--reference", config.reference]
    return shlex.join(words)


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The chosen scores by role, which have to be all that were asked for and did not fail; model and profile."""
    failed = {role_of(f.spec, f.bits, f.seed) for f in config.failed}
    cells = [(spec, bits, seed) for bits in config.bits for spec in config.methods for seed in config.seeds]
    made = [role for cell in cells if (role := role_of(*cell)) not in failed]
    wanted = [role_of(TEACHER, FLOAT, seed) for seed in config.seeds]
    wanted += [name for role in made for name in (role, *(f"{role} {stage}" for stage in LINKED))]
    missing = [role for role in wanted if role not in chosen]
    if missing or not wanted:
        raise HqdmError(
            f"a comparison is made of scores and their students, and {len(missing) or 'all'} are missing",
            "hqdm compare makes them first",
        )
    if "profile" not in chosen:
        raise HqdmError("a comparison is of one profile's students, and none is named", "hqdm compare makes it first")
    for role in chosen:
        if role not in (*wanted, "profile"):
            raise UsageError(f"compare has no input {role!r}", "hqdm compare names them")
    found = {role: store.get(ident) for role, ident in chosen.items()}
    return found | {"model": store.ancestor(found["profile"], "model")}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict[str, Any]:
    """Write the table and its pictures; figures: cells, failures, and the best method of each width by figure."""
    store = Store(inputs["profile"].path.parents[1])
    chains = _chains(config, store, inputs)
    cells = []
    for seed in config.seeds:
        cells.append(_teacher_cell(chains[role_of(TEACHER, FLOAT, seed)], seed))
    for bits in config.bits:
        for spec in config.methods:
            for seed in config.seeds:
                if (role := role_of(spec, bits, seed)) in chains:
                    cells.append(_cell(config, chains[role], spec, bits, seed, inputs["model"].id))
    about = _about(config, chains, cells, inputs)
    table = {
        "about": about, "rows": comparison.summarise(cells), "cells": cells,
        "failed": [
            vars(failure) | {"command": command_of(config, failure.spec, failure.bits, failure.seed, about["model"])}
            for failure in config.failed
        ],
    }  # fmt: skip
    table["best"] = _best(table)
    (out.path / "table.csv").write_text(comparison.csv_text(table), encoding="utf-8")
    pictures = _draw(config, table, chains, inputs["model"], out, report)
    (out.path / "table.md").write_text(_page(table, pictures, inputs["profile"]), encoding="utf-8")
    text = json.dumps(_plain(table), indent=1, ensure_ascii=False, allow_nan=False)
    (out.path / "table.json").write_text(text + "\n", encoding="utf-8")
    return {"cells": len(cells), "failed": len(config.failed), "best": table["best"]}


def _chains(config: Config, store: Store, inputs: Mapping[str, Artifact]) -> dict[str, dict[str, Artifact]]:
    """role -> stage -> artifact: of a student from plan to score, of a teacher samples and, where there is one, score.

    Samples and score may be another cell's of equal integers; plan, distillation and export are each cell's own.
    """
    roles = [role_of(TEACHER, FLOAT, seed) for seed in config.seeds]
    roles += [role_of(spec, bits, seed) for bits in config.bits for spec in config.methods for seed in config.seeds]
    chains = {}
    for role in roles:
        if role not in inputs:
            continue
        last = inputs[role]
        chain = {last.stage: last}
        if last.stage == "score":
            chain["sample"] = store.linked(last, "samples")
        chains[role] = chain | {stage: inputs[name] for stage in LINKED if (name := f"{role} {stage}") in inputs}
    return chains


def _measured(chain: Mapping[str, Artifact]) -> dict[str, Any]:
    """What samples and their score say, by the comparison's columns; all figures of the score under `figures`."""
    score, sample = chain.get("score"), chain["sample"].figures
    figures = dict(score.figures) if score else {}
    extractor = figures.get("extractor") or "none"
    measured = {
        column: figures.get(column if column in figures else key.format(extractor)) for column, key in SCORES.items()
    }
    return {
        "images_per_second": sample.get("images_per_second"), "bytes": sample.get("bytes"),
        **{key: None if value is None else float(value) for key, value in measured.items()},  # "inf" is a word in JSON
        "figures": figures,
    }  # fmt: skip


def _teacher_cell(chain: Mapping[str, Artifact], seed: int) -> dict[str, Any]:
    ids = {stage: chain[stage].id if stage in chain else None for stage in IDS}
    return {"spec": TEACHER, "method": TEACHER, "bits": FLOAT, "seed": seed} | _measured(chain) | ids


def _cell(config: Config, chain: Mapping[str, Artifact], spec: str, bits: str, seed: int, model: str) -> dict[str, Any]:
    plan, distilled = chain["plan"], chain["distill"]
    variant, options = plan.figures.get("variant") or plan.config["variant"], plan.config.get("options") or {}
    words = ", ".join([*([variant] if variant else []), *(f"{name}={value}" for name, value in options.items())])
    updates, seconds = distilled.figures.get("updates"), distilled.manifest["seconds"]
    return {
        "spec": spec, "method": f"{plan.config['method']} ({words})" if words else plan.config["method"],
        "variant": variant, "options": options, "bits": bits, "seed": seed,
        "plan_seconds": plan.manifest["seconds"],
        "updates": updates, "distill_seconds": seconds, "seconds_per_update": seconds / updates if updates else None,
        "device": distilled.figures.get("device"), "peak_memory_bytes": distilled.figures.get("peak_memory_bytes"),
        "last_loss": _number(distilled.figures.get("last_loss")),
        **_measured(chain), "bytes": chain["export"].figures.get("bytes"),
        "layers": _layers(plan, bits),
        **{stage: chain[stage].id for stage in IDS}, "command": command_of(config, spec, bits, seed, model),
    }  # fmt: skip


def _layers(plan: Artifact, bits: str) -> dict[str, int] | None:
    """How many sites a plan has at the bits asked (or at widths around them), at 8/8 bits, and in floating point."""
    return _counts(plan.file("plan.yaml"), bits) if "plan.yaml" in plan.manifest["files"] else None


@functools.cache  # the seeds share a plan, and reading its YAML takes a while
def _counts(path: Path, bits: str) -> dict[str, int]:
    counts = {"asked": 0, "eight": 0, "float": 0}
    for site in read_yaml(path)["sites"].values():
        eight = site["quantised"] and (site["weight_bits"], site["activation_bits"]) == (8, 8) and not site["mixed"]
        kind = "float" if not site["quantised"] else "eight" if eight and bits != "w8a8" else "asked"
        counts[kind] += 1
    return counts


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _only(values: Sequence[Any]) -> Any:
    """The value that all have, or the different ones as a text."""
    known = list(dict.fromkeys(values))
    return known[0] if len(known) == 1 else ", ".join(map(str, known)) or None


def _references(scores: Sequence[Artifact]) -> list[str | None]:
    """What was measured against: one file under two paths, as typed from two folders, is one."""
    names: dict[str | None, str | None] = {}
    for score in scores:
        name = score.figures.get("reference")
        names.setdefault(score.config.get("reference_sha256") or name, name)
    return list(names.values())


def _about(
    config: Config, chains: Mapping[str, Mapping[str, Artifact]], cells: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
) -> dict[str, Any]:  # fmt: skip
    """What all figures have in common, for the note under the table."""
    samples = [chain["sample"] for chain in chains.values()]
    scores = [chain["score"] for chain in chains.values() if "score" in chain]
    distilled = [chain["distill"] for chain in chains.values() if "distill" in chain]
    return {
        "model": inputs["model"].id, "model_path": inputs["model"].config.get("path"), "profile": inputs["profile"].id,
        "bits": list(config.bits), "seeds": list(config.seeds), "options": dict(config.options),
        "n": _only([sample.config.get("count") for sample in samples]),
        "steps": _only([sample.config.get("steps") for sample in samples]),
        "guidance": _only([sample.figures.get("guidance") for sample in samples]),
        "scheduler": _only([sample.figures.get("scheduler") for sample in samples]),
        "trajectories": _only([student.config.get("trajectories") for student in distilled]),
        "reference": _only(_references(scores)),
        "reference_n": _only([score.figures.get("reference_n") for score in scores]),
        "extractor": _only([score.figures.get("extractor") or "none" for score in scores]) or "none",
        "layers": any(cell.get("layers") for cell in cells),
        "untrained": any(student.figures.get("updates") == 0 for student in distilled),
        "devices": list(dict.fromkeys(cell["device"] for cell in cells if cell.get("device"))),
        "machine": _only([f"{a.manifest['machine']['cpu']}, {a.manifest['machine']['threads']} threads"
                          for a in [*samples, *distilled]]),
        "libraries": _only([", ".join(f"{name} {version}" for name, version in a.manifest["libraries"].items())
                            for a in [*samples, *distilled]]),
    }  # fmt: skip


def _best(table: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """bits -> heading -> the methods that are best there."""
    winners = comparison.best_of(table)
    labels = {row["spec"]: row["method"] for row in table["rows"]}
    best: dict[str, dict[str, list[str]]] = {}
    for column in comparison.COLUMNS:
        for row in table["rows"]:
            if (row["bits"], row["spec"], column.key) in winners:
                name = comparison.heading(column, table["about"]["extractor"])
                best.setdefault(row["bits"], {}).setdefault(name, []).append(labels[row["spec"]])
    return best


def _plain(value: Any) -> Any:
    """JSON has no infinity: it becomes the word, as in a manifest."""
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _draw(
    config: Config, table: Mapping[str, Any], chains: Mapping[str, Mapping[str, Artifact]], model: Artifact,
    out: Draft, report: Report,
) -> dict[str, str]:  # fmt: skip
    """Every picture that the cells allow; file name -> what it shows."""
    folder = out.path / "pictures"
    folder.mkdir(exist_ok=True)
    students = [cell for cell in table["cells"] if cell["spec"] != TEACHER]
    drawn = {}
    report.begin("pictures", 4 + len(config.bits), unit="pictures")
    if comparison_pictures.against_widths(folder / "widths.png", table):
        drawn["widths.png"] = "figures against bit widths"
    report.advance(1)
    if comparison_pictures.against_orders(folder / "orders.png", table):
        drawn["orders.png"] = "figures against the Hadamard order"
    report.advance(2)
    if curves := _losses(students, chains):
        comparison_pictures.losses(folder / "loss.png", curves)
        drawn["loss.png"] = "distillation loss over updates"
    report.advance(3)
    if layers := _weights(model):
        comparison_pictures.weight_outliers(
            folder / "weights.png", layers, f"{ORDER}, or the largest that divides a layer's channels"
        )
        drawn["weights.png"] = "outliers of the weights, unrotated (single) and rotated (double)"
    report.advance(4)
    first = config.seeds[0]
    for done, bits in enumerate(config.bits, 5):
        mine = [cell for cell in students if (cell["bits"], cell["seed"]) == (bits, first)]
        rows = [("teacher fp32", _images(chains[role_of(TEACHER, FLOAT, first)]))]
        rows += [(f"{cell['method']} {bits}", _images(chains[role_of(cell["spec"], bits, first)])) for cell in mine]
        if mine:
            comparison_pictures.sample_rows(folder / f"samples-{bits}.png", rows)
            drawn[f"samples-{bits}.png"] = f"samples at {bits}, methods as rows, seeds as columns"
        report.advance(done)
    report.end()
    return drawn


def _images(chain: Mapping[str, Artifact]) -> np.ndarray:
    """The first images of a cell, (n, H, W, C) uint8."""
    with np.load(chain["sample"].file("samples.npz"), allow_pickle=False) as file:
        return file["arr_0"][: comparison_pictures.SHOWN]


def _losses(
    students: Sequence[Mapping[str, Any]], chains: Mapping[str, Mapping[str, Artifact]]
) -> dict[str, dict[str, list[np.ndarray]]]:
    """bits -> method -> the losses of each seed, (trajectories, steps) as the sampler visits them, the last timestep
    last; students that do not train have none.
    """
    curves: dict[str, dict[str, list[np.ndarray]]] = {}
    for cell in students:
        student = chains[role_of(cell["spec"], cell["bits"], cell["seed"])]["distill"]
        if "losses.csv" not in student.manifest["files"]:
            continue
        with open(student.file("losses.csv"), newline="") as file:
            rows = [
                (int(row["trajectory"]), -float(row["timestep"]), float(row["loss_per_image"]))
                for row in csv.DictReader(file)
            ]
        rows.sort()
        trajectories = len({trajectory for trajectory, *_ in rows})
        if not rows or len(rows) % trajectories:
            continue
        values = np.array([loss for *_, loss in rows]).reshape(trajectories, -1)
        curves.setdefault(cell["bits"], {}).setdefault(cell["method"], []).append(values)
    return curves


def _weights(model: Artifact) -> list[dict[str, float]]:
    """Peak over deviation and kurtosis of every weight that a rotation along its input channels fits, before and after
    it; empty where the model keeps no weights.
    """
    if WEIGHTS not in model.manifest["files"]:
        return []
    from safetensors import safe_open

    from pipelines.quant.hadamard import rotate_weight

    sites = read_sites(model.file("sites.json"))
    layers = []
    with safe_open(model.file(WEIGHTS), "pt") as file:
        names = set(file.keys())
        for site in sites:
            transform = _rotation(site)
            if transform is None or f"{site.name}.weight" not in names:
                continue
            weight = file.get_tensor(f"{site.name}.weight").float()
            before, after = _shape_of(weight), _shape_of(rotate_weight(weight, transform))
            layers.append(before | {f"{key}_rotated": value for key, value in after.items()})
    return layers


def _rotation(site: Site) -> Transform | None:
    order = largest_block(site.channels, ORDER)
    transform = Transform("channels", order) if order > 1 else None
    return transform if transform and not site.obstacle and site.admits(transform) else None


def _shape_of(weight: Any) -> dict[str, float]:
    """Largest |w| over the standard deviation, and the kurtosis (3 of a normal distribution), of a whole tensor."""
    centred = weight - weight.mean()
    variance = centred.square().mean()
    return {
        "peak": (weight.abs().max() / variance.sqrt()).item(), "kurtosis": (centred**4).mean().div(variance**2).item()
    }  # fmt: skip


def _page(table: Mapping[str, Any], pictures: Mapping[str, str], profile: Artifact) -> str:
    """The table, its note, the failures, the pictures and every cell's artifacts, as one Markdown page."""
    about = table["about"]
    lines = ["# Comparison", "", *comparison.markdown(table), ""]
    if table["failed"]:
        lines += ["## Failed", ""]
        lines += comparison.failures(table)
        lines.append("")
    lines += ["## Pictures", ""]
    for name, what in pictures.items():
        lines += [f"![{what}](pictures/{name})", ""]
    # From this artifact's folder to the profile's, whatever its number will be.
    back = os.path.join("..", "..", profile.id)
    shown = [name for name in profile.manifest["files"] if name.startswith("pictures/")]
    if shown:
        lines += [f"Outliers before and after the transforms, of {profile.id}:", ""]
        lines += [f"- [{name.removeprefix('pictures/')}]({back}/{name})" for name in sorted(shown)] + [""]
    lines += ["## Cells", "", "| cell | plan | distill | export | sample | score |", "|" + " --- |" * 6]
    for cell in table["cells"]:
        links = [f"[{cell[stage]}](../../{cell[stage]})" if cell[stage] else "" for stage in IDS]
        lines.append(f"| {role_of(cell['spec'], cell['bits'], cell['seed'])} | {' | '.join(links)} |")
    lines += ["", "Each is made again, or found up to date, by one command (where the workspace is not `./workspace`,"]
    lines += ["with `-w` and its folder):", "", "```sh"]
    lines += [cell["command"] for cell in [*table["cells"], *table["failed"]] if cell.get("command")]
    lines += ["```", "", f"Model: {about['model']}. Libraries: {about['libraries']}.", ""]
    return "\n".join(lines)
