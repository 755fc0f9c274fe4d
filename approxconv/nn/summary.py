"""What became of a model's layers: shapes, multiplications, multipliers, energy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .._display import Shown, html_table, printable, titled
from ..engines import EngineError
from ..figures import power_in_milliwatts
from ..multiplier import Multiplier, check_table_shape
from .composite import ApproxComposite
from .convert import as_float, convertible_layers, other_layers, run_batch
from .layer import ApproxLayer, as_multiplier

if TYPE_CHECKING:
    from rich.console import Group

_LONGEST_NAME = 60
_HEADINGS = ("layer", "type", "weight", "input → output", "MACs", "multiplier", "mode", "engine", "energy")
_NUMBERS = ("MACs", "energy")
_UNITS = ("pJ", "nJ", "µJ", "mJ", "J")


@dataclass(frozen=True)
class LayerSummary:
    """A layer that is approximate or could be.

    Attributes
    ----------
    name, type : str
        In the model; of the class.
    weight_shape : tuple of int or None
        None where there is no one weight.
    input_shapes, output_shape : tuple or None
        Of its tensors in the first call; None where it was not called.
    macs : int or None
        Multiplications of all its calls, those of padding among them; None where not known.
    multiplier : str
        Its name, ``"custom"`` without one; empty for a stock layer.
    mode, engine : str
        The engine is the one that runs the first call, where that is known; empty for a stock layer.
    power : float or None
        Of the multiplier that mode ``"approximate"`` looks up in, or of the exact one in mode ``"quantized"``, in mW.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...] | None
    input_shapes: tuple[tuple[int, ...], ...] | None
    output_shape: tuple[int, ...] | None
    macs: int | None
    multiplier: str
    mode: str
    engine: str
    power: float | None

    @property
    def energy(self) -> float | None:
        """``MACs · power · 1 ns`` in pJ: one product a cycle at 1 GHz; None where either is not known."""
        return None if self.macs is None or self.power is None else self.macs * self.power

    @property
    def cells(self) -> tuple[str, ...]:
        """What the columns show."""
        inputs = ", ".join(map(_shape, self.input_shapes or ()))
        return (
            printable(self.name, _LONGEST_NAME) or "(the model)",
            self.type,
            _shape(self.weight_shape),
            f"{inputs} → {_shape(self.output_shape)}" if inputs else "–",
            "–" if self.macs is None else f"{self.macs:,}",
            printable(self.multiplier, _LONGEST_NAME) or "–",
            self.mode,
            self.engine or "–",
            _joules(self.energy),
        )


@dataclass(frozen=True)
class ModelSummary(Shown):
    """Made by `model_summary`: a sequence of `LayerSummary`, and totals. Prints as a table, with rich too.

    Attributes
    ----------
    rows : tuple of LayerSummary
        In module order.
    exact_power : float or None
        Of the exact multiplier that energies are compared with, in mW.
    """

    rows: tuple[LayerSummary, ...]
    exact_power: float | None

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerSummary:
        return self.rows[index]

    @property
    def macs(self) -> int:
        """Multiplications of all layers."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def energy(self) -> float | None:
        """Of the layers where it is known, in pJ; None where it is known of none."""
        known = [row.energy for row in self.rows if row.energy is not None]
        return sum(known) if known else None

    @property
    def relative_energy(self) -> float | None:
        """`energy` in terms of what the exact multiplier would take for the same layers; None where that is unknown."""
        macs = sum(row.macs for row in self.rows if row.energy is not None)
        return self.energy / (macs * self.exact_power) if macs and self.exact_power else None

    @property
    def _total(self) -> str:
        approximate = [row for row in self.rows if row.multiplier]
        parts = [f"{len(approximate)} of {len(self.rows)} layers approximate"]
        if self.macs:
            parts.append(f"{self.macs:,} MACs")
        if self.energy is not None:
            share = sum(row.macs for row in self.rows if row.energy is not None) / max(self.macs, 1)
            energy = _joules(self.energy) + ("" if share == 1 else f" for {share:.1%} of the MACs")
            exact = self.relative_energy
            parts.append(energy if exact is None else f"{energy}, {exact:.1%} of the exact multiplier's")
        return "; ".join(parts)

    def _columns(self) -> list[tuple[str, list[str]]]:
        """Heading and cells of the columns that say anything."""
        columns = zip(_HEADINGS, zip(*(row.cells for row in self.rows), strict=True), strict=True)
        return [(heading, list(cells)) for heading, cells in columns if set(cells) != {"–"}]

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        columns = self._columns()
        for heading, _ in columns:
            is_number = heading in _NUMBERS
            table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
        for cells in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(Text, cells))
        return Group(table, Text(self._total))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=10_000, color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        headings, cells = zip(*self._columns(), strict=True)
        return titled(self._total, html_table(zip(*cells, strict=True), headings))


def model_summary(model: nn.Module, input: Any = None, *, exact: Multiplier | str | None = None) -> ModelSummary:
    """Report on the layers of a model that are approximate, could be, or have a matrix of weights.

    Parameters
    ----------
    model : torch.nn.Module
        Converted or not, on any device; on ``"meta"`` nothing is computed.
    input : optional
        A batch as for `approxconv.calibrate`. The model runs once on it, in float and eval mode without gradients, for
        shapes, multiplications, engines and energy; modes and training flags are restored.
    exact : Multiplier or str, optional
        The exact multiplier to compare energies with, its power in its `info`; by default one that the model holds.

    Returns
    -------
    ModelSummary

    Raises
    ------
    ValueError
        No layer that is approximate or could be, an input that holds no tensor, or `exact` has no power.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> summary = model_summary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), zeros(1, 3, 10, 10))
    >>> summary.macs, summary[0].output_shape
    (13824, (1, 8, 8, 8))
    """
    known = {**convertible_layers(model), **other_layers(model)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ApproxLayer) or (name in known and not isinstance(module, ApproxComposite))
    }
    if not layers:
        raise ValueError("model has no layer that is approximate or could be")
    if exact is None:
        powers = (_power(layer) for layer in layers.values() if isinstance(layer, ApproxLayer) and _is_exact(layer))
        exact_power = next((power for power in powers if power is not None), None)
    else:
        exact_power = as_multiplier(exact).power
        if exact_power is None:
            raise ValueError(f"exact must state its power in its info, got {as_multiplier(exact)!r}")
    calls: dict[str, list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]]] = {name: [] for name in layers}
    if input is not None:
        _watch(model, layers, input, calls)
    rows = tuple(_summarize(name, layer, calls[name], exact_power) for name, layer in layers.items())
    return ModelSummary(rows, exact_power)


def _watch(model: nn.Module, layers: dict[str, nn.Module], input: Any, calls: dict[str, list[Any]]) -> None:
    """Run the model and note the shapes of each layer's tensors, call by call."""

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = tuple(tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        output = output if isinstance(output, Tensor) else output[0]
        calls[name].append((inputs, tuple(output.shape)))

    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        with as_float(model):
            run_batch(model, input)
    finally:
        for handle in handles:
            handle.remove()


def _summarize(
    name: str,
    layer: nn.Module,
    calls: list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]],
    exact_power: float | None,
) -> LayerSummary:
    weight = getattr(layer, "weight", None)
    inputs, output = calls[0] if calls else (None, None)
    macs = [_macs(layer, *call) for call in calls]
    common = {
        "name": name,
        "type": type(layer).__name__,
        "weight_shape": None if weight is None else tuple(weight.shape),
        "input_shapes": inputs,
        "output_shape": output,
        "macs": sum(macs) if macs and None not in macs else None,
    }
    if not isinstance(layer, ApproxLayer):
        return LayerSummary(**common, multiplier="", mode="float", engine="", power=None)
    power = None
    if layer.mode == "quantized":
        power = exact_power
    elif layer.mode != "float":
        power = _power(layer)
        if power is None and _is_exact(layer):
            power = exact_power
    return LayerSummary(
        **common,
        multiplier=layer.multiplier_name or "custom",
        mode=layer.mode,
        engine=_engine(layer, inputs),
        power=power,
    )


def _power(layer: ApproxLayer) -> float | None:
    """Of the multiplier whose table the layer holds, in mW."""
    return power_in_milliwatts(layer.multiplier_info)


def _is_exact(layer: ApproxLayer) -> bool:
    """Whether the layer's table holds exact products; False where it holds no values."""
    if layer.table.is_meta:
        return False
    signs = layer.activation_format.signed, layer.weight_format.signed
    exact = Multiplier.exact(check_table_shape(layer.table), *signs)
    return torch.equal(layer.table, exact.on(layer.table.device))


def _macs(layer: nn.Module, inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...]) -> int | None:
    """Multiplications of a call; None where the layer has no one weight and is no product of two inputs."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return math.prod(output) * inputs[0][-1] if isinstance(layer, ApproxLayer) else None
    return math.prod(inputs[0] if isinstance(layer, _ConvTransposeNd) else output) * math.prod(weight.shape[1:])


def _engine(layer: ApproxLayer, inputs: tuple[tuple[int, ...], ...] | None) -> str:
    """The engine that runs a call, or the one asked for where that is not known."""
    from ..explanation import explain

    if inputs is None or len(inputs) != 1 or layer.mode == "float" or layer.table.is_meta:
        return layer.engine
    try:
        return explain(layer, inputs[0]).engine
    except (EngineError, ImportError):
        return layer.engine


def _shape(shape: tuple[int, ...] | None) -> str:
    return "–" if shape is None else "×".join(map(str, shape)) or "scalar"


def _joules(picojoules: float | None) -> str:
    if picojoules is None:
        return "–"
    step = min(max(int(math.log10(picojoules) // 3), 0), len(_UNITS) - 1) if picojoules > 0 else 0
    return f"{picojoules / 1000**step:.3g} {_UNITS[step]}"
