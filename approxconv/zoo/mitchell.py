"""Mitchell's logarithmic multiplier."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family, leading_one


def mitchell(bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Antilogarithm of the summed logarithms, both approximated by straight lines between powers of two.

    With ``a = 2^p·(1 + x)`` and ``w = 2^q·(1 + y)``, 0 ≤ x, y < 1, the product is ``2^(p+q)·(1 + x + y)`` if
    x + y < 1, else ``2^(p+q+1)·(x + y)``; 0 if an operand is 0. Both are integers: nothing is rounded.

    Parameters
    ----------
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``mitchell_…``, as in ``mitchell_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The product is never too large, and too small by 1/9 (11.1 %) at most, where x = y = 1/2: 3·3 gives 8.

    J. N. Mitchell, "Computer Multiplication and Division Using Binary Logarithms", IRE Transactions on Electronic
    Computers EC-11(4), 1962.

    Examples
    --------
    >>> mitchell().table[3, 3].item()
    8
    """
    return FAMILY.build(bits, a_signed, w_signed)


def _unsigned(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    p, q = np.maximum(leading_one(a), 0), np.maximum(leading_one(w), 0)
    one = 1 << p + q
    fractions = (a - (1 << p) << q) + (w - (1 << q) << p)
    return np.where((a == 0) | (w == 0), 0, np.where(fractions < one, one + fractions, 2 * fractions))


FAMILY = Family("mitchell", _unsigned)
