"""Tables of low rank as a few products of 8-bit integers: dot-product instructions, or tensor cores.

``table[a, w] = Σ_p u_p[a]·v_p[w] + …`` exactly (`approxconv.factorize`, `ByteForm`), so that a product sum by table is
P ordinary products of 8-bit integers summed in int32. Depthwise convolutions on a GPU go through row tables, which are
limited by memory there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._versioned import once_per_version
from ..factorize import MOST_TERMS, factorize_table
from . import EngineError
from .byte_form import ByteForm, byte_form


def unavailable(device: torch.device) -> str | None:
    """Runs on CPU and CUDA tensors."""
    if device.type == "cuda":
        from ..kernels.factored import cuda_engine

        return cuda_engine().unavailable(device)
    return None if device.type == "cpu" else f"it takes CPU or CUDA tensors, got tensors on {device}"


@once_per_version
def _known(table: Tensor) -> dict[str, ByteForm | None]:
    """What `known_form` found for this version of a table."""
    return {}


def has_form(table: Tensor) -> bool:
    """Whether `known_form` answers without reading the table."""
    return "form" in _known(table)


def known_form(table: Tensor) -> ByteForm | None:
    """The table as products of bytes, on its device; None if it takes more than 64 terms."""
    known = _known(table)
    if "form" not in known:
        with torch.inference_mode(False):
            factors = factorize_table(table)
            if factors is not None and not torch.equal(factors.reconstruct(), table.cpu().long()):
                factors = factorize_table(table.clone())  # what others were given as well was written to
            known["form"] = None if factors is None else _on(byte_form(factors), table.device)
    return known["form"]


def _on(form: ByteForm, device: torch.device) -> ByteForm:
    if device.type == "cpu":
        return form
    by_row = None if form.by_row is None else form.by_row.to(device)
    form = replace(form, u=form.u.to(device), v=form.v.to(device), by_row=by_row, by_column=form.by_column.to(device))
    torch.cuda.current_stream(device).synchronize()  # whole before another stream sees it
    return form


def form_of(table: Tensor) -> ByteForm:
    """`known_form`, or an EngineError if there is none."""
    form = known_form(table)
    if form is None:
        raise EngineError(
            f"engine 'factored' cannot compute with this table: no factorisation of at most {MOST_TERMS} terms is "
            "found; engine 'auto' looks it up"
        )
    return form


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
    return _engine(x.device).lut_matmul(x, w, form_of(table))


def lut_conv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_code: int,
) -> Tensor:
    """Implicit im2col of the codes' features."""
    return _engine(x.device).lut_conv2d(x, w, form_of(table), stride, padding, dilation, groups, pad_code)


def lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
) -> Tensor:
    """On the CPU products of the factors, on a GPU row tables."""
    if x.device.type == "cuda":
        from . import cuda

        return cuda.lut_dwconv2d(x, w, table, stride, padding, dilation, pad_code)
    from .cpu import depthwise_dots

    return depthwise_dots.lut_dwconv2d(x, w, form_of(table), stride, padding, dilation, pad_code)


def _engine(device: torch.device) -> Any:
    if device.type == "cuda":
        from ..kernels.factored import cuda_engine

        return cuda_engine()
    from .cpu import dot_products

    return dot_products
