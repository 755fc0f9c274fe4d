"""Approximate convolution layers of one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import conv_output_size
from ..operators.conv2d import conv_gradient
from ..quantization import pad_codes, sum_dtype, window_sums
from .layer import ApproxLayer, sum_bound


class ApproxConvNd(ApproxLayer):
    """What convolutions and transposed convolutions share: construction, the check of the input, operand shapes.

    A subclass supplies ``_arguments(x, w, pad_code)``: the operator's x and w, of codes ``(B, C, *size)`` and
    ``(O, C/groups, *kernel)``, and its geometry.
    """

    _arguments: Callable[[Tensor, Tensor, int | Tensor], tuple[Any, ...]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def _channel_dim(self) -> int:
        return -1 - len(self.kernel_size)

    def _is_batched(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a shape has a batch dimension; a ValueError if it is no input of this layer."""
        dims = len(self.kernel_size)
        if len(shape) not in (dims + 1, dims + 2) or shape[-dims - 1] != self.in_channels:
            sizes = "L" if dims == 1 else ", ".join("DHW"[-dims:])
            raise ValueError(f"{name} must be (B, {self.in_channels}, {sizes}) or unbatched, got {tuple(shape)}")
        return len(shape) == dims + 2

    def _integer_forward(self, input: Tensor, *geometry: Any) -> Tensor:
        if self._is_batched("input", input.shape):
            return super()._integer_forward(self._padded(input), *geometry)
        return super()._integer_forward(self._padded(input.unsqueeze(0)), *geometry).squeeze(0)

    def _padded(self, input: Tensor) -> Tensor:
        """The input with what padding the operator does not do."""
        return input

    def operand_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for an input of some shape, and stride, padding, dilation and groups.

        A transposed convolution is a matrix product and has none of the latter.
        """
        batch = () if self._is_batched("shape", shape) else (1,)
        x = self._padded(torch.empty(*batch, *shape, device="meta"))
        w = self._filters(torch.empty_like(self.weight, device="meta"))
        x, w, *geometry = self._arguments(x, w, 0)
        return tuple(x.shape), tuple(w.shape), tuple(geometry)


class _Convolution(ApproxConvNd):
    """A convolution of one or two dimensions: one call of `lut_conv2d` or `lut_dwconv2d`."""

    padding: tuple[int, ...] | str
    padding_mode: str

    def _pads(self) -> list[tuple[int, int]]:
        """(before, after) in each dimension."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel_size)
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(p, p) for p in self.padding]

    def _conf(self) -> dict[str, Any]:
        pads = self._pads()
        within = self.padding_mode == "zeros" and all(before == after for before, after in pads)
        padding = tuple(before if within else 0 for before, _ in pads)
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}

    def _padded(self, input: Tensor) -> Tensor:
        pads = [p for ends in reversed(self._pads()) for p in ends]
        if not any(pads) or any(self._conf()["padding"]):
            return input
        return nn.functional.pad(input, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _arguments(self, x: Tensor, w: Tensor, pad_code: int | Tensor) -> tuple[Any, ...]:
        stride, padding, dilation, groups = self._conf().values()
        first = len(padding) if isinstance(pad_code, Tensor) else len(padding) - 2  # that the operator pads itself
        x = pad_codes(x, [p if dim < first else 0 for dim, p in enumerate(padding)], pad_code)
        own = [p if dim >= first else 0 for dim, p in enumerate(padding)]
        return *self._planes(x, w), (1, *stride)[-2:], (0, *own)[-2:], (1, *dilation)[-2:], groups

    def _planes(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Padded codes and filters in two dimensions."""
        return (x.unsqueeze(-2), w.unsqueeze(-2)) if x.ndim == 3 else (x, w)

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int | Tensor) -> Tensor:
        images, filters, *geometry, groups = self._arguments(x, w, pad_code)
        code = 0 if isinstance(pad_code, Tensor) else pad_code
        ops = torch.ops.approxconv
        if groups == images.shape[1]:
            y = ops.lut_dwconv2d(images, filters, table, *geometry, code, engine=self.engine)
        else:
            y = ops.lut_conv2d(images, filters, table, *geometry, groups, code, engine=self.engine)
        return y.squeeze(-2) if x.ndim == 3 else y

    def _code_sums(self, x: Tensor, zero_point: int | Tensor) -> Tensor:
        sums = window_sums(x, self.kernel_size, pad=zero_point, **self._conf())
        return sums.repeat_interleave(self.out_channels // self.groups, dim=1) if self.groups > 1 else sums

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return conv_gradient(grad, x, w, self._conf(), needs)


class ApproxConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` whose products come from a multiplier's table.

    As `ApproxConv2d`, with images of height 1: ``(B, C, L)`` to ``(B, O, L')``.
    """


class ApproxConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` whose products come from a multiplier's table.

    In the quantised modes
    ``y[b, o] = sx·sw[o] · (Σ table[xq, wq] − zx·Σwq − zw[o]·Σxq + K·zx·zw[o]) + bias[o]``,
    sums over channels and taps, padded positions holding zx as in hardware.

    Parameters are `torch.nn.Conv2d`'s and `ApproxLayer`'s.
    """


class ApproxConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` whose products come from a multiplier's table.

    As `ApproxConv2d`, with ``(B, C, D, H, W)`` to ``(B, O, D', H', W')``. It is one call of a 2-D operator: the
    kernel's depth becomes channels, and the output's depth images, ``(B·D', C·kd, H, W)``. This copies each code kd
    times, which is a byte each, where a call for each depth tap would add up kd tensors of int32 sums. If it is
    depthwise, the kernel's depth becomes filters ``(C·m·kd, 1, kh, kw)``, whose sums are added up over the depth:
    so a channel stays a group of its own, which `lut_dwconv2d` is fast at.
    """

    @property
    def _is_depthwise(self) -> bool:
        return 1 < self.groups == self.in_channels

    def _planes(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_depthwise:
            return x.transpose(1, 2).flatten(0, 1), w.reshape(-1, 1, *w.shape[3:])
        step = self.dilation[0]
        conv_output_size(x.shape[2:3], w.shape[2:3], self.stride[:1], (0,), (step,))  # or its ValueError
        taps = x.unfold(2, step * (w.shape[2] - 1) + 1, self.stride[0])[..., ::step]  # (B, C, D', H, W, kd)
        return taps.permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(1, 2), w.flatten(1, 2)

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int | Tensor) -> Tensor:
        batch, kernel, stride, padding, step = (
            x.shape[0],
            w.shape[2],
            self.stride[0],
            self._conf()["padding"][0],
            self.dilation[0],
        )
        (depth,) = conv_output_size(x.shape[2:3], (kernel,), (stride,), (padding,), (step,))
        y = super()._lookup(x, w, table, pad_code)
        if not self._is_depthwise:
            return y.unflatten(0, (batch, depth)).transpose(1, 2).contiguous()
        y = y.unflatten(0, (batch, x.shape[2] + 2 * padding)).unflatten(2, (len(w), kernel))
        sums = y.new_zeros(batch, depth, *y.shape[2:3], *y.shape[4:], dtype=sum_dtype(sum_bound(table, w[0].numel())))
        for tap in range(kernel):
            sums += y[:, tap * step :][:, : stride * (depth - 1) + 1 : stride, :, tap]
        return sums.transpose(1, 2).contiguous()
