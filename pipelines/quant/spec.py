"""Plain values that say how a site is quantised. No torch here: plans are read, shown and edited without it."""

import re
from dataclasses import asdict, dataclass, field, replace

from pipelines.config import from_dict
from pipelines.errors import UsageError

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (3, 4, 6, 8)
HALVES = ("first", "second")  # of a divided site, by the ends of their names
ORDERS = (8, 16, 32, 64)  # 2³ … 2⁶, the orders that the paper ablates (table 4)
AXES = ("none", "channels", "width")
INVERSES = ("none", "single", "double", "activation")
QUANTISERS = ("symmetric", "asymmetric")
CENTRINGS = ("none", "static", "dynamic")


@dataclass(frozen=True)
class Bits:
    """Bit widths of weights and activations, written `w4a4`."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> "Bits":
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise UsageError(f"bits {text!r} cannot be read", "write them as w4a4: weight bits, then activation bits")
        weight, activation = int(match[1]), int(match[2])
        if weight not in WEIGHT_BITS or activation not in ACTIVATION_BITS:
            raise UsageError(
                f"bits {text!r} are not supported",
                f"weights take {', '.join(map(str, WEIGHT_BITS))} bits, "
                f"activations {', '.join(map(str, ACTIVATION_BITS))}",
            )
        return cls(weight, activation)

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True)
class Transform:
    """A block-diagonal Hadamard transform with a diagonal of signs before it: x̃ = x·blockdiag(D·H_raw, …).

    H_raw (order × order, entries ±1) is the paper's equation 9 without its 2^(−k/2); D repeats in every block, so that
    D·H_raw is one small matrix. `signs` seeds D; None is D = I. Order 1 on axis "none" is the identity.
    """

    axis: str = "none"
    order: int = 1
    signs: int | None = None

    def __post_init__(self):
        if self.axis not in AXES:
            raise UsageError(f"axis {self.axis!r} does not exist", f"known: {', '.join(AXES)}")
        if self.axis == "none" and (self.order != 1 or self.signs is not None):
            raise UsageError("a transform along no axis has order 1 and no signs", "set axis to channels or width")
        if not 1 <= self.order <= 256 or self.order & (self.order - 1):
            raise UsageError(f"Hadamard order {self.order} is not a power of two up to 256", "use 8, 16, 32 or 64")

    @property
    def is_identity(self) -> bool:
        return self.axis == "none"

    @property
    def name(self) -> str:
        """How people write it: `none`, `channels-32`, `channels-32-signs`."""
        if self.is_identity:
            return "none"
        return f"{self.axis}-{self.order}" + ("" if self.signs is None else "-signs")


IDENTITY = Transform()


@dataclass(frozen=True)
class Site:
    """One quantisable layer of a model: the only word that models and methods share.

    `weight` is the layer's weight shape: (out, in) or (out, in/groups, kh, kw). `positions` are the (height, width) of
    its input, (0, 0) for a linear; the width decides whether a transform along it exists.
    """

    name: str
    kind: str  # linear or conv
    role: str  # first, last, time, condition, skip, attention, feed-forward, modulation, …: models/families name them
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    rank: int = 2  # of its input
    positions: tuple[int, int] = (0, 0)
    obstacle: str = ""  # why it cannot be quantised; empty where it can
    joint: int = 0  # channels of the first half where the input is a concatenation with a skip connection; 0 elsewhere

    def halves(self) -> "tuple[Site, Site]":
        """The two layers that the site is once it is divided where its input was joined; the first has the bias."""
        first, second = (self.joint, True), (self.channels - self.joint, False)
        return tuple(
            replace(self, name=f"{self.name}.{half}", weight=(self.weight[0], width, *self.weight[2:]),
                    bias=self.bias and bias, joint=0)
            for half, (width, bias) in zip(HALVES, (first, second), strict=True)
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.weight[1] * self.groups

    @property
    def outputs(self) -> int:
        return self.weight[0]

    def admits(self, transform: Transform) -> bool:
        """Whether the transform's blocks divide the axis it works on. Nothing is ever padded."""
        if transform.is_identity:
            return True
        if transform.axis == "width":
            return self.kind == "conv" and self.positions[1] > 0 and self.positions[1] % transform.order == 0
        return self.groups == 1 and self.channels % transform.order == 0


@dataclass(frozen=True)
class SitePlan:
    """What is decided for one site. `quantised: false` leaves the layer as it is, and `why` says the reason.

    inverse: where the transform's inverse goes. `single` folds it into the integers of a weight quantised unrotated
    (HQ-DM), `double` rotates the weight before its quantiser (QuaRot), `activation` undoes it on the quantised
    activation (the only place for a transform along the width).

    centring: what is subtracted from the input's channels before everything else, x − c; the layer adds c·Wᵀ back in
    floating point. `static` is a constant of each channel, `dynamic` an image's mean over its tokens (linears only).
    scaling: the channels are multiplied with a gain before the transform, and the weight's columns divided by it
    before its quantiser. mixed: every output has a bit width of its own; `weight_bits` is then the widest.
    """

    site: Site
    quantised: bool = True
    transform: Transform = IDENTITY
    inverse: str = "none"
    weight_bits: int = 8
    activation_bits: int = 8
    weight_quantiser: str = "symmetric"
    activation_quantiser: str = "symmetric"
    why: str = ""
    sqnr: dict[str, float] = field(default_factory=dict)  # dB by transform, at the planned bits, mean over timesteps
    centring: str = "none"
    scaling: bool = False
    mixed: bool = False

    def __post_init__(self):
        where = f"site {self.site.name}: "
        if not self.quantised:
            return
        if self.site.obstacle:
            raise UsageError(f"{where}{self.site.obstacle}", "set quantised: false")
        if self.inverse not in INVERSES:
            raise UsageError(f"{where}inverse {self.inverse!r} does not exist", f"known: {', '.join(INVERSES)}")
        allowed = {"none": ("none",), "channels": ("single", "double"), "width": ("activation",)}[self.transform.axis]
        if self.inverse not in allowed:
            raise UsageError(
                f"{where}inverse {self.inverse!r} does not fit a transform along {self.transform.axis}",
                f"use {' or '.join(allowed)}",
            )
        for what, kind in (("weight", self.weight_quantiser), ("activation", self.activation_quantiser)):
            if kind not in QUANTISERS:
                raise UsageError(f"{where}{what}_quantiser {kind!r} does not exist", f"known: {', '.join(QUANTISERS)}")
        if self.centring not in CENTRINGS:
            raise UsageError(f"{where}centring {self.centring!r} does not exist", f"known: {', '.join(CENTRINGS)}")
        if self.centring == "dynamic" and (self.site.kind != "linear" or self.site.rank < 3):
            raise UsageError(
                f"{where}its input has no tokens of an image to take a mean over", "centring: static, or none"
            )
        if self.weight_bits not in WEIGHT_BITS or self.activation_bits not in ACTIVATION_BITS:
            raise UsageError(
                f"{where}{self.weight_bits}/{self.activation_bits} bits are not supported",
                f"weights take {WEIGHT_BITS}, activations {ACTIVATION_BITS}",
            )
        if not self.site.admits(self.transform):
            axis = self.site.positions[1] if self.transform.axis == "width" else self.site.channels
            raise UsageError(
                f"{where}order {self.transform.order} does not divide its {self.transform.axis} ({axis})",
                "choose an order that divides it, or transform: none; nothing is padded",
            )

    @property
    def activation_range(self) -> tuple[int, int]:
        return integer_range(self.activation_bits, self.activation_quantiser == "symmetric")

    @property
    def weight_range(self) -> tuple[int, int]:
        return integer_range(self.weight_bits, self.weight_quantiser == "symmetric")


def largest_block(length: int, most: int) -> int:
    """The largest power of two that divides `length` and is at most `most`; 1 where none above it does."""
    order = 1
    while order * 2 <= most and length > 0 and length % (order * 2) == 0:
        order *= 2
    return order


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and largest code: ±(2^(b−1) − 1), or 0 … 2^b − 1 with a zero-point."""
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def largest_magnitude(codes: tuple[int, int]) -> int:
    """The largest |code − zero-point| of a range of codes: all of it where a zero-point may lie at either end."""
    low, high = codes
    return high - low if low == 0 else max(-low, high)


def site_to_dict(site: Site) -> dict:
    """Plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(site).items()}


def site_from_dict(values: dict) -> Site:
    """The inverse of `site_to_dict`; UsageError for keys and values that no site has."""
    return from_dict(Site, values, "a site")
