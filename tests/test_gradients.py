"""Slopes against their definitions, gradients against a double-precision sum over all pairs of operands."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from approxconv import Multiplier
from approxconv.gradients import (
    GRADIENTS,
    GradientTables,
    check_gradient,
    gradient_tables,
    lut_gradients,
    noise,
)
from approxconv.multiplier import operand_range
from approxconv.operators.approxgemm import _gemm_bwd_ste
from approxconv.operators.conv2d import _conv_bwd_ste

SIGNS = [(False, False), (False, True), (True, False), (True, True)]
BITS = [(2, 3), (4, 4), (5, 3), (8, 8)]
SQUARE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
# name: (shape of x, shape of w, convolution or None)
OPERATORS = {
    "plain": ((2, 3, 5, 4), (4, 3, 3, 2), SQUARE),
    "padded": ((2, 3, 5, 4), (4, 3, 3, 3), SQUARE | {"padding": (2, 1)}),
    "strided": ((1, 2, 9, 8), (3, 2, 2, 3), SQUARE | {"stride": (3, 2), "padding": (1, 0)}),
    "dilated": ((2, 2, 8, 7), (3, 2, 3, 2), SQUARE | {"padding": (1, 2), "dilation": (2, 3), "stride": (2, 1)}),
    "groups": ((2, 6, 4, 5), (4, 3, 3, 3), SQUARE | {"padding": (1, 1), "groups": 2}),
    "depthwise": ((2, 3, 5, 4), (6, 1, 3, 3), SQUARE | {"padding": (1, 1), "groups": 3}),
    "pointwise": ((1, 1, 1, 1), (1, 1, 1, 1), SQUARE),
    "no_samples": ((0, 3, 5, 4), (4, 3, 3, 3), SQUARE | {"padding": (1, 1)}),
    "linear": ((3, 2, 7), (5, 7), None),
    "row": ((1, 1), (1, 1), None),
    "no_rows": ((0, 7), (5, 7), None),
}


def hostile(bits=(8, 8), signs=(False, True), seed=0):
    rng = np.random.default_rng(seed)
    table = rng.integers(-30_000, 30_001, (2 ** bits[0], 2 ** bits[1]))
    return Multiplier(table, a_signed=signs[0], w_signed=signs[1], name=f"hostile{seed}")


def user_tables(bits=(8, 8), seed=0):
    """By no slope of any product, one of low rank and one of full."""
    rng = np.random.default_rng(seed)
    shape = 2 ** bits[0], 2 ** bits[1]
    return GradientTables(
        rng.normal(3, 50, (shape[0], 3)) @ rng.normal(0, 2, (3, shape[1])) - 7, rng.normal(20, 60, shape)
    )


def by_code(table, bits, signs):
    """From ascending order of values to that of codes."""
    low_a, low_w = (operand_range(n, signed)[0] for n, signed in zip(bits, signs, strict=True))
    return np.roll(table, (low_a, low_w), (0, 1))


def codes_of(values, signed):
    return values.to(torch.int8 if signed else torch.uint8)


class Case:
    """An operator with random operands and the sum over its pairs."""

    def __init__(self, name, bits=(8, 8), signs=(False, True), seed=0):
        x_shape, w_shape, self.conf = OPERATORS[name]
        self.bits, self.signs = bits, signs
        generator = torch.Generator().manual_seed(seed)
        ranges = [operand_range(n, signed) for n, signed in zip(bits, signs, strict=True)]
        self.x, self.w = (
            torch.randint(low, high + 1, shape, generator=generator)
            for shape, (low, high) in zip((x_shape, w_shape), ranges, strict=True)
        )
        column = (-1, *[1] * (len(w_shape) - 1))
        zero_points = torch.arange(w_shape[0]) * 5 % (2 ** bits[1]) + ranges[1][0]
        self.zx = torch.tensor(ranges[0][0] + 3 % 2 ** bits[0], dtype=torch.int32)
        self.sx = torch.tensor(0.037)
        self.zw = zero_points.int().view(column)
        self.sw = (torch.rand(w_shape[0], generator=generator) + 0.01).view(column)
        self.grad = torch.randn(self.pairs(self.x, self.w)[0].shape[: self.output_ndim], generator=generator).double()

    @property
    def output_ndim(self):
        return 4 if self.conf else self.x.ndim

    def pairs(self, x, w):
        """Both operands of every product, of shape (*output, *products of a sum); linear in x and w but for padding."""
        if not self.conf:
            return torch.broadcast_tensors(x.unsqueeze(-2), w)
        stride, (top, left), dilation, groups = self.conf.values()
        x = F.pad(x, (left, left, top, top), value=int(self.zx))
        for dim, k in ((2, w.shape[2]), (3, w.shape[3])):
            s, d = stride[dim - 2], dilation[dim - 2]
            x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        x = x.unflatten(1, (groups, -1)).repeat_interleave(w.shape[0] // groups, 1)  # (B, O, C/g, H', W', kh, kw)
        x = x.movedim(2, 4)
        return torch.broadcast_tensors(x, w[:, None, None])

    def expected(self, tables):
        x, w = (each.double().requires_grad_() for each in (self.x, self.w))
        pairs = self.pairs(x, w)
        a, b = (p.detach().long() & (2**n - 1) for p, n in zip(pairs, self.bits, strict=True))
        scales = torch.broadcast_tensors(self.pairs(x, self.sw.double().expand(w.shape))[1], pairs[0])[0]
        zeros = self.pairs(x, self.zw.double().expand(w.shape))[1]
        grad = self.grad.view(*self.grad.shape, *[1] * (a.ndim - self.grad.ndim))
        by_x = grad * scales * (tables.by_activation.double()[a, b] - zeros)
        by_w = grad * self.sx.double() * (tables.by_weight.double()[a, b] - self.zx)
        return torch.autograd.grad(pairs, (x, w), (by_x, by_w))

    def exact(self, grad, x, w, needs):
        return _conv_bwd_ste(grad, x, w, self.conf, needs) if self.conf else _gemm_bwd_ste(grad, x, w, needs)

    def sums(self, grad):
        dims = (0, 2, 3) if self.conf else tuple(range(grad.ndim - 1))
        return grad.sum(dims).view(self.zw.shape)

    def got(self, tables, needs=(True, True), *, grad=None, x=None, w=None, exact=None):
        x = codes_of(self.x, self.signs[0]) if x is None else x
        w = codes_of(self.w, self.signs[1]) if w is None else w
        return lut_gradients(
            tables.terms,
            self.grad if grad is None else grad,
            x,
            w,
            self.sx,
            self.zx,
            self.sw,
            self.zw,
            exact or self.exact,
            needs,
            self.sums,
        )


def close(got, expected, relative=3e-6):
    """To a relative tolerance of the whole tensor: one gradient is a sum with cancellation."""
    assert got.shape == expected.shape
    error, size = (each.double().norm().item() for each in (got - expected, expected))
    assert error <= relative * size, f"{error / max(size, 1e-300)}"


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("bits", BITS)
def test_of_the_exact_product_each_is_the_other_operands_value(bits, signs, gradient):
    exact = Multiplier.exact(bits, *signs)
    a, w = (torch.from_numpy(values).float() for values in exact.operand_values())
    got = gradient_tables(exact, gradient)
    torch.testing.assert_close(got.by_activation, w.expand(got.by_activation.shape), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.by_weight, a[:, None].expand(got.by_weight.shape), rtol=1e-6, atol=1e-6)
    assert all(len(each) == 1 for each in got.terms)


@pytest.mark.parametrize("signs", SIGNS)
def test_straight_through_ignores_the_table(signs):
    bits = (5, 3)
    got, expected = (gradient_tables(m, "ste") for m in (hostile(bits, signs), Multiplier.exact(bits, *signs)))
    assert torch.equal(got.by_activation, expected.by_activation)
    assert torch.equal(got.by_weight, expected.by_weight)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("bits", BITS)
def test_linear_regression(bits, signs):
    m = hostile(bits, signs)
    a, w = m.operand_values()
    table = m.table.numpy().astype(float)
    got = gradient_tables(m, "lre")
    for code in {0, 1, len(w) // 2, len(w) - 1}:
        slope = np.polyfit(a, table[:, code], 1)[0]
        np.testing.assert_allclose(got.by_activation[:, code], slope, rtol=1e-5, atol=1e-4)
    for code in {0, 1, len(a) // 2, len(a) - 1}:
        slope = np.polyfit(w, table[code], 1)[0]
        np.testing.assert_allclose(got.by_weight[code], slope, rtol=1e-5, atol=1e-4)
    assert all(len(each) == 1 for each in got.terms)


def smooth_slope(line, v, half_window):
    """Of one line in ascending order of values, at its v-th."""
    n = len(line)
    if v < half_window + 1 or v > n - 1 - half_window - 1:
        return (line[-1] - line[0]) / (n - 1)

    def average(centre):
        return np.mean(line[centre - half_window : centre + half_window + 1])

    return (average(v + 1) - average(v - 1)) / 2


@pytest.mark.parametrize("half_window", [None, 0, 1, 3, 6, 7, 100])
@pytest.mark.parametrize(("bits", "signs"), [*zip([(4, 4), (5, 3), (2, 6), (4, 5)], SIGNS, strict=True)])
def test_smoothed_central_difference(bits, signs, half_window):
    m = hostile(bits, signs)
    table = m.by_value().numpy().astype(float)
    got = gradient_tables(m, "smooth", half_window=half_window)
    windows = [n // 16 if half_window is None else half_window for n in table.shape]
    expected = np.empty_like(table), np.empty_like(table)
    for i, j in np.ndindex(table.shape):
        expected[0][i, j] = smooth_slope(table[:, j], i, windows[0])
        expected[1][i, j] = smooth_slope(table[i], j, windows[1])
    for each, slopes in zip((got.by_activation, got.by_weight), expected, strict=True):
        np.testing.assert_allclose(each, by_code(slopes, bits, signs), rtol=1e-6, atol=1e-3)


def test_default_window_is_a_sixteenth():
    m = hostile()
    default, sixteen, other = (gradient_tables(m, "smooth", half_window=h) for h in (None, 16, 15))
    assert torch.equal(default.by_weight, sixteen.by_weight)
    assert not torch.equal(default.by_weight, other.by_weight)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("bits", [(2, 3), (5, 4), (8, 8)])
def test_terms_are_the_tables(bits, signs):
    for tables in (*(gradient_tables(hostile(bits, signs), name) for name in GRADIENTS), user_tables(bits)):
        f_a, g_a, f_w, g_w = tables.terms
        assert (f_a[0] == 1).all()
        assert (g_w[0] == 1).all()
        repeats = [256 // n for n in tables.by_weight.shape]
        for f, g, table in ((f_a, g_a, tables.by_activation), (f_w, g_w, tables.by_weight)):
            assert f.dtype == g.dtype == torch.float32
            close(f.double().T @ g.double(), table.repeat(repeats).double(), 2e-6)


def test_smooth_slopes_have_no_more_terms_than_the_error(low_rank):
    for rank, flags in ((1, (False, True)), (5, (True, True))):
        terms = gradient_tables(low_rank(rank, flags=flags), "smooth").terms
        assert all(len(each) <= 1 + rank for each in terms)


def test_tolerance_trades_terms_for_error():
    tables = user_tables()
    coarse = GradientTables(tables.by_activation, tables.by_weight, 0.5)
    assert len(coarse.terms.f_w) < len(tables.terms.f_w)
    close(coarse.terms.f_w.T @ coarse.terms.g_w, tables.by_weight, 0.5)
    made = gradient_tables(hostile(), "smooth", tolerance=0.1)
    assert made.tolerance == 0.1
    assert len(made.terms.f_a) < len(gradient_tables(hostile(), "smooth").terms.f_a)


def test_made_once_and_anew_after_a_change():
    m = hostile((4, 4))
    first = gradient_tables(m, "lre")
    assert gradient_tables(m, "lre") is first
    assert gradient_tables(hostile((4, 4)), "lre") is first
    m.table += 1 + torch.arange(16)
    assert not torch.equal(gradient_tables(m, "lre").by_weight, first.by_weight)


@pytest.mark.parametrize("gradient", [*GRADIENTS, "user"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_equal_the_sum_over_pairs(name, gradient):
    bits, index = (5, 4), list(OPERATORS).index(name)
    signs = SIGNS[index % 4]
    case = Case(name, bits, signs)
    tables = user_tables(bits) if gradient == "user" else gradient_tables(hostile(bits, signs), gradient)
    for got, expected in zip(case.got(tables), case.expected(tables), strict=True):
        assert got.dtype == torch.float64
        close(got, expected)


@pytest.mark.parametrize("signs", SIGNS)
def test_gradients_of_bytes(signs):
    """8 bits, where an int8 code's sign bit counts, and in float32."""
    case = Case("padded", (8, 8), signs)
    for tables in (gradient_tables(hostile(signs=signs), "lre"), user_tables()):
        for got, expected in zip(case.got(tables, grad=case.grad.float()), case.expected(tables), strict=True):
            assert got.dtype == torch.float32
            close(got.double(), expected, 1e-5)


@pytest.mark.parametrize("signs", SIGNS)
def test_straight_through_is_autograds(signs):
    """Of the exact convolution of the fake-quantised operands."""
    case = Case("dilated", signs=signs)
    x, w = (
        (scale * (q - zero_point)).requires_grad_()
        for scale, q, zero_point in ((case.sx, case.x, case.zx), (case.sw, case.w, case.zw))
    )
    grad = case.grad.float()
    expected = torch.autograd.grad(F.conv2d(x, w, **case.conf), (x, w), grad)
    for got, want in zip(case.got(gradient_tables(hostile(signs=signs), "ste"), grad=grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_both_operands_activations():
    """Batched products with one scale each: no operand has channels, grad_sums sums over rows."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(0, 256, shape, generator=generator) for shape in ((2, 3, 5, 7), (2, 3, 4, 7)))
    grad = torch.randn(2, 3, 5, 4, generator=generator).double()
    sx, sw, zx, zw = torch.tensor(0.5), torch.tensor(0.25), torch.tensor(9), torch.tensor(200)
    tables = user_tables()

    def exact(grad, x, w, needs):
        return grad @ w if needs[0] else None, grad.mT @ x if needs[1] else None

    got = lut_gradients(
        tables.terms,
        grad,
        x.byte(),
        w.byte(),
        sx,
        zx,
        sw,
        zw,
        exact,
        (True, True),
        lambda grad: grad.sum(-2).unsqueeze(-1),
    )
    by_x, by_w = (
        each.double()[x[..., :, None, :], w[..., None, :, :]] for each in (tables.by_activation, tables.by_weight)
    )
    close(got[0], (grad[..., None] * 0.25 * (by_x - 200)).sum(-2))
    close(got[1], (grad[..., None] * 0.5 * (by_w - 9)).sum(-3))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("gradient", ["lre", "user"])
def test_only_what_is_wanted_is_computed_and_read(gradient, needs):
    bits = (4, 4)
    case = Case("groups", bits)
    tables = user_tables(bits) if gradient == "user" else gradient_tables(hostile(bits), gradient)
    asked = []

    def exact(grad, x, w, wanted):
        asked.append(wanted)
        return case.exact(grad, x, w, wanted)

    reads = tables.terms.reads(needs)
    operands = [
        codes_of(values, signed) if read else torch.empty(values.shape, device="meta")
        for values, signed, read in zip((case.x, case.w), case.signs, reads, strict=True)
    ]
    got = case.got(tables, needs, x=operands[0], w=operands[1], exact=exact)
    counts = [len(tables.terms.f_a), len(tables.terms.f_w)]
    assert asked == [(True, False)] * counts[0] * needs[0] + [(False, True)] * counts[1] * needs[1]
    if gradient == "lre":
        assert reads == (needs[1], needs[0])
    both = case.got(tables)
    for each, wanted, expected in zip(got, needs, both, strict=True):
        assert torch.equal(each, expected) if wanted else each is None


def test_any_strides():
    case, tables = Case("padded"), gradient_tables(hostile(), "smooth", half_window=120, tolerance=0.5)
    expected = case.got(tables)
    x, w = codes_of(case.x, False), codes_of(case.w, True)
    for x_form, w_form in itertools.product(
        (
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: F.pad(t, (1, 2, 0, 1))[..., :-1, 1:-2],
            lambda t: t.mT.contiguous().mT,
        ),
        repeat=2,
    ):
        for got, want in zip(case.got(tables, x=x_form(x), w=w_form(w)), expected, strict=True):
            close(got, want, 1e-12)


def test_no_value_is_read_while_tracing():
    """Neither by the fakes of torch.compile and export, nor are they left in what is kept."""
    m = hostile((4, 4), seed=9)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tables = gradient_tables(m, "smooth")
        terms = tables.terms
    case = Case("padded", (4, 4))
    before = case.got(tables)
    fakes = [mode.from_tensor(each) for each in (codes_of(case.x, False), codes_of(case.w, True), case.grad)]
    scales = [mode.from_tensor(each) for each in (case.sx, case.zx, case.sw, case.zw)]
    with mode:
        got = lut_gradients(
            type(terms)(*map(mode.from_tensor, terms)),
            fakes[2],
            *fakes[:2],
            *scales,
            case.exact,
            (True, True),
            case.sums,
        )
    assert [each.shape for each in got] == [each.shape for each in before]


def test_compiles_whole():
    case, tables = Case("groups"), gradient_tables(hostile(), "lre")
    compiled = torch.compile(lambda x, w, grad: case.got(tables, x=x, w=w, grad=grad), fullgraph=True, backend="eager")
    got = compiled(codes_of(case.x, False), codes_of(case.w, True), case.grad)
    for each, expected in zip(got, case.got(tables), strict=True):
        assert torch.equal(each, expected)


def test_terms_move():
    terms = gradient_tables(hostile((4, 4)), "lre").terms
    assert all(each.device.type == "meta" for each in terms.to("meta"))
    assert type(terms.to("meta")) is type(terms)


def test_tables_of_a_user():
    m = hostile((4, 3))
    tables = user_tables((4, 3))
    assert gradient_tables(m, tables) is tables
    with_own = Multiplier(m.table, a_signed=False, w_signed=True, gradients=(tables.by_activation, tables.by_weight))
    assert torch.equal(GradientTables(*with_own.gradients).by_weight, tables.by_weight)
    array = np.ones((16, 8))
    kept = GradientTables(array, array.tolist())
    array[0, 0] = 5
    assert kept.by_activation.dtype == torch.float32
    assert kept.by_activation[0, 0] == 1
    assert repr(kept) == "GradientTables(shape=(16, 8), tolerance=1e-06)"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((np.ones((16, 9)), np.ones((16, 9))), r"by_activation: table must have shape .* got \(16, 9\)"),
        ((np.ones((16, 8)), np.ones(16)), r"by_weight: table must have shape .* got \(16,\)"),
        ((np.ones((16, 8)), np.ones((8, 16))), r"one shape, got \(16, 8\) and \(8, 16\)"),
        ((np.ones((512, 4)), np.ones((512, 4))), r"by_activation: .* got \(512, 4\)"),
        ((np.full((16, 8), "a"), np.ones((16, 8))), "by_activation must hold numbers"),
        ((np.ones((16, 8)), np.full((16, 8), np.nan)), "by_weight must be finite"),
        ((np.ones((16, 8)), torch.full((16, 8), 1e39, dtype=torch.float64)), "by_weight must be finite"),
        ((None, np.ones((16, 8))), "by_activation must hold numbers"),
    ],
)
def test_bad_tables(pair, message):
    with pytest.raises(ValueError, match=message):
        GradientTables(*pair)


@pytest.mark.parametrize("tolerance", [0, 1, math.nan, "1e-3", None])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a number between 0 and 1, got"):
        GradientTables(np.ones((4, 4)), np.ones((4, 4)), tolerance)
    with pytest.raises(ValueError, match="tolerance must be a number between 0 and 1, got"):
        gradient_tables(hostile((2, 2)), "lre", tolerance=tolerance)


@pytest.mark.parametrize("gradient", ["STE", "", None, 3, np.array(["ste", "lre"]), (np.ones((4, 4)), np.ones((4, 4)))])
def test_bad_gradient(gradient):
    for ask in (check_gradient, lambda each: gradient_tables(hostile((2, 2)), each)):
        with pytest.raises(ValueError, match="gradient must be one of 'ste', 'lre', 'smooth' or a GradientTables, got"):
            ask(gradient)


def test_tables_of_another_shape():
    with pytest.raises(ValueError, match=r"gradient must have the shape .* \(16, 8\), got \(8, 16\)"):
        gradient_tables(hostile((4, 3)), user_tables((3, 4)))


@pytest.mark.parametrize(("gradient", "half_window"), [("smooth", -1), ("smooth", 1.0), ("smooth", True), ("lre", 3)])
def test_bad_half_window(gradient, half_window):
    with pytest.raises(ValueError, match=f"half_window must be .* got {half_window!r} for '{gradient}'"):
        gradient_tables(hostile((4, 4)), gradient, half_window=half_window)


def test_noise_has_the_moments_of_product_sums():
    m, depth, count = hostile((4, 4)), 30, 40_000
    figures = m.metrics()
    scale = torch.tensor([0.5, 2.0])
    torch.manual_seed(0)
    got = noise(torch.empty(count, 2), depth, figures["bias"], figures["variance"], scale, 1.0) / scale
    a, w = torch.randint(0, 16, (2, count, depth))
    sums = m.error()[a, w].sum(1).double()
    for column in got.double().T:
        deviation = sums.std()
        assert abs(column.mean() - sums.mean()) < 5 * deviation * math.sqrt(2 / count)
        assert abs(column.std() / deviation - 1) < 0.05
        assert 0.3 < (column > sums.mean() + 0.5 * deviation).double().mean() < 0.32  # as of a Gaussian: 0.309


def test_noise_is_differentiable_by_its_factor():
    factor = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(0.7)
    torch.manual_seed(0)
    got = noise(torch.empty(5, 4), 9, 2.0, 16.0, scale, factor)
    torch.manual_seed(0)
    expected = 0.7 * (18 + 12 * torch.randn(5, 4))
    torch.testing.assert_close(got, 0.3 * expected)
    (slope,) = torch.autograd.grad(got.square().sum(), factor)
    torch.testing.assert_close(slope, 2 * 0.3 * expected.square().sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_of_an_exact_multiplier_and_its_dtype(dtype):
    output = torch.empty(3, 0, 2, dtype=dtype), torch.empty(3, 2, dtype=dtype)
    for each in output:
        got = noise(each, 9, 0.0, 0.0, torch.tensor(0.5), torch.tensor(2.0))
        assert torch.equal(got, torch.zeros_like(each))
        assert got.dtype == dtype


@pytest.mark.parametrize(("depth", "variance"), [(-1, 1.0), (3, -0.5)])
def test_bad_moments(depth, variance):
    with pytest.raises(ValueError, match=f"depth and variance must be at least 0, got {depth} and {variance}"):
        noise(torch.empty(3), depth, 0.0, variance, torch.tensor(1.0), 1.0)
