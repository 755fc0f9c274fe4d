"""Approximate convolution layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.conv2d import _conv_bwd_ste
from ..quantization import pad_codes, window_sums
from .layer import ApproxLayer


class ApproxConv2d(ApproxLayer, nn.Conv2d):
    """`torch.nn.Conv2d` whose products come from a multiplier's table.

    In the quantised modes
    ``y[b, o] = sx·sw[o] · (Σ table[xq, wq] − zx·Σwq − zw[o]·Σxq + K·zx·zw[o]) + bias[o]``,
    sums over channels and taps, padded positions holding zx as in hardware.

    Parameters are `torch.nn.Conv2d`'s and `ApproxLayer`'s.
    """

    _channel_dim = -3

    def _pads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) of zeros."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        return tuple((p, p) for p in self.padding)

    def _conf(self) -> dict[str, Any]:
        (top, bottom), (left, right) = self._pads()
        symmetric = self.padding_mode == "zeros" and top == bottom and left == right
        padding = (top, left) if symmetric else (0, 0)
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}

    def _integer_forward(self, input: Tensor) -> Tensor:
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(f"input must be (B, {self.in_channels}, H, W) or unbatched, got {tuple(input.shape)}")
        if input.ndim == 3:
            return self._integer_forward(input.unsqueeze(0)).squeeze(0)
        (top, bottom), (left, right) = self._pads()
        if self._conf()["padding"] != (top, left) or top != bottom or left != right:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = nn.functional.pad(input, (left, right, top, bottom), mode=mode)
        return super()._integer_forward(input)

    def operand_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for an input of some shape, and stride, padding, dilation and groups."""
        if len(shape) not in (3, 4) or shape[-3] != self.in_channels:
            raise ValueError(f"shape must be (B, {self.in_channels}, H, W) or unbatched, got {tuple(shape)}")
        conf = self._conf()
        size = [
            extent + before + after - 2 * inside
            for extent, (before, after), inside in zip(shape[-2:], self._pads(), conf["padding"], strict=True)
        ]
        batch = shape[0] if len(shape) == 4 else 1
        return (batch, self.in_channels, *size), tuple(self.weight.shape), tuple(conf.values())

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int | Tensor) -> Tensor:
        conf = self._conf()
        padding = conf["padding"]
        if isinstance(pad_code, Tensor):  # whose value the operator could not have
            x, padding, pad_code = pad_codes(x, (*padding[1:] * 2, *padding[:1] * 2), pad_code), (0, 0), 0
        geometry = (conf["stride"], padding, conf["dilation"])
        if self.groups == self.in_channels:
            return torch.ops.approxconv.lut_dwconv2d(x, w, table, *geometry, pad_code, engine=self.engine)
        return torch.ops.approxconv.lut_conv2d(x, w, table, *geometry, self.groups, pad_code, engine=self.engine)

    def _code_sums(self, x: Tensor, zero_point: int | Tensor) -> Tensor:
        sums = window_sums(x, self.kernel_size, pad=zero_point, **self._conf())
        return sums.repeat_interleave(self.out_channels // self.groups, dim=1) if self.groups > 1 else sums

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return _conv_bwd_ste(grad, x, w, self._conf(), needs)
