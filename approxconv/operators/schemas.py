"""``torch.ops.approxconv``: schemas, shape functions and dispatch to the engines.

``lut_matmul(x, w, table)``
    ``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``; x ``(..., M, K)``, w ``(N, K)`` or ``(..., N, K)`` with
    leading dimensions that broadcast, y int32 ``(..., M, N)``.
``lut_conv2d(x, w, table, stride, padding, dilation, groups, pad_code)``
    ``y[b, o, i, j] = Σ_{c,r,s} table[x[b, c, i·sh − ph + r·dh, j·sw − pw + s·dw], w[o, c, r, s]]`` over the channels c
    of o's group; positions outside x hold `pad_code`. x ``(B, C, H, W)``, w ``(O, C/groups, kh, kw)``, y int32
    ``(B, O, H', W')``.
``lut_dwconv2d(x, w, table, stride, padding, dilation, pad_code)``
    The same with one group a channel: w ``(C·multiplier, 1, kh, kw)``.

x and w hold codes, uint8 or int8 each; of a byte the low ``a_bits`` or ``w_bits`` count. `table` is int32
``(2**a_bits, 2**w_bits)``. All are on one device. ``K·max|table| ≥ 2³¹`` is a ValueError: a sum could wrap.
The keyword `engine` names an engine; ``"auto"`` follows `approxconv.use_engine`, then what should be fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import choose
from ..engines.work import Work, record
from ..geometry import batch_shape, conv_output_size, pair
from ..multiplier import check_table_shape, prepare

_SCHEMAS = {
    "lut_matmul": '(Tensor x, Tensor w, Tensor table, *, str engine="auto") -> Tensor',
    "lut_conv2d": "(Tensor x, Tensor w, Tensor table, int[2] stride, int[2] padding, int[2] dilation, SymInt groups, "
    'SymInt pad_code, *, str engine="auto") -> Tensor',
    "lut_dwconv2d": "(Tensor x, Tensor w, Tensor table, int[2] stride, int[2] padding, int[2] dilation, "
    'SymInt pad_code, *, str engine="auto") -> Tensor',
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"approxconv::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_operands(x: Tensor, w: Tensor, table: Tensor) -> None:
    for name, operand in (("x", x), ("w", w)):
        if operand.dtype not in (torch.uint8, torch.int8):
            raise ValueError(f"{name} must be uint8 or int8 codes, got {operand.dtype}")
    if table.dtype != torch.int32:
        raise ValueError(f"table must be int32, got {table.dtype}")
    check_table_shape(table)
    if not x.device == w.device == table.device:
        raise ValueError(f"x, w and table must be on one device, got {x.device}, {w.device} and {table.device}")


def _matmul_shape(x: Tensor, w: Tensor, table: Tensor) -> tuple[int, ...]:
    _check_operands(x, w, table)
    if x.ndim < 2:
        raise ValueError(f"x must be (..., M, K), got shape {tuple(x.shape)}")
    if w.ndim < 2:
        raise ValueError(f"w must be (N, K) or (..., N, K), got shape {tuple(w.shape)}")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x and w must agree in K, got {tuple(x.shape)} and {tuple(w.shape)}")
    try:
        batch = batch_shape(x, w)
    except RuntimeError:
        raise ValueError(
            f"leading dimensions of x and w must broadcast, got {tuple(x.shape)} and {tuple(w.shape)}"
        ) from None
    return (*batch, x.shape[-2], w.shape[-2])


def _conv_shape(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
) -> tuple[int, int, int, int]:
    _check_operands(x, w, table)
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
    if w.ndim != 4:
        raise ValueError(f"w must be (O, C/groups, kh, kw), got shape {tuple(w.shape)}")
    stride, padding, dilation = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    if groups < 1 or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups != 0:
        raise ValueError(
            f"groups must divide the {x.shape[1]} channels of x and the {w.shape[0]} filters of w, and w must have "
            f"channels/groups channels, got groups={groups} and w of shape {tuple(w.shape)}"
        )
    side = table.shape[0]
    if pad_code < -side // 2 or pad_code >= side:
        raise ValueError(f"pad_code must be a code of the activation, from {-side // 2} to {side - 1}, got {pad_code}")
    out_h, out_w = conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return x.shape[0], w.shape[0], out_h, out_w


def _dwconv_groups(x: Tensor, w: Tensor) -> int:
    """Groups of a depthwise convolution: one a channel (an x without channels is refused by the shape check)."""
    if x.ndim != 4 or w.ndim != 4 or w.shape[1] != 1 or x.shape[1] < 1:
        raise ValueError(
            "x must be (B, C, H, W) with C at least 1 and w (C·multiplier, 1, kh, kw), got shapes "
            f"{tuple(x.shape)} and {tuple(w.shape)}"
        )
    return x.shape[1]


def _check_sums(depth: int, table: Tensor) -> None:
    largest = prepare(table).magnitude
    if depth * largest >= 2**31:
        raise ValueError(
            f"{depth} products of up to {largest} may not fit the int32 sum: K·max|table| must stay below 2**31"
        )


def _bytes(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)


def _timed(engine: str, work: Work, device: torch.device, operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call; on the CPU, where a call ends with its work, remember how long it took (`approxconv.explain`)."""
    if device.type != "cpu":
        return operator(*arguments)
    start = time.perf_counter()
    y = operator(*arguments)
    record(engine, work, time.perf_counter() - start)
    return y


def _lut_matmul(x: Tensor, w: Tensor, table: Tensor, *, engine: str = "auto") -> Tensor:
    shape = _matmul_shape(x, w, table)
    work = Work.matmul(x.shape, w.shape)
    engine, run = choose(engine, table, work)
    _check_sums(x.shape[-1], table)
    if 0 in shape or x.shape[-1] == 0:
        return x.new_zeros(shape, dtype=torch.int32)
    return _timed(engine, work, x.device, run.lut_matmul, _bytes(x), _bytes(w), table)


def _lut_conv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
    *,
    engine: str = "auto",
) -> Tensor:
    shape = _conv_shape(x, w, table, stride, padding, dilation, groups, pad_code)
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    work = Work.conv2d(x.shape, w.shape, *geometry, groups)
    engine, run = choose(engine, table, work)
    _check_sums(w.shape[1] * w.shape[2] * w.shape[3], table)
    if 0 in shape or w.shape[1] == 0:
        return x.new_zeros(shape, dtype=torch.int32)
    arguments = (_bytes(x), _bytes(w), table, *geometry, groups, pad_code & 0xFF)
    return _timed(engine, work, x.device, run.lut_conv2d, *arguments)


def _lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
    *,
    engine: str = "auto",
) -> Tensor:
    groups = _dwconv_groups(x, w)
    shape = _conv_shape(x, w, table, stride, padding, dilation, groups, pad_code)
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    work = Work.conv2d(x.shape, w.shape, *geometry, groups, "lut_dwconv2d")
    engine, run = choose(engine, table, work)
    _check_sums(w.shape[2] * w.shape[3], table)
    if 0 in shape:
        return x.new_zeros(shape, dtype=torch.int32)
    arguments = (_bytes(x), _bytes(w), table, *geometry, pad_code & 0xFF)
    return _timed(engine, work, x.device, run.lut_dwconv2d, *arguments)


def _fake_matmul(x: Tensor, w: Tensor, table: Tensor, *, engine: str = "auto") -> Tensor:
    return x.new_empty(_matmul_shape(x, w, table), dtype=torch.int32)


def _fake_conv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
    *,
    engine: str = "auto",
) -> Tensor:
    return x.new_empty(_conv_shape(x, w, table, stride, padding, dilation, groups, pad_code), dtype=torch.int32)


def _fake_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
    *,
    engine: str = "auto",
) -> Tensor:
    return _fake_conv2d(x, w, table, stride, padding, dilation, _dwconv_groups(x, w), pad_code, engine=engine)


for _name, _kernel, _fake in (
    ("lut_matmul", _lut_matmul, _fake_matmul),
    ("lut_conv2d", _lut_conv2d, _fake_conv2d),
    ("lut_dwconv2d", _lut_dwconv2d, _fake_dwconv2d),
):
    torch.library.register_kernel(f"approxconv::{_name}", None, _kernel)
    torch.library.register_fake(f"approxconv::{_name}", _fake)
