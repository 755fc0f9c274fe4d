"""Approximate layers and the conversion of stock models."""

from .conv import ApproxConv1d, ApproxConv2d, ApproxConv3d
from .conv_transpose import ApproxConvTranspose1d, ApproxConvTranspose2d, ApproxConvTranspose3d
from .convert import approx_layers, approximate, calibrate, set_mode
from .layer import ApproxLayer
from .linear import ApproxLinear

__all__ = [
    "ApproxConv1d",
    "ApproxConv2d",
    "ApproxConv3d",
    "ApproxConvTranspose1d",
    "ApproxConvTranspose2d",
    "ApproxConvTranspose3d",
    "ApproxLayer",
    "ApproxLinear",
    "approx_layers",
    "approximate",
    "calibrate",
    "set_mode",
]
