"""The product of two activations against a slow int64 oracle and its fake-quantised twin."""

import copy
import itertools

import pytest
import torch

import approxconv
from approxconv import Multiplier
from approxconv.gradients import gradient_tables
from approxconv.nn import ApproxMatmul, Matmul
from approxconv.quantization import OperandQuantization, Quantization

# name: shapes of a and b
SHAPES = {
    "square": ((4, 4), (4, 4)),
    "rectangular": ((3, 7), (7, 5)),
    "batched": ((4, 4, 4), (4, 4, 4)),
    "heads": ((2, 3, 5, 4), (2, 3, 4, 7)),
    "broadcast_a": ((3, 2), (2, 5, 2, 4)),
    "broadcast_b": ((2, 5, 3, 6), (6, 4)),
    "broadcast_both": ((2, 1, 3, 6), (5, 6, 2)),
    "one_deep": ((2, 3, 1), (2, 1, 4)),
    "one_row": ((2, 1, 5), (2, 5, 3)),
    "one_column": ((2, 4, 5), (2, 5, 1)),
    "row_vector": ((5,), (2, 5, 3)),
    "column_vector": ((2, 3, 5), (5,)),
    "vectors": ((6,), (6,)),
}
every_shape = pytest.mark.parametrize("name", SHAPES)
signedness = pytest.mark.parametrize(
    ("a_signed", "b_signed"), list(itertools.product([False, True], repeat=2)), ids=["u×u", "u×s", "s×u", "s×s"]
)


def operands(name, seed=0):
    """Operands whose ranges straddle zero unevenly."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(shape, generator=generator) for shape in SHAPES[name])
    return a * 2 - 0.7, b * 3 - 2.1


def calibrated(multiplier, a, b, mode="approximate", **arguments):
    """A product calibrated on narrower ranges than a's and b's, so that both saturate."""
    return calibrate(ApproxMatmul(multiplier=multiplier, mode=mode, **arguments), [(0.8 * a, 0.8 * b)])


def calibrate(layer, pairs):
    """Calibrate on pairs of operands, which a model may only be given as a dict."""
    return approxconv.calibrate(layer, [{"a": a, "b": b} for a, b in pairs])


def faked(layer, multiplier, a, b):
    """Both operands as torch's fake quantisation leaves them."""
    af = torch.fake_quantize_per_tensor_affine(
        a, layer.activation_scale, layer.activation_zero_point, *multiplier.a_range
    )
    bf = torch.fake_quantize_per_tensor_affine(b, layer.weight_scale, layer.weight_zero_point, *multiplier.w_range)
    return af, bf


def oracle(layer, multiplier, a, b):
    """Gather and add in int64, take the zero points out, rescale in float64."""
    af, bf = faked(layer, multiplier, a, b)
    sa, sb = layer.activation_scale.double(), layer.weight_scale.double()
    za, zb = int(layer.activation_zero_point), int(layer.weight_zero_point)
    aq, bq = (af.double() / sa).round().long() + za, (bf.double() / sb).round().long() + zb
    left = aq.view(-1, 1) if a.ndim == 1 else aq.unsqueeze(-1)  # (..., M, K, 1)
    right = bq.view(-1, 1) if b.ndim == 1 else bq.unsqueeze(-3)  # (..., 1, K, N)
    products = multiplier.table.long()[left % 2**multiplier.a_bits, right % 2**multiplier.w_bits]
    total = (products - za * right - zb * left + za * zb).sum(-2)
    return total.double().view((a @ b).shape) * (sa * sb)


def assert_same(got, expected, rtol=2e-6):
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol * expected.abs().max().item())


@every_shape
@signedness
def test_approximate_product_is_the_oracle(name, a_signed, b_signed, hostile):
    multiplier = hostile(8, a_signed, b_signed)
    a, b = operands(name)
    layer = calibrated(multiplier, a, b)
    assert (int(layer.activation_zero_point) == 0) == a_signed
    assert (int(layer.weight_zero_point) == 0) == b_signed
    assert_same(layer(a, b), oracle(layer, multiplier, a, b))


@every_shape
@signedness
def test_quantised_product_is_its_fake_quantised_twin(name, a_signed, b_signed):
    multiplier = Multiplier.exact(8, a_signed, b_signed)
    a, b = operands(name, seed=1)
    layer = calibrated(multiplier, a, b, mode="quantized")
    af, bf = faked(layer, multiplier, a, b)
    quantised = layer(a, b)
    assert_same(quantised, af.double() @ bf.double())
    assert not torch.allclose(quantised, a @ b, rtol=1e-4)
    layer.mode = "approximate"
    assert torch.equal(layer(a, b), quantised)
    layer.mode = "float"
    assert torch.equal(layer(a, b), a @ b)


@pytest.mark.parametrize("bits", [4, (4, 8), (8, 4), (3, 5)], ids=str)
def test_narrow_operands(bits, hostile):
    multiplier = hostile(bits, False, True)
    a, b = operands("heads")
    layer = calibrated(multiplier, a, b)
    assert_same(layer(a, b), oracle(layer, multiplier, a, b))


def test_long_sums_leave_int32():
    largest = 2**31 // 4000 - 1
    table = torch.full((256, 256), largest)
    multiplier = Multiplier(table, a_signed=False, w_signed=False, name="large")
    a, b = torch.rand(2, 4000) - 0.5, torch.rand(4000, 3) - 0.5
    layer = calibrated(multiplier, a, b)
    assert_same(layer(a, b), oracle(layer, multiplier, a, b))


@every_shape
@signedness
def test_gradient_is_that_of_the_exact_product_of_fake_quantised_operands(name, a_signed, b_signed, hostile):
    multiplier = hostile(8, a_signed, b_signed)
    a, b = (operand.requires_grad_() for operand in operands(name, seed=2))
    layer = calibrated(multiplier, a.detach(), b.detach())
    output = layer(a, b)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((output * weights).sum(), (a, b))
    af, bf = faked(layer, multiplier, a, b)
    expected = torch.autograd.grad(((af @ bf) * weights).sum(), (a, b))
    for g, e in zip(got, expected, strict=True):
        assert_same(g, e, rtol=1e-5)
    assert got[0].count_nonzero() < got[0].numel() or name == "one_deep"  # a saturates here and there


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_operand(which, hostile):
    pair = list(operands("heads"))
    layer = calibrated(hostile(8, False, False), *pair)
    both = [operand.clone().requires_grad_() for operand in pair]
    expected = torch.autograd.grad(layer(*both).sum(), both)
    pair[which].requires_grad_()
    layer(*pair).sum().backward()
    assert torch.equal(pair[which].grad, expected[which])


@pytest.mark.parametrize("name", ["rectangular", "heads", "broadcast_both", "row_vector", "column_vector"])
@signedness
@pytest.mark.parametrize("gradient", ["lre", "smooth"])
def test_gradient_by_tables_is_their_sum(name, a_signed, b_signed, gradient, hostile):
    multiplier = hostile(4, a_signed, b_signed)
    a, b = (operand.requires_grad_() for operand in operands(name, seed=4))
    layer = calibrated(multiplier, a.detach(), b.detach(), gradient=gradient)
    output = layer(a, b)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((output * weights).sum(), (a, b))

    tables = gradient_tables(multiplier, gradient)
    sa, sb = layer.activation_scale.double(), layer.weight_scale.double()
    za, zb = int(layer.activation_zero_point), int(layer.weight_zero_point)
    rows, columns = a.view(1, -1) if a.ndim == 1 else a, b.view(-1, 1) if b.ndim == 1 else b
    real_a, real_b = ((x.detach().double() / s).round() + z for x, s, z in ((rows, sa, za), (columns, sb, zb)))
    aq, bq = real_a.clamp(*multiplier.a_range).long(), real_b.clamp(*multiplier.w_range).long()
    at = aq.unsqueeze(-1) % 16, bq.unsqueeze(-3) % 16  # (..., M, K, 1) and (..., 1, K, N)
    weights = weights.double().view((rows @ columns).shape).unsqueeze(-2)
    of_a = (weights * sb * (tables.by_activation.double()[at] - zb)).sum(-1).sum_to_size(rows.shape) * (aq == real_a)
    of_b = (weights * sa * (tables.by_weight.double()[at] - za)).sum(-3).sum_to_size(columns.shape) * (bq == real_b)
    assert_same(got[0], of_a.view(a.shape), rtol=1e-4)
    assert_same(got[1], of_b.view(b.shape), rtol=1e-4)


def test_codes_of_b_are_the_weights_and_its_range_the_activations(hostile):
    quantization = Quantization(
        activation=OperandQuantization(bits=5, range="percentile", percentile=80.0),
        weight=OperandQuantization(bits=6, scheme="affine", range="mse"),
    )
    multiplier = hostile(8, True, False)
    a, b = operands("heads")
    layer = calibrated(multiplier, a, b, quantization=quantization)
    assert layer.activation_zero_point == 0
    assert layer.weight_zero_point != 0
    assert 0.8 * a.abs().max() > 1.05 * 15.5 * layer.activation_scale  # what lies outside the percentile is clipped
    assert 0.8 * (b.max() - b.min()) > 1.05 * 63 * layer.weight_scale
    af = torch.fake_quantize_per_tensor_affine(a, layer.activation_scale, 0, -16, 15)
    bf = torch.fake_quantize_per_tensor_affine(b, layer.weight_scale, layer.weight_zero_point, 0, 63)
    layer.mode = "quantized"
    assert_same(layer(a, b), af.double() @ bf.double())


def test_learned_scales_of_both_operands(hostile):
    quantization = Quantization(activation=OperandQuantization(range="lsq"))
    a, b = operands("heads")
    layer = calibrated(Multiplier.exact(8, False, True), a, b, quantization=quantization)
    assert dict(layer.named_parameters()).keys() == {"activation_scale", "weight_scale"}
    before = layer(a, b)
    ((before - a @ b) ** 2).sum().backward()
    assert all(scale.grad != 0 for scale in layer.parameters())
    with torch.no_grad():
        layer.weight_scale.mul_(1.5)
    assert not torch.allclose(layer(a, b), before)


def test_ranges_that_move_in_training(hostile):
    a, b = operands("heads")
    layer = ApproxMatmul(multiplier=hostile(), quantization=Quantization(freeze=False))
    layer(a, b)
    layer(2 * a, 3 * b)
    frozen = calibrate(ApproxMatmul(multiplier=hostile()), [(a, b), (2 * a, 3 * b)])
    assert torch.equal(layer.eval()(a, b), frozen(a, b))


def test_another_multiplier(hostile):
    a, b = operands("heads")
    layer = calibrated(hostile(8, False, False), a, b)
    layer.set_multiplier(hostile(8, True, True, seed=1))
    assert torch.equal(layer(a, b), calibrated(hostile(8, True, True, seed=1), a, b)(a, b))


def test_noise_has_the_errors_mean_and_variance():
    table = Multiplier.exact(8, False, True).table + torch.tensor([10, 50]).repeat(128)
    multiplier = Multiplier(table, a_signed=False, w_signed=True, name="noisy")
    torch.manual_seed(0)
    a, b = torch.rand(100, 9), torch.rand(9, 50) - 0.5
    layer = calibrated(multiplier, a, b, mode="noise")
    with torch.no_grad():
        output = layer(a, b)
    error = output - approxconv.set_mode(layer, "quantized")(a, b)
    unit = layer.activation_scale * layer.weight_scale
    assert error.mean() / unit == pytest.approx(9 * 30, rel=0.05)
    assert error.std() / unit == pytest.approx((9 * 400) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((0, 4), (4, 3)), ((3, 0), (0, 2)), ((3, 4), (4, 0)), ((0, 3, 4), (0, 4, 2)), ((0, 3, 4), (4, 2))],
)
def test_dimensions_of_size_0(a_shape, b_shape, hostile):
    layer = calibrated(hostile(8, False, False), *operands("rectangular"))
    a, b = torch.rand(a_shape, requires_grad=True), torch.rand(b_shape, requires_grad=True)
    output = layer(a, b)
    assert torch.equal(output, a @ b)  # empty, or sums of nothing
    output.sum().backward()
    assert torch.equal(a.grad, torch.zeros(a_shape))
    assert torch.equal(b.grad, torch.zeros(b_shape))


def test_strided_operands(hostile):
    a, b = operands("heads")
    layer = calibrated(hostile(), a, b)
    expected = layer(a, b)
    assert torch.equal(layer(a.mT.contiguous().mT, b.mT.contiguous().mT), expected)
    assert torch.equal(layer(a.transpose(0, 2).contiguous().transpose(0, 2), b.repeat_interleave(2, 0)[::2]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_operands_are_quantised_in_float(dtype, hostile):
    a, b = (operand.to(dtype) for operand in operands("heads"))
    layer = calibrated(hostile(), a.float(), b.float())
    output = layer(a, b)
    assert output.dtype == dtype
    assert torch.equal(output, layer(a.float(), b.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(a.float(), b.float()), layer(a, b.float()).float())
    layer.half()
    assert layer.activation_scale.dtype == layer.weight_scale.dtype == torch.float32


def test_state_round_trip(hostile):
    a, b = operands("heads")
    layer = calibrated(hostile(), a, b)
    other = ApproxMatmul(multiplier=hostile(seed=1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(a, b), layer(a, b))
    assert torch.equal(copy.deepcopy(layer)(a, b), layer(a, b))


def test_calibration_starts_anew(hostile):
    a, b = operands("heads")
    layer = calibrated(hostile(), 100 * a, 100 * b)
    calibrate(layer, [(0.5 * a, b), (a, 0.5 * b)])
    again = calibrate(ApproxMatmul(multiplier=hostile()), [(a, b)])
    assert torch.equal(layer.activation_scale, again.activation_scale)
    assert torch.equal(layer.weight_scale, again.weight_scale)


def test_errors(hostile):
    with pytest.raises(ValueError, match="mode"):
        ApproxMatmul(multiplier=hostile(), mode="fast")
    layer = ApproxMatmul(multiplier=hostile())
    with pytest.raises(RuntimeError, match="calibrate"):
        layer(torch.rand(2, 3), torch.rand(3, 2))
    calibrate(layer, [(torch.rand(2, 3), torch.rand(3, 2))])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 3\)"):
        layer(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"\(\)"):
        layer(torch.rand(()), torch.rand(2, 3))


@pytest.mark.slow
def test_traced(hostile):
    a, b = operands("heads")
    layer = calibrated(hostile(8, False, False), a, b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        pair = [operand.clone().requires_grad_() for operand in (a, b)]
        output = run(*pair)
        results.append((output, *torch.autograd.grad(output.square().sum(), pair)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(torch.export.export(layer, (a, b)).module()(a, b), layer(a, b))


def test_is_a_matmul_and_says_its_multiplier(hostile):
    layer = ApproxMatmul(multiplier=hostile(), engine="reference")
    assert isinstance(layer, Matmul)
    assert layer.extra_repr() == "multiplier=hostile0, mode=approximate, engine=reference"
    assert layer.operand_shapes((2, 3, 4), (4, 5)) == ((2, 3, 4), (5, 4), ())
    assert type(layer.to_float()) is Matmul
    assert layer.operand_shapes((4,), (4,)) == ((1, 4), (1, 4), ())
