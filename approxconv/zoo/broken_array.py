"""The broken-array multiplier (BAM)."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def broken_array(h: int, v: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Sum of the partial products that lie below both breaks: ``Σ a_j·w_i·2^(i+j)`` over ``i ≥ h`` and ``i + j ≥ v``.

    Row i of the carry-save array adds ``a·w_i``. The horizontal break omits the cells above it (rows 0 to h − 1), the
    vertical break the cells to its right (columns 0 to v − 1); omitted cells output 0.

    Parameters
    ----------
    h : int
        Horizontal break level (HBL), 0 to ``bits - 1``. It breaks the weight, so that with ``h > 0`` the multiplier
        does not commute.
    v : int
        Vertical break level (VBL), 0 to ``2·bits - 2``. Up to `h` it omits nothing more.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`), not through a Baugh-Wooley array.

    Returns
    -------
    Multiplier
        Named ``bam_h{h}_v{v}_…``, as in ``bam_h2_v4_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    For unsigned operands the error is never positive, its largest magnitude is the summed weight 2^(i+j) of the
    omitted cells and its mean over all pairs a quarter of that.

    H. R. Mahdiani, A. Ahmadi, S. M. Fakhraie, C. Lucas, "Bio-Inspired Imprecise Computational Blocks for Efficient
    VLSI Implementation of Soft-Computing Applications", IEEE Transactions on Circuits and Systems I 57(4), 2010.

    Examples
    --------
    >>> broken_array(1, 3, bits=4).table[15, 15].item()  # 225 less row 0 (15) and 2·(1 + 2) of row 1, 4·1 of row 2
    200
    """
    return FAMILY.build(bits, a_signed, w_signed, h=h, v=v)


def _unsigned(a: np.ndarray, w: np.ndarray, h: int, v: int, bits: int) -> np.ndarray:
    total = np.zeros_like(a)
    for i in range(h, bits):
        dropped = max(v - i, 0)
        total += (a >> dropped << dropped) * (w & 1 << i)
    return total


FAMILY = Family("bam_h{h}_v{v}", _unsigned, lambda bits: {"h": range(bits), "v": range(2 * bits - 1)}, by_width=True)
