"""One layer against its fake-quantised torch twin and against a slow int64 oracle."""

import copy
import io
import itertools
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import approxconv
from approxconv import Multiplier
from approxconv.engines import cpu, reference
from approxconv.nn import ApproxConv2d, ApproxLinear

BUFFERS = {
    "table",
    "operands_signed",
    "activation_scale",
    "activation_zero_point",
    "weight_scale",
    "weight_zero_point",
    "calibrated",
}
# name: (Conv2d's arguments, (H, W)). "plain" has batch = channels = filters = H' = W', so a vector over channels
# broadcasts along any axis without an error.
CONVOLUTIONS = {
    "plain": (dict(in_channels=4, out_channels=4, kernel_size=3, padding=1), (4, 4)),
    "not_square": (
        dict(in_channels=3, out_channels=5, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)),
        (9, 7),
    ),
    "strided_past_the_end": (dict(in_channels=2, out_channels=3, kernel_size=(2, 3), stride=(3, 2)), (9, 8)),
    "groups": (dict(in_channels=6, out_channels=4, kernel_size=3, padding=1, groups=2), (5, 6)),
    "depthwise": (dict(in_channels=3, out_channels=3, kernel_size=3, padding=1, groups=3), (5, 4)),
    "depthwise_twice_the_channels": (
        dict(in_channels=3, out_channels=6, kernel_size=(2, 3), stride=(1, 2), padding=(1, 0), groups=3),
        (5, 8),
    ),
    "depthwise_dilated": (
        dict(in_channels=4, out_channels=4, kernel_size=(3, 1), dilation=(2, 1), padding=(2, 1), groups=4),
        (6, 3),
    ),
    "one_channel": (dict(in_channels=1, out_channels=3, kernel_size=3, padding=2), (4, 4)),
    "pointwise": (dict(in_channels=7, out_channels=5, kernel_size=1), (3, 3)),
    "pointwise_padded": (dict(in_channels=3, out_channels=2, kernel_size=1, padding=1), (2, 3)),
    "kernel_is_the_input": (dict(in_channels=2, out_channels=3, kernel_size=(5, 6)), (5, 6)),
    "same": (dict(in_channels=3, out_channels=4, kernel_size=3, padding="same", dilation=2), (6, 5)),
    "same_even": (dict(in_channels=3, out_channels=4, kernel_size=(2, 4), padding="same"), (5, 6)),
    "same_even_depthwise": (dict(in_channels=3, out_channels=3, kernel_size=4, padding="same", groups=3), (5, 6)),
    "valid": (dict(in_channels=3, out_channels=4, kernel_size=3, padding="valid", stride=2), (6, 5)),
    "reflect": (dict(in_channels=3, out_channels=4, kernel_size=3, padding=(2, 1), padding_mode="reflect"), (4, 5)),
    "circular": (
        dict(in_channels=4, out_channels=4, kernel_size=3, padding=(1, 2), padding_mode="circular", groups=2),
        (4, 5),
    ),
    "replicate": (dict(in_channels=2, out_channels=2, kernel_size=2, padding=1, padding_mode="replicate"), (3, 3)),
    "same_reflect": (
        dict(in_channels=2, out_channels=3, kernel_size=(4, 3), padding="same", padding_mode="reflect"),
        (5, 5),
    ),
    "no_bias": (dict(in_channels=3, out_channels=4, kernel_size=3, padding=1, bias=False), (4, 4)),
}
# name: (Linear's arguments, leading dimensions of the input)
LINEARS = {
    "square": (dict(in_features=6, out_features=6), (6,)),
    "odd": (dict(in_features=17, out_features=3), (5,)),
    "one_in": (dict(in_features=1, out_features=4), (3,)),
    "one_out": (dict(in_features=9, out_features=1), (3,)),
    "three_dimensions": (dict(in_features=7, out_features=5), (2, 3)),
    "four_dimensions": (dict(in_features=4, out_features=4), (4, 4, 4)),
    "vector": (dict(in_features=7, out_features=5), ()),
    "no_bias": (dict(in_features=7, out_features=5, bias=False), (3,)),
}
LAYERS = {**{f"conv-{k}": k for k in CONVOLUTIONS}, **{f"linear-{k}": k for k in LINEARS}}
every_layer = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", ["conv-not_square", "conv-depthwise_twice_the_channels", "linear-odd"])
signedness = pytest.mark.parametrize(
    ("a_signed", "w_signed"),
    list(itertools.product([False, True], repeat=2)),
    ids=["u×u", "u×s", "s×u", "s×s"],
)
RANGES = {"zero_at_low": (0.0, 1.0), "zero_at_high": (-1.0, 0.0), "zero_inside": (-0.7, 1.3)}
ranges = pytest.mark.parametrize("where", RANGES)


def fill_parameters(layer, generator):
    """Weights that straddle zero unevenly, another magnitude and another offset every channel."""
    with torch.no_grad():
        column = (-1, *[1] * (layer.weight.ndim - 1))
        count = len(layer.weight)
        magnitude = torch.logspace(-1, 0.5, count).view(column)
        offset = torch.linspace(-0.8, 0.8, count).view(column)
        noise = torch.rand(layer.weight.shape, generator=generator) * 2 - 1
        layer.weight.copy_((noise + offset) * magnitude)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))


def make(name, where="zero_inside", seed=0):
    """A stock layer, a batch to calibrate with, and an input that leaves the calibrated range at both ends."""
    generator = torch.Generator().manual_seed(seed)
    kind, case = name.split("-", 1)
    if kind == "conv":
        arguments, size = CONVOLUTIONS[case]
        stock, shape = nn.Conv2d(**arguments), (4, arguments["in_channels"], *size)
    else:
        arguments, lead = LINEARS[case]
        stock, shape = nn.Linear(**arguments), (*lead, arguments["in_features"])
    fill_parameters(stock, generator)
    low, high = RANGES[where]
    x = torch.rand(shape, generator=generator) * (high - low) * 1.2 + low - 0.1 * (high - low)
    ends = torch.tensor([low, high]).repeat(math.prod(shape) // 2 + 1)[: math.prod(shape)].view(shape)
    if ends.numel() == 1:
        ends = ends.new_tensor([[low], [high]])
    return stock, ends, x


def convert(stock, multiplier, batch, mode="approximate", **arguments):
    layer = approxconv.approximate(stock, multiplier, mode=mode, **arguments)
    return approxconv.calibrate(layer, [batch])


def with_mode(layer, mode):
    return approxconv.set_mode(copy.deepcopy(layer), mode)


def faked_operands(layer, multiplier, x):
    """What torch's fake quantisation makes of input and weight, with the layer's scales and zero points."""
    xf = torch.fake_quantize_per_tensor_affine(
        x, layer.activation_scale, layer.activation_zero_point, *multiplier.a_range
    )
    wf = torch.fake_quantize_per_channel_affine(
        layer.weight, layer.weight_scale, layer.weight_zero_point, 0, *multiplier.w_range
    )
    return xf, wf


def twin(stock, layer, multiplier, x):
    """The stock layer on fake-quantised operands, in float64."""
    xf, wf = faked_operands(layer, multiplier, x)
    layer = copy.deepcopy(stock).double()
    with torch.no_grad():
        layer.weight.copy_(wf)
        return layer(xf.double())


def patches(stock, codes, zero_point):
    """Codes (B, C, H, W) to (B, g, 1, K, L); padded positions hold the zero point."""
    kernel, dilation = stock.kernel_size, stock.dilation
    if stock.padding == "valid":
        pads = [0] * 4
    elif stock.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2)]
    else:
        pads = [stock.padding[1]] * 2 + [stock.padding[0]] * 2
    codes = codes.double()
    if stock.padding_mode == "zeros":
        codes = F.pad(codes, pads, value=zero_point)
    else:
        codes = F.pad(codes, pads, mode=stock.padding_mode)
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(codes.shape[2:], dilation, kernel, stock.stride, strict=True)
    ]
    columns = F.unfold(codes, kernel, dilation, 0, stock.stride).long()
    return columns.unflatten(1, (stock.groups, 1, -1)), size


def oracle(stock, layer, multiplier, x):
    """Gather and add in int64, take the zero points out, rescale in float64."""
    sx, zx = layer.activation_scale.double(), int(layer.activation_zero_point)
    sw, zw = layer.weight_scale.double(), layer.weight_zero_point.long()
    xf, wf = faked_operands(layer, multiplier, x)
    xq = (xf.double() / sx).round().long() + zx
    column = (-1, *[1] * (wf.ndim - 1))
    wq = ((wf.double() / sw.view(column)).round().long() + zw.view(column)).flatten(1)
    if isinstance(stock, nn.Conv2d):
        a, size = patches(stock, xq, zx)  # (B, g, 1, K, L)
        w = wq.view(1, stock.groups, -1, wq.shape[1], 1)
        z = zw.view(1, stock.groups, -1, 1, 1)
        axis = 3
    else:
        a, w, z, axis = xq.unsqueeze(-2), wq, zw[:, None], -1
    products = multiplier.table.long()[a % 2**multiplier.a_bits, w % 2**multiplier.w_bits]
    total = (products - zx * w - z * a + zx * z).sum(axis)
    if isinstance(stock, nn.Conv2d):
        y = total.flatten(1, 2).unflatten(-1, size).double()
        column = (-1, 1, 1)
    else:
        y, column = total.double(), (-1,)
    y = y * (sx * sw).view(column)
    return y if stock.bias is None else y + stock.bias.detach().double().view(column)


def assert_same(got, expected, bias=None):
    """Equal but for the rounding of a few float32 operations."""
    assert got.shape == expected.shape
    scale = expected.abs().max().item() + (0 if bias is None else bias.abs().max().item())
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-6, atol=2e-6 * scale)


# Forward


@every_layer
@signedness
@ranges
def test_quantised_layer_is_its_fake_quantised_twin(name, a_signed, w_signed, where):
    multiplier = Multiplier.exact(8, a_signed, w_signed)
    stock, batch, x = make(name, where)
    layer = convert(stock, multiplier, batch, mode="quantized")
    low, high = multiplier.a_range
    zero_point = layer.activation_zero_point.item()
    if a_signed:
        assert zero_point == 0
    elif where == "zero_inside":
        assert low < zero_point < high
    else:
        assert zero_point == (low if where == "zero_at_low" else high)
    if not w_signed and len(layer.weight) > 2 and layer.weight[0].numel() > 2:
        assert layer.weight_zero_point.unique().numel() > 1

    quantised = layer(x)
    expected = twin(stock, layer, multiplier, x)
    assert quantised.dtype == torch.float32
    assert_same(quantised, expected, stock.bias)
    # The twin can tell: quantisation and saturation moved the output by far more than the tolerance.
    assert (expected - stock(x)).abs().max() > 1e-4
    assert torch.equal(approxconv.set_mode(layer, "approximate")(x), quantised)


@every_layer
@signedness
@ranges
def test_approximate_layer_is_the_oracle(name, a_signed, w_signed, where, hostile):
    multiplier = hostile(8, a_signed, w_signed)
    stock, batch, x = make(name, where, seed=1)
    layer = convert(stock, multiplier, batch)
    assert_same(layer(x), oracle(stock, layer, multiplier, x), stock.bias)


@some_layers
@pytest.mark.parametrize("bits", [4, (4, 8), (8, 4), (3, 5), 2, (7, 6)], ids=str)
@signedness
def test_narrow_operands(name, bits, a_signed, w_signed, hostile):
    stock, batch, x = make(name, seed=2)
    exact = Multiplier.exact(bits, a_signed, w_signed)
    layer = convert(stock, exact, batch, mode="quantized")
    quantised = layer(x)
    assert_same(quantised, twin(stock, layer, exact, x), stock.bias)
    assert torch.equal(with_mode(layer, "approximate")(x), quantised)

    multiplier = hostile(bits, a_signed, w_signed)
    layer = convert(stock, multiplier, batch)
    assert_same(layer(x), oracle(stock, layer, multiplier, x), stock.bias)
    assert torch.equal(with_mode(layer, "quantized")(x), quantised)


@some_layers
@signedness
def test_wide_table_and_full_range_operands(name, a_signed, w_signed, hostile):
    """Entries beyond 16 bits, every activation at an end of its range."""
    multiplier = hostile(8, a_signed, w_signed, largest=5_000_000)
    stock, batch, x = make(name, seed=3)
    x = x.sign() * 50
    layer = convert(stock, multiplier, batch)
    assert_same(layer(x), oracle(stock, layer, multiplier, x), stock.bias)


@pytest.mark.parametrize("seed", range(6))
def test_the_oracle_agrees_with_the_twin(seed):
    """Guards the tests: two independent expectations, one answer."""
    name = list(LAYERS)[seed * 5 % len(LAYERS)]
    multiplier = Multiplier.exact(8, False, False)
    stock, batch, x = make(name, seed=seed)
    layer = convert(stock, multiplier, batch)
    assert_same(oracle(stock, layer, multiplier, x), twin(stock, layer, multiplier, x), stock.bias)


@pytest.mark.parametrize("zero_point", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("w_signed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_padding_holds_the_zero_point_and_is_multiplied(zero_point, w_signed, groups):
    """A table with one column that knows which activation code it met."""
    table = torch.zeros(256, 256, dtype=torch.int64)
    table[zero_point] = 7
    multiplier = Multiplier(table, a_signed=False, w_signed=w_signed)
    stock = nn.Conv2d(4, 4, 3, padding=2, groups=groups, bias=False)
    fill_parameters(stock, torch.Generator().manual_seed(4))
    layer = convert(stock, multiplier, torch.rand(1, 4, 5, 5))
    layer.activation_scale.fill_(0.01)
    layer.activation_zero_point.fill_(zero_point)
    other = -1 if zero_point else 1
    x = torch.full((2, 4, 5, 5), 0.01 * other)
    y = layer(x).double() / (layer.activation_scale.double() * layer.weight_scale.double()).view(-1, 1, 1)
    # In the corner the 3×3 window meets one input pixel.
    depth = stock.weight[0].numel()
    outside = depth - depth // 9
    wq = layer.weight.detach() / layer.weight_scale.view(-1, 1, 1, 1)
    wq = wq.round() + layer.weight_zero_point.view(-1, 1, 1, 1)
    wq = wq.clamp(*multiplier.w_range).double()
    zw = layer.weight_zero_point.double()
    xs = outside * zero_point + (depth - outside) * (zero_point + other)
    expected = 7 * outside - zero_point * wq.flatten(1).sum(1) - zw * xs + depth * zero_point * zw
    torch.testing.assert_close(y[:, :, 0, 0], expected.expand(2, -1), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_scales_are_per_output_channel(kind):
    """Filters that differ by a power of two give outputs that differ by it exactly."""
    stock, batch, x = make("conv-plain" if kind == "conv" else "linear-square", seed=5)
    powers = 2.0 ** torch.arange(len(stock.weight))
    with torch.no_grad():
        stock.bias.zero_()
        stock.weight.copy_(stock.weight[:1] * powers.view(-1, *[1] * (stock.weight.ndim - 1)))
    for w_signed in (False, True):
        layer = convert(stock, Multiplier.exact(8, False, w_signed), batch, mode="quantized")
        assert layer.weight_scale.shape == powers.shape
        assert layer.activation_scale.shape == ()
        y = layer(x).movedim(1, 0)
        for channel, power in zip(y, powers, strict=True):
            assert torch.equal(channel, y[0] * power)


@pytest.mark.parametrize("mode", ["float", "quantized", "approximate"])
@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("conv")])
def test_unbatched_convolution(name, mode, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch, mode=mode)
    single = layer(x[0])
    assert single.shape == stock(x[0]).shape
    if mode != "float":
        assert torch.equal(single, layer(x)[0])


@pytest.mark.parametrize("mode", ["float", "quantized", "approximate"])
@signedness
@pytest.mark.parametrize("name", ["conv-not_square", "conv-depthwise", "conv-same_even", "conv-groups", "conv-no_bias"])
def test_empty_batch(name, mode, a_signed, w_signed, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, a_signed, w_signed), batch, mode=mode)
    empty = x[:0].requires_grad_()
    y = layer(empty)
    assert y.shape == stock(empty).shape
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    assert (layer.weight.grad == 0).all()


@pytest.mark.parametrize("mode", ["float", "quantized", "approximate"])
@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)])
def test_empty_linear_input(lead, mode, hostile):
    stock, batch, _ = make("linear-odd")
    layer = convert(stock, hostile(8, False, False), batch, mode=mode)
    x = torch.zeros(*lead, 17, requires_grad=True)
    y = layer(x)
    assert y.shape == (*lead, 3)
    y.sum().backward()
    assert (layer.weight.grad == 0).all()


@pytest.mark.parametrize("name", ["conv-plain", "conv-not_square", "conv-depthwise", "conv-groups", "conv-same_even"])
@signedness
def test_channels_last(name, a_signed, w_signed, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, a_signed, w_signed), batch)
    expected = layer(x)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), expected)
    layer = layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), expected)


@every_layer
def test_views_as_input(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch)
    order = list(range(x.ndim))[::-1]
    expected = layer(x)
    transposed = x.permute(order).contiguous().permute(order)
    strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    for view in (transposed, strided):
        assert torch.equal(view, x)
        assert torch.equal(layer(view), expected)
    expanded = x[..., :1].expand(x.shape)
    assert torch.equal(layer(expanded), layer(expanded.contiguous()))


@some_layers
def test_weight_as_a_view(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    expected = layer(x)
    order = list(range(stock.weight.ndim))[::-1]
    layer.weight = nn.Parameter(stock.weight.detach().permute(order).contiguous().permute(order))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("dtype", "calibrate_first"),
    [
        (torch.float16, True),
        (torch.float16, False),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float64, True),
    ],
)
@some_layers
def test_other_float_types(name, dtype, calibrate_first, hostile):
    """As the float32 layer with the same (rounded) parameters, the result rounded once."""
    stock, batch, x = make(name)
    stock, batch, x = stock.to(dtype).float(), batch.to(dtype), x.to(dtype)
    multiplier = hostile(8, False, False, largest=3000)
    expected = convert(stock, multiplier, batch.float())
    layer = approxconv.approximate(stock, multiplier)
    if calibrate_first:
        layer = approxconv.calibrate(layer, [batch.float()]).to(dtype)
    else:
        layer = approxconv.calibrate(layer.to(dtype), [batch])
    assert layer.weight.dtype == dtype
    for buffer in ("activation_scale", "activation_zero_point", "weight_scale", "weight_zero_point", "table"):
        assert torch.equal(getattr(layer, buffer), getattr(expected, buffer)), buffer
    y = layer(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert torch.equal(y, expected(x.float()).to(dtype))
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [(-40_000.0, 50_000.0), (-2e-4, 3e-4), (-0.3, 0.7)])
def test_half_module_calibrates_in_full_precision(dtype, low, high):
    layer = approxconv.approximate(nn.Linear(2, 2), Multiplier.exact()).to(dtype)
    batch = torch.tensor([[low, high]], dtype=dtype)
    approxconv.calibrate(layer, [batch])
    low, high = batch[0].double().tolist()
    torch.testing.assert_close(layer.activation_scale.double().item(), (high - low) / 255, rtol=1e-5, atol=0)


@some_layers
def test_autocast(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv-plain", (2, 3, 4, 4)),
        ("conv-plain", (4, 4)),
        ("conv-plain", (1, 1, 4, 4, 4)),
        ("conv-plain", (1, 4, 0, 4)),
        ("linear-odd", (3, 16)),
        ("linear-odd", ()),
    ],
)
@pytest.mark.parametrize("mode", ["quantized", "approximate"])
def test_wrong_input_shape(name, shape, mode, hostile):
    stock, batch, _ = make(name)
    if shape == (1, 4, 0, 4):
        stock.padding = (0, 0)
    layer = convert(stock, hostile(), batch, mode=mode)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.rand(shape))


def test_a_sum_that_may_wrap_is_an_error():
    table = torch.full((256, 256), 2**27)
    layer = convert(nn.Linear(16, 1), Multiplier(table, a_signed=False, w_signed=True), torch.rand(2, 16))
    with pytest.raises(ValueError, match=r"2\*\*31"):
        layer(torch.rand(2, 16))
    approxconv.set_mode(layer, "quantized")(torch.rand(2, 16))


def test_large_sums_are_corrected_without_wrapping():
    """Σ table close to 2³¹, corrections of the other sign and of the same one."""
    k = 700
    for entry in (3_000_000, -3_000_000):
        multiplier = Multiplier(torch.full((256, 256), entry), a_signed=False, w_signed=False)
        stock, batch = nn.Linear(k, 2), torch.tensor([[-1.0, 1.0]]).repeat(2, k // 2)
        with torch.no_grad():
            stock.weight[0], stock.weight[1] = -1, 1
            stock.weight[:, 0] = torch.tensor([0.5, -0.5])
        layer = convert(stock, multiplier, batch)
        x = torch.full((1, k), -5.0)
        assert_same(layer(x), oracle(stock, layer, multiplier, x), stock.bias)


# Construction, modes, engines


def test_constructors_take_torch_arguments(hostile):
    torch.manual_seed(0)
    conv = ApproxConv2d(4, 6, (3, 2), stride=2, padding=1, groups=2, bias=False, multiplier=hostile(), mode="quantized")
    linear = ApproxLinear(5, 3, multiplier=hostile(), engine="reference")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 2), (2, 2), (1, 1), 2)
    assert conv.bias is None
    assert (conv.mode, conv.engine) == ("quantized", "auto")
    assert (linear.mode, linear.engine) == ("approximate", "reference")
    x = torch.randn(2, 4, 6, 6)
    approxconv.calibrate(conv, [x])
    stock = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2, bias=False)
    stock.load_state_dict({"weight": conv.weight})
    assert_same(conv(x), twin(stock, conv, hostile(), x))
    assert torch.equal(approxconv.set_mode(conv, "float")(x), stock(x))


@every_layer
def test_float_mode_is_the_stock_layer(name, hostile):
    stock, _, x = make(name)
    assert torch.equal(approxconv.approximate(stock, hostile(), mode="float")(x), stock(x))


@pytest.mark.parametrize("mode", ["quantized", "approximate"])
@some_layers
def test_uncalibrated_forward_says_what_to_do(name, mode, hostile):
    stock, _, x = make(name)
    layer = approxconv.approximate(stock, hostile(), mode=mode)
    with pytest.raises(RuntimeError, match="calibrate"):
        layer(x)
    approxconv.set_mode(layer, "float")(x)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "fast"}, "fast"),
        ({"engine": "abacus"}, "abacus"),
        ({"multiplier": "no_such_circuit"}, "no_such_circuit"),
        ({"multiplier": 3}, "int"),
        ({"multiplier": None}, "None"),
    ],
)
def test_unknown_names(arguments, named, hostile):
    arguments = {"multiplier": hostile(), **arguments}
    for make_layer in (
        lambda: ApproxConv2d(1, 1, 1, **arguments),
        lambda: ApproxLinear(1, 1, **arguments),
        lambda: approxconv.approximate(nn.Linear(1, 1), **arguments),
    ):
        with pytest.raises(ValueError, match=named):
            make_layer()


def test_multiplier_by_name():
    by_name = ApproxLinear(2, 2, multiplier="drum6_8u")
    assert by_name.multiplier == approxconv.get_multiplier("drum6_8u")
    assert "drum6_8u" in repr(by_name)


@some_layers
def test_repr_names_multiplier_mode_and_engine(name, hostile):
    stock, *_ = make(name)
    layer = approxconv.approximate(stock, hostile(seed=7), mode="quantized", engine="reference")
    for word in ("hostile7", "quantized", "reference"):
        assert word in layer.extra_repr()
    assert stock.extra_repr() in layer.extra_repr()
    assert "approximate" in approxconv.set_mode(layer, "approximate").extra_repr()


@pytest.fixture
def calls(monkeypatch):
    """Names of the engines run, in order."""
    seen = []
    for engine in (reference, cpu):
        label = engine.__name__.rsplit(".", 1)[1]
        for operator in ("lut_matmul", "lut_conv2d", "lut_dwconv2d"):
            original = getattr(engine, operator)

            def run(*args, original=original, label=label):
                seen.append(label)
                return original(*args)

            monkeypatch.setattr(engine, operator, run)
    return seen


@pytest.mark.parametrize(
    ("engine", "around", "expected"),
    [
        ("auto", None, "cpu"),
        ("auto", "reference", "reference"),
        ("auto", "cpu", "cpu"),
        ("reference", None, "reference"),
        ("reference", "cpu", "reference"),
        ("cpu", "reference", "cpu"),
    ],
)
@pytest.mark.parametrize("mode", ["quantized", "approximate"])
@some_layers
def test_engine_choice(name, engine, around, expected, mode, calls, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch, mode=mode, engine=engine)
    calls.clear()
    with approxconv.use_engine(around) if around else nullcontext():
        y = layer(x)
    assert set(calls) == {expected}
    layer.engine = "reference"
    assert torch.equal(layer(x), y)


def test_an_engine_that_cannot_run_says_so(hostile):
    layer = convert(nn.Linear(2, 2), hostile(), torch.rand(1, 2), engine="cuda")
    with pytest.raises((approxconv.EngineError, ImportError)):
        layer(torch.rand(1, 2))


# State


def saved(module):
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@some_layers
def test_state_dict_holds_the_quantisation(name, hostile):
    stock, batch, x = make(name)
    multiplier = hostile(8, False, False)
    layer = convert(stock, multiplier, batch)
    layer(x)
    state = layer.state_dict()
    assert set(state) >= BUFFERS
    assert {key for key, _ in layer.named_buffers()} >= BUFFERS
    assert torch.equal(state["table"].long(), multiplier.table.long())
    assert state["weight_scale"].shape == state["weight_zero_point"].shape == (len(stock.weight),)
    assert state["activation_scale"].item() == layer.activation_scale.item() != 1


@some_layers
@signedness
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(name, a_signed, w_signed, assign, hostile):
    stock, batch, x = make(name)
    multiplier = hostile(8, a_signed, w_signed)
    layer = convert(stock, multiplier, batch)
    expected = layer(x)
    fresh = approxconv.approximate(make(name, seed=9)[0], multiplier)
    fresh.load_state_dict(saved(layer), assign=assign)
    assert torch.equal(fresh(x), expected)
    for buffer in BUFFERS:
        assert torch.equal(getattr(fresh, buffer), getattr(layer, buffer))


@some_layers
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies(name, way, used, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    if used:
        layer(x).sum().backward()
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    assert other.extra_repr() == layer.extra_repr()
    assert other.table.data_ptr() != layer.table.data_ptr()
    with torch.no_grad():
        other.weight.mul_(0.5)
        other.table.add_(1)
        other.activation_scale.mul_(2)
    assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


@some_layers
def test_there_and_back_in_another_type(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.bfloat16())
    expected = layer(x)
    layer = layer.bfloat16().float()
    assert torch.equal(layer(x), expected)
    assert layer.table.dtype == torch.int32
    assert layer.activation_scale.dtype == layer.weight_scale.dtype == torch.float32


@some_layers
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_brings_its_multiplier(name, assign, hostile):
    stock, batch, x = make(name)
    mine, other = hostile(seed=1), hostile(seed=2)
    tables = [m.table.clone() for m in (mine, other)]
    layer, source = convert(stock, mine, batch), convert(stock, other, batch)
    expected = source(x)
    assert not torch.equal(layer(x), expected)
    state = saved(source)
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer(x), expected)
    assert layer.multiplier == other
    assert mine.name not in layer.extra_repr()
    # The users' objects are theirs.
    assert [torch.equal(m.table, t) for m, t in zip((mine, other), tables, strict=True)] == [True, True]
    assert torch.equal(convert(stock, mine, batch)(x), convert(stock, hostile(seed=1), batch)(x))


@some_layers
def test_loading_over_the_shared_exact_table(name, hostile):
    stock, batch, x = make(name)
    exact = Multiplier.exact()
    kept = exact.table.clone()
    layer = convert(stock, exact, batch)
    quantised = with_mode(layer, "quantized")(x)
    layer.load_state_dict(saved(convert(stock, hostile(), batch)))
    assert torch.equal(Multiplier.exact().table, kept)
    assert not torch.equal(layer(x), quantised)
    assert torch.equal(with_mode(layer, "quantized")(x), quantised)


@some_layers
@pytest.mark.parametrize(
    ("bits", "a_signed", "w_signed"),
    [(8, True, True), (8, False, False), (8, True, False), (4, False, True), ((8, 4), False, True)],
)
def test_a_checkpoint_of_another_format_is_refused(name, bits, a_signed, w_signed, hostile):
    stock, batch, _ = make(name)
    layer = convert(stock, hostile(8, False, True), batch)
    state = saved(convert(stock, hostile(bits, a_signed, w_signed), batch))
    before = layer.table.clone()
    with pytest.raises(RuntimeError, match="table"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="table"):
        nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()}, strict=False)
    assert torch.equal(layer.table, before)


def test_a_stock_checkpoint_loads_into_a_converted_model(hostile):
    stock, batch, x = make("linear-odd")
    layer = convert(make("linear-odd", seed=9)[0], hostile(), batch)
    layer(x)
    missing, unexpected = layer.load_state_dict(stock.state_dict(), strict=False)
    assert set(missing) >= BUFFERS
    assert not unexpected
    assert_same(layer(x), oracle(stock, layer, hostile(), x), stock.bias)


# Weight changes


def optimizer_step(layer, x):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().mean().backward()
    optimizer.step()


def adam_step(layer, x):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, foreach=True)
    layer(x).square().mean().backward()
    optimizer.step()


def in_place(layer, x):
    with torch.no_grad():
        layer.weight.mul_(-1.7)


def one_element(layer, x):
    with torch.no_grad():
        layer.weight.view(-1)[0] += 3


def load(layer, x):
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["weight"].flip(0) * 1.3})


def load_assign(layer, x):
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["weight"].flip(0) * 1.3}, assign=True)


def new_parameter(layer, x):
    layer.weight = nn.Parameter(layer.weight.detach().flip(0) * 0.3)


def initialise(layer, x):
    nn.init.normal_(layer.weight)


def data_then_train(layer, x):
    layer.weight.data = layer.weight.data * 1.4 + 0.1
    layer.train()


def data_then_eval(layer, x):
    layer.weight.data.mul_(-0.6)
    nn.Sequential(layer).eval()


def inference_mode(layer, x):
    with torch.inference_mode():
        layer.weight.mul_(-0.6)


def fused_step(layer, x):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.5, fused=True)
    layer(x).square().sum().backward()
    optimizer.step()


def data(layer, x):
    layer.weight.data.mul_(-0.6)


def from_a_vector(layer, x):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * -0.6, layer.parameters())


CHANGES = [
    optimizer_step,
    fused_step,
    data,
    from_a_vector,
    adam_step,
    in_place,
    one_element,
    load,
    load_assign,
    new_parameter,
    initialise,
    data_then_train,
    data_then_eval,
    inference_mode,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@some_layers
def test_weight_changes_are_seen(name, change, hostile):
    stock, batch, x = make(name)
    multiplier = hostile(8, False, False)
    layer = convert(stock, multiplier, batch)
    before = layer(x).detach()
    change(layer, x)
    after = layer(x).detach()
    assert not torch.equal(after, before)
    now = copy.deepcopy(stock)
    now.load_state_dict(layer.state_dict(), strict=False)
    fresh = convert(now, multiplier, batch)
    assert torch.equal(after, fresh(x))
    assert torch.equal(layer.weight_scale, fresh.weight_scale)
    assert torch.equal(layer.weight_zero_point, fresh.weight_zero_point)
    assert_same(after, oracle(now, layer, multiplier, x), now.bias)


@some_layers
def test_weight_is_quantised_once_in_eval_without_gradients(name, hostile, monkeypatch):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch).eval()
    calls = []
    real = approxconv.nn.layer.quantize_weight
    monkeypatch.setattr(approxconv.nn.layer, "quantize_weight", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(calls) == 1
        layer.weight.mul_(-0.6)
        assert not torch.equal(layer(x), first)
        assert len(calls) == 2


@some_layers
def test_saved_scales_are_those_of_the_saved_weights(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch)
    data(layer, x)
    saved = copy.deepcopy(layer.state_dict())
    layer(x)
    assert torch.equal(saved["weight_scale"], layer.weight_scale)
    assert torch.equal(saved["weight_zero_point"], layer.weight_zero_point)


@some_layers
def test_a_model_without_values_has_a_state_dict_and_takes_one(name, hostile):
    stock, batch, x = make(name)
    multiplier = hostile(8, False, False)
    layer = convert(stock, multiplier, batch)
    empty = approxconv.approximate(copy.deepcopy(stock).to("meta"), multiplier)
    assert empty.state_dict().keys() == layer.state_dict().keys()
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_output_may_be_changed_in_place(kind, bias, hostile):
    stock = nn.Conv2d(3, 4, 3, bias=bias) if kind == "conv" else nn.Linear(5, 4, bias=bias)
    x = torch.randn(2, 3, 5, 5)
    layer = convert(stock, hostile(), x)
    expected = F.relu(layer(x) + 1)
    expected.sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    y = layer(x)
    y += 1
    y.relu_()
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(layer.weight.grad, gradient)


def test_float64_as_the_default_type(hostile):
    try:
        torch.set_default_dtype(torch.float64)
        stock, x = nn.Linear(5, 4), torch.randn(3, 5)
        layer = convert(stock, hostile(), x)
        layer(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.activation_scale.dtype == layer.weight_scale.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float64


@pytest.mark.parametrize(("attribute", "value"), [("mode", "aproximate"), ("engine", "gpu")])
def test_a_mistyped_mode_or_engine_is_refused_when_set(attribute, value, hostile):
    layer = approxconv.approximate(nn.Linear(5, 4), hostile())
    before = getattr(layer, attribute)
    with pytest.raises(ValueError, match=f"{attribute} must be .*{value}"):
        setattr(layer, attribute, value)
    assert getattr(layer, attribute) == before


def test_forward_by_keyword_and_copies_of_a_compiled_layer(hostile):
    layer, x = convert(nn.Linear(5, 4), hostile(), torch.randn(3, 5)), torch.randn(3, 5)
    assert torch.equal(layer(input=x), layer(x))
    layer.compile(backend="aot_eager")
    before = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(-0.5)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


def test_a_compiled_model_follows_its_weights(hostile):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    x = torch.randn(2, 3, 5, 5)
    model = convert(stock, hostile(), x)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(3):
        y = compiled(x)
        assert torch.equal(y, copy.deepcopy(model)(x))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    assert not torch.equal(outputs[0], outputs[1])


def test_changes_of_the_other_buffers_are_seen(hostile):
    stock, batch, x = make("conv-groups")
    multiplier = hostile(8, False, False)
    layer = convert(stock, multiplier, batch)
    layer(x)
    with torch.no_grad():
        layer.activation_scale.mul_(1.5)
        layer.activation_zero_point.add_(9)
        layer.table.neg_()
    swapped = Multiplier(-multiplier.table, a_signed=False, w_signed=False)
    assert_same(layer(x), oracle(stock, layer, swapped, x), stock.bias)


# Gradients


def gradients(function, x, *parameters):
    x = x.clone().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(11)).to(y))
    return [x.grad, *[p.grad for p in parameters]]


@every_layer
@signedness
@ranges
def test_gradient_is_the_twins(name, a_signed, w_signed, where, hostile):
    """Whatever the table says forward."""
    multiplier = hostile(8, a_signed, w_signed)
    stock, batch, x = make(name, where)
    layer = convert(stock, multiplier, batch)
    parameters = [p for p in (stock.weight, stock.bias) if p is not None]

    class Faked(type(stock)):
        def __init__(self):
            nn.Module.__init__(self)
            self.__dict__.update({k: v for k, v in stock.__dict__.items() if k != "_parameters"})
            self.register_parameter("bias", stock.bias)
            self.layer = layer

        def forward(self, x):
            xf, wf = faked_operands(layer, multiplier, x)
            wf_of_stock = torch.fake_quantize_per_channel_affine(
                stock.weight, layer.weight_scale, layer.weight_zero_point, 0, *multiplier.w_range
            )
            assert torch.equal(wf, wf_of_stock)
            self.weight = wf_of_stock
            return super().forward(xf)

    expected = gradients(Faked(), x, *parameters)
    got = gradients(layer, x, *[p for p in (layer.weight, layer.bias) if p is not None])
    for mine, twins in zip(got, expected, strict=True):
        assert mine.shape == twins.shape
        torch.testing.assert_close(mine, twins, rtol=1e-4, atol=1e-5 * twins.abs().max().item())
    assert expected[1].abs().max() > 0
    quantised = gradients(
        approxconv.set_mode(layer, "quantized"), x, *[p for p in (layer.weight, layer.bias) if p is not None]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, quantised, strict=True))


@some_layers
def test_clipped_inputs_get_no_gradient(name, hostile):
    stock, batch, x = make(name, "zero_inside")
    layer = convert(stock, hostile(), batch)
    x.view(-1)[::2] = torch.tensor([9.0, -9.0]).repeat(x.numel())[: x.view(-1)[::2].numel()]
    x.view(-1)[1::2] = x.view(-1)[1::2].clamp(-0.6, 1.2)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert (x.grad.view(-1)[::2] == 0).all()
    assert (x.grad.view(-1)[1::2] != 0).any()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.masks, self.products = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@some_layers
def test_only_the_wanted_gradients_are_computed(name, needs, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    full_x = x.clone().requires_grad_()
    layer(full_x).square().sum().backward()
    full_w, full_b = layer.weight.grad, layer.bias.grad
    layer.zero_grad(set_to_none=True)

    x = x.clone().requires_grad_(needs[0])
    layer.weight.requires_grad_(needs[1])
    y = layer(x).square().sum()
    with Operations() as ran:
        y.backward()
    if isinstance(layer, nn.Conv2d):
        assert ran.masks == ([(*needs, False)] if any(needs) else [])
    else:
        assert ran.products == sum(needs)
    assert torch.equal(layer.bias.grad, full_b)
    assert torch.equal(x.grad, full_x.grad) if needs[0] else x.grad is None
    assert torch.equal(layer.weight.grad, full_w) if needs[1] else layer.weight.grad is None


@some_layers
@pytest.mark.parametrize("mode", ["quantized", "approximate"])
def test_nothing_is_recorded_where_no_gradient_is_wanted(name, mode, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch, mode=mode)
    expected = layer(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = layer(x.clone().requires_grad_())
        assert not y.requires_grad
        assert y.grad_fn is None
        assert torch.equal(y, expected)
    frozen = layer.requires_grad_(False)(x)
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


@some_layers
def test_training_goes_on_after_inference_mode(name, hostile):
    """What a forward under inference_mode leaves behind must not stop the next backward."""
    stock, batch, x = make(name)
    layer = approxconv.approximate(stock, hostile())
    with torch.inference_mode():
        approxconv.calibrate(layer, [batch])
        layer(x)
        inference_input = x.clone()
    layer(inference_input)
    optimizer_step(layer, x)
    with torch.inference_mode():
        layer(x)
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0


def test_second_derivative_is_refused(hostile):
    stock, batch, x = make("linear-odd")
    layer = convert(stock, hostile(), batch)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_gradients_survive_a_later_input_change(hostile):
    """What is kept for the backward pass is the layer's own."""
    stock, batch, x = make("conv-plain")
    layer = convert(stock, hostile(), batch)
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    changed = x.clone()
    y = layer(changed)
    changed.zero_()
    with torch.no_grad():
        layer.activation_scale.mul_(3)
        layer.activation_zero_point.add_(5)
    y.sum().backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("name", ["conv-not_square", "conv-depthwise_twice_the_channels", "linear-odd"])
@pytest.mark.parametrize("mode", ["quantized", "approximate"])
def test_a_few_steps_reduce_the_loss(name, mode, truncated):
    stock, batch, x = make(name)
    target = make(name, seed=3)[0](x).detach()
    layer = convert(stock, truncated, batch, mode=mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@some_layers
def test_concurrent_forwards(name, hostile):
    from concurrent.futures import ThreadPoolExecutor

    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch)
    expected = layer(x).detach()
    layer.train()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: layer(x).detach(), range(16)))
    assert all(torch.equal(y, expected) for y in results)
