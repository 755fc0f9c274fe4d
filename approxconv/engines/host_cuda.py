"""The CUDA kernels on the CPU: the same plans and the same ``.cu``, compiled by g++; slow and exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import KernelEngine, Plan, Target
from ..kernels.host import compiler, run_on_host

TARGET = Target(multiprocessors=132, shared_bytes=227 * 2**10)  # an H100's: its geometry is tried everywhere


def _target(device: torch.device) -> Target:
    return TARGET


def _run(plans: Sequence[Plan], device: torch.device) -> None:
    run_on_host(plans)


engine = KernelEngine("cpu", _target, _run, compiler)
unavailable, with_kernel = engine.unavailable, engine.with_kernel
lut_matmul, lut_conv2d, lut_dwconv2d = engine.lut_matmul, engine.lut_conv2d, engine.lut_dwconv2d
