"""From a source to machine code, once per version of the source: NVRTC, its errors, what the kernels need of a GPU."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._display import Shown, html_table, titled
from .cache import cached_folder, find_entry
from .sources import Source, on_reload, read

_OPTIONS = ("-std=c++17", "--ptxas-options=-v", "-lineinfo")
_FORMAT = 1  # of a cache entry's files
_CUBIN, _LOG, _RESOURCES = "kernels.cubin", "compiler.log", "resources.json"

_compiled: dict[tuple[Source, str, tuple[str, ...]], Compiled] = {}


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes, as the assembler reports it.

    Attributes
    ----------
    registers : int
        Registers a thread.
    shared_bytes : int
        Static shared memory a block, without what a launch adds.
    spill_stores, spill_loads : int
        Bytes a thread moves between registers and local memory because registers ran out.
    stack_bytes : int
        Local memory a thread.
    max_threads : int or None
        Most threads a block that the kernel was compiled for, if ``__launch_bounds__`` says so.
    """

    registers: int
    shared_bytes: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    max_threads: int | None


@dataclass(frozen=True, eq=False)
class Compiled:
    """A source's machine code for one architecture.

    Attributes
    ----------
    path : Path
        The cubin on disk.
    arch : str
        As in ``sm_90``.
    source : Source
        What it was compiled from.
    kernels : mapping of str to KernelResources
        By the kernel's name, mangled where it is not ``extern "C"``.
    log : str
        What the compiler said, warnings among it.
    """

    path: Path
    arch: str
    source: Source
    kernels: Mapping[str, KernelResources]
    log: str = field(repr=False)


class KernelCompileError(RuntimeError):
    """A source that does not compile; the message begins ``lut_gemm.cu:41: error: …`` and shows that line.

    Attributes
    ----------
    log : str
        All that the compiler said.
    path : Path or None
        The file of the first error, which may be a header.
    line : int or None
        Its line, counted from 1; None where the compiler names none.
    """

    def __init__(self, message: str, log: str = "", path: Path | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.path = path
        self.line = line

    @classmethod
    def from_log(cls, log: str, path: Path) -> KernelCompileError:
        """The error that a log of NVRTC or GCC tells.

        Parameters
        ----------
        log : str
            The compiler's output.
        path : Path
            The file that was compiled: the one to name where the log names none.
        """
        found = _LOCATED_ERROR.search(log)
        if found is None:
            said = _ERROR.search(log)
            return cls(f"{path.name}: error: {said[1] if said else log.strip()}\nin {path}", log, path)
        path, line = Path(found["path"]), int(found["line"])
        message = [f"{path.name}:{line}: error: {found['message']}", *_excerpt(path, line), f"in {path}"]
        if more := len(_LOCATED_ERROR.findall(log)) - 1:
            message[-1] += f", with {more} more error{'s' if more > 1 else ''} (see .log)"
        return cls("\n".join(message), log, path, line)


# NVRTC: "file(41): error: …", GCC: "file:41:7: error: …".
_LOCATED_ERROR = re.compile(
    r"^(?P<path>\S.*?)[(:](?P<line>\d+)(?:\)|:\d+)?: (?:catastrophic |fatal )?error(?: #[\w-]+)?: (?P<message>.*)$",
    re.MULTILINE,
)
_ERROR = re.compile(r"\berror\s*: *(.*)")


def _excerpt(path: Path, line: int, around: int = 2) -> list[str]:
    """The line of an error and its neighbours, numbered, or nothing if the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    except OSError:
        return []
    first, last = max(line - around, 1), min(line + around, len(lines))
    width = len(str(last))
    return [f"{'>' if n == line else ' '} {n:{width}} | {lines[n - 1]}".rstrip() for n in range(first, last + 1)]


def compile_kernel(name: str, arch: str = "sm_90", options: Sequence[str] = ()) -> Compiled:
    """Kernel source `name` compiled for `arch`, from this process's memory, from disk, or by NVRTC; needs no GPU.

    Parameters
    ----------
    name : str
        A source in the chosen folder or the packaged one, without suffix.
    arch : str
        Of the GPU, as in ``sm_90`` or ``sm_90a``.
    options : sequence of str
        More options for NVRTC, as in ``-DNAME=1``.

    Raises
    ------
    KernelCompileError
        It does not compile; the message names the file and the line.
    FileNotFoundError
        There is no such source, or a header is missing.
    ImportError
        It must be compiled, and CuPy or NVRTC is missing.
    ValueError
        `arch` is no architecture.
    """
    if re.fullmatch(r"sm_\d{2,3}[af]?", arch) is None:
        raise ValueError(f"arch must be as in 'sm_90', got {arch!r}")
    source = read(name)
    key = (source, arch, tuple(options))
    compiled = _compiled.get(key)
    if compiled is None or not compiled.path.exists():
        compiled = _compiled[key] = _load(_entry(*key), source, arch)
    return compiled


on_reload(_compiled.clear)


def _entry(source: Source, arch: str, options: tuple[str, ...]) -> Path:
    """The cache entry of what is asked for, of any version of NVRTC where there is none to compile with."""
    digest = hashlib.sha256(json.dumps((_FORMAT, source.fingerprint, _OPTIONS, options)).encode()).hexdigest()[:32]
    key = f"{source.name}-{arch}-{digest}-nvrtc"
    try:
        nvrtc = _nvrtc()
    except ImportError:
        entry = find_entry(f"{glob.escape(key)}*")
        if entry is None:
            raise
        return entry
    version = ".".join(map(str, nvrtc.getVersion()))
    return cached_folder(key + version, lambda folder: _build(folder, nvrtc, source, (f"-arch={arch}", *options)))


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "compiling CUDA kernels needs CuPy and NVRTC: pip install 'approxconv[cuda12]' (or 'approxconv[cuda13]' "
            "for CUDA 13)"
        ) from error
    return nvrtc


def _build(folder: Path, nvrtc: Any, source: Source, options: tuple[str, ...]) -> None:
    """Compile from memory, so that the machine code is of the very text that the fingerprint is of."""
    headers = {path.as_posix().encode(): text.encode() for path, text in source.resolved.items() if path != source.path}
    text = source.resolved[source.path]
    program = nvrtc.createProgram(text, str(source.path), tuple(headers.values()), tuple(headers))
    try:
        nvrtc.compileProgram(program, (*_OPTIONS, *_cuda_headers(), *options))
        log, ptx = nvrtc.getProgramLog(program), nvrtc.getPTX(program).decode()
        (folder / _CUBIN).write_bytes(_whole(nvrtc.getCUBIN(program)))
    except nvrtc.NVRTCError as error:
        raise KernelCompileError.from_log(nvrtc.getProgramLog(program) or str(error), source.path) from None
    finally:
        nvrtc.destroyProgram(program)
    (folder / _LOG).write_text(log, encoding="utf-8")
    kernels = _resources(log, ptx)
    (folder / _RESOURCES).write_text(json.dumps({name: asdict(known) for name, known in kernels.items()}))


def _whole(cubin: bytes) -> bytes:
    """An ELF file with the last byte that CuPy's ``getCUBIN`` takes for a string's end and drops; it is always zero.

    The driver loads the file without it, NVIDIA's tools do not.
    """
    offset, size, count = (int.from_bytes(cubin[at : at + n], "little") for at, n in ((0x20, 8), (0x36, 2), (0x38, 2)))
    return cubin.ljust(offset + size * count, b"\0")


def _cuda_headers() -> tuple[str, ...]:
    """The option that lets sources include CUDA's own headers, where those are installed."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    return () if folder is None else (f"-I{folder}",)


_ENTRY_REPORT = re.compile(r"Compiling entry function '([^']+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
_ENTRY_PTX = re.compile(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{")
_MOST_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")


def _resources(log: str, ptx: str) -> dict[str, KernelResources]:
    bounds = {name: _MOST_THREADS.search(directives) for name, directives in _ENTRY_PTX.findall(ptx)}
    return {name: _resources_of(report, bounds.get(name)) for name, report in _ENTRY_REPORT.findall(log)}


def _resources_of(report: str, bound: re.Match[str] | None) -> KernelResources:
    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, report)]

    # Functions that were not inlined report after the kernel: their spills are its own.
    return KernelResources(
        registers=max(numbers(r"Used (\d+) registers")),
        shared_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
        spill_stores=sum(numbers(r"(\d+) bytes spill stores")),
        spill_loads=sum(numbers(r"(\d+) bytes spill loads")),
        stack_bytes=max(numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)"), default=0),
        max_threads=math.prod(int(n) for n in bound.groups("1")) if bound else None,
    )


def _load(entry: Path, source: Source, arch: str) -> Compiled:
    kernels = json.loads((entry / _RESOURCES).read_text())
    return Compiled(
        path=entry / _CUBIN,
        arch=arch,
        source=source,
        kernels={name: KernelResources(**known) for name, known in kernels.items()},
        log=(entry / _LOG).read_text(encoding="utf-8"),
    )


@dataclass(frozen=True)
class ArchLimits:
    """What one multiprocessor has.

    Attributes
    ----------
    warps, blocks : int
        Most that can be resident.
    shared_bytes : int
        Shared memory.
    reserved_bytes : int
        Shared memory that the driver takes of every block.
    shared_granularity : int
        Shared memory is handed out in multiples of this.
    """

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024
    shared_granularity: int = 128

    @property
    def shared_block_bytes(self) -> int:
        """Most shared memory that one block can have, with opt-in."""
        return self.shared_bytes - self.reserved_bytes


_WARP = 32
_BLOCK_THREADS = 1024
_REGISTERS = 65536  # of a multiprocessor, and the most that one block can have
_PARTITIONS = 4  # of a multiprocessor: each has its share of the registers, for its share of the warps
_WARP_REGISTERS = 256  # a warp's registers are a multiple of this

# NVIDIA's CUDA programming guide, "Technical specifications per compute capability".
_KIB = 1024
_LIMITS = {
    75: ArchLimits(32, 16, 64 * _KIB, 0, 256),
    80: ArchLimits(64, 32, 164 * _KIB),
    86: ArchLimits(48, 16, 100 * _KIB),
    87: ArchLimits(48, 16, 164 * _KIB),
    89: ArchLimits(48, 24, 100 * _KIB),
    90: ArchLimits(64, 32, 228 * _KIB),
    100: ArchLimits(64, 32, 228 * _KIB),
    101: ArchLimits(48, 24, 228 * _KIB),
    103: ArchLimits(64, 32, 228 * _KIB),
    110: ArchLimits(48, 24, 228 * _KIB),
    120: ArchLimits(48, 24, 100 * _KIB),
    121: ArchLimits(48, 24, 100 * _KIB),
}


def arch_limits(arch: str) -> ArchLimits:
    """The limits of a multiprocessor of `arch`.

    Raises
    ------
    ValueError
        They are not known here; the message lists those that are.
    """
    number = int(re.sub(r"\D", "", arch) or 0)
    if number not in _LIMITS:
        raise ValueError(f"no limits are known of arch {arch!r}, only of {', '.join(f'sm_{n}' for n in _LIMITS)}")
    return _LIMITS[number]


def current_arch() -> str:
    """The architecture of torch's current CUDA device, ``sm_90`` where there is none."""
    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class KernelInfo(Shown, KernelResources):
    """What a kernel takes of a GPU: `KernelResources`, and what follows from them. ``print`` it for a line of text.

    Attributes
    ----------
    source, kernel, arch : str
        Which one, compiled for what.
    """

    source: str
    kernel: str
    arch: str

    @property
    def block_threads(self) -> int:
        """Most threads a block can have: what the launch bounds and the registers allow."""
        fitting = self._resident_warps() // _PARTITIONS * _PARTITIONS * _WARP
        return min(self.max_threads or _BLOCK_THREADS, fitting)

    def occupancy(self, block: int | Sequence[int], dynamic_shared: int = 0) -> float:
        """The fraction of a multiprocessor's warps that can be resident: ``blocks · warps a block / warps``.

        Parameters
        ----------
        block : int or sequence of int
            Threads a block, or their number along each axis.
        dynamic_shared : int
            Bytes of shared memory that the launch adds.

        Returns
        -------
        float
            0 if not even one block can run.

        Raises
        ------
        ValueError
            `block` is not positive, or the limits of the architecture are not known.
        """
        threads = block if isinstance(block, int) else math.prod(block)
        if threads < 1:
            raise ValueError(f"block must have at least one thread, got {block}")
        limits = arch_limits(self.arch)
        shared = self.shared_bytes + dynamic_shared
        if threads > self.block_threads or shared > limits.shared_block_bytes:
            return 0.0
        warps = -(-threads // _WARP)
        granules = -(-(shared + limits.reserved_bytes) // limits.shared_granularity)
        blocks = min(limits.blocks, limits.warps // warps, self._resident_warps() // warps)
        if granules:
            blocks = min(blocks, limits.shared_bytes // (granules * limits.shared_granularity))
        return blocks * warps / limits.warps

    def _resident_warps(self) -> int:
        """Warps whose registers fit a multiprocessor."""
        granules = -(-self.registers * _WARP // _WARP_REGISTERS)
        return _REGISTERS // _PARTITIONS // (granules * _WARP_REGISTERS) * _PARTITIONS

    def __str__(self) -> str:
        spilled = f"{self.spill_stores} B spilled, {self.spill_loads} B reloaded"
        return (
            f"{self.kernel} ({self.source}.cu, {self.arch}): {self.registers} registers, "
            f"{self.shared_bytes} B static shared, {self.stack_bytes} B stack, "
            f"{spilled if self.spill_stores or self.spill_loads else 'no spills'}, "
            f"at most {self.block_threads} threads a block ({self.occupancy(self.block_threads):.0%} occupancy)"
        )

    def _repr_html_(self) -> str:
        return KernelInfos({self.kernel: self})._repr_html_()


class KernelInfos(Shown, dict[str, KernelInfo]):
    """`KernelInfo` of each kernel of a source, by name."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.values()))

    def _repr_html_(self) -> str:
        heading = ("kernel", "registers", "shared bytes", "stack bytes", "spilled bytes", "threads", "occupancy")
        rows = [
            (
                *(name, each.registers, each.shared_bytes, each.stack_bytes, each.spill_stores, each.block_threads),
                f"{each.occupancy(each.block_threads):.0%}",
            )
            for name, each in self.items()
        ]
        first = next(iter(self.values()), None)
        return titled(f"{first.source}.cu for {first.arch}" if first else "no kernels", html_table(rows, heading))


def info(name: str, kernel: str | None = None, arch: str | None = None) -> KernelInfo | KernelInfos:
    """Registers, shared memory, spills and occupancy of a source's kernels; compiles it if need be.

    Parameters
    ----------
    name : str
        The source, without suffix.
    kernel : str, optional
        One of its kernels.
    arch : str, optional
        As in ``sm_90``; left out, the current device's, or ``sm_90`` where there is none.

    Returns
    -------
    KernelInfo or KernelInfos
        Of `kernel`, or of each one by name, a dict; both show themselves as a table in a notebook.

    Raises
    ------
    ValueError
        There is no such kernel; the message lists those there are.
    KernelCompileError, FileNotFoundError, ImportError
        As by `compile_kernel`.
    """
    compiled = compile_kernel(name, arch or current_arch())
    infos = KernelInfos(
        (each, KernelInfo(**asdict(known), source=name, kernel=each, arch=compiled.arch))
        for each, known in sorted(compiled.kernels.items())
    )
    if kernel is None:
        return infos
    if kernel not in infos:
        raise ValueError(f"no kernel {kernel!r} in {compiled.source.path}; there are: {', '.join(infos) or 'none'}")
    return infos[kernel]
