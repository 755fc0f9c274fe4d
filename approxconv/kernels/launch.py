"""The CuPy launcher: plans run on torch's tensors and torch's current stream. The only place that loads modules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .compile import compile_kernel
from .plan import Plan, Target
from .sources import on_reload, read

_DEFAULT_SHARED = 48 * 2**10  # bytes of dynamic shared memory that need no opt-in
_first_process: int | None = None


def require_cupy() -> Any:
    """Import CuPy.

    Raises
    ------
    ImportError
        It is not installed; the message names the extras that bring it.
    """
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "CUDA tensors need CuPy: pip install 'approxconv[cuda12]' (or 'approxconv[cuda13]' for CUDA 13); "
            "approxconv.use_engine('reference') works without it, slowly"
        ) from error
    return cupy


@cache
def device_target(index: int) -> Target:
    """What planning needs to know of CUDA device `index`."""
    attributes = require_cupy().cuda.Device(index).attributes
    return Target(attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


@lru_cache(maxsize=64)
def _module(source: str, _fingerprint: str, index: int) -> Any:
    """Load a source for the current device, once a version."""
    cupy = require_cupy()
    arch = f"sm_{cupy.cuda.Device(index).compute_capability}"
    return cupy.RawModule(path=str(compile_kernel(source, arch).path))


@lru_cache(maxsize=1024)
def _function(source: str, fingerprint: str, index: int, kernel: str, shared: int) -> Any:
    function = _module(source, fingerprint, index).get_function(kernel)
    if shared > _DEFAULT_SHARED:
        function.max_dynamic_shared_size_bytes = shared
    return function


on_reload(_function.cache_clear)
on_reload(_module.cache_clear)


def _check_process() -> None:
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    elif _first_process != os.getpid():
        raise RuntimeError(
            "CUDA kernels were launched before this process was forked, and CUDA does not survive a fork: start "
            "workers with the 'spawn' method, or keep CUDA tensors out of them"
        )


def launch(plans: Sequence[Plan], device: torch.device) -> None:
    """Run plans, in order, whose tensors lie on `device`, on torch's current stream there.

    Raises
    ------
    ImportError
        CuPy is not installed.
    KernelCompileError
        A source does not compile.
    RuntimeError
        CUDA was used before this process was forked.
    """
    _check_process()
    cupy = require_cupy()
    index = device.index if device.index is not None else torch.cuda.current_device()
    # DLPack is asked inside the stream's context: torch then has nothing to synchronise.
    with (
        torch.cuda.device(index),
        cupy.cuda.Device(index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream(index)),
    ):
        shared_tensors: dict[int, Any] = {}

        def argument(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in shared_tensors:
                shared_tensors[id(value)] = cupy.from_dlpack(value.detach())
            return shared_tensors[id(value)]

        versions = {name: read(name).fingerprint for name in {plan.source for plan in plans}}
        for plan in plans:
            function = _function(plan.source, versions[plan.source], index, plan.kernel, plan.shared)
            function(plan.grid, plan.block, tuple(map(argument, plan.arguments)), shared_mem=plan.shared)
