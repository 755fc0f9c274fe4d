"""What works here, found by trying it, and the command that mends what does not."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ._display import Shown, html_table, titled
from ._version import __version__
from .engines import ENGINES, EngineError, reference, select
from .multiplier import operand_values

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 6)
_WIDTH = 110
_MARKS = {True: "✓", False: "✗", None: "–"}
_OPS = {"lut_gemm": "lut_matmul", "lut_conv2d": "lut_conv2d", "lut_dwconv2d": "lut_dwconv2d"}
_CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
_OLDEST_GCC = 11
_INSTALL_GCC = "apt-get install g++  # or name another compiler in $CXX"
_INSTALL_NUMBA = "pip install --force-reinstall numba"
_REINSTALL = "pip install --force-reinstall --no-deps .  # in the folder of the library's sources"
_VARIABLE = "$APPROXCONV_CUDA_SRC"
_LEAVE = {"use_source": "approxconv.kernels.use_source(None)", _VARIABLE: f"unset {_VARIABLE[1:]}"}
_USE_REFERENCE = "with approxconv.use_engine('reference'): ...  # exact and slow; please report this"


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes
    ----------
    name : str
        What it is.
    ok : bool or None
        Whether it works; None if nothing here needs it.
    found : str
        What there is, or what is wrong with it.
    mend : str
        The command that mends or improves it, "" if there is nothing to do.
    """

    name: str
    ok: bool | None
    found: str
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """What `doctor` found; shows itself in a notebook and at a prompt, ``print`` it elsewhere.

    Attributes
    ----------
    checks : tuple of Check
        In the order they are shown.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Everything works that should work here."""
        return all(check.ok is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"version": __version__, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        return "\n".join([_cut(self._head()), *(line for check in self.checks for line in _lines(check))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(f"{_MARKS[check.ok]} {check.name}", check.found, check.mend) for check in self.checks]
        return titled(self._head(), html_table(rows, ("", "found", "to mend it")))

    def _head(self) -> str:
        failed = [check.name for check in self.checks if check.ok is False]
        state = f"to mend: {_listed(failed)}" if failed else "all that should work here does"
        return f"approxconv {__version__}: {state}"


def _lines(check: Check) -> Iterator[str]:
    line = f"{_MARKS[check.ok]} {check.name:<9} {check.found}"
    mend = f"  → {check.mend}" if check.mend else ""
    if len(line + mend) <= _WIDTH:
        yield line + mend
        return
    yield _cut(line)
    if mend:
        yield mend


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def doctor() -> Diagnosis:
    """What works here: torch, CUDA, CuPy and NVRTC, cache, kernels, compiler, engines, threads, and every op.

    Every op is compared with the oracle on every engine there is, about a second in all; the first time kernels are
    compiled for it, up to a minute. Nothing raises: what fails is a line of the result, with the command that mends it.
    It starts CUDA in this process if there is a device, and runs the kernels in use, your own included.

    Returns
    -------
    Diagnosis
        Its repr is the report, so ``approxconv.doctor()`` shows it once at a prompt and in a notebook; nothing is
        printed, so a script says ``print(approxconv.doctor())``. ``.ok`` and ``.checks`` are for programs.
    """
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        return Diagnosis(tuple(_tried(name, check) for name, check in _CHECKS.items()))


def _tried(name: str, check: Callable[[], tuple[bool | None, str] | tuple[bool | None, str, str]]) -> Check:
    try:
        ok, found, *mend = check()
    except Exception as error:
        ok, found, mend = False, _said(error), []
    return Check(name, ok, " ".join(found.split()), *mend)


def _said(error: BaseException) -> str:
    """Kind and first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if re.search(r"\w", line)), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _installed(package: str) -> str | None:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


def _python() -> tuple[bool, str, str]:
    of_torch = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    packages = (f"{package} {_installed(package) or 'missing'}" for package in ("NumPy", "Numba"))
    found = f"{sys.version.split()[0]}, torch {torch.__version__}, {', '.join(packages)}"
    for package, release, oldest, mend in (
        ("Python", sys.version_info[:2], OLDEST_PYTHON, "conda create -n approxconv python=3.12"),
        ("torch", of_torch, OLDEST_TORCH, f"pip install --upgrade 'torch>={_version(OLDEST_TORCH)}'"),
    ):
        if release < oldest:
            return False, f"{found}; {package} must be at least {_version(oldest)}", mend
    return True, found, ""


def _driver() -> tuple[int, int]:
    """How many devices NVIDIA's driver offers, and the CUDA version it supports, as in 12080; zeros without it."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0, 0
    devices, supported = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(supported))
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(devices))
    return devices.value, supported.value


def _dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _has_device() -> bool:
    return torch.version.hip is None and torch.cuda.is_available()


def _cuda() -> tuple[bool | None, str] | tuple[bool | None, str, str]:
    if torch.version.hip is not None:
        return None, f"torch is built for ROCm {torch.version.hip}; GPU kernels need CUDA"
    devices, supported = _driver()
    if not torch.cuda.is_available() and not devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return None, f"no CUDA device{'' if hidden is None else f' (CUDA_VISIBLE_DEVICES={hidden!r})'}"
    mend = "update NVIDIA's driver: https://www.nvidia.com/drivers"
    if supported >= 12000:
        wheels = "cu130" if supported >= 13000 else "cu126"
        mend = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheels}"
    try:
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = (
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            f"{f', one of {n}' if (n := torch.cuda.device_count()) > 1 else ''}), "
            f"torch for CUDA {torch.version.cuda}, driver for CUDA up to {_dotted(supported)}"
        )
        torch.ones(1, device="cuda").add(1).item()
    except (RuntimeError, AssertionError) as error:
        return False, f"{devices} device{'s' * (devices != 1)}, but {_said(error)}", mend
    return True, found


def _extra() -> str:
    """The extra that brings the CuPy for torch's CUDA, or for the driver's."""
    major = int(torch.version.cuda.partition(".")[0]) if torch.version.cuda else _driver()[1] // 1000
    return "cuda13" if major >= 13 else "cuda12"


def _nvrtc_extra() -> str:
    """The extra that brings the NVRTC for the CuPy that is installed."""
    installed = [extra for extra in ("cuda12", "cuda13") if _installed(f"cupy-{extra}x")]
    return installed[0] if len(installed) == 1 else _extra()


def _cupy() -> tuple[bool | None, str] | tuple[bool | None, str, str]:
    from .kernels import require_cupy

    install = f"pip install 'approxconv[{_extra()}]'"
    packages = [name for name in _CUPY_PACKAGES if _installed(name)]
    if find_spec("cupy") is None:
        return (False, "not installed", install) if _has_device() else (None, "not installed, and no device needs it")
    anew = f"pip uninstall -y {' '.join(packages)} && {install}"
    if len(packages) > 1:
        return False, f"{_listed(packages)} are in each other's way", anew
    try:
        cupy = require_cupy()
        cuda = cupy.cuda.driver.get_build_version()
    except Exception as error:
        return False, f"installed, but {_said(error)}", f"pip install --force-reinstall {' '.join(packages) or 'cupy'}"
    found, supported = f"{cupy.__version__} for CUDA {cuda // 1000}", _driver()[1]
    if _has_device() and supported // 1000 < cuda // 1000:
        return False, f"{found}, but the driver supports CUDA up to {_dotted(supported)}", anew
    if torch.version.cuda and int(torch.version.cuda.partition(".")[0]) != cuda // 1000:
        return True, f"{found}, while torch is for CUDA {torch.version.cuda}", anew
    return True, found


def _nvrtc() -> tuple[bool | None, str] | tuple[bool | None, str, str]:
    from .kernels import KernelCompileError, compile_kernel, require_cupy
    from .kernels.compile import current_arch

    if find_spec("cupy") is None and not _has_device():
        return None, "comes with CuPy"
    try:
        found = _version(require_cupy().cuda.nvrtc.getVersion())
        arch = current_arch() if _has_device() else "sm_90"
        compile_kernel("lut_gemm", arch)
    except KernelCompileError as error:
        return False, _said(error), _mend_sources("lut_gemm") or _newer_nvrtc()
    except (OSError, ValueError) as error:
        return False, _said(error), _mend_sources("lut_gemm") or _REINSTALL
    except (ImportError, RuntimeError) as error:
        return False, _said(error), f"pip install 'approxconv[{_nvrtc_extra()}]'"
    return True, f"{found}; lut_gemm.cu compiled for {arch}, in the cache"


def _newer_nvrtc() -> str:
    return f"pip install --upgrade {'nvidia-cuda-nvrtc' if _nvrtc_extra() == 'cuda13' else 'nvidia-cuda-nvrtc-cu12'}"


def _cache() -> tuple[bool, str, str]:
    from .kernels.cache import cache_dir, wanted_dir

    mend = "export APPROXCONV_CACHE_DIR=$(mktemp -d)  # or a folder that lasts"
    try:
        folder, wanted = cache_dir(), wanted_dir()
    except RuntimeError as error:  # no home
        return False, f"{_said(error)}, so every process compiles anew", mend
    if folder != wanted:
        return False, f"{wanted} cannot be written, so every process compiles anew", mend
    sizes, entries = [], 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            sizes.append(path.stat().st_size if path.is_file() else 0)
            entries += path.name == "manifest.json"
    return True, f"{sum(sizes) / 1e6:.1f} MB in {entries} entries, writable: {folder}", ""


def _chosen_by() -> str:
    """What says where kernel sources are looked for: ``"use_source"``, ``"$APPROXCONV_CUDA_SRC"`` or ``"packaged"``."""
    from .kernels import source_dir
    from .kernels.sources import packaged_dir

    environment = os.environ.get(_VARIABLE[1:])
    try:
        folder = source_dir()
    except FileNotFoundError as error:
        return next((choice for choice in _LEAVE if choice in str(error)), "packaged")
    if folder == packaged_dir():
        return "packaged"
    named = environment and Path(os.path.abspath(os.path.expanduser(environment))) == folder
    return _VARIABLE if named else "use_source"


def _mend_sources(source: str) -> str:
    """How to go back to the packaged kernel, "" if `source` is it."""
    from . import kernels
    from .kernels.sources import packaged_dir

    if source in kernels.replaced():
        return f"approxconv.kernels.undo({source!r})"
    chosen = _chosen_by()
    if chosen == "packaged":
        return ""
    with suppress(OSError, ValueError):
        if all(file.parent == packaged_dir() for file in kernels.read(source).files):
            return ""
    return _LEAVE[chosen]


def _sources() -> tuple[bool, str] | tuple[bool, str, str]:
    from . import kernels

    try:
        folder = kernels.source_dir()
        for name in _OPS:
            kernels.read(name)
    except (OSError, ValueError) as error:
        return False, _said(error), next(filter(None, map(_mend_sources, _OPS)), _REINSTALL)
    replaced, chosen = kernels.replaced(), _chosen_by()
    names = sorted(path.stem for path in folder.glob("*.cu"))
    also = f"; replaced: {_listed(replaced)}" if replaced else ""
    whose = "packaged" if chosen == "packaged" else f"by {chosen}"
    return True, f"{_listed(names) or 'headers only'}{also}; {whose}: {folder}"


def _compiler() -> tuple[bool | None, str] | tuple[bool | None, str, str]:
    from .kernels.host import compiler

    chosen = os.environ.get("CXX", "")
    mend = "unset CXX" if chosen else _INSTALL_GCC
    try:
        command = compiler()
    except RuntimeError:
        missing = chosen or "g++"
        return False if chosen else None, f"no {missing!r}, for the engine host_cuda", mend
    try:
        asked = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return False, _said(error), mend
    said = next(iter(asked.stdout.splitlines()), "")
    release = re.search(r"\) (\d+)\.", said)  # "g++ (Debian 12.2.0-14) 12.2.0"
    if release and int(release[1]) < _OLDEST_GCC:
        return False, f"{said}; C++20 needs g++ {_OLDEST_GCC} or newer", "apt-get install g++-12 && export CXX=g++-12"
    return True, f"{said}, for the engine host_cuda"


_ON_HOST = ("host_cuda", "host_factored")
_OF_LOW_RANK = ("factored", "host_factored")


def _available(device: torch.device) -> tuple[dict[str, Any], dict[str, Exception]]:
    """The engines that can run on `device`, and what is wrong with the others that should."""
    engines, broken = {}, {}
    for name in ENGINES:
        if name == "truncated":  # is approximate, and needs a rank
            continue
        try:
            engines[name] = select(name, device)
        except EngineError:  # an engine for another kind of device
            continue
        except Exception as error:
            broken[name] = error
    return engines, broken


def _devices() -> list[torch.device]:
    return [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or _has_device()]


def _engines() -> tuple[bool, str, str]:
    parts, mend = [], ""
    for device in _devices():
        engines, broken = _available(device)
        try:
            chosen = select("auto", device)
            auto = next((name for name, engine in engines.items() if engine is chosen), "a kernel of your own")
        except Exception:
            auto = "none"
        if auto in ("cpu", "cuda") and "factored" in engines:
            auto += ", or factored for a table of low rank"
        if auto.startswith("cpu") and "residual" in engines:
            auto += ", or residual for one near the exact product"
        parts.append(f"{device.type.upper()} tensors: {', '.join(engines)} (auto: {auto})")
        for name, error in broken.items():
            if name in _ON_HOST and isinstance(error, RuntimeError):
                continue  # no compiler, which is a check of its own
            parts.append(f"{name}: {_said(error)}")
            mend = mend or (_INSTALL_NUMBA if name == "cpu" else f"pip install 'approxconv[{_extra()}]'")
    return not mend, "; ".join(parts), mend


def _cores() -> int:
    """CPU cores that this process may use, by its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = Path("/sys/fs/cgroup")
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max": no quota
            quota, period = map(int, " ".join((group / file).read_text() for file in files).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


def _threads() -> tuple[bool, str, str]:
    used, cores = torch.get_num_threads(), _cores()
    try:
        import numba

        of_numba = str(numba.config.NUMBA_NUM_THREADS)
    except Exception:
        of_numba = "broken"
    found = f"torch {used} (the engine cpu follows), Numba {of_numba}; {cores} core{'s' * (cores != 1)}"
    if used > cores:
        return True, f"{found}: more threads than cores wait for each other", f"torch.set_num_threads({cores})"
    return True, found, ""


def _pictures() -> tuple[bool | None, str, str]:
    packages = {package: _installed(package) for package in ("matplotlib", "adjustText")}
    missing = [package for package, release in packages.items() if release is None]
    found = ", ".join(f"{package} {release}" for package, release in packages.items() if release is not None)
    if missing:
        return None, f"{_listed(missing)} not installed{found and f', {found}'}", "pip install 'approxconv[notebooks]'"
    return True, found, ""


def _self_test() -> tuple[bool, str, str]:
    start = time.perf_counter()
    tested, failures = [], []
    for device in _devices():
        engines, _ = _available(device)
        for name in engines:
            if (name, device.type) == ("reference", "cpu"):  # the oracle
                continue
            tested.append(name)
            failures += _failures(name, device)
    if failures:
        more = len(failures) - 1
        return False, failures[0][0] + (f" (and {more} more)" if more else ""), failures[0][1]
    if not tested:
        return False, "no engine to test", ""
    return True, f"{_listed(tuple(_OPS.values()))} exact on {_listed(tested)} ({time.perf_counter() - start:.1f} s)", ""


def _failures(engine: str, device: torch.device) -> Iterator[tuple[str, str]]:
    """What each op gets wrong on an engine, and how to mend it."""
    from .kernels import KernelCompileError

    for source, op in _OPS.items():
        mend = ""
        try:
            wrong = _wrong(source, engine, device)
        except Exception as error:
            wrong = _said(error)
            if engine in _ON_HOST and isinstance(error, (KernelCompileError, OSError, subprocess.SubprocessError)):
                mend = _INSTALL_GCC
            elif isinstance(error, KernelCompileError):
                mend = _newer_nvrtc()
        if wrong is not None:
            if engine in ("cuda", "host_cuda"):
                mend = _mend_sources(source) or mend
            yield f"{op} on {engine}: {wrong}", mend or _USE_REFERENCE


def _wrong(source: str, engine: str, device: torch.device) -> str | None:
    """The first element of an op's hostile cases that is not the oracle's."""
    from .kernels.verify import Failure

    generator = torch.Generator().manual_seed(0)
    for case in _cases(source):
        x, w, table = case.operands(generator)
        if engine in _OF_LOW_RANK:
            f, g = (torch.randint(-128, 128, (side, 2), generator=generator) for side in table.shape)
            table = (f @ g.T).int()
        elif engine == "residual":
            a_values, w_values = (torch.from_numpy(operand_values(side.bit_length() - 1, True)) for side in table.shape)
            table = (torch.outer(a_values, w_values) + table % 256 - 128).int()
        expected = case.run(reference, x, w, table)
        got = case.run(_Ops(engine), x.to(device), w.view(torch.int8).to(device), table.to(device)).cpu()
        if got.shape != expected.shape or got.dtype != expected.dtype:
            kinds = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (got, expected))
            return "{}, expected {}".format(*kinds)
        wrong = Failure.of(case, got, expected)
        if wrong is not None:
            return (
                f"y{list(wrong.index)} = {wrong.got}, expected {wrong.expected}, "
                f"{wrong.wrong} of {wrong.total} elements wrong"
            )
    return None


class _Ops:
    """``torch.ops.approxconv`` on one engine."""

    def __init__(self, engine: str) -> None:
        for op in _OPS.values():
            setattr(self, op, partial(getattr(torch.ops.approxconv, op), engine=engine))


def _cases(source: str) -> Iterator[Any]:
    """Hostile calls: random tables of 16 and 32 bits, uneven sizes, a padding code that is no zero."""
    from .kernels.verify import Case

    if source == "lut_gemm":
        yield Case(source, (1040, 21), (19, 21), layout="channels_last")
        yield Case(source, (2, 5, 37), (11, 37), "int32", (4, 6), layout="sliced")
    elif source == "lut_conv2d":
        geometry = ((1, 2), (2, 1), (2, 1))
        yield Case(source, (2, 6, 9, 7), (10, 3, 3, 2), geometry=(*geometry, 2, 200), layout="channels_last")
        yield Case(source, (1, 5, 6, 9), (4, 5, 2, 3), "int32", (4, 6), (*geometry, 1, 9), layout="sliced")
    else:
        geometry = ((2, 1), (1, 2), (1, 2))
        yield Case(source, (2, 3, 9, 7), (6, 1, 3, 3), geometry=(*geometry, 3, 200), layout="channels_last")
        yield Case(source, (1, 5, 8, 9), (5, 1, 2, 5), "int32", (4, 6), (*geometry, 5, 9), layout="sliced")


_CHECKS = {
    "Python": _python,
    "CUDA": _cuda,
    "CuPy": _cupy,
    "NVRTC": _nvrtc,
    "cache": _cache,
    "kernels": _sources,
    "C++": _compiler,
    "engines": _engines,
    "threads": _threads,
    "pictures": _pictures,
    "self-test": _self_test,
}
