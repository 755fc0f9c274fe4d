"""What every approximate layer has: quantisation, gradients, noise, other tables, the way back, checkpoints."""

import copy
import io
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import approxconv
from approxconv import Multiplier
from approxconv.gradients import GradientTables, gradient_tables
from approxconv.nn import ApproxConv2d, ApproxLinear
from approxconv.quantization import OperandQuantization, Quantization, activation_observer, observed_scale

LSQ = OperandQuantization(range="lsq")
QUANTIZATIONS = {
    "default": (Quantization(), (False, True)),
    "affine_on_signed": (Quantization(OperandQuantization("affine")), (True, True)),
    "few_bits": (Quantization(OperandQuantization(bits=5), OperandQuantization(bits=3)), (False, False)),
    "narrow": (Quantization(weight=OperandQuantization(narrow_range=True)), (True, True)),
    "weight_per_tensor": (Quantization(weight=OperandQuantization(granularity="per_tensor")), (False, False)),
    "mse": (Quantization(OperandQuantization(range="mse"), OperandQuantization(range="mse", bits=4)), (False, True)),
    "percentile": (
        Quantization(
            OperandQuantization(range="percentile", percentile=95),
            OperandQuantization(range="percentile", percentile=90),
        ),
        (False, False),
    ),
    "histogram": (Quantization(OperandQuantization(range="histogram")), (True, False)),
    "moving_average": (Quantization(OperandQuantization(range="moving_average", momentum=0.5)), (False, True)),
    "learned": (Quantization(LSQ, LSQ), (False, True)),
    "learned_per_tensor": (
        Quantization(LSQ, OperandQuantization(range="lsq", granularity="per_tensor")),
        (False, False),
    ),
    "integer_bias": (Quantization(bias_bits=32), (False, False)),
}
quantizations = pytest.mark.parametrize("name", QUANTIZATIONS)
kinds = pytest.mark.parametrize("kind", ["conv", "linear"])


def make(kind, multiplier, seed=0, **arguments):
    """A calibrated layer, and an input that leaves the calibrated range."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "conv":
        stock = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2)
        layer, shape = ApproxConv2d.from_float(stock, multiplier, **arguments), (5, 4, 6, 5)
    else:
        layer, shape = ApproxLinear.from_float(nn.Linear(12, 7), multiplier, **arguments), (9, 12)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.2)
    x = torch.randn(shape, generator=generator) * 0.8 + 0.4
    return approxconv.calibrate(layer, [x, x * 1.1]), x * 1.3


def operands(layer, x):
    """What torch's fake quantisation makes of input and weight with the layer's scales, in double precision."""
    weight = layer.quantized_weight()
    xf = torch.fake_quantize_per_tensor_affine(
        x,
        layer.activation_scale.detach().view(()),
        layer.activation_zero_point,
        layer.activation_format.low,
        layer.activation_format.high,
    )
    wf = torch.fake_quantize_per_channel_affine(
        layer.weight.detach(), weight.scale, weight.zero_point, 0, layer.weight_format.low, layer.weight_format.high
    )
    return xf.double(), wf.double()


def apply(layer, x, w, bias=None):
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, w, bias)
    return nn.functional.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@kinds
@quantizations
def test_quantised_layer_is_its_fake_quantised_twin(name, kind):
    quantization, signs = QUANTIZATIONS[name]
    layer, x = make(kind, Multiplier.exact(8, *signs), quantization=quantization)
    bias = layer.bias.detach().double()
    if quantization.bias_bits:
        scale = layer.activation_scale.double() * layer.weight_scale.double()
        rounded = (bias / scale).round() * scale
        assert (rounded - bias).abs().max() > 0
        bias = rounded
    expected = apply(layer, *operands(layer, x), bias)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (expected - apply(layer, x.double(), layer.weight.double(), bias)).abs().max() > 1e-3
    assert torch.equal(approxconv.set_mode(layer, "quantized")(x), y)
    codes = layer.quantized_weight().codes
    assert codes.min() >= layer.weight_format.low
    assert codes.max() <= layer.weight_format.high


@quantizations
def test_approximate_layer_is_a_sum_of_entries(name, hostile):
    quantization, signs = QUANTIZATIONS[name]
    multiplier = hostile(8, *signs)
    layer, x = make("linear", multiplier, quantization=quantization)
    weight, zx = layer.quantized_weight(), int(layer.activation_zero_point)
    sx = layer.activation_scale.detach().double()
    a = (operands(layer, x)[0] / sx).round().long() + zx
    w, zw = weight.codes.long(), weight.zero_point.long()
    sums = torch.zeros(len(a), len(w), dtype=torch.float64)
    for i, j in itertools.product(range(len(a)), range(len(w))):
        entries = multiplier.table.long()[a[i] % 256, w[j] % 256]
        sums[i, j] = (entries - zx * w[j] - zw[j] * a[i] + zx * zw[j]).sum()
    scale = sx * weight.scale.double()
    bias = layer.bias.detach().double()
    if quantization.bias_bits:
        bias = (bias / scale).round() * scale
    expected = sums * scale + bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@kinds
@quantizations
def test_gradients_are_the_twins(name, kind, hostile):
    quantization, signs = QUANTIZATIONS[name]
    layer, x = make(kind, hostile(8, *signs), quantization=quantization)
    x = x.requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad(y, [x, *parameters.values()], grad)

    weight = layer.quantized_weight()
    formats = layer.activation_format, layer.weight_format
    if quantization.activation.range == "lsq":
        xf = formats[0].fake_quantize_learned(x, layer.activation_scale, layer.activation_zero_point, x[0].numel())
        zero_point, features = layer.weight_zero_point, layer.weight.numel() // len(layer.weight_scale)
        wf = formats[1].fake_quantize_learned(layer.weight, layer.weight_scale, zero_point, features)
    else:
        xf = formats[0].fake_quantize(x, layer.activation_scale, layer.activation_zero_point)
        wf = formats[1].fake_quantize(layer.weight, weight.scale, weight.zero_point)
    twin = apply(layer, xf, wf, layer.bias)
    expected = torch.autograd.grad(twin, [x, *parameters.values()], grad)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        assert theirs.abs().max() > 0
    assert ("weight_scale" in parameters) == (quantization.weight.range == "lsq")


@pytest.mark.parametrize("mode", ["quantized", "approximate"])
def test_learned_scales_train_with_any_optimizer(mode, truncated):
    layer, x = make("linear", truncated, quantization=Quantization(LSQ, LSQ), mode=mode)
    target = torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    before = layer.weight_scale.detach().clone(), layer.activation_scale.detach().clone()
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.01), []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(before[0], layer.weight_scale)
    assert not torch.equal(before[1], layer.activation_scale)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight_scale.dtype == half.activation_scale.dtype == torch.float32
    assert torch.equal(half.weight_scale, layer.weight_scale)


@kinds
@pytest.mark.parametrize("range", ["minmax", "moving_average"])
def test_ranges_that_move_in_training(range, kind, hostile):
    spec = OperandQuantization(range=range, momentum=0.25)
    layer, x = make(kind, hostile(), quantization=Quantization(spec, freeze=False))
    fresh = type(layer).from_float(layer.to_float(), hostile(), quantization=Quantization(spec, freeze=False)).train()
    with pytest.raises(RuntimeError, match="calibrate"):
        copy.deepcopy(fresh).eval()(x)
    observer = activation_observer(spec, fresh.activation_format)
    for factor in (1.0, 2.0, 0.5):
        fresh(x * factor)
        observer(x * factor)
        scale, zero_point = observed_scale(observer, spec, fresh.activation_format)
        assert torch.equal(fresh.activation_scale, scale)
        assert torch.equal(fresh.activation_zero_point, zero_point)
    fresh.eval()(x * 100)
    assert torch.equal(fresh.activation_scale, scale)
    frozen, _ = make(kind, hostile(), quantization=Quantization(spec))
    scale = frozen.activation_scale.clone()
    frozen.train()(x * 100)
    assert torch.equal(frozen.activation_scale, scale)


@pytest.mark.parametrize("range", ["minmax", "moving_average"])
def test_an_empty_batch_is_no_calibration(range, hostile):
    quantization = Quantization(OperandQuantization(range=range), freeze=False)
    layer = ApproxLinear(3, 2, multiplier=hostile(), quantization=quantization)
    assert layer(torch.rand(0, 3)).shape == (0, 2)
    with pytest.raises(RuntimeError, match="calibrate"):
        layer.eval()(torch.rand(4, 3))
    layer.train()(torch.rand(4, 3))
    layer.eval()(torch.rand(4, 3))


def test_a_weight_that_is_derived_later_gets_its_gradient(hostile):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = make("linear", hostile())
    doubled, _ = make("linear", hostile())
    with torch.no_grad():
        doubled.weight.mul_(0.5)
    nn.utils.parametrize.register_parametrization(doubled, "weight", Doubled())
    assert torch.equal(doubled(x), layer(x))
    for each in (layer, doubled):
        each.bias.requires_grad_(False)
        each(x).square().sum().backward()
    assert torch.equal(doubled.parametrizations.weight.original.grad, 2 * layer.weight.grad)


# Gradients and noise


def direct(layer, tables, grad, x):
    """Sums over products of a linear layer, in double precision, for operands that are not clipped."""
    weight, sx, zx = layer.quantized_weight(), layer.activation_scale.double(), layer.activation_zero_point.double()
    a = layer.activation_format.quantize(x, layer.activation_scale, layer.activation_zero_point).long() % 256
    w = weight.codes.long() % 256
    sw, zw = weight.scale.double()[:, None], weight.zero_point.double()[:, None]
    by_a = tables.by_activation.double()[a[:, None], w[None]] - zw  # (B, N, K)
    by_w = tables.by_weight.double()[a[:, None], w[None]] - zx
    grad = grad.double()[:, :, None]
    w_real = layer.weight.detach().requires_grad_()
    faked = layer.weight_format.fake_quantize(w_real, weight.scale, weight.zero_point)
    (inside,) = torch.autograd.grad(faked.sum(), w_real)  # a symmetric scale clips one of two opposite ends
    return (grad * sw * by_a).sum(1), (grad * sx * by_w).sum(0) * inside


@pytest.mark.parametrize("gradient", ["ste", "lre", "smooth", "own"])
@pytest.mark.parametrize("signs", list(itertools.product([False, True], repeat=2)))
def test_gradients_by_the_tables_slopes(gradient, signs, hostile):
    multiplier = hostile(8, *signs)
    if gradient == "own":
        generator = torch.Generator().manual_seed(3)
        gradient = GradientTables(*(torch.randn(256, 256, generator=generator) for _ in range(2)))
    layer, x = make("linear", multiplier, gradient=gradient)
    x = (x / 1.3).requires_grad_()  # nothing is clipped
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    got = torch.autograd.grad(y, [x, layer.weight], grad)
    expected = direct(layer, gradient_tables(multiplier, gradient), grad, x)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    # Products that are exact have the exact slope, and so has the straight-through estimate.
    approxconv.set_mode(layer, "quantized")
    exact = torch.autograd.grad(layer(x), [x, layer.weight], grad)
    approxconv.set_mode(layer, "approximate").gradient = "ste"
    through = torch.autograd.grad(layer(x), [x, layer.weight], grad)
    assert all(torch.equal(a, b) for a, b in zip(exact, through, strict=True))


def test_gradient_follows_the_table(hostile):
    other = hostile(seed=5)
    layer, x = make("conv", hostile(), gradient="lre")
    expected, _ = make("conv", other, gradient="lre")
    expected = torch.autograd.grad(expected(x).square().sum(), expected.weight)[0]
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(make("conv", other)[0].state_dict())
    layer.set_multiplier(other)
    for each in (layer, loaded):
        assert torch.equal(torch.autograd.grad(each(x).square().sum(), each.weight)[0], expected)


@pytest.mark.parametrize("gradient", ["steepest", None, 3])
def test_unknown_gradient(gradient, hostile):
    with pytest.raises(ValueError, match="gradient must be"):
        ApproxLinear(2, 2, multiplier=hostile(), gradient=gradient)
    layer = ApproxLinear(2, 2, multiplier=hostile())
    with pytest.raises(ValueError, match="gradient must be"):
        layer.gradient = gradient
    with pytest.raises(ValueError, match="shape"):
        layer.gradient = GradientTables(torch.ones(16, 16), torch.ones(16, 16))
    assert layer.gradient == "ste"


def test_noise_has_the_multipliers_mean_and_variance():
    multiplier = Multiplier.from_function(lambda a, w: a * w // 64 * 64, a_signed=False, w_signed=True)
    stock = nn.Linear(400, 50)
    layer = approxconv.calibrate(ApproxLinear.from_float(stock, multiplier, mode="quantized"), [torch.rand(200, 400)])
    x = torch.rand(200, 400)
    exact = layer(x)
    figures = multiplier.metrics()
    layer.mode = "noise"
    assert "noise_factor" in dict(layer.named_parameters())
    torch.manual_seed(0)
    error = (layer(x) - exact).double() / (layer.activation_scale * layer.weight_scale).double()
    assert error.mean().item() == pytest.approx(400 * figures["bias"], rel=0.02)
    assert error.var().item() == pytest.approx(400 * figures["variance"], rel=0.05)
    y = layer(x)
    y.sum().backward()
    assert layer.noise_factor.grad.item() == pytest.approx((y - exact).sum().item(), rel=1e-3)
    with torch.no_grad():
        layer.noise_factor.zero_()
    assert torch.equal(layer(x), exact)
    fresh = ApproxLinear.from_float(stock, multiplier)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.noise_factor.item() == 0


# The way back, other tables, checkpoints


@kinds
@quantizations
def test_there_and_back(name, kind, hostile):
    quantization, signs = QUANTIZATIONS[name]
    layer, x = make(kind, hostile(8, *signs), quantization=quantization, mode="noise")
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.tag = "mine"
    stock = layer.eval().to_float()
    assert type(stock) in (nn.Conv2d, nn.Linear)
    assert stock.weight is layer.weight
    assert stock.bias is layer.bias
    assert stock.tag == "mine"
    assert not stock.training
    assert torch.equal(stock(x), apply(layer, x, layer.weight, layer.bias))
    assert calls == [1]
    handle.remove()
    stock(x)
    assert calls == [1]
    new = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2) if kind == "conv" else nn.Linear(12, 7)
    assert set(stock.__dict__) == {*new.__dict__, "tag"}
    assert stock.state_dict().keys() == new.state_dict().keys()
    assert repr(stock) == repr(new)
    assert not stock._forward_pre_hooks
    again = type(layer).from_float(stock, hostile(8, *signs), quantization=quantization)
    assert again.extra_repr() == layer.extra_repr().replace("mode=noise", "mode=approximate")


@kinds
@quantizations
def test_another_multiplier_of_the_same_formats(name, kind, hostile):
    quantization, signs = QUANTIZATIONS[name]
    first, second = hostile(8, *signs), hostile(8, *signs, seed=1)
    layer, x = make(kind, first, quantization=quantization)
    expected = layer(x), make(kind, second, quantization=quantization)[0](x)
    weight = layer.weight
    for _ in range(2):
        layer.set_multiplier(second)
        assert torch.equal(layer(x), expected[1])
        assert layer.multiplier == second
        assert second.name in layer.extra_repr()
        layer.set_multiplier(first)
        assert torch.equal(layer(x), expected[0])
    assert layer.weight is weight
    layer.table.zero_()
    assert first.table.any()


@kinds
@quantizations
def test_another_multiplier_of_other_formats(name, kind, hostile):
    """As if the layer had been made and calibrated with it."""
    quantization, signs = QUANTIZATIONS[name]
    layer, x = make(kind, hostile(8, *signs), quantization=quantization)
    narrower = hostile((6, 5), *signs, seed=2)
    layer.set_multiplier(narrower)
    expected, _ = make(kind, narrower, quantization=quantization)
    assert torch.equal(layer(x), expected(x))
    assert layer.activation_format == expected.activation_format
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), expected.buffers(), strict=True))
    fresh = type(layer).from_float(layer.to_float(), hostile(8, *signs), quantization=quantization)
    fresh.set_multiplier(narrower)
    with pytest.raises(RuntimeError, match="calibrate"):
        fresh(x)


@pytest.mark.parametrize(
    "other",
    [
        Quantization(OperandQuantization(bits=4)),
        Quantization(weight=OperandQuantization(narrow_range=True)),
        Quantization(OperandQuantization("affine")),
    ],
)
def test_codes_of_another_quantization_are_not_loaded(other, hostile):
    layer, x = make("linear", hostile(8, True, True))
    expected, stream = layer(x), io.BytesIO()
    torch.save(make("linear", hostile(8, True, True), quantization=other)[0].state_dict(), stream)
    stream.seek(0)
    with pytest.raises(RuntimeError, match=r"saved with codes .* this layer's quantization has"):
        layer.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("signs", [(False, True), (True, False)])
def test_another_multiplier_while_evaluating(signs, hostile):
    layer, x = make("linear", hostile())
    with torch.inference_mode():
        layer.set_multiplier(hostile(8, *signs, seed=2))
        layer.mode = "noise"
        layer(x)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    layer(x).sum().backward()
    assert torch.isfinite(layer.noise_factor.grad).all()


def test_a_multiplier_that_does_not_fit_changes_nothing(hostile):
    layer, x = make("linear", hostile(), quantization=Quantization(weight=OperandQuantization("symmetric", bits=7)))
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    for multiplier in (hostile(8, False, False), hostile(6), "no_such_circuit"):
        with pytest.raises(ValueError, match=r"weight|no_such_circuit"):
            layer.set_multiplier(multiplier)
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_what_does_not_fit_is_refused_when_made(hostile):
    with pytest.raises(ValueError, match="'symmetric' fits"):
        ApproxLinear(2, 2, multiplier=hostile(), quantization=Quantization(weight=OperandQuantization("affine")))
    with pytest.raises(ValueError, match="quantization must be a Quantization"):
        ApproxLinear(2, 2, multiplier=hostile(), quantization="int8")


@kinds
def test_checkpoints_carry_a_version(kind, hostile):
    layer, x = make(kind, hostile())
    expected, state = layer(x), layer.state_dict()
    assert state._metadata[""]["version"] == 2
    # What the first version saved, by name and shape; it had no other number than torch's for any module.
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "weight": tuple(layer.weight.shape),
        "bias": tuple(layer.bias.shape),
        "table": (256, 256),
        "operands_signed": (2,),
        "activation_scale": (),
        "activation_zero_point": (),
        "weight_scale": (len(layer.weight),),
        "weight_zero_point": (len(layer.weight),),
        "calibrated": (),
        "activation_observer.eps": (1,),
        "activation_observer.min_val": (),
        "activation_observer.max_val": (),
    }
    for version in (1, None):
        old = copy.deepcopy(state)
        old._metadata[""]["version"] = version
        fresh = type(layer).from_float(copy.deepcopy(layer).to_float(), hostile())
        fresh.load_state_dict(old)
        assert torch.equal(fresh(x), expected)
    newer = copy.deepcopy(state)
    newer._metadata[""]["version"] = 3
    with pytest.raises(RuntimeError, match="format 3 by a newer approxconv"):
        layer.load_state_dict(newer)
    learned, _ = make(kind, hostile(), seed=1, quantization=Quantization(LSQ, LSQ))
    learned.load_state_dict(state, strict=False)  # learning starts from the ranges that were found
    assert torch.equal(learned(x), expected)


@quantizations
def test_saved_and_loaded(name, hostile):
    quantization, signs = QUANTIZATIONS[name]
    layer, x = make("conv", hostile(8, *signs), quantization=quantization)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh, _ = make("conv", hostile(8, *signs, seed=3), seed=4, quantization=quantization)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(fresh(x), layer(x))


def _rank(rank, folder, specs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(4, 64, 12, generator=generator) * torch.tensor([1.0, 3.0, 0.5, 2.0]).view(-1, 1, 1)
    scales = {}
    for name, spec in specs.items():
        for freeze in (True, False):
            if not freeze and spec.range not in ("minmax", "moving_average"):
                continue
            layer = ApproxLinear(12, 3, multiplier=Multiplier.exact(), quantization=Quantization(spec, freeze=freeze))
            mine = batches[:, rank * 40 :][:, :40]  # 40 of the rows here, 24 there
            if freeze:
                approxconv.calibrate(layer, mine)
            else:
                for batch in mine:
                    layer.train()(batch)
            scales[name, freeze] = layer.activation_scale.item(), layer.activation_zero_point.item()
    torch.save(scales, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_the_scales_of_the_joint_batch(tmp_path):
    specs = {kind: OperandQuantization(range=kind, percentile=95) for kind in approxconv.quantization.ACTIVATION_RANGES}
    torch.multiprocessing.spawn(_rank, (tmp_path, specs), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == len(specs) + 2
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(4, 64, 12, generator=generator) * torch.tensor([1.0, 3.0, 0.5, 2.0]).view(-1, 1, 1)
    for (name, freeze), (scale, zero_point) in ranks[0].items():
        layer = ApproxLinear(12, 3, multiplier=Multiplier.exact(), quantization=Quantization(specs[name]))
        approxconv.calibrate(layer, batches)
        binned = name in ("histogram", "mse", "percentile")
        assert scale == pytest.approx(layer.activation_scale.item(), rel=0.03 if binned else 1e-6), (name, freeze)
        assert zero_point == pytest.approx(layer.activation_zero_point.item(), abs=3 if binned else 0), (name, freeze)
