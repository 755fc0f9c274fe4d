"""Depthwise convolution: row tables whose lanes are the taps of a channel's kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ...geometry import conv_output_size
from ...multiplier import prepare
from . import shuffles
from .packing import copy_channels, copy_run
from .row_tables import build, lut_conv2d
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import (
    CODES,
    LANES,
    add_vector,
    copy,
    data_of,
    element_type,
    fill,
    i32,
    i64,
    jit,
    transpose_network,
    vector_at,
)

PLANE = 2048  # pixels of a depthwise band: their 9 products each stay in the first-level cache
ROW_READ = 3  # reading and transposing a row costs about as much as looking up this many products
MAX_PLANE = 2**15  # pixels one output row of a depthwise convolution may reach
MAX_DEPTH_MULTIPLIER = 3  # with more filters a channel, filters make better lanes than taps
_MAX_COPY = 2**23  # bytes of depthwise weights that may be copied for the sake of their order


def _look_up(taps: int) -> Any:
    """Intrinsic ``target[at + t·stride + j] = rows[first + codes[code_at + j]·16 + t]`` for j < 16, t < taps."""

    @intrinsic
    def look_up(_: Any, target: Any, at: Any, stride: Any, rows: Any, first: Any, codes: Any, code_at: Any) -> Any:
        signature = types.void(target, types.int64, types.int64, rows, types.int64, codes, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            target_value, at_value, stride_value, rows_value, first_value, codes_value, code_value = args
            element = element_type(context, sig.args[0])
            size, vector = element.width // 8, ir.VectorType(element, LANES)
            target_at = builder.gep(data_of(context, builder, sig.args[0], target_value), [at_value])
            rows_at = builder.gep(data_of(context, builder, sig.args[3], rows_value), [first_value])
            codes_at = builder.gep(data_of(context, builder, sig.args[5], codes_value), [code_value])
            found = []
            for j in range(LANES):
                code = builder.load(builder.gep(codes_at, [i64(j)]))
                row = builder.gep(rows_at, [builder.mul(builder.zext(code, i64), i64(LANES))])
                found.append(builder.load(vector_at(builder, row, vector), align=size))
            for t, column in enumerate(transpose_network(builder, found)[:taps]):
                to = builder.gep(target_at, [builder.mul(stride_value, i64(t))])
                builder.store(column, vector_at(builder, to, vector), align=size)
            return context.get_dummy_value()

        return signature, codegen

    return look_up


_look_up_9 = _look_up(9)  # a 3×3 kernel's taps
_look_up_16 = _look_up(LANES)


@intrinsic
def _add_shifted(_: Any, acc: Any, at: Any, source: Any, start: Any) -> Any:
    """``acc[at : at+16] += source[start : start+16]`` on flat arrays."""
    signature = types.void(acc, types.int64, source, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = element_type(context, sig.args[2])
        acc_at = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        from_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
        entries = builder.load(vector_at(builder, from_at, ir.VectorType(element, LANES)), align=element.width // 8)
        add_vector(builder, acc_at, entries)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _add_looked_up(_: Any, acc: Any, at: Any, table: Any, entries: Any, codes: Any, start: Any, step: Any) -> Any:
    """``acc[at + j] += table[entries + codes[start + j·step]]`` for j < 16, on flat arrays."""
    signature = types.void(acc, types.int64, table, types.int64, codes, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = element_type(context, sig.args[2])
        acc_at = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        entries_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
        codes_at = builder.gep(data_of(context, builder, sig.args[4], args[4]), [args[5]])
        found = ir.Constant(ir.VectorType(element, LANES), ir.Undefined)
        for j in range(LANES):
            entry = builder.load(builder.gep(entries_at, [builder.zext(builder.load(codes_at), i64)]))
            found = builder.insert_element(found, entry, i32(j))
            codes_at = builder.gep(codes_at, [args[6]])
        add_vector(builder, acc_at, found)
        return context.get_dummy_value()

    return signature, codegen


@jit
def fill_planes(
    planes, plane, x, base, channels, strides, first_row, size, rows, cols, pad_w, pad_code, offsets
):  # fmt: skip
    """Copy `rows` image rows from `first_row` on, padded to `cols` columns, to one plane a channel."""
    stride_c, stride_h, stride_w = strides
    left = min(pad_w, cols)
    inside = min(size[1], cols - left)
    if inside < cols or first_row < 0 or first_row + rows > size[0]:
        fill(planes, 0, channels * plane, pad_code)
    for i in range(max(0, -first_row), min(rows, size[0] - first_row)):
        at = i * cols + left
        start = base + (first_row + i) * stride_h
        if stride_c == 1 and channels > 1:
            copy_channels(planes, at, plane, x, start, stride_w, inside, channels, offsets)
        else:
            for c in range(channels):
                copy_run(planes, c * plane + at, x, start + c * stride_c, stride_w, inside)


@jit
def _depthwise_block(
    x, x_strides, size, kernel, geometry, pad_code, w, multiplier, table, bias, out, out_size, all_channels, band,
    plane_size, image_range, channel_range
):  # fmt: skip
    """One task: some images, some channels, 16 at a time.

    The lanes of a row table are here the taps of a channel's kernel: one row read gives all the products that an input
    pixel takes part in. Rows of 16 pixels are transposed to 16 pixels a tap, and the taps added with their shifts.
    """
    stride_image, stride_c, stride_h, stride_w = x_strides
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    taps = kernel[0] * kernel[1]
    out_h, out_w = out_size
    cols = plane_size[1]
    plane = (plane_size[0] * cols + LANES - 1) // LANES * LANES
    flat = step_h == 1 and step_w == 1
    acc_cols = cols if flat else (out_w + LANES - 1) // LANES * LANES
    offsets = np.empty(LANES, np.int64)
    tables = np.empty(LANES * CODES * LANES, table.dtype)
    # Vectors of 16 pixels run over the last one.
    planes = np.empty(LANES * plane + LANES * step_w, np.uint8)
    found = np.empty(LANES * plane + LANES, table.dtype)
    acc = np.empty(band * acc_cols + LANES, np.int32)
    shifts = np.empty(taps, np.int64)
    for tap in range(taps):
        shifts[tap] = tap // kernel[1] * dil_h * cols + tap % kernel[1] * dil_w
    for first_channel in range(channel_range[0], channel_range[1], LANES):
        channels = min(LANES, channel_range[1] - first_channel)
        for q in range(multiplier):
            for tap in range(0, taps, LANES):
                some = min(LANES, taps - tap)
                by_row = flat and some > ROW_READ
                for c in range(channels if by_row else 0):
                    lane = (first_channel + c) * multiplier + q
                    build(tables, c, table, w, 1, lane * taps + tap, some, offsets)
                for image in range(image_range[0], image_range[1]):
                    for out_row in range(0, out_h, band):
                        out_rows = min(band, out_h - out_row)
                        rows = (out_rows - 1) * step_h + dil_h * (kernel[0] - 1) + 1
                        used = rows * cols
                        fill_planes(
                            planes, plane, x, image * stride_image + first_channel * stride_c, channels,
                            (stride_c, stride_h, stride_w), out_row * step_h - pad_h, size,
                            rows, cols, pad_w, pad_code, offsets
                        )  # fmt: skip
                        for c in range(channels):
                            rows_at = c * CODES * LANES
                            lane = (first_channel + c) * multiplier + q
                            if by_row and some <= 9:
                                for p in range(0, used, LANES):
                                    _look_up_9(found, p, plane, tables, rows_at, planes, c * plane + p)
                            elif by_row:
                                for p in range(0, used, LANES):
                                    _look_up_16(found, p, plane, tables, rows_at, planes, c * plane + p)
                            acc[:] = bias if tap == 0 else 0
                            for t in range(some):
                                shift = shifts[tap + t]
                                entries = np.int64(w[lane * taps + tap + t]) * CODES
                                # With unit strides a tap is one shift of the whole plane, padding included.
                                count = (out_rows - 1) * cols + out_w if flat else out_w
                                for i in range(1 if flat else out_rows):
                                    start = shift + i * step_h * cols
                                    for j in range(0, count, LANES):
                                        if by_row:
                                            _add_shifted(acc, i * acc_cols + j, found, t * plane + start + j * step_w)
                                        else:
                                            _add_looked_up(
                                                acc, i * acc_cols + j, table, entries, planes,
                                                c * plane + start + j * step_w, step_w
                                            )  # fmt: skip
                            at = ((image * all_channels * multiplier + lane) * out_h + out_row) * out_w
                            for i in range(out_rows):
                                if tap == 0:
                                    copy(out, at + i * out_w, acc, i * acc_cols, out_w)
                                else:
                                    for j in range(out_w):
                                        out[at + i * out_w + j] += acc[i * acc_cols + j]


def _plan(
    x: Tensor, w: Tensor, table: Tensor, geometry: Sequence[int], pad_code: int, y: Tensor
) -> tuple[Any, tuple[Any, ...], int]:
    """The block to run, its arguments without its ranges, and the bytes of scratch that a worker takes."""
    _, channels, *size = x.shape
    kernel, known = tuple(w.shape[2:]), prepare(table)
    stride, dilation, (out_h, out_w) = geometry[:2], geometry[4:], y.shape[2:]
    reach = dilation[0] * (kernel[0] - 1) + 1
    cols = (out_w - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
    band = min(out_h, max(1, (PLANE // cols - reach) // stride[0] + 1))
    plane = ((band - 1) * stride[0] + reach) * cols
    # Codes and products of 16 channels, their tables, the sums.
    worker_bytes = LANES * (plane + LANES) * (1 + known.rows.itemsize) + LANES * CODES * LANES * known.rows.itemsize
    worker_bytes += 4 * (band * max(cols, out_w + LANES) + LANES)
    arguments = (
        flat(x),
        x.stride(),
        tuple(size),
        kernel,
        geometry,
        np.uint8(pad_code),
        w.contiguous().view(-1).numpy(),
        w.shape[0] // channels,
        known.columns.view(-1).numpy(),
        np.int32(w[0].numel() * known.offset),
        y.view(-1).numpy(),
        (out_h, out_w),
        channels,
        band,
        ((band - 1) * stride[0] + reach, cols),
    )
    return _depthwise_block, arguments, worker_bytes


def lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
) -> Tensor:
    """Byte shuffles where the CPU has those of 128 entries, else row tables over the taps of each channel.

    A grouped convolution where a row of pixels would not fit the scratch, or where row tables are used and each channel
    has so many filters that these make the better lanes.
    """
    batch, channels, *size = x.shape
    kernel, geometry, multiplier = tuple(w.shape[2:]), (*stride, *padding, *dilation), w.shape[0] // channels
    out_h, out_w = conv_output_size(size, kernel, stride, padding, dilation)
    cols = (out_w - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
    copied = 0 if w.is_contiguous() else w.numel()
    too_wide = (dilation[0] * (kernel[0] - 1) + 1) * cols > MAX_PLANE
    if too_wide or copied > _MAX_COPY or (multiplier > MAX_DEPTH_MULTIPLIER and not shuffles.SHUFFLES):
        return lut_conv2d(x, w, table, stride, padding, dilation, channels, pad_code)
    y = torch.empty(batch, w.shape[0], out_h, out_w, dtype=torch.int32)
    plan = shuffles.plan(x, w, table, geometry, pad_code, y) if shuffles.SHUFFLES else None
    block, arguments, worker_bytes = plan or _plan(x, w, table, geometry, pad_code, y)
    workers = max(1, min(torch.get_num_threads(), (SCRATCH - copied) // worker_bytes))
    blocks = -(-channels // LANES)
    channel_ranges = [
        (LANES * first, min(LANES * last, channels)) for first, last in even_ranges(blocks, min(blocks, 4 * workers))
    ]
    image_ranges = even_ranges(batch, min(batch, -(-workers // len(channel_ranges))))
    run(block, [(*arguments, i, c) for i in image_ranges for c in channel_ranges], workers)
    return y
