"""Matrix products and convolutions by row tables.

For 32 values of n and 16 of k the gather is done once for all 256 codes, ``T[k][a][n] = table[a, w[n, k]]``; then a row
m costs sixteen contiguous vector adds ``acc[m, :] += T[k][x[m, k], :]``. The tables of a block are built once and serve
all its rows. Where there are too few rows or columns for that to pay, entries are gathered one by one.

Convolution is the same on implicit patches. The codes of 16 channels of one pixel lie together, so that a tap of 16
k's is a pixel of the padded input at some distance from the output pixel's first; inputs of fewer channels are packed
patch by patch. Either is done channel group by channel group, in a scratch buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ...geometry import batch_shape, conv_output_size, flat_batches
from ...multiplier import PreparedTable, prepare, prepare_bytes
from .few_rows import few_rows_matmul, serves
from .packing import STEPS, ends_of, flush_tile, images_of, interleave, pack, pack_pixels, runs_of
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import CODES, LANES, data_of, element_type, i32, i64, inline, jit, transpose, vector_at

TILE = 2 * LANES  # lanes of a table: 16-bit rows are one cache line each
BYTE_TILE = 2 * TILE  # of one of 8-bit entries, whose rows are, too
ALIGNMENT = 64
FEW_STEPS = 4  # k's a pass where fewer than STEPS are left
# Passes whose sums of 8-bit entries, 0 to 255, fit 16 bits: 16 passes · 16 k's · 255 = 65,280 < 2^16.
FLUSH = (2**16 - 1) // (STEPS * 255)
_ROWS = 4096  # a block: their sums (512 KiB) stay in the second-level cache
MIN_ROWS = 1024  # below this a block is not cut further just to occupy a thread
BUILD_ROWS = 800  # building one k of a row table costs about as much as adding it to this many rows
_SCRATCH_WORKER = 4 * 2**20  # of packed codes
_MIN_PACKED = 2**19
_ROW_BYTES = 384  # what a row of a block takes beside them, of _ROWS at least: sums, tables, where it lies
_BYTE_ROW_BYTES = 640  # the same of 8-bit tables: twice the lanes, of 32 and of 16 bits
_OFFSET_BYTES = 9  # of the offset of each k's weight, and its share of its group
_LARGE_CACHE = 2**21


def _rows_in_cache() -> int:
    """Rows whose sums take four fifths of a core's second-level cache, if that is large."""
    with suppress(OSError, ValueError):  # "2048K"
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        cache = int(size.removesuffix("K")) * 2**10
        if size.endswith("K") and cache >= _LARGE_CACHE:
            return cache * 4 // 5 // (4 * TILE)
    return _ROWS


MAX_ROWS = _rows_in_cache()  # a block, of few threads


def halves(places: int, bits: int) -> tuple[list[int], list[int]]:
    """Which of a vector's places the in-lane unpacks of `bits`-wide elements take: the lower, and the upper halves."""
    width = 64 // bits
    return tuple([n for n in range(places) if n // width % 2 == half] for half in (0, 1))


_LOW, _HIGH = halves(TILE, 16)  # places in a row of 16-bit entries whose sums are lanes 0-15 and 16-31


def _lane_order(bits: int) -> list[int]:
    """The lane at each place of a row: for 16 bits the one that lets `_add_rows` unpack within 128-bit lanes only.

    For 8 bits, lanes 0-31 are the low bytes of 16-bit words, and lanes 32-63 the high ones.
    """
    if bits == 8:
        return [lane for word in range(BYTE_TILE // 2) for lane in (word, BYTE_TILE // 2 + word)]
    return [i for _, i in sorted((n, i) for i, n in enumerate(_LOW + _HIGH))] if bits == 16 else list(range(TILE))


def picked(builder: Any, first: Any, second: Any, places: Iterable[int]) -> Any:
    """The elements at `places` of two vectors, one after the other."""
    mask = [i32(n) for n in places]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(i32, len(mask)), mask))


def _add_neighbours(context: Any, builder: Any, pairs: Any) -> Any:
    """Sums of neighbours among 32 16-bit integers, as 16 of 32 bits, by a product with ones; None where none is known.

    It is exact, and LLVM makes one instruction of it and the addition that follows where the CPU has such.
    """
    features = context.codegen().magic_tuple()[2].split(",")  # of the CPU that Numba compiles for
    if "+avx512bw" in features:
        name, parts = "llvm.x86.avx512.pmaddw.d.512", 1
    elif "+avx2" in features:
        name, parts = "llvm.x86.avx2.pmadd.wd", 2
    else:
        return None
    width = TILE // parts
    taken, sums = ir.VectorType(ir.IntType(16), width), ir.VectorType(i32, width // 2)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(sums, [taken, taken]), name)
    ones = ir.Constant(taken, [1] * width)
    if parts == 1:
        return builder.call(function, [pairs, ones])
    ends = (picked(builder, pairs, pairs, range(start, start + width)) for start in (0, width))
    return picked(builder, *(builder.call(function, [end, ones]) for end in ends), range(LANES))


def _add_rows(steps: int) -> Any:
    """Intrinsic ``acc[m, :] += Σ_{i<steps} tables[slot + i, codes[code_at + i], :]`` on flat arrays.

    Written as LLVM vectors because Numba cannot promise that the arrays do not overlap, without which LLVM neither
    keeps the sums in a register nor drops the checks from this innermost loop. 16-bit rows are added two at a time: one
    instruction widens and adds a row's entry and the other's where they are neighbours.

    8-bit rows are added to `words` instead, 16-bit words of which m has two vectors: the sums of the rows' words as
    they are, modulo 2^16, and those of their high bytes. `_widen` tells them apart.
    """

    @intrinsic
    def add_rows(_: Any, acc: Any, words: Any, m: Any, tables: Any, slot: Any, codes: Any, code_at: Any) -> Any:
        signature = types.void(acc, words, types.int64, tables, types.int64, codes, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            acc_value, words_value, m_value, tables_value, slot_value, codes_value, code_value = args
            element = element_type(context, sig.args[3])
            tile = BYTE_TILE if element.width == 8 else TILE
            row_type, sum_type = ir.VectorType(element, tile), ir.VectorType(i32, LANES)
            at_value = builder.mul(m_value, i64(tile))
            acc_at = builder.gep(data_of(context, builder, sig.args[0], acc_value), [at_value])
            first_row = builder.mul(slot_value, i64(CODES * tile))
            tables_at = builder.gep(data_of(context, builder, sig.args[3], tables_value), [first_row])
            code_from = builder.gep(data_of(context, builder, sig.args[5], codes_value), [code_value])
            rows = []
            for i in range(steps):
                code = builder.load(builder.gep(code_from, [i64(i)]))
                row = builder.add(builder.mul(builder.zext(code, i64), i64(tile)), i64(i * CODES * tile))
                rows.append(builder.load(vector_at(builder, builder.gep(tables_at, [row]), row_type), align=ALIGNMENT))

            if element.width == 8:
                word_type = ir.VectorType(ir.IntType(16), TILE)
                words_at = builder.gep(data_of(context, builder, sig.args[1], words_value), [at_value])
                rows = [builder.bitcast(row, word_type) for row in rows]
                for half, some in enumerate(
                    (rows, [builder.lshr(row, ir.Constant(word_type, [8] * TILE)) for row in rows])
                ):
                    sums_at = vector_at(builder, builder.gep(words_at, [i64(half * TILE)]), word_type)
                    sums = builder.load(sums_at, align=ALIGNMENT)
                    for row in some:
                        sums = builder.add(sums, row)
                    builder.store(sums, sums_at, align=ALIGNMENT)
                return context.get_dummy_value()
            by_pairs = element.width == 16
            for half, places in enumerate((_LOW, _HIGH) if by_pairs else (range(LANES), range(LANES, TILE))):
                sums_at = vector_at(builder, builder.gep(acc_at, [i64(half * LANES)]), sum_type)
                sums = builder.load(sums_at, align=ALIGNMENT)
                for first, second in zip(rows[::2], rows[1::2], strict=True):
                    both = None
                    if by_pairs:
                        pairs = picked(builder, first, second, [n for place in places for n in (place, TILE + place)])
                        both = _add_neighbours(context, builder, pairs)
                    if both is not None:
                        sums = builder.add(sums, both)
                        continue
                    for row in (first, second):
                        some = picked(builder, row, row, places)
                        sums = builder.add(sums, builder.sext(some, sum_type) if by_pairs else some)
                builder.store(sums, sums_at, align=ALIGNMENT)
            return context.get_dummy_value()

        return signature, codegen

    return add_rows


_add_steps, _add_few = _add_rows(STEPS), _add_rows(FEW_STEPS)


@jit
def _widen(acc, words, rows):
    """Add the sums of 8-bit entries to those of 32 bits, and clear them: ``low = word − 2^8·high`` modulo 2^16."""
    for m in range(rows):
        row, sums = words[m * BYTE_TILE :][:BYTE_TILE], acc[m * BYTE_TILE :][:BYTE_TILE]
        for j in range(TILE):
            high = row[TILE + j]
            sums[j] += np.int32(np.uint16(row[j] - (high << 8)))
            sums[TILE + j] += np.int32(high)
            row[j] = row[TILE + j] = 0


@intrinsic
def _build_rows(_: Any, tables: Any, at: Any, table: Any, offsets: Any, first: Any) -> Any:
    """``tables[at + a·tile + place] = table[offsets[lane at place] + first + a]`` for as many a as 32 bytes hold."""
    signature = types.void(tables, types.int64, table, offsets, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = element_type(context, sig.args[0])
        count, places = 128 // element.width, 512 // element.width  # entries of a 128-bit lane and of a vector
        order = _lane_order(element.width)
        tile = len(order)
        half_type, row_type = ir.VectorType(element, places // 2), ir.VectorType(element, places)
        target = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        source = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[4]])
        offsets_at = data_of(context, builder, sig.args[3], args[3])

        def entries(lane: int) -> Any:
            offset = builder.load(builder.gep(offsets_at, [i64(lane)]))
            return builder.load(vector_at(builder, builder.gep(source, [offset]), half_type), align=element.width // 8)

        def columns(place: int) -> list[Any]:
            """Of the 2·count lanes from `place`: [first half at a, at a + count, second half at a, at a + count]."""
            rows = [
                picked(builder, entries(order[n]), entries(order[n + count]), range(places))
                for n in range(place, place + count)
            ]
            # Interleaving halves log2(count) times transposes, here within every 128-bit lane.
            for _round in range(count.bit_length() - 1):
                rows = [
                    picked(builder, rows[j], rows[j + count // 2], [n for k in some for n in (k, places + k)])
                    for j in range(count // 2)
                    for some in halves(places, element.width)
                ]
            return rows

        lanes = [range(start, start + count) for start in range(0, 2 * places, count)]
        for start in range(0, tile, places):
            for a, (left, right) in enumerate(zip(columns(start), columns(start + places // 2), strict=True)):
                for part in (0, 1):
                    row = picked(builder, left, right, [n for lane in lanes[part::2] for n in lane])
                    to = builder.gep(target, [i64((a + part * count) * tile + start)])
                    builder.store(row, vector_at(builder, to, row_type), align=ALIGNMENT)
        return context.get_dummy_value()

    return signature, codegen


@inline
def _tile(table):
    """Lanes of a table of such entries."""
    return BYTE_TILE if table.itemsize == 1 else TILE


@jit
def _build_tile(tables, slot, table, w, lane_stride, at, lanes, code_range, offsets):
    """Fill ``tables[slot][a][lane] = table[w[at + lane·lane_stride], a]``; lanes that do not exist repeat the first.

    At least for the codes a in `code_range`, both ends included.
    """
    tile = _tile(table)
    for j in range(tile):
        offsets[j] = np.int64(w[at + (j if j < lanes else 0) * lane_stride]) * CODES
    step = 32 // table.itemsize
    for a in range(code_range[0] // step * step, code_range[1] + 1, step):
        _build_rows(tables, (slot * CODES + a) * tile, table, offsets, a)


@jit
def build(tables, slot, table, w, lane_stride, at, lanes, offsets):
    """Fill ``tables[slot][a][j] = table[w[at + j·lane_stride], a]``; lanes that do not exist repeat the first."""
    for j in range(LANES):
        offsets[j] = np.int64(w[at + (j if j < lanes else 0) * lane_stride]) * CODES
    for a in range(0, CODES, LANES):
        transpose(tables, (slot * CODES + a) * LANES, LANES, table, offsets, a)


@jit
def _row_tables(
    out, out_rows, out_base, lane_stride_out, packed, pixels, table, w, w_base, lane_stride, groups, k_offsets, lanes,
    code_range, bias, first, tables, acc, words, square, offsets
):  # fmt: skip
    rows = len(pixels)
    tile = _tile(table)
    words[:] = 0
    for n in range(0, lanes, tile):
        width = min(tile, lanes - n)
        lane_base = w_base + n * lane_stride
        acc[: rows * tile] = bias
        for group in range(len(groups)):
            at, steps = groups[group]
            for i in range(steps):
                k_base = lane_base + k_offsets[group * STEPS + i]
                _build_tile(tables, i, table, w, lane_stride, k_base, width, code_range, offsets)
            if steps == STEPS:
                for m in range(rows):
                    _add_steps(acc, words, m, tables, 0, packed, at + pixels[m])
            else:
                for i in range(0, steps, FEW_STEPS):
                    for missing in range(steps, i + FEW_STEPS):
                        tables[missing * CODES * tile :][:tile] = 0  # for code 0, the only one packed there
                    for m in range(rows):
                        _add_few(acc, words, m, tables, i, packed, at + pixels[m] + i)
            if table.itemsize == 1 and (group % FLUSH == FLUSH - 1 or group == len(groups) - 1):
                _widen(acc, words, rows)
        for j in range(0, width, LANES):
            flush_tile(
                out, out_rows, out_base + (n + j) * lane_stride_out, lane_stride_out, acc, j, tile, rows,
                min(LANES, width - j), first, square, offsets
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


@inline
def _aligned(count, dtype):
    """An empty array that begins with a cache line."""
    memory = np.empty(count + ALIGNMENT, dtype)
    return memory[-memory.ctypes.data % ALIGNMENT // memory.itemsize :][:count]


@jit
def _block(
    x, x_strides, channels, size, kernel, geometry, pad_code, w, w_strides, table, bias, accumulate, out, out_strides,
    out_size, group_channels, budget, row_range, group_range, lane_range
):  # fmt: skip
    """One task: some output pixels, for some groups and some lanes of each."""
    stride_image, x_group, stride_c, stride_h, stride_w = x_strides
    w_group, lane_stride, w_channel, w_row, w_col = w_strides
    out_image, out_group, out_lane, out_row = out_strides
    rows = row_range[1] - row_range[0]
    taps = kernel[0] * kernel[1]
    lanes = lane_range[1] - lane_range[0]
    tile = _tile(table)
    by_table = rows * (min(lanes, tile) - 1) > BUILD_ROWS
    padded_rows = (rows + LANES - 1) // LANES * LANES  # transpose reads whole tiles of sums
    acc = _aligned(padded_rows * tile if by_table else rows, np.int32)
    words = _aligned(rows * tile if by_table and table.itemsize == 1 else 0, np.uint16)
    tables = _aligned(STEPS * CODES * tile if by_table else 1, table.dtype)
    square = np.empty(LANES * LANES, np.int32)
    offsets = np.empty(tile, np.int64)
    runs = np.empty((rows, 5), np.int64)
    out_rows = np.empty(rows, np.int64)
    n_runs = runs_of(row_range[0], rows, out_size, stride_image, out_image, out_row, runs, out_rows)
    pixels = np.empty(rows, np.int64)
    plane = out_size[0] * out_size[1]
    images = np.empty(((row_range[1] - 1) // plane - row_range[0] // plane + 1, 4), np.int64)
    first_col, width, area = images_of(row_range[0], out_size, kernel, geometry, stride_image, images, pixels)
    most_blocks = budget // ((area + _OFFSET_BYTES * taps) * STEPS)
    direct = by_table and channels >= STEPS and area <= rows * taps and most_blocks > 0
    if direct:
        group_channels = min(channels, most_blocks * STEPS)
        packed = np.empty(-(-group_channels // STEPS) * STEPS * area, np.uint8)
    else:
        packed = np.empty(-(-group_channels * taps // STEPS) * STEPS * rows, np.uint8)
        for m in range(rows):
            pixels[m] = m * STEPS
    regrouped = np.empty(STEPS * rows if by_table and not direct else 1, np.uint8)
    most = -(-group_channels // STEPS) * taps if direct else -(-group_channels * taps // STEPS)
    groups = np.empty((most, 2), np.int64)
    k_offsets = np.empty(most * STEPS, np.int64)
    for group in range(group_range[0], group_range[1]):
        out_base = group * out_group + lane_range[0] * out_lane
        w_base = group * w_group + lane_range[0] * lane_stride
        for c in range(0, channels, group_channels):
            some = min(group_channels, channels - c)
            base = group * x_group + c * stride_c
            if direct:
                pack_pixels(
                    packed, area, (first_col, width), x, base, some, (stride_c, stride_h, stride_w), size, geometry,
                    pad_code, images, offsets
                )  # fmt: skip
                count = -(-some // STEPS) * taps
                filled = -(-some // STEPS) * STEPS * area
                for g in range(count):
                    row, col = g % taps // kernel[1], g % kernel[1]
                    from_c = g // taps * STEPS
                    groups[g, 0] = from_c * area + (row * geometry[4] * width + col * geometry[5]) * STEPS
                    groups[g, 1] = min(STEPS, some - from_c)
                    for i in range(STEPS):
                        k_offsets[g * STEPS + i] = (c + from_c + i) * w_channel + row * w_row + col * w_col
            else:
                pack(
                    packed, rows, x, base, some, (stride_c, stride_h, stride_w), size, kernel, geometry, pad_code, runs,
                    n_runs, offsets
                )  # fmt: skip
                count = -(-some * taps // STEPS)
                filled = count * STEPS * rows
                for k in range(some * taps):
                    tap = k % taps
                    k_offsets[k] = (c + k // taps) * w_channel + tap // kernel[1] * w_row + tap % kernel[1] * w_col
                for g in range(count):
                    groups[g, 0], groups[g, 1] = g * STEPS * rows, min(STEPS, some * taps - g * STEPS)
            first = c == 0 and not accumulate
            start = np.int32(bias if first else 0)
            if by_table:
                if not direct:
                    interleave(packed, some * taps, rows, regrouped, offsets)
                _row_tables(
                    out, out_rows, out_base, out_lane, packed, pixels, table, w, w_base, lane_stride, groups[:count],
                    k_offsets, lanes, ends_of(packed[:filled]), start, first,
                    tables, acc, words, square, offsets
                )  # fmt: skip
            else:
                _gather(
                    out, out_rows, out_base, out_lane, packed, rows, table, w, w_base, lane_stride,
                    k_offsets[: some * taps], lanes, start, first, acc
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
    accumulate: bool,
) -> None:
    """Write the LUT product sums of an implicit grouped convolution; `accumulate` adds them to `out`, without bias.

    x is ``(B, g, C/g, H, W)``, w is ``(g, O/g, C/g, kh, kw)``, both with any strides; `table` is ``[w_code, x_code]``;
    `geometry` is stride, padding and dilation; `out_strides` are those of (image, group, output channel, output pixel).
    """
    kernel_h, kernel_w = w.shape[3:]
    most = _MIN_PACKED // (1 + _OFFSET_BYTES)
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    cols = min(kernel_w, most)
    rows = min(kernel_h, most // cols)
    for r in range(0, kernel_h, rows):  # once, but for kernels of more taps than the scratch holds
        for s in range(0, kernel_w, cols):
            shifted = (step_h, step_w, pad_h - r * dil_h, pad_w - s * dil_w, dil_h, dil_w)
            part = w[:, :, :, r : r + rows, s : s + cols]
            _partial_sum(x, part, table, bias, accumulate, out, out_strides, out_size, shifted, pad_code)
            accumulate = True


def _cost(rows: int, lanes: int, tile: int) -> int:
    """Row additions that a block of `rows` × `lanes` sums costs for each k, by row tables or by gathering."""
    return min(-(-lanes // tile) * (BUILD_ROWS + rows), lanes * (rows + STEPS))


@lru_cache
def _split(total: int, groups: int, lanes: int, tile: int, workers: int, most_rows: int) -> tuple[int, int, int]:
    """Into how many parts to cut rows, groups and lanes: cutting rows builds more tables, cutting lanes packs more."""
    fewest = -(-total // most_rows)
    found = []
    for parts in sorted({1, workers} | {2**i for i in range(workers.bit_length())}):
        group_parts = min(groups, parts)
        lane_parts = max(1, min(-(-parts // group_parts), lanes // tile))
        even = -(-workers // (group_parts * lane_parts))
        for blocks in {fewest, -(-fewest // even) * even}:
            if blocks > fewest and total < MIN_ROWS * blocks:
                continue
            rows = -(-total // blocks)
            rounds = -(-blocks * group_parts * lane_parts // workers) * -(-groups // group_parts)
            found.append(
                (rounds * (rows // 4 + _cost(rows, -(-lanes // lane_parts), tile)), blocks, group_parts, lane_parts)
            )
    return min(found)[1:]


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
    tile, row_bytes = (BYTE_TILE, _BYTE_ROW_BYTES) if table.dtype == torch.uint8 else (TILE, _ROW_BYTES)
    workers = min(torch.get_num_threads(), SCRATCH // (_MIN_PACKED + _ROWS * row_bytes))
    share = SCRATCH // workers
    rows = min(MAX_ROWS * _ROW_BYTES // row_bytes, max(_ROWS, (share - _SCRATCH_WORKER) // row_bytes))
    budget = min(_SCRATCH_WORKER, share - max(rows, _ROWS) * row_bytes)
    most_rows = max(1, min(rows, budget // taps - _OFFSET_BYTES))
    blocks, group_parts, lane_parts = _split(total, groups, lanes, tile, workers, most_rows)
    row_ranges, group_ranges, lane_ranges = map(even_ranges, (total, groups, lanes), (blocks, group_parts, lane_parts))
    largest = max(stop - start for start, stop in row_ranges)
    group_channels = max(1, min(channels, budget // ((largest + _OFFSET_BYTES) * taps)))
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
        budget,
    )
    tasks = [
        (*common, rows, group_range, lane_range)
        for rows in row_ranges
        for group_range in group_ranges
        for lane_range in lane_ranges
    ]
    run(_block, tasks, workers)


def _tables(table: Tensor, lanes: int) -> PreparedTable:
    """8-bit entries where they are and where a row of so many lanes then takes fewer cache lines."""
    return (prepare_bytes(table) if lanes > TILE else None) or prepare(table)


def add_matmul(y: Tensor, x: Tensor, w: Tensor, tables: Callable[[int], PreparedTable], accumulate: bool) -> None:
    """`lut_matmul` into `y`; `accumulate` adds to it, without the tables' offset. `tables` gives those of n lanes."""
    for x_part, w_part, y_part in flat_batches(x, w, y):
        _matmul(x_part, w_part, tables, y_part, accumulate)


def _matmul(x: Tensor, w: Tensor, tables: Callable[[int], PreparedTable], out: Tensor, accumulate: bool) -> None:
    """``(G, M, K)`` by ``(G, N, K)``, any strides, into a contiguous ``(G, M, N)``."""
    _, rows, columns = out.shape

    def cost(rows: int, lanes: int) -> int:
        blocks = -(-rows // MAX_ROWS)
        tile = BYTE_TILE if tables(lanes).entry == "uint8" else TILE
        return blocks * _cost(-(-rows // blocks), lanes, tile)

    swapped = cost(columns, rows) < cost(rows, columns)
    row_codes, lane_codes = (w, x) if swapped else (x, w)
    known = tables(lane_codes.shape[1])
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
        accumulate,
    )


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``; whichever of m and n is cheaper as rows is the rows."""
    y = torch.empty(*batch_shape(x, w), x.shape[-2], w.shape[-2], dtype=torch.int32)
    for x_part, w_part, y_part in flat_batches(x, w, y):
        if serves(x_part, w_part):
            few_rows_matmul(x_part, w_part, table, y_part, swapped=False)
        elif serves(w_part, x_part):
            few_rows_matmul(w_part, x_part, table, y_part.mT, swapped=True)
        else:
            _matmul(x_part, w_part, partial(_tables, table), y_part, False)
    return y


def add_conv2d(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    known: PreparedTable,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
    accumulate: bool,
) -> None:
    """`lut_conv2d` into `y`; `accumulate` adds to it, without the tables' offset."""
    geometry = (*stride, *padding, *dilation)
    out_h, out_w = y.shape[2:]
    pointwise = w.shape[2:] == (1, 1) and geometry[:4] == (1, 1, 0, 0)
    if pointwise and x.stride(2) == x.shape[3] * x.stride(3):
        x, out_h, out_w = x.flatten(2).unsqueeze(2), 1, out_h * out_w  # one long row: short ones are packed slowly
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
        accumulate,
    )


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
    out_h, out_w = conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = torch.empty(x.shape[0], w.shape[0], out_h, out_w, dtype=torch.int32)
    known = _tables(table, w.shape[0] // groups)
    add_conv2d(y, x, w, known, stride, padding, dilation, groups, pad_code, False)
    return y
