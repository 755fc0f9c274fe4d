"""The Numba engine equals the oracle, whatever table, shape, memory layout, thread, process or memory it gets."""

import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from approxconv.engines import cpu, reference
from approxconv.engines.cpu import row_tables, shuffles
from approxconv.engines.cpu.depthwise import MAX_PLANE, PLANE
from approxconv.engines.cpu.row_tables import BUILD_ROWS, FEW_STEPS, MAX_ROWS, MIN_ROWS, STEPS, TILE
from approxconv.engines.cpu.shuffles import BAND, BYTES, CODES, MAX_TAPS, RUN
from approxconv.engines.cpu.vectors import LANES

# name: (lowest entry, highest entry, sides)
RANGES = {
    "int16": (-(2**15), 2**15 - 1, (256, 256)),
    "offset": (0, 65025, (256, 256)),
    "offset_far_up": (10**6, 10**6 + 65535, (256, 256)),
    "offset_down": (-90_000, -30_000, (256, 256)),
    "wide": (-(2**20), 2**20, (256, 256)),
    "one_too_wide_for_int16": (0, 65536, (256, 256)),
    "4x6": (-500, 500, (16, 64)),
    "8x2": (-(2**20), 2**20, (256, 4)),
    "2x8": (0, 65025, (4, 256)),
    "code_0_only": (-(2**15), 2**15 - 1, (256, 256)),
}


def make_table(name):
    """Random, so neither commutative nor zero-preserving, and with both ends of its range in it."""
    low, high, sides = RANGES[name]
    table = torch.randint(low, high + 1, sides, dtype=torch.int32, generator=torch.Generator().manual_seed(len(name)))
    table[0, 0], table[0, -1], table[-1, 0] = 64, low, high
    if name == "code_0_only":  # where a tail padded with code 0 weighs most
        table[1:, 1:] = 0
    elif low > 64 or high < 64:
        table[0, 0] = low
    return table


TABLES = {name: make_table(name) for name in RANGES}


def tables(*names):
    return pytest.mark.parametrize("table", [TABLES[name] for name in names], ids=names)


some_tables = tables("offset", "wide")  # 16-bit entries and an offset, 32-bit entries
more_tables = tables("offset", "wide", "4x6", "code_0_only")


def codes(generator, *shape):
    """Any bytes: the bits above a narrow operand's are noise."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def permuted(order):
    """A layout that stores the dimensions in `order`."""
    inverse = [order.index(i) for i in range(4)]
    return lambda generator, *shape: codes(generator, *(shape[i] for i in order)).permute(inverse)


def sliced(generator, *shape):
    return codes(generator, *(2 * n + 3 for n in shape))[tuple(slice(1, 1 + 2 * n, 2) for n in shape)]


def expanded(*dims):
    """A layout with stride 0 along `dims`."""
    return lambda generator, *shape: codes(
        generator, *(1 if i % len(shape) in {d % len(shape) for d in dims} else n for i, n in enumerate(shape))
    ).expand(shape)


LAYOUTS = {
    "contiguous": codes,
    "channels_last": permuted((0, 2, 3, 1)),
    "transposed": permuted((1, 3, 2, 0)),
    "columns_first": permuted((0, 1, 3, 2)),
    "sliced": sliced,
    "expanded": expanded(0, 3),
    "one_channel_expanded": expanded(1),
    "channels_last_sliced": lambda generator, *shape: permuted((0, 2, 3, 1))(
        generator, shape[0], shape[1] + 2, shape[2], 2 * shape[3]
    )[:, 1:-1, :, ::2],
}


def layouts(generator, x_shape, w_shape):
    """Operands in every layout: x's and w's go round at different speeds, so both meet strange partners."""
    names = list(LAYOUTS)
    for i, name in enumerate(names):
        other = names[(3 * i + 2) % len(names)]
        yield f"x {name}, w {other}", LAYOUTS[name](generator, *x_shape), LAYOUTS[other](generator, *w_shape)


@pytest.fixture
def little_scratch(monkeypatch):
    """Blocks of few rows, and few channels at a time."""
    monkeypatch.setattr(row_tables, "_SCRATCH_WORKER", 3000)


def run(engine, operator, *arguments):
    return getattr(engine, operator)(*arguments)


def oracle(operator, *arguments):
    """On one thread: torch's own wait for each other by spinning, which takes seconds where the cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(reference, operator, *arguments)
    finally:
        torch.set_num_threads(threads)


def check(operator, *arguments, label="", ways=("",)):
    """In all `ways`: an iterable that prepares each, and names it."""
    expected = oracle(operator, *arguments)
    for way in ways:
        y = run(cpu, operator, *arguments)
        assert (y.dtype, y.shape, y.is_contiguous()) == (torch.int32, expected.shape, True)
        assert torch.equal(y, expected), f"{label} {way}"


# Matrix products


FEW = BUILD_ROWS // (TILE - 1)  # the most rows that a tile of columns gathers for
SIZES = [
    (1, 1),
    (1, TILE + 1),
    (3, 2 * TILE - 1),
    (FEW, TILE),
    (FEW + 1, TILE),
    (FEW + 1, 3 * TILE + 1),
    (BUILD_ROWS, 2),
    (BUILD_ROWS + 1, 2),
    (MIN_ROWS - 1, 3),
    (2 * MIN_ROWS + 1, TILE - 1),
    (MAX_ROWS - 1, TILE),
    (MAX_ROWS, 1),
    (MAX_ROWS + 1, TILE + 2),
    (2 * MAX_ROWS + 1, 2),
]


@tables(*TABLES)
@pytest.mark.parametrize("size", SIZES)
def test_matmul(table, size):
    generator = torch.Generator().manual_seed(1)
    depths = {1, STEPS - 1, STEPS, STEPS + FEW_STEPS, 2 * STEPS + 1, 8 * STEPS + FEW_STEPS + 1}
    for depth, (rows, columns) in itertools.product(sorted(depths), (size, size[::-1])):
        check("lut_matmul", codes(generator, rows, depth), codes(generator, columns, depth), table)


@some_tables
@pytest.mark.parametrize("size", [(5, 7), (70, 40), (3, 600), (MIN_ROWS + 1, TILE + 1)])
@pytest.mark.parametrize("turn", [False, True])
def test_matmul_of_strided_operands(table, size, turn, little_scratch):
    generator = torch.Generator().manual_seed(2)
    rows, columns = size[::-1] if turn else size
    depth = 2 * STEPS + 5
    ways = {
        "contiguous": lambda *shape: codes(generator, *shape),
        "transposed": lambda *shape: codes(generator, *shape[::-1]).T,
        "sliced": lambda *shape: sliced(generator, *shape),
        "rows_expanded": lambda *shape: expanded(0)(generator, *shape),
        "depth_expanded": lambda *shape: expanded(1)(generator, *shape),
    }
    for x_way, w_way in itertools.product(ways.values(), repeat=2):
        check("lut_matmul", x_way(rows, depth), w_way(columns, depth), table)


# name: (x's shape, w's shape)
BATCHES = {
    "shared_w": ((2, 3, 4, 9), (5, 9)),
    "shared_x": ((4, 9), (2, 3, 5, 9)),
    "own_w": ((3, 40, 9), (3, 17, 9)),
    "broadcast_both_ways": ((2, 1, 4, 7), (3, 6, 7)),
    "broadcast_in_the_middle": ((2, 1, 3, 4, 7), (1, 5, 1, 6, 7)),
    "size_1": ((1, 1, 1, 1), (1, 1, 1)),
    "one_column": ((5, 6, 8), (5, 1, 8)),
    "one_row": ((5, 1, 8), (5, 6, 8)),
    "many_of_one_row": ((2, 300, 1, 3), (2, 3)),
}


@some_tables
@pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES)
def test_batched_matmul(table, case):
    generator = torch.Generator().manual_seed(3)

    def ways(shape):
        lead = len(shape) - 2
        yield codes(generator, *shape)
        yield codes(generator, *shape).mT.contiguous().mT
        yield codes(generator, *shape[:lead][::-1], *shape[lead:]).permute(*reversed(range(lead)), lead, lead + 1)
        yield sliced(generator, *shape)
        for dim in range(lead):
            yield expanded(dim)(generator, *shape)

    for x, w in itertools.product(ways(case[0]), ways(case[1])):
        check("lut_matmul", x, w, table)


@pytest.mark.parametrize("size", [(MAX_ROWS, 1), (MAX_ROWS, TILE + 1), (1, MAX_ROWS)])
@some_tables
def test_matmul_deeper_than_the_scratch(size, table, set_threads):
    set_threads(1)  # more threads would take fewer rows each
    generator = torch.Generator().manual_seed(4)
    depth = row_tables._SCRATCH_WORKER // MAX_ROWS + 9
    check("lut_matmul", codes(generator, size[0], depth), codes(generator, size[1], depth), table)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("depth", [1, 3, STEPS, 2 * STEPS + 1])
@pytest.mark.parametrize("size", [(2, 3), (FEW + 1, TILE)])
@pytest.mark.parametrize("span", [0, 2**16 - 1, 2**16])
def test_sums_next_to_the_ends_of_int32(sign, depth, size, span):
    generator = torch.Generator().manual_seed(5)
    end = (2**31 - 1) // depth
    table = sign * torch.randint(end - span, end + 1, (256, 256), generator=generator)
    table[:, -1], table[-1, :] = sign * end, sign * (end - span)
    x, w = codes(generator, size[0], depth), codes(generator, size[1], depth)
    x[0], w[0] = 0, 255
    check("lut_matmul", x, w, table.int())


@some_tables
@pytest.mark.parametrize("depth", [1, FEW_STEPS + 1, STEPS, STEPS + 7])
def test_few_codes(table, depth):
    """Tables are built only for the codes that occur, by the block that one vector of entries covers."""
    generator = torch.Generator().manual_seed(13)
    w = codes(generator, TILE + 1, depth)
    for first, last in ((0, 0), (255, 255), (7, 8), (15, 16), (16, 31), (1, 254), (127, 128), (200, 203)):
        x = torch.randint(first, last + 1, (BUILD_ROWS, depth), dtype=torch.uint8, generator=generator)
        x[0], x[-1] = first, last
        check("lut_matmul", x, w, table, label=f"{first} to {last}")


@pytest.mark.parametrize("entry", [-(2**15), 2**15 - 1, -(2**31) // (3 * STEPS), (2**31 - 1) // (3 * STEPS)])
@pytest.mark.parametrize("depth", [2, FEW_STEPS, 3 * STEPS])
def test_all_entries_at_an_end(entry, depth):
    """Sums of two 16-bit entries, and of more, overflow 16 bits."""
    generator = torch.Generator().manual_seed(14)
    table = torch.full((256, 256), entry, dtype=torch.int32)
    table[0, 0] = -entry - 1 if abs(entry) <= 2**15 else entry  # both ends: no offset can make the others small
    check("lut_matmul", codes(generator, BUILD_ROWS, depth), codes(generator, TILE, depth), table)


# Convolutions


CONVOLUTIONS = {  # batch, channels, size, filters, kernel, stride, padding, dilation, groups
    "one_of_everything": (1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "not_square": (2, 3, (9, 7), 10, (3, 2), (1, 2), (1, 0), (1, 1), 1),
    "all_at_once": (1, 6, (8, 11), 9, (2, 3), (3, 1), (2, 3), (2, 1), 3),
    "one_group_a_channel": (3, 5, (6, 6), 10, (3, 3), (1, 1), (1, 1), (1, 2), 5),
    "four_filters_a_channel": (2, 3, (7, 30), 12, (3, 3), (2, 1), (1, 1), (1, 1), 3),
    "kernel_larger_than_input": (1, 2, (2, 2), 18, (3, 3), (2, 2), (4, 4), (1, 1), 2),
    "kernel_is_the_padded_input": (1, 4, (3, 2), 5, (7, 6), (1, 1), (2, 2), (1, 1), 1),
    "padding_larger_than_input": (2, 3, (2, 3), 17, (2, 2), (1, 1), (5, 7), (1, 1), 1),
    "patches_of_padding_only": (1, 2, (3, 3), 4, (2, 2), (7, 9), (6, 8), (1, 1), 1),
    "dilated_beyond_the_input": (1, 3, (5, 4), 20, (3, 3), (1, 2), (6, 8), (5, 7), 1),
    "stride_past_the_kernel": (2, 17, (13, 12), 16, (1, 1), (4, 5), (0, 0), (1, 1), 1),
    "channels_past_two_tiles": (2, 33, (6, 19), 35, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "wide_strides": (1, 32, (9, 70), 16, (1, 3), (2, 2), (0, 1), (1, 1), 1),
    "pointwise": (2, 70, (6, 7), 40, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "groups_of_tiles": (1, 64, (5, 9), 64, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "many_filters": (1, 2, (4, 3), 130, (2, 2), (1, 1), (0, 1), (1, 1), 1),
    "one_column": (2, 4, (40, 1), 6, (5, 1), (1, 1), (2, 0), (1, 1), 1),
    "one_row": (1, 4, (1, 300), 7, (1, 5), (1, 3), (0, 2), (1, 2), 1),
    "more_pixels_than_a_block": (1, 2, (70, 70), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "padded_pixels": (2, 18, (20, 37), 33, (3, 2), (2, 1), (3, 1), (2, 3), 1),
    "padded_pixels_beyond_the_input": (5, 35, (3, 7), 32, (3, 3), (1, 1), (4, 9), (1, 2), 1),
    "pointwise_strided": (2, 16, (29, 40), 32, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    "pointwise_padded": (3, 20, (13, 12), 40, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    "pointwise_with_as_many_outputs": (1, 5, (3, 4), 6, (1, 1), (2, 3), (2, 2), (1, 1), 1),
    "blocks_within_a_row": (1, 16, (2, MAX_ROWS + 200), 4, (2, 3), (1, 2), (1, 1), (1, 2), 1),
    "images_across_blocks": (600, 2, (3, 3), 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def check_conv2d(case, table, pad_code):
    batch, channels, size, filters, kernel, *geometry = case
    shapes = (batch, channels, *size), (filters, channels // geometry[-1], *kernel)
    for name, x, w in layouts(torch.Generator().manual_seed(6), *shapes):
        check("lut_conv2d", x, w, table, *geometry, pad_code, label=name)


@more_tables
@every_convolution
def test_conv2d(table, case):
    check_conv2d(case, table, 200)


@some_tables
@every_convolution
def test_conv2d_in_pieces(table, case, little_scratch):
    check_conv2d(case, table, 0)


@some_tables
@pytest.mark.parametrize("scratch", [6_000, 30_000, 60_000])
def test_conv2d_of_some_channels_at_a_time(table, scratch, monkeypatch):
    """Padded pixels of one block of 16 channels after the other, or of two; a padding code that x does not have."""
    monkeypatch.setattr(row_tables, "_SCRATCH_WORKER", scratch)
    generator = torch.Generator().manual_seed(15)
    for name in ("contiguous", "channels_last", "sliced"):
        x, w = LAYOUTS[name](generator, 2, 53, 21, 19), codes(generator, TILE + 3, 53, 3, 3)
        check("lut_conv2d", x % 90, w, table, (1, 1), (1, 2), (1, 1), 1, 255, label=name)


@pytest.mark.parametrize("filters", [1, TILE + 1])
def test_conv2d_with_more_channels_than_the_scratch_holds(filters, set_threads):
    set_threads(1)
    generator = torch.Generator().manual_seed(7)
    channels = row_tables._SCRATCH_WORKER // (9 * MAX_ROWS) + 3
    x, w = LAYOUTS["channels_last"](generator, 1, channels, 64, 64), codes(generator, filters, channels, 3, 3)
    check("lut_conv2d", x, w, TABLES["offset"], (1, 1), (1, 1), (1, 1), 1, 9)


# Depthwise convolutions


DEPTHWISE = {  # batch, channels, size, kernel, stride, padding, dilation
    "taps_1": (2, 3, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1)),
    "taps_2_strided": (1, 17, (6, 40), (1, 2), (1, 3), (0, 1), (1, 1)),
    "taps_3": (1, 16, (4, 20), (3, 1), (1, 1), (1, 0), (1, 1)),
    "taps_4": (1, 5, (9, 9), (2, 2), (1, 1), (1, 1), (1, 1)),
    "taps_9": (2, 18, (11, 13), (3, 3), (1, 1), (1, 1), (1, 1)),
    "taps_9_strided": (2, 33, (12, 37), (3, 3), (2, 2), (1, 1), (1, 1)),
    "taps_9_dilated": (1, 4, (12, 15), (3, 3), (1, 1), (4, 6), (2, 3)),
    "taps_9_strided_dilated": (1, 15, (12, 35), (3, 3), (3, 1), (0, 2), (1, 2)),
    "taps_15": (1, 3, (7, 9), (3, 5), (1, 1), (1, 2), (1, 1)),
    "taps_16": (1, 3, (9, 8), (4, 4), (1, 1), (2, 1), (1, 1)),
    "taps_17": (1, 17, (2, 30), (1, 17), (1, 1), (0, 8), (1, 1)),
    "taps_17_strided": (1, 2, (40, 3), (17, 1), (2, 1), (8, 0), (1, 1)),
    "taps_20": (1, 3, (8, 9), (4, 5), (1, 1), (1, 3), (2, 1)),
    "taps_25": (2, 4, (9, 10), (5, 5), (1, 1), (2, 2), (1, 1)),
    "taps_49": (1, 5, (9, 12), (7, 7), (1, 1), (3, 3), (1, 1)),
    "taps_49_strided": (1, 3, (15, 14), (7, 7), (2, 3), (3, 3), (1, 1)),
    "kernel_larger_than_input": (2, 3, (2, 3), (4, 5), (1, 1), (2, 3), (1, 1)),
    "kernel_is_the_padded_input": (1, 20, (3, 2), (5, 6), (1, 1), (1, 2), (1, 1)),
    "padding_larger_than_input": (1, 3, (2, 1), (2, 2), (1, 1), (5, 20), (1, 1)),
    "patches_of_padding_only": (1, 2, (3, 3), (2, 2), (7, 9), (6, 8), (1, 1)),
    "one_pixel": (1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "two_bands": (1, 3, (40, 70), (3, 3), (1, 1), (1, 1), (1, 1)),
    "strided_bands": (1, 2, (90, 61), (3, 3), (2, 2), (1, 1), (2, 1)),
    "a_row_a_band": (1, 1, (5, PLANE - 2), (3, 3), (1, 1), (1, 1), (1, 1)),
    "a_row_wider_than_a_band": (1, 2, (3, PLANE + 30), (2, 4), (1, 1), (0, 1), (1, 1)),
    # Shuffles move as many rows at once as fill a vector, and as end within a table's length of each other.
    "images_across_bands": (BAND // 64 + 2, 3, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "whole_channel_blocks": (3, 2 * LANES, (14, 14), (3, 3), (2, 2), (1, 1), (1, 1)),
    "rows_of_a_vector": (1, 3, (5, BYTES - 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "rows_past_a_vector": (2, LANES, (5, BYTES), (3, 3), (1, 1), (1, 1), (1, 1)),
    "rows_of_many_vectors": (2, 2, (4, 2 * RUN + 9), (3, 2), (1, 1), (1, 1), (1, 1)),
    "strided_rows_of_a_vector": (2, 3, (9, 2 * BYTES - 1), (3, 3), (2, 2), (1, 1), (1, 1)),
    "strided_rows_past_a_vector": (2, 3, (9, 2 * BYTES + 1), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride_4": (2, 2, (9, CODES + 8), (3, 5), (4, 4), (1, 2), (1, 1)),
    "stride_5": (2, 2, (11, CODES + 70), (3, 5), (5, 5), (1, 2), (1, 1)),
    "rows_far_apart": (2, 2, (20, 31), (3, 3), (9, 2), (1, 1), (1, 1)),
    "taps_128": (2, 2, (1, MAX_TAPS), (1, MAX_TAPS), (1, 1), (0, 5), (1, 1)),
    "taps_129": (1, 2, (3, 9), (3, MAX_TAPS // 3 + 1), (1, 1), (0, MAX_TAPS // 6), (1, 1)),
    "too_many_phases": (1, 1, (64, 50), (32, 25), (32, 25), (0, 0), (1, 1)),
}
WIDE = {  # one row of these reaches MAX_PLANE pixels, or one more
    "the_widest_row": (1, 2, (1, MAX_PLANE), (1, 3), (1, 1), (0, 0), (1, 1)),
    "too_wide": (1, 2, (1, MAX_PLANE - 1), (1, 3), (1, 1), (0, 1), (1, 1)),
    "the_widest_reach": (1, 1, (4, MAX_PLANE // 4), (4, 3), (1, 1), (1, 0), (1, 1)),
    "too_wide_a_reach": (1, 1, (5, MAX_PLANE // 5 + 1), (3, 2), (1, 2), (0, 1), (2, 1)),
    "the_widest_strided_row": (1, 2, (1, MAX_PLANE + 4), (1, 3), (1, 5), (0, 0), (1, 1)),
}


@pytest.fixture
def both_ways(monkeypatch):
    """By shuffles, where the CPU has them, and by row tables."""

    def each():
        for shuffled in {shuffles.SHUFFLES, False}:
            with monkeypatch.context() as patch:
                patch.setattr(shuffles, "SHUFFLES", shuffled)
                yield "by shuffles" if shuffled else "by row tables"

    return each


def check_dwconv2d(case, multiplier, table, pad_code, count, both_ways):
    batch, channels, size, kernel, *geometry = case
    shapes = (batch, channels, *size), (channels * multiplier, 1, *kernel)
    for name, x, w in itertools.islice(layouts(torch.Generator().manual_seed(8), *shapes), count):
        check("lut_dwconv2d", x, w, table, *geometry, pad_code, label=name, ways=both_ways())


@more_tables
@pytest.mark.parametrize("multiplier", [1, 2, 3, 4, TILE + 1])
@pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE)
def test_dwconv2d(case, multiplier, table, both_ways):
    check_dwconv2d(case, multiplier, table, 33, None, both_ways)


@some_tables
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_dwconv2d_of_wide_rows(case, table, both_ways):
    check_dwconv2d(case, 1, table, 33, 2, both_ways)
    check_dwconv2d(case, 2, table, 33, 1, both_ways)


@pytest.mark.parametrize("kernel", [(1, MAX_TAPS), (3, MAX_TAPS // 3 + 1), (19, 19)])
@pytest.mark.parametrize("span", [2**16 - 1, 2**22 - 1])
def test_dwconv2d_of_the_largest_sums(kernel, span, both_ways):
    """All bytes of nearly all entries are 255."""
    table = torch.full((256, 256), span, dtype=torch.int32)
    table[7, 9] = 0
    generator = torch.Generator().manual_seed(13)
    x, w = codes(generator, 1, 2, 20, 2 * MAX_TAPS), codes(generator, 2, 1, *kernel)
    check("lut_dwconv2d", x, w, table, (1, 1), (0, 0), (1, 1), 0, ways=both_ways())


# Threads and processes


def sample_calls(generator):
    """Calls whose work is split by rows, by groups, by columns, by images and by channels."""
    table = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=generator)
    plain = (1, 1), (1, 1), (1, 1)
    return [
        ("lut_matmul", codes(generator, 3 * MIN_ROWS + 5, 11), codes(generator, 19, 11), table),
        ("lut_matmul", codes(generator, 7, 40), codes(generator, 6 * TILE + 1, 40), table),
        ("lut_matmul", codes(generator, 7, 60, 9), codes(generator, 7, 17, 9), table),
        ("lut_conv2d", codes(generator, 2, 6, 50, 51), codes(generator, 9, 2, 3, 3), table, *plain, 3, 7),
        ("lut_conv2d", codes(generator, 1, 4, 9, 9), codes(generator, 90, 4, 3, 3), table, *plain, 1, 7),
        ("lut_dwconv2d", codes(generator, 6, 5, 20, 9), codes(generator, 10, 1, 3, 3), table, *plain, 7),
        ("lut_dwconv2d", codes(generator, 1, 70, 9, 9), codes(generator, 70, 1, 5, 5), table, *plain, 7),
    ]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads, set_threads):
    generator = torch.Generator().manual_seed(9)
    calls = sample_calls(generator)
    calls += [
        ("lut_matmul", codes(generator, n, 5), codes(generator, 18, 5), TABLES["wide"])
        for base in (threads * MIN_ROWS, MAX_ROWS, threads * MAX_ROWS)
        for n in (base - 1, base, base + 1)
    ]
    set_threads(threads)
    for call in calls:
        check(*call)


def test_concurrent_callers(monkeypatch):
    """Each on its own thread, while the number of threads to use changes all the time."""
    callers = 6
    jobs = [sample_calls(torch.Generator().manual_seed(10 + i)) for i in range(callers)]
    expected = [[oracle(*call) for call in job] for job in jobs]
    counts = itertools.cycle([1, 4, 2, 3, 5, 2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: next(counts))
    start = threading.Barrier(callers)

    def work(i):
        start.wait()
        order = [(i + j) % len(jobs[i]) for j in range(3 * len(jobs[i]))]
        return [torch.equal(run(cpu, *jobs[i][j]), expected[i][j]) for j in order]

    with ThreadPoolExecutor(callers) as pool:
        assert all(itertools.chain.from_iterable(pool.map(work, range(callers), timeout=120)))


PROCESSES = """
import multiprocessing, os, signal, sys, threading
import torch
from approxconv.engines import cpu, reference

GEOMETRY = (1, 1), (1, 1), (1, 1), 1, 7

def operands(seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            for shape in ((2, 9, 40, 41), (20, 9, 3, 3)))
    return x, w, torch.randint(-2**15, 2**15, (256, 256), dtype=torch.int32, generator=generator), *GEOMETRY

def same(arguments, expected):  # in NumPy: torch's own threads do not survive a fork
    return bool((cpu.lut_conv2d(*arguments).numpy() == expected.numpy()).all())

def in_child(arguments, expected):
    torch.set_num_threads(3)
    return same(arguments, expected) and same(arguments, expected)

def forked(arguments, expected):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a hang becomes a death
        os._exit(0 if same(arguments, expected) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

if __name__ == "__main__":
    torch.set_num_threads(3)
    known, fresh = operands(1), operands(2)
    after_known, after_fresh = (reference.lut_conv2d(*arguments) for arguments in (known, fresh))
    found = []
    if sys.argv[1] == "first_calls_at_once":
        threads = [threading.Thread(target=lambda: found.append(same(known, after_known))) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    else:
        found.append(same(known, after_known))
    if sys.argv[1] == "fork":
        found.append(forked(known, after_known))
    elif sys.argv[1] == "fork_then_new_table":
        found.append(forked(fresh, after_fresh))
    elif sys.argv[1] == "spawn":
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            jobs = [(known, after_known), (fresh, after_fresh)]
            found += pool.starmap_async(in_child, jobs, chunksize=1).get(timeout=120)
    found.append(same(known, after_known))
    print(found)
    sys.exit(not all(found))
"""


@pytest.mark.parametrize(
    "way", ["first_calls_at_once", "fork", "fork_then_new_table", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_other_processes(way, tmp_path):
    if way.startswith("fork") and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    result = subprocess.run([sys.executable, script, way], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# Memory


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("operator", "case"),
    [
        *(("lut_conv2d", case) for case in CONVOLUTIONS.values()),
        *(("lut_dwconv2d", case) for case in DEPTHWISE.values()),
    ],
    ids=[*(f"conv-{name}" for name in CONVOLUTIONS), *(f"depthwise-{name}" for name in DEPTHWISE)],
)
def test_no_operand_is_read_past_its_ends(operator, case, at_end, fenced):
    """A read beyond them is a segmentation fault here."""
    if operator == "lut_conv2d":
        batch, channels, size, filters, kernel, *geometry = case
        w_shape = (filters, channels // geometry[-1], *kernel)
    else:
        batch, channels, size, kernel, *geometry = case
        w_shape = (channels, 1, *kernel)
    for _, x, w in layouts(torch.Generator().manual_seed(12), (batch, channels, *size), w_shape):
        arguments = TABLES["int16"], *geometry, 7
        y = run(cpu, operator, fenced(x, at_end), fenced(w, at_end), *arguments)
        assert torch.equal(y, run(cpu, operator, x, w, *arguments))


PLAIN, BARE = ((1, 1), (1, 1), (1, 1)), ((1, 1), (0, 0), (1, 1))
LARGE = {  # operator, threads, table, other arguments, x's and w's shape, which of them repeat one byte in memory
    "convolution": ("lut_conv2d", 2, "int16", (*PLAIN, 1, 0), (8, 256, 96, 96), (16, 256, 3, 3), ""),
    "8_bits": ("lut_conv2d", 2, "2x2", (*PLAIN, 1, 0), (8, 128, 96, 96), (66, 128, 3, 3), ""),
    "8_bits_on_many_threads": ("lut_conv2d", 64, "2x2", (*PLAIN, 1, 0), (256, 64, 64, 64), (128, 64, 3, 3), "x"),
    "groups": ("lut_conv2d", 2, "wide", (*PLAIN, 64, 0), (8, 256, 96, 96), (256, 4, 3, 3), ""),
    "large_kernel": ("lut_conv2d", 2, "int16", (*PLAIN, 1, 0), (1, 2, 300, 300), (16, 2, 51, 51), ""),
    "deep_product": ("lut_matmul", 2, "int16", (), (2048, 2**15), (16, 2**15), ""),
    "batched_product": ("lut_matmul", 2, "int16", (), (4000, 1, 65, 300), (1, 2, 9, 300), "x"),
    "depthwise": ("lut_dwconv2d", 2, "wide", (*BARE, 0), (1, 512, 200, 200), (1024, 1, 5, 5), ""),
    "depthwise_of_a_wide_row": ("lut_dwconv2d", 2, "wide", (*BARE, 0), (1, 16, 1, 2**20), (16, 1, 1, 9), "x"),
    "convolution_on_many_threads": ("lut_conv2d", 64, "wide", (*PLAIN, 1, 0), (256, 64, 64, 64), (128, 64, 3, 3), "x"),
    "depthwise_on_many_threads": ("lut_dwconv2d", 64, "wide", (*BARE, 0), (64, 16, 1, 32767), (16, 1, 1, 128), "x"),
    "product_of_many_terms": ("lut_matmul", 2, "2x2", (), (1, 12 * 10**6), (1, 12 * 10**6), ""),
    "kernel_of_many_taps": ("lut_conv2d", 2, "2x2", (*BARE, 1, 0), (1, 1, 8400, 8400), (1, 1, 8400, 8400), "xw"),
    "many_depthwise_filters": ("lut_dwconv2d", 2, "int16", (*BARE, 0), (1, 2**20, 1, 80), (2**20, 1, 1, 80), "xw"),
}
SCRATCH = """
import json, re, sys
import torch
from approxconv.engines import cpu

def memory(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])

zero = torch.zeros(1, dtype=torch.uint8)
empty = torch.empty
torch.empty = lambda *shape, **keywords: empty(*shape, **keywords).fill_(0)  # the result is resident from the start
tables = {
    "int16": torch.randint(-2**15, 2**15, (256, 256), dtype=torch.int32),
    "wide": torch.randint(-2**20, 2**20, (256, 256), dtype=torch.int32),
    "2x2": torch.randint(0, 10, (4, 4), dtype=torch.int32),
}
warm_up = {
    "lut_matmul": ((), (65536, 1), (2, 1)),
    "lut_conv2d": (((1, 1), (0, 0), (1, 1), 1, 0), (64, 1, 32, 32), (33, 1, 1, 1)),
    "lut_dwconv2d": (((1, 1), (0, 0), (1, 1), 0), (64, 1, 32, 32), (1, 1, 1, 1)),
}
for name, (operator, threads, table, arguments, x_shape, w_shape, repeated) in json.loads(sys.argv[1]).items():
    torch.set_num_threads(threads)
    run, table = getattr(cpu, operator), tables[table]
    others, *shapes = warm_up[operator]
    run(*(zero.expand(shape) for shape in shapes), table, *others)  # compiles, starts the threads
    x, w = (
        zero.expand(shape) if which in repeated else zero.expand(shape).contiguous()
        for which, shape in (("x", x_shape), ("w", w_shape))
    )
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak, VmHWM, is now what is in use
    y = run(x, w, table, *arguments)
    print(json.dumps([name, memory("VmHWM") - before - 4 * y.numel()]), flush=True)
    del x, w, y
"""


@cache
def scratch(threads):
    """Bytes that each large call took beside its operands and its result, by the peak of resident memory."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc")
    calls = json.dumps({name: call for name, call in LARGE.items() if call[1] == threads})
    # Every large block of memory is its own mapping, gone when freed: nothing is left over for the next call to use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", SCRATCH, calls],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(map(json.loads, result.stdout.splitlines()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if call[1] > 2 or name == "convolution" else ())
        for name, call in LARGE.items()
    ],
)
def test_scratch_is_bounded(name):
    """On many threads the peak is what the threads that the machine runs at once add up to."""
    assert scratch(LARGE[name][1])[name] <= 64 * 2**20
