"""Approximate product of two activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..multiplier import Multiplier, prepare
from ..quantization import OperandFormat
from .layer import ApproxLayer, StraightThrough, eagerly, host_int, rescaled


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
    a is quantised in the format of the multiplier's activations and b in that of its weights, each with one scale and
    zero point that `approxconv.calibrate` sets.

    Parameters
    ----------
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

    weight = None
    bias = None

    def __init__(
        self,
        *,
        multiplier: Multiplier | str,
        mode: str = "approximate",
        engine: str = "auto",
    ) -> None:
        super().__init__()
        self._init_approx(multiplier, mode, engine)
        self.weight_observer = self.weight_format.activation_observer()

    @eagerly
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
        self._require_calibration()
        return self._integer_forward(a, b).to(torch.promote_types(a.dtype, b.dtype))

    def _integer_forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == 1:
            return self._integer_forward(a.unsqueeze(0), b).squeeze(-1 if b.ndim == 1 else -2)
        if b.ndim == 1:
            return self._integer_forward(a, b.unsqueeze(1)).squeeze(-1)
        if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-2]:
            raise ValueError(f"a and b must be (..., M, K) and (..., K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
        a_zero, b_zero = host_int(self.activation_zero_point), host_int(self.weight_zero_point)
        a, bt = a.float(), b.float().mT
        a_codes = self.activation_format.quantize(a, self.activation_scale, self.activation_zero_point)
        b_codes = self.weight_format.quantize(bt, self.weight_scale, self.weight_zero_point)
        table = self.operation_table()
        sums = torch.ops.approxconv.lut_matmul(a_codes, b_codes, table, engine=self.engine)
        depth = a.shape[-1]
        largest = max(prepare(table).magnitude, 2 ** (self.activation_format.bits + self.weight_format.bits))
        dtype = torch.int32 if 4 * depth * largest < 2**31 else torch.int64
        if a_zero:
            sums = sums.to(dtype).sub_(b_codes.sum(-1, dtype=dtype).sub_(depth * b_zero).mul_(a_zero).unsqueeze(-2))
        if b_zero:
            sums = sums.to(dtype).sub_(a_codes.sum(-1, keepdim=True, dtype=dtype).mul_(b_zero))
        scale = self.activation_scale * self.weight_scale
        if not (torch.is_grad_enabled() and (a.requires_grad or bt.requires_grad)):
            return rescaled(sums, scale)
        x = fake_quantize(a, self.activation_format, self.activation_scale, self.activation_zero_point)
        w = fake_quantize(bt, self.weight_format, self.weight_scale, self.weight_zero_point)
        return StraightThrough.apply(x, w, sums, scale, a_codes, self.activation_scale.clone(), a_zero, self._gradient)

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_x = (grad @ w.to(grad.dtype)).sum_to_size(x.shape) if needs[0] else None
        grad_w = (grad.mT @ x.to(grad.dtype)).sum_to_size(w.shape) if needs[1] else None
        return grad_x, grad_w

    def operand_shapes(
        self, shape: Sequence[int], other: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for a and b of some shapes, and no geometry."""
        if not shape or not other or shape[-1] != other[max(-2, -len(other))]:
            raise ValueError(f"shapes must be (..., M, K) and (..., K, N), got {tuple(shape)} and {tuple(other)}")
        columns = (other[-1], other[-2]) if len(other) > 1 else (1, other[0])
        return (1,) * (len(shape) == 1) + tuple(shape), (*other[:-2], *columns), ()

    def observers(self) -> list[nn.Module]:
        """Those of a and of b."""
        return [self.activation_observer, self.weight_observer]

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turn both observed ranges into scales and zero points."""
        for operand, observer in zip(("activation", "weight"), self.observers(), strict=True):
            scale, zero_point = observer.calculate_qparams()
            getattr(self, f"{operand}_scale").copy_(scale.view(()))
            getattr(self, f"{operand}_zero_point").copy_(zero_point.view(()))
        self.calibrated.fill_(True)

    def extra_repr(self) -> str:
        """Multiplier, mode and engine."""
        return super().extra_repr().removeprefix(", ")


def fake_quantize(real: Tensor, operand: OperandFormat, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`torch.fake_quantize_per_tensor_affine` over an operand's range."""
    return torch.fake_quantize_per_tensor_affine(real, scale, zero_point, operand.low, operand.high)
