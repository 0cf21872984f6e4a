"""What this machine has for hqdm, each thing tried and not only looked for."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines import native
from pipelines.errors import HqdmError
from pipelines.kernels import BACKENDS, ON_DEVICE, backend, operators
from pipelines.metrics.extractors import EXTRACTORS
from pipelines.quant.integers import IntegerWeights
from pipelines.quant.spec import Site, SitePlan, Transform
from pipelines.workspace.machine import libraries, machine

LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "transformers", "safetensors", "torch-fidelity", "typer")


@dataclass(frozen=True)
class Finding:
    """One line: what was tried, what came of it, and what to do where it is not well.

    state: `fine`, `slower` (all works, without what would make it fast), `without` (something cannot be done here).
    """

    what: str
    found: str
    state: str = "fine"
    hint: str = ""


def findings(workspace: Path) -> list[Finding]:
    """Every finding, in the order in which they are read best."""
    return [_libraries(), _processor(), *(_back_end(name) for name in BACKENDS), _compiled(), _accelerator(),
            *(_extractor(name) for name in EXTRACTORS), _memory(), _disk(workspace)]  # fmt: skip


def _libraries() -> Finding:
    return Finding("libraries", ", ".join(f"{name} {version}" for name, version in libraries(LIBRARIES).items()))


def _processor() -> Finding:
    has = [name for name in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16")
           if torch.cpu.get_capabilities().get(name)]  # fmt: skip
    here = machine()
    found = f"{here['cpu']}, {os.cpu_count()} cores, {here['threads']} threads"
    return Finding("processor", f"{found}, {' '.join(has) or 'none of the vector instructions that help'}")


def _back_end(name: str) -> Finding:
    """A layer of 4-bit integers through a back end, its accumulators against plain integer products."""
    plan = SitePlan(
        Site("self-test", "linear", "attention", (16, 64)), True, Transform("channels", 32, 1), "single", 4, 4
    )
    generator = torch.Generator().manual_seed(0)
    centred = torch.randint(-7, 8, (16, 64), generator=generator).short()
    weights = IntegerWeights(plan, centred, torch.zeros(16, dtype=torch.int16), torch.ones(16), None).packed()
    codes = torch.randint(-7, 8, (5, 64), generator=generator)
    what = f"integers ({name})"
    try:
        device = backend(name).device() if name in ON_DEVICE else torch.device("cpu")
        found = backend(name).prepare(weights).accumulators(codes.to(device)).cpu()
    except HqdmError as error:
        return Finding(what, error.what, "without", error.hint)
    if not torch.equal(found.long(), codes @ weights.folded().long().T):
        return Finding(what, "wrong sums", "without", "sample with --backend reference, and report this machine")
    found = BACKENDS[name]
    if name in ON_DEVICE and device.type == "cpu":
        found += "; here by Triton's interpreter, slowly"
    if name == "cpu":
        found += f"; here {operators.available()[0].name}"
    return Finding(what, found)


def _compiled() -> Finding:
    state = native.state()
    if state.path is None:
        hint = "install a C++ compiler (g++ or clang++), or name one with CXX; what comes out is the same"
        return Finding("compiled kernels", f"none: {state.why_not}", "slower", hint)
    found = f"{state.path}, by {state.compiler}"
    if not state.threaded:
        hint = f"install the compiler's OpenMP, or name another compiler with CXX, and remove {state.path}"
        return Finding("compiled kernels", f"{found}, which has no OpenMP: they run on one thread", "slower", hint)
    return Finding("compiled kernels", found)


def _accelerator() -> Finding:
    if not torch.cuda.is_available():
        return Finding("accelerator", "none; everything runs on the processor")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("accelerator", ", ".join(names))


def _extractor(name: str) -> Finding:
    what, kind = f"scores ({name})", EXTRACTORS[name]
    if kind.file().is_file():
        return Finding(what, str(kind.file()))
    hint = f"hqdm score fetches {kind.url} where it can; elsewhere pass the file: hqdm score --weights FILE"
    return Finding(what, f"its weights are not here: {kind.file()}", "without", hint)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return Finding("memory", "the system does not say")
    return Finding("memory", f"{total / 1e9:.1f} GB")


def _disk(workspace: Path) -> Finding:
    folder = workspace.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("workspace", f"{folder} cannot be written to", "without", "choose another with --workspace")
    return Finding("workspace", f"{workspace}: {free / 1e9:.1f} GB free")
