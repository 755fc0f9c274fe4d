"""Approximate recurrent cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .composite import ApproxComposite
from .projection import ApproxProjection


class _ApproxCell(ApproxComposite):
    """The two products of a cell: of its input, `ih`, and of its hidden state, `hh`."""

    input_size: int
    hidden_size: int

    def _init_products(self, **arguments: Any) -> None:
        for name in ("ih", "hh"):
            setattr(self, name, ApproxProjection(self, (f"weight_{name}", None), (f"bias_{name}", None), **arguments))

    def _check(self, name: str, tensor: Tensor, lead: tuple[int, ...] | None, size: int) -> None:
        if tensor.shape[-1:] != (size,) or (tensor.ndim > 2 if lead is None else tensor.shape[:-1] != lead):
            wanted = f"(B, {size}) or ({size},)" if lead is None else str((*lead, size))
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")

    def _state(self, name: str, state: Tensor | None, input: Tensor) -> Tensor:
        """The state that was given, or zeros."""
        if state is None:
            return input.new_zeros(*input.shape[:-1], self.hidden_size)
        self._check(name, state, input.shape[:-1], self.hidden_size)
        return state


class ApproxLSTMCell(_ApproxCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` whose products come from a multiplier's table.

    ``i, f, g, o = W_ih·x + b_ih + W_hh·h + b_hh``, both products as `ApproxLinear` computes them, each with its own
    activation scale; then ``c' = σ(f)·c + σ(i)·tanh(g)`` and ``h' = σ(o)·tanh(c')`` in floating point.

    Parameters are `torch.nn.LSTMCell`'s and `ApproxLayer`'s, which both products share.
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: input ``(B, I)`` or ``(I,)``, states h and c ``(B, H)`` or ``(H,)``, zeros if there are none.

        Raises
        ------
        ValueError
            The shapes do not fit.
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        self._check("input", input, None, self.input_size)
        h, c = (self._state(f"hx[{i}]", state, input) for i, state in enumerate(hx or (None, None)))
        i, f, g, o = (self.ih(input) + self.hh(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class ApproxGRUCell(_ApproxCell, nn.GRUCell):
    """`torch.nn.GRUCell` whose products come from a multiplier's table.

    ``r, z = σ(W_ih·x + b_ih + W_hh·h + b_hh)`` and ``n = tanh(W_in·x + b_in + r·(W_hn·h + b_hn))``, all products as
    `ApproxLinear` computes them, those of x with one activation scale and those of h with another; then
    ``h' = n + z·(h − n)`` in floating point.

    Parameters are `torch.nn.GRUCell`'s and `ApproxLayer`'s, which both products share.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input ``(B, I)`` or ``(I,)``, state ``(B, H)`` or ``(H,)``, zeros if there is none.

        Raises
        ------
        ValueError
            The shapes do not fit.
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        self._check("input", input, None, self.input_size)
        h = self._state("hx", hx, input)
        x_r, x_z, x_n = self.ih(input).chunk(3, -1)
        h_r, h_z, h_n = self.hh(h).chunk(3, -1)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return n + torch.sigmoid(x_z + h_z) * (h - n)
