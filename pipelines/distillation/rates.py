"""What a recipe trains, and at which rates.

Adapters decay by 0.01 of their rate at every update, and nothing else does. The public trainers of EfficientDM, HQ-DM
and MPQ-DM have that from AdamW's default, and so of all that they train: at rates that fall to 0 an activation scale
loses 0.05 % of itself over 200 updates and 4 % over 16,000, a weight scale 0.008 %. It takes from all timesteps' scales
at each update, since they are one tensor and those without a gradient have zeros. Here scales and zero-points are only
where their gradients took them.
"""

from pipelines.models.denoiser import Denoiser
from pipelines.plans import Recipe
from pipelines.quant.layers import QuantLayer, quant_layers
from pipelines.quant.tables import TimestepTables

WEIGHT_DECAY = 0.01  # of the adapters; scales have none


def parameter_groups(student: Denoiser, recipe: Recipe) -> list[dict]:
    """Trained parameters with their peak learning rates (facts of the recipe; `rate` is what the decay multiplies).

    A layer's adapters learn at mean(weight scale)/divisor: scale-aware optimisation, EfficientDM. Adapters add to the
    weight as it is; where its quantiser has it longer (`_length`), its scale counts less by that, and learns faster by
    that where its rate is absolute.
    """
    narrow = recipe.narrow_rate_divisors or {}

    def divisor(layer: QuantLayer) -> float:
        return narrow.get(str(layer.plan.weight_bits), recipe.lora_rate_divisor)

    length = _length if recipe.step == "weight" else lambda layer: 1.0
    layers = quant_layers(student.network)
    tables: TimestepTables = student.network.timestep_tables
    chosen = [layer for layer in layers.values() if not recipe.roles or layer.plan.site.role in recipe.roles]
    groups: list[dict] = []
    if "adapters" in recipe.trains:
        groups += [
            {"params": [layer.lora_a, layer.lora_b], "weight_decay": WEIGHT_DECAY,
             "rate": layer.weight_scale.mean().item() / length(layer) / divisor(layer)}
            for layer in chosen
        ]  # fmt: skip
    if "weights" in recipe.trains:
        groups.append({"params": [layer.weight for layer in chosen], "rate": recipe.weight_rate})
    if "biases" in recipe.trains:
        groups.append({"params": [layer.bias for layer in chosen], "rate": recipe.bias_rate})
    if "weight_scales" in recipe.trains and recipe.weight_scale_rate_divisor:
        groups += [
            {"params": [layer.weight_scale],
             "rate": layer.weight_scale.mean().item() / recipe.weight_scale_rate_divisor}
            for layer in chosen
        ]  # fmt: skip
    elif "weight_scales" in recipe.trains:
        for longer in sorted({length(layer) for layer in chosen}):
            mine = [layer.weight_scale for layer in chosen if length(layer) == longer]
            groups.append({"params": mine, "rate": recipe.weight_scale_rate * longer})
    if "activation_scales" in recipe.trains:
        groups.append({"params": list(tables.scale), "rate": recipe.activation_scale_rate})
    if "zero_points" in recipe.trains:
        groups.append({"params": list(tables.zero), "rate": recipe.zero_point_rate})
    if tables.factor is not None:
        groups.append({"params": list(tables.factor), "rate": recipe.activation_scale_rate})
    return [{"weight_decay": 0.0, "lr": 0.0} | group for group in groups if group["rate"] > 0 and group["params"]]


def _length(layer: QuantLayer) -> float:
    """How much longer a weight is in its quantiser: by √order where it is rotated before it, since transforms are not
    orthonormal, and by the inverse of the geometric mean of its gains.
    """
    rotated = layer.plan.transform.order**0.5 if layer.plan.inverse == "double" else 1.0
    gain = layer.surroundings.gain
    return rotated if gain is None else rotated / gain.log().mean().exp().item()
