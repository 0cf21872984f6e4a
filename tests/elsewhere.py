"""A device that is none: tensors that say they lie on it, whose values a processor computes all the same.

torch lets Python stand in for a device's driver. An operator that is given a tensor of the processor beside one of this
device raises here what CUDA raises, so that code which runs on it has put every tensor where it belongs; and what it
computes are the processor's own bits.
"""

from contextlib import ContextDecorator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Driver(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_rng_state(self, _device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device=None) -> None:
        """Random numbers are drawn on the processor."""


_setup_privateuseone_for_python_backend("elsewhere", _Driver())
DEVICE = torch.device("elsewhere", 0)


class _NoGradients(ContextDecorator):
    """In place of torch's inference mode, which does not know tensors that are made in Python."""

    def __init__(self, mode: bool = True):
        self.mode, self.before = mode, []

    def __enter__(self):
        self.before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(self.before[-1] and not self.mode)

    def __exit__(self, *_):
        torch.set_grad_enabled(self.before.pop())


torch.inference_mode = _NoGradients  # before anything is imported that is decorated with it
# What may be given tensors of both: copies, and an index from the processor, as CUDA has it.
_CROSS = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::_unsafe_index.Tensor")


class Elsewhere(torch.Tensor):
    """A tensor on the device, around one on the processor."""

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.value = value
        return made

    def __repr__(self):
        return f"Elsewhere({self.value})"

    def tolist(self):
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Mixed(RuntimeError):
    """Tensors of two devices met."""


def _run(function, args, kwargs):
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, Elsewhere)]
    # A number is taken from anywhere.
    here = [value for value in tensors if not isinstance(value, Elsewhere) and value.ndim]
    name = function._schema.name + (f".{function._schema.overload_name}" if function._schema.overload_name else "")
    if there and here and not name.startswith(_CROSS):
        raise Mixed(f"{name} was given tensors on {DEVICE} and on the processor: {[tuple(v.shape) for v in tensors]}")
    asked = kwargs.get("device")
    onto = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if name.startswith("aten::copy_"):
        onto = isinstance(args[0], Elsewhere)
    plain = tree_map(lambda value: value.value if isinstance(value, Elsewhere) else value, (args, dict(kwargs)))
    if asked is not None:
        plain[1]["device"] = torch.device("cpu")
    result = function(*plain[0], **plain[1])
    if not onto:
        return result
    # An operator that writes gives back the tensor that it was given.
    given = {id(value.value): value for value in there}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else Elsewhere(value)

    return tree_map(wrapped, result)


class Reached(TorchDispatchMode):
    """While it is entered tensors can be made on the device and sent to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})
