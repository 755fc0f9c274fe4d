"""Which arithmetic adds up a factorised table without an error, for given weights, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._display import Shown, html_table, titled
from .multiplier import MAX_BITS, operand_range

if TYPE_CHECKING:
    from .factorize import Factorization
    from .low_rank import LowRank
    from .truncation import Truncation

# name: (title, operands are integers of at most this magnitude, sums stay below this)
_FLOATS = {
    "fp16": ("fp16 → fp32", 2**11, 2**24),
    "bf16": ("bf16 → fp32", 2**8, 2**24),
    "fp32": ("fp32", 2**24, 2**24),
    "fp64": ("fp64", 2**53, 2**53),
}
_TITLES = {"int8": "int8 → int32", **{name: title for name, (title, _, _) in _FLOATS.items()}}


class Verdict(NamedTuple):
    """Whether an arithmetic is exact, and the proof or what it fails by."""

    exact: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Certificate(Shown):
    """For given weights, the arithmetics in which a factorised sum is exact whatever the activations.

    With F and G the parts of `Factorization.parts`, ``bound_n = Σ_k max_a Σ_p |F[p, a]·G[p, w[n, k]]|``. Any subset of
    the terms ``F[p, x[k]]·G[p, w[n, k]]`` adds up to at most that, so it bounds every partial sum of every order.

    Attributes
    ----------
    bounds : Tensor
        int64, ``(N,)``, by output channel, on the weights' device.
    bound : int
        The largest of them; 0 if there is none.
    arithmetics : dict of str to Verdict
        ``"int8"`` (int32 accumulators), ``"fp16"`` and ``"bf16"`` (fp32 ones), ``"fp32"`` and ``"fp64"``.
    """

    bounds: Tensor
    bound: int
    arithmetics: dict[str, Verdict]

    def exact(self, name: str) -> bool:
        """Whether arithmetic `name`, a key of `arithmetics`, is exact.

        Raises
        ------
        ValueError
            There is no such arithmetic.
        """
        if name not in self.arithmetics:
            raise ValueError(f"name must be one of {', '.join(map(repr, self.arithmetics))}, got {name!r}")
        return self.arithmetics[name].exact

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (_TITLES[name], "exact" if verdict.exact else "not proven", verdict.reason)
            for name, verdict in self.arithmetics.items()
        ]

    @property
    def _title(self) -> str:
        return f"Partial sums of {len(self.bounds)} channels: at most {self.bound:,}"

    def __str__(self) -> str:
        return "\n".join([self._title, *(f"{name:<12} {exact:<10} {why}" for name, exact, why in self._rows())])

    def __repr__(self) -> str:
        return f"Certificate(bound={self.bound}, exact={[name for name in self.arithmetics if self.exact(name)]})"

    def _repr_html_(self) -> str:
        return titled(self._title, html_table(self._rows(), ("arithmetic", "", "because")))


def weight_codes(w: Tensor, count: int) -> Tensor:
    """A layer's weights as rows of codes.

    Parameters
    ----------
    w : Tensor
        uint8 or int8 codes, of which the low bits count: ``(N, K)``, or ``(O, C/groups, kh, kw)``.
    count : int
        How many codes there are, a power of two.

    Returns
    -------
    Tensor
        int64, ``(N, K)``, from 0 to ``count − 1``.

    Raises
    ------
    ValueError
        w is no tensor of such a dtype and shape.
    """
    if not isinstance(w, Tensor) or w.dtype not in (torch.uint8, torch.int8):
        got = f"{w.dtype}" if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"w must be a tensor of uint8 or int8 codes, got {got}")
    if w.ndim not in (2, 4):
        raise ValueError(f"w must be (N, K) or (O, C/groups, kh, kw), got shape {tuple(w.shape)}")
    return w.flatten(1).long().bitwise_and_(count - 1)


def largest_partial_sums(factors: LowRank | Truncation) -> Tensor:
    """``B[w]`` by weight code, float64: no subset of the terms ``F[p, a]·G[p, w]`` adds up to more, for any a.

    Of a table ``max_a Σ_p |F[p, a]·G[p, w]|``, of wider operands the larger ``Σ_p max|F[p]|·|G[p, w]|``. Exact where it
    is below 2⁵³; what is not stays so.
    """
    f, g = (side.double().abs() for side in factors.parts)
    if f.shape[1] * g.shape[1] > 4**MAX_BITS:
        f = f.amax(1, keepdim=True)
    return (f.T @ g).amax(0)


def certify(factors: Factorization, w: Tensor) -> Certificate:
    """`Factorization.certificate`, which see."""
    rows = weight_codes(w, factors.g.shape[1])
    bounds = largest_partial_sums(factors).long().to(w.device)[rows].sum(1)
    bound = int(bounds.max()) if len(bounds) else 0
    largest = int(max((int(side.abs().max()) for side in factors.parts if len(side)), default=0))
    verdicts = {"int8": _int8(factors, rows.shape[1])}
    for name, (_, operands, sums) in _FLOATS.items():
        verdicts[name] = _float(largest, operands, bound, sums)
    return Certificate(bounds, bound, verdicts)


def _int8(factors: Factorization, depth: int) -> Verdict:
    largest = int(factors.reconstruct().abs().max())
    sums = f"K·max|table| = {depth:,}·{largest:,}"
    if depth * largest >= 2**31:
        return Verdict(False, f"{sums} ≥ 2³¹: the sum itself may not fit int32")
    return Verdict(
        True,
        f"{sums} < 2³¹, so the sum fits int32; additions are modulo 2³², so wraps on the way to it cancel; "
        f"{_byte_operands(factors)}",
    )


def _byte_operands(factors: Factorization) -> str:
    """What instructions the bytes need: factors are int8, and the exact product's operands as wide as they are."""
    wide = [
        name
        for name, side, signed in (
            ("activations", factors.f, factors.a_signed),
            ("weights", factors.g, factors.w_signed),
        )
        if factors.scale and operand_range(side.shape[1].bit_length() - 1, signed)[1] > 127
    ]
    if not wide:
        return "all operands fit int8"
    if len(wide) == 1:
        return f"unsigned 8-bit {wide[0]} need u8×s8 products"
    return "unsigned 8-bit operands on both sides need u8×s8 products of weights less 128, which row sums make up for"


def _float(largest: int, operands: int, bound: int, sums: int) -> Verdict:
    fits, below = largest <= operands, bound < sums
    return Verdict(
        fits and below,
        f"operands up to {largest:,} {'≤' if fits else '>'} {_power(operands)}, "
        f"every partial sum up to {bound:,} {'<' if below else '≥'} {_power(sums)}",
    )


def _power(number: int) -> str:
    return "2" + str(number.bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
