"""Tables with their gradients as the authors of "Gradient Approximation of Approximate Multipliers" write them.

Layout of changmg/AppMult-Aware-Retraining (written by ``simulator/src/main.cc`` and ``scripts/gen_bp_lut.py``, read by
``self_ops/ops_py/approx_ops.py``), for operands of n bits:

1. Any number of lines of remarks.
2. ``LUT for approximate multiplier:``, then ``4**n`` lines ``a b product``.
3. ``LUT for the gradient of the approximate multiplier w.r.t. the first operand:``, then ``4**n`` lines of that,
   ``a b gradient``.
4. The same ``w.r.t. the second operand:``.

The files ``…_lutfp.txt`` end after the first table. ``a`` and ``b`` are operand codes; the authors have unsigned
operands only and take `a` for the activation. A gradient is an integer, **in sixteenths**: 40 means 2.5. So writing
rounds gradients to sixteenths; the table itself is kept as it is. Lines of a table may be in any order here.

C. Meng, W. Burleson, W. Qian, G. De Micheli, "Gradient Approximation of Approximate Multipliers for High-Accuracy Deep
Neural Network Retraining", DATE 2025.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..multiplier import MAX_BITS, Multiplier
from .errors import FormatError
from .format import Format, check_order, line_at, read_text, square_side, table_multiplier
from .integers import parse_integers

_MAX_BYTES = 2**22
_TITLES = (
    "LUT for approximate multiplier:",
    "LUT for the gradient of the approximate multiplier w.r.t. the first operand:",
    "LUT for the gradient of the approximate multiplier w.r.t. the second operand:",
)
_TITLE_LINE = re.compile(
    f"LUT for (?:{'|'.join(re.escape(title.removeprefix('LUT for ')) for title in _TITLES)})[^\n]*"
)
_FACTOR = 16
_INT16 = np.iinfo(np.int16)


def load_gradient_txt(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a table, and its gradients where the file has them.

    Where nothing tells, the operands are signed if a product is negative.
    """
    weight_first = check_order(order) == "weight_first"
    text = read_text(path, _MAX_BYTES)
    titles = [match for match in _TITLE_LINE.finditer(text) if text[match.start() - 1 : match.start()] in ("", "\n")]
    found = [next(title for title in _TITLES if match[0].startswith(title)) for match in titles]
    if found not in ([_TITLES[0]], list(_TITLES)):
        line = line_at(text, titles[0].start()) if titles else 1
        raise FormatError(
            path, f"must hold the line {_TITLES[0]!r}, and then both gradients' or none, got {len(found)} titles", line
        )
    ends = [match.start() for match in titles[1:]] + [len(text)]
    sections = [
        _read_section(text[match.end() : end], path, line_at(text, match.end()))
        for match, end in zip(titles, ends, strict=True)
    ]
    if len({section.shape for section in sections}) != 1:
        raise FormatError(path, f"must hold tables of one shape, got {', '.join(str(s.shape) for s in sections)}")
    table, *gradients = sections
    by_operand = [gradient / _FACTOR for gradient in (reversed(gradients) if weight_first else gradients)]
    return table_multiplier(
        table,
        path,
        a_signed=a_signed,
        w_signed=w_signed,
        order=order,
        signed=bool(table.min() < 0),
        gradients=tuple(by_operand) or None,
    )


def _read_section(text: str, path: Path, line: int) -> np.ndarray:
    """A table by code from its lines ``a b value``, each pair of codes once."""
    numbers = parse_integers(text, path, most=3 * 4**MAX_BITS, line=line)
    numbers.check_width(path, 3, "integers a line, two operand codes and a value")
    count = numbers.values.size // 3
    lines = numbers.lines[::3]
    side = square_side(path, count)
    a, b, values = numbers.values.reshape(-1, 3).T
    outside = (a < 0) | (a >= side) | (b < 0) | (b >= side)
    if outside.any():
        at = int(np.argmax(outside))
        raise FormatError(
            path,
            f"must hold operand codes from 0 to {side - 1} as its {count:,} lines say, got {a[at]} and {b[at]}",
            int(lines[at]),
        )
    position = a * side + b
    if not np.array_equal(position, np.arange(count)) and np.unique(position).size != count:
        ordered = np.argsort(position, kind="stable")
        at = int(ordered[1:][np.diff(position[ordered]) == 0].min())
        raise FormatError(path, f"must hold each pair of codes once, got {a[at]} {b[at]} again", int(lines[at]))
    table = np.empty(count, np.int64)
    table[position] = values
    return table.reshape(side, side)


def save_gradient_txt(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write the table, and its gradients if there are any, rounded to sixteenths.

    Raises
    ------
    ValueError
        The operands differ in width, or a gradient in sixteenths does not fit int16.
    """
    weight_first = check_order(order) == "weight_first"
    if multiplier.a_bits != multiplier.w_bits:
        raise ValueError(f"this .txt holds square tables only, got bits {multiplier.bits}")
    gradients = [np.rint(_FACTOR * g.numpy().astype(float)) for g in multiplier.gradients or ()]
    for gradient in gradients:
        if gradient.min() < _INT16.min or gradient.max() > _INT16.max:
            raise ValueError(
                f"gradients must lie within {_INT16.min / _FACTOR} and {_INT16.max / _FACTOR} to be written in int16 "
                f"sixteenths, got {gradient.min() / _FACTOR} to {gradient.max() / _FACTOR}"
            )
    tables = [multiplier.table.numpy(), *(reversed(gradients) if weight_first else gradients)]
    parts = []
    for title, table in zip(_TITLES, tables, strict=False):
        parts.append(f"{title}\n")
        rows = (table.T if weight_first else table).astype(int).tolist()
        parts += (f"{a} {b} {value}\n" for a, row in enumerate(rows) for b, value in enumerate(row))
    path.write_bytes("".join(parts).encode())


def _recognise(head: bytes) -> bool:
    return re.search(rb"^" + re.escape(_TITLES[0].encode()), head, re.MULTILINE) is not None


FORMAT = Format("gradient_txt", (".txt",), load_gradient_txt, _recognise, save_gradient_txt)
