"""Approximate recurrent layers and their cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .composite import ApproxComposite
from .projection import ApproxProjection


def _lstm(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The states h and c from the four gates before their nonlinearities and the last c."""
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """The state from the products of the input and of the last state, and that state."""
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = y.chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + torch.sigmoid(x_z + h_z) * (h - n)


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
        return _lstm(self.ih(input) + self.hh(h), c)


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
        return _gru(self.ih(input), self.hh(h), h)


class _ApproxRecurrent(ApproxComposite):
    """The products of every layer and direction: ``ih_l0``, ``hh_l0``, ``ih_l0_reverse`` and so on.

    A subclass supplies ``_step(suffix, gates, state)``: the next state, h first, from the product of the input.
    """

    _step: Callable[[str, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def _init_products(self, **arguments: Any) -> None:
        self._init_flat_weights()  # what torch's layer does not hand on
        for suffix in self._suffixes():
            for name in ("ih", "hh"):
                bias = (f"bias_{name}_{suffix}", None) if self.bias else None
                product = ApproxProjection(self, (f"weight_{name}_{suffix}", None), bias, **arguments)
                setattr(self, f"{name}_{suffix}", product)
            if self.proj_size:
                setattr(self, f"hr_{suffix}", ApproxProjection(self, (f"weight_hr_{suffix}", None), **arguments))

    def _suffixes(self) -> list[str]:
        """Of the names of a layer's and direction's parameters."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def flatten_parameters(self) -> None:
        """Nothing to do: cuDNN, which wants parameters in one piece, is not called."""

    def to_float(self) -> nn.Module:
        """Give a stock layer back: the same parameters, not copies, the hooks and whatever else was put on this one."""
        layer = super().to_float()
        layer.mode = type(layer).__name__
        layer._init_flat_weights()
        return layer

    def _states(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """Zeros, all layers' and directions'."""
        count = len(self._suffixes())
        return (like.new_zeros(count, batch, self.proj_size or self.hidden_size),)

    def _direction(
        self, suffix: str, data: Tensor, sizes: list[int], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction, over steps of so many rows each; as many as there are at first, then fewer.

        Of the state, ``(B, ...)``, a step changes the first rows. The others have come to their end, or, from the last
        step to the first, not to their beginning.
        """
        gates = getattr(self, f"ih_{suffix}")(data).split(sizes)
        outputs = [data] * len(sizes)
        steps = range(len(sizes))
        for t in reversed(steps) if suffix.endswith("_reverse") else steps:
            now = self._step(suffix, gates[t], tuple(each[: sizes[t]] for each in state))
            state = tuple(torch.cat([new, old[sizes[t] :]]) for new, old in zip(now, state, strict=True))
            outputs[t] = now[0]
        return torch.cat(outputs), state

    def _layers(self, data: Tensor, sizes: list[int], states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers: output ``(ΣB, D·H)`` and last states ``(layers·D, B, ...)``."""
        last, directions = [], 1 + self.bidirectional
        for i, suffix in enumerate(self._suffixes()):
            if i % directions == 0:
                outputs, input = [], data
                if i and self.training and self.dropout:
                    input = F.dropout(data, self.dropout)
            output, state = self._direction(suffix, input, sizes, tuple(each[i] for each in states))
            outputs.append(output)
            last.append(state)
            if len(outputs) == directions:
                data = torch.cat(outputs, -1)
        return data, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run over a sequence; arguments, shapes and results are the torch layer's.

        Raises
        ------
        ValueError
            An input that is neither 2-D nor 3-D nor packed, of no steps, or of another dtype than the weights.
        RuntimeError
            Shapes that do not fit, or a quantised mode before `approxconv.calibrate`.
        """
        states = (hx,) if isinstance(hx, Tensor) else hx
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            if states is None:
                states = self._states(int(batch_sizes[0]), data)
            elif order is not None:
                states = tuple(each.index_select(1, order) for each in states)
            self._check(data, states, batch_sizes)
            data, states = self._layers(data, batch_sizes.tolist(), states)
            if back is not None:
                states = tuple(each.index_select(1, back) for each in states)
            output = PackedSequence(data, batch_sizes, order, back)
        else:
            if input.ndim not in (2, 3):
                raise ValueError(f"input must have 2 or 3 dimensions, got {tuple(input.shape)}")
            batched, batch_dim = input.ndim == 3, 0 if self.batch_first else 1
            if not batched:
                input = input.unsqueeze(batch_dim)
                states = None if states is None else tuple(each.unsqueeze(1) for each in states)
            if states is None:
                states = self._states(input.shape[batch_dim], input)
            self._check(input, states, None)
            steps = input.transpose(0, 1) if self.batch_first else input
            length, batch = steps.shape[:2]
            if length == 0:
                raise ValueError(f"input must have at least one step, got {tuple(input.shape)}")
            data, states = self._layers(steps.flatten(0, 1), [batch] * length, states)
            output = data.unflatten(0, (length, batch))
            output = output.transpose(0, 1) if self.batch_first else output
            if not batched:
                output, states = output.squeeze(batch_dim), tuple(each.squeeze(1) for each in states)
        return output, states if len(states) > 1 else states[0]

    def _check(self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None) -> None:
        """Torch's own checks."""
        self.check_forward_args(input, states if len(states) > 1 else states[0], batch_sizes)


class ApproxLSTM(_ApproxRecurrent, nn.LSTM):
    """`torch.nn.LSTM` whose products come from a multiplier's table.

    Every layer and direction steps as `ApproxLSTMCell` does, its products of inputs and of states each with their own
    activation scale over all steps; so do the projections of h, if there are any.

    Parameters are `torch.nn.LSTM`'s and `ApproxLayer`'s, which all products share. ``mode`` is that of the products.
    """

    def _states(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return *super()._states(batch, like), like.new_zeros(len(self._suffixes()), batch, self.hidden_size)

    def _step(self, suffix: str, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = _lstm(gates + getattr(self, f"hh_{suffix}")(state[0]), state[1])
        return (getattr(self, f"hr_{suffix}")(h), c) if self.proj_size else (h, c)


class ApproxGRU(_ApproxRecurrent, nn.GRU):
    """`torch.nn.GRU` whose products come from a multiplier's table.

    Every layer and direction steps as `ApproxGRUCell` does, its products of inputs and of states each with their own
    activation scale over all steps.

    Parameters are `torch.nn.GRU`'s and `ApproxLayer`'s, which all products share. ``mode`` is that of the products.
    """

    def _step(self, suffix: str, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        return (_gru(gates, getattr(self, f"hh_{suffix}")(h), h),)
