"""A folder of things that are slow to build, kept between processes and safe with several of them at once."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: entries are still whole, because they are renamed into place, but may be built twice
    fcntl = None

_MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """The folder that compiled kernels are kept in, made if it is not there.

    ``$APPROXCONV_CACHE_DIR``, else ``$XDG_CACHE_HOME/approxconv``, else ``~/.cache/approxconv``; where that cannot be
    written, a temporary folder of this process.
    """
    try:
        folder = wanted_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return _temporary_dir(os.getpid())


def wanted_dir() -> Path:
    """The folder that `cache_dir` makes where that can be written."""
    if chosen := os.environ.get("APPROXCONV_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if (base := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(base):
        return Path(base) / "approxconv"
    return Path.home() / ".cache" / "approxconv"


@cache
def _temporary_dir(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="approxconv-"))

    def remove() -> None:
        if os.getpid() == process:  # not in a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The folder of files that `build` makes, built once for all threads and processes.

    Parameters
    ----------
    key : str
        Names the entry: a file name that says everything the files depend on, so with a hash in it.
    build : callable
        Fills the empty folder it is given. If it raises, nothing is kept. The files must not name that folder: it is
        renamed into place when all is written.

    Returns
    -------
    Path
        A whole entry: every file is as `build` left it; one that is not is built again.
    """
    entry = cache_dir() / key
    if not is_whole(entry):
        with _locked(entry.with_name(f"{key}.lock")):
            if not is_whole(entry):
                _build_into(entry, build)
    return entry


def find_entry(pattern: str) -> Path | None:
    """The youngest whole entry whose key matches the glob `pattern`, or None."""
    entries = [entry for entry in cache_dir().glob(pattern) if is_whole(entry)]
    return max(entries, key=lambda entry: entry.stat().st_mtime_ns, default=None)


def is_whole(entry: Path) -> bool:
    """Whether a folder holds all files that its manifest names, unchanged."""
    try:
        return json.loads((entry / _MANIFEST).read_text()) == _digests(entry)
    except (OSError, ValueError):
        return False


def _digests(entry: Path) -> dict[str, str]:
    files = sorted(path for path in entry.rglob("*") if path.is_file() and path != entry / _MANIFEST)
    return {path.relative_to(entry).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _build_into(entry: Path, build: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}.", dir=entry.parent) as scratch:
        fresh = Path(scratch) / "entry"
        fresh.mkdir()
        build(fresh)
        (fresh / _MANIFEST).write_text(json.dumps(_digests(fresh)))
        shutil.rmtree(entry, ignore_errors=True)
        try:
            fresh.rename(entry)
        except OSError:  # without a lock another process may have been first
            if not is_whole(entry):
                raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; also between threads, because each opens the file anew."""
    with path.open("a") as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)  # a fork made meanwhile keeps the file open
