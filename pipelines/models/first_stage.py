"""The first stage of a latent model, which turns latents into images. Kept beside the denoiser, loaded when wanted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pipelines.config import strict_json
from pipelines.errors import FileFault
from pipelines.memory import give_back

FOLDER, WEIGHTS = "first_stage", "diffusion_pytorch_model.safetensors"
CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
AT_ONCE = 1  # latents decoded at a time: a decoder's activations are many times larger than a denoiser's
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


class SpaceToDepth(nn.Module):
    """A first stage without weights: `block`×`block` pixels of an image become channels of one latent pixel.

    Of C image channels the latent has C·block²; channel c·block² + block·y + x holds image channel c of the pixels at
    row y and column x of their blocks (torch's pixel_unshuffle). Nothing is lost, so encode and decode are exact
    inverses.
    """

    def __init__(self, block: int):
        super().__init__()
        if type(block) is not int or block < 1:
            raise ValueError(f"block cannot be {block!r}")
        self.block = block

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to latents (N, C·block², H/block, W/block); RuntimeError where the block cuts a side."""
        return F.pixel_unshuffle(images, self.block)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(latents, self.block)


class FirstStage:
    """A decoder of diffusers or SpaceToDepth, as a module or as the folder that `save` wrote: until it decodes it
    takes no memory.
    """

    def __init__(self, module: nn.Module | None = None, folder: Path | None = None):
        self._module, self._folder = module, folder

    def module(self) -> nn.Module:
        """The autoencoder, fp32, frozen. FileFault where its folder is damaged or lacks a tensor."""
        if self._module is None:
            self._module = _load(self._folder)
        return self._module.eval().requires_grad_(False)

    @property
    def factor(self) -> int:
        """Pixels a latent, along one side."""
        if isinstance(self.module(), SpaceToDepth):
            return self.module().block
        config = self.module().config
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, H, W) as the denoiser has them to images (N, 1 or 3, H', W'), about [-1, 1]."""
        module = self.module().to(latents.device)
        if isinstance(module, SpaceToDepth):
            return module.decode(latents)
        scaled = latents / module.config.scaling_factor + (module.config.get("shift_factor") or 0.0)
        if module.config.get("latents_mean") is not None and module.config.get("latents_std") is not None:
            known = (module.config[key] for key in ("latents_mean", "latents_std"))
            mean, deviation = (torch.tensor(values, device=latents.device) for values in known)
            scaled = latents * deviation.view(-1, 1, 1) / module.config.scaling_factor + mean.view(-1, 1, 1)
        scaled = scaled.contiguous()  # GroupNorm is less exact channels-last
        convolutions = (part for part in module.modules() if isinstance(part, nn.Conv2d))
        handles = [part.register_forward_pre_hook(lambda *_: give_back()) for part in convolutions]
        try:
            return torch.cat([module.decode(part).sample for part in scaled.split(AT_ONCE)])
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> None:
        """Write it to `folder`/first_stage, as safetensors whatever it was read from; SpaceToDepth is a config.json."""
        module, there = self.module(), Path(folder) / FOLDER
        if not isinstance(module, SpaceToDepth):
            module.save_pretrained(there)
            return
        there.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": SpaceToDepth.__name__, "block": module.block}
        (there / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "FirstStage | None":
        """That of a saved model, where it has one."""
        path = Path(folder) / FOLDER
        return cls(folder=path) if path.is_dir() else None


def build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """An autoencoder of one of CLASSES, its parameters on the meta device and its buffers filled."""
    if kind not in CLASSES:
        raise ValueError(f"a {kind} is no first stage")
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return getattr(diffusers, kind).from_config(dict(config))


def _load(folder: Path) -> nn.Module:
    """What `save` wrote. Its tensors stay in the mapped file: decoding never touches an encoder's pages."""
    try:
        config = strict_json((folder / "config.json").read_text(encoding="utf-8"))
        if config["_class_name"] == SpaceToDepth.__name__:
            return SpaceToDepth(config["block"])
        module = build(config["_class_name"], config)
        module.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except _DAMAGE as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileFault(f"{folder}: no first stage can be read from it: {first}", "make the artifact again") from error
    return module
