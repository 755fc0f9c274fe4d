"""Products of few rows by byte shuffles equal the oracle's; where the CPU has none, others take their place."""

import pytest
import torch

from approxconv.engines import cpu, reference
from approxconv.engines.cpu import few_rows, row_tables
from approxconv.engines.cpu.few_rows import MAX_ROWS, MIN_DEPTH

TABLES = {"int16": (-30000, 30000), "of a span beyond 16 bits": (-70000, 70000), "uint8": (3, 200)}


def draw(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draw_table(entries, bits=(8, 8)):
    size = tuple(2**b for b in bits)
    return torch.randint(*TABLES[entries], size, dtype=torch.int32, generator=torch.Generator().manual_seed(5))


def check(x, w, table):
    assert torch.equal(cpu.lut_matmul(x, w, table), reference.lut_matmul(x, w, table))
    assert torch.equal(cpu.lut_matmul(w, x, table), reference.lut_matmul(w, x, table))


@pytest.fixture
def served(monkeypatch):
    """How many products went by shuffles."""
    calls = []
    real = few_rows.few_rows_matmul
    monkeypatch.setattr(row_tables, "few_rows_matmul", lambda *a, **k: (calls.append(1), real(*a, **k)))
    return calls


@pytest.mark.parametrize("entries", TABLES)
@pytest.mark.parametrize(
    ("rows", "lanes", "depth"),
    [(1, 1000, 512), (1, 1, 64), (3, 130, 65), (MAX_ROWS, 63, 127), (2, 129, 4100), (1, 128, 2049), (5, 64, 200)],
)
def test_equals_the_oracle(rows, lanes, depth, entries, served):
    check(draw(rows, depth), draw(lanes, depth, seed=1), draw_table(entries))
    assert len(served) == 2 * few_rows.SHUFFLES


@pytest.mark.parametrize(("rows", "depth"), [(MAX_ROWS + 1, 64), (1, MIN_DEPTH - 1)])
def test_more_rows_and_shorter_ones_go_the_other_way(rows, depth, served):
    check(draw(rows, depth), draw(MAX_ROWS + 8, depth, seed=1), draw_table("int16"))
    assert not served


def test_only_the_low_bits_of_narrow_codes_count():
    check(draw(2, 70), draw(90, 70, seed=1), draw_table("int16", bits=(5, 3)))


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_of_any_strides(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w, table = draw(3, 2, 4, 140), draw(2, 300, 140, seed=1), draw_table("int16")
        check(x, w, table)
        check(x[..., ::2], w[..., :70], table)
        check(x[..., ::2], w[..., ::2], table)  # those of w lie apart: not by shuffles
        check(x.flip(2)[:, :, 1:3].transpose(0, 1).contiguous().transpose(0, 1), w.expand(3, 2, 300, 140), table)
        check(draw(70, 4, seed=2).T, draw(70, 90, seed=3).T, table)
    finally:
        torch.set_num_threads(before)


def test_the_last_row_is_read_to_its_end_and_no_further():
    codes = draw(2**16)
    table = draw_table("int16")
    for depth in (64, 100, 127):
        w = codes[-5 * depth :].view(5, depth)
        check(draw(1, depth), w, table)


def test_without_shuffles_it_is_the_same(monkeypatch, served):
    monkeypatch.setattr(few_rows, "SHUFFLES", False)
    check(draw(2, 80), draw(40, 80, seed=1), draw_table("int16"))
    assert not served
