"""Partial product perforation."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def perforated(j: int, k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Sum of all partial products but `k` successive ones from the `j`-th: ``Σ a·w_i·2^i`` over i < j and i ≥ j + k.

    Parameters
    ----------
    j : int
        The first partial product omitted, 0 to ``bits - 1``. It is a bit of the weight, so that the multiplier does not
        commute.
    k : int
        How many are omitted, 1 to ``bits - 1``. There are none past the last: more than ``bits - j`` omit no more.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`), not through a Baugh-Wooley array or Booth recoding.

    Returns
    -------
    Multiplier
        Named ``perf_j{j}_k{k}_…``, as in ``perf_j1_k2_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    For unsigned operands the error is never positive. Up to ``j + k = n`` its mean magnitude over all pairs, relative
    to the largest product, is the paper's ``NMED = 2^j·(2^k − 1) / (4·(2^n − 1))`` for n-bit operands. With j = 0 it is
    the broken-array multiplier of ``h = k``, ``v = 0``.

    G. Zervakis, K. Tsoumanis, S. Xydis, D. Soudris, K. Pekmestzi, "Design-Efficient Approximate Multiplication Circuits
    Through Partial Product Perforation", IEEE Transactions on VLSI Systems 24(10), 2016.

    Examples
    --------
    >>> perforated(1, 2).table[10, 0b1111].item()  # 10 · 0b1001
    90
    """
    return FAMILY.build(bits, a_signed, w_signed, j=j, k=k)


def _unsigned(a: np.ndarray, w: np.ndarray, j: int, k: int) -> np.ndarray:
    omitted = (1 << k) - 1 << j
    return a * (w & ~omitted)


FAMILY = Family("perf_j{j}_k{k}", _unsigned, lambda bits: {"j": range(bits), "k": range(1, bits)})
