"""What a PyTorch network does on approximate multipliers, bit-exactly and fast, and retraining to live with it."""

from . import nn, operators
from ._version import __version__
from .engines import EngineError, use_engine
from .formats import FormatError, load_multiplier
from .multiplier import Multiplier
from .nn import approximate, calibrate, set_mode
from .zoo import get_multiplier, list_multipliers

__all__ = [
    "EngineError",
    "FormatError",
    "Multiplier",
    "__version__",
    "approximate",
    "calibrate",
    "get_multiplier",
    "list_multipliers",
    "load_multiplier",
    "nn",
    "operators",
    "set_mode",
    "use_engine",
]
