"""APQ-DM: timesteps share a few quantisers, by how their activations are distributed.

Every timestep belongs to one of G groups, each with one activation scale and zero-point a layer, so that

    Σ_g min over the group's quantisers of Σ_{t in g} Σ_layers ‖x_t − Q_g(x_t)‖² / ‖x_t‖²

is least. A layer's candidates are the quantisers of the timesteps by themselves, found by error at 4 bits. Among spans
of the schedule the least is found exactly, by dynamic programming; then timesteps move to another group, wherever it is
in the schedule, until none gains.

Source: Wang et al., "Towards Accurate Post-training Quantization for Diffusion Models", CVPR 2024 (arXiv 2305.18723),
and ChangyuanWang17/APQ-DM. The paper searches by gradients of softmax importances π_{t,g} with their entropy as a
penalty and takes the largest in the end; its public code groups channels inside a timestep instead, and never takes the
largest. The search here has the paper's aim, timesteps in G groups with one quantiser each, without a relaxation. Its
active choice of calibration timesteps is not built: it saves teacher evaluations, and the profile has seen every
timestep. As in the code nothing but the grouping is learned, and weights are rounded to the nearest, here with ranges
by error (there by maximum). Activations are per tensor (there per channel), the 8-bit and floating-point layers the
other methods' (there all but the residual blocks' convolutions stay in floating point). G is 8 in the code.
"""

from typing import TYPE_CHECKING

from pipelines.methods.base import NOT_AS_ASKED, Measured, Method, Option, Recipe, Variant
from pipelines.methods.equivalent import plan_of
from pipelines.quant.spec import Bits, Site, SitePlan, integer_range

if TYPE_CHECKING:
    import torch

BITS = 4  # at which groups are searched, whatever the plan's
VALUES = 1024  # of a layer's input at a timestep, for the search
ROUNDS = 20  # of moving timesteps; it ends before, since every move lowers the error


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """No transform anywhere; the groups are the plan's, for all sites."""
    return plan_of(site, bits, measured, "asymmetric", "scales shared by groups of timesteps")


def groups(measured: Measured, variant: Variant) -> list[int]:
    """The group of every timestep, numbered by first appearance in sampling order."""
    import torch

    most, count = variant.options["groups"], len(measured.timesteps)
    if count <= most:
        return []
    sites = [site for site in measured.sites if not site.obstacle and site.role not in NOT_AS_ASKED] or list(
        measured.sites
    )
    return grouped(torch.stack([errors(measured.sample(site)) for site in sites]), most)


def errors(sample: "torch.Tensor") -> "torch.Tensor":
    """Noise over signal (T, T) of a site's input: at each timestep, under each timestep's own quantiser.

    sample: (T, …).
    """
    import torch

    from pipelines.quant.affine import dequantise, quantise
    from pipelines.quant.candidates import measure

    rows = sample.flatten(1)
    if rows.shape[1] > VALUES:  # drawn, since every nth value would be of the same few channels
        rows = rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))[:VALUES]]
    scale, zero, _ = measure(rows, BITS, "asymmetric")
    low, high = integer_range(BITS, False)
    signal = rows.square().sum(1).clamp(min=1e-30)
    noise = [
        (dequantise(quantise(rows, s, z, low, high), s, z) - rows).square().sum(1) / signal
        for s, z in zip(scale, zero, strict=True)
    ]
    return torch.stack(noise, 1)


def grouped(noise: "torch.Tensor", most: int) -> list[int]:
    """Groups of timesteps with the least total noise. noise: (sites, T, candidates)."""
    import torch

    count = noise.shape[1]
    sums = torch.cat([torch.zeros_like(noise[:, :1]), noise.cumsum(1)], 1)
    # cost[i, j]: of timesteps i … j − 1 as one group
    cost = torch.full((count + 1, count + 1), float("inf"), dtype=noise.dtype)
    for start in range(count):
        cost[start, start + 1 :] = (sums[:, start + 1 :] - sums[:, start : start + 1]).amin(2).sum(0)
    best, ends = cost[0], []
    for _ in range(most - 1):
        best, last = (best[:, None] + cost).min(0)
        ends.append(last)
    bounds = [count]
    for last in reversed(ends):
        bounds.append(int(last[bounds[-1]]))
    belongs = torch.zeros(count, dtype=torch.int64)
    for group, (start, end) in enumerate(zip(bounds[:0:-1], bounds[-2::-1], strict=True), 1):
        belongs[start:end] = group
    for _ in range(ROUNDS):
        present = belongs.unique()
        chosen = torch.stack([noise[:, belongs == group].sum(1).argmin(1) for group in present], 1)  # (sites, groups)
        each = torch.gather(noise, 2, chosen[:, None].expand(-1, count, -1)).sum(0)  # (T, groups)
        now = present[each.argmin(1)]
        if torch.equal(now, belongs):
            break
        belongs = now
    order = list(dict.fromkeys(belongs.tolist()))
    return [order.index(group) for group in belongs.tolist()]


METHOD = Method(
    name="apq_dm",
    summary="timesteps in groups that share activation scales, searched by distribution; nothing else is learned",
    source="Wang et al., CVPR 2024 (arXiv 2305.18723); ChangyuanWang17/APQ-DM",
    variants={"published": Variant("the paper's groups over timesteps", Recipe(updates="none", trains=[]))},
    default_variant="published",
    options={"groups": Option(8, "of timesteps that share scales; 1: static", least=1)},
    decide=decide,
    groups=groups,
)
