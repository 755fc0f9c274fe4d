"""The operators on factored tables, by tensor cores: plans for ``cuda_src/factored_*.cu``, and the engine of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..geometry import batch_shape, flat_batches
from .operators import FACTORED_OPERATORS, PlannedEngine, convolution_problem, product_problem, replanned
from .plan import Target
from .planning import (
    LAUNCH_CLOCKS,
    PARTIAL_SCRATCH,
    W_SCRATCH,
    X_SCRATCH,
    Problem,
    Ref,
    Step,
    Steps,
    ceil_div,
    fitting,
    product_sum_steps,
)
from .sources import on_reload, read

if TYPE_CHECKING:
    from ..engines.byte_form import ByteForm
    from ..engines.work import Work

SCRATCH = X_SCRATCH + W_SCRATCH + PARTIAL_SCRATCH  # of packed activations and weights together: no partial sums here
MAX_SPLITS, MOST_SPLIT = 32, 2**24  # splits, and outputs of a problem that is worth any
WARPS = (1, 2, 4, 8)  # a block
# Costs in clocks of a multiprocessor, estimates: an mma.m16n8k32 takes one of four tensor cores `Target.mma_clocks` (an
# A100's 8, an H100's about 6.5), a fragment's read of shared memory 4 for lanes and 2 for pixels, and of the shorter of
# both a quarter is not hidden; no stage is shorter than a read of global memory; a pass begins with one and with
# filling its table, which takes a lone warp 4,000. Splits write zeros and add each at this many bytes a clock.
TENSOR_CORES, LANES_CLOCKS, PIXELS_CLOCKS, HIDDEN = 4, 4, 2, 0.75
STAGE_CLOCKS, PASS_CLOCKS, FILL_CLOCKS, SPLIT_BYTES = 600, 600, 4000, 20
PACK_BLOCKS = np.dtype([(name, np.int32) for name in ("octets", "fragments", "lanes", "pixels", "zeros")], align=True)

_Variant = tuple[int, int, int, int, int]  # lanes a block, pixels a warp, slots a pass, warps a block, splits


class _Kernels:
    """The kernels of a source: their tile sizes, what they pack and what they cost."""

    def __init__(self, source: str, op: str, terms: int, has_by_row: bool) -> None:
        read_source = read(source)
        self.op, self.terms, self.has_by_row, constants = op, terms, has_by_row, read_source.constants
        names = (re.fullmatch(rf"{op}_tile(\d+)x(\d+)_slots(\d+)", name) for name in read_source.kernels)
        self.tiles = sorted(tuple(map(int, match.groups())) for match in names if match)
        if not self.tiles:
            raise ValueError(f"kernel source {source!r} has no kernel {op}_tile…")
        self.lanes, self.pixels, self.warp = (constants[n] for n in ("FRAGMENT_LANES", "FRAGMENT_PIXELS", "WARP"))
        self.threads, self.pack_threads = constants["THREADS"], constants["PACK_THREADS"]
        self.octet, self.stage_octets = constants["OCTET"], constants["STAGE_OCTETS"]
        self.table_bytes, self.slot_bytes = constants["TABLE_BYTES"], 16 * constants["SLOT_VECTORS"]

    def octets(self, problem: Problem) -> int:
        return ceil_div(problem.channels, self.octet)

    def stages(self, problem: Problem) -> int:
        return ceil_div(self.octets(problem) * problem.taps, self.stage_octets)

    def x_bytes(self, problem: Problem) -> int:
        """Packed codes, and a sum a padded pixel, whether there are any or not."""
        return problem.groups * problem.padded_pixels * (self.octets(problem) * self.octet + 4)

    def w_bytes(self, problem: Problem, slots: int) -> int:
        fragments = problem.groups * ceil_div(problem.lanes, self.lanes) * self.stages(problem)
        return fragments * ceil_div(self.terms, slots) * slots * self.slot_bytes

    def parts(self, problem: Problem) -> list[Problem]:
        """Parts whose packed operands fit the scratch, or that are as small as a part can be."""
        least = problem
        for axis in ("groups", "images", "rows", "lanes"):
            least = least.part(axis, 0, 1)
        budget = max(X_SCRATCH, self.x_bytes(least))
        parts = fitting(problem, self.x_bytes, budget, ("groups", "images", "rows"))
        most = max(slots for _, _, slots in self.tiles)

        def w_bytes(part: Problem) -> int:
            return self.w_bytes(part, most) + 4 * part.groups * part.lanes

        budget = max(SCRATCH - max(map(self.x_bytes, parts)), w_bytes(least))
        return [small for part in parts for small in fitting(part, w_bytes, budget, ("groups", "lanes"))]

    def shared(self, lanes: int, slots: int) -> int:
        return self.table_bytes + (2 * lanes // self.lanes * slots * self.slot_bytes if self.terms else 0)

    def blocks(self, problem: Problem, lanes: int, pixels: int, warps: int) -> int:
        return problem.groups * ceil_div(problem.lanes, lanes) * ceil_div(problem.pixels, pixels * warps)

    def clocks(self, problem: Problem, variant: _Variant, target: Target) -> float:
        lanes, pixels, slots, warps, splits = variant
        of_multiprocessor = ceil_div(self.blocks(problem, lanes, pixels, warps) * splits, target.multiprocessors)
        fit = min(self.threads // self.warp // warps, target.shared_bytes // self.shared(lanes, slots))
        together = min(of_multiprocessor, max(1, fit))
        rows, columns = lanes // self.lanes, pixels // self.pixels
        multiply = ceil_div(together * warps, TENSOR_CORES) * rows * columns * target.mma_clocks
        read_shared = together * warps * (rows * LANES_CLOCKS + columns * PIXELS_CLOCKS)
        stage = multiply + read_shared - HIDDEN * min(multiply, read_shared)
        stages = ceil_div(self.stages(problem), splits)
        one_pass = stages * max(stage * slots, STAGE_CLOCKS) + PASS_CLOCKS + FILL_CLOCKS / warps
        passes = ceil_div(self.terms, slots)
        added = 4 * problem.groups * problem.lanes * problem.pixels * (splits + 1) if splits > 1 else 0
        split = added / (SPLIT_BYTES * target.multiprocessors)
        return ceil_div(of_multiprocessor, together) * passes * one_pass + split + 2 * LAUNCH_CLOCKS

    def best(self, problem: Problem, target: Target) -> tuple[float, _Variant]:
        """(clocks, variant) of the cheapest way."""
        outputs = problem.groups * problem.lanes * problem.pixels
        splits = min(MAX_SPLITS, self.stages(problem)) if self.terms and outputs <= MOST_SPLIT else 1
        fit = [tile for tile in self.tiles if self.shared(tile[0], tile[2]) <= target.shared_bytes]
        variants = [(*tile, warps, split) for tile, warps, split in product(fit, WARPS, range(1, splits + 1))]

        def cost(variant: _Variant) -> tuple[float, int, int]:
            *_, warps, split = variant
            return self.clocks(problem, variant, target), split, -warps  # large blocks share more weights

        best = min(variants, key=cost)
        return self.clocks(problem, best, target), best

    def checked(self, variant: tuple[int, ...], problem: Problem) -> _Variant:
        """A variant asked for, if the source has it, with no more splits than there are stages."""
        *tile, warps, splits = variant
        if tuple(tile) not in self.tiles or not 0 < warps * self.warp <= self.threads or splits < 1:
            raise ValueError(
                f"variant must be (lanes, pixels, slots, warps, splits) with the first three among {self.tiles} and up "
                f"to {self.threads // self.warp} warps, got {variant}"
            )
        return *tile, warps, min(splits, self.stages(problem)) if self.terms else 1

    def pack(self, problem: Problem, slots: int, splits: int) -> Step:
        def blocks(jobs: int) -> int:
            return ceil_div(jobs, self.pack_threads)

        pixels, lanes = problem.groups * problem.padded_pixels, problem.groups * problem.lanes
        of_kind = (
            blocks(pixels * self.octets(problem)) if self.terms else 0,
            blocks(self.w_bytes(problem, slots) // 16),
            blocks(lanes * self.warp),
            blocks(pixels) if self.has_by_row else 0,
            blocks(lanes * problem.pixels) if splits > 1 else 0,
        )
        return Step(
            f"{self.op}_pack", (sum(of_kind), 1, 1), (self.pack_threads, 1, 1), 0,
            (Ref("x", problem.x_at), Ref("w", problem.w_at), Ref("v"), Ref("by_column"), Ref("by_row"), Ref("x_packed"),
             Ref("w_packed"), Ref("by_lane"), Ref("by_pixel"), Ref("out", problem.out_at), problem.geometry(),
             np.array([of_kind], PACK_BLOCKS), np.int32(self.terms), np.int32(slots)),
        )  # fmt: skip

    def run(self, problem: Problem, lanes: int, pixels: int, slots: int, warps: int, splits: int) -> Step:
        return Step(
            f"{self.op}_tile{lanes}x{pixels}_slots{slots}", (self.blocks(problem, lanes, pixels, warps), splits, 1),
            (warps * self.warp, 1, 1), self.shared(lanes, slots),
            (Ref("x_packed"), Ref("w_packed"), Ref("u"), Ref("by_lane"), Ref("by_pixel"), Ref("out", problem.out_at),
             problem.geometry(), np.int32(self.terms), np.int32(self.has_by_row)),
        )  # fmt: skip


@lru_cache(maxsize=4096)
def factored_steps(
    problem: Problem,
    source: str,
    _fingerprint: str,
    op: str,
    target: Target,
    terms: int,
    has_by_row: bool,
    variant: tuple[int, ...] | None = None,
) -> Steps:
    """Packing and products, in parts whose packed operands fit the scratch.

    Parameters
    ----------
    problem : Problem
        What to compute; its offset and entry do not matter.
    source, _fingerprint : str
        The kernel source, and its version: with another one the steps are made anew.
    op : str
        ``"factored_gemm"`` or ``"factored_conv2d"``, with which the names of the kernels begin.
    target : Target
        The device.
    terms : int
        P, products of bytes a k.
    has_by_row : bool
        Whether activations have sums of their own.
    variant : tuple of int, optional
        (lanes a block, pixels a warp, slots a pass, warps a block, splits), instead of the cheapest.
    """
    kernels = _Kernels(source, op, terms, has_by_row)
    parts = kernels.parts(problem)
    if variant is None:
        sizes = [(part.groups, part.lanes, part.pixels, part.channels, part.taps) for part in parts]
        best = {size: kernels.best(part, target) for size, part in dict(zip(sizes, parts, strict=True)).items()}
        chosen = [best[size] for size in sizes]
    else:
        chosen = [(math.inf, kernels.checked(variant, part)) for part in parts]
    each = [(part, *choice) for part, (_, choice) in zip(parts, chosen, strict=True)]
    scratch = {
        "x_packed": max(part.groups * part.padded_pixels * kernels.octets(part) * kernels.octet for part in parts),
        "w_packed": max(kernels.w_bytes(part, slots) for part, _, _, slots, _, _ in each),
        "by_lane": max(4 * part.groups * part.lanes for part in parts),
        "by_pixel": max(4 * part.groups * part.padded_pixels for part in parts),
    }
    steps = [
        step
        for part, lanes, pixels, slots, warps, splits in each
        for step in (
            kernels.pack(part, slots, splits), kernels.run(part, lanes, pixels, slots, warps, splits),
        )
    ]  # fmt: skip
    return Steps(tuple(steps), sum(clocks for clocks, _ in chosen), tuple(scratch.items()))


@lru_cache(maxsize=4096)
def _clocks(work: Work, terms: int, has_by_row: bool, entry: str, target: Target) -> tuple[float, float]:
    """As `FactoredKernelEngine.clocks`; remembered until sources are reloaded, for it is asked on every call."""

    def product(rows: int, lanes: int) -> Problem:
        x, w = ((work.groups, n, work.depth) for n in (rows, lanes))
        return product_problem(
            x, (rows * work.depth, work.depth, 1), w, (lanes * work.depth, work.depth, 1), (rows * lanes, 1, lanes), 0,
            entry,
        )  # fmt: skip

    direct, swapped = product(work.rows, work.lanes), product(work.lanes, work.rows)
    # Of a product whichever operand suits is looked up, as `KernelEngine` does.
    looked_up = min(
        product_sum_steps(problem, "lut_gemm", read("lut_gemm").fingerprint, "lut_gemm", target).clocks
        for problem in ((direct, swapped) if work.operator == "lut_matmul" else (direct,))
    )
    source = "factored_gemm", read("factored_gemm").fingerprint
    return looked_up, factored_steps(direct, *source, "factored_gemm", target, terms, has_by_row).clocks


on_reload(_clocks.cache_clear)


class FactoredKernelEngine(PlannedEngine):
    """The operators on factored tables. Parameters are those of `PlannedEngine`, variants those of `factored_steps`.

    Its kernels need tensor cores that take bytes: sm_75 or newer.
    """

    operators = FACTORED_OPERATORS

    def unavailable(self, device: torch.device) -> str | None:
        """Why tensors on `device` cannot be computed with, or None."""
        reason = super().unavailable(device)
        if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
            return f"it needs tensor cores that take bytes, sm_75 or newer, got {torch.cuda.get_device_name(device)}"
        return reason

    def _compute(self, op: str, problem: Problem, x: Tensor, w: Tensor, form: ByteForm, out: Tensor) -> None:
        source, target = self._source(op), self._target(x.device)
        has_by_row = form.by_row is not None
        steps = factored_steps(problem, *source, op, target, form.products, has_by_row, self._variant)
        # What a kernel does not read stands for what is not there.
        unread = form.by_column
        tensors = {
            "u": form.u.contiguous() if form.products else unread,
            "v": form.v.contiguous() if form.products else unread,
            "by_row": form.by_row if has_by_row else unread,
            "by_column": form.by_column,
        }
        self._execute(steps, source, {"x": x, "w": w, "out": out, **tensors})

    def clocks(self, work: Work, form: ByteForm, entry: str, device: torch.device) -> tuple[float, float]:
        """What some work should take of a multiprocessor's clocks by row tables, and by this engine.

        Both planners' estimates, of a matrix product of the same size: nothing in them has been measured.
        """
        return _clocks(work, form.products, form.by_row is not None, entry, self._target(device))

    @replanned
    def lut_matmul(self, x: Tensor, w: Tensor, form: ByteForm) -> Tensor:
        """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]`` with the table that `form` is of, modulo 2³².

        Parameters
        ----------
        x, w : Tensor
            Codes, uint8, ``(..., M, K)`` and ``(..., N, K)``, any strides; leading dimensions broadcast. Not empty.
        form : ByteForm
            On x's device.

        Returns
        -------
        Tensor
            int32, ``(..., M, N)``.
        """
        batch = batch_shape(x, w)
        y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32, device=x.device)
        for rows, lanes, out in flat_batches(x, w, y):
            group, row, column = out.stride()
            problem = product_problem(
                rows.shape, rows.stride(), lanes.shape, lanes.stride(), (group, column, row), 0, "int16"
            )
            self._compute("factored_gemm", problem, rows, lanes, form, out)
        return y

    @replanned
    def lut_conv2d(
        self,
        x: Tensor,
        w: Tensor,
        form: ByteForm,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pad_code: int,
    ) -> Tensor:
        """A grouped convolution as implicit GEMM, modulo 2³².

        Parameters
        ----------
        x, w : Tensor
            Codes, uint8, ``(B, C, H, W)`` and ``(O, C / groups, kh, kw)``, any strides. Not empty.
        form : ByteForm
            On x's device.
        stride, padding, dilation : sequence of int
            Vertical and horizontal.
        groups, pad_code : int
            Groups; the code at positions outside x.

        Returns
        -------
        Tensor
            int32, ``(B, O, H', W')``.
        """
        geometry = (tuple(stride), tuple(padding), tuple(dilation), groups, pad_code)
        problem = convolution_problem(x.shape, x.stride(), w.shape, w.stride(), *geometry, 0, "int16")
        y = torch.empty(x.shape[0], w.shape[0], *problem.out_size, dtype=torch.int32, device=x.device)
        self._compute("factored_conv2d", problem, x, w, form, y)
        return y


def cuda_engine() -> FactoredKernelEngine:
    """On CUDA tensors, by CuPy."""
    return _engine("cuda")


def host_engine() -> FactoredKernelEngine:
    """On CPU tensors, through g++; slow and exact."""
    return _engine("host_cuda")


def _engine(name: str) -> FactoredKernelEngine:
    return FactoredKernelEngine.beside(import_module(f"approxconv.engines.{name}").engine)
