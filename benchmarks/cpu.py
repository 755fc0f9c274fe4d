"""Layers of ResNet-18 and MobileNetV2 on the CPU: the LUT operators, native fp32, a naive gather."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numba
import numpy as np
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
class Linear:
    """A linear layer."""

    inputs: int
    outputs: int
    batch: int
    kind = "linear"

    @property
    def name(self) -> str:
        """As in tables."""
        return f"linear {self.inputs}→{self.outputs}, batch {self.batch}"

    @property
    def macs(self) -> int:
        """Multiplications."""
        return self.batch * self.inputs * self.outputs


LINEAR = (Linear(512, 1000, 1), Linear(512, 1000, 64))
# Random 16-bit entries, and the exact product and so many random terms beside it.
TABLES = ("any table", "rank 1", "rank 4")


@dataclass(frozen=True)
class Measurement:
    """Median seconds of each way to compute a case, those of the tables by their names."""

    case: Case | Linear
    seconds: Mapping[str, float]
    native: float
    gather: float

    def ratio(self, table: str) -> float:
        """Speed as a share of native fp32."""
        return self.native / self.seconds[table]


def geometric_mean(values: Sequence[float]) -> float:
    """``(Π v)^(1/n)``."""
    return math.exp(statistics.fmean(map(math.log, values)))


@numba.njit(parallel=True)
def naive_gather(x, w, table, y):  # noqa: ANN001, ANN201
    """The obvious loop, as peers write it: patches (G, M, K) and weights (G, N, K), one lookup a product."""
    groups, rows, depth = x.shape
    lanes = w.shape[1]
    flat = table.ravel()
    for job in numba.prange(groups * rows):
        g, m = job // rows, job % rows
        for n in range(lanes):
            total = np.int32(0)
            for k in range(depth):
                total += flat[np.uint32(x[g, m, k]) * np.uint32(256) + np.uint32(w[g, n, k])]
            y[g, m, n] = total


def patches(x: torch.Tensor, kernel: int, stride: int, padding: int, groups: int) -> np.ndarray:
    """im2col, which the naive gather is not charged for: ``(G, pixels of all images, K)``."""
    padded = F.pad(x, [padding] * 4).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    batch, channels, height, width = windows.shape[:4]
    apart = windows.reshape(batch, groups, channels // groups, height, width, kernel, kernel)
    return np.ascontiguousarray(apart.transpose(1, 0, 3, 4, 2, 5, 6)).reshape(groups, batch * height * width, -1)


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, the runs interleaved and back and forth: what ran before leaves its caches."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for i in range(len(functions)) if repeat % 2 else reversed(range(len(functions))):
            start = time.perf_counter()
            functions[i]()
            if repeat:  # the first round compiles and warms up
                times[i].append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def table_of(name: str, generator: torch.Generator) -> torch.Tensor:
    """One of `TABLES`, for signed operands; all entries fit 16 bits, as those of circuits do."""
    if name == "any table":
        return torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=generator)
    rank = int(name.removeprefix("rank "))
    f, g = (torch.randint(-n, n, (256, rank), dtype=torch.int32, generator=generator) for n in (16, 128))
    values = torch.arange(256, dtype=torch.int32).to(torch.int8).int()
    return torch.outer(values, values) + f @ g.T


def measure(case: Case | Linear, repeats: int) -> Measurement:
    """Time one case; every result is compared with a naive gather's on the way."""
    generator = torch.Generator().manual_seed(0)
    ops = torch.ops.approxconv
    tables = {name: table_of(name, generator) for name in TABLES}
    if isinstance(case, Linear):
        shapes = (case.batch, case.inputs), (case.outputs, case.inputs)
        x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
        rows, groups = x[None].numpy(), 1
        xf, wf = x.float(), w.float()
        natives = [lambda: F.linear(xf, wf)]

        def approximate(table: torch.Tensor) -> torch.Tensor:
            return ops.lut_matmul(x, w, table)
    else:
        groups = case.channels if case.depthwise else 1
        shape = (case.channels, case.channels // groups, 3, 3)
        x = torch.randint(0, 256, (BATCH, case.channels, case.size, case.size), dtype=torch.uint8, generator=generator)
        w = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        stride = case.stride
        geometry, rows = ([stride] * 2, [1, 1], [1, 1]), patches(x, 3, stride, 1, groups)

        def approximate(table: torch.Tensor) -> torch.Tensor:
            if case.depthwise:
                return ops.lut_dwconv2d(x, w, table, *geometry, 0)
            return ops.lut_conv2d(x, w, table, *geometry, groups, 0)

        def native(memory_format: torch.memory_format) -> Callable[[], torch.Tensor]:
            xf, wf = (t.float().contiguous(memory_format=memory_format) for t in (x, w))
            return lambda: F.conv2d(xf, wf, None, stride, 1, 1, groups)

        natives = [native(torch.contiguous_format), native(torch.channels_last)]
    filters = w.reshape(groups, w.shape[0] // groups, -1).numpy()
    sums = np.empty((groups, rows.shape[1], filters.shape[1]), np.int32)

    def gather(table: torch.Tensor) -> None:
        naive_gather(rows, filters, table.numpy(), sums)

    def in_order(y: torch.Tensor) -> torch.Tensor:
        """An operator's result as the gather writes it."""
        if y.ndim == 2:
            return y[None]
        return y.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    for name, table in tables.items():
        gather(table)
        if not torch.equal(in_order(approximate(table)), torch.from_numpy(sums)):
            raise AssertionError(f"{case.name}, {name}: the operator and the naive gather disagree")
    ours = [partial(approximate, table) for table in tables.values()]
    times = medians([*ours, *natives], repeats)
    (gather_seconds,) = medians([partial(gather, tables["any table"])], max(1, repeats // 5))
    seconds = dict(zip(tables, times, strict=False))
    return Measurement(case, seconds, min(times[len(tables) :]), gather_seconds)


def markdown(rows: Sequence[Measurement]) -> str:
    """The table, and the means that the README quotes."""
    lines = [
        "`lut_conv2d`, `lut_dwconv2d` and `lut_matmul` with the engine that `auto` takes; convolutions have batch"
        " 16, 3×3 kernels and padding 1. *Any table*: random 16-bit entries. *Rank r*: the exact product and r "
        "random terms of 8-bit factors. Native is fp32 `F.conv2d` in whichever of NCHW and channels_last is "
        "faster, or `F.linear`; the naive gather is a Numba `prange` loop that looks each product up. Medians of "
        "interleaved runs; a ratio is native time divided by ours.",
        "",
        f"| layer | {' | '.join(f'{name} ms' for name in TABLES)} | native ms | gather ms "
        f"| {' | '.join(f'{name} GMAC/s' for name in TABLES)} | native GMAC/s "
        f"| {' | '.join(f'{name} ratio' for name in TABLES)} | any table, times gather |",
        "|---" * (3 * len(TABLES) + 5) + "|",
    ]
    for row in rows:
        seconds = [row.seconds[name] for name in TABLES]
        cells = [
            row.case.name,
            *(f"{1e3 * value:.2f}" for value in (*seconds, row.native)),
            f"{1e3 * row.gather:.1f}",
            *(f"{row.case.macs / value / 1e9:.1f}" for value in (*seconds, row.native)),
            *(f"{row.ratio(name):.2f}" for name in TABLES),
            f"{row.gather / row.seconds[TABLES[0]]:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for kind in dict.fromkeys(row.case.kind for row in rows if row.case.kind != Linear.kind):
        some = [row for row in rows if row.case.kind == kind]
        ratios = ", ".join(f"{name} {geometric_mean([row.ratio(name) for row in some]):.2f}" for name in TABLES)
        gain = geometric_mean([row.gather / row.seconds[TABLES[0]] for row in some])
        lines.append(
            f"Geometric mean of the ratio to native fp32, {kind}: {ratios}; any table {gain:.1f} times the gather."
        )
        lines.append("")
    return "\n".join(lines)
