"""The convolution Functions: forward against gather-and-sum, backward against autograd through `F.conv2d`."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from approxconv import Multiplier
from approxconv.operators import ApproxConv2dOp, ApproxDWConv2dOp, Conv2dArgs, FastApproxConv2dOp
from approxconv.operators.conv2d import _conv_bwd_ste

# name: (Conv2dArgs' arguments, (B, H, W)). "ints" has x and w of one shape.
CONVOLUTIONS = {
    "ints": (dict(in_channels=4, out_channels=4, kernel_size=3, padding=2, stride=2), (4, 3, 3)),
    "not_square": (
        dict(in_channels=3, out_channels=5, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)),
        (2, 9, 7),
    ),
    "stride_past_the_end": (dict(in_channels=2, out_channels=3, kernel_size=(2, 3), stride=(3, 4)), (1, 9, 9)),
    "groups": (
        dict(in_channels=6, out_channels=4, kernel_size=(3, 1), stride=(1, 2), padding=(1, 0), dilation=2, groups=2),
        (2, 6, 5),
    ),
    "mostly_padding": (
        dict(in_channels=2, out_channels=3, kernel_size=(3, 4), stride=(2, 3), padding=(4, 3)),
        (2, 2, 1),
    ),
    "pointwise": (dict(in_channels=7, out_channels=5, kernel_size=1), (1, 3, 2)),
    "depthwise": (dict(in_channels=3, out_channels=3, kernel_size=(3, 2), padding=(2, 1), groups=3), (2, 5, 4)),
    "depthwise_twice": (
        dict(in_channels=3, out_channels=6, kernel_size=(2, 3), stride=(1, 2), padding=(1, 0), groups=3),
        (2, 5, 8),
    ),
    "depthwise_dilated": (
        dict(
            in_channels=2, out_channels=6, kernel_size=(3, 1), stride=(2, 1), padding=(2, 1), dilation=(2, 5), groups=2
        ),
        (1, 8, 3),
    ),
    "one_channel": (dict(in_channels=1, out_channels=3, kernel_size=(1, 5), padding=(0, 2), stride=(2, 1)), (2, 3, 4)),
}
DEPTHWISE = [
    name for name, (arguments, _) in CONVOLUTIONS.items() if arguments.get("groups", 1) == arguments["in_channels"]
]
CASES = [*(("conv", name) for name in CONVOLUTIONS), *(("dw", name) for name in DEPTHWISE)]
every_case = pytest.mark.parametrize(("kind", "name"), CASES, ids=map("-".join, CASES))
some_cases = pytest.mark.parametrize(
    ("kind", "name"), [("conv", "not_square"), ("conv", "groups"), ("dw", "depthwise_twice")]
)
every_kind = pytest.mark.parametrize(("kind", "name"), [("conv", "one_channel"), ("dw", "depthwise_twice")])
SIGNS = list(itertools.product([False, True], repeat=2))
signedness = pytest.mark.parametrize(("a_signed", "w_signed"), SIGNS, ids=["u×u", "u×s", "s×u", "s×s"])
INT8 = (-128, 127)
LIMITS = {torch.uint8: (0, 255), torch.int8: INT8}


def limits(bits, signed):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def geometry(name):
    """Keywords of F.conv2d, all pairs."""
    arguments = CONVOLUTIONS[name][0]
    conf = {k: arguments.get(k, default) for k, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    return {k: (v, v) if isinstance(v, int) else v for k, v in conf.items()} | {"groups": arguments.get("groups", 1)}


def make(name, dtype=torch.float64, spread=90, seed=0):
    """x and w that are no integers and leave 8 bits at both ends."""
    arguments, (batch, *size) = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(seed)
    kernel = arguments["kernel_size"]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    w_shape = arguments["out_channels"], arguments["in_channels"] // arguments.get("groups", 1), *kernel
    x = torch.randn(batch, arguments["in_channels"], *size, generator=generator, dtype=torch.float64) * spread + 20
    w = torch.randn(w_shape, generator=generator, dtype=torch.float64) * spread + 10
    return x.to(dtype), w.to(dtype)


def integers(name, x_dtype, w_dtype):
    """x and w over the whole range of uint8 or int8."""
    x, w = make(name, spread=150)
    return x.round().clamp(*LIMITS[x_dtype]).to(x_dtype), w.round().clamp(*LIMITS[w_dtype]).to(w_dtype)


def size_of(name, x, w):
    return tuple(F.conv2d(x.to("meta").float(), w.to("meta").float(), **geometry(name)).shape[2:])


def apply(kind, name, x, w, lut):
    arguments = Conv2dArgs(**CONVOLUTIONS[name][0])
    if kind == "dw":
        return ApproxDWConv2dOp.apply(x, w, lut, arguments.backward_args())
    return ApproxConv2dOp.apply(x, w, arguments, size_of(name, x, w), lut)


def convolution(x, w, stride, padding, dilation, groups):
    """Unfold and multiply in int64."""
    x, w = x.double(), w.long()
    size = F.conv2d(x, w.double(), None, stride, padding, dilation, groups).shape[2:]
    columns = F.unfold(x, w.shape[2:], dilation, padding, stride).long().unflatten(1, (groups, -1))
    return (w.view(groups, len(w) // groups, -1) @ columns).flatten(1, 2).unflatten(-1, size)


def exact_gradients(name, x, w, seed=0):
    """Autograd's, through F.conv2d in float64, and the gradient of the result they belong to."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y = F.conv2d(x, w, **geometry(name))
    grad = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(seed)).double()
    return grad, *torch.autograd.grad(y, (x, w), grad)


# Conv2dArgs


def test_arguments_take_ints_or_pairs():
    ints = Conv2dArgs(4, 6, 3, stride=2, padding=1, dilation=3, groups=2)
    pairs = Conv2dArgs(4, 6, (3, 3), (2, 2), (1, 1), (3, 3), 2)
    mixed = Conv2dArgs(4, 6, (3, 3), 2, (1, 1), (3, 3), 2)
    different = Conv2dArgs(4, 6, (3, 2), (2, 1), (1, 0), (3, 4), 2)
    x, w = torch.randn(2, 4, 11, 12), torch.randn(6, 2, 3, 3)
    for arguments in (ints, pairs, mixed, different):
        assert list(arguments.backward_args()) == ["stride", "padding", "dilation", "groups"]
    expected = F.conv2d(x, w, None, 2, 1, 3, 2)
    for arguments in (ints, pairs, mixed):
        assert torch.equal(F.conv2d(x, w, **arguments.backward_args()), expected)
    w = w[..., :2].contiguous()
    assert torch.equal(F.conv2d(x, w, **different.backward_args()), F.conv2d(x, w, None, (2, 1), (1, 0), (3, 4), 2))
    for arguments, defaults in ((Conv2dArgs(4, 6, (3, 2)), {}), (Conv2dArgs(4, 6, (3, 2), padding=1), {"padding": 1})):
        w = torch.randn(6, 4, 3, 2)
        assert torch.equal(F.conv2d(x, w, **arguments.backward_args()), F.conv2d(x, w, **defaults))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        *(({k: v}, k) for k in ("kernel_size", "stride", "dilation") for v in (0, -1, (0, 1), (1, 0), (1, 1, 1), ())),
        *(({"padding": v}, "padding") for v in (-1, (0, -1), (-1, 0), (0, 0, 0), "some")),
        *(({k: v}, k) for k in ("kernel_size", "stride", "padding", "dilation") for v in (1.5, (1, 1.5), None)),
        *(({"groups": v}, "groups") for v in (0, -1, 3, 4, 8, 2.0, "2", None, True, (2,))),
        *(({k: v}, k) for k in ("in_channels", "out_channels") for v in (0, -2, 4.0, "4", None, True, (4,))),
    ],
)
def test_arguments_that_no_convolution_has(wrong, named):
    with pytest.raises(ValueError, match=named):
        Conv2dArgs(**{"in_channels": 8, "out_channels": 6, "kernel_size": 3, **wrong})


def test_arguments_changed_later_are_checked_when_used():
    arguments = Conv2dArgs(4, 6, 3)
    arguments.groups = 2.0
    with pytest.raises(ValueError, match=r"groups must be an int of at least 1, got 2\.0"):
        arguments.backward_args()


# Forward


@every_case
@pytest.mark.parametrize("bits", [(8, 8), (4, 6), (6, 4), (8, 3)], ids=str)
def test_a_multiplier_reads_rounded_and_saturated_values(kind, name, bits, hostile, quantise, look_up_conv2d):
    for (a_signed, w_signed), dtype in itertools.product(SIGNS, (torch.float32, torch.float64)):
        multiplier = hostile(bits, a_signed, w_signed)
        x, w = make(name, dtype)
        xq, wq = quantise(x, limits(bits[0], a_signed)), quantise(w, limits(bits[1], w_signed))
        expected = look_up_conv2d(xq, wq, multiplier.table, **geometry(name), pad_code=0)
        y = apply(kind, name, x, w, multiplier)
        assert y.dtype == dtype
        assert torch.equal(y.long(), expected)
        assert (torch.cat([xq.flatten(), wq.flatten()]) - torch.cat([x.flatten(), w.flatten()]).round()).any()


OPERANDS = [torch.float64, torch.float32, torch.uint8, torch.int8]


@every_case
@pytest.mark.parametrize("lut", ["exact", "bare", "multiplier"])
def test_bytes_are_what_they_are_and_floats_are_int8(kind, name, lut, hostile, quantise, look_up_conv2d):
    for x_dtype, w_dtype in itertools.product(OPERANDS, OPERANDS):
        x, w = make(name, spread=150)
        x_limits, w_limits = LIMITS.get(x_dtype, INT8), LIMITS.get(w_dtype, INT8)
        xq, wq = quantise(x, x_limits), quantise(w, w_limits)
        x = x.to(x_dtype) if x_dtype.is_floating_point else xq.to(x_dtype)
        w = w.to(w_dtype) if w_dtype.is_floating_point else wq.to(w_dtype)
        if lut == "exact":
            expected, table = convolution(xq, wq, **geometry(name)), None
        else:
            multiplier = hostile(8, x_limits == INT8, w_limits == INT8)
            table = multiplier if lut == "multiplier" else multiplier.table
            expected = look_up_conv2d(xq, wq, multiplier.table, **geometry(name), pad_code=0)
        y = apply(kind, name, x, w, table)
        assert y.dtype == (x_dtype if x_dtype.is_floating_point else y.dtype)
        assert y.is_floating_point()
        assert torch.equal(y.long(), expected)


@some_cases
@pytest.mark.parametrize("bits", [(4, 6), (6, 4)], ids=str)
def test_bare_narrow_tables(kind, name, bits, hostile, quantise, look_up_conv2d):
    table = hostile(bits).table
    for (a_signed, w_signed), floats in itertools.product(SIGNS, (False, True)):
        if floats and not (a_signed and w_signed):
            continue
        xq, wq = (
            quantise(t, limits(n, signed))
            for t, n, signed in zip(make(name, spread=12), bits, (a_signed, w_signed), strict=True)
        )
        x = xq.to(torch.float64 if floats else torch.int8 if a_signed else torch.uint8)
        w = wq.to(torch.float64 if floats else torch.int8 if w_signed else torch.uint8)
        expected = look_up_conv2d(xq, wq, table, **geometry(name), pad_code=0)
        assert torch.equal(apply(kind, name, x, w, table).long(), expected)


@every_kind
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)], ids=str)
def test_bytes_beside_a_multiplier_of_another_format_saturate(kind, name, bits, hostile, quantise, look_up_conv2d):
    """200 beside a signed operand is 127, not -56."""
    for dtypes, signs in itertools.product(itertools.product(LIMITS, LIMITS), SIGNS):
        multiplier, (x, w) = hostile(bits, *signs), integers(name, *dtypes)
        xq, wq = (quantise(t, limits(n, signed)) for t, n, signed in zip((x, w), bits, signs, strict=True))
        expected = look_up_conv2d(xq, wq, multiplier.table, **geometry(name), pad_code=0)
        assert torch.equal(apply(kind, name, x, w, multiplier).long(), expected)


@pytest.mark.parametrize("kind", ["conv", "dw"])
@pytest.mark.parametrize(
    ("dtype", "ties"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_the_sum_is_rounded_once(kind, dtype, ties, near_ties, rounded):
    """One product a sum, so the result is the table; int32 → float32 → bfloat16 would round twice."""
    multiplier = near_ties(ties)
    x, w = torch.arange(256).to(dtype).view(-1, 1, 1, 1), torch.arange(-128, 128).to(dtype).view(-1, 1, 1, 1)
    if kind == "dw":
        y = ApproxDWConv2dOp.apply(x, w, multiplier, {})
    else:
        y = ApproxConv2dOp.apply(x, w, Conv2dArgs(1, 256, 1), (1, 1), multiplier)
    expected = rounded(multiplier.table.roll(128, 1), dtype)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert torch.equal(y.flatten(1), expected)


@some_cases
def test_a_bare_table_written_in_place_is_seen(kind, name, hostile):
    table = hostile().table.clone()
    x, w = make(name)
    before = apply(kind, name, x, w, table)
    table.neg_()
    assert torch.equal(apply(kind, name, x, w, table), -before)


def transposed(t):
    return t.mT.contiguous().mT


def strided(t):
    return torch.stack([t, t + 1], dim=-1)[..., 0]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


@some_cases
@pytest.mark.parametrize("layout", [transposed, strided, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_memory_layouts(kind, name, layout, dtype, hostile):
    """Of x, w and the gradient; results and gradients are those of contiguous tensors."""
    multiplier = hostile(8, True, True)

    def results(x, w, layout=lambda t: t):
        x, w = (t.detach().requires_grad_(t.is_floating_point()) for t in (x, w))
        y = apply(kind, name, x, w, multiplier)
        grad = torch.arange(y.numel(), dtype=torch.float64).view(y.shape) % 7 - 3
        wanted = [t for t in (x, w) if t.requires_grad]
        return y, *torch.autograd.grad(y, wanted, layout(grad))

    x, w = make(name)
    x = x.round().clamp(*INT8).to(dtype)
    expected = results(x, w)
    for got in (results(layout(x), w), results(x, layout(w)), results(layout(x), layout(w), layout)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_kind
def test_empty_batch(kind, name, hostile):
    x, w = (t.requires_grad_() for t in make(name))
    empty = x.detach()[:0].requires_grad_()
    y = apply(kind, name, empty, w, hostile())
    assert y.shape == (0, *apply(kind, name, x, w, hostile()).shape[1:])
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


# What does not fit


@pytest.mark.parametrize("name", ["not_square", "depthwise"])
def test_out_dims_are_checked(name, hostile):
    x, w = make(name)
    arguments = Conv2dArgs(**CONVOLUTIONS[name][0])
    height, width = size_of(name, x, w)
    assert height != width
    expected = ApproxConv2dOp.apply(x, w, arguments, (height, width), hostile())
    for same in ([height, width], torch.Size([height, width]), x.new_empty(height, width).shape):
        assert torch.equal(ApproxConv2dOp.apply(x, w, arguments, same, hostile()), expected)
    shapes = (width, height), (height + 1, width), (height, width - 1), (height,), (1, height, width), ()
    for wrong in (*shapes, None, height, "43"):
        with pytest.raises(ValueError, match="out_dims"):
            ApproxConv2dOp.apply(x, w, arguments, wrong, hostile())


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "named"),
    [
        ((2, 6, 5, 4), (4, 3, 3, 2), None),
        ((2, 6, 5, 4), (4, 3, 2, 3), "w"),
        ((2, 6, 5, 4), (4, 6, 3, 2), "w"),
        ((2, 6, 5, 4), (6, 3, 3, 2), "w"),
        ((2, 6, 5, 4), (3, 3, 2), "w"),
        ((2, 4, 5, 4), (4, 3, 3, 2), "x"),
        ((6, 5, 4), (4, 3, 3, 2), "x"),
        ((2, 6, 2, 4), (4, 3, 3, 2), "kernel"),
    ],
)
def test_operands_that_contradict_the_arguments(x_shape, w_shape, named, hostile):
    def call():
        arguments = Conv2dArgs(6, 4, (3, 2), groups=2)
        return ApproxConv2dOp.apply(torch.ones(x_shape), torch.ones(w_shape), arguments, (3, 3), hostile())

    if named is None:
        assert call().shape == (2, 4, 3, 3)
    else:
        with pytest.raises(ValueError, match=rf"\b{named}\b"):
            call()


def test_what_is_no_conv2d_args(hostile):
    x, w = make("pointwise")
    for wrong in ({}, None, {"in_channels": 7, "out_channels": 5, "kernel_size": 1}):
        with pytest.raises(ValueError, match=f"conv_args must be a Conv2dArgs, got {type(wrong).__name__}"):
            ApproxConv2dOp.apply(x, w, wrong, (3, 2), hostile())


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "kwargs", "named"),
    [
        ((2, 3, 5, 4), (6, 2, 3, 2), {}, "w"),
        ((2, 3, 5, 4), (4, 1, 3, 2), {}, "w"),
        ((2, 3, 5, 4), (6, 1, 3), {}, "w"),
        ((3, 5, 4), (3, 1, 3, 2), {}, "x"),
        ((2, 3, 5, 4), (6, 1, 6, 2), {}, "kernel"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"groups": 1}, "groups"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"groups": 2}, "groups"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"groups": 4.0}, "groups"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"groups": "4"}, "groups"),
        ((2, 4, 5, 4), (4, 1, 3, 2), None, "kwargs"),
        ((2, 4, 5, 4), (4, 1, 3, 2), [("stride", 1)], "kwargs"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"stride": (0, 1)}, "stride"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"padding": -1}, "padding"),
        ((2, 4, 5, 4), (4, 1, 3, 2), {"strides": 2}, "strides"),
    ],
)
def test_what_is_not_depthwise(x_shape, w_shape, kwargs, named, hostile):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        ApproxDWConv2dOp.apply(torch.ones(x_shape), torch.ones(w_shape), hostile(), kwargs)


@every_kind
def test_wrong_operands_and_tables_are_named(kind, name, hostile):
    x, w = make(name)
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        for lut in (hostile(), hostile().table, None):
            with pytest.raises(ValueError, match=r"\bx\b"):
                apply(kind, name, x.round().to(dtype), w, lut)
            with pytest.raises(ValueError, match=r"\bw\b"):
                apply(kind, name, x, w.round().to(dtype), lut)
    for lut in ("drum6_8u", 3, hostile().table.tolist(), hostile().table.numpy()):
        with pytest.raises(ValueError, match=r"\blut\b"):
            apply(kind, name, x, w, lut)
    for lut in (hostile().table[0], hostile().table[:, :96], hostile().table.double()):
        with pytest.raises(ValueError, match=r"\btable\b"):
            apply(kind, name, x, w, lut)
    with pytest.raises(ValueError, match=r"2\*\*31"):
        apply(kind, name, x, w, Multiplier(torch.full((8, 8), 2**30), a_signed=True, w_signed=True))


# Backward


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_straight_through_gradient_of_any_operands(name):
    """(grad_x, grad_w), also where the two have one shape; bytes are their values."""
    conf = Conv2dArgs(**CONVOLUTIONS[name][0]).backward_args()
    bytes_ = [integers(name, *dtypes) for dtypes in itertools.product(LIMITS, LIMITS)]
    for x, w in [make(name), *bytes_]:
        grad, grad_x, grad_w = exact_gradients(name, x, w)
        got = _conv_bwd_ste(grad, x, w, conf)
        assert isinstance(got, tuple)
        assert len(got) == 2
        torch.testing.assert_close(got[0], grad_x, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(got[1], grad_w, rtol=1e-12, atol=1e-9)


@every_case
@pytest.mark.parametrize("lut", ["u×u", "u×s", "s×u", "s×s", "4×6", "bare", "exact"])
def test_gradient_is_the_exact_convolution_s(kind, name, lut, hostile, quantise):
    """On the same operands, rounded and saturated; whatever the table says."""
    bits, signs = ((4, 6), (False, True)) if lut == "4×6" else ((8, 8), (True, True))
    if "×" in lut and lut != "4×6":
        signs = [side == "s" for side in lut.split("×")]
    multiplier = hostile(bits, *signs)
    table = {"bare": multiplier.table, "exact": None}.get(lut, multiplier)
    x, w = (t.requires_grad_() for t in make(name))
    xq, wq = (quantise(t, limits(n, signed)) for t, n, signed in zip((x, w), bits, signs, strict=True))
    grad, grad_x, grad_w = exact_gradients(name, xq, wq)
    apply(kind, name, x, w, table).backward(grad)
    assert torch.equal(x.grad, grad_x)
    assert torch.equal(w.grad, grad_w)
    _, other_x, other_w = exact_gradients(name, x.detach(), w.detach())
    assert not torch.equal(other_x, grad_x)  # the test can tell quantised operands from those it gave
    assert not torch.equal(other_w, grad_w)


@some_cases
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("lut", ["multiplier", "bare", "exact"])
def test_gradient_beside_an_operand_of_bytes(kind, name, dtype, lut, hostile, quantise):
    multiplier = hostile(8, dtype == torch.int8, dtype == torch.int8)
    table = {"bare": multiplier.table, "exact": None, "multiplier": multiplier}[lut]
    floats_are = LIMITS[dtype] if lut == "multiplier" else INT8
    x, w = make(name)
    x_bytes, w_bytes = integers(name, dtype, dtype)

    w.requires_grad_()
    grad, _, expected = exact_gradients(name, x_bytes, quantise(w, floats_are))
    y = apply(kind, name, x_bytes, w, table)
    y.backward(grad.to(y.dtype))
    assert torch.equal(w.grad, expected)

    x.requires_grad_()
    grad, expected, _ = exact_gradients(name, quantise(x, floats_are), w_bytes)
    apply(kind, name, x, w_bytes, table).backward(grad)
    assert torch.equal(x.grad, expected)


@some_cases
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_other_types(kind, name, x_dtype, w_dtype, hostile, quantise, look_up_conv2d, rounded):
    multiplier = hostile(8, False, True, largest=2000)
    x, w = make(name)
    x, w = x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()
    xq, wq = quantise(x, (0, 255)), quantise(w, INT8)
    y = apply(kind, name, x, w, multiplier)
    sums = look_up_conv2d(xq, wq, multiplier.table, **geometry(name), pad_code=0)
    assert torch.equal(y, rounded(sums, x_dtype))

    grad, grad_x, grad_w = exact_gradients(name, xq, wq)
    y.backward(grad.to(y.dtype))
    for got, expected, dtype in ((x.grad, grad_x, x_dtype), (w.grad, grad_w, w_dtype)):
        assert got.dtype == dtype
        tolerance = 4 * max(torch.finfo(x_dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize(
    ("kind", "name"), [("conv", "not_square"), ("conv", "groups"), ("dw", "depthwise_twice"), ("fast", "not_square")]
)
def test_only_the_wanted_gradients_are_computed(kind, name, needs, hostile, quantise, operations):
    x, w = make(name)
    xq, wq = quantise(x, INT8), quantise(w, INT8)
    grad, *expected = exact_gradients(name, xq, wq)
    x, w = xq.double().requires_grad_(needs[0]), wq.double().requires_grad_(needs[1])
    if kind == "fast":
        y = FastApproxConv2dOp.apply(x, w, lambda op, x, w, kwargs: -op(x, w, **kwargs), geometry(name))
    else:
        y = apply(kind, name, x, w, hostile(8, True, True))
    assert y.requires_grad == any(needs)
    with operations() as ran:
        if any(needs):
            y.backward(grad)
    assert ran.convolutions == [(*needs, False)] * any(needs)
    for got, wanted, right in zip((x.grad, w.grad), needs, expected, strict=True):
        assert torch.equal(got, right) if wanted else got is None


def fast(x, w):
    return FastApproxConv2dOp.apply(x, w, lambda op, x, w, kwargs: op(x, w, **kwargs), geometry("not_square"))


@pytest.mark.parametrize("kind", ["conv", "dw", "fast"])
def test_second_derivative_is_refused(kind, hostile):
    name = "depthwise_twice" if kind == "dw" else "not_square"
    x, w = (t.requires_grad_() for t in make(name))
    y = fast(x, w) if kind == "fast" else apply(kind, name, x, w, hostile())
    for gradient in torch.autograd.grad(y.square().sum(), (x, w), create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@some_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_a_later_change_of_an_operand_never_spoils_a_gradient(kind, name, dtype, hostile, quantise):
    """It is either of no consequence or autograd's own error."""
    x, w = make(name)
    x, w = x.round().clamp(*INT8).to(dtype), w.requires_grad_()
    grad, _, expected = exact_gradients(name, quantise(x, INT8), quantise(w, INT8))
    y = apply(kind, name, x, w, hostile(8, True, True))
    x.neg_()
    if dtype == torch.int8:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)
    else:
        y.backward(grad)
        assert torch.equal(w.grad, expected)


@every_kind
def test_nothing_is_recorded_where_no_gradient_is_wanted(kind, name, hostile):
    x, w = (t.requires_grad_() for t in make(name))
    expected = apply(kind, name, x, w, hostile())
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = apply(kind, name, x, w, hostile())
        assert y.grad_fn is None
        assert torch.equal(y, expected)


# Functional models


def shaved(op, x, w, kwargs):
    """Two calls of the operation, and nothing that is an integer."""
    return 0.9 * op(x, w, **kwargs) - 0.125 * op(x.abs(), w.sign(), **kwargs)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fast_convolution_rounds_what_the_model_gives(name, dtype, quantise):
    conf = Conv2dArgs(**CONVOLUTIONS[name][0]).backward_args()
    x, w = (quantise(t, INT8).to(dtype).requires_grad_() for t in make(name))
    seen = []

    def model(*arguments):
        seen.append(arguments)
        return shaved(*arguments)

    y = FastApproxConv2dOp.apply(x, w, model, conf)
    with torch.no_grad():
        unrounded = shaved(F.conv2d, x, w, geometry(name))
    assert y.dtype == dtype
    assert torch.equal(y, unrounded.round())
    assert not torch.equal(y, unrounded)
    ((op, seen_x, seen_w, kwargs),) = seen
    assert op is F.conv2d
    assert torch.equal(seen_x, x)
    assert torch.equal(seen_w, w)
    assert kwargs == conf

    grad, grad_x, grad_w = exact_gradients(name, x.detach(), w.detach())
    y.backward(grad.to(dtype))
    assert torch.equal(x.grad.double(), grad_x)
    assert torch.equal(w.grad.double(), grad_w)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"stride": 2}, {"padding": (1, 2), "groups": 2}, {"dilation": (1, 2), "stride": (2, 1), "groups": 2}],
    ids=str,
)
def test_fast_convolution_takes_part_of_the_keywords(kwargs):
    """As ints or pairs; a model may do with its own copy what it likes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (2, 4, 7, 8), generator=generator).double().requires_grad_()
    w = torch.randint(-9, 9, (6, 4 // kwargs.get("groups", 1), 3, 2), generator=generator).double().requires_grad_()
    given = dict(kwargs)

    def model(op, x, w, kwargs):
        y = op(x, w, **kwargs)
        kwargs.clear()
        kwargs["stride"] = 5
        return y + 0.25

    y = FastApproxConv2dOp.apply(x, w, model, given)
    assert given == kwargs
    expected = F.conv2d(x, w, **kwargs)
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y.square().sum(), (x, w))
    assert all(
        torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (x, w)), strict=True)
    )


# Compilation


@pytest.mark.parametrize("lut", ["multiplier", "bare", "exact"])
@pytest.mark.parametrize(("kind", "name"), [("conv", "groups"), ("dw", "depthwise_twice")])
def test_compiles_forward_and_backward(kind, name, lut, hostile, compiled):
    table = {"multiplier": hostile(), "bare": hostile().table, "exact": None}[lut]
    arguments, size = Conv2dArgs(**CONVOLUTIONS[name][0]), size_of(name, *make(name))

    def run(x, w):
        x, w = x * 1.5, w - 3
        if kind == "dw":
            y = ApproxDWConv2dOp.apply(x, w, table, arguments.backward_args())
        else:
            y = ApproxConv2dOp.apply(x, w, arguments, size, table)
        return y * 0.5

    def results(function):
        x, w = (t.requires_grad_() for t in make(name))
        y = function(x, w)
        return y, *torch.autograd.grad(y.square().sum(), (x, w))

    for got, expected in zip(results(compiled(run)), results(run), strict=True):
        assert torch.equal(got, expected)


def test_depthwise_traces_with_symbolic_sizes(hostile):
    def gradients(x, w, table):
        return torch.autograd.grad(ApproxDWConv2dOp.apply(x, w, table, {"padding": 1}).sum(), (x, w))

    x, w = (t.requires_grad_() for t in make("depthwise_twice"))
    traced = make_fx(gradients, tracing_mode="symbolic")(x, w, hostile().table)
    for got, expected in zip(traced(x, w, hostile().table), gradients(x, w, hostile().table), strict=True):
        assert torch.equal(got, expected)


@some_cases
def test_fake_tensors(kind, name, hostile):
    x, w = make(name, torch.bfloat16)
    expected = apply(kind, name, x, w, hostile().table)
    with FakeTensorMode() as mode:
        x, w, table = (mode.from_tensor(t) for t in (x, w, hostile().table))
        x, w = x.requires_grad_(), w.requires_grad_()
        arguments = Conv2dArgs(**CONVOLUTIONS[name][0])
        if kind == "dw":
            y = ApproxDWConv2dOp.apply(x, w, table, arguments.backward_args())
        else:
            y = ApproxConv2dOp.apply(x, w, arguments, expected.shape[2:], table)
        y.sum().backward()
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)
