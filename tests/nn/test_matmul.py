"""The product of two activations against a slow int64 oracle and its fake-quantised twin."""

import copy
import itertools

import pytest
import torch

import approxconv
from approxconv import Multiplier
from approxconv.nn import ApproxMatmul, Matmul

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


def calibrated(multiplier, a, b, mode="approximate"):
    """A product calibrated on narrower ranges than a's and b's, so that both saturate."""
    layer = ApproxMatmul(multiplier=multiplier, mode=mode)
    return calibrate(layer, [(0.8 * a, 0.8 * b)])


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


def test_is_a_matmul_and_says_its_multiplier(hostile):
    layer = ApproxMatmul(multiplier=hostile(), engine="reference")
    assert isinstance(layer, Matmul)
    assert layer.extra_repr() == "multiplier=hostile0, mode=approximate, engine=reference"
    assert layer.operand_shapes((2, 3, 4), (4, 5)) == ((2, 3, 4), (5, 4), ())
    assert layer.operand_shapes((4,), (4,)) == ((1, 4), (1, 4), ())
