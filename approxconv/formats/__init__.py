"""Multipliers from files, one importer a format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..multiplier import Multiplier
from .errors import FormatError
from .npy import load_npy
from .npz import load_npz

__all__ = ["FormatError", "load_multiplier"]

_LOADERS: dict[str, Callable[[Path, bool | None, bool | None], Multiplier]] = {".npz": load_npz, ".npy": load_npy}


def load_multiplier(
    path: str | Path, *, a_signed: bool | None = None, w_signed: bool | None = None, name: str | None = None
) -> Multiplier:
    """Read a multiplier from a file; the suffix decides the format.

    Parameters
    ----------
    path : str or Path
        ``.npz`` written by `Multiplier.save`, or a bare table ``(2**a_bits, 2**w_bits)`` by two's-complement codes,
        ``[activation_code, weight_code]``, as ``.npy`` or as the only array of an ``.npz``.
    a_signed, w_signed : bool, optional
        Operand signedness of a bare table. Where it is not given, an unsigned dtype means unsigned operands and a
        signed one two's-complement operands. A file that says it itself may not be contradicted.
    name : str, optional
        Instead of the file's own name, or of the file name.

    Returns
    -------
    Multiplier

    Raises
    ------
    FormatError
        The file is not what its suffix says; the message names the file and what was expected.
    FileNotFoundError
        There is no such file.
    """
    path = Path(path)
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        raise FormatError(path, f"its suffix must be one of {', '.join(_LOADERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no such multiplier file: {path}")
    multiplier = loader(path, a_signed, w_signed)
    multiplier.name = name if name is not None else multiplier.name or path.stem
    return multiplier
