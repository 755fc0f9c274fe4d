"""The truncated engine never errs by more than it says, and with all terms not at all."""

import itertools
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

from approxconv import Multiplier, get_multiplier, use_engine
from approxconv.engines import reference, truncated
from approxconv.truncation import truncate

RANKS = (0, 1, 4, 300)


def hostile(bits=(8, 8), flags=(False, True), largest=3000):
    table = np.random.default_rng(sum(bits)).integers(-largest, largest + 1, [2**n for n in bits])
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1])


@cache
def make(name):
    """Kept, as are their decompositions."""
    return MULTIPLIERS[name]()


MULTIPLIERS = {
    "mitchell": lambda: get_multiplier("mitchell_8u"),
    "drum": lambda: get_multiplier("drum4_8u_8s"),
    "hostile": hostile,
    "narrow": lambda: hostile((3, 7), (True, False)),
    "huge": lambda: hostile(largest=2**19),
}
every = pytest.mark.parametrize("name", MULTIPLIERS)
# name: (x's shape, w's shape)
GEMMS = {
    "rectangular": ((5, 19), (3, 19)),
    "one": ((1, 1), (1, 1)),
    "deep": ((3, 1501), (2, 1501)),
    "leading": ((2, 3, 4, 7), (5, 7)),
    "broadcast": ((2, 1, 4, 7), (3, 5, 7)),
}
# name: (x's shape, w's shape, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "not_square": ((2, 4, 9, 7), (3, 4, 3, 2), (2, 1), (1, 3), (1, 2), 1),
    "groups": ((2, 6, 6, 5), (4, 3, 3, 1), (1, 2), (1, 0), (2, 2), 2),
    "depthwise_twice": ((2, 3, 5, 8), (6, 1, 2, 3), (1, 2), (1, 1), (1, 1), 3),
    "mostly_padding": ((2, 2, 2, 1), (3, 2, 3, 4), (2, 3), (8, 7), (1, 1), 1),
    "pointwise": ((1, 7, 3, 2), (5, 7, 1, 1), (1, 1), (0, 0), (1, 1), 1),
}


def codes(*shape, seed=0):
    """Bytes, of narrow operands with bits that do not count."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + len(shape)))


def assert_within(y, exact, bounds):
    assert y.dtype == torch.int32
    assert y.shape == exact.shape
    assert ((y.long() - exact.long()).abs() <= bounds).all()


@every
@pytest.mark.parametrize("case", GEMMS)
@pytest.mark.parametrize("rank", RANKS)
def test_products(name, case, rank):
    m, (x, w) = make(name), (codes(*shape, seed=i) for i, shape in enumerate(GEMMS[case]))
    y, exact = truncated.with_rank(rank).lut_matmul(x, w, m.table), reference.lut_matmul(x, w, m.table)
    bounds = truncate(m.table, rank).error_bound(w.flatten(0, -2)).view(*w.shape[:-2], 1, -1)
    assert_within(y, exact, bounds)
    if rank == 300:
        assert torch.equal(y, exact)


@every
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("rank", RANKS)
def test_convolutions(name, case, rank):
    m = make(name)
    x_shape, w_shape, *geometry, groups = CONVOLUTIONS[case]
    x, w = codes(*x_shape), codes(*w_shape, seed=1)
    y = truncated.with_rank(rank).lut_conv2d(x, w, m.table, *geometry, groups, 3)
    exact = reference.lut_conv2d(x, w, m.table, *geometry, groups, 3)
    assert_within(y, exact, truncate(m.table, rank).error_bound(w).view(-1, 1, 1))
    if rank == 300:
        assert torch.equal(y, exact)
    if groups == x_shape[1]:
        assert torch.equal(truncated.with_rank(rank).lut_dwconv2d(x, w, m.table, *geometry, 3), y)


@every
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("depth", [1, 7, 600])
def test_the_worst_activations(name, rank, depth):
    """They come as close to the bound as it can be come, on either side."""
    m = make(name)
    truncation = truncate(m.table, rank)
    w = codes(3, depth)
    error = truncation.error()[:, w.long() % m.table.shape[1]]  # (a, N, K)
    for sign in (1, -1):
        x = (sign * error).argmax(0).to(torch.uint8)
        y = truncated.with_rank(rank).lut_matmul(x, w, m.table)
        exact = reference.lut_matmul(x, w, m.table)
        bounds = truncation.error_bound(w)
        assert_within(y, exact, bounds)
        reached = sign * (y.long() - exact.long()).diagonal()
        least = (sign * error).amax(0).sum(1)
        assert (reached >= least - (bounds - error.abs().amax(0).sum(1))).all()


@pytest.mark.parametrize(("a", "w"), [*itertools.product((0, 127, 128, 255), repeat=2)])
def test_extreme_operands(a, w):
    x, w = torch.full((3, 2000), a, dtype=torch.uint8), torch.full((2, 2000), w, dtype=torch.uint8)
    for name, rank in itertools.product(MULTIPLIERS, (0, 4)):
        table = make(name).table
        y = truncated.with_rank(rank).lut_matmul(x, w, table)
        assert_within(y, reference.lut_matmul(x, w, table), truncate(table, rank).error_bound(w))


def test_ends_of_int32():
    """Approximations beyond them come back to the end that they passed."""
    table = torch.full((4, 4), 2**31 - 1, dtype=torch.int32)
    table[1] = -(2**31) + 1
    table[2, 2] = 0
    x, w = torch.arange(4, dtype=torch.uint8).view(4, 1), torch.arange(4, dtype=torch.uint8).view(4, 1)
    for rank in (0, 1, 2):
        y = truncated.with_rank(rank).lut_matmul(x, w, table)
        assert_within(y, table, truncate(table, rank).error_bound(w))


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_any_size(monkeypatch, seed):
    """Tiles and blocks that cut through everything give what one piece gives."""
    m, x, w = make("hostile"), codes(3, 6, 9, 8), codes(4, 3, 3, 2)
    geometry = (2, 1), (2, 3), (1, 2), 2, 7
    engine = truncated.with_rank(300)
    expected = reference.lut_conv2d(x, w, m.table, *geometry)
    sizes = np.random.default_rng(seed)
    for name in ("_ROWS", "_COLUMNS", "_TILE"):
        monkeypatch.setattr(truncated, name, int(sizes.integers(1, 9)))
    monkeypatch.setattr(truncated, "_DEPTH", int(sizes.integers(1, 2000)))
    monkeypatch.setattr(truncated, "_PATCHES", int(sizes.integers(1, 4000)))
    assert torch.equal(engine.lut_conv2d(x, w, m.table, *geometry), expected)
    x, w = codes(2, 11, 13), codes(2, 5, 13)
    assert torch.equal(engine.lut_matmul(x, w, m.table), reference.lut_matmul(x, w, m.table))


def test_any_memory_format():
    m, engine = make("hostile"), truncated.with_rank(300)
    x, w = codes(2, 4, 8, 6), codes(4, 4, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1), 1, 0
    expected = engine.lut_conv2d(x, w, m.table, *geometry)
    last = torch.channels_last
    assert torch.equal(engine.lut_conv2d(*(t.to(memory_format=last) for t in (x, w)), m.table, *geometry), expected)
    x, w = codes(2, 6, 9).transpose(1, 2)[::, 1::2], codes(8, 6)[::2]
    assert torch.equal(engine.lut_matmul(x, w, m.table), reference.lut_matmul(x, w, m.table))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_and_autocast_do_not_matter(precision):
    m = make("mitchell")
    x, w = codes(50, 600), codes(40, 600)
    exact, bounds = reference.lut_matmul(x, w, m.table), truncate(m.table, 16).error_bound(w)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y = truncated.with_rank(16).lut_matmul(x, w, m.table)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_within(y, exact, bounds)
    assert_within(truncated.with_rank(16).lut_matmul(x, w, m.table), y, 8)


def test_by_name():
    m, x, w = make("hostile"), codes(2, 4, 6, 5), codes(4, 2, 3, 3)
    engine, ops = truncated.with_rank(4), torch.ops.approxconv
    assert engine.unavailable(torch.device("cpu")) is engine.unavailable(torch.device("meta")) is None
    expected = engine.lut_conv2d(x, w, m.table, (1, 1), (1, 1), (1, 1), 2, 3)
    geometry = [1], [1], [1]
    assert torch.equal(ops.lut_conv2d(x, w, m.table, *geometry, 2, 3, engine="truncated:4"), expected)
    assert not torch.equal(ops.lut_conv2d(x, w, m.table, *geometry, 2, 3, engine="truncated:5"), expected)
    with use_engine("truncated", rank=4):
        assert torch.equal(ops.lut_conv2d(x, w, m.table, *geometry, 2, 3), expected)
    assert repr(engine) == "TruncatedEngine(approximate, rank=4)"


@pytest.mark.parametrize("rank", [-1, "4", 1.5, True])
def test_wrong_ranks(rank):
    with pytest.raises(ValueError, match="rank must be an int of at least 0, got"):
        truncated.with_rank(rank)


SCRATCH = """
import torch, approxconv
from approxconv.engines import truncated
def memory(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024
table = approxconv.get_multiplier("mitchell_8u").table
x = torch.randint(0, 256, (4, 64, 112, 112), dtype=torch.uint8)
w = torch.randint(0, 256, (64, 64, 3, 3), dtype=torch.uint8)
wide = torch.randint(0, 256, (3000, 9000), dtype=torch.uint8)
engine, geometry = truncated.with_rank({rank}), ((1, 1), (1, 1), (1, 1), 1, 0)
engine.lut_conv2d(x[:1, :, :8, :8], w, table, *geometry)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far
before = memory("VmRSS")
engine.lut_conv2d(x, w[:{filters}], table, *geometry)
engine.lut_matmul(wide[:3], wide[: 10 * {filters}], table)
print(memory("VmHWM") - before - 4 * {filters} * 112 * 112 * 4 / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to tell the memory in use")
@pytest.mark.parametrize(("rank", "filters"), [(4, 64), (300, 2)])
def test_scratch(rank, filters):
    """In MiB, beyond the result; what is freed goes back to the system at once."""
    code = SCRATCH.format(rank=rank, filters=filters)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True, env=env
    )
    assert 4 < float(result.stdout) < 64
