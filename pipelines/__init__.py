"""The engine of hqdm: everything but the command line. Importing this package never imports torch."""

import importlib.util
import sys
from pathlib import Path


class _TorchvisionMend:
    """Declare the two operators torchvision needs when its compiled half cannot load.

    The registry's torchvision is built for CUDA. Beside a CPU build of torch its shared library does not load, and
    `import torchvision` then dies on an unknown operator, which peft, transformers and diffusers report as errors about
    quite other classes. Declaring the two schemas is enough, since nothing here calls them. This sits on the import
    path, so that it acts before whichever library asks for torchvision first, and on no other occasion.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            return spec
        import torch

        try:
            for library in Path(spec.origin).parent.glob("_C*.so"):
                torch.ops.load_library(library)
        except OSError:
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__]._torchvision_library = self.library  # the schemas live as long as the object
        return spec


sys.meta_path.insert(0, _TorchvisionMend())
