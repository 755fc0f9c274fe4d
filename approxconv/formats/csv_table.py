"""A bare ``.csv`` table by code, with or without a header row and an index column.

Cells are integers between commas, semicolons or blanks. Rows and columns may differ in number: each is a power of two,
and one more where there are labels. Labels are operand codes, or operand values where one is negative, in any order:
the table is sorted by them, and they say the signedness.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..multiplier import Multiplier
from .errors import FormatError
from .format import SIDES, Format, check_order, line_at, read_text, table_multiplier
from .integers import head_lines, only_integers, parse_integers

_MAX_BYTES = 2**21
_LABELLED = [side + 1 for side in SIDES]
_INTEGER = re.compile("[+-]?[0-9]+")


def load_csv_table(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a ``.csv`` table.

    Its operands are signed as their labels say, which may not be contradicted; where those are codes or missing and
    nothing else says it, signed if an entry is negative.
    """
    weight_first = check_order(order) == "weight_first"
    cells, lines, corner = _read_cells(read_text(path, _MAX_BYTES), path)
    if not all(side in SIDES or side in _LABELLED for side in cells.shape):
        raise FormatError(
            path,
            f"must hold 2**bits rows and columns, {SIDES[0]} to {SIDES[-1]}, and one more of each for labels, got "
            f"{' × '.join(map(str, cells.shape))}",
        )
    has_header, has_index = (side in _LABELLED for side in cells.shape)
    if corner and not (has_header and has_index):
        raise FormatError(path, f"must be an integer, got {corner:.40}", int(lines[0]))
    table = cells[has_header:, has_index:]
    labels = [cells[has_header:, 0] if has_index else None, cells[0, has_index:] if has_header else None]
    by_value = any(each is not None and each.min() < 0 for each in labels)
    own: list[bool | None] = [None, None]
    for axis, each in enumerate(labels):
        if each is None:
            continue
        codes = each % each.size
        low = -(each.size // 2) if each.min() < 0 else 0
        if each.min() < low or each.max() >= low + each.size or np.unique(codes).size != each.size:
            raise FormatError(
                path,
                f"must label its {('rows', 'columns')[axis]} by the codes 0 to {each.size - 1} or the values "
                f"{-each.size // 2} to {each.size // 2 - 1}, each once",
                int(lines[0]),
            )
        table = np.take(table, np.argsort(codes), axis=axis)
        own[axis] = low < 0 if by_value else None
    flags: dict[str, bool | None] = {"a_signed": a_signed, "w_signed": w_signed}
    for key, said in zip(flags, reversed(own) if weight_first else own, strict=True):
        if said is not None and flags[key] not in (None, said):
            raise FormatError(path, f"{key} is {said} by the file's labels, {flags[key]} was asked for")
        flags[key] = flags[key] if said is None else said
    return table_multiplier(table, path, order=order, signed=bool(table.min() < 0), **flags)


def _read_cells(text: str, path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """All cells with their lines' numbers; a corner above an index that holds no integer reads 0 and is returned."""
    separator = next((each for each in ";," if each in text), None)
    if separator == ";" and "," in text:
        raise FormatError(path, "must have one kind of separator, got ',' beside ';'", line_at(text, text.index(",")))
    rows = [line.strip(" \t").removesuffix(separator or "\n") for line in text.split("\n")]
    filled = [at for at, row in enumerate(rows) if row]
    if len(filled) < SIDES[0]:
        raise FormatError(path, f"must hold at least {SIDES[0]} lines, got {len(filled)}")
    if len(filled) > _LABELLED[-1]:
        raise FormatError(path, f"must hold at most {_LABELLED[-1]} lines", filled[_LABELLED[-1]] + 1)

    first, second = (rows[at].split(separator) for at in filled[:2])
    corner = "" if _INTEGER.fullmatch(first[0].strip(" \t")) else repr(first[0])
    if corner:
        first[0] = "0"
    elif len(first) == len(second) - 1:
        first.insert(0, "0")
    rows[filled[0]] = (separator or " ").join(first)
    if separator:
        for at in filled[1:]:
            rows[at] = separator + rows[at]
    joined = "\n".join(rows).replace(";", ",")
    numbers = parse_integers(joined, path, most=_LABELLED[-1] ** 2, commas=separator is not None)
    width = numbers.check_width(path)
    return numbers.values.reshape(-1, width), numbers.lines[::width], corner


def save_csv_table(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write the table, without labels."""
    weight_first = check_order(order) == "weight_first"
    table = multiplier.table.numpy()
    rows = (table.T if weight_first else table).tolist()
    path.write_bytes("".join(f"{','.join(map(str, row))}\n" for row in rows).encode())


def _recognise(head: bytes) -> bool:
    lines = [line.strip(b" \t") for line in head_lines(head)]
    if len(lines) < 2 or not only_integers(lines[1:], b",;"):
        return False
    separator = next((each for each in (b";", b",") if each in lines[1]), None)
    first, *widths = (len(line.removesuffix(separator or b"\n").split(separator)) for line in lines)
    return len(set(widths)) == 1 and widths[0] in SIDES + _LABELLED and first in (widths[0], widths[0] - 1)


FORMAT = Format("csv", (".csv",), load_csv_table, _recognise, save_csv_table)
