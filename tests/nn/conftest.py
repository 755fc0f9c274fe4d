import pytest
import torch

from approxconv import Multiplier


def _hostile(bits=8, a_signed=False, w_signed=True, *, seed=0, largest=30_000):
    a_bits, w_bits = (bits, bits) if isinstance(bits, int) else bits
    generator = torch.Generator().manual_seed(1000 + seed)
    table = torch.randint(-largest, largest + 1, (2**a_bits, 2**w_bits), generator=generator)
    table[0, 0] = 64
    return Multiplier(table, a_signed=a_signed, w_signed=w_signed, name=f"hostile{seed}")


@pytest.fixture(scope="session")
def hostile():
    """Factory of multipliers with random tables: not commutative, not zero-preserving."""
    return _hostile


@pytest.fixture(scope="session")
def truncated():
    """Drops the four low bits of the product: bad, but a multiplier."""
    return Multiplier.from_function(lambda a, w: a * w // 16 * 16, a_signed=False, w_signed=True, name="truncated")
