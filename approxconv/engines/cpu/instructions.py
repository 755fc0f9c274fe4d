"""Dot products of bytes: what the CPU has for them, as Numba intrinsics with one code for each instruction set.

A *path* is a type: kernels take an instance as an argument, so that each is compiled, and cached, for each path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .vectors import LANES, data_of, i32, i64, vector_at

i8, i16 = ir.IntType(8), ir.IntType(16)
QUAD = 4  # products that an instruction adds to a sum
BYTES = LANES * QUAD


class Vbmi512(NamedTuple):
    """AVX-512 with VNNI (``vpdpbusd``) and VBMI (``vpermi2b``)."""

    width = 16  # sums a register
    permutes = True
    rows = (14, 12, 8, 6)  # of a tile of 1, 2, … vectors of 16 lanes, whose sums stay in registers


class Vnni512(NamedTuple):
    """AVX-512 with VNNI."""

    width = 16
    permutes = False
    rows = Vbmi512.rows


class Vnni256(NamedTuple):
    """``vpdpbusd`` of 256 bits, and 16 registers."""

    width = 8
    permutes = False
    rows = (6,)


class Generic(NamedTuple):
    """Any CPU: LLVM's own vectors."""

    width = 16
    permutes = False
    rows = (4,)


PATHS = {"avx512_vbmi": Vbmi512(), "avx512_vnni": Vnni512(), "avx_vnni": Vnni256(), "generic": Generic()}
_VNNI = {"avx512vnni", "avx512bw"}
_NEEDS: dict[str, tuple[set[str], ...]] = {
    "avx512_vbmi": (_VNNI | {"avx512vbmi"},),
    "avx512_vnni": (_VNNI,),
    "avx_vnni": ({"avxvnni"}, {"avx512vnni", "avx512vl"}),
    "generic": (set(),),
}


def compiles(name: str) -> bool:
    """Whether Numba compiles for a CPU with the instructions of path `name`."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    return any(needed <= enabled for needed in _NEEDS[name])


def _declared(builder: Any, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _add_dots(builder: Any, path: types.Type, sums: Any, u: Any, v: Any) -> Any:
    """``sums[i] + Σ_{t<4} u[4i + t]·v[4i + t]``, u unsigned and v signed bytes; wraps, never saturates."""
    width = path.instance_class.width
    if path.instance_class is not Generic:
        bits = 32 * width
        dot = _declared(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", sums.type, [sums.type, u.type, v.type])
        return builder.call(dot, [sums, u, v])
    words = ir.VectorType(i16, BYTES)
    u, v = builder.zext(u, words), builder.sext(v, words)
    quads = ir.VectorType(i32, LANES)
    for first in (0, 2):  # LLVM knows a sum of two such products as vpmaddwd
        products = []
        for t in (first, first + 1):
            picks = ir.Constant(ir.VectorType(i32, LANES), [QUAD * lane + t for lane in range(LANES)])
            of_u, of_v = (builder.sext(builder.shuffle_vector(of, of, picks), quads) for of in (u, v))
            products.append(builder.mul(of_u, of_v))
        sums = builder.add(sums, builder.add(*products))
    return sums


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, i32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))


def _dot_tile(vectors: int) -> Any:
    """Intrinsic: add the dot products of some rows' features and 16·`vectors` lanes' weights to a tile of sums.

    ``acc[at + (m·vectors + n)·16 + lane] = begin[start + m·stride + 16·n + lane] + more[row + m] + Σ u·v`` for as many
    rows m as the path keeps in registers. Row m's features begin at ``rows[row + m]`` plus the offset of a piece; piece i is ``(offset, count of quads)``. The weights of all
    pieces are one run from `weight` on, ``[quad][n][lane][4]``.
    """

    @intrinsic
    def dot_tile(
        _: Any, path: Any, acc: Any, at: Any, begin: Any, start: Any, stride: Any, more: Any, features: Any, rows: Any,
        row: Any, pieces: Any, first: Any, last: Any, weights: Any, weight: Any,
    ) -> Any:  # fmt: skip
        integer = types.int64
        signature = types.void(
            path, acc, integer, begin, integer, integer, more, features, rows, integer, pieces, integer, integer,
            weights, integer
        )  # fmt: skip

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            width = path.instance_class.width
            if vectors > len(path.instance_class.rows):
                return context.get_dummy_value()
            height, parts = path.instance_class.rows[vectors - 1], vectors * LANES // width
            sum_type, byte_type = ir.VectorType(i32, width), ir.VectorType(i8, QUAD * width)
            acc_at, begin_at, more_at, features_at, rows_at, pieces_at, weights_at = (
                data_of(context, builder, sig.args[i], args[i]) for i in (1, 3, 6, 7, 8, 10, 13)
            )
            acc_at, begin_at = builder.gep(acc_at, [args[2]]), builder.gep(begin_at, [args[4]])
            more_at, rows_at = builder.gep(more_at, [args[9]]), builder.gep(rows_at, [args[9]])
            starts = [builder.gep(features_at, [builder.load(builder.gep(rows_at, [i64(m)]))]) for m in range(height)]
            places = [
                [
                    vector_at(builder, builder.gep(acc_at, [i64((m * parts + n) * width)]), sum_type)
                    for n in range(parts)
                ]
                for m in range(height)
            ]
            sums = [[cgutils.alloca_once(builder, sum_type) for _ in range(parts)] for _ in range(height)]
            for m in range(height):
                added = _splat(builder, builder.load(builder.gep(more_at, [i64(m)])), width)
                row_at = builder.gep(begin_at, [builder.mul(args[5], i64(m))])
                for n in range(parts):
                    come = vector_at(builder, builder.gep(row_at, [i64(n * width)]), sum_type)
                    builder.store(builder.add(builder.load(come, align=4), added), sums[m][n])
            weight_at = cgutils.alloca_once_value(builder, builder.gep(weights_at, [args[14]]))
            with cgutils.for_range_slice(builder, args[11], args[12], i64(1)) as (piece, _):
                piece_at = builder.gep(pieces_at, [builder.mul(piece, i64(2))])
                offset, count = builder.load(piece_at), builder.load(builder.gep(piece_at, [i64(1)]))
                froms = [builder.gep(start, [offset]) for start in starts]
                run = builder.load(weight_at)
                with cgutils.for_range(builder, count) as loop:
                    quad = builder.mul(loop.index, i64(QUAD))
                    here = builder.gep(run, [builder.mul(loop.index, i64(vectors * BYTES))])
                    v = []
                    for n in range(parts):
                        come = vector_at(builder, builder.gep(here, [i64(n * QUAD * width)]), byte_type)
                        v.append(builder.load(come, align=1))
                    for m in range(height):
                        four = builder.load(builder.bitcast(builder.gep(froms[m], [quad]), i32.as_pointer()), align=1)
                        u = builder.bitcast(_splat(builder, four, width), byte_type)
                        for n in range(parts):
                            builder.store(_add_dots(builder, path, builder.load(sums[m][n]), u, v[n]), sums[m][n])
                builder.store(builder.gep(run, [builder.mul(count, i64(vectors * BYTES))]), weight_at)
            for m in range(height):
                for n in range(parts):
                    builder.store(builder.load(sums[m][n]), places[m][n], align=4)
            return context.get_dummy_value()

        return signature, codegen

    return dot_tile


dot_tile_1, dot_tile_2, dot_tile_3, dot_tile_4 = (_dot_tile(n) for n in (1, 2, 3, 4))


def _look_up_by_permuting(builder: Any, table_at: Any, find: Any, count: Any) -> None:
    bytes_type = ir.VectorType(i8, BYTES)
    quarters = [
        builder.load(vector_at(builder, builder.gep(table_at, [i64(i * BYTES)]), bytes_type), align=1) for i in range(4)
    ]
    permute = _declared(builder, "llvm.x86.avx512.vpermi2var.qi.512", bytes_type, [bytes_type] * 3)
    with cgutils.for_range(builder, count) as loop:
        source, target = find(loop.index)
        codes = builder.load(vector_at(builder, source, bytes_type), align=1)
        low, high = (builder.call(permute, [quarters[i], codes, quarters[i + 1]]) for i in (0, 2))
        in_high = builder.icmp_signed("<", codes, ir.Constant(bytes_type, [0] * BYTES))
        builder.store(builder.select(in_high, high, low), vector_at(builder, target, bytes_type), align=1)


def _look_up_one_by_one(builder: Any, table_at: Any, find: Any, count: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        source, target = find(loop.index)
        for i in range(BYTES):
            code = builder.load(builder.gep(source, [i64(i)]))
            found = builder.load(builder.gep(table_at, [builder.zext(code, i64)]))
            builder.store(found, builder.gep(target, [i64(i)]))


@intrinsic
def look_up(
    _: Any, path: Any, target: Any, at: Any, step: Any, table: Any, row: Any, source: Any, start: Any, count: Any
) -> Any:
    """``target[at + i·step + j] = table[row + source[start + 64i + j]]`` for j < 64, i < count, on flat byte arrays."""
    integer = types.int64
    signature = types.void(path, target, integer, integer, table, integer, source, integer, integer)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target_at = builder.gep(data_of(context, builder, sig.args[1], args[1]), [args[2]])
        table_at = builder.gep(data_of(context, builder, sig.args[4], args[4]), [args[5]])
        source_at = builder.gep(data_of(context, builder, sig.args[6], args[6]), [args[7]])

        def find(i: Any) -> tuple[Any, Any]:
            return (
                builder.gep(source_at, [builder.mul(i, i64(BYTES))]),
                builder.gep(target_at, [builder.mul(i, args[3])]),
            )

        by = _look_up_by_permuting if path.instance_class.permutes else _look_up_one_by_one
        by(builder, table_at, find, args[8])
        return context.get_dummy_value()

    return signature, codegen


def _zipped(builder: Any, a: Any, b: Any) -> Any:
    picks = [pick for i in range(a.type.count) for pick in (i, a.type.count + i)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(picks)), picks))


def _quads(builder: Any, rows: Sequence[Any]) -> Any:
    """Four vectors of 16 bytes as 16 times four."""
    return _zipped(builder, _zipped(builder, rows[0], rows[2]), _zipped(builder, rows[1], rows[3]))


@intrinsic
def interleave(_: Any, target: Any, at: Any, source: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """``target[at + 4j + t] = source[<t-th place> + j]`` for j < 16, on flat byte arrays."""
    integer = types.int64
    signature = types.void(target, integer, source, integer, integer, integer, integer)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(i8, LANES)
        source_at = data_of(context, builder, sig.args[2], args[2])
        rows = [
            builder.load(vector_at(builder, builder.gep(source_at, [place]), vector), align=1) for place in args[3:]
        ]
        quads = _quads(builder, rows)
        to = builder.gep(data_of(context, builder, sig.args[0], args[0]), [args[1]])
        builder.store(quads, vector_at(builder, to, quads.type), align=1)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def spread(
    _: Any, path: Any, target: Any, at: Any, source: Any, start: Any, begins: Any, places: Any, first: Any, count: Any,
    pad: Any,
) -> Any:  # fmt: skip
    """``target[at + 64i + j] = source[start + begins[first + i] + places[first + i][j]]``, or `pad` where that is 128.

    For j < 64, i < count, places below 64; only a path that permutes does it. 64 bytes from each begin are read.
    """
    integer = types.int64
    signature = types.void(path, target, integer, source, integer, begins, places, integer, integer, types.uint8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not path.instance_class.permutes:
            return context.get_dummy_value()
        bytes_type = ir.VectorType(i8, BYTES)
        permute = _declared(builder, "llvm.x86.avx512.permvar.qi.512", bytes_type, [bytes_type] * 2)
        target_at = builder.gep(data_of(context, builder, sig.args[1], args[1]), [args[2]])
        source_at = builder.gep(data_of(context, builder, sig.args[3], args[3]), [args[4]])
        begins_at = builder.gep(data_of(context, builder, sig.args[5], args[5]), [args[7]])
        places_at = data_of(context, builder, sig.args[6], args[6])
        places_at = builder.gep(places_at, [builder.mul(args[7], i64(BYTES))])
        pads = _splat(builder, args[9], BYTES)
        with cgutils.for_range(builder, args[8]) as loop:
            far = builder.mul(loop.index, i64(BYTES))
            come = builder.gep(source_at, [builder.load(builder.gep(begins_at, [loop.index]))])
            places_here = builder.load(vector_at(builder, builder.gep(places_at, [far]), bytes_type), align=1)
            found = builder.call(permute, [builder.load(vector_at(builder, come, bytes_type), align=1), places_here])
            padded = builder.icmp_signed("<", places_here, ir.Constant(bytes_type, [0] * BYTES))
            to = vector_at(builder, builder.gep(target_at, [far]), bytes_type)
            builder.store(builder.select(padded, pads, found), to, align=1)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_quads(_: Any, path: Any, sums: Any, source: Any, start: Any, count: Any) -> Any:
    """``sums[j] += Σ_{i<count} Σ_{t<4} source[start + 64i + 4j + t]`` for j < 16: unsigned bytes to int32 sums."""
    signature = types.void(path, sums, source, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        width = path.instance_class.width
        sum_type, byte_type = ir.VectorType(i32, width), ir.VectorType(i8, QUAD * width)
        ones = ir.Constant(byte_type, [1] * (QUAD * width))
        sums_at = data_of(context, builder, sig.args[1], args[1])
        source_at = builder.gep(data_of(context, builder, sig.args[2], args[2]), [args[3]])
        for n in range(0, LANES, width):
            place = vector_at(builder, builder.gep(sums_at, [i64(n)]), sum_type)
            total = cgutils.alloca_once_value(builder, builder.load(place, align=4))
            with cgutils.for_range(builder, args[4]) as loop:
                at = builder.add(builder.mul(loop.index, i64(BYTES)), i64(QUAD * n))
                quads = builder.load(vector_at(builder, builder.gep(source_at, [at]), byte_type), align=1)
                builder.store(_add_dots(builder, path, builder.load(total), quads, ones), total)
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return signature, codegen


STRIPS = 4


def _dot_strips(step: int) -> Any:
    """Intrinsic: sums of pixels' taps, four strips of 16 pixels at a time.

    ``acc[at + i·acc_stride + j] = scale·acc[…] + start + Σ_piece Σ_{t<4} features[from + i·stride + offsets[piece] +
    step·j + t·dilation]·weights[weight + piece][t]`` for strips i and pixels j. A path that permutes takes any step, from
    `pattern`: the places of the 64 bytes in the 64 that follow.
    """

    @intrinsic
    def dot_strips(
        _: Any, path: Any, acc: Any, at: Any, acc_stride: Any, scale: Any, start: Any, features: Any, begin: Any,
        stride: Any, dilation: Any, pattern: Any, offsets: Any, weights: Any, weight: Any, first: Any, last: Any,
    ) -> Any:  # fmt: skip
        integer = types.int64
        signature = types.void(
            path, acc, integer, integer, types.int32, types.int32, features, integer, integer, integer, pattern,
            offsets, weights, integer, integer, integer
        )  # fmt: skip

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            permutes, width = path.instance_class.permutes, path.instance_class.width
            if permutes and step > 1:
                return context.get_dummy_value()
            quad_type, sum_type = ir.VectorType(i8, BYTES), ir.VectorType(i32, width)
            acc_at, features_at, pattern_at, offsets_at, weights_at = (
                data_of(context, builder, sig.args[i], args[i]) for i in (1, 6, 10, 11, 12)
            )
            if permutes:
                permute = _declared(builder, "llvm.x86.avx512.permvar.qi.512", quad_type, [quad_type] * 2)
                places = builder.load(vector_at(builder, pattern_at, quad_type), align=1)

            def window(come: Any) -> Any:
                if permutes:
                    return builder.call(permute, [builder.load(vector_at(builder, come, quad_type), align=1), places])
                rows, long = [], ir.VectorType(i8, LANES * step)
                for t in range(QUAD):
                    tap = vector_at(builder, builder.gep(come, [builder.mul(args[9], i64(t))]), long)
                    row = builder.load(tap, align=1)
                    picks = ir.Constant(ir.VectorType(i32, LANES), [step * j for j in range(LANES)])
                    rows.append(builder.shuffle_vector(row, row, picks))
                return _quads(builder, rows)

            def part(vector: Any, n: int) -> Any:
                picks = list(range(n * QUAD * width, (n + 1) * QUAD * width))
                return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, len(picks)), picks))

            froms = [
                builder.gep(features_at, [builder.add(args[7], builder.mul(args[8], i64(i)))]) for i in range(STRIPS)
            ]
            targets = [
                [
                    vector_at(
                        builder,
                        builder.gep(acc_at, [builder.add(args[2], builder.add(builder.mul(args[3], i64(i)), i64(n)))]),
                        sum_type,
                    )
                    for n in range(0, LANES, width)
                ]
                for i in range(STRIPS)
            ]
            scale_value, start_value = (_splat(builder, args[i], width) for i in (4, 5))
            sums = [[cgutils.alloca_once(builder, sum_type) for _ in target] for target in targets]
            for i in range(STRIPS):
                for n, target in enumerate(targets[i]):
                    scaled = builder.mul(builder.load(target, align=4), scale_value)
                    builder.store(builder.add(scaled, start_value), sums[i][n])
            with cgutils.for_range_slice(builder, args[14], args[15], i64(1)) as (piece, _):
                offset = builder.load(builder.gep(offsets_at, [piece]))
                four = builder.load(builder.gep(weights_at, [builder.add(args[13], piece)]))
                v = builder.bitcast(_splat(builder, four, width), ir.VectorType(i8, QUAD * width))
                for i in range(STRIPS):
                    u = window(builder.gep(froms[i], [offset]))
                    for n, each in enumerate(sums[i]):
                        builder.store(_add_dots(builder, path, builder.load(each), part(u, n), v), each)
            for i in range(STRIPS):
                for n, target in enumerate(targets[i]):
                    builder.store(builder.load(sums[i][n]), target, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return dot_strips


dot_strips, dot_strips_apart = _dot_strips(1), _dot_strips(2)
