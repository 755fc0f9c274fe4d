"""Which kernels compute a product sum, and with what geometry: made from shapes alone, without a GPU.

A `Problem` says what is to be computed; `product_sum_steps` and `depthwise_steps` say how, as `Step`s that name their
operands; `bind` puts tensors in their places. Steps are remembered by problem, so that a layer called again pays for
`bind` only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .plan import Plan, Target
from .sources import read

CODES = 256
MAX_PIXELS = 2**31 - 2**12  # room to round up to tiles
# Bytes of packed activations, packed weights and partial sums alive at once: less than 64 MiB together.
X_SCRATCH, W_SCRATCH, PARTIAL_SCRATCH = 36 * 2**20, 12 * 2**20, 13 * 2**20
MAX_SPLITS = 8
# Costs in clocks of a multiprocessor (GPU_KERNELS.md): adding a stage of row tables takes about one a row, building it
# as long as adding to 1,100 rows; a gather does about 6 products; a further launch costs about 7,000.
BUILD_ROWS, GATHER_RATE, LAUNCH_CLOCKS = 1100, 6, 7000
MANY_TILES = 64  # of so many, the last one's emptiness does not matter
WARP = 32
# Of a depthwise convolution, in outputs a thread: building a filter's tables, and beginning with a tile.
DEPTHWISE_BUILD, DEPTHWISE_TILE, MOST_PARTS = 24, 4, 1024

GEOMETRY = np.dtype(
    [(name, np.int64) for name in (
        "x_image", "x_group", "x_channel", "x_row", "x_col", "w_group", "w_lane", "w_channel", "w_row", "w_col",
        "out_image", "out_group", "out_lane", "out_pixel", "out_split",
    )]
    + [(name, np.int32) for name in (
        "images", "groups", "lanes", "channels", "height", "width", "out_h", "out_w", "kernel_h", "kernel_w",
        "step_h", "step_w", "pad_h", "pad_w", "dil_h", "dil_w", "bias", "pad_code",
    )],
    align=True,
)  # fmt: skip
TILING = np.dtype(
    [
        (name, np.int32)
        for name in ("rows", "cols", "images", "row_tiles", "col_tiles", "image_tiles", "parts", "copies")
    ],
    align=True,
)


class Ref(NamedTuple):
    """An operand of a step, from its element `offset` on."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """A launch whose tensors are named: ``x``, ``w``, ``table``, ``out`` and the scratch buffers."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[Ref | np.generic | np.ndarray, ...]


@dataclass(frozen=True)
class Steps:
    """The steps of an operator, how many clocks they should take, and the bytes of scratch they share."""

    steps: tuple[Step, ...]
    clocks: float
    scratch: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Problem:
    """An implicit grouped convolution ``out = bias + Σ table[w][x]``; a matrix product has images of one column.

    Attributes
    ----------
    x_shape, x_strides : tuple of int
        Of x as ``(images, groups, channels, height, width)``.
    w_shape, w_strides : tuple of int
        Of w as ``(groups, lanes, channels, kernel_h, kernel_w)``.
    out_size, out_strides : tuple of int
        ``(out_h, out_w)`` and the strides of (image, group, lane, pixel).
    step, pad, dil : tuple of int
        Vertical and horizontal.
    pad_code, offset : int
        The code outside x; what the table's entries have had taken out.
    entry : str
        ``"int16"`` or ``"int32"``.
    x_at, w_at, out_at : int
        Where the parts begin that this problem is about, in elements.
    """

    x_shape: tuple[int, ...]
    x_strides: tuple[int, ...]
    w_shape: tuple[int, ...]
    w_strides: tuple[int, ...]
    out_size: tuple[int, int]
    out_strides: tuple[int, int, int, int]
    step: tuple[int, int]
    pad: tuple[int, int]
    dil: tuple[int, int]
    pad_code: int
    offset: int
    entry: str
    x_at: int = 0
    w_at: int = 0
    out_at: int = 0

    @property
    def images(self) -> int:
        """Batch size."""
        return self.x_shape[0]

    @property
    def groups(self) -> int:
        """Independent products."""
        return self.w_shape[0]

    @property
    def lanes(self) -> int:
        """Output channels a group: columns of the product."""
        return self.w_shape[1]

    @property
    def channels(self) -> int:
        """Input channels a group."""
        return self.w_shape[2]

    @property
    def taps(self) -> int:
        """Products a channel."""
        return self.w_shape[3] * self.w_shape[4]

    @property
    def pixels(self) -> int:
        """Rows of the product."""
        return self.images * math.prod(self.out_size)

    @property
    def padded_pixels(self) -> int:
        """Pixels of x that the output sees, padding included."""
        return self.images * math.prod(
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(self.out_size, self.step, self.w_shape[3:], self.dil, strict=True)
        )

    def extent(self, axis: str) -> int:
        """How much of an axis there is: images, groups, lanes or (output) rows."""
        return {"images": self.images, "groups": self.groups, "lanes": self.lanes, "rows": self.out_size[0]}[axis]

    def geometry(self, out_split: int = 0) -> np.ndarray:
        """``struct Geometry``."""
        sizes = (self.images, self.groups, self.lanes, self.channels, *self.x_shape[3:], *self.out_size)
        bias = self.offset * self.channels * self.taps
        rest = (*self.w_shape[3:], *self.step, *self.pad, *self.dil, bias, self.pad_code)
        return np.array([(*self.x_strides, *self.w_strides, *self.out_strides, out_split, *sizes, *rest)], GEOMETRY)

    def part(self, axis: str, begin: int, end: int) -> Problem:
        """The problem of computing only ``[begin, end)`` of the images, groups, lanes or output rows."""
        if axis == "images":
            return replace(
                self, x_shape=(end - begin, *self.x_shape[1:]), x_at=self.x_at + begin * self.x_strides[0],
                out_at=self.out_at + begin * self.out_strides[0],
            )  # fmt: skip
        if axis == "groups":
            return replace(
                self, x_shape=(self.images, end - begin, *self.x_shape[2:]), w_shape=(end - begin, *self.w_shape[1:]),
                x_at=self.x_at + begin * self.x_strides[1], w_at=self.w_at + begin * self.w_strides[0],
                out_at=self.out_at + begin * self.out_strides[1],
            )  # fmt: skip
        if axis == "lanes":
            return replace(
                self, w_shape=(self.groups, end - begin, *self.w_shape[2:]), w_at=self.w_at + begin * self.w_strides[1],
                out_at=self.out_at + begin * self.out_strides[2],
            )  # fmt: skip
        out_at = self.out_at + begin * self.out_size[1] * self.out_strides[3]
        # The rows that the part sees: those above are cut off where there are any, and padding is what is left of it.
        first = begin * self.step[0] - self.pad[0]
        reach = (end - begin - 1) * self.step[0] + (self.w_shape[3] - 1) * self.dil[0] + 1
        top = min(max(first, 0), self.x_shape[3])
        height = max(min(first + reach, self.x_shape[3]) - top, 0)
        return replace(
            self, x_shape=(*self.x_shape[:3], height, self.x_shape[4]), x_at=self.x_at + top * self.x_strides[3],
            out_size=(end - begin, self.out_size[1]), pad=(top - first, self.pad[1]), out_at=out_at,
        )  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


class _RowTables:
    """The row-table kernels of a source: their tile sizes and what they cost."""

    def __init__(self, source: str, op: str, entry: str) -> None:
        read_source = read(source)
        self.op, self.entry, constants = op, entry, read_source.constants
        names = (re.fullmatch(rf"{op}_rows(\d+)_{entry}", name) for name in read_source.kernels)
        self.rows = sorted(int(match[1]) for match in names if match)
        if self.rows:
            self.threads, self.steps, self.shared = (constants[n] for n in ("THREADS", "STEPS", "SHARED_BYTES"))
            self.lanes, self.pack_threads = constants[f"LANES_{entry.upper()}"], constants["PACK_THREADS"]

    def stages(self, problem: Problem) -> int:
        return ceil_div(problem.channels, self.steps) * problem.taps

    def x_bytes(self, problem: Problem) -> int:
        return problem.groups * ceil_div(problem.channels, self.steps) * problem.padded_pixels * self.steps

    def w_bytes(self, problem: Problem) -> int:
        return problem.groups * ceil_div(problem.lanes, self.lanes) * self.lanes * self.stages(problem) * self.steps

    def choices(self, problem: Problem) -> set[tuple[int, int]]:
        """(rows a thread, threads a block): as few tiles as can be, or some more, as even as whole warps allow."""
        found = set()
        for rows in self.rows:
            fewest = ceil_div(problem.pixels, rows * self.threads)
            for tiles in range(fewest, 2 * fewest + 1) if fewest <= MANY_TILES else (fewest,):
                found.add((rows, ceil_div(ceil_div(problem.pixels, tiles * rows), WARP) * WARP))
        return found

    def clocks(self, problem: Problem, rows: int, threads: int, splits: int, multiprocessors: int) -> float:
        tiles = ceil_div(problem.pixels, rows * threads) * ceil_div(problem.lanes, self.lanes) * problem.groups
        waves = ceil_div(tiles * splits, multiprocessors)
        # With few threads the loads of the table are waited for: building takes as long with half of them.
        stage = rows * threads + BUILD_ROWS * max(1.0, self.threads / (2 * threads))
        extra = (3 if splits > 1 else 2) * LAUNCH_CLOCKS
        return waves * ceil_div(self.stages(problem), splits) * stage + extra

    def best(self, problem: Problem, multiprocessors: int, *, whole: bool) -> tuple[float, int, int, int]:
        """(clocks, rows, threads, splits) of the cheapest way; only a whole problem may be split."""
        partial = 4 * problem.groups * problem.lanes * problem.pixels
        splits = min(MAX_SPLITS, self.stages(problem), PARTIAL_SCRATCH // max(1, partial)) if whole else 1
        return min(
            (self.clocks(problem, *choice, split, multiprocessors), *choice, split)
            for choice in self.choices(problem)
            for split in range(1, max(1, splits) + 1)
        )

    def checked(self, variant: tuple[int, int, int], problem: Problem) -> tuple[int, int, int]:
        """A variant asked for, if the source has it, with no more splits than there are stages."""
        rows, threads, splits = variant
        if rows not in self.rows or not (0 < threads <= self.threads and threads % WARP == 0) or splits < 1:
            raise ValueError(
                f"variant must be (rows, threads, splits) with rows among {self.rows}, threads a multiple of {WARP} up "
                f"to {self.threads}, got {variant}"
            )
        return rows, threads, min(splits, self.stages(problem))

    def fitting(self, problem: Problem) -> list[Problem] | None:
        """Parts whose packed operands fit the scratch; None if no cut gets there."""
        parts = fitting(problem, self.x_bytes, X_SCRATCH, ("groups", "images", "rows"))
        if parts is None:
            return None
        found = [fitting(part, self.w_bytes, W_SCRATCH, ("groups", "lanes")) for part in parts]
        return None if None in found else [part for some in found for part in some]

    def pack(self, problem: Problem) -> Step:
        x_jobs, w_jobs = self.x_bytes(problem) // self.steps, self.w_bytes(problem) // self.lanes
        return Step(
            f"{self.op}_pack_{self.entry}", (ceil_div(x_jobs + w_jobs, self.pack_threads), 1, 1),
            (self.pack_threads, 1, 1), 0,
            (Ref("x", problem.x_at), Ref("w", problem.w_at), Ref("x_packed"), Ref("w_packed"), problem.geometry(),
             np.int32(x_jobs), np.int32(w_jobs)),
        )  # fmt: skip

    def run(self, problem: Problem, rows: int, threads: int, splits: int = 1, out_split: int = 0) -> Step:
        tiles = ceil_div(problem.pixels, rows * threads) * ceil_div(problem.lanes, self.lanes) * problem.groups
        out = Ref("partial") if splits > 1 else Ref("out", problem.out_at)
        return Step(
            f"{self.op}_rows{rows}_{self.entry}", (tiles, splits, 1), (threads, 1, 1), self.shared,
            (Ref("x_packed"), Ref("w_packed"), Ref("table"), out, problem.geometry(out_split)),
        )  # fmt: skip

    def reduce(self, count: int, splits: int) -> Step:
        return Step(
            f"{self.op}_reduce", (ceil_div(count, self.pack_threads), 1, 1), (self.pack_threads, 1, 1), 0,
            (Ref("partial"), Ref("out"), np.int64(count), np.int32(splits)),
        )  # fmt: skip


class _Gather:
    """The plain-gather kernel of a source."""

    def __init__(self, source: str, op: str, entry: str) -> None:
        read_source = read(source)
        self.kernel = f"{op}_gather_{entry}"
        self.exists = self.kernel in read_source.kernels
        if self.exists:
            sizes = (read_source.constants[f"GATHER_{name}"] for name in ("ROWS", "PARTS", "LANES"))
            self.rows, self.parts, self.lanes = sizes

    def _blocks(self, problem: Problem) -> int:
        return ceil_div(problem.pixels, self.rows) * ceil_div(problem.lanes, self.lanes) * problem.groups

    def clocks(self, problem: Problem, multiprocessors: int) -> float:
        products = self.rows * self.lanes * problem.channels * problem.taps
        return max(self._blocks(problem) / multiprocessors, 1) * products / GATHER_RATE + LAUNCH_CLOCKS

    def steps(self, problem: Problem) -> list[Step]:
        return [
            Step(
                self.kernel, (self._blocks(part), 1, 1), (self.rows, self.parts, 1), 0,
                (Ref("x", part.x_at), Ref("w", part.w_at), Ref("table"), Ref("out", part.out_at), part.geometry()),
            )
            for part in fitting(problem, lambda part: part.pixels, MAX_PIXELS, ("images", "rows")) or [problem]
        ]  # fmt: skip


def fitting(problem: Problem, size: Callable[[Problem], int], budget: int, axes: Sequence[str]) -> list[Problem] | None:
    """Cut in halves, along the first of `axes` that has more than one, until `size` fits `budget`."""
    if size(problem) <= budget:
        return [problem]
    axis = next((axis for axis in axes if problem.extent(axis) > 1), None)
    if axis is None:
        return None
    middle = problem.extent(axis) // 2
    halves = problem.part(axis, 0, middle), problem.part(axis, middle, problem.extent(axis))
    found = [fitting(half, size, budget, axes) for half in halves]
    return None if None in found else [part for some in found for part in some]


@lru_cache(maxsize=4096)
def product_sum_steps(
    problem: Problem,
    source: str,
    _fingerprint: str,
    op: str,
    target: Target,
    variant: tuple[int, int, int] | None = None,
) -> Steps:
    """Row tables or the plain gather, whichever should be faster, within the scratch budget.

    Parameters
    ----------
    problem : Problem
        What to compute.
    source, _fingerprint : str
        The kernel source, and its version: with another one the steps are made anew.
    op : str
        ``"lut_gemm"`` or ``"lut_conv2d"``, with which the names of the kernels begin.
    target : Target
        The device.
    variant : tuple of int, optional
        (rows a thread, threads a block, splits) of the row tables to use, or ``(0, 0, 0)`` for the gather, instead of
        the cheapest.
    """
    tables, gather = _RowTables(source, op, problem.entry), _Gather(source, op, problem.entry)
    parts = tables.fitting(problem) if tables.rows and tables.shared <= target.shared_bytes else None
    if not gather.exists and parts is None:
        raise ValueError(
            f"kernel source {source!r} has no {op} kernel for {problem.entry} tables that fits this device"
        )
    gather_clocks = gather.clocks(problem, target.multiprocessors) if gather.exists else math.inf
    if parts is None or variant == (0, 0, 0):
        return Steps(tuple(gather.steps(problem)), gather_clocks)
    if variant is None:
        chosen = [tables.best(part, target.multiprocessors, whole=len(parts) == 1) for part in parts]
    else:
        chosen = [(math.inf, *tables.checked(variant, problem))] * len(parts)
    clocks = sum(choice[0] for choice in chosen)
    if variant is None and gather_clocks <= clocks:
        return Steps(tuple(gather.steps(problem)), gather_clocks)
    scratch = [("x_packed", max(map(tables.x_bytes, parts))), ("w_packed", max(map(tables.w_bytes, parts)))]
    _, rows, threads, splits = chosen[0]
    if splits == 1 or len(parts) > 1:
        steps = [
            step
            for part, (_, rows, threads, _) in zip(parts, chosen, strict=True)
            for step in (tables.pack(part), tables.run(part, rows, threads))
        ]
        return Steps(tuple(steps), clocks, tuple(scratch))
    count = problem.groups * problem.lanes * problem.pixels
    steps = [tables.pack(problem), tables.run(problem, rows, threads, splits, count), tables.reduce(count, splits)]
    return Steps(tuple(steps), clocks, (*scratch, ("partial", 4 * splits * count)))


@lru_cache(maxsize=4096)
def depthwise_steps(problem: Problem, source: str, _fingerprint: str, target: Target) -> Steps:
    """Row tables over the taps of each channel, or the plain gather where these do not fit shared memory.

    Parameters are those of `product_sum_steps`; each of the problem's groups has one channel.
    """
    constants = read(source).constants
    slot = constants["TAPS"] * (2 if problem.entry == "int16" else 4)
    kernel_h, kernel_w = problem.w_shape[3:]
    chunks = ceil_div(kernel_h, constants["TAPS"])
    step_h, step_w = problem.step

    def tile_bytes(rows: int, cols: int) -> int:
        """Bytes an image of the codes that a tile sees."""
        strip_rows = ceil_div(rows, constants["STRIP"]) * constants["STRIP"]
        height = (strip_rows - 1) * step_h + max((kernel_h - 1) * problem.dil[0], chunks * constants["TAPS"] - 1) + 1
        return height * ((cols - 1) * step_w + (kernel_w - 1) * problem.dil[1] + 1)

    out_h, out_w = problem.out_size
    cols = ceil_div(out_w, ceil_div(out_w, constants["TILE_COLUMNS"]))
    rows = out_h
    while rows > constants["STRIP"] and tile_bytes(rows, cols) > constants["TILE_BYTES"]:
        rows = ceil_div(ceil_div(rows, 2), constants["STRIP"]) * constants["STRIP"]
    images = min(problem.images, max(1, constants["TILE_BYTES"] // tile_bytes(rows, cols))) if rows == out_h else 1
    copies = constants[f"COPIES_{problem.entry.upper()}"]

    def shared() -> int:
        return kernel_w * chunks * CODES * copies * slot + images * tile_bytes(rows, cols)

    while copies > 1 and shared() > target.shared_bytes:
        copies //= 2
    if shared() > target.shared_bytes:
        gather = _Gather(source, "lut_dwconv2d", problem.entry)
        if not gather.exists:
            raise ValueError(f"kernel source {source!r} has no lut_dwconv2d kernel for {kernel_h}×{kernel_w} taps")
        return Steps(tuple(gather.steps(problem)), gather.clocks(problem, target.multiprocessors))
    row_tiles, col_tiles, image_tiles = ceil_div(out_h, rows), ceil_div(out_w, cols), ceil_div(problem.images, images)
    filters = problem.groups * problem.lanes
    tiles = row_tiles * col_tiles * image_tiles
    resident = target.multiprocessors * max(1, target.shared_bytes // shared())
    strips = images * ceil_div(rows, constants["STRIP"]) * cols
    tile_cost = DEPTHWISE_TILE + ceil_div(strips, constants["THREADS"]) * constants["STRIP"]

    def cost(parts: int) -> int:
        return ceil_div(filters * parts, resident) * (DEPTHWISE_BUILD + ceil_div(tiles, parts) * tile_cost)

    parts = min(range(1, min(tiles, MOST_PARTS) + 1), key=cost)
    tiling = np.array([(rows, cols, images, row_tiles, col_tiles, image_tiles, parts, copies)], TILING)
    step = Step(
        f"lut_dwconv2d_{problem.entry}", (filters * parts, 1, 1), (constants["THREADS"], 1, 1), shared(),
        (Ref("x"), Ref("w"), Ref("table"), Ref("out"), problem.geometry(), tiling),
    )  # fmt: skip
    return Steps((step,), LAUNCH_CLOCKS)


def bind(steps: Steps, source: str, version: str, tensors: Mapping[str, Tensor]) -> list[Plan]:
    """Put tensors in the places of their names, and scratch of their device where the steps ask for it."""
    device = tensors["out"].device
    operands = {
        **tensors,
        **{name: torch.empty(size, dtype=torch.uint8, device=device) for name, size in steps.scratch},
    }

    def resolve(argument: Ref | np.generic | np.ndarray) -> Tensor | np.generic | np.ndarray:
        if not isinstance(argument, Ref):
            return argument
        tensor = operands[argument.name]
        if argument.offset == 0:
            return tensor
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.as_strided((span - argument.offset,), (1,), tensor.storage_offset() + argument.offset)

    return [
        Plan(source, step.kernel, step.grid, step.block, step.shared, tuple(map(resolve, step.arguments)), version)
        for step in steps.steps
    ]
