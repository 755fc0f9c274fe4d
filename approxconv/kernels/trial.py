"""The process in which `replace` tries a kernel, asked by its standard input and answering by a file."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path

from .compile import KernelCompileError
from .operators import OPERATORS, operators_of
from .sources import list_sources, read, set_overlay, use_source
from .verify import BenchmarkReport, VerificationReport, benchmark, verify


def main() -> None:
    """Read a request from standard input, try the kernel, write a pickle of what was found or of the error."""
    candidate, current, chosen, name, engine, seed, result, environment = pickle.load(sys.stdin.buffer)
    os.environ.clear()
    os.environ.update(environment)  # it may have changed since this process started
    try:
        use_source(chosen)
        outcome = _try_out(Path(candidate), Path(current), name, engine, seed)
    except FileNotFoundError as error:  # of a header, which `read` misses before a compiler does
        outcome = _named(KernelCompileError.from_log(f"{candidate}/{error}", Path(candidate, f"{name}.cu")), candidate)
    except KernelCompileError as error:
        outcome = _named(error, candidate)
    except Exception as error:
        outcome = error
    Path(result).write_bytes(pickle.dumps(outcome))


def _named(error: KernelCompileError, candidate: str) -> KernelCompileError:
    """The error without the candidate's path, which is gone when its message is read."""
    if error.path is None or error.path.parent != Path(candidate):
        return error
    text = str(error).replace(str(error.path), "the new text")
    return KernelCompileError(text, error.log, error.path, error.line)


def _try_out(
    candidate: Path, current: Path, name: str, engine: str, seed: int
) -> tuple[VerificationReport, BenchmarkReport | None]:
    set_overlay(candidate)
    if name in OPERATORS and name not in operators_of(name):
        raise ValueError(f"{name} must define kernels {name}_…, it defines {', '.join(read(name).kernels) or 'none'}")
    verification = verify(name, engine=engine, seed=seed)
    if not verification:
        return verification, None
    timed = benchmark(name, engine=engine)
    set_overlay(current)
    if name in list_sources():
        with suppress(Exception):  # the kernel in use may be broken, which is no fault of this one
            timed = timed.beside(benchmark(name, engine=engine), "the kernel before")
    return verification, timed
