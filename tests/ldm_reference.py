"""CompVis's latent-diffusion networks, written for the tests from their definition: plain torch, the published names.

The names of the modules are those of a checkpoint, so that `state_dict()` is its layout. Definition: Rombach et al.
2022, appendix E, with the UNet of Dhariwal and Nichol 2021 and the autoencoders of Esser et al. 2021.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels, eps=1e-5):
    return nn.GroupNorm(32, channels, eps=eps)


def conv(inside, outside, size=3, **options):
    return nn.Conv2d(inside, outside, size, padding=size // 2, **options)


def sinusoids(timesteps, width):
    """(N,) to (N, width), fp32: cosines, then sines, at frequencies from 1 to nearly 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Resampled(nn.Module):
    """Twice or half the side, with a convolution."""

    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        if up:
            self.conv = conv(channels, channels)
        else:
            self.op = conv(channels, channels, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2)) if self.up else self.op(x)


class ResBlock(nn.Module):
    def __init__(self, inside, outside, time, scale_shift=False, way=None):
        super().__init__()
        self.scale_shift, self.way = scale_shift, way
        self.in_layers = nn.Sequential(norm(inside), nn.SiLU(), conv(inside, outside))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outside * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(norm(outside), nn.SiLU(), nn.Identity(), conv(outside, outside))
        self.skip_connection = nn.Identity() if inside == outside else conv(inside, outside, 1)

    def resample(self, x):
        if self.way is None:
            return x
        return F.interpolate(x, scale_factor=2) if self.way == "up" else F.avg_pool2d(x, 2)

    def forward(self, x, time):
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        told = self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(self.resample(x)) + h


def attend(q, k, v):
    """(…, positions, d) each."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class AttentionBlock(nn.Module):
    """Heads first among the rows of qkv, then q, k and v, then a head's channels."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.flatten(2)
        mixed = self.qkv(self.norm(flat))
        parts = mixed.view(len(x), self.heads, 3, flat.shape[1] // self.heads, flat.shape[2]).transpose(-1, -2)
        found = attend(*parts.unbind(2)).transpose(-1, -2).reshape(flat.shape)
        return (flat + self.proj_out(found)).view(x.shape)


class CrossAttention(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, context):
        sides = self.to_q(x), self.to_k(context), self.to_v(context)
        heads = [side.unflatten(-1, (self.heads, -1)).transpose(1, 2) for side in sides]
        return self.to_out(attend(*heads).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels, context, heads, depth):
        super().__init__()
        self.norm = norm(channels, eps=1e-6)
        self.proj_in = conv(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(Transformer(channels, context, heads) for _ in range(depth))
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Place(nn.Sequential):
    """One entry of the UNet: a convolution or a residual block, perhaps attention, perhaps a resampling."""

    def forward(self, x, time, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """ε of x (N, C, H, W) at timesteps (N,), told context (N, positions, width) where it has spatial transformers."""

    def __init__(
        self, in_channels, out_channels, model_channels, attention_resolutions, num_res_blocks, channel_mult,
        num_heads=-1, num_head_channels=-1, use_spatial_transformer=False, transformer_depth=1, context_dim=None,
        use_scale_shift_norm=False, resblock_updown=False, **_,
    ):  # fmt: skip
        super().__init__()
        self.model_channels, time = model_channels, 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, time), nn.SiLU(), nn.Linear(time, time))

        def residual(inside, outside, way=None):
            return ResBlock(inside, outside, time, use_scale_shift_norm, way)

        def attention(channels):
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if use_spatial_transformer:
                return SpatialTransformer(channels, context_dim, heads, transformer_depth)
            return AttentionBlock(channels, heads)

        def resampling(channels, way):
            return residual(channels, channels, way) if resblock_updown else Resampled(channels, way == "up")

        width, side = model_channels, 1  # side: how many times the input's is larger
        self.input_blocks = nn.ModuleList([Place(conv(in_channels, width))])
        kept = [width]
        for level, multiplier in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [residual(width, width := multiplier * model_channels)]
                layers += [attention(width)] if side in attention_resolutions else []
                self.input_blocks.append(Place(*layers))
                kept.append(width)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Place(resampling(width, "down")))
                kept.append(width)
                side *= 2
        self.middle_block = Place(residual(width, width), attention(width), residual(width, width))
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [residual(width + kept.pop(), multiplier * model_channels)]
                width = multiplier * model_channels
                layers += [attention(width)] if side in attention_resolutions else []
                if level and index == num_res_blocks:
                    layers.append(resampling(width, "up"))
                    side //= 2
                self.output_blocks.append(Place(*layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), conv(width, out_channels))

    def forward(self, x, timesteps, context=None):
        time = self.time_embed(sinusoids(timesteps, self.model_channels).to(x.dtype))
        kept = []
        for place in self.input_blocks:
            x = place(x, time, context)
            kept.append(x)
        x = self.middle_block(x, time, context)
        for place in self.output_blocks:
            x = place(torch.cat([x, kept.pop()], 1), time, context)
        return self.out(x)


class Residual(nn.Module):
    """An autoencoder's residual block."""

    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.conv1 = norm(inside, 1e-6), conv(inside, outside)
        self.norm2, self.conv2 = norm(outside, 1e-6), conv(outside, outside)
        if inside != outside:
            self.nin_shortcut = conv(inside, outside, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class OneHead(nn.Module):
    """An autoencoder's attention."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (side(h).flatten(2).transpose(1, 2) for side in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


def middle(channels):
    inside = nn.Module()
    inside.block_1, inside.attn_1 = Residual(channels, channels), OneHead(channels)
    inside.block_2 = Residual(channels, channels)
    return inside


class Halved(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, z_channels, double_z, **_):
        super().__init__()
        self.conv_in = conv(in_channels, ch)
        self.down, width = nn.ModuleList(), ch
        for level, multiplier in enumerate(ch_mult):
            at = nn.Module()
            at.block = nn.ModuleList()
            for _ in range(num_res_blocks):
                at.block.append(Residual(width, width := ch * multiplier))
            if level < len(ch_mult) - 1:
                at.downsample = Halved(width)
            self.down.append(at)
        self.mid = middle(width)
        self.norm_out, self.conv_out = norm(width, 1e-6), conv(width, (2 if double_z else 1) * z_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for at in self.down:
            for block in at.block:
                x = block(x)
            x = at.downsample(x) if hasattr(at, "downsample") else x
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, out_ch, z_channels, **_):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = conv(z_channels, width)
        self.mid = middle(width)
        levels = []
        for level, multiplier in reversed(list(enumerate(ch_mult))):
            at = nn.Module()
            at.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                at.block.append(Residual(width, width := ch * multiplier))
            if level:
                at.upsample = Resampled(width, True)
            levels.append(at)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = norm(width, 1e-6), conv(width, out_ch)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for at in reversed(self.up):
            for block in at.block:
                x = block(x)
            x = at.upsample(x) if hasattr(at, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    """VQ where there are codes: latents snap to the nearest code before they are decoded; KL otherwise."""

    def __init__(self, ddconfig, embed_dim, n_embed=None):
        super().__init__()
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        z, twice = ddconfig["z_channels"], 2 if ddconfig["double_z"] else 1
        self.quant_conv = conv(twice * z, twice * embed_dim, 1)
        self.post_quant_conv = conv(embed_dim, z, 1)
        if n_embed is not None:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(n_embed, embed_dim)

    def moments(self, images):
        """What the encoder makes of images before anything is drawn or snapped."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        if hasattr(self, "quantize"):
            codes = self.quantize.embedding.weight
            far = (latents.movedim(1, -1)[..., None, :] - codes).square().sum(-1)
            latents = codes[far.argmin(-1)].movedim(-1, 1)
        return self.decoder(self.post_quant_conv(latents))


class LatentDiffusion(nn.Module):
    """The whole of `model.params`, given as plain values: what a checkpoint's state dict is of."""

    def __init__(self, params):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = UNet(**params["unet_config"]["params"])
        self.first_stage_model = FirstStage(**params["first_stage_config"]["params"])
        condition = params["cond_stage_config"]
        if condition != "__is_unconditional__":
            self.cond_stage_model = nn.Module()
            values = condition["params"]
            self.cond_stage_model.embedding = nn.Embedding(values["n_classes"], values["embed_dim"])
        ends = params["linear_start"] ** 0.5, params["linear_end"] ** 0.5
        betas = torch.linspace(*ends, params["timesteps"], dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float())
        if params.get("scale_by_std"):
            self.register_buffer("scale_factor", torch.tensor(0.7))

    def predict(self, x, timesteps, classes=None):
        context = None if classes is None else self.cond_stage_model.embedding(classes)[:, None]
        return self.model.diffusion_model(x, timesteps, context)

    def decode(self, latents):
        return self.first_stage_model.decode(latents / getattr(self, "scale_factor", 1.0))


def checkpoint_of(raw, averaged):
    """The state dict that a trainer keeps of `raw`, with the weights of `averaged`'s UNet as its moving averages."""
    state = raw.state_dict()
    for name, value in averaged.model.diffusion_model.state_dict().items():
        state["model_ema.diffusion_model" + name.replace(".", "")] = value
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(1000)
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    return state
