"""What the kernels are made of: Numba with LLVM vectors of 16 lanes on flat arrays.

Written as vectors because Numba cannot promise that arrays do not overlap, without which LLVM neither keeps sums in a
register nor drops the checks from an innermost loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # of a vector: one 64-byte vector of int32 sums
CODES = 256


SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
).hexdigest()


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL, cached on disk where some cache folder is writable.

    Numba compiles a kernel anew when its own file changes. What it inlines may come from any other file of the engines.
    """
    try:
        kernel = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # Numba: "no locator available"
        return numba.njit(nogil=True)(function)
    with suppress(AttributeError):  # no public way is known
        file = kernel._cache._cache_file
        file._source_stamp = (file._source_stamp, SOURCES)
    return kernel


inline = numba.njit(nogil=True, forceinline=True)  # compiled into its callers, with which it is cached


i32, i64 = ir.IntType(32), ir.IntType(64)


def data_of(context: Any, builder: Any, array_type: types.Array, value: Any) -> Any:
    return context.make_array(array_type)(context, builder, value).data


def element_type(context: Any, array_type: types.Array) -> ir.Type:
    return context.get_data_type(array_type.dtype)


def vector_at(builder: Any, pointer: Any, vector: ir.VectorType) -> Any:
    return builder.bitcast(pointer, vector.as_pointer())


def add_vector(builder: Any, acc: Any, entries: Any) -> None:
    """Add 16 entries to the 16 sums at `acc`."""
    sum_type = ir.VectorType(i32, LANES)
    sums_at = vector_at(builder, acc, sum_type)
    widened = builder.sext(entries, sum_type) if entries.type != sum_type else entries
    builder.store(builder.add(builder.load(sums_at, align=4), widened), sums_at, align=4)


def transpose_network(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 vectors of 16: interleaving halves log2(16) times transposes."""
    half = LANES // 2
    for _round in range(4):
        zipped = []
        for j in range(half):
            for start in (0, half):
                picks = [lane for k in range(start, start + half) for lane in (k, LANES + k)]
                mask = ir.Constant(ir.VectorType(i32, LANES), picks)
                zipped.append(builder.shuffle_vector(rows[j], rows[j + half], mask))
        rows = zipped
    return rows


@intrinsic
def transpose(_: Any, target: Any, at: Any, stride: Any, source: Any, offsets: Any, first: Any) -> Any:
    """``target[at + a·stride + j] = source[offsets[j] + first + a]`` for a, j < 16, on flat arrays of one dtype."""
    signature = types.void(target, types.int64, types.int64, source, offsets, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target_value, at_value, stride_value, source_value, offsets_value, first_value = args
        element = element_type(context, sig.args[0])
        size, vector = element.width // 8, ir.VectorType(element, LANES)
        target_at = builder.gep(data_of(context, builder, sig.args[0], target_value), [at_value])
        source_at = builder.gep(data_of(context, builder, sig.args[3], source_value), [first_value])
        offsets_at = data_of(context, builder, sig.args[4], offsets_value)
        rows = []
        for j in range(LANES):
            offset = builder.load(builder.gep(offsets_at, [i64(j)]))
            rows.append(builder.load(vector_at(builder, builder.gep(source_at, [offset]), vector), align=size))
        for a, column in enumerate(transpose_network(builder, rows)):
            to = builder.gep(target_at, [builder.mul(stride_value, i64(a))])
            builder.store(column, vector_at(builder, to, vector), align=size)
        return context.get_dummy_value()

    return signature, codegen


def _move(width: int) -> Any:
    """Intrinsic ``target[at : at + width] = source[start : start + width]`` on flat arrays of one dtype."""

    @intrinsic
    def move(_: Any, target: Any, at: Any, source: Any, start: Any) -> Any:
        signature = types.void(target, types.int64, source, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = element_type(context, sig.args[0])
            size, vector = element.width // 8, ir.VectorType(element, width)
            to = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
            come = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
            builder.store(
                builder.load(vector_at(builder, come, vector), align=size), vector_at(builder, to, vector), size
            )
            return context.get_dummy_value()

        return signature, codegen

    return move


_move_16, _move_8, _move_4, _move_1 = _move(16), _move(8), _move(4), _move(1)


@inline
def copy(target, at, source, start, count):
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
def fill(_: Any, target: Any, at: Any, count: Any, code: Any) -> Any:
    """``target[at : at + count] = code`` for bytes."""
    signature = types.void(target, types.int64, types.int64, types.uint8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        cgutils.memset(builder, to, args[2], args[3])
        return context.get_dummy_value()

    return signature, codegen
