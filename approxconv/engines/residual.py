"""Tables near the exact product: ``table[a, w] = a·w + residual[a, w]``, the residual of 8 bits, on the CPU.

The exact product is one GEMM of bytes (`dot_products`). What the table lacks of it is looked up in row tables whose
8-bit entries are added in 16 bits (`row_tables`), whatever its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._versioned import once_per_version
from ..factorize import Factorization, errors_by_signs
from ..multiplier import BYTE_SPAN, PreparedTable, prepare_bytes
from . import EngineError
from .byte_form import ByteForm, byte_form


def unavailable(device: torch.device) -> str | None:
    """Runs on CPU tensors only."""
    return None if device.type == "cpu" else f"it takes CPU tensors, got tensors on {device}"


@dataclass(frozen=True, eq=False)
class Split:
    """``table = form + rows`` entry by entry: the exact product plus a constant, and uint8 entries without offset."""

    form: ByteForm
    rows: PreparedTable


def _nearest(table: Tensor) -> tuple[tuple[bool, bool], np.ndarray]:
    """The operands' signedness in which ``table - a·w`` spans least, and that."""
    return min(errors_by_signs(table.numpy().astype(np.int64)).items(), key=lambda each: np.ptp(each[1]))


@once_per_version
def known_split(table: Tensor) -> Split | None:
    """The exact product and the rest of a table on the CPU; None if the rest spans more than 255."""
    signs, residual = _nearest(table)
    low = int(residual.min())
    if int(residual.max()) - low > BYTE_SPAN:
        return None
    with torch.inference_mode(False):
        nothing = (torch.zeros(0, side, dtype=torch.int8) for side in table.shape)
        form = byte_form(Factorization(1, *nothing, *signs))
        rows = prepare_bytes(torch.from_numpy((residual - low).astype(np.int32)))
        # The rest's lowest entry is part of every product; like all sums modulo 2^32, beyond which it may be.
        by_column = (form.by_column.long() + low).to(torch.int32)
        return Split(replace(form, by_column=by_column), rows)


def split_of(table: Tensor) -> Split:
    """`known_split`, or an EngineError if there is none."""
    split = known_split(table)
    if split is None:
        _, residual = _nearest(table)
        raise EngineError(
            "engine 'residual' cannot compute with this table: beside the exact product its entries go from "
            f"{residual.min()} to {residual.max()}, which is {np.ptp(residual)} and must be {BYTE_SPAN} at most; "
            "engine 'auto' finds another way"
        )
    return split


def lut_matmul(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """``y[..., m, n] = Σ_k table[x[..., m, k], w[..., n, k]]``."""
    from .cpu import dot_products, row_tables

    split = split_of(table)
    y = dot_products.lut_matmul(x, w, split.form)
    row_tables.add_matmul(y, x, w, lambda lanes: split.rows, True)
    return y


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
    """Implicit GEMM, and implicit im2col of the rest onto its sums."""
    from .cpu import dot_products, row_tables

    split, geometry = split_of(table), (stride, padding, dilation, groups, pad_code)
    y = dot_products.lut_conv2d(x, w, split.form, *geometry)
    row_tables.add_conv2d(y, x, w, split.rows, *geometry, True)
    return y


def lut_dwconv2d(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_code: int,
) -> Tensor:
    """Row tables of the whole entries: a channel has too few products for two ways to pay."""
    from .cpu import depthwise

    split_of(table)
    return depthwise.lut_dwconv2d(x, w, table, stride, padding, dilation, pad_code)
