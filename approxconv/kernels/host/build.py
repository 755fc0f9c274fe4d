"""From a CUDA source to a program for the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..cache import cached_folder
from ..compile import KernelCompileError
from ..sources import Source

_HERE = Path(__file__).parent
_SHIM, _DRIVER = _HERE / "cuda_on_host.h", _HERE / "driver.cpp"
_FLAGS = ("-std=c++20", "-pthread", "-fno-strict-aliasing", "-fvisibility=hidden")
_WATCHED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_MODES = {
    None: ("-O2", "-fPIC", "-shared"),
    "address": (*_WATCHED, "-fsanitize=address,undefined"),
    "thread": (*_WATCHED, "-fsanitize=thread", "-Wno-tsan"),
}
# `extern __shared__ T name[]…;`, where no other `extern` (of a comment, say) comes before.
_DYNAMIC_SHARED = re.compile(
    r"\bextern\b(?P<type>(?:(?!\bextern\b)[^;{}\"])*?)\b(?P<name>\w+)\s*\[\s*\](?P<dimensions>[^;{}=]*);"
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_SHARED_ALIGNAS = re.compile(r"\b(__shared__\s+)alignas\b")  # C++ wants an alignas before the `static`
_QUALIFIERS = re.compile(r"\b(?:__shared__|(?:__align__|alignas)\s*\([^()]*\))")


def compiler() -> list[str]:
    """The C++ compiler's command: what ``$CXX`` says, else ``g++``.

    Raises
    ------
    RuntimeError
        It is not there.
    """
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"running CUDA sources on the CPU needs a C++20 compiler, and there is no {command[0]!r}: "
            "install g++ (11 or newer), or name another compiler in $CXX"
        )
    return command


def build(source: Source, sanitize: str | None = None) -> Path:
    """Compile a source for the CPU, once for all processes.

    Parameters
    ----------
    source : Source
        As `approxconv.kernels.sources.read` gives it.
    sanitize : {None, "address", "thread"}
        None for a shared library, else the sanitizer under which a program of its own runs a launch.

    Returns
    -------
    Path
        The library or the program.

    Raises
    ------
    KernelCompileError
        It does not compile; the message names the source's own file and line.
    RuntimeError
        There is no compiler.
    """
    if sanitize not in _MODES:
        raise ValueError(f"sanitize must be one of {', '.join(map(repr, _MODES))}, got {sanitize!r}")
    command = [*compiler(), *_FLAGS, *_MODES[sanitize]]
    parts = [source.fingerprint, *command, _version(*compiler()), _SHIM.read_text(), _DRIVER.read_text()]
    if sanitize is not None:
        parts += map(str, source.files)  # which its reports name
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cached_folder(
        f"host-{source.name}-{sanitize or 'plain'}-{digest}",
        lambda folder: _compile(source, command, sanitize, folder / _program(sanitize)),
    )
    return folder / _program(sanitize)


def _compile(source: Source, command: list[str], sanitize: str | None, program: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="approxconv-host-") as folder:
        copies = {path: Path(folder, f"{number}-{path.name}") for number, path in enumerate(source.resolved)}
        for path, copy in copies.items():
            copy.write_text(_host_text(path, source.resolved[path], copies), encoding="utf-8")
        main = Path(folder, "main.cpp")
        lines = [_include(_SHIM), _include(copies[source.path]), *(f"HOST_KERNEL({name})" for name in source.kernels)]
        main.write_text("\n".join([*lines, ""]), encoding="utf-8")
        files = [main] if sanitize is None else [main, _DRIVER]
        done = subprocess.run(
            [*command, *map(str, files), "-o", str(program)],
            capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    if done.returncode != 0:
        raise KernelCompileError.from_log(done.stderr, source.path)


def _host_text(path: Path, text: str, copies: Mapping[Path, Path]) -> str:
    """A CUDA source as C++, every line where it was, that includes the copies of its headers."""

    def include(match: re.Match[str]) -> str:
        copy = copies.get(Path(match[1]))
        return match[0] if copy is None else _include(copy)

    text = _INCLUDE.sub(include, text)
    text = _DYNAMIC_SHARED.sub(_declaration, text)
    text = _SHARED_ALIGNAS.sub(r"\1__align__", text)
    return f"#line 1 {json.dumps(str(path), ensure_ascii=False)}\n{text}"


def _declaration(match: re.Match[str]) -> str:
    if "__shared__" not in match["type"]:
        return match[0]
    element = " ".join(_QUALIFIERS.sub("", match["type"]).split())
    return f"DYNAMIC_SHARED({match['name']}, {element}[]{match['dimensions']});" + "\n" * match[0].count("\n")


def _include(path: Path) -> str:
    return f'#include "{path.as_posix()}"'


def _program(sanitize: str | None) -> str:
    return "kernels.so" if sanitize is None else "kernels"


@cache
def _version(*command: str) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
