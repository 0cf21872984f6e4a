"""A tiny random denoiser with every kind of layer, built in memory in less than a second."""

import torch

from pipelines.models.denoiser import Denoiser, ModelInfo, ready


def tiny_denoiser(seed: int, levels: int = 2) -> Denoiser:
    """Two resolutions (8×8 and 4×4), 32 channels, one level with cross-attention, 4 classes. With one level 8×8 alone,
    and attention in the middle block.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,) * levels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[:levels],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[-levels:],
            cross_attention_dim=32, attention_head_dim=1, norm_num_groups=32,
        )  # fmt: skip
        embedding = torch.randn(5, 32)
    schedule = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    info = ModelInfo("unet-condition", (1, 8, 8), 4, "classifier-free", 1.5, schedule)
    return ready(Denoiser(unet, {"encoder_hidden_states": embedding[:, None]}, info))
