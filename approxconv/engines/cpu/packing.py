"""Implicit im2col: the codes that a block of output pixels sees, as patches or as padded pixels; the sums' way back."""

from __future__ import annotations

import numpy as np

from .vectors import LANES, copy, fill, inline, jit, transpose

STEPS = LANES  # k's whose codes of one pixel lie together, and are added in one pass


@inline
def copy_run(packed, at, x, start, step, count):
    if step == 1:
        copy(packed, at, x, start, count)
    else:
        target, source = packed[at:], x[start:]
        for i in range(count):
            target[i] = source[i * step]


@jit
def copy_channels(packed, at, k_stride, x, start, step, count, channels, offsets):
    """Copy `count` pixels of `channels` contiguous codes each to one packed row a channel."""
    for j in range(LANES):
        offsets[j] = j * step
    pixel = 0
    while pixel + LANES <= count:
        c = 0
        while c + LANES <= channels:
            transpose(packed, at + c * k_stride + pixel, k_stride, x, offsets, start + pixel * step + c)
            c += LANES
        while c < channels:
            copy_run(packed, at + c * k_stride + pixel, x, start + pixel * step + c, step, LANES)
            c += 1
        pixel += LANES
    for c in range(channels):
        copy_run(packed, at + c * k_stride + pixel, x, start + pixel * step + c, step, count - pixel)


@jit
def pack(packed, rows, x, base, channels, strides, size, kernel, geometry, pad_code, runs, n_runs, offsets):
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
                        fill(packed, (c * taps + k) * rows + m, lo - col, pad_code)
                if hi < col + count:
                    for c in range(channels):
                        fill(packed, (c * taps + k) * rows + m + hi - col, col + count - hi, pad_code)
                if hi > lo:
                    at = k * rows + m + lo - col
                    if channels_last:
                        copy_channels(packed, at, taps * rows, x, start, step_w * stride_w, hi - lo, channels, offsets)
                    else:
                        for c in range(channels):
                            copy_run(packed, at + c * taps * rows, x, start + c * stride_c, step_w * stride_w, hi - lo)


@jit
def runs_of(first_row, rows, out_size, image_stride, out_image_stride, row_stride_out, runs, out_rows):
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


@jit
def flush_tile(out, out_rows, lane_at, lane_stride, acc, acc_at, row_stride, rows, lanes, first, tile, offsets):
    """Write (or add, if not `first`) sums ``acc[acc_at + m·row_stride + lane]`` of up to 16 lanes to the output.

    Whole tiles of 16 rows are read.
    """
    if lane_stride == 1:
        for m in range(rows):
            at = out_rows[m] + lane_at
            if first:
                for j in range(lanes):
                    out[at + j] = acc[acc_at + m * row_stride + j]
            else:
                for j in range(lanes):
                    out[at + j] += acc[acc_at + m * row_stride + j]
        return
    for j in range(LANES):
        offsets[j] = j * row_stride
    for m in range(0, rows, LANES):
        m0 = max(0, min(m, rows - LANES)) if first else m  # what the last two tiles share is written twice
        count = min(LANES, rows - m0)
        contiguous = out_rows[m0 + count - 1] - out_rows[m0] == count - 1
        if first and contiguous and count == LANES and lanes == LANES:
            transpose(out, out_rows[m0] + lane_at, lane_stride, acc, offsets, acc_at + m0 * row_stride)
            continue
        transpose(tile, 0, LANES, acc, offsets, acc_at + m0 * row_stride)
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


@jit
def ends_of(codes):
    """Smallest and largest code."""
    low, high = np.uint8(255), np.uint8(0)
    for code in codes:
        low, high = min(low, code), max(high, code)
    return np.int64(low), np.int64(high)


@jit
def interleave(packed, depth, rows, regrouped, offsets):
    """Every 16 k's codes from k-major to row-major, in place; those past the last k are 0."""
    padded = -(-depth // STEPS) * STEPS
    fill(packed, depth * rows, (padded - depth) * rows, 0)
    for j in range(LANES):
        offsets[j] = j * rows
    for at in range(0, depth * rows, STEPS * rows):
        for m in range(0, rows - LANES + 1, LANES):
            transpose(regrouped, m * STEPS, STEPS, packed, offsets, at + m)
        for m in range(rows // LANES * LANES, rows):
            for i in range(STEPS):
                regrouped[m * STEPS + i] = packed[at + i * rows + m]
        copy(packed, at, regrouped, 0, STEPS * rows)


@jit
def images_of(first_row, out_size, kernel, geometry, image_stride, images, pixels):
    """Cut output pixels ``first_row …`` into images, whose padded rows that the pixels see are stored in one buffer.

    Says of each image where it lies in x, its first padded row, how many, and the first pixel they take of the buffer;
    of each output pixel, where the pixel that its first tap sees lies in the buffer. Returns the first padded column,
    how many, and the pixels of the buffer: the columns are all, unless all output pixels lie in one row.
    """
    out_h, out_w = out_size
    step_h, step_w, _pad_h, _pad_w, dil_h, dil_w = geometry
    rows = len(pixels)
    within = first_row // out_w == (first_row + rows - 1) // out_w
    first_col = first_row % out_w if within else 0
    width = ((rows if within else out_w) - 1) * step_w + (kernel[1] - 1) * dil_w + 1
    area = 0
    m = 0
    for i in range(len(images)):
        image = first_row // (out_h * out_w) + i
        top = (first_row + m) // out_w % out_h
        left = (first_row + m) % out_w - first_col
        stop = min(rows, (image + 1) * out_h * out_w - first_row)
        start = area
        for pixel in range(left, left + stop - m):
            pixels[m] = (start + pixel // out_w * step_h * width + pixel % out_w * step_w) * STEPS
            m += 1
        bottom = (first_row + m - 1) // out_w % out_h
        images[i, 0], images[i, 1], images[i, 3] = image * image_stride, top * step_h, start
        images[i, 2] = (bottom - top) * step_h + (kernel[0] - 1) * dil_h + 1
        area += images[i, 2] * width
    return first_col * step_w, width, area


@jit
def pack_pixels(packed, area, columns, x, base, channels, strides, size, geometry, pad_code, images, offsets):
    """Fill ``packed[c // 16, pixel, c % 16]`` with the codes of the pixels of `images_of`; c past the last are 0."""
    stride_c, stride_h, stride_w = strides
    width = columns[1]
    pad_h, pad_w = geometry[2], geometry[3] - columns[0]  # negative where these columns begin within x
    lo = min(max(pad_w, 0), width)
    hi = max(min(pad_w + size[1], width), lo)
    for c in range(0, channels, STEPS):
        some = min(STEPS, channels - c)
        for j in range(STEPS):
            offsets[j] = min(j, some - 1) * stride_c
        for i in range(len(images)):
            for row in range(images[i, 2]):
                ih = images[i, 1] + row - pad_h
                at = (c // STEPS * area + images[i, 3] + row * width) * STEPS
                if ih < 0 or ih >= size[0]:
                    fill(packed, at, width * STEPS, pad_code)
                else:
                    fill(packed, at, lo * STEPS, pad_code)
                    fill(packed, at + hi * STEPS, (width - hi) * STEPS, pad_code)
                    start = base + images[i, 0] + c * stride_c + ih * stride_h + (lo - pad_w) * stride_w
                    _pack_row(packed, at + lo * STEPS, x, start, stride_c, stride_w, hi - lo, some, offsets)
                if some < STEPS:
                    for pixel in range(width):
                        fill(packed, at + pixel * STEPS + some, STEPS - some, 0)


@inline
def _pack_row(packed, at, x, start, stride_c, stride_w, count, channels, offsets):
    """``packed[at + 16·pixel + c] = x[start + c·stride_c + pixel·stride_w]``."""
    if stride_c == 1 and channels == STEPS:
        for pixel in range(count):
            copy(packed, at + pixel * STEPS, x, start + pixel * stride_w, STEPS)
        return
    done = 0
    if stride_w == 1:
        while done + LANES <= count:
            transpose(packed, at + done * STEPS, STEPS, x, offsets, start + done)
            done += LANES
        if 0 < done < count:
            transpose(packed, at + (count - LANES) * STEPS, STEPS, x, offsets, start + count - LANES)
            done = count
    for pixel in range(done, count):
        for c in range(channels):
            packed[at + pixel * STEPS + c] = x[start + pixel * stride_w + c * stride_c]
