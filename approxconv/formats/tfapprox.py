"""TFApprox's ``.bin``: the 65,536 products of an 8×8-bit multiplier as little-endian uint16, and nothing else.

Layout as read by ehw-fit/tf-approximate (``tf2/src/approx_ops_types.h`` reads the file, ``approx_nn_conv_kernels.cu``
looks up ``table[a << 8 | w]``): the activation's code is the high byte of the index. TFApprox itself is unsigned only;
signed tables hold int16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..multiplier import MAX_BITS, Multiplier, operand_values
from .errors import FormatError
from .format import Format, check_order, operand_signs, read_bytes, table_multiplier

_SIDE = 2**MAX_BITS
_BYTES = 2 * _SIDE**2
_LIKENESS = 0.9


def load_tfapprox(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a ``.bin`` table; its entries are int16 if an operand is signed, else uint16. Unsigned if nothing tells."""
    weight_first = check_order(order) == "weight_first"
    data = read_bytes(path, _BYTES)
    if len(data) != _BYTES:
        raise FormatError(path, f"must be exactly {_BYTES:,} bytes long, {_SIDE}×{_SIDE} uint16, got {len(data):,}")

    def reading(a_signed: bool, w_signed: bool) -> np.ndarray:
        table = np.frombuffer(data, "<i2" if a_signed or w_signed else "<u2").reshape(_SIDE, _SIDE)
        return table.T if weight_first else table

    a_signed, w_signed = operand_signs(path, a_signed, w_signed, False, reading)
    return table_multiplier(reading(a_signed, w_signed), path, a_signed=a_signed, w_signed=w_signed)


def save_tfapprox(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write a ``.bin`` table.

    Raises
    ------
    ValueError
        The multiplier is not 8×8 bits, or an entry does not fit 16 bits.
    """
    weight_first = check_order(order) == "weight_first"
    if multiplier.bits != (MAX_BITS, MAX_BITS):
        raise ValueError(f"a TFApprox .bin holds 8×8-bit multipliers only, got bits {multiplier.bits}")
    dtype = np.dtype("<i2" if multiplier.a_signed or multiplier.w_signed else "<u2")
    table = multiplier.table.numpy()
    if table.min() < np.iinfo(dtype).min or table.max() > np.iinfo(dtype).max:
        raise ValueError(
            f"a TFApprox .bin of these operands holds {dtype.name}, got entries from {table.min()} to {table.max()}"
        )
    path.write_bytes((table.T if weight_first else table).astype(dtype).tobytes())


def _recognise(head: bytes) -> bool:
    """Whether its first rows, 0 to 127 in every reading, resemble products: nothing else marks such a file."""
    if len(head) != Format.HEAD:
        return False
    for dtype, signed in (("<u2", False), ("<i2", True)):
        found = np.frombuffer(head, dtype).astype(np.int64)
        exact = np.multiply.outer(np.arange(found.size // _SIDE), operand_values(MAX_BITS, signed)).ravel()
        if (found * exact).sum() > _LIKENESS * ((found * found).sum() * float((exact * exact).sum())) ** 0.5:
            return True
    return False


FORMAT = Format("tfapprox", (".bin",), load_tfapprox, _recognise, save_tfapprox)
