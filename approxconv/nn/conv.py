"""Approximate convolution layers of one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import conv_output_size
from ..multiplier import Multiplier, prepare
from ..operators.conv2d import conv_gradient
from ..quantization import sum_dtype, window_sums
from .layer import ApproxLayer


class ApproxConvNd(ApproxLayer):
    """What convolutions and transposed convolutions share: construction, the check of the input, operand shapes."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

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
        cls, layer: nn.Module, multiplier: Multiplier | str, *, mode: str = "approximate", engine: str = "auto"
    ) -> ApproxConvNd:
        """Take over a stock layer of the torch class: the same parameters, not copies, and its hooks."""
        return cls.__new__(cls)._adopt(layer, multiplier, mode, engine)

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

    def _operands(self, x: Tensor, w: Tensor, pad_code: int) -> tuple[Tensor, Tensor]:
        """The operator's operands, of codes ``(B, C, *size)`` and ``(O, C/groups, *kernel)``."""
        raise NotImplementedError

    def _operator_geometry(self) -> tuple[Any, ...]:
        """The operator's stride, padding, dilation and groups; none for a matrix product."""
        return ()

    def operand_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Shapes of the operator's x and w for an input of some shape, and stride, padding, dilation and groups.

        A transposed convolution is a matrix product and has none of the latter.
        """
        batch = () if self._is_batched("shape", shape) else (1,)
        x = self._padded(torch.empty(*batch, *shape, device="meta"))
        w = self._filters(torch.empty_like(self.weight, device="meta"))
        x, w = self._operands(x, w, 0)
        return tuple(x.shape), tuple(w.shape), self._operator_geometry()


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

    def _operands(self, x: Tensor, w: Tensor, pad_code: int) -> tuple[Tensor, Tensor]:
        return (x.unsqueeze(-2), w.unsqueeze(-2)) if x.ndim == 3 else (x, w)

    def _operator_geometry(self) -> tuple[Any, ...]:
        stride, padding, dilation, groups = self._conf().values()
        return (1, *stride)[-2:], (0, *padding)[-2:], (1, *dilation)[-2:], groups

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int) -> Tensor:
        operands, (*geometry, groups) = self._operands(x, w, pad_code), self._operator_geometry()
        if groups == operands[0].shape[1]:
            y = torch.ops.approxconv.lut_dwconv2d(*operands, table, *geometry, pad_code, engine=self.engine)
        else:
            y = torch.ops.approxconv.lut_conv2d(*operands, table, *geometry, groups, pad_code, engine=self.engine)
        return y.squeeze(-2) if x.ndim == 3 else y

    def _code_sums(self, x: Tensor, zero_point: int) -> Tensor:
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

    Parameters
    ----------
    *args, **kwargs
        `torch.nn.Conv2d`'s.
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

    def _operands(self, x: Tensor, w: Tensor, pad_code: int) -> tuple[Tensor, Tensor]:
        conf = self._conf()
        depth, step, kernel = conf["padding"][0], self.dilation[0], self.kernel_size[0]
        x = nn.functional.pad(x, (0, 0, 0, 0, depth, depth), value=pad_code)
        conv_output_size(x.shape[2:], self.kernel_size, self.stride, (0, *conf["padding"][1:]), self.dilation)
        if self._is_depthwise:
            return x.transpose(1, 2).flatten(0, 1), w.reshape(-1, 1, *self.kernel_size[1:])
        taps = x.unfold(2, step * (kernel - 1) + 1, self.stride[0])[..., ::step]  # (B, C, D', H, W, kd)
        return taps.permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(1, 2), w.flatten(1, 2)

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int) -> Tensor:
        conf, batch = self._conf(), x.shape[0]
        padding, kernel = conf["padding"][0], self.kernel_size[0]
        (depth,) = conv_output_size(x.shape[2:3], (kernel,), self.stride[:1], (padding,), self.dilation[:1])
        y = super()._lookup(x, w, table, pad_code)
        if not self._is_depthwise:
            return y.unflatten(0, (batch, depth)).transpose(1, 2).contiguous()
        y = y.unflatten(0, (batch, x.shape[2] + 2 * padding)).unflatten(2, (self.out_channels, kernel))
        stop = self.stride[0] * (depth - 1) + 1
        taps = [y[:, t * self.dilation[0] :][:, : stop : self.stride[0], :, t] for t in range(kernel)]
        dtype = sum_dtype(w[0].numel() * prepare(table).magnitude)
        sums = taps[0].to(dtype, copy=True)
        for tap in taps[1:]:
            sums += tap
        return sums.transpose(1, 2).contiguous()
