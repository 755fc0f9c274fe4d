"""What all approximate layers share: modes, quantisation state, the integer path and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._versioned import once_per_version
from ..engines import check_engine
from ..gradients import GradientTables, GradientTerms, check_gradient, gradient_tables, lut_gradients, noise
from ..multiplier import Multiplier, check_table_shape, prepare
from ..operators.straight_through import or_placeholder
from ..quantization import (
    OperandFormat,
    Quantization,
    QuantizedWeight,
    activation_observer,
    observed_scale,
    positive,
    quantize_bias,
    quantize_weight,
    remove_zero_points,
    weight_scale,
)
from ..zoo import get_multiplier
from .replacement import Replacement

MODES = ("float", "quantized", "approximate", "noise")
_SCALES = ("activation_scale", "weight_scale")
_FORMAT_VERSION = 2  # of a layer's part of a state_dict; 1 had no noise_factor and no learned scales


@once_per_version
def host_int(tensor: Tensor) -> int:
    """A scalar buffer's value, read back from its device once per version."""
    return int(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A parameter that `torch.distributed.fsdp.fully_shard` has sharded, outside a forward pass; a collective then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_transformed() -> bool:
    """Whether a torch.func transform runs this."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether torch.compile, torch.export or a torch.func transform runs this: values stay unread, nothing is kept."""
    return torch.compiler.is_compiling() or is_transformed()


def is_recomputed() -> bool:
    """Whether a backward pass runs this, as activation checkpointing does with forward passes that it had before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_require_grad(*tensors: Tensor) -> bool:
    """Whether any of them requires a gradient; torch.compile hides that from code inside torch.func.grad."""
    return torch.compiler.is_compiling() or any(tensor.requires_grad for tensor in tensors)


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


class ApproxLayer(Replacement):
    """Mixin placed before a torch layer with `weight` and `bias`; adds modes and the integer path.

    ``mode`` is one of

    - ``"float"``: the torch layer itself,
    - ``"quantized"``: operands quantised, products exact,
    - ``"approximate"``: operands quantised, products from the multiplier's table,
    - ``"noise"``: as quantized, plus Gaussian noise of the multiplier's mean and variance times the parameter
      ``noise_factor``, which is there once the mode is set (`approxconv.gradients.noise`).

    All but the first are one path with two tables: look up and add in int32, take the zero points out exactly, rescale
    once. torch.compile, torch.export and torch.func trace it: it then reads no value and writes to no buffer, but for
    ranges that move (``Quantization(freeze=False)``).

    Buffers: ``table`` int32 ``(2**a_bits, 2**w_bits)``, ``operands_signed`` bool ``(2,)``, ``activation_scale`` float32
    and ``activation_zero_point`` int32 scalars, ``weight_scale`` float32 and ``weight_zero_point`` int32 ``(O,)``, or
    ``(1,)`` per tensor, ``calibrated`` bool. Weight scales follow the weights; activation scales are set by
    `approxconv.calibrate`. A scale that is learned (range ``"lsq"``) is a parameter of the same name instead.

    Parameters
    ----------
    *args, **kwargs
        The torch layer's.
    multiplier : Multiplier or str
        The multiplier, or its name for `approxconv.get_multiplier`.
    quantization : Quantization, optional
        How operands and bias are quantised; by default as the multiplier's operand formats suggest.
    gradient : str or GradientTables
        What stands for the table's derivative in mode ``"approximate"``: ``"ste"``, the exact product's; ``"lre"``,
        ``"smooth"`` or tables of your own, see `approxconv.gradients.gradient_tables`. Other modes have the exact one.
    mode : str
        ``"float"``, ``"quantized"``, ``"approximate"`` or ``"noise"``.
    engine : str
        ``"auto"`` follows `approxconv.use_engine`, then the device; else the engine's name.

    Raises
    ------
    ValueError
        No such mode, engine, gradient or multiplier, or a quantisation that does not fit the multiplier's operands.
    """

    weight: Tensor | None
    bias: Tensor | None
    _channel_dim: int
    _activations: tuple[str, ...] = ("activation",)
    _version = _FORMAT_VERSION

    def _restore(self, layer: nn.Module) -> None:
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _no_op]:
            del hooks[key]
        layer._parameters.pop("noise_factor", None)

    def _init_approx(
        self,
        multiplier: Multiplier | str,
        mode: str,
        engine: str,
        quantization: Quantization | None = None,
        gradient: str | GradientTables = "ste",
    ) -> None:
        multiplier = as_multiplier(multiplier)
        quantization = Quantization() if quantization is None else quantization
        if not isinstance(quantization, Quantization):
            raise ValueError(f"quantization must be a Quantization or None, got {type(quantization).__name__}")
        formats = quantization.formats(multiplier.bits, multiplier.a_signed, multiplier.w_signed)
        self._mode, self.engine = check_mode(mode), engine
        self._gradient_kind = _fitting(gradient, multiplier)
        self.observing = False
        self.quantization = quantization
        self.multiplier_name, self.multiplier_info = multiplier.name, multiplier.info
        self.activation_format, self.weight_format = formats
        self._quantized: tuple[Tensor, tuple[int, ...] | None, QuantizedWeight] | None = None
        device = torch.get_default_device() if self.weight is None else self.weight.device
        # A copy: load_state_dict writes into it, and the multiplier belongs to its user.
        self.register_buffer("table", multiplier.table.to(device, copy=True))
        signed = torch.tensor([multiplier.a_signed, multiplier.w_signed], device=device)
        self.register_buffer("operands_signed", signed)
        self._register_operands(device)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=device))
        self.register_forward_pre_hook(_no_op)
        self._derive()

    def _register_operands(self, device: torch.device) -> None:
        """Make scales, zero points and observers."""
        for name in self._activations:
            scale = torch.ones((), dtype=torch.float32, device=device)
            if self.quantization.activation.range == "lsq":
                self.register_parameter(f"{name}_scale", nn.Parameter(scale.view(1)))
            else:
                self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_zero_point", torch.zeros((), dtype=torch.int32, device=device))
            self._register_observer(name, device)
        if self.weight is None:
            return
        channels = len(self._filters(self.weight)) if self.quantization.weight.granularity == "per_channel" else 1
        scale = torch.ones(channels, dtype=torch.float32, device=device)
        if self.quantization.weight.range == "lsq":
            self.weight_scale = nn.Parameter(scale)
        else:
            self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int32, device=device))
        self._start_weight_scale()

    def _register_observer(self, name: str, device: torch.device) -> None:
        observer = activation_observer(self.quantization.activation, getattr(self, f"{name}_format"))
        self.register_module(f"{name}_observer", observer.to(device).train(self.training))

    @torch.no_grad()
    def _start_weight_scale(self) -> None:
        """The first scale of a weight whose scale is learned."""
        if self.quantization.weight.range == "lsq" and self.weight is not None and not self.weight.is_meta:
            scales = weight_scale(self._filters(whole(self.weight)), self.weight_format, self.quantization.weight)
            self.weight_scale.copy_(scales[0])
            self.weight_zero_point.copy_(scales[1])

    def _derive(self) -> None:
        """What modes need of the tables, made where nothing is traced."""
        if self.mode == "noise" and "noise_factor" not in self._parameters:
            self.register_parameter("noise_factor", nn.Parameter(torch.ones(1, device=self.table.device)))
        self._exact: Tensor | None = None
        self._terms: GradientTerms | None = None
        self._error = 0.0, 0.0
        if self.table.is_meta:
            return
        bits = check_table_shape(self.table)
        signs = self.activation_format.signed, self.weight_format.signed
        self._exact = Multiplier.exact(bits, *signs).on(self.table.device)
        if self._gradient_kind != "ste":
            self._terms = gradient_tables(self.multiplier, self._gradient_kind).terms.to(self.table.device)
        if self.mode == "noise":
            figures = self.multiplier.metrics()
            self._error = figures["bias"], max(figures["variance"], 0.0)

    @property
    def mode(self) -> str:
        """``"float"``, ``"quantized"``, ``"approximate"`` or ``"noise"``; setting another one is a ValueError."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = check_mode(mode)
        if mode == "noise":
            with torch.inference_mode(False):
                self._derive()

    @property
    def engine(self) -> str:
        """``"auto"`` or the name of an engine; setting another one is a ValueError."""
        return self._engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self._engine = check_engine(engine)

    @property
    def gradient(self) -> str | GradientTables:
        """``"ste"``, ``"lre"``, ``"smooth"`` or tables that fit the multiplier's; setting another is a ValueError."""
        return self._gradient_kind

    @gradient.setter
    def gradient(self, gradient: str | GradientTables) -> None:
        self._gradient_kind = _fitting(gradient, self.multiplier)
        self._derive()

    @property
    def multiplier(self) -> Multiplier:
        """The multiplier this layer's table holds."""
        return Multiplier(
            self.table,
            a_signed=self.activation_format.signed,
            w_signed=self.weight_format.signed,
            name=self.multiplier_name,
            info=self.multiplier_info,
        )

    def check_multiplier(self, multiplier: Multiplier) -> tuple[OperandFormat, OperandFormat]:
        """The operand formats that `set_multiplier` would give the layer, or its ValueError."""
        _fitting(self._gradient_kind, multiplier)
        return self.quantization.formats(multiplier.bits, multiplier.a_signed, multiplier.w_signed)

    @torch.inference_mode(False)  # what it makes outlives evaluation
    def set_multiplier(self, multiplier: Multiplier | str) -> None:
        """Look up in another table from now on; weights stay what and where they are.

        One of the same operand formats keeps all scales. One of others is quantised for anew: activation ranges are
        those that were observed, without which the layer needs `approxconv.calibrate` again; learned scales start anew.

        Raises
        ------
        ValueError
            No such multiplier, or one whose operands the layer's quantisation or gradient tables do not fit; nothing
            has changed.
        """
        multiplier = as_multiplier(multiplier)
        formats = self.check_multiplier(multiplier)
        device, same = self.table.device, check_table_shape(self.table) == multiplier.bits
        same = same and formats == (self.activation_format, self.weight_format)
        self.table = multiplier.table.to(device, copy=True)
        self.multiplier_name, self.multiplier_info = multiplier.name, multiplier.info
        if not same:
            self.activation_format, self.weight_format = formats
            self.operands_signed = torch.tensor([multiplier.a_signed, multiplier.w_signed], device=device)
            for name in self._activations:
                observed = getattr(self, f"{name}_observer").state_dict()
                self._register_observer(name, device)
                getattr(self, f"{name}_observer").load_state_dict(observed)
            self._quantized = None
            if self.has_observed():
                self.finish_calibration()
            else:
                self.calibrated.fill_(False)
                self._start_weight_scale()
        self._derive()

    def forward(self, input: Tensor, *geometry: Any) -> Tensor:
        """Apply the layer in its mode; shapes as the torch layer's.

        Raises
        ------
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        if self.mode == "float":
            if self.observing:
                self.activation_observer(input.detach().float())
            return super().forward(input, *geometry)
        self._check_calibrated()
        return self._integer_forward(input, *geometry).to(input.dtype)

    def _check_calibrated(self) -> None:
        if self._moves():
            return
        advice = (
            f"{type(self).__name__} in mode {self.mode!r} has no activation range yet: run "
            "approxconv.calibrate(model, batches) first, or load a calibrated state_dict"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(self.calibrated, advice)
        elif not host_int(self.calibrated):
            raise RuntimeError(advice)

    def _moves(self) -> bool:
        """Whether activation ranges move with this forward pass."""
        moving = self.training and not self.quantization.freeze and self.quantization.activation.range != "lsq"
        return moving and not is_recomputed()

    def synchronize_observers(self) -> None:
        """Join what was observed with all ranks of `torch.distributed`; every rank must come here."""
        for name in self._activations:
            getattr(self, f"{name}_observer").synchronize()

    def has_observed(self) -> bool:
        """Whether a batch reached this layer since its observer was reset.

        Raises
        ------
        ValueError
            One did, with values that are not finite.
        """
        for name in self._activations:
            observer = getattr(self, f"{name}_observer")
            low, high = observer.min_val, observer.max_val
            if low > high:  # as initialised
                return False
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(
                    f"batches drove a {type(self).__name__} with values from {low.item()} to {high.item()}; they must "
                    "be finite"
                )
        return True

    def start_calibration(self) -> None:
        """Forget what was observed; observe what comes in mode ``"float"`` while `observing` is True."""
        for name in self._activations:
            getattr(self, f"{name}_observer").reset_min_max_vals()
        self.observing = True

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turn the observed ranges into scales and zero points; learned weight scales start anew."""
        self.observing = False
        for name in self._activations:
            self._set_scale(name)
        self.calibrated.fill_(True)
        if self.weight is not None:
            self._start_weight_scale()
            self.quantized_weight()

    @torch.no_grad()
    def _move_range(self, name: str, real: Tensor) -> None:
        """Let a range follow a training batch, joint over all ranks."""
        observer = getattr(self, f"{name}_observer")
        observer(real)
        observer.synchronize()
        self._set_scale(name)
        self.calibrated.copy_(observer.min_val <= observer.max_val)  # unless all batches were empty

    def _set_scale(self, name: str) -> None:
        observer, operand = getattr(self, f"{name}_observer"), getattr(self, f"{name}_format")
        scale, zero_point = observed_scale(observer, self.quantization.activation, operand)
        getattr(self, f"{name}_scale").copy_(scale)
        getattr(self, f"{name}_zero_point").copy_(zero_point)

    def quantized_weight(self) -> QuantizedWeight:
        """Codes, scales and zero points of the weight as it is now.

        Kept from one call to the next only in eval mode without gradients: fused optimizers and ``weight.data`` change
        a weight without raising its version.
        """
        if is_traced():
            return self._quantize_weight()
        state = None
        if not (self.training or torch.is_grad_enabled() or self.weight.is_inference()):
            state = (self.weight._version, self.weight.data_ptr(), self.weight_scale._version)
        known = self._quantized
        if known is None or state is None or known[1] != state:
            quantized = self._quantize_weight()
            if not self._learns("weight"):
                with torch.no_grad():
                    for name in ("scale", "zero_point"):
                        buffer = getattr(self, f"weight_{name}")
                        buffer.copy_(getattr(quantized, name)[: len(buffer)])
            if state is not None:
                state = (*state[:2], self.weight_scale._version)
            known = self._quantized = (self.weight.detach(), state, quantized)  # while it is kept, its address is its
        return known[2]

    def _quantize_weight(self) -> QuantizedWeight:
        learned = (positive(whole(self.weight_scale)), self.weight_zero_point) if self._learns("weight") else None
        return quantize_weight(self._filters(whole(self.weight)), self.weight_format, self.quantization.weight, learned)

    def _learns(self, name: str) -> bool:
        """Whether the scale of an operand is a parameter."""
        return f"{name}_scale" in self._parameters

    def _filters(self, weight: Tensor) -> Tensor:
        """The weight as ``(O, ...)``, output channels first, which is what is quantised and looked up."""
        return weight

    def operation_table(self) -> Tensor:
        """The table that the layer looks up in its mode: the multiplier's, or the exact one of its formats."""
        if self.mode == "approximate":
            return self.table
        if self._exact is None or self._exact.device != self.table.device:
            self._derive()
        return self._exact

    def _integer_forward(self, input: Tensor, *geometry: Any) -> Tensor:
        """Quantise, look up and add, take the zero points out, rescale, add the bias.

        The layer supplies its operator: ``operand_shapes(input_shape)``, those of both operands and a convolution's
        geometry, ``_lookup(x_codes, w_codes, table, pad_code)`` to int32 sums,
        ``_code_sums(x_codes, zero_point)`` to the Σ_k xq behind each sum, ``_gradient(grad, x, w, needs)`` to the exact
        operator's ``(grad_x, grad_w)``, and `_channel_dim`, where the output channels lie, from the end. Where the
        layer is traced, `pad_code` and `zero_point` may be a scalar integer tensor, as of `pad_codes`.
        """
        real, weight = input.float(), self.quantized_weight()
        codes, sx, zx, zero_point = self._quantize_activation("activation", real)
        table = self.operation_table()
        depth = weight.codes[0].numel()
        column = (-1, *[1] * (-self._channel_dim - 1))
        sums = remove_zero_points(
            self._lookup(codes, weight.codes, table, zero_point, *geometry),
            weight,
            zero_point,
            None if self.weight_format.symmetric else self._code_sums(codes, zero_point, *geometry),
            column,
            4 * sum_bound(table, depth),
        )
        scale = (sx * weight.scale).view(column)
        bias = None if self.bias is None else self.bias.float().view(column)
        if bias is not None and self.quantization.bias_bits is not None:
            sums = sums + quantize_bias(bias, scale)
            bias = bias - bias.detach()  # 0, with the gradient
        output = self._rescaled((real, None), sums, scale, codes, weight, sx, zx, depth, *geometry)
        return output if bias is None else output + bias

    def _rescaled(
        self,
        operands: tuple[Tensor, Tensor | None],
        sums: Tensor,
        scale: Tensor,
        codes: Tensor,
        weight: QuantizedWeight,
        sx: Tensor,
        zx: Tensor,
        depth: int,
        *geometry: Any,
    ) -> Tensor:
        """The sums as real numbers, with a gradient if one may be asked for, and with the noise of its mode.

        `operands` are those before they were quantised, in place of the second None for the layer's weight.
        """
        real, other = operands
        inputs = (real, *self._operands()) if other is None else (real, other, *self._operands())
        if torch.is_grad_enabled() and may_require_grad(*inputs):
            other = self._filters(self.weight).float() if other is None else other
            output = self._recorded(real, other, sums, scale, codes, weight, sx, zx)
        else:
            output = rescaled(sums, scale)
        if self.mode == "noise":
            fan_in = self._fan_in(depth, real.shape, *geometry)
            output = output + noise(output, fan_in, *self._error, scale, self.noise_factor)
        return output

    def _quantize_activation(self, name: str, real: Tensor) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
        """Codes, scale, zero point, and the zero point as a number unless it may not be read."""
        if self._moves():
            self._move_range(name, real)
        operand = getattr(self, f"{name}_format")
        scale, zero_point = getattr(self, f"{name}_scale").detach().reshape(()), getattr(self, f"{name}_zero_point")
        if self._learns(name):
            scale = positive(scale)
        known = host_int(zero_point) if not is_traced() else 0 if operand.symmetric else zero_point
        return operand.quantize(real, scale, zero_point), scale, zero_point, known

    def _operands(self) -> list[Tensor]:
        """What the product depends on beside activations: the weight, and scales that are learned."""
        learned = [self._parameters[name] for name in self._scale_names() if name in self._parameters]
        return learned if self.weight is None else [self.weight, *learned]

    def _recorded(
        self,
        real: Tensor,
        filters: Tensor,
        sums: Tensor,
        scale: Tensor,
        codes: Tensor,
        weight: QuantizedWeight,
        sx: Tensor,
        zx: Tensor,
    ) -> Tensor:
        """The rescaled sums, with a gradient by way of the fake-quantised operands."""
        x = self._fake_quantized("activation", real, sx, zx)
        w = self._fake_quantized("weight", filters, weight.scale, weight.zero_point)
        needs, terms = (may_require_grad(x), may_require_grad(w)), self._terms
        sx, zx = sx.clone(), zx.clone()  # what is kept for the backward pass is the layer's own
        if terms is None or self.mode != "approximate":
            if is_transformed():
                return _TracedLookUp.apply(x, w, sums, scale, self._exact_gradient, x, w)
            # The codes stand for x: a byte an element instead of a float.
            rule, kept = self._straight_through, (codes if needs[1] else None, w.detach() if needs[0] else None, sx, zx)
        else:
            reads = terms.reads(needs)
            read = codes if reads[0] else None, weight.codes if reads[1] else None
            rule, kept = self._by_terms, (*read, sx, zx, weight.scale, weight.zero_point, *terms)
        function = _TracedLookUp if is_traced() else _LookUp
        return function.apply(x, w, sums, scale, rule, *kept)

    def _fake_quantized(self, name: str, real: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        operand = getattr(self, f"{name}_format")
        if self._learns(name):
            learned = getattr(self, f"{name}_scale")
            features = math.prod(real.shape[1:]) if name in self._activations else real.numel() // len(learned)
            return operand.fake_quantize_learned(real, learned, getattr(self, f"{name}_zero_point"), features)
        return operand.fake_quantize(real, scale, zero_point)

    def _exact_gradient(
        self, grad: Tensor, needs: tuple[bool, bool], shapes: tuple[torch.Size, torch.Size], x: Tensor, w: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The exact operator's gradients, to be differentiated again."""
        return self._gradient(grad, x, w, needs)

    def _straight_through(
        self,
        grad: Tensor,
        needs: tuple[bool, bool],
        shapes: tuple[torch.Size, torch.Size],
        codes: Tensor | None,
        w: Tensor | None,
        sx: Tensor,
        zx: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The exact operator's gradients, at the fake-quantised operands."""
        x = or_placeholder(None, shapes[0], grad) if codes is None else codes.to(sx.dtype).sub_(zx).mul_(sx)
        return self._gradient(grad, x, or_placeholder(w, shapes[1], grad), needs)

    def _by_terms(
        self,
        grad: Tensor,
        needs: tuple[bool, bool],
        shapes: tuple[torch.Size, torch.Size],
        x_codes: Tensor | None,
        w_codes: Tensor | None,
        sx: Tensor,
        zx: Tensor,
        sw: Tensor,
        zw: Tensor,
        *terms: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those by the slopes of the table."""
        column = (-1, *[1] * (len(shapes[1]) - 1))
        return lut_gradients(
            GradientTerms(*terms),
            grad,
            or_placeholder(x_codes, shapes[0], grad),
            or_placeholder(w_codes, shapes[1], grad),
            sx,
            zx,
            sw.view(column),
            zw.view(column),
            self._gradient,
            needs,
            lambda grad: self._grad_sums(grad, shapes),
        )

    def _fan_in(self, depth: int, shape: Sequence[int], *geometry: Any) -> int | Tensor:
        """How many products each sum has, of at most `depth`, for an input of some shape."""
        return depth

    def _grad_sums(self, grad: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
        """The sum of grad over all products of each weight, padded positions among them."""
        others = [dim for dim in range(grad.ndim) if dim != grad.ndim + self._channel_dim]
        return grad.sum(others).view(-1, *[1] * (len(shapes[1]) - 1))

    def train(self, mode: bool = True) -> ApproxLayer:
        """As in torch. Weights changed in eval mode behind autograd's back (``weight.data``) are seen from here on."""
        self._quantized = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ApproxLayer:
        stores = [self._buffers, self._parameters]
        stores += [getattr(self, f"{name}_observer")._buffers for name in self._activations]
        names = {*self._scale_names(), "noise_factor"}
        kept = [
            (store, name, value.dtype, value.detach())
            for store in stores
            for name, value in store.items()
            if value is not None and value.is_floating_point() and (store not in stores[:2] or name in names)
        ]
        super()._apply(fn, recurse)
        for store, name, dtype, value in kept:  # half() is about weights; an 11-bit scale would shift every code
            if store[name].dtype != dtype:
                value = value.to(store[name].device)
                if isinstance(store[name], nn.Parameter):
                    store[name].data = value
                else:
                    store[name] = value
        self._quantized = None
        self._derive()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_quantized": None, "_exact": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._derive()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.weight is not None and not self.weight.is_meta:
            self.quantized_weight()  # the scales that are saved are those of the weights that are saved
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # beside the version
            destination._metadata[prefix[:-1]]["codes"] = self._codes()

    def _codes(self) -> dict[str, list[int | str]]:
        """Of each operand: the first code in use, the last, and the scheme."""
        formats = {"activation": self.activation_format, "weight": self.weight_format}
        return {name: [f.low, f.high, "symmetric" if f.symmetric else "affine"] for name, f in formats.items()}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        errors = args[-1]
        version = local_metadata.get("version")
        if version is not None and version > _FORMAT_VERSION:
            errors.append(
                f"{prefix}table: saved in format {version} by a newer approxconv; this one reads up to "
                f"{_FORMAT_VERSION}"
            )
            return
        signed, table = state_dict.get(f"{prefix}operands_signed"), state_dict.get(f"{prefix}table")
        own = [self.activation_format.signed, self.weight_format.signed]
        if signed is not None and signed.tolist() != own:
            errors.append(
                f"{prefix}table: saved with (activation, weight) signed = {signed.tolist()}, this layer has {own}"
            )
            return
        codes = local_metadata.get("codes", self._codes())
        if codes != self._codes():
            errors.append(f"{prefix}table: saved with codes {codes}, this layer's quantization has {self._codes()}")
            return
        loads = table is not None and table.shape == self.table.shape
        if loads and (self.table.is_meta or not torch.equal(table, self.table.to(table))):
            self.multiplier_name, self.multiplier_info = "", {}
        for name in self._scale_names():  # a scale that is learned here may have been computed there, and vice versa
            saved, here = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if saved is not None and saved.numel() == here.numel():
                state_dict[f"{prefix}{name}"] = saved.view(here.shape)
        if f"{prefix}noise_factor" in state_dict and "noise_factor" not in self._parameters:
            self.register_parameter("noise_factor", nn.Parameter(torch.ones(1, device=self.table.device)))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._quantized = None
        self._derive()

    def _scale_names(self) -> list[str]:
        return [f"{name}_scale" for name in (*self._activations, "weight")]

    def extra_repr(self) -> str:
        """The torch layer's, then multiplier, mode, engine; quantisation and gradient if they are not the default."""
        parts = [super().extra_repr(), f"multiplier={self.multiplier_name or 'custom'}", f"mode={self.mode}"]
        parts.append(f"engine={self.engine}")
        if self.quantization != Quantization():
            parts.append(f"quantization={self.quantization}")
        if self.gradient != "ste":
            parts.append(f"gradient={self.gradient if isinstance(self.gradient, str) else 'custom'}")
        return ", ".join(filter(None, parts))


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that keeps torch's fused inference paths, which read `weight` and skip modules without hooks, away."""


def _fitting(gradient: str | GradientTables, multiplier: Multiplier) -> str | GradientTables:
    """Return `gradient` if there is such a one for the multiplier, else raise a ValueError."""
    if isinstance(check_gradient(gradient), GradientTables):
        gradient_tables(multiplier, gradient)
    return gradient


def sum_bound(table: Tensor, depth: int) -> int:
    """The most that so many products, looked up or exact, add up to; 2³¹ where the table cannot be read."""
    return 2**31 if is_traced() else depth * max(prepare(table).magnitude, table.numel())


def rescaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Integer sums as real numbers, a new tensor."""
    return sums.float().mul_(scale)


class _TracedLookUp(torch.autograd.Function):
    """The looked-up output forward; backward by a rule, as if the fake-quantised operands had been multiplied.

    ``rule(grad, needs, shapes, *kept)`` returns the gradients of x and w.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, sums: Tensor, scale: Tensor, rule: Callable[..., Any], *kept: Tensor | None
    ) -> Tensor:
        return rescaled(sums, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, _, ctx.rule, *kept = inputs
        ctx.shapes = x.shape, w.shape
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        return *ctx.rule(grad, needs, ctx.shapes, *kept), None, None, None, *[None] * len(kept)


class _LookUp(_TracedLookUp):
    """The same with what is kept no function of x and w, so that it refuses to be differentiated twice.

    torch.compile refuses that itself.
    """

    backward = staticmethod(once_differentiable(_TracedLookUp.backward))
