"""Train the embedded model and write it in the CompVis checkpoint layout.

    python -m pipelines.digits.train --work runs/digits

Reproducible from `--seed`: every step draws its batch, timesteps and noise from a generator seeded by (seed, step), so
that a run stopped at any moment and started again goes on as if it had not stopped. About half an hour on 2 cores.
The shipped checkpoint is only replaced where `--out` names it.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.digits.data import CLASSES, train_split
from pipelines.models.compvis_keys import ema_name, to_compvis

DROP_CLASS = 0.1  # share of the samples trained without their class, for classifier-free guidance
EMA_DECAY = 0.999
PEAK_RATE = 1e-3
WARM_UP = 200  # steps


class ClassConditionalUNet(nn.Module):
    """The denoiser and its class embedding: (N, 1, 16, 16) noise, (N,) timesteps, (N,) classes to (N, 1, 16, 16) ε."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=2, norm_num_groups=32,
        )  # fmt: skip
        self.embedding = nn.Embedding(CLASSES + 1, 64)  # the last is the null class

    def forward(self, x, timesteps, classes):
        return self.unet(x, timesteps, encoder_hidden_states=self.embedding(classes)[:, None]).sample


def noise_schedule() -> tuple[torch.Tensor, torch.Tensor]:
    """betas and cumulative alphas (1000,) of LDM's "linear" schedule, which is linear in √β."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return betas.float(), torch.cumprod(1 - betas, 0).float()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def loss_of_step(model, images, labels, alphas, seed: int, step: int, batch: int) -> torch.Tensor:
    """The ε-prediction loss (DDPM, equation 14) on the batch that belongs to this step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(images), (batch,), generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    noise = torch.randn((batch, *images.shape[1:]), generator=generator)
    drop = torch.rand(batch, generator=generator) < DROP_CLASS
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * images[index] + (1 - alpha).sqrt() * noise
    classes = torch.where(drop, CLASSES, labels[index])
    noisy = noisy.to(memory_format=torch.channels_last)
    return F.mse_loss(model(noisy, timesteps, classes), noise)


def write_checkpoint(model: ClassConditionalUNet, ema: ClassConditionalUNet, step: int, path: Path) -> None:
    """Both sets of weights in half precision under CompVis's names, with the schedule's buffers."""
    attention = tuple("Attn" in kind for kind in model.unet.config.up_block_types)
    state = {}
    for name, value in model.unet.state_dict().items():
        compvis = to_compvis(name, model.unet.config.layers_per_block, attention)
        state[f"model.diffusion_model.{compvis}"] = value.half().contiguous()
        state[ema_name(compvis)] = ema.unet.state_dict()[name].half().contiguous()
    state["model_ema.decay"] = torch.tensor(EMA_DECAY)
    state["model_ema.num_updates"] = torch.tensor(step, dtype=torch.int32)
    state["cond_stage_model.embedding.weight"] = ema.embedding.weight.detach().half().clone()
    betas, alphas = noise_schedule()
    state["betas"], state["alphas_cumprod"] = betas, alphas
    torch.save({"state_dict": state, "global_step": step, "epoch": 0}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/digits"), help="folder of the resumable state")
    parser.add_argument("--out", type=Path, help="the checkpoint to write; WORK/model.ckpt by default")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out or options.work / "model.ckpt"
    asked = {name: getattr(options, name) for name in ("seed", "batch", "steps")}  # what every step's numbers depend on

    torch.manual_seed(options.seed)
    model = ClassConditionalUNet().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    images, labels = train_split()
    _, alphas = noise_schedule()

    options.work.mkdir(parents=True, exist_ok=True)
    saved, step = options.work / "state.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        differing = [f"{name} {state.get(name, 'not known')}, not {value}" for name, value in asked.items()
                     if state.get(name) != value]  # fmt: skip
        if differing:
            raise SystemExit(
                f"{saved} is of a run with {', '.join(differing)}: give the same options to go on, or another --work"
            )
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
        print(f"going on at step {step}", flush=True)

    def save() -> None:
        part = saved.with_suffix(".part")
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(),
                    "optimiser": optimiser.state_dict(), "step": step, **asked}, part)  # fmt: skip
        part.replace(saved)

    start, first, mean = time.monotonic(), step, None
    while step < options.steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options.steps)
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
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == options.steps:
            rate = (step - first) / (time.monotonic() - start)
            left = (options.steps - step) / rate / 60
            print(f"step {step}/{options.steps}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.1f} min left", flush=True)
        if step % 250 == 0:
            save()
    save()
    write_checkpoint(model, ema, step, out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
