"""The error-tolerant multiplier (ETM)."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family, leading_one


def etm(k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """Exact product of the high parts with ones below: ``⌊a/2^k⌋·⌊w/2^k⌋·2^(2k) + F``; a·w where both high parts are 0.

    The low parts, of `k` bits, are not multiplied but read from their highest bit down. F has 2k bits: where the first
    one is met in either part, at bit t, it has a one at bit k + t and at all below; it is 0 where there is none.

    Parameters
    ----------
    k : int
        Bits of the low (non-multiplication) part, 1 to half of `bits`, so that the multiplier of the high parts also
        takes the low ones. In the paper half of `bits`.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``etm{k}_…``, as in ``etm4_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The error has either sign. It is large next to the product where one high part is zero and the other is not, and an
    unsigned multiplication by 0 may not give 0. At 12 bits with k = 6 the paper gives accuracies, one minus the
    relative error, of 94 to 100 % for samples that it does not name; over all operands but 0 the median is 96.4 %, and
    71 % of the pairs lie in that range.

    K. Y. Kyaw, W. L. Goh, K. S. Yeo, "Low-Power High-Speed Multiplier for Error-Tolerant Application", EDSSC 2010.

    Examples
    --------
    >>> f"{etm(4).table[0b0011_0010, 0b0101_0100].item():016b}"  # 3 · 5, then ones from the bit of 0b0100 down
    '0000111101111111'
    """
    return FAMILY.build(bits, a_signed, w_signed, k=k)


def _unsigned(a: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    ones_from = leading_one((a | w) & (1 << k) - 1)
    fill = np.where(ones_from >= 0, (1 << ones_from + k + 1) - 1, 0)
    return np.where((a | w) >> k > 0, ((a >> k) * (w >> k) << 2 * k) + fill, a * w)


FAMILY = Family("etm{k}", _unsigned, lambda bits: {"k": range(1, bits // 2 + 1)})
