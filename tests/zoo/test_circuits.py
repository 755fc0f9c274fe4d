from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from approxconv.zoo import get_wide_multiplier
from approxconv.zoo.alm import FAMILIES as ALM
from approxconv.zoo.alm import alm
from approxconv.zoo.booth import FAMILIES as BOOTH
from approxconv.zoo.booth import approximate_booth, broken_booth
from approxconv.zoo.compressor_tree import FAMILIES as COMPRESSOR_TREE
from approxconv.zoo.compressor_tree import compressor_tree
from approxconv.zoo.exact import FAMILY as EXACT
from approxconv.zoo.lower_part_or import FAMILY as LOWER_PART_OR
from approxconv.zoo.lower_part_or import lower_part_or, lower_part_or_add
from approxconv.zoo.mitchell import mitchell
from approxconv.zoo.random_error import FAMILY as RANDOM_ERROR
from approxconv.zoo.random_error import random_error, splitmix64

FAMILIES = (*COMPRESSOR_TREE, LOWER_PART_OR, *ALM, *BOOTH, RANDOM_ERROR)

# The references below work on one pair of Python ints, bit by bit, and share nothing with the vectorised families.


def compressed(x, cin, compressor):
    """Sum, carry and carry-out of one approximate compressor; no carry-out where it has none."""
    x1, x2, x3, x4 = x
    if compressor == "akbari1":
        return x1, x4, None
    total, carry = int(x1 == x2 or x3 == x4), int((x1 or x2) and (x3 or x4))
    return (total, carry, None) if compressor == "momeni2" else (total if cin == 0 else 0, cin, carry)


def compressor_tree_reference(a, w, bits, k, compressor, counts=None):
    """The tree's rows, summed; `counts` collects the sizes of its counters."""
    total, columns = 0, {c: [] for c in range(k)}
    for i in range(bits):
        for j in range(bits):
            bit = (a >> j & 1) * (w >> i & 1)
            if i + j < k:
                columns[i + j].append(bit)
            else:
                total += bit * 2 ** (i + j)
    for height in (4, 2):
        carried = {c: [] for c in range(k + 1)}
        chained = {c: [] for c in range(k + 1)}
        arriving = dict.fromkeys(range(k + 1), 0)
        for c in range(k):
            column, sums, half_carries = columns[c], [], []
            to_go = len(column) + arriving[c] - height
            while to_go > 0:
                arriving[c + 1] += 1
                size = 4 if to_go >= 3 else to_go + 1
                to_go -= size - 1
                x, column = column[:size], column[size:]
                cin = chained[c].pop(0) if chained[c] else None
                if size == 2 and cin is not None:
                    x, cin = [*x, cin], None
                if size == 3 and cin is not None:
                    x = [*x, 0]
                if counts is not None:
                    counts[len(x)] = counts.get(len(x), 0) + 1
                if len(x) == 4:
                    bit, carry, cout = compressed(x, cin or 0, compressor)
                    carried[c + 1].append(carry)
                    if cout is not None:
                        chained[c + 1].append(cout)
                    elif cin is not None:
                        raise AssertionError("a carry-in for a compressor without one")
                else:
                    carry, bit = divmod(sum(x), 2)
                    if len(x) == 2 and compressor == "momeni1":
                        half_carries.append(carry)
                    else:
                        carried[c + 1].append(carry)
                sums.append(bit)
            chained[c + 1] += half_carries
            columns[c] = carried[c] + sums + column + chained[c]
            assert len(columns[c]) <= height
        total += 2**k * sum(carried[k] + chained[k])
    return total + sum(bit * 2**c for c in range(k) for bit in columns[c])


def lower_part_or_add_reference(x, y, k):
    low = sum(2**i for i in range(k) if x >> i & 1 or y >> i & 1)
    carry = (x >> (k - 1) & 1) * (y >> (k - 1) & 1)
    return (x // 2**k + y // 2**k + carry) * 2**k + low


def lower_part_or_reference(a, w, k, bits):
    """By columns: the form of the docstring's last sentence, not the row-by-row one."""
    total = 0
    for c in range(2 * bits - 1):
        ones = sum((a >> c - i & 1) * (w >> i & 1) for i in range(bits) if c >= i)
        if c >= k:
            total += ones * 2**c
        else:
            total += min(ones, 1) * 2**c
            if c == k - 1:
                total += max(ones - 1, 0) * 2**k
    return total


def alm_reference(a, w, m, bits, adder):
    if a == 0 or w == 0:
        return 0
    scale = 2 ** (bits - 1)

    def logarithm(x):
        characteristic = x.bit_length() - 1
        value = scale * (characteristic + Fraction(x, 2**characteristic) - 1)
        assert value.denominator == 1
        return int(value)

    total = lower_part_or_add_reference(logarithm(a), logarithm(w), m)
    if adder == "soa":
        total += 2**m - 1 - total % 2**m
    characteristic, fraction = divmod(total, scale)
    return int(2**characteristic * (1 + Fraction(fraction, scale)))


def booth_digits(w, bits):
    """``(high, middle, low)`` bits of each radix-4 digit."""
    return [(w >> 2 * i + 1 & 1, w >> 2 * i & 1, w >> 2 * i - 1 & 1 if i else 0) for i in range(bits // 2)]


def wrapped(total, width):
    total %= 2**width
    return total - 2**width if total >= 2 ** (width - 1) else total


def approximate_booth_reference(a, w, bits, p, encoder):
    """Booth's rows of 2·bits bits each, one bit at a time."""
    total = 0
    for i, (high, middle, low) in enumerate(booth_digits(w, bits)):
        digit = -2 * high + middle + low
        exact = abs(digit) * a if digit >= 0 else -abs(digit) * a - 1
        for j in range(2 * bits - 2 * i):
            bit = exact >> j & 1
            if j < bits and 2 * i + j < p:
                bit = high ^ a >> j & 1 if encoder == "r4abm2" or middle != low else 0
            total += bit << 2 * i + j
        if digit < 0 and i < bits // 2 - 1:
            total += 1 << 2 * i
    return wrapped(total, 2 * bits)


def broken_booth_reference(a, w, bits, v):
    total = 0
    for i, (high, middle, low) in enumerate(booth_digits(w, bits)):
        row = format((-2 * high + middle + low) * a * 4**i % 4**bits, f"0{2 * bits}b")
        total += int(row[: 2 * bits - v] + "0" * v, 2)
    return wrapped(total, 2 * bits)


def splitmix64_reference(n):
    z = n * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def random_error_reference(a, w, seed, m):
    h = splitmix64_reference(65536 * seed + 256 * (a % 256) + w % 256 + 1)
    return a * w + h % (2 * m + 1) - m


def assert_is(multiplier, reference, step=1):
    """Compare every `step`-th row and all its columns with the reference, as operand values."""
    (a_low, a_high), (w_low, w_high) = multiplier.a_range, multiplier.w_range
    for a in range(a_low, a_high + 1, step):
        expected = [reference(a, w) for w in range(w_low, w_high + 1)]
        got = multiplier.table[a % 2**multiplier.a_bits].roll(-w_low if w_low < 0 else 0).tolist()
        assert got == expected, f"a = {a}"


@pytest.mark.parametrize("compressor", ["momeni1", "momeni2", "akbari1"])
@pytest.mark.parametrize(("bits", "k"), [(4, 4), (4, 7), (5, 6), (6, 5), (6, 11), (7, 13), (8, 4), (8, 7), (8, 15)])
def test_compressor_tree(compressor, bits, k):
    m = compressor_tree(compressor, k, bits)
    step = {4: 1, 5: 1, 6: 5, 7: 23, 8: 51}[bits]
    assert_is(m, lambda a, w: compressor_tree_reference(a, w, bits, k, compressor), step)


@pytest.mark.parametrize(("compressor", "inputs", "wrong"), [("momeni1", 5, 12), ("momeni2", 4, 4), ("akbari1", 4, 10)])
def test_compressors_err_for_the_published_share_of_their_inputs(compressor, inputs, wrong):
    def value(x):
        total, carry, cout = compressed(x[:4], x[4] if inputs == 5 else 0, compressor)
        return total + 2 * carry + 2 * (cout or 0)

    errors = [value(x) - sum(x) for x in product((0, 1), repeat=inputs)]
    assert sum(error != 0 for error in errors) == wrong
    if compressor != "akbari1":
        assert set(errors) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("compressor", "right", "mean", "high", "low"),
    [
        ("momeni1", 5888, 0.9199e-3, 0.3199e-2, 0.2707e-2),
        ("momeni2", 9320, 0.7827e-3, 0.1845e-2, 0.3076e-2),
    ],
)
def test_momenis_multipliers_3_and_4_have_their_published_errors(compressor, right, mean, high, low):
    error = compressor_tree(compressor, 7).error()[1:, 1:].double() / 255**2
    assert (error == 0).sum() == right
    assert error.abs().mean().item() == pytest.approx(mean, abs=0.5e-7)
    assert error.max().item() == pytest.approx(high, abs=0.5e-6)
    assert -error.min().item() == pytest.approx(low, abs=0.5e-6)


def test_the_8_bit_tree_has_momenis_counters():
    counts = {}
    compressor_tree_reference(0, 0, 8, 15, "momeni1", counts)
    assert counts == {4: 18, 3: 3, 2: 3}


def test_momenis_compressors_make_something_of_zero():
    assert compressor_tree("momeni2", 7).table[0, 0] == 8 + 16 + 32 + 64
    for compressor, zero in (("momeni1", False), ("momeni2", False), ("akbari1", True)):
        table = compressor_tree(compressor, 9).table
        assert bool((table[0] == 0).all()) == zero
    signed = compressor_tree("momeni2", 7, a_signed=True, w_signed=True)
    assert (signed.table[0] == 0).all()  # sign(0) = 0


@pytest.mark.parametrize(("bits", "k"), [(2, 2), (2, 3), (3, 3), (4, 4), (4, 7), (5, 2), (8, 2), (8, 6), (8, 15)])
def test_lower_part_or(bits, k):
    assert_is(lower_part_or(k, bits), lambda a, w: lower_part_or_reference(a, w, k, bits), 1 if bits < 8 else 17)


def test_lower_part_or_worked_example():
    # 1011 · 0111 with four low bits ORed: 1011, then 1011 | 0110 with 1·0 carried, then 1111 | 1100 with 1·1 carried.
    assert lower_part_or(4, bits=4).table[0b1011, 0b0111] == 0b1111 + (1 + 1 + 2) * 16
    assert lower_part_or(5) == lower_part_or(5).swap()


@pytest.mark.parametrize(("k", "published"), [(2, 0.4), (8, 0.9)])
def test_the_adder_errs_as_often_as_published(k, published):
    x, y = np.meshgrid(*[np.arange(2**k)] * 2, indexing="ij")
    got = lower_part_or_add(x, y, k)
    assert got.ravel().tolist() == [lower_part_or_add_reference(a, b, k) for a, b in product(range(2**k), repeat=2)]
    error = got - (x + y)
    assert (error != 0).mean() == 1 - 0.75**k == pytest.approx(published, abs=0.05)
    assert error.mean() == 0.25
    assert np.abs(error).max() < 2**k


@pytest.mark.parametrize("adder", ["soa", "loa"])
@pytest.mark.parametrize(("bits", "m"), [(2, 1), (3, 1), (3, 2), (5, 3), (6, 1), (8, 1), (8, 3), (8, 7)])
def test_alm(adder, bits, m):
    assert_is(alm(adder, m, bits), lambda a, w: alm_reference(a, w, m, bits, adder), 1 if bits < 8 else 17)


def test_alm_worked_examples():
    # log 12 = 3 + 0.1000000, log 10 = 3 + 0.0100000: with six bits set 6 + 0.1111111, so 127.5, for 6 + 0.1100000.
    assert alm("soa", 6).table[12, 10] == 127
    assert alm("loa", 6).table[12, 10] == mitchell().table[12, 10] == 112
    # log 3 + log 3, each 1 + 0.1000000: the halves are ORed and carry, so that 3 + 0.1000000 takes the place of 3.
    assert alm("loa", 7).table[3, 3] == 12
    assert alm("soa", 7).table[3, 3] == 15


def test_alm_soa_at_16_bits_errs_least_with_the_papers_11_bits():
    a, w = np.random.default_rng(0).integers(1, 2**16, (2, 2**17))

    def mean_error(m):
        return np.abs(ALM[0].unsigned(a, w, m=m, bits=16) - a * w).mean() / (2**16 - 1) ** 2

    errors = {m: mean_error(m) for m in range(1, 16)}
    assert min(errors, key=errors.get) == 11
    assert errors[1] == pytest.approx(9.26e-3, rel=0.01)  # hardly differs from the exact adder's
    assert errors[11] == pytest.approx(0.87 * errors[1], rel=0.01)
    relative = np.abs(ALM[0].unsigned(a, w, m=1, bits=16) / (a * w) - 1)
    assert 100 * relative.mean() == pytest.approx(3.85, abs=0.02)
    assert 100 * relative.max() < 11.12


@pytest.mark.parametrize("encoder", ["r4abm1", "r4abm2"])
@pytest.mark.parametrize(
    ("bits", "p"), [(2, 1), (2, 2), (4, 1), (4, 4), (4, 6), (6, 5), (6, 10), (8, 1), (8, 6), (8, 9), (8, 14)]
)
def test_approximate_booth(encoder, bits, p):
    m = approximate_booth(encoder, p, bits)
    assert_is(m, lambda a, w: approximate_booth_reference(a, w, bits, p, encoder), 1 if bits < 8 else 19)


@pytest.mark.parametrize(("encoder", "changed", "up"), [("r4abm1", 4, False), ("r4abm2", 8, True)])
def test_the_encoders_change_the_published_number_of_entries(encoder, changed, up):
    differences = []
    for high, middle, low, a1, a0 in product((0, 1), repeat=5):
        digit = -2 * high + middle + low
        a = 2 * a1 + a0
        exact = (abs(digit) * a if digit >= 0 else ~(abs(digit) * a)) >> 1 & 1
        approximate = a1 ^ high if encoder == "r4abm2" or middle != low else 0
        differences.append(approximate - exact)
    assert sum(d != 0 for d in differences) == changed
    assert (1 in differences) == up
    assert -1 in differences
    assert changed / 32 == {"r4abm1": 0.125, "r4abm2": 0.25}[encoder]


def test_approximate_booth_leaves_out_the_last_neg():
    weights = torch.arange(0, 256, 4)  # digit 0 is 0, and its row exact
    top = weights >> 5
    neg = (top >= 4) & (top != 7)
    error = approximate_booth("r4abm1", 1).error()[:, weights]
    assert torch.equal(error, torch.where(neg, -64, 0).expand(256, -1))


@pytest.mark.parametrize(("bits", "v"), [(2, 1), (2, 2), (4, 1), (4, 3), (4, 4), (6, 5), (8, 1), (8, 6), (8, 8)])
def test_broken_booth(bits, v):
    m = broken_booth(v, bits)
    assert_is(m, lambda a, w: broken_booth_reference(a, w, bits, v), 1 if bits < 8 else 19)
    assert m.error().max() == 0


def test_broken_booth_published_figures():
    values = np.arange(-(2**11), 2**11)
    a, w = np.meshgrid(values, values, indexing="ij")
    error = get_wide_multiplier("bbm_v3_12s")(a, w) - a * w
    assert (error.mean(), (error != 0).mean(), error.min()) == (-3.5, 0.6875, -11)


@pytest.mark.parametrize(("bits", "a_signed", "w_signed"), [(2, False, False), (3, True, False), (8, False, True)])
@pytest.mark.parametrize(("seed", "m"), [(0, 1), (7, 16), (999, 999)])
def test_random_error(bits, a_signed, w_signed, seed, m):
    table = random_error(seed, m, bits, a_signed, w_signed)
    assert_is(table, lambda a, w: random_error_reference(a, w, seed, m), 1 if bits < 8 else 17)


def test_splitmix64_is_the_published_generator():
    assert [hex(v) for v in splitmix64(np.arange(1, 4, dtype=np.uint64))] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize(("seed", "m"), [(0, 1), (1, 16), (2, 255), (999, 999)])
def test_random_error_has_its_expected_moments(seed, m):
    metrics = random_error(seed, m).metrics()
    assert metrics["MAE"] == pytest.approx(m * (m + 1) / (2 * m + 1), rel=0.01)
    assert metrics["MSE"] == pytest.approx(m * (m + 1) / 3, rel=0.01)
    assert metrics["EP%"] == pytest.approx(200 * m / (2 * m + 1), rel=0.01)
    assert abs(metrics["bias"]) < 4 * (m * (m + 1) / 3 / 2**16) ** 0.5
    assert metrics["WCE"] == m


def test_random_error_is_the_same_everywhere_and_hostile():
    m = random_error(0, 16)
    assert m.content_hash == "a4a3bf8ef0b2d22c7fb41eb68d517421969ca9c055d679a54de83ff6ae566269"
    assert m != m.swap()
    assert (m.table[0] != 0).any()
    assert (m.table[:, 0] != 0).any()
    assert m.table[0, 0] != 0
    assert random_error(1, 16) != m
    assert torch.equal(random_error(0, 16, 4).table, m.table[:16, :16])


def test_names_build_what_they_name():
    names = [name for family in FAMILIES for name in family.names()]
    assert len(names) == len(set(names)) < 1300
    for family in FAMILIES:
        for name in list(family.names())[::7]:
            assert [other.from_name(name) is not None for other in FAMILIES].count(True) == 1
            assert family.from_name(name).name == name


@pytest.mark.parametrize(
    ("multiplier", "name"),
    [
        (compressor_tree("momeni1", 7), "momeni1_c7_8u"),
        (compressor_tree("akbari1", 5, 4, w_signed=True), "akbari1_c5_4u_4s"),
        (lower_part_or(4, 6, a_signed=True, w_signed=True), "loa4_6s"),
        (alm("soa", 3), "alm_soa3_8u"),
        (alm("loa", 1, 2, a_signed=True), "alm_loa1_2s_2u"),
        (approximate_booth("r4abm2", 9), "r4abm2_p9_8s"),
        (broken_booth(3, 4), "bbm_v3_4s"),
        (random_error(3, 100, w_signed=True), "random_s3_m100_8u_8s"),
    ],
)
def test_a_name_and_its_function_build_the_same(multiplier, name):
    assert multiplier.name == name
    (built,) = [m for m in (family.from_name(name) for family in FAMILIES) if m is not None]
    assert built == multiplier
    assert built.name == name


def test_unlisted_seeds_are_taken_too():
    names = set(RANDOM_ERROR.names())
    assert "random_s1_m256_8s_8u" in names
    assert "random_s2_m16_8u" not in names
    assert RANDOM_ERROR.from_name("random_s2_m17_8u") == random_error(2, 17)


@pytest.mark.parametrize("family", [*COMPRESSOR_TREE, LOWER_PART_OR, *ALM], ids=lambda family: family.stem)
def test_signed_operands_enter_by_magnitude(family):
    name = next(name for name in family.names() if name.endswith("_8u"))
    unsigned = family.from_name(name)
    assert family.from_name(name[:-1] + "s") == unsigned.sign_magnitude()
    mixed = family.from_name(name + "_8s")
    assert torch.equal(mixed.table[:, 1:128], unsigned.table[:, 1:128])
    assert torch.equal(mixed.table[:, 128:], -unsigned.table[:, 1:129].flip(1))


@pytest.mark.parametrize("family", BOOTH, ids=lambda family: family.stem)
def test_booth_is_signed_only(family):
    names = list(family.names())
    assert all(name.endswith("s") and "u" not in name.rsplit("_", 1)[1] for name in names)
    stem = names[-1].rsplit("_", 1)[0]
    for formats, flags in (
        ("8u", "a_signed=False, w_signed=False"),
        ("8u_8s", "a_signed=False, w_signed=True"),
        ("8s_8u", "a_signed=True, w_signed=False"),
    ):
        with pytest.raises(
            ValueError, match=f"no multiplier '{stem}_{formats}': this family is signed only, got {flags}"
        ):
            family.from_name(f"{stem}_{formats}")


def test_exact_is_still_all_four_formats():
    assert [name for name in EXACT.names() if "8" in name] == ["exact_8u", "exact_8s", "exact_8u_8s", "exact_8s_8u"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("momeni1_c3_8u", "k must be an int from 4 to 15, got 3"),
        ("momeni2_c16_8u", "k must be an int from 4 to 15, got 16"),
        ("akbari1_c4_3u", "bits must be an int from 4 to 8, got 3"),
        ("loa1_8u", "k must be an int from 2 to 15, got 1"),
        ("loa4_2s", "k must be an int from 2 to 3, got 4"),
        ("alm_soa0_8u", "m must be an int from 1 to 7, got 0"),
        ("alm_loa8_8u_8s", "m must be an int from 1 to 7, got 8"),
        ("r4abm1_p15_8s", "p must be an int from 1 to 14, got 15"),
        ("r4abm2_p1_5s", "bits must be an int: 2 or 4 or 6 or 8, got 5"),
        ("bbm_v9_8s", "v must be an int from 1 to 8, got 9"),
        ("random_s0_m0_8u", "m must be an int from 1 to 999, got 0"),
    ],
)
def test_a_well_formed_name_out_of_range_says_the_range(name, message):
    with pytest.raises(ValueError, match=f"no multiplier '{name}': {message}"):
        _ = [family.from_name(name) for family in FAMILIES]


@pytest.mark.parametrize("value", [True, 2.0, "2", None, -1, 1000, np.bool_(True)])
def test_arguments_of_the_wrong_type_or_range(value):
    for build, argument in [
        (lambda v: compressor_tree("momeni1", v), "k"),
        (lambda v: lower_part_or(v), "k"),
        (lambda v: alm("soa", v), "m"),
        (lambda v: alm("loa", 1, v), "bits"),
        (lambda v: approximate_booth("r4abm1", v), "p"),
        (lambda v: broken_booth(v), "v"),
        (lambda v: broken_booth(1, v), "bits"),
        (lambda v: random_error(v, 1), "seed"),
        (lambda v: random_error(0, v), "m"),
    ]:
        with pytest.raises(ValueError, match=f"^{argument} must be an int.* got "):
            build(value)


@pytest.mark.parametrize("value", ["momeni3", "", None, 1, ["soa"]])
def test_a_design_that_there_is_not(value):
    for build, message in [
        (lambda v: compressor_tree(v, 7), "compressor must be 'momeni1' or 'momeni2' or 'akbari1', got "),
        (lambda v: alm(v, 3), "adder must be 'soa' or 'loa', got "),
        (lambda v: approximate_booth(v, 3), "encoder must be 'r4abm1' or 'r4abm2', got "),
    ]:
        with pytest.raises(ValueError, match=message):
            build(value)


def test_flags_must_be_bools():
    for build in (lambda f: compressor_tree("momeni1", 7, w_signed=f), lambda f: random_error(0, 1, w_signed=f)):
        with pytest.raises(ValueError, match="w_signed must be True or False, got 'yes'"):
            build("yes")
