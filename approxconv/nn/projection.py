"""Approximate linear products inside a module that holds their weights itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .linear import ApproxLinear


class ApproxProjection(ApproxLinear):
    """An `ApproxLinear` whose weight and bias are parameters, or rows of parameters, of the module it is part of.

    It holds scales, zero points and table but no parameter, so that its owner keeps the parameters of the torch layer
    that it stands for, under their names.

    Parameters
    ----------
    owner : torch.nn.Module
        The module that holds the parameters; read anew whenever they are used.
    weight : (str, slice or None)
        Name of the owner's parameter ``(N, K)``, and its rows that belong to this product; None are all.
    bias : (str, slice or None), optional
        Of the owner's ``(N,)``, which may be None.
    **arguments
        `ApproxLayer`'s.
    """

    def __init__(
        self,
        owner: nn.Module,
        weight: tuple[str, slice | None],
        bias: tuple[str, slice | None] | None = None,
        **arguments: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._owner = (owner,)  # in a tuple it is no submodule
        self._weight, self._bias = weight, bias
        self.out_features, self.in_features = self.weight.shape
        self._init_approx(**arguments)

    def _parameter(self, name: str, rows: slice | None) -> Tensor | None:
        parameter = getattr(self._owner[0], name)
        return parameter if parameter is None or rows is None else parameter[rows]

    @property
    def weight(self) -> Tensor:
        """``(N, K)``, the owner's."""
        return self._parameter(*self._weight)

    @property
    def bias(self) -> Tensor | None:
        """``(N,)``, the owner's, or None."""
        return None if self._bias is None else self._parameter(*self._bias)

    def _operands(self) -> list[Tensor]:
        return [self.weight, *super()._operands()]

    def to_float(self) -> nn.Module:
        """There is no stock layer of such a kind; its owner has one."""
        raise ValueError("a projection has no stock layer of its own: convert the module that it is part of")
