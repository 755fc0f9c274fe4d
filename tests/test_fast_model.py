"""The fast models against gather and sum, bit for bit, and what they do to the switches of the process."""

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from approxconv import Multiplier, factorize, get_multiplier
from approxconv.fast_model import _DIRECT, FastModel
from approxconv.geometry import pair
from approxconv.operators import FastApproxConv2dOp, FastApproxGeMMOp
from approxconv.operators.conv2d import round_once

OPS = torch.ops.approxconv
MULTIPLIERS = {
    "exact": lambda _: get_multiplier("exact_8u_8s"),
    "drum": lambda _: get_multiplier("drum4_8u_8s"),
    "drum_signed": lambda _: get_multiplier("drum4_8s"),
    "drum_with_offsets": lambda _: get_multiplier("drum4_8u"),
    "truncation": lambda _: get_multiplier("trunc2_8s"),
    "kulkarni": lambda _: get_multiplier("kulkarni_8u"),
    "broken_array": lambda _: get_multiplier("bam_h2_v6_8u"),
    "hostile": lambda low_rank: low_rank(3),
    "hostile_narrow": lambda low_rank: low_rank(2, (3, 5), (True, False)),
    "hostile_no_product": lambda low_rank: low_rank(4, (8, 4), (True, True), scale=0),
    "sums_only": lambda _: sums_only(),
    "constant": lambda _: Multiplier(np.full((8, 16), -77), a_signed=True, w_signed=False),
    "zero": lambda _: Multiplier(np.zeros((8, 16), int), a_signed=False, w_signed=True),
}
every = pytest.mark.parametrize("name", MULTIPLIERS)
# name: (x's shape, w's shape, kwargs)
CONVOLUTIONS = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), {}),
    "padded": ((1, 3, 5, 9), (5, 3, 3, 2), {"padding": (2, 1)}),
    "not_square": ((2, 4, 9, 7), (3, 4, 3, 2), {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}),
    "groups": ((2, 6, 6, 5), (4, 3, 3, 1), {"stride": (1, 2), "padding": (1, 0), "dilation": 2, "groups": 2}),
    "depthwise_twice": ((2, 3, 5, 8), (6, 1, 2, 3), {"padding": 1, "groups": 3}),
    "mostly_padding": ((2, 2, 2, 1), (3, 2, 3, 4), {"stride": (2, 3), "padding": (4, 3)}),
    "pointwise": ((1, 7, 3, 2), (5, 7, 1, 1), {}),
    "one": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "nnpack_would": ((16, 3, 12, 12), (4, 3, 3, 3), {"padding": 1}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))


def sums_only():
    """Every term is constant on one side, and f(0), g(0) are not 0."""
    rng = np.random.default_rng(3)
    return Multiplier(
        rng.integers(-99, 100, (256, 1)) + rng.integers(-99, 100, (1, 256)), a_signed=False, w_signed=True
    )


def draw(shape, limits, dtype=torch.float32, seed=0):
    return torch.randint(
        limits[0], limits[1] + 1, shape, generator=torch.Generator().manual_seed(seed + len(shape))
    ).to(dtype)


def operands(m, x_shape, w_shape, dtype=torch.float32):
    return draw(x_shape, m.a_range, dtype), draw(w_shape, m.w_range, dtype, 7)


def as_codes(values):
    return values.long().bitwise_and(0xFF).to(torch.uint8)


def gathered(m, x, w):
    """The oracle, int32."""
    return OPS.lut_matmul(as_codes(x).view(-1, x.shape[-1]), as_codes(w), m.table, engine="reference").view(
        *x.shape[:-1], len(w)
    )


def gathered_conv(m, x, w, stride=1, padding=0, dilation=1, groups=1):
    return OPS.lut_conv2d(
        as_codes(x), as_codes(w), m.table, *(pair("", n, 0) for n in (stride, padding, dilation)), groups, 0,
        engine="reference",
    )  # fmt: skip


class Spy:
    """An op that notes what it is called with, and on which precision."""

    def __init__(self, op):
        self.op, self.calls = op, []

    def __call__(self, x, w, **kwargs):
        self.calls.append((x, w, kwargs))
        return self.op(x, w, **kwargs)


# Sums


@every
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_the_oracle(name, case, low_rank):
    m, (x_shape, w_shape, kwargs) = MULTIPLIERS[name](low_rank), CONVOLUTIONS[case]
    x, w = operands(m, x_shape, w_shape)
    y = FastApproxConv2dOp.apply(x, w, m.fast_model(), kwargs)
    assert y.dtype == x.dtype
    expected = gathered_conv(m, x, w, **kwargs)
    assert y.shape == expected.shape
    assert torch.equal(y.int(), expected)


@every
@pytest.mark.parametrize("x_shape", [(7,), (1,), (5, 19), (2, 3, 7), (2, 1, 3, 2, 8)])
def test_products_equal_the_oracle(name, x_shape, low_rank):
    m = MULTIPLIERS[name](low_rank)
    x, w = operands(m, x_shape, (4, x_shape[-1]))
    y = FastApproxGeMMOp.apply(x, w, m.fast_model())
    assert torch.equal(y.int(), gathered(m, x, w))


@pytest.mark.slow
def test_every_reference_table_of_low_rank(reference_multipliers):
    for m in reference_multipliers.values():
        if factorize(m) is None:
            continue
        x, w = operands(m, (2, 4, 6, 5), (6, 2, 3, 3))
        kwargs = {"padding": 2, "groups": 2}
        assert torch.equal(m.fast_model()(F.conv2d, x, w, kwargs).int(), gathered_conv(m, x, w, **kwargs))
        assert torch.equal(m.fast_model()(F.linear, x, w[0, 0, :, [0, 1, 2, 0, 1]], {}).int(),
                           gathered(m, x, w[0, 0, :, [0, 1, 2, 0, 1]]))  # fmt: skip


def test_adversarial_operands(low_rank):
    for name, m in ((name, make(low_rank)) for name, make in MULTIPLIERS.items()):
        model = m.fast_model()
        for a, w in itertools.product(m.a_range, m.w_range):
            x, w = torch.full((3, 200), float(a)), torch.full((2, 200), float(w))
            assert torch.equal(model(F.linear, x, w, {}).int(), gathered(m, x, w)), (name, a, w)


@every
def test_float64_where_sums_may_pass_2_to_the_24(name, low_rank):
    """The result is odd or nearly so: float32 does not hold it."""
    m = MULTIPLIERS[name](low_rank)
    entry = torch.tensor(np.unravel_index(int(m.table.abs().argmax()), m.table.shape))
    a, w = (values[code] for values, code in zip(m.operand_values(), entry, strict=True))
    x, w = torch.full((2, 9001), float(a), dtype=torch.float64), torch.full((1, 9001), float(w), dtype=torch.float64)
    x[1, ::2] = 0
    spy = Spy(F.linear)
    y = m.fast_model()(spy, x, w, {})
    assert torch.equal(y.int(), gathered(m, x, w))
    bound = factorize(m).certificate(as_codes(w)).bound
    assert {each.dtype for call in spy.calls for each in call[:2]} <= {
        torch.float32 if bound < 2**24 else torch.float64
    }


@pytest.mark.parametrize("wide", [False, True])
def test_the_certificate_of_these_weights_decides(wide, low_rank):
    m = low_rank(3)
    factors = factorize(m)
    bounds = torch.stack([factors.certificate(torch.full((1, 1), c, dtype=torch.uint8)).bounds[0] for c in range(256)])
    code = int(bounds.argmax())
    depth = -(-(2**24) // int(bounds[code])) - 1 + wide
    w = torch.full((1, depth), float(m.operand_values()[1][code]))
    spy = Spy(F.linear)
    x = draw((3, depth), m.a_range, torch.float64)
    assert torch.equal(m.fast_model()(spy, x, w, {}).int(), gathered(m, x, w))
    assert spy.calls[0][0].dtype == (torch.float64 if wide else torch.float32)
    w.zero_()  # small weights: the same depth stays in float32
    spy = Spy(F.linear)
    m.fast_model()(spy, x, w, {})
    assert spy.calls[0][0].dtype == torch.float32


def test_all_255_by_all_minus_128():
    m = get_multiplier("exact_8u_8s")
    x, w = torch.full((1, 40, 5, 5), 255.0), torch.full((2, 40, 5, 5), -128.0)
    w[1, 0, 0, 0] = -127
    for dtype in (torch.float32, torch.float64):
        y = m.fast_model()(F.conv2d, x.to(dtype), w.to(dtype), {"padding": 1})
        assert torch.equal(y, gathered_conv(m, x, w, padding=1).to(dtype))


def test_beyond_int32():
    """Where the ops refuse, as their int32 could wrap."""
    m = Multiplier(np.full((4, 4), 2**19) + np.arange(4), a_signed=False, w_signed=False)
    x, w = torch.zeros(1, 5001, dtype=torch.float64), torch.full((1, 5001), 3.0)
    w[0, 0] = 2
    assert m.fast_model()(F.linear, x, w, {}).item() == 5001 * (2**19 + 3) - 1


@pytest.mark.parametrize("limit", [2**53, 2**20, 2**18])
def test_sums_beyond_float64_are_put_together_from_digits(limit, low_rank, monkeypatch):
    """They take more weights than fit here: at a lower limit."""
    m = low_rank(3)
    x, w = operands(m, (2, 4, 6, 5), (6, 2, 3, 3))
    monkeypatch.setattr(FastModel, "exact_below", limit)
    kwargs, spy = {"padding": 2, "groups": 2}, Spy(F.conv2d)
    expected = gathered_conv(m, x, w, **kwargs)
    assert torch.equal(m.fast_model()(spy, x, w, kwargs).int(), expected)
    assert torch.equal(m.fast_model().sums(F.conv2d, x, w, kwargs), expected.long())
    assert (len(spy.calls) > 1) == (limit < 2**20)
    largest = [F.conv2d(x.double().abs(), w.double().abs(), **kwargs).max() for x, w, kwargs in spy.calls]
    assert max(largest) < limit


def test_bounds_beyond_int64_are_refused(low_rank):
    """Of a bound made up."""
    model = low_rank(1).fast_model()
    model._vectors["largest"] = torch.full((256, 1), 2.0**62)
    model._largest = 2.0**62
    with pytest.raises(ValueError, match=r"sums must be below 2\*\*63"):
        model(F.linear, torch.zeros(1, 2), torch.zeros(1, 2), {})


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.bfloat16, torch.float64], ids=str
)
def test_sums_of_operands_of_any_dtype(dtype, low_rank):
    m = low_rank(2)
    x, w = torch.tensor([[0, 1, 100, 200, 255]]).to(dtype), torch.tensor([[7, 1, -1, -100, 127]]).to(dtype)
    y = m.fast_model().sums(F.linear, x, w, {})
    assert y.dtype == torch.int64
    assert torch.equal(y, gathered(m, x.double().clamp(*m.a_range), w.double().clamp(*m.w_range)).long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rounded_once(dtype):
    """To nearest, ties to even, as integers say: at, near and far from halfway."""
    digits, largest = {torch.float16: (11, 2**16), torch.bfloat16: (8, 2**52), torch.float32: (24, 2**52)}.get(
        dtype, (53, 2**52)
    )
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(1, largest, (4000,), generator=generator).double() * torch.rand(4000, generator=generator)
    y = y.floor().add(1)
    step = torch.exp2(torch.floor(torch.log2(y)) + 1 - digits).clamp(min=1)
    ties = (y / step).floor() * step + step / 2
    y = torch.cat([y, *(ties + n for n in (-1, 0, 1))]).floor()
    y = torch.cat([y, -y])
    mantissa, exponent = np.frexp(y.numpy())
    nearest = np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)
    for integers in (y, y.long()):
        assert torch.equal(round_once(integers, dtype), torch.from_numpy(nearest).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [19, 1200])
def test_half_operands(dtype, depth, low_rank):
    """bfloat16 holds every code; the sums are rounded once."""
    m = low_rank(2)
    x, w = operands(m, (3, depth), (2, depth), dtype)
    y = FastApproxGeMMOp.apply(x, w, m.fast_model())
    assert y.dtype == dtype
    assert torch.equal(y, round_once(gathered(m, x, w).double(), dtype))


def test_operands_are_rounded_and_saturated():
    m = get_multiplier("drum4_8u_8s")
    x, w = torch.randn(5, 30) * 200 + 100, torch.randn(4, 30) * 100
    expected = gathered(m, x.round().clamp(0, 255), w.round().clamp(-128, 127))
    assert torch.equal(m.fast_model()(F.linear, x, w, {}).int(), expected)


@pytest.mark.parametrize("form", ["channels_last", "transposed", "strided", "expanded"])
def test_any_memory_format(form, low_rank):
    m = low_rank(3)
    x, w = operands(m, (4, 6, 8, 8), (4, 3, 3, 3))
    if form == "channels_last":
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    elif form == "transposed":
        x, w = x.transpose(2, 3), w.transpose(0, 1)[:3].contiguous().transpose(0, 1)
    elif form == "strided":
        x, w = x[:, :, ::2, 1::2], w.flip(0)[::2]
    else:
        x, w = x[:, :1].expand(4, 6, 8, 8), w[:1].expand(4, 3, 3, 3)
    kwargs = {"padding": 1, "groups": 2}
    y = m.fast_model()(F.conv2d, x, w, kwargs)
    assert torch.equal(y.int(), gathered_conv(m, x.contiguous(), w.contiguous(), **kwargs))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1), (4, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1), (1, 3)])
def test_padding_by_name(kernel, dilation):
    """Of the exact product they are torch's own."""
    m = get_multiplier("exact_8u_8s")
    x, w = operands(m, (2, 3, 9, 10), (4, 3, *kernel))
    for padding in ("same", "valid"):
        kwargs = {"padding": padding, "dilation": dilation}
        assert torch.equal(m.fast_model()(F.conv2d, x, w, kwargs), F.conv2d(x.double(), w.double(), **kwargs).float())


def test_same_padding_goes_through_the_multiplier(low_rank):
    m = low_rank(3)
    x, w = operands(m, (2, 3, 6, 5), (4, 3, 3, 3))
    y = m.fast_model()(F.conv2d, x, w, {"padding": "same"})
    assert torch.equal(y.int(), gathered_conv(m, x, w, padding=1))


@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [((0, 3, 5, 5), (2, 3, 3, 3)), ((2, 3, 5, 5), (0, 3, 3, 3)), ((2, 0, 5, 5), (2, 0, 3, 3)), ((0, 7), (3, 7)),
     ((3, 7), (0, 7)), ((3, 0), (2, 0)), ((2, 0, 4), (3, 4))],
)  # fmt: skip
def test_nothing(x_shape, w_shape, low_rank):
    y = low_rank(2).fast_model()(
        F.linear if len(w_shape) == 2 else F.conv2d, torch.ones(x_shape), torch.ones(w_shape), {}
    )
    expected = (*x_shape[:-1], w_shape[0]) if len(w_shape) == 2 else (x_shape[0], w_shape[0], 3, 3)
    assert y.shape == expected
    assert not y.any()


def test_the_table_at_the_time(low_rank):
    m = Multiplier(low_rank(2).table, a_signed=False, w_signed=True)
    x, w = operands(m, (2, 5), (3, 5))
    before, model = gathered(m, x, w), m.fast_model()
    m.table.add_(1)
    assert torch.equal(model(F.linear, x, w, {}).int(), before)
    assert torch.equal(m.fast_model()(F.linear, x, w, {}).int(), before + 5)


# Products


def test_one_call_for_all_terms_and_none_for_constant_ones():
    for m, terms in ((get_multiplier("bam_h2_v6_8u"), 6), (get_multiplier("drum4_8u"), 1), (sums_only(), 0)):
        assert factorize(m).products == terms
        for op, x_shape, w_shape in ((F.conv2d, (2, 4, 6, 6), (3, 4, 3, 3)), (F.linear, (5, 9), (3, 9))):
            spy = Spy(op)
            m.fast_model()(spy, *operands(m, x_shape, w_shape), {})
            wide = [x for x, _, _ in spy.calls if x.dtype == torch.float32]
            assert len(wide) == min(terms, 1)
            dim = 1 if op is F.conv2d else -1
            assert all(x.shape[dim] == terms * x_shape[dim] for x in wide)


def test_chunks_of_terms_and_samples(monkeypatch):
    """float32 features of a padded sample and a copy take 2 KiB a term."""
    m = get_multiplier("bam_h2_v6_8u")
    x, w = operands(m, (2, 4, 6, 6), (3, 2, 3, 3))
    kwargs, w = {"padding": 1, "groups": 2}, torch.cat([w, w])
    for kibibytes, calls in ((24, [(2, 24)]), (12, [(1, 24)] * 2), (4, [(1, 8)] * 6), (0, [(1, 4)] * 12)):
        monkeypatch.setattr(FastModel, "scratch", 1024 * kibibytes)
        spy = Spy(F.conv2d)
        assert torch.equal(m.fast_model()(spy, x, w, kwargs).int(), gathered_conv(m, x, w, **kwargs))
        assert [tuple(a.shape[:2]) for a, _, _ in spy.calls] == calls


# The process's switches


def nnpack():
    return torch._C._get_nnpack_enabled()


@pytest.fixture(params=[True, False])
def nnpack_before(request):
    (before,) = torch.backends.nnpack.set_flags(request.param)
    yield request.param
    torch.backends.nnpack.set_flags(before)


def test_nnpack_is_off_inside_and_as_before_after(nnpack_before, low_rank):
    m = low_rank(2)
    x, w = operands(m, (16, 3, 12, 12), (4, 3, 3, 3))
    seen = []

    def op(*args, **kwargs):
        seen.append(nnpack())
        return F.conv2d(*args, **kwargs)

    m.fast_model()(op, x, w, {})
    assert seen
    assert not any(seen)
    assert nnpack() == nnpack_before

    def failing(*args, **kwargs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        m.fast_model()(failing, x, w, {})
    assert nnpack() == nnpack_before


def test_of_several_threads_the_last_one_restores(nnpack_before, low_rank):
    m = low_rank(2)
    model, (x, w) = m.fast_model(), operands(m, (2, 3, 6, 6), (4, 3, 3, 3))
    inside, first_left, seen = threading.Barrier(2), threading.Event(), []

    def first(*args, **kwargs):
        inside.wait(60)
        raise RuntimeError("leaves first")

    def second(*args, **kwargs):
        inside.wait(60)
        first_left.wait(60)
        seen.append(nnpack())
        return F.conv2d(*args, **kwargs)

    def run_first():
        try:
            with pytest.raises(RuntimeError, match="leaves first"):
                model(first, x, w, {})
        finally:
            first_left.set()

    threads = [threading.Thread(target=run_first), threading.Thread(target=lambda: model(second, x, w, {}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False]
    assert nnpack() == nnpack_before


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_its_switches_back(nnpack_before):
    with _DIRECT["cpu"].inside():
        child = os.fork()
        if child == 0:
            os._exit(0 if nnpack() == nnpack_before else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not nnpack()
    assert nnpack() == nnpack_before


def test_cudnn_is_off_inside():
    before = torch.backends.cudnn.enabled
    with _DIRECT["cuda"].inside():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before


MODES = """
import torch, approxconv
from torch.nn import functional as F
{modes}
def flags():
    seen = [torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled, torch._C._get_nnpack_enabled()]
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        *(lambda b=b, o=o: getattr(getattr(torch.backends, b), o).fp32_precision
          for b, o in (("mkldnn", "conv"), ("mkldnn", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"))),
    ):
        try:
            seen.append(read())
        except (RuntimeError, AttributeError) as error:  # of mixed old and new flags
            seen.append(type(error))
    return seen
before = flags()
m = approxconv.get_multiplier("drum4_8u_8s")
g = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (16, 64, 9, 9), generator=g).float()
w = torch.randint(-9, 10, (8, 64, 3, 3), generator=g).float()
model = m.fast_model()
y, z = model(F.conv2d, x, w, {{"padding": 1}}), model(F.linear, x.flatten(2), w.view(-1, 9).repeat(1, 9), {{}})
assert model._arithmetic(w.byte()) == torch.float32
with torch.autocast("cpu", torch.bfloat16):
    assert torch.equal(model(F.conv2d, x, w, {{"padding": 1}}), y)
    assert torch.equal(model(F.linear, x.flatten(2), w.view(-1, 9).repeat(1, 9), {{}}), z)
    assert torch.is_autocast_enabled("cpu")
assert flags() == before, (flags(), before)
ops, codes = torch.ops.approxconv, lambda t: t.long().bitwise_and(255).to(torch.uint8)
assert torch.equal(y.int(), ops.lut_conv2d(codes(x), codes(w), m.table, [1], [1], [1], 1, 0, engine="reference"))
w = codes(w).view(-1, 9).repeat(1, 9)
assert torch.equal(z.int(), ops.lut_matmul(codes(x).flatten(2), w, m.table, engine="reference"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "modes",
    [
        "torch.set_float32_matmul_precision('medium')\ntorch.backends.cudnn.allow_tf32 = False",
        "torch.backends.mkldnn.conv.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\ntorch.backends.cudnn.rnn.fp32_precision = 'tf32'",
    ],
    ids=["by_precision", "by_operator"],
)
def test_modes_of_float32_change_nothing_and_are_left_alone(modes):
    if "fp32_precision" in modes and not hasattr(torch.backends.mkldnn, "conv"):
        pytest.skip("needs a torch that has fp32_precision by operator")
    result = subprocess.run(
        [sys.executable, "-W", "error:::approxconv", "-c", MODES.format(modes=modes)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# Training


def test_a_training_step(low_rank):
    """Forward is the multiplier's, backward that of the exact products of the same operands."""
    m = low_rank(3)
    x, w = operands(m, (2, 3, 7, 7), (4, 3, 3, 3), torch.float64)
    v = draw((5, 4), m.w_range, torch.float64)
    model, parameters = m.fast_model(), [w.requires_grad_(), v.requires_grad_()]

    def step(conv, linear):
        hidden = conv(x, w).amax((2, 3)) * 2**-9
        y = linear(hidden, v)
        (y * torch.arange(10.0).view(2, 5)).sum().backward()
        grads = [p.grad for p in parameters]
        w.grad = v.grad = None
        return y.detach(), hidden.detach(), grads

    y, hidden, grads = step(
        lambda x, w: FastApproxConv2dOp.apply(x, w, model, {"padding": 1}),
        lambda x, v: FastApproxGeMMOp.apply(x, v, model),
    )
    assert torch.equal(hidden, gathered_conv(m, x, w.detach(), padding=1).amax((2, 3)) * 2**-9)
    assert torch.equal(y.int(), gathered(m, hidden.round().clamp(*m.a_range), v.detach()))

    exact_conv = F.conv2d(x, w, padding=1)
    forward = gathered_conv(m, x, w.detach(), padding=1)

    def straight_through(x, w):
        return exact_conv + (forward - exact_conv).detach()

    *_, expected = step(straight_through, F.linear)
    assert all(g.any() for g in grads)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    w.grad, v.grad = grads
    before = w.detach().clone()
    optimizer.step()
    assert torch.equal(w, before.add(grads[0], alpha=-0.1))


def test_no_gradient_of_its_own(low_rank):
    m = low_rank(1)
    x, w = (t.requires_grad_() for t in operands(m, (2, 5), (3, 5)))
    assert not m.fast_model()(F.linear, x, w, {}).requires_grad
    with torch.inference_mode():
        model = m.fast_model()
        first = model(F.linear, x, w, {})
    assert torch.equal(model(F.linear, x, w, {}), first)


# GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_on_a_gpu(precision, low_rank):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for name, (case, (x_shape, w_shape, kwargs)) in itertools.product(MULTIPLIERS, CONVOLUTIONS.items()):
            m = MULTIPLIERS[name](low_rank)
            x, w = operands(m, x_shape, w_shape)
            y = m.fast_model()(F.conv2d, x.cuda(), w.cuda(), kwargs)
            assert torch.equal(y.cpu().int(), gathered_conv(m, x, w, **kwargs)), (name, case)
            x, w = operands(m, (64, 517), (33, 517))
            assert torch.equal(m.fast_model()(F.linear, x.cuda(), w.cuda(), {}).cpu().int(), gathered(m, x, w)), name
    finally:
        torch.set_float32_matmul_precision(before)


# Refusals


def test_without_a_factorisation():
    with pytest.raises(ValueError, match=r"'mitchell_8u'.* has no factorisation .* ApproxConv2dOp .* 'truncated'"):
        get_multiplier("mitchell_8u").fast_model()


ONES = torch.ones(2, 4, 5, 5), torch.ones(3, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "message"),
    [
        (ONES[0].byte(), ONES[1], {}, "x must be a floating tensor, got torch.uint8"),
        (ONES[0], ONES[1].int(), {}, "w must be a floating tensor, got torch.int32"),
        ([1.0], ONES[1], {}, "x must be a floating tensor, got list"),
        (ONES[0], ONES[1].to("meta"), {}, "x and w must be on one device, got cpu and meta"),
        (ONES[0], ONES[1], {"bias": None}, r"kwargs must hold only stride, .*, got 'bias'"),
        (ONES[0], ONES[1][:, 1:], {}, "groups must divide"),
        (ONES[0], ONES[1], {"groups": 2}, "groups must divide"),
        (ONES[0], ONES[1], {"groups": 1.0}, "groups must divide"),
        (ONES[0], ONES[1], {"stride": 0}, "stride must be"),
        (ONES[0], ONES[1], {"padding": -1}, "padding must be"),
        (ONES[0], ONES[1], {"padding": "full"}, "padding must be numbers, 'valid', or 'same'"),
        (ONES[0], ONES[1], {"padding": "same", "stride": 2}, r"'same' with stride 1, got 'same', stride \(2, 2\)"),
        (ONES[0], ONES[1], {"dilation": 3}, "larger than the input"),
        (ONES[0][0], ONES[1], {}, r"x must be \(B, C, H, W\)"),
        (ONES[0], ONES[1][0], {}, r"x must be \(B, C, H, W\)"),
        (ONES[0], torch.ones(3, 4), {}, r"x must be \(..., K\)"),
        (torch.ones(2, 4), torch.ones(3, 4), {"stride": 1}, "kwargs must be empty"),
    ],
)
def test_refused(x, w, kwargs, message):
    model = get_multiplier("exact_8u_8s").fast_model()
    with pytest.raises(ValueError, match=message):
        model(F.conv2d if w.ndim == 4 else F.linear, x, w, kwargs)


@pytest.mark.parametrize("name", ["x", "w"])
def test_sums_refuse_complex_operands(name):
    operands = {"x": torch.ones(2, 3), "w": torch.ones(2, 3)} | {name: torch.ones(2, 3, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=f"{name} must be real, got torch.complex64"):
        get_multiplier("exact_8u").fast_model().sums(F.linear, **operands, kwargs={})


def test_representation():
    assert repr(get_multiplier("bam_h2_v6_8u").fast_model()) == "FastModel('bam_h2_v6_8u', products=6)"
