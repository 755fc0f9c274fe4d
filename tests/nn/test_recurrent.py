"""Recurrent cells against torch's, their fake-quantised twins and a slow oracle."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import approxconv
from approxconv import Multiplier
from approxconv.nn import ApproxGRU, ApproxGRUCell, ApproxLSTM, ApproxLSTMCell

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
    with pytest.raises(ValueError, match="part of"):
        layer.ih.to_float()
    expected = stock(x, state)
    back = layer.to_float()
    assert type(back) is type(stock)
    assert vars(back).keys() == vars(stock).keys()
    assert back.weight_ih is stock.weight_ih
    torch.testing.assert_close(back(x, state), expected, rtol=0, atol=0)


@every_cell
def test_parameters_are_read_anew(kind, hostile):
    """As `torch.func.functional_call` and optimizers want it, in eval mode too, where codes are kept."""
    stock, x, state = make(kind)
    layer = convert(stock, kind, hostile(), x, state).eval()
    with torch.no_grad():
        before = stacked(layer(x, state))
        assert torch.equal(stacked(layer(x, state)), before)
        others = {name: parameter * 0.7 for name, parameter in layer.named_parameters()}
        called = stacked(torch.func.functional_call(layer, others, (x, state)))
        assert torch.equal(stacked(layer(x, state)), before)
        for name, parameter in layer.named_parameters():
            parameter.copy_(others[name])
        assert torch.equal(stacked(layer(x, state)), called)
    assert not torch.equal(called, before)


@every_cell
@pytest.mark.slow
def test_traced(kind, hostile):
    stock, x, state = make(kind)
    layer = convert(stock, kind, hostile(), x, state)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        output = stacked(run(x, state))
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


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


# Whole sequences

LENGTH = 6
SEQUENCES = {
    "plain": {},
    "deep": dict(num_layers=2, batch_first=True, bias=False),
    "both_ways": dict(num_layers=2, bidirectional=True),
    "both_ways_batch_first": dict(bidirectional=True, batch_first=True),
}
RECURRENT = {
    **{f"lstm-{name}": (nn.LSTM, ApproxLSTM, options) for name, options in SEQUENCES.items()},
    "lstm-projected": (nn.LSTM, ApproxLSTM, dict(num_layers=2, proj_size=2, bidirectional=True)),
    **{f"gru-{name}": (nn.GRU, ApproxGRU, options) for name, options in SEQUENCES.items()},
}
every_sequence = pytest.mark.parametrize("name", RECURRENT)


def sequence(name, seed=0):
    """A stock layer, an input and first states."""
    torch.manual_seed(seed)
    kind, _, options = RECURRENT[name]
    stock = kind(INPUT, HIDDEN, **options)
    x = torch.randn(LENGTH, BATCH, INPUT) + 0.3
    count = stock.num_layers * (1 + stock.bidirectional)
    h, c = torch.randn(count, BATCH, stock.proj_size or HIDDEN), torch.randn(count, BATCH, HIDDEN)
    return stock, x.transpose(0, 1).contiguous() if stock.batch_first else x, (h, c) if kind is nn.LSTM else h


def flat(results):
    """Output and states in one list."""
    output, states = results
    return [
        output.data if isinstance(output, PackedSequence) else output,
        *(states if isinstance(states, tuple) else (states,)),
    ]


@every_sequence
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_float_sequence_is_torchs(name, hostile):
    stock, x, state = sequence(name)
    layer = RECURRENT[name][1].from_float(copy.deepcopy(stock), hostile(), mode="float")
    one = x.select(0 if stock.batch_first else 1, 0)
    one_state = tuple(each[:, 0] for each in state) if isinstance(state, tuple) else state[:, 0]
    for arguments in ((x, state), (x,), (one, one_state), (one,)):
        for got, expected in zip(flat(layer(*arguments)), flat(stock(*arguments)), strict=True):
            torch.testing.assert_close(got, expected)


@every_sequence
@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "unsorted"])
def test_packed_sequence_is_torchs(name, ordered, hostile):
    stock, x, state = sequence(name)
    layer = RECURRENT[name][1].from_float(copy.deepcopy(stock), hostile(), mode="float")
    lengths = [6, 5, 2, 2] if ordered else [2, 6, 1, 5]
    packed = pack_padded_sequence(x, lengths, batch_first=stock.batch_first, enforce_sorted=ordered)
    for arguments in ((packed, state), (packed,)):
        got, expected = layer(*arguments), stock(*arguments)
        for one, other in zip(flat(got), flat(expected), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(pad_packed_sequence(got[0]), pad_packed_sequence(expected[0]))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_approximate_sequence_is_its_cells(kind, hostile):
    name = f"{kind}-plain"
    stock, x, state = sequence(name)
    layer = RECURRENT[name][1].from_float(stock, hostile())
    approxconv.calibrate(layer, [{"input": x, "hx": state}])
    cell = CELLS[kind][1](INPUT, HIDDEN, multiplier=hostile())
    cell.load_state_dict({key.replace("_l0", ""): value for key, value in layer.state_dict().items()})
    now = tuple(each[0] for each in state) if kind == "lstm" else state[0]
    output, last = layer(x, state)
    for t in range(LENGTH):
        now = cell(x[t], now)
        assert torch.equal(output[t], now[0] if kind == "lstm" else now)
    assert torch.equal(stacked(last)[:, 0] if kind == "lstm" else last[0], stacked(now))


@every_sequence
def test_sequence_with_the_exact_multiplier(name):
    stock, x, state = sequence(name)
    layer = RECURRENT[name][1].from_float(copy.deepcopy(stock), Multiplier.exact(8, False, True))
    approxconv.calibrate(layer, [{"input": x, "hx": state}])
    approximate = flat(layer(x, state))
    layer.mode = "quantized"
    for got, quantised, expected in zip(approximate, flat(layer(x, state)), flat(stock(x, state)), strict=True):
        assert torch.equal(got, quantised)
        assert 1e-6 < (got - expected).norm() < 0.05 * expected.norm()
    approximate[0].sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.count_nonzero() > 0


@every_sequence
def test_sequence_layers_names_copies_and_way_back(name, hostile):
    kind, approximate, options = RECURRENT[name]
    stock, x, state = sequence(name)
    layer = approximate.from_float(copy.deepcopy(stock), hostile())
    approxconv.calibrate(layer, [{"input": x, "hx": state}])
    assert list(dict(layer.named_parameters())) == list(dict(stock.named_parameters()))
    expected = flat(layer(x, state))
    other = approximate(INPUT, HIDDEN, **options, multiplier=hostile(seed=1))
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for got, wanted in zip(flat(copied(x, state)), expected, strict=True):
            assert torch.equal(got, wanted)
    layer.to(torch.float32)
    for back in (layer.to_float(), other.to_float()):
        assert type(back) is kind
        assert vars(back).keys() == vars(stock).keys()
        for got, wanted in zip(flat(back(x, state)), flat(stock(x, state)), strict=True):
            assert torch.equal(got, wanted)
        copy.deepcopy(back)(x)


def test_dropout_between_layers(hostile):
    stock, x, _ = sequence("lstm-deep")
    stock.dropout = 1.0
    layer = ApproxLSTM.from_float(copy.deepcopy(stock), hostile(), mode="float")
    for got, expected in zip(flat(layer(x)), flat(stock(x)), strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(flat(layer.eval()(x)), flat(stock.eval()(x)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["lstm-plain", "gru-deep"])
def test_bad_sequences(name, hostile):
    stock, x, state = sequence(name)
    layer = RECURRENT[name][1].from_float(stock, hostile(), mode="float")
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        layer(x[None])
    with pytest.raises(RuntimeError, match="input_size"):
        layer(x[..., 1:], state)
    with pytest.raises(RuntimeError, match="hidden"):
        layer(x, tuple(each[:, 1:] for each in state) if isinstance(state, tuple) else state[:, 1:])
    with pytest.raises(ValueError, match="one step"):
        layer(x[:, :0] if stock.batch_first else x[:0])
    assert layer.extra_repr().endswith("multiplier=hostile0, mode=float, engine=auto")
