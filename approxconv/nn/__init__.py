"""Approximate layers and the conversion of stock models."""

from .attention import (
    ApproxAttention,
    ApproxMultiheadAttention,
    Attention,
    approximate_attention,
    attention_modules,
    restore_attention,
)
from .composite import ApproxComposite
from .conv import ApproxConv1d, ApproxConv2d, ApproxConv3d
from .conv_transpose import ApproxConvTranspose1d, ApproxConvTranspose2d, ApproxConvTranspose3d
from .convert import approx_layers, approximate, calibrate, set_mode, set_multiplier, to_float
from .layer import ApproxLayer
from .linear import ApproxLinear
from .matmul import ApproxMatmul, Matmul
from .recurrent import ApproxGRU, ApproxGRUCell, ApproxLSTM, ApproxLSTMCell
from .summary import LayerSummary, ModelSummary, model_summary

__all__ = [
    "ApproxAttention",
    "ApproxComposite",
    "ApproxConv1d",
    "ApproxConv2d",
    "ApproxConv3d",
    "ApproxConvTranspose1d",
    "ApproxConvTranspose2d",
    "ApproxConvTranspose3d",
    "ApproxGRU",
    "ApproxGRUCell",
    "ApproxLSTM",
    "ApproxLSTMCell",
    "ApproxLayer",
    "ApproxLinear",
    "ApproxMatmul",
    "ApproxMultiheadAttention",
    "Attention",
    "LayerSummary",
    "Matmul",
    "ModelSummary",
    "approx_layers",
    "approximate",
    "approximate_attention",
    "attention_modules",
    "calibrate",
    "model_summary",
    "restore_attention",
    "set_mode",
    "set_multiplier",
    "to_float",
]
