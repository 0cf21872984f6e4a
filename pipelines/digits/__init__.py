"""The embedded model: a latent-diffusion UNet on the UCI handwritten digits, its data, its classifier and its
training.
"""

from pathlib import Path

HERE = Path(__file__).parent
CHECKPOINT = HERE / "model.ckpt"
CLASSIFIER = HERE / "classifier.safetensors"
