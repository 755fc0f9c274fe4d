"""Modules that take a stock one's place, with all that it holds, and give it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..gradients import GradientTables
from ..multiplier import Multiplier
from ..quantization import Quantization


class Replacement(nn.Module):
    """Mixin placed before a stock module; what `_init_approx` adds to that is taken off again by `to_float`.

    A subclass supplies ``_init_approx(multiplier, mode, engine, quantization, gradient)``, which makes what the stock
    module has not, and ``_restore(layer)``, which does what else `layer` needs that has become the stock module.
    """

    _init_approx: Callable[..., None]
    _restore: Callable[[nn.Module], None]

    def __init__(
        self,
        *args: Any,
        multiplier: Multiplier | str,
        quantization: Quantization | None = None,
        gradient: str | GradientTables = "ste",
        mode: str = "approximate",
        engine: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._become(multiplier=multiplier, quantization=quantization, gradient=gradient, mode=mode, engine=engine)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        multiplier: Multiplier | str,
        *,
        quantization: Quantization | None = None,
        gradient: str | GradientTables = "ste",
        mode: str = "approximate",
        engine: str = "auto",
    ) -> Replacement:
        """Take over a stock layer: the same parameters, not copies, its hooks and whatever else was put on it."""
        self = cls.__new__(cls)
        _move(layer, self)
        self._become(multiplier=multiplier, quantization=quantization, gradient=gradient, mode=mode, engine=engine)
        return self

    def _become(self, **settings: Any) -> None:
        stock = names_of(self)
        self._init_approx(**settings)
        self._own_names = {*(names_of(self) - stock), (None, "_own_names")}

    def to_float(self) -> nn.Module:
        """Give a stock layer back: the same parameters, not copies, the hooks and whatever else was put on this one."""
        stock = next(kind for kind in type(self).__mro__ if not issubclass(kind, Replacement))
        layer = stock.__new__(stock)
        _move(self, layer)
        for store, name in self._own_names:
            (layer.__dict__ if store is None else layer.__dict__[store]).pop(name, None)
        self._restore(layer)
        return layer


def names_of(module: nn.Module) -> set[tuple[str | None, str]]:
    """Where a module holds what: attributes, and entries of its parameters, buffers and modules."""
    stores = {None: vars(module), **{store: vars(module)[store] for store in ("_parameters", "_buffers", "_modules")}}
    return {(store, name) for store, names in stores.items() for name in names}


def _move(source: nn.Module, target: nn.Module) -> None:
    """Give a new module all that another has.

    The dicts of hooks move, so that their handles still remove them, and `source` keeps copies.
    """
    state = source.__getstate__()  # without its compiled call
    for name, value in vars(nn.Module()).items():
        if isinstance(value, (dict, set)):
            source.__dict__[name] = state[name].copy()
    target.__dict__.update(state)
    for key, hook in target._load_state_dict_pre_hooks.items():
        if hook.with_module:  # a weak reference to it, which would die with `source`
            target._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, target)
