"""The ``.cu`` files and the plans that a GPU runs, run on the CPU. Needs g++, and nothing of CUDA."""

from .build import compiler
from .run import KernelTrapError, run_on_host
from .watched import SanitizerError

__all__ = ["KernelTrapError", "SanitizerError", "compiler", "run_on_host"]
