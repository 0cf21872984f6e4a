"""The products that back end `cpu` is made of: bytes u with a zero-point z, int8 weights V, 32-bit sums, and the
epilogue float(Σ (u − z)·V)·s + b in fp32, every operation rounded.

oneDNN's operators, which torch ships for x86-64, are made for processors with VNNI. Where there is none they add two
products in 16 bits, which saturate, and widen; there compiled kernels of our own take their place, and where those
cannot be built weights are bounded.
"""

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pipelines import native
from pipelines.kernels.forms import INT8
from pipelines.quant.spec import Site

_LAYOUT = {"linear": torch.contiguous_format, "conv": torch.channels_last}


class Operators(ABC):
    """Linears (rows, in) and channels-last convolutions (N, in, H, W) of uint8 codes."""

    name: str
    carries: bool  # whether zero-points had better ride in constant channels
    by_shape: bool  # whether packed weights are made for one input shape

    @abstractmethod
    def largest_weight(self, largest_code: int) -> int:
        """The largest |V| whose products with codes up to that one are exact: 64 to 127."""

    @abstractmethod
    def pack(self, site: Site, weight: torch.Tensor, shape: tuple[int, ...], largest_code: int) -> Any:
        """weight: int8 (out, in) or (out, in/groups, kh, kw), contiguous; `in` may be wider than the site's."""

    @abstractmethod
    def run(
        self, site: Site, codes: torch.Tensor, zero: int, packed: Any, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """fp32 of the output's shape; scale (out,), bias (out,) or None."""


@lru_cache
def _zeros(outputs: int) -> torch.Tensor:
    """Zero-points of weights that have none."""
    return torch.zeros(outputs, dtype=torch.int8)


def _by_group(site: Site) -> bool:
    """Whether a convolution is multiplied group by group. With 33 outputs a group or more oneDNN's sums leave out
    zero-points of later groups (torch 2.13): of one input a group with AVX-512, of most numbers of inputs with AMX.
    """
    return site.kind == "conv" and site.groups > 1 and site.outputs // site.groups > 32


def _stride(site: Site, columns: int) -> tuple[int, int]:
    """A convolution's stride on an input of so many columns. Into an output of one column there is none along the
    width, and the other columns are dropped: strided, oneDNN with AMX reads beside its input there (torch 2.13).
    """
    reach = site.dilation[1] * (site.weight[3] - 1) + 1
    one = columns + 2 * site.padding[1] < reach + site.stride[1]
    return (site.stride[0], 1) if one else site.stride


class OneDNN(Operators):
    """torch.ops.onednn. Without VNNI pairs of products saturate, and |V| is bounded to 64 beside bytes up to 255."""

    by_shape = True

    def __init__(self, vnni: bool):
        self.name = "oneDNN with VNNI" if vnni else "oneDNN without VNNI"
        self.vnni = vnni
        # Constant channels are large codes beside large weights: without VNNI pairs of these products saturate.
        self.carries = vnni

    def largest_weight(self, largest_code: int) -> int:
        return INT8 if self.vnni else min(INT8, (2**15 - 1) // (2 * largest_code))

    def pack(self, site: Site, weight: torch.Tensor, shape: tuple[int, ...], largest_code: int) -> Any:
        if site.kind == "linear":
            return torch.ops.onednn.qlinear_prepack(weight, list(shape))
        parts = site.groups if _by_group(site) else 1
        around = _stride(site, shape[3]), site.padding, site.dilation
        shape = [shape[0], shape[1] // parts, *shape[2:]]
        return [
            torch.ops.onednn.qconv_prepack(part, torch.ones(len(part)), 1.0, 0, *around, site.groups // parts, shape)
            for part in weight.chunk(parts)
        ]

    def run(
        self, site: Site, codes: torch.Tensor, zero: int, packed: Any, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        zeros = _zeros(len(scale))
        if site.kind == "linear":
            return torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, zero, packed, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
            )
        parts, stride = len(packed), _stride(site, codes.shape[3])
        biases = [None] * parts if bias is None else bias.chunk(parts)
        sums = [
            torch.ops.onednn.qconv_pointwise(
                part.contiguous(memory_format=torch.channels_last), 1.0, zero, weight, *of, stride, site.padding,
                site.dilation, site.groups // parts, 1.0, 0, torch.float32, "none", [], None,
            )
            for part, weight, *of in zip(
                codes.chunk(parts, 1), packed, scale.chunk(parts), zeros.chunk(parts), biases, strict=True
            )
        ]  # fmt: skip
        result = sums[0] if parts == 1 else torch.cat(sums, 1)
        return result if stride == site.stride else result[..., :1].contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class PackedProduct:
    """A layer as products.cpp takes it, and the memory that it points into: weights, their sums, and which steps are
    added up in 16 bits.
    """

    product: native.Product
    packed: torch.Tensor
    sums: torch.Tensor
    plan: torch.Tensor


class Compiled(Operators):
    """products.cpp: for processors with AVX2. Zero-points and padding cost nothing there, and no shape is told."""

    name = "kernels compiled for AVX2"
    carries = False
    by_shape = False

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def largest_weight(self, largest_code: int) -> int:
        return INT8

    def pack(self, site: Site, weight: torch.Tensor, shape: tuple[int, ...], largest_code: int) -> PackedProduct:
        around = (1, 1), (0, 0), (1, 1)
        side, (stride, padding, dilation) = (1, 1), around
        if site.kind == "conv":
            side, stride, padding, dilation = weight.shape[2:], site.stride, site.padding, site.dilation
        groups = site.groups if site.kind == "conv" else 1
        product = native.Product(groups, len(weight) // groups, weight.shape[1], *side, *stride, *padding, *dilation)
        packed = torch.empty(self.library.hqdm_product_size(product), dtype=torch.int8)
        steps = -(-weight.shape[1] // native.PRODUCT_DEPTH)
        sums = torch.empty(len(packed) // (side[0] * side[1] * steps * native.PRODUCT_DEPTH), dtype=torch.int32)
        plan = torch.empty(side[0] * side[1] * steps, 4, dtype=torch.int32)
        self.library.hqdm_product_pack(
            product, weight.data_ptr(), largest_code, packed.data_ptr(), sums.data_ptr(), plan.data_ptr()
        )
        plan = plan[: product.segments].clone()
        product.packed, product.sums, product.plan = packed.data_ptr(), sums.data_ptr(), plan.data_ptr()
        return PackedProduct(product, packed, sums, plan)

    def run(
        self, site: Site, codes: torch.Tensor, zero: int, packed: Any, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        product = packed.product
        taken, given = product.groups * product.inputs, product.groups * product.outputs
        if (
            codes.dtype != torch.uint8
            or codes.shape[1] != taken
            or not codes.is_contiguous(memory_format=_LAYOUT[site.kind])
        ):
            raise ValueError(f"site {site.name}: {codes.dtype} {tuple(codes.shape)} are not bytes of {taken} channels")
        for value in (scale,) if bias is None else (scale, bias):
            if value.dtype != torch.float32 or value.shape != (given,):
                raise ValueError(f"site {site.name}: scales and biases are {given} numbers of fp32, not {value.dtype}")
        scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
        if site.kind == "linear":  # rows as images, which threads share where codes are copied
            images, rows, columns = len(codes), 1, 1
            y = torch.empty(images, given)
        else:
            images, _, rows, columns = codes.shape
            sides = [
                (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
                for extent, pad, dilation, taps, stride in zip(
                    (rows, columns), site.padding, site.dilation, site.weight[2:], site.stride, strict=True
                )
            ]
            if min(sides) < 1:
                raise ValueError(f"site {site.name}: {rows}×{columns} positions are fewer than its kernel takes")
            y = torch.empty((images, given, *sides), memory_format=torch.channels_last)
        scratch = torch.empty(self.library.hqdm_product_scratch(product, images, rows, columns), dtype=torch.uint8)
        self.library.hqdm_product(
            product, codes.data_ptr(), images, rows, columns, zero, scale.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y


@lru_cache(maxsize=1)
def has_vnni() -> bool:
    """Whether oneDNN's operators sum u8·s8 products in 32 bits; without VNNI pairs saturate at 16.

    Tried where the processor says that it can: oneDNN may take other instructions (ONEDNN_MAX_CPU_ISA).
    """
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")):
        return False
    channels, operators = 32, OneDNN(vnni=True)
    for side in (0, 1, 3):  # of a kernel; 0: a linear
        shape = (1, channels, 8, 8) if side else (8, channels)
        codes = torch.full(shape, 255, dtype=torch.uint8)
        weight = torch.full((16, channels, side, side) if side else (16, channels), INT8, dtype=torch.int8)
        site = Site("tried", "conv" if side else "linear", "", tuple(weight.shape))
        if side:
            codes = codes.contiguous(memory_format=torch.channels_last)
        packed = operators.pack(site, weight, shape, 255)
        if not (operators.run(site, codes, 0, packed, torch.ones(16), None) == weight[0].numel() * 255 * INT8).all():
            return False
    return True


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's int8 operators."""
    return hasattr(torch.ops.onednn, "qconv_pointwise") and torch.backends.mkldnn.is_available()


def available() -> list[Operators]:
    """All that are exact here, the fastest first; none where neither torch nor a compiler has any."""
    library, onednn = native.library(), has_onednn()
    found: list[Operators] = [OneDNN(vnni=True)] if onednn and has_vnni() else []
    found += [Compiled(library)] if library is not None and library.hqdm_products() else []
    return [*found, OneDNN(vnni=False)] if onednn else found
