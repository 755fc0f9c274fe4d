"""The three operators as plans for the kernels in ``cuda_src/``, and whatever executes these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..geometry import batch_shape, conv_output_size, flat_batches
from ..multiplier import PreparedTable, prepare
from .plan import Plan, SourceEditedError, Target
from .planning import Problem, Steps, bind, depthwise_steps, product_sum_steps
from .sources import read

_MOST_EDITS = 100  # during one call
LUT_OPERATORS = ("lut_gemm", "lut_conv2d", "lut_dwconv2d")
FACTORED_OPERATORS = ("factored_gemm", "factored_conv2d")
OPERATORS = LUT_OPERATORS + FACTORED_OPERATORS

_Engine = TypeVar("_Engine", bound="PlannedEngine")


def operators_of(source: str) -> list[str]:
    """The operators that a kernel source has kernels for, by the beginnings of their names."""
    return [op for op in OPERATORS if any(name.startswith(f"{op}_") for name in read(source).kernels)]


def replanned(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute anew where another thread edited or swapped the kernel between planning and launching."""

    @wraps(operator)
    def computed(*arguments: object) -> Tensor:
        for _ in range(_MOST_EDITS):
            try:
                return operator(*arguments)
            except SourceEditedError:
                continue
        return operator(*arguments)

    return computed


class PlannedEngine:
    """Operators by kernels, whatever executes these.

    Parameters
    ----------
    device_type : str
        ``"cuda"`` or ``"cpu"``: where the tensors lie.
    target : callable
        ``target(device)`` says what planning needs to know of a device.
    run : callable
        ``run(plans, device)`` executes plans in order.
    require : callable
        Raises an ImportError or RuntimeError that says what is missing here.
    kernel : str, optional
        A kernel source that stands in for those of the operators whose kernels it defines.
    variant : tuple of int, optional
        Instead of the planner's choice.

    Raises
    ------
    ValueError
        `kernel` defines no kernel of any operator of this engine.
    """

    operators: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        device_type: str,
        target: Callable[[torch.device], Target],
        run: Callable[[Sequence[Plan], torch.device], None],
        require: Callable[[], object],
        kernel: str | None = None,
        variant: tuple[int, ...] | None = None,
    ) -> None:
        self._device_type, self._target, self._run, self._require = device_type, target, run, require
        self._kernel, self._variant = kernel, variant
        if kernel is not None and not set(operators_of(kernel)) & set(self.operators):
            raise ValueError(
                f"kernel source {kernel!r} must define kernels of {', '.join(self.operators)}, it defines "
                f"{', '.join(read(kernel).kernels) or 'none'}"
            )

    @classmethod
    def beside(cls: type[_Engine], other: PlannedEngine) -> _Engine:
        """An engine of this class where another one runs."""
        return cls(other._device_type, other._target, other._run, other._require)

    def with_kernel(self: _Engine, kernel: str | None, variant: tuple[int, ...] | None = None) -> _Engine:
        """The same engine with another kernel source, or with a variant prescribed."""
        return type(self)(self._device_type, self._target, self._run, self._require, kernel, variant)

    def sanitized(self: _Engine, sanitize: str) -> _Engine:
        """The host's engine, every launch under a sanitizer, see `run_on_host`."""
        from .host import run_on_host

        def run(plans: Sequence[Plan], device: torch.device) -> None:
            run_on_host(plans, sanitize=sanitize)

        return type(self)(self._device_type, self._target, run, self._require, self._kernel, self._variant)

    def unavailable(self, device: torch.device) -> str | None:
        """Why tensors on `device` cannot be computed with, or None."""
        if device.type != self._device_type:
            return f"it takes {self._device_type.upper()} tensors, got tensors on {device}"
        self._require()
        return None

    def _source(self, op: str) -> tuple[str, str]:
        name = self._kernel if self._kernel is not None and op in operators_of(self._kernel) else op
        return name, read(name).fingerprint

    def _execute(self, steps: Steps, source: tuple[str, str], tensors: Mapping[str, Tensor]) -> None:
        self._run(bind(steps, *source, tensors), tensors["out"].device)


class KernelEngine(PlannedEngine):
    """The operators on tables. Parameters are those of `PlannedEngine`, variants those of `product_sum_steps`."""

    operators = LUT_OPERATORS

    def _matmul(self, x: Tensor, w: Tensor, known: PreparedTable, out: Tensor) -> None:
        """``(G, M, K)`` by ``(G, N, K)`` into a contiguous ``(G, M, N)``; whichever of m and n suits as rows is."""
        source = self._source("lut_gemm")
        target = self._target(x.device)
        group, row, column = out.stride()
        of_x, of_w, of_table = (x.shape, x.stride()), (w.shape, w.stride()), (known.offset, known.entry)
        direct = product_problem(*of_x, *of_w, (group, column, row), *of_table)
        swapped = product_problem(*of_w, *of_x, (group, row, column), *of_table)
        direct, swapped = (
            product_sum_steps(problem, *source, "lut_gemm", target, self._variant) for problem in (direct, swapped)
        )
        if swapped.clocks < direct.clocks:
            self._execute(swapped, source, {"x": w, "w": x, "table": known.rows, "out": out})
        else:
            self._execute(direct, source, {"x": x, "w": w, "table": known.columns, "out": out})

    @replanned
    def lut_matmul(self, x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
        known = prepare(table)
        batch = batch_shape(x, w)
        y = torch.empty(*batch, x.shape[-2], w.shape[-2], dtype=torch.int32, device=x.device)
        for operands in flat_batches(x, w, y):
            self._matmul(*operands[:2], known, operands[2])
        return y

    @staticmethod
    def _convolution(
        x: Tensor,
        w: Tensor,
        known: PreparedTable,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pad_code: int,
    ) -> tuple[Problem, Tensor]:
        """The problem, and its output to be written."""
        geometry = (tuple(stride), tuple(padding), tuple(dilation), groups, pad_code)
        problem = convolution_problem(x.shape, x.stride(), w.shape, w.stride(), *geometry, known.offset, known.entry)
        y = torch.empty(x.shape[0], w.shape[0], *problem.out_size, dtype=torch.int32, device=x.device)
        return problem, y

    @replanned
    def lut_conv2d(
        self,
        x: Tensor,
        w: Tensor,
        table: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pad_code: int,
    ) -> Tensor:
        """Implicit im2col: a packed copy of the codes is all there is beside input and output."""
        known, source = prepare(table), self._source("lut_conv2d")
        problem, y = self._convolution(x, w, known, stride, padding, dilation, groups, pad_code)
        steps = product_sum_steps(problem, *source, "lut_conv2d", self._target(x.device), self._variant)
        self._execute(steps, source, {"x": x, "w": w, "table": known.columns, "out": y})
        return y

    @replanned
    def lut_dwconv2d(
        self,
        x: Tensor,
        w: Tensor,
        table: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        pad_code: int,
    ) -> Tensor:
        """Row tables over the taps of each filter."""
        known, source = prepare(table), self._source("lut_dwconv2d")
        problem, y = self._convolution(x, w, known, stride, padding, dilation, x.shape[1], pad_code)
        steps = depthwise_steps(problem, *source, self._target(x.device))
        self._execute(steps, source, {"x": x, "w": w, "table": known.columns, "out": y})
        return y


# Problems are remembered by what they are made of, and steps by the problem's identity: a layer called again pays for
# neither.
@lru_cache(maxsize=4096)
def product_problem(
    rows_shape: tuple[int, int, int],
    rows_strides: tuple[int, int, int],
    lanes_shape: tuple[int, int, int],
    lanes_strides: tuple[int, int, int],
    out_strides: tuple[int, int, int],
    offset: int,
    entry: str,
) -> Problem:
    """A batched matrix product as a 1×1 convolution of one column; `out_strides` are those of (group, lane, row)."""
    groups, pixels, depth = rows_shape
    group, row, column = rows_strides
    return Problem(
        x_shape=(1, groups, depth, pixels, 1),
        x_strides=(0, group, column, row, 0),
        w_shape=(groups, lanes_shape[1], depth, 1, 1),
        w_strides=(*lanes_strides, 0, 0),
        out_size=(pixels, 1),
        out_strides=(0, *out_strides),
        step=(1, 1),
        pad=(0, 0),
        dil=(1, 1),
        pad_code=0,
        offset=offset,
        entry=entry,
    )


@lru_cache(maxsize=4096)
def convolution_problem(
    x_shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    w_shape: tuple[int, ...],
    w_strides: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    pad_code: int,
    offset: int,
    entry: str,
) -> Problem:
    """A convolution into a contiguous output."""
    batch, _, *size = x_shape
    filters, depth, *kernel = w_shape
    out_size = conv_output_size(size, kernel, stride, padding, dilation)
    lanes, plane, step = filters // groups, out_size[0] * out_size[1], stride
    if tuple(kernel) == (1, 1) and not any(padding):  # pixels that a stride leaves out are not even packed
        x_strides = (*x_strides[:2], *(s * by for s, by in zip(x_strides[2:], step, strict=True)))
        size, step = out_size, (1, 1)
    return Problem(
        x_shape=(batch, groups, depth, *size),
        x_strides=(x_strides[0], x_strides[1] * depth, *x_strides[1:]),
        w_shape=(groups, lanes, depth, *kernel),
        w_strides=(w_strides[0] * lanes, *w_strides),
        out_size=out_size,
        out_strides=(filters * plane, lanes * plane, plane, 1),
        step=step,
        pad=padding,
        dil=dilation,
        pad_code=pad_code,
        offset=offset,
        entry=entry,
    )
