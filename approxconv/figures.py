"""Error figures over a multiplier's operand pairs, and figures as publications print them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from .multiplier import Multiplier

_IN_MILLIWATTS = {"W": 1e3, "mW": 1.0, "uW": 1e-3, "µW": 1e-3, "μW": 1e-3, "nW": 1e-6}
_POWER_KEYS = ("power", "PDK45_PWR", "PWR")


class Quantity(NamedTuple):
    """A printed figure: its value, one unit of its last printed digit, and what follows it (``%``, ``mW``, …)."""

    value: float
    last_digit: float
    unit: str


def parse_quantity(printed: object) -> Quantity | None:
    """Read a figure as printed, such as ``"0.425 mW"``, ``"72829.102e2"`` or ``"1.2"``; None where it is none."""
    match = re.fullmatch(r"\s*([+-]?[0-9.]{1,40}(?:[eE][+-]?[0-9]{1,3})?)\s*(\S{0,20})\s*", str(printed))
    try:
        number = Decimal(match[1]) if match else None
    except InvalidOperation:
        return None
    if number is None:
        return None
    return Quantity(float(number), float(Decimal(1).scaleb(number.as_tuple().exponent)), match[2])


def power_in_milliwatts(info: Mapping[str, Any]) -> float | None:
    """The power that `info` states as ``power``, ``PDK45_PWR`` or ``PWR``: mW, or text such as ``"301 uW"``."""
    for key in _POWER_KEYS:
        quantity = parse_quantity(info.get(key))
        if quantity is not None and (quantity.unit or "mW") in _IN_MILLIWATTS:
            power = quantity.value * _IN_MILLIWATTS[quantity.unit or "mW"]
            if math.isfinite(power) and power >= 0:
                return power
    return None


def printed_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """The figures that describe a multiplier at a glance, as text: of all that `Multiplier.metrics` returns."""
    shown = {}
    for key in ("MAE", "WCE", "EP%", "MRE%", "bias"):
        value = f"{metrics[key]:.4g}{' %' * key.endswith('%')}"
        shown[key.removesuffix("%")] = "–" if math.isnan(metrics[key]) else value
    return shown


def probabilities(name: str, histogram: Any, codes: int) -> np.ndarray:
    """Counts or shares by code as float64 that sum to 1, equal ones for None; a ValueError calls it `name`."""
    if histogram is None:
        return np.full(codes, 1 / codes)
    try:
        if isinstance(histogram, torch.Tensor) and not histogram.is_complex():
            histogram = histogram.detach().to("cpu", torch.float64).numpy()  # NumPy has no bfloat16
        counts = np.asarray(histogram)
        if counts.dtype.kind not in "biufO":
            raise ValueError(f"got dtype {counts.dtype}")
        counts = counts.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from None
    if counts.shape != (codes,):
        raise ValueError(f"{name} must have one count a code, shape ({codes},), got {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"{name} must be finite, not negative and not all zero, got values from {counts.min()} to {counts.max()}"
        )
    counts = counts / counts.max()  # so that their sum is finite too
    return counts / counts.sum()


def error_figures(multiplier: Multiplier, a_hist: Any = None, w_hist: Any = None) -> dict[str, float]:
    """What `Multiplier.metrics` documents."""
    a_values, w_values = multiplier.operand_values()
    probability_a = probabilities("a_hist", a_hist, len(a_values))
    probability_w = probabilities("w_hist", w_hist, len(w_values))
    met = np.multiply.outer(probability_a > 0, probability_w > 0)
    error = multiplier.error().numpy()
    magnitude = np.abs(error)
    product = np.multiply.outer(a_values, w_values)
    nonzero = product != 0
    relative = np.divide(magnitude, np.abs(product), out=np.zeros(product.shape), where=nonzero)
    uniform = a_hist is None and w_hist is None

    def mean(values: np.ndarray) -> float:
        if uniform:
            return float(values.mean(dtype=np.float64))
        return float(probability_a @ values.astype(np.float64) @ probability_w)

    counted = mean(nonzero)
    mae, mse, bias = mean(magnitude), mean(error.astype(np.float64) ** 2), mean(error)
    worst = float(magnitude[met].max())
    full_scale = 2.0 ** (multiplier.a_bits + multiplier.w_bits)
    return {
        "MAE": mae,
        "MAE%": 100 * mae / full_scale,
        "WCE": worst,
        "WCE%": 100 * worst / full_scale,
        "WCRE%": 100 * float(relative[met].max()) if counted else float("nan"),
        "EP%": 100 * mean(error != 0),
        "MRE%": 100 * mean(relative) / counted if counted else float("nan"),
        "MSE": mse,
        "bias": bias,
        "variance": max(mse - bias**2, 0.0),
    }
