"""The ``torch.ops.approxconv`` operators and the autograd Functions that call them."""

from . import schemas as schemas
from .approxgemm import ApproxGeMMOp, FastApproxGeMMOp
from .conv2d import ApproxConv2dOp, ApproxDWConv2dOp, Conv2dArgs, FastApproxConv2dOp

__all__ = [
    "ApproxConv2dOp",
    "ApproxDWConv2dOp",
    "ApproxGeMMOp",
    "Conv2dArgs",
    "FastApproxConv2dOp",
    "FastApproxGeMMOp",
]
