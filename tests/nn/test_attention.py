"""Attention against torch's and transformers' own, its fake-quantised twin, and a composition of oracles."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import approxconv
from approxconv import Multiplier
from approxconv.nn import (
    ApproxAttention,
    ApproxLinear,
    ApproxMultiheadAttention,
    Attention,
    approximate_attention,
    attention_modules,
    restore_attention,
)
from approxconv.nn.attention import attention
from approxconv.quantization import OperandQuantization, Quantization

BATCH, LENGTH, SOURCE, EMBED, HEADS = 3, 4, 5, 6, 2
# name: arguments of MultiheadAttention
MODULES = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no_bias": dict(bias=False, batch_first=True),
    "kdim": dict(kdim=7),
    "kdim_vdim": dict(kdim=7, vdim=9, batch_first=True),
    "no_bias_vdim": dict(bias=False, vdim=9),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True, batch_first=True),
    "everything": dict(add_bias_kv=True, add_zero_attn=True, kdim=5, vdim=3, batch_first=True),
}
every_module = pytest.mark.parametrize("name", MODULES)


def masks(kind, heads=HEADS, batch=BATCH, boolean=True):
    """Arguments of forward: a mask that hides different keys from every query, or from every head, or none."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "none": {},
        "attn": {"attn_mask": (LENGTH, SOURCE)},
        "attn_heads": {"attn_mask": (batch * heads, LENGTH, SOURCE)},
        "padding": {"key_padding_mask": (batch, SOURCE)},
        "both": {"attn_mask": (batch * heads, LENGTH, SOURCE), "key_padding_mask": (batch, SOURCE)},
    }
    found = {}
    for name, shape in shapes[kind].items():
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[..., 0] = False
        found[name] = mask if boolean else torch.randn(shape, generator=generator).masked_fill(mask, -math.inf)
    return found


def make(name, seed=0):
    """A stock module with weights and biases unlike each other, and query, key and value as it takes them."""
    torch.manual_seed(seed)
    stock = nn.MultiheadAttention(EMBED, HEADS, **MODULES[name])
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    sizes = ((LENGTH, EMBED), (SOURCE, stock.kdim), (SOURCE, stock.vdim))
    inputs = [torch.randn(BATCH, length, size) + 0.3 for length, size in sizes]
    return stock, inputs if stock.batch_first else [x.transpose(0, 1).contiguous() for x in inputs]


def convert(stock, multiplier, inputs, mode="approximate", **masked):
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), multiplier, mode=mode)
    batch = dict(zip(("query", "key", "value"), inputs, strict=True)) | masked
    return approxconv.calibrate(layer, [batch]).eval()


def assert_close(got, expected, rtol=1e-5):
    if expected is None:
        assert got is None
        return
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=rtol, atol=rtol * expected.abs().max().item())


# Multi-head attention


@every_module
@pytest.mark.parametrize("kind", ["none", "attn", "attn_heads", "padding", "both"])
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "float"])
def test_float_mode_is_torch(name, kind, boolean, hostile):
    stock, inputs = make(name)
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    masked = masks(kind, boolean=boolean)
    for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        got, expected = layer(*inputs, **masked, **options), stock(*inputs, **masked, **options)
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_unbatched(name, hostile):
    stock, inputs = make(name)
    inputs = [x[0] if stock.batch_first else x[:, 0].contiguous() for x in inputs]
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    for kind, options in itertools.product(
        ["none", "attn_heads", "padding", "both"], [{}, {"average_attn_weights": False}, {"need_weights": False}]
    ):
        masked = masks(kind, batch=1)
        if "key_padding_mask" in masked:
            masked["key_padding_mask"] = masked["key_padding_mask"][0]
        got, expected = layer(*inputs, **masked, **options), stock(*inputs, **masked, **options)
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])


def test_causal_hint(hostile):
    stock, (query, *_) = make("batch_first")
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for options in ({}, {"need_weights": False}):
        got = layer(query, query, query, attn_mask=mask, is_causal=True, **options)
        assert_close(got[0], stock(query, query, query, attn_mask=mask, is_causal=True, **options)[0])
    with pytest.raises(ValueError, match="attn_mask"):
        layer(query, query, query, is_causal=True)


def test_a_query_without_keys_gets_zeros_and_a_finite_gradient(hostile):
    stock, inputs = make("no_bias")
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    mask = torch.zeros(LENGTH, SOURCE, dtype=torch.bool)
    mask[1] = True
    for operand in inputs:
        operand.requires_grad_()
    output, weights = layer(*inputs, attn_mask=mask)
    assert_close(output, stock(*inputs, attn_mask=mask, need_weights=False)[0])
    assert torch.equal(weights[:, 1], torch.zeros(BATCH, SOURCE))
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.isfinite().all()


def test_dropout_drops_weights_in_training_only(hostile):
    stock, inputs = make("batch_first")
    stock.dropout = 0.5
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    weights = layer(*inputs, average_attn_weights=False)[1]
    assert (weights == 0).any()
    assert_close(weights[weights != 0], 2 * layer.eval()(*inputs, average_attn_weights=False)[1][weights != 0])


def faked(layer, x, multiplier):
    """An operand as the layer's activation quantiser leaves it."""
    return torch.fake_quantize_per_tensor_affine(
        x, layer.activation_scale, layer.activation_zero_point, *multiplier.a_range
    )


def twin_linear(layer, x, multiplier):
    w = torch.fake_quantize_per_channel_affine(
        layer.weight, layer.weight_scale, layer.weight_zero_point, 0, *multiplier.w_range
    )
    return nn.functional.linear(faked(layer, x, multiplier), w, layer.bias)


def twin_matmul(layer, a, b, multiplier):
    b = torch.fake_quantize_per_tensor_affine(b, layer.weight_scale, layer.weight_zero_point, *multiplier.w_range)
    return faked(layer, a, multiplier) @ b


def slow_linear(layer, x, multiplier):
    """Gather and add in int64."""
    sx, zx = layer.activation_scale, int(layer.activation_zero_point)
    sw, zw = layer.weight_scale[:, None], layer.weight_zero_point.long()[:, None]
    xq = ((x / sx).round() + zx).clamp(*multiplier.a_range).long().unsqueeze(-2)
    wq = ((layer.weight.detach() / sw).round() + zw).clamp(*multiplier.w_range).long()
    products = multiplier.table.long()[xq % 2**multiplier.a_bits, wq % 2**multiplier.w_bits]
    y = (products - zx * wq - zw * xq + zx * zw).sum(-1) * (sx * layer.weight_scale)
    return y if layer.bias is None else y + layer.bias


def slow_matmul(layer, a, b, multiplier):
    sa, za = layer.activation_scale, int(layer.activation_zero_point)
    sb, zb = layer.weight_scale, int(layer.weight_zero_point)
    aq = ((a / sa).round() + za).clamp(*multiplier.a_range).long().unsqueeze(-1)
    bq = ((b / sb).round() + zb).clamp(*multiplier.w_range).long().unsqueeze(-3)
    products = multiplier.table.long()[aq % 2**multiplier.a_bits, bq % 2**multiplier.w_bits]
    return (products - za * bq - zb * aq + za * zb).sum(-2) * (sa * sb)


def compose(layer, inputs, multiplier, linear, matmul, mask):
    """The module out of `linear` and `matmul`, batch first, without keys of its own."""
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (
        linear(projection, x, multiplier).view(BATCH, -1, HEADS, EMBED // HEADS).transpose(1, 2)
        for projection, x in zip(projections, inputs, strict=True)
    )
    scores = matmul(layer.attention.qk, q, k.mT, multiplier) / math.sqrt(EMBED // HEADS)
    weights = scores.masked_fill(mask.view(BATCH, HEADS, LENGTH, SOURCE), -math.inf).softmax(-1)
    output = matmul(layer.attention.av, weights, v, multiplier).transpose(1, 2).reshape(BATCH, LENGTH, EMBED)
    return linear(layer.out_proj, output, multiplier)


@pytest.mark.parametrize("name", ["batch_first", "no_bias", "kdim_vdim"])
@pytest.mark.parametrize(
    ("a_signed", "w_signed"), list(itertools.product([False, True], repeat=2)), ids=["u×u", "u×s", "s×u", "s×s"]
)
def test_quantised_module_is_its_fake_quantised_twin(name, a_signed, w_signed):
    multiplier = Multiplier.exact(8, a_signed, w_signed)
    stock, inputs = make(name)
    masked = masks("attn_heads")
    layer = convert(stock, multiplier, inputs, mode="quantized", **masked)
    with torch.no_grad():
        got = layer(*inputs, **masked)[0]
        expected = compose(layer, inputs, multiplier, twin_linear, twin_matmul, masked["attn_mask"])
        # A value may fall to the other side of a rounding border in one of the two.
        assert ((got - expected).abs() <= 1e-4 * expected.abs().max()).float().mean() > 0.8
        assert_close(got, expected, rtol=0.02)
        layer.mode = "approximate"
        assert torch.equal(layer(*inputs, **masked)[0], got)


@pytest.mark.parametrize("name", ["batch_first", "kdim_vdim"])
def test_approximate_module_is_the_composed_oracle(name):
    # Wrong by up to 40, another error for every pair.
    noise = torch.randint(-40, 41, (256, 256), generator=torch.Generator().manual_seed(6))
    multiplier = Multiplier(Multiplier.exact(8, False, True).table + noise, a_signed=False, w_signed=True, name="noisy")
    stock, inputs = make(name)
    masked = masks("attn_heads")
    layer = convert(stock, multiplier, inputs, **masked)
    with torch.no_grad():
        got = layer(*inputs, **masked)[0]
        expected = compose(layer, inputs, multiplier, slow_linear, slow_matmul, masked["attn_mask"])
        assert ((got - expected).abs() <= 1e-4 * expected.abs().max()).float().mean() > 0.8
        assert_close(got, expected, rtol=0.05)


def gradients(module, output, inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    operands = {**dict(zip(("query", "key", "value"), inputs, strict=True)), **dict(module.named_parameters())}
    return dict(zip(operands, torch.autograd.grad((output * weights).sum(), operands.values()), strict=True))


@every_module
def test_float_gradient_is_torchs(name, hostile):
    stock, inputs = make(name)
    for x in inputs:
        x.requires_grad_()
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile(), mode="float")
    got, expected = (gradients(module, module(*inputs)[0], inputs) for module in (layer, stock))
    for operand, gradient in expected.items():
        torch.testing.assert_close(got[operand], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["batch_first", "no_bias", "kdim_vdim"])
def test_gradient_is_that_of_the_fake_quantised_twin(name):
    multiplier = Multiplier.exact(8, False, False)
    stock, inputs = make(name)
    masked = masks("attn_heads")
    layer = convert(stock, multiplier, inputs, **masked)
    for x in inputs:
        x.requires_grad_()
    got = gradients(layer, layer(*inputs, **masked)[0], inputs)
    twin = compose(layer, inputs, multiplier, twin_linear, twin_matmul, masked["attn_mask"])
    for operand, gradient in gradients(layer, twin, inputs).items():
        # A value may fall to the other side of a rounding border; adding to all keys alike changes nothing.
        assert (got[operand] - gradient).norm() <= 0.01 * gradient.norm() + 1e-3


@every_module
def test_state_and_names(name, hostile):
    stock, inputs = make(name)
    layer = convert(stock, hostile(), inputs)
    assert dict(layer.named_parameters()).keys() == dict(stock.named_parameters()).keys()
    other = ApproxMultiheadAttention(EMBED, HEADS, **MODULES[name], multiplier=hostile(seed=1)).eval()
    missing, unexpected = other.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(stock.state_dict())
    other.load_state_dict(layer.state_dict())
    expected = layer(*inputs)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(*inputs)[0], expected[0])
        with torch.no_grad():
            copied.in_proj_bias.add_(1) if copied.in_proj_bias is not None else copied.out_proj.weight.add_(1)
        assert not torch.equal(copied(*inputs)[0], expected[0])
    assert torch.equal(layer(*inputs)[0], expected[0])


def test_from_float_shares_parameters_and_leaves_the_stock_module_alone(hostile):
    stock, inputs = make("batch_first")
    stock.eval()
    expected = stock(*inputs)[0]
    layer = ApproxMultiheadAttention.from_float(stock, hostile(), mode="float", engine="reference")
    assert not layer.training
    assert layer.in_proj_weight is stock.in_proj_weight
    assert layer.out_proj.weight is stock.out_proj.weight
    assert torch.equal(stock(*inputs)[0], expected)
    assert layer.extra_repr() == "multiplier=hostile0, mode=float, engine=reference"
    assert isinstance(layer.out_proj, ApproxLinear)
    names = {"q_proj", "k_proj", "v_proj", "out_proj", "attention.qk", "attention.av"}
    assert approxconv.nn.approx_layers(layer).keys() == names
    assert layer.mode == "float"
    layer.out_proj.mode = "quantized"
    assert layer.mode == "mixed"
    layer.mode, layer.engine = "approximate", "auto"
    assert {(inner.mode, inner.engine) for inner in layer.products().values()} == {("approximate", "auto")}
    with pytest.raises(ValueError, match="mode"):
        layer.mode = "fast"


@every_module
def test_to_float_gives_torchs_module_back(name, hostile):
    stock, inputs = make(name)
    calls = []
    stock.register_forward_hook(lambda *_: calls.append(1))
    layer = ApproxMultiheadAttention.from_float(copy.deepcopy(stock), hostile())
    back = layer.to_float()
    assert type(back) is nn.MultiheadAttention
    assert type(back.out_proj) is type(stock.out_proj)
    assert vars(back).keys() == vars(stock).keys()
    assert back.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(back(*inputs)[0], stock(*inputs)[0])
    assert calls == [1, 1]
    again = ApproxMultiheadAttention.from_float(back, hostile())
    assert again.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("quantization", ["lsq", "moving", "bias"])
def test_quantization_and_gradient_reach_every_product(quantization, truncated):
    quantization = {
        "lsq": Quantization(activation=OperandQuantization(range="lsq"), weight=OperandQuantization(range="lsq")),
        "moving": Quantization(freeze=False),
        "bias": Quantization(bias_bits=32),
    }[quantization]
    stock, inputs = make("plain")
    layer = ApproxMultiheadAttention.from_float(stock, truncated, quantization=quantization, gradient="lre")
    approxconv.calibrate(layer, [dict(zip(("query", "key", "value"), inputs, strict=True))])
    for product in layer.products().values():
        assert product.quantization == quantization
        assert product.gradient == "lre"
    layer.train()(*inputs)[0].square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.count_nonzero() > 0


@pytest.mark.slow
def test_traced(hostile):
    stock, inputs = make("everything")
    layer = convert(stock, hostile(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        output = run(*inputs)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    exported = torch.export.export(layer, tuple(inputs)).module()
    assert torch.equal(exported(*inputs)[0], layer(*inputs)[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_encoder_layer_does_not_bypass_it(norm_first, hostile):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(EMBED, HEADS, 8, norm_first=norm_first, batch_first=True, dropout=0).eval()
    x = torch.randn(BATCH, LENGTH, EMBED)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -1] = True
    expected = encoder(x, src_key_padding_mask=padding)
    encoder.self_attn = ApproxMultiheadAttention.from_float(encoder.self_attn, hostile(), mode="float")
    calls = []
    encoder.self_attn.attention.qk.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert_close(encoder(x, src_key_padding_mask=padding), expected)
        assert len(calls) == 1
        approxconv.calibrate(encoder, [x])
        encoder.self_attn.mode = "approximate"
        assert not torch.allclose(encoder(x), expected, atol=0.01)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(hostile):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 8, batch_first=True, dropout=0)
    layer.self_attn = ApproxMultiheadAttention.from_float(layer.self_attn, hostile(), mode="float")
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.randn(1, LENGTH, EMBED), torch.tensor([[False] * (LENGTH - 1) + [True]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="use_nested_tensor = False"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        output = encoder(x, src_key_padding_mask=padding)
    assert_close(output, encoder.train()(x, src_key_padding_mask=padding))


def test_bad_shapes(hostile):
    stock, (query, key, value) = make("kdim_vdim")
    layer = ApproxMultiheadAttention.from_float(stock, hostile(), mode="float")
    for arguments, name in (
        ((query[..., :-1], key, value), "query"),
        ((query, key[..., :-1], value), "key"),
        ((query, key, value[0]), "value"),
        ((query, key[:, :-1], value), "key and value"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            layer(*arguments)
    with pytest.raises(ValueError, match=r"^attn_mask must"):
        layer(query, key, value, attn_mask=torch.zeros(SOURCE, LENGTH))
    with pytest.raises(ValueError, match=r"^key_padding_mask must"):
        layer(query, key, value, key_padding_mask=torch.zeros(BATCH, LENGTH))


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_size_0(batch, length, hostile):
    stock, inputs = make("batch_first")
    layer = convert(stock, hostile(), inputs)
    query, key = torch.rand(batch, length, EMBED), torch.rand(batch, SOURCE, EMBED)
    output, weights = layer(query, key, key)
    assert output.shape == (batch, length, EMBED)
    assert weights.shape == (batch, length, SOURCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype, hostile):
    stock, inputs = make("everything")
    layer = convert(stock, Multiplier.exact(8, False, True), inputs)
    expected = layer(*inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(layer(*inputs)[0].float(), expected, rtol=0.05)
    output = layer.to(dtype)(*(x.to(dtype) for x in inputs))[0]
    assert output.dtype == dtype
    assert_close(output.float(), expected, rtol=0.1)


# The function


def test_attention_is_torchs():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 7)
    boolean = torch.rand(2, 1, 3, 6) < 0.7
    boolean[0, 0, 1] = False
    for mask in (None, boolean, torch.randn(3, 6)):
        for scale in (None, 0.3):
            expected = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
            )
            output, weights = attention(query, key, value, mask, scale=scale)
            assert_close(output, expected)
            assert weights.shape == (2, 4, 3, 6)
            assert torch.equal(weights[0, :, 1], torch.zeros(4, 6)) or mask is not boolean
            module = ApproxAttention(multiplier=Multiplier.exact(), mode="float")
            for same in (module, module.to_float()):
                assert torch.equal(same(query, key, value, mask, scale=scale)[0], output)
            assert type(module.to_float()) is Attention


# Hugging Face


def hugging_face(name, implementation="eager"):
    """A small model with random weights, and what it takes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    small = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, attn_implementation="eager"
    )
    tokens = torch.randint(0, 30, (2, 7))
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[0, 5:] = 0
    if name == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=8, patch_size=4))
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    elif name == "bert":
        model = transformers.BertModel(transformers.BertConfig(**small, vocab_size=30, max_position_embeddings=9))
        inputs = {"input_ids": tokens, "attention_mask": padded}
    elif name == "llama":  # causal, grouped queries
        config = transformers.LlamaConfig(**small, vocab_size=30, num_key_value_heads=2)
        model, inputs = transformers.LlamaModel(config), {"input_ids": tokens, "attention_mask": padded}
    elif name == "gemma2":  # capped scores, a sliding window
        config = transformers.Gemma2Config(
            **small, vocab_size=30, num_key_value_heads=2, head_dim=4, sliding_window=3, attn_logit_softcapping=0.5
        )
        model, inputs = transformers.Gemma2Model(config), {"input_ids": tokens, "attention_mask": padded}
    else:  # encoder and decoder, relative positions
        config = transformers.T5Config(
            d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=30, attn_implementation="eager"
        )
        model = transformers.T5Model(config)
        inputs = {"input_ids": tokens, "attention_mask": padded, "decoder_input_ids": tokens[:, :5]}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that scores differ
    if name != "gemma2":  # which knows no other
        model.set_attn_implementation(implementation)
    return model.eval(), inputs


every_model = pytest.mark.parametrize("name", ["vit", "bert", "llama", "gemma2", "t5"])


@every_model
def test_float_mode_is_eager_attention(name, hostile):
    model, inputs = hugging_face(name)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        modules = attention_modules(model)
        added = approximate_attention(model, hostile(), mode="float")
        assert added.keys() == modules.keys()
        calls = []
        for child in added.values():
            child.av.register_forward_hook(lambda *_: calls.append(1))
        assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-6)
        assert len(calls) == len(added) > 1
        restore_attention(model)
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert not any("approx" in key for key in model.state_dict())


@every_model
def test_exact_multiplier_is_quantized_mode(name):
    model, inputs = hugging_face(name, "sdpa")
    expected = model(**inputs).last_hidden_state
    approximate_attention(model, Multiplier.exact(8, False, True))
    approxconv.calibrate(model, [inputs])
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
        assert torch.equal(approxconv.set_mode(model, "quantized")(**inputs).last_hidden_state, output)
        assert (output - expected).norm() < 0.1 * expected.norm()
        assert not torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
    configs = [module.config for module in attention_modules(model).values()]
    assert {config._attn_implementation for config in configs} == {"approxconv"}
    restore_attention(model)
    assert {config._attn_implementation for config in configs} == {"eager" if name == "gemma2" else "sdpa"}


def test_chosen_attention_modules(hostile):
    model, inputs = hugging_face("bert")
    first, second = attention_modules(model)
    with pytest.raises(ValueError, match="'elsewhere'"):
        approximate_attention(model, {first: hostile(), "elsewhere": hostile()})
    assert attention_modules(model)[first].config._attn_implementation == "eager"
    assert approximate_attention(model, {first: hostile()}, mode="float").keys() == {first}
    model(**inputs)  # the second one in floating point
    added = approximate_attention(model, {first: hostile(), second: hostile(seed=1)})
    assert added.keys() == {second}
    assert added[second].qk.multiplier_name == "hostile1"
    restore_attention(model)
    assert model.config._attn_implementation == "eager"


def test_copies_of_a_converted_model(hostile):
    model, inputs = hugging_face("bert")
    approximate_attention(model, hostile())
    approxconv.calibrate(model, [inputs])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
            from transformers import AttentionInterface

            del AttentionInterface._global_mapping["approxconv"]  # as in another process
            assert torch.equal(duplicate(model)(**inputs).last_hidden_state, expected)


def test_hugging_face_training(hostile):
    model, inputs = hugging_face("vit")
    approximate_attention(model, Multiplier.exact(8, False, True))
    approxconv.calibrate(model, [inputs])
    model.train()
    model(**inputs).last_hidden_state.square().mean().backward()
    for module in attention_modules(model).values():
        for parameter in module.parameters():
            assert parameter.grad.count_nonzero() > 0
            assert parameter.grad.isfinite().all()


@pytest.mark.slow
def test_hugging_face_traced(hostile):
    model, inputs = hugging_face("bert")
    approximate_attention(model, hostile())
    approxconv.calibrate(model, [inputs])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_models_without_attention_are_left_alone(hostile):
    model = nn.Sequential(nn.Linear(2, 2))
    assert approximate_attention(model, hostile()) == {}
    restore_attention(model)
    assert ApproxAttention(multiplier=hostile()).extra_repr().startswith("multiplier=hostile0")
