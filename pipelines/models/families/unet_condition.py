"""diffusers' UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL, and the class-conditional LDM of CompVis."""

import torch

from pipelines.models.families.base import CLASSIFIER_FREE, Family, unsupported
from pipelines.models.families.unet import UNET_ROLES


class UNetCondition(Family):
    name = "unet-condition"
    network = "UNet2DConditionModel"
    component = "unet"
    roles = UNET_ROLES

    def refusals(self, config):
        found = unsupported(
            config,
            {
                "addition_embed_type": (None, "text_time"), "encoder_hid_dim_type": (None,),
                "class_embed_type": (None,), "time_embedding_type": (None, "positional"),
                "time_cond_proj_dim": (None,), "num_class_embeds": (None,),
            },
        )  # fmt: skip
        if not isinstance(config.get("sample_size"), int | list | tuple):
            found.append(f"sample_size: {config.get('sample_size')}")
        if config["in_channels"] != config["out_channels"]:
            found.append(
                f"in_channels: {config['in_channels']} with out_channels: {config['out_channels']} "
                + ("(an image beside the noise)" if config["in_channels"] > config["out_channels"] else "")
            )
        return found

    def conditions(self, config):
        return None

    def wanted(self, config):
        across = config["cross_attention_dim"]
        found = {"encoder_hidden_states": (None, across if isinstance(across, int) else across[0])}
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            found |= {"text_embeds": (pooled,), "time_ids": (6,)}
        return found

    def guidance(self, config):
        return CLASSIFIER_FREE, 7.5 if config.get("addition_embed_type") is None else 5.0

    def call(self, network, x, timestep, given, guidance):
        extra = {name: value for name, value in given.items() if name != "encoder_hidden_states"}
        return network(
            x, timestep, encoder_hidden_states=given["encoder_hidden_states"],
            **({"added_cond_kwargs": extra} if extra else {}),
        ).sample  # fmt: skip

    def encode(self, pipeline, prompts):
        """Stable Diffusion's one text encoder, or SDXL's two with the pooled text and the sizes."""
        rows = [self._encode_one(pipeline, prompt, False) for prompt in prompts]
        rows.append(self._encode_one(pipeline, "", True))
        return {name: torch.cat([row[name] for row in rows]).float() for name in rows[0]}

    def _encode_one(self, pipeline, prompt: str, null: bool) -> dict[str, torch.Tensor]:
        """(1, …) each; the null prompt is as the pipeline itself makes it (SDXL: zeros, where it says so)."""
        found = pipeline.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=null
        )  # the prompt's and the null prompt's states, and then for SDXL the pooled ones likewise
        states, *pooled = found[int(null) :: 2]
        if not pooled:
            return {"encoder_hidden_states": states}
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
        return {"encoder_hidden_states": states, "text_embeds": pooled[0], "time_ids": sizes}


FAMILY = UNetCondition()
