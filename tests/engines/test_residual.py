"""8-bit row tables, of narrow tables and of what others lack of the exact product, against the oracle; their choice."""

import itertools

import pytest
import torch

from approxconv import EngineError, Multiplier, explain, get_multiplier
from approxconv.engines import choose, cost, cpu, reference, residual
from approxconv.engines.cost import Rates
from approxconv.engines.cpu import row_tables
from approxconv.engines.cpu.row_tables import FLUSH, STEPS, TILE
from approxconv.engines.work import Work, last_seconds
from approxconv.multiplier import operand_values, prepare_bytes
from approxconv.operators import Conv2dArgs

SIGNS = list(itertools.product((False, True), repeat=2))
INTERVAL = FLUSH * STEPS  # k's between two flushes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def product(bits=(8, 8), signs=(False, True)):
    values = (torch.from_numpy(operand_values(n, signed)).int() for n, signed in zip(bits, signs, strict=True))
    return torch.outer(*values)


def rest(low=-128, span=255, bits=(8, 8), seed=0):
    """Random entries, both ends among them; none is 0 at code 0."""
    entries = torch.randint(low, low + span + 1, [2**n for n in bits], dtype=torch.int32, generator=generator(seed))
    entries[0], entries[-1, 0], entries[0, 0] = low + span, low, low + span - 1
    return entries


def near(bits=(8, 8), signs=(False, True), **how):
    return product(bits, signs) + rest(bits=bits, **how)


NARROW = {"narrow": rest(), "far": rest(10**6), "few values": rest(7, 3), "4x6": rest(-3, bits=(4, 6))}
NEAR = {
    "u8 s8": near(),
    "u8 u8": near(signs=(False, False), low=-(10**5)),
    "s8 u8": near(signs=(True, False), low=0),
    "s8 s8": near(signs=(True, True), low=10**6, span=200),
    "4x6": near((4, 6), (True, False), low=-100),
    "8x2": near((8, 2), (False, True)),
}
every_table = pytest.mark.parametrize(
    ("engine", "table"),
    [(cpu, table) for table in NARROW.values()] + [(residual, table) for table in NEAR.values()],
    ids=[*NARROW, *NEAR],
)


@pytest.fixture
def seen(monkeypatch):
    """Entries of the row tables that were used."""
    entries, original = [], row_tables._product_sum

    def product_sum(x, w, table, *others):
        entries.append(table.dtype)
        original(x, w, table, *others)

    monkeypatch.setattr(row_tables, "_product_sum", product_sum)
    return entries


def check(engine, operator, *arguments):
    y = getattr(engine, operator)(*arguments)
    assert y.dtype == torch.int32
    assert torch.equal(y, getattr(reference, operator)(*arguments))


@every_table
@pytest.mark.parametrize(
    ("rows", "lanes", "depth"),
    [(901, 33, 5), (40, 64, 37), (20, 65, 4), (830, 130, 1), (1, 64, 50), (130, 1, 19), (35, 200, INTERVAL + 21)],
)
def test_matmul(engine, table, rows, lanes, depth, seen):
    check(engine, "lut_matmul", codes(rows, 2 * depth)[:, ::2], codes(lanes, depth, seed=1), table)
    if engine is residual or min(rows, lanes) > TILE:
        assert seen == [torch.uint8]


@every_table
def test_convolutions(engine, table, seen):
    pad_code = 77
    x, last = codes(3, 18, 12, 13), codes(2, 19, 24, 23, seed=3).to(memory_format=torch.channels_last)
    check(engine, "lut_conv2d", x, codes(80, 9, 3, 2, seed=1), table, (2, 1), (1, 2), (1, 2), 2, pad_code)
    check(engine, "lut_conv2d", last, codes(65, 19, 3, 3, seed=2), table, (1, 1), (1, 1), (1, 1), 1, pad_code)
    check(engine, "lut_conv2d", last, codes(70, 19, 1, 1, seed=2), table, (1, 1), (0, 0), (1, 1), 1, pad_code)
    assert seen == [torch.uint8] * 3
    check(engine, "lut_dwconv2d", x, codes(36, 1, 3, 3, seed=4), table, (2, 1), (1, 2), (1, 1), pad_code)


@pytest.mark.parametrize("depth", [INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL, 3 * INTERVAL + STEPS + 1])
@pytest.mark.parametrize("entries", [(-128, -128), (127, 127), (127, -128)], ids=["all low", "all high", "alternating"])
def test_sums_at_the_ends_of_16_bits(depth, entries):
    """Entry (1, 1) is the end of the range that the others leave open; lanes and rows take all, none and half of it."""
    table = torch.full((256, 256), entries[0], dtype=torch.int32)
    table[:, 1::2] = entries[1]
    table[9, 9], table[9, 10] = -128, 127
    x, w = torch.ones(64, depth, dtype=torch.uint8), torch.zeros(67, depth, dtype=torch.uint8)
    x[1::2, ::3], w[::3], w[1::3, ::2] = 2, 1, 1
    check(cpu, "lut_matmul", x, w, table)
    check(residual, "lut_matmul", x, w, table + product())


def test_a_pass_more_would_overflow():
    assert FLUSH * STEPS * 255 < 2**16 <= (FLUSH + 1) * STEPS * 255


@pytest.mark.parametrize("parts", [1, 3])
def test_channels_in_parts(parts, monkeypatch):
    monkeypatch.setattr(row_tables, "_SCRATCH_WORKER", 3000 * parts)
    x, w = codes(1, 60, 9, 9), codes(66, 60, 3, 3, seed=1)
    for engine, table in ((cpu, NARROW["far"]), (residual, NEAR["u8 s8"])):
        check(engine, "lut_conv2d", x, w, table, (1, 1), (1, 1), (1, 1), 1, 200)


def test_batches():
    for engine, table in ((cpu, NARROW["far"]), (residual, NEAR["u8 s8"])):
        check(engine, "lut_matmul", codes(2, 3, 50, 20), codes(3, 70, 20, seed=1), table)


@pytest.mark.parametrize("signs", SIGNS)
def test_the_most_that_the_rest_may_span(signs):
    x, w = codes(9, 21), codes(70, 21, seed=1)
    check(residual, "lut_matmul", x, w, near(signs=signs, span=255))
    wide = near(signs=signs, low=-60, span=256)
    with pytest.raises(EngineError, match=r"go from -60 to 196, which is 256 and must be 255"):
        torch.ops.approxconv.lut_matmul(x, w, wide, engine="residual")
    with pytest.raises(EngineError, match="must be 255"):
        residual.lut_dwconv2d(codes(1, 3, 5, 5), codes(3, 1, 3, 3), wide, (1, 1), (1, 1), (1, 1), 0)


@pytest.mark.parametrize("low", [2**31 - 1 - 255, -(2**31)])
def test_entries_at_the_ends_of_int32(low):
    x, w = codes(40, 1), codes(70, 1, seed=1)
    check(cpu, "lut_matmul", x, w, rest(low))
    ends = product((2, 2), (True, True)) + torch.full((4, 4), 2**31 - 5 if low > 0 else 2 - 2**31, dtype=torch.int32)
    ends[1, 1] = 2**31 - 1 if low > 0 else -(2**31)  # beside the product 2^31 - 2, or less than int32 holds
    check(residual, "lut_matmul", x, w, ends)


def test_bytes_of_a_table():
    assert prepare_bytes(rest(5, 256)) is None
    known = prepare_bytes(rest(5, 255, (4, 8)))
    assert (known.low, known.high, known.offset, known.entry) == (5, 260, 5, "uint8")
    assert torch.equal(known.rows.int() + 5, rest(5, 255, (4, 8)).repeat(16, 1))


def test_a_table_that_is_written_to_is_split_anew():
    x, w, table = codes(40, 21), codes(70, 21, seed=1), near(span=200)
    for _ in range(2):
        check(residual, "lut_matmul", x, w, table)
        table[3] -= 9


def test_another_device_is_refused():
    assert "CPU tensors" in residual.unavailable(torch.device("meta"))


# A lookup of 16 bits costs as much as 10 products, one of 8 bits a half; all else nothing.
RATES = Rates(0.0, 1e-9, 0.0, 1e-9, 1e-10, 0.0, 0.0, 0.0, 1e-9, 0.0, 1e-10, 0.0, 0.0, 5e-10, 0.0)
LARGE = Work.matmul((4096, 256), (64, 256))


def of_rank(rank):
    f, g = (torch.randint(-5, 6, (256, rank), dtype=torch.int32, generator=generator(side)) for side in (0, 1))
    return product() + (f @ g.T).clamp(-128, 127)


class TestChoice:
    @pytest.fixture(autouse=True)
    def rates(self, monkeypatch):
        monkeypatch.setattr(cost, "measured_rates", lambda: RATES)

    @pytest.mark.parametrize(
        ("table", "work", "engine"),
        [
            (near(), LARGE, "residual"),
            (of_rank(2), LARGE, "factored"),
            (near(span=256), LARGE, "cpu"),
            (rest(), LARGE, "cpu"),
            (near(), Work.matmul((4096, 256), (32, 256)), "cpu"),
            (near(), Work.matmul((64, 256), (64, 256)), "cpu"),
            (near(), Work("lut_dwconv2d", 64, 9999, 1, 9, 64 * 9999), "cpu"),
        ],
        ids=["high rank", "low rank", "too far", "narrow itself", "few lanes", "small", "depthwise"],
    )
    def test_auto_takes_what_should_be_faster(self, table, work, engine):
        name, module = choose("auto", table, work)
        assert name == engine
        assert module.__name__ == f"approxconv.engines.{engine}"

    def test_seconds_follow_from_the_rates(self):
        work = Work.matmul((100, 50), (65, 50))
        rows = 128 * 50 * 100 * 5e-10
        assert cost.seconds("residual", work, 1) == pytest.approx(work.macs * 1e-10 + rows)
        assert cost.seconds("cpu", work, narrow=True) == pytest.approx(rows)
        few = Work.matmul((100, 50), (32, 50))
        assert cost.seconds("cpu", few, narrow=True) == cost.seconds("cpu", few) == pytest.approx(few.macs * 1e-9)

    def test_auto_computes_with_the_engine_it_takes(self):
        x, w, table = codes(1030, 64), codes(64, 64, seed=1), near()
        y = torch.ops.approxconv.lut_matmul(x, w, table)
        assert last_seconds("residual", Work.matmul(x.shape, w.shape)) > 0
        assert torch.equal(y, reference.lut_matmul(x, w, table))

    def test_explain_shows_what_was_weighed(self):
        conv, shape = Conv2dArgs(64, 64, 3, padding=1), (2, 64, 16, 16)
        found = explain(conv, shape, Multiplier(near(), a_signed=False, w_signed=True))
        assert [(each.engine, each.products) for each in found.candidates] == [("residual", 1), ("cpu", 0)]
        assert [each.predicted for each in found.candidates] == pytest.approx([1 / 0.6, 1.0])
        assert "row tables of 8-bit residuals should take less than row tables; the table has no fact" in found.reason
        few = explain(conv, shape, Multiplier(of_rank(2), a_signed=False, w_signed=True))
        assert [each.engine for each in few.candidates] == ["factored", "residual", "cpu"]
        assert "should take less than the exact product and row tables of 8-bit residuals and row tables" in few.reason
        narrow = explain(conv, shape, Multiplier(rest(), a_signed=False, w_signed=True))
        assert [(each.engine, each.predicted) for each in narrow.candidates] == [("cpu", pytest.approx(2.0))]
        far = explain(conv, shape, Multiplier(near(span=256), a_signed=False, w_signed=True))
        assert "no factorisation of at most 64 terms, and beside the exact product its entries span more" in far.reason
        few = explain(conv, shape, get_multiplier("exact_8s"))
        assert [each.engine for each in few.candidates] == ["factored", "cpu"]
        assert few.reason == "1 product of 8-bit integers should take less than row tables"
