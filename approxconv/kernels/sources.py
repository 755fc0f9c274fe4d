"""Where the CUDA sources lie, and what Python needs to know of them: headers, constants, kernels, a fingerprint."""

from __future__ import annotations

import ast
import hashlib
import operator
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType

_PACKAGE = Path(__file__).parent.parent
_ENVIRONMENT = "APPROXCONV_CUDA_SRC"
_SETTLED_NS = 100_000_000  # two edits closer than a file system's clock tick can leave the same stamp

_Stamp = tuple[int, int, int]
_Selection = tuple[Path | None, Path | None, str | None]

_lock = Lock()
_chosen: Path | None = None
_overlay: Path | None = None
_entries: dict[str, _Entry] = {}
_forgetters: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel.

    Attributes
    ----------
    ctype : str
        Its C type without ``__restrict__``, a pointer's as in ``const short*``.
    name : str
        Its name.
    """

    ctype: str
    name: str


@dataclass(frozen=True, eq=False)
class Source:
    """A ``.cu`` file as it was read, with the headers it includes. One object for as long as no file changes.

    Attributes
    ----------
    name : str
        The file's name without suffix.
    path : Path
        The file.
    files : tuple of Path
        It and every header it includes with quotes, directly or not.
    fingerprint : str
        SHA-256 of the names and contents of `files`.
    text : str
        What the file holds.
    resolved : mapping of Path to str
        The text of each of `files`, line by line the same, where every include names the path that it stands for.
    constants : mapping of str to int
        Values of the ``constexpr int NAME = expression;`` in `files`. Expressions of literals and earlier constants
        with ``+ - * / % << >>`` and parentheses are known, others are left out, and so are names with two values.
    kernels : mapping of str to tuple of Parameter
        Parameters of each ``extern "C" __global__`` function in `files`.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    fingerprint: str
    text: str = field(repr=False)
    resolved: Mapping[Path, str] = field(repr=False)
    constants: Mapping[str, int] = field(repr=False)
    kernels: Mapping[str, tuple[Parameter, ...]] = field(repr=False)


def source_dir() -> Path:
    """The folder of the CUDA sources: `use_source`'s, else ``$APPROXCONV_CUDA_SRC``, else the packaged one.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    """
    return _roots()[0 if _overlay is None else 1]


def use_source(folder: str | os.PathLike[str] | None) -> AbstractContextManager[Path]:
    """Take kernels from `folder`, in all threads, from now on.

    Parameters
    ----------
    folder : path or None
        It may hold only some of the sources and headers: what is not there is taken from the packaged folder.
        None goes back to ``$APPROXCONV_CUDA_SRC`` and the packaged folder.

    Returns
    -------
    context manager
        Leaving it restores the choice made before; without ``with``, the choice stays.

    Raises
    ------
    FileNotFoundError
        `folder` is not a folder; the choice made before stays.
    """
    path = None if folder is None else _absolute(folder)
    if path is not None and not path.is_dir():
        raise FileNotFoundError(f"use_source needs a folder of CUDA sources, got {path}, which is none")
    return _restoring(_choose(path))


def set_overlay(folder: Path | None) -> None:
    """Look for sources and headers in `folder` before the chosen and the packaged ones; None ends that."""
    global _overlay
    _overlay = folder


def _choose(path: Path | None) -> Path | None:
    global _chosen
    with _lock:
        before, _chosen = _chosen, path
    return before


@contextmanager
def _restoring(before: Path | None) -> Iterator[Path]:
    try:
        yield source_dir()
    finally:
        _choose(before)


def list_sources() -> list[str]:
    """Names of the kernel sources there are: replaced ones, the chosen folder's and the packaged ones."""
    return sorted({path.stem for root in _roots() for path in root.glob("*.cu")})


def source_path(name: str) -> Path:
    """The file of kernel source `name`, without suffix.

    Raises
    ------
    FileNotFoundError
        There is no such file; the message lists those there are.
    """
    return _Reader(_roots()).find_source(name)


def hidden_source_path(name: str) -> Path | None:
    """The file of kernel source `name` that a replaced one hides, if there is one."""
    roots = _roots()[0 if _overlay is None else 1 :]
    return next((path for root in roots if (path := root / f"{name}.cu").exists()), None)


def source(name: str) -> str:
    """The text of kernel source `name`.

    Raises
    ------
    FileNotFoundError
        There is no such file; the message lists those there are.
    """
    return _decoded(source_path(name).read_bytes())


def copy_sources(folder: str | os.PathLike[str]) -> Path:
    """Copy all sources and headers in use into `folder`, made if it is not there, to start editing.

    Returns
    -------
    Path
        The folder, for `use_source`.

    Raises
    ------
    FileExistsError
        It holds files of these names and other contents, all of which the message lists; nothing is copied then.
    """
    to = _absolute(folder)
    wanted = {
        path.relative_to(root): path
        for root in reversed(_roots())
        for pattern in ("*.cu", "**/*.cuh")
        for path in root.glob(pattern)
    }
    there = {relative for relative in wanted if (to / relative).exists()}
    if edited := [str(name) for name in sorted(there) if (to / name).read_bytes() != wanted[name].read_bytes()]:
        raise FileExistsError(f"{to} holds files that differ from those to copy: {', '.join(edited)}")
    for relative in wanted.keys() - there:
        (to / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wanted[relative], to / relative)
    return to


def reload() -> None:
    """Forget everything that this process keeps of the sources, so that the next launch reads them anew."""
    _entries.clear()
    for forget in _forgetters:
        forget()


def on_reload(forget: Callable[[], None]) -> Callable[[], None]:
    """Have `reload` call a function that drops what was derived from sources; usable as a decorator."""
    _forgetters.append(forget)
    return forget


def read(name: str) -> Source:
    """Kernel source `name` with everything it includes, as the files are now.

    Called on every launch: where no file changed, it costs one ``stat`` a file.

    Raises
    ------
    FileNotFoundError
        There is no such source, or a header is missing; the message then names the file and the line of the include.
    ValueError
        The parameters of a kernel cannot be told.
    """
    entry = _entries.get(name)
    if entry is None or not entry.is_current():
        entry = _entries[name] = _read_anew(name, entry)
    return entry.source


def _absolute(folder: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _selection() -> _Selection:
    return _overlay, _chosen, os.environ.get(_ENVIRONMENT)


def _packaged_candidates() -> tuple[Path, Path]:
    """In an installation and in a checkout."""
    return _PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src"


def packaged_dir() -> Path | None:
    """The folder of the library's own sources, if it is there."""
    return next(filter(Path.is_dir, _packaged_candidates()), None)


def _roots() -> tuple[Path, ...]:
    """The folders to look in: of replaced sources, if any, the chosen one, if any, then the packaged one."""
    overlay, chosen, environment = _selection()
    packaged = packaged_dir()
    first = chosen or (_absolute(environment) if environment else packaged)
    if first is None:
        raise FileNotFoundError(f"no CUDA sources: looked in {', '.join(map(str, _packaged_candidates()))}")
    if not first.is_dir():
        raise FileNotFoundError(f"no CUDA sources: {first}, chosen by {'use_source' if chosen else f'${_ENVIRONMENT}'}")
    if overlay is not None and not overlay.is_dir():
        raise FileNotFoundError(
            f"the folder of replaced kernels is gone: {overlay}; the next replace or undo restores it"
        )
    roots = (first,) if packaged in (None, first) else (first, packaged)
    return roots if overlay is None else (overlay, *roots)


@dataclass(frozen=True)
class _Entry:
    """A source with what must be unchanged for it to be current.

    Attributes
    ----------
    stamps : dict
        Of every path that was read, or looked at and not there (None).
    settled : bool
        Whether the stamps are old enough to tell an edit.
    """

    source: Source
    selection: _Selection
    stamps: dict[str, _Stamp | None]
    settled: bool

    def is_current(self) -> bool:
        if not self.settled or self.selection != _selection():
            return False
        return all(_stamp(path) == stamp for path, stamp in self.stamps.items())


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read_anew(name: str, old: _Entry | None) -> _Entry:
    selection, now = _selection(), time.time_ns()
    reader = _Reader(_roots())
    path = reader.find_source(name)
    reader.follow(path)
    fingerprint = reader.fingerprint()
    if old is not None and (old.source.fingerprint, old.source.files) == (fingerprint, tuple(reader.contents)):
        source = old.source
    else:
        code = [_without_comments(text) for text in reader.resolved.values()]
        source = Source(
            name=name,
            path=path,
            files=tuple(reader.contents),
            fingerprint=fingerprint,
            text=_decoded(reader.contents[path]),
            resolved=MappingProxyType(reader.resolved),
            constants=MappingProxyType(_constants(code)),
            kernels=MappingProxyType(_kernels(path, code)),
        )
    youngest = max(stamp[0] for stamp in reader.stamps.values() if stamp is not None)
    return _Entry(source, selection, reader.stamps, not 0 <= now - youngest < _SETTLED_NS)


# What must not be mistaken for code, and the only directive of interest. `extern "C"` is no string here.
_TOKEN = re.compile(
    r"""
    (?P<include> ^[ \t]*\#[ \t]*include[ \t]*"(?P<header>[^"\n]+)" )
    | (?P<linkage> \bextern\s+"C" )
    | (?P<comment> //(?:\\\r?\n|[^\n])* | /\*.*?\*/ )
    | R"(?P<fence>[^\s()\\]*)\(.*?\)(?P=fence)"
    | "(?:\\.|[^"\\\n])*"
    | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


class _Reader:
    """Follows the includes of one source through the roots, and notes all it looked at.

    Attributes
    ----------
    contents : dict
        Path to bytes: the source, then headers in the order of their first include.
    resolved : dict
        Path to text with full paths in its includes; a header stands before what includes it.
    """

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self.roots = roots
        self.stamps: dict[str, _Stamp | None] = {}
        self.contents: dict[Path, bytes] = {}
        self.resolved: dict[Path, str] = {}

    def find_source(self, name: str) -> Path:
        path = self._find(root / f"{name}.cu" for root in self.roots)
        if path is None:
            there = ", ".join(list_sources()) or "none"
            raise FileNotFoundError(f"no kernel source {name}.cu in {self._looked_in()}; there are: {there}")
        return path

    def follow(self, path: Path) -> None:
        self.contents[path] = path.read_bytes()
        text = _decoded(self.contents[path])

        def resolve(token: re.Match[str]) -> str:
            if token["include"] is None:
                return token[0]
            header = self._find(self._candidates(path, token["header"]))
            if header is None:
                line = text.count("\n", 0, token.start("header")) + 1
                raise FileNotFoundError(
                    f'{path.name}:{line}: error: no header "{token["header"]}" beside {path} or in {self._looked_in()}'
                )
            if header not in self.contents:
                self.follow(header)
            return f'#include "{header.as_posix()}"'

        self.resolved[path] = _TOKEN.sub(resolve, text)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, content in self.contents.items():
            digest.update(f"{path.name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def _candidates(self, path: Path, header: str) -> Iterator[Path]:
        """Beside the including file (the chosen folder's version of that place first), then in the roots."""
        home = next((root for root in self.roots if path.is_relative_to(root)), None)
        beside = [path.parent] if home is None else [root / path.parent.relative_to(home) for root in self.roots]
        for folder in (*beside, *self.roots):
            yield Path(os.path.normpath(folder / header))

    def _find(self, candidates: Iterable[Path]) -> Path | None:
        for path in candidates:
            stamp = self.stamps[str(path)] = _stamp(str(path))
            if stamp is not None:
                return path
        return None

    def _looked_in(self) -> str:
        return " or ".join(map(str, self.roots))


def _decoded(content: bytes) -> str:
    return content.decode(errors="replace")


def _without_comments(text: str) -> str:
    return _TOKEN.sub(lambda token: token["linkage"] or (" " if token["comment"] else '""'), text)


_CONSTANT = re.compile(r"\bconstexpr\s+int\s+(\w+)\s*=([^;{}]+);")
_SUFFIX = re.compile(r"\b(0[xX][0-9a-fA-F]+|\d+)[uUlL]+\b")


def _divide(a: int, b: int) -> int:
    """C's division, which rounds towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.Mod: lambda a, b: a - b * _divide(a, b),
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class _NotConstantError(Exception):
    """An expression that is not made of ints and known constants."""


def _constants(code: Iterable[str]) -> dict[str, int]:
    values: dict[str, int] = {}
    ambiguous = set()
    for name, expression in (found for text in code for found in _CONSTANT.findall(text)):
        try:
            value = _evaluate(expression, values)
        except _NotConstantError:
            ambiguous.add(name)
            continue
        if values.setdefault(name, value) != value:
            ambiguous.add(name)
    return {name: value for name, value in values.items() if name not in ambiguous}


def _evaluate(expression: str, constants: Mapping[str, int]) -> int:
    python = _SUFFIX.sub(r"\1", re.sub(r"(?<=\w)'(?=\w)", "", expression))

    def value_of(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                value = number
            case ast.Name(id=name) if name in constants:
                value = constants[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                value = _UNARY[type(op)](value_of(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = value_of(left), value_of(right)
                if isinstance(op, (ast.LShift, ast.RShift)) and not 0 <= b < 32:
                    raise _NotConstantError
                value = _BINARY[type(op)](a, b)
            case _:
                raise _NotConstantError
        if not -(2**31) <= value < 2**31:
            raise _NotConstantError
        return value

    try:
        return value_of(ast.parse(f"({python})", mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise _NotConstantError from error


_HEAD = re.compile(r'\bextern\s+"C"([^{;]*)')
_ATTRIBUTE = re.compile(r"\b__\w+__\b(?!\s*\()|\b__\w+__\s*\((?:[^()]|\([^()]*\))*\)|\b__restrict\b")
_FUNCTION = re.compile(r"(\w+)\s*\((.*)\)\s*", re.DOTALL)
_COMMA = re.compile(r",(?![^<>]*>)")


def _kernels(path: Path, code: Iterable[str]) -> dict[str, tuple[Parameter, ...]]:
    kernels = {}
    for head in (found for text in code for found in _HEAD.findall(text) if "__global__" in found):
        function = _FUNCTION.search(_ATTRIBUTE.sub(" ", head))
        if function is None:
            raise ValueError(f"{path}: no function name and parameters in {' '.join(head.split())!r}")
        name, parameters = function.groups()
        parts = [] if parameters.strip() in ("", "void") else _COMMA.split(parameters)
        kernels[name] = tuple(_parameter(path, name, " ".join(part.split())) for part in parts)
    return kernels


def _parameter(path: Path, kernel: str, text: str) -> Parameter:
    declared = re.fullmatch(r"(.*[\w*&>]\s*[*&\s])\s*(\w+)", text)
    if declared is None:
        raise ValueError(f"{path}: parameters of {kernel} must be written 'type name', got {text!r}")
    return Parameter(re.sub(r"\s*([*&])\s*", r"\1", declared[1]).strip(), declared[2])
