"""Byte shuffles: 64 codes looked up at once, with nothing built (AVX-512 VBMI). Depthwise convolution by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from ..._versioned import once_per_version
from ...multiplier import PreparedTable, prepare
from .packing import copy_channels, copy_run
from .threads import flat
from .vectors import CODES, LANES, copy, data_of, fill, i32, i64, jit, transpose, vector_at

SHUFFLES = "+avx512vbmi" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")  # what Numba compiles for
BYTES = 64  # of a vector
RUN = 2 * BYTES  # codes looked up together
BAND = 4096  # codes of a channel that are looked up before their sums are written
MAX_WORKER = 2**21  # bytes of scratch: very many phases would not fit the cache
MAX_TAPS = 128  # so many bytes sum to less than 2¹⁵
BYTE_VECTOR = ir.VectorType(ir.IntType(8), BYTES)


def unpack(builder: Any, a: Any, b: Any, high: bool) -> Any:
    """Interleave the low or high halves of each 16 bytes, as vpunpckl/h do."""
    count = a.type.count
    per = count // 4
    picks = [
        lane
        for group in range(0, count, per)
        for j in range(group + high * per // 2, group + (1 + high) * per // 2)
        for lane in (j, count + j)
    ]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, count), picks))


def transpose_quarters(builder: Any, rows: list[Any]) -> list[Any]:
    """The 4×4 transpose of the 16-byte quarters of four vectors of int32."""

    def pick(a: Any, b: Any, quarters: Sequence[int]) -> Any:
        picks = [4 * quarter + j for quarter in quarters for j in range(4)]
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, LANES), picks))

    halves = [[pick(a, b, (k, k + 1, k + 4, k + 5)) for a, b in (rows[:2], rows[2:])] for k in (0, 2)]
    return [pick(a, b, (k, k + 2, k + 4, k + 6)) for a, b in halves for k in (0, 1)]


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, i32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(i32, vector.count), [0] * vector.count))


def load_bytes(builder: Any, pointer: Any, k: int) -> Any:
    """The k-th 64 bytes behind a pointer to bytes."""
    return builder.load(vector_at(builder, builder.gep(pointer, [i64(BYTES * k)]), BYTE_VECTOR), align=1)


def _look_up(builder: Any, table: Sequence[Any], codes: Any) -> Any:
    """Of each code the entry of a table in one vector, or in four."""
    if len(table) == 1:
        permute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(BYTE_VECTOR, [BYTE_VECTOR] * 2), "llvm.x86.avx512.permvar.qi.512"
        )
        return builder.call(permute, [table[0], codes])
    permute = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(BYTE_VECTOR, [BYTE_VECTOR] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
    )
    lower, upper = (builder.call(permute, [table[k], codes, table[k + 1]]) for k in (0, 2))
    return builder.select(builder.icmp_signed("<", codes, ir.Constant(BYTE_VECTOR, None)), upper, lower)


@intrinsic
def sum_looked_up(
    _: Any, acc: Any, at: Any, codes: Any, start: Any, shifts: Any, table: Any, entries: Any, tap: Any, taps: Any,
    first: Any, bias: Any, scale: Any
) -> Any:  # fmt: skip
    """``acc[at + j] = (bias if first else acc[at + j]) + (Σ_t looked_up(t, j) << scale)``, j < RUN, tap ≤ t < taps.

    ``looked_up(t, j) = table[entries[t] + code] + 256·table[entries[t] + 256 + code]`` with
    ``code = codes[start + shifts[t] + j]``. Two pixels share a 16-bit lane: of the sums of both and those of the upper
    one, both modulo 2¹⁶, the lower one's follow.
    """
    signature = types.void(
        acc, types.int64, codes, types.int64, shifts, table, entries, types.int64, types.int64, types.boolean,
        types.int32, types.int32
    )  # fmt: skip
    word, sums = ir.VectorType(ir.IntType(16), BYTES // 2), ir.VectorType(i32, LANES)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(vector: ir.VectorType, *values: int) -> ir.Constant:
            return ir.Constant(vector, list(values) * (vector.count // len(values)))

        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(sums, [word] * 2), "llvm.x86.avx512.pmaddw.d.512"
        )
        acc_at = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        codes_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
        shifts_at, table_at, entries_at = (data_of(context, builder, sig.args[i], args[i]) for i in (4, 5, 6))
        parts = range(RUN // BYTES)
        zero = constant(word, 0)
        # [part][low or high byte][both pixels, the upper one]
        totals = [[[cgutils.alloca_once_value(builder, zero) for _ in "bu"] for _ in "lh"] for _ in parts]
        with cgutils.for_range_slice(builder, args[7], args[8], i64(1), intp=i64) as (tap, _count):
            row_at = builder.gep(table_at, [builder.load(builder.gep(entries_at, [tap]))])
            quarters = [load_bytes(builder, row_at, k) for k in range(8)]
            from_at = builder.gep(codes_at, [builder.load(builder.gep(shifts_at, [tap]))])
            for part in parts:
                code = load_bytes(builder, from_at, part)
                for half in (0, 1):
                    found = _look_up(builder, quarters[4 * half : 4 * half + 4], code)
                    both = builder.bitcast(found, word)
                    for total, value in zip(
                        totals[part][half], (both, builder.lshr(both, constant(word, 8))), strict=True
                    ):
                        builder.store(builder.add(builder.load(total), value), total)
        bias_value, scale_value = (_splat(builder, args[i], sums) for i in (10, 11))
        for part in parts:
            low, high = (
                [
                    builder.sub(builder.load(both), builder.shl(builder.load(odd), constant(word, 8))),
                    builder.load(odd),
                ]
                for both, odd in totals[part]
            )
            even, odd = (
                [
                    builder.call(multiply_add, [unpack(builder, low[i], high[i], side), constant(word, 1, 256)])
                    for side in (False, True)
                ]
                for i in (0, 1)
            )
            rows = [unpack(builder, even[k], odd[k], side) for k in (0, 1) for side in (False, True)]
            for k, found in enumerate(transpose_quarters(builder, rows)):
                to = vector_at(builder, builder.gep(acc_at, [i64(BYTES * part + LANES * k)]), sums)
                before = builder.select(args[9], bias_value, builder.load(to, align=4))
                builder.store(builder.add(before, builder.shl(found, scale_value)), to, align=4)
        return context.get_dummy_value()

    return signature, codegen


class BytePlanes(NamedTuple):
    """Bytes of ``table - low``, the lowest first: flat uint8, ``(256, count, 256)``; low is the least entry."""

    planes: np.ndarray
    count: int
    low: int


def _byte_planes(known: PreparedTable, rows: Tensor) -> BytePlanes:
    entries = rows.numpy().astype(np.int64) + (known.offset - known.low)
    planes = entries.astype("<u4").view(np.uint8).reshape(CODES, CODES, 4)[..., : known.rows.itemsize]
    planes = torch.from_numpy(planes).transpose(1, 2).contiguous().numpy()  # torch's memory begins at a cache line
    return BytePlanes(planes.reshape(-1), known.rows.itemsize, known.low)


@once_per_version
def planes_of_columns(table: Tensor) -> BytePlanes:
    """Indexed ``[w, byte, a]``."""
    known = prepare(table)
    return _byte_planes(known, known.columns)


@once_per_version
def planes_of_rows(table: Tensor) -> BytePlanes:
    """Indexed ``[a, byte, w]``."""
    known = prepare(table)
    return _byte_planes(known, known.rows)


def _pick(reach: int) -> Any:
    """Intrinsic ``target[at + j] = source[start + picks[first + j]] if keep[first + j] else code`` for j < 64."""

    @intrinsic
    def pick(
        _: Any, target: Any, at: Any, source: Any, start: Any, picks: Any, keep: Any, first: Any, code: Any
    ) -> Any:
        signature = types.void(target, types.int64, source, types.int64, picks, keep, types.int64, types.uint8)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            target_at = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
            source_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
            picks, keep = (
                load_bytes(builder, builder.gep(data_of(context, builder, sig.args[i], args[i]), [args[6]]), 0)
                for i in (4, 5)
            )
            found = _look_up(builder, [load_bytes(builder, source_at, k) for k in range(reach // BYTES)], picks)
            kept = builder.icmp_unsigned("!=", keep, ir.Constant(BYTE_VECTOR, None))
            builder.store(
                builder.select(kept, found, _splat(builder, args[7], BYTE_VECTOR)),
                vector_at(builder, target_at, BYTE_VECTOR),
                align=1,
            )
            return context.get_dummy_value()

        return signature, codegen

    return pick


@intrinsic
def _pad_64(_: Any, target: Any, at: Any, code: Any) -> Any:
    """``target[at : at + 64] = code``."""
    signature = types.void(target, types.int64, types.uint8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        builder.store(_splat(builder, args[2], BYTE_VECTOR), vector_at(builder, to, BYTE_VECTOR), align=1)
        return context.get_dummy_value()

    return signature, codegen


_pick_64, _pick_256 = _pick(BYTES), _pick(CODES)


@jit
def _columns_of(width, step, stride_w, padding, phases, pitch, row_step, columns, picks, keep):
    """Of each phase: its first code, that one's offset in a row, count, how many rows a vector holds, their reach."""
    keep[:] = 0
    for i in range(len(phases)):
        left = max(0, (padding - phases[i] + step - 1) // step)
        col = left * step + phases[i] - padding
        count = max(0, (width - 1 - col) // step + 1)
        chunk = min(count, BYTES)
        together = 0
        if stride_w > 0 and row_step > 0 and (chunk - 1) * step * stride_w < CODES:
            together = 1
            if pitch <= BYTES:
                together = min(BYTES // pitch, (CODES - 1 - (chunk - 1) * step * stride_w) // row_step + 1)
            for row in range(together):
                for j in range(chunk):
                    picks[i * BYTES + row * pitch + j] = row * row_step + j * step * stride_w
                    keep[i * BYTES + row * pitch + j] = 1
        reach = (together - 1) * row_step + (chunk - 1) * step * stride_w + 1
        columns[i] = left, col * stride_w, count, together, reach


@jit
def _copy_rows(planes, at, pitch, x, start, step_h, step, rows, count):
    for i in range(rows):
        copy_run(planes, at + i * pitch, x, start + i * step_h, step, count)


@jit
def _fill_rows_of_16(planes, at, channel_size, pitch, x, start, step_h, step, rows, count, pad_code, offsets):
    """The same for 16 channels whose codes lie next to each other."""
    for j in range(LANES):
        offsets[j] = j * step
    whole = start + (rows - 1) * step_h + (count + LANES) * step <= len(x)
    for i in range(rows):
        to, come = at + i * pitch, start + i * step_h
        if whole:
            for j in range(0, count, LANES):
                transpose(planes, to + j, channel_size, x, offsets, come + j * step)
            for c in range(LANES):
                fill(planes, to + count + c * channel_size, LANES, pad_code)
        else:
            copy_channels(planes, to, channel_size, x, come, step, count, LANES, offsets)


@jit
def _fill_phases(
    planes, channel_size, phase_size, x, base, channels, strides, first_row, rows, images, height, step_h, step, pad_h,
    phases_h, columns, picks, keep, pitch, pad_code, offsets
):  # fmt: skip
    """Of each channel, one plane a phase of the strides, in which neighbours are one stride apart.

    Behind each row and each image comes only the padding in front of the next. Rows are written with what lies behind
    them in memory, which padding and the next rows then replace.
    """
    stride_image, stride_c, stride_h = strides
    row_step = step_h * stride_h
    by_pixel = stride_c == 1 and channels == LANES
    for ih in range(len(phases_h)):
        top = pad_h - phases_h[ih]
        lowest, behind = max(0, (top + step_h - 1) // step_h), (height - 1 + top) // step_h + 1
        for image in range(images):
            above = image * pitch[0] - first_row  # where the image begins
            first = max(0, above + lowest)
            n_rows = min(rows, above + behind) - first
            image_start = base + image * stride_image + ((first - above) * step_h - top) * stride_h
            for c in range(1 if by_pixel else channels):
                row_start = image_start + c * stride_c
                for iw in range(len(columns) if n_rows > 0 else 0):
                    left, col, count, together, reach = columns[iw]
                    at = c * channel_size + (ih * len(columns) + iw) * phase_size + first * pitch[1] + left
                    start = row_start + col
                    if count == 0:
                        continue
                    if by_pixel:
                        _fill_rows_of_16(
                            planes, at, channel_size, pitch[1], x, start, row_step, step, n_rows, count, pad_code,
                            offsets
                        )  # fmt: skip
                    elif together == 0 or start + (n_rows - 1) * row_step + count * step + CODES > len(x):
                        _copy_rows(planes, at, pitch[1], x, start, row_step, step, n_rows, count)
                    else:
                        i = 0
                        while i < n_rows:
                            to, come, j = at + i * pitch[1], start + i * row_step, 0
                            while j < count:
                                if reach <= BYTES:
                                    _pick_64(planes, to + j, x, come + j * step, picks, keep, iw * BYTES, pad_code)
                                else:
                                    _pick_256(planes, to + j, x, come + j * step, picks, keep, iw * BYTES, pad_code)
                                j += BYTES
                            if count > BYTES:
                                _pad_64(planes, to + count, pad_code)
                            i += together
                        _pad_64(planes, at + (n_rows - 1) * pitch[1] + count, pad_code)


@jit
def shuffled_block(
    x, x_strides, size, steps, padding, phases, pitch, pad_code, shifts, w, multiplier, table, pairs, bias, out,
    out_size, all_channels, band, rows, phase_size, image_range, channel_range
):  # fmt: skip
    """One task: some images, some channels, 16 at a time; see `sum_looked_up`.

    The images are one plane below each other, and the rows of it one run.
    """
    out_h, out_w = out_size
    taps = len(shifts)
    channel_size = len(phases[0]) * len(phases[1]) * phase_size
    planes = np.empty(LANES * channel_size, np.uint8)
    offsets, columns = np.empty(LANES, np.int64), np.empty((len(phases[1]), 5), np.int64)
    picks, keep = np.empty(len(columns) * BYTES, np.uint8), np.empty(len(columns) * BYTES, np.uint8)
    stride_image, stride_c, stride_h, stride_w = x_strides
    _columns_of(
        size[1], steps[1], stride_w, padding[1], phases[1], pitch[1], steps[0] * stride_h, columns, picks, keep
    )  # fmt: skip
    entries = np.empty(taps, np.int64)
    acc = np.empty(((band - 1) * pitch[1] + out_w + RUN - 1) // RUN * RUN + LANES, np.int32)
    acc = acc[-acc.ctypes.data % BYTES // 4 :]  # stores across cache lines take twice as long
    images = image_range[1] - image_range[0]
    all_rows = (images - 1) * pitch[0] + out_h
    for first_channel in range(channel_range[0], channel_range[1], LANES):
        channels = min(LANES, channel_range[1] - first_channel)
        for first_row in range(0, all_rows, band):
            some_rows = min(band, all_rows - first_row)
            base = image_range[0] * stride_image + first_channel * stride_c
            if first_channel == channel_range[0] or all_rows > band:  # else the padding is where it was
                fill(planes, 0, channels * channel_size, pad_code)
            _fill_phases(
                planes, channel_size, phase_size, x, base, channels, (stride_image, stride_c, stride_h), first_row,
                some_rows + rows - band, images, size[0], steps[0], steps[1] * stride_w, padding[0], phases[0], columns,
                picks, keep, pitch, pad_code, offsets
            )  # fmt: skip
            for lane in range(first_channel * multiplier, (first_channel + channels) * multiplier):
                start = (lane // multiplier - first_channel) * channel_size
                for pair in range(pairs):
                    for tap in range(taps):
                        entries[tap] = (np.int64(w[lane * taps + tap]) * pairs + pair) * 2 * CODES
                    for tap in range(0, taps, MAX_TAPS):
                        for j in range(0, (some_rows - 1) * pitch[1] + out_w, RUN):
                            sum_looked_up(
                                acc, j, planes, start + j, shifts, table, entries, tap, min(tap + MAX_TAPS, taps),
                                pair == 0 and tap == 0, bias, np.int32(16 * pair)
                            )  # fmt: skip
                for image in range(images):
                    at = ((image_range[0] + image) * all_channels * multiplier + lane) * out_h * out_w
                    above = image * pitch[0] - first_row
                    for row in range(max(0, -above), min(out_h, some_rows - above)):
                        copy(out, at + row * out_w, acc, (above + row) * pitch[1], out_w)


def _phases(taps: int, stride: int, dilation: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The phases of a stride that taps see, and of each tap the index of its phase and its shift there."""
    places = [divmod(tap * dilation, stride) for tap in range(taps)]
    phases = sorted({phase for _, phase in places})
    return phases, [(phases.index(phase), shift) for shift, phase in places]


def plan(
    x: Tensor, w: Tensor, table: Tensor, geometry: Sequence[int], pad_code: int, y: Tensor
) -> tuple[Any, tuple[Any, ...], int] | None:
    """The block to run, its arguments but its ranges, a worker's bytes of scratch; None where phases are too many."""
    _, channels, *size = x.shape
    kernel, stride, padding, dilation = w.shape[2:], geometry[:2], geometry[2:4], geometry[4:]
    known = planes_of_columns(table)
    pitch = [-(-(pad + n) // step) for pad, n, step in zip(padding, size, stride, strict=True)]
    (phases_h, rows), (phases_w, cols) = (_phases(*axis) for axis in zip(kernel, stride, dilation, strict=True))
    out_h, out_w = y.shape[2:]
    phases = len(phases_h) * len(phases_w)
    band = max(1, min(BAND, 4 * BAND // phases) // pitch[1])
    more = max(shift for _, shift in rows)
    run = -(-((band - 1) * pitch[1] + out_w) // RUN) * RUN
    seen = run + more * pitch[1] + max(shift for _, shift in cols)
    phase = max(seen, (band + more) * pitch[1]) + BYTES
    shifts = [(ih * len(phases_w) + iw) * phase + row * pitch[1] + col for ih, row in rows for iw, col in cols]
    worker_bytes = LANES * phases * phase + 4 * (run + LANES)
    if worker_bytes > MAX_WORKER:
        return None
    arguments = (
        flat(x),
        x.stride(),
        tuple(size),
        tuple(stride),
        tuple(padding),
        (np.array(phases_h), np.array(phases_w)),
        tuple(pitch),
        np.uint8(pad_code),
        np.array(shifts),
        w.contiguous().view(-1).numpy(),
        y.shape[1] // channels,
        known.planes,
        known.count // 2,
        np.int32(len(shifts) * known.low),
        y.view(-1).numpy(),
        (out_h, out_w),
        channels,
        band,
        band + more,
        phase,
    )
    return shuffled_block, arguments, worker_bytes
