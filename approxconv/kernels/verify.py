"""Is a kernel right, and how fast is it: hostile cases against the oracle, and timings against the packaged kernel."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._display import Shown, html_table, titled
from ..geometry import conv_output_size
from .factored import FactoredKernelEngine
from .operators import FACTORED_OPERATORS, OPERATORS, KernelEngine, PlannedEngine, operators_of
from .planning import CODES
from .sources import read

_TABLES = {
    "int16": (-(2**15), 2**15),
    "uint16": (0, 255 * 255 + 1),
    "int32": (-(2**20), 2**20),
}
_WRAPS = 2**30  # twice that is no int32
# Row-table variants that small problems would not be given: rows a thread, threads a block, splits.
_VARIANTS = ((10, 32, 1), (5, 64, 2), (2, 96, 3), None)


@dataclass(frozen=True)
class Case:
    """One call of an operator with random operands and a random table.

    Attributes
    ----------
    op : str
        ``"lut_gemm"``, ``"lut_conv2d"`` or ``"lut_dwconv2d"``.
    x_shape, w_shape : tuple of int
        Of the operands.
    table : str
        ``"int16"``, ``"uint16"`` or ``"int32"``: what its entries fit.
    bits : tuple of int
        Of the operands.
    geometry : tuple
        For a convolution stride, padding and dilation (pairs), groups and pad_code.
    layout : str
        ``"contiguous"``, ``"channels_last"`` (or, for a product, transposed) or ``"sliced"``.
    variant : tuple of int, optional
        A choice that the planner is not left.
    """

    op: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    table: str = "int16"
    bits: tuple[int, int] = (8, 8)
    geometry: tuple[Any, ...] = ()
    layout: str = "contiguous"
    variant: tuple[int, ...] | None = None

    def operands(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Codes of x and w, and the table, on the CPU."""
        low, high = _TABLES[self.table]
        shape = tuple(2**bits for bits in self.bits)
        table = torch.randint(low, high, shape, dtype=torch.int32, generator=generator)
        table[0, 0], table[-1, -1] = low, high - 1  # whatever the draw, the entries need what their name says
        return *(self._codes(shape, generator) for shape in (self.x_shape, self.w_shape)), table

    def _codes(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.layout == "sliced":
            wide = torch.randint(0, 256, (*shape[:-1], 2 * shape[-1] + 1), dtype=torch.uint8, generator=generator)
            return wide[..., 1::2]
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if self.layout == "contiguous":
            return codes
        if codes.ndim == 4:
            return codes.contiguous(memory_format=torch.channels_last)
        return codes.transpose(-1, -2).contiguous().transpose(-1, -2)

    def run(self, engine: Any, x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        """Call the operator of `engine`."""
        if not self.geometry:
            return engine.lut_matmul(x, w, table)
        *pairs, groups, pad_code = self.geometry
        if self.op == "lut_dwconv2d":
            return engine.lut_dwconv2d(x, w, table, *pairs, pad_code)
        return engine.lut_conv2d(x, w, table, *pairs, groups, pad_code)

    def expected(self, *operands: Tensor) -> Tensor:
        """What the oracle says."""
        from ..engines import reference

        return self.run(reference, *operands)

    @property
    def macs(self) -> int:
        """Products that are added."""
        if not self.geometry:
            return math.prod(self.x_shape) * self.w_shape[-2]
        out_h, out_w = conv_output_size(self.x_shape[2:], self.w_shape[2:], *self.geometry[:3])
        return self.x_shape[0] * out_h * out_w * math.prod(self.w_shape)

    def __str__(self) -> str:
        geometry = ""
        if self.geometry:
            names = ("stride", "padding", "dilation", "groups", "pad_code")
            geometry = "".join(f", {n} {v}" for n, v in zip(names, self.geometry, strict=True))
        variant = f", variant {self.variant}" if self.variant else ""
        return f"{self.op} x {self.x_shape}, w {self.w_shape}{geometry}, {self._table_text}, {self.layout}{variant}"

    @property
    def _table_text(self) -> str:
        return f"{self.bits[0]}×{self.bits[1]}-bit {self.table} table"


@dataclass(frozen=True)
class FactoredCase(Case):
    """One call of an operator of the factored engine with random operands and a random byte form.

    Attributes
    ----------
    op : str
        ``"factored_gemm"`` or ``"factored_conv2d"``.
    products : int
        Of the form.
    has_by_row : bool
        Whether it has a `by_row`; what wraps in its and `by_column`'s sums then cancels.
    """

    products: int = 0
    has_by_row: bool = False

    def operands(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Codes of x and w, then u, v, by_column and, if there is one, by_row of the form, on the CPU."""
        codes = (self._codes(shape, generator) for shape in (self.x_shape, self.w_shape))
        size = (self.products, CODES)
        u = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        v = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)
        by_column, by_row = torch.randint(-(2**20), 2**20, (2, CODES), dtype=torch.int32, generator=generator)
        return (*codes, u, v, by_column - _WRAPS, by_row + _WRAPS) if self.has_by_row else (*codes, u, v, by_column)

    def run(self, engine: Any, x: Tensor, w: Tensor, *form: Tensor) -> Tensor:
        """Call the operator of `engine`."""
        from ..engines.byte_form import ByteForm

        u, v, by_column, *by_row = form
        return super().run(engine, x, w, ByteForm(u, v, by_row[0] if by_row else None, by_column))

    def expected(self, *operands: Tensor) -> Tensor:
        """What the oracle says of the table that the form is of."""
        from ..engines import reference

        x, w, u, v, by_column, *by_row = operands
        table = u.T.int() @ v.int() + by_column + (by_row[0][:, None] if by_row else 0)
        return super().run(reference, x, w, table)

    @property
    def _table_text(self) -> str:
        return f"{self.products} products{' and sums of rows' if self.has_by_row else ''}"


def _gemm_cases() -> Iterator[Case]:
    shapes = (
        ((1, 1), (1, 1)),
        ((5, 3), (9, 3)),
        ((33, 17), (7, 17)),
        ((2, 70, 9), (3, 9)),
        ((2, 1, 40, 8), (3, 6, 8)),
        ((200, 65), (17, 65)),
    )
    for i, (x, w) in enumerate(shapes):
        for table in _TABLES:
            yield Case("lut_gemm", x, w, table, layout=("contiguous", "channels_last", "sliced")[i % 3])
    for variant in _VARIANTS:
        for table in _TABLES:
            if variant is None or table != "int32":
                yield Case("lut_gemm", (260, 37), (19, 37), table, variant=variant)
    yield Case("lut_gemm", (260, 37), (19, 37), "int32", variant=(10, 32, 2))
    yield Case("lut_gemm", (300, 21), (11, 21), bits=(4, 6), variant=(10, 64, 1))


def _conv_cases() -> Iterator[Case]:
    shapes = (  # x, w, stride, padding, dilation, groups
        ((2, 3, 9, 7), (10, 3, 3, 2), (1, 2), (1, 0), (1, 1), 1),
        ((1, 6, 8, 11), (9, 2, 2, 3), (3, 1), (2, 3), (2, 1), 3),
        ((3, 9, 6, 6), (12, 3, 3, 3), (1, 1), (1, 1), (1, 2), 3),
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((1, 2, 2, 2), (18, 1, 3, 3), (2, 2), (4, 4), (1, 1), 2),
        ((2, 17, 5, 6), (9, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    )
    for i, (x, w, stride, padding, dilation, groups) in enumerate(shapes):
        geometry = (stride, padding, dilation, groups, 200)
        for j, table in enumerate(_TABLES):
            layout = ("contiguous", "channels_last", "sliced")[(i + j) % 3]
            yield Case("lut_conv2d", x, w, table, geometry=geometry, layout=layout)
            variant = (10, 32, 1) if table == "int32" else _VARIANTS[(i + j) % 3]
            yield Case("lut_conv2d", x, w, table, geometry=geometry, layout=layout, variant=variant)
    yield Case("lut_conv2d", (1, 5, 6, 9), (4, 5, 2, 2), "int16", (4, 6), ((1, 1), (1, 1), (1, 1), 1, 9))


def _depthwise_cases() -> Iterator[Case]:
    shapes = (  # x, w, stride, padding, dilation
        ((2, 3, 9, 7), (3, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2, 12, 10), (4, 1, 3, 3), (2, 2), (1, 1), (1, 1)),
        ((1, 3, 7, 20), (9, 1, 2, 5), (1, 3), (0, 2), (1, 2)),
        ((2, 2, 11, 9), (2, 1, 7, 4), (3, 1), (3, 2), (1, 1)),
        ((1, 2, 20, 6), (2, 1, 3, 2), (1, 1), (5, 7), (3, 2)),
        ((5, 1, 1, 1), (2, 1, 1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1, 3, 260), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
        ((1, 1, 30, 40), (1, 1, 25, 31), (1, 1), (3, 2), (1, 1)),
    )
    for i, (x, w, stride, padding, dilation) in enumerate(shapes):
        for j, table in enumerate(_TABLES):
            layout = ("contiguous", "channels_last", "sliced")[(i + j) % 3]
            yield Case("lut_dwconv2d", x, w, table, geometry=(stride, padding, dilation, x[1], 77), layout=layout)
    yield Case("lut_dwconv2d", (1, 5, 6, 9), (5, 1, 2, 2), "int16", (4, 6), ((1, 1), (1, 1), (1, 1), 5, 9))


# Variants of the factored kernels: lanes a block, pixels a warp, slots a pass, warps a block, splits.
_FACTORED_VARIANTS = ((64, 64, 8, 1, 1), (64, 56, 4, 2, 3), (32, 32, 8, 3, 2), (32, 32, 4, 1, 1), None)
_PRODUCTS = (0, 1, 3, 4, 5, 9, 17, 64)


def _factored_cases(op: str, shapes: Sequence[tuple[Any, ...]]) -> Iterator[FactoredCase]:
    for i, products in enumerate(_PRODUCTS):
        x, w, *geometry = shapes[i % len(shapes)]
        for has_by_row in (False, True):
            layout = ("contiguous", "channels_last", "sliced")[(i + has_by_row) % 3]
            variant = _FACTORED_VARIANTS[(2 * i + has_by_row) % len(_FACTORED_VARIANTS)]
            of_table = {"products": products, "has_by_row": has_by_row}
            yield FactoredCase(op, x, w, geometry=tuple(geometry), layout=layout, variant=variant, **of_table)
    x, w, *geometry = shapes[0]
    for variant in _FACTORED_VARIANTS:
        yield FactoredCase(op, x, w, geometry=tuple(geometry), variant=variant, products=6, has_by_row=True)


def _factored_gemm_cases() -> Iterator[FactoredCase]:
    shapes = (
        ((190, 37), (67, 37)),
        ((70, 101), (33, 101)),
        ((1, 1), (1, 1)),
        ((2, 33, 9), (5, 9)),
        ((2, 1, 40, 8), (3, 6, 8)),
        ((130, 33), (17, 33)),
    )
    return _factored_cases("factored_gemm", shapes)


def _factored_conv_cases() -> Iterator[FactoredCase]:
    shapes = (  # x, w, stride, padding, dilation, groups, pad_code
        ((2, 9, 9, 7), (10, 9, 3, 2), (1, 2), (1, 0), (1, 1), 1, 200),
        ((1, 6, 8, 11), (9, 2, 2, 3), (3, 1), (2, 3), (2, 1), 3, 200),
        ((3, 27, 5, 6), (12, 9, 3, 3), (1, 1), (1, 1), (1, 2), 3, 7),
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1, 0),
        ((1, 2, 2, 2), (18, 1, 3, 3), (2, 2), (4, 4), (1, 1), 2, 255),
        ((2, 17, 5, 6), (35, 17, 1, 1), (2, 1), (0, 0), (1, 1), 1, 0),
    )
    return _factored_cases("factored_conv2d", shapes)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "lut_gemm": _gemm_cases,
    "lut_conv2d": _conv_cases,
    "lut_dwconv2d": _depthwise_cases,
    "factored_gemm": _factored_gemm_cases,
    "factored_conv2d": _factored_conv_cases,
}


@dataclass(frozen=True)
class Failure:
    """A case that a kernel gets wrong, and its first wrong element in memory order.

    Attributes
    ----------
    case : Case
        The call.
    wrong, total : int
        Elements that differ, and elements.
    index : tuple of int
        Of the first that differs.
    got, expected : int
        There.
    """

    case: Case
    wrong: int
    total: int
    index: tuple[int, ...]
    got: int
    expected: int

    @classmethod
    def of(cls, case: Case, got: Tensor, expected: Tensor) -> Failure | None:
        """How a result of a case differs from what is expected, which has its shape; None if it does not."""
        if torch.equal(got, expected):
            return None
        wrong = (got != expected).nonzero()
        index = tuple(wrong[0].tolist())
        return cls(case, len(wrong), got.numel(), index, int(got[index]), int(expected[index]))

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.wrong} of {self.total} elements differ, first y{list(self.index)} = {self.got}, "
            f"expected {self.expected}"
        )


@dataclass(frozen=True)
class VerificationReport(Shown):
    """What `verify` found; true if nothing was wrong."""

    name: str
    engine: str
    passed: int
    failures: tuple[Failure, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing was wrong, and something was tried."""
        return not self.failures and self.passed > 0

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join([self._head(), *map(str, self.failures)])

    def _repr_html_(self) -> str:
        rows = [(f"y{list(f.index)}", f.got, f.expected, f"{f.wrong} of {f.total}", f.case) for f in self.failures]
        heading = ("first wrong element", "got", "expected", "elements wrong", "case")
        return titled(f"{'✓' if self else '✗'} {self._head()}", html_table(rows, heading) if rows else "")

    def _head(self) -> str:
        return f"{self.name} on {self.engine}: {self.passed} of {self.passed + len(self.failures)} cases right"


def base_engine(engine: str | None) -> tuple[str, KernelEngine, torch.device]:
    """``"cuda"`` where there is a CUDA device, else ``"host_cuda"``."""
    from importlib import import_module

    name = engine or ("cuda" if torch.cuda.is_available() else "host_cuda")
    if name not in ("cuda", "host_cuda"):
        raise ValueError(f"engine must be 'cuda', 'host_cuda' or None, got {engine!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine 'cuda' needs a CUDA device, and torch sees none here; 'host_cuda' does without")
    module = import_module(f"approxconv.engines.{name}")
    return name, module.engine, torch.device("cuda" if name == "cuda" else "cpu")


def _engines(name: str, base: KernelEngine) -> dict[str, PlannedEngine]:
    """By operator that a source has kernels of: the engine of that operator where `base` runs."""
    found = operators_of(name)
    if not found:
        raise ValueError(
            f"kernel source {name!r} must define kernels of {', '.join(OPERATORS)}, it defines "
            f"{', '.join(read(name).kernels) or 'none'}"
        )
    factored = FactoredKernelEngine.beside(base)
    return {op: factored if op in FACTORED_OPERATORS else base for op in found}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device with the same strides, which `Tensor.to` keeps only of a tensor without gaps."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


def verify(
    name: str, *, engine: str | None = None, seed: int = 0, most_failures: int = 3, sanitize: str | None = None
) -> VerificationReport:
    """Compare a kernel with the oracle on hostile cases.

    Random tables (not commutative, not zero-preserving, narrow, offset and wide), K not a multiple of any tile,
    rectangular everything, any strides, every variant of the kernels.

    Parameters
    ----------
    name : str
        A kernel source, of the library or of your own.
    engine : str, optional
        ``"cuda"`` or ``"host_cuda"``; by default the GPU if there is one.
    seed : int
        Of operands and tables.
    most_failures : int
        Stop after so many.
    sanitize : str, optional
        On the host only: ``"address"`` or ``"thread"`` runs every launch in a process of its own under that sanitizer,
        minutes in all. Without it a kernel that writes where it must not can bring this process down.

    Returns
    -------
    VerificationReport
        True if all cases are right; else it names the first wrong elements.

    Raises
    ------
    KernelCompileError
        The source does not compile.
    SanitizerError
        The sanitizer asked for found a fault.
    ValueError
        It has kernels of no operator, or a sanitizer was asked for on a GPU.
    """
    engine_name, base, device = base_engine(engine)
    if sanitize is not None:
        if engine_name != "host_cuda":
            raise ValueError(f"sanitize needs engine='host_cuda', got engine {engine_name!r}")
        base = base.sanitized(sanitize)
    generator = torch.Generator().manual_seed(seed)
    passed, failures = 0, []
    for op, of_op in _engines(name, base).items():
        for case in CASES[op]():
            operands = case.operands(generator)
            expected = case.expected(*operands)
            on_device = (moved(tensor, device) for tensor in operands)
            got = case.run(of_op.with_kernel(name, case.variant), *on_device).cpu()
            failure = Failure.of(case, got, expected)
            if failure is None:
                passed += 1
                continue
            failures.append(failure)
            if len(failures) >= most_failures:
                return VerificationReport(name, engine_name, passed, tuple(failures))
    return VerificationReport(name, engine_name, passed, tuple(failures))


@dataclass(frozen=True)
class Timing:
    """A case timed: median seconds of the kernel and, if there is one, of the kernel it is compared with."""

    case: Case
    seconds: float
    baseline: float | None

    @property
    def gmacs(self) -> float:
        """10⁹ products a second."""
        return self.case.macs / self.seconds / 1e9


@dataclass(frozen=True)
class BenchmarkReport(Shown):
    """What `benchmark` measured, and the name of the kernel that it compared with."""

    name: str
    device: str
    timings: tuple[Timing, ...] = field(default=())
    baseline: str | None = None

    def beside(self, other: BenchmarkReport, baseline: str) -> BenchmarkReport:
        """The same times, compared with those of another report of the same cases."""
        seconds = {timing.case: timing.seconds for timing in other.timings}
        timings = tuple(replace(timing, baseline=seconds.get(timing.case)) for timing in self.timings)
        return replace(self, timings=timings, baseline=baseline)

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.device}"]
        for timing in self.timings:
            text = f"{timing.case}: {1e3 * timing.seconds:.3f} ms, {timing.gmacs:.3g} GMAC/s"
            if timing.baseline is not None:
                text += f", {timing.baseline / timing.seconds:.2f} times {self.baseline}"
            lines.append(text)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heading = ["ms", "GMAC/s", "case"]
        rows = [[f"{1e3 * t.seconds:.3f}", f"{t.gmacs:.3g}", t.case] for t in self.timings]
        if any(timing.baseline is not None for timing in self.timings):
            heading.insert(2, f"speed to {self.baseline}")
            for row, timing in zip(rows, self.timings, strict=True):
                row.insert(2, "" if timing.baseline is None else f"{timing.baseline / timing.seconds:.2f}")
        return titled(f"{self.name} on {self.device}", html_table(rows, heading))


_HEAD_START = 3_000_000  # clocks that the host has to enqueue a call before the device could begin it
# Sizes that take a GPU about a millisecond, and g++'s threads about a second.
_TIMED = {
    "cuda": (
        Case("lut_gemm", (12544, 2304), (256, 2304)),
        Case("lut_conv2d", (64, 64, 56, 56), (64, 64, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 1, 0)),
        Case("lut_conv2d", (64, 512, 7, 7), (512, 512, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 1, 0)),
        Case("lut_dwconv2d", (64, 144, 56, 56), (144, 1, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 144, 0)),
        *(FactoredCase("factored_gemm", (12544, 2304), (256, 2304), products=p) for p in (2, 5, 17)),
        *(
            FactoredCase(
                "factored_conv2d", (64, c, s, s), (c, c, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 1, 0), products=5
            )
            for c, s in ((64, 56), (512, 7))
        ),
    ),
    "host_cuda": (
        Case("lut_gemm", (512, 64), (16, 64)),
        Case("lut_conv2d", (1, 16, 16, 16), (16, 16, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 1, 0)),
        Case("lut_dwconv2d", (1, 16, 16, 16), (16, 1, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 16, 0)),
        FactoredCase("factored_gemm", (512, 64), (16, 64), products=5),
        FactoredCase(
            "factored_conv2d", (1, 16, 16, 16), (16, 16, 3, 3), geometry=((1, 1), (1, 1), (1, 1), 1, 0), products=5
        ),
    ),
}


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds that the current CUDA device works on one `call`, not those that the host takes to enqueue it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(call: Callable[[], object]) -> float:
    """Seconds of one `call`."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def benchmark(name: str, *, engine: str | None = None, repeats: int = 5) -> BenchmarkReport:
    """Time a kernel source on typical sizes, beside the kernels in use where it has a name of its own.

    Parameters
    ----------
    name : str
        A kernel source, of the library or of your own.
    engine : str, optional
        ``"cuda"`` or ``"host_cuda"``; by default the GPU if there is one. Times on the host say nothing about a GPU.
    repeats : int
        Timed calls a case; the median counts.

    Raises
    ------
    KernelCompileError
        The source does not compile.
    ValueError
        It has kernels of no operator.
    """
    engine_name, base, device = base_engine(engine)
    engines, once = _engines(name, base), device_seconds if device.type == "cuda" else host_seconds
    generator = torch.Generator().manual_seed(0)
    timings = []
    for case in _TIMED[engine_name]:
        if case.op not in engines:
            continue
        in_use, own = engines[case.op], engines[case.op].with_kernel(name)
        operands = [tensor.to(device) for tensor in case.operands(generator)]
        medians = []
        for each in (own,) if name == case.op else (own, in_use):
            case.run(each, *operands)  # compiles and warms up
            times = [once(lambda: case.run(each, *operands)) for _ in range(repeats)]  # noqa: B023
            medians.append(statistics.median(times))
        timings.append(Timing(case, medians[0], medians[1] if len(medians) > 1 else None))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the host, through g++"
    return BenchmarkReport(name, where, tuple(timings), "the kernel in use")
