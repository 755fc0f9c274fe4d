"""A bare table as NumPy writes it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from ..multiplier import MAX_BITS, Multiplier
from .errors import FormatError

_MAX_BYTES = 8 * 4**MAX_BITS + 2**16  # the largest table in the widest dtype, and a generous header


def read_array(file: BinaryIO, path: Path) -> np.ndarray:
    """Read one ``.npy`` stream, at most as large as a table can be, never with pickle."""
    try:
        major, _ = npy_format.read_magic(file)
        read_header = npy_format.read_array_header_1_0 if major == 1 else npy_format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except (ValueError, EOFError, OSError, MemoryError, SyntaxError, TypeError, UnicodeError) as error:
        raise FormatError(path, f"must start with a .npy header ({error})") from None
    if dtype.hasobject or dtype.kind not in "iuf":
        raise FormatError(path, f"must hold numbers, got dtype {dtype}")
    size = int(np.prod(shape, dtype=object)) if shape else 1
    if len(shape) > 2 or size * dtype.itemsize > _MAX_BYTES:
        raise FormatError(
            path, f"must hold a table of at most {2**MAX_BITS}×{2**MAX_BITS} entries, its header says {shape}"
        )
    data = file.read(size * dtype.itemsize)
    if len(data) != size * dtype.itemsize:
        raise FormatError(path, f"must hold {size * dtype.itemsize} bytes of data after its header, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def bare_table(table: np.ndarray, path: Path, a_signed: bool | None, w_signed: bool | None) -> Multiplier:
    """A multiplier from its table alone; signedness from the dtype where it is not given."""
    signed = table.dtype.kind != "u"
    try:
        return Multiplier(
            table,
            a_signed=signed if a_signed is None else a_signed,
            w_signed=signed if w_signed is None else w_signed,
        )
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def load_npy(path: Path, a_signed: bool | None, w_signed: bool | None) -> Multiplier:
    """Read a ``.npy`` table."""
    with path.open("rb") as file:
        table = read_array(file, path)
        if file.read(1):
            raise FormatError(path, "must end after its data, got more bytes")
    return bare_table(table, path, a_signed, w_signed)
