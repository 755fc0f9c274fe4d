"""A factorised table as sums of products of bytes, which is what dot-product instructions take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..factorize import Factorization
from ..multiplier import MAX_BITS, operand_values

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
    bits = (side.shape[1].bit_length() - 1 for side in (factors.f, factors.g))
    values = (operand_values(n, s) for n, s in zip(bits, (factors.a_signed, factors.w_signed), strict=True))
    pairs = [
        (f, g) for f, g in zip(factors.f.numpy().astype(np.int64), factors.g.numpy().astype(np.int64), strict=True)
    ]
    pairs = [tuple(values), *pairs] if factors.scale else pairs
    rows, columns = np.zeros(factors.f.shape[1], np.int64), np.zeros(factors.g.shape[1], np.int64)
    u, v = [], []
    for f, g in pairs:
        if (g == g[0]).all():
            rows += g[0] * f
        elif (f == f[0]).all():
            columns += f[0] * g
        else:
            alpha, beta = min(int(f.min()), 0), max(int(g.max()) - _HIGH, 0) + min(int(g.min()) - _LOW, 0)
            u.append(f - alpha)
            v.append(g - beta)
            columns += alpha * g
            rows += beta * f - alpha * beta
    if (rows == rows[0]).all():
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
