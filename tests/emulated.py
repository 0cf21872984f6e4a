"""Processors that the tests do not run on: what their instructions give, from the definition.

With VNNI layers take other forms than without (constant channels, parity, weights of all 8 bits), whose algebra is
tried everywhere.
"""

import torch

from pipelines.kernels import reference
from pipelines.kernels.operators import OneDNN, Operators, available, has_vnni
from pipelines.quant.layers import epilogue


class Definition(OneDNN):
    """oneDNN's operators with VNNI by plain integers: sums in 32 bits, then sum·s + b, each operation rounded to fp32.

    float(sum) is taken from int32, as the processor takes it.
    """

    def __init__(self):
        super().__init__(vnni=True)
        self.name = "the definition of oneDNN with VNNI"

    def pack(self, site, weight, shape, largest_code):
        assert weight.dtype == torch.int8 and weight.is_contiguous()
        return weight.clone()

    def run(self, site, codes, zero, packed, scale, bias):
        assert codes.dtype == torch.uint8
        sums = reference.accumulate(codes.int() - zero, packed.int(), site).float()
        return epilogue(sums, torch.tensor(1.0), scale, bias)


def with_vnni() -> Operators:
    """oneDNN with VNNI, or its definition where the processor has none."""
    return OneDNN(vnni=True) if has_vnni() else Definition()


def everywhere() -> list[Operators]:
    """What is exact here, and what another processor would have."""
    return available() if has_vnni() else [with_vnni(), *available()]
