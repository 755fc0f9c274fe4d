"""From a stock model to an approximate one: convert, calibrate, switch modes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..engines import check_engine
from ..multiplier import Multiplier
from .conv import ApproxConv2d
from .layer import ApproxLayer, as_multiplier, check_mode
from .linear import ApproxLinear

LAYERS: dict[type[nn.Module], type[ApproxLayer]] = {nn.Conv2d: ApproxConv2d, nn.Linear: ApproxLinear}
_UNDO = {
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, {!r})",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
}


def _matching(pattern: str, names: Iterable[str], argument: str) -> set[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"{argument} must hold names or glob patterns of layers, got {pattern!r}")
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"{argument} pattern {pattern!r} matches no Conv2d or Linear; there are {', '.join(names)}")
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_skip(skip: Iterable[str]) -> list[str]:
    if not isinstance(skip, Iterable):
        raise ValueError(f"skip must be an iterable of names or glob patterns, got {skip!r}")
    return [skip] if isinstance(skip, str) else list(skip)


def _check_per_layer(per_layer: Mapping[str, Multiplier | str]) -> dict[str, Multiplier]:
    if not isinstance(per_layer, Mapping):
        raise ValueError(f"per_layer must map names or glob patterns to multipliers, got {per_layer!r}")
    choices = {}
    for pattern, choice in per_layer.items():
        try:
            choices[pattern] = as_multiplier(choice)
        except ValueError as error:
            raise ValueError(f"per_layer[{pattern!r}]: {error}") from None
    return choices


@cache
def _own_names(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes an approximate layer has and the torch layer `kind` has not."""
    stock = kind(1, 1, 1, device="meta")  # no random numbers are drawn
    return frozenset(dir(LAYERS[kind].from_float(stock, Multiplier.exact()))).difference(dir(stock))


def _check_convertible(name: str, layer: nn.Module) -> None:
    """Raise a ValueError that names the layer and the remedy if it cannot be replaced.

    An approximate layer trains its weight itself; it must not be derived from others by a hook or a parametrisation.
    """
    derived = [tensor for tensor in ("weight", "bias") if tensor not in layer._parameters]
    if parametrize.is_parametrized(layer):
        derived = list(layer.parametrizations)
        undo = "torch.nn.utils.parametrize.remove_parametrizations(layer, {!r})"
    else:
        hooks = layer._forward_pre_hooks.values()
        undo = next((undo for hook in hooks for kind, undo in _UNDO.items() if isinstance(hook, kind)), None)
    if derived:
        remedy = f"run {undo.format(derived[0])} first" if undo else f"make its {derived[0]} a parameter"
        raise ValueError(f"layer {name!r} must hold its {derived[0]} as a parameter: {remedy}, or skip the layer")
    taken = _own_names(type(layer)).intersection(dir(layer)) | {"forward"}.intersection(vars(layer))
    if taken:
        raise ValueError(
            f"layer {name!r} must be free of attributes that the approximate layer has itself, got "
            f"{', '.join(sorted(taken))}: delete or rename them, or skip the layer"
        )


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
        in several places stays shared, and hooks, buffers and attributes that were put on a layer stay on it.
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
        Nothing to convert, a pattern that matches nothing, an unknown name, or a layer whose weight is no parameter
        (pruned, spectrally normalised, parametrised) or that has attributes which the approximate layer needs; the
        model is unchanged.
    """
    _check_model(model)
    check_mode(mode)
    check_engine(engine)
    if first_last not in ("approximate", "quantized", "float"):
        raise ValueError(f"first_last must be 'approximate', 'quantized' or 'float', got {first_last!r}")
    default = as_multiplier(multiplier)
    choices = {} if per_layer is None else _check_per_layer(per_layer)
    stock = {
        name: module
        for name, module in model.named_modules()
        if parametrize.type_before_parametrizations(module) in LAYERS
    }
    names = list(stock)
    if not names:
        raise ValueError("model has no Conv2d or Linear to convert")
    left = set().union(*(_matching(pattern, names, "skip") for pattern in _check_skip(skip)))
    chosen = {pattern: _matching(pattern, names, "per_layer") for pattern in choices}
    outer = {names[0], names[-1]} if first_last != "approximate" else set()
    if first_last == "float":
        left |= outer
    for name in names:
        if name not in left:
            _check_convertible(name, stock[name])

    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    converted: dict[nn.Module, ApproxLayer] = {}
    for name in names:
        if name in left:
            continue
        layer = modules[name]
        choice = next((choices[pattern] for pattern, found in chosen.items() if name in found), default)
        if name in outer:
            choice = Multiplier.exact(choice.bits, choice.a_signed, choice.w_signed)
        converted[layer] = LAYERS[type(layer)].from_float(layer, choice, mode=mode, engine=engine)
    if model in converted:
        return converted[model]
    for module in (*modules.values(), *converted.values()):
        for child_name, child in list(module._modules.items()):  # named_children() skips repeats
            if child in converted:
                setattr(module, child_name, converted[child])
    return model


def approx_layers(model: nn.Module) -> dict[str, ApproxLayer]:
    """The approximate layers of a model by name; a ValueError if there are none."""
    _check_model(model)
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


def _keywords(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any] | None:
    """What `model.forward` takes of `batch` by keyword; None if that is nothing, or not all it needs."""
    signature = inspect.signature(model.forward)
    names = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    keywords = {key: value for key, value in batch.items() if takes_any or key in names}
    try:
        signature.bind(**keywords)
    except TypeError:
        return None
    return keywords or None


def _first_tensor(batch: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and dicts, depth first."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (tuple, list)):
        return None
    return next((tensor for tensor in map(_first_tensor, batch) if tensor is not None), None)


def _run(model: nn.Module, batch: Any, device: torch.device) -> None:
    keywords = _keywords(model, batch) if isinstance(batch, Mapping) else None
    if keywords is not None:
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in keywords.items()})
        return
    tensor = _first_tensor(batch)
    if tensor is None:
        raise ValueError(
            f"batches must yield tensors, or tuples, lists or dicts that hold one, got {type(batch).__name__}"
        )
    model(tensor.to(device))


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Observe the activation range of every approximate layer and set its scale and zero point.

    Parameters
    ----------
    model : torch.nn.Module
        A converted model; run in float, in eval mode, without gradients. Modes and training flags are restored.
    batches : iterable
        Of tensors; of tuples or lists, nested or not, whose first tensor the model takes; or of dicts, of which it
        takes the keys that are arguments of its ``forward`` (or, where these are not all it needs, the first tensor).
        Tensors are moved to the model's device.

    Returns
    -------
    torch.nn.Module
        The same model. Layers that no batch reached stay uncalibrated.

    Raises
    ------
    ValueError
        No approximate layers, `batches` is no iterable, no batch, a batch without a tensor, or values that are not
        finite.
    """
    layers = list(approx_layers(model).values())
    try:
        batches = iter(batches)
    except TypeError as error:
        wanted = "an iterable of tensors, tuples, lists or dicts"
        raise ValueError(f"batches must be {wanted}, got {type(batches).__name__}") from error
    training = {module: module.training for module in model.modules()}
    modes = [layer.mode for layer in layers]
    device = next(chain(model.parameters(), model.buffers())).device
    count = 0
    try:
        model.eval()
        for layer in layers:
            layer.start_calibration()
            layer.mode = "float"
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
    for layer in layers:
        layer.synchronize_observers()
    for layer in [layer for layer in layers if layer.has_observed()]:
        layer.finish_calibration()
    return model
