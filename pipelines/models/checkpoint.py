"""Reading of a PyTorch Lightning or plain torch checkpoint: tensors only, nothing in the pickle runs."""

import pickle
import struct
import zipfile
from pathlib import Path

import torch

from pipelines.errors import FileFault


class _Stub:
    """Stands for every class a checkpoint names that is not a tensor's; it keeps nothing and runs nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# Wrappers that training frameworks leave beside the tensors. Anything else that is not a tensor's is refused.
_KNOWN_WRAPPERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")

# What torch and zipfile raise on bytes that are not what they should be.
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError, ValueError, TypeError,
    AttributeError, LookupError, AssertionError, OverflowError,
)  # fmt: skip


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of a .ckpt/.pt/.bin file and the qualified names of the wrapper objects that were left out.

    Raises FileFault for a file that is missing, no torch archive, damaged, without tensors, or that names code other
    than the known wrappers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFault(f"{path}: there is no such file", "give the path of a checkpoint, for example model.ckpt")
    if not zipfile.is_zipfile(path):
        raise FileFault(
            f"{path}: not a torch checkpoint (a zip archive that torch.save writes), or cut short",
            "fetch the file again; a checkpoint of torch before 1.6 must be saved anew by a newer torch",
        )
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not name.startswith(_KNOWN_WRAPPERS)]
        if refused:
            raise FileFault(
                f"{path}: the pickle names code that tensors do not need: {', '.join(sorted(refused))}",
                "nothing was run; save the state dict alone, or as safetensors, where you trust the file",
            )
        with torch.serialization.safe_globals([(_Stub, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGE as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileFault(f"{path}: damaged checkpoint: {first}", "fetch the file again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    entries = state.items() if isinstance(state, dict) else ()
    state = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not state:
        raise FileFault(f"{path}: holds no tensors under names", "give a checkpoint with a state dict")
    return state, sorted(names)
