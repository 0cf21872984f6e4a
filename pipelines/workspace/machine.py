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


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """`AMD EPYC (family 25, model 17)`: a virtual machine's name alone is that of many generations, whose fp32 sums
    differ in their last bits.
    """
    cpu = platform.processor() or platform.machine()
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return cpu
    found: dict[str, str] = {}
    for name, colon, value in (line.partition(":") for line in lines):
        if colon:
            found.setdefault(name.strip(), value.strip())
    cpu, family, model = found.get("model name", cpu), found.get("cpu family"), found.get("model")
    return f"{cpu} (family {family}, model {model})" if family and model else cpu


def machine() -> dict[str, Any]:
    """The CPU's name and the threads in use; torch is asked only where it is loaded already."""
    cpu = processor()
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cpu": cpu, "threads": os.cpu_count(), "device": "cpu"}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "device": "cpu"}
