"""Product sums of a factorised table, at the speed of the CPU's dot products of bytes.

With ``table[a, w] = Σ_p u[p, a]·v[p, w] + by_row[a] + by_column[w]`` a product sum over k is a product sum of bytes
over (k, p), a number for each row and one for each column. Codes are expanded to their P features once, into a block of
input pixels that stays in the second-level cache, ``[image][row][p][col][channel]``; a kernel's row is then a run of
bytes for each p, and an output pixel an address: an implicit GEMM without a copy of patches. Weights are expanded once
a call. The sums of a tile of rows and lanes stay in registers; all are modulo 2³², so only the whole sum has to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...geometry import batch_shape, conv_output_size, flat_batches
from ..byte_form import ByteForm
from .instructions import (
    BYTES,
    PATHS,
    QUAD,
    add_quads,
    compiles,
    dot_tile_1,
    dot_tile_2,
    dot_tile_3,
    dot_tile_4,
    interleave,
    look_up,
)
from .packing import flush_tile
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import CODES, LANES, copy, fill, jit, transpose

MAX_ROWS = 1024  # output pixels a block
_WEIGHTS = 24 * 2**20  # bytes of expanded weights alive at once, of SCRATCH
_WORKER = 3 * 2**19  # bytes of a block's features and sums: they stay in the second-level cache
_MIN_WORKER = 2**19
_MAX_DEPTH = 2**15  # k's whose weights are expanded at once
_DEPTH_BYTES = 3 * LANES  # scratch that expanding takes for each
_PASS = 3 * 2**13  # bytes of weights that stay in the first-level cache while all rows go by
_SLACK = 4 * BYTES  # lookups and transpositions run over the end


@jit
def _sum_of_digits(digits, first, count, values):
    """``Σ_d 256^d·Σ`` of row d's bytes: `values` holds a run of `count` bytes a digit, from `first` on in each."""
    total = np.int64(0)
    for d in range(digits):
        some = np.int64(0)
        for value in values[d, first:][:count]:  # as a slice it is summed in vectors
            some += value
        total += some << (8 * d)
    return total


@jit
def _gather_codes(codes, x, base, channels, depth, strides, runs, pixels, run_stride, offsets):
    """``codes[pixel][channel]``, a pixel `depth` bytes, of `runs` runs of `pixels` pixels."""
    stride_c, stride_w = strides
    for i in range(runs):
        start, at = base + i * run_stride, i * pixels * depth
        if stride_c == 1 and channels > 1:
            for m in range(pixels):
                copy(codes, at + m * depth, x, start + m * stride_w, channels)
        elif stride_w == 1 and pixels >= LANES:
            for m in range(0, pixels + LANES - 1, LANES):
                first = min(m, pixels - LANES)
                for c in range(0, channels, LANES):
                    # Where 16 channels run into the next pixel, that one is written later.
                    channel = max(0, min(c, channels - LANES))
                    for j in range(LANES):
                        offsets[j] = min(channel + j, channels - 1) * stride_c
                    transpose(codes, at + first * depth + channel, depth, x, offsets, start + first)
        else:
            for c in range(channels):
                for m in range(pixels):
                    codes[at + m * depth + c] = x[start + c * stride_c + m * stride_w]


@jit
def _expand(
    path, features, sums, codes, looked, x, base, channels, strides, size, first_row, rows, first_col, cols,
    at, sum_at, u, digits, digit_count, pad_code, offsets
):  # fmt: skip
    """Features of `rows` × `cols` input pixels of an image, and for each pixel the sum of by_row over its channels."""
    stride_c, stride_h, stride_w = strides
    products = len(u) // CODES
    depth = (channels + QUAD - 1) // QUAD * QUAD
    top, bottom = max(0, first_row), min(size[0], first_row + rows)
    left, right = max(0, first_col), min(size[1], first_col + cols)
    inside = max(0, right - left)
    lead, span = (left - first_col) * depth, inside * depth
    direct = stride_c == 1 and stride_w == depth and channels == depth and span % BYTES == 0
    start = base + top * stride_h + left * stride_w
    if not direct and inside > 0 and bottom > top:
        runs, pixels = bottom - top, inside
        if inside * stride_w == stride_h:
            runs, pixels = 1, inside * runs
        _gather_codes(codes, x, start, channels, depth, (stride_c, stride_w), runs, pixels, stride_h, offsets)
    source, stride = (x, stride_h) if direct else (codes, span)
    start = start if direct else 0
    pad_sum = np.int64(0)
    for d in range(digit_count):
        pad_sum += np.int64(digits[d * CODES + pad_code]) << (8 * d)
    for i in range(rows):
        row = first_row + i
        valid = top <= row < bottom and inside > 0
        come = start + (row - top) * stride
        for p in range(products):
            to = at + (i * products + p) * cols * depth
            pad = u[p * CODES + pad_code]
            if valid:
                if lead > 0:
                    fill(features, to, lead, pad)
                look_up(path, features, to + lead, BYTES, u, p * CODES, source, come, (span + BYTES - 1) // BYTES)
                if lead + span < cols * depth:
                    fill(features, to + lead + span, cols * depth - lead - span, pad)
            else:
                fill(features, to, cols * depth, pad)
        if digit_count > 0:
            for j in range(cols):
                sums[sum_at + i * cols + j] = np.int32(channels * pad_sum)
            if valid:
                for d in range(digit_count):
                    look_up(path, looked[d], 0, BYTES, digits, d * CODES, source, come, (span + BYTES - 1) // BYTES)
                for j in range(inside):
                    total = _sum_of_digits(digit_count, j * depth, channels, looked)
                    sums[sum_at + i * cols + left - first_col + j] = np.int32(total)


@jit
def _zero_tails(target, at, step, count, tail_every, tail):
    """Zero the bytes beyond `tail` of each lane's four, in every `tail_every`-th of `count` quads."""
    for i in range(tail_every - 1, count, tail_every):
        for lane in range(LANES):
            for t in range(tail, QUAD):
                target[at + i * step + lane * QUAD + t] = 0


@jit
def _expand_weights(
    path, w, w_strides, lanes, channels, kernel, v, digits, digit_count, base, weights, starts, tiles,
    first_vector, vector_range
):  # fmt: skip
    """Weights of some vectors of 16 lanes, ``[kernel row][p][kernel column][quad of channels][lane][4]``."""
    w_group, lane_stride, w_channel, w_row, w_col = w_strides
    products = len(v) // CODES
    taps, vectors = kernel[0] * kernel[1], (lanes + LANES - 1) // LANES
    quads = (channels + QUAD - 1) // QUAD
    depth, tail = channels * taps, channels % QUAD
    run = kernel[1] * quads
    dense = (w_col == 1 or kernel[1] == 1) and (w_row == kernel[1] or kernel[0] == 1) and w_channel == taps
    by_k = np.empty(depth * LANES + _SLACK, np.uint8)
    codes = np.empty(kernel[0] * run * BYTES + _SLACK, np.uint8)
    looked = np.empty(kernel[0] * run * BYTES + _SLACK, np.uint8)
    offsets = np.empty(LANES, np.int64)
    for vector in range(vector_range[0], vector_range[1]):
        group, n = vector // vectors, vector % vectors
        w_base = group * w_group + n * LANES * lane_stride
        for j in range(LANES):
            offsets[j] = min(j, lanes - n * LANES - 1) * lane_stride
        if dense and depth >= LANES:
            for k in range(0, depth, LANES):
                first = min(k, depth - LANES)
                transpose(by_k, first * LANES, LANES, w, offsets, w_base + first)
        else:
            for k in range(depth):
                tap = k % taps
                at = w_base + k // taps * w_channel + tap // kernel[1] * w_row + tap % kernel[1] * w_col
                for j in range(LANES):
                    by_k[k * LANES + j] = w[at + offsets[j]]
        for tap in range(taps):
            for quad in range(quads):
                c, at = quad * QUAD, (tap * quads + quad) * BYTES
                interleave(
                    codes, at, by_k, (c * taps + tap) * LANES, (min(c + 1, channels - 1) * taps + tap) * LANES,
                    (min(c + 2, channels - 1) * taps + tap) * LANES, (min(c + 3, channels - 1) * taps + tap) * LANES
                )  # fmt: skip
        tile = 0
        while tiles[tile + 1] <= n:
            tile += 1
        width = tiles[tile + 1] - tiles[tile]
        size = kernel[0] * products * run * BYTES
        to = (group * vectors + tiles[tile] - first_vector) * size + (n - tiles[tile]) * BYTES
        for r in range(kernel[0]):
            for p in range(products):
                at = to + (r * products + p) * run * width * BYTES
                look_up(path, weights, at, width * BYTES, v, p * CODES, codes, r * run * BYTES, run)
                if tail > 0:
                    _zero_tails(weights, at, width * BYTES, run, quads, tail)
        start = starts[(vector - first_vector) * LANES :][:LANES]
        for j in range(LANES):
            start[j] = 0
        for d in range(digit_count - 1, -1, -1):
            look_up(path, looked, 0, BYTES, digits, d * CODES, codes, 0, kernel[0] * run)
            if tail > 0:
                _zero_tails(looked, 0, BYTES, kernel[0] * run, quads, tail)
            for j in range(LANES):
                start[j] <<= 8
            add_quads(path, start, looked, 0, kernel[0] * run)
        for j in range(LANES):
            start[j] += np.int32(depth * base)


@jit
def _block(
    path, heights, x, x_strides, channels, size, kernel, geometry, pad_code, u, digits, digit_count,
    weights, starts, lanes, tiles, first_vector, accumulate, out, out_strides, out_size, image_range, row_range,
    col_range, unit_range
):  # fmt: skip
    """One task: the output pixels of some images, rows and columns, for some tiles of lanes."""
    stride_image, x_group, stride_c, stride_h, stride_w = x_strides
    out_image, out_group, out_lane, out_row = out_strides
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    kh, kw = kernel
    products, n_tiles, vectors = len(u) // CODES, len(tiles) - 1, tiles[-1]
    quads = (channels + QUAD - 1) // QUAD
    depth = quads * QUAD
    images, out_rows_n, out_cols = (
        image_range[1] - image_range[0], row_range[1] - row_range[0], col_range[1] - col_range[0]
    )  # fmt: skip
    rows, cols = (out_rows_n - 1) * step_h + dil_h * (kh - 1) + 1, (out_cols - 1) * step_w + dil_w * (kw - 1) + 1
    count = images * out_rows_n * out_cols
    padded = count + LANES  # the last tile is computed, and transposed, whole
    image_bytes = rows * products * cols * depth
    buffer = np.empty(images * image_bytes + _SLACK, np.uint8)
    features = buffer[-buffer.ctypes.data % BYTES :]
    codes = np.empty(rows * cols * depth + _SLACK, np.uint8)
    looked = np.empty((digit_count, cols * depth + _SLACK), np.uint8)
    sums = np.empty(images * rows * cols if digit_count else 1, np.int32)
    sum_of, nothing = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
    acc_buffer = np.empty((padded * len(heights) + 2) * LANES, np.int32)
    acc = acc_buffer[(-acc_buffer.ctypes.data % BYTES) // 4 :]
    tile = np.empty(LANES * LANES, np.int32)
    offsets = np.empty(LANES, np.int64)
    from_row, to_row = np.empty(padded, np.int64), np.empty(count, np.int64)
    m = 0
    for image in range(images):
        for i in range(out_rows_n):
            for j in range(out_cols):
                from_row[m] = image * image_bytes + (i * step_h * products * cols + j * step_w) * depth
                to_row[m] = (image_range[0] + image) * out_image + (
                    (row_range[0] + i) * out_size[1] + col_range[0] + j
                ) * out_row
                m += 1
    for i in range(count, padded):
        from_row[i] = from_row[count - 1]
    # A kernel's row (or tap, if dilated) is a run of bytes for each product: in pieces, and pieces in passes.
    run, runs_a_row = (kw * quads, 1) if dil_w == 1 else (quads, kw)
    most = max(1, _PASS // (len(heights) * BYTES))
    n_pieces = kh * products * runs_a_row * ((run + most - 1) // most)
    pieces = np.empty(2 * n_pieces, np.int64)
    passes = np.empty((n_pieces + 1, 2), np.int64)
    n, n_passes, in_pass, quad = 0, 0, most, 0
    for r in range(kh):
        for p in range(products):
            for s in range(runs_a_row):
                begin = ((r * dil_h * products + p) * cols + s * dil_w) * depth
                for first in range(0, run, most):
                    length = min(most, run - first)
                    if in_pass + length > most:
                        passes[n_passes, 0], passes[n_passes, 1] = n, quad
                        n_passes += 1
                        in_pass = 0
                    pieces[2 * n], pieces[2 * n + 1] = begin + first * QUAD, length
                    n += 1
                    in_pass += length
                    quad += length
    passes[n_passes, 0] = n
    at_group = -1
    for unit in range(unit_range[0], unit_range[1]):
        group, t = unit // n_tiles, unit % n_tiles
        if group != at_group:
            at_group = group
            for image in range(images):
                base = (image_range[0] + image) * stride_image + group * x_group
                _expand(
                    path, features, sums, codes, looked, x, base, channels, (stride_c, stride_h, stride_w), size,
                    row_range[0] * step_h - pad_h, rows, col_range[0] * step_w - pad_w, cols, image * image_bytes,
                    image * rows * cols, u, digits, digit_count, pad_code, offsets
                )  # fmt: skip
            if digit_count > 0:
                sum_of[:] = 0
                for row in range(images * out_rows_n):
                    at = (row // out_rows_n * rows + row % out_rows_n * step_h) * cols
                    of_row = sum_of[row * out_cols :][:out_cols]
                    for r in range(kh):
                        for s in range(kw):
                            seen = sums[at + r * dil_h * cols + s * dil_w :]
                            for j in range(out_cols):
                                of_row[j] += seen[j * step_w]
        width = tiles[t + 1] - tiles[t]
        height = heights[width - 1]
        vector = group * vectors + tiles[t] - first_vector
        wide = width * LANES
        for k in range(max(1, n_passes)):
            first, last = passes[k, 0], passes[min(k + 1, n_passes), 0]
            # The first pass begins with the numbers by column and row, the others with the sums so far.
            begin, begin_at, stride, more = (starts, vector * LANES, 0, sum_of) if k == 0 else (acc, 0, wide, nothing)
            at = vector * quad * BYTES + passes[k, 1] * width * BYTES
            for i in range(0, count, height):
                if width == 1:
                    dot_tile_1(
                        path, acc, i * wide, begin, begin_at + i * stride, stride, more, features, from_row, i, pieces,
                        first, last, weights, at
                    )  # fmt: skip
                elif width == 2:
                    dot_tile_2(
                        path, acc, i * wide, begin, begin_at + i * stride, stride, more, features, from_row, i, pieces,
                        first, last, weights, at
                    )  # fmt: skip
                elif width == 3:
                    dot_tile_3(
                        path, acc, i * wide, begin, begin_at + i * stride, stride, more, features, from_row, i, pieces,
                        first, last, weights, at
                    )  # fmt: skip
                else:
                    dot_tile_4(
                        path, acc, i * wide, begin, begin_at + i * stride, stride, more, features, from_row, i, pieces,
                        first, last, weights, at
                    )  # fmt: skip
        for n in range(width):
            lane = (tiles[t] + n) * LANES
            each = out_rows_n * out_cols
            for image in range(images):
                flush_tile(
                    out, to_row[image * each :], group * out_group + lane * out_lane, out_lane, acc,
                    image * each * wide + n * LANES, wide, each, min(LANES, lanes - lane), not accumulate, tile, offsets
                )  # fmt: skip


@lru_cache(maxsize=64)
def prepared(form: ByteForm) -> tuple[Any, ...]:
    """Flat u and v; by_row's and by_column's bytes, and how many, and what both lack: ``Σ_d 256^d·byte + base``."""

    def digits(by_code: Tensor | None) -> tuple[tuple[np.ndarray, int], int]:
        values = np.zeros(CODES, np.int64) if by_code is None else by_code.numpy().astype(np.int64)
        base = int(values.min())
        rest, rows = values - base, []
        while rest.any():
            rows.append((rest & 255).astype(np.uint8))
            rest >>= 8
        return (np.concatenate([*rows, np.zeros(CODES, np.uint8)]), len(rows)), base

    u, v = (np.ascontiguousarray(side.numpy()).view(np.uint8).reshape(-1) for side in (form.u, form.v))
    (rows, row_base), (columns, column_base) = digits(form.by_row), digits(form.by_column)
    return u, v, rows, columns, row_base + column_base, form.by_column.numpy().astype(np.int64) - column_base


def _aligned(count: int) -> np.ndarray:
    buffer = np.empty(count + BYTES, np.uint8)
    return buffer[-buffer.ctypes.data % BYTES :]


def _fewest_parts(total: int, fits: Callable[[int], bool]) -> int:
    """Into how many even parts `total` is cut so that they fit; `total` if none do."""
    parts = 1
    while parts < total and not fits(-(-total // parts)):
        parts = min(total, parts + 1 + parts // 8)
    return parts


def _partial_sums(
    x: Tensor, w: Tensor, geometry: tuple[int, ...], products: int, worker: int
) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Cut kernel and channels until one output pixel's features and one tile's weights fit the scratch."""
    channels, (kh, kw) = x.shape[2], w.shape[3:]
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    reach = (dil_h * (kh - 1) + 1) * (dil_w * (kw - 1) + 1)
    # A block takes at least the features of a pixel's patch, its codes and sums.
    too_large = reach * (channels + QUAD) * (products + 2) + 8 * reach > worker // 2
    too_deep = (channels + QUAD) * kh * kw > min(
        _MAX_DEPTH, worker // (_DEPTH_BYTES + 4 * LANES), _WEIGHTS // (4 * LANES * max(1, products))
    )
    if not (too_large or too_deep) or (kh * kw == 1 and channels <= QUAD):
        yield x, w, geometry
    elif channels > QUAD * 8 or kh * kw == 1:
        half = -(-channels // (2 * QUAD)) * QUAD
        for some in (slice(0, half), slice(half, None)):
            yield from _partial_sums(x[:, :, some], w[:, :, some], geometry, products, worker)
    elif (kh * dil_h >= kw * dil_w and kh > 1) or kw == 1:
        half = kh // 2
        for first, part in ((0, w[:, :, :, :half]), (half, w[:, :, :, half:])):
            shifted = (step_h, step_w, pad_h - first * dil_h, pad_w, dil_h, dil_w)
            yield from _partial_sums(x, part, shifted, products, worker)
    else:
        half = kw // 2
        for first, part in ((0, w[..., :half]), (half, w[..., half:])):
            shifted = (step_h, step_w, pad_h, pad_w - first * dil_w, dil_h, dil_w)
            yield from _partial_sums(x, part, shifted, products, worker)


def _product_sum(
    x: Tensor,
    w: Tensor,
    form: ByteForm,
    out: Tensor,
    out_strides: tuple[int, int, int, int],
    out_size: tuple[int, int],
    geometry: tuple[int, ...],
    pad_code: int,
    path: str,
) -> None:
    """Write the product sums of an implicit grouped convolution.

    x is ``(B, g, C/g, H, W)``, w is ``(g, O/g, C/g, kh, kw)``, both with any strides; `geometry` is stride, padding and
    dilation; `out_strides` are those of (image, group, output channel, output pixel).
    """
    workers = min(torch.get_num_threads(), (SCRATCH - _WEIGHTS) // _MIN_WORKER)
    worker = min(_WORKER, (SCRATCH - _WEIGHTS) // workers)
    accumulate = False
    for x_part, w_part, shifted in _partial_sums(x, w, geometry, form.products, worker):
        _partial_sum(
            x_part,
            w_part,
            form,
            out,
            out_strides,
            out_size,
            shifted,
            pad_code,
            PATHS[path],
            workers,
            worker,
            accumulate,
        )
        accumulate = True


def _partial_sum(
    x: Tensor,
    w: Tensor,
    form: ByteForm,
    out: Tensor,
    out_strides: tuple[int, int, int, int],
    out_size: tuple[int, int],
    geometry: tuple[int, ...],
    pad_code: int,
    path: Any,
    workers: int,
    worker: int,
    accumulate: bool,
) -> None:
    """`_product_sum` of what fits the scratch; `accumulate` adds to what is in `out`."""
    batch, groups, channels, *size = x.shape
    _, lanes, _, kh, kw = w.shape
    step_h, step_w, _, _, dil_h, dil_w = geometry
    u, v, (row_digits, row_count), (column_digits, column_count), base, _ = prepared(form)
    products, depth = form.products, -(-channels // QUAD) * QUAD
    vectors = -(-lanes // LANES)
    n_tiles = -(-vectors // len(path.rows))
    tiles = np.array([vectors * i // n_tiles for i in range(n_tiles + 1)])

    def block_fits(images: int, rows: int, cols: int) -> bool:
        ins = ((rows - 1) * step_h + dil_h * (kh - 1) + 1) * ((cols - 1) * step_w + dil_w * (kw - 1) + 1)
        count = images * rows * cols
        needs = ins * depth * (images * products + 2) + 4 * images * ins
        needs += count * (4 * LANES * len(path.rows) + 20)
        return count <= MAX_ROWS and needs <= worker

    col_parts = _fewest_parts(out_size[1], lambda n: block_fits(1, 1, n))
    cols = -(-out_size[1] // col_parts)
    row_parts = _fewest_parts(out_size[0], lambda n: block_fits(1, n, cols))
    rows = -(-out_size[0] // row_parts)
    image_parts = _fewest_parts(batch, lambda n: block_fits(n, rows, cols))
    if image_parts * row_parts * col_parts < workers:
        image_parts = min(batch, workers)
    blocks = [
        (i, r, c)
        for i in even_ranges(batch, image_parts)
        for r in even_ranges(out_size[0], row_parts)
        for c in even_ranges(out_size[1], col_parts)
    ]
    size_vector = kh * kw * depth * products * LANES
    units = groups * n_tiles
    chunk = max(1, _WEIGHTS // ((size_vector + 4 * LANES) * len(path.rows)))
    x_flat, w_flat, out_flat = flat(x), flat(w), flat(out)
    for first_unit in range(0, units, chunk):
        last_unit = min(units, first_unit + chunk)
        first, last = (int(unit // n_tiles * vectors + tiles[unit % n_tiles]) for unit in (first_unit, last_unit))
        weights, starts = _aligned((last - first) * size_vector), np.empty((last - first) * LANES, np.int32)
        common = (
            path, w_flat, w.stride(), lanes, channels, (kh, kw), v, column_digits, column_count, base,
            weights, starts, tiles, first
        )  # fmt: skip
        parts = even_ranges(last - first, 4 * workers)
        run(_expand_weights, [(*common, (first + a, first + b)) for a, b in parts], workers)
        common = (
            path, path.rows, x_flat, x.stride(), channels, tuple(size), (kh, kw), geometry, np.uint8(pad_code), u,
            row_digits, row_count, weights, starts, lanes, tiles, first, accumulate, out_flat, out_strides,
            out_size
        )  # fmt: skip
        spare = -(-workers // len(blocks))
        unit_ranges = [(first_unit + a, first_unit + b) for a, b in even_ranges(last_unit - first_unit, spare)]
        run(_block, [(*common, *block, unit_range) for block in blocks for unit_range in unit_ranges], workers)


def _matmul(x: Tensor, w: Tensor, form: ByteForm, path: str) -> Tensor:
    y = torch.empty(*batch_shape(x, w), x.shape[-2], w.shape[-2], dtype=torch.int32)
    for x_part, w_part, y_part in flat_batches(x, w, y):
        _, rows, columns = y_part.shape
        _product_sum(
            x_part.transpose(1, 2)[None, :, :, None, :],
            w_part[:, :, :, None, None],
            form,
            y_part,
            (0, rows * columns, 1, columns),
            (1, rows),
            (1, 1, 0, 0, 1, 1),
            0,
            path,
        )
    return y


@cache
def usable(path: str) -> bool:
    """Whether this CPU has the instructions of a path of `PATHS`, and they are exact on operands made to break them."""
    if not compiles(path):
        return False
    generator = torch.Generator().manual_seed(0)
    depth, rows, columns = 1030, 7, 70
    u, v = torch.zeros(2, CODES, dtype=torch.uint8), torch.zeros(2, CODES, dtype=torch.int8)
    u[:], v[0], v[1] = 255, -128, 127
    u[:, 0], v[:, 0], v[:, 1] = 0, 127, -128
    u[1, 2:] = torch.arange(254, dtype=torch.uint8)
    far = torch.full((CODES,), 2**21, dtype=torch.int32)
    form = ByteForm(u, v, far, far - 3 * torch.arange(CODES, dtype=torch.int32))
    x = torch.randint(0, CODES, (rows, depth), dtype=torch.uint8, generator=generator)
    w = torch.randint(0, CODES, (columns, depth), dtype=torch.uint8, generator=generator)
    x[0], w[0], w[1] = 1, 0, 255  # all products at an end of their range
    w[2], w[2, ::2] = 0, 1
    a, b = u.long()[:, x.long()], v.long()[:, w.long()]
    sums = torch.einsum("pmk,pnk->mn", a, b) + form.by_row[x.long()].long().sum(-1)[:, None]
    sums += form.by_column[w.long()].long().sum(-1)
    return torch.equal(_matmul(x, w, form, path), sums.to(torch.int32))  # wraps


@cache
def best() -> str:
    return next(path for path in PATHS if path == "generic" or usable(path))


def instruction() -> str | None:
    """The path of `PATHS` that dot products take here; None if it is the one for any CPU."""
    return None if best() == "generic" else best()


def lut_matmul(x: Tensor, w: Tensor, form: ByteForm) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]`` of the table in byte form."""
    return _matmul(x, w, form, best())


def lut_conv2d(
    x: Tensor,
    w: Tensor,
    form: ByteForm,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
) -> Tensor:
    """Implicit GEMM over blocks of input pixels' features."""
    out_h, out_w = conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = torch.empty(x.shape[0], w.shape[0], out_h, out_w, dtype=torch.int32)
    lane = out_h * out_w
    _product_sum(
        x.unflatten(1, (groups, -1)),
        w.unflatten(0, (groups, -1)),
        form,
        y,
        (y.stride(0), w.shape[0] // groups * lane, lane, 1),
        (out_h, out_w),
        (*stride, *padding, *dilation),
        pad_code,
        best(),
    )
    return y
