"""What the CPU engines take for a call: rates that are measured once a machine, times what the call has to do."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .byte_form import CODES, ByteForm
from .work import Work

_REPEATS = 3
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
    lookup, table, gather : float
        By row tables: a product; the products of one weight with all codes. A product that is looked up by itself.
    product, feature, pack : float
        In the factored engine, for each of its P products: a multiplication; a code's factor; a weight's factor.
    depthwise_lookup, depthwise_table : float
        Of a depthwise convolution by row tables: a product; a weight's table.
    depthwise_product, depthwise_feature : float
        Of a depthwise convolution in the factored engine, for each of its P products.
    """

    lookup: float
    table: float
    gather: float
    product: float
    feature: float
    pack: float
    depthwise_lookup: float
    depthwise_table: float
    depthwise_product: float
    depthwise_feature: float


def seconds(engine: str, work: Work, products: int = 0) -> float:
    """How long engine ``"cpu"``, or ``"factored"`` with so many products, should take with torch's present threads.

    The first call on a machine, with a number of threads, measures for about half a second.
    """
    rates = measured_rates()
    weights = work.groups * work.lanes * work.depth
    if work.operator == "lut_dwconv2d":
        if engine == "factored":
            return products * (work.macs * rates.depthwise_product + work.inputs * rates.depthwise_feature)
        return work.macs * rates.depthwise_lookup + weights * rates.depthwise_table
    if engine == "factored":
        return products * (work.macs * rates.product + work.inputs * rates.feature + weights * rates.pack)
    from .cpu.row_tables import MAX_ROWS

    blocks = -(-work.rows // MAX_ROWS)
    return min(work.macs * rates.lookup + blocks * weights * rates.table, work.macs * rates.gather)


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

    def form(products: int) -> ByteForm:
        u, v = codes(products, CODES), codes(products, CODES).view(torch.int8)
        return ByteForm(u, v, None, torch.zeros(CODES, dtype=torch.int32))

    def product(m: int, n: int, k: int, products: int = 0) -> float:
        x, w = codes(m, k), codes(n, k)
        if products:
            return _fastest(lambda: dot_products.form_matmul(x, w, form(products)))
        return _fastest(lambda: cpu.lut_matmul(x, w, table))

    def depthwise(b: int, c: int, size: int, products: int = 0) -> float:
        x, w, geometry = codes(b, c, size, size), codes(c, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 0)
        if products:
            return _fastest(lambda: depthwise_dots.form_dwconv2d(x, w, form(products), *geometry))
        return _fastest(lambda: cpu.lut_dwconv2d(x, w, table, *geometry))

    dense = [(4096, 64, 288), (784, 64, 288)]
    lookup, per_table = _solve([(m * n * k, n * k) for m, n, k in dense], [product(*shape) for shape in dense])
    gather = product(2, 256, 512) / (2 * 256 * 512)
    shapes = [(4096, 64, 288, 1), (4096, 64, 288, 3), (4096, 16, 288, 2), (64, 512, 512, 1), (64, 512, 512, 2)]
    multiply, feature, pack = _solve(
        [(p * m * n * k, p * m * k, p * n * k) for m, n, k, p in shapes], [product(*shape) for shape in shapes]
    )
    planes = [(8, 64, 28), (8, 64, 7)]
    per_lookup, of_table = _solve(
        [(b * c * s * s * 9, c * 9) for b, c, s in planes], [depthwise(*plane) for plane in planes]
    )
    planes = [(8, 64, 28, 1), (8, 64, 28, 3), (8, 64, 7, 1)]
    tap, plane = _solve(
        [(p * b * c * s * s * 9, p * b * c * s * s) for b, c, s, p in planes], [depthwise(*plane) for plane in planes]
    )
    return Rates(lookup, per_table, gather, multiply, feature, pack, per_lookup, of_table, tap, plane)


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first one compiles
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _solve(counts: Sequence[Sequence[int]], times: Sequence[float]) -> list[float]:
    """Rates, not negative, with which the counts come nearest to the times, relative to these."""
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
