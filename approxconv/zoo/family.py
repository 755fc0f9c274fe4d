"""What the multiplier families share: parameter checks, names and signed operands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from string import Formatter
from typing import TypeVar

import numpy as np

from ..multiplier import MAX_BITS, MAX_FUNCTION_BITS, MIN_BITS, Multiplier
from ..wide import WideMultiplier

T = TypeVar("T")

_NUMBER = "0|[1-9][0-9]{0,2}"
_FORMATS = f"_(?P<a_bits>{_NUMBER})(?P<a_sign>[us])(?:_(?P<w_bits>{_NUMBER})(?P<w_sign>[us]))?"
_SIGNEDNESS = ((False, False), (True, True), (False, True), (True, False))


def leading_one(x: np.ndarray) -> np.ndarray:
    """Position of the most significant one bit, ``⌊log2 x⌋``; −1 for 0.

    Parameters
    ----------
    x : numpy.ndarray
        Integers from 0 to 2**53 − 1.
    """
    return np.frexp(x)[1].astype(np.int64) - 1


def _choices(values: Sequence[int]) -> str:
    if isinstance(values, range) and values.step == 1 and len(values) > 1:
        return f"an int from {values[0]} to {values[-1]}"
    return f"an int: {' or '.join(str(v) for v in values)}"


def _check(name: str, value: object, wanted: Sequence[int]) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value not in wanted:
        raise ValueError(f"{name} must be {_choices(wanted)}, got {value!r}")
    return int(value)


def choose(name: str, value: object, families: Mapping[str, Family]) -> Family:
    """The family that `value` names, or a ValueError that says which there are."""
    if not isinstance(value, str) or value not in families:
        raise ValueError(f"{name} must be {' or '.join(map(repr, families))}, got {value!r}")
    return families[value]


def _no_parameters(bits: int) -> Mapping[str, range]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family of multipliers: its arithmetic, its parameters and its names.

    Where the arithmetic is that of unsigned operands, a signed one enters by its magnitude and its sign is put back on
    the product, with sign(0) = 0: ``sign(a)·sign(w)·f(|a|, |w|)``, without the sign of an operand that is unsigned.
    Magnitudes reach 2**(bits-1), so the unsigned circuit of the same width takes them all.

    Attributes
    ----------
    stem : str
        The name up to the operand formats, a replacement field per parameter: ``"bam_h{h}_v{v}"``.
    unsigned : callable, optional
        ``unsigned(a, w, **parameters)`` takes int64 arrays of values ≥ 0 and returns their approximate products.
    ranges : callable
        ``ranges(bits)`` returns the values each parameter can have at that width, by name.
    widths : sequence of int
        The widths of tables.
    wide : sequence of int
        The widths beyond that the circuit has as a function.
    native : callable, optional
        Called in place of `unsigned`, with the operands' values as they are, negative ones among them.
    by_width : bool
        Whether the circuit depends on the operands' width, so that the callable takes it too, as ``bits``.
    signed_only : bool
        Whether both operands must be signed.
    listed : callable, optional
        ``listed(bits)`` returns the parameter values that `names` goes through, where `ranges` holds too many.
    """

    stem: str
    unsigned: Callable[..., np.ndarray] | None = None
    ranges: Callable[[int], Mapping[str, range]] = _no_parameters
    widths: Sequence[int] = range(MIN_BITS, MAX_BITS + 1)
    wide: Sequence[int] = range(MAX_BITS + 1, MAX_FUNCTION_BITS + 1)
    native: Callable[..., np.ndarray] | None = None
    by_width: bool = False
    signed_only: bool = False
    listed: Callable[[int], Mapping[str, Sequence[int]]] | None = None

    def build(self, bits: int, a_signed: bool, w_signed: bool, **parameters: int) -> Multiplier:
        """Tabulate one member of the family.

        Raises
        ------
        ValueError
            A width or a parameter out of its range or of a wrong type, or a signedness the family does not have.
        """
        bits, parameters, circuit = self._circuit(bits, self.widths, a_signed, w_signed, parameters)
        multiplier = Multiplier.from_function(circuit, bits=bits, a_signed=a_signed, w_signed=w_signed)
        multiplier.name = self._name(bits, a_signed, w_signed, parameters)
        return multiplier

    def build_wide(self, bits: int, a_signed: bool, w_signed: bool, **parameters: int) -> WideMultiplier:
        """Like `build`, as a function of operand values, at the widths in `wide` too."""
        bits, parameters, circuit = self._circuit(bits, (*self.widths, *self.wide), a_signed, w_signed, parameters)
        name = self._name(bits, a_signed, w_signed, parameters)
        return WideMultiplier(circuit, bits=bits, a_signed=a_signed, w_signed=w_signed, name=name)

    def _circuit(
        self, bits: int, widths: Sequence[int], a_signed: bool, w_signed: bool, parameters: Mapping[str, int]
    ) -> tuple[int, dict[str, int], Callable[[np.ndarray, np.ndarray], np.ndarray]]:
        """The checked width and parameters, and the function of the operands' values."""
        bits = _check("bits", bits, widths)
        parameters = {name: _check(name, parameters[name], wanted) for name, wanted in self.ranges(bits).items()}
        if self.signed_only and not (a_signed and w_signed):
            raise ValueError(f"this family is signed only, got a_signed={a_signed!r}, w_signed={w_signed!r}")
        arguments = {**parameters, "bits": bits} if self.by_width else parameters

        def circuit(a: np.ndarray, w: np.ndarray) -> np.ndarray:
            if self.native is not None:
                return self.native(a, w, **arguments)
            products = self.unsigned(np.abs(a), np.abs(w), **arguments)
            for operand, signed in ((a, a_signed), (w, w_signed)):
                if signed:
                    products = products * np.sign(operand)
            return products

        return bits, parameters, circuit

    def from_name(self, name: str) -> Multiplier | None:
        """Build the member called `name`; None if no member of this family could be called so.

        Raises
        ------
        ValueError
            The name is well formed but asks for a width, a parameter or a signedness that the family does not have.
        """
        return self._from_name(name, self.build)

    def wide_from_name(self, name: str) -> WideMultiplier | None:
        """Like `from_name`, by `build_wide`."""
        return self._from_name(name, self.build_wide)

    def _from_name(self, name: str, build: Callable[..., T]) -> T | None:
        match = re.fullmatch(self._pattern(), name)
        if match is None:
            return None
        fields = match.groupdict()
        a_format = fields.pop("a_bits"), fields.pop("a_sign")
        w_format = fields.pop("w_bits"), fields.pop("w_sign")
        if w_format == a_format:
            return None
        if w_format == (None, None):
            w_format = a_format
        try:
            if a_format[0] != w_format[0]:
                raise ValueError(f"both operands must have the same width, got {a_format[0]} and {w_format[0]} bits")
            parameters = {key: int(value) for key, value in fields.items()}
            return build(int(a_format[0]), a_format[1] == "s", w_format[1] == "s", **parameters)
        except ValueError as error:
            raise ValueError(f"no multiplier {name!r}: {error}") from None

    def names(self) -> Iterator[str]:
        """Every name of a table that `from_name` takes; of a family with `listed`, those of the listed values only."""
        for bits in self.widths:
            ranges = (self.listed or self.ranges)(bits)
            for values in product(*ranges.values()):
                parameters = dict(zip(ranges, values, strict=True))
                for a_signed, w_signed in _SIGNEDNESS[1:2] if self.signed_only else _SIGNEDNESS:
                    yield self._name(bits, a_signed, w_signed, parameters)

    def _name(self, bits: int, a_signed: bool, w_signed: bool, parameters: Mapping[str, int]) -> str:
        a_format, w_format = (f"_{bits}{'s' if signed else 'u'}" for signed in (a_signed, w_signed))
        return self.stem.format(**parameters) + a_format + ("" if a_format == w_format else w_format)

    def _pattern(self) -> str:
        parts = Formatter().parse(self.stem)
        return (
            "".join(re.escape(text) + (f"(?P<{field}>{_NUMBER})" if field else "") for text, field, _, _ in parts)
            + _FORMATS
        )
