"""From a plan to a launch on the CPU."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from ..plan import Plan, SourceEditedError
from ..sources import Source, read
from .build import build
from .watched import run_watched

# What cuLaunchKernel accepts, on the device that has the most shared memory.
_MAX_GRID, _MAX_BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)
_MAX_THREADS, _MAX_SHARED = 1024, 227 * 1024
_KINDS = {"b": "i", "i": "i", "u": "i", "f": "f", "V": "s"}  # NumPy's letters in cuda_on_host.h's
_DONE, _TRAPPED, _, _ABSENT = range(4)  # cuda_on_host.h's Outcome

_one_launch_at_a_time = threading.Lock()  # __shared__ memory is a library's static storage


class KernelTrapError(RuntimeError):
    """A kernel called ``__trap`` or failed an ``assert``; the message says which thread, and why."""


def run_on_host(plans: Iterable[Plan], *, sanitize: str | None = None) -> None:
    """Run plans on CPU tensors, in order, through the very ``.cu`` files that a GPU runs.

    Parameters
    ----------
    plans : iterable of Plan
        Their tensors lie on the CPU, with any strides: a kernel gets the address of the first element.
    sanitize : {None, "address", "thread"}
        None runs in this process, which a kernel that reads or writes where it must not can bring down. Else each plan
        runs in a process of its own: ``"address"`` under AddressSanitizer and UndefinedBehaviorSanitizer, on copies of
        the tensors that end where their last element does, so that every overrun is seen; ``"thread"`` under
        ThreadSanitizer, which sees a missing ``__syncthreads``.

    Raises
    ------
    KernelCompileError
        A source does not compile.
    KernelTrapError, SanitizerError
        A kernel trapped; a sanitizer found a fault. What the plan writes is then undefined.
    SourceEditedError
        A plan was made for another version of its source.
    TypeError, ValueError
        A plan does not fit its kernel, or no GPU would launch it.
    RuntimeError
        There is no C++ compiler, or the sanitizer does not run on this machine.
    """
    for plan in plans:
        source = read(plan.source)
        if plan.version and plan.version != source.fingerprint:
            raise SourceEditedError(source.path)
        _check(plan, source)
        program = build(source, sanitize)
        launch = (plan, _signature(plan), (*plan.grid, *plan.block, plan.shared), program)
        outcome, text = _run_here(*launch) if sanitize is None else run_watched(*launch, source.files)
        if outcome != _DONE:
            raise _error(plan, source, outcome, text)


def _check(plan: Plan, source: Source) -> None:
    if plan.kernel not in source.kernels:
        there = ", ".join(source.kernels) or "none"
        raise ValueError(f"no kernel {plan.kernel!r} in {source.path}; there are: {there}")
    for name, size, limit in (("grid", plan.grid, _MAX_GRID), ("block", plan.block, _MAX_BLOCK)):
        if not all(1 <= n <= most for n, most in zip(size, limit, strict=True)):
            raise ValueError(f"{plan.kernel}: a {name} is from (1, 1, 1) to {limit}, got {size}")
    if math.prod(plan.block) > _MAX_THREADS:
        raise ValueError(f"{plan.kernel}: a block has up to {_MAX_THREADS} threads, got {plan.block}")
    if not 0 <= plan.shared <= _MAX_SHARED:
        raise ValueError(f"{plan.kernel}: a block has up to {_MAX_SHARED} bytes of shared memory, got {plan.shared}")
    for argument in plan.arguments:
        if isinstance(argument, Tensor) and argument.device.type != "cpu":
            raise ValueError(f"{plan.kernel}: the host build runs on CPU tensors, got one on {argument.device}")


def _signature(plan: Plan) -> str:
    return " ".join(map(_kind, plan.arguments))


def _kind(argument: Tensor | np.generic | np.ndarray) -> str:
    """Kind and size of an argument as cuda_on_host.h describes a parameter: p8, i4, f4, s32 …"""
    if isinstance(argument, Tensor):
        return f"p{ctypes.sizeof(ctypes.c_void_p)}"
    if not isinstance(argument, (np.generic, np.ndarray)) or argument.size != 1 or argument.dtype.kind not in _KINDS:
        raise TypeError(f"an argument is a tensor, a NumPy scalar or one structure in an array, got {argument!r}")
    return f"{_KINDS[argument.dtype.kind]}{argument.dtype.itemsize}"


def _error(plan: Plan, source: Source, outcome: int, text: str) -> Exception:
    if outcome == _TRAPPED:
        return KernelTrapError(f"{plan.kernel}: {text}")
    if outcome == _ABSENT:
        return ValueError(f"{plan.kernel}: an #if in {source.path} leaves it out where __CUDA_ARCH__ is not defined")
    return _wrong_arguments(plan, source, text)


def _wrong_arguments(plan: Plan, source: Source, taken: str) -> TypeError:
    kinds, given = taken.split(), _signature(plan).split()
    if len(kinds) != len(given):
        return TypeError(f"{plan.kernel} takes {len(kinds)} arguments, the plan has {len(given)}")
    at = next(i for i, (kind, other) in enumerate(zip(kinds, given, strict=True)) if kind != other)
    parameter, argument = source.kernels[plan.kernel][at], plan.arguments[at]
    wanted = f"{parameter.name} is {parameter.ctype} ({kinds[at][1:]} bytes)"
    got = "a tensor" if isinstance(argument, Tensor) else f"{argument.dtype} ({argument.nbytes} bytes)"
    return TypeError(f"{plan.kernel}: {wanted}, the plan has {got}")


@cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _run_here(plan: Plan, signature: str, geometry: tuple[int, ...], library: Path) -> tuple[int, str]:
    """Run a plan in this process; returns the outcome and its text."""
    values = [
        struct.pack("P", argument.data_ptr()) if isinstance(argument, Tensor) else argument.tobytes()
        for argument in plan.arguments
    ]
    arguments = (ctypes.c_char_p * len(values))(*values)
    text = ctypes.create_string_buffer(1024)
    with _one_launch_at_a_time:
        outcome = _library(library).run_kernel(
            plan.kernel.encode(), signature.encode(), (ctypes.c_uint * 7)(*geometry), arguments, text, len(text)
        )
    return outcome, text.value.decode(errors="replace")
