"""The report on a model's layers."""

import copy

import pytest
import torch
from rich.console import Console
from torch import nn

import approxconv
from approxconv import Multiplier, model_summary


def with_power(multiplier, power, name=""):
    signs = multiplier.a_signed, multiplier.w_signed
    return Multiplier(multiplier.table, a_signed=signs[0], w_signed=signs[1], name=name, info={"power": power})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, (3, 1), groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.idle = nn.Linear(4, 2)

    def forward(self, x):
        x = self.up(self.depthwise(self.stem(x))).mean((2, 3))
        return self.head(self.fc(self.fc(x)))


MACS = {
    "stem": 2 * 6 * 4 * 5 * 27,
    "depthwise": 2 * 6 * 2 * 5 * 3,
    "up": 2 * 6 * 2 * 5 * 2 * 4,
    "fc": 2 * 2 * 16,
    "head": 2 * 8,
    "idle": None,
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 9)


def test_shapes_and_multiplications(net, x):
    for model in (net, approxconv.approximate(net, "drum6_8u_8s", skip=["idle"])):
        summary = model_summary(model, x)
        assert {row.name: row.macs for row in summary} == MACS
        assert summary.macs == sum(filter(None, MACS.values()))
        assert len(summary) == 6
        assert summary[0].weight_shape == (6, 3, 3, 3)
        assert summary[0].input_shapes == ((2, 3, 8, 9),)
        assert summary[0].output_shape == (2, 6, 4, 5)
        assert summary[2].output_shape == (2, 4, 4, 10)
        assert summary[3].input_shapes == ((2, 4),)
        assert summary[5].input_shapes is summary[5].output_shape is None


def test_what_became_of_the_layers(net, x, hostile):
    model = approxconv.approximate(
        net, hostile(), skip=["up"], per_layer={"depthwise": {"mode": "float", "engine": "reference"}}
    )
    rows = {row.name: (row.type, row.multiplier, row.mode, row.engine) for row in model_summary(model)}
    assert rows == {
        "stem": ("ApproxConv2d", "exact_8u_8s", "approximate", "auto"),
        "depthwise": ("ApproxConv2d", "hostile0", "float", "reference"),
        "up": ("ConvTranspose2d", "", "float", ""),
        "fc": ("ApproxLinear", "hostile0", "approximate", "auto"),
        "head": ("ApproxLinear", "hostile0", "approximate", "auto"),
        "idle": ("ApproxLinear", "exact_8u_8s", "approximate", "auto"),
    }
    engines = {row.name: row.engine for row in model_summary(model, x)}
    assert engines == {
        "stem": "cpu", "depthwise": "reference", "up": "", "fc": "cpu", "head": "cpu", "idle": "auto"
    }  # fmt: skip
    assert not any(layer.calibrated for layer in approxconv.nn.approx_layers(model).values())


def test_nothing_changes(net, x, hostile):
    net.depthwise.eval()
    model = approxconv.set_mode(approxconv.approximate(net, hostile()), "quantized")
    model.fc.mode = "noise"
    before = copy.deepcopy(model.state_dict()), str(model), [m.training for m in model.modules()]
    model_summary(model, x)
    with pytest.raises(RuntimeError):
        model_summary(model, x[:, :2])
    assert (str(model), [m.training for m in model.modules()]) == before[1:]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_as_of_calibrate(net, x):
    for batch in ((x, 3), [x], {"x": x}, {"image": x, "label": 3}):
        assert model_summary(net, batch).macs == model_summary(net, x).macs
    with pytest.raises(ValueError, match="hold one"):
        model_summary(net, "image")


def test_on_the_meta_device(net, x):
    model = approxconv.approximate(net.to("meta"), "drum6_8u_8s", skip=["idle"])
    assert {row.name: row.macs for row in model_summary(model, x)} == MACS


def test_energy(net, x, hostile):
    exact, rough = with_power(Multiplier.exact(), "0.4 mW", "exact"), with_power(hostile(), 0.1, "rough")
    model = approxconv.approximate(net, rough, skip=["idle", "head"])
    summary = model_summary(model, x)
    energies = {row.name: row.energy for row in summary}
    assert energies == {
        name: pytest.approx(0.1 * MACS[name]) if name in ("depthwise", "up", "fc") else None for name in MACS
    }
    assert summary.energy == pytest.approx(0.1 * (MACS["depthwise"] + MACS["up"] + MACS["fc"]))
    assert summary.relative_energy is None

    summary = model_summary(model, x, exact=exact)  # the stem's products are exact
    assert summary[0].energy == pytest.approx(0.4 * MACS["stem"])
    known = [name for name in MACS if name not in ("idle", "head")]
    total = 0.4 * MACS["stem"] + 0.1 * sum(MACS[name] for name in known[1:])
    assert summary.energy == pytest.approx(total)
    assert summary.relative_energy == pytest.approx(total / (0.4 * sum(MACS[name] for name in known)))
    assert f"{summary.relative_energy:.1%} of the exact" in str(summary)

    approxconv.set_multiplier(model, {"stem": exact})  # that it holds one is enough
    assert model_summary(model, x).relative_energy == pytest.approx(summary.relative_energy)
    assert model_summary(approxconv.set_mode(model, "quantized"), x).relative_energy == pytest.approx(1)
    assert model_summary(approxconv.set_mode(model, "float"), x).energy is None
    with pytest.raises(ValueError, match=r"exact must state its power.*exact_8u_8s"):
        model_summary(model, x, exact="exact_8u_8s")


def test_power_survives_other_tables(net, hostile):
    model = approxconv.approximate(net, with_power(hostile(), "301 uW"), first_last="approximate")
    assert {row.power for row in model_summary(copy.deepcopy(model))} == {0.301}
    state = approxconv.approximate(net, hostile(seed=1), first_last="approximate").state_dict()
    model.load_state_dict(state)
    assert {row.power for row in model_summary(model)} == {None}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_printing(net, x, width, hostile):
    hostile_name = Multiplier(hostile().table, a_signed=False, w_signed=True, name="[bold]\x1b[31m<b>")
    model = approxconv.approximate(net, hostile_name, skip=["idle"])
    summary = model_summary(model, x)
    text = str(summary)
    for cell in ("stem", "ApproxConv2d", "6×3×3×3", "2×3×8×9 → 2×6×4×5", "6,480", "[bold]", "approximate", "idle"):
        assert cell in text
    assert "\x1b" not in text
    assert text.splitlines()[-1] == "5 of 6 layers approximate; 7,880 MACs"
    assert "energy" not in text
    page = summary._repr_html_()
    assert "6×3×3×3" in page
    assert "<b>" not in page
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(summary)
    assert "6,480" in capture.get()
    assert max(map(len, capture.get().splitlines())) <= width


def test_without_an_input(net):
    text = str(model_summary(approxconv.approximate(net, "drum6_8u_8s")))
    assert "MACs" not in text
    assert "→" not in text
    assert text.splitlines()[-1] == "6 of 6 layers approximate"


def test_products_of_activations_and_parts_of_modules(hostile):
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    model.forward = lambda x: model[0](x, x, x)[0]
    x = torch.randn(3, 5, 8)
    assert [(row.type, row.macs) for row in model_summary(model, x)] == [("MultiheadAttention", None)]
    rows = {row.name: row.macs for row in model_summary(approxconv.approximate(model, hostile(), inplace=True), x)}
    projection, product = 3 * 5 * 64, 3 * 2 * 5 * 5 * 4
    assert rows == {
        **{f"0.{name}_proj": projection for name in ("out", "q", "k", "v")},
        "0.attention.qk": product,
        "0.attention.av": product,
    }


def test_no_layers():
    for model, message in ((nn.ReLU(), "no layer"), ("net", "got str")):
        with pytest.raises(ValueError, match=message):
            model_summary(model)
