"""The matrix-product Functions: forward against gather-and-sum, backward against autograd through `F.linear`."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from approxconv import Multiplier
from approxconv.operators import ApproxGeMMOp, FastApproxGeMMOp

# name: (x's shape, N)
GEMMS = {
    "vector": ((7,), 5),
    "one": ((1,), 1),
    "rows": ((6, 6), 6),
    "rectangular": ((4, 19), 3),
    "one_row": ((1, 9), 8),
    "one_column": ((5, 9), 1),
    "one_deep": ((5, 1), 4),
    "three_dimensions": ((2, 3, 7), 5),
    "five_dimensions": ((2, 1, 3, 2, 8), 3),
}
every_gemm = pytest.mark.parametrize("name", GEMMS)
some_gemms = pytest.mark.parametrize("name", ["vector", "rectangular", "three_dimensions"])
SIGNS = list(itertools.product([False, True], repeat=2))
INT8 = (-128, 127)
LIMITS = {torch.uint8: (0, 255), torch.int8: INT8}


def limits(bits, signed):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def make(name, dtype=torch.float64, spread=90):
    """x and w that are no integers and leave 8 bits at both ends."""
    shape, filters = GEMMS[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + 20
    w = torch.randn(filters, shape[-1], generator=generator, dtype=torch.float64) * spread + 10
    x.view(-1)[0], w.view(-1)[0] = 300.4, -300.4
    return x.to(dtype), w.to(dtype)


def look_up(look_up_matmul, x, w, table):
    """The oracle for x of any rank ≥ 1."""
    y = look_up_matmul(x.reshape(-1, x.shape[-1]), w, table)
    return y.view(*x.shape[:-1], len(w))


def exact_gradients(x, w):
    """Autograd's, through F.linear in float64, and the gradient of the result they belong to."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y = F.linear(x, w)
    grad = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(0)).double()
    return grad, *torch.autograd.grad(y, (x, w), grad)


# Forward


@every_gemm
@pytest.mark.parametrize("bits", [(8, 8), (4, 6), (6, 4), (8, 3)], ids=str)
def test_a_multiplier_reads_rounded_and_saturated_values(name, bits, hostile, quantise, look_up_matmul):
    for (a_signed, w_signed), dtype in itertools.product(SIGNS, (torch.float32, torch.float64)):
        multiplier = hostile(bits, a_signed, w_signed)
        x, w = make(name, dtype)
        xq, wq = quantise(x, limits(bits[0], a_signed)), quantise(w, limits(bits[1], w_signed))
        y = ApproxGeMMOp.apply(x, w, multiplier)
        assert y.dtype == dtype
        assert torch.equal(y.long(), look_up(look_up_matmul, xq, wq, multiplier.table))


OPERANDS = [torch.float64, torch.float32, torch.uint8, torch.int8]


@every_gemm
@pytest.mark.parametrize("lut", ["exact", "bare", "multiplier"])
def test_bytes_are_what_they_are_and_floats_are_int8(name, lut, hostile, quantise, look_up_matmul):
    for x_dtype, w_dtype in itertools.product(OPERANDS, OPERANDS):
        x, w = make(name, spread=150)
        x_limits, w_limits = LIMITS.get(x_dtype, INT8), LIMITS.get(w_dtype, INT8)
        xq, wq = quantise(x, x_limits), quantise(w, w_limits)
        x = x.to(x_dtype) if x_dtype.is_floating_point else xq.to(x_dtype)
        w = w.to(w_dtype) if w_dtype.is_floating_point else wq.to(w_dtype)
        if lut == "exact":
            expected, table = xq @ wq.T, None
        else:
            multiplier = hostile(8, x_limits == INT8, w_limits == INT8)
            table = multiplier if lut == "multiplier" else multiplier.table
            expected = look_up(look_up_matmul, xq, wq, multiplier.table)
        y = ApproxGeMMOp.apply(x, w, table)
        assert y.dtype == (x_dtype if x_dtype.is_floating_point else y.dtype)
        assert y.is_floating_point()
        assert torch.equal(y.long(), expected)


@some_gemms
@pytest.mark.parametrize("bits", [(4, 6), (6, 4)], ids=str)
def test_bare_narrow_tables(name, bits, hostile, quantise, look_up_matmul):
    table = hostile(bits).table
    x, w = make(name, spread=12)
    for a_signed, w_signed in SIGNS:
        xq, wq = quantise(x, limits(bits[0], a_signed)), quantise(w, limits(bits[1], w_signed))
        expected = look_up(look_up_matmul, xq, wq, table)
        bytes_ = xq.to(torch.int8 if a_signed else torch.uint8), wq.to(torch.int8 if w_signed else torch.uint8)
        for operands in (bytes_, (xq.double(), wq.double())) if a_signed and w_signed else (bytes_,):
            assert torch.equal(ApproxGeMMOp.apply(*operands, table).long(), expected)


@pytest.mark.parametrize("bits", [(8, 8), (4, 6)], ids=str)
def test_bytes_beside_a_multiplier_of_another_format_saturate(bits, hostile, quantise, look_up_matmul):
    """200 beside a signed operand is 127, not -56."""
    for dtypes, signs in itertools.product(itertools.product(LIMITS, LIMITS), SIGNS):
        multiplier = hostile(bits, *signs)
        x, w = (quantise(t, LIMITS[d]).to(d) for t, d in zip(make("rectangular", spread=150), dtypes, strict=True))
        xq, wq = (quantise(t, limits(n, signed)) for t, n, signed in zip((x, w), bits, signs, strict=True))
        y = ApproxGeMMOp.apply(x, w, multiplier)
        assert torch.equal(y.long(), look_up_matmul(xq, wq, multiplier.table))


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
def test_the_sum_is_rounded_once(dtype, ties, near_ties, rounded):
    """One product a sum, so the result is the table; int32 → float32 → bfloat16 would round twice."""
    multiplier = near_ties(ties)
    x, w = torch.arange(256).to(dtype).view(-1, 1), torch.arange(-128, 128).to(dtype).view(-1, 1)
    y = ApproxGeMMOp.apply(x, w, multiplier)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert torch.equal(y, rounded(multiplier.table.roll(128, 1), dtype))


# Layouts, nothing, errors


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0]


def strided(t):
    return torch.stack([t, t + 1], dim=-1)[..., 0]


def reversed_dimensions(t):
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


@every_gemm
@pytest.mark.parametrize("layout", [transposed, strided, reversed_dimensions], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_memory_layouts(name, layout, dtype, hostile):
    """Of x, w and the gradient; results and gradients are those of contiguous tensors."""

    def results(x, w, layout=lambda t: t):
        x, w = (t.detach().requires_grad_(t.is_floating_point()) for t in (x, w))
        y = ApproxGeMMOp.apply(x, w, hostile(8, True, True))
        grad = torch.arange(y.numel(), dtype=torch.float64).view(y.shape) % 7 - 3
        return y, *torch.autograd.grad(y, [t for t in (x, w) if t.requires_grad], layout(grad))

    x, w = make(name)
    x = x.round().clamp(*INT8).to(dtype)
    expected = results(x, w)
    for got in (results(layout(x), w), results(x, layout(w)), results(layout(x), layout(w), layout)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("shape", "filters"),
    [((0, 4), 3), ((2, 0, 4), 3), ((0, 2, 4), 3), ((2, 4), 0), ((4,), 0), ((2, 0), 3), ((0,), 3), ((2, 3, 0), 5)],
)
def test_size_0(shape, filters, fast, hostile):
    """Forward and backward, as F.linear."""
    x, w = torch.ones(shape, requires_grad=True), torch.ones(filters, shape[-1], requires_grad=True)
    expected = F.linear(x, w)
    if fast:
        y = FastApproxGeMMOp.apply(x, w, lambda op, x, w, kwargs: op(x, w, **kwargs))
    else:
        y = ApproxGeMMOp.apply(x, w, hostile())
    assert torch.equal(y, expected)
    for got, right in zip(
        torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True
    ):
        assert torch.equal(got, right)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "named"),
    [
        ((), (3, 4), "x"),
        ((4,), (3, 5), "w"),
        ((2, 1), (3, 5), "w"),
        ((2, 4), (3, 1), "w"),
        ((2, 4), (4,), "w"),
        ((2, 3, 4), (2, 3, 4), "w"),
    ],
)
def test_wrong_shapes(x_shape, w_shape, named, hostile):
    x, w = torch.ones(x_shape), torch.ones(w_shape)
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        ApproxGeMMOp.apply(x, w, hostile())
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        FastApproxGeMMOp.apply(x, w, lambda op, x, w, kwargs: op(x, w, **kwargs))


def test_wrong_operands_and_tables_are_named(hostile):
    x, w = make("rectangular")
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        for lut in (hostile(), hostile().table, None):
            with pytest.raises(ValueError, match=r"\bx\b"):
                ApproxGeMMOp.apply(x.round().to(dtype), w, lut)
            with pytest.raises(ValueError, match=r"\bw\b"):
                ApproxGeMMOp.apply(x, w.round().to(dtype), lut)
    for lut in ("drum6_8u", 3, hostile().table.tolist(), hostile().table.numpy()):
        with pytest.raises(ValueError, match=r"\blut\b"):
            ApproxGeMMOp.apply(x, w, lut)
    for lut in (hostile().table[0], hostile().table[:, :96], hostile().table.double()):
        with pytest.raises(ValueError, match=r"\btable\b"):
            ApproxGeMMOp.apply(x, w, lut)
    for depth in (7, 8):
        x, w = torch.ones(depth), torch.ones(2, depth)
        multiplier = Multiplier(torch.full((8, 8), 2**28), a_signed=True, w_signed=True)
        if depth == 7:
            assert ApproxGeMMOp.apply(x, w, multiplier).tolist() == [7 * 2.0**28] * 2
        else:
            with pytest.raises(ValueError, match=r"2\*\*31"):
                ApproxGeMMOp.apply(x, w, multiplier)


# Backward


@every_gemm
@pytest.mark.parametrize("lut", ["u×u", "u×s", "s×u", "s×s", "4×6", "bare", "exact"])
def test_gradient_is_the_exact_product_s(name, lut, hostile, quantise):
    """On the same operands, rounded and saturated; whatever the table says."""
    bits, signs = ((4, 6), (False, True)) if lut == "4×6" else ((8, 8), (True, True))
    if "×" in lut and lut != "4×6":
        signs = [side == "s" for side in lut.split("×")]
    multiplier = hostile(bits, *signs)
    table = {"bare": multiplier.table, "exact": None}.get(lut, multiplier)
    x, w = (t.requires_grad_() for t in make(name))
    xq, wq = (quantise(t, limits(n, signed)) for t, n, signed in zip((x, w), bits, signs, strict=True))
    grad, grad_x, grad_w = exact_gradients(xq, wq)
    ApproxGeMMOp.apply(x, w, table).backward(grad)
    assert torch.equal(x.grad, grad_x)
    assert torch.equal(w.grad, grad_w)
    _, other_x, other_w = exact_gradients(x.detach(), w.detach())
    assert not torch.equal(other_x, grad_x)  # the test can tell quantised operands from those it gave
    assert not torch.equal(other_w, grad_w)


@some_gemms
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_gradient_beside_an_operand_of_bytes(name, dtype, hostile, quantise):
    x, w = make(name)
    x_bytes, w_bytes = (quantise(t, LIMITS[dtype]).to(dtype) for t in (x, w))
    for lut in (hostile().table, None):
        w = w.detach().requires_grad_()
        grad, _, expected = exact_gradients(x_bytes, quantise(w, INT8))
        y = ApproxGeMMOp.apply(x_bytes, w, lut)
        y.backward(grad.to(y.dtype))
        assert torch.equal(w.grad, expected)

        x = x.detach().requires_grad_()
        grad, expected, _ = exact_gradients(quantise(x, INT8), w_bytes)
        ApproxGeMMOp.apply(x, w_bytes, lut).backward(grad)
        assert torch.equal(x.grad, expected)


@some_gemms
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_other_types(name, x_dtype, w_dtype, hostile, quantise, look_up_matmul, rounded):
    multiplier = hostile(8, False, True, largest=2000)
    x, w = make(name)
    x, w = x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()
    xq, wq = quantise(x, (0, 255)), quantise(w, INT8)
    y = ApproxGeMMOp.apply(x, w, multiplier)
    assert torch.equal(y, rounded(look_up(look_up_matmul, xq, wq, multiplier.table), x_dtype))

    grad, grad_x, grad_w = exact_gradients(xq, wq)
    y.backward(grad.to(y.dtype))
    for got, expected, dtype in ((x.grad, grad_x, x_dtype), (w.grad, grad_w, w_dtype)):
        assert got.dtype == dtype
        tolerance = 4 * max(torch.finfo(x_dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("fast", [False, True])
@some_gemms
def test_only_the_wanted_gradients_are_computed(name, fast, needs, hostile, quantise, operations):
    xq, wq = (quantise(t, INT8) for t in make(name))
    grad, *expected = exact_gradients(xq, wq)
    x, w = xq.double().requires_grad_(needs[0]), wq.double().requires_grad_(needs[1])
    if fast:
        y = FastApproxGeMMOp.apply(x, w, lambda op, x, w, kwargs: -op(x, w, **kwargs))
    else:
        y = ApproxGeMMOp.apply(x, w, hostile(8, True, True))
    assert y.requires_grad == any(needs)
    with operations() as ran:
        if any(needs):
            y.backward(grad)
    assert ran.products == sum(needs)
    for got, wanted, right in zip((x.grad, w.grad), needs, expected, strict=True):
        assert torch.equal(got, right) if wanted else got is None


@pytest.mark.parametrize("fast", [False, True])
def test_second_derivative_is_refused(fast, hostile):
    x, w = (t.requires_grad_() for t in make("three_dimensions"))
    if fast:
        y = FastApproxGeMMOp.apply(x, w, lambda op, x, w, kwargs: op(x, w, **kwargs))
    else:
        y = ApproxGeMMOp.apply(x, w, hostile())
    for gradient in torch.autograd.grad(y.square().sum(), (x, w), create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_a_later_change_of_an_operand_never_spoils_a_gradient(dtype, hostile, quantise):
    """It is either of no consequence or autograd's own error."""
    x, w = make("rectangular")
    x, w = x.round().clamp(*INT8).to(dtype), w.requires_grad_()
    grad, _, expected = exact_gradients(quantise(x, INT8), quantise(w, INT8))
    y = ApproxGeMMOp.apply(x, w, hostile(8, True, True))
    x.neg_()
    if dtype == torch.int8:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)
    else:
        y.backward(grad)
        assert torch.equal(w.grad, expected)


# Functional models


@every_gemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fast_product_rounds_what_the_model_gives(name, dtype, quantise):
    def shaved(op, x, w, kwargs):
        return 0.9 * op(x, w, **kwargs) - 0.125 * op(x.abs(), w.sign(), **kwargs) + 0.3

    x, w = (quantise(t, INT8).to(dtype).requires_grad_() for t in make(name))
    seen = []

    def model(*arguments):
        seen.append(arguments)
        return shaved(*arguments)

    y = FastApproxGeMMOp.apply(x, w, model)
    with torch.no_grad():
        unrounded = shaved(F.linear, x, w, {})
    assert y.dtype == dtype
    assert torch.equal(y, unrounded.round())
    assert not torch.equal(y, unrounded)
    assert len(seen) == 1
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[0][2], w)

    grad, grad_x, grad_w = exact_gradients(x.detach(), w.detach())
    y.backward(grad.to(dtype))
    assert torch.equal(x.grad.double(), grad_x)
    assert torch.equal(w.grad.double(), grad_w)


# Compilation


@pytest.mark.parametrize("lut", ["multiplier", "bare", "exact"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(lut, dynamic, hostile, compiled):
    table = {"multiplier": hostile(), "bare": hostile().table, "exact": None}[lut]

    def run(x, w):
        return ApproxGeMMOp.apply(x * 1.5, w - 3, table) * 0.5

    def results(function, x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = function(x, w)
        return y, *torch.autograd.grad(y.square().sum(), (x, w))

    fast, (x, w) = compiled(run, dynamic=dynamic), make("three_dimensions")
    for batch in (x, torch.cat([x, -x, x])):
        for got, expected in zip(results(fast, batch, w), results(run, batch, w), strict=True):
            assert torch.equal(got, expected)


@some_gemms
def test_fake_tensors(name, hostile):
    x, w = make(name, torch.bfloat16)
    expected = ApproxGeMMOp.apply(x, w, hostile().table)
    with FakeTensorMode() as mode:
        x, w, table = (mode.from_tensor(t) for t in (x, w, hostile().table))
        x, w = x.requires_grad_(), w.requires_grad_()
        y = ApproxGeMMOp.apply(x, w, table)
        y.sum().backward()
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)


@pytest.mark.parametrize("lut", ["multiplier", "bare", "exact"])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(lut, strict, hostile):
    table = {"multiplier": hostile(), "bare": hostile().table, "exact": None}[lut]
    x, w = make("three_dimensions")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(w)

        def forward(self, x):
            return ApproxGeMMOp.apply(x * 1.5, self.w, table)

    network, longer = Network(), torch.cat([x, -x, x])
    expected = network(longer)
    program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert torch.ops.approxconv.lut_matmul.default in {node.target for graph in graphs for node in graph.nodes}
    assert torch.equal(program.module()(longer), expected)


def test_tracing_first_spoils_nothing_that_is_kept():
    """The exact table is made once a process: not as a fake one because a trace came first."""
    script = """
import contextlib
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from approxconv.operators import ApproxGeMMOp

with contextlib.suppress(Exception), FakeTensorMode():  # may work or not
    ApproxGeMMOp.apply(torch.ones(2, 3), torch.ones(4, 3), None)
x, w = torch.tensor([[3.0, -5.0]]), torch.tensor([[7.0, 2.0]])
assert ApproxGeMMOp.apply(x, w, None).tolist() == [[11.0]]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
