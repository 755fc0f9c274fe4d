"""Multipliers of up to 16 bits an operand: functions instead of tables, run through their exact low-rank form."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from ._display import Shown
from .geometry import conv_output_size, pair
from .lattice import MOST_TERMS, PRIMES, cross_lattice, find_pivots, reduce_together
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
        """A callable for `FastApproxConv2dOp` and `FastApproxGeMMOp` that computes exact sums; see `FastModel`.

        Raises
        ------
        ValueError
            There is no factorisation of at most 64 terms.
        """
        factors = factorize_wide(self)
        if factors is None:
            raise ValueError(f"no factorisation of {self} with at most {MOST_TERMS} terms was found")
        return factors.fast_model()

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
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """The convolution ``(B, C, H, W)`` with ``(O, C/groups, kh, kw)``, as `matmul`; padded positions hold 0.

        Returns
        -------
        Tensor
            int64, ``(B, O, H', W')``.
        """
        conf = {
            "stride": pair("stride", stride, 1),
            "padding": padding,
            "dilation": pair("dilation", dilation, 1),
            "groups": groups,
        }
        return self.fast_model().sums(functional.conv2d, x, w, conf)

    def __repr__(self) -> str:
        a, w = (
            f"{'' if signed else 'u'}int{bits}"
            for bits, signed in ((self.a_bits, self.a_signed), (self.w_bits, self.w_signed))
        )
        return f"WideMultiplier({self.name!r}, a={a}, w={w})"


@dataclass(frozen=True, eq=False)
class WideFactorization(Shown):
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

    scale: int
    f: Tensor
    g: Tensor
    a_signed: bool
    w_signed: bool
    verified: str

    @property
    def rank(self) -> int:
        """R, the number of terms besides the exact product."""
        return len(self.f)

    def fast_model(self) -> FastModel:
        """A callable for `FastApproxConv2dOp` and `FastApproxGeMMOp` that computes exact sums."""
        return FastModel(self.scale, self.f, self.g, self.a_signed, self.w_signed)

    def __str__(self) -> str:
        terms = "1 term" if self.rank == 1 else f"{self.rank} terms"
        parts = ["a·w"] * self.scale + [f"Σ f[a]·g[w] of {terms}"] * bool(self.rank)
        return f"fn(a, w) = {' + '.join(parts) or 0}, verified on {self.verified}"

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
    from .kernels.cache import cached_folder

    if multiplier._hash is None:
        return _finish(multiplier, _search(multiplier))
    fresh: list[_Form | None] = []

    def store(folder: Path) -> None:
        fresh.append(_search(multiplier))
        form = fresh[-1] or _Form(-1, *2 * [np.zeros((0, 0), np.int8)], "")
        np.savez(folder / "factors.npz", scale=form.scale, f=form.f, g=form.g, verified=form.verified)

    key = f"wide-factorization-{_REVISION}-{multiplier._hash}"
    with suppress(OSError):  # a full or read-only disk costs the time of a search, no more
        entry = cached_folder(key, store)
        if not fresh:
            try:
                fresh.append(_load(entry, multiplier))
            except (OSError, ValueError, KeyError, BadZipFile):
                shutil.rmtree(entry)
                cached_folder(key, store)
    return _finish(multiplier, fresh[-1] if fresh else _search(multiplier))


def _load(entry: Path, multiplier: WideMultiplier) -> _Form | None:
    """What was stored, or a ValueError if that is not this multiplier."""
    with np.load(entry / "factors.npz", allow_pickle=False) as file:
        form = _Form(int(file["scale"]), file["f"], file["g"], str(file["verified"]))
    if form.scale == -1:
        return None
    entries = _Entries(multiplier)
    shapes = [(len(form.f), len(values)) for values in entries.values]
    if [form.f.shape, form.g.shape] != shapes or form.f.dtype.kind != "i" or form.g.dtype.kind != "i":
        raise ValueError(f"{entry} holds no factorisation of this multiplier")
    if _witnesses(entries, form, [_lattice_points(*(_probes(values) for values in entries.values))]) is not None:
        raise ValueError(f"{entry} holds no factorisation of this multiplier")
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


class FastModel:
    """``model(op, x, w, kwargs)``: a convolution or linear layer by an exact low-rank form, in one call of `op`.

    An operand becomes its features, the factors at its value, as more channels: ``Σ_k fn(x_k, w_k) =
    Σ_k Σ_p f_p[x_k]·g_p[w_k]``, p running over the exact product too. `op` multiplies and adds them in float64, which
    is exact in any order while ``Σ_k Σ_p max|f_p|·|g_p[w_k]| < 2^53``: that is computed for the given weights, for
    each output channel. Where it is more, the weights' features are cut into digits of a few bits, one call of `op`
    each, and the sums are put together in int64.

    Parameters
    ----------
    scale : int
        0 or 1: whether the exact product is part of the sum.
    f, g : Tensor
        ``(R, 2**a_bits)`` and ``(R, 2**w_bits)``, integers of any dtype, by code.
    a_signed, w_signed : bool
        Operand signedness.
    """

    exact_below = 2**53
    """Sums of integers below it are exact in float64."""
    scratch = 2**26
    """Bytes of features and patches that are alive at once; one sample may need more."""

    def __init__(self, scale: int, f: Tensor, g: Tensor, a_signed: bool, w_signed: bool) -> None:
        self._ranges, terms = [], []
        for factors, signed in ((f, a_signed), (g, w_signed)):
            bits = factors.shape[1].bit_length() - 1
            values = torch.from_numpy(operand_values(bits, signed))
            self._ranges.append(operand_range(bits, signed))
            terms.append(torch.cat([values[None], factors.cpu().long()])[1 - scale :])
            if not len(terms[-1]):
                terms[-1] = torch.zeros_like(values)[None]
        self._tables = {torch.device("cpu"): (terms[0].double(), terms[1])}

    def __call__(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Exact sums, rounded once.

        Parameters
        ----------
        op : callable
            ``torch.nn.functional.conv2d`` or ``linear``, or what computes the same.
        x, w : Tensor
            What `op` takes, ``(B, C, H, W)`` and ``(O, C/groups, kh, kw)`` or ``(..., K)`` and ``(N, K)``; rounded and
            saturated to the operands' ranges.
        kwargs : mapping
            Of `op`: stride, padding, dilation, groups. Padded positions hold 0, which is multiplied like any value.

        Returns
        -------
        Tensor
            Of x's dtype, float32 or float64.

        Raises
        ------
        ValueError
            x of another dtype, shapes that do not fit, or sums that int64 may not hold.
        """
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x must be float32 or float64, which hold 16-bit integers, got {x.dtype}")
        return self._sums(op, x, w, kwargs).to(x.dtype)

    def sums(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The sums themselves, int64; x and w of any real dtype."""
        return self._sums(op, x, w, kwargs).long()

    def _sums(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """float64 if one call of `op` was exact, else int64."""
        kwargs = dict(kwargs)
        groups = _check_shapes(x, w, kwargs)
        if x.device not in self._tables:
            self._tables[x.device] = tuple(table.to(x.device) for table in self._tables[torch.device("cpu")])
        f, g = self._tables[x.device]
        codes, w_codes = (_codes(operand, *limits) for operand, limits in zip((x, w), self._ranges, strict=True))
        if w.ndim == 4:
            rows, columns = pair("padding", kwargs.pop("padding", 0), 0)
            stride, dilation = (pair(name, kwargs.get(name, 1), 1) for name in ("stride", "dilation"))
            conv_output_size(x.shape[2:], w.shape[2:], stride, (rows, columns), dilation)  # or a ValueError
            codes = functional.pad(codes, (columns, columns, rows, rows))
            codes = codes.reshape(len(x), groups, w.shape[1], *codes.shape[2:])
        else:
            codes = codes.reshape(x.shape[:-1].numel(), 1, x.shape[-1])
        digits = self._digits(_features(g, w_codes, 1), f.abs().amax(1))
        bytes_each = 8 * len(f) * codes.shape[1:].numel() * (1 + w.shape[2:].numel())
        sums = []
        exactly = _without_cudnn() if x.is_cuda else nullcontext()
        with exactly:  # cuDNN may transform operands, whose sums then are not of integers
            for part in codes.split(max(1, self.scratch // max(bytes_each, 1))):
                features = _features(f, part, 2).flatten(1, 3)
                parts = [(op(features, weights.flatten(1, 2), **kwargs), shift) for weights, shift in digits]
                sums.append(parts[0][0] if len(parts) == 1 else sum(y.long() << shift for y, shift in parts))
        y = sums[0] if len(sums) == 1 else torch.cat(sums)
        return y if w.ndim == 4 else y.reshape(*x.shape[:-1], len(w))

    def _digits(self, features: Tensor, peaks: Tensor) -> list[tuple[Tensor, int]]:
        """Weights' features ``(N, P, ...)`` as float64 digits and their shifts, so few that sums are exact in each."""

        def bound(part: Tensor) -> float:
            """No sum of an output channel, in whatever order, is larger."""
            terms = part.double().abs().flatten(2).sum(2) @ peaks
            return float(terms.max()) * (1 + 2**-20) if terms.numel() else 0.0  # what rounding these sums may hide

        largest = bound(features)
        if largest >= 2**63:
            raise ValueError(f"sums must be below 2**63, with these weights they may reach {largest:.3g}")
        if largest < self.exact_below:
            return [(features.double(), 0)]
        for bits in range(int(features.abs().max()).bit_length() - 1, 0, -1):
            rest, digits = features, []
            while rest.any():
                digits.append((torch.fmod(rest, 2**bits), bits * len(digits)))
                rest = torch.div(rest, 2**bits, rounding_mode="trunc")
            if all(bound(digit) < self.exact_below for digit, _ in digits):
                return [(digit.double(), shift) for digit, shift in digits]
        raise ValueError(f"float64 holds no sums of {features[0].numel():,} products of these operands")


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Not `torch.backends.cudnn.flags`, which writes the TF32 flags too."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _check_shapes(x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> int:
    """The number of groups, or a ValueError that says what does not fit."""
    groups = kwargs.get("groups", 1)
    if w.ndim == 2 and x.ndim and x.shape[-1] == w.shape[1]:
        return 1
    if w.ndim == 4 and x.ndim == 4 and x.shape[1] == groups * w.shape[1] and len(w) % groups == 0:
        return groups
    raise ValueError(
        f"x must be (..., K) and w (N, K), or x (B, C, H, W) and w (O, C/groups, kh, kw), got shapes "
        f"{tuple(x.shape)} and {tuple(w.shape)} with groups={groups}"
    )


def _codes(operand: Tensor, low: int, high: int) -> Tensor:
    """Codes of the nearest values that the operand's format has, int64."""
    values = operand.detach()
    values = values.round() if values.is_floating_point() else values.long()
    return values.clamp(low, high).long() & high - low


def _features(table: Tensor, codes: Tensor, dim: int) -> Tensor:
    """``table[p, codes]`` with p as dimension `dim`."""
    return torch.stack([row[codes] for row in table], dim)
