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

ENGINES = ("reference", "cpu", "cuda", "host_cuda")
_KERNEL_ENGINES = ("cuda", "host_cuda")
_DEVICE_ENGINE = {"cpu": "cpu", "cuda": "cuda"}
_override: ContextVar[str] = ContextVar("approxconv_engine", default="auto")


class EngineError(RuntimeError):
    """The engine asked for cannot run on this device or these operands."""


def check_engine(name: str) -> str:
    """Return `name` if it is ``"auto"`` or an engine, else raise a ValueError that lists them."""
    base, colon, kernel = name.partition(":")
    if name != "auto" and (base not in ENGINES or (colon and (not kernel or base not in _KERNEL_ENGINES))):
        raise ValueError(
            f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, or 'cuda:KERNEL' or 'host_cuda:KERNEL' "
            f"for a kernel source of your own, got {name!r}"
        )
    return name


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Run every op and layer that leaves its engine at ``"auto"`` on engine `name` within this context.

    Parameters
    ----------
    name : str
        ``"reference"`` (gather and sum, any device), ``"cpu"`` (row tables in Numba), ``"cuda"``, ``"host_cuda"`` (the
        CUDA kernels on the CPU, slowly) or ``"auto"``. ``"cuda:KERNEL"`` and ``"host_cuda:KERNEL"`` use the kernel
        source ``KERNEL.cu`` for those operators whose kernels it defines.

    Raises
    ------
    ValueError
        There is no such engine.
    """
    token = _override.set(check_engine(name))
    try:
        yield
    finally:
        _override.reset(token)


def select(name: str, device: torch.device) -> Any:
    """Return the engine for `name` on `device`: something with the three functions.

    Raises
    ------
    ValueError
        There is no such engine.
    EngineError
        It cannot run on `device`.
    ImportError
        It needs a package that is not installed; the message names the extra.
    """
    if check_engine(name) == "auto":
        name = _override.get()
    if name == "auto":
        name = _DEVICE_ENGINE.get(device.type, "reference")
    base, _, kernel = name.partition(":")
    engine = import_module(f".{base}", __name__)
    if kernel:
        engine = engine.with_kernel(kernel)
    reason = engine.unavailable(device)
    if reason is not None:
        raise EngineError(f"engine {name!r} cannot run here: {reason}")
    return engine
