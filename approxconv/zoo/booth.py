"""Radix-4 Booth multipliers, signed, with approximate low columns."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..multiplier import Multiplier
from .family import Family, choose


def approximate_booth(encoder: str, p: int, bits: int = 8) -> Multiplier:
    """Sum ``Σ (row_i + neg_i)·4^i`` of Booth's rows, those of their bits in columns below `p` approximate, no last neg.

    Digit i of the weight is ``d = -2·w_(2i+1) + w_(2i) + w_(2i−1)``, with w_(−1) = 0; the exact row is |d|·a or, if d
    is negative, its one's complement, and ``neg = 1`` if d < 0. Bit j of row i lies in column 2i + j. For j < `bits`
    and 2i + j < `p` it is, in place of the exact one,

    - ``"r4abm1"``: ``(w_(2i) ⊕ w_(2i−1))·(w_(2i+1) ⊕ a_j)``, the encoder R4ABE1: 0 where d = ±2;
    - ``"r4abm2"``: ``w_(2i+1) ⊕ a_j``, the encoder R4ABE2.

    Neg of the last row, i = `bits`/2 − 1, is left out, which makes the array of rows regular; with any `p`.

    Parameters
    ----------
    encoder : str
        ``"r4abm1"`` or ``"r4abm2"``.
    p : int
        Approximate columns, the paper's approximation factor, 1 to ``2·bits - 2`` (all).
    bits : int
        Width of both operands: 2, 4, 6 or 8. Both are signed.

    Returns
    -------
    Multiplier
        Named ``{encoder}_p{p}_{bits}s``, as in ``r4abm1_p6_8s``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    Of the 32 entries in the truth table of a row's bit R4ABE1 changes 4, all from 1 to 0, and R4ABE2 changes 8, some
    either way, so that their errors can cancel: error rates of 12.5 % and 25 %. The rows are added exactly.

    W. Liu, L. Qian, C. Wang, H. Jiang, J. Han, F. Lombardi, "Design of Approximate Radix-4 Booth Multipliers for
    Error-Tolerant Computing", IEEE Transactions on Computers 66(8), 2017.

    Examples
    --------
    >>> approximate_booth("r4abm1", 4).table[5, 2].item()  # 4·5 less 2·5: ¬10 = …110101 is …110000 here, −16, and neg 1
    5
    """
    return choose("encoder", encoder, _ENCODERS).build(bits, True, True, p=p)


def broken_booth(v: int, bits: int = 8) -> Multiplier:
    """Sum ``Σ ⌊d_i·a·4^i / 2^v⌋·2^v`` of exact Booth rows, d_i as in `approximate_booth`, without columns below `v`.

    This is the paper's Type 0, which forms the two's complement of a negative row before it cuts it.

    Parameters
    ----------
    v : int
        Vertical break level (VBL), 1 to `bits`.
    bits : int
        Width of both operands: 2, 4, 6 or 8. Both are signed.

    Returns
    -------
    Multiplier
        Named ``bbm_v{v}_{bits}s``, as in ``bbm_v6_8s``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The error is never positive: a row loses less than 2^v. At 12 bits with v = 3 the paper gives a mean error of −3.5,
    an error probability of 68.75 % and a smallest error of −11.

    F. Farshchi, M. S. Abrishami, S. M. Fakhraie, "New Approximate Multiplier for Low Power Digital Signal Processing",
    CADS 2013.

    Examples
    --------
    >>> broken_booth(4).table[5, 1].item()
    0
    """
    return _BROKEN.build(bits, True, True, v=v)


def _digits(w: np.ndarray, bits: int) -> list[tuple[np.ndarray, ...]]:
    doubled = w << 1
    return [tuple(doubled >> 2 * i + j & 1 for j in (2, 1, 0)) for i in range(bits // 2)]


def _row(a: np.ndarray, high: np.ndarray, middle: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    neg = high & (middle & low ^ 1)
    return a * np.abs(middle + low - 2 * high) ^ -neg, neg


def _approximate(a: np.ndarray, w: np.ndarray, p: int, bits: int, encoder: str) -> np.ndarray:
    total = np.zeros_like(a)
    for i, (high, middle, low) in enumerate(_digits(w, bits)):
        row, neg = _row(a, high, middle, low)
        approximate = a ^ -high
        if encoder == "r4abm1":
            approximate &= -(middle ^ low)
        replaced = (1 << min(max(p - 2 * i, 0), bits)) - 1
        total += (row & ~replaced | approximate & replaced) << 2 * i
        if i < bits // 2 - 1:
            total += neg << 2 * i
    return total


def _break(a: np.ndarray, w: np.ndarray, v: int, bits: int) -> np.ndarray:
    total = np.zeros_like(a)
    for i, digit in enumerate(_digits(w, bits)):
        row, neg = _row(a, *digit)
        total += row + neg << 2 * i >> v << v
    return total


_ENCODERS = {
    encoder: Family(
        f"{encoder}_p{{p}}",
        ranges=lambda bits: {"p": range(1, 2 * bits - 1)},
        widths=(2, 4, 6, 8),
        wide=(10, 12, 14, 16),
        native=partial(_approximate, encoder=encoder),
        by_width=True,
        signed_only=True,
    )
    for encoder in ("r4abm1", "r4abm2")
}
_BROKEN = Family(
    "bbm_v{v}",
    ranges=lambda bits: {"v": range(1, bits + 1)},
    widths=(2, 4, 6, 8),
    wide=(10, 12, 14, 16),
    native=_break,
    by_width=True,
    signed_only=True,
)
FAMILIES = (*_ENCODERS.values(), _BROKEN)
