"""Converted models under torch.compile, torch.export, torch.func, checkpointing, copying, saving and autocast."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import approxconv
from approxconv import Multiplier
from approxconv.quantization import OperandQuantization, Quantization


class Block(nn.Module):
    """A ResNet block that halves the image, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, (3, 2), padding="same", bias=False), nn.BatchNorm2d(4)
        self.shortcut, self.head = nn.Conv2d(3, 4, 1, stride=2), nn.Linear(4, 5)

    def forward(self, x):
        y = torch.relu(self.first_norm(self.first(x)))
        y = torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))
        return self.head(y.mean((2, 3)))


LEARNED = OperandQuantization(range="lsq")
CASES = {
    "default": ((False, True), {}),
    "affine_weights": ((False, False), {}),
    "symmetric": ((True, True), {"gradient": "lre"}),
    "moving": (
        (False, True),
        {
            "quantization": Quantization(OperandQuantization(range="moving_average"), freeze=False, bias_bits=32),
            "gradient": "smooth",
        },
    ),
    "learned": ((False, True), {"quantization": Quantization(LEARNED, LEARNED)}),
    "few_bits": (
        (True, True),
        {"quantization": Quantization(weight=OperandQuantization(bits=4, granularity="per_tensor"))},
    ),
}
cases = pytest.mark.parametrize("case", CASES)
one_quickly = pytest.mark.parametrize(
    "case", [case if case == "affine_weights" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)


@pytest.fixture
def make(hostile, low_rank):
    def make(case):
        signs, arguments = CASES[case]
        smooth = arguments.get("gradient") == "smooth"  # one term of the sum for each of the table's
        multiplier = low_rank(2, flags=signs) if smooth else hostile(8, *signs)
        torch.manual_seed(0)
        x = torch.randn(3, 3, 6, 5) - 0.2
        model = approxconv.approximate(Block(), multiplier, first_last="approximate", **arguments)
        return approxconv.calibrate(model, [x]), x * 1.2

    return make


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def results(function, model, x):
    """Output, gradients of input and parameters, and the state afterwards."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@one_quickly
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_in_one_graph(case, training, make):
    model, x = make(case)
    model.train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for scale in (1, 2):  # weights and ranges move between two calls of one graph
        assert_equal(results(compiled, other, x * scale), results(model, model, x * scale))
        with torch.no_grad():
            for each in (model, other):
                each.first.weight.mul_(-0.7)
    assert_equal(results(compiled, other, x[:2]), results(model, model, x[:2]))  # sizes are symbols from here on
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["quantized", "noise"])
def test_other_modes_compiled(mode, make):
    model, x = make("affine_weights")
    approxconv.set_mode(model, mode)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    if mode == "noise":
        for each in (model, other):
            for layer in approxconv.nn.approx_layers(each).values():
                layer.noise_factor.data.zero_()
    got, expected = results(compiled, other, x), results(model, model, x)
    if mode == "noise":  # other random numbers, which only the factor's gradients see
        assert torch.equal(got[0], expected[0])
        assert other.first.noise_factor.grad.abs() > 0
    else:
        assert_equal(got, expected)


def test_an_uncalibrated_layer_says_so_when_compiled(hostile):
    layer = torch.compile(
        approxconv.approximate(nn.Linear(3, 2), hostile(), first_last="approximate"),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(RuntimeError, match="calibrate"):
        layer(torch.rand(2, 3))


@pytest.mark.slow
def test_compiled_by_inductor(make):
    model, x = make("default")
    other = copy.deepcopy(model)
    got = results(torch.compile(other, fullgraph=True), other, x)
    for mine, theirs in zip(got, results(model, model, x), strict=True):
        mine, theirs = mine.double(), theirs.double()
        finite = theirs.isfinite()
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs[finite].abs().max().item())


@one_quickly
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported(case, strict, make):
    model, x = make(case)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},))
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        loaded = torch.export.load(stream).module()
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded(x[:2]), expected[:2])


@cases
def test_functional_call_and_its_gradients(case, make):
    model, x = make(case)
    model.eval()
    results(model, model, x)
    expected = {name: p.grad for name, p in model.named_parameters()}
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)  # what the module holds does not count
    before = copy.deepcopy(model.state_dict())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())
    by_sample = torch.func.vmap(lambda x: torch.func.grad(loss)(parameters, x[None]))(x)
    for name, grad in expected.items():
        torch.testing.assert_close(by_sample[name].sum(0), grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_second_derivatives_by_torch_func():
    """Those of the fake-quantised twin."""
    torch.manual_seed(0)
    x, stock = torch.randn(4, 6), nn.Linear(6, 3)
    layer = approxconv.approximate(stock, Multiplier.exact(), first_last="approximate")
    layer = approxconv.calibrate(layer, [x])

    def approximate(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    def twin(x, weight):
        x = torch.fake_quantize_per_tensor_affine(x, layer.activation_scale, layer.activation_zero_point, 0, 255)
        w = torch.fake_quantize_per_channel_affine(weight, layer.weight_scale, layer.weight_zero_point, 0, -128, 127)
        return nn.functional.linear(x, w, layer.bias)

    def curvature(function, operand):
        inner = torch.func.grad(lambda x, w: function(x, w).pow(3).sum())
        return torch.func.grad(lambda x, w: inner(x, w).square().sum(), argnums=operand)(x, layer.weight.detach())

    for operand in range(2):
        expected = curvature(twin, operand)
        torch.testing.assert_close(curvature(approximate, operand), expected, rtol=1e-4, atol=1e-3)
        assert expected.abs().max() > 1


@pytest.mark.parametrize("gradient", ["ste", "lre"])
def test_gradients_by_torch_func_compiled(gradient, hostile):
    """Inside of a transform torch.compile has no parameter require a gradient."""
    layer = approxconv.nn.ApproxLinear(4, 3, multiplier=hostile(), gradient=gradient)
    matmul, x = approxconv.nn.ApproxMatmul(multiplier=hostile(), gradient=gradient), torch.randn(5, 4)
    model = nn.ModuleList([layer, matmul])
    approxconv.set_mode(model, "float")
    for part in model:
        part.start_calibration()
    matmul(layer(x).mT, x)
    for part in model:
        part.finish_calibration()
    approxconv.set_mode(model, "approximate")

    def loss(parameters, x):
        return matmul(torch.func.functional_call(layer, parameters, (x,)).mT, x).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    expected = torch.func.grad(loss, (0, 1))(parameters, x)
    got = torch.compile(torch.func.grad(loss, (0, 1)), backend="aot_eager", fullgraph=True)(parameters, x)
    torch.testing.assert_close(got, expected)


@cases
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(case, use_reentrant, make):
    model, x = make(case)
    for module in model.modules():  # batch normalisation would see each batch twice in training
        module.train(not isinstance(module, nn.BatchNorm2d))
    other = copy.deepcopy(model)
    expected = results(model, model, x)
    got = results(lambda x: checkpoint(other, x, use_reentrant=use_reentrant), other, x)
    assert_equal(got, expected)


@cases
def test_copies_and_checkpoints(case, make):
    model, x = make(case)
    model.eval()
    expected = results(model, model, x)
    assert_equal(results(*[copy.deepcopy(model)] * 2, x), expected)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    fresh, _ = make(case)
    for layer in fresh.modules():
        if hasattr(layer, "weight"):
            layer.weight.data.mul_(0.3)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    fresh.eval()
    assert_equal(results(fresh, fresh, x), expected)


@cases
def test_safetensors(case, make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model, x = make(case)
    model.eval()
    expected = model(x)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    fresh, _ = make(case)
    with torch.no_grad():
        fresh.first.weight.mul_(0.3)
    safetensors.load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(x), expected)


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_autocast_are_quantised_in_full_precision(case, dtype, make):
    model, x = make(case)
    layer = model.eval().first
    x = x.to(dtype)
    expected = layer(x.float())
    assert torch.equal(layer(x), expected.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x.float()), expected)
        assert torch.equal(model(x.float()).argmax(1), model(x.float()).argmax(1))


@cases
def test_empty_batches(case, make):
    model, x = make(case)
    model.eval()
    empty = x[:0].requires_grad_()
    y = model(empty)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    model.train()
    for name in ("first", "head"):
        shape = (0, 3, 6, 5) if name == "first" else (0, 4)
        layer = getattr(model, name)
        scale = layer.activation_scale.clone()
        assert len(layer(torch.empty(shape))) == 0
        assert torch.equal(layer.activation_scale, scale)
