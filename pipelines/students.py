"""Students: a denoiser with quantised layers in it, fake or integer; how they are built, saved and loaded.

A fake student's files (of the distill stage): `student.safetensors` with

    tables/timesteps (T,) fp64 · tables/scale, tables/zero (T, n) · tables/factor (T, m) or (T, n), where trained
    <site>/weight_scale, <site>/weight_zero (out,) · <site>/lora_a, <site>/lora_b · <site>/base_scale (out,), where W is
    the dequantised base weight · <site>/weight_codes (out, …·in) uint8, where its integers were not rounded to the
    nearest · <site>/weight, <site>/bias, where they were trained · <site>/gain, centre, taps, row_bits: see
    pipelines/quant/surroundings.py

and the plan as `plan.yaml`, and `guidance.safetensors` and `correction.safetensors` where such were measured. An
integer model's files (of the export stage): `model.safetensors` with

    <site>.weight packed uint8 · <site>.weight_scale fp32 · <site>.weight_zero packed · <site>.bias · tables.* as above
    · <site>.gain, centre, taps, row_bits, where there are such
    float.<name>, what is not quantised

with `config.json`, which holds all that a loader needs, and `conditions.safetensors`, `first_stage/`,
`guidance.safetensors` and `correction.safetensors` as a model's folder has them.
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
from pipelines.diffusion import walker
from pipelines.errors import FileFault, NumericalFault, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.kernels import ON_DEVICE, cpu, cuda, reference
from pipelines.kernels import layers as integer_layers
from pipelines.memory import give_back, lasting, let_go
from pipelines.models.checkpoint import first_line
from pipelines.models.denoiser import Denoiser, info_from_dict, load_conditions, ready, save_beside
from pipelines.models.families import FAMILIES
from pipelines.models.families.base import CLASSIFIER_FREE
from pipelines.models.first_stage import FirstStage
from pipelines.models.source import read_json
from pipelines.plans import Plan
from pipelines.quant import layers as fake_layers
from pipelines.quant.correction import Correction
from pipelines.quant.guidance import GuidanceShares
from pipelines.quant.hadamard import sign_diagonal
from pipelines.quant.integers import LEARNED, PackedWeights, check_tensors
from pipelines.quant.spec import HALVES, SitePlan, site_from_dict, site_to_dict
from pipelines.quant.surroundings import NAMES
from pipelines.quant.tables import TimestepTables

_AGAIN = "make the artifact again with --force"
FORMAT = "hqdm-int"
FORMAT_VERSION = 6
VERSIONS = (5, FORMAT_VERSION)  # 5: scales are multiplied before the accumulator is; 6: factors may be of sites
# What a loader has to compute, in words that go into config.json.
ARITHMETIC = {
    "surroundings": "x' = (x - centre[c])·gain[c], and y' = y + taps[o] (of a convolution, at every position the sum "
    "of the taps whose input lies in the image); dynamic centring: centre is the image's mean over its tokens, and "
    "y' = y + (mean·gain·blockdiag(D·H, …)·V)·(w/order) in fp32; row_bits: bits of each output, rows packed by them",
    "prologue": "x~ = x'·blockdiag(D·H, …) in fp32 (H: Sylvester's ±1 matrix of `order`; D: `sign_diagonals`), as D, "
    "then stages of butterflies, values 1, 2, 4, … apart in a block becoming a + b and a - b; "
    "q = clamp(round_half_even(x~ / s_t) + z_t, low, high) - z_t",
    "ranges": "symmetric: ±(2^(bits-1) - 1), no zero-point; asymmetric: 0 … 2^bits - 1, zero-point clamped to it",
    "fold": "single: V = W·blockdiag(D·H, …) along the input channels; none, double: V = W; "
    "activation: V = W and q is replaced by q·blockdiag(D·H, …)^T along the width",
    "epilogue": "y = sum(q·V) · ((s_t/order) · w[c]) + bias[c], each operation rounded to fp32; "
    "w = weight_scale, times tables.factor at t where there is one (columns: the sites' outputs, in the order "
    "of `sites`, or where it is as wide as tables.scale the sites, for all their outputs)",
    "guidance": "where it is by shares, the guided prediction is p_c + (g - 1)·share·(p_c - p_null), rows by timestep "
    "interpolated linearly; else p_null + g·(p_c - p_null)",
    "correction": "where there is one, the guided prediction becomes (p - bias[c]) / (1 + slope), its rows by timestep "
    "as below, all interpolated linearly; sampling with noise of deviation s shrinks it to sqrt(s^2 - (c·d)^2), or 0, "
    "with d = deviation / (1 + slope) and c the prediction's factor in the sampler's step",
    "timesteps": "rows of the tables by the schedule's timestep, which is the network's argument times timestep_unit; "
    "one within 0.01 of a row's is that row's; between two rows scales and factors are interpolated linearly in "
    "their logarithm and zero-points linearly, then rounded; beyond the ends the end row holds",
}


def share_frozen(denoiser: Denoiser) -> Denoiser:
    """A second denoiser whose modules can be swapped while its tensors stay the first one's: no second copy of
    weights.
    """
    memo = {id(tensor): tensor for tensor in [*denoiser.parameters(), *denoiser.buffers()]}
    return copy.deepcopy(denoiser, memo)


def new_student(
    teacher: Denoiser, plan: Plan, scales: dict[str, torch.Tensor], seed: int, based: bool = True
) -> Denoiser:
    """A fake student at a plan's initial scales, with fresh adapters, ready to train. `scales`: the plan's tensors.
    based: whether `set_base` is called for every layer.

    The tables hold scales in orthonormal coordinates (times `unit`), which is what the recipe's learning rates are for.
    """
    student = share_frozen(teacher)
    plans = plan.quantised
    names = [site.site.name for site in plans]
    unit = torch.tensor([float(site.transform.order) ** 0.5 for site in plans])
    scale = torch.stack([scales[f"{name}/activation_scale"] for name in names], 1)
    zero = torch.stack([scales[f"{name}/activation_zero"] for name in names], 1)
    factor, outputs = None, [site.site.outputs for site in plans]
    if plan.recipe.weight_factors:
        factor = torch.ones(len(scale), sum(outputs))
    elif plan.recipe.site_factors:
        factor = torch.ones_like(scale)
    recipe, known = plan.recipe, {site.site.role for site in plans}
    if recipe.roles and not known & set(recipe.roles):  # a method may name roles that only other networks have
        raise UsageError(
            f"recipe: no quantised site has a role of {', '.join(recipe.roles)}", did_you_mean(recipe.roles[0], known)
        )
    groups = groups_at(plan, scales["timesteps"].tolist())
    tables = TimestepTables(
        scales["timesteps"].tolist(), scale / unit, zero, factor, unit, groups, recipe.relative_scales,
        outputs if recipe.site_factors else None,
    )  # fmt: skip
    layers = _swap_in(student, plans, tables, scales)
    for index, (name, layer) in enumerate(layers.items()):
        if based:
            set_base(name, layer, plan, scales)
        if recipe.roles and layer.plan.site.role not in recipe.roles:
            continue
        if "adapters" in recipe.trains and recipe.updates == "distill":
            layer.add_lora(recipe.lora_rank, torch.Generator().manual_seed(seed * 100_003 + index))
        if "weights" in recipe.trains:
            layer.train_weight()
        if "biases" in recipe.trains:
            layer.train_bias()
    return student


def set_base(name: str, layer: fake_layers.QuantLayer, plan: Plan, scales: dict[str, torch.Tensor]) -> None:
    """What a layer's adapters add to, where that is not the weight itself."""
    if plan.recipe.base_weight == "quantised" and "weights" not in plan.recipe.trains:
        layer.set_base(scales[f"{name}/weight_scale"])


def groups_at(plan: Plan, timesteps: list[float]) -> list[int] | None:
    """The plan's groups for other timesteps: each is in the group of the plan's timestep that is nearest."""
    if not plan.groups:
        return None
    known = dict(sorted(zip(plan.timesteps, plan.groups, strict=True)))  # ascending, so that ties fall as in the scales
    return [known[min(known, key=lambda other: abs(other - step))] for step in timesteps]


def _swap_in(student: Denoiser, plans: list[SitePlan], tables: TimestepTables, tensors: dict[str, torch.Tensor]):
    """Fake layers in a student's network, from tensors named <site>/…."""
    named = {plan.site.name: {} for plan in plans}
    for key, value in tensors.items():
        site, _, what = key.rpartition("/")
        if site in named:
            named[site][what] = value
    return fake_layers.swap_in(
        student.network, plans, tables, {name: mine["weight_scale"] for name, mine in named.items()},
        {name: mine["weight_zero"] for name, mine in named.items()}, student.family.timestep_unit, named,
    )  # fmt: skip


def student_tensors(student: Denoiser, plan: Plan, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was learned, as the tensors of `student.safetensors`."""
    tables: TimestepTables = student.network.timestep_tables
    tensors = {f"tables/{name}": value for name, value in tables.raw().items()}
    for name, layer in fake_layers.quant_layers(student.network).items():
        tensors[f"{name}/weight_scale"] = layer.weight_scale.detach().clone()
        tensors[f"{name}/weight_zero"] = layer.weight_zero.clone()
        tensors |= {f"{name}/{what}": value.clone() for what, value in layer.surroundings.tensors().items()}
        if layer.lora_a is not None:
            tensors[f"{name}/lora_a"] = layer.lora_a.detach().clone().contiguous()
            tensors[f"{name}/lora_b"] = layer.lora_b.detach().clone().contiguous()
        if f"{name}/weight_codes" in scales and layer.base_codes is not None:
            tensors[f"{name}/weight_codes"] = scales[f"{name}/weight_codes"].clone()
        if layer.base_scale is not None:
            tensors[f"{name}/base_scale"] = layer.base_scale.clone()
        for what, value in (("weight", layer.weight), ("bias", layer.bias)):
            if isinstance(value, nn.Parameter):
                tensors[f"{name}/{what}"] = value.detach().clone().contiguous()
    return {name: value.cpu() for name, value in tensors.items()}


def load_fake(teacher: Denoiser, plan: Plan, path: Path, freeze: bool = True) -> Denoiser:
    """The fake student of `student.safetensors`; it shares its teacher's weights. `freeze` computes every V, for
    sampling; without, it is computed at every call, to the same bits. FileFault for tensors that are not its plan's,
    NumericalFault for scales that are not positive.
    """
    tensors = _load(path)
    student = share_frozen(teacher)
    plans = plan.quantised
    for site in plans:
        mine = {what: tensors.get(f"{site.site.name}/{what}") for what in (*LEARNED, *NAMES)}
        check_tensors(site, {what: v for what, v in mine.items() if v is not None}, path, "weight_zero")
    layers = _swap_in(student, plans, _tables(tensors, "tables/", plans, path), tensors)
    for name, layer in layers.items():
        if f"{name}/weight" in tensors:
            layer.weight = tensors[f"{name}/weight"]
        if f"{name}/bias" in tensors:
            layer.bias = tensors[f"{name}/bias"]
        if f"{name}/weight_codes" in tensors:
            layer.set_codes(tensors[f"{name}/weight_codes"], tensors[f"{name}/base_scale"])
        elif f"{name}/base_scale" in tensors:
            layer.set_base(tensors[f"{name}/base_scale"])
        if f"{name}/lora_a" in tensors:
            layer.lora_a = nn.Parameter(tensors[f"{name}/lora_a"])
            layer.lora_b = nn.Parameter(tensors[f"{name}/lora_b"])
    if plan.recipe.guidance_signal and student.info.guidance == CLASSIFIER_FREE:
        student.guidance_shares = GuidanceShares.load(path.parent)
    if plan.recipe.correction:
        student.correction = Correction.load(path.parent)
    student.requires_grad_(False).eval()
    if freeze:
        freeze_weights(student)
    return student


def freeze_weights(student: Denoiser) -> None:
    """Compute every V of a fake student once, where it lies, and let it compute nothing that sampling does not need."""
    for layer in fake_layers.quant_layers(student.network).values():
        layer.freeze()
    integer_layers.shorten(student.network)


def _tables(tensors: dict[str, torch.Tensor], prefix: str, plans: list[SitePlan], path: Path) -> TimestepTables:
    """The tables of a file. FileFault where they are not the plans', NumericalFault for scales that are not positive
    and zero-points that are not finite.
    """
    timesteps, factor = tensors.get(f"{prefix}timesteps"), tensors.get(f"{prefix}factor")
    parts = {what: tensors.get(f"{prefix}{what}") for what in ("scale", "zero")}
    if timesteps is None or timesteps.ndim != 1 or timesteps.dtype != torch.float64 or not len(timesteps):
        raise FileFault(f"{path}: has no table of timesteps", _AGAIN)
    if not (timesteps.isfinite().all() and (timesteps.diff() > 0).all()):
        raise FileFault(f"{path}: its timesteps are not ascending numbers", _AGAIN)
    shapes = dict.fromkeys(parts, (len(timesteps), len(plans)))
    outputs = [plan.site.outputs for plan in plans]
    of_sites = factor is not None and factor.shape == shapes["scale"]
    if factor is not None:
        parts["factor"] = factor
        shapes["factor"] = shapes["scale"] if of_sites else (len(timesteps), sum(outputs))
    for what, value in parts.items():
        if value is None or value.shape != shapes[what] or value.dtype != torch.float32:
            raise FileFault(f"{path}: the timesteps' {what} is not fp32 of shape {shapes[what]}", _AGAIN)
        positive = what != "zero"
        good = (value > 0) & value.isfinite() if positive else value.isfinite()
        if not good.all():
            row, column = (~good).nonzero()[0].tolist()
            site = f" of site {plans[column].site.name}" if what != "factor" or of_sites else ""
            whose = "weight" if what == "factor" else "activation"
            raise NumericalFault(
                f"the {whose} {what}{site} at timestep {timesteps[row]:g} is {value[row, column]:g}, "
                f"not a {'positive' if positive else 'finite'} number",
                f"in {path}; {_AGAIN}",
            )
    return TimestepTables(
        timesteps.tolist(), parts["scale"], parts["zero"], factor, outputs=outputs if of_sites else None
    )


def check_places(network: nn.Module, plans: list[SitePlan], path: Path) -> None:
    """FileFault for sites that are not the layers that the network has under their names."""
    halves: dict[str, int] = {}
    for plan in plans:
        site = plan.site
        whole, _, half = site.name.rpartition(".")
        layer = network.get_submodule(whole if half in HALVES else site.name)
        shape = tuple(layer.weight.shape)
        wanted = site.weight
        if half in HALVES:
            halves[whole] = halves.get(whole, shape[1]) - site.channels
            wanted = wanted[0], shape[1], *wanted[2:]
        fits = isinstance(layer, {"linear": nn.Linear, "conv": nn.Conv2d}[site.kind]) and shape == wanted
        if site.kind == "conv" and fits:
            own = layer.stride, layer.padding, layer.dilation, layer.groups
            fits = own == (site.stride, site.padding, site.dilation, site.groups)
        if not fits:
            raise FileFault(f"{path}: site {site.name} is not the layer that the network has there", _AGAIN)
    if bad := [name for name, rest in halves.items() if rest]:
        raise FileFault(f"{path}: the halves of {bad[0]} are not its channels", _AGAIN)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileFault(
            f"{path}: not readable as safetensors: {error}", "make the artifact again with --force"
        ) from error


def merge_weights(student: Denoiser, teacher: Denoiser) -> None:
    """Give the teacher the floats that the student's integers stand for, in place of its own weights, one layer after
    another. The student, which shared them, is of no use afterwards.
    """
    for name, layer in fake_layers.quant_layers(student.network).items():
        weight, bias = layer.integers().dequantised(), layer.bias
        layer.weight = layer.base_codes = None
        whole, _, half = name.rpartition(".")
        target = teacher.network.get_submodule(whole if half in HALVES else name)
        if half in HALVES:
            joined = target.weight.detach().clone()
            part = slice(weight.shape[1]) if half == HALVES[0] else slice(joined.shape[1] - weight.shape[1], None)
            joined[:, part] = weight
            weight = joined
            if half == HALVES[1]:  # a bias of its own comes beside the first half's
                known = [value for value in (target.bias, bias) if value is not None]
                bias = sum(known) if known else None
        target.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            target.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)


def save_integer(student: Denoiser, plan: Plan, folder: Path, report: Report | None = None) -> dict:
    """Write a fake student as packed integers, checked: NumericalFault where an accumulator could overflow.

    Returns {site: {"bytes", "float_bytes", "weight_bits", "form"}}; the form is the one of the cpu back end, the bits
    are `mixed` where outputs have widths of their own.
    """
    layers = fake_layers.quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    tensors = {f"tables.{name}": value for name, value in tables.raw().items()}
    sizes, report = {}, report or Report()
    report.begin("pack", len(layers), unit="sites")
    for done, (name, layer) in enumerate(layers.items(), 1):
        packed = layer.integers().packed()
        reference.prepare(packed)  # its bound on accumulators holds, or the export fails here
        tensors |= {f"{name}.{key}": value for key, value in packed.tensors.items()}
        columns = 2  # the site's, of the timestep tables
        if tables.factor is not None:
            columns += 1 if tables.site_factors else layer.plan.site.outputs
        sizes[name] = {
            "bytes": sum(value.numel() * value.element_size() for value in packed.tensors.values())
            + columns * 4 * len(tables.timesteps),
            "float_bytes": 4 * (layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())),
            "weight_bits": "mixed" if layer.plan.mixed else layer.plan.weight_bits,
            "form": cpu.form_of(packed),
        }
        report.advance(done)
    report.end()
    for name, value in student.network.state_dict().items():
        if name.rpartition(".")[0] not in layers and not name.startswith("timestep_tables."):
            tensors[f"float.{name}"] = value.contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "format": FORMAT, "version": FORMAT_VERSION, "method": plan.method, "variant": plan.variant,
        "bits": str(plan.bits), "model": asdict(student.info), "arithmetic": ARITHMETIC,
        "timestep_unit": student.family.timestep_unit, "corrected": student.correction is not None,
        "guided_by_shares": student.guidance_shares is not None,
        "learned_on": {"scheduler": walker(student.info.schedule), "steps": len(tables.timesteps)},
        "sign_diagonals": _sign_diagonals(plan.quantised),
        "packing": "codes minus the smallest code, most significant bit first, rows one after another; with row_bits "
        "those of the narrowest width first, each width filled up to a byte",
        "network": {key: value for key, value in student.network.config.items() if not key.startswith("_")},
        "sites": [_site_entry(site) for site in plan.quantised],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_beside(student, folder)
    return sizes


def _sign_diagonals(sites: list[SitePlan]) -> dict[str, list[int]]:
    """Every diagonal D that the sites use, written out, by `<order>/<seed>`."""
    used = {(site.transform.order, site.transform.signs) for site in sites if site.transform.signs is not None}
    return {f"{order}/{seed}": sign_diagonal(order, seed).int().tolist() for order, seed in sorted(used)}


def _site_entry(site: SitePlan) -> dict:
    entry = to_dict(site) | {"site": site_to_dict(site.site)}
    return {key: value for key, value in entry.items() if key not in ("why", "sqnr")}


@lasting()
def load_integer(folder: Path, backend: str) -> Denoiser:
    """An exported integer model, ready to sample on a back end, from its own files alone. Where that is a device's,
    network and conditions lie there.

    FileFault for files that do not go together, NumericalFault for scales and tensors that are no numbers: kernels read
    where a plan says, and must not read beyond.
    """
    from pipelines.models.network import check_saved

    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.get("format") != FORMAT or config.get("version") not in VERSIONS:
        raise FileFault(
            f"{path}: format {config.get('format')!r} version {config.get('version')!r}, "
            f"this hqdm reads {FORMAT} {' and '.join(map(str, VERSIONS))}",
            "export again: hqdm export --format int --force",
        )
    tensors = _load(Path(folder) / "model.safetensors")
    try:
        plans = [
            from_dict(SitePlan, entry | {"site": site_from_dict(entry["site"])}, str(path)) for entry in config["sites"]
        ]
        if config["sign_diagonals"] != _sign_diagonals(plans):
            raise FileFault(f"{path}: its sign diagonals are not those of this hqdm", "use the hqdm that exported it")
        info = info_from_dict(config["model"])
        family = FAMILIES[info.family]
        check_saved(family.network, config["network"], path, len(tensors))
        network = family.build(config["network"], info.options)
        check_places(network, plans, path)
        weights = {}
        for plan in plans:
            prefix = f"{plan.site.name}."
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            weights[plan.site.name] = PackedWeights(plan, mine)
            weights[plan.site.name].check(path.parent / "model.safetensors")
        tables = _tables(tensors, "tables.", plans, path.parent / "model.safetensors")
        integer_layers.swap_in(network, plans, tables, weights, backend, family.timestep_unit)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        raise FileFault(
            f"{folder}: config.json or model.safetensors is incomplete: {type(error).__name__}: {first_line(error)}",
            "export again: hqdm export --format int --force",
        ) from error
    floats = {key.removeprefix("float."): value for key, value in tensors.items() if key.startswith("float.")}
    wanted = {name: v for name, v in network.state_dict().items() if not name.startswith("timestep_tables.")}
    if wanted.keys() != floats.keys():
        different = ", ".join(sorted(wanted.keys() ^ floats.keys())[:5])
        raise FileFault(f"{folder}: tensors and configuration disagree on {different}", "export again")
    for name, value in floats.items():
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            raise FileFault(f"{folder}: float.{name} is {value.dtype} of shape {tuple(value.shape)}", _AGAIN)
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericalFault(f"the tensor float.{name} holds NaN or Inf", f"in {folder}; {_AGAIN}")
    network.load_state_dict(floats, strict=False, assign=True)
    denoiser = ready(Denoiser(network, load_conditions(folder, info), info, FirstStage.load(Path(folder))))
    if config.get("guided_by_shares"):
        denoiser.guidance_shares = GuidanceShares.load(Path(folder))
    if config.get("corrected"):
        denoiser.correction = Correction.load(Path(folder))
    if backend in ON_DEVICE:
        move(denoiser, cuda.device(), torch.bfloat16 if backend == "cuda-bf16" else torch.float32)
    for value in floats.values():  # convolutions were copied
        let_go(value.data_ptr(), value.nbytes)
    give_back(sum(value.numel() for value in tensors.values()))
    return denoiser


def move(denoiser: Denoiser, device: torch.device, dtype: torch.dtype) -> None:
    """Move an integer student to a device, in place, and what is computed in floating point around its integers to a
    type. Packed weights and tables stay on the processor, where they are unpacked and interpolated; scales, biases and
    what centring adds stay fp32.
    """
    cuda.round_nothing()
    tables: TimestepTables = denoiser.network.timestep_tables
    del denoiser.network.timestep_tables
    denoiser.to(device)
    if dtype != torch.float32:
        layers = [part for part in denoiser.modules() if isinstance(part, integer_layers.IntegerLayer)]
        kept = {id(part) for layer in layers for part in layer.modules()}
        for module in denoiser.modules():
            if id(module) not in kept:
                for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if value.is_floating_point():
                        value.data = value.data.to(dtype)
        denoiser.dtype = dtype
    denoiser.network.timestep_tables = tables
