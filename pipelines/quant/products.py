"""Products of fp32 matrices, as fast as this build of torch multiplies them anywhere."""

import torch
from torch.nn import functional as F


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·bᵀ of a (…, K) and b (N, K), each possibly transposed or a part of another: (…, N). fp32 has no gradient here.

    oneDNN takes fp32 on a processor, which torch else gives to MKL: twice as fast on AMD's, whose AVX-512 MKL leaves
    alone, and as fast on Intel's. A sum over few products, as of low-rank adapters, has the same bits in both.
    """
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad) or not _onednn_takes(a, b):
        return F.linear(a, b)
    y = torch.ops.mkldnn._linear_pointwise(_dense(a.flatten(0, -2)), _dense(b), None, "none", [], "")
    return y.view(*a.shape[:-1], len(b))


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Without gaps in memory, by rows or by columns: oneDNN multiplies others by its reference, a thousand times as
    slowly.
    """
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def _onednn_takes(a: torch.Tensor, b: torch.Tensor) -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    fp32 = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    return known and fp32 and a.ndim > 1 and min(*a.shape, *b.shape) > 0
