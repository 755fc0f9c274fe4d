"""Sizes of convolutions, and batches of matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return `value` as a pair of ints, both at least `least`, or raise a ValueError that names it."""
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, Integral) and not isinstance(v, bool) and v >= least for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints, each at least {least}, got {value!r}")
    return int(values[0]), int(values[1])


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Sizes of a convolution's output: ``⌊(n + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1``.

    Raises
    ------
    ValueError
        The kernel is empty or larger than the padded input.
    """
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        if k < 1:
            raise ValueError(f"kernel size must be at least 1, got {tuple(kernel)}")
        if n + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"kernel {tuple(kernel)} with dilation {tuple(dilation)} is larger than the input {tuple(size)} with "
                f"padding {tuple(padding)}"
            )
        out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    return tuple(out)


def batch_shape(x: Tensor, w: Tensor) -> torch.Size:
    """Leading dimensions of the product of ``(..., M, K)`` and ``(..., N, K)``."""
    return x.shape[:-2] if w.ndim == 2 else torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])


def flat_batches(x: Tensor, w: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(G, M, K)``, ``(G, N, K)`` and ``(G, M, N)`` views that together are the product of x with w into y.

    Parameters
    ----------
    x, w : Tensor
        ``(..., M, K)`` and ``(..., N, K)``, leading dimensions that broadcast to y's.
    y : Tensor
        ``(..., M, N)``, contiguous.
    """
    if w.ndim == 2 and x.is_contiguous():  # one w for all: more rows, not more products
        yield x.view(1, -1, x.shape[-1]), w[None], y.view(1, -1, y.shape[-1])
    else:
        batch = y.shape[:-2]
        yield from _flat(x.expand(*batch, *x.shape[-2:]), w.expand(*batch, *w.shape[-2:]), y)


def _flat(x: Tensor, w: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flatten the leading dimensions where that takes no copy, else go through the first of them."""
    try:
        views = tuple(tensor.view(-1, *tensor.shape[-2:]) for tensor in (x, w, y))
    except RuntimeError:
        for parts in zip(x, w, y, strict=True):
            yield from _flat(*parts)
    else:
        yield views
