"""Multipliers from and to files, one module a format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ..multiplier import Multiplier
from .c_model import CFunction, load_function
from .errors import FormatError
from .format import Format, require_file

__all__ = [
    "CFunction",
    "FormatError",
    "list_formats",
    "load_function",
    "load_multiplier",
    "options_of",
    "save_multiplier",
]

# In the order in which contents are tried.
_FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        import_module(f".{name}", __name__)
        for name in (
            "npz",
            "npy",
            "c_model",
            "tfapprox",
            "adapt",
            "approxtorch",
            "gradient_txt",
            "csv_table",
        )
    )
}


def list_formats() -> dict[str, tuple[str, ...]]:
    """The names that ``format=`` takes, each with its suffixes."""
    return {name: each.suffixes for name, each in _FORMATS.items()}


def options_of(path: str | Path, format: str | None = None) -> list[str]:
    """The options that `load_multiplier` takes for a file, by its format.

    Raises
    ------
    FormatError, FileNotFoundError, ValueError
        As by `load_multiplier`.
    """
    path = Path(path)
    require_file(path)
    chosen = _recognise(path) if format is None else _named(format)
    return chosen.options(chosen.load)


def load_multiplier(
    path: str | Path,
    *,
    format: str | None = None,
    name: str | None = None,
    a_signed: bool | None = None,
    w_signed: bool | None = None,
    bits: int | tuple[int, int] | None = None,
    order: str | None = None,
    swap: bool | None = None,
) -> Multiplier:
    """Read a multiplier from a file; its contents and suffix decide the format.

    Parameters
    ----------
    path : str or Path
        The file.
    format : str, optional
        One of `list_formats`, to read the file as that and as nothing else.
    name : str, optional
        Instead of the file's own name, or of the file name.
    a_signed, w_signed : bool, optional
        Operand signedness of a bare table. Where it is not given, a file name as EvoApproxLib's says it (``mul8s_…`` is
        signed, ``mul8u_…`` is not), else the reading in which the table resembles products, else, with a warning, the
        format's own default. A file that says it itself may not be contradicted.
    bits : int or pair of int, optional
        Operand widths of a C model whose name and types do not say them.
    order : {"activation_first", "weight_first"}, optional
        Which operand the rows of a bare table belong to; the activation unless given, but the weight in a ``.h``.
    swap : bool, optional
        Read the first parameter of a C model as the weight instead of the activation.

    Returns
    -------
    Multiplier

    Raises
    ------
    FormatError
        The file does not hold what its format says; the message names the file, the place and what was expected.
    FileNotFoundError
        There is no such regular file.
    ValueError
        An option that the format does not take or a value that it does not have.

    Warns
    -----
    UserWarning
        Nothing tells whether the operands are signed, or whose the rows of a ``.h`` are; the header of a C model states
        other figures than its circuit has; a ``.h`` has the mistake of a known converter.
    """
    path = Path(path)
    require_file(path)
    chosen = _recognise(path) if format is None else _named(format)
    given = {"a_signed": a_signed, "w_signed": w_signed, "bits": bits, "order": order, "swap": swap}
    options = _options(chosen, chosen.load, {key: value for key, value in given.items() if value is not None})
    multiplier = chosen.load(path, **options)
    multiplier.name = name if name is not None else multiplier.name or path.stem
    return multiplier


def save_multiplier(multiplier: Multiplier, path: str | Path, *, format: str | None = None, **options: Any) -> None:
    """Write a multiplier to a file, in the format that its suffix says.

    Parameters
    ----------
    multiplier : Multiplier
        Only ``npz`` keeps all of it; the others keep the table and, some of them, its gradients.
    path : str or Path
        The file.
    format : str, optional
        One of `list_formats`; needed where several write the suffix, as for ``.txt``.
    **options
        What the format takes, such as ``order``.

    Raises
    ------
    ValueError
        There is no such format, it cannot be written or cannot hold this multiplier. Nothing is written then.
    """
    path = Path(path)
    writable = [each for each in _FORMATS.values() if each.save is not None]
    if format is not None:
        chosen = _named(format)
        if chosen.save is None:
            raise ValueError(
                f"format {format!r} can be read only; those that can be written: {', '.join(f.name for f in writable)}"
            )
    else:
        fitting = [each for each in writable if path.suffix.lower() in each.suffixes]
        if len(fitting) != 1:
            wanted = fitting or writable
            raise ValueError(
                f"path must end as a format that can be written, or format= be given: "
                f"{', '.join(f'{f.name} ({f.suffixes[0]})' for f in wanted)}; got {path}"
            )
        chosen = fitting[0]
    chosen.save(multiplier, path, **_options(chosen, chosen.save, options))


def _named(name: str) -> Format:
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {name!r}")
    return _FORMATS[name]


def _recognise(path: Path) -> Format:
    """The format whose suffix and contents fit; failing that, whose suffix or whose contents alone do."""
    with path.open("rb") as file:
        head = file.read(Format.HEAD)
    by_suffix = [each for each in _FORMATS.values() if path.suffix.lower() in each.suffixes]
    by_contents = [each for each in _FORMATS.values() if each.recognise(head)]
    both = [each for each in by_contents if each in by_suffix]
    for candidates in (both, by_contents, by_suffix):
        if candidates:
            return candidates[0]
    raise FormatError(path, f"must be of a known format: {', '.join(_FORMATS)}; format= forces one")


def _options(chosen: Format, function: Any, given: dict[str, Any]) -> dict[str, Any]:
    taken = chosen.options(function)
    for key in given:
        if key not in taken:
            raise ValueError(f"{key} is no option of format {chosen.name!r}, which takes {', '.join(taken) or 'none'}")
    return given
