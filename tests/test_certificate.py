"""The certificate against brute force: the worst order of the worst terms, and the floats themselves."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from approxconv import Multiplier, factorize, get_multiplier
from approxconv.certificate import Certificate, largest_partial_sums

NAMES = ("int8", "fp16", "bf16", "fp32", "fp64")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))


def parts(m):
    """The formula from the public fields alone."""
    factors = factorize(m)
    a, w = m.operand_values()
    f, g = factors.f.numpy().astype(int), factors.g.numpy().astype(int)
    return (np.vstack([a, f]), np.vstack([w, g])) if factors.scale else (f, g)


MULTIPLIERS = {
    "exact": lambda _: get_multiplier("exact_8u"),
    "drum": lambda _: get_multiplier("drum4_8s"),
    "kulkarni": lambda _: get_multiplier("kulkarni_8u"),
    "offset": lambda low_rank: low_rank(3),
    "narrow": lambda low_rank: low_rank(2, (3, 5), (True, False)),
    "no product": lambda low_rank: low_rank(4, (8, 4), (True, True), scale=0),
    "zero": lambda _: Multiplier(np.zeros((8, 16), int), a_signed=False, w_signed=True),
}
every = pytest.mark.parametrize("name", MULTIPLIERS)


@every
def test_parts_multiply_to_the_table(name, low_rank):
    m = MULTIPLIERS[name](low_rank)
    f, g = factorize(m).parts
    assert f.dtype == g.dtype == torch.int64
    assert torch.equal(f.T @ g, m.table.long())
    assert all(np.array_equal(ours, side.numpy()) for ours, side in zip(parts(m), (f, g), strict=True))


@every
def test_bounds_are_what_the_formula_says(name, low_rank):
    m = MULTIPLIERS[name](low_rank)
    f, g = parts(m)
    by_code = np.abs(f[:, :, None] * g[:, None, :]).sum(0).max(0)
    assert np.array_equal(largest_partial_sums(factorize(m)).numpy(), by_code)
    w = torch.randint(0, 256, (5, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = by_code[w.numpy().astype(int) % m.table.shape[1]].reshape(5, -1).sum(1)
    for codes in (w, w.view(torch.int8), w.flatten(1), w.flatten(1).T.contiguous().T):
        certificate = factorize(m).certificate(codes)
        assert isinstance(certificate, Certificate)
        assert certificate.bounds.dtype == torch.int64
        assert certificate.bounds.tolist() == expected.tolist()
        assert certificate.bound == expected.max()
        assert tuple(certificate.arithmetics) == NAMES


@every
def test_no_partial_sum_of_any_order_is_larger(name, low_rank):
    """The worst activation for every subset: only the positive terms, only the negative ones, and random orders."""
    m = MULTIPLIERS[name](low_rank)
    f, g = parts(m)
    rng = np.random.default_rng(2)
    w = rng.integers(0, m.table.shape[1], (3, 20))
    bounds = factorize(m).certificate(torch.from_numpy(w.astype(np.uint8))).bounds.numpy()
    terms = f[:, :, None] * g[:, None, :]  # (P, a, w)
    for sign in (1, -1):
        subset = np.maximum(sign * terms, 0).sum(0).max(0)
        assert (subset[w].sum(1) <= bounds).all()
    for _ in range(20):
        x = rng.integers(0, m.table.shape[0], 20)
        mixed = rng.permuted(terms[:, x[None], w].transpose(1, 0, 2).reshape(3, -1), axis=1)
        if mixed.size:
            assert (np.abs(mixed.cumsum(1)).max(1) <= bounds).all()


def depth_of(bound, m, code):
    return -(-bound // int(largest_partial_sums(factorize(m))[code]))


@pytest.mark.parametrize("name", ["exact", "drum", "offset"])
def test_exact_up_to_the_last_weight(name, low_rank):
    """One more, and the bound is no longer below 2²⁴ (in fp64 2⁵³ takes more weights than there is memory for)."""
    m = MULTIPLIERS[name](low_rank)
    code = int(largest_partial_sums(factorize(m)).argmax())
    depth = depth_of(2**24, m, code)
    for k, exact in ((depth - 1, True), (depth, False)):
        certificate = factorize(m).certificate(torch.full((1, k), code, dtype=torch.uint8))
        assert (certificate.bound < 2**24) == exact
        assert [certificate.exact(each) for each in NAMES] == [True, exact, exact, exact, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_exact_where_the_certificate_says_so(dtype, low_rank):
    """Accumulated term by term in fp32, in both orders, at a bound just below 2²⁴."""
    m = MULTIPLIERS["offset"](low_rank)
    f, g = (torch.from_numpy(side) for side in parts(m))
    code = int(largest_partial_sums(factorize(m)).argmax())
    worst = int((f.abs().T @ g.abs())[:, code].argmax())
    k = depth_of(2**24, m, code) - 1
    f, g = f[:, worst].repeat(k), g[:, code].repeat(k)
    assert torch.equal(f.to(dtype).long(), f)
    assert torch.equal(g.to(dtype).long(), g)
    terms = f.to(dtype).float() * g.to(dtype).float()
    for order in (terms, terms.flip(0), terms.sort().values, terms.sort(descending=True).values):
        assert np.cumsum(order.numpy(), dtype=np.float32)[-1] == int((f * g).sum())


def test_int8_is_refused_where_the_ops_refuse():
    m = Multiplier(np.full((4, 4), 2**20), a_signed=False, w_signed=False)
    for depth, exact in ((2047, True), (2048, False)):
        certificate = factorize(m).certificate(torch.zeros(2, depth, dtype=torch.uint8))
        assert certificate.exact("int8") == exact
        assert f"{depth:,}·1,048,576 {'<' if exact else '≥'} 2³¹" in certificate.arithmetics["int8"].reason
    x = torch.zeros(1, 2048, dtype=torch.uint8)
    with pytest.raises(ValueError, match="may not fit the int32 sum"):
        torch.ops.approxconv.lut_matmul(x, x, m.table)


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=2)))
def test_says_what_the_bytes_need(flags, low_rank):
    def reason(m):
        return factorize(m).certificate(torch.zeros(1, 2, dtype=torch.uint8)).arithmetics["int8"].reason

    wide = reason(Multiplier.exact(8, *flags))
    if all(flags):
        assert "all operands fit int8" in wide
    elif not any(flags):
        assert "both sides need u8×s8 products of weights less 128" in wide
    else:
        assert f"unsigned 8-bit {'weights' if flags[0] else 'activations'} need u8×s8 products" in wide
    assert "all operands fit int8" in reason(Multiplier.exact(7, *flags))
    assert "all operands fit int8" in reason(low_rank(1, flags=flags, scale=0))


def test_empty_weights():
    factors = factorize(get_multiplier("drum4_8s"))
    none, shallow = (factors.certificate(torch.zeros(shape, dtype=torch.int8)) for shape in ((0, 7), (3, 0)))
    assert (none.bounds.tolist(), none.bound) == ([], 0)
    assert (shallow.bounds.tolist(), shallow.bound) == ([0, 0, 0], 0)
    assert all(none.exact(name) and shallow.exact(name) for name in NAMES)


def test_report():
    certificate = factorize(get_multiplier("drum4_8s")).certificate(torch.full((2, 1200), -128, dtype=torch.int8))
    text, html = str(certificate), certificate._repr_html_()
    assert f"2 channels: at most {certificate.bound:,}" in text
    assert len(text.splitlines()) == 6
    for title in ("int8 → int32", "fp16 → fp32", "bf16 → fp32", "fp32", "fp64"):
        assert title in text
        assert title in html
    assert f"operands up to 128 ≤ 2⁸, every partial sum up to {certificate.bound:,} ≥ 2²⁴" in text
    assert f"every partial sum up to {certificate.bound:,} &lt; 2⁵³" in html
    assert repr(certificate) == f"Certificate(bound={certificate.bound}, exact=['int8', 'fp64'])"


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(2, 3), "w must be a tensor of uint8 or int8 codes, got torch.float32"),
        (np.zeros((2, 3), np.uint8), "w must be a tensor of uint8 or int8 codes, got ndarray"),
        (torch.zeros(3, dtype=torch.uint8), r"w must be \(N, K\) or .*, got shape \(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int8), r"got shape \(1, 2, 3\)"),
    ],
)
def test_refused(w, message):
    with pytest.raises(ValueError, match=message):
        factorize(get_multiplier("exact_8u")).certificate(w)


def test_unknown_arithmetic():
    certificate = factorize(get_multiplier("exact_8u")).certificate(torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"name must be one of 'int8', .*, got 'tf32'"):
        certificate.exact("tf32")


def test_is_pickled_whole():
    certificate = factorize(get_multiplier("drum4_8s")).certificate(torch.full((2, 9), -128, dtype=torch.int8))
    copy = pickle.loads(pickle.dumps(certificate))
    assert str(copy) == str(certificate)
    assert torch.equal(copy.bounds, certificate.bounds)
