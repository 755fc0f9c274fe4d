"""What one call of an operator computes, as far as its cost goes, and how fast it last was."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..geometry import conv_output_size

_MOST_REMEMBERED = 4096
_SMALL = 2**22


@dataclass(frozen=True)
class Work:
    """Some products of a ``(rows, depth)`` and a ``(lanes, depth)`` operand.

    Attributes
    ----------
    operator : str
        ``"lut_matmul"``, ``"lut_conv2d"`` or ``"lut_dwconv2d"``.
    groups : int
        How many products: of a batch of matrices, or of a grouped convolution.
    rows : int
        Sums of each lane: rows of x, or output pixels of all images.
    lanes : int
        Rows of w, or output channels of a group.
    depth : int
        Products of a sum.
    inputs : int
        Codes of x.
    """

    operator: str
    groups: int
    rows: int
    lanes: int
    depth: int
    inputs: int

    @property
    def macs(self) -> int:
        """Multiplications, or lookups."""
        return self.groups * self.rows * self.lanes * self.depth

    @property
    def is_small(self) -> bool:
        """Whether it is not worth learning if the table has few terms, which can take half a second once a table."""
        return self.macs < _SMALL

    @classmethod
    def matmul(cls, x: Sequence[int], w: Sequence[int]) -> Work:
        """Of codes ``(..., M, K)`` and ``(N, K)`` or ``(..., N, K)``."""
        rows, lanes = x[-2], w[-2]
        if len(w) == 2:  # one w: the leading dimensions of x are rows
            groups, rows = 1, math.prod(x[:-1])
        else:
            groups = math.prod(torch.broadcast_shapes(tuple(w[:-2]), tuple(x[:-2])))
        return cls("lut_matmul", groups, rows, lanes, x[-1], groups * rows * x[-1])

    @classmethod
    def conv2d(
        cls,
        x: Sequence[int],
        w: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        operator: str = "lut_conv2d",
    ) -> Work:
        """Of codes ``(B, C, H, W)`` and ``(O, C/groups, kh, kw)``."""
        size = conv_output_size(x[2:], w[2:], stride, padding, dilation)
        return cls(operator, groups, x[0] * math.prod(size), w[0] // groups, math.prod(w[1:]), math.prod(x))


_last: OrderedDict[tuple[str, Work], float] = OrderedDict()


def record(engine: str, work: Work, seconds: float) -> None:
    """Remember how long an engine took."""
    _last[engine, work] = seconds
    _last.move_to_end((engine, work))
    while len(_last) > _MOST_REMEMBERED:
        _last.popitem(last=False)


def last_seconds(engine: str, work: Work) -> float | None:
    """How long an engine last took for such work in this process; None if it was not timed."""
    return _last.get((engine, work))
