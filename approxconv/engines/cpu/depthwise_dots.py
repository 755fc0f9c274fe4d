"""Depthwise convolution of a factorised table: dot products of bytes whose four products are taps of a kernel's row.

The codes of 16 channels are copied to padded planes, a channel's plane is expanded to its features, and 16 neighbouring
pixels' windows of four bytes meet four of a kernel row's weights in one instruction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...geometry import conv_output_size
from ..byte_form import ByteForm
from .depthwise import MAX_PLANE, PLANE, fill_planes
from .dot_products import best, lut_conv2d, prepared
from .instructions import BYTES, PATHS, QUAD, STRIPS, dot_strips, dot_strips_apart, look_up, spread
from .threads import SCRATCH, even_ranges, flat, run
from .vectors import CODES, LANES, copy, jit

_FEATURES = 3 * 2**13  # bytes of features that stay in the first-level cache


@jit
def _pack_taps(packed, at, w, start, w_row, w_col, kernel, v, products, digit_count):
    """Four taps of a kernel row a number, ``[digit or product][row][quad]``; the digits of by_row count once a tap."""
    kh, kw = kernel
    n = at
    for p in range(-digit_count, products):
        for r in range(kh):
            for first in range(0, kw, QUAD):
                four = np.uint32(0)
                for t in range(min(QUAD, kw - first)):
                    code = w[start + r * w_row + (first + t) * w_col]
                    byte = np.uint32(1) if p < 0 else np.uint32(v[p * CODES + code])
                    four |= byte << np.uint32(8 * t)
                packed[n] = np.int32(four)
                n += 1


@jit
def _plan_spread(begins, places, chunks, first_row, rows, cols, size, pad_w):
    """Where the bytes of a padded band lie in an image plane without gaps, 64 at a time; 128 if they are padding."""
    height, width = size
    for i in range(chunks):
        begins[i] = 0
        found = False
        for j in range(BYTES):
            e = i * BYTES + j
            row, col = first_row + e // cols, e % cols - pad_w
            if e < rows * cols and 0 <= row < height and 0 <= col < width:
                at = row * width + col
                if not found:
                    begins[i] = at
                    found = True
                places[i, j] = at - begins[i]
            else:
                places[i, j] = 128


@jit
def _block(
    path, permutes, x, x_strides, size, kernel, geometry, pad_code, w, w_strides, multiplier, u, v, digits, digit_count,
    columns, base, out, out_size, all_channels, band, plane_size, pattern, image_range, channel_range
):  # fmt: skip
    """One task: some images, some channels, 16 at a time."""
    stride_image, stride_c, stride_h, stride_w = x_strides
    lane_stride, w_row, w_col = w_strides
    step_h, step_w, pad_h, pad_w, dil_h, dil_w = geometry
    kh, kw = kernel
    out_h, out_w = out_size
    cols = plane_size[1]
    chunks = (plane_size[0] * cols + BYTES - 1) // BYTES
    plane = chunks * BYTES
    products = len(u) // CODES
    total = products + digit_count
    dense = step_h == 1 and step_w == 1
    acc_cols = cols if dense else (out_w + LANES - 1) // LANES * LANES
    # Strips, windows and lookups run over the end.
    over = STRIPS * LANES * step_w + STRIPS * step_h * cols + 4 * BYTES
    at_once = max(1, min(LANES, _FEATURES // max(1, total * plane)))
    pitch = at_once * plane + over
    planes = np.empty(LANES * plane + over, np.uint8)
    features = np.zeros(total * pitch, np.uint8)
    acc = np.zeros((band + STRIPS) * acc_cols + STRIPS * LANES, np.int32)
    quads = (kw + QUAD - 1) // QUAD
    row_pieces = kh * quads
    pieces = total * row_pieces
    offsets = np.empty(pieces, np.int64)
    packed = np.empty(LANES * multiplier * pieces, np.int32)
    starts = np.empty(LANES * multiplier, np.int32)
    transposing = np.empty(LANES, np.int64)
    n = 0
    for p in range(total):
        for r in range(kh):
            for q in range(quads):
                offsets[n] = p * pitch + r * dil_h * cols + q * QUAD * dil_w
                n += 1
    bands = (out_h + band - 1) // band
    gapless = permutes and stride_w == 1 and stride_h == size[1]
    begins, places = np.empty(bands * chunks, np.int64), np.empty((bands * chunks, BYTES), np.uint8)
    for i in range(bands if gapless else 0):
        _plan_spread(
            begins[i * chunks :], places[i * chunks :], chunks, i * band * step_h - pad_h, plane_size[0], cols, size,
            pad_w
        )  # fmt: skip
    last_begin = max(0, size[0] * size[1] - 1) + BYTES
    for first_channel in range(channel_range[0], channel_range[1], LANES):
        channels = min(LANES, channel_range[1] - first_channel)
        for i in range(channels * multiplier):
            lane = (first_channel * multiplier + i) * lane_stride
            _pack_taps(packed, i * pieces, w, lane, w_row, w_col, kernel, v, products, digit_count)
            start = kh * kw * base
            for r in range(kh):
                for s in range(kw):
                    start += columns[w[lane + r * w_row + s * w_col]]
            starts[i] = np.int32(start)
        for image in range(image_range[0], image_range[1]):
            for out_row in range(0, out_h, band):
                out_rows = min(band, out_h - out_row)
                rows = (out_rows - 1) * step_h + dil_h * (kh - 1) + 1
                begin = image * stride_image + first_channel * stride_c
                if gapless and begin + (channels - 1) * stride_c + last_begin <= len(x):
                    for c in range(channels):
                        spread(
                            path, planes, c * plane, x, begin + c * stride_c, begins, places, out_row // band * chunks,
                            (rows * cols + BYTES - 1) // BYTES, pad_code
                        )  # fmt: skip
                else:
                    fill_planes(
                        planes, plane, x, begin, channels, (stride_c, stride_h, stride_w), out_row * step_h - pad_h,
                        size, rows, cols, pad_w, pad_code, transposing
                    )  # fmt: skip
                count = (out_rows - 1) * cols + out_w if dense else out_w
                # With unit strides a plane is one row, else strips lie below each other.
                deep, strip, acc_strip = (1, LANES, LANES) if dense else (out_rows, step_h * cols, acc_cols)
                across = STRIPS * LANES if dense else LANES
                for c in range(channels):
                    if c % at_once == 0:
                        come, count_of = c * plane, min(at_once, channels - c) * chunks
                        for d in range(digit_count):
                            look_up(path, features, d * pitch, BYTES, digits, d * CODES, planes, come, count_of)
                        for p in range(products):
                            at = (digit_count + p) * pitch
                            look_up(path, features, at, BYTES, u, p * CODES, planes, come, count_of)
                    for q in range(multiplier):
                        i = c * multiplier + q
                        for j in range(0, count, across):
                            for k in range(0, deep, STRIPS):
                                at = k * acc_cols + j
                                begin = c % at_once * plane + k * step_h * cols + j * step_w
                                for d in range(digit_count + 1):
                                    # Horner's rule, from by_row's highest digit down; then the products.
                                    last = d == digit_count
                                    scale = np.int32(0 if d == 0 else (1 if last else 256))
                                    start = starts[i] if last else np.int32(0)
                                    piece = (d if last else digit_count - 1 - d) * row_pieces
                                    end = pieces if last else piece + row_pieces
                                    if step_w == 1 or permutes:
                                        dot_strips(
                                            path, acc, at, acc_strip, scale, start, features, begin, strip, dil_w,
                                            pattern, offsets, packed, i * pieces, piece, end
                                        )  # fmt: skip
                                    else:
                                        dot_strips_apart(
                                            path, acc, at, acc_strip, scale, start, features, begin, strip, dil_w,
                                            pattern, offsets, packed, i * pieces, piece, end
                                        )  # fmt: skip
                        to = ((image * all_channels + first_channel) * multiplier + i) * out_h + out_row
                        for k in range(out_rows):
                            copy(out, (to + k) * out_w, acc, k * acc_cols, out_w)


def lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    form: ByteForm,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
) -> Tensor:
    """One group a channel. A grouped convolution where a plane is too large or its pixels lie too far apart."""
    batch, channels, *size = x.shape
    kernel, multiplier = tuple(w.shape[2:]), w.shape[0] // channels
    dilation = [d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True)]  # windows of four taps stay near
    geometry = (*stride, *padding, *dilation)
    out_h, out_w = conv_output_size(size, kernel, stride, padding, dilation)
    path = PATHS[best()]
    reach = dilation[0] * (kernel[0] - 1) + 1
    # At least the image's own: what `spread` takes from 64 bytes then lies within 64.
    cols = max(size[1], (out_w - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1)
    lane, tap = np.divmod(np.arange(BYTES), QUAD)
    places = lane * stride[1] + np.minimum(tap, kernel[1] - 1) * dilation[1]
    far = places.max() >= BYTES if path.permutes else stride[1] > 2
    u, v, (digits, digit_count), (_, _), base, columns = prepared(form)
    total = form.products + digit_count
    pieces = total * kernel[0] * -(-kernel[1] // QUAD)
    band = min(out_h, max(1, (PLANE // cols - reach) // stride[0] + 1))
    plane = ((band - 1) * stride[0] + reach) * cols
    over = STRIPS * LANES * stride[1] + STRIPS * stride[0] * cols + 5 * BYTES
    worker_bytes = (LANES + total) * (plane + BYTES + over) + max(_FEATURES, total * plane)
    worker_bytes += 73 * (-(-out_h // band) * (plane // BYTES + 1)) + 4 * (band + STRIPS) * (cols + LANES)
    worker_bytes += pieces * (8 + 4 * LANES * multiplier)
    if reach * cols > MAX_PLANE or far or worker_bytes > SCRATCH:
        return lut_conv2d(x, w, form, stride, padding, dilation, channels, pad_code)
    y = torch.empty(batch, w.shape[0], out_h, out_w, dtype=torch.int32)
    workers = min(torch.get_num_threads(), SCRATCH // worker_bytes)
    blocks = -(-channels // LANES)
    channel_ranges = [
        (LANES * first, min(LANES * last, channels))
        for first, last in even_ranges(blocks, min(blocks, 4 * workers if workers > 1 else 1))
    ]
    image_ranges = even_ranges(batch, min(batch, -(-workers // len(channel_ranges))))
    common = (
        path, path.permutes, flat(x), x.stride(), tuple(size), kernel, geometry, np.uint8(pad_code), flat(w),
        (w.stride(0), w.stride(2), w.stride(3)), multiplier, u, v, digits, digit_count, columns, base,
        y.view(-1).numpy(), (out_h, out_w), channels, band, ((band - 1) * stride[0] + reach, cols),
        places.clip(0, BYTES - 1).astype(np.uint8)
    )  # fmt: skip
    run(_block, [(*common, i, c) for i in image_ranges for c in channel_ranges], workers)
    return y
