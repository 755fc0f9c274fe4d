"""LUT product sums on an NVIDIA GPU: ``cuda_src/lut_conv2d.cu``, launched by CuPy on torch's tensors and stream."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..geometry import conv_output_size
from ..kernels import Plan, launch, require_cupy, source_path
from ..multiplier import PreparedTable, prepare

_SOURCE = "lut_conv2d"
_MAX_GRID_X, _MAX_GRID_Y = 2**31 - 1, 2**16 - 1


def unavailable(device: torch.device) -> str | None:
    """Runs on CUDA tensors, with CuPy."""
    if device.type != "cuda":
        return f"it takes CUDA tensors, got tensors on {device}"
    require_cupy()
    return None


def _constant(name: str) -> int:
    """A tile size, from where it is stated: the ``constexpr int`` in the source."""
    found = re.search(rf"constexpr int {name} = (\d+);", source_path(_SOURCE).read_text())
    if found is None:
        raise ValueError(f"{source_path(_SOURCE)} must state 'constexpr int {name} = …;'")
    return int(found[1])


@lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def product_sum_plan(
    x: Tensor,
    w: Tensor,
    known: PreparedTable,
    y: Tensor,
    y_strides: tuple[int, int, int, int],
    geometry: tuple[int, int, int, int, int, int],
    out_size: tuple[int, int],
    pad_code: int,
) -> Plan:
    """Plan an implicit grouped convolution of x ``(B, g, C/g, H, W)`` with w ``(g, O/g, C/g, kh, kw)``, any strides.

    `geometry` is stride, padding and dilation; `y_strides` are those of (image, group, output channel, output pixel).
    """
    batch, groups, channels, *size = x.shape
    lanes, *kernel = w.shape[1], *w.shape[3:]
    pixels = batch * out_size[0] * out_size[1]
    numbers = (pixels, groups, lanes, channels, *size, *out_size, *kernel, *geometry, *x.stride(), *w.stride())
    threads, tile = _constant("THREADS"), _constant("LANES")
    return Plan(
        _SOURCE,
        f"lut_conv2d_{str(known.columns.dtype).removeprefix('torch.')}",
        (min(-(-pixels // threads), _MAX_GRID_X), min(groups * -(-lanes // tile), _MAX_GRID_Y), 1),
        (threads, 1, 1),
        (
            x,
            w,
            known.columns,
            y,
            _on_device((*numbers, *y_strides), x.device),
            np.int32(w[0, 0].numel() * known.offset),
            np.uint8(pad_code),
        ),
    )


def matmul_plan(x: Tensor, w: Tensor, known: PreparedTable, y: Tensor) -> Plan:
    """Plan ``lut_matmul`` into a contiguous y: rows are the pixels of a 1×1 convolution, the batch its groups."""
    rows, columns = y.shape[-2:]
    x = x.expand(*y.shape[:-1], x.shape[-1]).reshape(-1, *x.shape[-2:])
    w = w.expand(*y.shape[:-2], *w.shape[-2:]).reshape(-1, *w.shape[-2:])
    return product_sum_plan(
        x.transpose(1, 2)[None, :, :, None, :],
        w[:, :, :, None, None],
        known,
        y,
        (0, rows * columns, 1, columns),
        (1, 1, 0, 0, 1, 1),
        (1, rows),
        0,
    )


def conv2d_plan(
    x: Tensor,
    w: Tensor,
    known: PreparedTable,
    y: Tensor,
    geometry: tuple[int, int, int, int, int, int],
    groups: int,
    pad_code: int,
) -> Plan:
    """Plan ``lut_conv2d`` into a contiguous y."""
    channels, *out_size = y.shape[1:]
    lane = out_size[0] * out_size[1]
    return product_sum_plan(
        x.unflatten(1, (groups, -1)),
        w.unflatten(0, (groups, -1)),
        known,
        y,
        (channels * lane, channels // groups * lane, lane, 1),
        geometry,
        tuple(out_size),
        pad_code,
    )


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32, device=x.device)
    launch(matmul_plan(x, w, prepare(table), y), x.device)
    return y


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
    """Implicit im2col: nothing but input and output in global memory."""
    size = conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = torch.empty(x.shape[0], w.shape[0], *size, dtype=torch.int32, device=x.device)
    launch(conv2d_plan(x, w, prepare(table), y, (*stride, *padding, *dilation), groups, pad_code), x.device)
    return y


def lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
) -> Tensor:
    """A convolution with one group a channel."""
    return lut_conv2d(x, w, table, stride, padding, dilation, x.shape[1], pad_code)
