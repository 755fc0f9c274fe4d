"""The enhanced static segment method (ESSM)."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def essm(m: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Product ``S(a)·S(w)`` of the operands cut to the lowest of three fixed `m`-bit segments with their leading one.

    For n-bit operands and q = (n − m)/2 the segments start at bits 0, q and 2q: ``S(x) = ⌊x/2^s⌋·2^s``, where s = 0 if
    x < 2^m, q if x < 2^(m+q), else 2q. `ssm` does without the middle one.

    Parameters
    ----------
    m : int
        Bits of a segment, from half of `bits` to ``bits - 2``, as odd or even as `bits`; in the paper half of `bits`.
    bits : int
        Width of both operands, 4 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``essm{m}_…``, as in ``essm4_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    For unsigned operands the error is never positive. At 16 bits, m = 8, operands random, the paper gives an average
    accuracy, one minus the mean relative error, of 99 %.

    S. Narayanamoorthy, H. A. Moghaddam, Z. Liu, T. Park, N. S. Kim, "Energy-Efficient Approximate Multiplication for
    Digital Signal Processing and Classification Applications", IEEE Transactions on VLSI Systems 23(6), 2015.
    Segments of more than half the bits: G. Di Meo, G. Saggese, A. G. M. Strollo, D. De Caro, "Design of Generalized
    Enhanced Static Segment Multiplier with Minimum Mean Square Error for Uniform and Nonuniform Input Distributions",
    Electronics 12(2), 2023.

    Examples
    --------
    >>> essm(4).table[0b00010111, 0b1011].item()  # 0b0101 · 2**2 · 0b1011
    220
    """
    return FAMILY.build(bits, a_signed, w_signed, m=m)


def _unsigned(a: np.ndarray, w: np.ndarray, m: int, bits: int) -> np.ndarray:
    return _segment(a, m, bits) * _segment(w, m, bits)


def _segment(x: np.ndarray, m: int, bits: int) -> np.ndarray:
    step = (bits - m) // 2
    shift = np.where(x >> m + step > 0, 2 * step, np.where(x >> m > 0, step, 0))
    return x >> shift << shift


FAMILY = Family(
    "essm{m}",
    _unsigned,
    lambda bits: {"m": range(bits - 2 * (bits // 4), bits, 2)},
    widths=range(4, 9),
    by_width=True,
)
