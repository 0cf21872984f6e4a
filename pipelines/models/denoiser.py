"""What the stages see of a model: a network, what it can be told, its schedule and its sites, saved without pickles."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.errors import FileFault, HqdmError, NumericalFault, UsageError
from pipelines.models.families import FAMILIES
from pipelines.models.families.base import CLASSIFIER_FREE, NONE, Family
from pipelines.models.first_stage import FirstStage
from pipelines.models.source import read_json
from pipelines.quant.correction import Correction
from pipelines.quant.guidance import GuidanceShares
from pipelines.quant.spec import Site

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
CONDITIONS = "conditions.safetensors"
MOST_SIDE = 4096  # of what is denoised


@dataclass(frozen=True)
class ModelInfo:
    """Plain values that go with the weights."""

    family: str  # a row of models/families
    shape: tuple[int, int, int]  # of what is denoised: channels, height, width
    conditions: int  # classes or prompts that can be asked for; 0 for an unconditional model
    guidance: str  # classifier-free, embedded or none
    strength: float  # of guidance, unless asked otherwise
    schedule: dict  # arguments of diffusers' schedulers
    source: str = ""  # what it was read from, in words
    labels: tuple[str, ...] = ()  # the prompts
    options: dict = field(default_factory=dict)  # what the network's own configuration cannot say

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "labels", tuple(self.labels))

    def guidance_or(self, asked: float | None) -> float:
        """The strength asked for, or the model's; UsageError where it has nothing to guide by."""
        if asked is None:
            return self.strength
        if self.guidance == NONE and asked != 1.0:
            what = "is told no condition" if self.conditions == 0 else "has no null condition"
            raise UsageError(f"guidance {asked:g}: the model {what} and cannot be guided", "leave --guidance out")
        return asked


class Denoiser(nn.Module):
    """A network of some family with its conditions: ε (or v, or a velocity) of x at t under condition c, guided.

    network: as diffusers has it. conditions: what it can be told, by name, (n, …) or, for classifier-free guidance,
    (n + 1, …) with the null condition last. guidance_shares, correction: of a student, where such were measured.
    """

    def __init__(
        self, network: nn.Module, conditions: Mapping[str, torch.Tensor], info: ModelInfo,
        first_stage: FirstStage | None = None,
    ):  # fmt: skip
        super().__init__()
        self.network, self.info, self.first_stage = network, info, first_stage
        self.dtype: torch.dtype | None = None  # in which the network is told x, where that is not x's own
        self.guidance_shares: GuidanceShares | None = None
        self.correction: Correction | None = None
        self.conditions = nn.Module()
        for name, value in conditions.items():
            self.conditions.register_buffer(name, value)

    @property
    def family(self) -> Family:
        return FAMILIES[self.info.family]

    def given(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the network is told under conditions (N,) int64."""
        return {name: value[rows.to(value.device)] for name, value in self.conditions.named_buffers()}

    def predict(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """The guided prediction at x (N, C, H, W) for conditions (N,) int64: p_∅ + g·(p_c − p_∅), corrected; g is
        `guidance`, or by a student's shares of it.

        `timestep` is the schedule's, a number or (N,). The conditional and unconditional halves are one batch of 2N
        (g = 1 needs the conditional half alone).
        """
        guided = self.guided(x, timestep, conditions, guidance, self.strength(guidance, timestep))
        return guided if self.correction is None else self.correction.corrected(guided, timestep)

    def strength(self, guidance: float, timestep: torch.Tensor) -> float | torch.Tensor:
        """What a difference of predictions is multiplied with where `guidance` is asked for: 1 where nothing is."""
        if self.info.guidance != CLASSIFIER_FREE:
            return 1.0
        return guidance if self.guidance_shares is None else self.guidance_shares.strength(guidance, timestep)

    def guided(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: torch.Tensor, guidance: float,
        strength: float | torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The guided prediction at a `strength`, a number or a tensor that broadcasts with x; not yet corrected."""
        x = x.contiguous(memory_format=torch.channels_last)
        if not isinstance(strength, torch.Tensor) and strength == 1:
            return self._call(x, timestep, self.given(conditions), guidance)
        null = torch.full_like(conditions, self.info.conditions)
        given = self.given(torch.cat([null, conditions]))
        both = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
        times = torch.cat([timestep, timestep]) if timestep.ndim else timestep
        without, given = self._call(both, times, given, guidance).chunk(2)
        if isinstance(strength, torch.Tensor):
            strength = strength.to(x.device)
        guided = without + strength * (given - without)
        # An image of strength 1 is its conditional prediction in a mixed batch as it is alone.
        return torch.where(strength == 1, given, guided) if isinstance(strength, torch.Tensor) else guided

    def _call(
        self, x: torch.Tensor, timestep: torch.Tensor, given: Mapping[str, torch.Tensor], guidance: float
    ) -> torch.Tensor:
        if self.dtype is None:
            return self.family.call(self.network, x, timestep, given, guidance)
        return self.family.call(self.network, x.to(self.dtype), timestep, given, guidance).to(x.dtype)

    def check_images(self) -> None:
        """HqdmError where no images can be made of what is denoised."""
        if self.first_stage is None and self.info.shape[0] not in (1, 3):
            raise HqdmError(
                f"latents of {self.info.shape[0]} channels are no images, and the model came without a first stage",
                "profile the whole pipeline's folder, which has its vae",
            )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1], (N, C, H, W), fp32."""
        self.check_images()
        return (latents if self.first_stage is None else self.first_stage.decode(latents)).clamp(-1, 1)


@torch.no_grad()
def find_sites(denoiser: Denoiser) -> list[Site]:
    """Every linear and convolution of the denoiser, in the order in which one forward pass reaches them."""
    sites: dict[str, Site] = {}
    joints: dict[str, int] = {}
    joins = _Joins()

    def reads_a_join(name: str):
        def hook(module, args):
            if (width := joins.width(args[0])) is not None:
                joints.update({f"{name}.{layer}": width for layer in ("conv1", "conv_shortcut")})

        return hook

    def seen(name: str):
        def hook(module, args):
            x = args[0]
            shape = dict(kind="linear")
            if isinstance(module, nn.Conv2d):
                shape = dict(
                    kind="conv", stride=module.stride, dilation=module.dilation, groups=module.groups,
                    padding=(0, 0) if isinstance(module.padding, str) else module.padding,
                    positions=tuple(x.shape[-2:]),
                )  # fmt: skip
            sites.setdefault(
                name,
                Site(name=name, role=denoiser.family.role(name), weight=tuple(module.weight.shape), rank=x.ndim,
                     bias=module.bias is not None, obstacle=_obstacle(module), joint=joints.get(name, 0), **shape),
            )  # fmt: skip

        return hook

    handles = [
        module.register_forward_pre_hook(seen(name))
        for name, module in denoiser.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    handles += [
        module.register_forward_pre_hook(reads_a_join(name))
        for name, module in denoiser.network.named_modules()
        if hasattr(module, "conv1") and hasattr(module, "conv_shortcut")  # diffusers' residual blocks
    ]
    with joins:
        denoiser.predict(torch.zeros(1, *denoiser.info.shape), torch.tensor(1), torch.zeros(1, dtype=torch.int64), 1.0)
    for handle in handles:
        handle.remove()
    return list(sites.values())


class _Joins(torch.overrides.TorchFunctionMode):
    """Remembers, while it is entered, which tensors join two others along their channels, as skip connections do."""

    def __init__(self):
        super().__init__()
        self._known: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.cat and result.ndim == 4 and len(args[0]) == 2:
            first, second = args[0]
            if first.shape[1] + second.shape[1] == result.shape[1]:
                self._known.append((result, first.shape[1]))
        return result

    def width(self, x: torch.Tensor) -> int | None:
        """Channels of the first of the two that x joins; None where it joins none."""
        return next((width for joined, width in self._known if joined is x), None)


def _obstacle(module: nn.Module) -> str:
    """Why a layer cannot be quantised; empty where it can."""
    if isinstance(module, nn.Linear):
        return ""
    if module.groups != 1:
        return f"{module.groups} groups: grouped convolutions are not quantised"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode}: only zeros are the same in integers"
    return f"padding {module.padding!r} is not a number" if isinstance(module.padding, str) else ""


def save_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """Write `denoiser/` (as diffusers has it), `conditions.safetensors`, `model.json` and, where there is one,
    `first_stage/`.
    """
    folder = Path(folder)
    (folder / "denoiser").mkdir(parents=True, exist_ok=True)
    denoiser.network.save_config(folder / "denoiser")
    state = {name: value.contiguous() for name, value in denoiser.network.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    save_beside(denoiser, folder)
    (folder / "model.json").write_text(json.dumps(asdict(denoiser.info), indent=1) + "\n")


def save_beside(denoiser: Denoiser, folder: Path) -> None:
    """Write what goes with a network whatever form it has: `conditions.safetensors`, `first_stage/` and, where there
    are such, `guidance.safetensors` and `correction.safetensors`.
    """
    save_file({name: value.contiguous() for name, value in denoiser.conditions.named_buffers()}, folder / CONDITIONS)
    if denoiser.first_stage is not None:
        denoiser.first_stage.save(folder)
    for measured in (denoiser.guidance_shares, denoiser.correction):
        if measured is not None:
            measured.save(folder)


def read_info(folder: Path) -> ModelInfo:
    """The plain values of a saved model, without torch modules."""
    path = Path(folder) / "model.json"
    try:
        return info_from_dict(read_json(path))
    except TypeError as error:
        raise FileFault(
            f"{path}: not a model's description: {error}",
            "make the model artifact again: hqdm profile model.ckpt --force",
        ) from error


def info_from_dict(values: Mapping) -> ModelInfo:
    """The inverse of `asdict`; TypeError for keys that are missing or not known, and for values of other types."""
    if not isinstance(values, Mapping):
        raise TypeError(f"a {type(values).__name__}, no mapping")
    known = {entry.name for entry in fields(ModelInfo)}
    if unknown := sorted(set(values) - known):
        raise TypeError(f"unknown keys {', '.join(unknown)}")
    for name, kind in (("shape", list), ("labels", list), ("schedule", dict), ("options", dict)):
        if name in values and not isinstance(values[name], kind):
            raise TypeError(f"{name} is a {type(values[name]).__name__}")
    info = ModelInfo(**values)
    if info.family not in FAMILIES or not all(isinstance(label, str) for label in (info.source, *info.labels)):
        raise TypeError("no family of models that is known, or labels that are not text")
    if len(info.shape) != 3 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in info.shape):
        raise TypeError(f"shape is not three whole numbers from 1 to {MOST_SIDE}")
    if type(info.conditions) is not int or not 0 <= info.conditions < 2**31 or type(info.strength) not in (int, float):
        raise TypeError("conditions or strength are no numbers")
    return info


def load_denoiser(folder: Path, mapped: bool = False) -> Denoiser:
    """The inverse of `save_denoiser`: fp32, evaluation mode, frozen; convolutions channels-last, the rest mapped.

    mapped: convolutions too are left in the mapped file, as they lie there, for whoever lays them out anew.
    """
    folder = Path(folder)
    info = read_info(folder)
    config = read_json(folder / "denoiser" / "config.json")
    network = FAMILIES[info.family].build(config, info.options)
    fill(network, folder / WEIGHTS, mapped)
    denoiser = Denoiser(network, load_conditions(folder, info), info, FirstStage.load(folder))
    return ready(denoiser, torch.preserve_format if mapped else torch.channels_last)


def load_conditions(folder: Path, info: ModelInfo) -> dict[str, torch.Tensor]:
    """What a saved model can be told. FileFault where rows are missing or not floating-point numbers."""
    path = Path(folder) / CONDITIONS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileFault(f"{path}: {error}", "make the artifact again with --force") from error
    rows = info.conditions + (info.guidance == CLASSIFIER_FREE) if info.conditions else None
    for name, value in found.items():
        if not name.isidentifier() or not value.is_floating_point() and value.dtype != torch.int64:
            raise FileFault(f"{path}: {name[:80]!r} is {value.dtype}", "make the artifact again with --force")
        if value.ndim == 0 or (rows is not None and len(value) != rows):
            raise FileFault(
                f"{path}: {name} is of shape {tuple(value.shape)} for {rows} conditions",
                "make the artifact again with --force",
            )
    return found


def check_finite(denoiser: Denoiser) -> None:
    """NumericalFault that names the first tensor of a model that holds NaN or Inf."""
    parts = {"": denoiser.network, "conditions.": denoiser.conditions}
    for prefix, part in parts.items():
        for name, value in part.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NumericalFault(
                    f"the model's tensor {prefix}{name} holds NaN or Inf",
                    "fetch the checkpoint again, or give it in fp32: half precision overflows at 65504",
                )


def fill(network: nn.Module, path: Path, mapped: bool = False) -> None:
    """Give a network on the meta device its tensors from a file.

    A convolution's weight is copied, channels-last, unless `mapped`; everything else stays a view of the mapped file.
    The two come through maps of their own, so that the pages that were copied are let go.
    """
    spatial = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    try:
        for wanted in (True, False):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if (name in spatial) == wanted}
            if wanted and not mapped:
                for name in tensors:
                    tensors[name] = tensors[name].clone(memory_format=torch.channels_last)
            network.load_state_dict(tensors, strict=False, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FileFault(f"{path}: {error}", "make the model artifact again: hqdm profile … --force") from error
    if empty := [name for name, value in network.named_parameters() if value.is_meta]:
        raise FileFault(f"{path}: no tensor for {', '.join(empty[:5])}", "make the model artifact again: --force")


def place(device: torch.device, *parts: nn.Module) -> None:
    """Move modules to a device, in place: memory that they share they share there too, parameters are new ones, and
    what is divided among processes (on the meta device) stays as it is.
    """
    moved: dict[tuple, torch.Tensor] = {}
    for module in (module for part in parts for module in part.modules()):
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is None or value.is_meta or value.device == device:
                    continue
                memory = value.untyped_storage()
                key = memory.data_ptr(), value.dtype
                if key not in moved:
                    moved[key] = torch.empty(0, dtype=value.dtype).set_(memory).to(device)
                there = moved[key].as_strided(value.shape, value.stride(), value.storage_offset())
                learned = isinstance(value, nn.Parameter)
                store[name] = nn.Parameter(there, requires_grad=value.requires_grad) if learned else there


def _channels_last(_module, _args, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def ready(denoiser: Denoiser, memory_format: torch.memory_format = torch.channels_last) -> Denoiser:
    """Evaluation mode, frozen, channels-last: the state in which every stage uses a denoiser.

    An input of one channel is both formats at once, and torch then takes the slower one for the whole first level, so
    a UNet's first convolution's output is told.
    """
    if hasattr(denoiser.network, "conv_in"):
        denoiser.network.conv_in.register_forward_hook(_channels_last)
    return denoiser.eval().requires_grad_(False).to(memory_format=memory_format)
