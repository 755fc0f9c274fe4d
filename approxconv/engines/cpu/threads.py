"""The threads that compute, and the scratch that they share."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

SCRATCH = 60 * 2**20  # bytes over all workers


_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """A forked child has the parent's pool object but none of its threads."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(block: Callable[..., None], tasks: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call ``block(*task)`` for all tasks on `workers` threads, this one included."""
    global _pool, _pool_size
    helpers = min(workers, len(tasks)) - 1
    # next() on this iterator is atomic under the GIL, so each task is taken once.
    remaining = iter(tasks)

    def work() -> None:
        for task in remaining:
            block(*task)

    if helpers <= 0:
        work()
        return
    with _pool_lock:
        if _pool is None or _pool_size < helpers:
            _pool = ThreadPoolExecutor(helpers, thread_name_prefix="approxconv")
            _pool_size = helpers
        futures = [_pool.submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        future.result()


def even_ranges(total: int, parts: int) -> list[tuple[int, int]]:
    edges = [total * i // parts for i in range(parts + 1)]
    return [pair for pair in itertools.pairwise(edges) if pair[0] < pair[1]]


def flat(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes from its first element to its last, as a 1-D array: no copy, whatever the strides."""
    if tensor.numel() == 0:
        return np.empty(1, np.uint8)  # has a type and is not read
    if tensor.is_contiguous():
        return tensor.numpy().reshape(-1)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()
