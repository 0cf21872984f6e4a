"""What a layer holds of a weight that is divided among processes while it is not gathered."""

import torch

from pipelines.errors import HqdmError


class Absent(torch.Tensor):
    """What stands where a tensor is that is not gathered. torch's own meta tensors would not do: some of its operators
    on the processor take one for a weight and return what lies in memory.
    """

    _TOLD = frozenset({"__get__", "__len__", "numel", "nelement", "dim", "size", "stride", "is_floating_point",
                       "element_size", "requires_grad_", "__repr__"})  # fmt: skip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ == "requires_grad_":
            return args[0]
        if function.__name__ in cls._TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                told = function(*args, **(kwargs or {}))
            if not isinstance(told, torch.Tensor):
                return told
        raise HqdmError(
            f"{function.__name__} reads a weight that is divided among processes outside the call of its layer",
            "this network cannot be divided: leave FSDP out",
        )
