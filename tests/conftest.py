"""Shared by all tests: no hub, one thread a process where the shape of the work allows it, torchvision mended first."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pipelines  # noqa: E402, F401  (mends torchvision before any library imports it)
