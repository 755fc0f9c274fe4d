"""What all approximate layers share: modes, quantisation state, the integer path and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._versioned import once_per_version
from ..engines import check_engine
from ..multiplier import Multiplier, prepare
from ..operators.straight_through import save_operands, saved_operands, wanted
from ..quantization import OperandFormat, QuantizedWeight, quantize_weight, remove_zero_points
from ..zoo import get_multiplier

MODES = ("float", "quantized", "approximate")
_SCALES = ("activation_scale", "weight_scale")


@once_per_version
def host_int(tensor: Tensor) -> int:
    """A scalar buffer's value, read back from its device once per version."""
    return int(tensor)


def check_mode(mode: str) -> str:
    """Return `mode` if there is one of that name, else raise a ValueError that lists them."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode


def as_multiplier(multiplier: Multiplier | str) -> Multiplier:
    """A multiplier given as itself or by its zoo name."""
    if isinstance(multiplier, str):
        return get_multiplier(multiplier)
    if not isinstance(multiplier, Multiplier):
        raise ValueError(f"multiplier must be a Multiplier or a name, got {type(multiplier).__name__}")
    return multiplier


def eagerly(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have torch.compile leave `method` out: it reads scales and weights anew on every call, which a trace would not.

    torch's compiler is imported by the first call, not by the decoration.
    """

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        disabled = getattr(method, "_disabled", None)
        if disabled is None:
            disabled = method._disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return run


class ApproxLayer(nn.Module):
    """Mixin placed before a torch layer with `weight` and `bias`; adds modes and the integer path.

    ``mode`` is one of

    - ``"float"``: the torch layer itself,
    - ``"quantized"``: operands quantised, products exact,
    - ``"approximate"``: operands quantised, products from the multiplier's table.

    The last two are one path with two tables: look up and add in int32, take the zero points out exactly, rescale once.

    Buffers: ``table`` int32 ``(2**a_bits, 2**w_bits)``, ``operands_signed`` bool ``(2,)``, ``activation_scale`` float32
    and ``activation_zero_point`` int32 scalars, ``weight_scale`` float32 and ``weight_zero_point`` int32 ``(O,)``,
    ``calibrated`` bool. Weight scales follow the weights; activation scales are set by `approxconv.calibrate`.
    """

    weight: Tensor
    bias: Tensor | None
    _channel_dim: int

    def _init_approx(self, multiplier: Multiplier | str, mode: str, engine: str) -> None:
        multiplier = as_multiplier(multiplier)
        self.mode = mode
        self.engine = engine
        self.observing = False
        self.multiplier_name = multiplier.name
        device, channels = self.weight.device, self._filters(self.weight).shape[0]
        signed = torch.tensor([multiplier.a_signed, multiplier.w_signed], device=device)
        self.activation_format = OperandFormat(multiplier.a_bits, multiplier.a_signed)
        self.weight_format = OperandFormat(multiplier.w_bits, multiplier.w_signed)
        # A copy: load_state_dict writes into it, and the multiplier belongs to its user.
        self.register_buffer("table", multiplier.table.to(device, copy=True))
        self.register_buffer("operands_signed", signed)
        self.register_buffer("activation_scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("activation_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.ones(channels, dtype=torch.float32, device=device))
        self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int32, device=device))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=device))
        self.activation_observer = self.activation_format.activation_observer().to(device)
        self._quantized: tuple[Tensor, tuple[int, int] | None, QuantizedWeight] | None = None
        self.register_forward_pre_hook(_no_op)

    def _adopt(self, layer: nn.Module, multiplier: Multiplier | str, mode: str, engine: str) -> ApproxLayer:
        """Become `layer`, on its device: its parameters, training flag, hooks and whatever else was put on it."""
        state = layer.__getstate__()  # without its compiled call
        # The dicts of hooks move, so that their handles still remove them, and `layer` keeps copies.
        for name, value in vars(nn.Module()).items():
            if isinstance(value, (dict, set)):
                layer.__dict__[name] = state[name].copy()
        self.__dict__.update(state)
        for key, hook in self._load_state_dict_pre_hooks.items():
            if hook.with_module:  # a weak reference to it, which would die with `layer`
                self._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, self)
        self._init_approx(multiplier, mode, engine)
        self.activation_observer.train(self.training)
        return self

    @property
    def mode(self) -> str:
        """``"float"``, ``"quantized"`` or ``"approximate"``; setting another one is a ValueError."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = check_mode(mode)

    @property
    def engine(self) -> str:
        """``"auto"`` or the name of an engine; setting another one is a ValueError."""
        return self._engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self._engine = check_engine(engine)

    @property
    def multiplier(self) -> Multiplier:
        """The multiplier this layer's table holds."""
        return Multiplier(
            self.table,
            a_signed=self.activation_format.signed,
            w_signed=self.weight_format.signed,
            name=self.multiplier_name,
        )

    @eagerly
    def forward(self, input: Tensor, *geometry: Any) -> Tensor:
        """Apply the layer in its mode; shapes as the torch layer's. Inside a compiled model it runs as it is.

        Raises
        ------
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        if self.mode == "float":
            if self.observing:
                self.activation_observer(input.detach().float())
            return super().forward(input, *geometry)
        if not host_int(self.calibrated):
            raise RuntimeError(
                f"{type(self).__name__} in mode {self.mode!r} has no activation range yet: run "
                "approxconv.calibrate(model, batches) first, or load a calibrated state_dict"
            )
        return self._integer_forward(input, *geometry).to(input.dtype)

    def has_observed(self) -> bool:
        """Whether a batch reached this layer since its observer was reset.

        Raises
        ------
        ValueError
            One did, with values that are not finite.
        """
        low, high = self.activation_observer.min_val, self.activation_observer.max_val
        if low > high:  # as initialised
            return False
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(
                f"batches drove a {type(self).__name__} with values from {low.item()} to {high.item()}; they must be "
                "finite"
            )
        return True

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turn the observed range into scale and zero point."""
        scale, zero_point = self.activation_observer.calculate_qparams()
        self.activation_scale.copy_(scale.view(()))
        self.activation_zero_point.copy_(zero_point.view(()))
        self.calibrated.fill_(True)
        self.quantized_weight()

    def quantized_weight(self) -> QuantizedWeight:
        """Codes, scales and zero points of the weight as it is now.

        Kept from one call to the next only in eval mode without gradients: fused optimizers and ``weight.data`` change
        a weight without raising its version.
        """
        state = None
        if not (self.training or torch.is_grad_enabled() or self.weight.is_inference()):
            state = (self.weight._version, self.weight.data_ptr())
        known = self._quantized
        if known is None or state is None or known[0] is not self.weight or known[1] != state:
            quantized = quantize_weight(self._filters(self.weight), self.weight_format)
            with torch.no_grad():
                self.weight_scale.copy_(quantized.scale)
                self.weight_zero_point.copy_(quantized.zero_point)
            known = self._quantized = (self.weight, state, quantized)
        return known[2]

    def operation_table(self) -> Tensor:
        """The table that the layer looks up in its mode: the multiplier's, or the exact one of its formats."""
        if self.mode == "approximate":
            return self.table
        formats = (self.activation_format, self.weight_format)
        exact = Multiplier.exact(tuple(f.bits for f in formats), *(f.signed for f in formats))
        return exact.on(self.table.device)

    def _filters(self, weight: Tensor) -> Tensor:
        """The weight ``(O, ...)``, output channels first, for the quantiser and the operator."""
        return weight

    def _integer_forward(self, input: Tensor, *geometry: Any) -> Tensor:
        """Quantise, look up and add, take the zero points out, rescale, add the bias.

        The layer supplies its operator: ``operand_shapes(input_shape)``, those of both operands and a convolution's
        geometry, ``_lookup(x_codes, w_codes, table, pad_code)`` to int32 sums,
        ``_code_sums(x_codes, zero_point)`` to the Σ_k xq behind each sum, ``_gradient(grad, x, w, needs)`` to the exact
        operator's ``(grad_x, grad_w)``, and `_channel_dim`, where the output channels lie, from the end.
        """
        real, weight = input.float(), self.quantized_weight()
        zero_point = host_int(self.activation_zero_point)
        codes = self.activation_format.quantize(real, self.activation_scale, self.activation_zero_point)
        table = self.operation_table()
        depth = weight.codes[0].numel()
        largest = max(prepare(table).magnitude, 2 ** (self.activation_format.bits + self.weight_format.bits))
        column = (-1, *[1] * (-self._channel_dim - 1))
        sums = remove_zero_points(
            self._lookup(codes, weight.codes, table, zero_point, *geometry),
            weight,
            zero_point,
            None if self.weight_format.signed else self._code_sums(codes, zero_point, *geometry),
            column,
            4 * depth * largest,
        )
        scale = (self.activation_scale * weight.scale).view(column)
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            x_format, w_format = self.activation_format, self.weight_format
            x = torch.fake_quantize_per_tensor_affine(
                real, self.activation_scale, self.activation_zero_point, x_format.low, x_format.high
            )
            w = torch.fake_quantize_per_channel_affine(
                self._filters(self.weight).float(), weight.scale, weight.zero_point, 0, w_format.low, w_format.high
            )
            output = _StraightThrough.apply(
                x, w, sums, scale, codes, self.activation_scale.clone(), zero_point, self._gradient
            )
        else:
            output = _rescaled(sums, scale)
        return output if self.bias is None else output + self.bias.float().view(column)

    def train(self, mode: bool = True) -> ApproxLayer:
        """As in torch. Weights changed in eval mode behind autograd's back (``weight.data``) are seen from here on."""
        self._quantized = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ApproxLayer:
        observer = self.activation_observer._buffers
        kept = [(self._buffers, name, self._buffers[name]) for name in _SCALES]
        kept += [(observer, name, value) for name, value in observer.items() if value.is_floating_point()]
        super()._apply(fn, recurse)
        for buffers, name, value in kept:  # half() is about weights; an 11-bit scale would shift every code
            if buffers[name].dtype != value.dtype:
                buffers[name] = value.to(buffers[name].device)
        self._quantized = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_quantized": None}

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.weight.is_meta:
            self.quantized_weight()  # the scales that are saved are those of the weights that are saved
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = args[-1]
        signed, table = state_dict.get(f"{prefix}operands_signed"), state_dict.get(f"{prefix}table")
        own = [self.activation_format.signed, self.weight_format.signed]
        if signed is not None and signed.tolist() != own:
            errors.append(
                f"{prefix}table: saved with (activation, weight) signed = {signed.tolist()}, this layer has {own}"
            )
            return
        loads = table is not None and table.shape == self.table.shape
        if loads and (self.table.is_meta or not torch.equal(table, self.table.to(table))):
            self.multiplier_name = ""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._quantized = None

    def extra_repr(self) -> str:
        """The torch layer's, then multiplier, mode and engine."""
        name = self.multiplier_name or "custom"
        return f"{super().extra_repr()}, multiplier={name}, mode={self.mode}, engine={self.engine}"


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that keeps torch's fused inference paths, which read `weight` and skip modules without hooks, away."""


def _rescaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Integer sums as real numbers, a new tensor."""
    return sums.float().mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """The looked-up output forward; backward as if the fake-quantised operands had been multiplied exactly."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        sums: Tensor,
        output_scale: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: int,
        gradient: Callable[..., tuple[Tensor | None, Tensor | None]],
    ) -> Tensor:
        # The codes stand for x: a byte an element instead of a float.
        save_operands(ctx, codes, w)
        ctx.scale, ctx.zero_point, ctx.gradient = scale, zero_point, gradient
        return _rescaled(sums, output_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = saved_operands(ctx, grad)
        needs = wanted(ctx)
        if needs[1]:
            x = x.to(ctx.scale.dtype).sub_(ctx.zero_point).mul_(ctx.scale)
        return *ctx.gradient(grad, x, w, needs), None, None, None, None, None, None
