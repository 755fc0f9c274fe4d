"""DRUM, the dynamic range unbiased multiplier."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family, leading_one


def drum(k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Product ``D(a)·D(w)`` of the operands cut to the `k` bits from their leading one down, the lowest of them set.

    With t = ⌊log2 x⌋ and s = t − k + 1, ``D(x) = x`` if t < k, else ``(⌊x/2^s⌋ | 1)·2^s``: the one in the last place
    stands for the mean of what is cut off, which makes the error nearly unbiased.

    Parameters
    ----------
    k : int
        Bits kept of each operand, 2 to `bits`; exact with `bits`.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes, as in the paper. (The authors' parametrised Verilog approximates the
        magnitude by the one's complement; this is the two's complement.)

    Returns
    -------
    Multiplier
        Named ``drum{k}_…``, as in ``drum6_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The largest relative error is ``(1 + 2^(1−k))² − 1``, 6.35 % for k = 6, met by powers of two. The paper gives DRUM6
    at 16 bits a mean relative error of 1.47 %.

    S. Hashemi, R. I. Bahar, S. Reda, "DRUM: A Dynamic Range Unbiased Multiplier for Approximate Applications",
    ICCAD 2015.

    Examples
    --------
    >>> drum(3).table[0b10010110, 3].item()  # 0b101 · 2**5 · 3
    480
    """
    return FAMILY.build(bits, a_signed, w_signed, k=k)


def _unsigned(a: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    return _segment(a, k) * _segment(w, k)


def _segment(x: np.ndarray, k: int) -> np.ndarray:
    shift = np.maximum(leading_one(x) - k + 1, 0)
    return np.where(shift > 0, (x >> shift | 1) << shift, x)


FAMILY = Family("drum{k}", _unsigned, lambda bits: {"k": range(2, bits + 1)})
