"""Decimal integers from text that nobody vouches for, without a loop over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import FormatError
from .format import Format, line_at

_NUMBER = b"0123456789+-"
_BLANKS = b" \t\n"
_LONGEST = 10  # digits of the largest int32
_COMMA = ord(",")


@dataclass(frozen=True)
class Integers:
    """Integers in the order of a text.

    Attributes
    ----------
    values : numpy.ndarray
        int64, all within int32.
    lines : numpy.ndarray
        Number of the line that each stands in.
    """

    values: np.ndarray
    lines: np.ndarray

    def check_width(self, path: Path, width: int | None = None, what: str = "integers a line") -> int:
        """`width`, or the first line's, if every line that holds integers holds that many; else a FormatError."""
        first = np.flatnonzero(np.diff(self.lines, prepend=-1))
        widths = np.diff(first, append=self.lines.size)
        wanted = int(widths[0]) if width is None else width
        if (widths != wanted).any():
            at = int(np.argmax(widths != wanted))
            raise FormatError(path, f"must hold {wanted} {what}, got {widths[at]}", int(self.lines[first[at]]))
        return wanted


def parse_integers(text: str, path: Path, *, most: int, line: int = 1, commas: bool = False) -> Integers:
    """Read a text of nothing but decimal integers, between blanks or between single commas.

    Parameters
    ----------
    text : str
        Its lines end in a newline alone; a sign belongs to its number without a blank.
    path : Path
        For messages.
    most : int
        More integers than so are refused before they are read.
    line : int
        Number of the text's first line.
    commas : bool
        Whether exactly one comma stands between any two integers, instead of none.

    Raises
    ------
    FormatError
        Anything else in the text, or an integer beyond int32.
    """
    data = text.encode("ascii", "replace")  # a '?' is refused as any other character is
    foreign = data.translate(None, _NUMBER + _BLANKS + (b"," if commas else b""))
    if foreign:
        position = data.index(foreign[:1])
        raise FormatError(path, f"must be an integer, got {text[position]!r}", line + line_at(data, position) - 1)

    raw = np.frombuffer(data, np.uint8)
    inside = np.zeros(raw.size + 2, bool)
    np.not_equal(raw, _COMMA, out=inside[1:-1])
    inside[1:-1] &= raw > ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    if starts.size == 0:
        raise FormatError(path, "must hold integers, got none", line)
    if starts.size > most:
        at = line + line_at(data, int(starts[most])) - 1
        raise FormatError(path, f"must hold at most {most:,} integers here, got {starts.size:,}", at)
    lines = line + np.cumsum(raw == ord("\n"), dtype=np.int32)[starts]

    signed = raw[starts] < ord("0")
    digits = ends - starts - signed
    wrong = (digits < 1) | (digits > _LONGEST)
    within = inside[1:-1] & (raw < ord("0"))
    within[starts] = False
    for misplaced in np.flatnonzero(within)[:1]:
        wrong[np.searchsorted(starts, misplaced) - 1] = True
    if commas:
        wrong |= np.cumsum(raw == _COMMA, dtype=np.int32)[starts] != np.arange(starts.size)
    values = np.empty(0)
    if not wrong.any():
        values = np.fromstring(data.replace(b",", b" "), np.int64, sep=" ")
        wrong = values != values.astype(np.int32)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        token = data[starts[at] : ends[at]].decode()
        raise FormatError(path, _complaint(token, commas), int(lines[at]))
    if commas and data.count(b",") != starts.size - 1:
        raise FormatError(path, "must end after an integer, got a comma", int(lines[-1]))
    return Integers(values, lines)


def head_lines(head: bytes) -> list[bytes]:
    """The whole lines at the start of a file that are not blank, without a byte order mark."""
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    return [line for line in (lines[:-1] if len(head) == Format.HEAD else lines) if line.strip()]


def only_integers(lines: list[bytes], separators: bytes = b"") -> bool:
    """Whether lines are made of nothing but digits, signs, blanks and `separators`."""
    return not b"".join(lines).translate(None, _NUMBER + _BLANKS + separators)


def _complaint(token: str, commas: bool) -> str:
    shown = token if len(token) <= 2 * _LONGEST else f"{token[:_LONGEST]}… of {len(token):,} characters"
    number = token[1:] if token[0] in "+-" else token
    if not number.isdigit():
        return f"must be an integer, got {shown!r}"
    if commas and len(number) <= _LONGEST and abs(int(number)) < 2**31:
        return f"must have one separator between any two integers, got none or several before {shown!r}"
    return f"must be an integer that fits int32, got {shown}"
