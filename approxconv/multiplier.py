"""A multiplier as its truth table, with the formats of its two operands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._versioned import once_per_version
from .figures import error_figures, power_in_milliwatts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .fast_model import FastModel

MIN_BITS, MAX_BITS = 2, 8
MAX_FUNCTION_BITS = 16  # of a multiplier that is a function, not a table
_INT16_SPAN = 2**16 - 1
BYTE_SPAN = 2**8 - 1


def operand_values(bits: int, signed: bool) -> np.ndarray:
    """Value of every operand code, ordered by code.

    Parameters
    ----------
    bits : int
        Width of the operand.
    signed : bool
        Whether a code is read as two's complement.

    Returns
    -------
    numpy.ndarray
        int64, shape ``(2**bits,)``: ``0, 1, …`` and, if signed, ``-2**(bits-1), …, -1`` in the upper half.
    """
    codes = np.arange(2**bits, dtype=np.int64)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if signed else codes


def table_values(shape: Sequence[int], signs: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """`operand_values` of the rows and the columns of a table of that shape."""
    return tuple(operand_values(n.bit_length() - 1, signed) for n, signed in zip(shape, signs, strict=True))


def operand_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest value of an operand of `bits` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def check_table_shape(table: Tensor) -> tuple[int, int]:
    """Return ``(a_bits, w_bits)`` of a table, or raise a ValueError that says what is wrong with its shape."""
    sides = tuple(table.shape)
    bits = tuple(side.bit_length() - 1 for side in sides)
    fits = all(MIN_BITS <= n <= MAX_BITS and side == 1 << n for side, n in zip(sides, bits, strict=True))
    if len(sides) != 2 or not fits:
        raise ValueError(
            f"table must have shape (2**a_bits, 2**w_bits) with {MIN_BITS} to {MAX_BITS} bits an operand, got {sides}"
        )
    return bits


@dataclass(frozen=True)
class PreparedTable:
    """What an engine needs of a table, read from it once.

    Attributes
    ----------
    low, high : int
        Smallest and largest entry.
    offset : int
        ``rows`` holds ``table - offset``; 0 wherever the entries fit int16 as they are.
    rows : Tensor
        ``(256, 256)``, int16 if ``high - low`` fits 16 bits, else int32; uint8 of `prepare_bytes`. Narrower tables are
        repeated over the unused high bits of a code, so that any byte is a valid index and only its low bits count.
    """

    low: int
    high: int
    offset: int
    rows: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """``rows`` transposed and contiguous: indexed ``[weight_code, activation_code]``."""
        if self.rows.device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(self.rows.numpy().T))
        return self.rows.T.contiguous()

    @property
    def entry(self) -> str:
        """``"int16"``, ``"int32"`` or ``"uint8"``: the type of ``rows``."""
        return str(self.rows.dtype).removeprefix("torch.")

    @property
    def magnitude(self) -> int:
        """Largest absolute entry."""
        return max(abs(self.low), abs(self.high))


@once_per_version
def prepare(table: Tensor) -> PreparedTable:
    """Prepare a table tensor, once per tensor and version of its contents.

    Parameters
    ----------
    table : Tensor
        int32, ``(2**a_bits, 2**w_bits)``, on any device.

    Returns
    -------
    PreparedTable
        On the table's device. A second call with the same tensor, not written to in between, reads nothing back.

    Notes
    -----
    On the CPU by NumPy: torch's threads do not survive a fork, and a child may meet a new table.
    """
    if table.device.type == "cpu":
        low, high = int(table.numpy().min()), int(table.numpy().max())
    else:
        low, high = (int(v) for v in torch.stack(torch.aminmax(table)).tolist())
    narrow = high - low <= _INT16_SPAN
    # The offset nearest to zero that fits int16, so never larger than the largest entry.
    offset = max(high - (2**15 - 1), 0) + min(low + 2**15, 0) if narrow else 0
    repeats = tuple(256 // side for side in table.shape)
    if table.device.type == "cpu":
        entries = (table.numpy() - offset).astype(np.int16 if narrow else np.int32)
        rows = torch.from_numpy(np.ascontiguousarray(np.tile(entries, repeats)))
    else:
        rows = (table - offset).to(torch.int16 if narrow else torch.int32).repeat(repeats)
    known = PreparedTable(low, high, offset, rows)
    if table.device.type == "cuda":
        # Whole before anyone sees it: another stream would not wait for it, a graph would make it its own.
        _ = known.columns
        torch.cuda.current_stream(table.device).synchronize()
    return known


@once_per_version
def prepare_bytes(table: Tensor) -> PreparedTable | None:
    """`prepare` a table on the CPU as uint8 ``table - low``, once per version; None if its entries span more than 255.

    Parameters
    ----------
    table : Tensor
        int32, ``(2**a_bits, 2**w_bits)``.
    """
    low, high = int(table.numpy().min()), int(table.numpy().max())
    if high - low > BYTE_SPAN:
        return None
    entries = np.tile((table.numpy() - low).astype(np.uint8), tuple(256 // side for side in table.shape))
    return PreparedTable(low, high, low, torch.from_numpy(np.ascontiguousarray(entries)))


def _as_table(table: Any) -> Tensor:
    """Turn any integer-valued 2-D array into a contiguous int32 CPU tensor, or say why it is none."""
    if isinstance(table, Tensor):
        if table.layout != torch.strided or table.device.type == "meta":
            raise ValueError(f"table must be dense and hold values, got layout {table.layout} on {table.device}")
        table = table.detach().cpu()
        if table.is_floating_point() and table.dtype != torch.float64:
            table = table.float()
        if table.is_complex():
            raise ValueError(f"table must hold integers, got dtype {table.dtype}")
        array = table.resolve_neg().numpy()
    else:
        try:
            array = np.asarray(table)
        except ValueError as error:
            raise ValueError(f"table must be a rectangular 2-D array: {error}") from None
    limits = np.iinfo(np.int32)
    huge = array.dtype == object and all(isinstance(value, int) for value in array.flat)  # ints beyond 64 bits
    if array.dtype.kind not in "iuf" and not huge:
        raise ValueError(f"table must hold integers, got dtype {array.dtype}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("table must be finite, got NaN or infinity")
        if (array != np.rint(array)).any():
            raise ValueError(f"table must hold integers, got {array[array != np.rint(array)].flat[0]}")
    # As Python ints: in float32 the largest int32 rounds up to one that does not fit.
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"table entries must fit int32, got values from {array.min()} to {array.max()}")
    if huge:
        raise ValueError("table must hold integers, got dtype object")
    # A copy always: later writes to the caller's array must not reach a table whose range is already known. Not an
    # inference tensor even where one would be made: these have no version to tell a write by.
    with torch.inference_mode(False):
        return torch.from_numpy(array.astype(np.int32, order="C", copy=True))


def check_flag(name: str, value: object) -> bool:
    """Return a bool as it is, or raise a ValueError that calls it `name`."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_bits(bits: Any, most: int = MAX_BITS) -> tuple[int, int]:
    """``(a_bits, w_bits)`` of a width or a pair of them, or a ValueError that calls it bits."""
    pair = tuple(bits) if isinstance(bits, (tuple, list)) else (bits, bits)
    if len(pair) != 2 or not all(
        isinstance(n, int) and not isinstance(n, bool) and MIN_BITS <= n <= most for n in pair
    ):
        raise ValueError(f"bits must be an int from {MIN_BITS} to {most} or a pair of them, got {bits!r}")
    return pair


def check_operand(name: str, operand: Any, low: int, high: int) -> np.ndarray:
    """An operand's values as int64, or a ValueError that says what they must be."""
    array = np.asarray(operand)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers from {low} to {high}, got {array.dtype}: {operand!r:.60}")
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(f"{name} must hold values from {low} to {high}, got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def as_info(info: Any) -> dict[str, Any]:
    """A copy of `info` that JSON can hold, or say why there is none."""
    if info is None:
        return {}
    if not isinstance(info, Mapping) or not all(isinstance(key, str) for key in info):
        raise ValueError(f"info must be a mapping with str keys, got {info!r:.200}")
    try:
        return json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"info must hold what JSON can: {error}") from None


def _as_gradients(gradients: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """A pair of finite float32 tables of `shape` on the CPU, copied, or say why it is none."""
    if gradients is None:
        return None
    if not isinstance(gradients, (tuple, list)) or len(gradients) != 2:
        raise ValueError(f"gradients must be a pair of tables, got {type(gradients).__name__}")
    pair = tuple(as_gradient("gradients", each) for each in gradients)
    for table in pair:
        if table.shape != shape:
            raise ValueError(f"gradients must be of the table's shape {tuple(shape)}, got {tuple(table.shape)}")
    return pair


def as_gradient(name: str, gradient: Any) -> Tensor:
    """A contiguous finite float32 CPU copy of what `name` is given as, or a ValueError that calls it so."""
    try:
        with torch.inference_mode(False):
            if isinstance(gradient, Tensor) and not gradient.is_complex() and gradient.layout == torch.strided:
                table = gradient.detach().to("cpu", torch.float32, copy=True).contiguous()
            else:
                array = np.asarray(gradient)
                if array.dtype.kind not in "biuf":
                    raise ValueError(f"got dtype {array.dtype}")
                with np.errstate(over="ignore"):
                    table = torch.from_numpy(array.astype(np.float32, order="C", copy=True))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from None
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"{name} must be finite in float32, got NaN, infinity or a number too large")
    return table


class Multiplier:
    """An approximate multiplier, given by its truth table.

    ``table[a, w]`` is the product the circuit returns for activation code `a` and weight code `w`. A code is the
    operand's two's-complement bit pattern, so a signed axis runs ``0 … 2**(bits-1)-1, -2**(bits-1) … -1``. Nothing is
    assumed of the entries: the table need not be commutative nor map zero to zero.

    Parameters
    ----------
    table : array_like
        Integer-valued, ``(2**a_bits, 2**w_bits)``, 2 to 8 bits an operand; copied to a contiguous int32 CPU tensor.
    a_signed, w_signed : bool
        Whether activation and weight codes are read as two's complement.
    name : str
        For reports; takes no part in equality.
    info : mapping, optional
        What is known of the circuit, such as its authors' figures or its power, by name; anything JSON can hold. Takes
        no part in equality.
    gradients : pair of array_like, optional
        Tables of the derivatives of the product by the activation's and by the weight's value, of the table's shape and
        order; kept as float32. Take no part in equality.

    Raises
    ------
    ValueError
        A shape, dtype or value that no such table has; the message says which.

    Examples
    --------
    >>> m = Multiplier.from_function(lambda a, w: a * w & ~1, a_signed=False, w_signed=True, name="no_lsb")
    >>> m.error().abs().max().item()
    1
    """

    def __init__(
        self,
        table: Any,
        *,
        a_signed: bool,
        w_signed: bool,
        name: str = "",
        info: Mapping[str, Any] | None = None,
        gradients: tuple[Any, Any] | None = None,
    ) -> None:
        self.a_signed = check_flag("a_signed", a_signed)
        self.w_signed = check_flag("w_signed", w_signed)
        self.name = str(name)
        self.table = _as_table(table)
        self.a_bits, self.w_bits = check_table_shape(self.table)
        self.info = as_info(info)
        self.gradients = _as_gradients(gradients, self.table.shape)
        self._copies: dict[torch.device, tuple[int, Tensor]] = {}

    @classmethod
    def exact(cls, bits: int | tuple[int, int] = 8, a_signed: bool = False, w_signed: bool = True) -> Multiplier:
        """The exact product ``a·w`` of the given formats; the same object on every call.

        Parameters
        ----------
        bits : int or pair of int
            Width of both operands, or ``(a_bits, w_bits)``.
        a_signed, w_signed : bool
            Operand signedness.

        Raises
        ------
        ValueError
            A width outside 2 to 8 bits or a flag that is no bool.
        """
        return _exact(check_bits(bits), check_flag("a_signed", a_signed), check_flag("w_signed", w_signed))

    @classmethod
    def from_function(
        cls,
        fn: Callable[[np.ndarray, np.ndarray], np.ndarray],
        *,
        bits: int | tuple[int, int] = 8,
        a_signed: bool,
        w_signed: bool,
        name: str = "",
    ) -> Multiplier:
        """Tabulate a Python model of a multiplier.

        Parameters
        ----------
        fn : callable
            ``fn(a, w)`` takes two int64 arrays of operand *values*, each ``(2**a_bits, 2**w_bits)``, and returns their
            products in that shape.
        bits : int or pair of int
            Width of both operands, or ``(a_bits, w_bits)``.
        a_signed, w_signed : bool
            Operand signedness.
        name : str
            For reports.

        Raises
        ------
        ValueError
            `fn` is not callable, its result has another shape, or it holds what `Multiplier` does not take.
        """
        if not callable(fn):
            raise ValueError(f"fn must be callable, got {fn!r}")
        a_bits, w_bits = check_bits(bits)
        a = operand_values(a_bits, check_flag("a_signed", a_signed))
        w = operand_values(w_bits, check_flag("w_signed", w_signed))
        a, w = (np.ascontiguousarray(v) for v in np.meshgrid(a, w, indexing="ij"))
        products = fn(a, w)
        try:
            shape = tuple(np.shape(products))
        except ValueError as error:
            raise ValueError(f"fn must return a rectangular array of shape {a.shape}: {error}") from None
        if shape != a.shape:
            raise ValueError(f"fn must return an array of shape {a.shape}, got {shape}")
        return cls(products, a_signed=a_signed, w_signed=w_signed, name=name)

    @classmethod
    def from_c(
        cls,
        text: str,
        *,
        bits: int | tuple[int, int] | None = None,
        a_signed: bool | None = None,
        w_signed: bool | None = None,
        swap: bool = False,
        name: str | None = None,
    ) -> Multiplier:
        """Tabulate a straight-line C function, or CUDA ``__device__`` function, of two integers, without compiling it.

        Parameters
        ----------
        text : str
            The source, as `approxconv.load_function` describes it.
        bits : int or pair of int, optional
            Widths, or ``(a_bits, w_bits)``; by default the function's name (``mul8s_…``) or types say them.
        a_signed, w_signed : bool, optional
            Operand signedness, likewise.
        swap : bool
            The first parameter is the weight, not the activation.
        name : str, optional
            Instead of the function's.

        Returns
        -------
        Multiplier

        Raises
        ------
        FormatError
            The text is no such C; the message names line and construct.
        ValueError
            Another argument of a wrong type or out of its range.

        Examples
        --------
        >>> Multiplier.from_c("uint16_t f(uint8_t a, int8_t w) { return (a * w) & ~1; }")
        Multiplier('f', a=uint8, w=int8)
        """
        from .formats.c_model import tabulate

        if not isinstance(text, str):
            raise ValueError(f"text must be the source as a str, got {type(text).__name__}")
        multiplier = tabulate(Path("<C>"), text, bits=bits, a_signed=a_signed, w_signed=w_signed, swap=swap)
        multiplier.name = multiplier.name if name is None else str(name)
        return multiplier

    @property
    def bits(self) -> tuple[int, int]:
        """``(a_bits, w_bits)``."""
        return self.a_bits, self.w_bits

    @property
    def a_range(self) -> tuple[int, int]:
        """Smallest and largest activation value."""
        return operand_range(self.a_bits, self.a_signed)

    @property
    def w_range(self) -> tuple[int, int]:
        """Smallest and largest weight value."""
        return operand_range(self.w_bits, self.w_signed)

    @property
    def prepared(self) -> PreparedTable:
        """The table's range and 16-bit form on the CPU."""
        return prepare(self.table)

    def on(self, device: torch.device | str) -> Tensor:
        """The table on `device`, copied and prepared there once."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.table
        if device.index is None:
            device = torch.empty(0, device=device).device
        version, copy = self._copies.get(device, (None, None))
        if version != self.table._version:
            with torch.inference_mode(False):  # else it would have no version, and be prepared anew on every call
                copy = self.table.to(device)
            self._copies[device] = (self.table._version, copy)
        return copy

    @property
    def power(self) -> float | None:
        """Power in mW as `info` states it (``power``, ``PDK45_PWR`` or ``PWR``); None where it does not."""
        return power_in_milliwatts(self.info)

    def operand_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Value of every activation code and of every weight code, int64, in the table's order."""
        return operand_values(self.a_bits, self.a_signed), operand_values(self.w_bits, self.w_signed)

    def by_value(self) -> Tensor:
        """The table with both axes in ascending order of operand value, int32."""
        a, w = (np.argsort(values) for values in self.operand_values())
        return self.table[torch.from_numpy(a)][:, torch.from_numpy(w)].contiguous()

    def error(self) -> Tensor:
        """``table[a, w] - a·w``, int64, indexed by code as the table is."""
        exact = np.multiply.outer(*self.operand_values())
        return torch.from_numpy(self.table.numpy() - exact)  # by NumPy: waking torch's threads takes longer

    def metrics(self, a_hist: Any = None, w_hist: Any = None) -> dict[str, float]:
        """Error figures over all operand pairs, as EvoApproxLib defines them.

        Parameters
        ----------
        a_hist, w_hist : array_like, optional
            How often each activation or weight code is met, shape ``(2**bits,)`` by code, counts or shares. A pair
            then weighs ``a_hist[a]·w_hist[w]``, so that a layer's own operands decide; codes are equally frequent where
            it is not given.

        Returns
        -------
        dict of str to float
            With ``e = table[a, w] - a·w`` over all N pairs: ``MAE`` = Σ|e|/N, ``WCE`` = max|e|, ``EP%`` = share of
            pairs with e ≠ 0, ``MSE`` = Σe²/N, ``bias`` = Σe/N, ``variance`` = MSE − bias²; over the pairs with
            a·w ≠ 0 ``MRE%`` = mean |e/(a·w)| and ``WCRE%`` = max |e/(a·w)|; ``MAE%`` and ``WCE%`` are relative to
            2**(a_bits + w_bits). With histograms means are weighted and maxima are over pairs that are met; ``MRE%``
            and ``WCRE%`` are NaN where no pair with a·w ≠ 0 is.

        Raises
        ------
        ValueError
            A histogram of another shape or of no numbers, or with negative, infinite or only zero counts.

        Notes
        -----
        V. Mrazek et al., "EvoApprox8b: Library of Approximate Adders and Multipliers for Circuit Design and
        Benchmarking of Approximation Methods", DATE 2017.
        """
        return error_figures(self, a_hist, w_hist)

    def plot(self, ax: Axes | None = None, *, a_hist: Any = None, w_hist: Any = None, relative: bool = False) -> Figure:
        """Draw the error over the operand values, with its mean by activation and by weight beside it.

        Red is too large, blue too small, white exact. Up to eight wrong pairs are ringed, as single ones would be
        overlooked. Needs matplotlib, but no display; no pyplot figure is opened.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw, with a third of its size free above and half of it to the right; a new figure if not given.
        a_hist, w_hist : array_like, optional
            How often each code is met, as for `metrics`: weighs the means and the figures in the title, and is drawn
            beside the means.
        relative : bool
            Draw ``100·e/(a·w)`` instead of ``e``, grey where ``a·w = 0``. Colours then end where 99 % of the pairs do.

        Returns
        -------
        matplotlib.figure.Figure
            That of `ax`, or a new one; ``.savefig(path)`` writes it.

        Raises
        ------
        ValueError
            `ax` is none, `relative` no bool, or a histogram that `metrics` does not take.
        ImportError
            matplotlib is missing.
        """
        from .pictures import plot_error

        return plot_error(self, ax, a_hist=a_hist, w_hist=w_hist, relative=check_flag("relative", relative))

    def _repr_png_(self) -> bytes | None:
        from .pictures import error_png

        return error_png(self)

    def _repr_html_(self) -> str:
        from .pictures import error_png, to_html

        return to_html(self, error_png(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from .pictures import to_mimebundle

        return to_mimebundle(self)

    def swap(self) -> Multiplier:
        """The same circuit with its operands exchanged: ``swap().table[w, a] == table[a, w]``."""
        return Multiplier(
            self.table.T,
            a_signed=self.w_signed,
            w_signed=self.a_signed,
            name=f"{self.name}_swapped" if self.name else "",
            info=self.info,
            gradients=self.gradients and (self.gradients[1].T, self.gradients[0].T),
        )

    def sign_magnitude(self) -> Multiplier:
        """An unsigned circuit used on signed numbers: ``sign(a)·sign(w)·table[|a|, |w|]``, with sign(0) = 0.

        Raises
        ------
        ValueError
            An operand of this multiplier is signed already.
        """
        if self.a_signed or self.w_signed:
            raise ValueError(
                f"sign_magnitude needs an unsigned multiplier, got a_signed={self.a_signed}, w_signed={self.w_signed}"
            )
        unsigned = self.table.numpy().astype(np.int64)
        return Multiplier.from_function(
            lambda a, w: np.sign(a) * np.sign(w) * unsigned[np.abs(a), np.abs(w)],
            bits=self.bits,
            a_signed=True,
            w_signed=True,
            name=f"{self.name}_sm" if self.name else "",
        )

    def fast_model(self) -> FastModel:
        """An exact functional model for `FastApproxConv2dOp` and `FastApproxGeMMOp`, from the table's factorisation.

        Returns
        -------
        FastModel
            Of the table as it is now.

        Raises
        ------
        ValueError
            The table has no factorisation; the message says what to use instead.

        Examples
        --------
        >>> from approxconv import get_multiplier
        >>> x, w = torch.tensor([[100.0, 3.0]]), torch.tensor([[100.0, 3.0]])
        >>> get_multiplier("drum4_8u_8s").fast_model()(torch.nn.functional.linear, x, w, {})
        tensor([[10825.]])
        """
        from .fast_model import FastModel

        return FastModel(self)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the operand formats and the table; the name takes no part."""
        head = f"{self.a_bits},{self.w_bits},{self.a_signed:d},{self.w_signed:d};"
        return hashlib.sha256(head.encode() + self.table.numpy().astype("<i4").tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write all of it and a hash to an ``.npz`` that `approxconv.load_multiplier` reads.

        `approxconv.save_multiplier` writes other formats.

        Raises
        ------
        ValueError
            The suffix is not ``.npz``, or the name or `info` is no Unicode or larger than a table.
        """
        from .formats.npz import save_npz

        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"path must end in .npz, got {path}")
        save_npz(self, path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Multiplier):
            return NotImplemented
        return (
            (self.a_signed, self.w_signed) == (other.a_signed, other.w_signed)
            and self.bits == other.bits
            and torch.equal(self.table, other.table)
        )

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __reduce__(self) -> tuple[Any, ...]:
        gradients = self.gradients and tuple(table.numpy() for table in self.gradients)
        return _rebuild, (self.table.numpy(), self.a_signed, self.w_signed, self.name, self.info, gradients)

    def __repr__(self) -> str:
        return f"Multiplier({self.name or 'unnamed'!r}, a={self.a_format}, w={self.w_format})"

    @property
    def a_format(self) -> str:
        """The activation format as in ``uint8`` or ``int4``."""
        return f"{'' if self.a_signed else 'u'}int{self.a_bits}"

    @property
    def w_format(self) -> str:
        """The weight format as in ``uint8`` or ``int4``."""
        return f"{'' if self.w_signed else 'u'}int{self.w_bits}"


def _rebuild(
    table: np.ndarray,
    a_signed: bool,
    w_signed: bool,
    name: str,
    info: dict[str, Any] | None = None,
    gradients: tuple[np.ndarray, np.ndarray] | None = None,
) -> Multiplier:
    return Multiplier(table, a_signed=a_signed, w_signed=w_signed, name=name, info=info, gradients=gradients)


@cache
def _exact(bits: tuple[int, int], a_signed: bool, w_signed: bool) -> Multiplier:
    formats = [f"{n}{'s' if signed else 'u'}" for n, signed in zip(bits, (a_signed, w_signed), strict=True)]
    name = f"exact_{formats[0]}" if formats[0] == formats[1] else f"exact_{formats[0]}_{formats[1]}"
    with _disable_current_modes():  # what is kept for all must not be the fake tensor of one who traces
        return Multiplier.from_function(np.multiply, bits=bits, a_signed=a_signed, w_signed=w_signed, name=name)
