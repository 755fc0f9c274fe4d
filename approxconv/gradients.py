"""Gradients of a look-up product: slopes of the table, and their sums through the layer's exact gradient.

A layer computes ``y = sx·sw·(Σ_k table[xq, wq] − zx·Σwq − zw·Σxq + K·zx·zw)``. With slopes ``D_a[a, w]`` for
∂table/∂(value of a) and ``D_w[a, w]`` for ∂table/∂(value of w), and x̂ = sx·(xq − zx), ŵ = sw·(wq − zw),

    ∂y/∂x̂ = sw·(D_a[xq, wq] − zw),        ∂y/∂ŵ = sx·(D_w[xq, wq] − zx)

for each product. Where ``D = Σ_r f_r[a]·g_r[w]``, the sums over products are those of the exact operator's gradients:
``grad_x = Σ_r f_r[xq] ⊙ exact_x(grad, g_r[wq])`` and ``grad_w = Σ_r g_r[wq] ⊙ exact_w(grad, f_r[xq])``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .multiplier import Multiplier, as_gradient, check_table_shape
from .operators.straight_through import or_placeholder

GRADIENTS = ("ste", "lre", "smooth")
_TOLERANCE = 1e-6  # float32 holds not much more


class GradientTerms(NamedTuple):
    """Gradient tables as sums of products, ``D_a = f_aᵀ·g_a`` and ``D_w = f_wᵀ·g_w``.

    Rows are by byte: tables of narrower operands are repeated over the unused high bits, as in `PreparedTable`.

    Attributes
    ----------
    f_a, g_a : Tensor
        float32 ``(1 + R, 256)``, by activation and by weight byte; ``f_a[0]`` is 1.
    f_w, g_w : Tensor
        float32 ``(1 + R', 256)``, likewise; ``g_w[0]`` is 1.
    """

    f_a: Tensor
    g_a: Tensor
    f_w: Tensor
    g_w: Tensor

    def to(self, device: torch.device | str) -> GradientTerms:
        """The terms on `device`."""
        return GradientTerms(*(each.to(device) for each in self))

    def reads(self, needs: tuple[bool, bool]) -> tuple[bool, bool]:
        """Whether `lut_gradients` reads the values of x_codes and of w_codes."""
        return needs[1] or (needs[0] and len(self.f_a) > 1), needs[0] or (needs[1] and len(self.f_w) > 1)


@dataclass(frozen=True, eq=False, repr=False)
class GradientTables:
    """Slopes of a product by each operand's value, one for each pair of codes.

    Parameters
    ----------
    by_activation, by_weight : array_like
        ∂table/∂(value of a) and ∂table/∂(value of w), finite, ``(2**a_bits, 2**w_bits)``, indexed
        ``[activation_code, weight_code]`` as the multiplier's table is; copied to float32 CPU tensors.
    tolerance : float
        How far off the sum of terms may be that stands for a table, relative to it in the Frobenius norm. A backward
        pass takes the time of as many exact ones as there are terms.

    Attributes
    ----------
    terms : GradientTerms
        The tables as sums of products, as few as the tolerance allows; not to be written to.

    Raises
    ------
    ValueError
        A table of no such shape, of no numbers or of another shape than the other, or a tolerance not in (0, 1).

    Examples
    --------
    What a file states: ``GradientTables(*load_multiplier(path).gradients)``.
    """

    by_activation: Tensor
    by_weight: Tensor
    tolerance: float = _TOLERANCE
    terms: GradientTerms = field(init=False)

    def __post_init__(self) -> None:
        for name in ("by_activation", "by_weight"):
            table = as_gradient(name, getattr(self, name))
            try:
                check_table_shape(table)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            object.__setattr__(self, name, table)
        if self.by_activation.shape != self.by_weight.shape:
            raise ValueError(
                "by_activation and by_weight must have one shape, got "
                f"{tuple(self.by_activation.shape)} and {tuple(self.by_weight.shape)}"
            )
        _check_tolerance(self.tolerance)
        f_a, g_a = _factorize(self.by_activation.numpy(), self.tolerance)
        g_w, f_w = _factorize(self.by_weight.numpy().T, self.tolerance)
        with torch.inference_mode(False):  # they outlive who makes them
            object.__setattr__(self, "terms", GradientTerms(*(_by_byte(each) for each in (f_a, g_a, f_w, g_w))))

    def __repr__(self) -> str:
        return f"GradientTables(shape={tuple(self.by_weight.shape)}, tolerance={self.tolerance})"


def _check_tolerance(tolerance: float) -> None:
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a number between 0 and 1, got {tolerance!r}")


def check_gradient(gradient: str | GradientTables) -> str | GradientTables:
    """Return `gradient` if it is one, else raise a ValueError that lists what there is."""
    if not isinstance(gradient, GradientTables) and not (isinstance(gradient, str) and gradient in GRADIENTS):
        names = ", ".join(map(repr, GRADIENTS))
        raise ValueError(f"gradient must be one of {names} or a GradientTables, got {gradient!r:.200}")
    return gradient


def gradient_tables(
    multiplier: Multiplier,
    gradient: str | GradientTables,
    *,
    half_window: int | None = None,
    tolerance: float = _TOLERANCE,
) -> GradientTables:
    """Slopes of a multiplier's table.

    In ascending order of the operand's value v, from v_0 to v_{N−1}, and for a fixed other operand:

    - ``"ste"``, straight-through: the exact product's slope, which is the other operand's value.
    - ``"lre"``, linear regression estimation: the slope ``Σ(v − v̄)·table[v] / Σ(v − v̄)²`` of the least-squares line.
    - ``"smooth"``: the central difference ``(s[v+1] − s[v−1])/2`` of the moving average
      ``s[v] = Σ_{|i| ≤ h} table[v+i]/(2h+1)``. Where a window would leave the range, ``v < v_0 + h + 1`` and
      ``v > v_{N−1} − h − 1``: the mean slope ``(table[v_{N−1}] − table[v_0])/(N − 1)``.

    Each is exact for the exact product.

    Parameters
    ----------
    multiplier : Multiplier
        The table and its operands' formats.
    gradient : str or GradientTables
        One of the above; tables are returned as they are.
    half_window : int, optional
        h of ``"smooth"``; by default a sixteenth of each operand's number of codes, 16 for 8 bits.
    tolerance : float
        That of `GradientTables`, for those that are made here.

    Returns
    -------
    GradientTables
        Shared by all who ask for the same, so not to be written to.

    Raises
    ------
    ValueError
        No such gradient or tolerance, tables of another shape than the multiplier's, or a half_window that is negative,
        no int, or of another gradient.

    Notes
    -----
    "ste": Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", arXiv 1308.3432. "lre": so named by ApproxTorch's code (K. Ma, S. Kimura, "ApproxTorch: An
    Approximate Multiplier Evaluation Environment for CNNs based on Pytorch", ISOCC 2022). Slopes by one operand only
    are also the LUT-1D of C. Meng, W. Burleson, G. De Micheli, "Gradient Estimation Methods of Approximate Multipliers
    for High-Accuracy Retraining of Deep Learning Models", arXiv 2509.10519. "smooth": C. Meng, W. Burleson, W. Qian,
    G. De Micheli, "Gradient Approximation of Approximate Multipliers for High-Accuracy Deep Neural Network Retraining",
    DATE 2025. Its authors' code has ``(max table − min table)/N`` at the ends, for unsigned operands. The mean slope is
    nearly that where the table does not decrease, but negative where it falls, and linear in the table, so that the
    slopes have at most one term more than ``table − a·w`` has rank.
    """
    check_gradient(gradient)
    if half_window is not None and (gradient != "smooth" or type(half_window) is not int or half_window < 0):
        raise ValueError(
            f"half_window must be an int of at least 0, for 'smooth' only, got {half_window!r} for {gradient!r:.200}"
        )
    _check_tolerance(tolerance)
    if isinstance(gradient, GradientTables):
        if gradient.by_activation.shape != multiplier.table.shape:
            raise ValueError(
                f"gradient must have the shape of the multiplier's table {tuple(multiplier.table.shape)}, "
                f"got {tuple(gradient.by_activation.shape)}"
            )
        return gradient
    with _disable_current_modes():  # what is kept for all must not be the fake tensor of one who traces
        return _slopes(multiplier, gradient, half_window, tolerance)


@lru_cache(maxsize=32)
def _slopes(multiplier: Multiplier, gradient: str, half_window: int | None, tolerance: float) -> GradientTables:
    a, w = multiplier.operand_values()
    by_value = multiplier.by_value().numpy().astype(np.float64)
    if gradient == "ste":
        by_activation, by_weight = np.broadcast_arrays(np.sort(w), np.sort(a)[:, None])
    else:
        slope = _regression_slopes if gradient == "lre" else _smoothed_differences
        by_activation, by_weight = slope(by_value, half_window), slope(by_value.T, half_window).T
    codes = np.ix_(a - a.min(), w - w.min())
    return GradientTables(by_activation[codes], by_weight[codes], tolerance)


def _regression_slopes(table: np.ndarray, _: int | None) -> np.ndarray:
    """Least-squares slope of each column, at each of its entries."""
    steps = np.arange(len(table)) - (len(table) - 1) / 2
    return np.broadcast_to(steps @ table / (steps @ steps), table.shape)


def _smoothed_differences(table: np.ndarray, half_window: int | None) -> np.ndarray:
    """Central differences of each column's moving average, the mean slope near its ends."""
    n = len(table)
    reach = 1 + (n // 16 if half_window is None else half_window)
    slopes = np.repeat((table[-1:] - table[:1]) / (n - 1), n, axis=0)
    inner = n - 2 * reach
    if inner > 0:  # all between the outermost two of either window cancels
        upper, lower = table[2 * reach :] + table[2 * reach - 1 : -1], table[:inner] + table[1 : 1 + inner]
        slopes[reach:-reach] = (upper - lower) / (4 * reach - 2)
    return slopes


def _factorize(table: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """F ``(1 + R, rows)`` and G ``(1 + R, columns)`` with ``‖table − Fᵀ·G‖ ≤ tolerance·‖table‖``, and F[0] = 1."""
    table = table.astype(np.float64)
    mean = table.mean(axis=0, keepdims=True)
    rest = table - mean
    f, g = np.ones((1, len(table))), mean
    if rest.any():
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        tails = np.sqrt(np.cumsum(s[::-1] ** 2)[::-1])
        rank = int((tails > tolerance * np.linalg.norm(table)).sum())
        root = np.sqrt(s[:rank, None])
        f, g = np.concatenate([f, root * u.T[:rank]]), np.concatenate([g, root * v[:rank]])
    return f, g


def _by_byte(factors: np.ndarray) -> Tensor:
    return torch.from_numpy(np.tile(factors, 256 // factors.shape[1]).astype(np.float32))


def _bytes(codes: Tensor) -> Tensor:
    """Codes as indices."""
    return codes.view(torch.uint8).to(torch.int32, memory_format=torch.contiguous_format)


def _look_up(row: Tensor, at: Tensor) -> Tensor:
    return row.index_select(0, at.flatten()).view(at.shape)


def lut_gradients(
    terms: GradientTerms,
    grad: Tensor,
    x_codes: Tensor,
    w_codes: Tensor,
    sx: Tensor,
    zx: Tensor,
    sw: Tensor,
    zw: Tensor,
    exact: Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], tuple[Tensor | None, Tensor | None]],
    needs: tuple[bool, bool],
    grad_sums: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by the fake-quantised operands x̂ = sx·(xq − zx) and ŵ = sw·(wq − zw).

    ``grad_x = Σ grad·sw·(D_a[xq, wq] − zw)`` over the products of each x̂ and
    ``grad_w = Σ grad·sx·(D_w[xq, wq] − zx)`` over those of each ŵ, padded positions, where xq is zx, among them. Takes
    one call of `exact` for each term of each gradient that is asked for, and holds one term at a time.

    Parameters
    ----------
    terms : GradientTerms
        Of the slopes, on grad's device.
    grad : Tensor
        The gradient by y, floating, of y's shape.
    x_codes, w_codes : Tensor
        uint8 or int8 codes. Of one that `terms.reads` excludes, only the shape counts.
    sx, zx : Tensor
        Scale, and integer zero point, of x; scalars.
    sw, zw : Tensor
        Of w; broadcastable to w_codes, such as ``(O, 1, 1, 1)``.
    exact : callable
        ``exact(grad, x, w, needs)`` returns the exact operator's ``(grad_x, grad_w)``, as padded with zeros.
    needs : pair of bool
        Which of the two to compute; the other is None.
    grad_sums : callable
        ``grad_sums(grad)`` is grad's sum over all products of each weight, padded positions among them, broadcastable
        to w_codes: what ``exact``'s grad_w would be if x were 1 and padded with ones. Of a convolution
        ``grad.sum((0, 2, 3)).view(-1, 1, 1, 1)``, as each weight takes part in each output of its channel. Called once,
        if grad_w is asked for.

    Returns
    -------
    tuple of Tensor
        ``(grad_x, grad_w)`` in grad's dtype.
    """
    f_a, g_a, f_w, g_w = (each.to(grad.dtype) for each in terms)
    reads_x, reads_w = terms.reads(needs)
    x_at = _bytes(x_codes) if reads_x else None
    w_at = _bytes(w_codes) if reads_w else None
    grad_x = grad_w = None
    if needs[0]:
        x = or_placeholder(None, x_codes.shape, grad)
        for r, (f, g) in enumerate(zip(f_a, g_a, strict=True)):
            slopes = _look_up(g, w_at)
            term, _ = exact(grad, x, (slopes if r else slopes - zw) * sw, (True, False))
            grad_x = torch.addcmul(grad_x, _look_up(f, x_at), term) if r else term
    if needs[1]:
        w = or_placeholder(None, w_codes.shape, grad)
        # What a padded position has, every position gets through the sums: exact's zeros there then hold what is left.
        padded = f_w.index_select(1, (zx & 255).view(1))
        rest, sums = sx * (f_w - padded), sx * grad_sums(grad)
        for r, (f, g) in enumerate(zip(rest, g_w, strict=True)):
            _, term = exact(grad, _look_up(f, x_at), w, (False, True))
            term = term + sums * (padded[r] if r else padded[r] - zx)
            grad_w = torch.addcmul(grad_w, _look_up(g, w_at), term) if r else term
    return grad_x, grad_w


def noise(
    output: Tensor, depth: int | Tensor, mean: float, variance: float, scale: Tensor, factor: Tensor | float
) -> Tensor:
    """Gaussian stand-in for the error of product sums: ``factor·scale·(K·μ + √(K·σ²)·ε)``, ε ~ N(0, 1) for each sum.

    The K errors of a sum are taken as independent, with the multiplier's mean and variance. ε does not depend on the
    factor (reparametrisation), so that the result is differentiable by it: a network can learn how much error a layer
    tolerates. 0 is the exact product, 1 the multiplier.

    Parameters
    ----------
    output : Tensor
        The exact output; gives shape, dtype and device.
    depth : int or Tensor
        K, the number of products in a sum; broadcastable to output.
    mean, variance : float
        μ and σ² of one product's error: ``bias`` and ``variance`` of `Multiplier.metrics`, over uniform operands or
        over a layer's own.
    scale : Tensor
        sx·sw, broadcastable to output.
    factor : Tensor or float
        Scalar or broadcastable to output.

    Returns
    -------
    Tensor
        Of output's shape and dtype, to be added to it.

    Raises
    ------
    ValueError
        A negative depth or variance.

    Notes
    -----
    E. Trommer, B. Waschneck, A. Kumar, "Combining Gradients and Probabilities for Heterogeneous Approximation of Neural
    Networks", ICCAD 2022: Gaussian noise of learnable strength added to the exact output, and the standard deviation of
    a multiplier's error in a sum from its table.
    """
    if variance < 0 or (not isinstance(depth, Tensor) and depth < 0):
        raise ValueError(f"depth and variance must be at least 0, got {depth} and {variance}")
    error = torch.randn_like(output).mul_((depth * variance) ** 0.5).add_(depth * mean)
    return (factor * (scale * error)).to(output.dtype)
