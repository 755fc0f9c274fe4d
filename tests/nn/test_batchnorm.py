"""Batch normalisation folded into the layer before it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import approxconv
from approxconv import Multiplier
from approxconv.nn import approx_layers
from approxconv.nn.batchnorm import FoldedBatchNorm, find_batchnorms, fold


def learned(norm):
    """A normalisation in eval mode that does something."""
    generator = torch.Generator().manual_seed(3)
    norm.running_mean.normal_(0, 0.5, generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    return norm.eval()


LAYERS = {
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6, affine=False), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, (1, 3), groups=2), nn.BatchNorm2d(6, eps=0.1), (2, 4, 3, 5)),
    "conv3d": (nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6), (2, 4, 3, 4, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.SyncBatchNorm(8), (1, 4, 4, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, (2, 3), bias=False), nn.BatchNorm2d(6), (2, 4, 3, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 8, 2, groups=4), nn.BatchNorm3d(8), (1, 4, 3, 2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_folded_layer_is_both(name, dtype):
    layer, norm, shape = LAYERS[name]
    layer, norm = copy.deepcopy(layer).to(dtype), learned(copy.deepcopy(norm)).to(dtype)
    layer.weight.requires_grad_(False)
    x, weight, has_bias = torch.randn(shape, dtype=dtype), layer.weight, layer.bias is not None
    expected = norm(layer(x)) if not isinstance(norm, nn.SyncBatchNorm) else F.batch_norm(
        layer(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )  # fmt: skip
    folded = fold(layer, norm)
    assert layer.weight is weight
    assert (layer.weight.dtype, layer.bias.dtype) == (dtype, dtype)
    assert layer.bias.requires_grad == has_bias
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(folded(layer(x)), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=f"{len(shape)} dimensions"):
        folded(layer(x)[0])
    assert str(folded) == f"FoldedBatchNorm(ndim={len(shape)})"


@torch.no_grad()
def in_a_run(model, x):
    return find_batchnorms(model, layers_of(model), lambda: model(x))


class Block(nn.Module):
    """Cannot be traced as a whole: the shape decides what it does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.side = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x):
        if x.shape[-1] < 2:
            return x
        return self.conv(x) + self.side(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x.mean((2, 3)))


class Traceable(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(block.side for block in self.blocks))

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


def ready(model):
    torch.manual_seed(0)
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            learned(module)
    return model


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize("inplace", [False, True])
def test_of_a_model(inplace):
    model, x = ready(Traceable()), torch.randn(3, 3, 6, 6)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    multiplier = Multiplier.exact()
    approx = approxconv.approximate(model, multiplier, fold_batchnorm=True, skip=["blocks.1.0"], inplace=inplace)
    kinds = [type(m).__name__ for m in approx.modules() if "BatchNorm" in type(m).__name__]
    assert kinds == ["FoldedBatchNorm", "FoldedBatchNorm", "BatchNorm2d", "FoldedBatchNorm"]
    torch.testing.assert_close(approxconv.set_mode(approx, "float")(x), expected)
    quantized = approxconv.set_mode(approxconv.calibrate(approx, [x]), "quantized")(x)
    assert 0 < (quantized - expected).norm() < 0.2 * expected.norm()
    # Quantised is the folded weight.
    stem = approx.stem
    torch.testing.assert_close(stem.weight_scale, stem.weight.detach().abs().amax((1, 2, 3)) / 127.5)
    stock = approxconv.to_float(approx)
    assert type(stock.norm) is FoldedBatchNorm
    torch.testing.assert_close(stock(x), expected)
    if not inplace:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Once folded, nothing is left to fold.
    again = approxconv.approximate(approx, multiplier, fold_batchnorm=True, skip=["blocks.1.0"])
    assert all(torch.equal(p, q) for p, q in zip(approx.parameters(), again.parameters(), strict=True))


def test_parts_of_a_model_that_cannot_be_traced():
    model = ready(Net())
    expected = {
        "blocks.0.conv.0": "blocks.0.conv.1", "blocks.0.side.0": "blocks.0.side.1", "blocks.1.conv.0":
        "blocks.1.conv.1", "blocks.1.side.0": "blocks.1.side.1", "head.0": "head.1",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot trace the code that calls 'norm'.*give a batch"):
        approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=True)
    x = torch.randn(2, 3, 6, 6)
    assert in_a_run(model, x) == {"stem": "norm", **expected}
    assert in_a_run(model, torch.randn(2, 3, 3, 3)) == {"stem": "norm", "head.0": "head.1"}
    approx = approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=x, mode="float")
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in approx.modules())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(approx(x), model(x))
    model.norm = nn.Identity()
    assert find_batchnorms(model, layers_of(model)) == expected
    approx = approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=True, mode="float")
    torch.testing.assert_close(approx(x), model(x))
    assert not any("_tensor_constant" in name for module in model.modules() for name in vars(module))


class Uses(nn.Module):
    """A convolution whose output, or whose weight, goes elsewhere too."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.other, self.use = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), use

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x: net.norm(net.conv(x) + x),
        lambda net, x: (lambda y: net.norm(y) + y)(net.conv(x)),
        lambda net, x: net.norm(net.conv(net.conv(x))),
        lambda net, x: net.norm(net.norm(net.conv(x))),
        lambda net, x: net.norm(net.conv(x)) + net.conv.weight.sum(),
        lambda net, x: net.norm(net.conv(x)) + net.norm.running_mean.sum(),
        lambda net, x: (lambda y: (net.norm(y), net.other(y)))(net.conv(x)),
        lambda net, x: net.norm(F.relu(net.conv(x))),
        lambda net, x: net.conv(net.norm(x)),
    ],
    ids=["sum", "skip", "twice", "norm twice", "weight", "mean", "two", "relu", "before"],
)
def test_a_layer_with_other_uses_is_left_alone(use):
    model, x = ready(Uses(use)), torch.randn(2, 4, 3, 3)
    assert find_batchnorms(model, layers_of(model)) == {}
    assert in_a_run(model, x) == {}
    approx = approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=True, mode="float")
    torch.testing.assert_close(approx(x), model(x), rtol=0, atol=0)


def test_tied_parameters_and_batch_statistics_are_left_alone():
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert find_batchnorms(model, layers_of(model)) == {"0": "1", "2": "3"}
    model[0].weight = model[2].weight
    assert find_batchnorms(model, layers_of(model)) == {}
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert find_batchnorms(model, layers_of(model)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.norm.train(), "'norm' must be in eval mode"),
        (lambda net: net.norm.register_forward_hook(lambda *_: None), "'norm' has hooks"),
        (lambda net: net.norm.register_forward_pre_hook(lambda *_: None), "'norm' has hooks"),
        (lambda net: net.stem.register_forward_hook(lambda *_: None), "'stem' has hooks"),
        (lambda net: net.stem.register_full_backward_hook(lambda *_: None), "'stem' has hooks"),
    ],
    ids=["training", "hook", "pre-hook", "layer's hook", "layer's backward hook"],
)
def test_what_cannot_be_folded_is_named(change, message):
    model = ready(Traceable())
    change(model)
    before = copy.deepcopy(model.state_dict())
    for how in (True, torch.randn(2, 3, 6, 6)):
        with pytest.raises(ValueError, match=message):
            approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=how, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no approximate layers"):
        approx_layers(model)


def test_a_pre_hook_of_the_layer_and_a_shared_part():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = ready(nn.Sequential(nn.Sequential(block), nn.Conv2d(4, 4, 1)))
    block[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(1, 4, 2, 2)
    assert find_batchnorms(model, layers_of(model)) == in_a_run(model, x) == {"0.0.0": "0.0.1"}
    approx = approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=True, mode="float")
    torch.testing.assert_close(approx(x), model(x))
