"""Approximate linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.approxgemm import _gemm_bwd_ste
from .layer import ApproxLayer


class ApproxLinear(ApproxLayer, nn.Linear):
    """`torch.nn.Linear` whose products come from a multiplier's table.

    In the quantised modes
    ``y[..., n] = sx·sw[n] · (Σ_k table[xq, wq] − zx·Σwq − zw[n]·Σxq + K·zx·zw[n]) + bias[n]``.

    Parameters are `torch.nn.Linear`'s and `ApproxLayer`'s.
    """

    _channel_dim = -1

    def _integer_forward(self, input: Tensor) -> Tensor:
        if input.ndim < 1 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must be (..., {self.in_features}), got {tuple(input.shape)}")
        if input.ndim == 1:
            return self._integer_forward(input.unsqueeze(0)).squeeze(0)
        return super()._integer_forward(input)

    def operand_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for an input of some shape, and no geometry."""
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"shape must be (..., {self.in_features}), got {tuple(shape)}")
        return (1,) * (len(shape) == 1) + tuple(shape), tuple(self.weight.shape), ()

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int | Tensor) -> Tensor:
        return torch.ops.approxconv.lut_matmul(x, w, table, engine=self.engine)

    def _code_sums(self, x: Tensor, zero_point: int | Tensor) -> Tensor:
        return x.sum(-1, keepdim=True, dtype=torch.int32)

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return _gemm_bwd_ste(grad, x, w, needs)
