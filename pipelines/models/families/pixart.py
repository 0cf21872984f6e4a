"""diffusers' PixArtTransformer2DModel: PixArt-α and PixArt-Σ, which read prompts through T5."""

import torch

from pipelines.models.families.base import CLASSIFIER_FREE, Family, half_if_learned, per_image, unsupported
from pipelines.models.families.dit import TRANSFORMER_ROLES, output_refusals

PIXELS = 8  # a latent along one side, in every PixArt


class PixArt(Family):
    name = "pixart"
    network = "PixArtTransformer2DModel"
    roles = TRANSFORMER_ROLES

    def refusals(self, config):
        known = {"norm_type": (None, "ada_norm_single"), "attention_type": (None, "default")}
        return unsupported(config, known) + output_refusals(config, learned=True)

    def conditions(self, config):
        return None

    def wanted(self, config):
        width = config.get("caption_channels") or config["cross_attention_dim"]
        return {"encoder_hidden_states": (None, width), "encoder_attention_mask": (None,)}

    def guidance(self, config):
        return CLASSIFIER_FREE, 4.5

    def call(self, network, x, timestep, given, guidance):
        """A network that also wants the image's size and ratio (PixArt-α at 1024 pixels) is told x's own."""
        added = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            height, width = x.shape[-2:]
            added["resolution"] = x.new_tensor([height * PIXELS, width * PIXELS]).expand(len(x), 2)
            added["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), 1)
        output = network(x, timestep=per_image(timestep, x), added_cond_kwargs=added, **given).sample
        return half_if_learned(output, x)

    def encode(self, pipeline, prompts):
        """Captions are not cleaned, which takes packages that the pipeline does without where they are missing."""
        rows = [pipeline.encode_prompt(prompt, False, device="cpu")[:2] for prompt in [*prompts, ""]]
        states, masks = (torch.cat(part).float() for part in zip(*rows, strict=True))
        return {"encoder_hidden_states": states, "encoder_attention_mask": masks}


FAMILY = PixArt()
