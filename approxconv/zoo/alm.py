"""Logarithmic multipliers whose logarithms are added by an approximate adder (ALM)."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..multiplier import Multiplier
from .family import Family, choose, leading_one
from .lower_part_or import lower_part_or_add


def alm(adder: str, m: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Mitchell's antilogarithm of ``L(a) ⊞ L(w)``, where the adder ⊞ does not add the `m` low bits.

    With ``x = 2^p·(1 + f)``, 0 ≤ f < 1, the logarithm is the integer ``L(x) = (p + f)·2^F``, F = `bits` − 1 bits of it
    the fraction. From the sum ``s = (k + g)·2^F`` the product is ``⌊2^k·(1 + g)⌋``; 0 if an operand is 0. The sum is
    ``(⌊L(a)/2^m⌋ + ⌊L(w)/2^m⌋ + c)·2^m + r``, the carry c the AND of the logarithms' bits m − 1, and

    - ``"soa"``, the set-one adder: ``r = 2^m − 1``;
    - ``"loa"``, the lower-part-OR adder: ``r = (L(a) | L(w)) mod 2^m``.

    Parameters
    ----------
    adder : str
        ``"soa"`` or ``"loa"``.
    m : int
        Low bits of the sum that are not added, 1 to ``bits - 1``, all of the fraction; `mitchell` is 0.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``alm_{adder}{m}_…``, as in ``alm_soa3_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    Mitchell's product is never too large, and the ones set make up for some of it: at 16 bits ALM-SOA has its smallest
    mean error with m = 11, 13 % below that of the exact adder; the paper, too, has it below. Its third adder, ALM-MAA3,
    is not here.

    W. Liu, J. Xu, D. Wang, C. Wang, P. Montuschi, F. Lombardi, "Design and Evaluation of Approximate Logarithmic
    Multipliers for Low Power Error-Tolerant Applications", IEEE Transactions on Circuits and Systems I 65(9), 2018.

    Examples
    --------
    >>> alm("soa", 3).table[3, 3].item()  # ⌊8·(1 + 7/128)⌋
    8
    """
    return choose("adder", adder, _FAMILIES).build(bits, a_signed, w_signed, m=m)


def _unsigned(a: np.ndarray, w: np.ndarray, m: int, bits: int, adder: str) -> np.ndarray:
    fraction_bits = bits - 1
    total = lower_part_or_add(*(_logarithm(np.maximum(x, 1), fraction_bits) for x in (a, w)), m)
    if adder == "soa":
        total |= (1 << m) - 1
    characteristic = total >> fraction_bits
    one = 1 << fraction_bits
    products = (one + (total & one - 1) << characteristic) >> fraction_bits
    return np.where((a == 0) | (w == 0), 0, products)


def _logarithm(x: np.ndarray, fraction_bits: int) -> np.ndarray:
    characteristic = leading_one(x)
    fraction = x - (1 << characteristic) << fraction_bits - characteristic
    return characteristic << fraction_bits | fraction


_FAMILIES = {
    adder: Family(
        f"alm_{adder}{{m}}",
        partial(_unsigned, adder=adder),
        lambda bits: {"m": range(1, bits)},
        by_width=True,
    )
    for adder in ("soa", "loa")
}
FAMILIES = tuple(_FAMILIES.values())
