"""A factorised table in bytes is the table, whatever the factors' ranges."""

import itertools

import pytest
import torch

from approxconv import Multiplier, get_multiplier
from approxconv.engines.byte_form import byte_form
from approxconv.factorize import Factorization, factorize, factorize_table


def rebuilt(form):
    rows = 0 if form.by_row is None else form.by_row.long()[:, None]
    return form.u.long().T @ form.v.long() + rows + form.by_column.long()


def whole(table):
    return table.long().repeat(256 // table.shape[0], 256 // table.shape[1])


def factors(f, g, scale=1, a_signed=False, w_signed=True):
    f, g = (torch.tensor(side, dtype=torch.int8) for side in (f, g))
    return Factorization(scale, f, g, a_signed, w_signed)


@pytest.mark.parametrize(("scale", "a_signed", "w_signed"), [*itertools.product((0, 1), (False, True), (False, True))])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("bits", [(8, 8), (3, 5)])
def test_random_factors(scale, a_signed, w_signed, rank, bits):
    generator = torch.Generator().manual_seed(rank)
    sides = (torch.randint(-128, 128, (rank, 2**n), dtype=torch.int8, generator=generator) for n in bits)
    form = Factorization(scale, *sides, a_signed, w_signed)
    found = byte_form(form)
    assert torch.equal(rebuilt(found), whole(form.reconstruct()))
    assert (found.u.dtype, found.v.dtype, found.by_column.dtype) == (torch.uint8, torch.int8, torch.int32)
    assert found.products <= form.products
    assert found.u.shape == found.v.shape == (found.products, 256)


@pytest.mark.parametrize(
    ("f", "g"),
    [
        ([-128] * 4, [-128, 127, 0, 1]),
        ([-128, 127, -1, 0], [127] * 4),
        ([5] * 4, [-7] * 4),
        ([-128, 127, 0, 3], [-128, 127, 5, 0]),
        ([0] * 4, [0] * 4),
    ],
)
@pytest.mark.parametrize("signs", [*itertools.product((False, True), repeat=2)])
def test_constant_and_extreme_factors(f, g, signs):
    form = factors([f], [g], 1, *signs)
    assert torch.equal(rebuilt(byte_form(form)), whole(form.reconstruct()))


def test_only_what_cannot_be_shifted_into_the_columns_is_a_sum_over_rows():
    signed = byte_form(factorize(get_multiplier("exact_8s")))
    assert signed.by_row is None
    assert signed.by_column.any()  # −128·w, for activations shifted by 128
    mixed = byte_form(factorize(get_multiplier("exact_8u_8s")))
    assert mixed.by_row is None
    assert not mixed.by_column.any()
    unsigned = byte_form(factorize(get_multiplier("exact_8u")))
    assert torch.equal(unsigned.by_row, 128 * torch.arange(256, dtype=torch.int32))


def test_digits_that_an_unsigned_byte_holds_are_one_product():
    f = torch.arange(256) % 241
    multiplier = Multiplier(torch.outer(f, torch.arange(256) - 160), a_signed=False, w_signed=False)
    form = byte_form(factorize(multiplier))
    assert form.products == 1
    assert torch.equal(rebuilt(form), multiplier.table.long())


@pytest.mark.parametrize(("sign", "side"), [*itertools.product((1, -1), (0, 1))])
def test_terms_with_a_factor_in_common_are_merged_if_a_byte_holds_the_sum(sign, side):
    common, one = torch.tensor([3, -5, 7, 0]), torch.tensor([-100, 27, 100, 3])
    for other, products in (([-20, 27, 30, 9], 1), ([-100, 127, 90, 9], 2)):
        pairs = [(common, one), (sign * common, sign * torch.tensor(other))]
        f, g = zip(*(pair if side == 0 else pair[::-1] for pair in pairs), strict=True)
        form = Factorization(0, torch.stack(f).to(torch.int8), torch.stack(g).to(torch.int8), True, True)
        assert byte_form(form).products == products
        assert torch.equal(rebuilt(byte_form(form)), whole(form.reconstruct()))


def test_a_constant_table_takes_no_product():
    form = byte_form(factorize(Multiplier(torch.full((16, 16), 9), a_signed=True, w_signed=False)))
    assert form.products == 0
    assert torch.equal(rebuilt(form), torch.full((256, 256), 9))


@pytest.mark.parametrize("name", ["kulkarni_8u", "kulkarni_8s", "drum4_8u_8s", "exact_4s", "roba_8u", "trunc3_8u_8s"])
def test_a_table_is_factorised_without_its_signs(name):
    multiplier = get_multiplier(name)
    found = factorize_table(multiplier.table)
    assert found.rank <= factorize(multiplier).rank
    assert torch.equal(found.reconstruct(), multiplier.table.long())
    assert torch.equal(rebuilt(byte_form(found)), whole(multiplier.table))


def test_a_table_is_factorised_once_until_it_is_written_to():
    table = get_multiplier("kulkarni_8s").table.clone()
    first = factorize_table(table)
    assert factorize_table(table) is first
    table[3, 5] += 1
    second = factorize_table(table)
    assert torch.equal(second.reconstruct(), table.long())


def test_a_random_table_has_no_factorisation():
    table = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    assert factorize_table(table) is None
    small = table[:16, :16].contiguous()
    assert torch.equal(factorize_table(small).reconstruct(), small.long())


def test_a_high_rank_outside_the_corner_is_seen():
    table = torch.zeros(256, 256, dtype=torch.int32)
    table[128:, 128:] = torch.randint(-99, 99, (128, 128), generator=torch.Generator().manual_seed(2))
    assert factorize_table(table) is None
