"""LUT product sums by the kernels in ``cuda_src/``, launched by CuPy on torch's tensors and stream."""

from __future__ import annotations

import torch

from ..kernels import KernelEngine, Target, device_target, launch, require_cupy


def _target(device: torch.device) -> Target:
    return device_target(device.index if device.index is not None else torch.cuda.current_device())


engine = KernelEngine("cuda", _target, launch, require_cupy)
unavailable, with_kernel = engine.unavailable, engine.with_kernel
lut_matmul, lut_conv2d, lut_dwconv2d = engine.lut_matmul, engine.lut_conv2d, engine.lut_dwconv2d
