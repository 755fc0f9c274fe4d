"""Batch normalisation folded into the layer before it, as inference hardware has it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class FoldedBatchNorm(nn.Identity):
    """Stands where a batch normalisation was that is now part of the layer before it.

    Parameters
    ----------
    ndim : int
        Dimensions of an input whose channels are those of that layer. With others the normalisation would have had
        other channels, or have raised; this raises a ValueError.
    """

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, ``(B, C, ...)`` of `ndim` dimensions."""
        if input.ndim != self.ndim:
            raise ValueError(
                f"input must have {self.ndim} dimensions, as the folded batch normalisation wants, "
                f"got {tuple(input.shape)}"
            )
        return input

    def extra_repr(self) -> str:
        """The number of dimensions."""
        return f"ndim={self.ndim}"


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith(__package__) or super().is_leaf_module(m, module_qualified_name)


def _graphs(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The graph of `module`, or where torch.fx cannot trace it those of the largest parts that it can trace."""
    if module in seen or not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return
    seen.add(module)
    try:
        graph = _Tracer().trace(module)
    except Exception:  # of whatever kind the model's own code raises when it meets a proxy
        for child in module.children():
            yield from _graphs(child, seen)
    else:
        yield module, graph


def _pairs(root: nn.Module, graph: fx.Graph, layers: set[nn.Module]) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Every batch normalisation that `graph` calls, with the layer that feeds it and nothing else, or None."""
    calls = [(node, root.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"]
    called = [module for _, module in calls]
    of = dict(calls)
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node, norm in calls:
        if not isinstance(norm, _BatchNorm):
            continue
        fed = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        layer = of.get(fed)
        folds = (
            layer in layers
            and type(norm) in _KINDS
            and norm.running_mean is not None
            and len(fed.users) == 1
            and called.count(layer) == called.count(norm) == 1
            and not read & {fed.target, node.target}
        )
        yield layer if folds else None, norm


class _Flow(TorchDispatchMode):
    """Notes, while a model runs, which modules take the outputs of which layers, and parameters read from outside."""

    def __init__(self, layers: set[nn.Module], norms: set[nn.Module]) -> None:
        super().__init__()
        self.norms = norms
        self.calls = Counter[nn.Module]()
        self.active: list[nn.Module] = []
        self.takers: dict[nn.Module, set[nn.Module | None]] = {layer: set() for layer in layers}
        self.read: set[nn.Module] = set()
        self.owners = {
            id(tensor): part
            for part in layers | norms
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
        }
        self.makers: dict[int, nn.Module] = {}
        self.outputs: list[Any] = []  # kept, so that no other tensor gets the id of one

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        self.calls[module] += 1
        self.active.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        self.active.pop()
        if module in self.takers:
            self.makers[id(output)] = module
            self.outputs.append(output)

    def note(self, tensors: Iterable[Any], taker: nn.Module | None) -> None:
        """Some tensors are used in the forward pass of `taker`, or outside of all."""
        for tensor in tensors:
            if id(tensor) in self.makers:
                self.takers[self.makers[id(tensor)]].add(taker)
            owner = self.owners.get(id(tensor), taker)
            if owner is not None and owner is not taker:
                self.read.add(owner)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note(tree_leaves((args, kwargs)), self.active[-1] if self.active else None)
        return func(*args, **(kwargs or {}))

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Layers and the batch normalisations that alone take their outputs."""
        for layer, takers in self.takers.items():
            norm = next(iter(takers), None)
            once = self.calls[layer] == self.calls[norm] == len(takers) == 1
            if once and norm in self.norms and not {layer, norm} & self.read:
                yield layer, norm


def _run_pairs(
    model: nn.Module, layers: set[nn.Module], run: Callable[[], Any]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every layer whose output, in one run of the model, only a batch normalisation takes, and that."""
    norms = {module for module in model.modules() if type(module) in _KINDS and module.running_mean is not None}
    flow = _Flow(layers, norms)
    handles = [part.register_forward_pre_hook(flow.enter) for part in layers | norms]
    handles += [part.register_forward_hook(flow.leave) for part in layers | norms]
    try:
        with flow:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    flow.note(tree_leaves(output), None)
    yield from flow.pairs()


def _traced_pairs(model: nn.Module, layers: set[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The same by tracing a copy of the model, which runs its own code and may put constants on it."""
    traced = copy.deepcopy(model)
    original = dict(zip(traced.modules(), model.modules(), strict=True))
    chosen = {copied for copied, module in original.items() if module in layers}
    known: set[nn.Module] = set()
    for root, graph in _graphs(traced, set()):
        if root is traced:  # what it does not call is not used
            known.update(model.modules())
        for layer, norm in _pairs(root, graph, chosen):
            known.add(original[norm])
            if layer is not None:
                yield original[layer], original[norm]
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module not in known:
            raise ValueError(
                f"fold_batchnorm: torch.fx cannot trace the code that calls {name!r}, so what comes before it is not "
                "known: give a batch instead of True, to see it in a run, or leave fold_batchnorm out"
            )


def find_batchnorms(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any] | None = None
) -> dict[str, str]:
    """Which batch normalisation takes the output of which layer, that output going nowhere else.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode. A copy of it is traced by `torch.fx`, in parts where it cannot be traced as a whole; layers of a
        part are then taken to be called by that part alone.
    layers : mapping of str to torch.nn.Module
        The layers of `model` in question by name; convolutions and linear ones are looked at.
    run : callable, optional
        Runs the model and returns its output, without gradients. What this one run does is then taken for what the
        model does, and nothing is traced.

    Returns
    -------
    dict
        Name of layer → name of its batch normalisation. One that follows something else, or whose layer has other
        uses or shares its parameters, is in no pair.

    Raises
    ------
    ValueError
        A batch normalisation that no part calls which can be traced, that is in training mode, or with hooks on it or
        on its layer that would see other values.
    """
    names = {module: name for name, module in model.named_modules()}
    uses = Counter(  # parameters() skips repeats
        parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None
    )
    weighted = {layer for layer in layers.values() if isinstance(layer, (nn.Linear, _ConvNd))}
    pairs = _traced_pairs(model, weighted) if run is None else _run_pairs(model, weighted, run)
    found = {
        names[layer]: names[norm]
        for layer, norm in pairs
        if all(uses[parameter] == 1 for part in (layer, norm) for parameter in part.parameters(recurse=False))
    }
    for name, norm_name in found.items():
        _check_foldable(name, model.get_submodule(name), norm_name, model.get_submodule(norm_name))
    return found


def _check_foldable(name: str, layer: nn.Module, norm_name: str, norm: nn.Module) -> None:
    if norm.training:
        raise ValueError(
            f"fold_batchnorm: {norm_name!r} must be in eval mode, its statistics fixed: run model.eval() first"
        )
    for part, where, hooks in ((name, layer, _OUTPUT_HOOKS), (norm_name, norm, (*_OUTPUT_HOOKS, "_forward_pre_hooks"))):
        if any(getattr(where, kind) for kind in hooks):
            raise ValueError(
                f"fold_batchnorm: {part!r} has hooks, which would see other values once {norm_name!r} is part of "
                f"{name!r}: remove them, or leave fold_batchnorm out"
            )


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> FoldedBatchNorm:
    """Make a batch normalisation in eval mode part of the layer before it, whose parameters are written in place.

    ``w' = w·γ/√(σ²+ε)`` an output channel, ``b' = (b − μ)·γ/√(σ²+ε) + β``, in double precision. A layer without bias
    gets one.

    Parameters
    ----------
    layer : torch.nn.Module
        A convolution, transposed or not, or a linear layer.
    norm : torch.nn.Module
        `torch.nn.BatchNorm1d` and so on, with running statistics.

    Returns
    -------
    FoldedBatchNorm
        What to put in the place of `norm`.
    """
    transposed = isinstance(layer, _ConvTransposeNd)
    weight = layer.weight
    if transposed:  # (C, O/groups, ...) to (O, C/groups, ...), as of other layers
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    tensors = (layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    bias, mean, variance, gain, shift = (None if tensor is None else tensor.double() for tensor in tensors)
    weight, bias = fuse_conv_bn_weights(weight.double(), bias, mean, variance, norm.eps, gain, shift)
    if transposed:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
    return FoldedBatchNorm(2 + len(getattr(layer, "kernel_size", ())))
