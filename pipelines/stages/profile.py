"""Watch the teacher at work: what goes into every site at every timestep, and what quantising it would cost.

The model's sampler runs one batch of guided trajectories from noise. Of every site's input this keeps, by timestep,

    statistics.safetensors   <site>/minimum, maximum, kurtosis, outliers (T,); low, high, absmax, mean,
                             absmax/<transform> (T, C)
    samples.safetensors      <site>: some inputs, (T, rows, C, W) of a convolution, (T, rows, C) of a linear, and where
                             that has tokens, <site>/mean: of all tokens of the image that each is of
    candidates.safetensors   <site>/<candidate>/<quantiser>/<bits>/scale, zero, sqnr (T,); centred: sqnr alone
    profile.json             the timesteps (rows of all tensors, in sampling order), the schedule, candidates and means
    pictures/                maxima of the channels before and after transforms, SQNR gained by each, SQNR over time

Importing this module does not import torch: only `run` needs it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import HqdmError, NumericalFault, UsageError
from pipelines.events import Report
from pipelines.plans import read_sites
from pipelines.quant.spec import QUANTISERS, Site
from pipelines.report import pictures
from pipelines.workspace.artifacts import Artifact
from pipelines.workspace.drafts import Draft
from pipelines.workspace.store import Store

if TYPE_CHECKING:
    from pipelines.models.denoiser import Denoiser
    from pipelines.quant.observe import Observer

NAME = "profile"
VERSION = 5
MOST = 100_000  # trajectories, all of which are held at once

BITS = (8, 6, 4, 3)
# Candidates by what they have in common: a site's own order along the width, or its largest channel order, may differ.
FAMILIES = (
    "none", "channels-8", "channels-8-signs", "channels-16", "channels-16-signs", "channels-32", "channels-32-signs",
    "channels-64", "channels-64-signs", "width", "centred", "centred-channels",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    steps: int = 20  # of the sampler
    batch: int = 8  # trajectories; guidance doubles what the sites see
    guidance: float | None = None  # the model's
    eta: float | None = None  # 1 where the scheduler has it
    scheduler: str | None = None  # DDIM's, or flow matching's Euler
    seed: int = 0
    sample: int = 4096  # values that are kept of each site and timestep; at least one image row or token

    def __post_init__(self):
        for name in ("steps", "batch", "sample"):
            if getattr(self, name) < 1:
                raise UsageError(f"profile: {name} cannot be {getattr(self, name)}", "it takes 1 or more")
        if self.batch > MOST:
            raise UsageError(f"profile: batch cannot be {self.batch}", f"it takes {MOST} or less")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UsageError(f"profile: eta cannot be {self.eta:g}", "it takes 0 (DDIM) … 1 (DDPM)")


def inputs(config: Config, store: Store, chosen: Mapping[str, str]) -> dict[str, Artifact]:
    """model: the chosen or the newest model artifact."""
    if "model" in chosen:
        return {"model": store.get(chosen["model"])}
    newest = store.current("model")
    if newest is None:
        raise HqdmError(f"{store.root} holds no model", "hqdm profile model.ckpt takes a checkpoint into the workspace")
    return {"model": newest}


def run(config: Config, inputs: dict[str, Artifact], out: Draft, report: Report) -> dict[str, Any]:
    """Write the files above. Figures: sites, timesteps, SQNR by candidate at 4 and 3 bits, and its gain over none."""
    from safetensors.torch import save_file

    from pipelines.diffusion import eta_or, walker
    from pipelines.models.denoiser import check_finite, load_denoiser

    model = inputs["model"]
    denoiser = load_denoiser(model.path)
    check_finite(denoiser)
    sites = read_sites(model.file("sites.json"))
    name = config.scheduler or walker(denoiser.info.schedule)
    config = replace(
        config, scheduler=name, guidance=denoiser.info.guidance_or(config.guidance), eta=eta_or(config.eta, name, 1.0)
    )
    observer = observe(config, denoiser, sites, report)
    statistics = {site.name: observer.sites[site.name].statistics() for site in sites}
    measured = _measure(observer, report)
    ratios = _Ratios(sites, measured)

    save_file(
        {f"{site}/{name}": value.contiguous() for site, named in statistics.items() for name, value in named.items()},
        out.path / "statistics.safetensors",
    )
    save_file(
        {
            f"{site}/{candidate}/{quantiser}/{bits}/{name}": value
            for (site, candidate, quantiser, bits), tensors in measured.items()
            for name, value in tensors.items()
        },
        out.path / "candidates.safetensors",
    )
    samples = {name: seen.stacked_sample().contiguous() for name, seen in observer.sites.items()}
    means = {f"{name}/mean": seen.stacked_mean() for name, seen in observer.sites.items()}
    save_file(
        samples | {name: mean for name, mean in means.items() if mean is not None}, out.path / "samples.safetensors"
    )
    timesteps = list(observer.rows)
    described = _described(config, denoiser, timesteps, sites, statistics, measured)
    (out.path / "profile.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    maxima = {
        name: {key: value.numpy() for key, value in named.items() if key.startswith("absmax")}
        for name, named in statistics.items()
    }
    _draw(out.path / "pictures", config, timesteps, sites, maxima, ratios, report)
    return {"sites": len(sites), "timesteps": len(timesteps)} | ratios.figures((4, 3))


def observe(config: Config, denoiser: "Denoiser", sites: list[Site], report: Report) -> "Observer":
    """Run the teacher's trajectories under observation. Its rows are timesteps in the order of their first visit."""
    import torch

    from pipelines.diffusion import conditions_of, noise_of, timesteps_of, trajectory
    from pipelines.quant.candidates import shown
    from pipelines.quant.observe import Observer

    info = denoiser.info
    visited = timesteps_of(config.scheduler, info.schedule, config.steps)
    indices = list(range(config.batch))
    # Noise and conditions of their own: scales must not be fitted to the images that are scored later.
    noise = noise_of(config.seed, indices, info.shape, "profile")
    conditions = conditions_of(config.seed, indices, info.conditions, "profile classes")
    report.begin("teacher trajectories", len(visited))
    with (
        torch.inference_mode(),
        Observer(
            denoiser.network,
            sites,
            list(dict.fromkeys(visited)),
            shown,
            config.seed,
            denoiser.family.timestep_unit,
            config.sample,
        ) as observer,
    ):
        for step, timestep, x, predicted in trajectory(
            denoiser, config.scheduler, info.schedule, config.steps, noise, conditions, config.guidance, config.eta,
            config.seed, indices,
        ):  # fmt: skip
            for what, values in (("prediction", predicted), ("image", x)):  # no site reads the last of them
                if not values.isfinite().all():
                    raise NumericalFault(
                        f"the teacher's {what} holds NaN or Inf at timestep {float(timestep):g}",
                        "check the checkpoint and its configuration: the full-precision model itself goes wrong there",
                    )
            report.advance(min(step + 1, len(visited)))
    report.end()
    for name, seen in observer.sites.items():
        if not seen.absmax.any():
            report.warn(f"site {name} is dead: all its inputs are 0 at every timestep; its scales are set to 1")
        if not denoiser.network.get_submodule(name).weight.any():
            report.warn(f"site {name} is dead: all its weights are 0; their scales are set to 1")
    return observer


def _measure(observer: "Observer", report: Report) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """(site, candidate, quantiser, bits) -> sqnr and, where a layer could use it, scale and zero: (T,) each."""
    import torch

    from pipelines.quant.candidates import candidates, centred_rows, measure, rotated_rows

    measured: dict[tuple[str, str, str, int], dict[str, torch.Tensor]] = {}
    report.begin("quantisers by error", len(observer.sites), unit="sites")
    with torch.inference_mode():
        for done, (name, seen) in enumerate(observer.sites.items(), 1):
            sample = seen.stacked_sample()
            for candidate in candidates(seen.site):
                rows = rotated_rows(sample, candidate.transform)
                signal = None
                if candidate.centred:
                    signal, rows = rows, centred_rows(rows, seen.mean, sample, candidate.transform)
                for quantiser in QUANTISERS:
                    for bits in BITS:
                        scale, zero, ratio = measure(rows, bits, quantiser, signal)
                        tensors = {"sqnr": ratio}
                        if not candidate.centred:
                            tensors |= {"scale": scale, "zero": zero}
                        measured[name, candidate.name, quantiser, bits] = tensors
            report.advance(done)
    report.end()
    return measured


def _described(
    config: Config,
    denoiser: "Denoiser",
    timesteps: list[int],
    sites: list[Site],
    statistics: Mapping,
    measured: Mapping,
) -> dict[str, Any]:
    """profile.json: what the rows of the tensors are, and every site in a few numbers (means over the timesteps)."""
    from pipelines.quant.candidates import candidates

    described = {}
    for site in sites:
        found = candidates(site)
        described[site.name] = {
            "kind": site.kind,
            "role": site.role,
            "channels": site.channels,
            "candidates": [
                {"name": entry.name, "transform": asdict(entry.transform), "centred": entry.centred} for entry in found
            ],
            "mean": {
                name: _rounded(statistics[site.name][name].double().mean())
                for name in ("minimum", "maximum", "kurtosis", "outliers")
            },
            "sqnr": {
                entry.name: {
                    quantiser: {
                        str(bits): _rounded(measured[site.name, entry.name, quantiser, bits]["sqnr"].double().mean())
                        for bits in BITS
                    }
                    for quantiser in QUANTISERS
                }
                for entry in found
            },
        }
    return {
        "timesteps": timesteps,
        "scheduler": config.scheduler,
        "schedule": denoiser.info.schedule,
        "steps": config.steps,
        "guidance": config.guidance,
        "eta": config.eta,
        "batch": config.batch,
        "seed": config.seed,
        "bits": list(BITS),
        "quantisers": list(QUANTISERS),
        "sites": described,
    }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _family(candidate: str) -> str:
    """`width` for width-16, `centred-channels` for centred-channels-32, else the candidate's own name."""
    for family in ("width", "centred-channels"):
        if candidate.startswith(family):
            return family
    return candidate


class _Ratios:
    """SQNR in dB by site, family, quantiser, bits and timestep, NaN where a site does not admit the family."""

    def __init__(self, sites: list[Site], measured: Mapping):
        rows = {site.name: index for index, site in enumerate(sites)}
        steps = len(next(iter(measured.values()))["sqnr"])
        self.values = np.full((len(sites), len(FAMILIES), len(QUANTISERS), len(BITS), steps), np.nan)
        for (site, candidate, quantiser, bits), tensors in measured.items():
            place = rows[site], FAMILIES.index(_family(candidate)), QUANTISERS.index(quantiser), BITS.index(bits)
            self.values[place] = tensors["sqnr"].numpy()

    def at(self, quantiser: str, bits: int) -> np.ndarray:
        """(sites, families, T)"""
        return self.values[:, :, QUANTISERS.index(quantiser), BITS.index(bits)]

    def gain(self, quantiser: str, bits: int) -> np.ndarray:
        """Over no transform at the same site, mean over the timesteps: (sites, families)."""
        values = self.at(quantiser, bits)
        return (values - values[:, :1]).mean(-1)

    def figures(self, widths: tuple[int, ...]) -> dict[str, Any]:
        """Means over timesteps and the sites that admit a family, and the gain over none at those same sites."""
        found = {"mean_sqnr_db": self.at, "mean_gain_db": self.gain}
        return {
            name: {
                quantiser: {str(bits): _means(values(quantiser, bits)) for bits in widths} for quantiser in QUANTISERS
            }
            for name, values in found.items()
        }


def _means(values: np.ndarray) -> dict[str, float]:
    """family -> mean of values (sites, families, …) where not NaN; families that no site admits are left out."""
    means = {}
    for index, family in enumerate(FAMILIES):
        there = values[:, index][~np.isnan(values[:, index])]
        if len(there):
            means[family] = round(float(there.mean()), 3)
    return means


# ---------------------------------------------------------------------------------------------------------- pictures


def _peak(maxima: np.ndarray) -> float:
    """How far a site's largest channel stands out: its maximum over the median channel's, mean over timesteps."""
    middle = np.median(maxima, axis=1)
    return float((maxima.max(1) / np.where(middle > 0, middle, np.inf)).mean())


def chosen_sites(sites: list[Site], maxima: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Site]:
    """What to show: of each part of the network, the site whose largest channel stands out most.

    Convolutions stand for a UNet's input, middle and output blocks, every site for a transformer's thirds; a model
    without such parts shows its worst site, as `network`. Sites that admit no transform are passed over.
    """
    blocks = [site.name for site in sites if "blocks." in site.name]
    thirds = {name: 3 * index // len(blocks) for index, name in enumerate(blocks)}
    if any(name.startswith("down_blocks") for name in blocks):
        parts = {
            "input block": lambda site: site.kind == "conv" and site.name.startswith("down_blocks"),
            "middle": lambda site: site.kind == "conv" and site.name.startswith("mid_block"),
            "output block": lambda site: site.kind == "conv" and site.name.startswith("up_blocks"),
        }
    else:
        parts = {
            "early blocks": lambda site: thirds.get(site.name) == 0,
            "middle blocks": lambda site: thirds.get(site.name) == 1,
            "late blocks": lambda site: thirds.get(site.name) == 2,
        }
    parts |= {"feed-forward": lambda site: site.role == "feed-forward", "network": lambda site: True}
    found: dict[str, Site] = {}
    for part, belongs in parts.items():
        fitting = [site for site in sites if belongs(site) and len(maxima[site.name]) > 1]
        if fitting and not (part == "network" and found):
            found[part] = max(fitting, key=lambda site: _peak(maxima[site.name]["absmax"]))
    return found


def short(name: str) -> str:
    """A site's name for a picture: `up 0 · attn 1 · to_q` for up_blocks.0.attentions.1.transformer_blocks.0.to_q."""
    for old, new in (
        ("down_blocks.", "down "), ("up_blocks.", "up "), ("mid_block.", "mid."), (".resnets.", " · res "),
        (".attentions.", " · attn "), ("mid.resnets.", "mid · res "), ("mid.attentions.", "mid · attn "),
        (".transformer_blocks.0.", " · "), (".downsamplers.", " · down "), (".upsamplers.", " · up "),
        ("single_transformer_blocks.", "single "), ("transformer_blocks.", "block "),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def _draw(
    folder: Path, config: Config, timesteps: list[int], sites: list[Site],
    maxima: Mapping[str, Mapping[str, np.ndarray]], ratios: _Ratios, report: Report,
) -> None:  # fmt: skip
    shown = chosen_sites(sites, maxima)
    instants = list(dict.fromkeys((0, len(timesteps) // 2, len(timesteps) - 1)))
    halves = f"{config.batch} trajectories" + ("" if config.guidance == 1 else ", conditional and unconditional halves")
    source = (
        f"Largest |x| of each channel over all values ({halves}, {len(timesteps)}-step {config.scheduler}). Transforms "
        "are orthonormal; along the channels the horizontal axis counts rotated coordinates."
    )
    if shown:
        last = len(timesteps) - 1
        pictures.channel_maxima(
            folder / "outliers.png",
            f"Outlier channels before and after a Hadamard transform, timestep {timesteps[last]:g}",
            source,
            [(part, _panels(maxima[site.name], last, short(site.name))) for part, site in shown.items()],
            share="row",
        )
        for part, site in shown.items():
            _draw_site(folder, part, site, maxima[site.name], timesteps, instants, source)
    _draw_gain(folder, sites, ratios)
    _draw_over_time(folder, timesteps, sites, ratios)
    report.note(f"{len(shown) + 3 if shown else 2} pictures, in the artifact's {folder.name}/")


_IN_WORDS = {"none": "no transform", "centred": "mean-centred"}


def _colour(transform: str) -> int:
    """One colour for a kind of transform in all pictures, as an index into `pictures.COLOURS`."""
    kind = "signs" if transform.endswith("signs") else transform.partition("-")[0]
    return ("none", "channels", "signs", "width", "centred").index(kind)


def _transforms_of(maxima: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """(file's key, name of the transform) of the recorded maxima, no transform first."""
    return [(key, key.removeprefix("absmax/") if "/" in key else "none") for key in maxima]


def _panels(maxima: Mapping[str, np.ndarray], row: int, site: str) -> list[pictures.Panel]:
    """Before and after every recorded transform at one timestep; the first panel bears the site's name."""
    return [
        pictures.Panel(site if name == "none" else name, maxima[key][row], _colour(name))
        for key, name in _transforms_of(maxima)
    ]


def _draw_site(
    folder: Path, part: str, site: Site, maxima: Mapping[str, np.ndarray], timesteps: list[int], instants: list[int],
    source: str,
) -> None:  # fmt: skip
    rows = []
    for key, name in _transforms_of(maxima):
        titles = [f"timestep {timesteps[row]:g}" if name == "none" else "" for row in instants]
        panels = [
            pictures.Panel(title, maxima[key][row], _colour(name)) for title, row in zip(titles, instants, strict=True)
        ]
        rows.append((_IN_WORDS.get(name, name), panels))
    pictures.channel_maxima(
        folder / f"outliers-{part.replace(' ', '-')}.png", f"{part.capitalize()}: input of {site.name}", source, rows
    )


def _draw_gain(folder: Path, sites: list[Site], ratios: _Ratios) -> None:
    pictures.heat_map(
        folder / "sqnr-gain.png",
        "SQNR gained by each transform at 4 bits",
        "Change of the signal-to-quantisation-noise ratio of a site's input against no transform and the same "
        "quantiser, mean over timesteps; scales by error search. Grey: the site does not admit the transform. Centred: "
        "every channel's mean at the timestep is subtracted first.",
        [short(site.name) for site in sites],
        FAMILIES[1:],
        {f"{quantiser} quantiser": ratios.gain(quantiser, 4)[:, 1:] for quantiser in QUANTISERS},
        "gain in dB",
        6.0,
    )


def _draw_over_time(folder: Path, timesteps: list[int], sites: list[Site], ratios: _Ratios) -> None:
    names = {"conv": "convolutions", "linear": "linears"}
    grid = []
    for bits in (4, 3):
        row = []
        for kind, plural in names.items():
            families = ["none", "channels-32", "channels-32-signs", "width", "centred"]
            if kind == "linear":
                families.remove("width")
            there = [FAMILIES.index(family) for family in families]
            for quantiser in QUANTISERS:
                values = ratios.at(quantiser, bits)
                of_kind = np.array([site.kind == kind for site in sites])
                admitting = of_kind & ~np.isnan(values[:, there]).any((1, 2))  # the same sites in every curve
                curves = []
                if admitting.any():
                    curves = [
                        pictures.Line(_IN_WORDS.get(family, family), values[admitting, index].mean(0), _colour(family))
                        for family, index in zip(families, there, strict=True)
                    ]
                row.append((f"{admitting.sum()} {plural}, {bits} bits, {quantiser}", curves))
        grid.append(row)
    pictures.lines(
        folder / "sqnr-over-time.png",
        "SQNR of the sites' inputs over the timesteps",
        "Mean in dB over the sites that admit every transform of their panel; one scale for each site and timestep, by "
        "error search. Mean-centred: every channel's mean at the timestep is subtracted first (not for the time "
        "embedding, whose linears are left out). Sampling runs from left to right.",
        timesteps, "timestep", "SQNR in dB", grid, falling=True,
    )  # fmt: skip
