"""An array multiplier whose rows are accumulated by lower-part-OR adders (LOA)."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def lower_part_or(k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Rows ``a·w_i·2^i`` added one after another, from i = 0 on, by adders that OR their `k` low bits.

    The adder: ``LOA(x, y) = (⌊x/2^k⌋ + ⌊y/2^k⌋ + c)·2^k + (x mod 2^k | y mod 2^k)`` with ``c = x_(k−1)·y_(k−1)``, the
    AND of the highest bits ORed. So a column c < k of the product is the OR of its partial products a_j·w_i with
    i + j = c; and column k − 1, if m > 1 of its partial products are set, carries m − 1 into column k.

    Parameters
    ----------
    k : int
        Low bits that are ORed, 2 to ``2·bits - 1``; 1 would be exact.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``loa{k}_…``, as in ``loa4_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    One LOA errs with the probability ``1 - (3/4)^k`` (the paper says about 40 % for k = 2, about 90 % for k = 8), by
    1/4 in the mean whatever k is, and by less than 2^k at most. The paper has the adder, and uses it next to its
    broken-array multiplier (see `broken_array`); this multiplier is that adder put into an array.

    H. R. Mahdiani, A. Ahmadi, S. M. Fakhraie, C. Lucas, "Bio-Inspired Imprecise Computational Blocks for Efficient
    VLSI Implementation of Soft-Computing Applications", IEEE Transactions on Circuits and Systems I 57(4), 2010.

    Examples
    --------
    >>> lower_part_or(2).table[3, 3].item()  # 011 | 110 in the low bits is 11, and 1·1 carries: 11 + 100 + 100
    11
    """
    return FAMILY.build(bits, a_signed, w_signed, k=k)


def lower_part_or_add(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """``x + y`` by the adder above, for integers ≥ 0."""
    upper = (x >> k) + (y >> k) + ((x & y) >> k - 1 & 1)
    return upper << k | (x | y) & (1 << k) - 1


def _unsigned(a: np.ndarray, w: np.ndarray, k: int, bits: int) -> np.ndarray:
    total = np.zeros_like(a)
    for i in range(bits):
        total = lower_part_or_add(total, (a << i) * (w >> i & 1), k)
    return total


FAMILY = Family("loa{k}", _unsigned, lambda bits: {"k": range(2, 2 * bits)}, by_width=True)
