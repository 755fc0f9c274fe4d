"""Multipliers of up to 16 bits an operand: functions instead of tables, run through their exact low-rank form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from .lattice import MOST_TERMS, PRIMES, cross_lattice, find_pivots, reduce_together
from .low_rank import LowRank, search_once
from .multiplier import (
    MAX_FUNCTION_BITS,
    as_info,
    check_bits,
    check_flag,
    check_operand,
    operand_range,
    operand_values,
)

if TYPE_CHECKING:
    from .fast_model import FastModel
    from .formats import CFunction

_RANDOM_PAIRS = 10**7
_EXHAUSTIVE_BITS = 24
_PRODUCT_LIMIT = 2**52
_LANES = 2**14  # pairs that a function is called with: its intermediate results then stay in cache
_C_LANES = 2**16  # a circuit's are bytes, and the steps between them cost more than they do
_BLOCK = 2**17  # pairs of whole rows compared at a time
_PROBES = 256
_RANDOM_LINES = 12
_ENOUGH_WITNESSES = MOST_TERMS
# Part of the names of stored results: to be raised when other ones are to be found.
_REVISION = 1

_Pairs = tuple[np.ndarray, np.ndarray]


class WideMultiplier:
    """An approximate multiplier of 2 to 16 bits an operand, given as a function: no table is made of it.

    Parameters
    ----------
    fn : callable
        ``fn(a, w)`` takes two int64 vectors of operand *values*, of one length up to 2**14, and returns the products of
        their entries: integers below 2**52 in magnitude, the same for the same pair whatever else is in the vectors.
    bits : int or pair of int
        Width of both operands, or ``(a_bits, w_bits)``.
    a_signed, w_signed : bool
        Operand signedness.
    name : str
        For reports.
    info : mapping, optional
        What is known of the circuit, by name; anything JSON can hold.

    Raises
    ------
    ValueError
        `fn` is not callable, or another argument is of a wrong type or out of its range.

    Examples
    --------
    >>> from approxconv import WideMultiplier
    >>> m = WideMultiplier(lambda a, w: a * w - (a & 7) * (w & 7), bits=(12, 16), a_signed=False, w_signed=True)
    >>> int(m(4095, -1))
    -4144
    >>> m.conv2d(torch.full((1, 1, 3, 3), 4095), torch.full((1, 1, 2, 2), -1)).unique().tolist()
    [-16576]
    """

    def __init__(
        self,
        fn: Callable[[np.ndarray, np.ndarray], np.ndarray],
        *,
        bits: int | tuple[int, int],
        a_signed: bool,
        w_signed: bool,
        name: str = "",
        info: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(fn):
            raise ValueError(f"fn must be callable, got {fn!r}")
        self.a_bits, self.w_bits = check_bits(bits, MAX_FUNCTION_BITS)
        self.a_signed = check_flag("a_signed", a_signed)
        self.w_signed = check_flag("w_signed", w_signed)
        self.name = str(name)
        self.info = as_info(info)
        self._fn = fn
        self._lanes = _LANES
        self._hash: str | None = None
        self._known: list[WideFactorization | None] = []

    @classmethod
    def from_c_function(cls, function: CFunction) -> WideMultiplier:
        """The multiplier that a C model computes, such as EvoApproxLib's ``mul12s_*.c`` and ``mul16s_*.c``.

        Parameters
        ----------
        function : CFunction
            What `approxconv.load_function` returns. Its factorisation is kept on disk, by a hash of the source.
        """
        multiplier = cls(
            function,
            bits=function.bits,
            a_signed=function.a_signed,
            w_signed=function.w_signed,
            name=function.name,
            info=function.info,
        )
        multiplier._lanes, multiplier._hash = _C_LANES, function.content_hash
        return multiplier

    @property
    def a_range(self) -> tuple[int, int]:
        """Smallest and largest activation."""
        return operand_range(self.a_bits, self.a_signed)

    @property
    def w_range(self) -> tuple[int, int]:
        """Smallest and largest weight."""
        return operand_range(self.w_bits, self.w_signed)

    def __call__(self, a: Any, w: Any) -> np.ndarray:
        """Products of operand values.

        Parameters
        ----------
        a, w : array_like
            Integers that the operands' formats have, of shapes that broadcast.

        Returns
        -------
        numpy.ndarray
            int64, of the broadcast shape.

        Raises
        ------
        ValueError
            An operand that holds no integers or values out of its range, shapes that do not broadcast, or a function
            that returns another shape, no integers or ones of 2**52 or more in magnitude.
        """
        a, w = check_operand("a", a, *self.a_range), check_operand("w", w, *self.w_range)
        pairs = np.broadcast_arrays(a, w)
        products = np.empty(pairs[0].shape, np.int64)
        flat, (a, w) = products.reshape(-1), (np.ascontiguousarray(side).reshape(-1) for side in pairs)
        for start in range(0, flat.size, self._lanes):
            part = slice(start, start + self._lanes)
            flat[part] = self._evaluate(a[part], w[part])
        return products

    def _evaluate(self, a: np.ndarray, w: np.ndarray) -> np.ndarray:
        products = np.asarray(self._fn(a, w))
        if products.shape != a.shape:
            raise ValueError(f"fn must return an array of shape {a.shape}, got {products.shape}")
        if products.dtype.kind not in "iu":
            raise ValueError(f"fn must return integers, got {products.dtype}")
        if int(products.max()) >= _PRODUCT_LIMIT or int(products.min()) <= -_PRODUCT_LIMIT:
            raise ValueError(f"fn must return products below 2**52, got {products.min()} to {products.max()}")
        return products

    def fast_model(self) -> FastModel:
        """A callable for `FastApproxConv2dOp` and `FastApproxGeMMOp` that computes exact sums; the same on every call.

        Raises
        ------
        ValueError
            There is no factorisation of at most 64 terms.
        """
        return self._model

    @cached_property
    def _model(self) -> FastModel:
        from .fast_model import FastModel

        with _disable_current_modes(), torch.inference_mode(False):  # as in `factorize_wide`
            return FastModel(self)

    def matmul(self, x: Tensor, w: Tensor) -> Tensor:
        """``y[..., n] = Σ_k fn(x[..., k], w[n, k])``, exactly.

        Parameters
        ----------
        x, w : Tensor
            ``(..., K)`` and ``(N, K)``, integers of any dtype or rounded floats, saturated to the operands' ranges.

        Returns
        -------
        Tensor
            int64, ``(..., N)``.

        Raises
        ------
        ValueError
            Shapes that do not fit, no factorisation (see `fast_model`), or sums that int64 may not hold.
        """
        return self.fast_model().sums(functional.linear, x, w, {})

    def conv2d(
        self,
        x: Tensor,
        w: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """The convolution ``(B, C, H, W)`` with ``(O, C/groups, kh, kw)``, as `matmul`; padded positions hold 0.

        Returns
        -------
        Tensor
            int64, ``(B, O, H', W')``.
        """
        conf = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self.fast_model().sums(functional.conv2d, x, w, conf)

    def __repr__(self) -> str:
        a, w = (
            f"{'' if signed else 'u'}int{bits}"
            for bits, signed in ((self.a_bits, self.a_signed), (self.w_bits, self.w_signed))
        )
        return f"WideMultiplier({self.name!r}, a={a}, w={w})"


@dataclass(frozen=True, eq=False)
class WideFactorization(LowRank):
    """``fn(a, w) = scale·a·w + Σ_r f[r, a]·g[r, w]`` over the integers, f and g by operand code.

    Made by `factorize_wide`; not to be written to.

    Attributes
    ----------
    scale : int
        0 or 1: whether the exact product is part of the sum.
    f : Tensor
        ``(R, 2**a_bits)``, by activation code, in the smallest of int8, int16, int32 and int64.
    g : Tensor
        ``(R, 2**w_bits)``, by weight code, likewise. Terms come in descending order of ``‖f_r‖·‖g_r‖``.
    a_signed, w_signed : bool
        How a code is read in the exact product.
    verified : str
        What it was compared with: ``"all 16,777,216 pairs"``, or a sample of them, and then it is not proven.
    """

    verified: str

    _left = "fn(a, w)"

    def _facts(self) -> list[tuple[str, object]]:
        return [("verified on", self.verified)]

    def __str__(self) -> str:
        return f"{self._formula}, verified on {self.verified}"

    def __repr__(self) -> str:
        return f"WideFactorization(scale={self.scale}, rank={self.rank}, verified={self.verified!r})"


def factorize_wide(multiplier: WideMultiplier) -> WideFactorization | None:
    """Write a multiplier as ``s·a·w + Σ_{r<R} f_r[a]·g_r[w]`` with few terms of integers, from some of its products.

    Parameters
    ----------
    multiplier : WideMultiplier
        Any.

    Returns
    -------
    WideFactorization or None
        With s = 1 if ``E = fn − s·a·w`` then has the lower rank, else with s = 0; compared with the function on all
        pairs if there are at most 2**24 of them. Beyond that on 10⁷ random pairs, all pairs of structured operands (0,
        ±1, the ends, powers of two and their neighbours, alternating bits) and whole rows and columns at some of these
        and at random ones; ``verified`` says which. Products that are wrong in a share q of all pairs escape 10⁷ random
        ones with probability ``(1 − q)^(10⁷)``: e⁻¹⁵² for a whole row at 16 bits, but 0.998 for a single pair.
        None if more than 64 terms are needed.

        The same object on every call. Of a C model it is kept on disk too, by a hash of its source, beside the compiled
        kernels; what is read from there is compared with some products anew.

    Raises
    ------
    ValueError
        `multiplier` is none, or its function returns what `WideMultiplier` does not take.

    Notes
    -----
    Adaptive cross approximation writes a matrix of rank R by R of its columns J and rows I as
    ``E = E[:, J] · E[I, J]⁻¹ · E[I, :]`` and evaluates nothing else of it; a pair where the residual is not 0 adds its
    row and column to the cross. Over the integers

    1. the pivots I, J are those of an elimination modulo a prime, on a grid of structured and random operands: a minor
       that is not 0 modulo a prime is not 0, whatever its size;
    2. there is no tolerance: the search ends when verification meets no residual. Any pair it meets joins the grid;
    3. a reduced basis G of the lattice that the rows of E span takes the place of E[I, :]. A row is known by its
       entries in J, so E[:, J] suffices for the Hermite form; E's coordinates F in the basis are integers, and so is
       G, solved from ``F[I]·G = E[I, :]``.

    M. Bebendorf, "Approximation of boundary element matrices", Numerische Mathematik 86, 2000. `factorize` says how
    bases are reduced.

    Examples
    --------
    >>> m = WideMultiplier(lambda a, w: a * w - (a & 7) * (w & 7), bits=12, a_signed=False, w_signed=True)
    >>> print(factorize_wide(m))
    fn(a, w) = a·w + Σ f[a]·g[w] of 1 term, verified on all 16,777,216 pairs
    """
    if not isinstance(multiplier, WideMultiplier):
        raise ValueError(f"multiplier must be a WideMultiplier, got {multiplier!r:.60}")
    if not multiplier._known:
        # What is kept for all must be neither a tracer's fake tensor nor one of inference.
        with _disable_current_modes(), torch.inference_mode(False):
            multiplier._known.append(_load_or_search(multiplier))
    return multiplier._known[0]


def _load_or_search(multiplier: WideMultiplier) -> WideFactorization | None:
    if multiplier._hash is None:
        return _finish(multiplier, _search(multiplier))
    key = f"wide-factorization-{_REVISION}-{multiplier._hash}"
    return _finish(multiplier, search_once(key, lambda: _search(multiplier), lambda file: _load(file, multiplier)))


def _load(file: Mapping[str, np.ndarray], multiplier: WideMultiplier) -> _Form:
    """What was stored, or a ValueError if that is not this multiplier."""
    form = _Form(int(file["scale"]), file["f"], file["g"], str(file["verified"]))
    entries = _Entries(multiplier)
    shapes = [(len(form.f), len(values)) for values in entries.values]
    if (
        form.scale not in (0, 1)
        or [form.f.shape, form.g.shape] != shapes
        or form.f.dtype.kind != "i"
        or form.g.dtype.kind != "i"
        or _witnesses(entries, form, [_lattice_points(*(_probes(values) for values in entries.values))]) is not None
    ):
        raise ValueError("factors of another multiplier")
    return form


def _finish(multiplier: WideMultiplier, form: _Form | None) -> WideFactorization | None:
    if form is None:
        return None
    f, g = (torch.from_numpy(np.ascontiguousarray(side)) for side in (form.f, form.g))
    return WideFactorization(form.scale, f, g, multiplier.a_signed, multiplier.w_signed, form.verified)


@dataclass(frozen=True)
class _Form:
    """What the search finds: f (R, 2**a_bits) and g (R, 2**w_bits)."""

    scale: int
    f: np.ndarray
    g: np.ndarray
    verified: str = ""

    def comparison(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """A function of errors and their codes that says where they are not ``Σ f·g``."""
        f, g = (side.T.astype(np.float64, order="C") for side in (self.f, self.g))
        if float(np.abs(f).max(axis=0) @ np.abs(g).max(axis=0)) >= 2**53:
            # Modulo 2**64 errors far below 2**63 are what they are.
            f, g = (side.T.astype(np.int64, order="C") for side in (self.f, self.g))

        def differs(errors: np.ndarray, a: np.ndarray, w: np.ndarray) -> np.ndarray:
            if a.ndim == 2:  # rows and columns
                return errors != f[a[:, 0]] @ g[w[0]].T
            return errors != np.einsum("ij,ij->i", np.take(f, a, 0), np.take(g, w, 0))

        return differs


@dataclass(frozen=True)
class _Skeleton:
    """``E[:, J]·E[I, J]⁻¹·E[I, :]`` modulo a prime."""

    scale: int
    columns: np.ndarray
    rows: np.ndarray
    pivots: _Pairs
    prime: int

    def comparison(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """As `_Form.comparison`, modulo the prime."""
        from flint import nmod_mat

        prime, rank = self.prime, len(self.rows)
        minor = nmod_mat(rank, rank, (self.rows[:, self.pivots[1]] % prime).ravel().tolist(), prime)
        inverse = np.array([int(entry) for entry in minor.inv().entries()]).reshape(rank, rank)
        f, g = self.columns % prime, _product_modulo(inverse, self.rows % prime, prime).T

        def differs(errors: np.ndarray, a: np.ndarray, w: np.ndarray) -> np.ndarray:
            if a.ndim == 2:
                return errors % prime != _product_modulo(f[a[:, 0]], g[w[0]].T, prime)
            return errors % prime != (np.take(f, a, 0) * np.take(g, w, 0) % prime).sum(axis=1) % prime

        return differs


def _product_modulo(x: np.ndarray, y: np.ndarray, prime: int) -> np.ndarray:
    """``x @ y`` modulo a prime below 2^31, of residues, at most 64 terms each: by halves of x, exact in float64."""
    high, low = (half.astype(float) @ y.astype(float) % prime for half in (x >> 16, x & 0xFFFF))
    return (high * 2**16 + low).astype(np.int64) % prime


class _Entries:
    """A multiplier's products by operand codes, evaluated where they are asked for."""

    def __init__(self, multiplier: WideMultiplier) -> None:
        self.multiplier = multiplier
        self.values = (
            operand_values(multiplier.a_bits, multiplier.a_signed),
            operand_values(multiplier.w_bits, multiplier.w_signed),
        )

    def errors(self, a: np.ndarray, w: np.ndarray, scale: int) -> np.ndarray:
        """``fn − scale·a·w`` at codes of shapes that broadcast."""
        a, w = self.values[0][a], self.values[1][w]
        return self.multiplier(a, w) - scale * a * w


def _search(multiplier: WideMultiplier) -> _Form | None:
    """The form that verification finds no fault with, or None."""
    entries = _Entries(multiplier)
    grid = [_probes(values) for values in entries.values]
    for prime in PRIMES:
        known = -1
        while True:
            found = _least_pivots(entries, grid, prime)
            if found is None:
                return None
            scale, pivots, total = found
            if total <= known:  # modulo this prime a witness makes no difference
                break
            known = total
            columns, rows = _cross(entries, scale, pivots)
            form = _interpolate(scale, columns, rows, pivots)
            # The cross of a matrix of higher rank need not have integer factors; modulo a prime it has factors always.
            witnesses, verified = _verify(entries, form or _Skeleton(scale, columns, rows, pivots, prime))
            if witnesses is None:
                if form is None:
                    break
                return replace(form, verified=verified)
            grid = [np.union1d(known_codes, new) for known_codes, new in zip(grid, witnesses, strict=True)]
    return None


def _least_pivots(entries: _Entries, grid: list[np.ndarray], prime: int) -> tuple[int, _Pairs, int] | None:
    """The scale of less rank on the grid, its pivots there and the sum of both ranks; None if over the limit."""
    rows, columns = grid
    products = entries.errors(rows[:, None], columns[None], 0)
    exact = np.multiply.outer(entries.values[0][rows], entries.values[1][columns])
    pivots = {scale: find_pivots(products - scale * exact, prime) for scale in (0, 1)}
    ranks = {scale: MOST_TERMS + 1 if found is None else len(found[0]) for scale, found in pivots.items()}
    scale = min(ranks, key=lambda scale: (ranks[scale], scale))
    if pivots[scale] is None:
        return None
    at_rows, at_columns = pivots[scale]
    return scale, (rows[at_rows], columns[at_columns]), sum(ranks.values())


def _cross(entries: _Entries, scale: int, pivots: _Pairs) -> _Pairs:
    """``E[:, J]`` and ``E[I, :]``."""
    a, w = (np.arange(len(values)) for values in entries.values)
    at_rows, at_columns = pivots
    return entries.errors(a[:, None], at_columns[None], scale), entries.errors(at_rows[:, None], w[None], scale)


def _interpolate(scale: int, columns: np.ndarray, rows: np.ndarray, pivots: _Pairs) -> _Form | None:
    """The form of rank r that has the multiplier's products in the rows and columns of its pivots, if there is one."""
    if not len(rows):
        return _Form(scale, *(np.zeros((0, length), np.int8) for length in (len(columns), rows.shape[1])))
    try:
        factors = cross_lattice(columns, rows, pivots)
    except (np.linalg.LinAlgError, OverflowError):  # numbers that float64 or int64 do not hold
        return None
    if factors is None:
        return None
    f, g = reduce_together(*factors)
    weight = np.square(f.astype(float)).sum(axis=0) * np.square(g.astype(float)).sum(axis=1)
    order = np.argsort(-weight, kind="stable")
    return _Form(scale, *(_narrowest(np.ascontiguousarray(side[order])) for side in (f.T, g)))


def _narrowest(factors: np.ndarray) -> np.ndarray:
    low, high = int(factors.min()), int(factors.max())
    return factors.astype(
        next(t for t in (np.int8, np.int16, np.int32, np.int64) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    )


def _verify(entries: _Entries, form: _Form | _Skeleton) -> tuple[_Pairs | None, str]:
    """Pairs where the form is wrong, None if none was met, and what it was compared with."""
    codes = [np.arange(len(values)) for values in entries.values]
    count = len(codes[0]) * len(codes[1])
    if count <= 2**_EXHAUSTIVE_BITS:
        return _witnesses(entries, form, _lattice_blocks(*codes)), f"all {count:,} pairs"
    structured = [_structured(values) for values in entries.values]
    lines = [_lines(values) for values in entries.values]
    size = len(structured[0]) * len(structured[1]) + len(lines[0]) * len(codes[1]) + len(codes[0]) * len(lines[1])
    blocks = itertools.chain(
        _lattice_blocks(*structured),
        _lattice_blocks(lines[0], codes[1]),
        _lattice_blocks(codes[0], lines[1]),
        _random_blocks(*codes),
    )
    said = f"{_RANDOM_PAIRS:,} random pairs and {size:,} structured ones of {count:,}"
    return _witnesses(entries, form, blocks), said


def _witnesses(
    entries: _Entries, form: _Form | _Skeleton, blocks: Iterator[_Pairs] | Sequence[_Pairs]
) -> _Pairs | None:
    """Pairs at which the form is wrong, no two in a row or a column; None if it is right in all blocks."""
    differs = form.comparison()
    rng = np.random.default_rng(3)
    rows = columns = np.zeros(0, np.int64)
    for a, w in blocks:
        wrong = differs(entries.errors(a, w, form.scale), a, w)
        if wrong.any():
            # A row or a column adds 1 to the rank at most.
            chosen = rng.permutation(np.flatnonzero(wrong))
            a, w = (np.broadcast_to(side, wrong.shape).flat[chosen] for side in (a, w))
            rows, columns = np.concatenate([rows, a]), np.concatenate([columns, w])
            first = np.unique(rows, return_index=True)[1]
            first = first[np.unique(columns[first], return_index=True)[1]]
            rows, columns = rows[first], columns[first]
            if len(rows) >= _ENOUGH_WITNESSES:
                break
    return (rows, columns) if len(rows) else None


def _lattice_points(rows: np.ndarray, columns: np.ndarray) -> _Pairs:
    return rows[:, None], columns[None]


def _lattice_blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[_Pairs]:
    """All pairs of some codes, as rows and columns that broadcast."""
    step = max(1, _BLOCK // len(columns))
    for i in range(0, len(rows), step):
        yield _lattice_points(rows[i : i + step], columns)


def _random_blocks(a_codes: np.ndarray, w_codes: np.ndarray) -> Iterator[_Pairs]:
    rng = np.random.default_rng(0)
    for start in range(0, _RANDOM_PAIRS, _C_LANES):
        size = min(_C_LANES, _RANDOM_PAIRS - start)
        yield rng.integers(len(a_codes), size=size), rng.integers(len(w_codes), size=size)


def _chosen(values: np.ndarray, wanted: set[int]) -> np.ndarray:
    """Codes of those of the wanted values that there are."""
    low, high = int(values.min()), int(values.max())
    return np.array(sorted({value & len(values) - 1 for value in wanted if low <= value <= high}))


def _powers(values: np.ndarray) -> set[int]:
    """0, the ends, powers of two of either sign."""
    powers = {1 << i for i in range(len(values).bit_length())}
    return {0, int(values.min()), int(values.max())} | powers | {-power for power in powers}


def _structured(values: np.ndarray) -> np.ndarray:
    """Codes of 0, ±1, the ends, powers of two and their neighbours, all ones among them, and alternating bits."""
    near = {power + step for power in _powers(values) for step in (-1, 0, 1)}
    alternating = {int(values[code & len(values) - 1]) for code in (0x5555, 0xAAAA, 0x3333, 0xCCCC)}
    return _chosen(values, near | alternating)


def _lines(values: np.ndarray) -> np.ndarray:
    """Codes whose rows or columns are compared whole."""
    return np.union1d(
        _chosen(values, _powers(values)), np.random.default_rng(1).integers(len(values), size=_RANDOM_LINES)
    )


def _probes(values: np.ndarray) -> np.ndarray:
    """Codes of the grid that the search begins with."""
    if len(values) <= _PROBES:
        return np.arange(len(values))
    structured = _structured(values)
    others = np.random.default_rng(2).integers(len(values), size=_PROBES - len(structured))
    return np.union1d(structured, others)
