"""The first stage of a latent model, which turns latents into images. Kept beside the denoiser, loaded when wanted."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from pipelines.errors import FileFault, HqdmError

FOLDER = "first_stage"
CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
AT_ONCE = 1  # latents decoded at a time: a decoder's activations are many times larger than a denoiser's
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


class FirstStage:
    """A decoder of diffusers, as a module or as the folder to load it from: until it decodes it takes no memory."""

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
        config = self.module().config
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, H, W) as the denoiser has them to images (N, 3, H', W'), about [-1, 1]."""
        module = self.module()
        scaled = latents / module.config.scaling_factor + (module.config.get("shift_factor") or 0.0)
        return torch.cat([module.decode(part).sample for part in scaled.split(AT_ONCE)])

    def save(self, folder: Path) -> None:
        """Write it to `folder`/first_stage, as safetensors whatever it was read from."""
        self.module().save_pretrained(Path(folder) / FOLDER)

    @classmethod
    def load(cls, folder: Path) -> "FirstStage | None":
        """That of a saved model, where it has one."""
        path = Path(folder) / FOLDER
        return cls(folder=path) if path.is_dir() else None


def _load(folder: Path) -> nn.Module:
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in CLASSES:
            raise HqdmError(f"{folder}: a {name} cannot be the first stage", f"known: {', '.join(CLASSES)}")
        module, found = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except _DAMAGE as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileFault(f"{folder}: no first stage can be read from it: {first}", "fetch its files again") from error
    if missing := sorted(found["missing_keys"]):
        raise FileFault(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}", "fetch its files again"
        )
    return module
