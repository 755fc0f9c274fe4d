"""Recurrent cells against torch's, their fake-quantised twins and a slow oracle."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import approxconv
from approxconv import Multiplier
from approxconv.nn import ApproxGRUCell, ApproxLSTMCell

CELLS = {"lstm": (nn.LSTMCell, ApproxLSTMCell), "gru": (nn.GRUCell, ApproxGRUCell)}
every_cell = pytest.mark.parametrize("kind", CELLS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
signedness = pytest.mark.parametrize(
    ("a_signed", "w_signed"), list(itertools.product([False, True], repeat=2)), ids=["u×u", "u×s", "s×u", "s×s"]
)
INPUT, HIDDEN, BATCH = 5, 3, 4


def make(kind, bias=True, seed=0):
    """A stock cell whose gates' weights differ in magnitude and offset, an input, and a state."""
    torch.manual_seed(seed)
    stock = CELLS[kind][0](INPUT, HIDDEN, bias)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(torch.linspace(0.3, 3, len(parameter)).view(-1, *[1] * (parameter.ndim - 1))).add_(0.1)
    x, h, c = torch.randn(BATCH, INPUT) + 0.4, torch.rand(BATCH, HIDDEN) - 0.3, torch.randn(BATCH, HIDDEN)
    return stock, x, (h, c) if kind == "lstm" else h


def convert(stock, kind, multiplier, x, state, mode="approximate"):
    layer = CELLS[kind][1].from_float(copy.deepcopy(stock), multiplier, mode=mode)
    return approxconv.calibrate(layer, [{"input": x, "hx": state}])


def stacked(output):
    return torch.stack(output) if isinstance(output, tuple) else output


def faked(product, x, multiplier):
    """The product's operands as torch's fake quantisation leaves them."""
    xf = torch.fake_quantize_per_tensor_affine(
        x, product.activation_scale, product.activation_zero_point, *multiplier.a_range
    )
    wf = torch.fake_quantize_per_channel_affine(
        product.weight, product.weight_scale, product.weight_zero_point, 0, *multiplier.w_range
    )
    return xf, wf


def twin(product, x, multiplier):
    return nn.functional.linear(*faked(product, x, multiplier), product.bias)


def oracle(product, x, multiplier):
    """Gather and add in int64, take the zero points out, rescale in float64."""
    xf, wf = (operand.detach().double() for operand in faked(product, x, multiplier))
    sx, zx = product.activation_scale.double(), int(product.activation_zero_point)
    sw, zw = product.weight_scale.double()[:, None], product.weight_zero_point.long()[:, None]
    xq, wq = (xf / sx).round().long().unsqueeze(-2) + zx, (wf / sw).round().long() + zw
    products = multiplier.table.long()[xq % 2**multiplier.a_bits, wq % 2**multiplier.w_bits]
    y = (products - zx * wq - zw * xq + zx * zw).sum(-1) * (sx * sw.view(-1))
    return y if product.bias is None else y + product.bias.double()


def step(layer, x, state, multiplier, product):
    """The cell by torch's formulas, its two products computed by `product`."""
    h = state[0] if isinstance(state, tuple) else state
    from_x, from_h = product(layer.ih, x, multiplier), product(layer.hh, h, multiplier)
    if isinstance(layer, nn.LSTMCell):
        i, f, g, o = (from_x + from_h).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return torch.stack((o.sigmoid() * c.tanh(), c))
    (r, z, n), (hr, hz, hn) = from_x.chunk(3, 1), from_h.chunk(3, 1)
    n = torch.tanh(n + (r + hr).sigmoid() * hn)
    z = (z + hz).sigmoid()
    return (1 - z) * n + z * h


def beyond(x, state):
    """An input and a state that leave the calibrated range."""
    return 1.3 * x, (1.3 * state[0], state[1]) if isinstance(state, tuple) else 1.3 * state


@every_cell
@biases
def test_float_mode_is_torch(kind, bias, hostile):
    stock, x, state = make(kind, bias)
    layer = CELLS[kind][1].from_float(copy.deepcopy(stock), hostile(), mode="float")
    one = (state[0][0], state[1][0]) if kind == "lstm" else state[0]
    for arguments in ((x, state), (x,), (x[0], one), (x[0],), (x[:0],)):
        torch.testing.assert_close(layer(*arguments), stock(*arguments))


@every_cell
@biases
@signedness
def test_quantised_cell_is_its_fake_quantised_twin(kind, bias, a_signed, w_signed):
    multiplier = Multiplier.exact(8, a_signed, w_signed)
    stock, x, state = make(kind, bias)
    layer = convert(stock, kind, multiplier, x, state, mode="quantized")
    assert not torch.equal(layer.ih.activation_scale, layer.hh.activation_scale)
    x, state = beyond(x, state)
    got = stacked(layer(x, state))
    torch.testing.assert_close(got, step(layer, x, state, multiplier, twin), rtol=1e-4, atol=1e-5)
    assert (got - stacked(stock(x, state))).abs().max() > 1e-3
    layer.mode = "approximate"
    assert torch.equal(stacked(layer(x, state)), got)


@every_cell
@biases
@signedness
def test_approximate_cell_is_the_oracle(kind, bias, a_signed, w_signed, hostile):
    multiplier = hostile(8, a_signed, w_signed, largest=20_000)
    stock, x, state = make(kind, bias)
    layer = convert(stock, kind, multiplier, x, state)
    x, state = beyond(x, state)
    expected = step(layer, x, state, multiplier, oracle)
    torch.testing.assert_close(stacked(layer(x, state)).double(), expected, rtol=1e-4, atol=1e-5)


@every_cell
@biases
def test_gradient_through_time_is_that_of_the_fake_quantised_twin(kind, bias):
    multiplier = Multiplier.exact(8, False, False)
    stock, x, state = make(kind, bias)
    layer = convert(stock, kind, multiplier, x, state)
    gradients = []
    for run in (layer, lambda x, state: step(layer, x, state, multiplier, twin)):
        operand = x.clone().requires_grad_()
        now = state
        for _ in range(3):
            now = run(operand, now)
            now = tuple(now) if kind == "lstm" else now
        loss = (stacked(now) * torch.arange(1.0, 1 + HIDDEN)).sum()
        gradients.append(torch.autograd.grad(loss, [operand, *layer.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm()


@every_cell
@biases
def test_state_and_names(kind, bias, hostile):
    stock, x, state = make(kind, bias)
    layer = convert(stock, kind, hostile(), x, state)
    assert list(dict(layer.named_parameters())) == list(dict(stock.named_parameters()))
    other = CELLS[kind][1](INPUT, HIDDEN, bias, multiplier=hostile(seed=1))
    missing, unexpected = other.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(stock.state_dict())
    other.load_state_dict(layer.state_dict())
    expected = stacked(layer(x, state))
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(stacked(copied(x, state)), expected)
        with torch.no_grad():
            copied.weight_hh.add_(1)
        assert not torch.equal(stacked(copied(x, state)), expected)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(kind, dtype):
    stock, x, state = make(kind)
    layer = convert(stock, kind, Multiplier.exact(8, False, True), x, state)
    expected = stacked(layer(x, state))
    layer = layer.to(dtype)
    state = tuple(s.to(dtype) for s in state) if kind == "lstm" else state.to(dtype)
    output = stacked(layer(x.to(dtype), state))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@every_cell
def test_from_float_and_repr(kind, hostile):
    stock, x, state = make(kind)
    layer = CELLS[kind][1].from_float(stock, hostile(), engine="reference")
    assert isinstance(layer, CELLS[kind][0])
    assert layer.weight_ih is stock.weight_ih
    assert layer.extra_repr() == "5, 3, multiplier=hostile0, mode=approximate, engine=reference"
    assert approxconv.nn.approx_layers(layer).keys() == {"ih", "hh"}
    with pytest.raises(RuntimeError, match="calibrate"):
        layer(x, state)
    stock(x, state)


@every_cell
def test_bad_shapes(kind, hostile):
    stock, x, _ = make(kind)
    layer = CELLS[kind][1].from_float(stock, hostile(), mode="float")
    for bad in (x[..., :-1], x[None], x[0, 0]):
        with pytest.raises(ValueError, match=r"input must be \(B, 5\) or \(5,\)"):
            layer(bad)
    good, bad = torch.zeros(BATCH, HIDDEN), torch.zeros(HIDDEN)
    with pytest.raises(ValueError, match=r"hx(\[0\])? must be \(4, 3\), got \(3,\)"):
        layer(x, (bad, good) if kind == "lstm" else bad)
    if kind == "lstm":
        with pytest.raises(ValueError, match=r"hx\[1\] must be \(4, 3\)"):
            layer(x, (good, good[:1]))
