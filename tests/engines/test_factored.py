"""The factored engine against the oracle, and when it is chosen."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from approxconv import EngineError, explain, get_multiplier, use_engine
from approxconv.engines import choice, choose, cost, factored, host_cuda, reference
from approxconv.engines.cost import Rates
from approxconv.engines.work import Work, last_seconds
from approxconv.factorize import factorize_table
from approxconv.kernels import factored as kernels
from approxconv.kernels.factored import FactoredKernelEngine
from approxconv.multiplier import prepare
from approxconv.nn import ApproxConv2d, ApproxLinear
from approxconv.operators import Conv2dArgs

GEOMETRY = (2, 1), (1, 2), (1, 2)
LOW_RANK = ("exact_8u", "exact_8s", "drum4_8s", "kulkarni_8u", "trunc4_8u_8s", "bam_h0_v6_8u", "roba_8s", "drum3_5u_5s")
# With which a product costs a tenth of a lookup, and expanding a code or a weight nothing.
RATES = Rates(0.0, 1e-9, 0.0, 1e-9, 1e-10, 0.0, 0.0, 0.0, 1e-9, 0.0, 1e-10, 0.0, 0.0, 5e-10, 0.0)


def codes(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def low_rank(rank, seed=0, bits=8, scale=1):
    """The exact product of hostile factors, none of them 0 at code 0."""
    generator = torch.Generator().manual_seed(seed)
    f, g = (torch.randint(-128, 128, (2**bits, rank), dtype=torch.int32, generator=generator) for _ in range(2))
    f[0], g[0] = 101, -103
    values = torch.arange(2**bits, dtype=torch.int32)
    return f @ g.T + scale * torch.outer(values, values - 2 ** (bits - 1))


def high_rank():
    return torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def cheap_products(monkeypatch):
    monkeypatch.setattr(cost, "measured_rates", lambda: RATES)


def both(operator, *arguments):
    return [getattr(torch.ops.approxconv, operator)(*arguments, engine=engine) for engine in ("factored", "reference")]


@pytest.mark.parametrize("name", LOW_RANK)
def test_zoo_through_every_operator(name):
    table = get_multiplier(name).table
    pad_code = table.shape[0] - 1
    x, w, filters = codes(2, 6, 7, 5), codes(4, 3, 3, 2, seed=1), codes(12, 1, 3, 2, seed=2)
    assert torch.equal(*both("lut_matmul", codes(9, 13), codes(5, 13, seed=1), table))
    assert torch.equal(*both("lut_conv2d", x, w, table, *GEOMETRY, 2, pad_code))
    assert torch.equal(*both("lut_dwconv2d", x, filters, table, *GEOMETRY, pad_code))


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
@pytest.mark.parametrize("bits", [8, 6])
def test_hostile_factors_through_every_operator(rank, bits):
    table = low_rank(rank, seed=rank, bits=bits, scale=rank % 2)
    x = codes(3, 4, 6, 9).to(memory_format=torch.channels_last)
    assert torch.equal(*both("lut_matmul", codes(2, 7, 30)[..., ::2], codes(2, 3, 15, seed=3), table))
    assert torch.equal(*both("lut_conv2d", x, codes(5, 4, 2, 3, seed=4), table, *GEOMETRY, 1, 7))
    assert torch.equal(*both("lut_dwconv2d", x, codes(4, 1, 3, 3, seed=4), table, *GEOMETRY, 7))


@pytest.mark.parametrize(("x_code", "w_code"), [(128, 128), (255, 255), (255, 128), (127, 127), (0, 0)])
def test_operands_at_the_ends_of_their_ranges(x_code, w_code):
    for name in ("exact_8u", "exact_8s", "drum4_8u_8s"):
        x, w = torch.full((3, 1000), x_code, dtype=torch.uint8), torch.full((5, 1000), w_code, dtype=torch.uint8)
        assert torch.equal(*both("lut_matmul", x, w, get_multiplier(name).table))


def test_reference_circuits(reference_multipliers):
    x, w = codes(5, 21), codes(4, 21, seed=1)
    few = {name: each for name, each in reference_multipliers.items() if factored.known_form(each.table) is not None}
    assert len(few) > 10
    for name, multiplier in few.items():
        assert torch.equal(*both("lut_matmul", x, w, multiplier.table)), name


def test_a_table_of_high_rank_is_refused_by_name_only():
    x, w = codes(4, 9), codes(3, 9)
    with pytest.raises(EngineError, match="no factorisation of at most 64 terms"):
        torch.ops.approxconv.lut_matmul(x, w, high_rank(), engine="factored")
    assert torch.equal(torch.ops.approxconv.lut_matmul(x, w, high_rank()), reference.lut_matmul(x, w, high_rank()))


def test_a_factorisation_that_was_written_to_is_not_used():
    table = low_rank(2)
    factorize_table(table).f.zero_()
    assert torch.equal(*both("lut_matmul", codes(4, 9), codes(3, 9), table))


def test_another_device_is_refused():
    assert "CPU or CUDA" in factored.unavailable(torch.device("meta"))


LARGE = Work.matmul((4096, 256), (64, 256))


@pytest.mark.parametrize(
    ("table", "work", "engine"),
    [
        (low_rank(2), LARGE, "factored"),
        (low_rank(9), LARGE, "cpu"),
        (high_rank(), LARGE, "cpu"),
        (low_rank(2), Work.matmul((64, 256), (64, 256)), "cpu"),
    ],
    ids=["few products", "many products", "high rank", "small"],
)
def test_auto_takes_what_should_be_faster(table, work, engine, cheap_products):
    name, module = choose("auto", table, work)
    assert name == engine
    assert module.__name__ == f"approxconv.engines.{engine}"
    with use_engine("reference"):
        assert choose("auto", table, work)[0] == "reference"
    assert choose("cpu", table, work)[0] == "cpu"


def test_an_inference_table_is_not_factorised_on_every_call(cheap_products):
    with torch.inference_mode():
        table = low_rank(1)
    assert choose("auto", table, LARGE)[0] == "cpu"


def test_auto_computes_with_the_engine_it_takes(cheap_products):
    x, w, table = codes(4099, 64), codes(67, 64, seed=1), low_rank(1)
    work = Work.matmul(x.shape, w.shape)
    y = torch.ops.approxconv.lut_matmul(x, w, table)
    assert last_seconds("factored", work) > 0
    assert last_seconds("cpu", work) is None
    assert torch.equal(y, torch.ops.approxconv.lut_matmul(x, w, table, engine="cpu"))
    table[7, 9] += 1  # is factorised anew
    y = torch.ops.approxconv.lut_matmul(x, w, table)
    assert torch.equal(y, torch.ops.approxconv.lut_matmul(x, w, table, engine="cpu"))


class TestOnAGpu:
    """What is chosen there, with a table that only looks as if it lay on one."""

    @pytest.fixture
    def table(self, monkeypatch):
        table = low_rank(2)
        on_cpu = factored.known_form(table), prepare(table)
        with FakeTensorMode():
            on_gpu = torch.empty(table.shape, dtype=table.dtype, device="cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(choice, "known_form", lambda table: on_cpu[0])
        monkeypatch.setattr(choice, "prepare", lambda table: on_cpu[1])
        engine = FactoredKernelEngine("cuda", lambda device: host_cuda.TARGET, lambda plans, device: None, lambda: None)
        monkeypatch.setattr(kernels, "cuda_engine", lambda: engine)
        return on_gpu

    def test_few_products_are_multiplied(self, table):
        found = choice.weigh(LARGE, table)
        assert [(each.engine, each.products) for each in found.candidates] == [("factored", 3), ("cuda", 0)]

    def test_many_products_are_looked_up(self, table, monkeypatch):
        form = choice.known_form(table)
        many = replace(form, u=form.u.repeat(30, 1), v=form.v.repeat(30, 1))
        monkeypatch.setattr(choice, "known_form", lambda table: many)
        assert choice.weigh(Work.matmul((4096, 2304), (256, 2304)), table).engine == "cuda"

    def test_depthwise_convolutions_are_looked_up(self, table):
        work = Work.conv2d((64, 96, 56, 56), (96, 1, 3, 3), (1, 1), (1, 1), (1, 1), 96, "lut_dwconv2d")
        found = choice.weigh(work, table)
        assert found.engine == "cuda"
        assert "memory" in found.why

    def test_a_device_without_the_instructions_looks_up(self, table, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        monkeypatch.setattr(choice, "known_form", None)  # nothing is factorised
        found = choice.weigh(LARGE, table)
        assert found.engine == "cuda"
        assert "sm_75 or newer, got a device" in found.why

    def test_nothing_is_factorised_while_a_graph_is_recorded(self, table, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(choice, "known_form", None)
        found = choice.weigh(LARGE, table)
        assert found.engine == "cuda"
        assert "graph" in found.why


class TestExplain:
    conv = Conv2dArgs(64, 64, 3, padding=1)

    def test_names_the_engines_that_were_weighed(self, cheap_products):
        found = explain(self.conv, (2, 64, 16, 16), get_multiplier("kulkarni_8s"))
        assert found.engine == "factored"
        assert found.macs == 2 * 256 * 64 * 576
        assert [(each.engine, each.products) for each in found.candidates] == [("factored", 2), ("cpu", 0)]
        assert [each.predicted for each in found.candidates] == pytest.approx([5.0, 1.0])
        assert "2 products of 8-bit integers should take less than row tables" in str(found)
        assert found.threads == torch.get_num_threads()
        assert "factored" in found._repr_html_()

    def test_says_what_the_last_call_reached(self, cheap_products):
        x, w, multiplier = codes(3, 64, 17, 16), codes(64, 64, 3, 3), get_multiplier("mitchell_8u")
        assert explain(self.conv, x.shape, multiplier).candidates[0].measured is None
        torch.ops.approxconv.lut_conv2d(x, w, multiplier.table, [1, 1], [1, 1], [1, 1], 1, 0)
        found = explain(self.conv, x.shape, multiplier)
        assert found.engine == "cpu"
        assert "no factorisation of at most 64 terms" in found.reason
        assert found.candidates[0].measured > 0

    def test_an_engine_asked_for_by_name(self, cheap_products):
        found = explain(self.conv, (2, 64, 16, 16), get_multiplier("kulkarni_8s"), engine="factored")
        assert [(each.engine, each.products) for each in found.candidates] == [("factored", 2)]
        assert found.candidates[0].predicted == pytest.approx(5.0)
        with pytest.raises(EngineError, match="no factorisation of at most 64 terms"):
            explain(self.conv, (2, 64, 16, 16), get_multiplier("mitchell_8u"), engine="factored")
        with use_engine("truncated", rank=3):
            assert "approximate: table ≈ a·w + Σ f[a]·g[w] of 3 terms" in str(
                explain(self.conv, (2, 64, 16, 16), get_multiplier("mitchell_8u"))
            )

    def test_measures_if_asked_to(self, cheap_products):
        for args, shape in (
            (Conv2dArgs(32, 32, 3), (1, 32, 24, 24)),
            (Conv2dArgs(512, 512, 3, groups=512), (2, 512, 32, 32)),
        ):
            found = explain(args, shape, get_multiplier("exact_8s"), measure=True)
            assert {each.engine for each in found.candidates} == {"factored", "cpu"}
            assert min(each.measured for each in found.candidates) > 0

    def test_layers(self, cheap_products):
        conv = ApproxConv2d(64, 64, 3, padding="same", multiplier="kulkarni_8s")
        assert explain(conv, (2, 64, 16, 16)).engine == "factored"
        assert explain(conv, (64, 16, 16)).macs == 256 * 64 * 576
        assert explain(conv, (2, 64, 16, 16), engine="reference").reason == "asked for by name"
        linear = ApproxLinear(7, 3, multiplier="mitchell_8u_8s", engine="reference")
        assert explain(linear, (5, 7)).engine == "reference"
        linear.engine = "auto"
        assert "too few multiplications" in explain(linear, (7,)).reason
        with use_engine("reference"):
            assert explain(linear, (5, 7)).engine == "reference"

    @pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 1)])
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
    def test_layers_have_the_shapes_that_their_op_sees(self, padding, padding_mode, monkeypatch):
        layer = ApproxConv2d(4, 6, (2, 3), padding=padding, padding_mode=padding_mode, multiplier="exact_8s")
        layer.calibrated.fill_(True)
        seen = []
        lookup = layer._lookup
        layer._lookup = lambda x, w, *others: seen.append((x.shape, w.shape)) or lookup(x, w, *others)
        layer(torch.randn(2, 4, 8, 9))
        x, w, _ = layer.operand_shapes((2, 4, 8, 9))
        assert seen == [(x, w)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.nn.Conv2d(3, 4, 1), (1, 3, 4, 4)), "target must be"),
            ((conv, (1, 64, 4, 4)), "multiplier must be a Multiplier"),
            ((conv, (1, 63, 4, 4), get_multiplier("exact_8s")), r"shape must be \(B, 64, H, W\)"),
            ((conv, (-1, 64, 4, 4), get_multiplier("exact_8s")), "shape must be a sequence of ints of at least 0"),
            ((conv, (1, 64, 4.0, 4), get_multiplier("exact_8s")), "shape must be a sequence of ints of at least 0"),
            ((conv, None, get_multiplier("exact_8s")), "shape must be a sequence of ints of at least 0, got None"),
            ((ApproxLinear(7, 3, multiplier="exact_8s"), (5, 6)), r"shape must be \(..., 7\)"),
            ((ApproxConv2d(7, 3, 1, multiplier="exact_8s"), (5, 6)), r"shape must be \(B, 7, H, W\)"),
            ((ApproxLinear(7, 3, multiplier="exact_8s"), (5, 7), get_multiplier("exact_8s")), "must be left out"),
            ((ApproxLinear(7, 3, multiplier="exact_8s", mode="float"), (5, 7)), "looks nothing up"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            explain(*arguments)
