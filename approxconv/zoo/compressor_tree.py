"""Dadda multipliers whose low columns are reduced by approximate 4-2 compressors."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..multiplier import Multiplier
from .family import Family, choose


def compressor_tree(
    compressor: str, k: int, bits: int = 8, a_signed: bool = False, w_signed: bool = False
) -> Multiplier:
    """``a·w + Σ e·2^c`` over the compressors in columns c < `k`, e their outputs' value less their inputs' bits.

    A compressor replaces four bits of column c, ``x1 … x4``, by a ``sum`` there and a ``carry`` in column c + 1:

    - ``"momeni2"``: ``sum = ¬(x1⊕x2) ∨ ¬(x3⊕x4)``, ``carry = (x1∨x2)·(x3∨x4)``; errs for 4 inputs of 16.
    - ``"momeni1"`` has a carry-in and a carry-out too: ``sum`` is that above and ``¬cin``, ``carry = cin``, and what is
      ``carry`` above is ``cout``, a carry-in of the next column in the same stage; errs for 12 inputs of 32.
    - ``"akbari1"``: ``sum = x1``, ``carry = x4``; errs for 10 inputs of 16.

    The tree: a column's bits a_(c−i)·w_i stand in the order of i. One stage leaves 4 bits a column at most, the next 2;
    the two rows are then added exactly. A stage goes through the columns from the right. With h bits in a column and r
    carries that counters of this stage put into it, ``h + r − 4`` (or − 2) must go: a compressor takes away 3, as long
    as so many must; then a full adder 2 or a half adder 1. Each takes the column's next bits, ``x1`` first. The next
    stage finds the carries from the right, this column's sums and the bits left over, in this order.

    With ``"momeni1"`` the carry-outs of a column, then the carry of its half adder, enter the next column's counters,
    one each in their order: a compressor by its ``cin``, else 0; so does a full adder, which becomes a compressor with
    ``x4 = 0``; a half adder becomes a full adder. What finds no counter is left over.

    Parameters
    ----------
    compressor : str
        ``"momeni1"``, ``"momeni2"`` or ``"akbari1"``.
    k : int
        Columns whose compressors are approximate, 4 to ``2·bits - 1`` (all); up to 3 would be exact.
    bits : int
        Width of both operands, 4 to 8.
    a_signed, w_signed : bool
        Signed operands enter by their magnitudes (see `Family`).

    Returns
    -------
    Multiplier
        Named ``{compressor}_c{k}_…``, as in ``momeni2_c7_8u``.

    Raises
    ------
    ValueError
        An argument out of its range or of a wrong type.

    Notes
    -----
    Four zeros make a 1 in Momeni's compressors, so that a product by zero is not zero. The paper's Multipliers 3 and 4,
    of 8 bits with designs 1 and 2 in ``k = bits - 1`` columns, have 5888 and 9320 of the 65025 products without a zero
    right and mean errors of 0.9199e-3 and 0.7827e-3 times 65025, as here. Its Multipliers 1 and 2 (all columns) must be
    wired otherwise in the high columns: their mean errors, 0.06065 and 0.05352, are 0.05499 and 0.05017 here.

    A. Momeni, J. Han, P. Montuschi, F. Lombardi, "Design and Analysis of Approximate Compressors for Multiplication",
    IEEE Transactions on Computers 64(4), 2015.

    O. Akbari, M. Kamal, A. Afzali-Kusha, M. Pedram, "Dual-Quality 4:2 Compressors for Utilizing in Dynamic Accuracy
    Configurable Multipliers", IEEE Transactions on VLSI Systems 25(4), 2017: the approximate part of DQ4:2C1.

    Examples
    --------
    >>> compressor_tree("momeni2", 7).table[0, 0].item()  # a one in each of the columns 3 to 6
    120
    """
    return choose("compressor", compressor, _FAMILIES).build(bits, a_signed, w_signed, k=k)


def _unsigned(a: np.ndarray, w: np.ndarray, k: int, bits: int, compressor: str) -> np.ndarray:
    a_bits, w_bits = ([(x >> i & 1).astype(np.int8) for i in range(bits)] for x in (a, w))
    columns = [[a_bits[c - i] & w_bits[i] for i in range(max(c - bits + 1, 0), min(c + 1, bits))] for c in range(k)]
    products = a * w
    for height in (4, 2):
        columns, errors = _stage(columns, height, compressor)
        for c, lost in errors:
            products += lost.astype(np.int64) << c
    return products


def _stage(columns: list[list[np.ndarray]], height: int, compressor: str) -> tuple[list, list]:
    chained = compressor == "momeni1"
    reduced, errors = [], []
    carries, chain, arriving = [], [], 0
    for c, column in enumerate(columns):
        excess = len(column) + arriving - height
        column, sums, next_carries, couts, half_carries, arriving = list(column), [], [], [], [], 0
        while excess > 0:
            taken = min(excess, 3) + 1
            excess -= taken - 1
            arriving += 1
            x, column = column[:taken], column[taken:]
            if chain and taken == 2:
                x.append(chain.pop(0))
            elif chain and taken == 3:
                x.append(np.zeros_like(x[0]))
            ones = sum(x)
            if len(x) == 4:
                total, carry = _compress(x, compressor)
                lost = total + 2 * carry - ones
                if chained:
                    cin = chain.pop(0) if chain else np.zeros_like(x[0])
                    lost += cin & ~total
                    couts.append(carry)
                    total, carry = total & ~cin, cin
                errors.append((c, lost))
                next_carries.append(carry)
            else:
                total, carry = ones & 1, ones >> 1
                (half_carries if chained and len(x) == 2 else next_carries).append(carry)
            sums.append(total)
        reduced.append([*carries, *sums, *column, *chain])
        carries, chain = next_carries, couts + half_carries
    return reduced, errors


def _compress(x: list[np.ndarray], compressor: str) -> tuple[np.ndarray, np.ndarray]:
    x1, x2, x3, x4 = x
    if compressor == "akbari1":
        return x1, x4
    return (x1 ^ x2 ^ 1) | (x3 ^ x4 ^ 1), (x1 | x2) & (x3 | x4)


_FAMILIES = {
    compressor: Family(
        f"{compressor}_c{{k}}",
        partial(_unsigned, compressor=compressor),
        lambda bits: {"k": range(4, 2 * bits)},
        widths=range(4, 9),
        wide=(),
        by_width=True,
    )
    for compressor in ("momeni1", "momeni2", "akbari1")
}
FAMILIES = tuple(_FAMILIES.values())
