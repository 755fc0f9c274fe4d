"""A bare table as NumPy writes it; TorchApprox and others ship such files."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from ..multiplier import MAX_BITS, Multiplier
from .errors import FormatError
from .format import Format, check_order, is_unsigned, read_bytes, table_multiplier

MAX_BYTES = 8 * 4**MAX_BITS + 2**16  # the largest table in the widest dtype, and a generous header
_MAGIC = b"\x93NUMPY"


def read_array(file: BinaryIO, path: Path) -> np.ndarray:
    """Read one ``.npy`` stream, at most as large as a table can be, never with pickle."""
    try:
        major, _ = npy_format.read_magic(file)
        read_header = npy_format.read_array_header_1_0 if major == 1 else npy_format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # NumPy parses the header as Python, which a hostile one makes fail in many ways
        raise FormatError(path, f"must start with a .npy header ({error})") from None
    if dtype.hasobject or dtype.kind not in "iuf":
        raise FormatError(path, f"must hold numbers, got dtype {dtype}")
    whole = all(type(side) is int and 0 <= side <= MAX_BYTES for side in shape)
    size = math.prod(shape)
    if len(shape) > 2 or not whole or size * dtype.itemsize > MAX_BYTES:
        raise FormatError(
            path, f"must hold a table of at most {2**MAX_BITS}×{2**MAX_BITS} entries, its header says {shape}"
        )
    data = file.read(size * dtype.itemsize)
    if len(data) != size * dtype.itemsize:
        raise FormatError(path, f"must hold {size * dtype.itemsize} bytes of data after its header, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def bare_table(table: np.ndarray, path: Path, **options: Any) -> Multiplier:
    """A multiplier from its table alone; where nothing else tells, an unsigned dtype means unsigned operands."""
    return table_multiplier(table, path, signed=table.dtype.kind != "u", **options)


def load_npy(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read a ``.npy`` table."""
    file = BytesIO(read_bytes(path, MAX_BYTES))
    table = read_array(file, path)
    if file.read(1):
        raise FormatError(path, "must end after its data, got more bytes")
    return bare_table(table, path, a_signed=a_signed, w_signed=w_signed, order=order)


def save_npy(multiplier: Multiplier, path: Path, *, order: str | None = None) -> None:
    """Write the table as int32, or as uint32 if neither an operand nor an entry is signed."""
    weight_first = check_order(order) == "weight_first"
    table = multiplier.table.numpy()
    with path.open("wb") as file:  # a path NumPy would append .npy to, were it .NPY
        np.save(file, (table.T if weight_first else table).astype(np.uint32 if is_unsigned(multiplier) else np.int32))


FORMAT = Format("npy", (".npy",), load_npy, lambda head: head.startswith(_MAGIC), save_npy)
