"""The CuPy launcher: plans run on torch's tensors and torch's current stream. The only place that loads modules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .compile import compile_kernel
from .plan import Plan, SourceEditedError, Target
from .sources import on_reload, read

_LARGE_TENSOR_CORES = ("80", "87", "90", "100")  # others multiply half as many bytes a clock
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
    device = require_cupy().cuda.Device(index)
    attributes, has_large_tensor_cores = device.attributes, device.compute_capability in _LARGE_TENSOR_CORES
    return Target(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        mma_clocks=8 if has_large_tensor_cores else 16,
    )


@lru_cache(maxsize=64)
def _module(source: str, version: str, index: int) -> Any:
    """Load a source for the current device, once a version."""
    cupy = require_cupy()
    compiled = compile_kernel(source, f"sm_{cupy.cuda.Device(index).compute_capability}")
    if compiled.source.fingerprint != version:
        raise SourceEditedError(compiled.source.path)
    return cupy.RawModule(path=str(compiled.path))


class _Stream:
    """torch's current stream, by the protocol that CuPy asks for; torch's own streams have it from 2.10 on."""

    def __init__(self, index: int) -> None:
        self._pointer = torch.cuda.current_stream(index).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class _OnThisStream:
    """A tensor for DLPack that is used on the stream it was made on: torch has nothing to order."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__(stream=-1)


@dataclass
class _Function:
    """A loaded kernel, and how much dynamic shared memory it may be launched with."""

    kernel: Any
    shared: int = 48 * 2**10  # needs no opt-in

    def __call__(self, plan: Plan, arguments: tuple[Any, ...]) -> None:
        if plan.shared > self.shared:
            self.kernel.max_dynamic_shared_size_bytes = self.shared = plan.shared
        self.kernel(plan.grid, plan.block, arguments, shared_mem=plan.shared)


@lru_cache(maxsize=1024)
def _function(source: str, version: str, index: int, kernel: str) -> _Function:
    return _Function(_module(source, version, index).get_function(kernel))


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
        CUDA was used before this process was forked, or a source was edited after the plan was made.
    """
    _check_process()
    cupy = require_cupy()
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index), cupy.cuda.Device(index), cupy.cuda.Stream.from_external(_Stream(index)):
        shared_tensors: dict[int, Any] = {}

        def argument(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in shared_tensors:
                shared_tensors[id(value)] = cupy.from_dlpack(_OnThisStream(value))
            return shared_tensors[id(value)]

        for plan in plans:
            version = plan.version or read(plan.source).fingerprint
            _function(plan.source, version, index, plan.kernel)(plan, tuple(map(argument, plan.arguments)))
