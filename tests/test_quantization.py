"""Codes against torch's fake quantisation; zero-point sums against plain int64 loops."""

import itertools

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torch.nn import functional as F

from approxconv.quantization import (
    OperandFormat,
    OperandQuantization,
    Quantization,
    QuantizedWeight,
    activation_observer,
    observed_scale,
    pad_codes,
    quantize_bias,
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


# Schemes, ranges and observers

ODD = torch.tensor([-0.7, 1.9, 0.3, -0.2, 0.8])


@pytest.mark.parametrize("kind", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_scales_are_bit_for_bit_those_of_torchs_observers(bits, signed, scheme, narrow, kind):
    if not signed and (narrow or scheme == "symmetric"):
        return
    operand = OperandFormat(bits, signed, scheme, narrow)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(400, 6, generator=generator) * torch.logspace(-9, 9, 400)[:, None]
    values += torch.randn(400, 1, generator=generator) * values.abs().amax(1, keepdim=True)
    observer = (PerChannelMinMaxObserver if kind == "per_channel" else MinMaxObserver)(
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=getattr(torch, f"{kind}_{scheme}"),
        quant_min=operand.low,
        quant_max=operand.high,
    )
    for rows in [values] if kind == "per_channel" else values[::40].split(1):
        observer.reset_min_max_vals()
        observer(rows)
        scale, zero_point = operand.scale_and_zero_point(*rows.aminmax(dim=1))
        theirs = observer.calculate_qparams()
        assert torch.equal(scale, theirs[0])
        assert torch.equal(zero_point.long(), theirs[1].long())
        assert zero_point.dtype == torch.int32


def test_moving_average_is_torchs():
    quantization, operand = OperandQuantization(range="moving_average", momentum=0.3), OperandFormat(8, False)
    ours = activation_observer(quantization, operand)
    theirs = MovingAverageMinMaxObserver(averaging_constant=0.3)
    for factor in (1.0, -3.0, 0.1):
        ours(ODD * factor)
        theirs(ODD * factor)
        ours(ODD[:0])
        assert torch.equal(ours.min_val, theirs.min_val)
        assert torch.equal(ours.max_val, theirs.max_val)


def observed(quantization, operand, *batches):
    observer = activation_observer(quantization, operand)
    for batch in batches:
        observer(batch)
    scale, zero_point = observed_scale(observer, quantization, operand)
    assert scale.shape == zero_point.shape == ()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    return scale, zero_point


def squared_error(values, operand, scale, zero_point):
    return (operand.fake_quantize(values, scale, zero_point) - values).double().square().sum().item()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["histogram", "mse", "percentile"])
def test_ranges_that_clip_outliers(kind, signed, bits):
    operand = OperandFormat(bits, signed)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20_000, generator=generator) + 0.3
    values[:3] = torch.tensor([-9.0, 30.0, 40.0])
    parts = values[:10_000] * 0.5, values[10_000:]
    joint = torch.cat(parts)
    scale, zero_point = observed(OperandQuantization(range=kind, percentile=99.0), operand, *parts)
    widest = observed(OperandQuantization(), operand, *parts)
    assert scale < widest[0]
    if kind != "percentile":  # torch's search stops at the first step that does not pay
        assert squared_error(joint, operand, scale, zero_point) < squared_error(joint, operand, *widest) * 1.001
    if kind == "mse":  # what a search over the values themselves finds, to the width of a bin
        low, high = joint.aminmax()
        trials = [operand.scale_and_zero_point(low * t / 100, high * t / 100) for t in range(1, 101)]
        least = min(squared_error(joint, operand, *trial) for trial in trials)
        assert squared_error(joint, operand, scale, zero_point) < 1.02 * least
    if kind == "percentile":
        low, high = joint.double().quantile(0.005), joint.double().quantile(0.995)
        expected, _ = operand.scale_and_zero_point(low, high)
        bin_width = (joint.max() - joint.min()).item() / 2048
        assert abs(scale - expected).item() <= 2 * 2 * bin_width / (operand.high - operand.low)


def test_histogram_is_torchs_and_refuses_what_is_not_finite():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3000, generator=generator).exp()
    theirs = HistogramObserver(quant_min=0, quant_max=255)
    theirs(values)
    scale, zero_point = observed(OperandQuantization(range="histogram"), OperandFormat(8, False), values)
    assert (scale.item(), zero_point.item()) == tuple(each.item() for each in theirs.calculate_qparams())
    with pytest.raises(ValueError, match="finite"):
        observed(OperandQuantization(range="mse"), OperandFormat(8, False), torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "lsq"])
@pytest.mark.parametrize(
    "operand", [OperandFormat(4, True), OperandFormat(5, False), OperandFormat(8, True, None, True)]
)
def test_weight_ranges(operand, kind, granularity):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 3, 50, generator=generator) * torch.tensor([0.1, 1.0, 3.0, 0.5]).view(-1, 1, 1)
    quantization = OperandQuantization(range=kind, granularity=granularity, percentile=98.0)
    result = quantize_weight(weight, operand, quantization)
    assert result.scale.shape == result.zero_point.shape == (4,)
    assert result.codes.shape == weight.shape
    rows = weight.flatten(1) if granularity == "per_channel" else weight.view(1, -1)
    for row, scale, zero_point in zip(rows, result.scale, result.zero_point, strict=False):
        low, high = row.aminmax()
        if kind == "percentile":
            low, high = row.sort().values[[len(row) // 100, -1 - len(row) // 100]]
        if kind == "mse":
            trials = [operand.scale_and_zero_point(low * t / 100, high * t / 100) for t in range(1, 101)]
            least = min(squared_error(row, operand, *trial) for trial in trials)
            assert squared_error(row, operand, scale, zero_point) == pytest.approx(least, rel=1e-4)
            continue
        expected, zero = operand.scale_and_zero_point(low, high)
        if kind == "lsq":
            steps = max(operand.high - zero.item(), zero.item() - operand.low)
            expected = 2 * row.abs().mean() / steps**0.5
        torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)
        assert zero_point == zero
    if granularity == "per_tensor":
        assert result.scale.unique().numel() == 1
    column = (-1, 1, 1)
    codes = operand.quantize(weight, result.scale.view(column), result.zero_point.view(column))
    assert torch.equal(result.codes, codes)
    assert codes.min() >= operand.low
    assert codes.max() <= operand.high


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("operand", "zero"), [(OperandFormat(4, True), 0), (OperandFormat(3, False), 2)])
def test_learned_step_size(channels, operand, zero):
    """Value and gradients by the paper's equations 1 and 3, in double precision."""
    generator = torch.Generator().manual_seed(4)
    real = torch.randn(3, 40, generator=generator).requires_grad_()
    scale = (torch.rand(channels, generator=generator) * 0.2 + 0.1).requires_grad_()
    zero_point = torch.full((channels,), zero, dtype=torch.int32)
    grad = torch.randn(3, 40, generator=generator)
    y = operand.fake_quantize_learned(real, scale, zero_point, 40)
    y.backward(grad)

    s = scale.detach().double().view(-1, 1)
    v = real.detach().double() / s
    low, high = operand.low - zero, operand.high - zero
    torch.testing.assert_close(y.double(), v.round().clamp(low, high) * s, rtol=1e-6, atol=1e-6)
    inside = (v.round() >= low) & (v.round() <= high)
    by_scale = torch.where(inside, v.round() - v, v.clamp(low, high)) * grad
    expected = (by_scale.sum(1) if channels == 3 else by_scale.sum().view(1)) / (40 * operand.high) ** 0.5
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(real.grad, grad * inside, rtol=1e-5, atol=1e-6)


def test_bias_codes():
    bias, scale = torch.tensor([0.26, -0.24, 0.25, 3e9, -3e9, 0.0]), torch.full((6,), 0.5)
    assert quantize_bias(bias, scale).tolist() == [1, 0, 0, 2**31 - 1, -(2**31), 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("value", [0, 100, 127])
def test_padding_with_a_value_that_is_not_read(dtype, value):
    codes = random_codes(torch.Generator().manual_seed(5), (2, 3, 4), OperandFormat(8, dtype == torch.int8)).to(dtype)
    padded = pad_codes(codes, (1, 2), torch.tensor(value, dtype=torch.int32))
    assert torch.equal(padded, pad_codes(codes, (1, 2), value))
    assert torch.equal(padded, F.pad(codes, (2, 2, 1, 1), value=value))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scheme": "logarithmic"}, "scheme"),
        ({"granularity": "per_group"}, "granularity"),
        ({"range": "guess"}, "range"),
        ({"bits": 7.5}, "bits"),
        ({"bits": True}, "bits"),
        ({"narrow_range": 1}, "narrow_range"),
        ({"percentile": 20}, "percentile"),
        ({"momentum": 0}, "momentum"),
    ],
)
def test_operand_quantization_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        OperandQuantization(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"activation": OperandQuantization(granularity="per_channel")}, "'per_tensor' fits"),
        ({"activation": "minmax"}, "activation must be"),
        ({"weight": OperandQuantization(range="moving_average")}, "weight range must be one of 'minmax'"),
        ({"activation": OperandQuantization(range="mse"), "freeze": False}, "'moving_average', 'lsq' fit"),
        ({"freeze": 1}, "freeze"),
        ({"bias_bits": 16}, "bias_bits"),
    ],
)
def test_quantization_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        Quantization(**arguments)


@pytest.mark.parametrize(
    ("quantization", "a_signed", "w_signed", "named"),
    [
        (Quantization(weight=OperandQuantization("affine")), False, True, "weight scheme 'affine'.*'symmetric' fits"),
        (Quantization(weight=OperandQuantization("symmetric")), False, False, "weight scheme.*unsigned.*'affine' fits"),
        (Quantization(OperandQuantization("symmetric")), False, True, "activation scheme.*'affine' fits"),
        (Quantization(OperandQuantization(bits=9)), False, True, "activation bits must be 2 to 8"),
        (Quantization(weight=OperandQuantization(bits=5)), False, True, "weight bits must be 2 to 4"),
        (Quantization(OperandQuantization(narrow_range=True)), False, True, "narrow_range=False fits"),
    ],
)
def test_pairs_that_do_not_fit_say_what_does(quantization, a_signed, w_signed, named):
    with pytest.raises(ValueError, match=named):
        quantization.formats((8, 4), a_signed, w_signed)


def test_formats_are_chosen_from_the_operands():
    for a_signed, w_signed in itertools.product([False, True], repeat=2):
        a, w = Quantization().formats((8, 6), a_signed, w_signed)
        assert (a.bits, a.signed, a.symmetric, a.low, a.high) == (8, a_signed, a_signed, *expected_range(a))
        assert (w.bits, w.signed, w.symmetric, w.low, w.high) == (6, w_signed, w_signed, *expected_range(w))
    a, w = Quantization(OperandQuantization("affine", bits=3), OperandQuantization(narrow_range=True)).formats(
        (8, 8), True, True
    )
    assert (a.low, a.high, a.symmetric) == (-4, 3, False)
    assert (w.low, w.high, w.symmetric) == (-127, 127, True)
