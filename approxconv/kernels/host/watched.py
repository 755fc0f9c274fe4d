"""A launch in a process of its own, which a sanitizer watches: it cannot be loaded into Python's."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ..plan import Plan

_VALUE, _ALIGNMENT = 2**64 - 1, 64  # driver.cpp's
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # looking for leaks needs ptrace, which containers forbid
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
_FINDING = re.compile(r"runtime error: .*|(?<=SUMMARY: )\w+: \S+(?: race)?")
_NOT_STARTED = "Sanitizer: unexpected memory mapping"

_Range = tuple[int, int]


class SanitizerError(RuntimeError):
    """A sanitizer found a fault in a kernel; the message begins ``lut_gemm.cu:41: …`` where it knows the line.

    Attributes
    ----------
    report : str
        All that the sanitizer said.
    """

    def __init__(self, message: str, report: str) -> None:
        super().__init__(f"{message}\n\n{report}")
        self.report = report

    @classmethod
    def from_report(cls, report: str, status: int, kernel: str, files: Iterable[Path]) -> SanitizerError:
        """The error that a report tells.

        Parameters
        ----------
        report : str
            What the process said.
        status : int
            What it ended with.
        kernel : str
            What it ran.
        files : iterable of Path
            The kernel's sources, for the first line of theirs that the report names.
        """
        found = _FINDING.search(report)
        message = f"{found[0] if found else f'ended with status {status}'}, in {kernel}"
        place = re.search(rf"({'|'.join(re.escape(str(file)) for file in files)}):(\d+)", report)
        return cls(f"{Path(place[1]).name}:{place[2]}: {message}" if place else message, report)


def run_watched(
    plan: Plan, signature: str, geometry: tuple[int, ...], program: Path, files: Iterable[Path]
) -> tuple[int, str]:
    """Run a plan in the program that a sanitizer was built into.

    Parameters
    ----------
    plan : Plan
        Its tensors lie on the CPU.
    signature : str
        Kinds and sizes of its arguments.
    geometry : tuple of int
        Grid, block and shared bytes.
    program : Path
        As `build` makes it.
    files : iterable of Path
        What it was made from.

    Returns
    -------
    tuple of int and str
        The outcome and its text.

    Raises
    ------
    SanitizerError
        It found a fault.
    RuntimeError
        It does not run on this machine.
    """
    ranges, places = _lay_out([argument for argument in plan.arguments if isinstance(argument, Tensor)])
    before = [ctypes.string_at(begin, end - begin) for begin, end in ranges]
    head = [_sized(plan.kernel.encode()), _sized(signature.encode()), _sized(struct.pack("7I", *geometry))]
    with tempfile.TemporaryDirectory(prefix="approxconv-host-") as folder:
        launch, result = Path(folder, "launch"), Path(folder, "result")
        launch.write_bytes(b"".join([*head, *_buffers(ranges, before), *_arguments(plan, places)]))
        done = subprocess.run(
            [*_fixed_addresses(), str(program), str(launch), str(result)],
            stderr=subprocess.PIPE, text=True, errors="replace", env=_OPTIONS | os.environ,
        )  # fmt: skip
        if _NOT_STARTED in done.stderr:
            raise RuntimeError(f"the sanitizer does not run on this machine: {done.stderr.strip()}")
        if done.returncode != 0:
            raise SanitizerError.from_report(done.stderr, done.returncode, plan.kernel, files)
        with result.open("rb") as file:
            outcome, text = _read_number(file), _read_sized(file)
            after = [_read_sized(file) for _ in ranges]
    for (begin, _), old, new in zip(ranges, before, after, strict=True):
        if new != old:  # a tensor that is only read may lie in read-only memory
            ctypes.memmove(begin, new, len(new))
    return outcome, text.decode(errors="replace")


def _lay_out(tensors: list[Tensor]) -> tuple[list[_Range], list[tuple[int, int]]]:
    """The address ranges that tensors span, those that overlap joined; and each tensor's range and offset in it."""
    spans = [_span(tensor) for tensor in tensors]
    ranges: list[_Range] = []
    places = [(0, 0)] * len(tensors)
    for number in sorted(range(len(tensors)), key=spans.__getitem__):
        begin, end = spans[number]
        if ranges and begin < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
        places[number] = (len(ranges) - 1, begin - ranges[-1][0])
    return ranges, places


def _span(tensor: Tensor) -> _Range:
    """The addresses from a tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = last + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _buffers(ranges: list[_Range], contents: list[bytes]) -> list[bytes]:
    parts = [_number(len(ranges))]
    for (begin, _), content in zip(ranges, contents, strict=True):
        parts += [_number(begin % _ALIGNMENT), _sized(content)]
    return parts


def _arguments(plan: Plan, places: list[tuple[int, int]]) -> list[bytes]:
    parts, place = [_number(len(plan.arguments))], iter(places)
    for argument in plan.arguments:
        if isinstance(argument, Tensor):
            parts += map(_number, next(place))
        else:
            parts += [_number(_VALUE), _sized(argument.tobytes())]
    return parts


@cache
def _fixed_addresses() -> tuple[str, ...]:
    """A command that runs another without address randomisation, in which ThreadSanitizer may not find its place.

    Nothing where that is not allowed.
    """
    command = ("setarch", "-R")
    if shutil.which(command[0]) is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return ()
    return command


def _number(value: int) -> bytes:
    return struct.pack("Q", value)


def _sized(content: bytes) -> bytes:
    return _number(len(content)) + content


def _read_number(file: BinaryIO) -> int:
    return struct.unpack("Q", file.read(8))[0]


def _read_sized(file: BinaryIO) -> bytes:
    return file.read(_read_number(file))
