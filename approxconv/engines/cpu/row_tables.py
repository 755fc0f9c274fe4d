"""Matrix products and convolutions by row tables.

For 16 values of n and 8 of k the gather is done once for all 256 codes, ``T[k][a][n] = table[a, w[n, k]]``; then a row
m costs eight contiguous vector adds ``acc[m, :] += T[k][x[m, k], :]``. The tables of a block are built once and serve
all its rows, up to 4,096. Where there are too few rows or columns for that to pay, entries are gathered one by one.

Convolution is the same on implicit patches: a block of output pixels is packed k-major, channel group by channel group,
into a scratch buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ...geometry import conv_output_size, flat_batches
from ...multiplier import PreparedTable, prepare
from .packing import flush_tile, pack, runs_of
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import CODES, LANES, data_of, element_type, i32, i64, jit, transpose, vector_at

STEPS = 8  # k's a pass: their int16 tables are 64 KiB and stay in the caches closest to the core
MAX_ROWS = 4096  # rows a block: their sums (256 KiB) stay in the second-level cache
MIN_ROWS = 1024  # below this a block is not cut further just to occupy a thread
BUILD_ROWS = 512  # building one k of a row table costs about as much as adding it to this many rows
_SCRATCH_WORKER = 4 * 2**20  # of packed codes
_MIN_PACKED = 2**19
_BLOCK_BYTES = 2**20 * 5 // 8  # what a block of MAX_ROWS takes beside them: sums, tables, where its rows lie
_OFFSET_BYTES = 8  # of the offset of each k's weight


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
            element = element_type(context, sig.args[2])
            size = element.width // 8
            row_type, sum_type = ir.VectorType(element, LANES), ir.VectorType(i32, LANES)
            acc_at = builder.gep(data_of(context, builder, sig.args[0], acc_value), [at_value])
            sums_at = vector_at(builder, acc_at, sum_type)
            tables_at = data_of(context, builder, sig.args[2], tables_value)
            code_from = builder.gep(data_of(context, builder, sig.args[3], codes_value), [code_value])
            sums = builder.load(sums_at, align=4)
            for i in range(steps):
                code = builder.load(builder.gep(code_from, [builder.mul(stride_value, i64(i))]))
                row = builder.add(builder.mul(builder.zext(code, i64), i64(LANES)), i64(i * CODES * LANES))
                entries = builder.load(vector_at(builder, builder.gep(tables_at, [row]), row_type), align=size)
                sums = builder.add(sums, builder.sext(entries, sum_type) if element.width < 32 else entries)
            builder.store(sums, sums_at, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return add_rows


_add_steps = _add_rows(STEPS)
_add_one = _add_rows(1)


@jit
def build(tables, slot, table, w, lane_stride, at, lanes, offsets):
    """Fill ``tables[slot][a][j] = table[w[at + j·lane_stride], a]``; lanes that do not exist repeat the first."""
    for j in range(LANES):
        offsets[j] = np.int64(w[at + (j if j < lanes else 0) * lane_stride]) * CODES
    for a in range(0, CODES, LANES):
        transpose(tables, (slot * CODES + a) * LANES, LANES, table, offsets, a)


@jit
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
                build(tables, i, table, w, lane_stride, lane_base + k_offsets[k + i], width, offsets)
            for m in range(rows):
                _add_steps(acc, m * LANES, tables, packed, k * rows + m, rows)
            k += STEPS
        while k < depth:
            build(tables, 0, table, w, lane_stride, lane_base + k_offsets[k], width, offsets)
            for m in range(rows):
                _add_one(acc, m * LANES, tables, packed, k * rows + m, rows)
            k += 1
        flush_tile(
            out, out_rows, out_base + n * lane_stride_out, lane_stride_out, acc, 0, LANES, rows, width, first, tile,
            offsets
        )  # fmt: skip


@jit
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


@jit
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
    padded_rows = (rows + LANES - 1) // LANES * LANES  # transpose reads whole tiles of sums
    packed = np.empty(group_channels * taps * rows, np.uint8)
    acc = np.empty(padded_rows * LANES if by_table else rows, np.int32)
    tables = np.empty(STEPS * CODES * LANES if by_table else 1, table.dtype)
    tile = np.empty(LANES * LANES, np.int32)
    offsets = np.empty(LANES, np.int64)
    k_offsets = np.empty(group_channels * taps, np.int64)
    runs = np.empty((rows, 5), np.int64)
    out_rows = np.empty(rows, np.int64)
    n_runs = runs_of(row_range[0], rows, out_size, stride_image, out_image, out_row, runs, out_rows)
    for group in range(group_range[0], group_range[1]):
        out_base = group * out_group + lane_range[0] * out_lane
        w_base = group * w_group + lane_range[0] * lane_stride
        for c in range(0, channels, group_channels):
            some = min(group_channels, channels - c)
            pack(
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
    workers = min(torch.get_num_threads(), SCRATCH // (_MIN_PACKED + _BLOCK_BYTES))
    budget = min(_SCRATCH_WORKER, SCRATCH // workers - _BLOCK_BYTES)
    blocks = -(-total // max(1, min(MAX_ROWS, budget // taps - _OFFSET_BYTES)))
    if total >= MIN_ROWS * workers:
        blocks = -(-blocks // workers) * workers
    row_ranges = even_ranges(total, blocks)
    largest = max(stop - start for start, stop in row_ranges)
    group_channels = max(1, min(channels, budget // ((largest + _OFFSET_BYTES) * taps)))
    spare = -(-workers // len(row_ranges))
    group_ranges = even_ranges(groups, min(groups, spare))
    lane_ranges = even_ranges(lanes, max(1, min(-(-spare // len(group_ranges)), lanes // LANES)))
    common = (
        flat(x),
        x.stride(),
        channels,
        tuple(size),
        tuple(kernel),
        geometry,
        np.uint8(pad_code),
        flat(w),
        w.stride(),
        table.view(-1).numpy(),
        bias,
        accumulate,
        flat(out),
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
    run(_block, tasks, workers)


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
