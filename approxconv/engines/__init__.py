"""Ways to compute a LUT product sum; one module each, all with the same three functions.

Every engine module offers ``unavailable(device) -> str | None`` (why it cannot run there) and

- ``lut_matmul(x, w, table)``: codes ``(..., M, K)`` and ``(N, K)`` or ``(..., N, K)`` to int32 ``(..., M, N)``,
- ``lut_conv2d(x, w, table, stride, padding, dilation, groups, pad_code)``,
- ``lut_dwconv2d(x, w, table, stride, padding, dilation, pad_code)``.

Codes arrive as uint8 bytes, already checked, never empty. Engines are imported when first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .work import Work

ENGINES = ("reference", "cpu", "factored", "residual", "truncated", "cuda", "host_cuda", "host_factored")
_KERNEL_ENGINES = ("cuda", "host_cuda")
_DEVICE_ENGINE = {"cpu": "cpu", "cuda": "cuda"}
_override: ContextVar[str] = ContextVar("approxconv_engine", default="auto")


class EngineError(RuntimeError):
    """The engine asked for cannot run on this device or these operands."""


def check_engine(name: str) -> str:
    """Return `name` if it is ``"auto"`` or an engine, else raise a ValueError that lists them."""
    base, colon, kernel = name.partition(":") if isinstance(name, str) else ("", "", "")
    if base == "truncated":
        if not kernel.isdecimal():
            raise ValueError(f"engine 'truncated' needs a rank, as in 'truncated:4', got {name!r}")
        return name
    if name != "auto" and (base not in ENGINES or (colon and (not kernel or base not in _KERNEL_ENGINES))):
        raise ValueError(
            f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, or 'cuda:KERNEL' or 'host_cuda:KERNEL' "
            f"for a kernel source of your own, got {name!r}"
        )
    return name


@contextmanager
def use_engine(name: str, *, rank: int | None = None) -> Iterator[None]:
    """Run every op and layer that leaves its engine at ``"auto"`` on engine `name` within this context.

    Parameters
    ----------
    name : str
        ``"reference"`` (gather and sum, any device), ``"cpu"`` (row tables in Numba), ``"factored"`` (products of 8-bit
        integers, for tables of low rank), ``"residual"`` (the exact product, and row tables of 8 bits for what a table
        lacks of it), ``"cuda"``, ``"host_cuda"`` and ``"host_factored"`` (the CUDA kernels on the
        CPU, slowly), ``"truncated"`` (**approximate**: the table's best approximation of a rank) or ``"auto"``, which
        chooses the fastest exact one. ``"cuda:KERNEL"`` and ``"host_cuda:KERNEL"`` use the kernel source ``KERNEL.cu``
        for those operators whose kernels it defines.
    rank : int, optional
        Of engine ``"truncated"``, which is ``"truncated:RANK"`` where only a name can be given.

    Raises
    ------
    ValueError
        There is no such engine, or a rank beside another one.
    """
    if rank is not None:
        if name != "truncated" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(
                f"rank must be an int of at least 0 beside engine 'truncated', got {name!r}, rank={rank!r}"
            )
        name = f"truncated:{rank}"
    token = _override.set(check_engine(name))
    try:
        yield
    finally:
        _override.reset(token)


def select(name: str, device: torch.device) -> Any:
    """Return the engine for `name` on `device`: something with the three functions.

    ``"auto"`` without more is the innermost `use_engine`, else the device's row tables; see `choose`.

    Raises
    ------
    ValueError
        There is no such engine.
    EngineError
        It cannot run on `device`.
    ImportError
        It needs a package that is not installed; the message names the extra.
    """
    return _engine(requested(name), device)


def _engine(name: str, device: torch.device) -> Any:
    if name == "auto":
        name = _DEVICE_ENGINE.get(device.type, "reference")
    base, _, variant = name.partition(":")
    engine = import_module(f".{base}", __name__)
    if variant:
        engine = engine.with_rank(int(variant)) if base == "truncated" else engine.with_kernel(variant)
    reason = engine.unavailable(device)
    if reason is not None:
        raise EngineError(f"engine {name!r} cannot run here: {reason}")
    return engine


def requested(name: str) -> str:
    """The engine that is asked for by `name`, or where that is ``"auto"`` by `use_engine`."""
    return _override.get() if check_engine(name) == "auto" else name


def choose(name: str, table: Tensor, work: Work) -> tuple[str, Any]:
    """Return the name and the engine for some work: for ``"auto"`` the one that should be fastest, of the exact ones.

    Raises
    ------
    ValueError, EngineError, ImportError
        As `select`.
    """
    name = requested(name)
    device = table.device
    engine = _engine(name, device)
    if name != "auto":
        return name, engine
    if device.type not in _DEVICE_ENGINE:
        return "reference", engine
    if not work.is_small:
        from .choice import weigh

        fastest = weigh(work, table).engine
        return fastest, _engine(fastest, device)
    return _DEVICE_ENGINE[device.type], engine
