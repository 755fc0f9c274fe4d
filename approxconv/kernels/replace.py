"""Swapping a kernel from a running session: tried in a process of its own first, and swapped in only if right."""

from __future__ import annotations

import atexit
import difflib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .._display import Shown, titled
from .compile import KernelCompileError
from .sources import hidden_source_path, list_sources, set_overlay, source, source_dir
from .verify import BenchmarkReport, VerificationReport, base_engine

_NAME = re.compile(r"[A-Za-z_]\w{0,60}", re.ASCII)
_LONGEST_OUTPUT = 2000

_lock = threading.Lock()
_session: _Session | None = None


class KernelRejectedError(RuntimeError):
    """A kernel that was not swapped in: it computes something wrong, crashed or did not end. The old one stays.

    Attributes
    ----------
    report : VerificationReport or None
        What it got wrong, if it ran.
    """

    def __init__(self, message: str, report: VerificationReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Replacement(Shown):
    """A kernel that was swapped in.

    Attributes
    ----------
    name : str
        The kernel source.
    verification : VerificationReport
        All its cases were right.
    benchmark : BenchmarkReport
        Its times, beside those of the kernel it replaced, if there was one.
    """

    name: str
    verification: VerificationReport
    benchmark: BenchmarkReport

    def __str__(self) -> str:
        return f"{self.name} replaced\n{self.verification}\n{self.benchmark}"

    def _repr_html_(self) -> str:
        return titled(f"{self.name} replaced", self.verification._repr_html_(), self.benchmark._repr_html_())


def replace(name: str, text: str, *, engine: str | None = None, seed: int = 0, timeout: float = 120.0) -> Replacement:
    """Swap a kernel source for another text in this process, if that is right.

    The text is compiled, verified against the oracle and timed in a process of its own, so that no mistake in it takes
    this one down; only then do launches use it. Files are not touched. Until `undo`, it hides a file of its name in the
    folder that `use_source` chose.

    Parameters
    ----------
    name : str
        One of `list`, or a new name for a kernel of your own.
    text : str
        The whole ``.cu`` file. It may include the headers in use.
    engine : str, optional
        ``"cuda"`` or ``"host_cuda"``; by default the GPU if there is one.
    seed : int
        Of the cases that it is verified on.
    timeout : float
        Seconds that it may take in all.

    Returns
    -------
    Replacement
        What was found.

    Raises
    ------
    KernelCompileError
        The text does not compile; the message shows the line.
    KernelRejectedError
        A result is wrong, or it crashed or took too long; the kernel in use stays as it was.
    ValueError
        `name` is no identifier, or the text has kernels of no operator, or not those of the operator `name`.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"name must be an identifier such as lut_gemm, got {name!r:.80}")
    if not isinstance(text, str):
        raise ValueError(f"text must be the source as a str, got {type(text).__name__}")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be a finite number of seconds above 0, got {timeout!r}")
    engine = base_engine(engine)[0]
    with _lock:
        session = _get_session()
        report = session.try_out(name, text, engine, seed, timeout)
        session.put(name, text)
    return report


def undo(name: str) -> str:
    """Take back the last `replace` of a kernel; return what its source is now, "" if there is none any more.

    Raises
    ------
    ValueError
        It was not replaced.
    """
    with _lock:
        if _session is None or not _session.history.get(name):
            raise ValueError(f"{name!r} was not replaced; replaced: {', '.join(replaced()) or 'none'}")
        _get_session().take_back(name)
    return source(name) if name in list_sources() else ""


def replaced() -> list[str]:
    """Names of the kernels that `replace` swapped in and `undo` did not take back."""
    return sorted(name for name, texts in _session.history.items() if texts) if _session is not None else []


def diff(name: str) -> str:
    """What `replace` changed in a kernel, as a unified diff against the file that it hides; "" if nothing.

    Raises
    ------
    FileNotFoundError
        There is no such kernel.
    """
    now, hidden = source(name), hidden_source_path(name)
    before = "" if hidden is None else hidden.read_text(encoding="utf-8", errors="replace")
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), now.splitlines(keepends=True), f"{name}.cu", f"{name}.cu in use"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def prepare() -> None:
    """Start the process that tries the next `replace`, so that it need not be waited for."""
    with _lock:
        _get_session().prepare()


def _get_session() -> _Session:
    global _session
    if _session is None or _session.process != os.getpid():
        _session = _Session(_session)
    elif not _session.folder.is_dir():  # a temporary folder, and somebody tidied up
        _session.restore()
    return _session


class _Session:
    """The replaced sources of this process, in folders of their own, and a process in wait to try the next."""

    def __init__(self, parent: _Session | None) -> None:
        self.process = os.getpid()
        self.history: dict[str, list[str]] = {}
        self._folders = Path(tempfile.mkdtemp(prefix="approxconv-kernels-"))
        self._waiting: subprocess.Popen[bytes] | None = None
        atexit.register(self._close)
        self._use({} if parent is None else parent.history)  # with a parent, this process was forked

    def _close(self) -> None:
        if os.getpid() == self.process:  # not in a forked child
            if self._waiting is not None:
                with self._waiting:
                    _kill(self._waiting)
            shutil.rmtree(self._folders, ignore_errors=True)

    def put(self, name: str, text: str) -> None:
        self._use({**self.history, name: [*self.history.get(name, ()), text]})

    def take_back(self, name: str) -> None:
        self._use({**self.history, name: self.history[name][:-1]})

    def restore(self) -> None:
        """Write the folder anew."""
        self._folders.mkdir(parents=True, exist_ok=True)
        self._use(self.history)

    def _use(self, history: dict[str, list[str]]) -> None:
        """Let launches use the last text of each kernel, all at once; what is just being read stays where it was."""
        folder = Path(tempfile.mkdtemp(dir=self._folders))
        for name, texts in history.items():
            if texts:
                (folder / f"{name}.cu").write_text(texts[-1], encoding="utf-8")
        set_overlay(folder)
        self.folder, self.history = folder, history

    def prepare(self) -> None:
        if self._waiting is None or self._waiting.poll() is not None:
            path = [*map(str, sys.path)]  # this very library, wherever it came from
            code = f"import sys; sys.path[:] = {path!r}; from approxconv.kernels.trial import main; main()"
            self._waiting = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt of this process must not end it, and `_kill` ends all of it
            )  # fmt: skip

    def try_out(self, name: str, text: str, engine: str, seed: int, timeout: float) -> Replacement:
        with tempfile.TemporaryDirectory(prefix="approxconv-trial-") as folder:
            sources, result = Path(folder, "sources"), Path(folder, "result")
            shutil.copytree(self.folder, sources)
            (sources / f"{name}.cu").write_text(text, encoding="utf-8")
            folders = str(sources), str(self.folder), str(source_dir())
            environment = {**os.environ, "TMPDIR": folder}  # what it leaves when it is ended goes with the folder
            request = pickle.dumps((*folders, name, engine, seed, str(result), environment))
            self.prepare()
            process, self._waiting = self._waiting, None
            try:
                said = _ask(process, request, timeout)
            except subprocess.TimeoutExpired:
                raise KernelRejectedError(f"{name} did not end within {timeout:g} s; the kernel in use stays") from None
            finally:
                self.prepare()
            if process.returncode != 0 or not result.exists():
                raise KernelRejectedError(
                    f"{name} crashed with {_status(process.returncode)}; the kernel in use stays{said and f': {said}'}"
                )
            outcome = pickle.loads(result.read_bytes())  # written by this library's own process
        if isinstance(outcome, (KernelCompileError, ValueError)):
            raise outcome
        if isinstance(outcome, Exception):
            raise KernelRejectedError(
                f"{name} ended with {type(outcome).__name__}: {outcome}; the kernel in use stays"
            ) from outcome
        verification, benchmark = outcome
        if not verification:
            raise KernelRejectedError(f"{verification}\nthe kernel in use stays", verification)
        return Replacement(name, verification, benchmark)


def _ask(process: subprocess.Popen[bytes], request: bytes, timeout: float) -> str:
    """Hand over a request and wait for the process's end; returns the last it said, as a kernel may print for ever."""
    said = bytearray()

    def listen() -> None:
        while some := process.stdout.read1():
            said.extend(some)
            del said[:-_LONGEST_OUTPUT]

    listener = threading.Thread(target=listen, daemon=True)
    with process:
        listener.start()
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request)
            process.wait(timeout)
        finally:
            _kill(process)
            listener.join()
    return said.decode(errors="replace").strip()


def _status(code: int) -> str:
    """What a process ended with; below 0 it is a signal's number."""
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"status {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with the compiler that it may have started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
