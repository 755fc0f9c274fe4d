from functools import cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from approxconv import Multiplier


@cache
def _hostile(bits=8, a_signed=False, w_signed=True, *, largest=30_000):
    a_bits, w_bits = (bits, bits) if isinstance(bits, int) else bits
    generator = torch.Generator().manual_seed(largest + 10 * a_bits + w_bits)
    table = torch.randint(-largest, largest + 1, (2**a_bits, 2**w_bits), generator=generator)
    table[0, 0] = 64
    return Multiplier(table, a_signed=a_signed, w_signed=w_signed, name="hostile")


def _numbers(*tensors):
    return (t.numpy().astype(np.int64) for t in tensors)


def _look_up(table, a, w):
    """Products of values or codes: an index is the low bits, in two's complement."""
    return table[a % table.shape[0], w % table.shape[1]]


def _look_up_matmul(x, w, table):
    x, w, table = _numbers(x, w, table)
    return torch.from_numpy(_look_up(table, x[..., :, None, :], w[..., None, :, :]).sum(-1))


def _look_up_conv2d(x, w, table, stride, padding, dilation, groups, pad_code):
    x, w, table = _numbers(x, w, table)
    filters, depth, *kernel = w.shape
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=pad_code)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))  # (B, C, rows, columns, *spans)
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    y = np.empty((len(x), filters, *windows.shape[2:4]), dtype=np.int64)
    for o in range(filters):
        first = o // (filters // groups) * depth
        y[:, o] = _look_up(table, windows[:, first : first + depth], w[o, :, None, None]).sum((1, 4, 5))
    return torch.from_numpy(y)


@pytest.fixture(autouse=True)
def one_thread():
    """For operands this small threads only wait for each other; tests/engines has those that need several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hostile():
    """Factory of multipliers with random tables: not commutative, not zero-preserving."""
    return _hostile


@pytest.fixture(scope="session")
def look_up_matmul():
    """The oracle: gather and add in int64. Operands are values or codes: only their low bits count."""
    return _look_up_matmul


@pytest.fixture(scope="session")
def look_up_conv2d():
    """The oracle: unfold, gather and add in int64."""
    return _look_up_conv2d


@pytest.fixture
def compiled():
    """torch.compile without breaks, from a clean start."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.fixture(scope="session")
def quantise():
    """``quantise(operand, (low, high))``: the values a multiplier sees, int64."""
    return lambda operand, limits: operand.detach().double().round().clamp(*limits).long()


@pytest.fixture(scope="session")
def rounded():
    """``rounded(sums, dtype)``: each int64 to the nearest number of `dtype`, ties to even; exact below 2⁵³."""

    def to_nearest(sums, dtype):
        digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
        mantissa, exponent = np.frexp(sums.numpy().astype(np.float64))
        nearest = np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)
        return torch.from_numpy(nearest).to(dtype)  # exact: nothing is left to round

    return to_nearest


@pytest.fixture(scope="session")
def near_ties():
    """Factory of multipliers, every entry halfway between two numbers of `dtype`, or one off it."""

    def make(dtype):
        digits, largest_shift = {torch.float16: (11, 4), torch.bfloat16: (8, 22), torch.float32: (24, 6)}[dtype]
        generator = torch.Generator().manual_seed(digits)

        def draw(low, high):
            return torch.randint(low, high, (256, 256), generator=generator)

        shift = draw(1, largest_shift + 1)
        halfway = (draw(2 ** (digits - 1), 2**digits) << shift) + (1 << (shift - 1))
        table = (halfway + draw(-1, 2)) * (2 * draw(0, 2) - 1)
        return Multiplier(table, a_signed=False, w_signed=True, name=f"near ties of {dtype}")

    return make


class _Operations(TorchDispatchMode):
    """Counts what a backward pass computes: ``convolutions`` holds the masks of wanted gradients."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.products = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.convolutions.append(tuple(args[-1]))
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operations():
    return _Operations
