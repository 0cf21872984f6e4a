"""Networks of configurations that are not trusted: before anything is allocated their numbers are bounded, and a
network built on the meta device must have exactly the file's tensors, by name and shape.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipelines.errors import FileFault, HqdmError
from pipelines.models.checkpoint import first_line
from pipelines.models.denoiser import MOST_SIDE
from pipelines.models.families.base import Family
from pipelines.models.source import bounded

MOST_TABLES = 256 << 20  # bytes of what a network computes for itself, such as embeddings of positions
MOST_LATENTS = 1 << 24  # of what is denoised
_MOST_ENTRIES = 256  # of a list in a configuration

# diffusers once called an attention's linears otherwise.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def known_entries(kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the defaults of its diffusers class, and the keys that the class has no argument for."""
    import diffusers

    arguments = dict(inspect.signature(getattr(diffusers, kind).__init__).parameters)
    arguments.pop("self")
    defaults = {name: part.default for name, part in arguments.items() if part.default is not part.empty}
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return {**defaults, **{k: v for k, v in own.items() if k in arguments}}, sorted(own.keys() - arguments.keys())


def checked(family: Family, config: Mapping[str, Any], where: Path, tensors: int) -> tuple[dict[str, Any], list[str]]:
    """A configuration complete, bounded and of the kind that the family supports; notes on what was not used."""
    if "quantization_config" in config:
        raise HqdmError(f"{where}: the model is quantised already", "give the model in fp32 or half precision")
    config, unused = known_entries(family.network, config)
    with blaming(where, family.network):
        check_bounds(config, tensors)
        refusals = family.refusals(config)
        if refusals:
            raise HqdmError(
                f"{where}: this configuration is not supported: {'; '.join(refusals)}",
                "docs/models.md lists what is refused; an own family can cover it: docs/families.md",
            )
    _check_shape(family, config, where)
    return config, [f"{where}: not used by {family.network}: {', '.join(unused)}"] if unused else []


def check_bounds(config: Mapping[str, Any], tensors: int) -> None:
    """ValueError for lists too long, and for more layers than the file has tensors."""
    bounded(config)

    def look(key: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            if len(value) > _MOST_ENTRIES:
                raise ValueError(f"{key} has {len(value)} entries (at most {_MOST_ENTRIES})")
            for part in value:
                look(key, part)
        layers = any(word in key for word in ("layer", "block", "depth")) and "channels" not in key
        if layers and isinstance(value, int) and value > tensors:
            raise ValueError(f"{key} {value} is more than the file's {tensors} tensors")

    for key, value in config.items():
        look(key, value)


def _check_shape(family: Family, config: Mapping[str, Any], where: Path) -> None:
    with blaming(where, family.network):
        shape = tuple(family.shape(config))
        if len(shape) != 3 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in shape):
            raise ValueError(f"channels, height and width {shape} are not three numbers from 1 to {MOST_SIDE}")
        if shape[0] * shape[1] * shape[2] > MOST_LATENTS:
            raise ValueError(f"channels, height and width {shape} are too large")


def check_saved(kind: str, config: Mapping[str, Any], where: Path, tensors: int) -> None:
    """FileFault for a saved network's configuration that describes more than the `tensors` of its file; nothing is
    allocated.
    """
    with blaming(where, kind):
        check_bounds(config, tensors)
    skeleton_of(kind, config, where, tensors)


@contextmanager
def blaming(where: Path | str, kind: str) -> Iterator[None]:
    """Whatever a constructor raises on an untrusted configuration is that configuration's fault."""
    try:
        yield
    except HqdmError:
        raise
    except Exception as error:
        raise FileFault(
            f"{where}: not the configuration of a {kind}: {type(error).__name__}: {first_line(error)}",
            "fetch the file again, or give the configuration that the weights belong to",
        ) from error


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """ValueError once a network under construction has more parameters than that; only counts, allocates nothing."""
    seen = 0

    def count(_module, _name, _value):
        nonlocal seen
        seen += 1
        if seen > parameters:
            raise ValueError("it describes more parameters than the file has tensors")

    handle = register_module_parameter_registration_hook(count)
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        handle.remove()
        logging.getLogger("diffusers").setLevel(level)


def skeleton_of(kind: str, config: Mapping[str, Any], where: Path, tensors: int, slack: int = 2) -> nn.Module:
    """The network with parameters and buffers on the meta device: names and shapes, and nothing allocated."""
    import diffusers

    with blaming(where, kind), at_most(slack * tensors + 16), torch.device("meta"):
        network = getattr(diffusers, kind).from_config(dict(config))
        kept = network.state_dict()
        tables = sum(value.numel() * value.itemsize for name, value in network.named_buffers() if name not in kept)
        if tables > MOST_TABLES:
            raise ValueError(f"its tables would take {tables} bytes (at most {MOST_TABLES})")
    return network


def _renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that diffusers has today."""

    def new(name: str) -> str:
        match = _OLD_ATTENTION.fullmatch(name)
        return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name

    return {new(name): value for name, value in state.items()}


def _check_fit(network: nn.Module, state: Mapping[str, torch.Tensor], where: Path) -> None:
    """FileFault with the missing, unexpected and wrongly shaped tensors."""
    wanted = network.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} by the configuration"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or wrong:
        raise FileFault(
            f"{where}: the weights do not fit it: {few('missing', missing)}; {few('unexpected', unexpected)}; "
            f"{few('shapes', wrong)}",
            "give the configuration and weights that belong together",
        )
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    odd = sorted(f"{n}: {v.dtype}" for n, v in state.items() if v.dtype not in kinds and wanted[n].is_floating_point())
    if odd:
        raise FileFault(
            f"{where}: {few('weights that are no floating-point numbers', odd)}",
            "give the model in fp32 or half precision",
        )


def filled(
    kind: str, build: Callable[[Mapping[str, Any]], nn.Module], config: dict[str, Any],
    state: Mapping[str, torch.Tensor], where: Path,
) -> nn.Module:  # fmt: skip
    """The network with the file's tensors: fp32, which stay mapped where they were fp32, in evaluation mode."""
    state = _renamed(state)
    skeleton = skeleton_of(kind, config, where, len(state))
    _check_fit(skeleton, state, where)
    with blaming(where, kind), at_most(2 * len(state) + 16):
        network = build(config)
        network.load_state_dict(_in_fp32(state, where), assign=True)
    return network.eval()


def _in_fp32(state: Mapping[str, torch.Tensor], where: Path) -> dict[str, torch.Tensor]:
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    check_numbers(tensors, where)
    return tensors


def check_numbers(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    if bad := sorted(name for name, value in tensors.items() if not torch.isfinite(value).all()):
        raise FileFault(f"{where}: {few('NaN or Inf in weights', bad)}", "fetch the weights again")


def few(what: str, names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
    return f"{what}: {shown or 'none'}"
