"""Which engine a call takes, why, and how fast that should be and was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ._display import Shown, html_table, titled
from .engines import choose, requested
from .engines.choice import Candidate as Weighed
from .engines.choice import predict, weigh
from .engines.factored import form_of
from .engines.truncated import TruncatedEngine
from .engines.work import Work, last_seconds, record
from .geometry import pair
from .multiplier import Multiplier
from .nn.layer import ApproxLayer
from .operators.conv2d import Conv2dArgs
from .truncation import truncate

_HEADING = ("engine", "products", "predicted GMAC/s", "last measured GMAC/s")
_REPEATS = 5


@dataclass(frozen=True)
class Candidate:
    """An engine that could run the call.

    Attributes
    ----------
    engine : str
        Its name.
    products : int
        GEMMs that it takes; 0 for one that looks products up.
    predicted, measured : float or None
        GMAC/s by the cost model, and of the last call of this shape in this process; None where not known. A MAC is one
        product of the multiplier, however an engine computes it.
    """

    engine: str
    products: int
    predicted: float | None
    measured: float | None

    @property
    def _cells(self) -> tuple[str, ...]:
        speeds = ("–" if speed is None else f"{speed:.1f}" for speed in (self.predicted, self.measured))
        return self.engine, str(self.products or "–"), *speeds


@dataclass(frozen=True)
class Explanation(Shown):
    """Made by `approxconv.explain`.

    Attributes
    ----------
    engine : str
        The one that runs the call.
    reason : str
        Why.
    candidates : tuple of Candidate
        That one, and the others that were weighed.
    macs : int
        Multiplications.
    threads : int or None
        Those of torch, which a CPU engine uses; None on a GPU.
    """

    engine: str
    reason: str
    candidates: tuple[Candidate, ...]
    macs: int
    threads: int | None

    @property
    def _title(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"engine {self.engine}: {self.macs / 1e6:,.1f} million multiplications{threads}"

    def __str__(self) -> str:
        rows = [_HEADING, *(candidate._cells for candidate in self.candidates)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self._title, self.reason, *lines])

    def _repr_html_(self) -> str:
        return titled(self._title, f"<p>{self.reason}</p>", html_table([c._cells for c in self.candidates], _HEADING))


def explain(
    target: ApproxLayer | Conv2dArgs,
    shape: Sequence[int],
    multiplier: Multiplier | None = None,
    *,
    engine: str | None = None,
    device: torch.device | str | None = None,
    measure: bool = False,
) -> Explanation:
    """Say which engine computes a layer or a convolution, and why.

    Parameters
    ----------
    target : ApproxLayer or Conv2dArgs
        The layer (of attention or a recurrent cell, one of its `products`), or the shape of a convolution.
    shape : sequence of int
        Of the input: ``(B, C, H, W)`` of a convolution in 2-D, ``(..., K)`` of a linear layer.
    multiplier : Multiplier, optional
        Beside `Conv2dArgs` only; a layer has its own.
    engine : str, optional
        As for the ops; by default the layer's, or ``"auto"``.
    device : torch.device or str, optional
        By default the layer's, or the CPU.
    measure : bool
        Time the engines that are weighed, on random codes, instead of relying on earlier calls.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        `target` is neither, the shape does not fit it, a multiplier is missing or one too many, or the layer is in
        float mode and looks nothing up.
    EngineError, ImportError
        The engine asked for cannot run there, or not with this table.

    Examples
    --------
    >>> from approxconv import get_multiplier
    >>> conv = Conv2dArgs(64, 64, 3, padding=1)
    >>> explain(conv, (1, 64, 8, 8), get_multiplier("mitchell_8u_8s")).engine
    'cpu'
    """
    call = _call(target, _sizes(shape), multiplier, device)
    work, on_gpu = call.work, call.table.is_cuda
    asked = requested(getattr(target, "engine", "auto") if engine is None else engine)
    name, run = choose(asked, call.table, work)
    if asked == "factored":
        form_of(call.table)  # or an EngineError, as the call would raise
    choice = None if asked != "auto" or work.is_small else weigh(work, call.table)
    candidates = choice.candidates if choice is not None else (predict(name, work, call.table),)
    if measure:
        for candidate in candidates:
            record(candidate.engine, work, call.seconds(candidate.engine))
    if choice is not None:
        reason = choice.why
    elif asked == "auto":
        reason = "too few multiplications for it to be worth learning whether the table has few terms"
    elif isinstance(run, TruncatedEngine):
        reason = f"asked for by name; {truncate(call.table, run.rank)}"
    else:
        reason = "asked for by name"
    return Explanation(
        name,
        reason,
        tuple(_with_speeds(candidate, work) for candidate in candidates),
        work.macs,
        None if on_gpu else torch.get_num_threads(),
    )


@dataclass(frozen=True)
class _Call:
    """A call of an operator: its operands' shapes, a convolution's stride, padding, dilation and groups, the table."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    geometry: tuple[Any, ...]
    table: Tensor

    @property
    def _is_depthwise(self) -> bool:
        return self.geometry[-1] == self.x[1]

    @property
    def work(self) -> Work:
        if not self.geometry:
            return Work.matmul(self.x, self.w)
        return Work.conv2d(self.x, self.w, *self.geometry, "lut_dwconv2d" if self._is_depthwise else "lut_conv2d")

    def seconds(self, engine: str) -> float:
        """The median of some runs on random codes."""
        ops, device = torch.ops.approxconv, self.table.device
        x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in (self.x, self.w))
        times = []
        for _ in range(_REPEATS + 1):  # the first one compiles
            start = time.perf_counter()
            if not self.geometry:
                y = ops.lut_matmul(x, w, self.table, engine=engine)
            elif self._is_depthwise:
                y = ops.lut_dwconv2d(x, w, self.table, *self.geometry[:-1], 0, engine=engine)
            else:
                y = ops.lut_conv2d(x, w, self.table, *self.geometry, 0, engine=engine)
            if y.is_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that tensors can have, or a ValueError."""
    if not isinstance(shape, Sequence) or not all(isinstance(size, Integral) and size >= 0 for size in shape):
        raise ValueError(f"shape must be a sequence of ints of at least 0, got {shape!r:.60}")
    return tuple(shape)


def _call(
    target: ApproxLayer | Conv2dArgs, shape: tuple[int, ...], multiplier: Multiplier | None, device: Any
) -> _Call:
    if isinstance(target, ApproxLayer):
        if multiplier is not None:
            raise ValueError(f"multiplier must be left out beside a layer, which has its own, got {multiplier!r}")
        if target.mode == "float":
            raise ValueError("target must be in mode 'quantized' or 'approximate': in 'float' it looks nothing up")
        table = target.operation_table()
        return _Call(*target.operand_shapes(shape), table if device is None else table.to(device))
    if not isinstance(target, Conv2dArgs):
        raise ValueError(f"target must be an ApproxLayer or Conv2dArgs, got {target!r:.60}")
    if not isinstance(multiplier, Multiplier):
        raise ValueError(f"multiplier must be a Multiplier beside Conv2dArgs, got {multiplier!r:.60}")
    if len(shape) != 4 or shape[1] != target.in_channels:
        raise ValueError(f"shape must be (B, {target.in_channels}, H, W), got {shape}")
    filters = (target.out_channels, target.in_channels // target.groups, *pair("kernel_size", target.kernel_size, 1))
    return _Call(shape, filters, tuple(target.backward_args().values()), multiplier.on(device or "cpu"))


def _with_speeds(weighed: Weighed, work: Work) -> Candidate:
    times = weighed.seconds, last_seconds(weighed.engine, work)
    return Candidate(weighed.engine, weighed.products, *(time and work.macs / time / 1e9 for time in times))
