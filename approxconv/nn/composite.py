"""What modules made of several approximate layers share."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..gradients import GradientTables
from ..multiplier import Multiplier
from ..quantization import Quantization
from .layer import ApproxLayer, move, names_of


class ApproxComposite(nn.Module):
    """Mixin placed before a torch layer whose products are approximate layers inside it.

    The inner layers carry mode, engine, table and scales, and `approxconv.approx_layers` finds them; the composite only
    hands its own settings on to them.
    """

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
        self._init(multiplier, mode, engine, quantization, gradient)

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
    ) -> ApproxComposite:
        """Take over a stock layer: the same parameters, not copies, its hooks and whatever else was put on it."""
        new = cls.__new__(cls)
        move(layer, new)
        new._init(multiplier, mode, engine, quantization, gradient)
        return new

    def to_float(self) -> nn.Module:
        """Give a stock layer back: the same parameters, not copies, the hooks and whatever else was put on this one."""
        stock = next(kind for kind in type(self).__mro__ if not issubclass(kind, ApproxComposite))
        layer = stock.__new__(stock)
        move(self, layer)
        for store, name in self._own_names:
            (layer.__dict__ if store is None else layer.__dict__[store]).pop(name, None)
        for name, child in layer._modules.items():
            if isinstance(child, ApproxLayer):
                layer._modules[name] = child.to_float()
        return layer

    def _init(
        self,
        multiplier: Multiplier | str,
        mode: str,
        engine: str,
        quantization: Quantization | None,
        gradient: str | GradientTables,
    ) -> None:
        stock = names_of(self)
        self._init_products(
            multiplier=multiplier, mode=mode, engine=engine, quantization=quantization, gradient=gradient
        )
        self.train(self.training)
        self._own_names = {*(names_of(self) - stock), (None, "_own_names")}

    def _init_products(self, **arguments: Any) -> None:
        """Make the inner layers."""
        raise NotImplementedError

    def products(self) -> dict[str, ApproxLayer]:
        """The inner layers by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ApproxLayer)}

    def _common(self, attribute: str) -> str:
        values = {getattr(layer, attribute) for layer in self.products().values()}
        return values.pop() if len(values) == 1 else "mixed"

    @property
    def mode(self) -> str:
        """The inner layers' mode, ``"mixed"`` where they differ; setting it sets theirs."""
        return self._common("mode")

    @mode.setter
    def mode(self, mode: str) -> None:
        for layer in self.products().values():
            layer.mode = mode

    @property
    def engine(self) -> str:
        """The inner layers' engine, ``"mixed"`` where they differ; setting it sets theirs."""
        return self._common("engine")

    @engine.setter
    def engine(self, engine: str) -> None:
        for layer in self.products().values():
            layer.engine = engine

    def extra_repr(self) -> str:
        """The torch layer's, then multiplier, mode and engine."""
        own = f"multiplier={self._common('multiplier_name') or 'custom'}, mode={self.mode}, engine={self.engine}"
        return ", ".join(filter(None, (super().extra_repr(), own)))
