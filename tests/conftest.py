"""Shared by all tests: no hub, one thread, torchvision mended before any library asks for it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models here are tiny: more threads gain nothing, and beside other work they wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pipelines  # noqa: E402, F401  (mends torchvision before any library imports it)

import torch  # noqa: E402  isort: skip

if not torch.cuda.is_available():  # read when the CUDA kernels are declared, whichever test does it first
    os.environ.setdefault("TRITON_INTERPRET", "1")
