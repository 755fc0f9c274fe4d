"""Approximate layers and the conversion of stock models."""

from .conv import ApproxConv2d
from .convert import approx_layers, approximate, calibrate, set_mode
from .layer import ApproxLayer
from .linear import ApproxLinear

__all__ = ["ApproxConv2d", "ApproxLayer", "ApproxLinear", "approx_layers", "approximate", "calibrate", "set_mode"]
