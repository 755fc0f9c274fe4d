"""The oracle against loops in plain Python, literal numbers, and int64 matrix products of the operands' values."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from approxconv import Multiplier
from approxconv.engines import reference

# Sides differ and entries are random, so that exchanged operands, a skipped mask or a skipped code 0 show.
SIDES = {"8x8": (256, 256), "4x6": (16, 64), "6x4": (64, 16), "2x8": (4, 256), "8x2": (256, 4)}
every_table = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
# name: (x's shape, w's shape, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "one_of_everything": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "not_square": ((2, 3, 5, 4), (4, 3, 3, 2), (1, 1), (0, 0), (1, 1), 1),
    "stride": ((1, 2, 7, 8), (2, 2, 2, 3), (3, 2), (0, 0), (1, 1), 1),
    "stride_past_the_end": ((1, 1, 6, 7), (1, 1, 2, 3), (3, 5), (0, 0), (1, 1), 1),
    "padding": ((2, 2, 3, 2), (3, 2, 2, 3), (1, 1), (1, 2), (1, 1), 1),
    "padding_larger_than_input": ((1, 2, 2, 1), (2, 2, 2, 2), (2, 3), (4, 3), (1, 1), 1),
    "kernel_larger_than_input": ((1, 2, 2, 3), (2, 2, 4, 5), (1, 1), (1, 2), (1, 1), 1),
    "dilation": ((1, 2, 7, 6), (2, 2, 3, 2), (1, 1), (0, 0), (3, 2), 1),
    "groups": ((2, 6, 3, 4), (4, 3, 2, 2), (1, 1), (0, 0), (1, 1), 2),
    "one_group_a_channel": ((1, 3, 4, 3), (6, 1, 2, 2), (1, 1), (1, 1), (1, 1), 3),
    "all_at_once": ((2, 6, 6, 9), (9, 2, 2, 3), (2, 3), (2, 1), (3, 2), 3),
}
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def make(sides, *shapes):
    """A hostile table and operands of any bytes: the bits above a narrow operand's are noise."""
    generator = torch.Generator().manual_seed(sides[0] + sides[1])
    table = torch.randint(-(10**6), 10**6, sides, dtype=torch.int32, generator=generator)
    return table, *(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)


def look_up(table, a, w):
    return table[a % len(table)][w % len(table[0])]


def matmul_by_hand(x, w, table):
    table, columns = table.tolist(), w.tolist()
    return [[sum(look_up(table, a, b) for a, b in zip(row, col, strict=True)) for col in columns] for row in x.tolist()]


def conv2d_by_hand(x, w, table, stride, padding, dilation, groups, pad_code):
    (_, channels, height, width), (filters, depth, kh, kw) = x.shape, w.shape
    x, w, table = x.tolist(), w.tolist(), table.tolist()

    def code(image, c, row, col):
        inside = 0 <= row < height and 0 <= col < width
        return image[c][row][col] if inside else pad_code

    def product_sum(image, o, top, left):
        group = o // (filters // groups)
        assert depth == channels // groups
        total = 0
        for c, r, s in itertools.product(range(depth), range(kh), range(kw)):
            seen = code(image, group * depth + c, top + r * dilation[0], left + s * dilation[1])
            total += look_up(table, seen, w[o][c][r][s])
        return total

    tops = range(-padding[0], height + padding[0] - dilation[0] * (kh - 1), stride[0])
    lefts = range(-padding[1], width + padding[1] - dilation[1] * (kw - 1), stride[1])
    return [
        [[[product_sum(image, o, top, left) for left in lefts] for top in tops] for o in range(filters)] for image in x
    ]


def assert_is(got, expected):
    assert got.dtype == torch.int32
    assert got.is_contiguous()
    assert got.tolist() == expected


def test_literal_numbers():
    table = torch.tensor([[10 * a + w for w in range(4)] for a in range(4)], dtype=torch.int32)
    x, w = torch.tensor([[1, 2], [3, 7]], dtype=torch.uint8), torch.tensor([[0, 3]], dtype=torch.uint8)
    assert_is(reference.lut_matmul(x, w, table), [[10 + 23], [30 + 33]])
    x, w = torch.tensor([[[[1, 2], [3, 0]]]], dtype=torch.uint8), torch.tensor([[[[2, 1]]]], dtype=torch.uint8)
    expected = [[[[32 + 11, 12 + 21, 22 + 31], [32 + 31, 32 + 1, 2 + 31]]]]
    assert_is(reference.lut_conv2d(x, w, table, (1, 1), (0, 1), (1, 1), 1, 3), expected)
    assert_is(reference.lut_dwconv2d(x, w, table, (1, 1), (0, 1), (1, 1), 255), expected)


@every_table
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (3, 2, 5), (2, 5, 1), (1, 4, 9), (4, 1, 8)])
def test_matmul_by_hand(sides, rows, columns, depth):
    table, x, w = make(sides, (rows, depth), (columns, depth))
    assert_is(reference.lut_matmul(x, w, table), matmul_by_hand(x, w, table))


@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [
        ((2, 3, 4), (5, 4)),
        ((3, 4), (2, 5, 4)),
        ((2, 1, 3, 4), (3, 2, 4)),
        ((1, 3, 3, 4), (2, 1, 2, 4)),
        ((2, 2, 3, 1), (2, 2, 1, 1)),
    ],
)
def test_batched_matmul_by_hand(x_shape, w_shape):
    table, x, w = make((64, 16), x_shape, w_shape)
    batch = torch.broadcast_shapes(x_shape[:-2], w_shape[:-2])
    x_parts, w_parts = x.expand(*batch, *x_shape[-2:]), w.expand(*batch, *w_shape[-2:])
    y = reference.lut_matmul(x, w, table)
    assert y.shape == (*batch, x_shape[-2], w_shape[-2])
    for index in itertools.product(*map(range, batch)):
        assert y[index].tolist() == matmul_by_hand(x_parts[index], w_parts[index], table)


@every_table
@every_convolution
@pytest.mark.parametrize("pad_code", [0, 201])
def test_conv2d_by_hand(sides, case, pad_code):
    x_shape, w_shape, *geometry = case
    table, x, w = make(sides, x_shape, w_shape)
    expected = conv2d_by_hand(x, w, table, *geometry, pad_code)
    assert_is(reference.lut_conv2d(x, w, table, *geometry, pad_code), expected)


@every_table
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_dwconv2d_by_hand(sides, multiplier):
    geometry = (2, 1), (1, 3), (1, 2)
    table, x, w = make(sides, (2, 3, 5, 4), (3 * multiplier, 1, 3, 2))
    expected = conv2d_by_hand(x, w, table, *geometry, 3, 77)
    assert_is(reference.lut_dwconv2d(x, w, table, *geometry, 77), expected)


@every_convolution
@pytest.mark.parametrize("a_signed", [False, True])
@pytest.mark.parametrize("w_signed", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (5, 7)])
def test_the_exact_table_gives_the_int64_convolution_of_the_values(case, a_signed, w_signed, bits):
    x_shape, w_shape, stride, padding, dilation, groups = case
    table = Multiplier.exact(bits, a_signed, w_signed).table
    generator = torch.Generator().manual_seed(5)

    def values(shape, bits, signed):
        low = -(2 ** (bits - 1)) if signed else 0
        return torch.randint(low, low + 2**bits, shape, generator=generator)

    x, w, pad = values(x_shape, bits[0], a_signed), values(w_shape, bits[1], w_signed), 3 - 7 * a_signed
    padded = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=pad)
    columns = F.unfold(padded, w_shape[2:], dilation, 0, stride).long().unflatten(1, (groups, -1))
    expected = w.view(groups, w_shape[0] // groups, -1) @ columns
    # int64 to uint8 keeps the low byte: two's complement.
    y = reference.lut_conv2d(
        x.to(torch.uint8), w.to(torch.uint8), table, stride, padding, dilation, groups, pad % 2 ** bits[0]
    )
    assert torch.equal(y.long().flatten(2), expected.flatten(1, 2))


@pytest.mark.parametrize(("rows", "columns", "depth"), [(3, 1200, 1500), (2, 1, 2**22 + 1)])
def test_products_too_many_to_hold_at_once(rows, columns, depth):
    table, x, w = make((4, 16), (rows, depth), (columns, depth))
    table //= 10**4
    y = reference.lut_matmul(x, w, table)
    for m, n in itertools.product(range(rows), range(0, columns, 97)):
        assert y[m, n] == table.numpy()[x[m].numpy() % 4, w[n].numpy() % 16].sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_next_to_the_ends_of_int32(sign):
    table = torch.full((4, 4), sign * ((2**31 - 1) // 3), dtype=torch.int32)
    codes = torch.zeros(1, 3, dtype=torch.uint8)
    assert reference.lut_matmul(codes, codes, table).item() == 3 * table[0, 0].item()
