"""Where the CUDA sources lie."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def source_dir() -> Path:
    """The folder of the CUDA sources: ``$APPROXCONV_CUDA_SRC``, else the packaged one, else the checkout's.

    Raises
    ------
    FileNotFoundError
        None of them exists.
    """
    chosen = os.environ.get("APPROXCONV_CUDA_SRC")
    candidates = [Path(chosen)] if chosen else [_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no CUDA sources: looked in {', '.join(map(str, candidates))}")


def source_path(name: str) -> Path:
    """The file of kernel source `name`, without suffix.

    Raises
    ------
    FileNotFoundError
        There is no such file; the message lists those there are.
    """
    folder = source_dir()
    path = folder / f"{name}.cu"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.cu"))) or "none"
        raise FileNotFoundError(f"no kernel source {path.name} in {folder}; there are: {there}")
    return path
