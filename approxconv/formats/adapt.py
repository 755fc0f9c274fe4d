"""AdaPT's and TransAxx's ``.h``: a C array ``lut[256][256]`` by operand code, read as text and never compiled.

Both (dimdano/adapt, dimdano/transaxx: ``tools/LUT_convert.ipynb`` writes, ``axx_mults/*.h`` are shipped) declare
``const int16_t lut [256][256]``, TransAxx with ``__device__``, and index it by two's-complement byte. A ``.h`` does not
say whose its rows are, and the peers do not agree with themselves: rows are weights in the convolutions of both
(``axx_conv2d.cpp``, ``adapt_convolution_layer.cu``) and activations in their linear layers (``axx_linear.cpp``,
``adapt_linear_layer.cu``).

That converter fills the quadrant of two negative operands with ``mul(|a|, |w|)`` instead of ``mul(a, w)``. What it
wrote for a circuit, shipped ``mul8s_1L2H.h`` included, is not that circuit: the quadrant repeats that of two positive
operands, and as the circuit reads |−128| = 128 as code 0x80, which is −128 again, −128·−w comes out as −128·w.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from ..multiplier import MAX_BITS, Multiplier
from .errors import FormatError
from .format import Format, check_order, is_unsigned, line_at, operand_signs, read_text, square_side, table_multiplier
from .integers import parse_integers

_MAX_BYTES = 2**21
_LONGEST_HEAD = 2**10
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\\\n]|\\\n?)*", re.MULTILINE)
_DECLARATION = re.compile(
    r"(?P<type>(?:[A-Za-z_][\w:]*\s+)+)[A-Za-z_]\w*\s*(?P<sides>(?:\[[^\[\]{}]*\]\s*){1,2})=\s*", re.ASCII
)
_BODY = re.compile(r",*|(?:\{,*\},)*\{,*\}")
_TRAILING_COMMA = re.compile(r",(\s*\})")
_WORD = re.compile(r"\w+", re.ASCII)
_LITERAL = re.compile(r"(?P<digits>0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})(?:[uU](?:ll?|LL?)?|(?:ll?|LL?)[uU]?)?")
_SIZED_TYPE = re.compile(r"\b(u?)int(8|16|32)_t\b")


def load_adapt(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a ``.h`` table; where nothing tells, its operands are signed unless it is of an unsigned type.

    Warns
    -----
    UserWarning
        `order` is not given and matters, or the quadrant of two negative operands is the converter's mistake.
    """
    table, unsigned = _read_array(read_text(path, _MAX_BYTES), path)
    weight_first = order is None or check_order(order) == "weight_first"
    by_activation = table.T if weight_first else table
    a_signed, w_signed = operand_signs(path, a_signed, w_signed, not unsigned, lambda a, w: by_activation)
    if order is None and not np.array_equal(table, table.T):
        warnings.warn(
            f"{path}: a .h does not say which operand its rows are, and this table is not symmetric; taken as AdaPT's "
            'convolutions do, rows are weights: say order="weight_first" or order="activation_first"',
            stacklevel=3,
        )
    if a_signed and w_signed and _has_mistaken_quadrant(table):
        warnings.warn(
            f"{path}: the products of two negative operands are not this multiplier's: they repeat those of the "
            "absolute values, as the converter of AdaPT and TransAxx writes them; make the table from the circuit anew",
            stacklevel=3,
        )
    return table_multiplier(by_activation, path, a_signed=a_signed, w_signed=w_signed)


def _has_mistaken_quadrant(table: np.ndarray) -> bool:
    """Whether the quadrant of two negative operands is ``table[|a|, |w|]`` with |−128| taken for −128.

    Sign-magnitude multipliers and those that cut low bits of the product rightly repeat the quadrant of two positive
    operands, so that alone proves nothing; that −128·−w is the negative −128·w does. In tables of hardly any
    products but 0 the mistake may go unnoticed.
    """
    half = table.shape[0] // 2
    if table.shape != (2**MAX_BITS, 2**MAX_BITS):
        return False  # the converter writes no other
    magnitudes = slice(1, half)
    negatives = slice(None, half, -1)  # −1, −2, … to one above the lowest
    if not np.array_equal(table[negatives, negatives], table[magnitudes, magnitudes]):
        return False
    lowest = [(table[half, negatives], table[half, magnitudes]), (table[negatives, half], table[magnitudes, half])]
    return all(np.array_equal(same, mixed) for same, mixed in lowest) and any(same.sum() < 0 for same, _ in lowest)


def _read_array(text: str, path: Path) -> tuple[np.ndarray, bool]:
    """The table as its file orders it, and whether its type is unsigned."""
    text = _DIRECTIVE.sub(_newlines, _COMMENT.sub(_newlines, text))
    head, brace, body = text.partition("{")
    line = line_at(text, len(head))
    declaration = _declaration(head)
    if not brace or declaration is None:
        raise FormatError(
            path, "must be one array of integers, declared and initialised: `int16_t lut[256][256] = {`", line
        )
    body, brace, rest = body.rpartition("}")
    if not brace or rest.strip(" \t\n;"):
        position = len(text) - len(rest.lstrip(" \t\n;")) if brace else len(text)
        raise FormatError(path, "must end with `};` after its only array", line_at(text, position))

    body = _TRAILING_COMMA.sub(r"\1", f"{body}}}")[:-1]
    structure = re.sub("[^{},]+", "", body)
    if not _BODY.fullmatch(structure):
        raise FormatError(path, "must be initialised by numbers, or by rows of numbers in braces, between commas", line)
    most = 4**MAX_BITS
    if structure.count(",") >= most:
        raise FormatError(path, f"must hold at most {most:,} numbers, got {structure.count(',') + 1:,}", line)
    sized = _SIZED_TYPE.search(declaration["type"])
    limits = np.iinfo(f"{sized[1]}int{sized[2]}" if sized else np.int32)
    flat = _decimal(body.replace("{", " ").replace("}", " "), path, line, limits)
    numbers = parse_integers(flat, path, most=most, line=line, commas=True)
    values = numbers.values
    rows = [len(row) for row in re.findall(r"\{(,*)", structure)]
    sides = [_extent(side) for side in re.findall(r"\[([^\]]*)\]", declaration["sides"])]
    if rows:
        ends = np.cumsum(np.array(rows) + 1)
        wrong = [at for at, commas in enumerate(rows) if commas != rows[0]]
        if wrong:
            at = int(numbers.lines[ends[wrong[0]] - 1])
            raise FormatError(path, f"must hold {rows[0] + 1} numbers a row, got {rows[wrong[0]] + 1}", at)
        shape = (len(rows), rows[0] + 1)
        sides = sides if len(sides) == 2 else [0]
    elif len(sides) == 2 and sides[1]:
        shape = (-(-values.size // sides[1]), sides[1])
    else:
        shape = (square_side(path, values.size),) * 2
    expected = [values.size] if len(sides) == 1 and not rows else list(shape)
    if shape[0] * shape[1] != values.size or any(
        side not in (None, found) for side, found in zip(sides, expected, strict=False)
    ):
        raise FormatError(
            path, f"must hold as many numbers as it declares, {declaration['sides'].strip()}, got {values.size:,}", line
        )
    beyond = (values < limits.min) | (values > limits.max)
    if beyond.any():
        at = int(np.argmax(beyond))
        raise FormatError(
            path, f"must hold numbers that fit {limits.dtype}_t, got {values[at]}", int(numbers.lines[at])
        )
    unsigned = any(word.startswith(("u", "std::u")) for word in declaration["type"].split())
    return values.reshape(shape), unsigned


def _declaration(head: str) -> re.Match[str] | None:
    head = head.strip()
    return _DECLARATION.fullmatch(head) if len(head) <= _LONGEST_HEAD else None


def _newlines(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n") or " "


def _extent(side: str) -> int | None:
    """A side as a number; None where it is left out or a macro."""
    match = _LITERAL.fullmatch(side.strip())
    return _value(match["digits"]) if match else None


def _value(digits: str) -> int:
    """A literal's value as C has it: a leading zero makes it octal."""
    octal = digits.startswith("0") and digits.isdigit()
    return int(digits, 8 if octal else 0)


def _decimal(text: str, path: Path, line: int, limits: np.iinfo) -> str:
    """The text with every literal in decimal, without its suffix; bit patterns in hexadecimal keep their meaning."""
    raw = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    digit = (raw >= ord("0")) & (raw <= ord("9"))
    octal = (raw[:-1] == ord("0")) & digit[1:] & ~np.concatenate(([False], digit[:-2]))
    if not octal.any() and not (raw >= ord("A")).any():
        return text
    known: dict[str, str] = {}

    def convert(match: re.Match[str]) -> str:
        word = match[0]
        if word not in known:
            literal = _LITERAL.fullmatch(word)
            try:
                value = _value(literal["digits"])
                pattern = limits.min < 0 and "x" in word.lower() and limits.max < value < 1 << limits.bits
                known[word] = str(value - (1 << limits.bits) if pattern else value)
            except (TypeError, ValueError):
                raise FormatError(
                    path, f"must be an integer, got {word[:40]!r}", line + line_at(text, match.start()) - 1
                ) from None
        return known[word]

    return _WORD.sub(convert, text)


def save_adapt(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write a ``.h`` as AdaPT does, by default with a weight's products in a row.

    Its type is int16_t, which AdaPT and TransAxx expect, uint16_t where nothing is signed, or 32-bit for entries that
    do not fit.
    """
    order = "weight_first" if order is None else check_order(order)
    table = multiplier.table.numpy()
    names = ("uint16", "uint32") if is_unsigned(multiplier) else ("int16", "int32")
    fitting = [name for name in names if _fits(table, np.iinfo(name))]
    rows = (table.T if order == "weight_first" else table).tolist()
    sides = f"[{len(rows)}][{len(rows[0])}]"
    body = ",\n".join(f"{{{', '.join(map(str, row))}}}" for row in rows)
    path.write_bytes(f"#include <stdint.h>\n\nconst {fitting[0]}_t lut {sides} = {{{body}}};\n".encode())


def _fits(table: np.ndarray, limits: np.iinfo) -> bool:
    return bool(limits.min <= table.min() and table.max() <= limits.max)


def _recognise(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1").replace("\r", "\n")
    before, brace, after = _DIRECTIVE.sub("", _COMMENT.sub("", text)).partition("{")
    return bool(brace) and "(" not in after and _declaration(before) is not None


FORMAT = Format("adapt", (".h",), load_adapt, _recognise, save_adapt)
