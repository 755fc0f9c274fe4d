"""Approximate by choice: a table as the exact product and its error's largest terms, on float products.

``"truncated:4"`` is ``with_rank(4)``, of four terms. `approxconv.truncation.truncate` makes the approximation of a
table, and its `error_bound` says how far off results can be. Scratch stays within 64 MiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..features import device_for, features
from ..geometry import batch_shape, conv_output_size, flat_batches
from ..truncation import Truncation, check_rank, truncate

# A tile of the product: rows of x, rows of w, and features summed over. Of float64 it takes 29 MiB.
_ROWS, _COLUMNS, _DEPTH = 2048, 512, 1024
_TILE = _ROWS * _DEPTH + _COLUMNS * _DEPTH + _ROWS * _COLUMNS
# Bytes of a convolution's patches and of their sums alive at once.
_PATCHES = 2**23


class TruncatedEngine:
    """The engine's three functions with `rank` terms besides the exact product.

    Parameters
    ----------
    rank : int
        0 or more.

    Raises
    ------
    ValueError
        `rank` is no such number.
    """

    def __init__(self, rank: int) -> None:
        self.rank = check_rank(rank)

    def __repr__(self) -> str:
        return f"TruncatedEngine(approximate, rank={self.rank})"

    def unavailable(self, device: torch.device) -> str | None:
        """Runs wherever torch does."""
        return None

    def lut_matmul(self, x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        """About ``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``, to the nearest integer."""
        batch = batch_shape(x, w)
        y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32, device=x.device)
        form = truncate(table, self.rank)
        for operands in flat_batches(x, w, y):
            _multiply(form, *operands)
        return y

    def lut_conv2d(
        self,
        x: Tensor,
        w: Tensor,
        table: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pad_code: int,
    ) -> Tensor:
        """Cut patches out of a few rows at a time, and multiply them with the filters of their group."""
        filters, _, *kernel = w.shape
        size = conv_output_size(x.shape[2:], kernel, stride, padding, dilation)
        y = torch.empty(x.shape[0], filters, *size, dtype=torch.int32, device=x.device)
        form, kernels = truncate(table, self.rank), w.reshape(groups, filters // groups, -1)
        row = size[1] * (kernels.shape[0] * kernels.shape[2] + 4 * filters)  # bytes of one row of one image
        for images, rows in _blocks(x.shape[0], size[0], max(1, _PATCHES // row)):
            patches = _patches(x[images], rows, kernel, stride, padding, dilation, groups, pad_code)
            sums = patches.new_empty(groups, patches.shape[1], filters // groups, dtype=torch.int32)
            _multiply(form, patches, kernels, sums)
            part = y[images, :, rows]
            part.unflatten(1, (groups, -1)).copy_(
                sums.unflatten(1, (part.shape[0], *part.shape[2:])).permute(1, 0, 4, 2, 3)
            )
        return y

    def lut_dwconv2d(
        self,
        x: Tensor,
        w: Tensor,
        table: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        pad_code: int,
    ) -> Tensor:
        """A convolution with one group a channel."""
        return self.lut_conv2d(x, w, table, stride, padding, dilation, x.shape[1], pad_code)


def with_rank(rank: int) -> TruncatedEngine:
    """The engine ``"truncated:RANK"``.

    Raises
    ------
    ValueError
        `rank` is no int of at least 0.
    """
    return TruncatedEngine(rank)


def _blocks(images: int, rows: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `most` rows: of several whole images, or else of one."""
    at_once, height = max(1, most // rows), min(most, rows)
    for image, row in itertools.product(range(0, images, at_once), range(0, rows, height)):
        yield slice(image, min(image + at_once, images)), slice(row, min(row + height, rows))


def _patches(
    x: Tensor,
    rows: slice,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
) -> Tensor:
    """The receptive fields of some rows of the result: ``(groups, B·rows·W', C/groups·kh·kw)``."""
    batch, channels, height, width = x.shape
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    top = rows.start * stride[0] - padding[0]
    bottom = (rows.stop - 1) * stride[0] - padding[0] + span[0]
    first, last = (min(max(n, 0), height) for n in (top, bottom))
    padded = x.new_full((batch, channels, bottom - top, width + 2 * padding[1]), pad_code)
    padded[:, :, first - top : last - top, padding[1] : padding[1] + width] = x[:, :, first:last]
    windows = padded.unfold(2, span[0], stride[0]).unfold(3, span[1], stride[1])
    windows = windows[..., :: dilation[0], :: dilation[1]].unflatten(1, (groups, -1))  # (B, g, C/g, H', W', kh, kw)
    return windows.permute(1, 0, 3, 4, 2, 5, 6).flatten(4).flatten(1, 3)


def _multiply(form: Truncation, x: Tensor, w: Tensor, y: Tensor) -> None:
    """Sums of codes ``(G, M, K)`` with ``(G, N, K)``, rounded into y ``(G, M, N)``."""
    device, (groups, m, k), n = device_for(x), x.shape, w.shape[1]
    dtype = form.arithmetic(k) if _float32_is_plain() else torch.float64
    f, g = (side.T.to(device, dtype).contiguous() for side in form.parts)
    depth = max(1, _DEPTH // f.shape[1])
    features_at_once = min(k, depth) * f.shape[1]
    rows, columns = min(m, _ROWS), min(n, _COLUMNS)
    together = max(1, _TILE // (rows * features_at_once + columns * features_at_once + rows * columns))
    steps = itertools.product(range(0, groups, together), range(0, n, columns), range(0, m, rows))
    with torch.autocast(device.type, enabled=False):
        for group, column, row in steps:
            x_tile, w_tile = x[group : group + together, row : row + rows], w[group : group + together]
            w_tile = w_tile[:, column : column + columns]
            sums = torch.zeros(*x_tile.shape[:2], w_tile.shape[1], dtype=dtype, device=device)
            for first in range(0, k, depth):
                a, b = (
                    features(tile[..., first : first + depth].to(device).bitwise_and(len(vectors) - 1), vectors, -1)
                    for tile, vectors in ((x_tile, f), (w_tile, g))
                )
                sums.baddbmm_(a, b.transpose(1, 2))
            # By int64, as int32's ends are no float32. The exact sums are within them, so nothing gets worse.
            whole = sums.round_().long().clamp_(-(2**31), 2**31 - 1)
            y[group : group + together, row : row + rows, column : column + columns] = whole


def _float32_is_plain() -> bool:
    """Whether products of float32 matrices are of float32 everywhere: no TF32, no bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by operator or backend, and not alike
        return False
