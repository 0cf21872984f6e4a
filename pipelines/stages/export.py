"""Export the student: packed integers, or its fake-quantised weights as an ordinary diffusers folder.

`int` merges the adapters, quantises with the very function of training and writes `model.safetensors`, `config.json`,
`conditions.safetensors` and `first_stage/` (see pipelines/students.py). `float` writes a model's folder, whose
`denoiser/` diffusers loads; its activations are not quantised.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import HqdmError
from pipelines.events import Report
from pipelines.plans import read_plan, read_sites
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "export"
VERSION = 4


@dataclass(frozen=True)
class Config:
    format: Literal["int", "float"] = "int"


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The distilled student, and its teacher."""
    distilled = store.get(chosen["distill"]) if "distill" in chosen else store.current("distill")
    if distilled is None:
        raise HqdmError("there is no student to export", "hqdm distill --bits w4a4")
    return {"distill": distilled, "model": store.ancestor(distilled, "model")}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Write the model; figures: bytes, and for integers the shares of fp32 that the layers take by weight bits."""
    from pipelines.models.denoiser import WEIGHTS, load_denoiser, save_denoiser
    from pipelines.students import load_fake, merge_weights, save_integer

    sites = read_sites(inputs["model"].file("sites.json"))
    plan = read_plan(inputs["distill"].file("plan.yaml"), sites)
    teacher = load_denoiser(inputs["model"].path)
    student = load_fake(teacher, plan, inputs["distill"].file("student.safetensors"), freeze=False)
    about = {"method": plan.method, "variant": plan.variant, "bits": str(plan.bits), "format": config.format}
    if config.format == "float":
        merge_weights(student, teacher)
        save_denoiser(teacher, out.path)
        factors = student.network.timestep_tables.factor
        for what, measured in (
            ("shares of guidance", student.guidance_shares), ("correction", student.correction),
            ("factors for each timestep", factors),
        ):  # fmt: skip
            if measured is not None:
                report.warn(f"the student's {what} do not go with weights in floating point; its integers have them")
        return about | {"bytes": (out.path / WEIGHTS).stat().st_size}
    sizes = save_integer(student, plan, out.path, report)
    forms = dict(sorted(Counter(size["form"] for size in sizes.values()).items()))
    shares = {}
    for bits in sorted({size["weight_bits"] for size in sizes.values()}, key=str):
        mine = [size for size in sizes.values() if size["weight_bits"] == bits]
        shares[bits if bits == "mixed" else f"w{bits}"] = {
            "layers": len(mine),
            "of_fp32": round(sum(size["bytes"] for size in mine) / sum(size["float_bytes"] for size in mine), 4),
            "largest": round(max(size["bytes"] / size["float_bytes"] for size in mine), 4),
        }
    return about | {
        "bytes": (out.path / "model.safetensors").stat().st_size, "shares": shares, "forms": forms
    }  # fmt: skip
