"""Exact functional models of multipliers: a factorised table as ordinary products of expanded operands."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .certificate import largest_partial_sums
from .factorize import MOST_TERMS, factorize
from .features import device_for, features
from .geometry import conv_output_size, pair
from .multiplier import Multiplier
from .operators.conv2d import to_codes

_KEYS = ("stride", "padding", "dilation", "groups")
# Features of an operand alive at once, unless a single term has more.
_CHUNK = 2**24


class FastModel:
    """``model(op, x, w, kwargs)``: a multiplier's sums of products, exactly, from calls of ``op(x, w, **kwargs)``.

    For `FastApproxConv2dOp` and `FastApproxGeMMOp`. As ``table[a, w] = Σ_p F[p, a]·G[p, w]``
    (`Factorization.parts`), one product or convolution of operands with P channels for each of their own, which hold
    ``F[p, x]`` and ``G[p, w]``, is the sum of table entries. Terms with a constant ``F[p]`` or ``G[p]`` are sums over w
    or x alone and no part of it.
    Made by `Multiplier.fast_model`.

    Parameters
    ----------
    multiplier : Multiplier
        With a factorisation. Later writes to its table are not seen.

    Raises
    ------
    ValueError
        `multiplier` is none, or has no factorisation.

    Notes
    -----
    Why the result is the integer sum, rounded once to x's dtype, to nearest with ties to even:

    - Features are integers of at most 2⁸ in magnitude. They are summed up in float32 if for these weights no partial
      sum in any order reaches 2²⁴ (`Factorization.certificate`), else in float64 if none reaches 2⁵³. That takes more
      than 2³² weights a channel, and is refused.
    - TF32 and bfloat16 modes of float32 products (``torch.set_float32_matmul_precision``, ``allow_tf32``,
      ``fp32_precision``) cannot change it: their operands hold integers up to 2⁸, and their sums are float32. They are
      neither read nor written. No operand is float16 or bfloat16, so that no reduction is of reduced precision.
    - Autocast is off inside, for the calling thread.
    - Winograd and FFT convolutions are no sums of these products. In torch only cuDNN and NNPACK use them, oneDNN's are
      direct; so cuDNN on CUDA, NNPACK on the CPU, is off while a convolution is launched. These are switches of the
      whole process: meanwhile other threads' convolutions run without them too, and a thread that sets one loses what
      it set. Of several models at work the last one restores what the first one found, also after an exception.
    - What is neither on a CPU nor on a CUDA device is computed on the CPU.
    """

    def __init__(self, multiplier: Multiplier) -> None:
        factors = factorize(multiplier)
        if factors is None:
            raise ValueError(
                f"{multiplier!r} has no factorisation of at most {MOST_TERMS} terms to make a model of: use "
                "ApproxConv2dOp and ApproxGeMMOp, which look its products up, or, where an approximation of it will "
                "do, the engine 'truncated'"
            )
        self._name = multiplier.name
        self._formats = (multiplier.a_bits, factors.a_signed), (multiplier.w_bits, factors.w_signed)
        f, g = factors.parts
        by_row = (g == g[:, :1]).all(1)
        by_column = (f == f[:, :1]).all(1) & ~by_row
        product = ~(by_row | by_column)
        row, column = g[by_row, 0] @ f[by_row], f[by_column, 0] @ g[by_column]
        self._has_rows = bool((row != 0).any())
        self._vectors = {
            "f": f[product].T.contiguous(),
            "g": g[product].T.contiguous(),
            "row": row[:, None],
            "column": column[:, None],
            "largest": largest_partial_sums(factors)[:, None],
        }
        self._largest = int(self._vectors["largest"].max())
        self._copies: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"FastModel({self._name or 'unnamed'!r}, products={self._vectors['f'].shape[1]})"

    @torch.no_grad()
    def __call__(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """``y[..., n] = Σ_k table[x[..., k], w[n, k]]``, or its convolution.

        Parameters
        ----------
        op : callable
            `torch.nn.functional.linear`, or `torch.nn.functional.conv2d` if w has four dimensions, or their equal.
        x : Tensor
            ``(..., K)`` or ``(B, C, H, W)``, floating; rounded and saturated to the activation's range.
        w : Tensor
            ``(N, K)`` or ``(O, C/groups, kh, kw)``, floating; likewise.
        kwargs : mapping
            Of a convolution: stride, padding (also ``"same"`` and ``"valid"``), dilation and groups. Padded positions
            hold 0, which goes through the multiplier like any value.

        Returns
        -------
        Tensor
            ``(..., N)`` or ``(B, O, H', W')``, of x's dtype and without a gradient.

        Raises
        ------
        ValueError
            Operands that are not floating or not on one device, or shapes or arguments that do not fit.
        """
        for name, operand in (("x", x), ("w", w)):
            if not isinstance(operand, Tensor) or not operand.is_floating_point():
                got = operand.dtype if isinstance(operand, Tensor) else type(operand).__name__
                raise ValueError(f"{name} must be a floating tensor, got {got}")
        if x.device != w.device:
            raise ValueError(f"x and w must be on one device, got {x.device} and {w.device}")
        device = device_for(x)
        a, b = (
            _indices(operand, name, *bits_signed).to(device)
            for operand, name, bits_signed in zip((x, w), "xw", self._formats, strict=True)
        )
        direct: AbstractContextManager[None] = nullcontext()
        if w.ndim == 2:
            shape = _linear_shape(x, w, kwargs)
        else:
            a, kwargs, shape = _without_padding(a, b, kwargs)
            direct = _DIRECT[device.type].inside()
        if 0 in (*shape, *w.shape):
            return x.new_zeros(shape)
        with torch.autocast(device.type, enabled=False), direct:
            y = self._sums(op, a, b, kwargs, shape)
        return _rounded_once(y, x.dtype).to(x.device)

    def _sums(
        self, op: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: Mapping[str, Any], shape: tuple[int, ...]
    ) -> Tensor:
        """The sums of codes' products, float32 or float64."""
        dtype, dim = self._arithmetic(b), 1 - b.ndim
        f, g = (self._on(name, a.device, dtype) for name in "fg")
        terms = f.shape[1]
        step = max(1, _CHUNK // max(a.numel(), b.numel()))
        parts = (slice(first, first + step) for first in range(0, terms, step))
        products = (op(features(a, f[:, part], dim), features(b, g[:, part], dim), **kwargs) for part in parts)
        y = reduce(Tensor.add_, products) if terms else torch.zeros(shape, dtype=dtype, device=a.device)
        column = features(b, self._on("column", a.device, torch.float64), dim).flatten(1).sum(1)
        y += column.to(dtype).view(-1, *[1] * (b.ndim - 2))
        if self._has_rows:
            row = features(a, self._on("row", a.device, torch.float64), dim)
            y += (row.sum(-1, keepdim=True) if dim == -1 else _window_sums(op, row, b, kwargs)).to(dtype)
        return y

    def _arithmetic(self, b: Tensor) -> torch.dtype:
        """The narrower float in which no partial sum can be inexact."""
        bound = b[0].numel() * self._largest
        if bound >= 2**24:
            bound = int(features(b, self._on("largest", b.device, torch.float64), 1).flatten(1).sum(1).max())
        if bound >= 2**53:
            raise ValueError(
                f"w must have partial sums below 2**53, got a bound of {bound} from shape {tuple(b.shape)}"
            )
        return torch.float32 if bound < 2**24 else torch.float64

    def _on(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = name, dtype, device
        if key not in self._copies:
            with torch.inference_mode(False):  # what is kept may meet autograd later
                self._copies[key] = self._vectors[name].to(device, dtype)
        return self._copies[key]


def _indices(operand: Tensor, name: str, bits: int, signed: bool) -> Tensor:
    """The codes of an operand's values, uint8, from 0 to ``2**bits − 1``."""
    return to_codes(operand.detach(), name, bits, signed).view(torch.uint8).bitwise_and(2**bits - 1)


def _linear_shape(x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    if kwargs:
        raise ValueError(f"kwargs must be empty for a w of two dimensions, got {', '.join(sorted(map(repr, kwargs)))}")
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x must be (..., K) and w (N, K), got shapes {tuple(x.shape)} and {tuple(w.shape)}")
    return *x.shape[:-1], w.shape[0]


def _without_padding(
    a: Tensor, b: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], tuple[int, int, int, int]]:
    """The same convolution of padded codes: those arguments that are left, and the shape of its result."""
    unknown = set(kwargs) - set(_KEYS)
    if unknown:
        raise ValueError(f"kwargs must hold only {', '.join(_KEYS)}, got {', '.join(sorted(map(repr, unknown)))}")
    if a.ndim != 4 or b.ndim != 4:
        raise ValueError(
            "x must be (B, C, H, W) and w (O, C/groups, kh, kw), or w (N, K), got shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    groups = kwargs.get("groups", 1)
    if not isinstance(groups, int) or groups < 1 or a.shape[1] != b.shape[1] * groups or b.shape[0] % groups:
        raise ValueError(
            f"groups must divide the channels of x and the filters of w, got groups={groups!r} and shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    stride, dilation = (pair(name, kwargs.get(name, 1), 1) for name in ("stride", "dilation"))
    padding, kernel = kwargs.get("padding", 0), b.shape[2:]
    if not isinstance(padding, str):
        before = after = pair("padding", padding, 0)
    elif padding == "valid" or (padding == "same" and stride == (1, 1)):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        before = [n // 2 for n in total]
        after = [n - n // 2 for n in total]
    else:
        raise ValueError(f"padding must be numbers, 'valid', or 'same' with stride 1, got {padding!r}, stride {stride}")
    a = torch.nn.functional.pad(a, (before[1], after[1], before[0], after[0]))
    shape = a.shape[0], b.shape[0], *conv_output_size(a.shape[2:], kernel, stride, (0, 0), dilation)
    return a, {"stride": stride, "dilation": dilation, "groups": groups}, shape


def _window_sums(op: Callable[..., Tensor], row: Tensor, b: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """``Σ_k row`` over each receptive field: ``(B, C, H, W)`` to ``(B, O, H', W')``."""
    groups = kwargs["groups"]
    planes = row.unflatten(1, (groups, -1)).sum(2).flatten(0, 1).unsqueeze(1)  # (B·groups, 1, H, W)
    sums = op(planes, planes.new_ones(1, 1, *b.shape[2:]), **{**kwargs, "groups": 1})
    return sums.unflatten(0, (row.shape[0], groups)).squeeze(2).repeat_interleave(b.shape[0] // groups, 1)


def _rounded_once(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in float32 or float64 to the nearest numbers of `dtype`, ties to even.

    torch converts float64 to float16 and bfloat16 by way of float32, and so rounds twice. Integers beyond float32 are
    infinite in float16. For bfloat16, of 8 digits, the first rounding is to odd at the 21st.
    """
    if y.dtype == torch.float64 and dtype == torch.bfloat16:
        bits = y.view(torch.int64)
        rest = bits & 0xFFFF_FFFF
        y = torch.where(rest != 0, (bits - rest) | 1 << 32, bits).view(torch.float64)
    return y.to(dtype)


class _Shared:
    """A context of the whole process: entered by the first thread, left by the last one."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._count = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave_for_all)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            if self._count == 0:
                self._entered = self._context()
                self._entered.__enter__()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._entered.__exit__(None, None, None)

    def _leave_for_all(self) -> None:
        """In a forked child: the parent's other threads are not there to leave."""
        self._lock = threading.Lock()
        if self._count:
            self._count = 0
            self._entered.__exit__(None, None, None)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """`torch.backends.cudnn.flags` reads and writes TF32 flags too, and raises where they were set by operator."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_DIRECT = {"cpu": _Shared(torch.backends.nnpack.flags), "cuda": _Shared(_without_cudnn)}
