"""What modules made of several approximate layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .layer import ApproxLayer
from .replacement import Replacement


class ApproxComposite(Replacement):
    """Mixin placed before a torch layer whose products are approximate layers inside it.

    The inner layers carry mode, engine, table and scales, and `approxconv.approx_layers` finds them; the composite only
    hands its own settings on to them. A subclass supplies ``_init_products(**settings)``, which makes them.
    """

    _init_products: Callable[..., None]

    def _restore(self, layer: nn.Module) -> None:
        for name, child in layer._modules.items():
            if isinstance(child, ApproxLayer):
                layer._modules[name] = child.to_float()

    def _init_approx(self, **settings: Any) -> None:
        self._init_products(**settings)
        self.train(self.training)

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
