"""C's integer arithmetic on whole NumPy arrays: promotions, conversions, wrap-around, as gcc and clang do on LP64.

A value is held as any integers congruent to it modulo 2**bits of its type, in the narrowest dtype that their known
range allows: a gate-level circuit then works on arrays of single bytes although C computes in int or uint64_t, and
``~x`` of a uint64_t bit stays a byte. What depends on more than the low bits (shifts to the right, comparisons,
widening of unsigned values) makes the integers exact first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_DTYPES = [np.dtype(f"{kind}{size}") for size in (1, 2, 4, 8) for kind in ("i", "u")]
_RANGES = [(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max), dtype) for dtype in _DTYPES]
_MODULAR = np.dtype("u8")


class UndefinedError(Exception):
    """What C leaves undefined."""


class CType(NamedTuple):
    """An integer type: width in bits, signedness and conversion rank; _Bool has rank 0."""

    bits: int
    signed: bool
    rank: int

    @property
    def low(self) -> int:
        """Smallest value."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest value."""
        return (1 << self.bits - self.signed) - 1

    @property
    def dtype(self) -> np.dtype:
        """The NumPy type of this width and signedness."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits // 8}")

    def wrap(self, value: int) -> int:
        """The value of this type congruent to `value`."""
        low = value & (1 << self.bits) - 1
        return low - (1 << self.bits) if self.signed and low >> self.bits - 1 else low


BOOL = CType(8, False, 0)
INT = CType(32, True, 3)
_UNSIGNED_INT = CType(32, False, 3)
LONG = CType(64, True, 4)


@dataclass(slots=True)
class Value:
    """An expression's value over all lanes: integers from `low` to `high`; a constant has no array."""

    type: CType
    low: int
    high: int
    array: np.ndarray | None = None

    def held_as(self, dtype: np.dtype) -> np.ndarray:
        """The integers in `dtype`, modulo its width."""
        if self.array is None:
            return np.array(self.low % 2**64, _MODULAR).astype(dtype)
        return self.array.astype(dtype, copy=False)

    def exact(self) -> Value:
        """The same value, held by the integers themselves instead of by congruent ones."""
        if self.low >= self.type.low and self.high <= self.type.high:
            return self
        if self.array is None:
            return constant(self.type, self.low)
        return Value(self.type, self.type.low, self.type.high, self.array.astype(self.type.dtype))


def constant(type_: CType, value: int) -> Value:
    """A constant, wrapped to its type."""
    value = type_.wrap(value)
    return Value(type_, value, value)


def lanes(array: np.ndarray, low: int, high: int) -> Value:
    """A long per lane, all from `low` to `high`."""
    return Value(LONG, low, high, array.astype(_narrowest(low, high)))


def convert(value: Value, type_: CType) -> Value:
    """``(type_)value``."""
    if type_.rank == 0:
        if value.type.rank == 0:
            return value
        if value.array is None:
            return constant(BOOL, value.low != 0)
        return _compute(BOOL, 0, 1, np.not_equal, value, constant(INT, 0))
    if type_.bits > value.type.bits:
        value = value.exact()
    return _reduce(type_, value.low, value.high, value.array)


def _narrowest(low: int, high: int) -> np.dtype | None:
    for least, greatest, dtype in _RANGES:
        if least <= low and high <= greatest:
            return dtype
    return None


def _reduce(type_: CType, low: int, high: int, array: np.ndarray | None) -> Value:
    """Hold integers as a value of `type_`, cut to its width where they pass it."""
    if array is None:
        return constant(type_, low)
    if low >= -(1 << type_.bits - 1) and high <= type_.high:
        return Value(type_, low, high, array)
    return Value(type_, type_.low, type_.high, array.astype(type_.dtype))


def _compute(type_: CType, low: int, high: int, ufunc: Callable[..., np.ndarray], *operands: Value) -> Value:
    """Apply `ufunc`, whose results are from `low` to `high`; modulo 2**64 where no dtype holds operands and results."""
    if low == high:
        return constant(type_, low)
    dtype = _narrowest(min(low, *(o.low for o in operands)), max(high, *(o.high for o in operands)))
    result = ufunc(*(o.held_as(dtype or _MODULAR) for o in operands))
    if result.dtype == np.bool_:
        return Value(type_, low, high, result.view(np.uint8))
    if dtype is None:
        return _reduce(type_, 0, 2**64 - 1, result)
    return _reduce(type_, low, high, result.astype(_narrowest(low, high), copy=False))


def promoted(type_: CType) -> CType:
    """The type after integer promotion."""
    return INT if type_.rank < INT.rank else type_


def common(left: CType, right: CType) -> CType:
    """The type of the usual arithmetic conversions."""
    left, right = promoted(left), promoted(right)
    if left.rank == right.rank:
        return CType(left.bits, left.signed and right.signed, left.rank)
    wide, narrow = (left, right) if left.rank > right.rank else (right, left)
    keeps_sign = wide.signed and (narrow.signed or wide.bits > narrow.bits)
    return CType(wide.bits, keeps_sign, wide.rank)


def _power_above(*bounds: int) -> int:
    return 1 << max((b if b >= 0 else ~b).bit_length() for b in bounds)


def _and_range(a: Value, b: Value) -> tuple[int, int]:
    if a.low >= 0 and b.low >= 0:
        return 0, min(a.high, b.high)
    if a.low >= 0 or b.low >= 0:
        return 0, a.high if a.low >= 0 else b.high
    return -_power_above(a.low, b.low), max(a.high, b.high)


def _or_range(a: Value, b: Value) -> tuple[int, int]:
    power = _power_above(a.low, a.high, b.low, b.high)
    return (0 if a.low >= 0 and b.low >= 0 else -power), power - 1


def _product_range(a: Value, b: Value) -> tuple[int, int]:
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(corners), max(corners)


_BINARY: dict[str, tuple[Callable[[Value, Value], tuple[int, int]], Callable[..., np.ndarray], Callable]] = {
    "+": (lambda a, b: (a.low + b.low, a.high + b.high), np.add, operator.add),
    "-": (lambda a, b: (a.low - b.high, a.high - b.low), np.subtract, operator.sub),
    "*": (_product_range, np.multiply, operator.mul),
    "&": (_and_range, np.bitwise_and, operator.and_),
    "|": (_or_range, np.bitwise_or, operator.or_),
    "^": (_or_range, np.bitwise_xor, operator.xor),
}
_COMPARISONS: dict[str, tuple[Callable[..., np.ndarray], Callable[[int, int], bool]]] = {
    "==": (np.equal, operator.eq),
    "!=": (np.not_equal, operator.ne),
    "<": (np.less, operator.lt),
    "<=": (np.less_equal, operator.le),
    ">": (np.greater, operator.gt),
    ">=": (np.greater_equal, operator.ge),
}
BINARY_OPERATORS = (*_BINARY, "<<", ">>", *_COMPARISONS, "&&", "||")
UNARY_OPERATORS = ("~", "-", "+", "!")


def binary(symbol: str, a: Value, b: Value) -> Value:
    """``a symbol b``, for the symbols in `BINARY_OPERATORS`; signed overflow wraps.

    Raises
    ------
    UndefinedError
        A shift by a negative count, or by the width of the left operand or more.
    """
    if symbol in ("<<", ">>"):
        return _shift(symbol, a, b)
    if symbol in ("&&", "||"):
        return convert(binary("&" if symbol == "&&" else "|", convert(a, BOOL), convert(b, BOOL)), INT)
    type_ = common(a.type, b.type)
    a, b = convert(a, type_), convert(b, type_)
    if symbol in _COMPARISONS:
        ufunc, compare = _COMPARISONS[symbol]
        a, b = a.exact(), b.exact()
        if a.array is None and b.array is None:
            return constant(INT, compare(a.low, b.low))
        return _compute(INT, 0, 1, ufunc, a, b)
    range_of, ufunc, apply = _BINARY[symbol]
    if a.array is None and b.array is None:
        return constant(type_, apply(a.low, b.low))
    if symbol == "&" and (_covers(a, b) or _covers(b, a)):
        return b if _covers(a, b) else a
    low, high = range_of(a, b)
    return _compute(type_, low, high, ufunc, a, b)


def _covers(mask: Value, value: Value) -> bool:
    """Whether `mask` is a constant 0…01…1 that changes nothing of `value`."""
    return mask.array is None and value.low >= 0 and mask.low & mask.low + 1 == 0 and mask.low >= value.high


def _shift(symbol: str, a: Value, count: Value) -> Value:
    type_ = promoted(a.type)
    a, count = convert(a, type_), count.exact()
    least, most = count.low, count.high
    if count.array is not None and not 0 <= least <= most < type_.bits:
        least, most = int(count.array.min()), int(count.array.max())
    if not 0 <= least <= most < type_.bits:
        raise UndefinedError(f"a shift must be by 0 to {type_.bits - 1} bits, got {most if least >= 0 else least}")
    if most == 0:
        return a
    count = Value(count.type, least, most, count.array)
    if symbol == "<<":
        ends = [bound << by for bound in (a.low, a.high) for by in (least, most)]
        ufunc = np.left_shift
    else:
        a = a.exact()
        ends = [bound >> by for bound in (a.low, a.high) for by in (least, most)]
        ufunc = np.right_shift
    return _compute(type_, min(ends), max(ends), ufunc, a, count)


def unary(symbol: str, a: Value) -> Value:
    """``symbol a``, for the symbols in `UNARY_OPERATORS`."""
    if symbol == "!":
        return binary("==", a, constant(INT, 0))
    a = convert(a, promoted(a.type))
    if symbol == "~":
        return _compute(a.type, ~a.high, ~a.low, np.invert, a)
    if symbol == "-":
        return binary("-", constant(a.type, 0), a)
    return a


def ternary(condition: Value, a: Value, b: Value) -> Value:
    """``condition ? a : b``, both computed in every lane."""
    type_ = common(a.type, b.type)
    a, b, condition = convert(a, type_), convert(b, type_), convert(condition, BOOL)
    if condition.array is None:
        return a if condition.low else b
    chosen = condition.array.view(np.bool_)
    return _compute(type_, min(a.low, b.low), max(a.high, b.high), lambda x, y: np.where(chosen, x, y), a, b)
