"""What modules made of several approximate layers share."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..multiplier import Multiplier
from .layer import ApproxLayer, adopt


class ApproxComposite(nn.Module):
    """Mixin placed before a torch layer whose products are approximate layers inside it.

    The inner layers carry mode, engine, table and scales, and `approxconv.approx_layers` finds them; the composite only
    hands its own settings on to them.
    """

    def __init__(
        self,
        *args: Any,
        multiplier: Multiplier | str,
        mode: str = "approximate",
        engine: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_products(multiplier=multiplier, mode=mode, engine=engine)

    def _init_products(self, **arguments: Any) -> None:
        """Make the inner layers."""
        raise NotImplementedError

    @classmethod
    def from_float(
        cls, layer: nn.Module, multiplier: Multiplier | str, *, mode: str = "approximate", engine: str = "auto"
    ) -> ApproxComposite:
        """Take over a stock layer: the same parameters, not copies, and its hooks."""
        new = adopt(cls.__new__(cls), layer)
        new._init_products(multiplier=multiplier, mode=mode, engine=engine)
        return new

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
