"""Matrix products by look-up table, with a straight-through gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .conv2d import Lut, operands, result_dtype, round_once
from .straight_through import save_operands, saved_operands, wanted


def _check(x: Tensor, w: Tensor) -> None:
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x must be (..., K) and w (N, K), got shapes {tuple(x.shape)} and {tuple(w.shape)}")


def _gemm_bwd_ste(
    grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Straight-through gradient of ``y = x·wᵀ``: ``grad_x = grad·w`` and ``grad_w = gradᵀ·x``.

    Parameters
    ----------
    grad : Tensor
        ``(..., N)``, floating.
    x, w : Tensor
        ``(..., K)`` and ``(N, K)``; converted to grad's dtype.
    needs : pair of bool
        Which of the two to compute; the other is None.
    """
    grad_x = grad @ w.to(grad.dtype) if needs[0] else None
    rows = math.prod(grad.shape[:-1])  # -1 would be ambiguous where a side is 0
    grad_w = grad.reshape(rows, grad.shape[-1]).T @ x.to(grad.dtype).reshape(rows, x.shape[-1]) if needs[1] else None
    return grad_x, grad_w


class ApproxGeMMOp(torch.autograd.Function):
    """``y[..., n] = Σ_k lut[x[..., k], w[n, k]]``: a linear layer by look-up table, straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, lut: Lut) -> Tensor:
        """Multiply.

        Parameters
        ----------
        x : Tensor
            ``(..., K)``, any rank ≥ 1, integer values in a float tensor, or uint8/int8.
        w : Tensor
            ``(N, K)``, likewise.
        lut : Multiplier or Tensor or None
            The product. None is the exact one. Beside a `Multiplier` float operands are rounded and saturated to its
            operand ranges; otherwise float operands are read as int8, and uint8/int8 ones as what they are.

        Returns
        -------
        Tensor
            ``(..., N)``: the exact int32 sum, rounded once to x's floating dtype (w's, or torch's default one, if x has
            none).

        Raises
        ------
        ValueError
            The shapes do not fit, or lut is none of the three.
        """
        _check(x, w)
        x_codes, w_codes, table = operands(x, w, lut)
        rows = x_codes[None] if x.ndim == 1 else x_codes
        y = torch.ops.approxconv.lut_matmul(rows, w_codes, table)
        save_operands(ctx, x_codes, w_codes)
        return round_once(y[0] if x.ndim == 1 else y, result_dtype(x, w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the exact product of the quantised operands."""
        return *_gemm_bwd_ste(grad, *saved_operands(ctx, grad), wanted(ctx)), None


class FastApproxGeMMOp(torch.autograd.Function):
    """Linear layer by a fast functional model of the multiplier forward, the exact product's gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, model: Callable[..., Tensor]) -> Tensor:
        """``round(model(torch.nn.functional.linear, x, w, {}))``.

        Parameters
        ----------
        x, w : Tensor
            ``(..., K)`` and ``(N, K)``, floating, holding integer values.
        model : callable
            ``model(op, x, w, kwargs)`` computes the approximate result from calls of ``op(x, w, **kwargs)``.

        Returns
        -------
        Tensor
            ``(..., N)``, rounded to integers.

        Raises
        ------
        ValueError
            The shapes do not fit.
        """
        _check(x, w)
        save_operands(ctx, x, w)
        return torch.round(model(torch.nn.functional.linear, x, w, {}))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the exact product of x and w."""
        return *_gemm_bwd_ste(grad, *saved_operands(ctx, grad), wanted(ctx)), None
