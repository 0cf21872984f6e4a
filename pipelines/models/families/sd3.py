"""diffusers' SD3Transformer2DModel: Stable Diffusion 3 and 3.5, which match flows."""

import torch

from pipelines.models.families.base import CLASSIFIER_FREE, Family, per_image
from pipelines.models.families.dit import TRANSFORMER_ROLES, output_refusals


class SD3(Family):
    name = "sd3"
    network = "SD3Transformer2DModel"
    roles = TRANSFORMER_ROLES

    def refusals(self, config):
        return output_refusals(config, learned=False)

    def conditions(self, config):
        return None

    def wanted(self, config):
        return {
            "encoder_hidden_states": (None, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def guidance(self, config):
        return CLASSIFIER_FREE, 7.0

    def call(self, network, x, timestep, given, guidance):
        return network(x, timestep=per_image(timestep, x), **given).sample

    def encode(self, pipeline, prompts):
        """Two CLIPs and T5 one after another; zeros for T5 where the pipeline has none."""
        rows = []
        for prompt in [*prompts, ""]:
            rows.append(pipeline.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False))
        states, pooled = (torch.cat([row[part] for row in rows]).float() for part in (0, 2))
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILY = SD3()
