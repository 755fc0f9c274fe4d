"""Multipliers from the literature, by name.

A name is ``<family><parameters>_<bits><u|s>``, both operands of 2 to 8 bits, unsigned or signed: ``drum6_8u``,
``bam_h2_v4_8u``, ``exact_4s``. Operands that differ in signedness are named one by one, the activation first:
``drum6_8u_8s``. `get_wide_multiplier` goes on to 16 bits. Each family is a module here, with a function that builds its
members and says what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType

from ..multiplier import Multiplier
from ..wide import WideMultiplier
from .family import Family, T

__all__ = ["get_multiplier", "get_wide_multiplier", "list_multipliers"]

_MODULES = (
    "exact",
    "truncated",
    "perforated",
    "broken_array",
    "lower_part_or",
    "kulkarni",
    "compressor_tree",
    "etm",
    "drum",
    "dsm",
    "ssm",
    "essm",
    "roba",
    "mitchell",
    "alm",
    "booth",
    "random_error",
)


def _families(module: ModuleType) -> tuple[Family, ...]:
    return module.FAMILIES if hasattr(module, "FAMILIES") else (module.FAMILY,)


_FAMILIES = tuple(family for name in _MODULES for family in _families(import_module(f".{name}", __name__)))
_LONGEST_SHOWN = 60


def get_multiplier(name: str) -> Multiplier:
    """Build a multiplier by its name.

    Parameters
    ----------
    name : str
        One of `list_multipliers`.

    Returns
    -------
    Multiplier
        A new one on every call, with ``.name == name``.

    Raises
    ------
    ValueError
        There is none of that name; the message says which parameter is out of range or which names are near.

    Examples
    --------
    >>> get_multiplier("drum6_8u_8s")
    Multiplier('drum6_8u_8s', a=uint8, w=int8)
    """
    return _build(name, Family.from_name)


def get_wide_multiplier(name: str) -> WideMultiplier:
    """Build a multiplier of up to 16 bits an operand by its name, as a function.

    Parameters
    ----------
    name : str
        As `get_multiplier` takes it, with 9 to 16 bits too: ``drum6_16s``, ``bam_h2_v8_12u``. The families
        ``momeni1``, ``momeni2``, ``akbari1`` and ``random`` end at 8 bits.

    Returns
    -------
    WideMultiplier
        A new one on every call, with ``.name == name``.

    Raises
    ------
    ValueError
        As `get_multiplier`.

    Examples
    --------
    >>> int(get_wide_multiplier("drum6_16u")(1000, 3))  # 0b111111 · 2**4 · 3
    3024
    """
    return _build(name, Family.wide_from_name)


def _build(name: str, build: Callable[[Family, str], T | None]) -> T:
    if not isinstance(name, str):
        raise ValueError(f"name must be a str, got {name!r}")
    for family in _FAMILIES:
        multiplier = build(family, name)
        if multiplier is not None:
            return multiplier
    shown = name[:_LONGEST_SHOWN]
    near = get_close_matches(shown, list_multipliers())
    hint = f"did you mean {', '.join(near)}?" if near else "see approxconv.list_multipliers()"
    raise ValueError(f"no multiplier {shown!r}{'…' if shown != name else ''}; {hint}")


def list_multipliers(pattern: str | None = None) -> list[str]:
    """The names that `get_multiplier` takes, in natural order (``drum9`` before ``drum10``).

    Of `random_error`'s seeds and magnitudes it takes many more than are listed.

    Parameters
    ----------
    pattern : str, optional
        Shell-style filter, case-sensitive: ``"drum?_8u"``.

    Raises
    ------
    ValueError
        `pattern` is neither a str nor None.

    Examples
    --------
    >>> list_multipliers("mitchell_[78]u")
    ['mitchell_7u', 'mitchell_8u']
    """
    if not isinstance(pattern, (str, type(None))):
        raise ValueError(f"pattern must be a str or None, got {pattern!r}")
    names = (name for family in _FAMILIES for name in family.names() if pattern is None or fnmatchcase(name, pattern))
    return sorted(names, key=_natural_order)


def _natural_order(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
