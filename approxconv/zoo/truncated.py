"""Operand truncation."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def truncated(k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Product of the operands without their low `k` bits: ``(⌊a/2^k⌋·2^k) · (⌊w/2^k⌋·2^k)``.

    Parameters
    ----------
    k : int
        Bits of each operand set to zero, 1 to ``bits - 1``.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands are truncated in magnitude, towards zero. A two's-complement circuit that drops wires rounds
        towards −∞ instead: ``Multiplier.from_function(lambda a, w: (a >> k << k) * (w >> k << k), …)``.

    Returns
    -------
    Multiplier
        Named ``trunc{k}_…``, as in ``trunc2_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    Over all unsigned operand pairs the mean error is ``((2^n − 2^k)² − (2^n − 1)²) / 4`` for n-bit operands.

    Surveyed in H. Jiang, F. J. H. Santiago, H. Mo, L. Liu, J. Han, "Approximate Arithmetic Circuits: A Survey,
    Characterization, and Recent Applications", Proceedings of the IEEE 108(12), 2020.

    Examples
    --------
    >>> truncated(2).table[7, 13].item()  # 4 · 12
    48
    """
    return FAMILY.build(bits, a_signed, w_signed, k=k)


def _unsigned(a: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    return (a >> k << k) * (w >> k << k)


FAMILY = Family("trunc{k}", _unsigned, lambda bits: {"k": range(1, bits)})
