"""The underdesigned multiplier: exact but for 3·3 = 7 in its 2×2 blocks."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family

_LOW_BIT_OF_EACH_DIGIT = 0x5555


def kulkarni(bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Exact sum ``Σ m(a_i, w_j)·4^(i+j)`` over base-4 digits, where ``m(3, 3) = 7`` and m is exact otherwise.

    The paper builds it recursively: four blocks of half the width, down to 2×2 blocks that save the fourth output bit.

    Parameters
    ----------
    bits : int
        Width of both operands: 2, 4 or 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``kulkarni_…``, as in ``kulkarni_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The 2×2 block errs for one input in 16, by 2 of 9. The paper's mean relative error of 1.39 % is (2/9)/16, inputs
    with a zero counted as exact; its 3.32 % is that of 16 bits. At every width the largest is 22.2 %.

    P. Kulkarni, P. Gupta, M. Ercegovac, "Trading Accuracy for Power with an Underdesigned Multiplier Architecture",
    VLSI Design 2011.

    Examples
    --------
    >>> kulkarni().table[3, 3].item()
    7
    """
    return FAMILY.build(bits, a_signed, w_signed)


def _unsigned(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    # A block is 2 too small where both digits are 3, so the error is the product of the operands' masks of such digits.
    return a * w - 2 * _threes(a) * _threes(w)


def _threes(x: np.ndarray) -> np.ndarray:
    return x & x >> 1 & _LOW_BIT_OF_EACH_DIGIT


FAMILY = Family("kulkarni", _unsigned, widths=(2, 4, 8), wide=(16,))
