"""Find, compile, plan, launch and verify the ``.cu`` files. The only importer of CuPy."""

from .compile import KernelCompileError, compile_kernel, info
from .factored import FactoredKernelEngine
from .launch import device_target, launch, require_cupy
from .operators import KernelEngine
from .plan import Plan, Target
from .replace import KernelRejectedError, Replacement, diff, replace, replaced, undo
from .sources import copy_sources, read, reload, source, source_dir, source_path, use_source
from .sources import list_sources as list
from .verify import benchmark, verify

__all__ = [
    "FactoredKernelEngine",
    "KernelCompileError",
    "KernelEngine",
    "KernelRejectedError",
    "Plan",
    "Replacement",
    "Target",
    "benchmark",
    "compile_kernel",
    "copy_sources",
    "device_target",
    "diff",
    "info",
    "launch",
    "list",
    "read",
    "reload",
    "replace",
    "replaced",
    "require_cupy",
    "source",
    "source_dir",
    "source_path",
    "undo",
    "use_source",
    "verify",
]
