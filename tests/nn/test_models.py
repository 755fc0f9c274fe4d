"""Conversion of models that nobody here wrote: Hugging Face transformers, built from configurations."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import approxconv
from approxconv import Multiplier
from approxconv.nn import ApproxConv2d, ApproxLayer, approx_layers, attention_modules
from approxconv.nn.batchnorm import FoldedBatchNorm
from approxconv.quantization import OperandQuantization, Quantization

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")


def resnet(small):
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=2 if small else 8,
            hidden_sizes=[2, 3] if small else [8, 16],
            depths=[1, 1],
            layer_type="basic" if small else "bottleneck",
            num_labels=3,
        )
    )


def mobilenet(small):
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.1, min_depth=2, depth_divisible_by=2, expand_ratio=2 if small else 6, num_labels=3
    )
    return transformers.MobileNetV2ForImageClassification(config)


def vit(small):
    size, heads, layers = (4, 2, 1) if small else (32, 4, 2)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * size,
            image_size=16, patch_size=8, num_labels=3,
        )
    )  # fmt: skip


def convnext(small):
    sizes = [2, 2, 3, 3] if small else [8, 8, 16, 16]
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_scale_init_value=1.0, num_labels=3)
    )


def bert(small):
    size, layers = (4, 1) if small else (32, 2)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=size, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=2 * size, max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


MODELS = {
    "resnet": (resnet, (3, 32, 32), (3, 8, 8)),
    "mobilenet_v2": (mobilenet, (3, 32, 32), (3, 8, 8)),
    "vit": (vit, (3, 16, 16), (3, 16, 16)),
    "convnext": (convnext, (3, 32, 32), (3, 32, 32)),
    "bert": (bert, (9,), (3,)),
}


def make(name, small=False):
    """A model in eval mode whose layers all matter, and a batch as its keywords."""
    build, *shapes = MODELS[name]
    torch.manual_seed(0)
    model = build(small).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
    shape = (1 if small else 2, *shapes[small])
    if name == "bert":
        return model, {"input_ids": torch.randint(0, 50, shape)}
    return model, {"pixel_values": torch.randn(shape)}


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model, the same one converted with the exact multiplier and calibrated, and a batch."""
    model, batch = make(request.param)
    return model, approxconv.calibrate(approxconv.approximate(model, Multiplier.exact()), [batch]), batch


def test_every_layer_is_converted(pair):
    model, approx, _ = pair
    stock = [name for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    attention = [f"{name}.approx_attention.{product}" for name in attention_modules(model) for product in ("qk", "av")]
    assert set(approx_layers(approx)) == {*stock, *attention}
    assert len(attention) == {"bert": 4, "vit": 4}.get(model.config.model_type, 0)
    assert all(layer.calibrated for layer in approx_layers(approx).values())


def test_exact_products_are_those_of_quantized_mode(pair):
    model, approx, batch = pair
    quantized = logits(approxconv.set_mode(approx, "quantized"), batch)
    assert torch.equal(logits(approxconv.set_mode(approx, "approximate"), batch), quantized)
    expected = logits(model, batch)
    assert 0 < (quantized - expected).norm() < 0.2 * expected.norm()


def fake_quantized(layer, x, other=None):
    """The layer's output as torch's fake quantisation has it, in double precision."""
    operands = layer.activation_scale, layer.activation_zero_point
    x = torch.fake_quantize_per_tensor_affine(x, *operands, layer.activation_format.low, layer.activation_format.high)
    if other is not None:
        operands = layer.weight_scale, layer.weight_zero_point
        limits = layer.weight_format.low, layer.weight_format.high
        return (x.double() @ torch.fake_quantize_per_tensor_affine(other, *operands, *limits).double()).float()
    twin = copy.deepcopy(layer).to_float().double()
    twin.weight.data = torch.fake_quantize_per_channel_affine(
        layer.weight, layer.weight_scale, layer.weight_zero_point, 0, layer.weight_format.low, layer.weight_format.high
    ).double()
    return twin(x.double()).float()


def test_each_layer_is_its_fake_quantized_twin(pair):
    _, approx, batch = pair
    seen = {}
    handles = [
        layer.register_forward_hook(lambda layer, args, output: seen.__setitem__(layer, (args, output)))
        for layer in approx_layers(approx).values()
    ]
    logits(approxconv.set_mode(approx, "approximate"), batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    for layer, (args, output) in seen.items():
        expected = fake_quantized(layer, *args)
        assert (output - expected).norm() <= 1e-4 * expected.norm()


def test_back_to_float(pair):
    model, approx, batch = pair
    stock = approxconv.to_float(approx)
    assert [type(module) for module in stock.modules()] == [type(module) for module in model.modules()]
    assert stock.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(stock, batch), logits(model, batch))
    assert isinstance(next(iter(approx_layers(approx).values())), ApproxLayer)


def test_folded_batch_normalisation(pair):
    model, _, batch = pair
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    folded = approxconv.approximate(model, Multiplier.exact(), fold_batchnorm=batch)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert sum(isinstance(module, FoldedBatchNorm) for module in folded.modules()) == len(norms)
    expected = logits(model, batch)
    torch.testing.assert_close(logits(approxconv.set_mode(folded, "float"), batch), expected, rtol=1e-4, atol=1e-5)
    quantized = logits(approxconv.set_mode(approxconv.calibrate(folded, [batch]), "quantized"), batch)
    assert 0 < (quantized - expected).norm() < 0.2 * expected.norm()


def test_copies_and_checkpoints(pair):
    model, approx, batch = pair
    expected = logits(approxconv.set_mode(approx, "approximate"), batch)
    assert torch.equal(logits(copy.deepcopy(approx), batch), expected)
    fresh = approxconv.approximate(model, Multiplier.exact())
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(approx.state_dict())
    assert torch.equal(logits(fresh, batch), expected)


def test_converted_again(pair):
    model, approx, batch = pair
    again = approxconv.approximate(approx, Multiplier.exact())
    assert torch.equal(logits(again, batch), logits(approx, batch))
    coarse = Quantization(activation=OperandQuantization(bits=5))
    again, fresh = (
        approxconv.calibrate(approxconv.approximate(source, "drum6_8u_8s", quantization=coarse), [batch])
        for source in (again, model)
    )
    assert str(again) == str(fresh)
    assert torch.equal(logits(again, batch), logits(fresh, batch))
    assert torch.equal(logits(approxconv.to_float(again), batch), logits(model, batch))


def test_attention_can_be_skipped(pair):
    model, _, batch = pair
    approx = approxconv.approximate(model, "drum6_8u_8s", skip=lambda name, _: name in attention_modules(model))
    stock = [name for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert list(approx_layers(approx)) == stock
    approxconv.calibrate(approx, [batch])
    assert logits(approx, batch).isfinite().all()


# A slow oracle


def codes(real, operand, scale, zero_point):
    return (real.detach() * scale.reciprocal()).round().add(zero_point).clamp(operand.low, operand.high).long()


def oracle(layer, x, other=None):
    """Quantise, then for every output one product after the other in Python integers; rescale."""
    zx = int(layer.activation_zero_point)
    xq = codes(x, layer.activation_format, layer.activation_scale, zx)
    weight = layer.weight if other is None else other.mT
    column = (-1, *[1] * (weight.ndim - 1)) if other is None else ()
    scale, zero = layer.weight_scale.view(column), layer.weight_zero_point.view(column)
    wq = codes(weight, layer.weight_format, scale, zero)
    table = layer.multiplier.table.tolist()
    masks = [side - 1 for side in layer.table.shape]

    def products(inputs, filters, zw):
        return sum(
            table[a & masks[0]][w & masks[1]] - zx * w - zw * a + zx * zw for a, w in zip(inputs, filters, strict=True)
        )

    zw = zero.flatten().tolist()
    if other is not None:
        pairs = zip(xq.flatten(0, -3).tolist(), wq.flatten(0, -3).tolist(), strict=True)
        sums = [[[products(row, other, zw[0]) for other in lanes] for row in rows] for rows, lanes in pairs]
        return torch.tensor(sums).view(*x.shape[:-1], -1).float() * (layer.activation_scale * layer.weight_scale)
    if not isinstance(layer, ApproxConv2d):
        rows, filters = xq.flatten(0, -2).tolist(), list(zip(wq.tolist(), zw, strict=True))
        sums = torch.tensor([[products(row, *lane) for lane in filters] for row in rows]).view(*x.shape[:-1], -1)
        column = (-1,)
    else:
        (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
        xq = F.pad(xq, (pw, pw, ph, ph), value=zx)
        kh, kw = layer.kernel_size
        height = (xq.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (xq.shape[3] - dw * (kw - 1) - 1) // sw + 1
        sums = torch.empty(len(x), layer.out_channels, height, width, dtype=torch.long)
        channels = layer.in_channels // layer.groups
        for b, o, i, j in itertools.product(*map(range, sums.shape)):
            first = o // (layer.out_channels // layer.groups) * channels
            window = xq[b, first : first + channels, i * sh :, j * sw :]
            window = window[:, : dh * (kh - 1) + 1 : dh, : dw * (kw - 1) + 1 : dw]
            sums[b, o, i, j] = products(window.flatten().tolist(), wq[o].flatten().tolist(), zw[o])
        column = (-1, 1, 1)
    output = sums.float() * (layer.activation_scale * layer.weight_scale).view(column)
    return output if layer.bias is None else output + layer.bias.detach().view(column)


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_table_is_what_an_oracle_in_python_says(name, hostile):
    model, batch = make(name, small=True)
    approx = approxconv.approximate(model, hostile(largest=3000), first_last="approximate")
    approxconv.calibrate(approx, [batch])
    output = logits(approx, batch)
    assert not torch.equal(output, logits(approxconv.set_mode(approx, "quantized"), batch))
    slow = copy.deepcopy(approxconv.set_mode(approx, "approximate"))
    for layer in approx_layers(slow).values():
        layer.forward = partial(oracle, layer)
    assert torch.equal(logits(slow, batch), output)
