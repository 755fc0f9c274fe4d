from fractions import Fraction

import numpy as np
import pytest
import torch

from approxconv.multiplier import Multiplier
from approxconv.zoo import get_multiplier, list_multipliers
from approxconv.zoo.broken_array import broken_array
from approxconv.zoo.drum import FAMILY as DRUM
from approxconv.zoo.drum import drum
from approxconv.zoo.kulkarni import FAMILY as KULKARNI
from approxconv.zoo.kulkarni import kulkarni
from approxconv.zoo.mitchell import mitchell
from approxconv.zoo.truncated import truncated

# The references below work on one pair of Python ints, bit by bit, and share nothing with the vectorised families.


def truncated_reference(a, w, k):
    def cut(x):
        return int(f"{x:08b}"[:-k] + "0" * k, 2)

    return cut(a) * cut(w)


def broken_array_reference(a, w, h, v):
    total = 0
    for row in range(8):
        for column in range(row, row + 8):
            kept = row >= h and column >= v
            total += kept * (a >> (column - row) & 1) * (w >> row & 1) * 2**column
    return total


def drum_reference(a, w, k):
    def segment(x):
        if x < 2**k:
            return x
        bits = f"{x:b}"
        return int(bits[: k - 1] + "1" + "0" * (len(bits) - k), 2)

    return segment(a) * segment(w)


def mitchell_reference(a, w):
    if a == 0 or w == 0:
        return 0

    def log2(x):
        characteristic = x.bit_length() - 1
        return characteristic + Fraction(x, 2**characteristic) - 1

    total = log2(a) + log2(w)
    characteristic = int(total)
    return 2**characteristic * (1 + total - characteristic)


def kulkarni_reference(a, w, bits):
    if bits == 2:
        return 7 if a == w == 3 else a * w
    half = bits // 2
    (a_high, a_low), (w_high, w_low) = divmod(a, 2**half), divmod(w, 2**half)
    middle = kulkarni_reference(a_high, w_low, half) + kulkarni_reference(a_low, w_high, half)
    high, low = kulkarni_reference(a_high, w_high, half), kulkarni_reference(a_low, w_low, half)
    return (high << bits) + (middle << half) + low


def assert_is(multiplier, reference, step=1):
    """Compare every `step`-th row and all its columns with the reference, as operand values."""
    (a_low, a_high), (w_low, w_high) = multiplier.a_range, multiplier.w_range
    for a in range(a_low, a_high + 1, step):
        expected = [reference(a, w) for w in range(w_low, w_high + 1)]
        got = multiplier.table[a % 2**multiplier.a_bits].roll(-w_low if w_low < 0 else 0).tolist()
        assert got == expected, f"a = {a}"


@pytest.mark.parametrize(("bits", "k"), [(2, 1), (4, 1), (4, 3), (5, 2), (8, 2), (8, 7)])
def test_truncated(bits, k):
    m = truncated(k, bits)
    assert_is(m, lambda a, w: truncated_reference(a, w, k), step=1 if bits < 8 else 7)
    assert m.metrics()["bias"] == ((2**bits - 2**k) ** 2 - (2**bits - 1) ** 2) / 4


@pytest.mark.parametrize(
    ("bits", "h", "v"), [(2, 1, 2), (3, 0, 4), (4, 1, 3), (4, 3, 0), (5, 2, 1), (8, 2, 4), (8, 0, 14), (8, 7, 9)]
)
def test_broken_array(bits, h, v):
    m = broken_array(h, v, bits)
    assert_is(m, lambda a, w: broken_array_reference(a, w, h, v), step=1 if bits < 8 else 7)
    omitted = sum(2 ** (i + j) for i in range(bits) for j in range(bits) if i < h or i + j < v)
    metrics = m.metrics()
    assert metrics["WCE"] == omitted
    assert metrics["bias"] == -omitted / 4


def test_broken_array_breaks_rows_of_the_weight():
    assert broken_array(1, 3, bits=4).table[15, 15] == 200
    m = broken_array(3, 0)
    assert m.table[255, 7] == 0
    assert m.table[7, 255] == 7 * 248
    assert m != m.swap()
    assert broken_array(0, 5) == broken_array(0, 5).swap()


@pytest.mark.parametrize(("bits", "k"), [(2, 2), (4, 2), (4, 3), (5, 3), (8, 3), (8, 6)])
def test_drum(bits, k):
    assert_is(drum(k, bits), lambda a, w: drum_reference(a, w, k), step=1 if bits < 8 else 7)


def test_drum_worked_example_and_largest_error():
    assert drum(3).table[0b10010110, 3] == (0b101 << 5) * 3
    assert drum(6).table[128, 128] == 132 * 132
    for k in range(3, 8):
        assert drum(k).metrics()["WCRE%"] == pytest.approx(100 * ((1 + 2 ** (1 - k)) ** 2 - 1))
    assert drum(8) == get_multiplier("exact_8u")


@pytest.mark.parametrize(("k", "published"), [(3, 11.9), (4, 5.89), (5, 2.94), (6, 1.47), (7, 0.73), (8, 0.37)])
def test_drum_mean_relative_error_at_16_bits_is_the_published_one(k, published):
    a, w = np.random.default_rng(0).integers(1, 2**16, (2, 2**18))
    error = DRUM.unsigned(a, w, k=k) / (a * w) - 1
    assert 100 * np.abs(error).mean() == pytest.approx(published, rel=0.01)
    assert abs(error.mean()) < 0.2 * np.abs(error).mean()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_mitchell(bits):
    assert_is(mitchell(bits), mitchell_reference, step=1 if bits < 8 else 7)


def test_mitchell_errs_downwards_by_a_ninth_at_most():
    m = mitchell()
    assert m.table[3, 3] == 8
    assert m.error().max() == 0
    assert m.metrics()["WCRE%"] == pytest.approx(100 / 9)
    powers = 2 ** torch.arange(8)
    assert (m.error()[powers] == 0).all()
    assert (m.error()[:, powers] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kulkarni(bits):
    m = kulkarni(bits)
    assert_is(m, lambda a, w: kulkarni_reference(a, w, bits), step=1 if bits < 8 else 7)
    assert m.table[3, 3] == 7
    assert m.metrics()["WCRE%"] == pytest.approx(200 / 9)


def test_kulkarni_published_figures():
    metrics = kulkarni(2).metrics()
    assert metrics["EP%"] == 100 / 16
    # The paper's mean counts the 7 of 16 inputs with a zero as exact.
    assert metrics["MRE%"] * 9 / 16 == pytest.approx(1.39, abs=0.005)
    a, w = np.random.default_rng(0).integers(1, 2**16, (2, 2**18))
    assert 100 * (1 - KULKARNI.unsigned(a, w) / (a * w)).mean() == pytest.approx(3.32, abs=0.02)


@pytest.mark.parametrize("stem", ["exact", "trunc2", "bam_h1_v3", "drum3", "mitchell", "kulkarni"])
@pytest.mark.parametrize("bits", [4, 8])
def test_signed_operands_enter_by_magnitude(stem, bits):
    unsigned = get_multiplier(f"{stem}_{bits}u")
    assert get_multiplier(f"{stem}_{bits}s") == unsigned.sign_magnitude()
    table = unsigned.table
    mixed = get_multiplier(f"{stem}_{bits}u_{bits}s")
    assert (mixed.a_signed, mixed.w_signed) == (False, True)
    other = get_multiplier(f"{stem}_{bits}s_{bits}u")
    assert (other.a_signed, other.w_signed) == (True, False)
    for code in range(2**bits):
        value = code - 2**bits if code >= 2 ** (bits - 1) else code
        sign = (value > 0) - (value < 0)
        assert torch.equal(mixed.table[:, code], sign * table[:, abs(value)])
        assert torch.equal(other.table[code], sign * table[abs(value)])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("a_signed", "w_signed"), [(False, False), (False, True), (True, False), (True, True)])
def test_exact_is_multiplier_exact(bits, a_signed, w_signed):
    exact = Multiplier.exact(bits, a_signed, w_signed)
    m = get_multiplier(exact.name)
    assert m == exact
    assert m is not exact
    assert m.name == exact.name


def test_every_listed_name_builds():
    names = list_multipliers()
    assert len(names) == len(set(names)) > 1000
    for name in names:
        m = get_multiplier(name)
        assert m.name == name
        assert m.a_bits == m.w_bits == int(name.rstrip("us").rsplit("_", 1)[1])


def test_a_name_and_its_function_build_the_same():
    assert get_multiplier("trunc2_8u") == truncated(2)
    assert get_multiplier("bam_h2_v4_8s") == broken_array(2, 4, a_signed=True, w_signed=True)
    assert get_multiplier("bam_h2_v4_8u") != get_multiplier("bam_h4_v2_8u")
    assert get_multiplier("drum6_8u_8s") == drum(6, w_signed=True)
    assert get_multiplier("mitchell_5u") == mitchell(bits=5)
    assert get_multiplier("kulkarni_4u") == kulkarni(bits=4)


def test_each_call_builds_anew():
    first = get_multiplier("exact_4u")
    first.table.zero_()
    assert get_multiplier("exact_4u").table[1, 1] == 1


def test_list_filters_and_sorts_naturally():
    assert list_multipliers("drum?_8u") == [f"drum{k}_8u" for k in range(2, 9)]
    for formats in ("8u_8s", "8s_8u"):
        assert list_multipliers(f"trunc*_{formats}") == [f"trunc{k}_{formats}" for k in range(1, 8)]
    assert list_multipliers("kulkarni_?u") == ["kulkarni_2u", "kulkarni_4u", "kulkarni_8u"]
    columns = [int(name.split("_")[2][1:]) for name in list_multipliers("bam_h0_v*_8u") if "_8s_" not in name]
    assert columns == list(range(15))
    assert {name.split("_", 1)[1] for name in list_multipliers("exact*8*")} == {"8u", "8s", "8u_8s", "8s_8u"}
    assert list_multipliers("DRUM*") == []
    assert list_multipliers("") == []
    with pytest.raises(ValueError, match="pattern must be a str or None, got 3"):
        list_multipliers(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("drum9_8u", "k must be an int from 2 to 8, got 9"),
        ("drum5_4u_4s", "k must be an int from 2 to 4, got 5"),
        ("trunc0_8u", "k must be an int from 1 to 7, got 0"),
        ("trunc2_2u", "k must be an int: 1, got 2"),
        ("bam_h8_v0_8u", "h must be an int from 0 to 7, got 8"),
        ("bam_h0_v15_8u", "v must be an int from 0 to 14, got 15"),
        ("mitchell_9u", "bits must be an int from 2 to 8, got 9"),
        ("exact_1u", "bits must be an int from 2 to 8, got 1"),
        ("kulkarni_3u", "bits must be an int: 2 or 4 or 8, got 3"),
        ("exact_8u_4s", "same width, got 8 and 4 bits"),
    ],
)
def test_a_well_formed_name_out_of_range_says_the_range(name, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        get_multiplier(name)


@pytest.mark.parametrize(
    ("name", "near"), [("drm6_8u", "drum6_8u"), ("Mitchell_8u", "mitchell_8u"), ("exact_8u_8u", "exact_8u")]
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(ValueError, match=f"no multiplier '{name}'; did you mean .*{near}"):
        get_multiplier(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "drum6",
        "drum_8u",
        "drum-6_8u",
        "drum06_8u",
        "drum6_08u",
        "drum6_8u\n",
        " drum6_8u",
        "drum6_8u_8u",
        "drum6_8x",
        "drum٦_8u",
        "bam_v4_h2_8u",
        "../../etc/passwd",
        "drum{k}_8u",
        "drum" + "9" * 5000 + "_8u",
        "x" * 10**6,
    ],
)
def test_hostile_names_end_in_a_short_value_error(name):
    with pytest.raises(ValueError, match="no multiplier") as caught:
        get_multiplier(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 6, b"drum6_8u", ["drum6_8u"]])
def test_a_name_that_is_no_str(name):
    with pytest.raises(ValueError, match="name must be a str, got"):
        get_multiplier(name)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, -1, 99, np.bool_(True)])
def test_arguments_of_the_wrong_type_or_range(value):
    for build, argument in [
        (lambda v: truncated(v), "k"),
        (lambda v: drum(v), "k"),
        (lambda v: broken_array(v, 0), "h"),
        (lambda v: broken_array(0, v), "v"),
        (lambda v: mitchell(v), "bits"),
        (lambda v: kulkarni(v), "bits"),
    ]:
        with pytest.raises(ValueError, match=f"^{argument} must be an int.* got "):
            build(value)


def test_flags_must_be_bools_and_numpy_ints_are_ints():
    with pytest.raises(ValueError, match="w_signed must be True or False, got 'yes'"):
        drum(4, w_signed="yes")
    assert drum(np.int64(4), np.uint8(8)).name == "drum4_8u"
