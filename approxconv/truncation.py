"""The best approximation of a table by the exact product and a few terms, and how far off it can be. Not exact."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._display import Shown, html_table, titled
from ._versioned import once_per_version
from .certificate import largest_partial_sums, weight_codes
from .low_rank import count_terms
from .multiplier import Multiplier, check_table_shape, table_values

# Half the distance from 1 to the next number.
_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_Signs = tuple[bool, bool]


@dataclass(frozen=True, eq=False)
class Truncation(Shown):
    """``table[a, w] ≈ value(a)·value(w) + Σ_r f[r, a]·g[r, w]``: approximate, by choice.

    Made by `truncate`; its tensors are shared by all who ask for that table's, so they are not to be written to.

    Attributes
    ----------
    f : Tensor
        float64, ``(R, 2**a_bits)``, by activation code.
    g : Tensor
        float64, ``(R, 2**w_bits)``, by weight code. Terms come in descending order of ``‖f_r‖·‖g_r‖``.
    a_signed, w_signed : bool
        How a code is read in the exact product.
    """

    f: Tensor
    g: Tensor
    a_signed: bool
    w_signed: bool
    _error: Tensor

    @property
    def rank(self) -> int:
        """R, the number of terms besides the exact product."""
        return len(self.f)

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """F and G with ``approximation = Fᵀ·G``, float64, ``(1 + R, 2**bits)``; the product's values come first."""
        values = table_values(self._error.shape, (self.a_signed, self.w_signed))
        return tuple(
            torch.cat([torch.from_numpy(v).double()[None], side])
            for v, side in zip(values, (self.f, self.g), strict=True)
        )

    def table(self) -> Tensor:
        """The approximation, float64, ``(2**a_bits, 2**w_bits)``, by code."""
        f, g = self.parts
        return f.T @ g

    def error(self) -> Tensor:
        """``approximation − table`` of each product, float64, by code."""
        return self._error

    @property
    def bound(self) -> float:
        """The largest error of one product: ``max |table − approximation|``."""
        return float(self._error.abs().max())

    @cached_property
    def _by_weight(self) -> tuple[Tensor, Tensor]:
        """By weight code: ``max_a |error|``, and ``max_a Σ_p |F[p, a]·G[p, w]|``."""
        return self._error.abs().amax(0), largest_partial_sums(self)

    def _rounding(self, depth: int, dtype: torch.dtype) -> float:
        """γ: the error of a sum of `depth` products relative to the sum of their terms' magnitudes.

        A term goes through at most as many roundings as there are terms, two more for its factors', and those of
        `table` in float64.
        """
        count = (depth + 1) * (1 + self.rank) + 4
        share = count * _UNIT[dtype]
        return share / (1 - share) if share < 1 else float("inf")

    def arithmetic(self, depth: int) -> torch.dtype:
        """What the engine sums `depth` products up in.

        float32 where its roundings cannot exceed the largest error of the approximation itself, else float64.
        """
        largest = float(self._by_weight[1].max())
        return torch.float32 if self._rounding(depth, torch.float32) * largest <= self.bound else torch.float64

    def error_bound(self, w: Tensor) -> Tensor:
        """How far the engine's int32 results can be from the exact sums of table entries, whatever the activations.

        ``Σ_k max_a |error[a, w[n, k]]| + γ·Σ_k max_a Σ_p |F[p, a]·G[p, w[n, k]]| + 1/2`` for each output channel n: the
        approximation's, that of the arithmetic (`arithmetic`), in any order, and the last rounding's. Where it is
        below 1 results are exact.

        Parameters
        ----------
        w : Tensor
            uint8 or int8 weight codes, of which the low bits count: ``(N, K)``, or ``(O, C/groups, kh, kw)``.

        Returns
        -------
        Tensor
            float64, ``(N,)``, on w's device.

        Raises
        ------
        ValueError
            w is no tensor of such a dtype and shape.

        Notes
        -----
        N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM 2002, section 3.1: a sum of n
        products in any order is off by at most ``γ_n = n·u/(1 − n·u)`` times the sum of their magnitudes.
        """
        rows = weight_codes(w, self.g.shape[1])
        errors, sums = (by_code.to(w.device)[rows].sum(1) for by_code in self._by_weight)
        depth = rows.shape[1]
        rounding = self._rounding(depth, self.arithmetic(depth)) * sums
        return (errors + rounding + 0.5) * (1 + 2**-30)  # and the roundings of this very formula, and underflows

    def __str__(self) -> str:
        terms = count_terms(self.rank)
        return f"approximate: table ≈ a·w + Σ f[a]·g[w] of {terms}, off by up to {self.bound:.6g} a product"

    def __repr__(self) -> str:
        return f"Truncation(approximate, rank={self.rank}, bound={self.bound:.6g})"

    def _repr_html_(self) -> str:
        rows = [
            ("terms besides the exact product", self.rank),
            ("largest error of a product", f"{self.bound:.6g}"),
            ("mean |error|", f"{float(self._error.abs().mean()):.6g}"),
            ("mean error", f"{float(self._error.mean()):.6g}"),
        ]
        return titled("Approximate: table ≈ a·w + Σ f[a]·g[w]", html_table(rows))


def check_rank(rank: int) -> int:
    """Return `rank` if it is an int of at least 0, else raise a ValueError that names it."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise ValueError(f"rank must be an int of at least 0, got {rank!r}")
    return rank


def truncate(multiplier: Multiplier | Tensor, rank: int) -> Truncation:
    """Approximate a table by the exact product and the `rank` largest terms of its error's singular values.

    With ``E = table − a·w = Σ_i σ_i·u_i·v_iᵀ`` it keeps ``i < rank``: of all of that rank the one with the least sum of
    squared errors, which is ``Σ_{i ≥ rank} σ_i²``.

    Parameters
    ----------
    multiplier : Multiplier or Tensor
        Any; of a bare int32 table ``(2**a_bits, 2**w_bits)``, on any device, codes are read as signed or unsigned,
        whichever leaves the least.
    rank : int
        Terms, 0 or more. Beyond the rank of E there are none.

    Returns
    -------
    Truncation
        On the CPU. The same object until the table is written to.

    Raises
    ------
    ValueError
        `multiplier` is neither, or `rank` no such number.

    Notes
    -----
    C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.

    Examples
    --------
    >>> from approxconv import get_multiplier
    >>> mitchell = get_multiplier("mitchell_8u")  # no exact factorisation
    >>> [round(truncate(mitchell, rank).bound) for rank in (0, 4, 32, 127)]
    [4096, 496, 69, 0]
    """
    check_rank(rank)
    if isinstance(multiplier, Multiplier):
        readings = [(bool(multiplier.a_signed), bool(multiplier.w_signed))]
        table = multiplier.table
    elif isinstance(multiplier, Tensor) and multiplier.dtype == torch.int32:
        check_table_shape(multiplier)
        readings, table = list(itertools.product((False, True), repeat=2)), multiplier
    else:
        got = multiplier.dtype if isinstance(multiplier, Tensor) else type(multiplier).__name__
        raise ValueError(f"multiplier must be a Multiplier or an int32 table, got {got}")
    # What is kept for all must be neither a tracer's fake tensor nor one of inference.
    with _disable_current_modes(), torch.inference_mode(False):
        return _spectra(table).truncation(readings, rank)


class _Spectra:
    """A table's errors by the reading of its codes, decomposed when first asked for."""

    def __init__(self, table: np.ndarray) -> None:
        self._table = table
        self._decomposed: dict[_Signs, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._known: dict[tuple[_Signs, int], Truncation] = {}

    def _svd(self, signs: _Signs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u, σ and v, without what is 0 but for roundings."""
        if signs not in self._decomposed:
            exact = np.multiply.outer(*table_values(self._table.shape, signs))
            u, s, v = np.linalg.svd(self._table - exact, full_matrices=False)
            rank = int((s > s[0] * max(self._table.shape) * np.finfo(s.dtype).eps).sum())
            self._decomposed[signs] = u[:, :rank], s[:rank], v[:rank]
        return self._decomposed[signs]

    def truncation(self, readings: list[_Signs], rank: int) -> Truncation:
        def left(signs: _Signs) -> tuple[float, int]:
            s = self._svd(signs)[1]
            return float((s[rank:] ** 2).sum()), len(s)

        signs = min(readings, key=left)
        if (signs, rank) not in self._known:
            u, s, v = self._svd(signs)
            f, g = (side[:rank] * np.sqrt(s[:rank, None]) for side in (u.T, v))
            errors = np.multiply.outer(*table_values(self._table.shape, signs)) + f.T @ g - self._table
            f, g, errors = (torch.from_numpy(np.ascontiguousarray(each)) for each in (f, g, errors))
            self._known[signs, rank] = Truncation(f, g, *signs, errors)
        return self._known[signs, rank]


@once_per_version
def _spectra(table: Tensor) -> _Spectra:
    return _Spectra(table.cpu().numpy().astype(np.float64))
