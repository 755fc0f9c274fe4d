import ctypes
import mmap
import sys

import pytest
import torch


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fenced():
    """A function of a tensor: its copy with the same strides, between two pages nobody may touch, against one of them.

    A read or write beyond its ends is a segmentation fault then.
    """
    if sys.platform == "win32":
        pytest.skip("needs mprotect")

    def copy(tensor, at_end):
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = -(-span // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (start, start + mmap.PAGESIZE + size):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        offset = mmap.PAGESIZE + (size - span if at_end else 0)
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=span, offset=offset)
        return flat.copy_(tensor.as_strided((span,), (1,))).as_strided(tensor.shape, tensor.stride())

    return copy
