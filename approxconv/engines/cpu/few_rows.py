"""Products of a few rows by byte shuffles: too few to build row tables for.

The other operand, w, is turned around 64 × 64 codes at a time, so that one k's codes of 128 lanes lie together; then
the entries of a row's code x[m, k] are looked up for all of them at once. It needs AVX-512 VBMI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .shuffles import (
    BYTE_VECTOR,
    BYTES,
    MAX_TAPS,
    RUN,
    SHUFFLES,
    load_bytes,
    planes_of_columns,
    planes_of_rows,
    sum_looked_up,
    transpose_quarters,
    unpack,
)
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import CODES, LANES, copy, data_of, i64, jit, vector_at

MAX_ROWS = 12  # more take longer than row tables, built for one tile of lanes
MIN_DEPTH = BYTES  # a row of w is read 64 bytes at a time
_DEPTH = 2048  # k's that are turned around at once: their codes stay in the second-level cache
_ALONE = 2**20  # lookups that end before another thread has woken up
_WORKER = _DEPTH * (RUN + 16) + 8 * RUN * MAX_ROWS  # bytes of scratch, at most


@intrinsic
def _turn(_: Any, target: Any, at: Any, source: Any, offsets: Any, first: Any) -> Any:
    """``target[at + RUN·a + j] = source[offsets[j] + first + a]`` for a, j < 64, on flat byte arrays."""
    signature = types.void(target, types.int64, source, offsets, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target_at = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        source_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[4]])
        offsets_at = data_of(context, builder, sig.args[3], args[3])
        word = ir.VectorType(ir.IntType(32), LANES)
        groups = []
        for group in range(0, BYTES, LANES):
            offsets = [builder.load(builder.gep(offsets_at, [i64(group + j)])) for j in range(LANES)]
            rows = [load_bytes(builder, builder.gep(source_at, [offset]), 0) for offset in offsets]
            for _round in range(4):  # interleaving halves log2(16) times transposes, here within every 16 bytes
                rows = [
                    unpack(builder, rows[j], rows[j + LANES // 2], side)
                    for j in range(LANES // 2)
                    for side in (False, True)
                ]
            groups.append([builder.bitcast(row, word) for row in rows])
        for a, quarters in enumerate(zip(*groups, strict=True)):
            for k, row in enumerate(transpose_quarters(builder, list(quarters))):
                to = vector_at(builder, builder.gep(target_at, [i64((LANES * k + a) * RUN)]), BYTE_VECTOR)
                builder.store(builder.bitcast(row, BYTE_VECTOR), to, align=1)
        return context.get_dummy_value()

    return signature, codegen


@jit
def _block(x, x_strides, w, w_strides, shape, planes, pairs, bias, out, out_strides, group, lane_range):
    """One task: all rows and some lanes of one product."""
    rows, depth = shape
    parts = (depth + _DEPTH - 1) // _DEPTH
    some = (depth + parts - 1) // parts
    turned = np.empty(some * RUN, np.uint8)
    acc, offsets = np.empty(rows * RUN, np.int32), np.empty(RUN, np.int64)
    shifts, entries = np.arange(some) * RUN, np.empty(some, np.int64)
    for n in range(lane_range[0], lane_range[1], RUN):
        lanes = min(RUN, lane_range[1] - n)
        for j in range(RUN):
            offsets[j] = group * w_strides[0] + (n + min(j, lanes - 1)) * w_strides[1]
        for part in range(parts):
            first = depth * part // parts
            count = depth * (part + 1) // parts - first
            for half in range(0, lanes, BYTES):
                for k in range(0, count, BYTES):
                    k0 = max(0, min(k, count - BYTES))  # what the last two share is written twice
                    _turn(turned, k0 * RUN + half, w, offsets[half:], first + k0)
            for m in range(rows):
                at = group * x_strides[0] + m * x_strides[1] + first * x_strides[2]
                for pair in range(pairs):
                    for k in range(count):
                        entries[k] = (np.int64(x[at + k * x_strides[2]]) * pairs + pair) * 2 * CODES
                    for k in range(0, count, MAX_TAPS):
                        sum_looked_up(
                            acc, m * RUN, turned, 0, shifts, planes, entries, k, min(k + MAX_TAPS, count),
                            first == 0 and pair == 0 and k == 0, bias, np.int32(16 * pair)
                        )  # fmt: skip
        for m in range(rows):
            at = group * out_strides[0] + m * out_strides[1] + n * out_strides[2]
            if out_strides[2] == 1:
                copy(out, at, acc, m * RUN, lanes)
            else:
                for j in range(lanes):
                    out[at + j * out_strides[2]] = acc[m * RUN + j]


def serves(x: Tensor, w: Tensor) -> bool:
    """Whether x ``(G, M, K)`` has few enough rows, and the rows of w ``(G, N, K)`` are such that they can be read."""
    return SHUFFLES and x.shape[1] <= MAX_ROWS and x.shape[2] >= MIN_DEPTH and w.stride(2) == 1


def few_rows_matmul(x: Tensor, w: Tensor, table: Tensor, out: Tensor, swapped: bool) -> None:
    """``out[g, m, n] = Σ_k table[x[g, m, k], w[g, n, k]]``, where x and w have been `swapped` ``table[w…, x…]``.

    Parameters
    ----------
    x : Tensor
        uint8 ``(G, M, K)``, any strides.
    w : Tensor
        uint8 ``(G, N, K)``, as `serves` says.
    table : Tensor
        int32 ``(2**a_bits, 2**w_bits)``.
    out : Tensor
        int32 ``(G, M, N)``, any strides.
    swapped : bool
        Whether the codes of x are the table's columns.
    """
    groups, rows, lanes = out.shape
    depth = x.shape[2]
    known = (planes_of_columns if swapped else planes_of_rows)(table)
    workers = min(torch.get_num_threads(), SCRATCH // _WORKER) if out.numel() * depth > _ALONE else 1
    common = (
        flat(x),
        x.stride(),
        flat(w),
        w.stride(),
        (rows, depth),
        known.planes,
        known.count // 2,
        np.int32(depth * known.low),
        flat(out),
        out.stride(),
    )
    tiles = -(-lanes // RUN)
    ranges = [(RUN * first, min(RUN * last, lanes)) for first, last in even_ranges(tiles, min(workers, tiles))]
    run(_block, [(*common, group, lane_range) for group in range(groups) for lane_range in ranges], workers)
