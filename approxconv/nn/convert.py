"""From a stock model to an approximate one: convert, calibrate, switch modes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..engines import check_engine
from ..multiplier import Multiplier
from .conv import ApproxConv2d
from .layer import ApproxLayer, as_multiplier, check_mode
from .linear import ApproxLinear

LAYERS: dict[type[nn.Module], type[ApproxLayer]] = {nn.Conv2d: ApproxConv2d, nn.Linear: ApproxLinear}


def _matching(pattern: str, names: Iterable[str], argument: str) -> set[str]:
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"{argument} pattern {pattern!r} matches no Conv2d or Linear; there are {', '.join(names)}")
    return found


def approximate(
    model: nn.Module,
    multiplier: Multiplier | str,
    *,
    skip: Iterable[str] = (),
    per_layer: Mapping[str, Multiplier | str] | None = None,
    first_last: str = "approximate",
    mode: str = "approximate",
    engine: str = "auto",
    inplace: bool = False,
) -> nn.Module:
    """Replace the Conv2d and Linear layers of a model by approximate ones.

    Parameters
    ----------
    model : torch.nn.Module
        A stock model. Only layers that are exactly `torch.nn.Conv2d` or `torch.nn.Linear` are replaced; a layer used
        in several places stays shared.
    multiplier : Multiplier or str
        For every layer that `per_layer` does not name.
    skip : iterable of str
        Names or glob patterns of layers to leave as they are.
    per_layer : mapping of str to Multiplier or str
        Name or glob pattern → multiplier; of several that match, the first counts.
    first_last : str
        What becomes of the first and the last layer in module order: ``"approximate"`` as all, ``"quantized"`` (exact
        products) or ``"float"`` (left as they are).
    mode, engine : str
        Of the new layers.
    inplace : bool
        Change `model` itself instead of a deep copy.

    Returns
    -------
    torch.nn.Module
        The converted model, in need of `calibrate` unless mode is ``"float"``.

    Raises
    ------
    ValueError
        Nothing to convert, a pattern that matches nothing, or an unknown name; the model is unchanged.
    """
    check_mode(mode)
    check_engine(engine)
    if first_last not in ("approximate", "quantized", "float"):
        raise ValueError(f"first_last must be 'approximate', 'quantized' or 'float', got {first_last!r}")
    default = as_multiplier(multiplier)
    choices = {pattern: as_multiplier(choice) for pattern, choice in (per_layer or {}).items()}
    names = [name for name, module in model.named_modules() if type(module) in LAYERS]
    if not names:
        raise ValueError("model has no Conv2d or Linear to convert")
    skip = [skip] if isinstance(skip, str) else list(skip)
    left = set().union(*(_matching(pattern, names, "skip") for pattern in skip))
    chosen = {pattern: _matching(pattern, names, "per_layer") for pattern in choices}
    outer = {names[0], names[-1]} if first_last != "approximate" else set()

    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    converted: dict[nn.Module, ApproxLayer] = {}
    for name in names:
        if name in left or (name in outer and first_last == "float"):
            continue
        layer = modules[name]
        choice = next((choices[pattern] for pattern, found in chosen.items() if name in found), default)
        if name in outer:
            choice = Multiplier.exact(choice.bits, choice.a_signed, choice.w_signed)
        converted[layer] = LAYERS[type(layer)].from_float(layer, choice, mode=mode, engine=engine)
    if model in converted:
        return converted[model]
    for module in modules.values():
        for child_name, child in list(module._modules.items()):  # named_children() skips repeats
            if child in converted:
                setattr(module, child_name, converted[child])
    return model


def approx_layers(model: nn.Module) -> dict[str, ApproxLayer]:
    """The approximate layers of a model by name; a ValueError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ApproxLayer)}
    if not layers:
        raise ValueError("model has no approximate layers: convert it with approxconv.approximate first")
    return layers


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Set every approximate layer of `model` to ``"float"``, ``"quantized"`` or ``"approximate"``; return the model.

    Raises
    ------
    ValueError
        No such mode, or no approximate layer in the model.
    """
    check_mode(mode)
    for layer in approx_layers(model).values():
        layer.mode = mode
    return model


def _run(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
        return
    if isinstance(batch, Mapping):
        keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        try:
            inspect.signature(model.forward).bind(**keywords)
        except TypeError:
            batch = tuple(batch.values())
        else:
            model(**keywords)
            return
    tensors = [value for value in batch if isinstance(value, Tensor)] if isinstance(batch, (tuple, list)) else []
    if not tensors:
        raise ValueError(f"batches must yield tensors, or tuples or dicts of them, got {type(batch).__name__}")
    model(tensors[0].to(device))


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Observe the activation range of every approximate layer and set its scale and zero point.

    Parameters
    ----------
    model : torch.nn.Module
        A converted model; run in float, in eval mode, without gradients. Modes and training flags are restored.
    batches : iterable
        Of tensors, of tuples or lists whose first tensor the model takes, or of dicts that it takes as keyword
        arguments (or, where their keys are not its arguments, whose first tensor it takes). Tensors are moved to the
        model's device.

    Returns
    -------
    torch.nn.Module
        The same model. Layers that no batch reached stay uncalibrated.

    Raises
    ------
    ValueError
        No approximate layers, no batch, a batch without a tensor, or values that are not finite.
    """
    layers = list(approx_layers(model).values())
    training = {module: module.training for module in model.modules()}
    modes = [layer.mode for layer in layers]
    device = next(chain(model.parameters(), model.buffers())).device
    count = 0
    try:
        model.eval()
        for layer in layers:
            layer.activation_observer.reset_min_max_vals()
            layer.mode, layer.observing = "float", True
        with torch.no_grad():
            for batch in batches:
                _run(model, batch, device)
                count += 1
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.mode, layer.observing = mode, False
        for module, flag in training.items():
            module.training = flag
    if count == 0:
        raise ValueError("batches must yield at least one batch, got none")
    for layer in [layer for layer in layers if layer.has_observed()]:
        layer.finish_calibration()
    return model
