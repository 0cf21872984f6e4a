"""A profile as methods and stages ask for it: samples of every site's input, statistics, and what quantisers cost.

A half of a divided site (`Site.halves`) is answered from the whole's sample. Importing this module does not load torch.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import FileFault
from pipelines.quant.spec import Site, SitePlan, Transform
from pipelines.workspace.seals import read_values

if TYPE_CHECKING:
    import torch


class Measures:
    """The files of a profile artifact. Rows of its tensors are `timesteps`, in sampling order.

    network: the teacher's, for methods that look at weights.
    """

    def __init__(self, folder: Path, sites: Sequence[Site], network: "torch.nn.Module | None" = None):
        from safetensors import safe_open
        from safetensors.torch import load_file

        self.folder, self.sites = folder, sites
        self._network = network
        # A schedule without a lower limit of its own has -Infinity there.
        self.summary = read_values(folder / "profile.json", "hqdm profile --force", constants=("-Infinity",))
        self.timesteps: list[float] = self.summary["timesteps"]
        self._tensors = load_file(folder / "candidates.safetensors")
        if not (folder / "samples.safetensors").is_file():
            raise FileFault(f"{folder}: the profile has no samples of the sites' inputs", "hqdm profile --force")
        self._samples = safe_open(folder / "samples.safetensors", "pt")
        self._statistics = safe_open(folder / "statistics.safetensors", "pt")
        self._transforms = {
            site: [Transform(**candidate["transform"]) for candidate in entry["candidates"] if not candidate["centred"]]
            for site, entry in self.summary["sites"].items()
        }
        self._whole = {site.name: (site.name, slice(None)) for site in sites}
        for site in sites:
            if site.joint:
                for half, span in zip(site.halves(), (slice(0, site.joint), slice(site.joint, None)), strict=True):
                    self._whole[half.name] = site.name, span

    def transforms(self, site: Site) -> list[Transform]:
        """What the profile measured and the site admits, the identity first."""
        name, _ = self._whole[site.name]
        return [transform for transform in self._transforms[name] if site.admits(transform)]

    def weight(self, site: Site) -> "torch.Tensor":
        """The teacher's weight (out, C, …)."""
        name, span = self._whole[site.name]
        return self._network.get_submodule(name).weight.detach()[:, span]

    def sample(self, site: Site) -> "torch.Tensor":
        """Some of the site's inputs: (T, rows, C, W) of a convolution (whole image rows), (T, rows, C) of a linear."""
        name, span = self._whole[site.name]
        return self._samples.get_tensor(name)[:, :, span].contiguous()

    def own_mean(self, site: Site) -> "torch.Tensor":
        """The mean over all tokens of the image that each token of a linear's sample is of: (T, rows, C). FileFault
        where the profile is of a version that did not keep it.
        """
        name, span = self._whole[site.name]
        return self._seen(self._samples, f"{name}/mean")[:, :, span].contiguous()

    def statistic(self, site: Site, name: str) -> "torch.Tensor":
        """`low`, `high`, `absmax` or `mean` of each channel (T, C), over all values that the profile saw. FileFault
        where the profile is of a version that did not keep it.
        """
        whole, span = self._whole[site.name]
        return self._seen(self._statistics, f"{whole}/{name}")[:, span]

    def _seen(self, file: Any, key: str) -> "torch.Tensor":
        """A tensor of an open file, which older profiles may lack."""
        if key not in file.keys():
            raise FileFault(f"{self.folder}: the profile has no {key}", "hqdm profile --force")
        return file.get_tensor(key)

    def sqnr(self, site: Site, transform: Transform, quantiser: str, bits: int) -> float:
        """dB, mean over the timesteps, of a quantiser of its own for each timestep; −inf where the site does not admit
        the transform.
        """
        if not site.admits(transform):
            return float("-inf")
        return self._measured(site, transform, quantiser, bits, "sqnr").mean().item()

    def sqnrs(self, site: Site, quantiser: str, bits: int) -> dict[str, float]:
        """`sqnr` of every measured transform by its name, for a plan's record."""
        return {
            transform.name: round(self.sqnr(site, transform, quantiser, bits), 2) for transform in self.transforms(site)
        }

    def record(self, plan: SitePlan) -> dict[str, float]:
        """`sqnrs` at a plan's quantiser and bits, its own transform's under that one's name."""
        quantiser, bits = plan.activation_quantiser, plan.activation_bits
        own = {plan.transform.name: round(self.sqnr(plan.site, plan.transform, quantiser, bits), 2)}
        return self.sqnrs(plan.site, quantiser, bits) | own

    def _measured(self, site: Site, transform: Transform, quantiser: str, bits: int, what: str) -> "torch.Tensor":
        """`scale`, `zero` or `sqnr` (T,): the profile's own figure, or computed from the sample."""
        from pipelines.quant.candidates import SIGN_SEED

        other = "" if transform.signs in (None, SIGN_SEED) else f"-{transform.signs}"  # than the diagonal of the names
        key = f"{site.name}/{transform.name}{other}/{quantiser}/{bits}"
        if f"{key}/{what}" not in self._tensors:
            from pipelines.quant.candidates import measure, rotated_rows

            values = measure(rotated_rows(self.sample(site), transform), bits, quantiser)
            names = (f"{key}/{name}" for name in ("scale", "zero", "sqnr"))
            self._tensors |= dict(zip(names, values, strict=True))
        return self._tensors[f"{key}/{what}"]

    @cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self.timesteps)), key=lambda index: self.timesteps[index])

    def activation_scales(
        self, plan: SitePlan, constants: Mapping[str, "torch.Tensor"], groups: Sequence[int], by: str, headroom: float
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Initial scale and zero-point (T,) of a site, timesteps ascending.

        constants: the site's surroundings. groups: of each timestep in the profile's order, or empty. by, headroom: as
        `candidates.initial` takes them; a range is that of all values that the profile saw, which needs no headroom,
        but where they are rotated or lose each image's own mean: of these only the sample is at hand.
        """
        import torch

        from pipelines.quant.candidates import initial, rotated_rows, widened

        if by == "error" and not groups and plan.centring == "none" and not constants.keys() & {"gain", "centre"}:
            known = plan.site, plan.transform, plan.activation_quantiser, plan.activation_bits
            scale, zero = widened(self._measured(*known, "scale"), plan, headroom), self._measured(*known, "zero")
            return scale[self._order].contiguous(), zero[self._order].contiguous()
        if by == "max" and plan.transform.is_identity and plan.centring != "dynamic":
            rows, headroom = self._ends(plan, constants), 1.0
        else:
            rows = rotated_rows(self.moved(plan, constants), plan.transform)  # (T, n)
        groups = groups or range(len(rows))
        scale, zero = torch.empty(len(rows)), torch.empty(len(rows))
        for group in set(groups):
            mine = [index for index, other in enumerate(groups) if other == group]
            found = initial(rows[mine].reshape(1, -1), plan, by, headroom)
            scale[mine], zero[mine] = (value[0] for value in found)
        return scale[self._order].contiguous(), zero[self._order].contiguous()

    def _ends(self, plan: SitePlan, constants: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """The least and the largest value of each channel, centred and scaled: (T, 2·C)."""
        import torch

        ends = torch.stack([self.statistic(plan.site, name) for name in ("low", "high")], 1)
        ends = ends - constants["centre"] if "centre" in constants else ends
        return (ends * constants["gain"] if "gain" in constants else ends).flatten(1)

    def moved(self, plan: SitePlan, constants: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """The sample after centring and scaling."""
        sample = self.sample(plan.site)
        shape = (1, 1, -1, 1) if sample.ndim == 4 else (1, 1, -1)
        if plan.centring == "dynamic":
            sample = sample - self.own_mean(plan.site)
        elif "centre" in constants:
            sample = sample - constants["centre"].view(shape)
        return sample * constants["gain"].view(shape) if "gain" in constants else sample
