"""Convolutions of ResNet-18 and MobileNetV2 on the CPU: the LUT operators, native fp32, a naive gather."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import torch
import torch.nn.functional as F

import approxconv  # noqa: F401 (registers torch.ops.approxconv)

BATCH = 16


@dataclass(frozen=True)
class Case:
    """One 3×3 convolution, padding 1, at batch 16."""

    kind: str
    channels: int
    size: int
    stride: int = 1

    @property
    def depthwise(self) -> bool:
        """One group a channel."""
        return "depthwise" in self.kind

    @property
    def name(self) -> str:
        """As in tables."""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kind} {self.channels}→{self.channels} at {self.size}×{self.size}{stride}"

    @property
    def macs(self) -> int:
        """Multiplications."""
        out = (self.size - 1) // self.stride + 1
        return BATCH * out * out * self.channels * 9 * (1 if self.depthwise else self.channels)


CASES = (
    *(Case("ResNet-18", c, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(
        Case("MobileNetV2 depthwise", c, s, step)
        for c, s, step in (
            (32, 112, 1),
            (96, 112, 2),
            (144, 56, 1),
            (144, 56, 2),
            (192, 28, 1),
            (192, 28, 2),
            (384, 14, 1),
            (576, 14, 1),
            (576, 14, 2),
            (960, 7, 1),
        )
    ),
)


@dataclass(frozen=True)
class Measurement:
    """Median seconds of each way to compute a case."""

    case: Case
    seconds: float
    native: float
    gather: float

    @property
    def ratio(self) -> float:
        """Speed as a share of native fp32."""
        return self.native / self.seconds


def geometric_mean(values: Sequence[float]) -> float:
    """``(Π v)^(1/n)``."""
    return math.exp(statistics.fmean(map(math.log, values)))


@numba.njit(parallel=True)
def naive_gather(x, w, table, stride, y):  # noqa: ANN001, ANN201
    """The obvious loop: one lookup a product, 3×3, padding 1 by the caller, groups as the shapes say."""
    batch, filters, out_h, out_w = y.shape
    depth = w.shape[1]
    per_group = filters // (x.shape[1] // depth)
    for job in numba.prange(batch * filters):
        b, o = job // filters, job % filters
        first = o // per_group * depth
        for i in range(out_h):
            for j in range(out_w):
                total = 0
                for c in range(depth):
                    for r in range(3):
                        for s in range(3):
                            total += table[x[b, first + c, i * stride + r, j * stride + s], w[o, c, r, s]]
                y[b, o, i, j] = total


def _medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, the runs interleaved so that all see the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat:  # the first round compiles and warms up
                seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def measure(case: Case, repeats: int) -> Measurement:
    """Time one case; the three results are compared with each other on the way."""
    generator = torch.Generator().manual_seed(0)
    groups = case.channels if case.depthwise else 1
    shape = (case.channels, case.channels // groups, 3, 3)
    x = torch.randint(0, 256, (BATCH, case.channels, case.size, case.size), dtype=torch.uint8, generator=generator)
    w = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    table = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=generator)
    geometry = ([case.stride] * 2, [1, 1], [1, 1])
    ops = torch.ops.approxconv
    out = (case.size - 1) // case.stride + 1
    y = torch.empty(BATCH, case.channels, out, out, dtype=torch.int32)
    padded, arrays = F.pad(x, (1, 1, 1, 1)).numpy(), (w.numpy(), table.numpy())

    def approximate() -> torch.Tensor:
        if case.depthwise:
            return ops.lut_dwconv2d(x, w, table, *geometry, 0, engine="cpu")
        return ops.lut_conv2d(x, w, table, *geometry, groups, 0, engine="cpu")

    def native(memory_format: torch.memory_format) -> Callable[[], torch.Tensor]:
        xf, wf = (t.float().contiguous(memory_format=memory_format) for t in (x, w))
        return lambda: F.conv2d(xf, wf, None, case.stride, 1, 1, groups)

    def gather() -> None:
        naive_gather(padded, *arrays, case.stride, y.numpy())

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    natives = [native(torch.contiguous_format), native(torch.channels_last)]
    gather()
    if not torch.equal(approximate(), y):
        raise AssertionError(f"{case.name}: the engine and the naive gather disagree")
    seconds, *native_seconds = _medians([approximate, *natives], repeats)
    (gather_seconds,) = _medians([gather], max(1, repeats // 5))
    return Measurement(case, seconds, min(native_seconds), gather_seconds)


def markdown(rows: Sequence[Measurement]) -> str:
    """The table, and the means that the README quotes."""
    lines = [
        "`lut_conv2d` and `lut_dwconv2d` with a random 16-bit table, engine `cpu`, batch 16, 3×3 kernels, padding 1; "
        "native is fp32 `F.conv2d` in whichever of NCHW and channels_last is faster; the naive gather is a Numba "
        "`prange` loop that looks each product up. Medians of interleaved runs.",
        "",
        "| layer | approxconv ms | native ms | gather ms | approxconv GMAC/s | native GMAC/s | ratio to native "
        "| times gather |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case.name} | {1e3 * row.seconds:.2f} | {1e3 * row.native:.2f} | {1e3 * row.gather:.1f} "
            f"| {row.case.macs / row.seconds / 1e9:.1f} | {row.case.macs / row.native / 1e9:.1f} "
            f"| {row.ratio:.2f} | {row.gather / row.seconds:.1f} |"
        )
    lines.append("")
    for kind in dict.fromkeys(row.case.kind for row in rows):
        some = [row for row in rows if row.case.kind == kind]
        ratio = geometric_mean([row.ratio for row in some])
        gain = geometric_mean([row.gather / row.seconds for row in some])
        lines.append(f"Geometric mean, {kind}: {ratio:.2f} of native fp32, {gain:.1f} times the naive gather.")
        lines.append("")
    return "\n".join(lines)
