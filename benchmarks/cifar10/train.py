"""Train a teacher of the CIFAR-10 benchmark.

    python -m benchmarks.cifar10.train unet --train cifar10-train.tar.xz
    python -m benchmarks.cifar10.train dit --train cifar10-train.tar.xz

`unet` is a class-conditional UNet of the LDM family on 16×16×12, which 32×32×3 is after space-to-depth; `dit` a small
diffusion transformer on the pixels. Every step draws its batch, timesteps and noise from a generator seeded by
(seed, step), so a run that was stopped goes on as if it had not been; `--steps` and `--fall` may be changed later, as
long as the closing fall of the learning rate (over the last `--fall` steps) has not begun.
"""

import argparse
import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import pipelines  # noqa: F401
from benchmarks.cifar10.data import BLOCK, tensors
from benchmarks.options import told
from pipelines.cifar10 import CLASSES
from pipelines.cifar10.classifier import as_floats
from pipelines.digits.train import noise_schedule
from pipelines.errors import UsageError

DROP_CLASS = 0.1  # share of the samples trained without their class, for classifier-free guidance
EMA_DECAY = 0.9995
WARM_UP = 200  # steps
RATES = {"unet": 8e-4, "dit": 6e-4}


class ClassConditionalUNet(nn.Module):
    """(N, 12, 16, 16) noisy latents, (N,) timesteps, (N,) classes to v of the latents' shape."""

    widths = (64, 128)

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=12, out_channels=12, layers_per_block=1, block_out_channels=self.widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=tuple(width // 32 for width in self.widths),
            norm_num_groups=32,
        )  # fmt: skip
        self.embedding = nn.Embedding(len(CLASSES) + 1, 64)  # the last is the null class

    def forward(self, x, timesteps, classes):
        return self.unet(x, timesteps, encoder_hidden_states=self.embedding(classes)[:, None]).sample

    @staticmethod
    def prepared(images: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(images, BLOCK)


class ClassConditionalDiT(nn.Module):
    """(N, 3, 32, 32) noisy images, (N,) timesteps, (N,) classes to v of the images' shape."""

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        # Its label embeddings hold the null class themselves; each block would drop classes by itself in training.
        self.dit = DiTTransformer2DModel(
            sample_size=32, patch_size=4, in_channels=3, out_channels=3, num_layers=6, num_attention_heads=6,
            attention_head_dim=32, num_embeds_ada_norm=len(CLASSES),
        )  # fmt: skip
        for module in self.dit.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # diffusers leaves torch's initialisation. The paper's begins with blocks that pass their input on (adaLN-Zero,
        # Peebles & Xie, 2023): after 100 steps the loss is a third lower.
        for layer in (*(block.norm1.linear for block in self.dit.transformer_blocks), self.dit.proj_out_1,
                      self.dit.proj_out_2):  # fmt: skip
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, timesteps, classes):
        return self.dit(x, timestep=timesteps, class_labels=classes).sample

    @staticmethod
    def prepared(images: torch.Tensor) -> torch.Tensor:
        return images


NETWORKS = {"unet": ClassConditionalUNet, "dit": ClassConditionalDiT}


def learning_rate(peak: float, step: int, steps: int, fall: int) -> float:
    """Linear warm-up, constant, and a linear fall to zero over the last steps."""
    return peak * min(1.0, (step + 1) / WARM_UP, (steps - step) / fall)


def loss_of_step(model, images, labels, alphas, seed: int, step: int, batch: int) -> torch.Tensor:
    """The v-prediction loss (Salimans & Ho, 2022, v = √ᾱ·ε − √(1−ᾱ)·x₀) on this step's batch, mirrored at random.

    The schedule ends at √ᾱ = 0.012: there an error of ε is 84 times as large in x₀, and a short training cannot afford
    that.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(images), (batch,), generator=generator)
    # One timestep in each of `batch` equal spans: the loss of a step varies less than with independent ones.
    timesteps = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
    mirrored = torch.rand(batch, generator=generator) < 0.5
    drop = torch.rand(batch, generator=generator) < DROP_CLASS
    x = as_floats(images[index])
    x = model.prepared(torch.where(mirrored[:, None, None, None], x.flip(3), x))
    noise = torch.randn(x.shape, generator=generator)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
    classes = torch.where(drop, len(CLASSES), labels[index])
    # Drawn on the CPU wherever the model is, so that a device changes rounding and no draw.
    device = next(model.parameters()).device
    noisy, timesteps, classes, target = (value.to(device) for value in (noisy, timesteps, classes, target))
    return F.mse_loss(model(noisy, timesteps, classes), target)


def compiled(model: nn.Module) -> None:
    """Compile the forward pass for bfloat16. Attention over 64 tokens is left to matrix products: the fused kernel's
    backward pass is 7 times slower in bfloat16 than in fp32 on CPUs (torch 2.13).
    """
    from diffusers.models.attention_processor import AttnProcessor

    for network in model.children():
        if hasattr(network, "set_attn_processor"):
            network.set_attn_processor(AttnProcessor())
    model.forward = torch.compile(model.forward)


def fall_has_begun(step: int, steps: int, fall: int) -> bool:
    """Whether the closing fall has lowered the learning rate of any of the first `step` steps."""
    return step - 1 > steps - fall


def check_going_on(state: Mapping[str, Any], asked: Mapping[str, Any], saved: Path) -> None:
    """UsageError where a saved state is of another run, or where its learning rate has begun to fall, or would have by
    now, to another end than is asked for.
    """
    for name in ("network", "seed", "batch"):
        if state[name] != asked[name]:
            raise UsageError(
                f"{saved} is of another run: {name} {state[name]}, not {asked[name]}",
                f"give its {name} to go on, or another --work",
            )
    step, now = state["step"], (asked["steps"], asked["fall"])
    steps, fall = before = state.get("steps", now[0]), state.get("fall", now[1])  # older states do not say
    if before != now and (fall_has_begun(step, *before) or fall_has_begun(step, *now)):
        raise UsageError(
            f"{saved} is at step {step} of {steps} with a fall over the last {fall}: too late for "
            f"--steps {asked['steps']} --fall {asked['fall']}",
            f"go on with --steps {steps} --fall {fall}, or begin anew with another --work",
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--train", type=Path, required=True, help="folder or archive of the training images")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="folder of the resumable state")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--fall", type=int, default=1500, help="last steps, over which the learning rate falls to zero")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16 and compiled code: 1.6 times as "
                        "fast on 2 cores with AVX512-BF16; needs a C++ compiler")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="that it trains on, such as cuda")
    options = parser.parse_args(arguments)
    with told():
        train(options)


def train(options: argparse.Namespace) -> None:
    """Train, or go on where a run was stopped. FileFault without images, UsageError for the state of another run."""
    asked = {name: getattr(options, name) for name in ("network", "seed", "batch", "steps", "fall")}
    torch.manual_seed(options.seed)
    model = NETWORKS[options.network]().to(options.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATES[options.network], weight_decay=0.01)
    images, labels = tensors(options.train, options.work / "train.npz")
    _, alphas = noise_schedule()

    saved, step, mean = options.work / f"{options.network}.pt", 0, None
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=options.device)
        check_going_on(state, asked, saved)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        step, mean = state["step"], state["mean"]
        print(f"going on at step {step}", flush=True)

    def save() -> None:
        part = saved.with_suffix(".part")
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
                    "step": step, "mean": mean, **asked}, part)  # fmt: skip
        part.replace(saved)

    if options.bfloat16:
        compiled(model)
    start, first = time.monotonic(), step
    while step < options.steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(RATES[options.network], step, options.steps, options.fall)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bfloat16):
            loss = loss_of_step(model, images, labels, alphas, options.seed, step, options.batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(value, 1 - decay)
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0 or step == options.steps:
            rate = (step - first) / (time.monotonic() - start)
            left = (options.steps - step) / rate / 60
            print(f"step {step}/{options.steps}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.1f} min left", flush=True)
        if step % 200 == 0:
            save()
    save()
    print(f"{saved} holds step {step}; write the teacher with: python -m benchmarks.cifar10.teacher {options.network}")


if __name__ == "__main__":
    main()
