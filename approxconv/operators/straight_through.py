"""What the straight-through Functions keep for their backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save_operands(ctx: Any, x: Tensor, w: Tensor) -> None:
    """Keep each operand only if the other one's gradient will ask for it."""
    ctx.shapes = x.shape, w.shape
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)


def or_placeholder(operand: Tensor | None, shape: torch.Size, grad: Tensor) -> Tensor:
    """The operand, or a stand-in of its shape where it was not kept: nothing then reads its values."""
    return grad.new_empty(1).expand(shape) if operand is None else operand


def saved_operands(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What `save_operands` kept."""
    x, w = ctx.saved_tensors
    return or_placeholder(x, ctx.shapes[0], grad), or_placeholder(w, ctx.shapes[1], grad)


def wanted(ctx: Any) -> tuple[bool, bool]:
    """Which of grad_x and grad_w is asked for."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[1]
