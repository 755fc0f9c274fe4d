"""Operand codes expanded to the factors of a table, so that products and convolutions of floats multiply by it."""

from __future__ import annotations

import torch
from torch import Tensor


def features(codes: Tensor, vectors: Tensor, dim: int) -> Tensor:
    """Replace each code by its P features, which stand side by side in dimension `dim`.

    Parameters
    ----------
    codes : Tensor
        Integers, of any shape.
    vectors : Tensor
        ``(codes, P)``, of any dtype.
    dim : int
        The dimension that is summed over. Groups of it stay groups.

    Returns
    -------
    Tensor
        Of vectors' dtype and codes' shape, but P times as large in `dim`; that dimension is innermost in memory.
    """
    expanded = torch.nn.functional.embedding(codes.movedim(dim, -1).int(), vectors)
    return expanded.flatten(-2).movedim(-1, dim)


def device_for(tensor: Tensor) -> torch.device:
    """Where floats are computed with a proof: the CPU or a CUDA device; for tensors on any other, the CPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
