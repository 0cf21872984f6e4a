"""The search behind `hqdm --variant auto`: for every site, the placement that costs its output least.

Over transform (none; along the channels at every order, without signs and with several diagonals of them; with `axis`
any along the width of images, too, undone on the activation's side), where its inverse goes (single, double),
activation quantiser (symmetric, asymmetric), static centring and scaling, the least of

    noise of the activation + `bias` · its part that is the same for all tokens + noise of the weight,

each as a share of the output's energy (see `quant.search.SiteSearch`). What a clipped or badly centred quantiser does
to all tokens of an image alike shifts whole channels, where noise averages out, hence the factor. With a byte budget
the bit widths are chosen too: the width is lowered, site after site, where it costs least for the bytes it saves.

Sites at 8 bits are priced with scales of least error; the headroom that a recipe then gives them (`headroom`, 1.3 times
as wide a range) takes 2 dB of what is said here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from pipelines.errors import UsageError
from pipelines.methods.base import NOT_AS_ASKED, Measured, Option, Variant, enough_db
from pipelines.quant.spec import IDENTITY, ORDERS, QUANTISERS, WEIGHT_BITS, Bits, Site, SitePlan, Transform

if TYPE_CHECKING:
    import torch

    from pipelines.quant.search import Cost, SiteSearch

SIGNS = (None, 1, 2, 3)  # seeds of the diagonals that are tried
INVERSES = {"channels": ("single", "double"), "width": ("activation",)}
ALPHA = 0.25  # of the gain that is tried, maxima to the power −α
# Of 1, 3 and 10 the scores of students before training at w4a3 were best with 1 to 3.
OPTIONS = {
    "bias": Option(3.0, "weight of an activation's systematic error against its noise", variants=("auto",), least=0),
    "axis": Option(
        "channels",
        "along what transforms are tried; any: along the width, too",
        ("channels", "any"),
        ("auto",),
        quiet=True,
    ),  # fmt: skip
    # What a search without one of its parts finds tells what the part gives.
    "orders": Option(
        "any",
        "orders of the transforms that are tried; sites that one does not divide stay unrotated by it",
        ("any", "none", *map(str, ORDERS)),
        ("auto",),
        quiet=True,
    ),
    "signs": Option(True, "try diagonals of ±1 signs before a transform", variants=("auto",), quiet=True),
    "double": Option(True, "try transforms of activation and weight, too", variants=("auto",), quiet=True),
    "quantiser": Option("any", "activation quantisers that are tried", ("any", *QUANTISERS), ("auto",), quiet=True),
    "centring": Option(True, "try static centring, whose constants join the biases", variants=("auto",)),
    "scaling": Option(True, "try a gain of each channel", variants=("auto",)),
    "budget": Option(
        0.0,
        "bytes of the quantised weights as a share of what the bits asked for take; 0: as asked",
        variants=("auto",),
        least=0,
        most=1,
    ),
}


def decide(site: Site, bits: Bits, measured: Measured, variant: Variant) -> SitePlan:
    """The cheapest placement of one site at its bits. UsageError for a budget that no widths keep."""
    _check_budget(bits, variant)  # before the search, which takes minutes
    weight, activation = (8, 8) if site.role in NOT_AS_ASKED else (bits.weight, bits.activation)
    search, known = _search(site, measured), {}
    plain = _of_width(SitePlan(site, True, activation_bits=activation), weight)
    unrotated = {quantiser: _cost(search, replace(plain, activation_quantiser=quantiser), measured, known)
                 for quantiser in _quantisers(variant)}  # fmt: skip
    factor = variant.options["bias"]
    quantiser = min(unrotated, key=lambda each: unrotated[each].total(factor))
    best, least = replace(plain, activation_quantiser=quantiser), unrotated[quantiser]
    first = least
    searched = least.total(factor) > 10 ** (-enough_db(bits) / 10)
    if searched:
        for plan in _placements(plain, variant):
            cost = _cost(search, plan, measured, known)
            if cost.total(factor) < least.total(factor):
                best, least = plan, cost
    kept = f"costs {_db(least, factor)} of its output"
    if best.transform.is_identity and best.centring == "none" and not best.scaling:
        why = f"{kept} unrotated ({quantiser}), {'the least of those tried' if searched else 'which is little enough'}"
    else:
        why = f"{kept}, {_db(first, factor)} unrotated ({quantiser})"
    return replace(best, why=why, sqnr=measured.record(best))


def _quantisers(variant: Variant) -> Sequence[str]:
    """The activation quantisers that are tried."""
    only = variant.options["quantiser"]
    return QUANTISERS if only == "any" else (only,)


def _transforms(variant: Variant) -> Iterator[tuple[Transform, str]]:
    """Those that are tried, each with where its inverse goes."""
    options = variant.options
    orders = ORDERS if options["orders"] == "any" else [order for order in ORDERS if str(order) == options["orders"]]
    for axis in ("channels", "width") if options["axis"] == "any" else ("channels",):
        for order, signs in product(orders, SIGNS if options["signs"] else (None,)):
            for inverse in INVERSES[axis]:
                if options["double"] or inverse != "double":
                    yield Transform(axis, order, signs), inverse


def _placements(plain: SitePlan, variant: Variant) -> Iterator[SitePlan]:
    rotations = [(IDENTITY, "none"), *(pair for pair in _transforms(variant) if plain.site.admits(pair[0]))]
    centrings = (
        ["none", "static"] if variant.options["centring"] and not plain.site.role.startswith("time") else ["none"]
    )
    scalings = [False, True] if variant.options["scaling"] else [False]
    for transform, inverse in rotations:
        for quantiser in _quantisers(variant):
            for centring in centrings:
                for scaling in scalings:
                    yield replace(
                        plain, transform=transform, inverse=inverse, activation_quantiser=quantiser, centring=centring,
                        scaling=scaling,
                    )  # fmt: skip


def constants(plan: SitePlan, weight: "torch.Tensor", measured: Measured, variant: Variant) -> dict:
    """The centre (means of the channels) and the gain (absolute maxima to the power −α) of a site."""
    found = {}
    if plan.centring == "static":
        found["centre"] = measured.statistic(plan.site, "mean").mean(0)
    if plan.scaling:
        largest = measured.statistic(plan.site, "absmax").amax(0).clamp(min=1e-5)
        if "centre" in found:
            largest = (largest - found["centre"].abs()).clamp(min=1e-5)
        gain = largest.pow(-ALPHA)
        found["gain"] = gain / gain.log().mean().exp()
    return found


def _search(site: Site, measured: Measured) -> "SiteSearch":
    from pipelines.quant.search import SiteSearch

    return SiteSearch(measured.sample(site), measured.weight(site))


def _cost(search: "SiteSearch", plan: SitePlan, measured: Measured, known: dict) -> "Cost":
    """known: the constants of the site's placements so far, which no transform changes."""
    if (kind := (plan.centring, plan.scaling)) not in known:
        known[kind] = constants(plan, search.weight, measured, None)
    return search.cost(plan, known[kind].get("centre"), known[kind].get("gain"))


def _db(cost: "Cost", bias: float) -> str:
    return f"{10 * math.log10(max(cost.total(bias), 1e-20)):.1f} dB"


def allocate(plans: list[SitePlan], bits: Bits, measured: Measured, variant: Variant) -> list[SitePlan]:
    """The plans with weight widths of their own, so that all weights fit the budget at the least added noise.
    UsageError where the narrowest do not.

    Every site that is not kept at 8 bits starts there; then, as long as the budget is exceeded, the width of the site
    is lowered that adds the least noise for each byte saved. Noise is a share of each site's output, as in `decide`;
    its placements stay.
    """
    _check_budget(bits, variant)
    share, factor = variant.options["budget"], variant.options["bias"]
    chosen = [index for index, plan in enumerate(plans) if plan.quantised and plan.site.role not in NOT_AS_ASKED]
    if not share or not chosen:
        return plans
    sizes = {index: _size(plans[index].site) for index in chosen}
    budget = share * bits.weight * sum(sizes.values())
    cost = {}
    for index in chosen:
        search, known = _search(plans[index].site, measured), {}
        for width in WEIGHT_BITS:
            cost[index, width] = _cost(search, _of_width(plans[index], width), measured, known)
    width = dict.fromkeys(chosen, WEIGHT_BITS[-1])
    while sum(width[index] * sizes[index] for index in chosen) > budget:
        steps = []
        for index in chosen:
            below = [bits for bits in WEIGHT_BITS if bits < width[index]]
            if below:
                added = cost[index, below[-1]].weight - cost[index, width[index]].weight
                steps.append((added / ((width[index] - below[-1]) * sizes[index]), index, below[-1]))
        _, index, narrower = min(steps)
        width[index] = narrower
    return [
        replace(
            _of_width(plan, width[index]),
            why=f"costs {_db(cost[index, width[index]], factor)} at {width[index]} bits within the budget; "
            f"at {plan.weight_bits}: {plan.why}",
        )
        if index in width
        else plan
        for index, plan in enumerate(plans)
    ]


def _check_budget(bits: Bits, variant: Variant) -> None:
    share, least = variant.options["budget"], WEIGHT_BITS[0] / bits.weight
    if 0 < share < least:
        raise UsageError(
            f"budget {share:g}: weights of {WEIGHT_BITS[0]} bits take {least:.4g} of what w{bits.weight} does",
            f"--set budget={math.ceil(least * 1e4) / 1e4:g} or more, or fewer --bits",
        )


def _of_width(plan: SitePlan, bits: int) -> SitePlan:
    """The plan with its weight at `bits`. A zero-point gains little at 8, and kernels take such weights without one."""
    return replace(plan, weight_bits=bits, weight_quantiser="symmetric" if bits == 8 else "asymmetric")


def _size(site: Site) -> int:
    size = 1
    for length in site.weight:
        size *= length
    return size
