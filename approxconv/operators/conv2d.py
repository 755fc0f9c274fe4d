"""Convolutions by look-up table, with a straight-through gradient.

The Functions take operands that hold integer *values*: float tensors as a quantiser leaves them (rounded and saturated
to the operand's range here) or uint8/int8 tensors. What the values mean as codes is the multiplier's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..geometry import conv_output_size, pair
from ..multiplier import MAX_BITS, Multiplier, check_table_shape, operand_range
from .straight_through import save_operands, saved_operands, wanted

Lut = Multiplier | Tensor | None
_CONF_KEYS = ("stride", "padding", "dilation", "groups")
# By signedness, made beforehand: torch.compile cannot trace the making.
_EXACT = {signed: Multiplier.exact(MAX_BITS, *signed) for signed in itertools.product((False, True), repeat=2)}


@dataclass
class Conv2dArgs:
    """Shape of a 2-D convolution.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of x and of the result.
    kernel_size : int or pair of int
        ``(kh, kw)``.
    stride, padding, dilation : int or pair of int
        As in `torch.nn.functional.conv2d`.
    groups : int
        Divides both channel counts.

    Raises
    ------
    ValueError
        A size that no convolution has; the message names it.
    """

    in_channels: int
    out_channels: int
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels"):
            _count(name, getattr(self, name))
        pair("kernel_size", self.kernel_size, 1)
        self.backward_args()
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups must divide in_channels and out_channels, got groups={self.groups}, "
                f"in_channels={self.in_channels}, out_channels={self.out_channels}"
            )

    def backward_args(self) -> dict[str, Any]:
        """The keyword arguments of `torch.nn.functional.conv2d`: stride, padding, dilation (pairs) and groups."""
        return _conf({key: getattr(self, key) for key in _CONF_KEYS})


def _count(name: str, value: int) -> int:
    """Return `value` if it is an int of at least 1, else raise a ValueError that names it."""
    if not isinstance(value, (Integral, torch.SymInt)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _conf(kwargs: Mapping[str, Any], groups: int = 1) -> dict[str, Any]:
    """Fill in the defaults of `conf`/`kwargs` and check its keys and values."""
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs must be a mapping of {', '.join(_CONF_KEYS)}, got {kwargs!r}")
    unknown = set(kwargs) - set(_CONF_KEYS)
    if unknown:
        raise ValueError(f"kwargs must hold only {', '.join(_CONF_KEYS)}, got {', '.join(sorted(map(repr, unknown)))}")
    return {
        "stride": pair("stride", kwargs.get("stride", 1), 1),
        "padding": pair("padding", kwargs.get("padding", 0), 0),
        "dilation": pair("dilation", kwargs.get("dilation", 1), 1),
        "groups": _count("groups", kwargs["groups"]) if "groups" in kwargs else groups,
    }


def to_codes(operand: Tensor, name: str, bits: int, signed: bool | None) -> Tensor:
    """Round and saturate `operand` to the values of its format; return them as uint8 or int8 codes.

    `signed` None reads uint8 as unsigned and anything else as signed.
    """
    if not operand.is_floating_point() and operand.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"{name} must be a float, uint8 or int8 tensor, got {operand.dtype}")
    if signed is None:
        signed = operand.dtype != torch.uint8
    low, high = operand_range(bits, signed)
    dtype = torch.int8 if signed else torch.uint8
    if operand.is_floating_point():
        return operand.round().clamp_(low, high).to(dtype)
    if operand.dtype == dtype and bits == MAX_BITS:
        return operand
    return operand.to(torch.int16).clamp_(low, high).to(dtype)


def operands(x: Tensor, w: Tensor, lut: Lut) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x and w and the table on their device, as `lut` says.

    A `Multiplier` knows its operand formats. Without one (None: the exact product; a tensor: a bare table) uint8 and
    int8 operands are what they are and float ones are read as int8.
    """
    if isinstance(lut, Multiplier):
        x_codes = to_codes(x.detach(), "x", lut.a_bits, lut.a_signed)
        w_codes = to_codes(w.detach(), "w", lut.w_bits, lut.w_signed)
        return x_codes, w_codes, lut.on(x.device)
    if lut is None:
        a_bits = w_bits = MAX_BITS
    elif isinstance(lut, Tensor):
        a_bits, w_bits = check_table_shape(lut)
    else:
        raise ValueError(f"lut must be a Multiplier, a table tensor or None, got {type(lut).__name__}")
    x_codes, w_codes = to_codes(x.detach(), "x", a_bits, None), to_codes(w.detach(), "w", w_bits, None)
    if lut is None:
        exact = _EXACT[x_codes.dtype == torch.int8, w_codes.dtype == torch.int8]
        return x_codes, w_codes, exact.on(x.device)
    return x_codes, w_codes, lut


def result_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """Floating dtype of x, else of w, else torch's default one."""
    for operand in (x, w):
        if operand.is_floating_point():
            return operand.dtype
    return torch.get_default_dtype()


def round_once(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers, in int32, int64, float32 or float64, to the nearest numbers of `dtype`, ties to even.

    torch converts to float16 and bfloat16 by way of float32, and so rounds twice. Integers beyond float32 are infinite
    in float16. For bfloat16, of 8 digits, the first rounding is to odd at the 21st.
    """
    if dtype == torch.bfloat16 and sums.dtype != torch.float32:
        bits = sums.double().view(torch.int64)
        rest = bits & 0xFFFF_FFFF
        sums = torch.where(rest != 0, (bits - rest) | 1 << 32, bits).view(torch.float64)
    return sums.to(dtype)


def conv_gradient(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    conf: Mapping[str, Any],
    needs: tuple[bool, bool],
    output_padding: Sequence[int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoints of a convolution of any number of dimensions, or of a transposed one.

    Parameters
    ----------
    grad : Tensor
        ``(B, O, *output)``, floating.
    x, w : Tensor
        ``(B, C, *input)`` and ``(O, C/groups, *kernel)``, or ``(C, O/groups, *kernel)`` of a transposed convolution;
        converted to grad's dtype.
    conf : mapping
        stride, padding, dilation (one int a dimension) and groups.
    needs : pair of bool
        Which of the two to compute; the other is None.
    output_padding : sequence of int, optional
        That of a transposed convolution.

    Returns
    -------
    tuple of Tensor
        ``(grad_x, grad_w)``.
    """
    transposed = output_padding is not None
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        grad,
        x.to(grad.dtype),
        w.to(grad.dtype),
        None,
        conf["stride"],
        conf["padding"],
        conf["dilation"],
        transposed,
        output_padding if transposed else (0,) * len(conf["stride"]),
        conf["groups"],
        (*needs, False),
    )
    return grad_x, grad_w


def _conv_bwd_ste(
    grad: Tensor, x: Tensor, w: Tensor, conf: Mapping[str, Any], needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Straight-through gradient: that of the exact convolution of x with w.

    ``grad_x = Σ_o grad ⋆ w`` and ``grad_w = Σ_b x ⋆ grad``, the adjoints of ``conv2d(x, w, **conf)``.

    Parameters
    ----------
    grad : Tensor
        ``(B, O, H', W')``, floating.
    x, w : Tensor
        ``(B, C, H, W)`` and ``(O, C/groups, kh, kw)``; converted to grad's dtype.
    conf : mapping
        stride, padding, dilation, groups: what `Conv2dArgs.backward_args` returns.
    needs : pair of bool
        Which of the two to compute; the other is None.

    Returns
    -------
    tuple of Tensor
        ``(grad_x, grad_w)``.
    """
    return conv_gradient(grad, x, w, _conf(conf), needs)


class ApproxConv2dOp(torch.autograd.Function):
    """``y = Σ lut[x, w]`` over im2col patches: a convolution by look-up table, straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, conv_args: Conv2dArgs, out_dims: Sequence[int], lut: Lut) -> Tensor:
        """Convolve.

        Parameters
        ----------
        x : Tensor
            ``(B, in_channels, H, W)``, integer values in a float tensor, or uint8/int8.
        w : Tensor
            ``(out_channels, in_channels/groups, kh, kw)``, likewise.
        conv_args : Conv2dArgs
            The convolution; padded positions hold 0.
        out_dims : pair of int
            ``(H', W')``, checked.
        lut : Multiplier or Tensor or None
            The product. None is the exact one. Beside a `Multiplier` float operands are rounded and saturated to its
            operand ranges; otherwise float operands are read as int8, and uint8/int8 ones as what they are.

        Returns
        -------
        Tensor
            ``(B, out_channels, H', W')``: the exact int32 sum, rounded once to x's floating dtype (w's, or torch's
            default one, if x has none).

        Raises
        ------
        ValueError
            x, w or out_dims contradict conv_args, conv_args is no `Conv2dArgs`, or lut is none of the three.
        """
        if not isinstance(conv_args, Conv2dArgs):
            raise ValueError(f"conv_args must be a Conv2dArgs, got {type(conv_args).__name__}")
        conf = conv_args.backward_args()
        kernel = pair("kernel_size", conv_args.kernel_size, 1)
        expected = (conv_args.out_channels, conv_args.in_channels // conv_args.groups, *kernel)
        if tuple(w.shape) != expected:
            raise ValueError(f"w must have shape {expected} as conv_args says, got {tuple(w.shape)}")
        if x.ndim != 4 or x.shape[1] != conv_args.in_channels:
            raise ValueError(f"x must have shape (B, {conv_args.in_channels}, H, W), got {tuple(x.shape)}")
        size = conv_output_size(x.shape[2:], kernel, conf["stride"], conf["padding"], conf["dilation"])
        if not isinstance(out_dims, Iterable) or tuple(out_dims) != size:
            raise ValueError(f"out_dims must be {size} for this x and conv_args, got {out_dims!r}")
        x_codes, w_codes, table = operands(x, w, lut)
        y = torch.ops.approxconv.lut_conv2d(
            x_codes, w_codes, table, conf["stride"], conf["padding"], conf["dilation"], conf["groups"], 0
        )
        ctx.conf = conf
        save_operands(ctx, x_codes, w_codes)
        return round_once(y, result_dtype(x, w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`_conv_bwd_ste` of the quantised operands."""
        return *_conv_bwd_ste(grad, *saved_operands(ctx, grad), ctx.conf, wanted(ctx)), None, None, None


class ApproxDWConv2dOp(torch.autograd.Function):
    """Depthwise convolution by look-up table, straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, lut: Lut, kwargs: Mapping[str, Any]) -> Tensor:
        """Convolve each channel with its own filters.

        Parameters
        ----------
        x : Tensor
            ``(B, C, H, W)``, integer values in a float tensor, or uint8/int8.
        w : Tensor
            ``(C·multiplier, 1, kh, kw)``, likewise.
        lut : Multiplier or Tensor or None
            As in `ApproxConv2dOp`.
        kwargs : mapping
            stride, padding, dilation (ints or pairs) and groups, which must be C if it is given.

        Returns
        -------
        Tensor
            ``(B, C·multiplier, H', W')``, as in `ApproxConv2dOp`.

        Raises
        ------
        ValueError
            Shapes or groups that are not depthwise, or an unknown key in kwargs.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
        conf = _conf(kwargs, groups=x.shape[1])
        if conf["groups"] != x.shape[1]:
            raise ValueError(f"groups must be the {x.shape[1]} channels of x, got {conf['groups']}")
        x_codes, w_codes, table = operands(x, w, lut)
        y = torch.ops.approxconv.lut_dwconv2d(
            x_codes, w_codes, table, conf["stride"], conf["padding"], conf["dilation"], 0
        )
        ctx.conf = conf
        save_operands(ctx, x_codes, w_codes)
        return round_once(y, result_dtype(x, w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`_conv_bwd_ste` of the quantised operands."""
        return *_conv_bwd_ste(grad, *saved_operands(ctx, grad), ctx.conf, wanted(ctx)), None, None


class FastApproxConv2dOp(torch.autograd.Function):
    """Convolution by a fast functional model of the multiplier forward, the exact convolution's gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, model: Callable[..., Tensor], kwargs: Mapping[str, Any]) -> Tensor:
        """``round(model(torch.nn.functional.conv2d, x, w, kwargs))``.

        Parameters
        ----------
        x, w : Tensor
            ``(B, C, H, W)`` and ``(O, C/groups, kh, kw)``, floating, holding integer values.
        model : callable
            ``model(op, x, w, kwargs)`` computes the approximate result from calls of ``op(x, w, **kwargs)``.
        kwargs : mapping
            stride, padding, dilation, groups.

        Returns
        -------
        Tensor
            ``(B, O, H', W')``, rounded to integers.
        """
        ctx.conf = _conf(kwargs)
        save_operands(ctx, x, w)
        return torch.round(model(torch.nn.functional.conv2d, x, w, dict(kwargs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`_conv_bwd_ste` of x and w."""
        return *_conv_bwd_ste(grad, *saved_operands(ctx, grad), ctx.conf, wanted(ctx)), None, None
