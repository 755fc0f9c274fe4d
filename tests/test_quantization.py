"""Codes against torch's fake quantisation; zero-point sums against plain int64 loops."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from approxconv.quantization import (
    OperandFormat,
    OperandQuantization,
    QuantizedWeight,
    activation_observer,
    observed_scale,
    quantize_weight,
    remove_zero_points,
    window_sums,
)

FORMATS = [OperandFormat(bits, signed) for bits in range(2, 9) for signed in (False, True)]


def format_id(operand):
    return f"{'' if operand.signed else 'u'}int{operand.bits}"


def expected_range(operand):
    half = 2 ** (operand.bits - 1)
    return (-half, half - 1) if operand.signed else (0, 2 * half - 1)


def codes_behind(faked, scale, zero_point):
    """Integers q with ``faked = (q - zero_point) * scale``."""
    return (faked.double() / scale.double()).round().long() + zero_point.long()


def awkward_reals(scale, low, high, zero_point):
    """Grid points, ties between them, the floats next to both, values past both ends, both zeros."""
    steps = torch.arange(low - zero_point - 3, high - zero_point + 4, dtype=torch.float64)
    points = torch.cat([steps, steps + 0.5, steps + 0.25]).mul(scale).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    far = torch.tensor([-1e4, -300.0, 300.0, 1e4]) * scale
    return torch.cat(
        [points, torch.nextafter(points, up), torch.nextafter(points, down), far, torch.tensor([0.0, -0.0])]
    )


@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
def test_format_range_and_type(operand):
    assert (operand.low, operand.high) == expected_range(operand)
    assert operand.dtype == (torch.int8 if operand.signed else torch.uint8)


@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
def test_tensor_codes_are_fake_quantised_ones(operand):
    low, high = expected_range(operand)
    scales = [0.5, 1.0, 0.1, 1 / 3, 0.0123, 7.7e-4, 3.0, *np.random.default_rng(0).lognormal(-3, 2, 20)]
    for scale, zero_point in itertools.product(scales, [0] if operand.signed else [0, 1, (high + 1) // 2, high]):
        scale_t, zero_t = torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32)
        real = awkward_reals(scale_t.item(), low, high, zero_point)
        kept = real.clone()
        codes = operand.quantize(real, scale_t, zero_t)
        faked = torch.fake_quantize_per_tensor_affine(real, scale_t, zero_t, low, high)
        assert codes.dtype == operand.dtype
        assert torch.equal(codes.long(), codes_behind(faked, scale_t, zero_t)), (scale, zero_point)
        assert torch.equal(codes.float().sub(zero_point).mul(scale_t), faked), (scale, zero_point)
        assert torch.equal(real, kept)
        assert codes.min() == low
        assert codes.max() == high


@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
def test_not_a_number_is_quantised_as_torch_does(operand):
    scale, zero = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    real = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    codes = operand.quantize(real, scale, zero)
    faked = torch.fake_quantize_per_tensor_affine(real, scale, zero, operand.low, operand.high)
    assert torch.equal(codes.long(), codes_behind(faked, scale, zero))
    assert codes.tolist() == [operand.low, operand.low, operand.high, operand.low]


@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
def test_channel_codes_are_fake_quantised_ones(operand):
    low, high = expected_range(operand)
    rng = np.random.default_rng(1)
    scales = torch.tensor([0.5, 0.1, 1 / 3, *rng.lognormal(-3, 2, 9)], dtype=torch.float32)
    zeros = torch.zeros(12) if operand.signed else torch.from_numpy(rng.integers(low, high + 1, 12))
    zeros = zeros.int()
    real = torch.stack([awkward_reals(s.item(), low, high, z.item()) for s, z in zip(scales, zeros, strict=True)])
    codes = operand.quantize(real, scales[:, None], zeros[:, None])
    faked = torch.fake_quantize_per_channel_affine(real, scales, zeros, 0, low, high)
    assert torch.equal(codes.long(), codes_behind(faked, scales[:, None], zeros[:, None]))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 5), (3, 1, 1, 1)])
@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
def test_quantised_weight(operand, shape):
    low, high = expected_range(operand)
    generator = torch.Generator().manual_seed(2)
    column = (-1, *[1] * (len(shape) - 1))
    magnitude = torch.logspace(-2, 1, shape[0]).view(column)
    # Channels that straddle zero unevenly, one all positive, one all negative.
    weight = (torch.rand(shape, generator=generator) * 2 - 0.6) * magnitude
    weight[0], weight[-1] = weight[0].abs() + 0.1, -weight[-1].abs() - 0.1
    result = quantize_weight(weight, operand)

    flat = weight.flatten(1).double()
    bottom, top = flat.min(1).values.clamp(max=0), flat.max(1).values.clamp(min=0)
    span = 2 * torch.maximum(-bottom, top) if operand.signed else top - bottom
    torch.testing.assert_close(result.scale.double(), span / (high - low), rtol=1e-6, atol=0)
    zero = torch.zeros_like(bottom) if operand.signed else (-bottom * (high - low) / span).round()
    assert torch.equal(result.zero_point.long(), zero.long())
    assert result.scale.shape == result.zero_point.shape == result.sums.shape == (shape[0],)

    faked = torch.fake_quantize_per_channel_affine(weight, result.scale, result.zero_point, 0, low, high)
    expected = codes_behind(faked, result.scale.view(column), result.zero_point.view(column))
    assert result.codes.dtype == operand.dtype
    assert torch.equal(result.codes.long(), expected)
    assert torch.equal(result.sums, expected.flatten(1).sum(1))
    # Nothing but the last half step is lost: every weight is in range.
    assert ((faked - weight).abs() <= result.scale.view(column) * 1.01).all()


def test_quantised_weight_of_a_zero_channel_is_finite():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([-1.0, 0.0, 2.0])
    for operand in FORMATS:
        result = quantize_weight(weight, operand)
        assert torch.isfinite(result.scale).all()
        assert (result.scale > 0).all()
        assert torch.equal(result.codes[0].int(), result.zero_point[0].expand(3))


@pytest.mark.parametrize("operand", FORMATS, ids=format_id)
@pytest.mark.parametrize(("bottom", "top"), [(-0.7, 1.3), (0.2, 1.3), (-1.3, -0.2), (-1.0, 0.9), (0.0, 0.0)])
def test_activation_observer(operand, bottom, top):
    low, high = expected_range(operand)
    observer = activation_observer(OperandQuantization(), operand)
    observer(torch.tensor([bottom, (bottom + top) / 2]))
    observer(torch.tensor([(bottom + top) / 2, top]))
    scale, zero_point = observed_scale(observer, OperandQuantization(), operand)
    assert scale.shape == zero_point.shape == ()
    theirs = observer.calculate_qparams()
    assert (scale.item(), zero_point.item()) == (theirs[0].item(), theirs[1].item())
    bottom, top = min(bottom, 0.0), max(top, 0.0)
    if bottom == top:
        assert torch.isfinite(scale)
        assert scale > 0
        return
    span = 2 * max(-bottom, top) if operand.signed else top - bottom
    torch.testing.assert_close(scale.item(), span / (high - low), rtol=1e-5, atol=0)
    assert zero_point.item() == (0 if operand.signed else round(-bottom * (high - low) / span))


def random_codes(generator, shape, operand):
    low, high = expected_range(operand)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(operand.dtype)


def zero_points(generator, count, operand):
    """Different ones a channel for an unsigned operand, the ends among them; 0 for a signed one."""
    low, high = expected_range(operand)
    if operand.signed:
        return torch.zeros(count, dtype=torch.int32)
    zeros = torch.randint(low, high + 1, (count,), generator=generator, dtype=torch.int32)
    zeros[0], zeros[-1] = high, low
    return zeros


def as_weight(codes, zero_point):
    ones = torch.ones(len(codes))
    return QuantizedWeight(codes, ones, zero_point, codes.flatten(1).sum(1, dtype=torch.int64))


PAIRS = [
    (OperandFormat(a, a_signed), OperandFormat(w, w_signed))
    for (a, w) in [(8, 8), (4, 8), (3, 2)]
    for a_signed in (False, True)
    for w_signed in (False, True)
]
pairs = pytest.mark.parametrize(("a", "w"), PAIRS, ids=[f"{format_id(a)}-{format_id(w)}" for a, w in PAIRS])


@pairs
@pytest.mark.parametrize("where", ["low", "high", "between"])
def test_remove_zero_points_of_a_matmul(a, w, where):
    generator = torch.Generator().manual_seed(3)
    m, n, k = 5, 4, 7
    xq, wq = random_codes(generator, (m, k), a), random_codes(generator, (n, k), w)
    zx = 0 if a.signed else {"low": 0, "high": a.high, "between": a.high // 3 + 1}[where]
    zw = zero_points(generator, n, w)
    table = torch.randint(-3000, 3001, (2**a.bits, 2**w.bits), generator=generator)
    raw = torch.zeros(m, n, dtype=torch.int32)
    product, looked_up = [[[0] * n for _ in range(m)] for _ in range(2)]
    for i, j in itertools.product(range(m), range(n)):
        for x, v in zip(xq[i].tolist(), wq[j].tolist(), strict=True):
            entry = table[x % 2**a.bits, v % 2**w.bits].item()
            z = zw[j].item()
            raw[i, j] += x * v
            product[i][j] += (x - zx) * (v - z)
            looked_up[i][j] += entry - zx * v - z * x + zx * z
    weight = as_weight(wq, zw)
    x_sums = None if w.signed else xq.sum(1, keepdim=True, dtype=torch.int32)
    exact = remove_zero_points(raw, weight, zx, x_sums, (-1,), 4 * k * 2**16)
    assert exact.tolist() == product

    gathered = table[xq.long()[:, None] % 2**a.bits, wq.long()[None] % 2**w.bits].sum(-1).int()
    assert remove_zero_points(gathered, weight, zx, x_sums, (-1,), 4 * k * 2**16).tolist() == looked_up


@pytest.mark.parametrize("sign", [-1, 1])
def test_remove_zero_points_beyond_int32(sign):
    unsigned = OperandFormat(8, False)
    generator = torch.Generator().manual_seed(4)
    k = 600
    wq = random_codes(generator, (2, k), unsigned)
    wq[0] //= 8
    zw = torch.tensor([255, 3], dtype=torch.int32)
    xq = random_codes(generator, (3, k), unsigned)
    xq[0] //= 8
    zx = 200
    sums = torch.full((3, 2), sign * (2**31 - 1), dtype=torch.int32)
    expected = [
        [
            sums[i, j].item() - zx * sum(wq[j].tolist()) - zw[j].item() * sum(xq[i].tolist()) + k * zx * zw[j].item()
            for j in range(2)
        ]
        for i in range(3)
    ]
    x_sums = xq.sum(1, keepdim=True, dtype=torch.int32)
    result = remove_zero_points(sums.clone(), as_weight(wq, zw), zx, x_sums, (-1,), 4 * 2**31)
    assert result.tolist() == expected
    assert any(abs(v) >= 2**31 for row in expected for v in row)


# channels, filters, groups, kernel, stride, padding, dilation, height, width
CONVOLUTIONS = {
    "plain": (2, 3, 1, (3, 3), (1, 1), (0, 0), (1, 1), 5, 5),
    "padded": (2, 3, 1, (3, 3), (1, 1), (1, 1), (1, 1), 3, 3),
    "not_square": (3, 2, 1, (3, 2), (2, 1), (1, 2), (1, 2), 6, 5),
    "strided_past_the_end": (1, 1, 1, (2, 3), (3, 2), (0, 1), (2, 1), 8, 7),
    "groups": (4, 6, 2, (2, 3), (1, 2), (2, 0), (1, 1), 4, 6),
    "depthwise": (3, 6, 3, (3, 1), (1, 1), (1, 0), (2, 1), 5, 3),
    "padding_wider_than_the_input": (2, 2, 1, (2, 2), (2, 2), (3, 4), (1, 1), 2, 1),
}
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())


def taps(case, i, j):
    """(channel within its group, row, column, kernel row, kernel column) behind output position (i, j)."""
    channels, _, groups, kernel, stride, padding, dilation, _, _ = case
    for c, r, s in itertools.product(range(channels // groups), range(kernel[0]), range(kernel[1])):
        yield c, i * stride[0] - padding[0] + r * dilation[0], j * stride[1] - padding[1] + s * dilation[1], r, s


def output_size(case):
    _, _, _, kernel, stride, padding, dilation, *size = case
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def pixel(x, b, c, row, column, pad):
    inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
    return x[b, c, row, column].item() if inside else pad


@convolutions
@pytest.mark.parametrize(("operand", "pad"), [(OperandFormat(8, False), 131), (OperandFormat(8, True), -77)])
def test_window_sums(case, operand, pad):
    channels, _, groups, kernel, stride, padding, dilation, height, width = case
    x = random_codes(torch.Generator().manual_seed(5), (2, channels, height, width), operand)
    sums = window_sums(x, kernel, stride, padding, dilation, groups, pad)
    out = output_size(case)
    assert sums.shape == (2, groups, *out)
    assert sums.dtype == torch.int32
    for b, g, i, j in itertools.product(range(2), range(groups), range(out[0]), range(out[1])):
        window = [pixel(x, b, g * channels // groups + c, row, col, pad) for c, row, col, _, _ in taps(case, i, j)]
        assert sums[b, g, i, j].item() == sum(window)


def test_window_sums_of_an_empty_batch():
    x = torch.zeros(0, 4, 5, 6, dtype=torch.uint8)
    assert window_sums(x, (3, 2), (1, 2), (1, 0), (1, 1), 2, 9).shape == (0, 2, 5, 3)


def test_window_sums_takes_views():
    x = random_codes(torch.Generator().manual_seed(6), (2, 5, 6, 4), OperandFormat(8, False)).permute(0, 3, 1, 2)
    arguments = ((3, 2), (1, 2), (1, 0), (1, 1), 2, 9)
    assert torch.equal(window_sums(x, *arguments), window_sums(x.contiguous(), *arguments))


@convolutions
@pytest.mark.parametrize("a_signed", [False, True])
@pytest.mark.parametrize("w_signed", [False, True])
def test_remove_zero_points_of_a_convolution(case, a_signed, w_signed):
    channels, filters, groups, kernel, stride, padding, dilation, height, width = case
    a, w = OperandFormat(8, a_signed), OperandFormat(8, w_signed)
    generator = torch.Generator().manual_seed(7)
    xq = random_codes(generator, (2, channels, height, width), a)
    wq = random_codes(generator, (filters, channels // groups, *kernel), w)
    zx, zw = 0 if a_signed else 97, zero_points(generator, filters, w)
    out = output_size(case)
    raw = torch.zeros(2, filters, *out, dtype=torch.int64)
    expected = torch.zeros_like(raw)
    for b, o, i, j in itertools.product(range(2), range(filters), range(out[0]), range(out[1])):
        first = o // (filters // groups) * (channels // groups)
        for c, row, column, r, s in taps(case, i, j):
            x, v = pixel(xq, b, first + c, row, column, zx), wq[o, c, r, s].item()
            raw[b, o, i, j] += x * v
            expected[b, o, i, j] += (x - zx) * (v - zw[o].item())
    x_sums = None
    if not w_signed:
        x_sums = window_sums(xq, kernel, stride, padding, dilation, groups, zx)
        x_sums = x_sums.repeat_interleave(filters // groups, dim=1)
    depth = wq[0].numel()
    result = remove_zero_points(raw.int(), as_weight(wq, zw), zx, x_sums, (-1, 1, 1), 4 * depth * 2**16)
    assert torch.equal(result.long(), expected)
    # The loops themselves: with the zero points taken out, padding is zero.
    centred = F.conv2d(xq.double() - zx, wq.double() - zw.view(-1, 1, 1, 1), None, stride, padding, dilation, groups)
    assert torch.equal(centred.round().long(), expected)
