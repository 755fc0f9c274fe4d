"""A factorised table as sums of products of bytes, which is what dot-product instructions take."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..factorize import Factorization, is_constant
from ..multiplier import MAX_BITS

CODES = 2**MAX_BITS
_LOW, _HIGH = -128, 127


@dataclass(frozen=True, eq=False)
class ByteForm:
    """``table[a, w] = Σ_p u[p, a]·v[p, w] + by_row[a] + by_column[w]`` over the integers.

    Made by `byte_form`. Any byte is an index: of the codes of narrower operands the low bits count.

    Attributes
    ----------
    u : Tensor
        uint8, ``(P, 256)``, by activation code.
    v : Tensor
        int8, ``(P, 256)``, by weight code.
    by_row : Tensor or None
        int32, ``(256,)``, by activation code: over k, a number for each row of x. None where it is 0.
    by_column : Tensor
        int32, ``(256,)``, by weight code: over k, a number for each row of w.
    """

    u: Tensor
    v: Tensor
    by_row: Tensor | None
    by_column: Tensor

    @property
    def products(self) -> int:
        """P, the GEMMs that it takes."""
        return len(self.u)


def byte_form(factors: Factorization) -> ByteForm:
    """Shift the factors into bytes: with ``f = u + α`` and ``g = v + β``, ``f·g = u·v + α·g + β·f − α·β``.

    An activation's factor becomes unsigned and a weight's signed, as x86's and NVIDIA's mixed instructions take them.
    What the shifts leave, and the terms with a constant factor, are sums over rows and columns: no GEMM.

    Parameters
    ----------
    factors : Factorization
        Of an 8-bit or narrower table.

    Returns
    -------
    ByteForm
        On the CPU. ``α`` and ``β`` are 0 wherever the factor is in range already.
    """
    pairs = list(zip(*(side.numpy() for side in factors.parts), strict=True))
    rows, columns = np.zeros(factors.f.shape[1], np.int64), np.zeros(factors.g.shape[1], np.int64)
    u, v = [], []
    for f, g in _merged(pairs):
        if is_constant(g):
            rows += g[0] * f
        elif is_constant(f):
            columns += f[0] * g
        else:
            alpha, beta = min(int(f.min()), 0), max(int(g.max()) - _HIGH, 0) + min(int(g.min()) - _LOW, 0)
            u.append(f - alpha)
            v.append(g - beta)
            columns += alpha * g
            rows += beta * f - alpha * beta
    if is_constant(rows):
        columns += rows[0]
        rows[:] = 0

    def whole(vectors: list[np.ndarray], length: int, dtype: type) -> Tensor:
        stacked = np.array(vectors, dtype).reshape(len(vectors), length)
        return torch.from_numpy(np.ascontiguousarray(np.tile(stacked, CODES // length)))

    by_row = whole([rows], len(rows), np.int32)[0] if rows.any() else None
    return ByteForm(
        whole(u, len(rows), np.uint8),
        whole(v, len(columns), np.int8),
        by_row,
        whole([columns], len(columns), np.int32)[0],
    )


def _merged(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fewer pairs with the same ``Σ f⊗g``: those with a factor in common are one where a byte holds the others' sum.

    A factor beyond int8 was split into digits by `factorize`; an unsigned byte may hold it after all.
    """
    pairs = list(pairs)
    for i, j in itertools.combinations(range(len(pairs)), 2):
        if pairs[i] is None or pairs[j] is None:
            continue
        for side in (0, 1):
            sign = _sign(pairs[i][side], pairs[j][side])
            total = pairs[i][1 - side] + sign * pairs[j][1 - side]
            if sign and np.ptp(total) < CODES:
                pairs[j] = None
                pairs[i] = (pairs[i][0], total) if side == 0 else (total, pairs[i][1])
                break
    return [pair for pair in pairs if pair is not None]


def _sign(x: np.ndarray, y: np.ndarray) -> int:
    """1 or −1 if y is that times x, else 0."""
    return 1 if np.array_equal(x, y) else -1 if np.array_equal(x, -y) else 0
