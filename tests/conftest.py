"""Shared by all tests: no hub, torchvision mended before any library asks for it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pipelines  # noqa: E402, F401  (mends torchvision before any library imports it)
