"""Approximate attention: PyTorch's module, and the function that Hugging Face models call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from inspect import getattr_static, unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..multiplier import Multiplier
from .composite import ApproxComposite
from .linear import ApproxLinear
from .matmul import ApproxMatmul
from .projection import ApproxProjection

_IMPLEMENTATION = "approxconv"
ATTENTION_CHILD = "approx_attention"
_Product = Callable[[Tensor, Tensor], Tensor]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores for a mask that is True where a query may not attend, or that is added already."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    *,
    qk: _Product = torch.matmul,
    av: _Product = torch.matmul,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale·Q·Kᵀ + mask)·V``, and the weights that V was averaged with.

    Parameters
    ----------
    query, key, value : Tensor
        ``(..., H, L, D)``, ``(..., G, S, D)`` and ``(..., G, S, Dv)``; where G is less than H, consecutive H/G heads of
        the query share one of key and value.
    attn_mask : Tensor or None
        Broadcastable to ``(..., H, L, S)``: bool, True where a query may attend, or what to add to the scores. A query
        that may attend to nothing gets zeros.
    dropout_p : float
        Probability of dropping a weight.
    scale : float or None
        None is ``1/√D``.
    qk, av : callable
        The two products.
    softcap : float or None
        Scores become ``softcap·tanh(scores / softcap)`` before the mask.

    Returns
    -------
    tuple of Tensor
        ``(..., H, L, Dv)`` and ``(..., H, L, S)``.
    """
    if key.shape[-3:-2] != query.shape[-3:-2]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = qk(query, key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    nowhere = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = _additive(~attn_mask, scores.dtype)
        nowhere = (attn_mask == -math.inf).all(-1, keepdim=True)
        scores = scores + attn_mask.masked_fill(nowhere, 0)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if nowhere is not None:
        weights = weights.masked_fill(nowhere, 0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return av(weights, value), weights


class Attention(nn.Module):
    """`attention` as a module."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attend: output ``(..., H, L, Dv)`` and weights ``(..., H, L, S)``."""
        return attention(query, key, value, *args, **kwargs)


class ApproxAttention(ApproxComposite, Attention):
    """`Attention` whose two products come from a multiplier's table.

    ``weights = softmax(scale·(Q·Kᵀ) + mask)`` and ``output = weights·V``: Q·Kᵀ and weights·V as `ApproxMatmul` computes
    them, each operand with its own scale, the softmax in float32.

    Parameters are `ApproxLayer`'s, which both products share.
    """

    def _init_products(self, **arguments: Any) -> None:
        self.qk = ApproxMatmul(**arguments)
        self.av = ApproxMatmul(**arguments)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attend by the layer's products: output ``(..., H, L, Dv)`` and weights ``(..., H, L, S)``."""
        return super().forward(query, key, value, *args, **kwargs, qk=self.qk, av=self.av)


class ApproxOutProjection(ApproxLinear, NonDynamicallyQuantizableLinear):
    """The `ApproxLinear` of `ApproxMultiheadAttention`, where torch has a linear layer of this kind."""


class ApproxMultiheadAttention(ApproxComposite, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose products come from a multiplier's table.

    The four projections are computed as `ApproxLinear` does and Q·Kᵀ and weights·V as `ApproxMatmul` does, each operand
    with its own scale; the softmax is float32. In every mode a query that may attend to nothing gets zeros.

    Parameters are `torch.nn.MultiheadAttention`'s and `ApproxLayer`'s, which all of its products share.
    """

    def _init_products(self, **arguments: Any) -> None:
        for i, name in enumerate(("q", "k", "v")):
            rows = slice(i * self.embed_dim, (i + 1) * self.embed_dim)
            weight = ("in_proj_weight", rows) if self._qkv_same_embed_dim else (f"{name}_proj_weight", None)
            projection = ApproxProjection(self, weight, ("in_proj_bias", rows), **arguments)
            setattr(self, f"{name}_proj", projection)
        self.out_proj = ApproxOutProjection.from_float(self.out_proj, **arguments)
        self.attention = ApproxAttention(**arguments).to(self.out_proj.weight.device)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key and value must not be nested: set use_nested_tensor = False on the TransformerEncoder"
            )
        sizes = (self.embed_dim, self.kdim, self.vdim)
        for name, tensor, size in zip(("query", "key", "value"), (query, key, value), sizes, strict=True):
            if tensor.ndim not in (2, 3) or tensor.ndim != query.ndim or tensor.shape[-1] != size:
                raise ValueError(
                    f"{name} must have 3 dimensions, or as query 2, of which the last is {size}, got "
                    f"{tuple(tensor.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key and value must be of one length, got {tuple(key.shape)} and {tuple(value.shape)}")

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """Both masks as one to add to the scores ``(N, H, L, S)``, for query ``(N, L, E)`` and key ``(N, S, Ek)``."""
        (batch, length), source = query.shape[:2], key.shape[1]
        mask = None
        if attn_mask is not None:
            shape, heads = (length, source), batch * self.num_heads
            if attn_mask.shape not in (shape, (heads, *shape)):
                raise ValueError(f"attn_mask must be {shape} or {(heads, *shape)}, got {tuple(attn_mask.shape)}")
            mask = _additive(attn_mask, query.dtype)
            mask = mask.unflatten(0, (batch, self.num_heads)) if mask.ndim == 3 else mask[None, None]
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, source):
                raise ValueError(f"key_padding_mask must be {(batch, source)}, got {tuple(key_padding_mask.shape)}")
            padding = _additive(key_padding_mask, query.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments, shapes and results are `torch.nn.MultiheadAttention`'s.

        Raises
        ------
        ValueError
            The shapes do not fit, a nested tensor, or `is_causal` (a hint about `attn_mask`) without `attn_mask`.
        RuntimeError
            A quantised mode before `approxconv.calibrate`.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, which only says what it is")
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, query, key)

        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None:
            k, v = (
                torch.cat([tensor, bias.to(tensor.dtype).expand(len(tensor), -1, -1)], 1)
                for tensor, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[1] - key.shape[1]))  # whatever was appended may be attended to
        q, k, v = (tensor.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        output, weights = self.attention(q, k, v, mask, self.dropout if self.training else 0.0)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if batched and not self.batch_first:
            output = output.transpose(0, 1)
        if average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output[0], weights[0]
        return output, weights if need_weights else None


class HuggingFaceAttention(ApproxAttention):
    """The two products of a Hugging Face attention module, which `approximate_attention` adds to it as a child.

    Parameters
    ----------
    implementation : str
        The attention implementation that the model used before.
    **arguments
        `ApproxAttention`'s.
    """

    def __init__(self, implementation: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.implementation = implementation
        _register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # a model may be unpickled where none was converted


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers' eager attention functions compute, by the products that `module` was given, if any."""
    mask = attention_mask
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    attend = getattr(module, ATTENTION_CHILD, attention)
    dropout = dropout if module.training else 0.0
    output, weights = attend(query, key, value, mask, dropout, scaling, softcap=softcap)
    return output.transpose(1, 2).contiguous(), weights


def _register() -> None:
    """Make the implementation known to transformers: its function, and that its masks are as for eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_IMPLEMENTATION, _attention_function)
    AttentionMaskInterface.register(_IMPLEMENTATION, eager_mask)


@cache
def _code_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names that the forward method of a class reads; none if it is not written in Python."""
    return getattr(getattr(unwrap(getattr_static(kind, "forward")), "__code__", None), "co_names", ())


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of Hugging Face models that call a registered attention function, by name."""
    return {
        name: module for name, module in model.named_modules() if "ALL_ATTENTION_FUNCTIONS" in _code_names(type(module))
    }


def check_attention(name: str, module: nn.Module) -> None:
    """Raise a ValueError if `approximate_attention` cannot stand for what an attention module computes."""
    if getattr(module, "sinks", None) is not None:
        raise ValueError(f"attention module {name!r} must have no attention sinks: skip it")


def approximate_attention(
    model: nn.Module,
    multiplier: Multiplier | str | Mapping[str, Multiplier | str],
    **arguments: Any,
) -> dict[str, HuggingFaceAttention]:
    """Have the attention of Hugging Face models compute Q·Kᵀ and weights·V by a multiplier's table, in place.

    Each attention module gets a child ``approx_attention``, and its config the attention implementation
    ``"approxconv"``, which is registered with transformers. Attention modules that were not converted, of the same
    config, go on in floating point.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is, or holds, models of transformers; nothing happens if there are none.
    multiplier : Multiplier or str or mapping
        For all attention modules, or by name as `attention_modules` gives them; others are left as they are.
    **arguments
        `ApproxAttention`'s: ``mode``, ``engine`` and so on.

    Returns
    -------
    dict
        What was added, by the name of its attention module.

    Raises
    ------
    ValueError
        No such mode, engine or multiplier, a name that is no attention module's, or one with attention sinks; the model
        is unchanged.
    """
    modules = attention_modules(model)
    if not isinstance(multiplier, Mapping):
        multiplier = dict.fromkeys(modules, multiplier)
    former = {}
    for module in modules.values():
        child = getattr(module, ATTENTION_CHILD, None)
        former.setdefault(id(module.config), module.config._attn_implementation)
        if child is not None:
            former[id(module.config)] = child.implementation
    added = {}
    for name, choice in multiplier.items():
        if name not in modules:
            raise ValueError(f"multiplier must name attention modules, got {name!r}; there are {', '.join(modules)}")
        module = modules[name]
        check_attention(name, module)
        if not hasattr(module, ATTENTION_CHILD):
            added[name] = HuggingFaceAttention(former[id(module.config)], multiplier=choice, **arguments)
    for name, child in added.items():
        child.train(modules[name].training).to(next(modules[name].parameters()).device)
        setattr(modules[name], ATTENTION_CHILD, child)
        modules[name].config._attn_implementation = _IMPLEMENTATION
    return added


def restore_attention(model: nn.Module) -> None:
    """Undo `approximate_attention`, in place."""
    for module in attention_modules(model).values():
        child = getattr(module, ATTENTION_CHILD, None)
        if child is not None:
            module.config._attn_implementation = child.implementation
            delattr(module, ATTENTION_CHILD)
