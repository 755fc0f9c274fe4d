"""Sizes of convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral


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
) -> tuple[int, int]:
    """``(H', W')`` of a convolution: ``⌊(n + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1``.

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
    return out[0], out[1]
