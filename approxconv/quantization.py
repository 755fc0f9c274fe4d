"""How real numbers become operand codes: schemes, ranges, scales, and the sums that take zero points out again.

A value is ``real = scale · (q − zero_point)``. Unless `Quantization` says otherwise, the multiplier's operand format
decides: a signed operand is quantised symmetrically (zero point 0), an unsigned one affinely, activations with one
scale a tensor, weights with one an output channel, over all values seen.

Activation ranges are observed by `torch.ao.quantization`'s observers, and training goes through torch's fake
quantisation operators: every supported torch ships them (2.6 to 2.13), so they are no further dependency. Their
announced successor torchao follows one or two torch versions with each release, prints which of its extensions do not
load beside others (0.18 beside torch 2.13 does), and has no observer of histograms. Scales follow the formula of
torch's observers, in functional form, so that they can be traced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

from .multiplier import MIN_BITS, operand_range

SCHEMES = ("symmetric", "affine")
GRANULARITIES = ("per_tensor", "per_channel")
ACTIVATION_RANGES = ("minmax", "moving_average", "histogram", "mse", "percentile", "lsq")
WEIGHT_RANGES = ("minmax", "mse", "percentile", "lsq")
MOVING_RANGES = ("minmax", "moving_average", "lsq")
_LEAST_SCALE = torch.finfo(torch.float32).eps  # as torch's observers
_SHRINKAGES = 100


def positive(scale: Tensor) -> Tensor:
    """A learned scale, at least the smallest that an observer gives."""
    return scale.clamp(min=_LEAST_SCALE)


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


class _FakeQuantize(torch.autograd.Function):
    """`torch.fake_quantize_per_tensor_affine` of elementary operations."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        steps = torch.round(real * scale.reciprocal()) + zero_point
        codes = steps.clamp(low, high)
        ctx.save_for_backward(codes == steps)
        return (codes - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None, None, None


@dataclass(frozen=True)
class OperandFormat:
    """Codes of one operand: how many bits of them are in use, how they are read, and where zero lies.

    Parameters
    ----------
    bits : int
        In use; at most the multiplier's.
    signed : bool
        Whether the multiplier reads the code as two's complement.
    scheme : str, optional
        ``"symmetric"`` (zero point 0) or ``"affine"``; by default the former for signed operands.
    narrow_range : bool
        Leave out the smallest value of a signed operand, which has no opposite.
    """

    bits: int
    signed: bool
    scheme: str | None = None
    narrow_range: bool = False

    @property
    def low(self) -> int:
        """Smallest value."""
        return operand_range(self.bits, self.signed)[0] + self.narrow_range

    @property
    def high(self) -> int:
        """Largest value."""
        return operand_range(self.bits, self.signed)[1]

    @property
    def dtype(self) -> torch.dtype:
        """The byte type that holds its codes."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is always 0."""
        return self.signed if self.scheme is None else self.scheme == "symmetric"

    def scale_and_zero_point(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Cover the real numbers from `low` to `high`, and zero.

        Affine: ``scale = (high − low) / (q_high − q_low)``, ``zero_point = q_low − round(low / scale)``; symmetric:
        ``scale = 2·max(−low, high) / (q_high − q_low)``, ``zero_point = 0``. Bit for bit what torch's observers make of
        a range.

        Parameters
        ----------
        low, high : Tensor
            Of one shape: a scalar, or one a channel.

        Returns
        -------
        tuple of Tensor
            float32 scale and int32 zero point.
        """
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / (float(self.high - self.low) / 2)
            return scale.clamp(min=_LEAST_SCALE), torch.zeros_like(scale, dtype=torch.int32)
        scale = ((high - low) / float(self.high - self.low)).clamp(min=_LEAST_SCALE)
        return scale, (self.low - torch.round(low / scale).int()).clamp(self.low, self.high)

    def step_size(self, magnitude: Tensor, zero_point: Tensor) -> Tensor:
        """LSQ's first scale, ``2·⟨|v|⟩ / √Q_P`` (Esser et al., "Learned Step Size Quantization", ICLR 2020).

        Parameters
        ----------
        magnitude : Tensor
            ⟨|v|⟩, the mean absolute value.
        zero_point : Tensor
            Of the same shape; Q_P is the distance from it to the largest code (or to the smallest, if that is further).
        """
        steps = torch.maximum(self.high - zero_point, zero_point - self.low)
        return (2 * magnitude.float() / steps.float().sqrt()).clamp(min=_LEAST_SCALE)

    def quantize(self, real: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``clamp(round(real / scale) + zero_point, low, high)`` as uint8 or int8 codes.

        Bit for bit the codes behind `torch.fake_quantize_per_tensor_affine`, which multiplies by the reciprocal and
        makes NaN the lowest one.
        """
        shifted = (real.detach() * scale.detach().reciprocal()).round_().add_(zero_point)
        shifted.nan_to_num_(nan=self.low, posinf=self.high, neginf=self.low)
        return shifted.clamp_(self.low, self.high).to(self.dtype)

    def fake_quantize(self, real: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``scale · (code − zero_point)``; the gradient passes where nothing was clipped.

        Parameters
        ----------
        real : Tensor
            float32.
        scale, zero_point : Tensor
            One value, or one for each index of dimension 0.
        """
        if torch.compiler.is_compiling():  # torch's operators cannot be traced for sizes that vary
            column = (-1, *[1] * (real.ndim - 1)) if scale.numel() > 1 else ()
            return _FakeQuantize.apply(real, scale.reshape(column), zero_point.reshape(column), self.low, self.high)
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(
                real, scale.reshape(()), zero_point.reshape(()), self.low, self.high
            )
        return torch.fake_quantize_per_channel_affine(real, scale, zero_point, 0, self.low, self.high)

    def fake_quantize_learned(self, real: Tensor, scale: Tensor, zero_point: Tensor, features: int) -> Tensor:
        """`fake_quantize` with LSQ's gradient for the scale too.

        ``∂v̂/∂s = round(v/s) − v/s`` inside the range, the end's distance from the zero point outside, times
        ``1/√(N·Q_P)`` (Esser et al. 2020, eq. 3 and section 2.2): the derivative of ``s · fake_quantize(v/s)``. Torch's
        own operator for it cannot be traced for channels.

        Parameters
        ----------
        features : int
            N: the weights that share a scale, or the activations of one sample.
        """
        gain = 1 / math.sqrt(max(features * self.high, 1))
        slowed = scale * gain
        slowed = slowed + (positive(scale) - slowed).detach()
        column = slowed.reshape(-1, *[1] * (real.ndim - 1)) if slowed.numel() > 1 else slowed.reshape(())
        ones = torch.ones_like(scale, requires_grad=False)
        return self.fake_quantize(real * column.reciprocal(), ones, zero_point) * column


@dataclass(frozen=True)
class OperandQuantization:
    """How one operand is quantised.

    Parameters
    ----------
    scheme : str, optional
        ``"symmetric"`` (zero point 0) or ``"affine"``; by default what the multiplier's operand format suggests:
        symmetric if it is signed, else affine.
    granularity : str, optional
        ``"per_tensor"`` or, for weights, ``"per_channel"``: one scale an output channel, the default there.
    bits : int, optional
        2 to the multiplier's width, the default. Fewer are codes of a sub-range.
    narrow_range : bool
        Leave out the smallest code of a signed operand: −127 to 127. The largest value of a symmetric range has a code
        then; else, as with torch's observers, it rounds to one code more than there are, is clipped and gets no
        gradient.
    range : str
        ``"minmax"``; ``"moving_average"`` of the batches' extremes (activations); ``"histogram"``, torch's search for
        the least squared error (activations); ``"mse"``, of 100 evenly shrunk min-max ranges that of the least squared
        error; ``"percentile"``; or ``"lsq"``, a scale that is a parameter (Esser et al. 2020). All but the last take a
        weight's range from the weight as it is, whenever it is used.
    percentile : float
        Of range ``"percentile"``: how many percent of the values lie within, half of the rest beyond each end.
    momentum : float
        Of range ``"moving_average"``: the weight of a new batch.

    Raises
    ------
    ValueError
        A value outside what is listed.
    """

    scheme: str | None = None
    granularity: str | None = None
    bits: int | None = None
    narrow_range: bool = False
    range: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.01

    def __post_init__(self) -> None:
        _choice("scheme", self.scheme, (None, *SCHEMES))
        _choice("granularity", self.granularity, (None, *GRANULARITIES))
        _choice("range", self.range, ACTIVATION_RANGES)
        if self.bits is not None and (isinstance(self.bits, bool) or not isinstance(self.bits, int)):
            raise ValueError(f"bits must be an int or None, got {self.bits!r}")
        if not isinstance(self.narrow_range, bool):
            raise ValueError(f"narrow_range must be True or False, got {self.narrow_range!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile!r}")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {self.momentum!r}")

    def operand_format(self, name: str, bits: int, signed: bool) -> OperandFormat:
        """The codes in use of a multiplier's operand.

        Parameters
        ----------
        name : str
            Of the operand, for messages.
        bits, signed
            The multiplier's.

        Raises
        ------
        ValueError
            The operand cannot hold such codes; the message says what fits.
        """
        kind = f"{'a signed' if signed else 'an unsigned'} {bits}-bit operand"
        if self.bits is not None and not MIN_BITS <= self.bits <= bits:
            raise ValueError(f"{name} bits must be {MIN_BITS} to {bits}, the multiplier's, got {self.bits}")
        if self.scheme == "symmetric" and not signed:
            raise ValueError(
                f"{name} scheme 'symmetric' needs negative codes and the multiplier has {kind}; 'affine' fits"
            )
        if self.narrow_range and not signed:
            raise ValueError(
                f"{name} narrow_range leaves out the smallest code of a signed operand and the multiplier has {kind}; "
                "narrow_range=False fits"
            )
        return OperandFormat(bits if self.bits is None else self.bits, signed, self.scheme, self.narrow_range)


@dataclass(frozen=True)
class Quantization:
    """How a layer's operands and bias are quantised; what is left out is chosen from the multiplier's operand formats.

    Parameters
    ----------
    activation, weight : OperandQuantization
        Of the layer's input and its weight.
    freeze : bool
        True: activation ranges stay as `approxconv.calibrate` found them. False: those by ``"minmax"`` and
        ``"moving_average"`` move on with every forward pass in training mode, over all ranks of `torch.distributed`,
        and need no calibration. A pass that activation checkpointing runs again moves nothing.
    bias_bits : int, optional
        32: the bias is rounded to an int32 of scale ``sx·sw`` and added to the integer sums, as hardware does. None: it
        is added in floating point.

    Raises
    ------
    ValueError
        A pair that does not go together; the message says what fits.

    Examples
    --------
    >>> from approxconv.quantization import OperandQuantization, Quantization
    >>> Quantization(activation=OperandQuantization(range="percentile"), weight=OperandQuantization(bits=4))
    """

    activation: OperandQuantization = field(default_factory=OperandQuantization)
    weight: OperandQuantization = field(default_factory=OperandQuantization)
    freeze: bool = True
    bias_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            operand = getattr(self, name)
            if not isinstance(operand, OperandQuantization):
                raise ValueError(f"{name} must be an OperandQuantization, got {type(operand).__name__}")
            if operand.granularity is None:
                usual = "per_tensor" if name == "activation" else "per_channel"
                object.__setattr__(self, name, replace(operand, granularity=usual))
        if not isinstance(self.freeze, bool):
            raise ValueError(f"freeze must be True or False, got {self.freeze!r}")
        _choice("bias_bits", self.bias_bits, (None, 32))
        if self.activation.granularity == "per_channel":
            raise ValueError(
                "activation granularity 'per_channel' would need a scale for each product of a sum; 'per_tensor' fits"
            )
        _choice("weight range", self.weight.range, WEIGHT_RANGES)
        if not self.freeze and self.activation.range not in MOVING_RANGES:
            raise ValueError(
                f"activation range {self.activation.range!r} is found by calibration and cannot move in training "
                f"(freeze=False); {', '.join(map(repr, MOVING_RANGES))} fit"
            )

    def formats(self, bits: tuple[int, int], a_signed: bool, w_signed: bool) -> tuple[OperandFormat, OperandFormat]:
        """Codes in use of a multiplier's activation and weight operand.

        Raises
        ------
        ValueError
            An operand cannot hold what is asked for; the message says what fits.
        """
        if w_signed and self.weight.scheme == "affine":
            raise ValueError(
                f"weight scheme 'affine' needs an unsigned operand and the multiplier has a signed {bits[1]}-bit one; "
                "'symmetric' fits"
            )
        return (
            self.activation.operand_format("activation", bits[0], a_signed),
            self.weight.operand_format("weight", bits[1], w_signed),
        )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def joint_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range over all ranks of `torch.distributed`'s default group, in one all-reduce."""
    if _ranks() == 1:
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


class RangeObserver(MinMaxObserver):
    """Extremes of all batches."""

    def synchronize(self) -> None:
        """Make the state that of all ranks' batches."""
        low, high = joint_range(self.min_val, self.max_val)
        self.min_val.copy_(low)
        self.max_val.copy_(high)


class MovingRangeObserver(MovingAverageMinMaxObserver):
    """Moving averages of the extremes of a batch, joint over the ranks; torch's, without a branch on values."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe a batch. Every rank must observe as many."""
        if x_orig.numel() == 0:
            low, high = self.min_val.new_tensor(torch.inf), self.min_val.new_tensor(-torch.inf)
        else:
            low, high = torch.aminmax(x_orig.detach().to(self.min_val.dtype))
        low, high = joint_range(low, high)
        for state, now in ((self.min_val, low), (self.max_val, high)):
            moved = torch.where(torch.isinf(state), now, state + self.averaging_constant * (now - state))
            state.copy_(torch.where(low > high, state, moved))
        return x_orig

    def synchronize(self) -> None:
        """Nothing is left to do."""


class MagnitudeObserver(RangeObserver):
    """Extremes and mean absolute value of all batches."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.register_buffer("magnitude", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe a batch."""
        self.magnitude.add_(x_orig.detach().abs().sum())
        self.count.add_(x_orig.numel())
        return super().forward(x_orig)

    def reset_min_max_vals(self) -> None:
        """Forget all batches."""
        super().reset_min_max_vals()
        self.magnitude.zero_()
        self.count.zero_()

    def synchronize(self) -> None:
        """Make the state that of all ranks' batches."""
        super().synchronize()
        if _ranks() > 1:
            for total in (self.magnitude, self.count):
                dist.all_reduce(total)


class HistogramRangeObserver(HistogramObserver):
    """Histogram of all batches."""

    def __init__(self, quant_min: int, quant_max: int, **kwargs: object) -> None:
        super().__init__(quant_min=quant_min, quant_max=quant_max, **kwargs)
        self.dst_nbins = quant_max - quant_min + 1  # torch searches for all 8 bits else

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe a batch; a ValueError if it is not finite."""
        if not torch.isfinite(x_orig).all():
            low, high = x_orig.min().item(), x_orig.max().item()
            raise ValueError(f"values must be finite for a histogram, got {low} to {high}")
        return super().forward(x_orig)

    def reset_min_max_vals(self) -> None:
        """Forget all batches."""
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)
        self.histogram.zero_()

    def _edges(self) -> Tensor:
        steps = torch.arange(self.bins + 1, dtype=self.histogram.dtype, device=self.histogram.device)
        return self.min_val + steps * ((self.max_val - self.min_val) / self.bins)

    def centres(self) -> Tensor:
        """The middle of every bin, ``(bins,)``."""
        edges = self._edges()
        return (edges[1:] + edges[:-1]) / 2

    def percentile_range(self, percentile: float) -> tuple[Tensor, Tensor]:
        """The range of the bins that hold so many percent of the values."""
        cut, edges = (1 - percentile / 100) / 2, self._edges()
        share = self.histogram.double().cumsum(0) / self.histogram.double().sum()
        ends = torch.tensor([cut, 1 - cut], dtype=share.dtype, device=share.device)
        last = self.bins - 1
        below = torch.searchsorted(share, ends[:1], right=True).clamp(max=last)
        above = torch.searchsorted(share, ends[1:]).clamp(max=last)
        return edges[below].squeeze(0), edges[above + 1].squeeze(0)

    def synchronize(self) -> None:
        """Make the state that of all ranks' batches: the bins of the joint range, counts added."""
        if _ranks() == 1:
            return
        low, high = joint_range(self.min_val, self.max_val)
        counts = torch.zeros_like(self.histogram)
        if self.min_val <= self.max_val:
            width = ((high - low) / self.bins).clamp(min=torch.finfo(low.dtype).tiny)
            place = ((self.centres() - low) / width).long().clamp(0, self.bins - 1)
            counts.index_add_(0, place, self.histogram)
        dist.all_reduce(counts)
        self.histogram.copy_(counts)
        self.min_val.copy_(low)
        self.max_val.copy_(high)


Observer = RangeObserver | MovingRangeObserver | HistogramRangeObserver
_OBSERVERS = {"minmax": RangeObserver, "moving_average": MovingRangeObserver, "lsq": MagnitudeObserver}


def activation_observer(quantization: OperandQuantization, operand: OperandFormat) -> Observer:
    """A torch observer of the kind that the range asks for.

    Each has buffers ``min_val`` and ``max_val``, takes batches by a call, forgets them with ``reset_min_max_vals()``,
    and joins those of all ranks with ``synchronize()``.
    """
    kind = _OBSERVERS.get(quantization.range, HistogramRangeObserver)
    momentum = {"averaging_constant": quantization.momentum} if kind is MovingRangeObserver else {}
    return kind(
        dtype=torch.qint8 if operand.signed else torch.quint8,
        qscheme=torch.per_tensor_symmetric if operand.symmetric else torch.per_tensor_affine,
        quant_min=operand.low,
        quant_max=operand.high,
        **momentum,
    )


def observed_scale(
    observer: Observer, quantization: OperandQuantization, operand: OperandFormat
) -> tuple[Tensor, Tensor]:
    """Scalar float32 scale and int32 zero point from what an observer saw."""
    low, high = observer.min_val, observer.max_val
    if quantization.range == "histogram":
        scale, zero_point = observer.calculate_qparams()
        return scale.float().reshape(()), zero_point.int().reshape(())
    if quantization.range == "percentile":
        low, high = observer.percentile_range(quantization.percentile)
    elif quantization.range == "mse":
        low, high = (
            end.squeeze(0)
            for end in least_error_range(
                observer.centres()[None], low.view(1), high.view(1), operand, observer.histogram[None]
            )
        )
    scale, zero_point = operand.scale_and_zero_point(low, high)
    if quantization.range == "lsq":
        scale = operand.step_size(observer.magnitude / observer.count, zero_point)
    return scale, zero_point


def least_error_range(
    values: Tensor, low: Tensor, high: Tensor, operand: OperandFormat, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of the ranges ``(t·low, t·high)``, t from 0.01 to 1 in steps of 0.01, that of the least squared error, by row.

    Parameters
    ----------
    values : Tensor
        float32 ``(C, n)``.
    low, high : Tensor
        ``(C,)``.
    counts : Tensor, optional
        ``(C, n)``: how often each value occurs.
    """
    least = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for step in range(_SHRINKAGES, 0, -1):
        t = step / _SHRINKAGES
        scale, zero_point = operand.scale_and_zero_point(low * t, high * t)
        faked = torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, operand.low, operand.high)
        error = (faked - values).square_()
        error = (error if counts is None else error * counts).sum(1)
        best = torch.where(error < least, t, best)
        least = torch.minimum(error, least)
    return low * best, high * best


class QuantizedWeight(NamedTuple):
    """A weight's codes and what goes with them, one entry an output channel.

    Attributes
    ----------
    codes : Tensor
        uint8 or int8, the weight's shape.
    scale : Tensor
        float32 ``(O,)``.
    zero_point : Tensor
        int32 ``(O,)``.
    sums : Tensor
        int64 ``(O,)``: Σ_k codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor


_PER_CHANNEL = OperandQuantization(granularity="per_channel")


def weight_scale(
    weight: Tensor, operand: OperandFormat, quantization: OperandQuantization = _PER_CHANNEL
) -> tuple[Tensor, Tensor]:
    """float32 scale and int32 zero point of a weight ``(O, ...)``: ``(O,)`` per channel, ``(1,)`` per tensor.

    A pure function of the weight, LSQ's being the first scale.
    """
    rows = weight.detach().float().flatten(1)
    if quantization.granularity == "per_tensor":
        rows = rows.reshape(1, -1)
    if rows.shape[1] == 0:
        low = high = rows.new_zeros(len(rows))
    elif quantization.range == "percentile":
        beyond = int((1 - quantization.percentile / 100) / 2 * rows.shape[1])
        low = rows.kthvalue(1 + beyond, dim=1).values
        high = rows.kthvalue(rows.shape[1] - beyond, dim=1).values
    else:
        low, high = rows.aminmax(dim=1)
        if quantization.range == "mse":
            low, high = least_error_range(rows, low, high, operand)
    scale, zero_point = operand.scale_and_zero_point(low, high)
    if quantization.range == "lsq":
        scale = operand.step_size(rows.abs().mean(1), zero_point)
    return scale, zero_point


def quantize_weight(
    weight: Tensor,
    operand: OperandFormat,
    quantization: OperandQuantization = _PER_CHANNEL,
    scales: tuple[Tensor, Tensor] | None = None,
) -> QuantizedWeight:
    """Quantise a weight ``(O, ...)`` over its range, or with the scale and zero point that are given."""
    weight = weight.detach().float()
    scale, zero_point = weight_scale(weight, operand, quantization) if scales is None else scales
    scale, zero_point = (each.detach().expand(len(weight)) for each in (scale, zero_point))
    column = (-1, *[1] * (weight.ndim - 1))
    codes = operand.quantize(weight, scale.view(column), zero_point.view(column))
    return QuantizedWeight(codes, scale, zero_point, codes.flatten(1).sum(1, dtype=torch.int64))


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """``clamp(round(bias / scale))`` to int32's range, as int64."""
    limit = 2**31
    return (bias.detach().double() / scale.detach().double()).round().clamp(-limit, limit - 1).long()


def sum_dtype(bound: int) -> torch.dtype:
    """int32 where it holds every integer below a bound in magnitude, else int64."""
    return torch.int32 if bound < 2**31 else torch.int64


def remove_zero_points(
    sums: Tensor,
    weight: QuantizedWeight,
    x_zero_point: int | Tensor,
    x_sums: Tensor | None,
    column: tuple[int, ...],
    bound: int,
) -> Tensor:
    """``Σ(xq − zx)(wq − zw) = Σ table[xq, wq] − zx·Σwq − zw·Σxq + K·zx·zw``, in exact integers.

    Parameters
    ----------
    sums : Tensor
        int32 or int64 ``Σ table[xq, wq]``; may be overwritten.
    weight : QuantizedWeight
        Of K weights a channel.
    x_zero_point : int or Tensor
        zx; a scalar tensor where its value cannot be read.
    x_sums : Tensor or None
        ``Σ_k xq`` behind each of `sums`, broadcastable to them; None where every zw is 0.
    column : tuple of int
        The shape in which a vector over output channels broadcasts to sums.
    bound : int
        At least the magnitude of any partial result; int64 is used where int32 cannot hold it.

    Returns
    -------
    Tensor
        int32 or int64, of sums' shape.
    """
    dtype = sum_dtype(bound)
    depth = weight.codes[0].numel()
    if isinstance(x_zero_point, Tensor) or x_zero_point:
        constant = depth * x_zero_point * weight.zero_point.long() - x_zero_point * weight.sums
        sums = sums.to(dtype).add_(constant.to(dtype).view(column))
    if x_sums is not None:
        sums = sums.to(dtype).sub_(x_sums.to(dtype) * weight.zero_point.to(dtype).view(column))
    return sums


def pad_codes(codes: Tensor, padding: Sequence[int], value: int | Tensor) -> Tensor:
    """Pad the last dimensions, at both ends each, with an integer or a scalar integer tensor, whose value is not read.

    The latter wraps around in the codes' type, and so is exact.
    """
    pads = [p for p in reversed(padding) for _end in range(2)]
    if isinstance(value, Tensor):
        value = value.to(codes.dtype)
        return torch.nn.functional.pad(codes - value, pads) + value
    return torch.nn.functional.pad(codes, pads, value=value) if any(pads) else codes


def window_sums(
    codes: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    pad: int | Tensor,
) -> Tensor:
    """``Σ_k xq`` over each receptive field: codes ``(B, C, *size)`` to int32 ``(B, groups, *output)``."""
    sums = codes.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)
    border = pad * (codes.shape[1] // groups)
    sums = pad_codes(sums, padding, border)
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        sums = sums.unfold(dim, d * (k - 1) + 1, s)[..., ::d].sum(-1, dtype=torch.int32)
    return sums
