"""Approximate transposed convolution layers of one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..operators.conv2d import conv_gradient
from ..operators.straight_through import or_placeholder
from ..quantization import sum_dtype
from .conv import ApproxConvNd
from .layer import sum_bound


def _reach(shift: int, stride: int, size: int, output: int) -> tuple[slice, slice]:
    """The inputs i of which ``i·stride + shift`` is an output, and these outputs."""
    first = max(0, -(shift // stride))
    count = max(0, min(size - 1, (output - 1 - shift) // stride) - first + 1)
    start = first * stride + shift
    return slice(first, first + count), slice(start, start + count * stride, stride)


class _ConvTranspose(ApproxConvNd):
    """A transposed convolution: a matrix product, whose columns are added up where they overlap."""

    padding: tuple[int, ...]

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer in its mode; arguments and shapes as the torch layer's.

        Raises
        ------
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        ValueError
            An output size that this input cannot have.
        """
        return super().forward(input, output_size)

    def _filters(self, weight: Tensor) -> Tensor:
        """``(C, O/groups, *kernel)`` as ``(O, C/groups, *kernel)``; and back."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _smallest_output(self, size: Sequence[int]) -> list[int]:
        """The output's size where output_padding is 0."""
        geometry = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in geometry]

    def _integer_forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        self._is_batched("input", input.shape)
        dims = len(self.kernel_size)
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        if any(e >= max(s, d) for e, s, d in zip(extra, self.stride, self.dilation, strict=True)):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got {tuple(extra)}, {self.stride} and "
                f"{self.dilation}"
            )
        size = [least + e for least, e in zip(self._smallest_output(input.shape[-dims:]), extra, strict=True)]
        if min(*input.shape[-dims:], *size) < 1:
            raise ValueError(f"input and output must not be empty, got {tuple(input.shape)} and an output of {size}")
        return super()._integer_forward(input, size)

    def _arguments(self, x: Tensor, w: Tensor, pad_code: int | Tensor) -> tuple[Tensor, Tensor]:
        rows = x.unflatten(1, (self.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        return rows, w.unflatten(0, (self.groups, -1)).flatten(3).permute(0, 3, 1, 2).flatten(1, 2)

    def _overlap_add(self, columns: Tensor, output: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``y[b, (g, o), i·stride + tap·dilation − padding] += columns[g, b, i, tap, o]``, i and tap of each dimension.

        One dimension after another: so there are as many additions as a kernel has rows plus columns, not times.
        """
        taps_at = 2 + len(output)  # the first taps that are left
        for dim, size in enumerate(output):
            stride, padding, dilation = self.stride[dim], self.padding[dim], self.dilation[dim]
            before, shape = (slice(None),) * (2 + dim), list(columns.shape)
            count, shape[2 + dim] = shape[2 + dim], size
            del shape[taps_at]
            sums = columns.new_zeros(shape, dtype=dtype)
            for tap, part in enumerate(columns.unbind(taps_at)):
                inputs, outputs = _reach(tap * dilation - padding, stride, count, size)
                sums[(*before, outputs)] += part[(*before, inputs)]
            columns = sums
        return columns.movedim(-1, 1).movedim(2, 0).flatten(1, 2).contiguous()

    def _lookup(self, x: Tensor, w: Tensor, table: Tensor, pad_code: int | Tensor, output: Sequence[int]) -> Tensor:
        rows, taps = self._arguments(x, w, pad_code)
        columns = torch.ops.approxconv.lut_matmul(rows, taps, table, engine=self.engine)
        columns = columns.unflatten(1, (x.shape[0], *x.shape[2:])).unflatten(-1, (*self.kernel_size, -1))
        dtype = sum_dtype(sum_bound(table, w[0].numel()))
        sums = self._overlap_add(columns, output, dtype)
        if isinstance(pad_code, Tensor) or pad_code:
            # zx·wq is about to be taken out of K products: what is missing of them has to be there as such.
            of_taps = taps.sum(-1, dtype=torch.int32).unflatten(-1, (*self.kernel_size, -1))
            of_taps = of_taps[(slice(None), None, *[None] * len(output))].expand(-1, 1, *columns.shape[2:])
            of_all = w.flatten(1).sum(1, dtype=dtype).view(-1, *[1] * len(output))
            sums += pad_code * (of_all - self._overlap_add(of_taps, output, dtype))
        return sums

    def _overlaps(self, values: Tensor, output: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Sums ``(B, g, *output)`` of values ``(B, g, *input)`` over the taps that reach an output."""
        columns = values.transpose(0, 1)[(..., *[None] * (len(output) + 1))]
        return self._overlap_add(columns.expand(*[-1] * values.ndim, *self.kernel_size, 1), output, dtype)

    def _code_sums(self, x: Tensor, zero_point: int | Tensor, output: Sequence[int]) -> Tensor:
        channels, taps = self.in_channels // self.groups, math.prod(self.kernel_size)
        sums = x.unflatten(1, (self.groups, -1)).sum(2, dtype=torch.int32) - channels * zero_point
        sums = self._overlaps(sums, output, torch.int32) + channels * taps * zero_point
        return sums.repeat_interleave(self.out_channels // self.groups, dim=1)

    def _gradient(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        conf = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        extra = [n - least for n, least in zip(grad.shape[2:], self._smallest_output(x.shape[2:]), strict=True)]
        grad_x, grad_w = conv_gradient(grad, x, self._filters(w), conf, needs, extra)
        return grad_x, None if grad_w is None else self._filters(grad_w)

    def _fan_in(self, depth: int, shape: Sequence[int], output: Sequence[int]) -> Tensor:
        channels = torch.tensor(self.in_channels // self.groups, device=self.table.device)
        return self._overlaps(channels.expand(1, 1, *shape[2:]), output, torch.int64)

    def _grad_sums(self, grad: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
        ones, w = grad.new_ones(()).expand(shapes[0]), or_placeholder(None, shapes[1], grad)
        return self._gradient(grad, ones, w, (False, True))[1]


class ApproxConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` whose products come from a multiplier's table.

    As `ApproxConvTranspose2d`, with ``(B, C, L)`` to ``(B, O, L')``.
    """


class ApproxConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose products come from a multiplier's table.

    In the quantised modes
    ``y[b, o, i·stride + r·dilation − padding] += sx·sw[o] · Σ_c (table[xq, wq] − zx·wq − zw[o]·xq + zx·zw[o])``
    for each input pixel i of ``xq[b, c, i]`` and each tap r of ``wq[c, o, r]``, and ``+ bias[o]`` once. The hardware
    meant multiplies each input with each tap and adds products up where they overlap, as this layer does: it inserts no
    zeros, so ``table[zx, wq]`` counts for those inputs only that are zero. Sums are exact integers, rescaled once.

    Parameters are `torch.nn.ConvTranspose2d`'s and `ApproxLayer`'s.
    """


class ApproxConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose products come from a multiplier's table.

    As `ApproxConvTranspose2d`, with ``(B, C, D, H, W)`` to ``(B, O, D', H', W')``.
    """
