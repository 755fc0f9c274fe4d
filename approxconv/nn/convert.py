"""From a stock model to an approximate one: convert, calibrate, switch modes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from ..gradients import GradientTables
from ..multiplier import Multiplier, check_flag
from ..quantization import Quantization
from .attention import (
    ATTENTION_CHILD,
    ApproxAttention,
    ApproxMultiheadAttention,
    Attention,
    HuggingFaceAttention,
    approximate_attention,
    attention_modules,
    check_attention,
    restore_attention,
)
from .batchnorm import find_batchnorms, fold
from .composite import ApproxComposite
from .conv import ApproxConv1d, ApproxConv2d, ApproxConv3d
from .conv_transpose import ApproxConvTranspose1d, ApproxConvTranspose2d, ApproxConvTranspose3d
from .layer import ApproxLayer, as_multiplier, check_mode
from .linear import ApproxLinear
from .matmul import ApproxMatmul, Matmul
from .recurrent import ApproxGRU, ApproxGRUCell, ApproxLSTM, ApproxLSTMCell

LAYERS: dict[type[nn.Module], type[ApproxLayer | ApproxComposite]] = {
    nn.Conv1d: ApproxConv1d,
    nn.Conv2d: ApproxConv2d,
    nn.Conv3d: ApproxConv3d,
    nn.ConvTranspose1d: ApproxConvTranspose1d,
    nn.ConvTranspose2d: ApproxConvTranspose2d,
    nn.ConvTranspose3d: ApproxConvTranspose3d,
    nn.Linear: ApproxLinear,
    nn.MultiheadAttention: ApproxMultiheadAttention,
    nn.LSTM: ApproxLSTM,
    nn.GRU: ApproxGRU,
    nn.LSTMCell: ApproxLSTMCell,
    nn.GRUCell: ApproxGRUCell,
    Matmul: ApproxMatmul,
    Attention: ApproxAttention,
}
"""What `approximate` replaces by what: exactly these types, not their subclasses."""

Pattern = str | Callable[[str, nn.Module], bool]
FIRST_LAST = ("quantized", "approximate", "float")
_UNDO = {
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, {!r})",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
}


def matching(pattern: Pattern, layers: Mapping[str, nn.Module], argument: str) -> set[str]:
    """Names of the layers that a glob pattern or a predicate picks; a ValueError for a pattern that picks none."""
    if callable(pattern):
        return {name for name, layer in layers.items() if pattern(name, layer)}
    if not isinstance(pattern, str):
        raise ValueError(
            f"{argument} must hold names or glob patterns of layers, or predicates of name and layer, got {pattern!r}"
        )
    found = {name for name in layers if fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"{argument} pattern {pattern!r} matches no layer; there are {', '.join(layers)}")
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_skip(skip: Pattern | Iterable[Pattern]) -> list[Pattern]:
    if isinstance(skip, str) or callable(skip):
        return [skip]
    if not isinstance(skip, Iterable):
        raise ValueError(f"skip must be an iterable of names, glob patterns or predicates, got {skip!r}")
    return list(skip)


@cache
def _stock(kind: type[nn.Module]) -> nn.Module:
    """A small layer of that type; no random numbers are drawn."""
    return kind() if kind in (Matmul, Attention) else kind(1, 1, 1, device="meta")


def _check_settings(argument: str, settings: dict[str, Any], kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
    """Settings that `from_float` takes for layers of a type, or its ValueError; tried on one without weights."""
    try:
        settings["multiplier"] = as_multiplier(settings["multiplier"])
        LAYERS[kind].from_float(copy.deepcopy(_stock(kind)), **settings)
    except ValueError as error:
        raise ValueError(f"{argument}{error}") from None
    return settings


def _check_per_layer(
    per_layer: Mapping[Pattern, Multiplier | str | Mapping[str, Any]], default: dict[str, Any]
) -> dict[Pattern, dict[str, Any]]:
    """The settings by pattern; what one leaves out is the default's."""
    if not isinstance(per_layer, Mapping):
        raise ValueError(f"per_layer must map names, glob patterns or predicates to multipliers, got {per_layer!r}")
    choices = {}
    for pattern, choice in per_layer.items():
        own = dict(choice) if isinstance(choice, Mapping) else {"multiplier": choice}
        unknown = [key for key in own if key not in default]
        if unknown:
            wanted = ", ".join(map(repr, default))
            raise ValueError(f"per_layer[{pattern!r}] must hold {wanted} at most, got {unknown[0]!r}")
        choices[pattern] = _check_settings(f"per_layer[{pattern!r}]: ", {**default, **own})
    return choices


@cache
def _own_names(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes an approximate layer has and the torch layer `kind` has not."""
    stock = copy.deepcopy(_stock(kind))
    return frozenset(dir(LAYERS[kind].from_float(stock, Multiplier.exact()))).difference(dir(_stock(kind)))


def _check_parameters(name: str, layer: nn.Module, stock: nn.Module) -> None:
    """Raise a ValueError that names the layer and the remedy if a parameter that `stock` has is derived from others."""
    names = getattr(layer, "_flat_weights_names", stock._parameters)  # an LSTM's or a GRU's, as many as it has layers
    derived = [tensor for tensor in names if tensor not in layer._parameters]
    if parametrize.is_parametrized(layer):
        derived = list(layer.parametrizations)
        undo = "torch.nn.utils.parametrize.remove_parametrizations(layer, {!r})"
    else:
        hooks = layer._forward_pre_hooks.values()
        undo = next((undo for hook in hooks for kind, undo in _UNDO.items() if isinstance(hook, kind)), None)
    if derived:
        remedy = f"run {undo.format(derived[0])} first" if undo else f"make its {derived[0]} a parameter"
        raise ValueError(f"layer {name!r} must hold its {derived[0]} as a parameter: {remedy}, or skip the layer")
    for child, part in stock.named_children():
        _check_parameters(f"{name}.{child}", layer.get_submodule(child), part)


def _check_convertible(name: str, layer: nn.Module) -> None:
    """Raise a ValueError that names the layer and the remedy if it cannot be replaced.

    An approximate layer trains its weight itself; it must not be derived from others by a hook or a parametrisation.
    """
    _check_parameters(name, layer, _stock(parametrize.type_before_parametrizations(layer)))
    taken = _own_names(type(layer)).intersection(dir(layer)) | {"forward"}.intersection(vars(layer))
    if taken:
        raise ValueError(
            f"layer {name!r} must be free of attributes that the approximate layer has itself, got "
            f"{', '.join(sorted(taken))}: delete or rename them, or skip the layer"
        )


def convertible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that are approximate or that `approximate` would convert, by name, in module order.

    Without those inside an approximate one, and without what `approximate_attention` added.
    """
    _check_model(model)
    found, inside = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, (ApproxLayer, ApproxComposite)):
            if module not in inside and not isinstance(module, HuggingFaceAttention):
                found[name] = module
            if isinstance(module, ApproxComposite):
                inside.update(module.modules())
        elif parametrize.type_before_parametrizations(module) in LAYERS:
            found[name] = module
    return found


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The type in `LAYERS` of a stock layer, or of that which an approximate one stands for; None if there is none."""
    for kind, new in LAYERS.items():
        if isinstance(layer, new) or parametrize.type_before_parametrizations(layer) is kind:
            return kind
    return None


def other_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a matrix of weights that `approximate` does not know, as subclasses of those that it does.

    Embeddings, which multiply nothing, are none.
    """
    known = convertible_layers(model).values()
    inside = {part for layer in known for part in layer.modules()}
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if module in inside or isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or any(module.children()):
            continue
        if isinstance(module, tuple(LAYERS)) or (isinstance(weight, nn.Parameter) and weight.ndim > 1):
            found[name] = module
    return found


def _ends(names: Sequence[str], first_last: str | None) -> tuple[set[str], str]:
    """The first and the last name, and what becomes of them."""
    if first_last not in (None, *FIRST_LAST):
        raise ValueError(f"first_last must be {', '.join(map(repr, FIRST_LAST))} or None, got {first_last!r}")
    ends = {*names[:1], *names[-1:]}
    return ends, first_last or ("quantized" if len(names) > len(ends) else "approximate")


def exact_products(multiplier: Multiplier) -> Multiplier:
    """The exact multiplier of the same operand formats."""
    return Multiplier.exact(multiplier.bits, multiplier.a_signed, multiplier.w_signed)


def _set_anew(layer: ApproxLayer | ApproxComposite, settings: dict[str, Any]) -> ApproxLayer | ApproxComposite:
    """An approximate layer with other settings: the same one, calibrated as it is, unless quantised another way."""
    parts = layer.products().values() if isinstance(layer, ApproxComposite) else (layer,)
    if any(part.quantization != (settings["quantization"] or Quantization()) for part in parts):
        if isinstance(layer, HuggingFaceAttention):
            device = next(layer.buffers()).device
            return HuggingFaceAttention(layer.implementation, **settings).to(device).train(layer.training)
        return type(layer).from_float(layer.to_float(), **settings)
    for part in parts:
        part.gradient = "ste"  # tables of its own may not fit the other multiplier
        part.set_multiplier(settings["multiplier"])
        for name in ("gradient", "mode", "engine"):
            setattr(part, name, settings[name])
    return layer


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, wherever these are; the model, or what stands for it."""
    modules = [*model.modules(), *replacements.values()]
    for module in modules:
        for name, child in list(module._modules.items()):  # named_children() skips repeats
            if child in replacements:
                setattr(module, name, replacements[child])
    return replacements.get(model, model)


def _find_batchnorms(model: nn.Module, layers: Mapping[str, nn.Module], fold_batchnorm: Any) -> dict[str, str]:
    """`find_batchnorms` by tracing for True, in a run for a batch, none for False."""
    if isinstance(fold_batchnorm, bool):
        return find_batchnorms(model, layers) if fold_batchnorm else {}

    def run() -> Any:
        with as_float(model):
            return run_batch(model, fold_batchnorm)

    return find_batchnorms(model, layers, run)


def approximate(
    model: nn.Module,
    multiplier: Multiplier | str,
    *,
    skip: Pattern | Iterable[Pattern] = (),
    per_layer: Mapping[Pattern, Multiplier | str | Mapping[str, Any]] | None = None,
    first_last: str | None = None,
    quantization: Quantization | None = None,
    gradient: str | GradientTables = "ste",
    fold_batchnorm: Any = False,
    mode: str = "approximate",
    engine: str = "auto",
    inplace: bool = False,
) -> nn.Module:
    """Replace the layers of a model by approximate ones; `approxconv.model_summary` reports what became of it.

    Parameters
    ----------
    model : torch.nn.Module
        A stock model. Only layers that are exactly of a type in `approxconv.nn.convert.LAYERS` are replaced (a warning
        names others that have a matrix of weights, such as those of subclasses, unless they are skipped), and the
        attention of Hugging Face models computed by `approximate_attention`, under the name of its module; a layer
        used in several places stays shared, and hooks, buffers and attributes that were put on a layer stay on it.
        Layers that are approximate already are set anew, as if they were converted now; they stay calibrated unless
        operand formats or quantisation change. So converting twice is converting once.
    multiplier : Multiplier or str
        For every layer that `per_layer` does not name.
    skip : str, callable or iterable of them
        Names or glob patterns of layers to leave as they are, or predicates ``f(name, layer) -> bool``.
    per_layer : mapping
        Name, glob pattern or predicate → multiplier, or a mapping with any of the keys ``multiplier``,
        ``quantization``, ``gradient``, ``mode`` and ``engine``; of several that match, the first counts.
    first_last : str, optional
        What becomes of the first and the last layer in module order where `per_layer` does not name them:
        ``"quantized"`` (exact products), as is usual and the default if there are other layers, ``"approximate"`` as
        all, or ``"float"`` (left as they are).
    quantization : Quantization, optional
        Of the new layers; by default chosen from the multiplier's operand formats.
    gradient : str or GradientTables
        Of the new layers: ``"ste"``, ``"lre"``, ``"smooth"`` or tables.
    fold_batchnorm : bool or batch
        First make every batch normalisation that directly follows one of these layers part of it, as hardware for
        inference has it. Which one follows which is found by `torch.fx`; for models that it cannot trace, by one run on
        a batch as for `calibrate`. They must be in eval mode.
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
        Nothing to convert, a pattern that matches nothing, an unknown name, a quantisation that does not fit a
        multiplier, a layer whose weight is no parameter (pruned, spectrally normalised, parametrised) or that has
        attributes which the approximate layer needs, or a batch normalisation to fold that is in training mode, has
        hooks or is called by code that cannot be traced; the model is unchanged.
    """
    check_flag("inplace", inplace)
    default = _check_settings(
        "",
        {
            "multiplier": multiplier,
            "quantization": quantization,
            "gradient": gradient,
            "mode": mode,
            "engine": engine,
        },
    )
    choices = {} if per_layer is None else _check_per_layer(per_layer, default)
    layers, attentions = convertible_layers(model), attention_modules(model)
    units = {**layers, **attentions}
    if not units:
        raise ValueError(f"model has no layer to convert: {', '.join(kind.__name__ for kind in LAYERS)}")
    ends, treatment = _ends(list(layers), first_last)
    others = other_layers(model)
    left = set().union(*(matching(pattern, {**units, **others}, "skip") for pattern in _check_skip(skip)))
    chosen = {pattern: matching(pattern, units, "per_layer") for pattern in choices}
    exact = {**default, "multiplier": exact_products(default["multiplier"])}
    settings = {}
    for name in units:
        named = next((pattern for pattern, found in chosen.items() if name in found), None)
        if named is not None:
            settings[name] = choices[named]
        elif name not in ends or treatment == "approximate":
            settings[name] = default
        elif treatment == "quantized":
            settings[name] = exact
    settings = {name: own for name, own in settings.items() if name not in left}
    tried = set()
    for name, own in settings.items():
        if name in attentions:
            check_attention(name, attentions[name])
        elif not isinstance(layers[name], (ApproxLayer, ApproxComposite)):
            _check_convertible(name, layers[name])
        kind = Matmul if name in attentions else _kind(layers[name])
        if kind is not None and (id(own), kind) not in tried:
            _check_settings(f"layer {name!r}: ", own, kind)
            tried.add((id(own), kind))
    norms = _find_batchnorms(model, {name: layers[name] for name in settings if name in layers}, fold_batchnorm)
    unknown = [f"{name} ({type(other).__name__})" for name, other in others.items() if name not in left]
    if unknown:
        warnings.warn(
            f"layers of unknown types stay in float: {', '.join(unknown)}; skip= says that they shall", stacklevel=2
        )

    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    for name, norm in norms.items():
        new[modules[norm]] = fold(modules[name], modules[norm])
    for name, own in settings.items():
        layer = modules[name]
        if name in attentions:
            layer = getattr(layer, ATTENTION_CHILD, None)
        if layer is None:
            approximate_attention(
                model, {name: own["multiplier"]}, **{k: v for k, v in own.items() if k != "multiplier"}
            )
        elif isinstance(layer, (ApproxLayer, ApproxComposite)):
            new[layer] = _set_anew(layer, own)
        else:
            new[layer] = LAYERS[type(layer)].from_float(layer, **own)
    return _nest(_replace(model, new))


def _nest(model: nn.Module) -> nn.Module:
    """Have transformer encoders make nested tensors, which only torch's fused layers take, or not; return the model."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            stock = vars(encoder).pop("_stock_use_nested_tensor", encoder.use_nested_tensor)
            encoder.use_nested_tensor = stock
            if any(isinstance(module, ApproxLayer) for module in encoder.modules()):
                encoder._stock_use_nested_tensor = stock
                encoder.use_nested_tensor = False
    return model


def to_float(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give the stock layers back that `approximate` replaced.

    Parameters
    ----------
    model : torch.nn.Module
        A converted model.
    inplace : bool
        Change `model` itself instead of a deep copy.

    Returns
    -------
    torch.nn.Module
        The model with the parameters as they are now, and the hooks. A folded batch normalisation stays folded.

    Raises
    ------
    ValueError
        No approximate layers, or one that was parametrised since.
    """
    approx_layers(model)
    check_flag("inplace", inplace)
    for name, layer in convertible_layers(model).items():
        if isinstance(layer, tuple(LAYERS.values())) and parametrize.is_parametrized(layer):
            _check_parameters(name, layer, _stock(_kind(layer)))
    model = model if inplace else copy.deepcopy(model)
    restore_attention(model)
    layers = convertible_layers(model).values()
    converted = {layer: layer.to_float() for layer in layers if isinstance(layer, tuple(LAYERS.values()))}
    return _nest(_replace(model, converted))


def set_multiplier(
    model: nn.Module,
    multiplier: Multiplier | str | Mapping[Pattern, Multiplier | str],
    *,
    first_last: str | None = None,
) -> nn.Module:
    """Have approximate layers look up in other tables from now on; weights stay where they are, and are not copied.

    Parameters
    ----------
    model : torch.nn.Module
        A converted model.
    multiplier : Multiplier, str or mapping
        For every approximate layer; or by name (as of `approx_layers`), glob pattern or predicate for those that match,
        the first that matches counting.
    first_last : str, optional
        As for `approximate`, of a multiplier for all: which of them get the exact products of its operand formats
        (``"quantized"``) or stay as they are (``"float"``).

    Returns
    -------
    torch.nn.Module
        The same model, calibrated as it was unless operand formats change.

    Raises
    ------
    ValueError
        No approximate layers, no such multiplier, a pattern that matches nothing, or a multiplier that does not fit a
        layer's quantisation or gradient; nothing has changed.
    """
    layers = approx_layers(model)
    chosen: dict[str, Multiplier] = {}
    if isinstance(multiplier, Mapping):
        for pattern, choice in multiplier.items():
            choice = as_multiplier(choice)
            for name in matching(pattern, layers, "multiplier"):
                chosen.setdefault(name, choice)
    else:
        chosen = dict.fromkeys(layers, as_multiplier(multiplier))
        ends, treatment = _ends(list(convertible_layers(model)), first_last)
        if treatment != "approximate":
            inner = tuple(f"{name}." for name in ends)
            for name in [name for name in layers if name in ends or name.startswith(inner)]:
                own = chosen.pop(name)
                if treatment == "quantized":
                    chosen[name] = exact_products(own)
    for name, choice in chosen.items():
        try:
            layers[name].check_multiplier(choice)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    for name, choice in chosen.items():
        layers[name].set_multiplier(choice)
    return model


def approx_layers(model: nn.Module) -> dict[str, ApproxLayer]:
    """The approximate layers of a model by name; a ValueError if there are none."""
    _check_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ApproxLayer)}
    if not layers:
        raise ValueError("model has no approximate layers: convert it with approxconv.approximate first")
    return layers


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Set the `mode` of every approximate layer of a model, as `ApproxLayer` lists them; return the model.

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


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch as `calibrate` describes it, on the model's device."""
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    keywords = _keywords(model, batch) if isinstance(batch, Mapping) else None
    if keywords is not None:
        return model(
            **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in keywords.items()}
        )
    tensor = _first_tensor(batch)
    if tensor is None:
        raise ValueError(
            f"batches must yield tensors, or tuples, lists or dicts that hold one, got {type(batch).__name__}"
        )
    return model(tensor.to(device))


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Every approximate layer in float, the model in eval mode, no gradients; modes and training flags come back."""
    training = {module: module.training for module in model.modules()}
    modes = {module: module.mode for module in model.modules() if isinstance(module, ApproxLayer)}
    try:
        model.eval()
        for layer in modes:
            layer.mode = "float"
        with torch.no_grad():
            yield
    finally:
        for layer, mode in modes.items():
            layer.mode = mode
        for module, flag in training.items():
            module.training = flag


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
    count = 0
    try:
        for layer in layers:
            layer.start_calibration()
        with as_float(model):
            for batch in batches:
                run_batch(model, batch)
                count += 1
    finally:
        for layer in layers:
            layer.observing = False
    if count == 0:
        raise ValueError("batches must yield at least one batch, got none")
    for layer in layers:
        layer.synchronize_observers()
    for layer in [layer for layer in layers if layer.has_observed()]:
        layer.finish_calibration()
    return model
