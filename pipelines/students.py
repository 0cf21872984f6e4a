"""Students: a denoiser with quantised layers in it, fake or integer; how they are built, saved and loaded.

A fake student's files (of the distill stage): `student.safetensors` with

    tables/timesteps (T,) int64 · tables/scale, tables/zero (T, n) · tables/factor (T, m), where trained
    <site>/weight_scale, <site>/weight_zero (out,) · <site>/lora_a, <site>/lora_b · <site>/base_scale (out,), where W is
    the dequantised base weight

and the plan as `plan.yaml`. An integer model's files (of the export stage): `model.safetensors` with

    <site>.weight packed uint8 · <site>.weight_scale fp32 · <site>.weight_zero packed · <site>.bias · tables.* as above
    float.<name>, what is not quantised · embedding

with `config.json`, which holds all that a loader needs.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.config import from_dict, to_dict
from pipelines.diffusion import SCHEDULER
from pipelines.errors import FileFault
from pipelines.kernels import layers as integer_layers
from pipelines.models.denoiser import Denoiser, ModelInfo, ready
from pipelines.plans import Plan
from pipelines.quant import layers as fake_layers
from pipelines.quant.affine import dequantise, quantise
from pipelines.quant.hadamard import rotate_weight, sign_diagonal
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.layers import QuantLayer
from pipelines.quant.spec import SitePlan, site_from_dict, site_to_dict
from pipelines.quant.tables import TimestepTables

FORMAT = "hqdm-int"
FORMAT_VERSION = 1
# What a loader has to compute, in words that go into config.json.
ARITHMETIC = {
    "prologue": "x~ = x·blockdiag(D·H, …) in fp32 (H: Sylvester's ±1 matrix of `order`; D: `sign_diagonals`); "
    "q = clamp(round_half_even(x~ / s_t) + z_t, low, high) - z_t",
    "ranges": "symmetric: ±(2^(bits-1) - 1), no zero-point; asymmetric: 0 … 2^bits - 1, zero-point clamped to it",
    "fold": "single: V = W·blockdiag(D·H, …) along the input channels; none, double: V = W; "
    "activation: V = W and q is replaced by q·blockdiag(D·H, …)^T along the width",
    "epilogue": "y = ((sum(q·V) · (s_t/order)) · w[c]) + bias[c], each operation rounded to fp32; "
    "w = weight_scale, times tables.factor at t where there is one (columns: the sites' outputs, in the order "
    "of `sites`)",
    "timesteps": "rows of the tables by timestep; between two rows scales and factors are interpolated linearly in "
    "their logarithm and zero-points linearly, then rounded; beyond the ends the end row holds",
}


def base_weight(weight: torch.Tensor, plan: SitePlan, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The integer weight at its initial scale, dequantised: what EfficientDM adds LoRA to. (out, in, …) fp32."""
    shape = (-1, *[1] * (weight.ndim - 1))
    rotated = rotate_weight(weight, plan.transform) if plan.inverse == "double" else weight
    codes = quantise(rotated, scale.view(shape), zero.view(shape), *plan.weight_range)
    value = dequantise(codes, scale.view(shape), zero.view(shape))
    if plan.inverse == "double":
        value = rotate_weight(value, plan.transform, inverse=True) / plan.transform.order
    return value


def share_frozen(denoiser: Denoiser) -> Denoiser:
    """A second denoiser whose modules can be swapped while its tensors stay the first one's: no second copy of
    weights.
    """
    memo = {id(tensor): tensor for tensor in [*denoiser.parameters(), *denoiser.buffers()]}
    return copy.deepcopy(denoiser, memo)


def new_student(teacher: Denoiser, plan: Plan, scales: dict[str, torch.Tensor], seed: int) -> Denoiser:
    """A fake student at a plan's initial scales, with fresh adapters, ready to train. `scales`: the plan's tensors.

    The tables hold scales in orthonormal coordinates (times `unit`), which is what the recipe's learning rates are for.
    """
    student = share_frozen(teacher)
    plans = plan.quantised
    names = [site.site.name for site in plans]
    unit = torch.tensor([float(site.transform.order) ** 0.5 for site in plans])
    scale = torch.stack([scales[f"{name}/activation_scale"] for name in names], 1)
    zero = torch.stack([scales[f"{name}/activation_zero"] for name in names], 1)
    factor = None
    if plan.recipe.weight_factors:
        factor = torch.ones(scale.shape[0], sum(site.site.outputs for site in plans))
    tables = TimestepTables(scales["timesteps"].tolist(), scale / unit, zero, factor, unit)
    weight_scale = {name: scales[f"{name}/weight_scale"] for name in names}
    weight_zero = {name: scales[f"{name}/weight_zero"] for name in names}
    layers = fake_layers.swap_in(student.unet, plans, tables, weight_scale, weight_zero)
    for index, (name, layer) in enumerate(layers.items()):
        if plan.recipe.base_weight == "quantised":
            layer.weight = base_weight(layer.weight, layer.plan, weight_scale[name], weight_zero[name])
        layer.add_lora(plan.recipe.lora_rank, torch.Generator().manual_seed(seed * 100_003 + index))
    return student


def student_tensors(student: Denoiser, plan: Plan, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was learned, as the tensors of `student.safetensors`."""
    tables: TimestepTables = student.unet.timestep_tables
    tensors = {f"tables/{name}": value for name, value in tables.raw().items()}
    for name, layer in fake_layers.quant_layers(student.unet).items():
        tensors[f"{name}/weight_scale"] = layer.weight_scale.detach().clone()
        tensors[f"{name}/weight_zero"] = layer.weight_zero.clone()
        tensors[f"{name}/lora_a"] = layer.lora_a.detach().clone().contiguous()
        tensors[f"{name}/lora_b"] = layer.lora_b.detach().clone().contiguous()
        if plan.recipe.base_weight == "quantised":
            tensors[f"{name}/base_scale"] = scales[f"{name}/weight_scale"].clone()
    return tensors


def load_fake(teacher: Denoiser, plan: Plan, path: Path) -> Denoiser:
    """The fake student of `student.safetensors`, frozen, for sampling and export. The teacher's weights are shared."""
    tensors = _load(path)
    student = share_frozen(teacher)
    plans = plan.quantised
    weight_scale = {site.site.name: tensors[f"{site.site.name}/weight_scale"] for site in plans}
    weight_zero = {site.site.name: tensors[f"{site.site.name}/weight_zero"] for site in plans}
    layers = fake_layers.swap_in(student.unet, plans, _tables(tensors, "tables/"), weight_scale, weight_zero)
    for name, layer in layers.items():
        if f"{name}/base_scale" in tensors:
            layer.weight = base_weight(layer.weight, layer.plan, tensors[f"{name}/base_scale"], weight_zero[name])
        layer.lora_a = nn.Parameter(tensors[f"{name}/lora_a"])
        layer.lora_b = nn.Parameter(tensors[f"{name}/lora_b"])
        layer.freeze()
    return student.requires_grad_(False).eval()


def _tables(tensors: dict[str, torch.Tensor], prefix: str) -> TimestepTables:
    return TimestepTables(
        tensors[f"{prefix}timesteps"].tolist(), tensors[f"{prefix}scale"], tensors[f"{prefix}zero"],
        tensors.get(f"{prefix}factor"),
    )  # fmt: skip


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileFault(
            f"{path}: not readable as safetensors: {error}", "make the artifact again with --force"
        ) from error


def merged_state(student: Denoiser) -> dict[str, torch.Tensor]:
    """The student's parameters under the teacher's names, quantised weights as the floats their integers stand for."""
    state = {}
    layers: dict[str, QuantLayer] = fake_layers.quant_layers(student.unet)
    for name, value in student.unet.state_dict().items():
        if name.rpartition(".")[0] not in layers and not name.startswith("timestep_tables."):
            state[name] = value
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.integers().dequantised()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def save_integer(student: Denoiser, plan: Plan, folder: Path) -> dict:
    """Write a frozen fake student as packed integers. Returns {site: {"bytes", "float_bytes", "weight_bits"}}."""
    layers = fake_layers.quant_layers(student.unet)
    tables: TimestepTables = student.unet.timestep_tables
    tensors = {f"tables.{name}": value for name, value in tables.raw().items()}
    tensors["embedding"] = student.embedding.contiguous()
    sizes = {}
    for name, layer in layers.items():
        packed = layer.integers().to_tensors()
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        steps = 2 * 4 * len(tables.timesteps)  # the site's columns of the timestep tables
        sizes[name] = {
            "bytes": sum(value.numel() * value.element_size() for value in packed.values()) + steps,
            "float_bytes": 4 * (layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())),
            "weight_bits": layer.plan.weight_bits,
        }
    for name, value in student.unet.state_dict().items():
        if name.rpartition(".")[0] not in layers and not name.startswith("timestep_tables."):
            tensors[f"float.{name}"] = value.contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "format": FORMAT, "version": FORMAT_VERSION, "method": plan.method, "variant": plan.variant,
        "bits": str(plan.bits), "model": asdict(student.info), "arithmetic": ARITHMETIC,
        "learned_on": {"scheduler": SCHEDULER, "steps": len(tables.timesteps)},
        "sign_diagonals": _sign_diagonals(plan.quantised),
        "packing": "codes minus the smallest code, most significant bit first, rows one after another",
        "unet": {key: value for key, value in student.unet.config.items() if not key.startswith("_")},
        "sites": [_site_entry(site) for site in plan.quantised],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return sizes


def _sign_diagonals(sites: list[SitePlan]) -> dict[str, list[int]]:
    """Every diagonal D that the sites use, written out, by `<order>/<seed>`."""
    used = {(site.transform.order, site.transform.signs) for site in sites if site.transform.signs is not None}
    return {f"{order}/{seed}": sign_diagonal(order, seed).int().tolist() for order, seed in sorted(used)}


def _site_entry(site: SitePlan) -> dict:
    entry = to_dict(site) | {"site": site_to_dict(site.site)}
    return {key: value for key, value in entry.items() if key not in ("why", "sqnr")}


def load_integer(folder: Path, backend: str) -> Denoiser:
    """An exported integer model, ready to sample on a back end ("reference" or "cpu"), from its own files alone."""
    from diffusers import UNet2DConditionModel

    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FileFault(f"{path}: not readable: {error}", "export again: hqdm export --format int") from error
    if config.get("format") != FORMAT or config.get("version") != FORMAT_VERSION:
        raise FileFault(
            f"{path}: format {config.get('format')!r} version {config.get('version')!r}, "
            f"this hqdm reads {FORMAT} {FORMAT_VERSION}",
            "export again: hqdm export --format int",
        )
    tensors = _load(Path(folder) / "model.safetensors")
    try:
        plans = [
            from_dict(SitePlan, entry | {"site": site_from_dict(entry["site"])}, str(path)) for entry in config["sites"]
        ]
        if config["sign_diagonals"] != _sign_diagonals(plans):
            raise FileFault(f"{path}: its sign diagonals are not those of this hqdm", "use the hqdm that exported it")
        info = ModelInfo(**config["model"])
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config["unet"])
        weights = {}
        for plan in plans:
            prefix = f"{plan.site.name}."
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            weights[plan.site.name] = IntegerWeights.from_tensors(plan, mine)
        integer_layers.swap_in(unet, plans, _tables(tensors, "tables."), weights, backend)
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFault(
            f"{folder}: config.json or model.safetensors is incomplete: {type(error).__name__}: {error}",
            "export again: hqdm export --format int --force",
        ) from error
    floats = {key.removeprefix("float."): value for key, value in tensors.items() if key.startswith("float.")}
    left = [name for name, value in [*unet.named_parameters(), *unet.named_buffers()] if value.is_meta]
    if sorted(left) != sorted(floats):
        different = sorted(set(left) ^ set(floats))
        raise FileFault(f"{folder}: tensors and configuration disagree on {', '.join(different[:5])}", "export again")
    unet.load_state_dict(floats, strict=False, assign=True)
    return ready(Denoiser(unet, tensors["embedding"], info))
