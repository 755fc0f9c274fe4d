"""Approximate linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..multiplier import Multiplier
from ..operators.approxgemm import _gemm_bwd_ste
from .layer import ApproxLayer


class ApproxLinear(ApproxLayer, nn.Linear):
    """`torch.nn.Linear` whose products come from a multiplier's table.

    In the quantised modes
    ``y[..., n] = sx·sw[n] · (Σ_k table[xq, wq] − zx·Σwq − zw[n]·Σxq + K·zx·zw[n]) + bias[n]``.

    Parameters
    ----------
    *args, **kwargs
        `torch.nn.Linear`'s.
    multiplier : Multiplier or str
        The multiplier, or its name for `approxconv.get_multiplier`.
    mode : str
        ``"float"``, ``"quantized"`` or ``"approximate"``.
    engine : str
        ``"auto"`` follows `approxconv.use_engine`, then the device; else the engine's name.

    Raises
    ------
    ValueError
        No such mode, engine or multiplier.
    """

    _channel_dim = -1

    def __init__(
        self,
        *args: Any,
        multiplier: Multiplier | str,
        mode: str = "approximate",
        engine: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_approx(multiplier, mode, engine)

    @classmethod
    def from_float(
        cls, layer: nn.Linear, multiplier: Multiplier | str, *, mode: str = "approximate", engine: str = "auto"
    ) -> ApproxLinear:
        """Take over a stock `torch.nn.Linear`: the same parameters, not copies, and its hooks."""
        return cls.__new__(cls)._adopt(layer, multiplier, mode, engine)

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

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int) -> Tensor:
        return torch.ops.approxconv.lut_matmul(x, w, table, engine=self.engine)

    def _code_sums(self, x: Tensor, zero_point: int) -> Tensor:
        return x.sum(-1, keepdim=True, dtype=torch.int32)

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return _gemm_bwd_ste(grad, x, w, needs)
