"""What a PyTorch network does on approximate multipliers, bit-exactly and fast, and retraining to live with it."""

from . import nn, operators
from ._version import __version__
from .diagnosis import doctor
from .engines import EngineError, use_engine
from .explanation import Explanation, explain
from .factorize import Factorization, factorize
from .formats import CFunction, FormatError, load_function, load_multiplier, save_multiplier
from .gradients import GradientTables, gradient_tables
from .multiplier import Multiplier
from .nn import approximate, calibrate, model_summary, set_mode, set_multiplier, to_float
from .pictures import compare
from .quantization import OperandQuantization, Quantization
from .wide import WideMultiplier
from .zoo import get_multiplier, get_wide_multiplier, list_multipliers

__all__ = [
    "CFunction",
    "EngineError",
    "Explanation",
    "Factorization",
    "FormatError",
    "GradientTables",
    "Multiplier",
    "OperandQuantization",
    "Quantization",
    "WideMultiplier",
    "__version__",
    "approximate",
    "calibrate",
    "compare",
    "doctor",
    "explain",
    "factorize",
    "get_multiplier",
    "get_wide_multiplier",
    "gradient_tables",
    "list_multipliers",
    "load_function",
    "load_multiplier",
    "model_summary",
    "nn",
    "operators",
    "save_multiplier",
    "set_mode",
    "set_multiplier",
    "to_float",
    "use_engine",
]


def load_ipython_extension(shell: object) -> None:
    """``%load_ext approxconv``: the magics ``%%kernel``, ``%kernel`` and ``%%multiplier``."""
    from .notebook import load

    load(shell)
