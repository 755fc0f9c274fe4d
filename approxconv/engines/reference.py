"""The oracle: look every product up, add the products. Any device, no cleverness, compared with by every test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**22  # gathered entries alive at once


def unavailable(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    a = x.long().bitwise_and(table.shape[0] - 1).expand(*batch, *x.shape[-2:])
    b = w.long().bitwise_and(table.shape[1] - 1).expand(*batch, *w.shape[-2:])
    y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32, device=x.device)
    a, b, flat = a.reshape(-1, *x.shape[-2:]), b.reshape(-1, *w.shape[-2:]), y.view(-1, *y.shape[-2:])
    rows = max(1, _CHUNK // (b.shape[-2] * b.shape[-1]))
    for i in range(len(flat)):
        for m in range(0, x.shape[-2], rows):
            products = table[a[i, m : m + rows, None, :], b[i, None, :, :]]
            flat[i, m : m + rows] = products.sum(-1, dtype=torch.int64)
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
    """Pad with `pad_code`, cut the patches out, multiply them with the filters of their group."""
    batch, channels, height, width = x.shape
    filters, _, kh, kw = w.shape
    padded = x.new_full((batch, channels, height + 2 * padding[0], width + 2 * padding[1]), pad_code)
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x
    out_h = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    taps = []
    for r in range(kh):
        for s in range(kw):
            top, left = r * dilation[0], s * dilation[1]
            rows = slice(top, top + (out_h - 1) * stride[0] + 1, stride[0])
            cols = slice(left, left + (out_w - 1) * stride[1] + 1, stride[1])
            taps.append(padded[:, :, rows, cols])
    patches = torch.stack(taps, dim=2)  # (B, C, kh·kw, H', W')
    patches = patches.reshape(batch, groups, channels // groups * kh * kw, out_h * out_w)
    kernels = w.reshape(groups, filters // groups, -1)
    sums = lut_matmul(patches.transpose(-1, -2), kernels, table)  # (B, g, H'W', O/g)
    return sums.transpose(-1, -2).reshape(batch, filters, out_h, out_w).contiguous()


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
