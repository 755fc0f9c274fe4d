import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from approxconv.factorize import Factorization, factorize
from approxconv.multiplier import Multiplier
from approxconv.zoo import get_multiplier, list_multipliers

module = importlib.import_module("approxconv.factorize")  # `approxconv.factorize` is the function
pytestmark = pytest.mark.slow

BITS = [(2, 2), (2, 8), (8, 2), (3, 5), (7, 4), (8, 8)]
FLAGS = [(False, False), (True, True), (False, True), (True, False)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def searches(monkeypatch):
    """What the search was asked for."""
    asked = []
    search = module._search
    monkeypatch.setattr(module, "_search", lambda table, *values: asked.append(table) or search(table, *values))
    return asked


def values_of(side, signed):
    return [code - side if signed and code >= side // 2 else code for code in range(side)]


def product_of(sides, flags):
    a, w = (np.array(values_of(side, signed)) for side, signed in zip(sides, flags, strict=True))
    return a[:, None] * w[None, :]


def with_error(error, flags=(False, False), scale=1):
    """A multiplier whose table is ``scale·a·w + error``."""
    error = np.asarray(error)
    table = error + scale * product_of(error.shape, flags)
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1])


def assert_exact(factors, m):
    """The contract, in integers, from the public fields alone."""
    assert factors.scale in (0, 1)
    assert factors.f.dtype == factors.g.dtype == torch.int8
    assert factors.f.shape == (factors.rank, 2**m.a_bits)
    assert factors.g.shape == (factors.rank, 2**m.w_bits)
    assert factors.rank <= 64
    total = factors.scale * torch.from_numpy(product_of(m.table.shape, (m.a_signed, m.w_signed)))
    for f, g in zip(factors.f.long(), factors.g.long(), strict=True):
        assert f.any()
        assert g.any()
        total = total + f[:, None] * g[None, :]
    assert torch.equal(total, m.table.long())
    assert factors.reconstruct().dtype == torch.int64
    assert torch.equal(factors.reconstruct(), total)


def found(m):
    factors = factorize(m)
    assert factors is not None
    assert_exact(factors, m)
    return factors


def exact_or_none(m):
    factors = factorize(m)
    if factors is not None:
        assert_exact(factors, m)
    return factors


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("bits", BITS)
def test_exact_product_has_no_terms(bits, flags):
    factors = found(Multiplier.exact(bits, *flags))
    assert (factors.scale, factors.rank, factors.products) == (1, 0, 1)


def test_zero_has_no_terms():
    factors = found(Multiplier(np.zeros((4, 256), int), a_signed=False, w_signed=True))
    assert (factors.scale, factors.rank, factors.products) == (0, 0, 0)
    assert str(factors) == "table = 0"


# Scale, terms, products in a GEMM.
ZOO = {
    "drum4_7u": (0, 1, 1),
    "drum6_6s": (1, 0, 1),
    "drum4_8s": (1, 3, 4),  # −128 becomes −144, which int8 does not hold
    "drum4_8u": (0, 4, 1),  # 65,000 takes four products of int8; offsets make three of them sums
    "drum6_7u_7s": (0, 1, 1),
    "trunc2_8s": (0, 1, 1),
    "trunc1_7u": (0, 1, 1),
    "roba_8u": (1, 1, 2),
    "roba_8s": (1, 1, 2),
    "kulkarni_4u": (1, 1, 2),
    "kulkarni_8s": (1, 1, 2),
    "kulkarni_8u": (1, 2, 2),  # 2·85·85 is more than 85·127
}


@pytest.mark.parametrize("name", ZOO)
def test_known_forms(name):
    factors = found(get_multiplier(name))
    assert (factors.scale, factors.rank, factors.products) == ZOO[name]


@pytest.mark.parametrize("name", [f"bam_h{h}_v{v}_8{sign}" for h in (0, 3) for v in (2, 5, 8, 11) for sign in "us"])
def test_broken_array_has_at_most_seven_terms(name):
    assert found(get_multiplier(name)).rank <= 7


@pytest.mark.parametrize("name", ["mitchell_8u", "random_s0_m16_8s", "random_s1_m1_8u_8s"])
def test_high_ranks_are_none(name):
    assert factorize(get_multiplier(name)) is None


@pytest.mark.parametrize("name", list_multipliers("*_3u") + list_multipliers("*_4s") + list_multipliers("*_5u_5s"))
def test_narrow_zoo(name):
    found(get_multiplier(name))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*_8u", "*_8s", "*_8u_8s", "*_7u"])
def test_wide_zoo(pattern):
    for name in list_multipliers(pattern):
        m = get_multiplier(name)
        if exact_or_none(m) is None:
            assert min(np.linalg.matrix_rank(m.error().double()), np.linalg.matrix_rank(m.table.double())) > 32, name


def outer(f, g):
    return np.multiply.outer(np.asarray(f), np.asarray(g))


def one_to_four(first):
    """A vector for two bits of no common divisor, whose first entry is largest."""
    return [first, 1, 0, -1]


# With s = 0: the largest entries, and how many terms they take.
@pytest.mark.parametrize(
    ("first", "second", "terms"),
    [
        (127, 127, 1),
        (-128, -128, 1),
        (128, -127, 1),
        (128, -128, 2),  # −2^14 is 128·−128, but 128 is not of int8
        (128, 127, 1),  # the second, turned round, is −127
        (128, 128, 2),
        (129, 127, 2),
        (255, 127, 3),
        (254, 127, 2),
        (255, 1, 2),
        (127 * 128, 1, 2),
        (-(2**15), 1, 4),
        (2**15, 1, 3),
        (2**16, 1, 5),
        (2**20, 1, None),
        (2**31 - 1, 1, None),
        (-(2**31), 1, None),
    ],
)
def test_digits(first, second, terms):
    error = outer(one_to_four(first), [1, 0, 0, second] if abs(second) == 1 else one_to_four(second))
    m = with_error(np.clip(error, -(2**31), 2**31 - 1), scale=0)
    factors = exact_or_none(m)
    if terms is None:
        assert factors is None or factors.rank <= 64
    else:
        assert factors is not None
        assert factors.rank <= terms + (factors.scale == 1)


@pytest.mark.parametrize("value", [1, -1, 127, 128, -128, 129, 255, 2**14, 2**14 + 1, 2**15, -(2**15), 2**20, -(2**20)])
@pytest.mark.parametrize("flags", FLAGS)
def test_constant_tables(value, flags):
    factors = exact_or_none(with_error(np.full((256, 16), value), flags, scale=0))
    fewest = -(-abs(value) // (128 * 128 if value > 0 else 128 * 127))
    if fewest > 64:
        assert factors is None
    else:
        assert (factors.scale, factors.rank, factors.products) == (0, fewest, 0)


@pytest.mark.parametrize("value", [2**20 + 1, 2**31 - 1, -(2**31)])
def test_entries_out_of_reach_are_none(value):
    assert factorize(with_error(np.full((8, 8), value), scale=0)) is None


@pytest.mark.parametrize("value", [1, 127, 128, 255, -(2**14), 2**14, 2**15, 2**17])
@pytest.mark.parametrize("place", [(0, 0), (0, 7), (200, 0), (255, 255)])
def test_single_errors(value, place):
    error = np.zeros((256, 256), int)
    error[place] = value
    factors = found(with_error(error, (True, False)))
    assert factors.scale == 1
    assert factors.rank == -(-abs(value) // (128 * 128 if value > 0 else 128 * 127))


@pytest.mark.parametrize("bits", BITS)
def test_rows_and_columns_of_code_zero(bits):
    rng = np.random.default_rng(0)
    error = np.zeros((2 ** bits[0], 2 ** bits[1]), int)
    error[0] = rng.integers(-300, 301, error.shape[1])
    error[:, 0] += rng.integers(-300, 301, error.shape[0])
    assert found(with_error(error, (False, True))).rank <= 4


@pytest.mark.parametrize("rank", [1, 2, 5, 17, 33, 64])
def test_hidden_factors_are_found(rank):
    rng = np.random.default_rng(rank)
    f, g = rng.integers(-127, 128, (256, rank)), rng.integers(-127, 128, (rank, 256))
    factors = found(with_error(f @ g, (True, True)))
    assert factors.rank <= rank


@pytest.mark.parametrize("rank", [64, 65])
def test_limit(rank):
    error = np.zeros((256, 256), int)
    error[range(1, 2 * rank, 2), range(1, 2 * rank, 2)] = 7
    m = with_error(error)
    assert found(m).rank == 64 if rank == 64 else factorize(m) is None


def test_one_more_than_the_limit_with_the_exact_product_only():
    """Rank 64 with s = 0, where s = 1 has 65."""
    table = np.zeros((256, 256), int)
    table[range(64), range(64)] = 9
    factors = found(with_error(table, scale=0))
    assert (factors.scale, factors.rank) == (0, 64)


@pytest.mark.parametrize("sides", [(64, 64), (64, 256), (256, 64), (32, 128)])
def test_any_narrow_table_of_small_entries(sides):
    error = np.random.default_rng(1).integers(-100, 101, sides)
    assert found(with_error(error)).rank <= min(sides)


def test_determinants_that_a_prime_divides():
    """Modulo the first prime this error has rank 1."""
    error = np.zeros((4, 4), int)
    error[:2, :2] = [[46341, 2 * 7], [331, 46341]]
    assert 46341**2 - 2 * 7 * 331 == 2**31 - 1
    factors = found(with_error(error))
    assert factors.rank <= 12


def test_lattices_with_large_invariants():
    rng = np.random.default_rng(2)
    f, g = rng.integers(-1, 2, (256, 6)), rng.integers(-1, 2, (6, 256))
    assert found(with_error(f @ np.diag([1, 4, 64, 81, 1024, 8191]) @ g)).rank <= 9


VECTOR = st.one_of(st.integers(-3, 3), st.sampled_from([-129, -128, -127, 127, 128, 255, 256, 2**15, -(2**15)]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), flags=st.sampled_from(FLAGS), scale=st.sampled_from([0, 1]))
def test_low_ranks(data, flags, scale):
    sides = data.draw(st.tuples(*[st.integers(2, 4).map(lambda n: 2**n)] * 2))
    error = np.zeros(sides, int)
    for _ in range(data.draw(st.integers(0, 3))):
        f, g = (data.draw(st.lists(VECTOR, min_size=side, max_size=side)) for side in sides)
        error += outer(f, g)
    m = with_error(np.clip(error, -(2**30), 2**30), flags, scale)
    factors = exact_or_none(m)
    if np.abs(error).max() <= 127:
        assert factors is not None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from(BITS),
    flags=st.sampled_from(FLAGS),
    rank=st.integers(1, 6),
    size=st.sampled_from([1, 20, 127]),
)
def test_random_factors(seed, bits, flags, rank, size):
    rng = np.random.default_rng(seed)
    f, g = rng.integers(-size, size + 1, (2 ** bits[0], rank)), rng.integers(-size, size + 1, (rank, 2 ** bits[1]))
    found(with_error(f @ g, flags))


def test_a_wrong_form_is_never_returned(monkeypatch):
    reduce = module.reduce_together
    monkeypatch.setattr(module, "reduce_together", lambda f, g: (reduce(f, g)[0] + 1, reduce(f, g)[1]))
    assert factorize(get_multiplier("roba_8u")) is None


def test_tables_that_float64_does_not_hold_are_none(monkeypatch):
    def fail(*_):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(module, "_between", fail)
    assert factorize(get_multiplier("roba_8u")) is None


# Keeping


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_kept_in_memory_by_version(searches):
    m = get_multiplier("kulkarni_4u")
    first = factorize(m)
    assert factorize(m) is first
    assert len(searches) == 1
    m.table[0, 0] = 5
    second = found(m)
    assert second != first
    assert len(searches) == 2
    m.table[0, 0] = 0
    assert found(m) == first
    assert len(searches) == 2  # the disk knew it


def test_none_is_kept_too(searches):
    m = get_multiplier("mitchell_8u")
    assert factorize(m) is factorize(m) is factorize(get_multiplier("mitchell_8u")) is None
    assert len(searches) == 1


def test_kept_on_disk(own_cache, searches):
    first = found(get_multiplier("roba_8u"))
    (entry,) = entries(own_cache)
    assert get_multiplier("roba_8u").content_hash in entry.name
    second = found(get_multiplier("roba_8u"))
    assert first == second
    assert first is not second
    assert len(searches) == 1


def test_same_table_of_other_signedness(searches):
    table = np.arange(16).reshape(4, 4)
    for flags in FLAGS:
        found(Multiplier(table, a_signed=flags[0], w_signed=flags[1]))
    assert len(searches) == 4
    m = Multiplier(table, a_signed=False, w_signed=False)
    found(m)
    m.a_signed = True
    found(m)
    assert len(searches) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "text"])
def test_damaged_entries_are_made_anew(own_cache, searches, damage):
    expected = factorize(get_multiplier("roba_8u"))
    file = entries(own_cache)[0] / "factors.npz"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = {"cut": content[: len(content) // 2], "text": b"no", "flip": content[:-300] + b"!" + content[-299:]}
        file.write_bytes(changed[damage])
    assert found(get_multiplier("roba_8u")) == expected
    assert len(searches) == 2
    assert found(get_multiplier("roba_8u")) == expected
    assert len(searches) == 2


WRONG = {
    "other values": lambda f, g: {"scale": 1, "f": f + 1, "g": g},
    "other scale": lambda f, g: {"scale": 0, "f": f, "g": g},
    "no scale": lambda f, g: {"scale": 2, "f": f, "g": g},
    "other type": lambda f, g: {"scale": 1, "f": f.astype(np.int16), "g": g},
    "other shape": lambda f, g: {"scale": 1, "f": f[:, :4], "g": g},
    "other ranks": lambda f, g: {"scale": 1, "f": f, "g": np.vstack([g, g])},
    "missing": lambda f, g: {"scale": 1, "f": f},
    "objects": lambda f, g: {"scale": 1, "f": f.astype(object), "g": g},
    "text": lambda f, g: {"scale": "one", "f": f, "g": g},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whole_entries_of_something_else_are_made_anew(own_cache, searches, wrong):
    """As another version might have written them: the manifest fits."""
    from approxconv.kernels import cache

    expected = factorize(get_multiplier("roba_8u"))
    (entry,) = entries(own_cache)
    np.savez(entry / "factors.npz", **WRONG[wrong](expected.f.numpy(), expected.g.numpy()))
    (entry / "manifest.json").write_text(json.dumps(cache._digests(entry)))
    assert cache.is_whole(entry)
    assert found(get_multiplier("roba_8u")) == expected
    assert len(searches) == 2
    assert found(get_multiplier("roba_8u")) == expected
    assert len(searches) == 2


def test_disk_that_cannot_be_written(monkeypatch, searches):
    from approxconv.kernels import cache

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cache, "_build_into", fail)
    m = get_multiplier("roba_8u")
    assert found(m) is found(m)
    assert len(searches) == 1


def test_written_results_are_not_handed_out_again():
    m = get_multiplier("roba_8u")
    first = factorize(m)
    expected = first.f.clone()
    first.f.zero_()
    assert torch.equal(found(m).f, expected)


def test_threads(searches):
    m = get_multiplier("bam_h2_v6_8u")
    results = []
    threads = [threading.Thread(target=lambda: results.append(factorize(m))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(result == results[0] for result in results)
    assert len(searches) == 1


def test_inside_inference_mode_and_a_tracer():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode():
        factors = factorize(get_multiplier("roba_4u"))
    assert not factors.f.is_inference()
    m = get_multiplier("roba_5u")
    with FakeTensorMode():
        factorize(m)
    found(m)


def test_processes_agree():
    code = (
        "from approxconv import get_multiplier\n"
        "from approxconv.factorize import factorize\n"
        "factors = factorize(get_multiplier('bam_h2_v6_8u'))\n"
        "print(factors.f.tolist(), factors.g.tolist())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {run.communicate(timeout=120)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(printed) == 1


# The object


def test_equality_and_hash():
    first, second = factorize(get_multiplier("roba_4u")), factorize(get_multiplier("roba_4u"))
    assert first == second
    assert hash(first) == hash(second)
    assert first != factorize(get_multiplier("roba_4s"))
    assert first != "roba"
    assert len({first, second, factorize(get_multiplier("roba_5u"))}) == 2
    turned = Factorization(first.scale, -first.f, first.g, first.a_signed, first.w_signed)
    assert turned != first


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies(copied):
    m = get_multiplier("drum4_8s")
    first = factorize(m)
    again = copied(first)
    assert again == first
    assert_exact(again, m)


def test_frozen():
    with pytest.raises(AttributeError):
        factorize(get_multiplier("roba_4u")).scale = 0


def test_text():
    text = str(factorize(get_multiplier("roba_8u")))
    assert re.fullmatch(r"table = a·w \+ Σ f\[a\]·g\[w\] of 1 term, f −\d+ to \d+, g −\d+ to \d+", text)
    assert str(factorize(get_multiplier("exact_8u"))) == "table = a·w"
    assert "3 terms" in str(factorize(get_multiplier("drum4_8s")))
    assert str(factorize(get_multiplier("drum4_7u"))).startswith("table = Σ")
    assert repr(factorize(get_multiplier("drum4_8s"))) == "Factorization(scale=1, rank=3)"


@pytest.mark.parametrize("name", ["exact_8u", "roba_8u_8s", "drum4_8s", "bam_h2_v6_8u", "trunc1_2u"])
def test_picture(name):
    factors = factorize(get_multiplier(name))
    figure = factors.plot()
    images = [ax.images[0] for ax in figure.axes[:2]]
    for image, side, signed in zip(images, (factors.f, factors.g), (factors.a_signed, factors.w_signed), strict=True):
        values = values_of(side.shape[1], signed)
        by_value = [dict(zip(values, row, strict=True)) for row in side.tolist()] or [dict.fromkeys(values, 0)]
        assert image.get_array().tolist() == [[row[value] for value in sorted(values)] for row in by_value]
        assert image.get_extent() == [min(values) - 0.5, max(values) + 0.5, len(by_value) - 0.5, -0.5]
    html = factors._repr_html_()
    assert "data:image/png;base64," in html
    assert len(html) < 60_000


def test_html_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "approxconv._picture", None)
    factors = factorize(get_multiplier("roba_4u"))
    html = factors._repr_html_()
    assert "<img" not in html
    assert "terms" in html
    with pytest.raises(ImportError, match="matplotlib"):
        factors.plot()


@pytest.mark.parametrize("wrong", [None, "roba_8u", np.zeros((4, 4))])
def test_refused(wrong):
    with pytest.raises(ValueError, match="multiplier must be a Multiplier, got"):
        factorize(wrong)


def test_import_is_light():
    code = "import sys, approxconv.factorize; print({'flint', 'matplotlib', 'cupy', 'numba'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "set()"


# EvoApproxLib


# Most terms; that is the lower rank of both scales but for 13QR (4), 17KS (18), FTA (17) and QKX (51).
EVOAPPROX = {
    "mul8s_1KR3": 1,
    "mul8s_1KR6": 3,
    "mul8s_1KVA": 2,
    "mul8s_1KVL": 4,
    "mul8s_1KX2": 4,
    "mul8s_1L2H": 1,
    "mul8u_125K": 4,
    "mul8u_12N4": None,
    "mul8u_13QR": 7,
    "mul8u_14VP": 11,
    "mul8u_17KS": 28,
    "mul8u_185Q": None,
    "mul8u_19DB": None,
    "mul8u_1CMB": 49,
    "mul8u_1JFF": 0,
    "mul8u_2AC": 10,
    "mul8u_2HH": 49,
    "mul8u_2P7": 6,
    "mul8u_7C1": 8,
    "mul8u_FTA": 19,
    "mul8u_JQQ": 3,
    "mul8u_KEM": 15,
    "mul8u_QKX": 57,
    "mul8u_Y48": 1,
    "mul8u_YX7": None,
}


def test_evoapprox(reference_multipliers):
    assert reference_multipliers.keys() == EVOAPPROX.keys()
    for name, m in reference_multipliers.items():
        factors = exact_or_none(m)
        if EVOAPPROX[name] is None:
            assert factors is None, name
        else:
            assert factors is not None, name
            assert factors.rank <= EVOAPPROX[name], name
