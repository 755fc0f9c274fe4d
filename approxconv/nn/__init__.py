"""Approximate layers and the conversion of stock models."""

from .conv import ApproxConv2d
from .convert import approx_layers, approximate, calibrate, set_mode, set_multiplier, to_float
from .layer import ApproxLayer
from .linear import ApproxLinear
from .summary import LayerSummary, ModelSummary, model_summary

__all__ = [
    "ApproxConv2d",
    "ApproxLayer",
    "ApproxLinear",
    "LayerSummary",
    "ModelSummary",
    "approx_layers",
    "approximate",
    "calibrate",
    "model_summary",
    "set_mode",
    "set_multiplier",
    "to_float",
]
