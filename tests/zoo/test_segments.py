import numpy as np
import pytest
import torch

from approxconv.multiplier import Multiplier
from approxconv.zoo.broken_array import broken_array
from approxconv.zoo.dsm import FAMILY as DSM
from approxconv.zoo.dsm import dsm
from approxconv.zoo.essm import FAMILY as ESSM
from approxconv.zoo.essm import essm
from approxconv.zoo.etm import FAMILY as ETM
from approxconv.zoo.etm import etm
from approxconv.zoo.perforated import FAMILY as PERFORATED
from approxconv.zoo.perforated import perforated
from approxconv.zoo.roba import FAMILY as ROBA
from approxconv.zoo.roba import roba
from approxconv.zoo.ssm import FAMILY as SSM
from approxconv.zoo.ssm import ssm

FAMILIES = (PERFORATED, ROBA, DSM, SSM, ESSM, ETM)

# The references below work on one pair of Python ints, bit by bit, and share nothing with the vectorised families.


def perforated_reference(a, w, j, k):
    total = 0
    for row in range(8):
        if not j <= row < j + k:
            total += sum((a >> column & 1) * (w >> row & 1) * 2 ** (row + column) for column in range(8))
    return total


def roba_rounded(x):
    """The paper's sums of products: one for each bit of the rounded operand."""

    def bit(i):
        return i >= 0 and x >> i & 1

    rounded = 0
    for i in range(10):
        up = i >= 3 and not bit(i) and bit(i - 1) and bit(i - 2)
        down = bit(i) and not (bit(i - 1) and i >= 2)
        if (up or down) and not any(bit(higher) for higher in range(i + 1, 10)):
            rounded += 2**i
    return rounded


def roba_reference(a, w):
    return a * w - (roba_rounded(a) - a) * (roba_rounded(w) - w)


def dsm_reference(a, w, m):
    def segment(x):
        digits = f"{x:b}"
        return int(digits[:m].ljust(len(digits), "0"), 2)

    return segment(a) * segment(w)


def ssm_reference(a, w, m, bits):
    def segment(x):
        digits = f"{x:0{bits}b}"
        return int(digits[:m].ljust(bits, "0") if "1" in digits[: bits - m] else digits, 2)

    return segment(a) * segment(w)


def essm_reference(a, w, m, bits):
    def segment(x):
        digits = f"{x:0{bits}b}"
        for start in (0, (bits - m) // 2):
            if "1" in digits[start : start + (bits - m) // 2]:
                return int(digits[: start + m].ljust(bits, "0"), 2)
        return x

    return segment(a) * segment(w)


def etm_reference(a, w, k):
    if a < 2**k and w < 2**k:
        return a * w
    fill = ""
    for i in reversed(range(k)):
        fill += "1" if "1" in fill or a >> i & 1 or w >> i & 1 else "0"
    return int(f"{(a >> k) * (w >> k):b}" + fill + fill[-1] * k, 2)


def assert_is(multiplier, reference):
    """Compare the table of an unsigned multiplier with the reference, every 7th row of an 8-bit one."""
    assert not multiplier.a_signed
    assert not multiplier.w_signed
    codes = range(2**multiplier.w_bits)
    for a in range(0, 2**multiplier.a_bits, 1 if multiplier.a_bits < 8 else 7):
        assert multiplier.table[a].tolist() == [reference(a, w) for w in codes], f"a = {a}"


def random_operands(bits):
    return np.random.default_rng(0).integers(1, 2**bits, (2, 2**20))


def accuracy(products, a, w):
    """What Narayanamoorthy et al. call the average computational accuracy, in percent."""
    return 100 * (1 - np.abs(products / (a * w) - 1).mean())


@pytest.mark.parametrize(
    ("bits", "j", "k"),
    [(2, 0, 1), (2, 1, 1), (3, 2, 2), (4, 1, 2), (5, 0, 4), (6, 3, 3), (7, 5, 1), (8, 0, 7), (8, 2, 3), (8, 7, 7)],
)
def test_perforated(bits, j, k):
    m = perforated(j, k, bits)
    assert_is(m, lambda a, w: perforated_reference(a, w, j, k))
    assert m.error().max() == 0
    assert m.metrics()["WCE"] == (2**bits - 1) * sum(2**i for i in range(j, min(j + k, bits)))


def test_perforated_omits_bits_of_the_weight_and_none_past_the_last():
    assert perforated(1, 2).table[10, 0b1111] == 90
    assert perforated(1, 2) != perforated(1, 2).swap()
    assert perforated(5, 7) == perforated(5, 3)
    assert perforated(3, 2, a_signed=True, w_signed=True).table[10, -0b11111] == -10 * 0b111
    for h in range(1, 8):
        assert perforated(0, h) == broken_array(h, 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_perforated_normalised_mean_error_is_the_published_formula(bits):
    for j in range(bits):
        for k in range(1, min(bits - j, bits - 1) + 1):
            published = 2**j * (2**k - 1) / (4 * (2**bits - 1))
            assert perforated(j, k, bits).metrics()["MAE"] / (2**bits - 1) ** 2 == pytest.approx(published)


def test_perforated_published_errors_at_16_bits():
    # At half the power of the exact multiplier: NMED 1.95e-3 and MRED 2.61e-2, both those of j = 0 and k = 9.
    # The activation enters the first by its mean alone and the second not at all.
    w = np.arange(1, 2**16)
    a = np.full_like(w, 2**15)
    missing = a * w - PERFORATED.unsigned(a, w, j=0, k=9)
    assert missing.sum() / 2**16 / (2**16 - 1) ** 2 == pytest.approx(1.95e-3, rel=0.003)
    assert (missing / (a * w)).mean() == pytest.approx(2.61e-2, rel=0.003)


@pytest.mark.parametrize("bits", range(2, 9))
def test_roba(bits):
    assert_is(roba(bits), roba_reference)


@pytest.mark.parametrize(
    ("x", "power"), [(0, 0), (1, 1), (2, 2), (3, 2), (5, 4), (6, 8), (11, 8), (12, 16), (191, 128), (192, 256)]
)
def test_roba_rounds_ties_up_but_for_three(x, power):
    assert roba_rounded(x) == power
    # 7 rounds to 8, which leaves R(x)·7 + 8·x − 8·R(x).
    assert roba().table[x, 7] == 8 * x - power


@pytest.mark.parametrize("bits", range(2, 9))
def test_roba_published_largest_error(bits):
    m = roba(bits)
    assert m.metrics()["WCRE%"] == pytest.approx(11.1, abs=0.02)
    assert m.table[3, 3] == 8
    powers = 2 ** torch.arange(bits)
    assert (m.error()[powers] == 0).all()
    assert (m.error()[:, powers] == 0).all()
    if bits > 2:
        assert m.error().min() < 0 < m.error().max()


def test_roba_published_largest_error_at_16_bits():
    a, w = random_operands(16)
    assert 100 * np.abs(ROBA.unsigned(a, w) / (a * w) - 1).max() == pytest.approx(11.1, abs=0.02)


@pytest.mark.parametrize(
    ("bits", "m"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 4), (5, 3), (6, 4), (7, 2), (8, 1), (8, 4), (8, 7)]
)
def test_dsm(bits, m):
    cut = dsm(m, bits)
    assert_is(cut, lambda a, w: dsm_reference(a, w, m))
    assert cut.error().max() == 0
    assert cut.metrics()["WCRE%"] < 100 * (1 - (1 - 1 / (2 ** (m - 1) + 1)) ** 2)


def test_dsm_worked_example():
    assert dsm(3).table[0b10010110, 3] == (0b100 << 5) * 3
    assert dsm(4).table[0b00010110, 0b11111111] == 0b10110 * 0b11110000
    assert dsm(8) == Multiplier.exact(8, False, False)


@pytest.mark.parametrize(("m", "published"), [(6, 97.8), (8, 99.4)])
def test_dsm_published_accuracy_at_16_bits(m, published):
    a, w = random_operands(16)
    assert accuracy(DSM.unsigned(a, w, m=m), a, w) == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(
    ("bits", "m"), [(2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (5, 3), (6, 3), (7, 4), (7, 6), (8, 4), (8, 5), (8, 7)]
)
def test_ssm(bits, m):
    cut = ssm(m, bits)
    assert_is(cut, lambda a, w: ssm_reference(a, w, m, bits))
    assert cut.error().max() == 0
    step = 2 ** (bits - m)
    assert cut.metrics()["WCRE%"] == pytest.approx(100 * (1 - (1 - (step - 1) / (2**m + step - 1)) ** 2))


def test_ssm_worked_example():
    assert ssm(4).table[0b00010111, 0b1011] == 0b10000 * 0b1011
    assert ssm(5).table[0b11011111, 0b00111111] == 0b11011000 * 0b00111000
    assert ssm(5).error()[:32, :32].abs().max() == 0
    assert ssm(8) == Multiplier.exact(8, False, False)
    assert ssm(4, a_signed=True, w_signed=True).table[-15, -128] == 15 * 128


@pytest.mark.parametrize(("m", "published"), [(8, 98.0), (10, 99.6)])
def test_ssm_published_accuracy_at_16_bits(m, published):
    a, w = random_operands(16)
    assert accuracy(SSM.unsigned(a, w, m=m, bits=16), a, w) == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(("bits", "m"), [(4, 2), (5, 3), (6, 4), (7, 5), (8, 4), (8, 6)])
def test_essm(bits, m):
    cut = essm(m, bits)
    assert_is(cut, lambda a, w: essm_reference(a, w, m, bits))
    assert cut.error().max() == 0
    assert (cut.error() >= ssm(m, bits).error()).all()
    assert cut.metrics()["MAE"] < ssm(m, bits).metrics()["MAE"]


def test_essm_worked_example():
    assert essm(4).table[0b00010111, 0b1011] == 0b10100 * 0b1011
    assert essm(4).table[0b01010111, 0b00111111] == 0b01010000 * 0b00111100


def test_essm_published_accuracy_at_16_bits():
    a, w = random_operands(16)
    # The paper prints 99 % and 99.0 %; this is 98.9 %.
    assert accuracy(ESSM.unsigned(a, w, m=8, bits=16), a, w) == pytest.approx(99, abs=0.2)


@pytest.mark.parametrize(
    ("bits", "k"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 2), (6, 3), (7, 3), (8, 1), (8, 2), (8, 4)]
)
def test_etm(bits, k):
    m = etm(k, bits)
    assert_is(m, lambda a, w: etm_reference(a, w, k))
    small = 2**k
    assert m.error()[:small, :small].abs().max() == 0
    assert m.table[small - 1, small - 1] == (small - 1) ** 2


def test_etm_worked_example():
    m = etm(4)
    assert m.table[0b0011_0010, 0b0101_0100] == 0b00001111_0111_1111
    # A bit of either operand is enough, both are no more, and where there is none the low part is zero.
    assert m.table[0b0011_0100, 0b0101_0000] == m.table[0b0011_0100, 0b0101_0100] == 0b00001111_0111_1111
    assert m.table[0b0011_0001, 0b0101_0000] == 0b00001111_0001_1111
    assert m.table[0b0011_0000, 0b0101_0000] == 0b00001111_0000_0000
    # One high part that is not zero is enough to keep the low parts from being multiplied.
    assert m.table[0b0000_1001, 0b0001_0000] == 0b11111111
    assert m.table[0, 0b0001_0001] == 0b11111
    assert etm(4, a_signed=True).table[0, 0b0001_0001] == 0


def test_etm_at_the_12_bits_of_the_paper():
    a, w = np.array([0b110101_000110, 0b000000_101101]), np.array([0b001010_010010, 0b000000_011001])
    assert ETM.unsigned(a, w, k=6).tolist() == [(53 * 10 << 12) + 0b011111_111111, 45 * 25]


def test_etm_accuracies_at_12_bits_lie_where_the_paper_s_samples_do():
    a, w = np.meshgrid(np.arange(1, 2**12), np.arange(1, 2**12), indexing="ij")
    accuracy = 100 * (1 - np.abs(ETM.unsigned(a, w, k=6) / (a * w) - 1))
    assert 94 <= np.median(accuracy) <= accuracy.max() == 100
    assert np.median(accuracy) == pytest.approx(96.4, abs=0.05)
    assert (accuracy >= 94).mean() == pytest.approx(0.71, abs=0.005)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.stem)
def test_every_name_builds_in_the_four_formats(family):
    names = list(family.names())
    assert len(names) == len(set(names)) >= 24
    for name in names:
        m = family.from_name(name)
        assert m.name == name
        assert m.a_bits == m.w_bits == int(name.rstrip("us").rsplit("_", 1)[1])


@pytest.mark.parametrize("stem", ["perf_j1_k2", "roba", "dsm2", "ssm2", "essm2", "etm1", "dsm3", "ssm3", "etm2"])
def test_signed_operands_enter_by_magnitude(stem):
    bits = 4

    def build(formats):
        return next(m for family in FAMILIES if (m := family.from_name(f"{stem}_{formats}")))

    table = build("4u").table
    signed, mixed, other = build("4s"), build("4u_4s"), build("4s_4u")
    assert signed == build("4u").sign_magnitude()
    assert [(m.a_signed, m.w_signed) for m in (mixed, other)] == [(False, True), (True, False)]
    for code in range(2**bits):
        value = code - 2**bits if code >= 2 ** (bits - 1) else code
        sign = (value > 0) - (value < 0)
        assert torch.equal(mixed.table[:, code], sign * table[:, abs(value)])
        assert torch.equal(other.table[code], sign * table[abs(value)])


@pytest.mark.parametrize(
    ("family", "name", "build"),
    [
        (PERFORATED, "perf_j1_k2_8u", lambda: perforated(1, 2)),
        (PERFORATED, "perf_j0_k3_4s", lambda: perforated(0, 3, 4, True, True)),
        (ROBA, "roba_5u", lambda: roba(5)),
        (DSM, "dsm4_8u_8s", lambda: dsm(4, w_signed=True)),
        (SSM, "ssm5_8s_8u", lambda: ssm(5, a_signed=True)),
        (ESSM, "essm6_8u", lambda: essm(6)),
        (ETM, "etm3_6u", lambda: etm(3, bits=6)),
    ],
)
def test_a_name_and_its_function_build_the_same(family, name, build):
    assert family.from_name(name) == build()
    assert build().name == name
    assert [other for other in FAMILIES if other.from_name(name) is not None] == [family]


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (PERFORATED, "perf_j8_k1_8u", "j must be an int from 0 to 7, got 8"),
        (PERFORATED, "perf_j0_k0_8u", "k must be an int from 1 to 7, got 0"),
        (PERFORATED, "perf_j0_k4_4u", "k must be an int from 1 to 3, got 4"),
        (ROBA, "roba_9u", "bits must be an int from 2 to 8, got 9"),
        (DSM, "dsm0_8u", "m must be an int from 1 to 8, got 0"),
        (DSM, "dsm5_4u_4s", "m must be an int from 1 to 4, got 5"),
        (SSM, "ssm3_8u", "m must be an int from 4 to 8, got 3"),
        (SSM, "ssm3_7u", "m must be an int from 4 to 7, got 3"),
        (SSM, "ssm9_8u", "m must be an int from 4 to 8, got 9"),
        (ESSM, "essm5_8u", "m must be an int: 4 or 6, got 5"),
        (ESSM, "essm3_6u", "m must be an int: 4, got 3"),
        (ESSM, "essm2_3u", "bits must be an int from 4 to 8, got 3"),
        (ETM, "etm5_8u", "k must be an int from 1 to 4, got 5"),
        (ETM, "etm2_3u", "k must be an int: 1, got 2"),
        (ETM, "etm4_8u_4u", "same width, got 8 and 4 bits"),
    ],
)
def test_a_well_formed_name_out_of_range_says_the_range(family, name, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        family.from_name(name)


@pytest.mark.parametrize("name", ["perf_j1_8u", "perf_k1_j1_8u", "roba2_8u", "dsm_8u", "dsm04_8u", "ssm4_8u_8u", "etm"])
def test_names_of_no_member(name):
    assert all(family.from_name(name) is None for family in FAMILIES)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, -1, 99, np.bool_(True)])
def test_arguments_of_the_wrong_type_or_range(value):
    for build, argument in [
        (lambda v: perforated(v, 1), "j"),
        (lambda v: perforated(0, v), "k"),
        (lambda v: perforated(0, 1, v), "bits"),
        (lambda v: roba(v), "bits"),
        (lambda v: dsm(v), "m"),
        (lambda v: dsm(1, v), "bits"),
        (lambda v: ssm(v), "m"),
        (lambda v: ssm(4, v), "bits"),
        (lambda v: essm(v), "m"),
        (lambda v: essm(4, v), "bits"),
        (lambda v: etm(v), "k"),
        (lambda v: etm(1, v), "bits"),
    ]:
        with pytest.raises(ValueError, match=f"^{argument} must be an int.* got "):
            build(value)


def test_numpy_ints_are_ints():
    assert ssm(np.uint8(5), np.uint8(8)) == ssm(5)
    assert essm(np.int64(4), np.uint8(8)) == essm(4)
    assert perforated(np.uint8(7), np.uint8(7)).name == "perf_j7_k7_8u"
