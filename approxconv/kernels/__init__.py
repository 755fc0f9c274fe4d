"""Find, compile and launch the ``.cu`` files. The only importer of CuPy."""

from .launch import Plan, launch, require_cupy
from .sources import source_dir, source_path

__all__ = ["Plan", "launch", "require_cupy", "source_dir", "source_path"]
