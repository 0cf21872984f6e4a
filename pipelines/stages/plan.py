"""Decide for every site: transform, where its inverse goes, bit widths, quantisers and initial scales, and write why.

Writes `plan.yaml`, which a person can read, edit and hand back, and `scales.safetensors`:

    timesteps (T,) fp64, ascending · <site>/activation_scale, <site>/activation_zero (T,) fp32, of the raw-rotated
    activation · <site>/weight_scale, <site>/weight_zero (out,) fp32 · <site>/gain, centre, taps, row_bits, where the
    method has such
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.errors import HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.measures import Measures
from pipelines.methods import Method, Variant, find
from pipelines.plans import Plan, read_plan, read_sites, write_plan
from pipelines.quant.spec import Bits, SitePlan
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

NAME = "plan"
VERSION = 15
_DECIDED: dict[tuple, list[SitePlan]] = {}


@dataclass(frozen=True)
class Config:
    method: str = "hqdm"
    variant: str | None = None  # the method's default
    bits: str = "w4a4"
    options: dict[str, str | bool | int | float] = field(default_factory=dict)  # of the variant; kept as words
    edited: str | None = field(default=None, metadata={"key": False, "path": True})  # a plan.yaml changed by hand
    edited_sha256: str | None = None

    def __post_init__(self):
        # As --set writes them, so that a recipe's 16 and the command's "16" are the same run.
        words = {
            name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in self.options.items()
        }
        object.__setattr__(self, "options", words)
        find(self.method, self.variant, words)
        Bits.parse(self.bits)


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """The profile, and the model it was made from."""
    profile = store.get(chosen["profile"]) if "profile" in chosen else store.current("profile")
    if profile is None:
        raise HqdmError("there is no profile to plan from", "hqdm profile model.ckpt")
    return {"profile": profile, "model": store.ancestor(profile, "model")}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict:
    """Write the plan and its scales; figures: sites by transform, bits, mean SQNR before and after."""
    import torch
    from safetensors.torch import save_file

    from pipelines.models.denoiser import load_denoiser
    from pipelines.quant.affine import choose, cover
    from pipelines.quant.hadamard import rotate_weight
    from pipelines.quant.layers import divide
    from pipelines.quant.surroundings import taps_of, weight_bounds

    sites = read_sites(inputs["model"].file("sites.json"))
    network = load_denoiser(inputs["model"].path).network
    measured = Measures(inputs["profile"].path, sites, network)
    if config.edited is not None:
        plan = read_plan(Path(config.edited), sites)
        if plan.timesteps != measured.timesteps:
            raise UsageError(
                f"{config.edited}: its timesteps are not those of {inputs['profile'].id}",
                "leave timesteps as they were, or profile with the same --steps",
            )
        plan = replace(plan, sites=[_measured_anew(site, measured) for site in plan.sites])
        words = {name: str(value) for name, value in plan.options.items()}
        method, variant_name, variant = find(plan.method, plan.variant, words)
    else:
        method, variant_name, variant = find(config.method, config.variant, config.options)
        bits = Bits.parse(config.bits)
        decided = _placements(method, variant_name, variant, bits, measured, inputs["profile"], report)
        groups = method.groups(measured, variant) if method.groups else []
        shown = {
            name: variant.options[name]
            for name, option in method.options_of(variant_name).items()
            if not (option.quiet and variant.options[name] == option.default)
        }
        recipe = variant.recipe_at(bits, decided)
        plan = Plan(method.name, variant_name, bits, recipe, measured.timesteps, decided, groups, shown)

    recipe = plan.recipe
    tensors = {"timesteps": torch.tensor(sorted(measured.timesteps), dtype=torch.float64)}
    together = [0] * len(plan.timesteps) if recipe.activation_scale_from == "trajectory" else plan.groups
    divide(network, [site.site for site in plan.quantised])
    (out.path / "plan.yaml").write_text(write_plan(plan))
    report.begin("scales", len(plan.quantised), unit="sites")
    for done, site in enumerate(plan.quantised, 1):
        name, weight = site.site.name, network.get_submodule(site.site.name).weight.detach()
        constants = method.constants(site, weight, measured, variant) if method.constants else {}
        _check_constants(site, constants)
        if "centre" in constants:
            constants["taps"] = taps_of(constants["centre"], weight, site.site)
        scale, zero = measured.activation_scales(site, constants, together, recipe.activation_scale_by, recipe.headroom)
        mine = {"activation_scale": scale, "activation_zero": zero}
        if "gain" in constants:
            weight = weight / constants["gain"].view(1, -1, *[1] * (weight.ndim - 2))
        if site.inverse == "double":
            weight = rotate_weight(weight, site.transform)
        rows = weight.flatten(1)
        search = cover if recipe.weight_scale_by == "max" else choose
        if site.mixed:
            mine["weight_scale"], mine["weight_zero"] = torch.empty(len(rows)), torch.empty(len(rows))
            low, high = weight_bounds(site, constants["row_bits"])
            for bounds in set(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)):
                chosen = (low.flatten() == bounds[0]) & (high.flatten() == bounds[1])
                found = search(rows[chosen], *map(int, bounds))
                mine["weight_scale"][chosen], mine["weight_zero"][chosen] = found
        else:
            mine["weight_scale"], mine["weight_zero"] = search(rows, *site.weight_range)
        _check_scales(name, mine | constants, tensors["timesteps"].tolist())
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in (constants | mine).items()}
        report.advance(done)
    report.end()
    save_file(tensors, out.path / "scales.safetensors")
    return _figures(plan)


def _placements(
    method: Method, name: str, variant: Variant, bits: Bits, measured: Measures, profile: Artifact, report: Report
) -> list[SitePlan]:
    """Every site's decision. Those of the last plan where the recipe alone is another, of which a decision reads the
    roles that train and nothing else: the rows of a comparison by recipes are then searched for once.
    """
    options = tuple(sorted((option, repr(value)) for option, value in variant.options.items()))
    key = (profile.digest, method.decide, name, options, str(bits), tuple(variant.recipe.roles))
    if key not in _DECIDED:
        report.begin("placements", len(measured.sites), unit="sites")
        decided: list[SitePlan] = []
        for done, site in enumerate(measured.sites, 1):
            made = method.decide(site, bits, measured, variant)
            decided += made if isinstance(made, tuple) else (made,)
            report.advance(done)
        report.end()
        _DECIDED.clear()
        _DECIDED[key] = method.allocate(decided, bits, measured, variant) if method.allocate else decided
    return _DECIDED[key]


def _check_constants(site: SitePlan, constants: Mapping) -> None:
    """The tensors that a placement speaks of have to be there."""
    for wanted, name in ((site.scaling, "gain"), (site.centring == "static", "centre"), (site.mixed, "row_bits")):
        if wanted != (name in constants):
            word = {"gain": "scaling", "centre": "centring", "row_bits": "mixed"}[name]
            raise UsageError(
                f"site {site.site.name}: {word} is {'asked for' if wanted else 'not asked for'}, and the method "
                f"{'has no' if wanted else 'has a'} {name} for it",
                f"set {word} as the method plans it, or choose a method that has it: hqdm methods",
            )


def _check_scales(name: str, tensors: Mapping, timesteps: list[float]) -> None:
    """NumericalFault, by site and timestep, for scales that are not positive and constants that are not finite."""
    hint = "leave the site in floating point (quantised: false in the plan), or see what the model does there"
    for what, value in tensors.items():
        scale = what.endswith("_scale")
        good = value.isfinite() & (value > 0) if scale else value.isfinite()
        if not good.all():
            place = int((~good).flatten().nonzero()[0])
            where = f"timestep {timesteps[place]:g}" if what.startswith("activation_") else f"output or channel {place}"
            raise NumericalFault(
                f"site {name}: its {what} is {value.flatten()[place]:g} at {where}, not a "
                f"{'positive' if scale else 'finite'} number", hint,
            )  # fmt: skip


def _measured_anew(site: SitePlan, measured: Measures) -> SitePlan:
    """An edited site with the SQNR of its own bits and quantiser, whatever the file said."""
    if not site.quantised:
        return site
    return replace(site, sqnr=measured.record(site))


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
