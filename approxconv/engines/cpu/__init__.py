"""Row tables on the CPU, in Numba.

A LUT product sum ``y[m, n] = Σ_k table[x[m, k], w[n, k]]`` is a random gather. For some values of n and k the gather is
done once for all codes; then each row m costs contiguous vector adds: `row_tables`, and `depthwise` for one group a
channel.
"""

from __future__ import annotations

import torch

from .depthwise import lut_dwconv2d
from .row_tables import lut_conv2d, lut_matmul

__all__ = ["lut_conv2d", "lut_dwconv2d", "lut_matmul", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """Runs on CPU tensors only."""
    return None if device.type == "cpu" else f"it takes CPU tensors, got tensors on {device}"
