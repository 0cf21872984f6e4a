"""The plan as a file: YAML that a person can read, edit and hand back. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.config import from_dict, read_yaml, strict_json, to_dict, write_yaml, yaml_value
from pipelines.errors import FileFault, UsageError, did_you_mean
from pipelines.quant.spec import WEIGHT_BITS, Bits, Site, SitePlan, Transform, site_from_dict

FORMAT = 2
TRAINED = ("adapters", "weight_scales", "activation_scales", "zero_points")  # what the published recipes train
TRAINABLE = (*TRAINED, "weights", "biases")


@dataclass(frozen=True)
class Reconstruction:
    """How a student is calibrated and its blocks reconstructed: AdaRound's and BRECQ's settings.

    A block gets as many iterations as distillation would make updates, `trajectories` × steps, which is the same work;
    published are 20,000 of rounding and 5,000 of scales, at rates of 1e-3 and 4e-4. Few iterations need larger rates.
    """

    spread: Literal["even", "normal"] = "even"  # of the calibration's timesteps over a trajectory
    timesteps: int = 20  # of the calibration (Q-Diffusion: 20)
    images: int = 16  # at each of them, at most trajectories × batch (Q-Diffusion: 256)
    normal_mean: float = 0.4  # of the spread `normal`, as a share of the trajectory, 0 at the image (PTQ4DM's code)
    normal_deviation: float = 0.4
    rescale: bool = False  # activation scales are found anew on the calibration, whatever the profile's sample gave
    rounding_share: float = 0.8  # of the iterations, for the weights' rounding; 0: to the nearest
    scale_share: float = 0.2  # of the iterations, for activation scales; 0: as they were calibrated
    rounding_rate: float = 5e-2  # of Adam; measured best of 2e-2, 5e-2 and 1e-1 at 64 iterations
    rounding_weight: float = 0.01  # of what pushes a rounding to 0 or 1, a sum over a block's weights
    beta_first: float = 20.0  # its exponent falls linearly from here …
    beta_last: float = 2.0  # … to here
    warm_up: float = 0.2  # share of the iterations without it
    temporal_block: bool = False  # time embedding and all time projections are one block (TFMQ-DM)

    def __post_init__(self):
        for name in ("timesteps", "images"):
            if getattr(self, name) < 1:
                raise UsageError(f"reconstruction: {name} cannot be {getattr(self, name)}", "it takes 1 or more")
        for name in ("rounding_share", "scale_share", "warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"reconstruction: {name} cannot be {getattr(self, name)}", "it is a share, 0 to 1")
        for name in ("normal_deviation", "rounding_rate", "rounding_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"reconstruction: {name} cannot be {getattr(self, name)}", "it takes 0 or more")
        if self.beta_last <= 0 or self.beta_first < self.beta_last:
            raise UsageError(
                f"reconstruction: beta cannot fall from {self.beta_first} to {self.beta_last}",
                "20 and 2 are the published values",
            )

    @property
    def learns(self) -> bool:
        """Whether it does more than calibrate."""
        return self.rounding_share > 0 or self.scale_share > 0


@dataclass(frozen=True)
class Recipe:
    """How the student is trained; the defaults are those of EfficientDM's and HQ-DM's public code, but for `momentum`,
    `activation_scale_from` and `headroom`, which has none.
    """

    lora_rank: int = 32
    lora_rate_divisor: float = 2500.0  # a layer's LoRA learns at mean(weight scale) / divisor: scale-aware optimisation
    # … or, by bits of the weights, at a divisor of their own: sites with fewer bits than were asked for.
    narrow_rate_divisors: dict[str, float] | None = None
    weight_scale_rate: float = 1e-6
    activation_scale_rate: float = 5e-4  # of the scale in orthonormal coordinates
    zero_point_rate: float = 5e-4
    base_weight: Literal["quantised", "float"] = (
        "quantised"  # what LoRA is added to: the integer weight dequantised, or the float weight
    )
    # Of scales, zero-points and factors by timestep: each timestep's own, or as of one tensor, which moves all of them
    # on at every update (the public code's).
    momentum: Literal["own", "shared"] = "own"
    # Where the adapters' rate counts a weight scale: among the weights, or in the quantiser, where they are over the
    # site's gain and rotated.
    step: Literal["weight", "quantiser"] = "weight"
    weight_factors: bool = False  # a learned factor on the weight scale of every output for every timestep …
    site_factors: bool = False  # … or one on all of a site, of few bytes; both learn at activation_scale_rate
    # In which the timesteps of a trajectory are learned: as the sampler visits them, or as drawn for each trajectory.
    order: Literal["trajectory", "shuffled"] = "trajectory"
    updates: Literal["distill", "reconstruct", "none"] = "distill"  # how the student learns; none: as it was calibrated
    # Of: adapters, weights, biases, weight_scales, activation_scales, zero_points.
    trains: list[str] = field(default_factory=lambda: list(TRAINED))
    # Of the sites whose adapters, weights, biases and weight scales train; empty: of all.
    roles: list[str] = field(default_factory=list)
    activation_scale_by: Literal["error", "max"] = (
        "error"  # how initial scales are found: least squared error, or range
    )
    # … and on what: the sample of the timestep that it is of (or of its group), or that of all of them, from where each
    # timestep learns apart (the public code's one calibration batch).
    activation_scale_from: Literal["timestep", "trajectory"] = "timestep"
    weight_scale_by: Literal["error", "max"] = "error"
    headroom: float = 1.3  # of 8-bit activations beyond what was found in a sample: rare values show when clipped
    relative_scales: bool = False  # activation scales learn by their logarithm, so the rate is a share of them
    bias_rate: float = 1e-4
    weight_rate: float = 1e-5
    ema: float = 0.0  # decay of an average of what is trained, which is then the student; 0: none
    weighting: Literal["none", "timestep"] = "none"  # a loss over its running mean at each timestep, or as it is
    relation: float = 0.0  # weight of MPQ-DM's distillation of relations between positions; 0: none
    guidance_signal: float = 0.0  # weight of guidance's signal against its noise (`quant/guidance.py`); 0: as asked
    correction: bool = False  # PTQD's, of ε, measured after training
    correction_images: int = 64  # that it is measured on, teacher's trajectories of their own
    reconstruction: Reconstruction | None = None  # where updates is `reconstruct`
    weight_scale_rate_divisor: float = 0.0  # a layer's weight scales learn at mean / this; 0: at weight_scale_rate

    def __post_init__(self):
        for name in self.trains:
            if name not in TRAINABLE:
                raise UsageError(f"recipe: trains cannot name {name!r}", did_you_mean(name, TRAINABLE))
        if self.headroom < 1:
            raise UsageError(f"recipe: headroom cannot be {self.headroom}", "it takes 1 or more; 1.3 is ample")
        if self.guidance_signal < 0:
            raise UsageError(
                f"recipe: guidance_signal cannot be {self.guidance_signal}", "0 guides as asked; 1.5 is usual"
            )
        if not 0 <= self.ema < 1:
            raise UsageError(f"recipe: ema cannot be {self.ema}", "it takes 0 or a decay below 1, such as 0.99")
        if self.weight_factors and self.site_factors:
            raise UsageError("recipe: weight_factors and site_factors are both true", "one of them says the other")
        if self.relation and self.order != "trajectory":
            raise UsageError(
                f"recipe: a relation is between the features of consecutive timesteps, and order is {self.order}",
                "order: trajectory, or relation: 0",
            )
        if self.lora_rank < 1 or self.lora_rate_divisor <= 0:
            raise UsageError(
                f"recipe: lora_rank {self.lora_rank} and lora_rate_divisor {self.lora_rate_divisor} must be positive",
                "32 and 2500 are the published values",
            )
        for bits, divisor in (self.narrow_rate_divisors or {}).items():
            if bits not in map(str, WEIGHT_BITS) or divisor <= 0:
                raise UsageError(
                    f"recipe: narrow_rate_divisors cannot be {bits}: {divisor:g}",
                    f"it takes positive numbers by bits of weights ({', '.join(map(str, WEIGHT_BITS))})",
                )
        if self.correction_images < 1:
            raise UsageError(
                f"recipe: correction_images cannot be {self.correction_images}",
                "64 is usual; correction: false is none",
            )
        if self.weight_scale_rate_divisor < 0:
            raise UsageError(
                f"recipe: weight_scale_rate_divisor cannot be {self.weight_scale_rate_divisor}",
                "0 lets weight scales learn at weight_scale_rate",
            )
        for name in (
            "weight_scale_rate", "activation_scale_rate", "zero_point_rate", "bias_rate", "weight_rate", "relation",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise UsageError(
                    f"recipe: {name} cannot be {getattr(self, name)}", "0 leaves those parameters as they are"
                )
        if (self.updates == "reconstruct") != (self.reconstruction is not None):
            if self.reconstruction is not None:
                what = f"recipe: updates is {self.updates}, which takes no reconstruction"
                raise UsageError(what, "updates: reconstruct, or leave it out")
            object.__setattr__(self, "reconstruction", Reconstruction())


def changed(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """A recipe with some of its keys anew, their values as YAML writes them; `reconstruction.images` is a key inside
    another. UsageError for a key that there is not, and for a value that it does not take.
    """
    values = to_dict(recipe)
    for key, text in changes.items():
        *outer, name = key.split(".")
        place: Any = values
        for part in outer:
            place = place.get(part)
            if not isinstance(place, dict):
                raise UsageError(
                    f"recipe.{key}: {part} of this recipe has no keys inside it",
                    f"give all of it, recipe.{part}=…; `hqdm methods NAME` shows what a recipe sets",
                )
        place[name] = yaml_value(text, f"recipe.{key}")
    return from_dict(Recipe, values, "recipe") if changes else recipe


@dataclass(frozen=True)
class Course:
    """How long and on what the student trains, or its blocks are reconstructed."""

    trajectories: int
    steps: int
    batch: int  # images of a trajectory; guidance doubles what the denoisers see
    guidance: float
    eta: float
    seed: int

    @property
    def updates(self) -> int:
        return self.trajectories * self.steps


@dataclass(frozen=True)
class Plan:
    """Every site's decision, how the student is to be trained, and the timesteps of its scales (in sampling order)."""

    method: str
    variant: str
    bits: Bits
    recipe: Recipe
    timesteps: list[int | float]
    sites: list[SitePlan]
    groups: list[int] = field(
        default_factory=list
    )  # of each timestep: those of a group share scales; empty: each its own
    options: dict[str, Any] = field(default_factory=dict)  # of the method, as they were in force

    def __post_init__(self):
        if self.groups and len(self.groups) != len(self.timesteps):
            raise UsageError(
                f"plan: {len(self.groups)} groups for {len(self.timesteps)} timesteps",
                "give a number for each, or an empty list",
            )

    @property
    def quantised(self) -> list[SitePlan]:
        """The sites that have quantisers, in the tables' order."""
        return [site for site in self.sites if site.quantised]


@dataclass(frozen=True)
class _SiteEntry:
    """A site as the file has it; its shape is the model's and not to be edited."""

    quantised: bool
    role: str = ""
    transform: Transform = Transform()
    inverse: str = "none"
    weight_bits: int = 8
    activation_bits: int = 8
    weight_quantiser: str = "symmetric"
    activation_quantiser: str = "symmetric"
    why: str = ""
    sqnr: dict[str, float] = field(default_factory=dict)
    centring: str = "none"
    scaling: bool = False
    mixed: bool = False


@dataclass(frozen=True)
class _PlanFile:
    format: int
    method: str
    variant: str
    bits: str
    timesteps: list[int | float]
    sites: dict[str, Any]
    recipe: Recipe = Recipe()
    groups: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def read_sites(path: Path) -> list[Site]:
    """The sites of a model, from its artifact's `sites.json`; FileFault for anything else."""
    try:
        entries = strict_json(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("not a list of mappings")
        return [site_from_dict(entry) for entry in entries]
    except (OSError, ValueError, UsageError) as error:
        raise FileFault(f"{path}: not a model's sites: {error}", "hqdm profile model.ckpt --force") from error


def write_plan(plan: Plan) -> str:
    """The plan as YAML text. A site left in floating point shows its reason and nothing that would not count."""
    sites, recipe = {}, to_dict(plan.recipe)
    for name in (
        "guidance_signal", "weight_scale_rate_divisor", "site_factors", "order", "momentum", "step",
        "narrow_rate_divisors", "activation_scale_from",
    ):  # fmt: skip
        if recipe[name] == getattr(Recipe, name):  # left out where unused: older plans made again are the same file
            del recipe[name]
    for site in plan.sites:
        entry: dict[str, Any] = {"role": site.site.role, "quantised": site.quantised, "why": site.why}
        if site.quantised:
            entry |= {
                "transform": to_dict(site.transform), "inverse": site.inverse, "weight_bits": site.weight_bits,
                "activation_bits": site.activation_bits, "weight_quantiser": site.weight_quantiser,
                "activation_quantiser": site.activation_quantiser, "centring": site.centring,
                "scaling": site.scaling, "mixed": site.mixed, "sqnr": dict(site.sqnr),
            }  # fmt: skip
        sites[site.site.name] = entry
    return write_yaml(
        {
            "format": FORMAT, "method": plan.method, "variant": plan.variant, "bits": str(plan.bits),
            "timesteps": [int(step) if step == int(step) else step for step in plan.timesteps],
            "groups": list(plan.groups), "options": dict(plan.options), "recipe": recipe, "sites": sites,
        }
    )  # fmt: skip


def read_plan(path: Path, sites: list[Site]) -> Plan:
    """A plan file against the sites of its model. Errors name the file, the site and the key."""
    values = from_dict(_PlanFile, read_yaml(path), str(path))
    if values.format != FORMAT:
        raise FileFault(
            f"{path}: plan format {values.format}, this hqdm reads {FORMAT}", "make the plan again: hqdm plan"
        )
    known: dict[str, Site] = {}
    for site in sites:
        halves = site.halves() if site.joint else ()
        divided = any(half.name in values.sites for half in halves)
        known |= {part.name: part for part in (halves if divided else (site,))}
    for name in values.sites:
        if name not in known:
            raise UsageError(f"{path}: the model has no site {name!r}", did_you_mean(name, known))
    missing = [name for name in known if name not in values.sites]
    if missing:
        raise UsageError(
            f"{path}: no entry for site {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            "every site needs one; quantised: false leaves a site as it is",
        )
    plans = []
    for name, site in known.items():
        if not isinstance(values.sites[name], Mapping):
            raise UsageError(f"{path}: sites.{name} is {values.sites[name]!r}", "it takes a mapping")
        entry = from_dict(_SiteEntry, values.sites[name], f"{path}: sites.{name}")
        fields = {key: value for key, value in vars(entry).items() if key != "role"}
        plans.append(SitePlan(site=site, **fields))
    return Plan(
        values.method, values.variant, Bits.parse(values.bits), values.recipe, values.timesteps, plans, values.groups,
        values.options,
    )  # fmt: skip
