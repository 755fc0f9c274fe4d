"""The factored CUDA kernels on the CPU: the same plans and the same ``.cu``, compiled by g++; slow and exact.

Depthwise convolutions go through row tables, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..kernels.factored import host_engine
from . import host_cuda
from .factored import form_of

unavailable = host_cuda.unavailable
lut_dwconv2d = host_cuda.lut_dwconv2d


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
    return host_engine().lut_matmul(x, w, form_of(table))


def lut_conv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
) -> Tensor:
    """Implicit GEMM on the codes' features."""
    return host_engine().lut_conv2d(x, w, form_of(table), stride, padding, dilation, groups, pad_code)
