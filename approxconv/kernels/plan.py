"""A launch as data, made without a GPU and executed by CuPy or by the host build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor


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
    shared : int
        Dynamic shared memory, bytes.
    arguments : tuple of Tensor or numpy.generic or numpy.ndarray
        In the kernel's order: a tensor is passed as the address of its first element, a NumPy scalar by value, a
        one-element structured array as a C struct by value.
    version : str
        Fingerprint of the source that the plan was made for; empty for whatever the source is at the launch.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[Tensor | np.generic | np.ndarray, ...]
    version: str = ""


class SourceEditedError(RuntimeError):
    """A source was edited between planning a launch and launching it; the plan does not fit it any more."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} or a header of it was edited during the call: call again")


@dataclass(frozen=True)
class Target:
    """What planning needs to know of a device.

    Attributes
    ----------
    multiprocessors : int
        How many there are: blocks that can run at once.
    shared_bytes : int
        Shared memory one block can have, with opt-in.
    mma_clocks : int
        Clocks that an ``mma.m16n8k32`` of bytes takes one of a multiprocessor's four tensor cores.
    """

    multiprocessors: int
    shared_bytes: int
    mma_clocks: int = 8
