"""What a file format is to the others, and how its files are read without trusting them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import numpy as np

from ..multiplier import MAX_BITS, MIN_BITS, Multiplier, operand_values
from .errors import FormatError

SIDES = [2**bits for bits in range(MIN_BITS, MAX_BITS + 1)]
_LEAST_LIKENESS, _LEAST_LEAD = 0.8, 0.05
ORDERS = ("activation_first", "weight_first")
_EVOAPPROX_NAME = re.compile(r"mul(?P<a>[0-9]{1,2})(?:x(?P<w>[0-9]{1,2}))?(?P<sign>[us])_")


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes
    ----------
    name : str
        For ``format=`` and messages.
    suffixes : tuple of str
        In lower case with their dot, the first being the usual one; several formats may share one.
    load : callable
        ``load(path, **options) -> Multiplier``; its keyword parameters are the options the format takes.
    recognise : callable
        ``recognise(head) -> bool``: whether a file that starts with these bytes (at most `HEAD`) may be of this format.
    save : callable, optional
        ``save(multiplier, path, **options)``, where the format can be written. It raises ValueError, before anything is
        written, for a multiplier that it cannot hold.
    """

    name: str
    suffixes: tuple[str, ...]
    load: Callable[..., Multiplier]
    recognise: Callable[[bytes], bool]
    save: Callable[..., None] | None = None

    HEAD = 2**16

    def options(self, function: Callable[..., object]) -> list[str]:
        """Names of the options that `load` or `save` takes."""
        return [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def require_file(path: Path) -> None:
    """Raise a FileNotFoundError unless `path` is a regular file; a pipe or a device may never end."""
    if not path.is_file():
        raise FileNotFoundError(f"{'not a regular file' if path.exists() else 'no such file'}: {path}")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file, or a FormatError if it is larger than `limit` bytes, whatever its size."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(path, f"must be at most {limit:,} bytes long")
    return data


def read_text(path: Path, limit: int) -> str:
    """The whole file as text, line ends and byte order mark normalised, or a FormatError."""
    data = read_bytes(path, limit)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            path, f"must be text, got byte 0x{data[error.start]:02x}", line_at(data, error.start)
        ) from None
    if "\0" in text:
        raise FormatError(path, "must be text, got a NUL byte", line_at(text, text.index("\0")))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def line_at(text: str | bytes, position: int) -> int:
    """Number of the line, from 1, that `position` lies in."""
    return text.count("\n" if isinstance(text, str) else b"\n", 0, position) + 1


def named_formats(stem: str) -> tuple[tuple[int, bool], tuple[int, bool]] | None:
    """``((a_bits, a_signed), (w_bits, w_signed))`` of a circuit named as EvoApproxLib does, ``mul8s_1KV8``; else None.

    ``mul8x4u_…`` has an 8-bit first and a 4-bit second operand.
    """
    match = _EVOAPPROX_NAME.match(stem)
    if match is None:
        return None
    a_bits, signed = int(match["a"]), match["sign"] == "s"
    return (a_bits, signed), (int(match["w"] or a_bits), signed)


def operand_signs(
    path: Path,
    a_signed: bool | None,
    w_signed: bool | None,
    default: bool,
    reading: Callable[[bool, bool], np.ndarray],
) -> tuple[bool, bool]:
    """Signedness of both operands of a file that does not say it.

    As given, else as a name like EvoApproxLib's says, else the reading in which the table resembles products.

    Parameters
    ----------
    path : Path
        For the name and for messages.
    a_signed, w_signed : bool or None
        As given by the user, or by what else the file has.
    default : bool
        Of both operands, where nothing tells.
    reading : callable
        ``reading(a_signed, w_signed)`` is the table by code, ``[activation, weight]``, if the operands are such.

    Warns
    -----
    UserWarning
        Nothing tells.
    """
    named = named_formats(path.stem)
    if named is not None:
        a_signed = named[0][1] if a_signed is None else a_signed
        w_signed = named[1][1] if w_signed is None else w_signed
    candidates = [
        (a, w)
        for a in ((False, True) if a_signed is None else (a_signed,))
        for w in ((False, True) if w_signed is None else (w_signed,))
    ]
    if len(candidates) == 1:
        return candidates[0]
    likeness = {signs: _likeness(reading(*signs), *signs) for signs in candidates}
    best, second, *_ = sorted(candidates, key=likeness.__getitem__, reverse=True)
    if likeness[best] >= _LEAST_LIKENESS and likeness[best] - likeness[second] >= _LEAST_LEAD:
        return best
    chosen = default if a_signed is None else a_signed, default if w_signed is None else w_signed
    names = " × ".join("signed" if signed else "unsigned" for signed in chosen)
    warnings.warn(
        f"{path}: neither its name nor its entries tell whether its operands are signed; taken as {names}: say "
        "a_signed= and w_signed=",
        stacklevel=4,
    )
    return chosen


def _likeness(table: np.ndarray, a_signed: bool, w_signed: bool) -> float:
    """Cosine of the angle between a table and the exact products of its operands; 0 if it is no table."""
    if table.ndim != 2 or not all(side in SIDES for side in table.shape) or not np.isfinite(table).all():
        return 0.0
    bits = [side.bit_length() - 1 for side in table.shape]
    exact = np.multiply.outer(operand_values(bits[0], a_signed), operand_values(bits[1], w_signed)).astype(float)
    entries = table.astype(float)
    size = np.sqrt((entries**2).sum() * (exact**2).sum())
    return float((entries * exact).sum() / size) if size > 0 else 0.0


def table_multiplier(
    table: np.ndarray,
    path: Path,
    *,
    a_signed: bool | None,
    w_signed: bool | None,
    order: str | None = None,
    signed: bool = False,
    gradients: tuple[np.ndarray, np.ndarray] | None = None,
) -> Multiplier:
    """A multiplier from a table by two's-complement codes whose file does not say how codes are read.

    Parameters
    ----------
    table : numpy.ndarray
        Rows are activation codes, or weight codes with ``order="weight_first"``.
    path : Path
        For messages; a name as EvoApproxLib's says the signedness that is not given.
    a_signed, w_signed : bool or None
        As given by the user.
    order : str or None
        One of `ORDERS`; None means the first.
    signed : bool
        Of both operands where nothing tells, see `operand_signs`.
    gradients : pair of numpy.ndarray, optional
        By activation and by weight, ordered as the table is.

    Raises
    ------
    FormatError
        The table is none.
    ValueError
        `order` is none of `ORDERS`.
    """
    weight_first = check_order(order) == "weight_first"
    table, *slopes = (t.T if weight_first else t for t in (table, *(gradients or ())))
    flags = operand_signs(path, a_signed, w_signed, signed, lambda a, w: table)
    try:
        return Multiplier(table, a_signed=flags[0], w_signed=flags[1], gradients=tuple(slopes) or None)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def is_unsigned(multiplier: Multiplier) -> bool:
    """Whether neither an operand nor an entry needs a sign."""
    return not multiplier.a_signed and not multiplier.w_signed and multiplier.prepared.low >= 0


def check_order(order: str | None) -> str:
    """The order, or a ValueError that says which there are."""
    if order is None:
        return ORDERS[0]
    if order not in ORDERS:
        raise ValueError(f"order must be {' or '.join(map(repr, ORDERS))}, got {order!r}")
    return order


def square_side(path: Path, entries: int) -> int:
    """Side of a square table of so many entries, 2 to 8 bits an operand, or a FormatError."""
    for side in SIDES:
        if entries == side**2:
            return side
    raise FormatError(path, f"must hold 4**bits entries, {4**MAX_BITS:,} for 8 bits, got {entries:,}")
