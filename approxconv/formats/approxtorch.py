"""ApproxTorch's ``.txt``: a square table of integers between blanks, the rows in ascending order of operand value.

Layout as read by woshimark666/ApproxTorch (``approxtorch/load_lut.py`` and the README's figure): for int8 the first row
and column are those of −128 and the last those of 127 (``int8_gemm.cu`` looks up ``256*a + w + 32896``), for uint8 they
run from 0 to 255 (``approx_gemm.cu``). Rows are activations, columns weights. It reads by ``numpy.loadtxt`` and
reshapes, so a table may also stand in one column or one line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..multiplier import MAX_BITS, Multiplier
from .format import SIDES, Format, check_order, operand_signs, read_text, square_side, table_multiplier
from .integers import head_lines, only_integers, parse_integers

_MAX_BYTES = 2**21


def load_approxtorch(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a ``.txt`` table; where nothing tells, its operands are signed if an entry is negative."""
    weight_first = check_order(order) == "weight_first"
    numbers = parse_integers(read_text(path, _MAX_BYTES), path, most=4**MAX_BITS)
    numbers.check_width(path)
    side = square_side(path, numbers.values.size)
    table = numbers.values.reshape(side, side)
    table = table.T if weight_first else table
    signs = operand_signs(path, a_signed, w_signed, bool(table.min() < 0), lambda a, w: _shifted(table, a, w))
    return table_multiplier(_shifted(table, *signs), path, a_signed=signs[0], w_signed=signs[1])


def save_approxtorch(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write a ``.txt`` table.

    Raises
    ------
    ValueError
        The operands differ in width.
    """
    weight_first = check_order(order) == "weight_first"
    if multiplier.a_bits != multiplier.w_bits:
        raise ValueError(f"an ApproxTorch .txt holds square tables only, got bits {multiplier.bits}")
    table = _shifted(multiplier.table.numpy(), multiplier.a_signed, multiplier.w_signed)
    rows = (table.T if weight_first else table).tolist()
    path.write_bytes("".join(f"{' '.join(map(str, row))}\n" for row in rows).encode())


def _shifted(table: np.ndarray, rows_signed: bool, columns_signed: bool) -> np.ndarray:
    """Between order by code and order by value, which differ by half a turn of each signed axis."""
    rows, columns = table.shape
    return np.roll(table, (rows // 2 * rows_signed, columns // 2 * columns_signed), axis=(0, 1))


def _recognise(head: bytes) -> bool:
    lines = head_lines(head)
    widths = {len(line.split()) for line in lines}
    return only_integers(lines) and len(widths) == 1 and widths <= set(SIDES)


FORMAT = Format("approxtorch", (".txt",), load_approxtorch, _recognise, save_approxtorch)
