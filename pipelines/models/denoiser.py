"""What the stages see of a model: a denoiser with its conditioning, its schedule and its sites, saved without
pickles.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.errors import FileFault
from pipelines.quant.spec import Site


@dataclass(frozen=True)
class ModelInfo:
    """Plain values that go with the weights. Latents are (channels, size, size); `schedule` are diffusers'
    arguments.
    """

    family: str
    channels: int
    size: int
    classes: int  # the null class is one more
    schedule: dict


class Denoiser(nn.Module):
    """A class-conditional denoiser ε(x, t, c) with classifier-free guidance.

    unet: diffusers' UNet2DConditionModel. embedding: (classes + 1, d); the last row is the null class.
    """

    def __init__(self, unet: nn.Module, embedding: torch.Tensor, info: ModelInfo):
        super().__init__()
        self.unet, self.info = unet, info
        self.register_buffer("embedding", embedding)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor, guidance: float) -> torch.Tensor:
        """Guided ε of x (N, C, H, W) at one timestep for classes (N,) int64: ε_∅ + guidance·(ε_c − ε_∅).

        The conditional and unconditional halves are one batch of 2N (guidance 1 needs the conditional half alone).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        if guidance == 1.0:
            return self.unet(x, timestep, encoder_hidden_states=self.embedding[classes][:, None]).sample
        null = torch.full_like(classes, self.info.classes)
        context = self.embedding[torch.cat([null, classes])][:, None]  # (2N, 1, d)
        both = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
        without, given = self.unet(both, timestep, encoder_hidden_states=context).sample.chunk(2)
        return without + guidance * (given - without)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1], (N, C, H, W). The first stage is the identity."""
        return latents.clamp(-1, 1)


def role_of(name: str) -> str:
    """The role of a site of diffusers' UNet2DConditionModel, from its module name.

    first reads the noisy image, last writes ε; time: the two linears of the time embedding; time-projection: a residual
    block's linear on it; skip: a 1×1 convolution where a residual block changes its width; downsample, upsample: the
    convolutions between resolutions; projection: into and out of a transformer; attention: q, k, v and output;
    feed-forward: a transformer's two linears; residual: a 3×3 convolution of a residual block.
    """
    if name == "conv_in":
        return "first"
    if name == "conv_out":
        return "last"
    for part, role in (
        ("time_embedding", "time"),
        ("time_emb_proj", "time-projection"),
        ("conv_shortcut", "skip"),
        ("downsamplers", "downsample"),
        ("upsamplers", "upsample"),
        (".attn", "attention"),
        (".ff.", "feed-forward"),
        ("proj_in", "projection"),
        ("proj_out", "projection"),
    ):
        if part in name:
            return role
    return "residual"


@torch.no_grad()
def find_sites(denoiser: Denoiser) -> list[Site]:
    """Every linear and convolution of the denoiser, in the order in which one forward pass reaches them."""
    sites: list[Site] = []

    def seen(name: str):
        def hook(module, args):
            x = args[0]
            if isinstance(module, nn.Linear):
                shape = dict(kind="linear")
            else:
                shape = dict(
                    kind="conv", stride=tuple(module.stride), padding=tuple(module.padding),
                    dilation=tuple(module.dilation), groups=module.groups, positions=tuple(x.shape[-2:]),
                )  # fmt: skip
            sites.append(
                Site(name=name, role=role_of(name), weight=tuple(module.weight.shape), bias=module.bias is not None,
                     rank=x.ndim, **shape)
            )  # fmt: skip

        return hook

    handles = [
        module.register_forward_pre_hook(seen(name))
        for name, module in denoiser.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    info = denoiser.info
    x = torch.zeros(1, info.channels, info.size, info.size)
    denoiser.predict(x, torch.tensor(1), torch.zeros(1, dtype=torch.int64), 1.0)
    for handle in handles:
        handle.remove()
    return sites


def save_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """Write `unet/` (a diffusers folder), `condition.safetensors` and `model.json`."""
    folder = Path(folder)
    denoiser.unet.save_pretrained(folder / "unet")
    save_file({"embedding": denoiser.embedding.contiguous()}, folder / "condition.safetensors")
    (folder / "model.json").write_text(json.dumps(asdict(denoiser.info), indent=1) + "\n")


def read_info(folder: Path) -> ModelInfo:
    """The plain values of a saved model, without torch modules."""
    path = Path(folder) / "model.json"
    try:
        return ModelInfo(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise FileFault(
            f"{path}: not a model's description: {error}",
            "make the model artifact again: hqdm profile model.ckpt --force",
        ) from error


def load_denoiser(folder: Path) -> Denoiser:
    """The inverse of `save_denoiser`: fp32, evaluation mode, frozen, channels-last."""
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    embedding = load_file(folder / "condition.safetensors")["embedding"]
    return ready(Denoiser(unet, embedding, read_info(folder)))


def _channels_last(_module, _args, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def ready(denoiser: Denoiser) -> Denoiser:
    """Evaluation mode, frozen, channels-last: the state in which every stage uses a denoiser.

    An input of one channel is both formats at once, and torch then takes the slower one for the whole first level, so
    the first convolution's output is told.
    """
    denoiser.unet.conv_in.register_forward_hook(_channels_last)
    return denoiser.eval().requires_grad_(False).to(memory_format=torch.channels_last)
