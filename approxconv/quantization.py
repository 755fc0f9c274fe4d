"""How real numbers become operand codes: scales, zero points, and the sums that take zero points out again.

A value is ``real = scale · (q − zero_point)``. The multiplier's operand format decides the scheme: a signed operand is
quantised symmetrically (zero point 0), an unsigned one affinely. Activations have one scale a tensor, weights one an
output channel. Ranges come from PyTorch's observers and training goes through PyTorch's fake quantisation
(`torch.ao.quantization`, which every supported torch ships, so it is no further dependency).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from .multiplier import operand_range


@dataclass(frozen=True)
class OperandFormat:
    """Width and signedness of one operand."""

    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """Smallest value."""
        return operand_range(self.bits, self.signed)[0]

    @property
    def high(self) -> int:
        """Largest value."""
        return operand_range(self.bits, self.signed)[1]

    @property
    def dtype(self) -> torch.dtype:
        """The byte type that holds its codes."""
        return torch.int8 if self.signed else torch.uint8

    def _observer_arguments(self, kind: str) -> dict[str, object]:
        return {
            "dtype": torch.qint8 if self.signed else torch.quint8,
            "qscheme": getattr(torch, f"{kind}_{'symmetric' if self.signed else 'affine'}"),
            "quant_min": self.low,
            "quant_max": self.high,
        }

    def activation_observer(self) -> MinMaxObserver:
        """Observer of one range a tensor."""
        return MinMaxObserver(**self._observer_arguments("per_tensor"))

    def weight_observer(self) -> PerChannelMinMaxObserver:
        """Observer of one range an output channel (dimension 0)."""
        return PerChannelMinMaxObserver(ch_axis=0, **self._observer_arguments("per_channel"))

    def quantize(self, real: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``clamp(round(real / scale) + zero_point, low, high)`` as uint8 or int8 codes.

        Bit for bit the codes behind `torch.fake_quantize_per_tensor_affine`, which multiplies by the reciprocal and
        makes NaN the lowest one.
        """
        shifted = (real.detach() * scale.reciprocal()).round_().add_(zero_point)
        low = torch.tensor(float(self.low), dtype=shifted.dtype, device="cpu")  # a scalar goes with any device
        return torch.fmax(shifted, low, out=shifted).clamp_(max=self.high).to(self.dtype)


class QuantizedWeight(NamedTuple):
    """A weight's codes and what goes with them, one entry an output channel.

    Attributes
    ----------
    codes : Tensor
        uint8 or int8, the weight's shape.
    scale : Tensor
        float32 ``(O,)``.
    zero_point : Tensor
        int32 ``(O,)``.
    sums : Tensor
        int64 ``(O,)``: Σ_k codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor


def quantize_weight(weight: Tensor, operand: OperandFormat) -> QuantizedWeight:
    """Quantise a weight ``(O, ...)`` over the range of each output channel."""
    weight = weight.detach().float()
    observer = operand.weight_observer().to(weight.device)
    observer(weight)
    scale, zero_point = (q.to(weight.device) for q in observer.calculate_qparams())
    scale = scale.float()  # the observer computes in torch's default type
    column = (-1, *[1] * (weight.ndim - 1))
    codes = operand.quantize(weight, scale.view(column), zero_point.view(column))
    return QuantizedWeight(codes, scale, zero_point.int(), codes.flatten(1).sum(1, dtype=torch.int64))


def sum_dtype(bound: int) -> torch.dtype:
    """int32 where it holds every integer of at most this magnitude, else int64."""
    return torch.int32 if bound < 2**31 else torch.int64


def remove_zero_points(
    sums: Tensor,
    weight: QuantizedWeight,
    x_zero_point: int,
    x_sums: Tensor | None,
    column: tuple[int, ...],
    bound: int,
) -> Tensor:
    """``Σ(xq − zx)(wq − zw) = Σ table[xq, wq] − zx·Σwq − zw·Σxq + K·zx·zw``, in exact integers.

    Parameters
    ----------
    sums : Tensor
        int32 or int64 ``Σ table[xq, wq]``; may be overwritten.
    weight : QuantizedWeight
        Of K weights a channel.
    x_zero_point : int
        zx.
    x_sums : Tensor or None
        ``Σ_k xq`` behind each of `sums`, broadcastable to them; None where every zw is 0.
    column : tuple of int
        The shape in which a vector over output channels broadcasts to sums.
    bound : int
        At least the magnitude of any partial result; int64 is used where int32 cannot hold it.

    Returns
    -------
    Tensor
        int32 or int64, of sums' shape.
    """
    dtype = sum_dtype(bound)
    depth = weight.codes[0].numel()
    if x_zero_point:
        constant = depth * x_zero_point * weight.zero_point.long() - x_zero_point * weight.sums
        sums = sums.to(dtype).add_(constant.to(dtype).view(column))
    if x_sums is not None:
        sums = sums.to(dtype).sub_(x_sums.to(dtype) * weight.zero_point.to(dtype).view(column))
    return sums


def window_sums(
    codes: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    pad: int,
) -> Tensor:
    """``Σ_k xq`` over each receptive field: codes ``(B, C, *size)`` to int32 ``(B, groups, *output)``."""
    sums = codes.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)
    border = pad * (codes.shape[1] // groups)
    sums = torch.nn.functional.pad(sums, [p for p in reversed(padding) for _side in range(2)], value=border)
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        sums = sums.unfold(dim, d * (k - 1) + 1, s)[..., ::d].sum(-1, dtype=torch.int32)
    return sums
