"""Convolutions of 1 and 3 dimensions and transposed ones, against a slow oracle and their fake-quantised twins."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import approxconv
import approxconv.nn
from approxconv import Multiplier
from approxconv.gradients import GradientTables
from approxconv.quantization import OperandQuantization, Quantization

# name: (class, arguments, input size). "plain" ones have batch = channels = filters = all sizes.
CASES = {
    "1d-plain": (nn.Conv1d, dict(in_channels=3, out_channels=3, kernel_size=3, padding=1), (3,)),
    "1d-odd": (
        nn.Conv1d,
        dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=3, dilation=2, groups=2),
        (11,),
    ),
    "1d-depthwise": (nn.Conv1d, dict(in_channels=3, out_channels=6, kernel_size=4, padding=2, groups=3), (7,)),
    "1d-same_even": (nn.Conv1d, dict(in_channels=2, out_channels=3, kernel_size=4, padding="same"), (6,)),
    "1d-valid": (nn.Conv1d, dict(in_channels=1, out_channels=3, kernel_size=2, padding="valid", bias=False), (2,)),
    "1d-reflect": (
        nn.Conv1d,
        dict(in_channels=2, out_channels=2, kernel_size=3, padding=2, padding_mode="reflect"),
        (5,),
    ),
    "3d-plain": (nn.Conv3d, dict(in_channels=3, out_channels=3, kernel_size=3, padding=1), (3, 3, 3)),
    "3d-odd": (
        nn.Conv3d,
        dict(
            in_channels=4,
            out_channels=6,
            kernel_size=(3, 1, 2),
            stride=(2, 1, 3),
            padding=(2, 0, 1),
            dilation=(1, 2, 3),
            groups=2,
        ),
        (4, 3, 6),
    ),
    "3d-dilated_depth": (
        nn.Conv3d,
        dict(in_channels=2, out_channels=3, kernel_size=(2, 2, 1), dilation=(3, 1, 1), padding=(1, 1, 0), bias=False),
        (5, 2, 3),
    ),
    "3d-depthwise": (
        nn.Conv3d,
        dict(
            in_channels=2,
            out_channels=4,
            kernel_size=(3, 2, 3),
            stride=(2, 1, 2),
            padding=(3, 1, 0),
            dilation=(2, 1, 1),
            groups=2,
        ),
        (5, 2, 5),
    ),
    "3d-one_channel": (nn.Conv3d, dict(in_channels=1, out_channels=2, kernel_size=2, padding=1), (2, 3, 1)),
    "3d-flat": (nn.Conv3d, dict(in_channels=3, out_channels=2, kernel_size=(1, 2, 3), stride=(3, 1, 1)), (4, 3, 3)),
    "3d-same_even": (
        nn.Conv3d,
        dict(in_channels=2, out_channels=2, kernel_size=(2, 3, 4), padding="same", dilation=(3, 1, 1)),
        (4, 3, 4),
    ),
    "3d-circular": (
        nn.Conv3d,
        dict(
            in_channels=4, out_channels=2, kernel_size=(3, 2, 1), padding=(2, 1, 0), padding_mode="circular", groups=2
        ),
        (3, 2, 2),
    ),
    "3d-replicate": (
        nn.Conv3d,
        dict(in_channels=1, out_channels=2, kernel_size=2, padding=(2, 0, 1), padding_mode="replicate"),
        (2, 3, 2),
    ),
    "t1d-plain": (nn.ConvTranspose1d, dict(in_channels=3, out_channels=3, kernel_size=3, padding=1), (3,)),
    "t1d-odd": (
        nn.ConvTranspose1d,
        dict(in_channels=4, out_channels=6, kernel_size=3, stride=3, padding=2, output_padding=2, dilation=2, groups=2),
        (4,),
    ),
    "t1d-gaps": (nn.ConvTranspose1d, dict(in_channels=2, out_channels=2, kernel_size=2, stride=5, padding=1), (3,)),
    "t2d-odd": (
        nn.ConvTranspose2d,
        dict(
            in_channels=4,
            out_channels=6,
            kernel_size=(3, 2),
            stride=(1, 3),
            padding=(2, 1),
            output_padding=(1, 2),
            dilation=(2, 1),
            groups=2,
        ),
        (4, 3),
    ),
    "t2d-upsampling": (
        nn.ConvTranspose2d,
        dict(in_channels=3, out_channels=2, kernel_size=4, stride=2, padding=1),
        (3, 2),
    ),
    "t2d-depthwise": (
        nn.ConvTranspose2d,
        dict(in_channels=3, out_channels=6, kernel_size=2, stride=(2, 1), groups=3, bias=False),
        (2, 3),
    ),
    "t2d-cropped_to_a_pixel": (
        nn.ConvTranspose2d,
        dict(in_channels=2, out_channels=3, kernel_size=3, padding=2),
        (3, 3),
    ),
    "t2d-one_channel": (nn.ConvTranspose2d, dict(in_channels=1, out_channels=1, kernel_size=1, stride=2), (2, 1)),
    "t3d-odd": (
        nn.ConvTranspose3d,
        dict(
            in_channels=2,
            out_channels=4,
            kernel_size=(2, 1, 3),
            stride=(2, 3, 1),
            padding=(1, 0, 2),
            output_padding=(0, 2, 1),
            dilation=(3, 1, 2),
            groups=2,
        ),
        (2, 3, 2),
    ),
    "t3d-plain": (nn.ConvTranspose3d, dict(in_channels=2, out_channels=2, kernel_size=2, stride=2), (2, 2, 2)),
}
every_layer = pytest.mark.parametrize("name", CASES)
some_layers = pytest.mark.parametrize("name", ["1d-odd", "3d-odd", "3d-depthwise", "t1d-odd", "t2d-odd", "t3d-odd"])
transposed = pytest.mark.parametrize("name", ["t1d-odd", "t2d-odd", "t3d-odd"])
signedness = pytest.mark.parametrize(
    ("a_signed", "w_signed"), list(itertools.product([False, True], repeat=2)), ids=["u×u", "u×s", "s×u", "s×s"]
)


def is_transposed(stock):
    return isinstance(stock, nn.modules.conv._ConvTransposeNd)


def filters(stock, weight):
    """The weight with output channels first, channel by channel."""
    if not is_transposed(stock):
        return weight
    each = [part.transpose(0, 1) for part in weight.chunk(stock.groups)]
    return torch.cat(each)


def like_weight(stock, rows):
    """The inverse of `filters`."""
    return torch.cat([part.transpose(0, 1) for part in rows.chunk(stock.groups)]) if is_transposed(stock) else rows


def make(name, seed=0):
    """A stock layer whose filters differ in size and offset, and an input that leaves the range of a batch."""
    generator = torch.Generator().manual_seed(seed)
    kind, arguments, size = CASES[name]
    stock = kind(**arguments)
    with torch.no_grad():
        rows = torch.rand(filters(stock, stock.weight).shape, generator=generator) * 2 - 1
        column = (-1, *[1] * (rows.ndim - 1))
        rows = (rows + torch.linspace(-0.8, 0.8, len(rows)).view(column)) * torch.logspace(-1, 0.5, len(rows)).view(
            column
        )
        stock.weight.copy_(like_weight(stock, rows))
        if stock.bias is not None:
            stock.bias.copy_(torch.randn(stock.bias.shape, generator=generator))
    shape = (3, arguments["in_channels"], *size)
    batch = torch.rand(shape, generator=generator) * 2 - 0.7
    return stock, batch, batch * 1.2 - 0.03


def convert(stock, multiplier, batch, mode="approximate"):
    return approxconv.calibrate(approxconv.approximate(stock, multiplier, mode=mode), [batch])


def twin(stock, layer, multiplier, x, weight):
    """The stock layer, in float32 or float64, on operands that torch fake-quantises with the layer's scales."""
    xf = torch.fake_quantize_per_tensor_affine(
        x, layer.activation_scale, layer.activation_zero_point, *multiplier.a_range
    )
    wf = torch.fake_quantize_per_channel_affine(
        filters(stock, weight), layer.weight_scale, layer.weight_zero_point, 0, *multiplier.w_range
    )
    parameters = {"weight": like_weight(stock, wf).double()}
    if stock.bias is not None:
        parameters["bias"] = stock.bias.double()
    return torch.func.functional_call(copy.deepcopy(stock).double(), parameters, (xf.double(),))


def positions(sizes):
    return itertools.product(*map(range, sizes))


def products(stock, x_shape, y_shape):
    """Which products are computed: where in y each is added, and of what in padded x and in the filters it is.

    Nothing but the definitions: a convolution goes through its outputs, a transposed one through its inputs.
    """
    per_group, inside = stock.out_channels // stock.groups, stock.in_channels // stock.groups
    geometry = stock.stride, stock.dilation
    starts = positions(x_shape[2:]) if is_transposed(stock) else positions(y_shape[2:])
    everything = itertools.product(
        range(x_shape[0]), range(stock.out_channels), range(inside), starts, positions(stock.kernel_size)
    )
    for b, o, c, start, tap in everything:
        end = tuple(n * s + t * d for n, t, s, d in zip(start, tap, *geometry, strict=True))
        if is_transposed(stock):
            end = tuple(n - p for n, p in zip(end, stock.padding, strict=True))
            if not all(0 <= n < size for n, size in zip(end, y_shape[2:], strict=True)):
                continue
        x_at, y_at = (start, end) if is_transposed(stock) else (end, start)
        yield (b, o, *y_at), (b, o // per_group * inside + c, *x_at), (o, c, *tap)


def padded(stock, x, value):
    if is_transposed(stock):
        return x
    pads, mode = stock._reversed_padding_repeated_twice, stock.padding_mode
    return F.pad(x, pads, value=value) if mode == "zeros" else F.pad(x, pads, mode=mode)


def codes_of(stock, layer, multiplier, x):
    """Padded codes of x and those of the filters, and their zero points."""
    zx, zw = int(layer.activation_zero_point), layer.weight_zero_point
    column = (-1, *[1] * (stock.weight.ndim - 1))
    xq = (x.detach() * (1 / layer.activation_scale)).round().add(zx).clamp(*multiplier.a_range)
    wq = filters(stock, stock.weight.detach()) * (1 / layer.weight_scale).view(column)
    wq = wq.round().add(zw.view(column)).clamp(*multiplier.w_range)
    return padded(stock, xq, zx).long().numpy(), wq.long().numpy(), zx, zw.tolist()


def oracle(stock, layer, multiplier, x):
    """Product by product, in Python's integers."""
    xq, wq, zx, zw = codes_of(stock, layer, multiplier, x)
    table = multiplier.table.tolist()
    a_codes, w_codes = 2**multiplier.a_bits, 2**multiplier.w_bits
    with torch.no_grad():
        y = np.zeros(stock(x).shape, dtype=object)
    for at, i, k in products(stock, x.shape, y.shape):
        a, w = int(xq[i]), int(wq[k])
        y[at] += table[a % a_codes][w % w_codes] - zx * w - zw[k[0]] * a + zx * zw[k[0]]
    column = (-1, *[1] * (y.ndim - 2))
    y = torch.from_numpy(y.astype(np.float64))
    y = y * (layer.activation_scale.double() * layer.weight_scale.double()).view(column)
    return y if stock.bias is None else y + stock.bias.detach().double().view(column)


def assert_same(got, expected, tolerance=3e-6):
    """Equal but for the rounding of float32 operations."""
    assert got.shape == expected.shape
    scale = 1 + expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


@every_layer
@signedness
def test_quantised_layer_is_its_fake_quantised_twin(name, a_signed, w_signed):
    multiplier = Multiplier.exact(8, a_signed, w_signed)
    stock, batch, x = make(name)
    layer = convert(stock, multiplier, batch, mode="quantized")
    assert a_signed or 0 < layer.activation_zero_point < 255
    quantised = layer(x)
    expected = twin(stock, layer, multiplier, x, stock.weight)
    assert quantised.dtype == torch.float32
    assert quantised.is_contiguous()
    assert_same(quantised, expected)
    assert (expected - stock(x)).abs().max() > 1e-4  # the twin can tell
    assert torch.equal(approxconv.set_mode(layer, "approximate")(x), quantised)


@every_layer
@signedness
def test_approximate_layer_is_the_oracle(name, a_signed, w_signed, hostile):
    multiplier = hostile(8, a_signed, w_signed)
    stock, batch, x = make(name, seed=1)
    layer = convert(stock, multiplier, batch)
    assert_same(layer(x), oracle(stock, layer, multiplier, x))


@some_layers
@pytest.mark.parametrize("bits", [(4, 8), (3, 5)], ids=str)
@signedness
def test_narrow_operands(name, bits, a_signed, w_signed, hostile):
    multiplier = hostile(bits, a_signed, w_signed)
    stock, batch, x = make(name, seed=2)
    layer = convert(stock, multiplier, batch)
    assert_same(layer(x), oracle(stock, layer, multiplier, x))


@every_layer
@pytest.mark.parametrize("signed", [False, True])
def test_gradient_is_the_twin_s(name, signed):
    multiplier = Multiplier.exact(8, signed, signed)
    stock, batch, x = make(name)
    layer = convert(stock, multiplier, batch)
    x.requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    weight, again = stock.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    twin(stock, layer, multiplier, again, weight).backward(grad.double())
    assert_same(x.grad, again.grad)
    assert_same(layer.weight.grad, weight.grad)
    if stock.bias is not None:
        torch.testing.assert_close(layer.bias.grad, grad.transpose(0, 1).flatten(1).sum(1))


@every_layer
@pytest.mark.parametrize("mode", ["float", "quantized", "approximate"])
def test_unbatched_and_empty_batch(name, mode, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch, mode=mode)
    single = layer(x[0])
    assert single.shape == stock(x[0]).shape
    if mode == "float":
        assert torch.equal(single, stock(x[0]))
    else:
        assert torch.equal(single, layer(x)[0])
    empty = x[:0].requires_grad_()
    y = layer(empty)
    assert y.shape == stock(empty).shape
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    assert (layer.weight.grad == 0).all()


@every_layer
def test_memory_formats_and_views(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch)
    expected = layer(x)
    order = list(range(x.ndim))[::-1]
    views = [x.permute(order).contiguous().permute(order), torch.stack([x, x + 1], dim=-1)[..., 0]]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None:
        views.append(x.to(memory_format=last))
    for view in views:
        assert torch.equal(layer(view), expected)
    if last is not None:
        assert torch.equal(layer.to(memory_format=last)(x), expected)
    layer.weight = nn.Parameter(stock.weight.detach().permute(order).contiguous().permute(order))
    assert torch.equal(layer(x), expected)
    expanded = x[..., :1].expand(x.shape)
    assert torch.equal(layer(expanded), layer(expanded.contiguous()))


@some_layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(name, dtype, hostile):
    """As the float32 layer with the same (rounded) parameters, the result rounded once."""
    stock, batch, x = make(name)
    stock, batch, x = stock.to(dtype).float(), batch.to(dtype), x.to(dtype)
    multiplier = hostile(8, False, False, largest=300)
    expected = convert(stock, multiplier, batch.float())
    layer = approxconv.calibrate(approxconv.approximate(stock, multiplier).to(dtype), [batch])
    y = layer(x)
    assert torch.equal(y, expected(x.float()).to(dtype))
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = layer(x)
    torch.testing.assert_close(again.float(), y.float(), rtol=1e-2, atol=1e-2 * y.abs().max().item())


def test_one_table_column_counts_the_products_of_a_transposed_convolution():
    """No zeros are inserted: ``table[zx, ·]`` is met where an input is zero, and where no product is there is none."""
    zero_point = 3
    table = torch.zeros(256, 256, dtype=torch.int64)
    table[zero_point] = 1000
    multiplier = Multiplier(table, a_signed=False, w_signed=False)
    stock = nn.ConvTranspose1d(2, 1, 2, stride=3, output_padding=1)
    layer = convert(stock, multiplier, torch.rand(1, 2, 4))
    layer.activation_scale.fill_(1.0)
    layer.activation_zero_point.fill_(zero_point)
    x = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]])  # of two channels, two and one zeros
    with torch.no_grad():
        got = (layer(x) - layer.bias) / layer.weight_scale
    # At zero both zero points meet: 1000 − zx·wq − zw·zx + zx·zw = 1000 − zx·wq.
    scale, zw = layer.weight_scale.item(), layer.weight_zero_point.item()
    wq = (stock.weight.detach() / scale).round().add(zw).clamp(0, 255)[:, 0]  # (C, taps)
    first = 2000 - zero_point * wq.sum(0)
    second = 1000 - zero_point * wq.sum(0) - zw * 5
    expected = torch.stack([first[0], first[1], torch.zeros(()), second[0], second[1], torch.zeros(())])
    torch.testing.assert_close(got[0, 0], expected, rtol=1e-5, atol=1e-2)


@transposed
def test_output_size(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch)
    stock.output_padding = layer.output_padding = (0,) * (x.ndim - 2)
    smallest = stock(x).shape[2:]
    choices = list(itertools.product(*[range(n, n + s) for n, s in zip(smallest, stock.stride, strict=True)]))
    outputs = {}
    for size in (choices[0], choices[-1]):
        outputs[size] = layer(x, output_size=list(size))
        assert outputs[size].shape[2:] == size
        fresh = copy.deepcopy(layer)
        fresh.output_padding = tuple(n - least for n, least in zip(size, smallest, strict=True))
        assert torch.equal(outputs[size], fresh(x))
        assert torch.equal(outputs[size], layer(x, torch.Size((3, stock.out_channels, *size))))
        assert torch.equal(outputs[size][0], layer(x[0], size))
        assert torch.equal(approxconv.set_mode(fresh, "float")(x, size), stock(x, size))
    assert torch.equal(outputs[choices[0]], layer(x))
    sum(y.sum() for y in outputs.values()).backward()  # each through its own size
    for wrong in ([n + 5 for n in smallest], [n - 1 for n in smallest]):
        with pytest.raises(ValueError, match="output size"):
            layer(x, wrong)


def test_output_padding_of_a_stride_or_more_is_an_error(hostile):
    stock = nn.ConvTranspose2d(1, 1, 2, stride=2, output_padding=(1, 2))
    layer = approxconv.approximate(stock, hostile(), mode="float")
    approxconv.set_mode(layer, "approximate").calibrated.fill_(True)
    with pytest.raises(ValueError, match="output_padding"):
        layer(torch.rand(1, 1, 3, 3))


@pytest.mark.parametrize("mode", ["quantized", "approximate"])
@some_layers
def test_wrong_input(name, mode, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(), batch, mode=mode)
    if not is_transposed(stock):
        layer.padding = (0,) * (x.ndim - 2)
    for wrong in (x[:, :1], x[0, 0], x[None], x[..., :0]):
        with pytest.raises(ValueError, match=r"input|kernel"):
            layer(wrong)


@pytest.mark.parametrize(
    "stock",
    [
        nn.Conv3d(3, 6, (5, 2, 2), groups=3, padding=(2, 0, 0)),
        nn.ConvTranspose1d(4, 2, 6),
        nn.ConvTranspose2d(3, 2, 3, padding=1),
    ],
    ids=["depthwise", "t1d", "t2d"],
)
@pytest.mark.parametrize("entry", [2**28, -(2**28)])
def test_sums_beyond_32_bits(stock, entry):
    """Each product sum of an operator fits, and what is added up of them does not."""
    multiplier = Multiplier(torch.full((256, 256), entry), a_signed=False, w_signed=False)
    batch = torch.rand(2, stock.in_channels, *[4] * (stock.weight.ndim - 2)) - 0.4
    layer = convert(stock, multiplier, batch)
    expected = oracle(stock, layer, multiplier, batch)
    assert (expected / layer.activation_scale / layer.weight_scale.max()).abs().max() > 2**31
    assert_same(layer(batch) / 1e6, expected / 1e6)


def test_a_sum_of_one_operator_that_may_wrap_is_an_error(hostile):
    for stock in (nn.Conv1d(4, 1, 4), nn.Conv3d(2, 1, 2), nn.ConvTranspose2d(16, 1, 1)):
        layer = convert(
            stock,
            Multiplier(torch.full((256, 256), 2**28), a_signed=False, w_signed=True),
            torch.rand(1, stock.in_channels, *[5] * (stock.weight.ndim - 2)),
        )
        with pytest.raises(ValueError, match=r"2\*\*31"):
            layer(torch.rand(1, stock.in_channels, *[5] * (stock.weight.ndim - 2)))


@transposed
def test_scales_are_per_output_channel(name):
    """Filters that differ by a power of two give outputs that differ by it exactly, over groups too."""
    stock, batch, x = make(name)
    powers = 2.0 ** torch.arange(stock.out_channels)
    with torch.no_grad():
        rows = torch.randn_like(filters(stock, stock.weight)[:1])
        stock.weight.copy_(like_weight(stock, rows * powers.view(-1, *[1] * (rows.ndim - 1))))
        stock.bias.zero_()
    x[:, x.shape[1] // 2 :] = x[:, : x.shape[1] // 2]  # both groups see the same
    layer = convert(stock, Multiplier.exact(8, False, False), batch, mode="quantized")
    assert layer.weight_scale.shape == powers.shape
    y = layer(x).movedim(1, 0)
    for channel, power in zip(y, powers, strict=True):
        assert torch.equal(channel, y[0] * power)


@pytest.mark.parametrize(
    "name", ["1d-odd", "3d-odd", "3d-depthwise", "t1d-odd", "t2d-odd", "t2d-upsampling", "t3d-odd"]
)
@pytest.mark.parametrize("w_signed", [False, True])
def test_gradient_by_slopes_is_the_sum_over_products(name, w_signed, hostile):
    """``Σ grad·sw·(D_a[xq, wq] − zw)`` and ``Σ grad·sx·(D_w[xq, wq] − zx)``, where operands were not clipped."""
    multiplier = hostile(4, False, w_signed, largest=300)
    generator = torch.Generator().manual_seed(5)
    slopes = [torch.randn(16, 16, generator=generator) for _ in range(2)]
    stock, batch, x = make(name)
    layer = convert(stock, multiplier, batch)
    layer.gradient = GradientTables(*slopes)
    x.requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)

    xq, wq, zx, zw = codes_of(stock, layer, multiplier, x)
    sx, sw = layer.activation_scale.item(), layer.weight_scale.tolist()
    by_a, by_w = (table.tolist() for table in slopes)
    grad_x, grad_w, grad = np.zeros(xq.shape), np.zeros(wq.shape), grad.numpy().astype(np.float64)
    for at, i, k in products(stock, x.shape, y.shape):
        a, w, o = xq[i] % 16, wq[k] % 16, k[0]
        grad_x[i] += grad[at] * sw[o] * (by_a[a][w] - zw[o])
        grad_w[k] += grad[at] * sx * (by_w[a][w] - zx)
    if not is_transposed(stock):
        inside = (slice(p, p + n) for p, n in zip(stock.padding, x.shape[2:], strict=True))
        grad_x = grad_x[(slice(None), slice(None), *inside)]
    unclipped = []
    for operand, scale, zero_point, ends in (
        (x, layer.activation_scale, layer.activation_zero_point, multiplier.a_range),
        (filters(stock, layer.weight), layer.weight_scale, layer.weight_zero_point, multiplier.w_range),
    ):
        operand = operand.detach().requires_grad_()
        faked = (
            torch.fake_quantize_per_channel_affine(operand, scale, zero_point, 0, *ends)
            if scale.ndim
            else (torch.fake_quantize_per_tensor_affine(operand, scale, zero_point, *ends))
        )
        unclipped.append(torch.autograd.grad(faked.sum(), operand)[0])
    assert not unclipped[0].all()
    assert_same(x.grad, torch.from_numpy(grad_x) * unclipped[0], 1e-4)
    assert_same(filters(stock, layer.weight.grad), torch.from_numpy(grad_w) * unclipped[1], 1e-4)


@every_layer
def test_noise_of_a_constant_error_is_the_table_s(name):
    """With no variance it is the mean times the number of products of a sum, which of a transposed one varies."""
    multiplier = Multiplier.from_function(lambda a, w: a * w + 5, a_signed=False, w_signed=False)
    stock, batch, x = make(name)
    layer = convert(stock, multiplier, batch)
    expected = layer(x)
    assert_same(approxconv.set_mode(layer, "noise")(x), expected)
    assert not torch.allclose(approxconv.set_mode(layer, "quantized")(x), expected)


@pytest.mark.parametrize(
    ("name", "w_signed"),
    [
        ("3d-depthwise", True),
        ("t1d-odd", False),
        *[pytest.param(name, False, marks=pytest.mark.slow) for name in ("1d-odd", "3d-odd", "3d-circular", "t2d-odd")],
    ],
)
def test_compiled_and_exported(name, w_signed, hostile):
    """In one graph, of which the zero points are inputs."""
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, w_signed), batch)
    expected = layer(x.requires_grad_())
    wanted = torch.autograd.grad(expected.sum(), (x, layer.weight))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, expected)
    for got, known in zip(torch.autograd.grad(y.sum(), (x, layer.weight)), wanted, strict=True):
        torch.testing.assert_close(got, known)
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (x.detach(),)).module()(x), expected)
        layer.activation_zero_point += 7
        assert torch.equal(compiled(x), layer(x))


QUANTIZATIONS = {
    "weight_per_tensor": Quantization(weight=OperandQuantization(granularity="per_tensor")),
    "learned": Quantization(OperandQuantization(range="lsq"), OperandQuantization(range="lsq")),
    "few_bits_and_bias": Quantization(OperandQuantization(bits=5), OperandQuantization(bits=3), bias_bits=32),
}


@some_layers
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantisation(name, quantization, hostile):
    stock, batch, x = make(name)
    chosen = QUANTIZATIONS[quantization]
    exact = approxconv.approximate(stock, Multiplier.exact(8, False, False), quantization=chosen)
    y = approxconv.calibrate(exact, [batch])(x)
    assert torch.equal(approxconv.set_mode(exact, "quantized")(x), y)
    error, signal = (y - stock(x)).norm(), stock(x).norm()
    assert 0 < error < (0.6 if quantization == "few_bits_and_bias" else 0.1) * signal
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in exact.named_parameters() if n != "bias")
    other = hostile(8, False, False)
    exact.mode = "approximate"
    exact.set_multiplier(other)
    again = approxconv.calibrate(approxconv.approximate(stock, other, quantization=chosen), [batch])
    assert torch.equal(exact(x), again(x))


class _Operands(TorchDispatchMode):
    """Records the operators called and the shapes of their operands."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "approxconv":
            self.calls.append((tuple(args[0].shape), tuple(args[1].shape), func._schema.name.split("::")[1]))
        return func(*args, **(kwargs or {}))


@every_layer
def test_explain_knows_the_one_call(name, hostile):
    stock, batch, x = make(name)
    layer = convert(stock, hostile(8, False, False), batch)
    with _Operands() as seen:
        layer(x)
    x_shape, w_shape, geometry = layer.operand_shapes(x.shape)
    kind = "lut_matmul" if is_transposed(stock) else "lut_conv2d"
    if not is_transposed(stock) and geometry[-1] == x_shape[1]:
        kind = "lut_dwconv2d"
    assert seen.calls == [(x_shape, w_shape, kind)]
    assert layer.operand_shapes(x.shape[1:])[0][-1] == x_shape[-1]
    explanation = approxconv.explain(layer, x.shape, measure=True)
    products = len(x) * stock.weight.numel()
    if is_transposed(stock):
        assert explanation.macs == products * x[0, 0].numel()
    elif name == "3d-depthwise":  # each padded plane with each tap, whether their product is part of a sum or not
        assert explanation.macs == len(x) * 11 * 3 * 4 * (2 * 3) * (3 * 2)
    else:
        assert explanation.macs == products * stock(x)[0, 0].numel()
    with pytest.raises(ValueError, match="shape"):
        approxconv.explain(layer, (1, 99, *x.shape[2:]))


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_drop_in_for_the_torch_class(kind, hostile):
    approx, stock = getattr(approxconv.nn, f"Approx{kind}"), getattr(nn, kind)
    assert issubclass(approx, stock)
    layer = approx(4, 6, 3, 2, 1, groups=2, multiplier=hostile(), mode="quantized", engine="reference")
    model = stock(4, 6, 3, 2, 1, groups=2)
    assert (layer.mode, layer.engine) == ("quantized", "reference")
    assert stock.extra_repr(layer) in layer.extra_repr()
    assert layer.extra_repr().endswith("multiplier=hostile0, mode=quantized, engine=reference")
    model.load_state_dict({key: layer.state_dict()[key] for key in ("weight", "bias")})
    x = torch.randn(2, 4, *[5] * (model.weight.ndim - 2))
    assert torch.equal(approxconv.set_mode(layer, "float")(x), model(x))
    taken = approx.from_float(model, hostile(), mode="approximate")
    assert taken.weight is model.weight
    back = taken.to_float()
    assert type(back) is stock
    assert torch.equal(back(x), model(x))
    assert type(approxconv.approximate(nn.Sequential(model, nn.Linear(3, 2)), hostile())[0]) is approx

    approxconv.set_mode(approxconv.calibrate(layer, [x]), "approximate")
    other = approx(4, 6, 3, 2, 1, groups=2, multiplier=hostile(seed=1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
