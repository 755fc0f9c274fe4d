"""Integer matrices of low rank: pivots, bases of the lattices that their rows span, reduction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_TERMS = 64

# A rank modulo a prime is at most the true one. A table for which it is less with all of these is not factorised.
PRIMES = (2**31 - 1, 2**31 - 19, 2**31 - 61)
# Rows or columns by which those of a long matrix are known well enough to be reduced.
_FEW = 256
_REFINEMENTS = 2


def find_pivots(matrix: np.ndarray, prime: int, most: int = MOST_TERMS) -> tuple[list[int], list[int]] | None:
    """Rows and columns whose minor is a multiple neither of `prime` nor 0, all there are; None if over `most`."""
    rest = matrix % prime
    rows: list[int] = []
    columns: list[int] = []
    while (left := rest.any(axis=1)).any():
        if len(rows) == most:
            return None
        row = int(np.argmax(left))
        column = int(np.argmax(rest[row] != 0))
        pivot = rest[row] * pow(int(rest[row, column]), -1, prime) % prime
        rest = (rest - rest[:, column, None] * pivot) % prime
        rows.append(row)
        columns.append(column)
    return rows, columns


def row_lattice(
    matrix: np.ndarray, pivots: tuple[list[int], list[int]] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """A basis (r, columns) of the lattice that the rows span and, before it, their coordinates (rows, r).

    `pivots` are those modulo the first prime, if known. None if no prime tells the rank.
    """
    for prime in PRIMES:
        pivots = pivots or find_pivots(matrix, prime)
        if pivots is None:
            return None
        rows, columns = pivots
        lattice = cross_lattice(matrix[:, columns], matrix[rows], pivots)
        if lattice is not None and is_product(matrix, *lattice):
            return lattice
        pivots = None
    return None


def cross_lattice(
    columns: np.ndarray, rows: np.ndarray, pivots: tuple[Sequence[int], Sequence[int]]
) -> tuple[np.ndarray, np.ndarray] | None:
    """`row_lattice` of a matrix of which only the columns and rows of its pivots are known.

    Parameters
    ----------
    columns, rows : numpy.ndarray
        int64, ``(m, r)`` and ``(r, n)``.
    pivots : pair of sequence of int
        Which rows and columns of the matrix they are; its minor there is not 0.

    Returns
    -------
    pair of numpy.ndarray or None
        Coordinates ``(m, r)`` and basis ``(r, n)``. Their product is the matrix if its rank is r. None if the matrix is
        found not to be of rank r, or float64 does not find them.
    """
    at_rows, at_columns = (list(side) for side in pivots)
    # A vector's entries in these columns determine the others.
    basis = reduced_basis(columns, at_rows)
    few = sorted({*at_columns, *range(0, rows.shape[1], -(-rows.shape[1] // _FEW))})
    coordinates = divide(columns, basis)
    known = None if coordinates is None else divide(rows[:, few].T, coordinates[at_rows].T)
    if known is None:
        return None
    basis = lll(known.T)[:, np.searchsorted(few, at_columns)]
    coordinates = divide(columns, basis)
    whole = None if coordinates is None else divide(rows.T, coordinates[at_rows].T)
    return None if whole is None else (coordinates, np.ascontiguousarray(whole.T))


def reduced_basis(generators: np.ndarray, independent: list[int]) -> np.ndarray:
    """An LLL-reduced basis, square, of the lattice that some rows span; as many of them as columns are independent."""
    from flint import fmpz_mat

    rank = generators.shape[1]
    basis = lll(generators[independent])
    while True:
        # What the others add to these: the Hermite form of the rows as they are can take seconds.
        rest = generators - _nearest(generators, basis) @ basis
        rest = rest[rest.any(axis=1)]
        if not len(rest):
            return basis
        rest = np.unique(rest[:: -(-len(rest) // _FEW)], axis=0)
        hermite = fmpz_mat(np.vstack([basis, rest]).tolist()).hnf().entries()[: rank * rank]
        basis, previous = lll(np.array([int(entry) for entry in hermite], object).reshape(rank, rank)), basis
        if np.array_equal(basis, previous):  # what is left is float64's inaccuracy
            return basis


def lll(basis: np.ndarray) -> np.ndarray:
    """The LLL-reduced basis of the lattice that independent rows span."""
    from flint import fmpz_mat

    entries = fmpz_mat(basis.tolist()).lll().entries()
    return np.array([int(entry) for entry in entries], np.int64).reshape(basis.shape)


def divide(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray | None:
    """The integer X with ``X @ basis == matrix``; None if float64 does not find it."""
    quotient = _nearest(matrix, basis)
    if not is_product(matrix, quotient, basis):
        # Of an ill-conditioned basis float64 finds the leading digits, and then those of what they leave.
        for _ in range(_REFINEMENTS):
            quotient += _nearest(matrix - quotient @ basis, basis)
        return quotient if is_product(matrix, quotient, basis) else None
    return quotient


def _nearest(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """``matrix @ basis⁻¹`` by float64, rounded."""
    return np.rint(np.linalg.solve(basis.T.astype(float), matrix.T.astype(float)).T).astype(np.int64)


def is_product(matrix: np.ndarray, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether ``matrix == x @ y`` over the integers."""
    bound = float(np.abs(x).max()) * float(np.abs(y).max()) * len(y)
    if bound < 2**53:
        return np.array_equal(matrix, x.astype(float) @ y.astype(float))
    return bound < 2**62 and np.array_equal(matrix, x @ y)


def reduce_together(f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce F (rows, r) and G (r, columns) by steps ``G_i += c·G_j``, ``F_j −= c·F_i``, which leave ``F·G`` as it is.

    A step lowers ``Σ_i ‖F_i‖²·‖G_i‖²``. Those of a round have no index in common, so that their gains add up.
    """
    # Only their Gram matrices take part: small, and none of the BLAS threads that other work may keep waiting.
    gram_f, gram_g = (side.T @ side for side in (f.astype(float), g.T.astype(float)))
    for_f, for_g = np.eye(len(g), dtype=np.int64), np.eye(len(g), dtype=np.int64)
    while True:
        norms_f, norms_g = np.diag(gram_f), np.diag(gram_g)
        weight = norms_f[:, None] * norms_g
        slope = gram_f * norms_g - norms_f[:, None] * gram_g
        step = np.rint(slope / (2 * weight))
        np.fill_diagonal(step, 0)
        gain = 2 * step * (slope - step * weight)
        least = max(gain.max() / 5, 1e-4 * weight.trace())
        if gain.max() <= least:
            return f @ for_f, for_g @ g
        while gain.flat[best := int(np.argmax(gain))] > least:
            i, j = divmod(best, len(g))
            c = int(step[i, j])
            for_g[i] += c * for_g[j]
            for_f[:, j] -= c * for_f[:, i]
            gram_g[i] += c * gram_g[j]
            gram_g[:, i] += c * gram_g[:, j]
            gram_f[j] -= c * gram_f[i]
            gram_f[:, j] -= c * gram_f[:, i]
            gain[[i, j]] = gain[:, [i, j]] = 0
