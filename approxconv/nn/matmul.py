"""Approximate product of two activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import QuantizedWeight, sum_dtype
from .layer import ApproxLayer, sum_bound


class Matmul(nn.Module):
    """``y = a @ b`` as a module, which a model can hold and `approxconv.approximate` convert.

    Shapes, broadcasting and dtypes are `torch.matmul`'s.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply a ``(..., M, K)`` and b ``(..., K, N)``; either may be a vector."""
        return a @ b


class ApproxMatmul(ApproxLayer, Matmul):
    """``y = a @ b`` with both operands activations, its products from a multiplier's table.

    In the quantised modes
    ``y[..., m, n] = sa·sb · (Σ_k table[aq, bq] − za·Σbq − zb·Σaq + K·za·zb)``.

    a is quantised as the layer's activation, and b in codes as of its weight (`Quantization.weight`: scheme, bits,
    narrow range) but over a range as of an activation (`Quantization.activation`): one scale and one zero point each,
    set by `approxconv.calibrate`. Those of b are the buffers ``weight_scale`` and ``weight_zero_point``.

    Parameters are `ApproxLayer`'s.
    """

    weight = None
    bias = None
    _activations = ("activation", "weight")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply in the layer's mode; shapes as `torch.matmul`'s, and the dtype that torch promotes a and b to.

        Raises
        ------
        ValueError
            The shapes do not fit.
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        if self.mode == "float":
            if self.observing:
                self.activation_observer(a.detach().float())
                self.weight_observer(b.detach().float())
            return a @ b
        self._check_calibrated()
        return self._integer_forward(a, b).to(torch.promote_types(a.dtype, b.dtype))

    def _integer_forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[max(-2, -b.ndim)]:
            raise ValueError(f"a and b must be (..., M, K) and (..., K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
        if b.ndim == 1:
            return self._integer_forward(a, b.unsqueeze(1)).squeeze(-1)
        if a.ndim == 1:
            return self._integer_forward(a.unsqueeze(0), b).squeeze(-2)
        a, b = a.float(), b.float().mT
        a_codes, sa, za, a_zero = self._quantize_activation("activation", a)
        b_codes, sb, zb, b_zero = self._quantize_activation("weight", b)
        table, depth = self.operation_table(), a.shape[-1]
        sums = torch.ops.approxconv.lut_matmul(a_codes, b_codes, table, engine=self.engine)
        sums = sums.to(sum_dtype(4 * sum_bound(table, depth)))
        quantized = QuantizedWeight(b_codes, sb, zb, b_codes.sum(-1, dtype=torch.int64))
        if isinstance(a_zero, Tensor) or a_zero:
            sums -= (a_zero * (quantized.sums - depth * b_zero)).unsqueeze(-2)
        if isinstance(b_zero, Tensor) or b_zero:
            sums -= b_zero * a_codes.sum(-1, keepdim=True, dtype=sums.dtype)
        return self._rescaled((a, b), sums, sa * sb, a_codes, quantized, sa, za, depth)

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_x = (grad @ w.to(grad.dtype)).sum_to_size(x.shape) if needs[0] else None
        grad_w = (grad.mT @ x.to(grad.dtype)).sum_to_size(w.shape) if needs[1] else None
        return grad_x, grad_w

    def _grad_sums(self, grad: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
        return grad.sum(-2).sum_to_size(shapes[1][:-1]).unsqueeze(-1)

    def operand_shapes(
        self, shape: Sequence[int], other: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for a and b of some shapes, and no geometry."""
        if not shape or not other or shape[-1] != other[max(-2, -len(other))]:
            raise ValueError(f"shapes must be (..., M, K) and (..., K, N), got {tuple(shape)} and {tuple(other)}")
        columns = (other[-1], other[-2]) if len(other) > 1 else (1, other[0])
        return (1,) * (len(shape) == 1) + tuple(shape), (*other[:-2], *columns), ()
