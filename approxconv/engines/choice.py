"""Which exact engine should be fastest for a call, and in words why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factorize import MOST_TERMS
from ..multiplier import BYTE_SPAN, prepare, prepare_bytes
from . import cost
from .factored import has_form, known_form, unavailable
from .residual import known_split
from .work import Work


@dataclass(frozen=True)
class Candidate:
    """An engine that computes the call exactly, the 8-bit GEMMs that it takes, and how long it should take on a CPU."""

    engine: str
    products: int
    seconds: float | None

    def __str__(self) -> str:
        if self.engine == "factored":
            return f"{self.products} {'product' if self.products == 1 else 'products'} of 8-bit integers"
        return "the exact product and row tables of 8-bit residuals" if self.engine == "residual" else "row tables"


@dataclass(frozen=True)
class Choice:
    """The engines that were weighed, the fastest first, and why it is that one."""

    candidates: tuple[Candidate, ...]
    why: str

    @property
    def engine(self) -> str:
        """The fastest."""
        return self.candidates[0].engine


_NO_VERSION = "the table is an inference tensor, which would be factorised anew on every call"
_CAPTURING = "the table cannot be read while a CUDA graph is recorded"
_HIGH_RANK = f"the table has no factorisation of at most {MOST_TERMS} terms"
_FAR = f"{_HIGH_RANK}, and beside the exact product its entries span more than {BYTE_SPAN}"
_IN_MEMORY = "row tables of a depthwise convolution are limited by a GPU's memory already"


def weigh(work: Work, table: Tensor) -> Choice:
    """Compare the exact engines of the table's device."""
    if table.device.type == "cuda":
        return _on_gpu(work, table)
    lookup = predict("cpu", work, table)
    if table.is_inference():
        return Choice((lookup,), _NO_VERSION)
    form, split = known_form(table), None if work.operator == "lut_dwconv2d" else known_split(table)
    others = [] if form is None else ["factored"]
    if split is not None and (form is None or form.products > split.form.products):
        others.append("residual")
    if not others:
        return Choice((lookup,), _HIGH_RANK if split is None and work.operator == "lut_dwconv2d" else _FAR)
    found = _ordered([lookup, *(predict(engine, work, table) for engine in others)])
    return found if form is not None else Choice(found.candidates, f"{found.why}; {_HIGH_RANK}")


def _on_gpu(work: Work, table: Tensor) -> Choice:
    lookup = Candidate("cuda", 0, None)
    if table.is_inference():
        return Choice((lookup,), _NO_VERSION)
    if work.operator == "lut_dwconv2d":
        return Choice((lookup,), _IN_MEMORY)
    if (reason := unavailable(table.device)) is not None:
        return Choice((lookup,), f"products of 8-bit integers cannot run here: {reason}")
    if not has_form(table) and torch.cuda.is_current_stream_capturing():
        return Choice((lookup,), _CAPTURING)
    form = known_form(table)
    if form is None:
        return Choice((lookup,), _HIGH_RANK)
    from ..kernels.factored import cuda_engine

    looked_up, multiplied = cuda_engine().clocks(work, form, prepare(table).entry, table.device)
    return _ordered([lookup, Candidate("factored", form.products, None)], [looked_up, multiplied])


def _ordered(candidates: Sequence[Candidate], costs: Sequence[float] | None = None) -> Choice:
    """The cheapest first, among equals the first that is given."""
    costs = [each.seconds for each in candidates] if costs is None else costs
    first, *rest = (candidates[i] for i in sorted(range(len(candidates)), key=costs.__getitem__))
    return Choice((first, *rest), f"{first} should take less than {' and '.join(map(str, rest))}")


def predict(engine: str, work: Work, table: Tensor) -> Candidate:
    """What an engine should take for a table; for one that there is no model of, or that cannot compute it, None."""
    if table.device.type == "cpu" and engine == "cpu":
        return Candidate(engine, 0, cost.seconds(engine, work, narrow=prepare_bytes(table) is not None))
    if engine == "factored" and (form := known_form(table)) is not None:
        seconds = cost.seconds(engine, work, form.products) if table.device.type == "cpu" else None
        return Candidate(engine, form.products, seconds)
    if engine == "residual" and (split := known_split(table)) is not None:
        return Candidate(engine, split.form.products, cost.seconds(engine, work, split.form.products))
    return Candidate(engine, 0, None)
