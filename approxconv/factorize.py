"""The exact integer low-rank form of a multiplier: ``table = s·a·w + Σ_r f_r[a]·g_r[w]`` with int8 factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._versioned import once_per_version
from .lattice import MOST_TERMS, PRIMES, divide, find_pivots, lll, reduce_together, row_lattice
from .low_rank import LowRank, search_once, span, varying_terms
from .multiplier import Multiplier, check_flag, table_values
from .wide import WideFactorization, WideMultiplier, factorize_wide

if TYPE_CHECKING:
    from .certificate import Certificate

_LOW, _HIGH = -128, 127
_MOST_PRODUCT = _LOW * _LOW
_MOST_DOUBLINGS = 12
_TRY_ALL_UP_TO = 16
_TRY_BOTH_UP_TO = 32
_FEW_DIGITS = 4
# Side of the corner of a table by which one of high rank is told.
_SAMPLE = 80
# Terms over the limit that may yet be merged.
_SLACK = 16
# Part of the names of stored results: to be raised when other ones are to be found.
_REVISION = 1

# A term's two vectors of integers, by code.
_Term = tuple[np.ndarray, np.ndarray]
# A weight and what it multiplies.
_Digit = tuple[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Factorization(LowRank):
    """``table[a, w] = scale·value(a)·value(w) + Σ_r f[r, a]·g[r, w]`` over the integers, a and w being codes.

    Made by `factorize`; its tensors are shared by all who ask for that table's, so they are not to be written to.

    Attributes
    ----------
    scale : int
        0 or 1: whether the exact product is part of the sum.
    f : Tensor
        int8, ``(R, 2**a_bits)``, by activation code.
    g : Tensor
        int8, ``(R, 2**w_bits)``, by weight code. Terms come in descending order of ``‖f_r‖·‖g_r‖``.
    a_signed, w_signed : bool
        How a code is read in the exact product.
    """

    _left = "table"

    def certificate(self, w: Tensor) -> Certificate:
        """Which arithmetics add up the terms without an error for these weights, whatever the activations, and why.

        Parameters
        ----------
        w : Tensor
            uint8 or int8 weight codes, of which the low bits count: ``(N, K)``, or ``(O, C/groups, kh, kw)``.

        Returns
        -------
        Certificate
            Prints as a report.

        Raises
        ------
        ValueError
            w is no tensor of such a dtype and shape.

        Notes
        -----
        Integers add up exactly in a float accumulator of p bits, in any order, if no partial sum reaches ``2**p``.
        In int32, additions are modulo 2³²: a sum that fits is right whatever its partial sums. See docs/exactness.md.

        Examples
        --------
        >>> from approxconv import get_multiplier
        >>> w = torch.full((1, 600), 127, dtype=torch.int8)
        >>> certificate = factorize(get_multiplier("exact_8u_8s")).certificate(w)
        >>> certificate.bound, certificate.exact("int8"), certificate.exact("fp32"), certificate.exact("fp64")
        (19431000, True, False, True)
        """
        from .certificate import certify

        return certify(self, w)

    def reconstruct(self) -> Tensor:
        """The table, int64, ``(2**a_bits, 2**w_bits)``, by code."""
        f, g = (side.double() for side in self.parts)
        return (f.T @ g).long()  # exact: 65·2**16 is far below 2**53

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factorization):
            return NotImplemented
        return (
            (self.scale, self.a_signed, self.w_signed) == (other.scale, other.a_signed, other.w_signed)
            and torch.equal(self.f, other.f)
            and torch.equal(self.g, other.g)
        )

    def __hash__(self) -> int:
        factors = (side.numpy() for side in (self.f, self.g))
        return hash((self.scale, self.a_signed, self.w_signed, *((side.shape, side.tobytes()) for side in factors)))

    def __str__(self) -> str:
        return f"{self._formula}, f {span(self.f)}, g {span(self.g)}" if self.rank else self._formula

    def __repr__(self) -> str:
        return f"Factorization(scale={self.scale}, rank={self.rank})"


def factorize(multiplier: Multiplier | WideMultiplier) -> Factorization | WideFactorization | None:
    """Write a table as ``s·a·w + Σ_{r<R} f_r[a]·g_r[w]`` with int8 factors and few terms, exactly.

    Parameters
    ----------
    multiplier : Multiplier or WideMultiplier
        Any, of any width and signedness. A `WideMultiplier` goes to `factorize_wide`.

    Returns
    -------
    Factorization or None
        The form with the fewest terms of those found with s = 1 and s = 0; among equals with the fewest products that
        take a GEMM (see `Factorization.products`), then with s = 1, then with the smallest factors. Compared with the
        table entry by entry. None if none of at most 64 terms is found.

        The same object on every call until the table is written to. Kept on disk too, by the table's hash, beside the
        compiled kernels; what is read from there is compared with the table anew.

    Raises
    ------
    ValueError
        `multiplier` is none.

    Notes
    -----
    For both s (above rank 32 for the one of less rank only), with ``E = table − s·a·w`` of rank r:

    1. The search ends where the rank modulo a prime, which is at most r, or ``max|E|/2^14`` is over 64.
    2. A basis G of the lattice that the rows of E span comes from their Hermite normal form and is reduced by LLL; F
       are the rows' coordinates in it: ``E = F·G``. The same for the columns of G gives ``E = F·C·V`` with C (r, r),
       where the rows of V span all integer vectors that those of E span over Q.
    3. C may be part of F, of G, or partly of both: each lattice between ``Z^r·C·V`` and ``Z^r·V`` has its own F. Those
       tried are ``Z^r·C·V + q·Z^r·V`` for powers q of two. The larger q, the larger G and the smaller F.
    4. Both are reduced together, by steps ``G_i += c·G_j``, ``F_j −= c·F_i`` that lower ``Σ_i ‖F_i‖²·‖G_i‖²``.
    5. A term beyond int8 is split: one of its vectors is ``Σ_i k_i·x_i`` with x_i of int8 and integers k_i by which
       the other can be multiplied. An ``x_i`` that is constant is preferred.

    H. Cohen, "A Course in Computational Algebraic Number Theory", Springer 1993, section 2.4, for Hermite normal forms.
    A. K. Lenstra, H. W. Lenstra, L. Lovász, "Factoring Polynomials with Rational Coefficients", Mathematische Annalen
    261, 1982. M. Seysen, "Simultaneous Reduction of a Lattice Basis and its Reciprocal Basis", Combinatorica 13, 1993.

    Examples
    --------
    >>> from approxconv import get_multiplier
    >>> print(factorize(get_multiplier("kulkarni_8s")))
    table = a·w + Σ f[a]·g[w] of 1 term, f −21 to 21, g −42 to 42
    >>> print(factorize(get_multiplier("mitchell_8u")))
    None
    """
    if isinstance(multiplier, WideMultiplier):
        return factorize_wide(multiplier)
    if not isinstance(multiplier, Multiplier):
        raise ValueError(f"multiplier must be a Multiplier, got {multiplier!r:.60}")
    signs = check_flag("a_signed", multiplier.a_signed), check_flag("w_signed", multiplier.w_signed)
    # What is kept for all must be neither a tracer's fake tensor nor one of inference, whose writes do not count.
    with _disable_current_modes(), torch.inference_mode(False):
        found = _found(multiplier.table)
        if signs not in found or _written(*found[signs]):
            result = _load_or_search(multiplier)
            found[signs] = result, result and (result.f._version, result.g._version)
        return found[signs][0]


@once_per_version
def factorize_table(table: Tensor) -> Factorization | None:
    """`factorize` of a bare table, which does not say how its codes are read: in the reading nearest to products.

    Parameters
    ----------
    table : Tensor
        int32, ``(2**a_bits, 2**w_bits)``, on any device.

    Returns
    -------
    Factorization or None
        On the CPU. The same object until the table is written to.
    """
    entries = table.cpu().numpy().astype(np.int64)
    sample = entries[:_SAMPLE, :_SAMPLE] if min(entries.shape) >= _SAMPLE else entries
    # The product changes the rank by 1 at most, so that a random table is told from its corner.
    if find_pivots(sample, PRIMES[0], MOST_TERMS + 1) is None:
        return None
    errors = errors_by_signs(entries)
    a_signed, w_signed = min(errors, key=lambda signs: np.abs(errors[signs]).sum())
    return factorize(Multiplier(table.cpu(), a_signed=a_signed, w_signed=w_signed))


def errors_by_signs(entries: np.ndarray) -> dict[tuple[bool, bool], np.ndarray]:
    """``entries - a·w`` by code, in every reading of the codes: by the activations' and the weights' signedness.

    Parameters
    ----------
    entries : ndarray
        int64, ``(2**a_bits, 2**w_bits)``.
    """
    return {
        signs: entries - np.multiply.outer(*table_values(entries.shape, signs))
        for signs in itertools.product((False, True), repeat=2)
    }


@once_per_version
def _found(table: Tensor) -> dict[tuple[bool, bool], tuple[Factorization | None, tuple[int, int] | None]]:
    """What is known of this version of a table, by the operands' signedness; filled by `factorize`."""
    return {}


def _written(result: Factorization | None, versions: tuple[int, int] | None) -> bool:
    """Whether a result's tensors were written to after it was kept."""
    return result is not None and (result.f._version, result.g._version) != versions


def _load_or_search(multiplier: Multiplier) -> Factorization | None:
    table = multiplier.table.numpy().astype(np.int64)
    a, w = multiplier.operand_values()
    key = f"factorization-{_REVISION}-{multiplier.content_hash}"
    form = search_once(key, lambda: _search(table, a, w), lambda file: _load(file, table, a, w))
    if form is None:
        return None
    f, g = (torch.from_numpy(side) for side in (form.f, form.g))
    return Factorization(form.scale, f, g, multiplier.a_signed, multiplier.w_signed)


@dataclass(frozen=True)
class _Form:
    """What the search finds: f (R, rows) and g (R, columns), int8, C-contiguous."""

    scale: int
    f: np.ndarray
    g: np.ndarray

    def is_exact(self, table: np.ndarray, a: np.ndarray, w: np.ndarray) -> bool:
        """Whether it is `table`, compared entry by entry."""
        product = np.multiply.outer(a, w) if self.scale else 0
        return np.array_equal(table, product + _product(self.f.T, self.g))

    @property
    def merit(self) -> tuple[int, int, int, int]:
        """What is to be small: terms, products in a GEMM, the other scale, the largest factor."""
        largest = max((int(np.abs(side.astype(np.int64)).max()) for side in (self.f, self.g) if side.size), default=0)
        return len(self.f), self.scale + varying_terms(self.f, self.g), 1 - self.scale, largest


def _load(file: Mapping[str, np.ndarray], table: np.ndarray, a: np.ndarray, w: np.ndarray) -> _Form:
    """What was stored, or a ValueError if that is not this table."""
    form = _Form(int(file["scale"]), *(np.ascontiguousarray(file[name]) for name in "fg"))
    shapes = form.f.shape, form.g.shape
    count = len(form.f)
    if (
        form.scale not in (0, 1)
        or count > MOST_TERMS
        or shapes != ((count, len(a)), (count, len(w)))
        or not form.f.dtype == form.g.dtype == np.int8
        or not form.is_exact(table, a, w)
    ):
        raise ValueError("factors of another table")
    return form


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x @ y`` of int8 matrices, int64: in float64, which is exact and much faster, as 64·2^14 is far below 2^53."""
    return (x.astype(np.float64) @ y.astype(np.float64)).astype(np.int64)


def _search(table: np.ndarray, a: np.ndarray, w: np.ndarray) -> _Form | None:
    """The best form of a table that is found with either scale; exact, or None."""
    tasks = []
    for scale in (1, 0):
        error = table - scale * np.multiply.outer(a, w)
        fewest = -(-int(np.abs(error).max()) // _MOST_PRODUCT)
        pivots = find_pivots(error, PRIMES[0]) if fewest <= MOST_TERMS else None
        if pivots is not None:
            tasks.append((max(len(pivots[0]), fewest), 1 - scale, error, pivots))
    best = None
    for number, (bound, other, error, pivots) in enumerate(sorted(tasks, key=lambda task: task[:2])):
        most = MOST_TERMS if best is None else len(best.f)
        if bound > most or (number and len(pivots[0]) > _TRY_BOTH_UP_TO):
            continue
        with suppress(np.linalg.LinAlgError, OverflowError):  # numbers that float64 or int64 do not hold: none found
            for terms in _factorisations(error, pivots, most):
                form = _Form(1 - other, *_as_int8(terms, error.shape))
                if (best is None or form.merit < best.merit) and form.is_exact(table, a, w):
                    best = form
    return best


def _as_int8(terms: Sequence[_Term], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Stack terms as f (R, rows) and g (R, columns), the largest first, each f beginning positive where g lets it."""
    terms = sorted(terms, key=lambda term: -int(np.square(term[0]).sum()) * int(np.square(term[1]).sum()))
    f, g = (
        np.array([term[side] for term in terms], np.int64).reshape(len(terms), length)
        for side, length in enumerate(shape)
    )
    first = np.take_along_axis(f, (f != 0).argmax(axis=1)[:, None], axis=1)
    turned = (first < 0) & ~((f == _LOW).any(axis=1) | (g == _LOW).any(axis=1))[:, None]
    return tuple(np.where(turned, -side, side).astype(np.int8) for side in (f, g))


def _factorisations(error: np.ndarray, pivots: tuple[list[int], list[int]], most: int) -> Iterator[list[_Term]]:
    """Sums of at most `most` terms of int8 that are `error`, one for every lattice that is tried."""
    if not error.any():
        yield []
        return
    outer = row_lattice(error, pivots)
    inner = outer and row_lattice(np.ascontiguousarray(outer[1].T))
    if not inner:
        return
    (f, _), (v, core) = outer, (side.T for side in inner)
    # With determinant 1 or −1 there is one lattice only; in a single term `_split` places the common divisors.
    last = _MOST_DOUBLINGS if len(core) > 1 and np.linalg.slogdet(core)[1] > 0.5 else 0
    counts: dict[int, int] = {}

    def attempt(doublings: int) -> tuple[list[list[_Term]], bool]:
        """What this lattice gives, in a list if it is something, and whether F came out larger than G."""
        pair = _between(f, core, v, doublings)
        if pair is None:
            return [], False
        x, y = reduce_together(*pair)
        terms = _split_all(x.T, y, most)
        counts[doublings] = MOST_TERMS + 1 if terms is None else len(terms)
        return [] if terms is None else [terms], bool(np.abs(x).max() > np.abs(y).max())

    if len(core) <= _TRY_ALL_UP_TO:
        for doublings in range(last + 1):
            yield from attempt(doublings)[0]
        return
    # Few terms are where F and G are about equally large.
    low, high = 0, last
    while low <= high:
        doublings = (low + high) // 2
        terms, f_is_larger = attempt(doublings)
        yield from terms
        low, high = (doublings + 1, high) if f_is_larger else (low, doublings - 1)
    best = min(counts, key=lambda doublings: counts[doublings], default=0)
    if len(core) < counts.get(best, 0) <= MOST_TERMS:
        for doublings in sorted({best - 1, best + 1} & {*range(last + 1)} - {*counts}):
            yield from attempt(doublings)[0]


def _between(f: np.ndarray, core: np.ndarray, v: np.ndarray, doublings: int) -> tuple[np.ndarray, np.ndarray] | None:
    """F and G with ``F·G = f·core·v``, where the rows of G span ``Z^r·core·v + 2**doublings·Z^r·v``."""
    basis = lll(_with_multiples(core, doublings))
    share = divide(core, basis)
    return None if share is None else (f @ share, basis @ v)


def _with_multiples(matrix: np.ndarray, doublings: int) -> np.ndarray:
    """A basis, square, of the lattice that the rows of a square matrix and all multiples of q = 2**doublings span.

    By elimination modulo q. The pivot is an entry with the fewest factors of two, so that it divides all others.
    """
    q = 2**doublings
    rest = matrix % q
    pivots = []
    free = np.ones(len(matrix), bool)
    while rest.any():
        power = np.where(rest, rest & -rest, q)
        row, column = np.unravel_index(np.argmin(power), power.shape)
        unit = power[row, column]
        pivots.append(rest[row] * pow(int(rest[row, column] // unit), -1, q) % q)
        free[column] = False
        rest = (rest - (rest[:, column] // unit)[:, None] * pivots[-1]) % q
    return np.vstack([*pivots, q * np.eye(len(matrix), dtype=np.int64)[free]])


def _split_all(f: np.ndarray, g: np.ndarray, most: int) -> list[_Term] | None:
    """``Σ_i f_i ⊗ g_i`` over the rows of two matrices as at most `most` terms of int8, or None."""
    terms: list[_Term] = []
    for left, (x, y) in zip(reversed(range(len(f))), zip(f, g, strict=True), strict=True):
        parts = _split(x, y, most + _SLACK - len(terms) - left)
        if parts is None:
            return None
        terms += parts
    terms = _merge_constant(_merge_constant(terms, 1), 0)
    return terms if len(terms) <= most else None


def _merge_constant(terms: list[_Term], side: int) -> list[_Term]:
    """The terms whose vector of that side is constant are together one outer product, which may take fewer."""
    constant = [term for term in terms if is_constant(term[side])]
    others = [term for term in terms if not is_constant(term[side])]
    if len(constant) < 2:
        return terms
    total = sum(term[1 - side] * term[side][0] for term in constant)
    ones = np.ones_like(constant[0][side])
    merged = _split(*((total, ones) if side else (ones, total)), len(constant) - 1) if total.any() else []
    return terms if merged is None else others + merged


def is_constant(vector: np.ndarray) -> bool:
    """Whether all entries are the first one."""
    return bool((vector == vector[0]).all())


def _reach(vector: np.ndarray) -> tuple[int, int]:
    """The largest p and n for which ``p·vector`` and ``−n·vector`` are int8; the vector is not 0."""
    low, high = int(vector.min()), int(vector.max())
    multiples = [(_LOW // low, _HIGH // -low)] if low < 0 else []
    multiples += [(_HIGH // high, _LOW // -high)] if high > 0 else []
    return tuple(map(min, zip(*multiples, strict=True)))


def _split(f: np.ndarray, g: np.ndarray, most: int) -> list[_Term] | None:
    """``f ⊗ g``, neither 0, as at most `most` terms of int8, or None."""
    if int(np.abs(f).max()) * int(np.abs(g).max()) > most * _MOST_PRODUCT:
        return None
    in_f, in_g = int(np.gcd.reduce(f)), int(np.gcd.reduce(g))
    content = in_f * in_g
    f, g = f // in_f, g // in_g
    single = _as_one(f, g, content)
    if single is not None:
        return [single]
    sides = [(f, content * g, False), (g, content * f, True)]
    fitting = [side for side in sides if any(_reach(side[0]))]
    choices = []
    for x, y, swapped in fitting or sides:
        terms = _split_second(x, y, most) if fitting else _split_both(x, y, most)
        if terms:
            choices.append([(y, x) for x, y in terms] if swapped else terms)
    return min(choices, key=_cost, default=None)


def _cost(terms: list[_Term]) -> tuple[int, int]:
    return len(terms), sum(not is_constant(x) and not is_constant(y) for x, y in terms)


def _as_one(f: np.ndarray, g: np.ndarray, content: int) -> _Term | None:
    """``content·f ⊗ g`` as one term of int8, f and g about equally large, or None."""
    reach_f, reach_g = _reach(f), _reach(g)
    if content > max(reach_f) * max(reach_g):
        return None
    largest_f, largest_g = int(np.abs(f).max()), int(np.abs(g).max())
    shares = (
        (max(share * largest_f, content // share * largest_g), -sign, share)
        for share in range(1, -_LOW + 1)
        if content % share == 0
        for sign, index in ((1, 0), (-1, 1))
        if share <= reach_f[index] and content // share <= reach_g[index]
    )
    _, sign, share = min(shares, default=(0, 0, 0))
    return (-sign * share * f, -sign * (content // share) * g) if share else None


def _split_second(x: np.ndarray, y: np.ndarray, most: int) -> list[_Term]:
    """``x ⊗ y`` as terms of int8, where x fits: y in digits with weights that x takes. Empty if over `most`."""
    return [(weight * x, digit) for weight, digit in _digits(y, _reach(x), most)]


def _split_both(x: np.ndarray, y: np.ndarray, most: int) -> list[_Term]:
    """``x ⊗ y`` as terms of int8: x in digits and then y, for each of them anew. Empty if over `most`."""
    terms: list[_Term] = []
    for weight, digit in _digits(x, (1, 1), most):
        parts = _split(digit, weight * y, most - len(terms))
        if parts is None:
            return []
        terms += parts
    return terms


def _digits(y: np.ndarray, reach: tuple[int, int], most: int) -> list[_Digit]:
    """``y = Σ weight·digit`` with digits of int8 and weights from −n to p, few of them; empty if over `most`.

    Among as many, rather with a constant digit.
    """
    found = []
    content = int(np.gcd.reduce(y))
    # A unit other than 1 saves a digit at most, so that it is not worth its time where there are many.
    few = int(np.abs(y).max()) <= _FEW_DIGITS * max(reach) * -_LOW
    for unit in range(1, max(reach) + 1 if few else 2):
        if content % unit == 0:
            rest, (p, n) = y // unit, (limit // unit for limit in reach)
            for digits in (_offset_digits(rest, p, n), _plain_digits(rest, p, n, most)):
                if 0 < len(digits) <= most:
                    most = len(digits)
                    found.append([(unit * weight, digit) for weight, digit in digits])
    return min(found, key=lambda d: (len(d), not any(is_constant(x) for _, x in d)), default=[])


def _offset_digits(y: np.ndarray, p: int, n: int) -> list[_Digit]:
    """``y`` as a constant and one more digit; empty if int8 does not hold its span."""
    low, high = int(y.min()), int(y.max())
    for sign, limit in ((1, p), (-1, n)):
        # sign·(y − offset) is of int8 for these offsets.
        first, last = (high - _HIGH, low - _LOW) if sign > 0 else (high + _LOW, low + _HIGH)
        for weight in range(1, max(p, n) + 1) if limit and first <= last else ():
            nearest = min(max(0, -(-first // weight)), last // weight) * weight
            for signed in (weight, -weight):
                constant = nearest // signed
                if first <= nearest <= last and -n <= signed <= p and _LOW <= constant <= _HIGH:
                    return [(sign, sign * (y - nearest)), (signed, np.full_like(y, constant))]
    return []


def _plain_digits(y: np.ndarray, p: int, n: int, most: int) -> list[_Digit]:
    """``y`` in digits that have the largest weight, but for one at the end; empty if over `most`."""
    weight = p if p >= n else -n
    if int(np.abs(y).max()) > most * max(p, n) * -_LOW:
        return []
    digits: list[_Digit] = []
    while y.any():
        for sign, limit in ((1, p), (-1, n)):
            if limit and (sign * y).min() >= _LOW and (sign * y).max() <= _HIGH:
                return [*digits, (sign, sign * y)]
        if len(digits) + 1 >= most:
            return []
        digits.append((weight, np.clip(np.rint(y / weight).astype(np.int64), _LOW, _HIGH)))
        y = y - weight * digits[-1][1]
    return digits
