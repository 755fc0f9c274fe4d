"""From a plan, made without a GPU, to a running kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import source_path


@dataclass(frozen=True)
class Plan:
    """Everything a launch needs.

    Attributes
    ----------
    source : str
        Name of the ``.cu`` file, without suffix.
    kernel : str
        Name of the ``extern "C"`` function.
    grid, block : tuple of int
        Launch geometry.
    arguments : tuple of Tensor or numpy.generic
        In the kernel's order; a tensor is passed as the address of its first element.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Tensor | np.generic, ...]


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
def _function(path: Path, _modified: int, kernel: str, _device: int) -> Any:
    """Compile a source for the current device, once per version of the file."""
    return require_cupy().RawModule(code=path.read_text(), options=("-std=c++17",)).get_function(kernel)


def launch(plan: Plan, device: torch.device) -> None:
    """Run a plan whose tensors lie on `device`, on torch's current stream there."""
    cupy = require_cupy()
    path = source_path(plan.source)
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index), cupy.cuda.Device(index):
        function = _function(path, path.stat().st_mtime_ns, plan.kernel, index)
        arguments = [cupy.from_dlpack(a.detach()) if isinstance(a, Tensor) else a for a in plan.arguments]
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream(index)):
            function(plan.grid, plan.block, tuple(arguments))
