"""Exact functional models of multipliers: a factorised one as ordinary products of expanded operands."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .certificate import largest_partial_sums
from .factorize import factorize
from .features import device_for, features
from .geometry import conv_output_size, pair
from .lattice import MOST_TERMS
from .low_rank import LowRank
from .multiplier import MAX_BITS, Multiplier, operand_range
from .operators.conv2d import round_once
from .wide import WideMultiplier

_KEYS = ("stride", "padding", "dilation", "groups")


class FastModel:
    """``model(op, x, w, kwargs)``: a multiplier's sums of products, exactly, from calls of ``op(x, w, **kwargs)``.

    For `FastApproxConv2dOp` and `FastApproxGeMMOp`. As ``fn(a, w) = Σ_p F[p, a]·G[p, w]`` (`LowRank.parts`), one
    product or convolution of operands with P channels for each of their own, which hold ``F[p, x]`` and ``G[p, w]``, is
    the sum of products. Terms with a constant ``F[p]`` or ``G[p]`` are sums over w or x alone and no part of it.
    Made by the multipliers' `fast_model`.

    Parameters
    ----------
    multiplier : Multiplier or WideMultiplier or LowRank
        With a factorisation, or that itself. Later writes to a table are not seen.

    Raises
    ------
    ValueError
        `multiplier` is none, or has no factorisation.

    Notes
    -----
    Why the result is the integer sum, rounded once to x's dtype, to nearest with ties to even. With B[w] a bound of
    ``Σ_p |F[p, a]·G[p, w]|`` for all a, no partial sum of an output channel exceeds ``Σ_k B[w[n, k]]`` in any order:

    - If that is below 2²⁴ and bfloat16 holds all features (as it does those of a table), sums are of float32; else, if
      it is below 2⁵³, of float64. Else the weights' features are cut into digits with lower sums, of float64, one call
      of `op` each, which are put together in int64.
    - TF32 and bfloat16 modes of float32 products (``torch.set_float32_matmul_precision``, ``allow_tf32``,
      ``fp32_precision``) cannot change it: they hold the features, and their sums are float32. They are neither read
      nor written. No operand is float16 or bfloat16, so that no reduction is of reduced precision.
    - Autocast is off inside, for the calling thread.
    - Winograd and FFT convolutions are no sums of these products. In torch only cuDNN and NNPACK use them, oneDNN's are
      direct; so cuDNN on CUDA, NNPACK on the CPU, is off while a convolution is launched. These are switches of the
      whole process: meanwhile other threads' convolutions run without them too, and a thread that sets one loses what
      it set. Of several models at work the last one restores what the first one found, also after an exception.
    - What is neither on a CPU nor on a CUDA device is computed on the CPU.
    """

    exact_below = 2**53
    """Sums of integers below it are exact in float64."""
    scratch = 2**26
    """Bytes of features and patches that are alive at once; one term of a sample, or of w, may need more."""

    def __init__(self, multiplier: Multiplier | WideMultiplier | LowRank) -> None:
        is_form = isinstance(multiplier, LowRank)
        factors = multiplier if is_form else factorize(multiplier)
        if factors is None:
            instead = (
                ": use ApproxConv2dOp and ApproxGeMMOp, which look its products up, or, where an approximation of it "
                "will do, the engine 'truncated'"
            )
            raise ValueError(
                f"{multiplier!r} has no factorisation of at most {MOST_TERMS} terms to make a model of"
                f"{instead if isinstance(multiplier, Multiplier) else ''}"
            )
        self._name = "" if is_form else multiplier.name
        self._formats = tuple(
            (side.shape[1].bit_length() - 1, signed)
            for side, signed in ((factors.f, factors.a_signed), (factors.g, factors.w_signed))
        )
        f, g = factors.parts
        by_row = (g == g[:, :1]).all(1)
        by_column = (f == f[:, :1]).all(1) & ~by_row
        product = ~(by_row | by_column)
        row, column = g[by_row, 0] @ f[by_row], f[by_column, 0] @ g[by_column]
        self._has_rows = bool((row != 0).any())
        f, g = f[product], g[product]
        self._in_bfloat16 = all(torch.equal(side.bfloat16().long(), side) for side in (f, g))
        self._vectors = {
            "f": f.T.contiguous(),
            "g": g.T.contiguous(),
            "row": row[:, None],
            "column": column[:, None],
            "largest": largest_partial_sums(factors)[:, None],
        }
        self._largest = float(self._vectors["largest"].max())
        self._copies: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"FastModel({self._name or 'unnamed'!r}, products={self._vectors['f'].shape[1]})"

    @torch.no_grad()
    def __call__(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """``y[..., n] = Σ_k fn(x[..., k], w[n, k])``, or its convolution.

        Parameters
        ----------
        op : callable
            `torch.nn.functional.linear`, or `torch.nn.functional.conv2d` if w has four dimensions, or their equal.
        x : Tensor
            ``(..., K)`` or ``(B, C, H, W)``, floating, of more than 8 bits float32 or float64; rounded and saturated to
            the activation's range.
        w : Tensor
            ``(N, K)`` or ``(O, C/groups, kh, kw)``, likewise.
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
            Operands of another dtype or not on one device, shapes or arguments that do not fit, or sums that int64 may
            not hold.
        """
        for name, operand, (bits, _) in zip("xw", (x, w), self._formats, strict=True):
            wanted = (
                "floating" if bits <= MAX_BITS else "float32 or float64"
            )  # bfloat16 does not hold all 16-bit integers
            fits = isinstance(operand, Tensor) and operand.is_floating_point()
            if not fits or (bits > MAX_BITS and operand.dtype not in (torch.float32, torch.float64)):
                got = operand.dtype if isinstance(operand, Tensor) else type(operand).__name__
                raise ValueError(f"{name} must be a {wanted} tensor, got {got}")
        return round_once(self._sums(op, x, w, kwargs), x.dtype).to(x.device)

    @torch.no_grad()
    def sums(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The sums themselves, int64; x and w of any real dtype. Otherwise as a call."""
        for name, operand in (("x", x), ("w", w)):
            if operand.is_complex():
                raise ValueError(f"{name} must be real, got {operand.dtype}")
        return self._sums(op, x, w, kwargs).to(x.device, torch.int64)

    def _sums(self, op: Callable[..., Tensor], x: Tensor, w: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The sums in float32, float64 or int64."""
        if x.device != w.device:
            raise ValueError(f"x and w must be on one device, got {x.device} and {w.device}")
        device = device_for(x)
        a, b = (
            _codes(operand, *bits_signed).to(device) for operand, bits_signed in zip((x, w), self._formats, strict=True)
        )
        direct: AbstractContextManager[None] = nullcontext()
        if w.ndim == 2:
            shape = _linear_shape(x, w, kwargs)
            a = a.reshape(x.shape[:-1].numel(), x.shape[-1])
        else:
            a, kwargs, shape = _without_padding(a, b, kwargs)
            direct = _DIRECT[device.type].inside()
        if 0 in (*shape, *w.shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)
        y = self._constants(a, b, kwargs, shape)
        with torch.autocast(device.type, enabled=False), direct:
            self._add_products(op, a, b, kwargs, y)
        return y.reshape(shape)

    def _constants(self, a: Tensor, b: Tensor, kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
        """What terms with a constant factor add up to, in the dtype that holds all sums."""
        dtype, dim, device = self._arithmetic(b), 1 - b.ndim, a.device
        column = features(b, self._on("column", device, torch.int64), dim).flatten(1).sum(1)
        y = column.to(dtype).view(-1, *[1] * (b.ndim - 2)).expand(len(a), *shape[len(shape) + dim :])
        y = y.clone(memory_format=torch.contiguous_format if b.ndim == 2 else torch.channels_last)
        if self._has_rows:
            row = self._on("row", device, torch.int64)
            for part in _slices(len(a), self.scratch // (8 * a[0].numel())):
                sums = features(a[part], row, dim)
                y[part] += sums.sum(-1, keepdim=True) if dim == -1 else _window_sums(sums, b, **kwargs)
        return y

    def _add_products(
        self, op: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: Mapping[str, Any], y: Tensor
    ) -> None:
        """Add all other terms: as many at a time as scratch holds for one sample, of as many samples as it holds."""
        dim, device = 1 - b.ndim, a.device
        dtype = torch.float32 if y.dtype == torch.float32 else torch.float64
        f, g = self._on("f", device, dtype), self._on("g", device, torch.int64 if y.dtype == torch.int64 else dtype)
        # float32 is copied once, into another layout; of float64 patches are cut out.
        copies = 1 + (1 if dtype == torch.float32 else b[0, 0].numel())
        sample = dtype.itemsize * a[0].numel() * copies
        for terms in _slices(f.shape[1], self.scratch // max(sample, dtype.itemsize * b.numel())):
            vectors = f[:, terms]
            weights = [(features(b, g[:, terms], dim), 0)]
            if y.dtype == torch.int64:
                weights = self._digits(weights[0][0], vectors.abs().amax(0), dim)
            for part in _slices(len(a), self.scratch // (sample * vectors.shape[1])):
                expanded = features(a[part], vectors, dim)
                for digit, shift in weights:
                    y[part].add_(op(expanded, digit, **kwargs).to(y.dtype), alpha=2**shift)

    def _arithmetic(self, b: Tensor) -> torch.dtype:
        """float32 or float64, the narrower one in which no partial sum can be inexact, or else int64."""
        bound = b[0].numel() * self._largest
        if bound >= min(2**24, self.exact_below):
            # Of no negative terms, so that roundings take none from 2⁵³ or more to below it.
            bound = float(features(b, self._on("largest", b.device, torch.float64), 1).flatten(1).sum(1).max())
        if bound < min(2**24, self.exact_below) and self._in_bfloat16:
            return torch.float32
        if bound < self.exact_below:
            return torch.float64
        if bound * (1 + 2**-20) >= 2**63:  # what roundings may hide
            raise ValueError(f"sums must be below 2**63, with these weights they may reach {bound:.3g}")
        return torch.int64

    def _digits(self, weights: Tensor, peaks: Tensor, dim: int) -> list[tuple[Tensor, int]]:
        """Weights' features, int64, as float64 digits and their shifts, so few that sums are exact in each."""
        by_term = weights.movedim(dim, -1).unflatten(-1, (-1, len(peaks)))

        def is_exact(digit: Tensor) -> bool:
            return float((digit.double().abs() @ peaks).flatten(1).sum(1).max()) < self.exact_below

        for bits in range(min(int(weights.abs().max()).bit_length(), 62), 0, -1):
            rest, digits = by_term, []
            while rest.any():
                digits.append((torch.fmod(rest, 2**bits), bits * len(digits)))
                rest = torch.div(rest, 2**bits, rounding_mode="trunc")
            if all(is_exact(digit) for digit, _ in digits):
                return [(digit.double().flatten(-2).movedim(-1, dim), shift) for digit, shift in digits]
        if not weights.any():
            return []
        raise ValueError(f"float64 holds no sums of {weights[0].numel():,} products of these operands")

    def _on(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = name, dtype, device
        if key not in self._copies:
            with torch.inference_mode(False):  # what is kept may meet autograd later
                self._copies[key] = self._vectors[name].to(device, dtype)
        return self._copies[key]


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(first, first + step) for first in range(0, length, step))


def _codes(operand: Tensor, bits: int, signed: bool) -> Tensor:
    """Codes of the nearest values that the operand's format has, int32, from 0 to ``2**bits − 1``."""
    low, high = operand_range(bits, signed)
    values = operand.detach()
    if values.is_floating_point():
        values = values.to(torch.promote_types(values.dtype, torch.float32)).round()
    else:
        values = values.long()
    return values.clamp(low, high).int() & high - low


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


def _window_sums(row: Tensor, b: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """Sums over each receptive field: ``(B, C, H, W)`` to ``(B, O, H', W')``."""
    sums = row.unflatten(1, (groups, -1)).sum(2)
    for dim, k, s, d in zip((2, 3), b.shape[2:], stride, dilation, strict=True):
        sums = sums.unfold(dim, d * (k - 1) + 1, s)[..., ::d].sum(-1)
    return sums.repeat_interleave(b.shape[0] // groups, 1)


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
