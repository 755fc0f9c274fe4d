"""A multiplier with a random error, for tests: nothing that a table may lack does it have."""

from __future__ import annotations

import numpy as np

from ..multiplier import Multiplier
from .family import Family


def random_error(seed: int, m: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False) -> Multiplier:
    """``a·w + h(seed, a, w) mod (2m + 1) − m``, a fixed error from −m to m for each pair of operands.

    The hash h is output number ``65536·seed + 256·(a mod 256) + (w mod 256) + 1`` of the generator SplitMix64 started
    at 0, an unsigned 64-bit integer: the same table everywhere, and pairs that agree in value agree in error, whatever
    their formats. The table does not commute, and its row and column 0 are not zero.

    Parameters
    ----------
    seed : int
        0 to 999. `list_multipliers` lists 0 and 1.
    m : int
        Largest error, 1 to 999. `list_multipliers` lists 1, 16 and 256.
    bits : int
        Width of both operands, 2 to 8.
    a_signed, w_signed : bool
        Operands enter by their values.

    Returns
    -------
    Multiplier
        Named ``random_s{seed}_m{m}_…``, as in ``random_s0_m16_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    The expected mean error is 0, mean absolute error ``m·(m + 1)/(2m + 1)``, mean squared error ``m·(m + 1)/3`` and
    share of wrong products ``2m/(2m + 1)``.

    G. L. Steele Jr., D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Examples
    --------
    >>> random_error(0, 16).table[0, :4].tolist()
    [-15, 5, -15, 9]
    """
    return FAMILY.build(bits, a_signed, w_signed, seed=seed, m=m)


def splitmix64(n: np.ndarray) -> np.ndarray:
    """Output number n of SplitMix64 started at 0, counted from 1; uint64 in and out."""
    z = n * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def _native(a: np.ndarray, w: np.ndarray, seed: int, m: int) -> np.ndarray:
    number = (seed << 16) + ((a & 0xFF) << 8) + (w & 0xFF) + 1
    error = splitmix64(number.astype(np.uint64)) % np.uint64(2 * m + 1)
    return a * w + error.astype(np.int64) - m


FAMILY = Family(
    "random_s{seed}_m{m}",
    ranges=lambda bits: {"seed": range(1000), "m": range(1, 1000)},
    wide=(),
    native=_native,
    listed=lambda bits: {"seed": (0, 1), "m": (1, 16, 256)},
)
