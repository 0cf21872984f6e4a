"""diffusers' FluxTransformer2DModel: FLUX.1 dev, told how strongly to be guided, and schnell, which is not guided."""

import torch

from pipelines.models.families.base import EMBEDDED, NONE, Family, per_image, unsupported
from pipelines.models.families.dit import TRANSFORMER_ROLES


class Flux(Family):
    name = "flux"
    network = "FluxTransformer2DModel"
    timestep_unit = 1000.0
    roles = TRANSFORMER_ROLES

    def refusals(self, config):
        found = unsupported(config, {"patch_size": (None, 1)})
        channels, out = config["in_channels"], config.get("out_channels")
        if out not in (None, channels):
            found.append(f"in_channels: {channels} with out_channels: {out} (an image beside the noise)")
        elif not isinstance(channels, int) or channels % 4:
            found.append(f"in_channels: {channels}, which is not four times the latents' channels")
        return found

    def shape(self, config):
        """The configuration states no size: that of 1024 pixels."""
        return config["in_channels"] // 4, 128, 128

    def multiple(self, config):
        return 2

    def schedule(self, stated):
        """The pipeline spaces σ evenly from 1 to 1/steps, whatever its scheduler would do."""
        return {**stated, "linear_sigmas": True}

    def conditions(self, config):
        return None

    def wanted(self, config):
        return {
            "encoder_hidden_states": (None, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def guidance(self, config):
        return (EMBEDDED, 3.5) if config.get("guidance_embeds") else (NONE, 1.0)

    def call(self, network, x, timestep, given, guidance):
        """Patches of 2×2 latents are the network's tokens; it is told where each is."""
        count, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        output = network(
            tokens.reshape(count, rows * columns, 4 * channels),
            timestep=per_image(timestep, x).to(x.dtype) / self.timestep_unit,
            guidance=x.new_full((count,), guidance) if network.config.guidance_embeds else None,
            img_ids=places.to(x), txt_ids=x.new_zeros(given["encoder_hidden_states"].shape[1], 3), **given,
        ).sample  # fmt: skip
        output = output.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(x.shape)

    def encode(self, pipeline, prompts):
        """T5's states and CLIP's pooled output."""
        rows = [pipeline.encode_prompt(prompt, device="cpu")[:2] for prompt in [*prompts, ""]]
        states, pooled = (torch.cat(part).float() for part in zip(*rows, strict=True))
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILY = Flux()
