"""diffusers' DiTTransformer2DModel: DiT (Peebles and Xie, 2023), told a class."""

import torch

from pipelines.models.families.base import CLASSIFIER_FREE, Family, half_if_learned, per_image, unsupported

# Of the diffusion transformers. first embeds patches, last predicts them; time: the two linears of the timestep's
# embedding; condition: linears on texts, sizes and the guidance's strength; modulation: the linears that shift, scale
# and gate; attention: q, k, v and output; feed-forward: a block's two linears; projection: the one linear behind
# attention and feed-forward together.
TRANSFORMER_ROLES = (
    ("timestep_embedder", "time"),
    ("guidance_embedder", "condition"),
    ("text_embedder", "condition"),
    ("context_embedder", "condition"),
    ("caption_projection", "condition"),
    ("resolution_embedder", "condition"),
    ("aspect_ratio_embedder", "condition"),
    ("pos_embed.proj", "first"),
    ("x_embedder", "first"),
    ("norm", "modulation"),
    ("adaln_single", "modulation"),
    ("proj_out_1", "modulation"),
    (".attn", "attention"),
    (".ff", "feed-forward"),
    (".proj_mlp", "feed-forward"),
    (".proj_out", "projection"),
    ("proj_out", "last"),
)


class DiT(Family):
    name = "dit"
    network = "DiTTransformer2DModel"
    roles = TRANSFORMER_ROLES

    def refusals(self, config):
        return unsupported(config, {"norm_type": (None, "ada_norm_zero")}) + output_refusals(config, learned=True)

    def conditions(self, config):
        """The classes, and the one more that its training drops labels to."""
        return {"class_labels": torch.arange(config.get("num_embeds_ada_norm", 1000) + 1)}

    def guidance(self, config):
        return CLASSIFIER_FREE, 4.0

    def call(self, network, x, timestep, given, guidance):
        return half_if_learned(network(x, timestep=per_image(timestep, x), **given).sample, x)


def output_refusals(config, learned: bool) -> list[str]:
    """Channels that are neither those of x nor, for a learned variance, twice as many; images cut by the patches."""
    found = []
    channels, out = config["in_channels"], config.get("out_channels")
    if out not in (None, channels, *([2 * channels] if learned else [])):
        found.append(f"in_channels: {channels} with out_channels: {out}")
    size, patch = config["sample_size"], config.get("patch_size", 2)
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1 or size % patch:
        found.append(f"sample_size: {size} with patch_size: {patch}")
    return found


FAMILY = DiT()
