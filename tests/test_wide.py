import itertools
import json
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional

from approxconv import load_function
from approxconv import wide as module
from approxconv.certificate import largest_partial_sums
from approxconv.factorize import factorize
from approxconv.fast_model import FastModel
from approxconv.multiplier import operand_values
from approxconv.operators import FastApproxConv2dOp, FastApproxGeMMOp
from approxconv.wide import WideMultiplier, factorize_wide
from approxconv.zoo import get_multiplier, get_wide_multiplier

FLAGS = list(itertools.product((False, True), repeat=2))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def few_pairs(request, monkeypatch):
    """Quick tests compare fewer pairs."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(module, "_RANDOM_PAIRS", 10**5)
        monkeypatch.setattr(module, "_EXHAUSTIVE_BITS", 20)
        monkeypatch.setattr(module, "_lines", lambda values: module._chosen(values, {0, 2**15}))


def wide(fn, bits=16, flags=(False, False)):
    return WideMultiplier(fn, bits=bits, a_signed=flags[0], w_signed=flags[1])


def low_rank(bits, flags, rank, scale, seed=0, size=50):
    """Random, without symmetry, with products other than 0 where an operand is 0."""
    rng = np.random.default_rng(seed)
    f, g = (rng.integers(-size, size + 1, (rank, 2**n)) for n in bits)

    def fn(a, w):
        return scale * a * w + sum(f[r, a & f.shape[1] - 1] * g[r, w & g.shape[1] - 1] for r in range(rank)) + 7 * a - 3

    return wide(fn, bits, flags)


def drawn(m, size, side, rng):
    """Operands with the ends among them."""
    low, high = (m.a_range, m.w_range)[side]
    values = rng.integers(low, high + 1, size)
    values.flat[: min(values.size, 3)] = [low, high, 0][: values.size]
    return torch.from_numpy(values)


def assert_exact(factors, m, count=10**5):
    """The contract on random pairs, in integers, from the public fields alone."""
    rng = np.random.default_rng(9)
    a, w = (drawn(m, count, side, rng) for side in (0, 1))
    total = factors.scale * a * w
    for f, g in zip(factors.f.long(), factors.g.long(), strict=True):
        assert f.any()
        assert g.any()
        total += f[a & len(f) - 1] * g[w & len(g) - 1]
    assert torch.equal(total, torch.from_numpy(m(a.numpy(), w.numpy())))
    assert (factors.scale in (0, 1), factors.rank <= 64, factors.f.shape, factors.g.shape) == (
        True,
        True,
        (factors.rank, 2**m.a_bits),
        (factors.rank, 2**m.w_bits),
    )
    assert (factors.a_signed, factors.w_signed) == (m.a_signed, m.w_signed)


def found(m):
    factors = factorize_wide(m)
    assert factors is not None
    assert_exact(factors, m)
    return factors


def matmul_oracle(m, x, w):
    """Every product by the function, summed up in int64."""
    products = m(x.numpy()[..., None, :], w.numpy())
    return torch.from_numpy(products.sum(-1))


def conv_oracle(m, x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    patches = functional.unfold(x.double(), w.shape[2:], dilation, padding, stride)  # (B, C·kh·kw, L)
    batch, _, length = patches.shape
    patches = patches.long().reshape(batch, groups, -1, length).transpose(2, 3)
    kernels = w.reshape(groups, len(w) // groups, -1)
    sums = [matmul_oracle(m, patches[:, i], kernels[i]) for i in range(groups)]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, w.shape[2:], stride, strict=True)
    ]
    return torch.cat(sums, 2).transpose(1, 2).reshape(batch, len(w), *size)


# The multiplier


def test_values_and_formats():
    m = WideMultiplier(
        lambda a, w: a * w - 1, bits=(9, 16), a_signed=True, w_signed=False, name="less_one", info={"power": 3}
    )
    assert (m.a_bits, m.w_bits, m.a_range, m.w_range) == (9, 16, (-256, 255), (0, 65535))
    assert (m.name, m.info) == ("less_one", {"power": 3})
    assert repr(m) == "WideMultiplier('less_one', a=int9, w=uint16)"
    y = m([[-256], [255]], [0, 1, 65535])
    assert y.dtype == np.int64
    assert y.tolist() == [[-1, -257, -256 * 65535 - 1], [-1, 254, 255 * 65535 - 1]]
    assert m(np.zeros((0, 3), int), np.zeros(3, int)).shape == (0, 3)


def test_long_vectors_are_cut():
    lengths = []
    m = wide(lambda a, w: lengths.append(a.shape) or a * w)
    a = np.arange(50_000)
    assert np.array_equal(m(a.reshape(100, 500), 3), 3 * a.reshape(100, 500))
    assert sum(n for (n,) in lengths) == a.size
    assert max(lengths) <= (2**14,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fn": 3}, "fn must be callable"),
        ({"bits": 17}, "bits must be an int from 2 to 16"),
        ({"bits": (16, 1)}, "bits must be an int from 2 to 16"),
        ({"a_signed": 1}, "a_signed must be True or False"),
        ({"w_signed": None}, "w_signed must be True or False"),
        ({"info": {"x": object()}}, "info must hold"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WideMultiplier(**{"fn": np.multiply, "bits": 12, "a_signed": False, "w_signed": False} | arguments)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda a, w: 3, "shape"),
        (lambda a, w: (a * w)[:-1], "shape"),
        (lambda a, w: a * w / 2, "integers, got float64"),
        (lambda a, w: a * w > 0, "integers, got bool"),
        (lambda a, w: a * 0 + 2**52, r"below 2\*\*52"),
        (lambda a, w: a * 0 - 2**52, r"below 2\*\*52"),
        (lambda a, w: np.full(a.shape, 2**63, np.uint64), r"below 2\*\*52"),
    ],
)
def test_functions_that_return_something_else(fn, message):
    with pytest.raises(ValueError, match=message):
        wide(fn)([1, 2], [3, 4])
    with pytest.raises(ValueError, match=message):
        factorize_wide(wide(fn))


@pytest.mark.parametrize(("a", "w"), [(-1, 0), (65536, 0), (0, 2048), (0, -2049), (0.5, 0)])
def test_operands_out_of_range(a, w):
    with pytest.raises(ValueError, match="must hold"):
        wide(np.multiply, (16, 12), (False, True))(a, w)


# Zoo


@pytest.mark.parametrize("name", ["trunc2_8s", "bam_h2_v6_8u", "loa5_8u_8s", "bbm_v6_8s", "momeni1_c9_8u", "etm3_7s"])
def test_zoo_functions_are_the_tables(name):
    m, table = get_wide_multiplier(name), get_multiplier(name)
    a, w = table.operand_values()
    assert np.array_equal(m(a[:, None], w), table.table.numpy())
    assert m.name == name


def test_zoo_beyond_tables():
    assert get_wide_multiplier("trunc3_12s")(-15, 100) == -8 * 96
    assert get_wide_multiplier("drum6_16u")(1000, 3) == 0b111111 * 2**4 * 3
    assert get_wide_multiplier("kulkarni_16u")(0xFFFF, 0xFFFF) == 0xFFFF**2 - 2 * 0x5555**2
    assert get_wide_multiplier("bam_h1_v0_16u")(0xFFFF, 0xFFFF) == 0xFFFF * 0xFFFE
    assert get_wide_multiplier("mitchell_16u")(3 << 14, 3 << 14) == 2**31
    a = np.random.default_rng(0).integers(-(2**11), 2**11, 10_000)
    mean = (get_wide_multiplier("bbm_v3_12s")(a, a[::-1]) - a * a[::-1]).mean()
    assert abs(mean + 3.5) < 0.1  # as published


@pytest.mark.parametrize(
    "name", ["momeni1_c9_12u", "random_s0_m1_9u", "kulkarni_12u", "bbm_v3_11s", "trunc3_17u", "bbm_v3_16u", "nothing"]
)
def test_zoo_refuses(name):
    with pytest.raises(ValueError, match="no multiplier"):
        get_wide_multiplier(name)


def test_tables_stay_at_eight_bits():
    with pytest.raises(ValueError, match="bits must be an int from 2 to 8"):
        get_multiplier("drum6_16u")


# Factorisation


@pytest.mark.parametrize(
    ("name", "scale", "rank"),
    [
        ("exact_16s", 1, 0),
        ("trunc3_16u", 0, 1),
        ("trunc5_12s_12u", 0, 1),
        ("drum6_12s", 0, 1),
        ("drum6_16u_16s", 0, 1),
        ("kulkarni_16s", 1, 1),
        ("roba_12u_12s", 1, 1),
        ("bam_h2_v8_12s", 0, 7),
        ("bam_h0_v6_16u", 1, 6),
        ("bbm_v6_16s", 1, 10),
    ],
)
def test_zoo_ranks(name, scale, rank):
    factors = found(get_wide_multiplier(name))
    assert (factors.scale, factors.rank) == (scale, rank)


@pytest.mark.parametrize(
    ("bits", "flags", "scale"),
    [
        ((16, 8), (False, True), 1),
        ((8, 16), (True, False), 0),
        ((9, 16), (True, True), 1),
        ((12, 3), (False, False), 0),
        ((2, 13), (True, True), 1),
        ((16, 16), (True, False), 1),
        ((16, 16), (False, False), 0),
    ],
)
def test_hidden_factors(bits, flags, scale):
    factors = found(low_rank(bits, flags, 2, scale))
    assert factors.rank <= 4


def test_zero():
    factors = found(wide(lambda a, w: 0 * a, (12, 8)))
    assert (factors.scale, factors.rank) == (0, 0)
    assert str(factors) == "fn(a, w) = 0, verified on all 1,048,576 pairs"


def test_smallest_dtypes():
    m = wide(lambda a, w: (a - 128) * (w & 1) + 100_000 * (a & 1) * (w >> 1), (8, 12), (False, True))
    factors = found(m)
    for side in (factors.f, factors.g):
        held = torch.iinfo(side.dtype)
        narrower = {torch.int64: 2**31, torch.int32: 2**15, torch.int16: 2**7, torch.int8: 0}[side.dtype]
        assert held.bits == 8 or int(side.max()) >= narrower or int(side.min()) < -narrower


def test_integers_beyond_float64():
    """Terms of nearly 2**52, far from cancelling."""
    rng = np.random.default_rng(0)
    f, g = rng.integers(-(2**24), 2**24, (2, 3, 2**10))
    factors = found(wide(lambda a, w: (f[:, a] * g[:, w]).sum(0), 10))
    assert factors.rank == 3


@pytest.mark.parametrize("rank", [64, 65])
def test_limit(rank):
    m = wide(lambda a, w: a * w + 7 * (a == w) * (w < 2 * rank) * (w & 1), (12, 8))
    factors = factorize_wide(m)
    assert (factors and factors.rank) == (64 if rank == 64 else None)


@pytest.mark.parametrize("name", ["mitchell_12u", "mitchell_16s", "loa9_12u", "alm_soa6_16u"])
def test_high_ranks_are_none_after_few_products(name):
    m, seen = get_wide_multiplier(name), []
    fn = m._fn
    m._fn = lambda a, w: seen.append(a.size) or fn(a, w)
    assert factorize_wide(m) is None
    assert sum(seen) <= 2**17
    with pytest.raises(ValueError, match=f"{name}.* no factorisation of at most 64 terms to make a model of$"):
        m.fast_model()


def test_a_prime_that_divides_the_error():
    prime = 2**31 - 1
    assert found(wide(lambda a, w: a * w + prime * (a & 5) * (w & 3), (12, 8))).rank == 1


def test_crosses_without_integer_factors():
    """Whichever of these joins the grid first, the other two are not multiples of it."""
    pairs = {(1234, 77): 1, (1234, 200): 1_000_003, (2001, 200): 1}

    def fn(a, w):
        return a * w + sum(value * ((a == i) & (w == j)) for (i, j), value in pairs.items())

    assert found(wide(fn, (12, 8))).rank == 2


def test_rare_rows_are_found_together(monkeypatch):
    rows = np.random.default_rng(1).permutation(2**12)[:30]
    error = np.zeros((2**12, 2**8), int)
    error[rows] = np.random.default_rng(2).integers(-9, 10, (30, 2**8))
    m, rounds, search = wide(lambda a, w: a * w + error[a, w], (12, 8)), [], module._verify
    monkeypatch.setattr(module, "_verify", lambda *arguments: rounds.append(0) or search(*arguments))
    assert found(m).rank == 30
    assert len(rounds) <= 3


def test_a_wrong_row():
    """Of structured operands by whole rows, of others by random pairs, of which 100 are in a row here."""
    for row in (2**15, 12345):
        factors = found(wide(lambda a, w, row=row: a * w + (a == row) * (w >> 3)))
        assert factors.rank == 1
        assert factors.f.count_nonzero() == 1


def test_words():
    assert found(wide(np.multiply, (10, 10))).verified == "all 1,048,576 pairs"
    said = found(wide(np.multiply, 16)).verified
    assert "100,000 random pairs and " in said
    assert said.endswith(" structured ones of 4,294,967,296")


@pytest.mark.slow
def test_one_wrong_pair():
    """Found at 12 bits, where all are compared; missed at 16, and said to be of a sample."""

    def fn(a, w):
        return a * w + 5 * ((a == 1234) & (w == 777))

    factors = found(wide(fn, 12))
    assert (factors.rank, factors.verified) == (1, "all 16,777,216 pairs")
    factors = factorize_wide(wide(fn, 16))
    assert factors.rank == 0
    assert factors.verified.startswith("10,000,000 random pairs")
    # A pair of structured operands is met.
    assert found(wide(lambda a, w: a * w + 5 * ((a == 2**14 - 1) & (w == 2**9 + 1)), 16)).rank == 1


@pytest.mark.slow
def test_every_pair_at_twelve_bits():
    m = get_wide_multiplier("bam_h2_v8_12s")
    factors = factorize_wide(m)
    a, w = (torch.from_numpy(operand_values(12, True)) for _ in range(2))
    total = factors.scale * a[:, None] * w + factors.f.long().T @ factors.g.long()
    assert np.array_equal(total.numpy(), m(a.numpy()[:, None], w.numpy()))


def test_many_terms_at_sixteen_bits():
    assert found(low_rank((16, 16), (True, False), 20, 1)).rank <= 22


def test_through_factorize():
    m = get_wide_multiplier("drum6_12u")
    assert factorize(m) is factorize_wide(m) is factorize(m)
    with pytest.raises(ValueError, match="multiplier must be a WideMultiplier"):
        factorize_wide(get_multiplier("drum6_8u"))


def test_text():
    factors = factorize_wide(get_wide_multiplier("roba_9u"))
    assert str(factors) == "fn(a, w) = a·w + Σ f[a]·g[w] of 1 term, verified on all 262,144 pairs"
    assert repr(factors) == "WideFactorization(scale=1, rank=1, verified='all 262,144 pairs')"


@pytest.mark.parametrize("name", ["bbm_v2_16s", "trunc2_9u_9s", "exact_12s"])
def test_in_a_notebook(name):
    factors = factorize_wide(get_wide_multiplier(name))
    html = factors._repr_html_()
    assert "data:image/png;base64," in html
    assert len(html) < 60_000
    for text in (f"fn(a, w) = {'a·w' if factors.scale else 'Σ f[a]'}", "verified on</th><td", factors.verified):
        assert text in html
    panels = factors.plot().axes[:2]
    for ax, (low, high) in zip(
        panels, (get_wide_multiplier(name).a_range, get_wide_multiplier(name).w_range), strict=True
    ):
        (picture,) = ax.images
        assert picture.get_array().shape == (max(factors.rank, 1), min(high - low + 1, 2048))
        assert list(picture.get_extent()[:2]) == [low - 0.5, high + 0.5]


@pytest.mark.parametrize("name", ["bam_h2_v8_12s", "trunc3_16u", "exact_12s_12u"])
def test_parts_multiply_to_the_products(name):
    m = get_wide_multiplier(name)
    factors = found(m)
    f, g = factors.parts
    assert f.dtype == g.dtype == torch.int64
    assert len(f) == len(g) == factors.scale + factors.rank
    rng = np.random.default_rng(11)
    a, w = (drawn(m, 1000, side, rng) for side in (0, 1))
    products = (f[:, a & f.shape[1] - 1] * g[:, w & g.shape[1] - 1]).sum(0)
    assert torch.equal(products, torch.from_numpy(m(a.numpy(), w.numpy())))


def test_bounds_of_wide_operands():
    """Of a table the largest sum, of more codes the sum of the largest factors."""
    factors = factorize_wide(low_rank((10, 9), (True, False), 3, 1))
    f, g = (side.abs() for side in factors.parts)
    bounds = largest_partial_sums(factors)
    assert torch.equal(bounds, f.amax(1).double() @ g.double())
    assert ((f.T @ g).amax(0) <= bounds).all()


@pytest.mark.parametrize(("fn", "bits"), [(np.multiply, 9), (lambda a, w: a * w - (a & 7) * (w & 7), (9, 4))])
def test_float32_only_of_what_bfloat16_holds(fn, bits):
    """Sums are small, but reduced precisions of float32 products would round codes of 9 bits."""
    m = wide(fn, bits)
    seen = []
    m.fast_model()(lambda x, w: seen.append(x.dtype) or functional.linear(x, w), torch.ones(1, 1), torch.ones(1, 1), {})
    assert seen == [torch.float64]
    kept = wide(lambda a, w: (a >> 1) * w, bits)  # 8 bits are left
    seen.clear()
    x, w = torch.full((1, 1), 511.0), torch.full((1, 1), 15.0)
    y = kept.fast_model()(lambda x, w: seen.append(x.dtype) or functional.linear(x, w), x, w, {})
    assert y.item() == 255 * 15
    assert seen == [torch.float32 if bits == (9, 4) else torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_operands_saturate_in_float32(dtype):
    """Neither holds 65535."""
    m = get_wide_multiplier("exact_16u")
    x, w = torch.tensor([[60000.0, float("inf")]], dtype=dtype), torch.tensor([[1, 65535]])
    assert m.matmul(x, w).item() == int(x[0, 0]) + 65535**2


def test_a_wrong_form_is_never_returned(monkeypatch):
    reduce = module.reduce_together
    monkeypatch.setattr(module, "reduce_together", lambda f, g: (reduce(f, g)[0] + 1, reduce(f, g)[1]))
    assert factorize_wide(get_wide_multiplier("roba_9u")) is None


# C models


def circuit(bits, cut, signed):
    """An array multiplier as EvoApproxLib prints one, without the partial products of weight below ``2**cut``."""
    sign = "s" if signed else "u"
    lines = [f"uint64_t mul{bits}{sign}_T(uint64_t A, uint64_t B)", "{", "  uint64_t O = 0;"]
    count = itertools.count()

    def node(expression):
        name = f"n{next(count)}"
        lines.append(f"  uint64_t {name} = {expression};")
        return name

    a, b = ([node(f"({x} >> {i}) & 1") for i in range(bits)] for x in "AB")
    columns = [[] for _ in range(2 * bits + 1)]
    for i, j in itertools.product(range(bits), repeat=2):
        if i + j >= cut:
            inverted = signed and (i == bits - 1) != (j == bits - 1)  # Baugh-Wooley
            columns[i + j].append(node(f"({a[i]} & {b[j]}) ^ {int(inverted)}"))
    if signed:
        columns[bits].append(node("1"))
        columns[2 * bits - 1].append(node("1"))
    for c, column in enumerate(columns[:-1]):
        while len(column) > 1:
            x, y, *rest = column
            z = rest.pop(0) if rest else node("0")
            t = node(f"{x} ^ {y}")
            column[:] = [*rest, node(f"{t} ^ {z}")]
            columns[c + 1].append(node(f"({x} & {y}) | ({t} & {z})"))
        lines += [f"  O |= {bit} << {c};" for bit in column]
    return "#include <stdint.h>\n" + "\n".join([*lines, "  return O;", "}"])


def c_multiplier(folder, bits, cut, signed, comment=""):
    path = folder / f"mul{bits}{'s' if signed else 'u'}_T.c"
    path.write_text(f"// MAE = 3\n{comment}{circuit(bits, cut, signed)}")
    return WideMultiplier.from_c_function(load_function(path))


def broken(a, w, cut):
    """The partial products of weight below ``2**cut``."""
    return sum((a >> i & 1) * (w & (1 << max(cut - i, 0)) - 1) << i for i in range(cut))


@pytest.mark.parametrize(("bits", "signed"), [(10, False), (12, True)])
def test_c_models(tmp_path, bits, signed):
    m = c_multiplier(tmp_path, bits, 4, signed)
    rng = np.random.default_rng(0)
    a, w = (drawn(m, 1000, side, rng).numpy() for side in (0, 1))
    assert np.array_equal(m(a, w), a * w - broken(a, w, 4))
    assert (m.a_bits, m.w_bits, m.a_signed, m.w_signed) == (bits, bits, signed, signed)
    assert m.info == {"MAE": "3"}
    assert m.name.startswith("mul")
    factors = found(m)
    assert (factors.scale, factors.rank) == (1, 4)


def count_searches(monkeypatch):
    asked, search = [], module._search
    monkeypatch.setattr(module, "_search", lambda m: asked.append(m) or search(m))
    return asked


def test_c_models_are_kept_on_disk(tmp_path, own_cache, monkeypatch):
    searches = count_searches(monkeypatch)
    first = found(c_multiplier(tmp_path, 9, 3, False))
    again = found(c_multiplier(tmp_path, 9, 3, False, comment="// the same\n"))
    assert len(searches) == 1
    assert torch.equal(first.f, again.f)
    assert torch.equal(first.g, again.g)
    assert (first.scale, first.verified) == (again.scale, again.verified)
    found(c_multiplier(tmp_path, 9, 4, False))
    assert len(searches) == 2
    function = load_function(tmp_path / "mul9u_T.c", swap=True)
    found(WideMultiplier.from_c_function(function))
    assert len(searches) == 3


def test_none_is_kept_too(tmp_path, monkeypatch):
    searches = count_searches(monkeypatch)
    path = tmp_path / "mul12u_X.c"
    path.write_text("uint32_t mul12u_X(uint16_t a, uint16_t b) { return a * b + (a ^ b) * (a | b); }")
    for _ in range(2):
        m = WideMultiplier.from_c_function(load_function(path))
        assert factorize_wide(m) is factorize_wide(m) is None
    assert len(searches) == 1


WRONG = {
    "other values": lambda f, g: {"scale": 1, "f": f + 1, "g": g, "verified": ""},
    "other shape": lambda f, g: {"scale": 1, "f": f[:, :4], "g": g, "verified": ""},
    "other type": lambda f, g: {"scale": 1, "f": f.astype(float), "g": g, "verified": ""},
    "missing": lambda f, g: {"scale": 1, "f": f},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whole_entries_of_something_else_are_made_anew(tmp_path, own_cache, monkeypatch, wrong):
    from approxconv.kernels import cache

    searches = count_searches(monkeypatch)
    first = found(c_multiplier(tmp_path, 9, 3, False))
    (entry,) = (path for path in own_cache.iterdir() if path.is_dir())
    np.savez(entry / "factors.npz", **WRONG[wrong](first.f.numpy(), first.g.numpy()))
    (entry / "manifest.json").write_text(json.dumps(cache._digests(entry)))
    for _ in range(2):
        assert torch.equal(found(c_multiplier(tmp_path, 9, 3, False)).f, first.f)
    assert len(searches) == 2


# Sums


MULTIPLIERS = {
    "bam_h2_v8_12s": lambda: get_wide_multiplier("bam_h2_v8_12s"),
    "drum6_16u_16s": lambda: get_wide_multiplier("drum6_16u_16s"),
    "offsets 16x8": lambda: low_rank((16, 8), (False, True), 3, 1),
    "offsets 9x16": lambda: low_rank((9, 16), (True, True), 2, 0),
}


@pytest.fixture(params=MULTIPLIERS)
def m(request):
    return MULTIPLIERS[request.param]()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 33), (1,), (4, 0), (0, 3)])
def test_matmul(m, shape):
    rng = np.random.default_rng(1)
    x, w = drawn(m, shape, 0, rng), drawn(m, (6, shape[-1]), 1, rng)
    y = m.matmul(x, w)
    assert y.dtype == torch.int64
    assert torch.equal(y, matmul_oracle(m, x, w))


CONVOLUTIONS = [
    {},
    {"padding": (2, 1)},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    {"groups": 3, "padding": (1, 1)},
    {"groups": 6, "stride": (1, 3), "padding": (4, 0)},
]


@pytest.mark.parametrize("conf", CONVOLUTIONS)
def test_conv2d(m, conf):
    rng = np.random.default_rng(2)
    groups = conf.get("groups", 1)
    x, w = drawn(m, (3, 6, 7, 9), 0, rng), drawn(m, (12, 6 // groups, 3, 2), 1, rng)
    expected = conv_oracle(m, x, w, **conf)
    assert torch.equal(m.conv2d(x, w, **conf), expected)
    assert torch.equal(m.conv2d(x.to(memory_format=torch.channels_last), w, **conf), expected)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(m.conv2d(transposed.int(), w.int(), **conf), expected)


def test_padding_with_a_product_other_than_0():
    m = wide(lambda a, w: a * w + (w & 7) * (a == 0), (12, 12))
    y = m.conv2d(torch.zeros(1, 1, 1, 1).long(), torch.full((1, 1, 3, 3), 5), padding=1)
    assert y.tolist() == [[[[45]]]]


def test_numbers_as_pairs(m):
    rng = np.random.default_rng(3)
    x, w = drawn(m, (1, 2, 8, 8), 0, rng), drawn(m, (1, 2, 2, 2), 1, rng)
    expected = conv_oracle(m, x, w, (2, 2), (1, 1), (3, 3))
    assert torch.equal(m.conv2d(x, w, stride=2, padding=1, dilation=3), expected)


def test_saturation_and_dtypes():
    m = get_wide_multiplier("trunc2_12s_12u")
    x, w = torch.tensor([[5000, -5000, 7]], dtype=torch.int16), torch.tensor([[5000, -9, 3000]])
    expected = matmul_oracle(m, torch.tensor([[2047, -2048, 7]]), torch.tensor([[4095, 0, 3000]]))
    assert torch.equal(m.matmul(x, w), expected)
    assert torch.equal(m.matmul(x.double() - 0.25, w.float() + 0.25), expected)
    assert torch.equal(m.matmul(torch.tensor([[float("inf"), -float("inf"), 7.0]]), w), expected)


def test_parts_of_a_batch(m, monkeypatch):
    """Scratch for three samples holds that many; for less than one of them, one of its terms."""
    rng = np.random.default_rng(4)
    x, w = drawn(m, (5, 4, 6, 6), 0, rng), drawn(m, (3, 4, 3, 3), 1, rng)
    model, expected, seen = m.fast_model(), conv_oracle(m, x, w, padding=(1, 1)), []

    def op(x, w, **kwargs):
        seen.append(x)
        return functional.conv2d(x, w, **kwargs)

    def samples(scratch):
        seen.clear()
        monkeypatch.setattr(FastModel, "scratch", scratch)
        assert torch.equal(model.sums(op, x, w, {"padding": 1}), expected)
        return [len(each) for each in seen]

    assert samples(10**9) == [5]
    # Features and a copy of them, or patches of 3x3.
    sample = seen[0][0].nbytes * (2 if seen[0].dtype == torch.float32 else 10)
    terms = seen[0].shape[1] // 4
    assert samples(3 * sample) == [3, 2]
    assert samples(sample) == [1] * 5
    assert samples(1) == [1] * 5 * terms


@pytest.mark.parametrize("name", [name for name in MULTIPLIERS if name != "offsets 9x16"])
def test_digits(monkeypatch, name):
    """As with sums beyond 2**53, at a lower limit."""
    m = MULTIPLIERS[name]()
    rng = np.random.default_rng(5)
    x, w = drawn(m, (2, 6, 5, 4), 0, rng), drawn(m, (4, 3, 2, 2), 1, rng)
    largest = []

    def op(*operands, **kwargs):
        largest.append(functional.conv2d(*(operand.abs() for operand in operands), **kwargs).max())
        return functional.conv2d(*operands, **kwargs)

    model, conf = m.fast_model(), {"padding": 1, "groups": 2}
    expected = conv_oracle(m, x, w, padding=(1, 1), groups=2)
    assert torch.equal(model.sums(op, x, w, conf), expected)
    assert len(largest) == 1
    limit = int(largest.pop()) // 2
    monkeypatch.setattr(FastModel, "exact_below", limit)
    assert torch.equal(model.sums(op, x, w, conf), expected)
    assert max(largest) < limit
    assert len(largest) > 1


@pytest.mark.parametrize(("limit", "digits"), [(2**53, 1), (2**34, 1), (2**30, 2), (2**24, 3), (2**18, 16)])
def test_number_of_digits(monkeypatch, limit, digits):
    m = get_wide_multiplier("exact_16u")
    x, w = torch.full((2, 3), 65535), torch.full((2, 3), 65535)
    calls = []
    monkeypatch.setattr(FastModel, "exact_below", limit)
    model = m.fast_model()
    y = model.sums(lambda *operands: calls.append(operands) or functional.linear(*operands), x, w, {})
    assert torch.equal(y, torch.full((2, 2), 3 * 65535**2))
    assert len(calls) == digits


def test_sums_beyond_float64():
    """Products of 2**51 each, so that four of them are out of float64's reach."""
    m = wide(lambda a, w: (a * w << 19) + a, 16)
    x, w = torch.full((2, 9), 65535), torch.full((3, 9), 65535)
    w[1] = 65533
    y = m.matmul(x, w)
    assert torch.equal(y, matmul_oracle(m, x, w))
    assert int(y.max()) > 2**54
    x, w = torch.full((1, 2**13), 65535), torch.full((1, 2**13), 65535)
    with pytest.raises(ValueError, match=r"sums must be below 2\*\*63"):
        m.matmul(x, w)


def test_sums_that_no_digits_make_exact(monkeypatch):
    monkeypatch.setattr(FastModel, "exact_below", 2**16)
    m = get_wide_multiplier("trunc1_16u")
    with pytest.raises(ValueError, match="float64 holds no sums of 4 products"):
        m.matmul(torch.full((1, 4), 65535), torch.full((1, 4), 65535))


# As a functional model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_operators(m, dtype):
    rng = np.random.default_rng(6)
    model = m.fast_model()
    x, w = drawn(m, (2, 4, 6, 5), 0, rng), drawn(m, (6, 2, 3, 3), 1, rng)
    conf = {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 1), "groups": 2}
    y = FastApproxConv2dOp.apply(x.to(dtype), w.to(dtype), model, conf)
    assert torch.equal(y, conv_oracle(m, x, w, **conf).to(dtype))
    x, w = drawn(m, (3, 2, 40), 0, rng), drawn(m, (5, 40), 1, rng)
    y = FastApproxGeMMOp.apply(x.to(dtype), w.to(dtype), model)
    assert torch.equal(y, matmul_oracle(m, x, w).to(dtype))


def test_gradients():
    m = get_wide_multiplier("bam_h2_v8_12s")
    x = torch.full((2, 3), 1000.0, requires_grad=True)
    w = torch.full((4, 3), -7.0, requires_grad=True)
    FastApproxGeMMOp.apply(x, w, m.fast_model()).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), -28.0))
    assert torch.equal(w.grad, torch.full((4, 3), 2000.0))


def test_a_model_of_narrow_factors():
    """It takes those of a table too."""
    table = get_multiplier("bam_h2_v6_8u_8s")
    model = FastModel(factorize(table))
    rng = np.random.default_rng(7)
    x, w = torch.from_numpy(rng.integers(0, 256, (5, 30))), torch.from_numpy(rng.integers(-128, 128, (4, 30)))
    expected = table.table.long()[x[:, None], w[None] & 255].sum(-1)
    assert torch.equal(model.sums(functional.linear, x, w, {}), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_models_refuse_dtypes(dtype):
    model = get_wide_multiplier("trunc2_9u").fast_model()
    with pytest.raises(ValueError, match="x must be a float32 or float64 tensor"):
        model(functional.linear, torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3), {})


@pytest.mark.parametrize(
    ("x", "w", "groups"),
    [
        ((2, 3), (4, 4), 1),
        ((), (4, 4), 1),
        ((2, 4, 3), (4, 3, 1), 1),
        ((1, 3, 5, 5), (4, 2, 3, 3), 1),
        ((1, 4, 5, 5), (3, 2, 3, 3), 2),
        ((4, 5, 5), (3, 4, 3, 3), 1),
    ],
)
def test_shapes_that_do_not_fit(x, w, groups):
    m = get_wide_multiplier("trunc2_9u")
    kwargs = {"groups": groups} if len(w) > 2 else {}
    with pytest.raises(
        ValueError, match=r"x must be \(\.\.\., K\) and w \(N, K\)|x must be \(B, C, H, W\)|groups must"
    ):
        m.fast_model().sums(functional.conv2d, torch.zeros(x), torch.zeros(w), kwargs)


def test_kernels_larger_than_the_input():
    m = get_wide_multiplier("trunc2_9u")
    with pytest.raises(ValueError, match=r"kernel \(3, 3\) with dilation \(2, 1\) is larger than the input \(4, 3\)"):
        m.conv2d(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, 3), padding=(1, 0), dilation=(2, 1))


@pytest.mark.parametrize(("name", "value"), [("stride", 0), ("padding", -1), ("padding", (1, 2, 3)), ("dilation", 0)])
def test_convolutions_that_there_are_not(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an int or a pair"):
        get_wide_multiplier("trunc2_9u").conv2d(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 2, 2), **{name: value})


def test_threads():
    m, results = get_wide_multiplier("bam_h2_v6_9u"), []
    threads = [threading.Thread(target=lambda: results.append(factorize_wide(m))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(result) for result in results}) == 1


def test_inside_inference_mode_and_a_tracer():
    from torch._subclasses.fake_tensor import FakeTensorMode

    m = get_wide_multiplier("roba_9u")
    with torch.inference_mode():
        model = m.fast_model()
        model.sums(functional.linear, torch.ones(1, 1), torch.ones(1, 1), {})
    assert not factorize_wide(m).f.is_inference()
    with FakeTensorMode():
        factorize_wide(other := get_wide_multiplier("roba_10u"))
    found(other)


@pytest.mark.gpu
@pytest.mark.parametrize("conf", CONVOLUTIONS[:4])
def test_gpu(m, conf):
    rng = np.random.default_rng(8)
    groups = conf.get("groups", 1)
    x, w = drawn(m, (3, 6, 17, 19), 0, rng), drawn(m, (12, 6 // groups, 3, 3), 1, rng)
    assert torch.equal(m.conv2d(x.cuda(), w.cuda(), **conf).cpu(), m.conv2d(x, w, **conf))
    x, w = drawn(m, (70, 300), 0, rng), drawn(m, (60, 300), 1, rng)
    assert torch.equal(m.matmul(x.cuda(), w.cuda()).cpu(), m.matmul(x, w))
