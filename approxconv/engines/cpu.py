"""Row tables on the CPU, in Numba.

A LUT product sum ``y[m, n] = Σ_k table[x[m, k], w[n, k]]`` is a random gather. For 16 values of n and 8 of k the
gather is done once for all 256 codes, ``T[k][a][n] = table[a, w[n, k]]``; then a row m costs eight contiguous vector
adds ``acc[m, :] += T[k][x[m, k], :]``. The tables of a block are built once and serve all its rows, up to 4,096.
Where there are too few rows or columns for that to pay, the entries are gathered one by one.

Convolution is the same on implicit patches: a block of output pixels is packed k-major, channel group by channel
group, into a scratch buffer of bounded size.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..geometry import conv_output_size, flat_batches
from ..multiplier import PreparedTable, prepare

LANES = 16  # columns of a row table: one 64-byte vector of int32 sums
STEPS = 8  # k's a pass: their int16 tables are 64 KiB and stay in the caches closest to the core
MAX_ROWS = 4096  # rows a block: their sums (256 KiB) stay in the second-level cache
MIN_ROWS = 1024  # below this a block is not cut further just to occupy a thread
BUILD_ROWS = 512  # building one k of a row table costs about as much as adding it to this many rows
CODES = 256
PLANE = 2048  # pixels of a depthwise band: their 9 products each stay in the first-level cache
ROW_READ = 3  # reading and transposing a row costs about as much as looking up this many products
MAX_PLANE = 2**15  # pixels one output row of a depthwise convolution may reach
MAX_DEPTH_MULTIPLIER = 3  # with more filters a channel, filters make better lanes than taps
_SCRATCH = 60 * 2**20  # bytes over all workers
_SCRATCH_WORKER = 4 * 2**20  # of packed codes
_MIN_PACKED = 2**19
_BLOCK_BYTES = 2**20 * 5 // 8  # what a block of MAX_ROWS takes beside them: sums, tables, where its rows lie
_MAX_COPY = 2**23  # bytes of depthwise weights that may be copied for the sake of their order
_OFFSET_BYTES = 8  # of the offset of each k's weight


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL, cached on disk where some cache folder is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # Numba: "no locator available"
        return numba.njit(nogil=True)(function)


_inline = numba.njit(nogil=True, forceinline=True)  # compiled into its callers, with which it is cached


_i32, _i64 = ir.IntType(32), ir.IntType(64)


def _data(context: Any, builder: Any, array_type: types.Array, value: Any) -> Any:
    return context.make_array(array_type)(context, builder, value).data


def _element(context: Any, array_type: types.Array) -> ir.Type:
    return context.get_data_type(array_type.dtype)


def _vector(builder: Any, pointer: Any, vector: ir.VectorType) -> Any:
    return builder.bitcast(pointer, vector.as_pointer())


def _add_vector(builder: Any, acc: Any, entries: Any) -> None:
    """Add 16 entries to the 16 sums at `acc`."""
    sum_type = ir.VectorType(_i32, LANES)
    sums_at = _vector(builder, acc, sum_type)
    widened = builder.sext(entries, sum_type) if entries.type != sum_type else entries
    builder.store(builder.add(builder.load(sums_at, align=4), widened), sums_at, align=4)


def _add_rows(steps: int) -> Any:
    """Intrinsic ``acc[at : at+16] += Σ_{i<steps} tables[i, codes[code_at + i·code_stride], :]`` on flat arrays.

    Written as LLVM vectors because Numba cannot promise that the arrays do not overlap, without which LLVM neither
    keeps the sums in a register nor drops the checks from this innermost loop.
    """

    @intrinsic
    def add_rows(_: Any, acc: Any, at: Any, tables: Any, codes: Any, code_at: Any, code_stride: Any) -> Any:
        signature = types.void(acc, types.int64, tables, codes, types.int64, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            acc_value, at_value, tables_value, codes_value, code_value, stride_value = args
            element = _element(context, sig.args[2])
            size = element.width // 8
            row_type, sum_type = ir.VectorType(element, LANES), ir.VectorType(_i32, LANES)
            acc_at = builder.gep(_data(context, builder, sig.args[0], acc_value), [at_value])
            sums_at = _vector(builder, acc_at, sum_type)
            tables_at = _data(context, builder, sig.args[2], tables_value)
            code_from = builder.gep(_data(context, builder, sig.args[3], codes_value), [code_value])
            sums = builder.load(sums_at, align=4)
            for i in range(steps):
                code = builder.load(builder.gep(code_from, [builder.mul(stride_value, _i64(i))]))
                row = builder.add(builder.mul(builder.zext(code, _i64), _i64(LANES)), _i64(i * CODES * LANES))
                entries = builder.load(_vector(builder, builder.gep(tables_at, [row]), row_type), align=size)
                sums = builder.add(sums, builder.sext(entries, sum_type) if element.width < 32 else entries)
            builder.store(sums, sums_at, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return add_rows


def _transpose_network(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 vectors of 16: interleaving halves log2(16) times transposes."""
    half = LANES // 2
    for _round in range(4):
        zipped = []
        for j in range(half):
            for start in (0, half):
                picks = [lane for k in range(start, start + half) for lane in (k, LANES + k)]
                mask = ir.Constant(ir.VectorType(_i32, LANES), picks)
                zipped.append(builder.shuffle_vector(rows[j], rows[j + half], mask))
        rows = zipped
    return rows


@intrinsic
def _transpose(_: Any, target: Any, at: Any, stride: Any, source: Any, offsets: Any, first: Any) -> Any:
    """``target[at + a·stride + j] = source[offsets[j] + first + a]`` for a, j < 16, on flat arrays of one dtype."""
    signature = types.void(target, types.int64, types.int64, source, offsets, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target_value, at_value, stride_value, source_value, offsets_value, first_value = args
        element = _element(context, sig.args[0])
        size, vector = element.width // 8, ir.VectorType(element, LANES)
        target_at = builder.gep(_data(context, builder, sig.args[0], target_value), [at_value])
        source_at = builder.gep(_data(context, builder, sig.args[3], source_value), [first_value])
        offsets_at = _data(context, builder, sig.args[4], offsets_value)
        rows = []
        for j in range(LANES):
            offset = builder.load(builder.gep(offsets_at, [_i64(j)]))
            rows.append(builder.load(_vector(builder, builder.gep(source_at, [offset]), vector), align=size))
        for a, column in enumerate(_transpose_network(builder, rows)):
            to = builder.gep(target_at, [builder.mul(stride_value, _i64(a))])
            builder.store(column, _vector(builder, to, vector), align=size)
        return context.get_dummy_value()

    return signature, codegen


def _look_up(taps: int) -> Any:
    """Intrinsic ``target[at + t·stride + j] = rows[first + codes[code_at + j]·16 + t]`` for j < 16, t < taps."""

    @intrinsic
    def look_up(_: Any, target: Any, at: Any, stride: Any, rows: Any, first: Any, codes: Any, code_at: Any) -> Any:
        signature = types.void(target, types.int64, types.int64, rows, types.int64, codes, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            target_value, at_value, stride_value, rows_value, first_value, codes_value, code_value = args
            element = _element(context, sig.args[0])
            size, vector = element.width // 8, ir.VectorType(element, LANES)
            target_at = builder.gep(_data(context, builder, sig.args[0], target_value), [at_value])
            rows_at = builder.gep(_data(context, builder, sig.args[3], rows_value), [first_value])
            codes_at = builder.gep(_data(context, builder, sig.args[5], codes_value), [code_value])
            found = []
            for j in range(LANES):
                code = builder.load(builder.gep(codes_at, [_i64(j)]))
                row = builder.gep(rows_at, [builder.mul(builder.zext(code, _i64), _i64(LANES))])
                found.append(builder.load(_vector(builder, row, vector), align=size))
            for t, column in enumerate(_transpose_network(builder, found)[:taps]):
                to = builder.gep(target_at, [builder.mul(stride_value, _i64(t))])
                builder.store(column, _vector(builder, to, vector), align=size)
            return context.get_dummy_value()

        return signature, codegen

    return look_up


_add_steps = _add_rows(STEPS)
_add_one = _add_rows(1)
_look_up_9 = _look_up(9)  # a 3×3 kernel's taps
_look_up_16 = _look_up(LANES)


def _move(width: int) -> Any:
    """Intrinsic ``target[at : at + width] = source[start : start + width]`` on flat arrays of one dtype."""

    @intrinsic
    def move(_: Any, target: Any, at: Any, source: Any, start: Any) -> Any:
        signature = types.void(target, types.int64, source, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = _element(context, sig.args[0])
            size, vector = element.width // 8, ir.VectorType(element, width)
            to = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]])
            come = builder.gep(_data(context, builder, sig.args[2], args[2]), [args[3]])
            builder.store(builder.load(_vector(builder, come, vector), align=size), _vector(builder, to, vector), size)
            return context.get_dummy_value()

        return signature, codegen

    return move


_move_16, _move_8, _move_4, _move_1 = _move(16), _move(8), _move(4), _move(1)


@_inline
def _copy(target, at, source, start, count):
    """``target[at : at + count] = source[start : start + count]``: rows are short, a call to memcpy is dear."""
    if count >= 16:
        for i in range(0, count - 15, 16):
            _move_16(target, at + i, source, start + i)
        _move_16(target, at + count - 16, source, start + count - 16)
    elif count >= 8:
        _move_8(target, at, source, start)
        _move_8(target, at + count - 8, source, start + count - 8)
    elif count >= 4:
        _move_4(target, at, source, start)
        _move_4(target, at + count - 4, source, start + count - 4)
    else:
        for i in range(count):
            _move_1(target, at + i, source, start + i)


@intrinsic
def _fill(_: Any, target: Any, at: Any, count: Any, code: Any) -> Any:
    """``target[at : at + count] = code`` for bytes."""
    signature = types.void(target, types.int64, types.int64, types.uint8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]])
        cgutils.memset(builder, to, args[2], args[3])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _add_shifted(_: Any, acc: Any, at: Any, source: Any, start: Any) -> Any:
    """``acc[at : at+16] += source[start : start+16]`` on flat arrays."""
    signature = types.void(acc, types.int64, source, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _element(context, sig.args[2])
        acc_at = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]])
        from_at = builder.gep(_data(context, builder, sig.args[2], args[2]), [args[3]])
        entries = builder.load(_vector(builder, from_at, ir.VectorType(element, LANES)), align=element.width // 8)
        _add_vector(builder, acc_at, entries)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _add_looked_up(_: Any, acc: Any, at: Any, table: Any, entries: Any, codes: Any, start: Any, step: Any) -> Any:
    """``acc[at + j] += table[entries + codes[start + j·step]]`` for j < 16, on flat arrays."""
    signature = types.void(acc, types.int64, table, types.int64, codes, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _element(context, sig.args[2])
        acc_at = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]])
        entries_at = builder.gep(_data(context, builder, sig.args[2], args[2]), [args[3]])
        codes_at = builder.gep(_data(context, builder, sig.args[4], args[4]), [args[5]])
        found = ir.Constant(ir.VectorType(element, LANES), ir.Undefined)
        for j in range(LANES):
            entry = builder.load(builder.gep(entries_at, [builder.zext(builder.load(codes_at), _i64)]))
            found = builder.insert_element(found, entry, _i32(j))
            codes_at = builder.gep(codes_at, [args[6]])
        _add_vector(builder, acc_at, found)
        return context.get_dummy_value()

    return signature, codegen


@_inline
def _copy_run(packed, at, x, start, step, count):
    if step == 1:
        _copy(packed, at, x, start, count)
    else:
        target, source = packed[at:], x[start:]
        for i in range(count):
            target[i] = source[i * step]


@_jit
def _copy_channels(packed, at, k_stride, x, start, step, count, channels, offsets):
    """Copy `count` pixels of `channels` contiguous codes each to one packed row a channel."""
    for j in range(LANES):
        offsets[j] = j * step
    pixel = 0
    while pixel + LANES <= count:
        c = 0
        while c + LANES <= channels:
            _transpose(packed, at + c * k_stride + pixel, k_stride, x, offsets, start + pixel * step + c)
            c += LANES
        while c < channels:
            _copy_run(packed, at + c * k_stride + pixel, x, start + pixel * step + c, step, LANES)
            c += 1
        pixel += LANES
    for c in range(channels):
        _copy_run(packed, at + c * k_stride + pixel, x, start + pixel * step + c, step, count - pixel)


@_jit
def _pack(packed, rows, x, base, channels, strides, size, kernel, geometry, pad_code, runs, n_runs, offsets):
    """Fill ``packed[(c·kh + r)·kw + s, m]`` with the codes that output pixels m see at tap (r, s) of channel c."""
    stride_c, stride_h, stride_w = strides
    height, width = size
    kh, kw = kernel
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    taps = kh * kw
    channels_last = stride_c == 1 and channels > 1
    for r in range(kh):
        for s in range(kw):
            shift = s * dil_w - pad_w
            first = 0 if shift >= 0 else (-shift + step_w - 1) // step_w
            last = (width - 1 - shift) // step_w + 1 if width > shift else 0
            k = r * kw + s
            for i in range(n_runs):
                m, image, row, col, count = runs[i, 0], runs[i, 1], runs[i, 2], runs[i, 3], runs[i, 4]
                ih = row * step_h - pad_h + r * dil_h
                lo = min(max(first, col), col + count)
                hi = max(min(last, col + count), lo)
                if ih < 0 or ih >= height:
                    lo = hi = col + count
                start = base + image + ih * stride_h + (lo * step_w + shift) * stride_w
                if lo > col:
                    for c in range(channels):
                        _fill(packed, (c * taps + k) * rows + m, lo - col, pad_code)
                if hi < col + count:
                    for c in range(channels):
                        _fill(packed, (c * taps + k) * rows + m + hi - col, col + count - hi, pad_code)
                if hi > lo:
                    at = k * rows + m + lo - col
                    if channels_last:
                        _copy_channels(packed, at, taps * rows, x, start, step_w * stride_w, hi - lo, channels, offsets)
                    else:
                        for c in range(channels):
                            _copy_run(packed, at + c * taps * rows, x, start + c * stride_c, step_w * stride_w, hi - lo)


@_jit
def _build(tables, slot, table, w, lane_stride, at, lanes, offsets):
    """Fill ``tables[slot][a][j] = table[w[at + j·lane_stride], a]``; lanes that do not exist repeat the first."""
    for j in range(LANES):
        offsets[j] = np.int64(w[at + (j if j < lanes else 0) * lane_stride]) * CODES
    for a in range(0, CODES, LANES):
        _transpose(tables, (slot * CODES + a) * LANES, LANES, table, offsets, a)


@_jit
def _flush_tile(out, out_rows, lane_at, lane_stride, acc, rows, lanes, first, tile, offsets):
    """Write (or, after the first channel group, add) the sums of one lane tile to the output."""
    if lane_stride == 1:
        for m in range(rows):
            at = out_rows[m] + lane_at
            if first:
                for j in range(lanes):
                    out[at + j] = acc[m * LANES + j]
            else:
                for j in range(lanes):
                    out[at + j] += acc[m * LANES + j]
        return
    for j in range(LANES):
        offsets[j] = j * LANES
    for m0 in range(0, rows, LANES):
        count = min(LANES, rows - m0)
        _transpose(tile, 0, LANES, acc, offsets, m0 * LANES)
        contiguous = out_rows[m0 + count - 1] - out_rows[m0] == count - 1
        for j in range(lanes):
            if contiguous:
                at = out_rows[m0] + lane_at + j * lane_stride
                if first:
                    for i in range(count):
                        out[at + i] = tile[j * LANES + i]
                else:
                    for i in range(count):
                        out[at + i] += tile[j * LANES + i]
            else:
                for i in range(count):
                    at = out_rows[m0 + i] + lane_at + j * lane_stride
                    out[at] = tile[j * LANES + i] if first else out[at] + tile[j * LANES + i]


@_jit
def _row_tables(
    out, out_rows, out_base, lane_stride_out, packed, rows, table, w, w_base, lane_stride, k_offsets, lanes,
    bias, first, tables, acc, tile, offsets
):  # fmt: skip
    depth = len(k_offsets)
    for n in range(0, lanes, LANES):
        width = min(LANES, lanes - n)
        lane_base = w_base + n * lane_stride
        acc[: rows * LANES] = bias
        k = 0
        while k + STEPS <= depth:
            for i in range(STEPS):
                _build(tables, i, table, w, lane_stride, lane_base + k_offsets[k + i], width, offsets)
            for m in range(rows):
                _add_steps(acc, m * LANES, tables, packed, k * rows + m, rows)
            k += STEPS
        while k < depth:
            _build(tables, 0, table, w, lane_stride, lane_base + k_offsets[k], width, offsets)
            for m in range(rows):
                _add_one(acc, m * LANES, tables, packed, k * rows + m, rows)
            k += 1
        _flush_tile(
            out, out_rows, out_base + n * lane_stride_out, lane_stride_out, acc, rows, width, first, tile, offsets
        )


@_jit
def _gather(
    out, out_rows, out_base, lane_stride_out, packed, rows, table, w, w_base, lane_stride, k_offsets, lanes,
    bias, first, acc
):  # fmt: skip
    # Slices and their unsigned indices spare the innermost loops Numba's test for negative ones.
    depth = len(k_offsets)
    for n in range(lanes):
        lane = w_base + n * lane_stride
        acc[:rows] = bias
        k = 0
        while k + 4 <= depth:
            t0 = table[np.int64(w[lane + k_offsets[k]]) * CODES :][:CODES]
            t1 = table[np.int64(w[lane + k_offsets[k + 1]]) * CODES :][:CODES]
            t2 = table[np.int64(w[lane + k_offsets[k + 2]]) * CODES :][:CODES]
            t3 = table[np.int64(w[lane + k_offsets[k + 3]]) * CODES :][:CODES]
            p0, p1 = packed[k * rows :][:rows], packed[(k + 1) * rows :][:rows]
            p2, p3 = packed[(k + 2) * rows :][:rows], packed[(k + 3) * rows :][:rows]
            for m in range(rows):
                acc[m] += t0[p0[m]] + t1[p1[m]] + t2[p2[m]] + t3[p3[m]]
            k += 4
        while k < depth:
            t0 = table[np.int64(w[lane + k_offsets[k]]) * CODES :][:CODES]
            p0 = packed[k * rows :][:rows]
            for m in range(rows):
                acc[m] += t0[p0[m]]
            k += 1
        at = out_base + n * lane_stride_out
        for m in range(rows):
            out[out_rows[m] + at] = acc[m] if first else out[out_rows[m] + at] + acc[m]


@_jit
def _runs_of(first_row, rows, out_size, image_stride, out_image_stride, row_stride_out, runs, out_rows):
    """Cut output pixels ``first_row …`` into runs within one image row; say where each pixel is written."""
    out_h, out_w = out_size
    n, m = 0, 0
    while m < rows:
        pixel = first_row + m
        col = pixel % out_w
        row = pixel // out_w % out_h
        image = pixel // (out_w * out_h)
        count = min(out_w - col, rows - m)
        runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3], runs[n, 4] = m, image * image_stride, row, col, count
        at = image * out_image_stride + (row * out_w + col) * row_stride_out
        for i in range(count):
            out_rows[m + i] = at + i * row_stride_out
        n += 1
        m += count
    return n


@_jit
def _block(
    x, x_strides, channels, size, kernel, geometry, pad_code, w, w_strides, table, bias, accumulate, out, out_strides,
    out_size, group_channels, row_range, group_range, lane_range
):  # fmt: skip
    """One task: some output pixels, for some groups and some lanes of each."""
    stride_image, x_group, stride_c, stride_h, stride_w = x_strides
    w_group, lane_stride, w_channel, w_row, w_col = w_strides
    out_image, out_group, out_lane, out_row = out_strides
    rows = row_range[1] - row_range[0]
    taps = kernel[0] * kernel[1]
    lanes = lane_range[1] - lane_range[0]
    by_table = rows * (min(lanes, LANES) - 1) > BUILD_ROWS
    padded_rows = (rows + LANES - 1) // LANES * LANES  # _transpose reads whole tiles of sums
    packed = np.empty(group_channels * taps * rows, np.uint8)
    acc = np.empty(padded_rows * LANES if by_table else rows, np.int32)
    tables = np.empty(STEPS * CODES * LANES if by_table else 1, table.dtype)
    tile = np.empty(LANES * LANES, np.int32)
    offsets = np.empty(LANES, np.int64)
    k_offsets = np.empty(group_channels * taps, np.int64)
    runs = np.empty((rows, 5), np.int64)
    out_rows = np.empty(rows, np.int64)
    n_runs = _runs_of(row_range[0], rows, out_size, stride_image, out_image, out_row, runs, out_rows)
    for group in range(group_range[0], group_range[1]):
        out_base = group * out_group + lane_range[0] * out_lane
        w_base = group * w_group + lane_range[0] * lane_stride
        for c in range(0, channels, group_channels):
            some = min(group_channels, channels - c)
            _pack(
                packed, rows, x, group * x_group + c * stride_c, some, (stride_c, stride_h, stride_w), size, kernel,
                geometry, pad_code, runs, n_runs, offsets
            )  # fmt: skip
            for k in range(some * taps):
                tap = k % taps
                k_offsets[k] = (c + k // taps) * w_channel + tap // kernel[1] * w_row + tap % kernel[1] * w_col
            first = c == 0 and not accumulate
            some_k = k_offsets[: some * taps]
            start = np.int32(bias if first else 0)
            if by_table:
                _row_tables(
                    out, out_rows, out_base, out_lane, packed, rows, table, w, w_base, lane_stride, some_k, lanes,
                    start, first, tables, acc, tile, offsets
                )  # fmt: skip
            else:
                _gather(
                    out, out_rows, out_base, out_lane, packed, rows, table, w, w_base, lane_stride, some_k, lanes,
                    start, first, acc
                )  # fmt: skip


@_jit
def _fill_planes(
    planes, plane, x, base, channels, strides, first_row, size, rows, cols, pad_w, pad_code, offsets
):  # fmt: skip
    """Copy `rows` image rows from `first_row` on, padded to `cols` columns, to one plane a channel."""
    stride_c, stride_h, stride_w = strides
    left = min(pad_w, cols)
    inside = min(size[1], cols - left)
    if inside < cols or first_row < 0 or first_row + rows > size[0]:
        _fill(planes, 0, channels * plane, pad_code)
    for i in range(max(0, -first_row), min(rows, size[0] - first_row)):
        at = i * cols + left
        start = base + (first_row + i) * stride_h
        if stride_c == 1 and channels > 1:
            _copy_channels(planes, at, plane, x, start, stride_w, inside, channels, offsets)
        else:
            for c in range(channels):
                _copy_run(planes, c * plane + at, x, start + c * stride_c, stride_w, inside)


@_jit
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
                    _build(tables, c, table, w, 1, lane * taps + tap, some, offsets)
                for image in range(image_range[0], image_range[1]):
                    for out_row in range(0, out_h, band):
                        out_rows = min(band, out_h - out_row)
                        rows = (out_rows - 1) * step_h + dil_h * (kernel[0] - 1) + 1
                        used = rows * cols
                        _fill_planes(
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
                                    _copy(out, at + i * out_w, acc, i * acc_cols, out_w)
                                else:
                                    for j in range(out_w):
                                        out[at + i * out_w + j] += acc[i * acc_cols + j]


_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """A forked child has the parent's pool object but none of its threads."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _run(block: Callable[..., None], tasks: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call ``block(*task)`` for all tasks on `workers` threads, this one included."""
    global _pool, _pool_size
    helpers = min(workers, len(tasks)) - 1
    # next() on this iterator is atomic under the GIL, so each task is taken once.
    remaining = iter(tasks)

    def work() -> None:
        for task in remaining:
            block(*task)

    if helpers <= 0:
        work()
        return
    with _pool_lock:
        if _pool is None or _pool_size < helpers:
            _pool = ThreadPoolExecutor(helpers, thread_name_prefix="approxconv")
            _pool_size = helpers
        futures = [_pool.submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        future.result()


def _even_ranges(total: int, parts: int) -> list[tuple[int, int]]:
    edges = [total * i // parts for i in range(parts + 1)]
    return [pair for pair in itertools.pairwise(edges) if pair[0] < pair[1]]


def _flat(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes from its first element to its last, as a 1-D array: no copy, whatever the strides."""
    if tensor.numel() == 0:
        return np.empty(1, np.uint8)  # has a type and is not read
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((span,), (1,)).numpy()


def _product_sum(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    bias: int,
    out: Tensor,
    out_strides: tuple[int, int, int, int],
    out_size: tuple[int, int],
    geometry: tuple[int, int, int, int, int, int],
    pad_code: int,
) -> None:
    """Write the LUT product sums of an implicit grouped convolution.

    x is ``(B, g, C/g, H, W)``, w is ``(g, O/g, C/g, kh, kw)``, both with any strides; `table` is ``[w_code, x_code]``;
    `geometry` is stride, padding and dilation; `out_strides` are those of (image, group, output channel, output pixel).
    """
    kernel_h, kernel_w = w.shape[3:]
    most = _MIN_PACKED // (1 + _OFFSET_BYTES)
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    cols = min(kernel_w, most)
    rows = min(kernel_h, most // cols)
    accumulate = False
    for r in range(0, kernel_h, rows):  # once, but for kernels of more taps than the scratch holds
        for s in range(0, kernel_w, cols):
            shifted = (step_h, step_w, pad_h - r * dil_h, pad_w - s * dil_w, dil_h, dil_w)
            part = w[:, :, :, r : r + rows, s : s + cols]
            _partial_sum(x, part, table, bias, accumulate, out, out_strides, out_size, shifted, pad_code)
            accumulate = True


def _partial_sum(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    bias: int,
    accumulate: bool,
    out: Tensor,
    out_strides: tuple[int, int, int, int],
    out_size: tuple[int, int],
    geometry: tuple[int, int, int, int, int, int],
    pad_code: int,
) -> None:
    """`_product_sum` of a kernel whose taps fit the scratch; `accumulate` adds to what is in `out`, without bias."""
    batch, groups, channels, *size = x.shape
    _, lanes, _, *kernel = w.shape
    total, taps = batch * out_size[0] * out_size[1], kernel[0] * kernel[1]
    workers = min(torch.get_num_threads(), _SCRATCH // (_MIN_PACKED + _BLOCK_BYTES))
    budget = min(_SCRATCH_WORKER, _SCRATCH // workers - _BLOCK_BYTES)
    blocks = -(-total // max(1, min(MAX_ROWS, budget // taps - _OFFSET_BYTES)))
    if total >= MIN_ROWS * workers:
        blocks = -(-blocks // workers) * workers
    row_ranges = _even_ranges(total, blocks)
    largest = max(stop - start for start, stop in row_ranges)
    group_channels = max(1, min(channels, budget // ((largest + _OFFSET_BYTES) * taps)))
    spare = -(-workers // len(row_ranges))
    group_ranges = _even_ranges(groups, min(groups, spare))
    lane_ranges = _even_ranges(lanes, max(1, min(-(-spare // len(group_ranges)), lanes // LANES)))
    common = (
        _flat(x),
        x.stride(),
        channels,
        tuple(size),
        tuple(kernel),
        geometry,
        np.uint8(pad_code),
        _flat(w),
        w.stride(),
        table.view(-1).numpy(),
        bias,
        accumulate,
        _flat(out),
        out_strides,
        out_size,
        group_channels,
    )
    tasks = [
        (*common, rows, group_range, lane_range)
        for rows in row_ranges
        for group_range in group_ranges
        for lane_range in lane_ranges
    ]
    _run(_block, tasks, workers)


def _cost(rows: int, lanes: int) -> int:
    """Row additions that `rows` × `lanes` sums cost for each k, by row tables or by gathering."""
    blocks, tiles = -(-rows // MAX_ROWS), -(-lanes // LANES)
    return min(tiles * (BUILD_ROWS * blocks + rows), lanes * (rows + STEPS))


def _matmul(x: Tensor, w: Tensor, known: PreparedTable, out: Tensor) -> None:
    """``(G, M, K)`` by ``(G, N, K)``, any strides, into a contiguous ``(G, M, N)``."""
    _, rows, columns = out.shape
    swapped = _cost(columns, rows) < _cost(rows, columns)
    row_codes, lane_codes = (w, x) if swapped else (x, w)
    _product_sum(
        row_codes.transpose(1, 2)[None, :, :, None, :],
        lane_codes[:, :, :, None, None],
        known.rows if swapped else known.columns,
        x.shape[-1] * known.offset,
        out,
        (0, rows * columns, columns, 1) if swapped else (0, rows * columns, 1, columns),
        (1, row_codes.shape[1]),
        (1, 1, 0, 0, 1, 1),
        0,
    )


def unavailable(device: torch.device) -> str | None:
    """Runs on CPU tensors only."""
    return None if device.type == "cpu" else f"it takes CPU tensors, got tensors on {device}"


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``; whichever of m and n is cheaper as rows is the rows."""
    known = prepare(table)
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32)
    for x_part, w_part, y_part in flat_batches(x, w, y):
        _matmul(x_part, w_part, known, y_part)
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
    """Implicit im2col over blocks of output pixels."""
    known = prepare(table)
    geometry = (*stride, *padding, *dilation)
    out_h, out_w = conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = torch.empty(x.shape[0], w.shape[0], out_h, out_w, dtype=torch.int32)
    lane = out_h * out_w
    _product_sum(
        x.unflatten(1, (groups, -1)),
        w.unflatten(0, (groups, -1)),
        known.columns,
        w[0].numel() * known.offset,
        y,
        (y.stride(0), w.shape[0] // groups * lane, lane, 1),
        (out_h, out_w),
        geometry,
        pad_code,
    )
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
    """Row tables over the taps of each channel.

    A grouped convolution where a row of pixels would not fit the scratch, or where each channel has so many filters
    that these make the better lanes.
    """
    batch, channels, *size = x.shape
    kernel, geometry, multiplier = tuple(w.shape[2:]), (*stride, *padding, *dilation), w.shape[0] // channels
    out_h, out_w = conv_output_size(size, kernel, stride, padding, dilation)
    reach = dilation[0] * (kernel[0] - 1) + 1
    cols = (out_w - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
    known = prepare(table)
    copied = 0 if w.is_contiguous() else w.numel()
    if reach * cols > MAX_PLANE or multiplier > MAX_DEPTH_MULTIPLIER or copied > _MAX_COPY:
        return lut_conv2d(x, w, table, stride, padding, dilation, channels, pad_code)
    band = min(out_h, max(1, (PLANE // cols - reach) // stride[0] + 1))
    plane = ((band - 1) * stride[0] + reach) * cols
    # Codes and products of 16 channels, their tables, the sums.
    worker_bytes = LANES * (plane + LANES) * (1 + known.rows.itemsize) + LANES * CODES * LANES * known.rows.itemsize
    worker_bytes += 4 * (band * max(cols, out_w + LANES) + LANES)
    y = torch.empty(batch, w.shape[0], out_h, out_w, dtype=torch.int32)
    workers = max(1, min(torch.get_num_threads(), (_SCRATCH - copied) // worker_bytes))
    blocks = -(-channels // LANES)
    channel_ranges = [
        (LANES * first, min(LANES * last, channels)) for first, last in _even_ranges(blocks, min(blocks, 4 * workers))
    ]
    image_ranges = _even_ranges(batch, min(batch, -(-workers // len(channel_ranges))))
    common = (
        _flat(x),
        x.stride(),
        tuple(size),
        kernel,
        geometry,
        np.uint8(pad_code),
        w.contiguous().view(-1).numpy(),
        multiplier,
        known.columns.view(-1).numpy(),
        np.int32(w[0].numel() * known.offset),
        y.view(-1).numpy(),
        (out_h, out_w),
        channels,
        band,
        ((band - 1) * stride[0] + reach, cols),
    )
    _run(_depthwise_block, [(*common, i, c) for i in image_ranges for c in channel_ranges], workers)
    return y
