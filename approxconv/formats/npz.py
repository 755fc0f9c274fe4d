"""Our own format: an ``.npz`` that says everything about a multiplier and proves its table by a hash."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np

from ..multiplier import Multiplier
from .errors import FormatError
from .format import Format, read_bytes
from .npy import MAX_BYTES, bare_table, read_array

FORMAT_VERSION = 1
_KEYS = ("format_version", "table", "a_signed", "w_signed", "name", "hash")
_MAX_ARCHIVE_BYTES = 9 * MAX_BYTES
_GRADIENTS = ("a_gradient", "w_gradient")
_MEMBERS = (*_KEYS, "info", *_GRADIENTS)


def save_npz(multiplier: Multiplier, path: str | Path) -> None:
    """Write `multiplier` to `path`.

    Raises
    ------
    ValueError
        A name or info that is no Unicode or larger than a table.
    """
    path = Path(path)
    info = json.dumps(multiplier.info, ensure_ascii=False).encode()
    if len(info) > MAX_BYTES // 2:
        raise ValueError(f"info must be at most {MAX_BYTES // 2:,} bytes as JSON, got {len(info):,}")
    arrays = {
        "format_version": np.int64(FORMAT_VERSION),
        "table": multiplier.table.numpy(),
        "a_signed": np.uint8(multiplier.a_signed),
        "w_signed": np.uint8(multiplier.w_signed),
        "name": np.frombuffer(multiplier.name.encode(), np.uint8),
        "info": np.frombuffer(info, np.uint8),
        "hash": np.frombuffer(bytes.fromhex(multiplier.content_hash), np.uint8),
    }
    for key, gradient in zip(_GRADIENTS, multiplier.gradients or (), strict=False):
        arrays[key] = gradient.numpy()
    with path.open("wb") as file:  # a path NumPy would append .npz to, were it .NPZ
        np.savez_compressed(file, **arrays)


def _read_members(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a zip of ``.npy`` members, read in memory, each of bounded size; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(BytesIO(read_bytes(path, _MAX_ARCHIVE_BYTES))) as archive:
            infos = archive.infolist()
            if not 1 <= len(infos) <= len(_MEMBERS):
                raise FormatError(path, f"must hold 1 to {len(_MEMBERS)} arrays, got {len(infos)}")
            arrays = {}
            for info in infos:
                _check_member(info, arrays, path)
                with archive.open(info) as member:
                    data = member.read(MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise FormatError(
                        path, f"{info.filename} must be no larger than a table, at most {MAX_BYTES} bytes"
                    )
                arrays[info.filename.removesuffix(".npy")] = read_array(BytesIO(data), path)
            return arrays
    except FormatError:
        raise
    except Exception as error:  # zipfile trusts the sizes and offsets in the file, and fails in many ways
        raise FormatError(path, f"must be a zip archive of .npy arrays ({error})") from None


def _check_member(info: zipfile.ZipInfo, before: dict[str, np.ndarray], path: Path) -> None:
    """Refuse a member that NumPy would not have written, before any of it is read."""
    name = info.filename
    if not name.endswith(".npy") or set(name) & set("/\\:") or ".." in name or name.removesuffix(".npy") in before:
        raise FormatError(
            path, f"its members must have different names that end in .npy, without a folder, got {name!r:.80}"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate whole blocks at once
        raise FormatError(path, f"{name} must be stored or deflated, got compression type {info.compress_type}")


def load_npz(
    path: Path, *, a_signed: bool | None = None, w_signed: bool | None = None, order: str | None = None
) -> Multiplier:
    """Read our own format, or the only array of any other ``.npz``."""
    arrays = _read_members(path)
    if len(arrays) == 1:
        return bare_table(next(iter(arrays.values())), path, a_signed=a_signed, w_signed=w_signed, order=order)
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise FormatError(path, f"must hold one table, or {', '.join(_KEYS)}; {', '.join(missing)} missing")
    try:
        version = int(arrays["format_version"])
        flags = [bool(int(arrays[key])) for key in ("a_signed", "w_signed")]
        name = arrays["name"].astype(np.uint8).tobytes().decode()
        info = json.loads(arrays["info"].astype(np.uint8).tobytes()) if "info" in arrays else {}
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise FormatError(
            path, f"format_version, a_signed and w_signed must be numbers, name UTF-8, info JSON ({error})"
        ) from None
    if version != FORMAT_VERSION:
        raise FormatError(path, f"format_version must be {FORMAT_VERSION}, got {version}")
    for key, given, own in zip(("a_signed", "w_signed"), (a_signed, w_signed), flags, strict=True):
        if given is not None and given != own:
            raise FormatError(path, f"{key} is {own} in the file, {given} was asked for")
    if order is not None:
        raise FormatError(path, f"its rows are activations as the file itself says, order={order!r} was asked for")
    try:
        multiplier = Multiplier(
            arrays["table"],
            a_signed=flags[0],
            w_signed=flags[1],
            name=name,
            info=info,
            gradients=tuple(arrays[key] for key in _GRADIENTS) if all(key in arrays for key in _GRADIENTS) else None,
        )
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    if arrays["hash"].astype(np.uint8).tobytes().hex() != multiplier.content_hash:
        raise FormatError(path, "its hash must be that of its table and formats")
    return multiplier


FORMAT = Format("npz", (".npz",), load_npz, lambda head: head.startswith(b"PK\x03\x04"), save_npz)
