"""What a manifest says of where and when it was made."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "diffusers", "peft", "safetensors", "triton")


def utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="microseconds")


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Versions of python and of those named packages that are installed; none is imported."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """The CPU's name and the threads in use; torch is asked only where it is loaded already."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:  # not Linux
        pass
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cpu": cpu, "threads": os.cpu_count(), "device": "cpu"}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "device": "cpu"}
