"""What the CPU engines take for a call: rates that are measured once a machine, times what the call has to do."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .byte_form import CODES, ByteForm
from .work import Work

_REPEATS = 8
_lock = threading.Lock()


def _renew_lock() -> None:
    """Another thread of the parent may have been measuring when this process was forked."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Rates:
    """Seconds of the parts of a call, all threads together.

    Attributes
    ----------
    call : float
        What any call takes.
    lookup, table, gather : float
        By row tables: a product; the products of one weight with all codes. A product that is looked up by itself.
    product, feature, pack, output : float
        In the factored engine, for each of its P products: a multiplication; a code's factor; a weight's factor. A sum.
    depthwise_lookup, depthwise_table : float
        Of a depthwise convolution by row tables: a product; a weight's table.
    depthwise_product, depthwise_pack, depthwise_output : float
        Of a depthwise convolution in the factored engine.
    byte_lookup, byte_table : float
        By row tables of 8-bit entries: a product; the products of one weight with all codes. Of all lanes of a row.
    """

    call: float
    lookup: float
    table: float
    gather: float
    product: float
    feature: float
    pack: float
    output: float
    depthwise_lookup: float
    depthwise_table: float
    depthwise_product: float
    depthwise_pack: float
    depthwise_output: float
    byte_lookup: float
    byte_table: float


def seconds(engine: str, work: Work, products: int = 0, narrow: bool = False) -> float:
    """How long a CPU engine should take with torch's present threads.

    ``"cpu"``, where the entries may be `narrow`, that is of 8 bits; ``"factored"`` with so many products, or
    ``"residual"`` with so many for the exact product. The first call on a machine, with a number of threads, measures
    for about half a second.
    """
    rates = measured_rates()
    weights, outputs = work.groups * work.lanes * work.depth, work.groups * work.lanes * work.rows
    if work.operator == "lut_dwconv2d":
        if engine == "factored":
            each = work.macs * rates.depthwise_product + weights * rates.depthwise_pack
            return rates.call + products * each + outputs * rates.depthwise_output
        return rates.call + work.macs * rates.depthwise_lookup + weights * rates.depthwise_table
    each = work.macs * rates.product + work.inputs * rates.feature + weights * rates.pack
    multiplied = products * each + outputs * rates.output
    if engine == "factored":
        return rates.call + multiplied
    from .cpu.row_tables import BYTE_TILE, MAX_ROWS, TILE

    blocks, gathered = -(-work.rows // MAX_ROWS), work.macs * rates.gather
    looked_up = min(work.macs * rates.lookup + blocks * weights * rates.table, gathered)
    # A row is added whole.
    padded = -(-work.lanes // BYTE_TILE) * BYTE_TILE * work.groups * work.depth
    in_bytes = min(padded * (work.rows * rates.byte_lookup + blocks * rates.byte_table), gathered)
    if engine == "residual":
        return rates.call + multiplied + in_bytes
    return rates.call + (in_bytes if narrow and work.lanes > TILE else looked_up)


def measured_rates() -> Rates:
    """The machine's rates with torch's present number of threads, kept on disk beside the compiled kernels."""
    with _lock:
        return _rates(torch.get_num_threads())


@cache
def _rates(threads: int) -> Rates:
    from ..kernels.cache import cached_folder

    fresh: list[Rates] = []

    def store(folder: Path) -> None:
        fresh.append(_measure())
        (folder / "rates.json").write_text(json.dumps(asdict(fresh[0])))

    with suppress(OSError, ValueError, TypeError):  # without a disk, for this process
        entry = cached_folder(f"rates-{_machine(threads)}", store)
        return fresh[0] if fresh else Rates(**json.loads((entry / "rates.json").read_text()))
    return fresh[0] if fresh else _measure()


def _machine(threads: int) -> str:
    import llvmlite.binding as llvm

    from .cpu.vectors import SOURCES

    cpu = llvm.get_host_cpu_name(), *sorted(name for name, has in llvm.get_host_cpu_features().items() if has)
    return hashlib.sha256(repr((cpu, threads, SOURCES, [f.name for f in fields(Rates)])).encode()).hexdigest()


def _measure() -> Rates:
    from . import cpu
    from .cpu import depthwise_dots, dot_products

    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, CODES, shape, dtype=torch.uint8, generator=generator)

    table = torch.randint(-(2**15), 2**15, (CODES, CODES), dtype=torch.int32, generator=generator)

    @cache
    def form(products: int) -> ByteForm:
        u, v = codes(products, CODES), codes(products, CODES).view(torch.int8)
        return ByteForm(u, v, None, torch.zeros(CODES, dtype=torch.int32))

    def product(m: int, n: int, k: int, products: int = 0, table: torch.Tensor = table) -> Callable[[], object]:
        x, w = codes(m, k), codes(n, k)
        if products:
            return lambda: dot_products.lut_matmul(x, w, form(products))
        return lambda: cpu.lut_matmul(x, w, table)

    def depthwise(b: int, c: int, size: int, products: int = 0) -> Callable[[], object]:
        x, w, geometry = codes(b, c, size, size), codes(c, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 0)
        if products:
            return lambda: depthwise_dots.lut_dwconv2d(x, w, form(products), *geometry)
        return lambda: cpu.lut_dwconv2d(x, w, table, *geometry)

    least, few = (1, 16, 16, 1), (2, 256, 512)
    dense = [(4096, 64, 288), (784, 64, 288)]
    dots = [(512, 512, 1024), (2048, 16, 512), (64, 512, 512)]
    planes = [(8, 128, 28), (16, 512, 7)]
    calls = [product(*shape) for shape in (least, few, *dense)]
    calls += [product(*shape, table=table & 255) for shape in dense]
    calls += [depthwise(*plane) for plane in planes]
    calls += [product(*shape, products) for products in (1, 3) for shape in dots]
    calls += [depthwise(*plane, products) for products in (1, 3) for plane in planes]
    of_call, *times = _fastest(calls)
    times = iter([max(seconds - of_call, seconds / 9) for seconds in times])
    gather = next(times) / math.prod(few)
    of_tables, of_bytes = (_solve([(m * n * k, n * k) for m, n, k in dense], times) for _ in range(2))
    of_planes = _solve([(b * c * s * s * 9, c * 9) for b, c, s in planes], times)
    of_dots = _by_products([(m * n * k, m * k, n * k) for m, n, k in dots], [m * n for m, n, _ in dots], times)
    outputs = [b * c * s * s for b, c, s in planes]
    of_dotted = _by_products([(9 * o, c * 9) for o, (_, c, _) in zip(outputs, planes, strict=True)], outputs, times)
    return Rates(of_call, *of_tables, gather, *of_dots, *of_planes, *of_dotted, *of_bytes)


def _by_products(counts: Sequence[Sequence[int]], outputs: Sequence[int], times: Iterator[float]) -> list[float]:
    """Rates of what each product takes, and of a sum, from the times of one product and then of three."""
    one, three = ([next(times) for _ in counts] for _ in range(2))
    more = [max(c - a, c / 9) / 2 for a, c in zip(one, three, strict=True)]
    rates = _solve(counts, iter(more))
    left = sum(max(a - each, 0) for a, each in zip(one, more, strict=True))
    return [*rates, left / sum(outputs)]


def _fastest(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The least seconds of each; the runs are interleaved, so that what else the machine does meets all alike."""
    times = [math.inf] * len(calls)
    for repeat in range(_REPEATS + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if repeat:  # the first one compiles
                times[i] = min(times[i], time.perf_counter() - start)
    return times


def _solve(counts: Sequence[Sequence[int]], times: Iterator[float]) -> list[float]:
    """Rates, not negative, with which the counts come nearest to the next of the times, relative to these."""
    times = list(itertools.islice(times, len(counts)))
    shares = np.array(counts, float) / np.array(times)[:, None]
    scale = shares.max(axis=0)
    used = list(range(shares.shape[1]))
    while True:
        found = np.linalg.lstsq(shares[:, used] / scale[used], np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        del used[int(np.argmin(found))]
    rates = np.zeros(shares.shape[1])
    rates[used] = np.abs(found) / scale[used]
    return rates.tolist()
