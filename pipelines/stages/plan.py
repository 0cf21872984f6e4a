"""Decide for every site: transform, where its inverse goes, bit widths, quantisers and initial scales, and write why.

Writes `plan.yaml`, which a person can read, edit and hand back, and `scales.safetensors`:

    timesteps (T,) fp64, ascending · <site>/activation_scale, <site>/activation_zero (T,) fp32, of the raw-rotated
    activation · <site>/weight_scale, <site>/weight_zero (out,) fp32
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.errors import HqdmError, UsageError
from pipelines.events import Report
from pipelines.methods import find
from pipelines.methods.base import measured_sqnr
from pipelines.plans import Plan, read_plan, write_plan
from pipelines.quant.spec import Bits, SitePlan, Transform, site_from_dict
from pipelines.store import Artifact, Draft, Store

NAME = "plan"
VERSION = 2


@dataclass(frozen=True)
class Config:
    method: str = "hqdm"
    variant: str | None = None  # the method's default
    bits: str = "w4a4"
    edited: str | None = field(default=None, metadata={"key": False, "path": True})  # a plan.yaml changed by hand
    edited_sha256: str | None = None


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The profile, and the model it was made from."""
    profile = store.get(chosen["profile"]) if "profile" in chosen else store.current("profile")
    if profile is None:
        raise HqdmError("there is no profile to plan from", "hqdm profile model.ckpt")
    return {"profile": profile, "model": store.ancestor(profile, "model")}


class ProfileMeasures:
    """A profile's candidates as methods and this stage ask for them."""

    def __init__(self, profile: Artifact):
        from safetensors.torch import load_file

        self.summary = json.loads(profile.file("profile.json").read_text())
        self._tensors = load_file(profile.file("candidates.safetensors"))
        self._transforms = {
            site: [Transform(**candidate["transform"]) for candidate in entry["candidates"] if not candidate["centred"]]
            for site, entry in self.summary["sites"].items()
        }

    def transforms(self, site: str) -> list[Transform]:
        """The transforms that were measured with scales."""
        return self._transforms[site]

    def tensor(self, site: str, transform: Transform, quantiser: str, bits: int, what: str):
        """`scale`, `zero` or `sqnr` (T,) in the profile's order of timesteps; None where it was not measured."""
        if transform not in self._transforms[site]:
            return None
        return self._tensors.get(f"{site}/{transform.name}/{quantiser}/{bits}/{what}")

    def sqnr(self, site: str, transform: Transform, quantiser: str, bits: int) -> float:
        """dB, mean over the timesteps; −inf where it was not measured."""
        values = self.tensor(site, transform, quantiser, bits, "sqnr")
        return float("-inf") if values is None else values.mean().item()


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Write the plan and its scales; figures: sites by transform, bits, mean SQNR before and after."""
    import torch
    from safetensors.torch import save_file

    from pipelines.models.denoiser import load_denoiser
    from pipelines.quant.affine import choose
    from pipelines.quant.hadamard import rotate_weight

    measured = ProfileMeasures(inputs["profile"])
    sites = [site_from_dict(entry) for entry in json.loads(inputs["model"].file("sites.json").read_text())]
    timesteps = measured.summary["timesteps"]
    if config.edited is not None:
        plan = read_plan(Path(config.edited), sites)
        if sorted(plan.timesteps) != sorted(timesteps):
            raise UsageError(
                f"{config.edited}: its timesteps are not those of {inputs['profile'].id}",
                "leave timesteps as they were, or profile with the same --steps",
            )
        plan = replace(plan, sites=[_measured_anew(site, measured) for site in plan.sites])
    else:
        method, variant_name, variant = find(config.method, config.variant)
        bits = Bits.parse(config.bits)
        decided = [method.decide(site, bits, measured, variant) for site in sites]
        plan = Plan(method.name, variant_name, bits, variant.recipe, timesteps, decided)
    (out.path / "plan.yaml").write_text(write_plan(plan))

    order = sorted(range(len(timesteps)), key=lambda index: timesteps[index])
    tensors = {"timesteps": torch.tensor(sorted(timesteps), dtype=torch.float64)}
    network = load_denoiser(inputs["model"].path).network
    report.begin("weight scales", len(plan.quantised), unit="sites")
    for done, site in enumerate(plan.quantised, 1):
        name = site.site.name
        for what, key in (("scale", "activation_scale"), ("zero", "activation_zero")):
            values = measured.tensor(name, site.transform, site.activation_quantiser, site.activation_bits, what)
            if values is None:
                names = ", ".join(known.name for known in measured.transforms(name))
                raise UsageError(
                    f"site {name}: {site.transform.name} was not profiled, so it has no scales", f"profiled: {names}"
                )
            tensors[f"{name}/{key}"] = values[order].contiguous()
        weight = network.get_submodule(name).weight
        if site.inverse == "double":
            weight = rotate_weight(weight, site.transform)
        scale, zero = choose(weight.flatten(1), *site.weight_range)
        tensors[f"{name}/weight_scale"], tensors[f"{name}/weight_zero"] = scale, zero
        report.advance(done)
    report.end()
    save_file(tensors, out.path / "scales.safetensors")
    return _figures(plan)


def _measured_anew(site: SitePlan, measured: ProfileMeasures) -> SitePlan:
    """An edited site with the SQNR of its own bits and quantiser, whatever the file said."""
    if not site.quantised:
        return site
    return replace(site, sqnr=measured_sqnr(site.site, measured, site.activation_quantiser, site.activation_bits))


def _figures(plan: Plan) -> dict:
    kinds: dict[str, int] = {}
    for site in plan.quantised:
        kinds[site.transform.name] = kinds.get(site.transform.name, 0) + 1
    rotated = [site for site in plan.quantised if not site.transform.is_identity]
    return {
        "method": plan.method, "variant": plan.variant, "bits": str(plan.bits), "sites": len(plan.sites),
        "quantised": len(plan.quantised), "transforms": dict(sorted(kinds.items())),
        "sqnr_before": _mean([site.sqnr["none"] for site in rotated if "none" in site.sqnr]),
        "sqnr_after": _mean([site.sqnr[site.transform.name] for site in rotated if site.transform.name in site.sqnr]),
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None
