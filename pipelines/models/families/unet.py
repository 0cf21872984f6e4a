"""diffusers' UNet2DModel: DDPM, DDIM and LDM pipelines, ADM; unconditional, or told a class."""

import torch

from pipelines.models.families.base import Family, half_if_learned, unsupported

# Of both UNets. first reads the noisy image, last writes the prediction; time: the two linears of the time embedding;
# condition: linears on labels, pooled texts and sizes; time-projection: a residual block's linear on the embedding;
# skip: a 1×1 convolution where a residual block changes its width; downsample, upsample: between resolutions;
# projection: into and out of a transformer; attention: q, k, v and output; feed-forward: a transformer's two linears;
# residual: a 3×3 convolution of a residual block.
UNET_ROLES = (
    ("conv_in", "first"),
    ("conv_out", "last"),
    ("time_embedding", "time"),
    ("time_emb_proj", "time-projection"),
    ("add_embedding", "condition"),
    ("class_embedding", "condition"),
    ("conv_shortcut", "skip"),
    ("downsamplers", "downsample"),
    ("upsamplers", "upsample"),
    (".attn", "attention"),
    (".ff.", "feed-forward"),
    ("proj_in", "projection"),
    ("proj_out", "projection"),
    ("attentions.", "attention"),
)


class UNet(Family):
    name = "unet"
    network = "UNet2DModel"
    component = "unet"
    roles = UNET_ROLES

    def refusals(self, config):
        found = unsupported(config, {"class_embed_type": (None,), "time_embedding_type": (None, "positional")})
        if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
            found.append(f"in_channels: {config['in_channels']} with out_channels: {config['out_channels']}")
        if not isinstance(config.get("sample_size"), int | list | tuple):
            found.append(f"sample_size: {config.get('sample_size')}")
        return found

    def conditions(self, config):
        count = config.get("num_class_embeds")
        return {"class_labels": torch.arange(count)} if count else {}

    def build(self, config, options):
        """`heads` among the options is the number of attention heads at every width, which UNet2DModel's own
        configuration cannot say: it knows one size of a head.
        """
        network = super().build(config, options)
        if heads := options.get("heads"):
            for name, module in network.named_modules():
                if name.rpartition(".")[2].isdigit() and ".attentions." in f".{name}":
                    module.heads = heads
        return network

    def call(self, network, x, timestep, given, guidance):
        return half_if_learned(network(x, timestep, **given).sample, x)


FAMILY = UNet()
