"""A multiplier's exact low-rank form over the integers: what tables' and functions' have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ._display import Shown, html_table, image, titled
from .multiplier import table_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .fast_model import FastModel

Form = TypeVar("Form")
_MOST_COLUMNS = 2048  # of a picture, each of which then is an operand


@dataclass(frozen=True, eq=False)
class LowRank(Shown):
    """``fn(a, w) = scale·value(a)·value(w) + Σ_r f[r, a]·g[r, w]``, a and w being codes; see `Factorization`."""

    scale: int
    f: Tensor
    g: Tensor
    a_signed: bool
    w_signed: bool

    _left: ClassVar[str]

    @property
    def rank(self) -> int:
        """R, the number of terms besides the exact product."""
        return len(self.f)

    @property
    def products(self) -> int:
        """How many of the ``scale + rank`` products take a GEMM.

        A term with a constant f_r or g_r does not: over k it is that constant times the sum of the other.
        """
        return self.scale + varying_terms(self.f.numpy(), self.g.numpy())

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """F and G with ``fn = Fᵀ·G``, int64, ``(scale + R, 2**bits)``; the exact product's values come first."""
        return tuple(
            torch.cat([torch.from_numpy(values)[None][: self.scale], side.long()])
            for values, side in zip(self._values, (self.f, self.g), strict=True)
        )

    def fast_model(self) -> FastModel:
        """A callable for `FastApproxConv2dOp` and `FastApproxGeMMOp` that computes exact sums."""
        from .fast_model import FastModel

        return FastModel(self)

    @cached_property
    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        return table_values((self.f.shape[1], self.g.shape[1]), (self.a_signed, self.w_signed))

    def plot(self) -> Figure:
        """Draw f and g, a term a row, operands in ascending order of value; red is positive, blue negative.

        Of operands of more than 11 bits it shows 2048, at even distances.

        Returns
        -------
        matplotlib.figure.Figure
            A new one; no pyplot figure is opened.

        Raises
        ------
        ImportError
            matplotlib is missing.
        """
        from .pictures import colormap, new_picture

        rows = max(self.rank, 1)
        figure = new_picture(figsize=(6.4, 1.2 + 0.22 * min(rows, 24)), layout="constrained")
        limit = max(_largest(self.f), _largest(self.g), 1)
        panels = figure.subplots(1, 2, sharey=True)
        for ax, name, operand, factors, values in zip(
            panels, "fg", ("activation", "weight"), (self.f, self.g), self._values, strict=True
        ):
            low, high = int(values.min()), int(values.max())
            order = np.argsort(values)[:: max(len(values) // _MOST_COLUMNS, 1)]
            shown = ax.imshow(
                factors.numpy()[:, order] if self.rank else np.zeros((1, len(order))),
                cmap=colormap(),
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="nearest",
                extent=(low - 0.5, high + 0.5, rows - 0.5, -0.5),
            )
            ax.set_title(f"{name}: {span(factors)}", fontsize=9)
            ax.set_xlabel(operand, fontsize=8)
            ax.set_xticks(sorted({low, 0, high}))
            ax.set_yticks(range(0, self.rank, max(self.rank // 8, 1)))
            ax.tick_params(labelsize=7)
            ax.grid(False)
        panels[0].set_ylabel("term", fontsize=8)
        figure.colorbar(shown, ax=panels, format="{x:.0f}").ax.tick_params(labelsize=7)
        return figure

    def _repr_html_(self) -> str:
        try:
            png = self.plot().png(80)
        except ImportError:
            png = None
        rows = [
            ("terms", self.rank),
            ("products in a GEMM", self.products),
            ("f", span(self.f)),
            ("g", span(self.g)),
            *self._facts(),
        ]
        picture = "" if png is None else image(png, "f and g by operand values")
        return titled(self._formula, html_table(rows), picture)

    def _facts(self) -> list[tuple[str, object]]:
        """More rows for notebooks."""
        return []

    @property
    def _formula(self) -> str:
        parts = ["a·w"] * self.scale + [f"Σ f[a]·g[w] of {count_terms(self.rank)}"] * bool(self.rank)
        return f"{self._left} = {' + '.join(parts) or 0}"


def count_terms(rank: int) -> str:
    """``1 term``, ``2 terms``."""
    return "1 term" if rank == 1 else f"{rank} terms"


def varying_terms(f: np.ndarray, g: np.ndarray) -> int:
    """How many terms have neither a constant f nor a constant g."""
    return int(((f != f[:, :1]).any(axis=1) & (g != g[:, :1]).any(axis=1)).sum())


def span(factors: Tensor) -> str:
    """The range of some factors, in words."""
    return f"{int(factors.min())} to {int(factors.max())}".replace("-", "−") if len(factors) else "no terms"


def _largest(factors: Tensor) -> int:
    return int(factors.long().abs().max()) if factors.numel() else 0


def search_once(key: str, search: Callable[[], Form | None], load: Callable[[Mapping[str, Any]], Form]) -> Form | None:
    """What a search finds, kept on disk beside the compiled kernels.

    Parameters
    ----------
    key : str
        Name of the entry: by all that the search depends on.
    search : callable
        Returns a dataclass of arrays, strings and numbers, or None.
    load : callable
        That dataclass anew from a mapping of arrays by the fields' names; a ValueError or a KeyError if what it gets is
        not what the search would find.
    """
    from .kernels.cache import cached_folder

    fresh: list[Form | None] = []

    def store(folder: Path) -> None:
        fresh.append(search())
        np.savez(folder / "factors.npz", **({} if fresh[-1] is None else vars(fresh[-1])))

    with suppress(OSError):  # a full or read-only disk costs the time of a search, no more
        entry = cached_folder(key, store)
        if not fresh:
            try:
                with np.load(entry / "factors.npz", allow_pickle=False) as file:
                    fresh.append(load(file) if file.files else None)
            except (OSError, ValueError, KeyError, BadZipFile):
                shutil.rmtree(entry)
                cached_folder(key, store)
    return fresh[-1] if fresh else search()
