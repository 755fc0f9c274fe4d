"""Conversion, calibration and modes of whole models."""

import copy
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import approxconv
from approxconv import Multiplier
from approxconv.nn import ApproxAttention, ApproxConv2d, ApproxLayer, ApproxLinear, Attention, Matmul, approx_layers
from approxconv.quantization import OperandQuantization, Quantization


class Separable(nn.Module):
    def __init__(self, channels, filters):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, filters, 1)

    def forward(self, x):
        return F.relu(self.pointwise(F.relu(self.norm(self.depthwise(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 4, 3, stride=2, padding=1), norm=nn.BatchNorm2d(4), act=nn.ReLU())
        )
        self.blocks = nn.ModuleList([Separable(4, 6), Separable(6, 8)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x.mean((2, 3))))


LAYERS = [
    "stem.conv",
    "blocks.0.depthwise",
    "blocks.0.pointwise",
    "blocks.1.depthwise",
    "blocks.1.pointwise",
    "head",
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images():
    return torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact():
    return Multiplier.exact()


def names_converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, ApproxLayer)]


def fingerprint(model):
    return {name: (id(module), type(module), module.training) for name, module in model.named_modules()}


# Conversion


def test_every_convolution_and_linear_is_replaced(net, exact):
    model = approxconv.approximate(net, exact)
    assert names_converted(model) == LAYERS
    assert isinstance(model, Net)
    assert type(model.head) is ApproxLinear
    assert type(model.stem.conv) is ApproxConv2d
    assert [name for name, _ in model.named_modules() if "observer" not in name] == [n for n, _ in net.named_modules()]
    for name, layer in approx_layers(model).items():
        stock = net.get_submodule(name)
        assert stock.extra_repr() in layer.extra_repr()
        assert (layer.mode, layer.engine) == ("approximate", "auto")
        assert layer.multiplier == exact
        assert not layer.calibrated
    assert set(net.state_dict()) <= set(model.state_dict())


def test_arguments_reach_the_layers(net, hostile):
    model = approxconv.approximate(net, hostile(4), mode="quantized", engine="reference")
    for layer in approx_layers(model).values():
        assert (layer.mode, layer.engine) == ("quantized", "reference")
        assert layer.table.shape == (16, 16)


@pytest.mark.parametrize("stock", [nn.Conv2d(2, 3, 3, padding="same"), nn.Linear(4, 2, bias=False)], ids=["conv", "fc"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_root_itself(stock, inplace, exact):
    layer = approxconv.approximate(stock, exact, mode="float", inplace=inplace)
    assert isinstance(layer, ApproxLayer)
    assert isinstance(layer, type(stock))
    assert (layer.weight is stock.weight) == inplace
    x = torch.rand(1, 2, 5, 5) if isinstance(stock, nn.Conv2d) else torch.rand(3, 4)
    assert torch.equal(layer(x), stock(x))
    approxconv.calibrate(layer, [x])
    assert layer.calibrated


def test_the_copy_shares_nothing_with_the_original(net, images, exact):
    before, state = fingerprint(net), copy.deepcopy(net.state_dict())
    model = approxconv.approximate(net, exact, mode="float")
    assert fingerprint(net) == before
    storages = {t.data_ptr() for t in net.state_dict().values()}
    assert not storages & {t.data_ptr() for t in model.state_dict().values()}
    approxconv.set_mode(approxconv.calibrate(model, [images]), "approximate")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_inplace_keeps_model_and_parameters(net, exact):
    parameters = dict(net.named_parameters())
    model = approxconv.approximate(net, exact, inplace=True)
    assert model is net
    assert names_converted(net) == LAYERS
    now = dict(net.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameter for name, parameter in parameters.items())


def test_frozen_parameters_stay_frozen(net, exact):
    net.stem.conv.weight.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    model = approxconv.approximate(net, exact)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.conv.weight", "head.bias"}


def test_training_flags_are_kept(net, exact):
    net.eval()
    net.blocks[0].train()
    net.blocks[0].norm.eval()
    model = approxconv.approximate(net, exact)
    for name, module in net.named_modules():
        assert model.get_submodule(name).training == module.training, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(net, images, dtype, exact):
    model = approxconv.approximate(net.to(dtype), exact, mode="float")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.eval()(images.to(dtype)).dtype == dtype
    assert {layer.table.dtype for layer in approx_layers(model).values()} == {torch.int32}


def test_device_is_kept(exact):
    with torch.device("meta"):
        stock = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 2))
    model = approxconv.approximate(stock, exact)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    cpu = approxconv.approximate(nn.Linear(2, 2), exact)
    assert {t.device.type for t in [*cpu.parameters(), *cpu.buffers()]} == {"cpu"}


class Own(nn.Linear):
    pass


class OwnAttention(nn.MultiheadAttention):
    pass


def test_subclasses_are_left_alone(exact):
    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), OwnAttention(8, 2), nn.Bilinear(2, 2, 2))
    before = fingerprint(model)
    converted = approxconv.approximate(model, exact)
    assert names_converted(converted) == ["0"]
    assert fingerprint(model) == before
    assert type(converted[1]) is Own
    assert type(converted[2].out_proj) is type(model[2].out_proj)
    query = torch.rand(3, 1, 8)
    assert torch.equal(converted[2](query, query, query)[0], model[2](query, query, query)[0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.a, self.b = nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared)
        self.own = nn.Linear(4, 4)

    def forward(self, x):
        return self.own(self.b(self.a(x)))


def test_a_layer_shared_between_modules_stays_shared(exact):
    model = approxconv.approximate(Twice(), exact)
    assert model.a[0] is model.b[0]
    assert isinstance(model.a[0], ApproxLinear)
    assert len(approx_layers(model)) == 2


def test_a_layer_used_twice_in_one_module_stays_shared(exact):
    shared = nn.Linear(4, 4)
    model = approxconv.approximate(nn.Sequential(shared, nn.ReLU(), shared), exact)
    assert isinstance(model[0], ApproxLinear)
    assert model[2] is model[0]


def test_a_module_shared_between_modules_stays_shared(exact):
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = approxconv.approximate(nn.Sequential(block, nn.Sequential(block), block), exact)
    assert model[0] is model[1][0] is model[2]
    assert isinstance(model[0][0], ApproxLinear)


def test_tied_parameters_stay_tied(exact):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    converted = approxconv.approximate(model, exact)
    assert converted[2].weight is converted[0].weight is not model[0].weight


def test_tied_weights_calibrate_and_train(exact):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.rand(3, 4)
    model = approxconv.calibrate(approxconv.approximate(model, exact), [x])
    model(x).sum().backward()
    assert model[0].weight.grad is model[2].weight.grad is not None


HOOKS = {
    "register_forward_pre_hook": {},
    "register_forward_hook": {"always_call": True},
    "register_full_backward_pre_hook": {},
    "register_full_backward_hook": {},
    "register_state_dict_pre_hook": {},
    "register_load_state_dict_pre_hook": {},
    "register_load_state_dict_post_hook": {},
}


def run_every_hook(layer, x):
    layer(x.requires_grad_()).sum().backward()
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stock", [nn.Conv2d(3, 2, 1), nn.Linear(3, 2)], ids=["conv", "fc"])
def test_hooks_stay(stock, inplace, exact):
    model, seen = nn.Sequential(copy.deepcopy(stock)), []
    handles = [
        getattr(model[0], hook)(lambda module, *_, hook=hook: seen.append((hook, module)), **options)
        for hook, options in HOOKS.items()
    ]
    x = torch.rand(2, 3, 4, 4) if isinstance(stock, nn.Conv2d) else torch.rand(2, 3)
    converted = approxconv.calibrate(approxconv.approximate(model, exact, inplace=inplace), [x])
    seen.clear()
    run_every_hook(converted[0], x)
    assert [hook for hook, _ in seen] == list(HOOKS)
    assert all(module is converted[0] for _, module in seen)
    assert len(converted[0]._forward_pre_hooks) == 2  # and the layer's own
    if inplace:  # the handles are still those of the hooks
        for handle in handles:
            handle.remove()
        run_every_hook(converted[0], x)
        assert len(seen) == len(HOOKS)


def test_layers_made_of_one_stock_layer_share_no_hooks(exact):
    stock = nn.Linear(3, 2)
    first, second = (ApproxLinear.from_float(stock, exact, mode="float") for _ in range(2))
    seen = []
    first.register_forward_hook(lambda module, *_: seen.append(module))
    for layer in (second, stock, first):
        layer(torch.rand(1, 3))
    assert seen == [first]
    assert not stock._forward_pre_hooks


def test_conversion_draws_no_random_numbers(net, exact):
    state = torch.get_rng_state()
    approxconv.nn.convert._own_names.cache_clear()
    approxconv.approximate(net, exact)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_put_on_a_layer_stays(inplace, exact):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].note = {"from": "the user"}
    model[0].gain = nn.Parameter(torch.ones(2))
    model[0].register_buffer("count", torch.tensor(7), persistent=False)
    model[0].inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[0].direct = nn.Linear(2, 2)
    model[0].compile(backend="eager")
    state = set(model.state_dict())
    converted = approxconv.approximate(model, exact, inplace=inplace)
    assert names_converted(converted) == ["0", "0.inner.0", "0.direct", "1"]
    layer = converted[0]
    assert layer.note == {"from": "the user"}
    assert layer.count == 7
    assert state <= set(converted.state_dict())
    assert "0.count" not in converted.state_dict()
    assert "0.gain" in dict(converted.named_parameters())
    assert layer.training
    assert not layer.inner.training
    assert not any(module.training for module in layer.inner)
    with pytest.raises(RuntimeError, match="calibrate"):  # not the compiled stock layer
        layer(torch.rand(1, 3))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["forward", "mode", "multiplier", "table", "_lookup"])
def test_an_attribute_in_the_way_is_named(net, name, inplace, exact):
    setattr(net.head, name, net.head.forward)
    before = fingerprint(net)
    with pytest.raises(ValueError, match=f"'head'.*{name}"):
        approxconv.approximate(net, exact, inplace=inplace)
    assert fingerprint(net) == before
    assert not net.stem.conv._forward_pre_hooks
    assert names_converted(approxconv.approximate(net, exact, skip="head", inplace=inplace)) == LAYERS[:-1]


def parametrized_gain(layer):
    layer.gain = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(layer, "gain", nn.Softplus())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("derive", "remedy"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove\(layer, 'weight'\)"),
        (lambda layer: prune.random_unstructured(layer, "bias", 0.5), r"prune\.remove\(layer, 'bias'\)"),
        (nn.utils.spectral_norm, r"utils\.remove_spectral_norm\(layer\)"),
        (nn.utils.weight_norm, r"utils\.remove_weight_norm\(layer\)"),
        (parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
        (parametrizations.orthogonal, r"remove_parametrizations\(layer, 'weight'\)"),
        (parametrized_gain, r"remove_parametrizations\(layer, 'gain'\)"),
        (lambda layer: layer.__delattr__("weight"), "parameter"),
    ],
    ids=["pruned", "bias", "spectral_norm", "weight_norm", "parametrized", "orthogonal", "gain", "deleted"],
)
def test_a_derived_weight_is_named_with_its_remedy(net, derive, remedy, inplace, exact):
    derive(net.blocks[1].pointwise)
    before = fingerprint(net)
    with pytest.raises(ValueError, match=f"'blocks.1.pointwise'.*{remedy}"):
        approxconv.approximate(net, exact, inplace=inplace)
    assert fingerprint(net) == before
    assert not net.stem.conv._forward_pre_hooks
    model = approxconv.approximate(net, exact, skip="blocks.1.pointwise", inplace=True)
    assert names_converted(model) == [name for name in LAYERS if name != "blocks.1.pointwise"]


class Scaled(nn.Conv2d):
    pass


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize("skip", [("2",), (lambda name, layer: isinstance(layer, Transposed),)])
def test_layers_of_unknown_types_are_named(skip, exact):
    model = nn.Sequential(
        Scaled(1, 1, 1), nn.Linear(1, 1), Transposed(), nn.Embedding(3, 4), nn.MultiheadAttention(2, 1)
    )
    with pytest.warns(UserWarning, match=r"stay in float: 0 \(Scaled\), 2 \(Transposed\); skip="):
        approximate = approxconv.approximate(model, exact)
    assert [type(approximate[i]) for i in (0, 2)] == [Scaled, Transposed]
    modes = {row.name: row.mode for row in approxconv.model_summary(approximate)}
    assert modes["0"] == modes["2"] == "float"
    assert set(map(modes.get, set(modes) - {"0", "2"})) == {"approximate"}
    with pytest.warns(UserWarning, match=r"stay in float: 0 \(Scaled\); skip="):
        approxconv.approximate(model, exact, skip=skip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        approxconv.approximate(model, exact, skip=[*skip, "0"])


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        (["head"], {"head"}),
        ("head", {"head"}),
        (["blocks.*"], {n for n in LAYERS if n.startswith("blocks")}),
        (["*.depthwise", "stem.conv"], {"blocks.0.depthwise", "blocks.1.depthwise", "stem.conv"}),
        (["blocks.[1]*", "blocks.1.pointwise"], {"blocks.1.depthwise", "blocks.1.pointwise"}),
        (["*wise", "head", "stem*"], set(LAYERS)),
        ((name for name in ["head"]), {"head"}),
    ],
    ids=["none", "list", "name", "glob", "globs", "overlapping", "all", "generator"],
)
def test_skip(net, skip, left, exact):
    model = approxconv.approximate(net, exact, skip=skip)
    assert names_converted(model) == [name for name in LAYERS if name not in left]
    for name in left:
        assert type(model.get_submodule(name)) is type(net.get_submodule(name))


def test_per_layer_first_match_counts(net, exact, hostile):
    first, second, third = (hostile(seed=i) for i in range(3))
    per_layer = {"blocks.0.depthwise": first, "*.depthwise": second, "blocks.*": third}
    model = approxconv.approximate(net, exact, per_layer=per_layer)
    chosen = {name: layer.multiplier for name, layer in approx_layers(model).items()}
    assert chosen == dict(zip(LAYERS, [exact, first, third, second, third, exact], strict=True))
    model = approxconv.approximate(net, exact, per_layer=dict(reversed(per_layer.items())))
    chosen = {name: layer.multiplier for name, layer in approx_layers(model).items()}
    assert chosen == dict(zip(LAYERS, [exact, third, third, third, third, exact], strict=True))


def test_per_layer_takes_names_and_other_formats(net, images, exact, hostile):
    model = approxconv.approximate(net, exact, per_layer={"head": "drum6_8u", "stem.conv": hostile(4, True, True)})
    assert model.head.multiplier == approxconv.get_multiplier("drum6_8u")
    assert model.stem.conv.table.shape == (16, 16)
    assert torch.isfinite(approxconv.calibrate(model, [images])(images)).all()


def test_skip_wins_over_per_layer(net, exact, hostile):
    model = approxconv.approximate(net, exact, skip=["head"], per_layer={"*": hostile()})
    assert names_converted(model) == LAYERS[:-1]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"skip": ["nothing"]}, "nothing"),
        ({"skip": 3}, "skip.*got 3"),
        ({"skip": ["head", "stem"]}, "stem"),
        ({"per_layer": {"blocks": "exact"}}, "blocks|exact"),
        ({"per_layer": {"heads.*": Multiplier.exact()}}, "heads"),
        ({"per_layer": {"head": "no_such_circuit"}}, r"per_layer\['head'\].*no_such_circuit"),
        ({"per_layer": {"head": 3}}, r"per_layer\['head'\].*got int"),
        ({"per_layer": {3: "exact_8u"}}, "per_layer.*got 3"),
        ({"per_layer": ["exact_8u"]}, r"per_layer.*got \['exact_8u'\]"),
        ({"skip": (3,)}, "skip.*got 3"),
        ({"skip": None}, "skip.*got None"),
        ({"first_last": "exact"}, "first_last.*exact"),
        ({"mode": "quantised"}, "quantised"),
        ({"engine": "abacus"}, "abacus"),
        ({"gradient": "steepest"}, "steepest"),
        ({"quantization": 8}, "quantization.*int"),
        ({"fold_batchnorm": "yes"}, "tensors.*got str"),
        ({"fold_batchnorm": True}, r"'stem\.norm' must be in eval mode"),
        ({"per_layer": {"head": {"bits": 4}}}, r"per_layer\['head'\].*'bits'"),
        ({"per_layer": {"head": {"mode": "exact"}}}, r"per_layer\['head'\].*exact"),
        (
            {"quantization": Quantization(activation=OperandQuantization(scheme="symmetric"))},
            "activation scheme 'symmetric'",
        ),
    ],
    ids=str,
)
def test_a_wrong_argument_changes_nothing(net, arguments, named, inplace, exact):
    before = fingerprint(net)
    with pytest.raises(ValueError, match=named):
        approxconv.approximate(net, exact, inplace=inplace, **arguments)
    assert fingerprint(net) == before


def test_unmatched_pattern_lists_what_there_is(net, exact):
    with pytest.raises(ValueError, match=r"blocks\.1\.pointwise"):
        approxconv.approximate(net, exact, skip=["blocks.2.*"])


def test_nothing_to_convert(exact):
    for model in (nn.ReLU(), nn.Sequential(), nn.Sequential(nn.BatchNorm1d(3))):
        with pytest.raises(ValueError, match=r"no layer to convert: .*Conv2d, .*Linear"):
            approxconv.approximate(model, exact)


def test_a_model_that_is_none(exact):
    for call in (
        lambda: approxconv.approximate("net", exact),
        lambda: approxconv.set_mode("net", "float"),
        lambda: approxconv.calibrate("net", []),
    ):
        with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
            call()


def test_first_and_last_layer(net, images, hostile):
    multiplier = hostile(8, False, False)
    model = approxconv.approximate(net, multiplier, first_last="float")
    assert names_converted(model) == LAYERS[1:-1]
    model = approxconv.approximate(net, multiplier, first_last="approximate")
    assert {m.multiplier for m in approx_layers(model).values()} == {multiplier}

    model = approxconv.approximate(net, multiplier, first_last="quantized")
    chosen = {name: layer.multiplier for name, layer in approx_layers(model).items()}
    exact = Multiplier.exact(8, False, False)
    assert chosen == {name: exact if name in ("stem.conv", "head") else multiplier for name in LAYERS}
    approxconv.calibrate(model, [images])
    approxconv.set_mode(model.stem, "quantized")
    expected = model.eval()(images)
    approxconv.set_mode(model, "approximate")
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("first_last", ["float", "quantized"])
def test_a_single_layer_is_first_and_last(first_last, hostile):
    model = approxconv.approximate(nn.Sequential(nn.Linear(2, 2)), hostile(), first_last=first_last)
    if first_last == "float":
        assert type(model[0]) is nn.Linear
    else:
        assert model[0].multiplier == Multiplier.exact()


def multipliers(model):
    return [layer.multiplier for layer in approx_layers(model).values()]


def test_first_and_last_are_exact_by_default_if_there_are_others(net, exact, hostile):
    assert multipliers(approxconv.approximate(net, hostile())) == [exact, *[hostile()] * 4, exact]
    assert multipliers(approxconv.approximate(net, hostile(), skip=["stem.conv"])) == [*[hostile()] * 4, exact]
    three = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert multipliers(approxconv.approximate(three, hostile())) == [exact, hostile(), exact]
    assert multipliers(approxconv.approximate(three[:2], hostile())) == [hostile()] * 2
    assert multipliers(approxconv.approximate(three[0], hostile())) == [hostile()]


@pytest.mark.parametrize("first_last", [None, "quantized", "float", "approximate"])
def test_per_layer_wins_over_first_last(net, first_last, hostile):
    first, rest = hostile(seed=1), hostile(seed=2)
    model = approxconv.approximate(net, rest, per_layer={"stem.*": first, "head": "drum6_8u"}, first_last=first_last)
    assert multipliers(model) == [first, *[rest] * 4, approxconv.get_multiplier("drum6_8u")]


def is_depthwise(name, layer):
    return getattr(layer, "groups", 1) > 1


def test_predicates(net, exact, hostile):
    deep = [name for name in LAYERS if name.endswith("depthwise")]
    model = approxconv.approximate(net, exact, skip=is_depthwise)
    assert names_converted(model) == [name for name in LAYERS if name not in deep]
    assert names_converted(approxconv.approximate(net, exact, skip=[is_depthwise, "head"])) == [
        name for name in LAYERS[:-1] if name not in deep
    ]
    model = approxconv.approximate(net, exact, per_layer={is_depthwise: hostile(), lambda *_: True: "drum6_8u"})
    assert [m == hostile() for m in multipliers(model)] == [name in deep for name in LAYERS]
    # A recipe for many models may find nothing in one of them.
    assert names_converted(approxconv.approximate(net, exact, skip=lambda *_: False)) == LAYERS


def test_settings_of_some_layers(net, images, exact, hostile):
    narrow = Quantization(weight=OperandQuantization(narrow_range=True))
    model = approxconv.approximate(
        net,
        exact,
        quantization=narrow,
        gradient="lre",
        per_layer={
            "blocks.0.*": {"mode": "quantized", "gradient": "ste"},
            "*.pointwise": {"multiplier": hostile(), "engine": "reference", "quantization": None},
        },
    )
    layers = approx_layers(model)
    assert [layer.mode for layer in layers.values()] == ["approximate", *["quantized"] * 2, *["approximate"] * 3]
    assert [layer.gradient for layer in layers.values()] == ["lre", "ste", "ste", "lre", "lre", "lre"]
    assert [layer.engine for layer in layers.values()] == [*["auto"] * 4, "reference", "auto"]
    assert [layer.quantization == narrow for layer in layers.values()] == [True, True, True, True, False, True]
    assert multipliers(model) == [exact, exact, exact, exact, hostile(), exact]
    approxconv.calibrate(model, [images])(images).sum().backward()


# Converting again


def everything(net, images, multiplier, **arguments):
    return approxconv.calibrate(approxconv.approximate(net, multiplier, **arguments), [images])


@pytest.mark.parametrize("inplace", [False, True])
def test_converting_twice_is_converting_once(net, images, inplace, hostile):
    arguments = {
        "skip": ["blocks.0.depthwise"],
        "per_layer": {"*.pointwise": {"multiplier": "drum6_8u_8s", "gradient": "lre"}},
        "quantization": Quantization(activation=OperandQuantization(range="moving_average")),
        "fold_batchnorm": True,
    }
    once = everything(net.eval(), images, hostile(), **arguments)
    before, text, state = fingerprint(once), str(once), copy.deepcopy(once.state_dict())
    twice = approxconv.approximate(once, hostile(), **arguments, inplace=inplace)
    assert (twice is once) == inplace
    assert fingerprint(once) == before
    assert str(twice) == text
    assert twice.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in twice.state_dict().items())
    assert torch.equal(twice(images), once(images))


@pytest.mark.parametrize("bits", [8, 4])
def test_converting_again_sets_anew(net, images, bits, hostile):
    model = everything(net.eval(), images, hostile(), skip=["head"], mode="quantized", gradient="lre")
    again = approxconv.approximate(model, hostile(bits, True, seed=2), engine="reference")
    assert names_converted(model) == LAYERS[:-1]
    assert not again.head.calibrated
    approxconv.calibrate(again.head, [torch.rand(3, 8)])
    fresh = everything(net, images, hostile(bits, True, seed=2), engine="reference")
    approxconv.calibrate(fresh.head, [torch.rand(3, 8)])
    for name, layer in approx_layers(again).items():
        assert str(layer).split("\n")[1] == str(fresh.get_submodule(name)).split("\n")[1]
        assert layer.calibrated
    fresh.head.load_state_dict(again.head.state_dict())
    assert torch.equal(again(images), fresh(images))


def test_other_quantization_needs_calibration(net, images, exact):
    model = everything(net.eval(), images, exact)
    other = Quantization(activation=OperandQuantization(bits=5))
    again = approxconv.approximate(model, exact, quantization=other, per_layer={"head": {"quantization": None}})
    assert [bool(layer.calibrated) for layer in approx_layers(again).values()] == [*[False] * 5, True]
    assert {layer.activation_format.bits for name, layer in approx_layers(again).items() if name != "head"} == {5}
    approxconv.calibrate(again, [images])
    assert torch.equal(again(images), everything(net, images, exact, quantization=other, per_layer={
        "head": {"quantization": None}
    })(images))  # fmt: skip


def test_skipped_layers_stay_as_they_are(net, images, exact, hostile):
    model = everything(net, images, hostile())
    again = approxconv.approximate(model, exact, skip=["blocks.*"])
    assert multipliers(again) == [exact, *[hostile()] * 4, exact]


# Back to float


@pytest.mark.parametrize("inplace", [False, True])
def test_back_to_float(net, images, inplace, hostile):
    net.eval()
    before, expected = fingerprint(net), net(images)
    model = everything(net, images, hostile())
    parameters, state = dict(model.named_parameters()), str(model)
    stock = approxconv.to_float(model, inplace=inplace)
    assert (stock is model) == inplace
    assert [(type(m), m.training) for m in stock.modules()] == [own[1:] for own in before.values()]
    assert str(stock) == str(net)
    assert torch.equal(stock(images), expected)
    assert stock.state_dict().keys() == net.state_dict().keys()
    if inplace:
        assert all(parameters[name] is parameter for name, parameter in stock.named_parameters())
    else:
        assert str(model) == state
        assert not {t.data_ptr() for t in stock.parameters()} & {t.data_ptr() for t in model.parameters()}
    again = everything(stock, images, hostile())
    assert torch.equal(again(images), everything(net, images, hostile())(images))


def test_back_to_float_keeps_what_is_shared_and_hooks(exact):
    stock = Twice()
    seen = []
    handle = stock.own.register_forward_hook(lambda module, *_: seen.append(module))
    model = approxconv.to_float(approxconv.approximate(stock, exact, inplace=True), inplace=True)
    assert model.a[0] is model.b[0]
    assert type(model.a[0]) is nn.Linear
    model(torch.rand(1, 4))
    assert seen == [model.own]
    assert not model.own._forward_pre_hooks
    handle.remove()
    assert not model.own._forward_hooks


def test_the_root_itself_back_to_float(exact):
    stock = nn.Linear(3, 2)
    layer = approxconv.to_float(approxconv.approximate(stock, exact))
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(stock).keys()


@pytest.mark.parametrize("inplace", [False, True])
def test_back_to_float_of_a_parametrised_layer(inplace, exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), exact)
    parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"layer '1' must hold its weight .*remove_parametrizations\(layer"):
        approxconv.to_float(model, inplace=inplace)
    assert isinstance(model[0], ApproxLinear)
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(approxconv.to_float(model, inplace=inplace)[1]) is nn.Linear


def test_back_to_float_without_approximate_layers(net):
    for model, message in ((net, "no approximate layers"), ("net", "got str")):
        with pytest.raises(ValueError, match=message):
            approxconv.to_float(model)


# Composites


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.gru, self.product = nn.LSTMCell(8, 6), nn.GRUCell(6, 8), Matmul()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.attention(*[self.inner(x)] * 3)[0]
        x = self.gru(self.lstm(x.mean(1))[0])
        return self.head(self.product(x, x.mT @ x))


def test_modules_of_several_products(hostile):
    torch.manual_seed(0)
    stock, x = Mixed().eval(), torch.randn(3, 4, 8)
    model = everything(stock, x, hostile(), fold_batchnorm=True)
    assert names_converted(model) == [
        "inner", "attention.out_proj", "attention.q_proj", "attention.k_proj", "attention.v_proj",
        "attention.attention.qk", "attention.attention.av", "lstm.ih", "lstm.hh", "gru.ih", "gru.hh", "product", "head",
    ]  # fmt: skip
    assert multipliers(model) == [Multiplier.exact(), *[hostile()] * 11, Multiplier.exact()]
    again = approxconv.approximate(model, hostile(), fold_batchnorm=True)
    assert torch.equal(again(x), model(x))
    other = approxconv.set_multiplier(copy.deepcopy(model), hostile(seed=1))
    assert torch.equal(other(x), everything(stock, x, hostile(seed=1))(x))
    finer = approxconv.approximate(model, hostile(), quantization=Quantization(activation=OperandQuantization(bits=7)))
    assert {layer.activation_format.bits for layer in approx_layers(finer).values()} == {7}
    back = approxconv.to_float(model)
    assert str(back) == str(stock)
    assert torch.equal(back(x), stock(x))
    left = approxconv.approximate(stock, hostile(), skip=["attention", "*u"])
    assert [type(m) for m in (left.attention, left.gru)] == [nn.MultiheadAttention, nn.GRUCell]


def test_a_composite_at_the_end_is_exact_as_a_whole(exact, hostile):
    stock = nn.Sequential(nn.LSTMCell(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    model = approxconv.approximate(stock, hostile())
    assert multipliers(model) == [exact, exact, hostile(), *[exact] * 6]
    assert multipliers(approxconv.approximate(model, hostile(seed=1))) == [exact, exact, hostile(seed=1), *[exact] * 6]
    assert multipliers(approxconv.set_multiplier(model, hostile(seed=2))) == [
        exact, exact, hostile(seed=2), *[exact] * 6
    ]  # fmt: skip


def test_attention_made_approximate_goes_back_to_plain_products(hostile):
    model = nn.ModuleDict({"attention": ApproxAttention(multiplier="drum6_8u_8s"), "fc": nn.Linear(2, 2)})
    model = approxconv.approximate(model, hostile())
    assert multipliers(model) == [hostile()] * 3
    back = approxconv.to_float(model)
    assert [type(module) for module in back.values()] == [Attention, nn.Linear]


def test_a_derived_weight_inside_is_named(exact):
    stock = nn.Sequential(nn.MultiheadAttention(4, 1))
    parametrizations.weight_norm(stock[0].out_proj)
    with pytest.raises(ValueError, match=r"'0\.out_proj'.*remove_parametrizations"):
        approxconv.approximate(stock, exact)
    prune.l1_unstructured(stock[0], "in_proj_weight", 0.5)
    with pytest.raises(ValueError, match=r"'0'.*prune\.remove\(layer, 'in_proj_weight'\)"):
        approxconv.approximate(stock, exact)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_parts_are_left_alone(exact):
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU())), nn.Linear(2, 2))
    assert names_converted(approxconv.approximate(model, exact, inplace=True)) == ["1"]


# Other tables


def test_set_multiplier_moves_no_weight(net, images, hostile):
    model = everything(net.eval(), images, hostile())
    before = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    for seed in (1, 2, 0):
        assert approxconv.set_multiplier(model, hostile(seed=seed)) is model
        assert torch.equal(model(images), everything(net, images, hostile(seed=seed))(images))
    approxconv.set_multiplier(model, hostile(4, True))
    assert torch.equal(model(images), everything(net, images, hostile(4, True))(images))
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == before


def test_set_multiplier_of_some(net, exact, hostile):
    first, second = hostile(seed=1), hostile(seed=2)
    model = approxconv.approximate(net, exact)
    approxconv.set_multiplier(model, {"blocks.0.*": first, is_depthwise: second, "head": "drum6_8u"})
    assert multipliers(model) == [exact, first, first, second, exact, approxconv.get_multiplier("drum6_8u")]
    approxconv.set_multiplier(model, second, first_last="float")
    assert multipliers(model) == [exact, *[second] * 4, approxconv.get_multiplier("drum6_8u")]
    approxconv.set_multiplier(model, first, first_last="approximate")
    assert multipliers(model) == [first] * 6
    approxconv.set_multiplier(model, second)
    assert multipliers(model) == [exact, *[second] * 4, exact]


@pytest.mark.parametrize(
    ("multiplier", "named"),
    [
        ("no_such_circuit", "no_such_circuit"),
        (3, "got int"),
        ({"head": 3}, "got int"),
        ({"heads": "drum6_8u_8s"}, "heads.*stem.conv"),
        ({3: "drum6_8u_8s"}, "got 3"),
        ({"stem.conv": "drum6_8u_8s", "blocks.1.*": "drum4_8u"}, r"'blocks\.1\.pointwise'.*symmetric"),
    ],
    ids=str,
)
def test_set_multiplier_is_all_or_nothing(net, multiplier, named, exact):
    symmetric = {"quantization": Quantization(weight=OperandQuantization(scheme="symmetric"))}
    model = approxconv.approximate(net, exact, per_layer={"blocks.1.pointwise": symmetric})
    with pytest.raises(ValueError, match=named):
        approxconv.set_multiplier(model, multiplier)
    assert multipliers(model) == [exact] * 6


def test_set_multiplier_of_a_stock_model(net, exact):
    with pytest.raises(ValueError, match="no approximate layers"):
        approxconv.set_multiplier(net, exact)


@pytest.mark.parametrize("train", [False, True])
def test_transformer_encoder_layer(train, exact):
    """torch's fused path reads linear1.weight itself and would go past the converted layers."""
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, 5, 8)
    coarse = Multiplier.exact(3)
    model = approxconv.calibrate(approxconv.approximate(stock, coarse), [x])
    assert all(layer.calibrated for layer in approx_layers(model).values())
    with torch.no_grad():
        assert (model(x) - stock(x)).abs().max() > 1e-2
        assert torch.equal(model(x), approxconv.set_mode(model, "quantized")(x))


# Calibration


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.seen = []

    def forward(self, pixels, scale=None):
        self.seen.append((pixels, scale))
        return self.fc(pixels if scale is None else pixels * scale)


Pair = namedtuple("Pair", "image label")
LOW, HIGH = -2.0, 6.0
BATCH = torch.tensor([[LOW, 0.0, 1.0], [0.5, HIGH, -1.0]])
LABEL = torch.tensor([90.0, -70.0])


@pytest.mark.parametrize(
    "batches",
    [
        [BATCH],
        (BATCH,),
        [BATCH[:1], BATCH[1:]],
        [(BATCH, LABEL)],
        [[BATCH, LABEL]],
        [Pair(BATCH, LABEL)],
        [("name", BATCH, LABEL)],
        [{"pixels": BATCH}],
        [{"scale": 1.0, "pixels": BATCH}],
        [{"scale": torch.ones(3), "pixels": BATCH}],
        [{"image": BATCH, "label": LABEL}],
        [{"id": 7, "image": BATCH, "label": LABEL}],
        [OrderedDict(image=BATCH * 50, pixels=BATCH)],
        [BATCH, (BATCH[:1], LABEL), {"pixels": BATCH[1:]}],
        [BATCH, BATCH[:0]],
        [((BATCH, LABEL), LABEL)],
        [[["name", [], [BATCH, LABEL]], LABEL]],
        [({"image": BATCH}, LABEL)],
        [{"ids": ["a", "b"], "image": (BATCH, LABEL)}],
    ],
    ids=range(19),
)
@pytest.mark.parametrize("lazy", [False, True])
def test_kinds_of_batches(batches, lazy, exact):
    model = approxconv.approximate(Keywords(), exact)
    result = approxconv.calibrate(model, (b for b in batches) if lazy else batches)
    assert result is model
    torch.testing.assert_close(model.fc.activation_scale.item(), (HIGH - LOW) / 255, rtol=1e-6, atol=0)
    assert model.fc.activation_zero_point.item() == 64
    assert model.fc.calibrated
    assert len(model.seen) == len(batches)


class AnyKeyword(Keywords):
    def forward(self, pixels, **others):
        return super().forward(pixels, **others)


@pytest.mark.parametrize("stock", [Keywords, AnyKeyword])
def test_keywords_are_all_passed(stock, exact):
    model = approxconv.approximate(stock(), exact)
    approxconv.calibrate(model, [{"pixels": BATCH, "scale": torch.tensor(2.0)}])
    assert model.seen[0][1].item() == 2
    torch.testing.assert_close(model.fc.activation_scale.item(), 2 * (HIGH - LOW) / 255, rtol=1e-6, atol=0)


def test_keywords_that_forward_does_not_take_are_left_out(exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    approxconv.calibrate(model, [{"label": LABEL, "input": BATCH}])
    torch.testing.assert_close(model[0].activation_scale.item(), (HIGH - LOW) / 255, rtol=1e-6, atol=0)


class PositionalOnly(Keywords):
    def forward(self, pixels, /, **others):
        return self.fc(pixels + others.get("shift", 0))


class AnyPositional(Keywords):
    def forward(self, *inputs):
        return self.fc(inputs[0])


@pytest.mark.parametrize("stock", [PositionalOnly, AnyPositional])
def test_forward_that_takes_nothing_by_keyword(stock, exact):
    model = approxconv.approximate(stock(), exact)
    approxconv.calibrate(model, [{"pixels": BATCH, "shift": 50.0}])
    torch.testing.assert_close(model.fc.activation_scale.item(), (HIGH - LOW) / 255, rtol=1e-6, atol=0)


def test_a_data_loader(exact):
    data = torch.utils.data.TensorDataset(BATCH, LABEL)
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    approxconv.calibrate(model, torch.utils.data.DataLoader(data, batch_size=1))
    torch.testing.assert_close(model[0].activation_scale.item(), (HIGH - LOW) / 255, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batches", [[], (), iter(()), (b for b in ())], ids=["list", "tuple", "iter", "generator"])
def test_no_batches(net, batches, exact):
    model = approxconv.approximate(net, exact)
    with pytest.raises(ValueError, match="at least one"):
        approxconv.calibrate(model, batches)
    assert not any(layer.calibrated for layer in approx_layers(model).values())


@pytest.mark.parametrize("batches", [None, 3], ids=str)
def test_batches_that_are_no_iterable(batches, exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    with pytest.raises(ValueError, match=f"batches must be an iterable.* got {type(batches).__name__}"):
        approxconv.calibrate(model, batches)
    assert model[0].mode == "approximate"


@pytest.mark.parametrize("batch", ["text", 3, None, [], {}, ("a", 1), {"a": "b"}, [[("a", ())], {}]], ids=str)
def test_a_batch_without_a_tensor(batch, exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    with pytest.raises(ValueError, match="batches"):
        approxconv.calibrate(model, [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    batch = BATCH.clone()
    batch[0, 1] = value
    with pytest.raises(ValueError, match="finite"):
        approxconv.calibrate(model, [BATCH, batch, BATCH])
    assert not model[0].calibrated
    assert model[0].mode == "approximate"
    assert not approxconv.calibrate(model, [BATCH])[0].activation_scale.isnan()


def test_calibrating_a_stock_model(net, images):
    with pytest.raises(ValueError, match="approximate"):
        approxconv.calibrate(net, [images])


def test_modes_and_flags_are_restored(net, images, exact):
    model = approxconv.approximate(net, exact)
    approxconv.set_mode(model.blocks, "quantized")
    model.head.mode = "float"
    model.train()
    model.blocks[1].eval()
    modes = {name: layer.mode for name, layer in approx_layers(model).items()}
    flags = {name: module.training for name, module in model.named_modules()}
    approxconv.calibrate(model, [images])
    assert {name: layer.mode for name, layer in approx_layers(model).items()} == modes
    assert {name: module.training for name, module in model.named_modules()} == flags

    def failing():
        yield images
        raise KeyboardInterrupt

    scales = {name: layer.activation_scale.clone() for name, layer in approx_layers(model).items()}
    for batches, error in ((failing(), KeyboardInterrupt), ([images, images[:, :, 0]], Exception)):
        with pytest.raises(error):
            approxconv.calibrate(model, batches)
        assert {name: layer.mode for name, layer in approx_layers(model).items()} == modes
        assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: layer.activation_scale for name, layer in approx_layers(model).items()} == scales
    # Nothing goes on observing.
    approxconv.set_mode(model, "float").eval()(images * 100)
    approxconv.calibrate(model, [images])
    assert {name: layer.activation_scale for name, layer in approx_layers(model).items()} == scales


def test_calibration_observes_only(net, images, exact):
    model = approxconv.approximate(net, exact).train()
    state = copy.deepcopy(model.state_dict())
    approxconv.calibrate(model, [images, images * 2])
    own = set(net.state_dict())
    assert any("running_mean" in key for key in own)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in own)
    assert all(p.grad is None for p in model.parameters())
    # In eval mode: dropout before the head dropped nothing, so twice gives the same.
    scale = model.head.activation_scale.item()
    assert approxconv.calibrate(model, [images, images * 2]).head.activation_scale.item() == scale


def test_ranges_are_those_of_the_float_model(net, images, exact):
    """Whatever mode the model is in, the second layer sees what the float first layer gives."""
    inputs = {}
    net.eval()
    for name in LAYERS:
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: inputs.__setitem__(name, args[0].detach())
        )
    net(images)
    plain = Net()
    plain.load_state_dict(net.state_dict())
    model = approxconv.approximate(plain, exact)
    approxconv.calibrate(model, [images * 7])
    approxconv.calibrate(model, [images])
    for name, layer in approx_layers(model).items():
        low, high = inputs[name].min().clamp(max=0).item(), inputs[name].max().clamp(min=0).item()
        torch.testing.assert_close(layer.activation_scale.item(), (high - low) / 255, rtol=1e-5, atol=0)
        assert layer.activation_zero_point.item() == pytest.approx(-low / (high - low) * 255, abs=0.51)


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, idle=False):
        return self.idle(x) if idle else self.used(x)


def test_unreached_layers_stay_uncalibrated(exact):
    model = approxconv.approximate(TwoWays(), exact)
    approxconv.calibrate(model, [BATCH])
    assert model.used.calibrated
    assert not model.idle.calibrated
    model(BATCH)
    with pytest.raises(RuntimeError, match="calibrate"):
        model(BATCH, idle=True)
    scale = model.used.activation_scale.clone()
    approxconv.calibrate(model, [{"x": BATCH * 9, "idle": True}])
    assert model.idle.calibrated
    assert torch.equal(model.used.activation_scale, scale)
    model(BATCH, idle=True)


def test_calibrating_again_replaces_the_range(exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    for factor in (10.0, 0.1, 1.0):
        approxconv.calibrate(model, [BATCH * factor])
        model(BATCH)
        torch.testing.assert_close(model[0].activation_scale.item(), factor * (HIGH - LOW) / 255, rtol=1e-5, atol=0)


def test_an_input_of_zeros(exact):
    model = approxconv.approximate(nn.Sequential(nn.Linear(3, 2)), exact)
    approxconv.calibrate(model, [torch.zeros(2, 3)])
    torch.testing.assert_close(model(torch.zeros(2, 3)), model[0].bias.expand(2, -1))


# Modes


def test_set_mode(net, exact):
    model = approxconv.approximate(net, exact)
    for mode in ("float", "quantized", "approximate"):
        assert approxconv.set_mode(model, mode) is model
        assert {layer.mode for layer in approx_layers(model).values()} == {mode}
    for mode in ("exact", "", None, "Float"):
        with pytest.raises(ValueError, match="mode"):
            approxconv.set_mode(model, mode)
        assert {layer.mode for layer in approx_layers(model).values()} == {"approximate"}
    with pytest.raises(ValueError, match="no approximate layers"):
        approxconv.set_mode(net, "float")


# End to end


@pytest.mark.parametrize("a_signed", [False, True])
@pytest.mark.parametrize("w_signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_with_the_exact_table(net, images, bits, a_signed, w_signed, hostile):
    model = approxconv.approximate(net.eval(), Multiplier.exact(bits, a_signed, w_signed))
    approxconv.calibrate(model, [images])
    approximate = model(images)
    quantised = approxconv.set_mode(model, "quantized")(images)
    assert torch.equal(approximate, quantised)
    expected = net(images)
    assert torch.equal(approxconv.set_mode(model, "float")(images), expected)
    error = (quantised - expected).norm() / expected.norm()
    assert 0 < error < (0.1 if bits == 8 else 1.5)
    approxconv.set_mode(model, "approximate")
    with approxconv.use_engine("reference"):
        assert torch.equal(model(images), approximate)

    other = approxconv.approximate(net, hostile(bits, a_signed, w_signed))
    other = approxconv.calibrate(other, [images])
    assert not torch.equal(other(images), quantised)
    assert torch.equal(approxconv.set_mode(other, "quantized")(images), quantised)


def test_a_network_survives_its_checkpoint(net, images, truncated, tmp_path):
    model = approxconv.calibrate(approxconv.approximate(net.eval(), truncated), [images])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(5)
    fresh = approxconv.approximate(Net().eval(), Multiplier.exact())
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def loss_of(model, images, labels):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(images), labels).item()


def fit(model, images, labels, optimizer, steps):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def one_thread():
    """Small ops by the thousand: OpenMP threads that find the cores taken would spin for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(one_thread):
    """A network that has learnt a small task in float, BatchNorm statistics settled, and the task."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 5
    images = torch.randn(60, 1, 12, 12) * 0.3 + labels[:, None, None, None] - 2
    net = Net()
    net.drop.p = 0.0
    fit(net, images, labels, torch.optim.Adam(net.parameters(), lr=0.02), 80)
    assert loss_of(net, images, labels) < 0.1
    return net, images, labels


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.05), (torch.optim.Adam, 0.01)])
def test_retraining_lowers_the_loss(trained, optimizer, lr):
    net, images, labels = trained
    brutal = Multiplier.from_function(lambda a, w: a * w // 2048 * 2048, a_signed=False, w_signed=True)
    model = approxconv.calibrate(approxconv.approximate(net, brutal), [images])
    start, before = copy.deepcopy(model.state_dict()), loss_of(model, images, labels)
    assert before > 10 * loss_of(net, images, labels)

    fit(model, images, labels, optimizer(model.parameters(), lr=lr), 30)
    assert loss_of(model, images, labels) < 0.5 * before
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for name, layer in approx_layers(model).items():
        assert layer.mode == "approximate"
        assert not torch.equal(layer.weight, start[f"{name}.weight"])
        for kept in ("table", "activation_scale", "activation_zero_point"):
            assert torch.equal(getattr(layer, kept), start[f"{name}.{kept}"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_makes_no_nested_tensors_while_it_is_approximate():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    converted = approxconv.approximate(encoder, Multiplier.exact(8, True, True))
    approxconv.calibrate(converted, [{"src": x, "src_key_padding_mask": padding}])
    with torch.no_grad():
        output, expected = converted(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(output[~padding], expected[~padding], rtol=0.1, atol=0.1)
    assert not approxconv.approximate(converted, Multiplier.exact(8, True, True)).use_nested_tensor
    assert vars(approxconv.nn.to_float(converted)).keys() == vars(encoder).keys()
    assert approxconv.nn.to_float(converted).use_nested_tensor


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_convert_and_come_back(kind):
    stock = kind(3, 4, num_layers=2, bias=False)
    converted = approxconv.approximate(stock, Multiplier.exact(8, True, True), mode="float")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(converted(x)[0], stock(x)[0])
    assert torch.equal(approxconv.nn.to_float(converted)(x)[0], stock(x)[0])
    del stock.weight_hh_l1
    with pytest.raises(ValueError, match="weight_hh_l1 as a parameter"):
        approxconv.approximate(stock, Multiplier.exact(8, True, True))


def test_attention_modules_convert_and_come_back():
    query = torch.randn(2, 4, 3)
    stock = approxconv.nn.Attention()
    converted = approxconv.approximate(stock, Multiplier.exact(8, True, True), mode="float")
    assert type(converted) is approxconv.nn.ApproxAttention
    back = approxconv.nn.to_float(converted)
    assert type(back) is approxconv.nn.Attention
    assert torch.equal(back(query, query, query)[0], stock(query, query, query)[0])
