"""Truncations against NumPy's decomposition and brute force."""

import itertools

import numpy as np
import pytest
import torch

from approxconv import Multiplier, get_multiplier
from approxconv.truncation import Truncation, truncate

FLAGS = list(itertools.product((False, True), repeat=2))


def hostile(bits=(8, 8), flags=(False, True), largest=3000, seed=0):
    table = np.random.default_rng(seed).integers(-largest, largest + 1, [2**n for n in bits])
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1])


MULTIPLIERS = {
    "mitchell": lambda: get_multiplier("mitchell_8u"),
    "drum": lambda: get_multiplier("drum4_8u_8s"),
    "hostile": hostile,
    "hostile_wide": lambda: hostile((3, 7), (True, False)),
    "hostile_tall": lambda: hostile((8, 4), (True, True)),
    "exact": lambda: get_multiplier("exact_8u"),
}
every = pytest.mark.parametrize("name", MULTIPLIERS)


def brute_force(m, truncation):
    """Approximation from the public fields alone."""
    a, w = m.operand_values()
    table = np.multiply.outer(a, w).astype(float)
    for f, g in zip(truncation.f.numpy(), truncation.g.numpy(), strict=True):
        table += np.multiply.outer(f, g)
    return table


@every
@pytest.mark.parametrize("rank", [0, 1, 4, 15, 1000])
def test_best_of_its_rank(name, rank):
    m = MULTIPLIERS[name]()
    truncation = truncate(m, rank)
    singular = np.linalg.svd(m.error().numpy(), compute_uv=False)
    squares = (truncation.error().numpy() ** 2).sum()
    assert truncation.rank <= min(rank, len(singular))
    assert np.isclose(squares, (singular[rank:] ** 2).sum(), rtol=1e-9, atol=1e-9 * max(1, singular[0]))
    assert truncation.f.dtype == truncation.g.dtype == truncation.error().dtype == torch.float64


@every
@pytest.mark.parametrize("rank", [0, 1, 4, 1000])
def test_table_error_and_bound_equal_brute_force(name, rank):
    m = MULTIPLIERS[name]()
    truncation = truncate(m, rank)
    table = brute_force(m, truncation)
    error = table - m.table.numpy()
    assert np.allclose(truncation.table().numpy(), table, rtol=0, atol=1e-8)
    assert np.allclose(truncation.error().numpy(), error, rtol=0, atol=1e-8)
    assert np.isclose(truncation.bound, np.abs(error).max(), rtol=0, atol=1e-8)


@every
@pytest.mark.parametrize("rank", [0, 3, 1000])
def test_error_bound_equals_its_formula(name, rank):
    m = MULTIPLIERS[name]()
    truncation = truncate(m, rank)
    f, g = (side.numpy() for side in truncation.parts)
    codes = np.random.default_rng(1).integers(0, m.table.shape[1], (3, 2, 2, 5))
    depth, count = 20, 21 * len(f) + 4
    unit = 2.0 ** (-24 if truncation.arithmetic(depth) == torch.float32 else -53)
    errors = np.abs(truncation.error().numpy()).max(0)[codes].reshape(3, -1).sum(1)
    sums = (np.abs(f).T @ np.abs(g)).max(0)[codes].reshape(3, -1).sum(1)
    expected = errors + count * unit / (1 - count * unit) * sums + 0.5
    w = torch.from_numpy(codes.astype(np.uint8))
    for form in (w, w.view(torch.int8), w.flatten(1), w | ~(m.table.shape[1] - 1) & 0xFF):
        got = truncation.error_bound(form)
        assert got.dtype == torch.float64
        assert np.allclose(got.numpy(), expected, rtol=2e-9)


def test_float32_where_its_roundings_are_the_smaller_evil():
    mitchell = get_multiplier("mitchell_8u")
    assert truncate(mitchell, 4).arithmetic(576) == torch.float32
    assert truncate(mitchell, 4).arithmetic(10**6) == torch.float64
    assert truncate(mitchell, 256).arithmetic(1) == torch.float64
    for rank, depth in itertools.product((0, 1, 4, 16, 64, 256), (1, 9, 576, 4608)):
        truncation = truncate(mitchell, rank)
        bound = float(truncation.error_bound(torch.full((1, depth), 255, dtype=torch.uint8)))
        rounding = bound - 0.5 - depth * float(truncation.error().abs().amax(0)[255])
        assert rounding <= max(depth * truncation.bound, 0.1)


def test_full_rank_is_exact_to_a_rounding():
    for make in MULTIPLIERS.values():
        truncation = truncate(make(), 256)
        assert truncation.bound < 1e-7
        assert (truncation.error_bound(torch.zeros(1, 4608, dtype=torch.uint8)) < 1).all()


@pytest.mark.parametrize("flags", FLAGS)
def test_bare_tables_in_the_reading_that_leaves_least(flags):
    m = Multiplier.exact(8, *flags)
    table = m.table + torch.arange(256, dtype=torch.int32) % 5
    truncation = truncate(table, 1)
    assert (truncation.a_signed, truncation.w_signed) == flags
    assert truncation.bound < 1e-7
    table = table + torch.randint(-99, 100, table.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for rank in (0, 1, 3, 40):
        errors = [(truncate(Multiplier(table, a_signed=a, w_signed=w), rank).error() ** 2).sum() for a, w in FLAGS]
        assert (truncate(table, rank).error() ** 2).sum() == min(errors)


def test_decomposed_once_per_version(monkeypatch):
    asked = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **kwargs: asked.append(0) or svd(*args, **kwargs))
    m = hostile()
    first = truncate(m, 3)
    assert truncate(m, 3) is first
    assert truncate(m, 5) is not first
    assert len(asked) == 1
    assert truncate(m.table, 3) is truncate(m.table, 3)
    assert len(asked) == 4  # the other readings
    m.table[0, 0] += 1
    second = truncate(m, 3)
    assert len(asked) == 5
    assert second is not first
    assert not torch.equal(second.error(), first.error())


def test_calls_itself_approximate():
    truncation = truncate(get_multiplier("mitchell_8u"), 4)
    assert isinstance(truncation, Truncation)
    assert str(truncation) == "approximate: table ≈ a·w + Σ f[a]·g[w] of 4 terms, off by up to 496.234 a product"
    assert "of 1 term, off" in str(truncate(get_multiplier("mitchell_8u"), 1))
    assert repr(truncation) == "Truncation(approximate, rank=4, bound=496.234)"
    assert "Approximate" in truncation._repr_html_()
    assert "496.234" in truncation._repr_html_()


@pytest.mark.parametrize("rank", [-1, 1.0, True, None, "4"])
def test_wrong_ranks(rank):
    with pytest.raises(ValueError, match="rank must be an int of at least 0, got"):
        truncate(get_multiplier("mitchell_8u"), rank)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 4)), "multiplier must be a Multiplier or an int32 table, got ndarray"),
        (torch.zeros(4, 4), "got torch.float32"),
        (torch.zeros(4, 5, dtype=torch.int32), "table must have shape"),
    ],
)
def test_wrong_tables(wrong, message):
    with pytest.raises(ValueError, match=message):
        truncate(wrong, 1)


def test_wrong_weights():
    with pytest.raises(ValueError, match="w must be"):
        truncate(get_multiplier("mitchell_8u"), 1).error_bound(torch.zeros(2, 3))
