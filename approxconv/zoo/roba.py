"""RoBA, the rounding-based approximate multiplier."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family, leading_one


def roba(bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Product ``R(a)·w + a·R(w) − R(a)·R(w)``, where R rounds to the nearest power of two: three shifts and two sums.

    It is a·w without ``(R(a) − a)·(R(w) − w)``. ``R(0) = 0``; a tie, 3·2^p, rounds up to 2^(p+2), except for R(3) = 2.

    Parameters
    ----------
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Unsigned, this is the paper's U-RoBA. Signed operands enter by their magnitudes, as in its S-RoBA. (Its AS-RoBA,
        which negates by the one's complement, is not here.)

    Returns
    -------
    Multiplier
        Named ``roba_…``, as in ``roba_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The error has either sign and is zero where an operand is a power of two. The largest relative error is the paper's
    11.1 %, that is 1/9, met where both operands are ties.

    R. Zendegani, M. Kamal, M. Bahadori, A. Afzali-Kusha, M. Pedram, "RoBA Multiplier: A Rounding-Based Approximate
    Multiplier for High-Speed yet Energy-Efficient Digital Signal Processing", IEEE Transactions on VLSI Systems 25(2),
    2017.

    Examples
    --------
    >>> roba().table[6, 10].item()  # 8 · 10 + 6 · 8 − 8 · 8
    64
    """
    return FAMILY.build(bits, a_signed, w_signed)


def _unsigned(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    rounded_a, rounded_w = _rounded(a), _rounded(w)
    return rounded_a * w + a * rounded_w - rounded_a * rounded_w


def _rounded(x: np.ndarray) -> np.ndarray:
    below = 1 << np.maximum(leading_one(x), 0)
    up = (2 * x >= 3 * below) & (x != 3)
    return np.where(x > 0, below << up, 0)


FAMILY = Family("roba", _unsigned)
