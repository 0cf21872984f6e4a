"""What ends a distillation, numbers that are none, named by their cause; and scales that lost their sign."""

import math

import torch

from pipelines.errors import NumericalFault
from pipelines.models.denoiser import Denoiser
from pipelines.quant.absent import Absent
from pipelines.quant.layers import quant_layers
from pipelines.quant.tables import TimestepTables


def check_finite(student: Denoiser, loss: float, timestep: float) -> None:
    """NumericalFault that names the timestep and, where a parameter is the cause, its site."""
    layers = quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    way_out = "plan lower rates (--set recipe.lora_rate_divisor=…); the last good state is kept in the draft"
    bad = [
        f"{what} of site {name}"
        for name, layer in layers.items()
        for what, values, positive in (
            # Its backward pass carries NaN from an adapter or a weight to the scale: the cause comes first.
            ("an adapter", layer.lora_a, False),
            ("an adapter", layer.lora_b, False),
            ("a weight", layer.weight if layer.weight.requires_grad else None, False),
            ("a bias", layer.bias, False),
            ("the weight scale", layer.weight_scale, True),
        )
        if values is not None
        and not isinstance(values, Absent)  # divided among processes, and not gathered now
        and not bool(((values > 0) & (values < math.inf)).all() if positive else torch.isfinite(values).all())
    ]
    known_tensors = tables.raw()
    scale, names = known_tensors["scale"], list(layers)
    for what, good in (("scale", (scale > 0) & scale.isfinite()), ("zero-point", known_tensors["zero"].isfinite())):
        bad += [
            f"the activation {what} of site {names[column]} at timestep {tables.timesteps[row]:g}"
            for row, column in (~good).nonzero().tolist()
        ]
    if (factor := known_tensors.get("factor")) is not None:
        for row, column in (~((factor > 0) & factor.isfinite())).nonzero().tolist():
            site = f" of site {names[column]}" if tables.site_factors else ""
            bad.append(f"a weight factor{site} at timestep {tables.timesteps[row]:g}")
    if bad:
        what = f"{bad[0]} is not a positive number or not finite, found at timestep {timestep:g}"
        raise NumericalFault(what, way_out)
    if not math.isfinite(loss):
        raise NumericalFault(f"the loss is {loss} at timestep {timestep:g}", way_out)


def told_of_signs(student: Denoiser) -> str | None:
    """A warning of the activation scales that updates left below zero, or None where there are none."""
    names, found = list(quant_layers(student.network)), student.network.timestep_tables.below_zero()
    if not found:
        return None
    timestep, first = found[0]
    return (
        f"activation scales that updates left below zero, and that count by their magnitude: {len(found)}, the first "
        f"that of site {names[first]} at timestep {timestep:g}; they learn too fast for their size "
        "(hqdm plan --set recipe.activation_scale_rate=…)"
    )


def check_teacher(target: torch.Tensor, timestep: float) -> None:
    """NumericalFault where it is the teacher that goes wrong."""
    if not target.isfinite().all():
        raise NumericalFault(
            f"the teacher's prediction holds NaN or Inf at timestep {timestep:g}",
            "profile with as many --steps, --guidance and --eta as this run has: it names the site",
        )


def check_student(predicted: torch.Tensor, timestep: float, purpose: str) -> None:
    if not predicted.isfinite().all():
        raise NumericalFault(
            f"{purpose}: the student's prediction holds NaN or Inf at timestep {timestep:g}",
            "plan lower rates and distill again (hqdm plan --set recipe.lora_rate_divisor=…)",
        )
