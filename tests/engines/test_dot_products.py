"""Dot products of a table's byte form equal the oracle, on every path of instructions that this CPU has."""

import itertools

import pytest
import torch

from approxconv.engines import reference
from approxconv.engines.byte_form import CODES, ByteForm, byte_form
from approxconv.engines.cpu import depthwise_dots, dot_products
from approxconv.engines.cpu.depthwise_dots import lut_dwconv2d
from approxconv.engines.cpu.dot_products import lut_conv2d, lut_matmul, usable
from approxconv.engines.cpu.instructions import PATHS, compiles
from approxconv.factorize import factorize

FUNCTIONS = {"lut_matmul": lut_matmul, "lut_conv2d": lut_conv2d, "lut_dwconv2d": lut_dwconv2d}
# products, whether there are numbers by row
FORMS = {"no_product": (0, True), "one": (1, False), "two": (2, True), "five": (5, False)}


def make_form(products, rows, seed=0):
    """Random with its ends in it, and its table: neither commutative nor zero-preserving."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape, dtype=torch.int32):
        values = torch.randint(low, high + 1, shape, dtype=dtype, generator=generator)
        values[..., 3], values[..., 7] = low, high
        return values

    u, v = draw(0, 255, products, CODES, dtype=torch.uint8), draw(-128, 127, products, CODES, dtype=torch.int8)
    by_row, by_column = draw(-(2**19), 2**19, CODES) if rows else None, draw(-500, 70_000, CODES)
    table = torch.einsum("pa,pw->aw", u.long(), v.long()) + by_column
    return ByteForm(u, v, by_row, by_column), (table if by_row is None else table + by_row[:, None]).int()


FORMED = {name: make_form(*made) for name, made in FORMS.items()}


SELDOM = ("avx512_vnni", "avx_vnni")  # made of the same parts as the others; each takes seconds to compile


@pytest.fixture(params=[pytest.param(path, marks=pytest.mark.slow if path in SELDOM else ()) for path in PATHS])
def path(request, monkeypatch):
    if not compiles(request.param):
        pytest.skip(f"this CPU has not the instructions of {request.param}")
    for module in (dot_products, depthwise_dots):
        monkeypatch.setattr(module, "best", lambda: request.param)
    return request.param


@pytest.fixture
def little_scratch(monkeypatch):
    """Blocks of few pixels, few channels, few lanes and few taps at a time."""
    monkeypatch.setattr(dot_products, "_WORKER", 6000)
    monkeypatch.setattr(dot_products, "_WEIGHTS", 2**15)


def codes(generator, *shape):
    return torch.randint(0, CODES, shape, dtype=torch.uint8, generator=generator)


def layouts(generator, *shape):
    """The same shape, differently stored."""
    yield codes(generator, *shape)
    yield codes(generator, *shape).to(memory_format=torch.channels_last)
    yield codes(generator, *(2 * n + 1 for n in shape))[tuple(slice(1, None, 2) for _ in shape)]
    yield codes(generator, *shape[:3], 1).expand(shape)


def check(operator, form, x, w, *arguments):
    made, table = FORMED[form]
    ours = FUNCTIONS[operator](x, w, made, *arguments)
    assert ours.is_contiguous()
    assert torch.equal(ours, getattr(reference, operator)(x, w, table, *arguments))


# x, w, stride, padding, dilation, groups
CONVOLUTIONS = {
    "3x3": ((2, 8, 9, 20), (70, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((3, 37, 5, 7), (20, 37, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "first_layer": ((1, 3, 21, 40), (33, 3, 7, 5), (2, 3), (3, 1), (1, 1), 1),
    "strides": ((2, 5, 11, 13), (3, 5, 2, 3), (3, 2), (2, 0), (2, 3), 1),
    "groups": ((2, 18, 6, 5), (51, 6, 3, 2), (1, 2), (1, 2), (1, 1), 3),
    "one_group_a_channel": ((1, 5, 6, 7), (10, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    "larger_than_image": ((2, 4, 2, 3), (17, 4, 5, 6), (1, 1), (2, 2), (1, 1), 1),
    "only_padding": ((1, 2, 1, 1), (4, 2, 1, 1), (1, 3), (2, 4), (1, 1), 1),
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_conv2d(path, form):
    generator = torch.Generator().manual_seed(1)
    for x_shape, w_shape, *geometry in CONVOLUTIONS.values():
        x, w = codes(generator, *x_shape), codes(generator, *w_shape)
        check("lut_conv2d", form, x, w, *geometry, 3)


@pytest.mark.parametrize("form", ["one", "two"])
def test_conv2d_layouts(form):
    generator = torch.Generator().manual_seed(2)
    for x, w in zip(layouts(generator, 2, 20, 7, 18), layouts(generator, 19, 20, 3, 2), strict=True):
        check("lut_conv2d", form, x, w, (1, 2), (1, 1), (1, 1), 1, 7)
    for x in layouts(generator, 2, 64, 4, 6):  # read where it lies, if channels_last
        check("lut_conv2d", form, x, codes(generator, 16, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1, 7)


@pytest.mark.parametrize("threads", [1, 5])
def test_conv2d_in_pieces(little_scratch, set_threads, threads):
    set_threads(threads)
    generator = torch.Generator().manual_seed(3)
    for x_shape, w_shape, *geometry in (
        *CONVOLUTIONS.values(),
        ((1, 200, 3, 40), (40, 200, 2, 2), (1, 1), (1, 1), (1, 1), 1),
        ((2, 3, 60, 60), (5, 3, 30, 31), (2, 1), (3, 4), (1, 2), 1),
    ):
        for form in ("no_product", "two"):
            check("lut_conv2d", form, codes(generator, *x_shape), codes(generator, *w_shape), *geometry, 7)


@pytest.mark.parametrize("form", FORMS)
def test_matmul(path, form):
    generator = torch.Generator().manual_seed(4)
    for rows, columns, depth in ((1, 1, 1), (1, 100, 65), (33, 1, 7), (50, 130, 129), (1100, 17, 4)):
        check("lut_matmul", form, codes(generator, rows, depth), codes(generator, columns, depth))


def test_matmul_broadcasts():
    generator = torch.Generator().manual_seed(5)
    for batch, other in (((3,), ()), ((2, 1), (1, 3)), ((), (4,)), ((1,), (1,))):
        x, w = codes(generator, *batch, 6, 20), codes(generator, *other, 9, 20)
        check("lut_matmul", "two", x, w)
        check("lut_matmul", "two", x.mT.contiguous().mT, w.mT.contiguous().mT)


# x, w, stride, padding, dilation
DEPTHWISE = {
    "3x3": ((2, 20, 9, 20), (20, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "stride_2": ((1, 17, 13, 70), (17, 1, 3, 3), (2, 2), (1, 1), (1, 1)),
    "far_apart": ((1, 3, 9, 80), (3, 1, 3, 2), (1, 7), (1, 0), (2, 5)),
    "dilated": ((2, 3, 12, 30), (3, 1, 3, 5), (2, 3), (0, 3), (3, 2)),
    "multiplier": ((2, 5, 7, 7), (15, 1, 4, 6), (1, 1), (2, 1), (1, 1)),
    "band": ((1, 2, 90, 70), (2, 1, 5, 1), (1, 1), (2, 2), (1, 1)),
    "large_plane": ((1, 1, 12, 12_000), (1, 1, 3, 2), (1, 1), (1, 1), (1, 1)),
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1)),
    "one_column_dilated_far": ((1, 2, 3, 4), (2, 1, 2, 1), (1, 1), (0, 0), (2, 2**30)),
}


@pytest.mark.parametrize("form", FORMS)
def test_dwconv2d(path, form):
    generator = torch.Generator().manual_seed(6)
    for x_shape, w_shape, *geometry in DEPTHWISE.values():
        check("lut_dwconv2d", form, codes(generator, *x_shape), codes(generator, *w_shape), *geometry, 7)


def test_dwconv2d_layouts():
    generator = torch.Generator().manual_seed(7)
    for x, w in itertools.product(layouts(generator, 2, 18, 7, 18), layouts(generator, 18, 1, 3, 2)):
        check("lut_dwconv2d", "two", x, w, (1, 2), (1, 1), (1, 1), 7)


@pytest.mark.parametrize("at_end", [True, False])
def test_no_operand_is_read_past_its_ends(path, fenced, at_end):
    generator = torch.Generator().manual_seed(10)
    cases = [("lut_conv2d", case) for case in CONVOLUTIONS.values()]
    cases += [("lut_dwconv2d", case) for case in DEPTHWISE.values()]
    for operator, (x_shape, w_shape, *geometry) in cases:
        for x, w in zip(layouts(generator, *x_shape), layouts(generator, *w_shape), strict=True):
            check(operator, "two", fenced(x, at_end), fenced(w, at_end), *geometry, 7)


def test_sums_wrap_and_products_do_not_saturate(path):
    # Pairs of products at an end of their range overflow 16 bits, four of them do so twice.
    generator = torch.Generator().manual_seed(8)
    u, v = torch.full((2, CODES), 255, dtype=torch.uint8), torch.full((2, CODES), -128, dtype=torch.int8)
    v[:, ::2] = 127
    far = torch.full((CODES,), 2**24, dtype=torch.int32)
    products = torch.einsum("pa,pw->aw", u.long(), v.long())
    form = ByteForm(u, v, far, -far)
    x, w = codes(generator, 5, 3000), codes(generator, 20, 3000)
    w[0], w[1], w[2, ::2] = 0, 1, 1
    assert torch.equal(lut_matmul(x, w, form), reference.lut_matmul(x, w, products.int()))


def test_the_self_test(path, monkeypatch):
    usable.cache_clear()
    assert usable(path)
    monkeypatch.setattr(
        dot_products, "_matmul", lambda x, w, form, path: torch.zeros(len(x), len(w), dtype=torch.int32)
    )
    usable.cache_clear()
    assert not usable(path)
    usable.cache_clear()


def test_reference_multipliers(reference_multipliers):
    generator = torch.Generator().manual_seed(9)
    x, w = codes(generator, 30, 50), codes(generator, 20, 50)
    tried = 0
    for multiplier in reference_multipliers.values():
        factors = factorize(multiplier)
        if factors is not None and factors.products <= 8:
            tried += 1
            table = multiplier.table.int()
            assert torch.equal(lut_matmul(x, w, byte_form(factors)), reference.lut_matmul(x, w, table))
    assert tried > 10
