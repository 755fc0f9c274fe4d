"""Find, compile, plan, launch and verify the ``.cu`` files. The only importer of CuPy."""

from .compile import KernelCompileError, compile_kernel, info
from .launch import device_target, launch, require_cupy
from .operators import KernelEngine
from .plan import Plan, Target
from .sources import copy_sources, read, reload, source, source_dir, source_path, use_source
from .sources import list_sources as list
from .verify import benchmark, verify

__all__ = [
    "KernelCompileError",
    "KernelEngine",
    "Plan",
    "Target",
    "benchmark",
    "compile_kernel",
    "copy_sources",
    "device_target",
    "info",
    "launch",
    "list",
    "read",
    "reload",
    "require_cupy",
    "source",
    "source_dir",
    "source_path",
    "use_source",
    "verify",
]
