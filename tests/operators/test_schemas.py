"""The operators against gather-and-sum and int64 matrix products, their fakes, what they refuse."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from approxconv import EngineError, use_engine

ops = torch.ops.approxconv
ENGINES = ["cpu", "reference"]
DTYPES = list(itertools.product([torch.uint8, torch.int8], repeat=2))
dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=["u×u", "u×s", "s×u", "s×s"])
# Sides differ, entries go beyond 16 bits.
TABLES = {
    "8x8": (8, 30_000),
    "wide": (8, 5_000_000),
    "4x6": ((4, 6), 1000),
    "6x4": ((6, 4), 90_000),
    "2x8": ((2, 8), 9),
}
tables = pytest.mark.parametrize("table", TABLES)
# name: (x's shape, w's shape)
MATMULS = {
    "one": ((1, 1), (1, 1)),
    "rectangular": ((7, 19), (5, 19)),
    "tall": ((300, 3), (2, 3)),
    "wide": ((2, 33), (70, 33)),
    "shared_weight": ((2, 3, 4, 9), (5, 9)),
    "shared_input": ((4, 9), (3, 5, 9)),
    "both_batched": ((3, 2, 4, 9), (3, 2, 5, 9)),
    "broadcast": ((3, 1, 4, 9), (2, 5, 9)),
    "broadcast_ones": ((1, 3, 4, 2), (2, 1, 1, 2)),
}
# name: (x's shape, w's shape, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "not_square": ((2, 3, 9, 7), (5, 3, 3, 2), [2, 1], [1, 2], [1, 3], 1),
    "stride_past_the_end": ((1, 2, 9, 8), (3, 2, 2, 3), [3, 5], [0, 0], [1, 1], 1),
    "groups": ((2, 6, 5, 6), (4, 3, 3, 1), [1, 2], [1, 0], [2, 1], 2),
    "mostly_padding": ((2, 2, 2, 1), (3, 2, 3, 4), [2, 3], [4, 3], [1, 1], 1),
    "pointwise_padded": ((3, 4, 2, 3), (2, 4, 1, 1), [1, 1], [0, 1], [1, 1], 1),
    "kernel_is_the_input": ((2, 3, 4, 5), (7, 3, 4, 5), [1, 1], [0, 0], [1, 1], 1),
    "depthwise": ((2, 3, 5, 4), (3, 1, 3, 2), [1, 2], [2, 1], [1, 2], 3),
    "depthwise_thrice": ((2, 2, 9, 8), (6, 1, 5, 3), [2, 1], [3, 0], [1, 2], 2),
    "depthwise_one_channel": ((3, 1, 4, 6), (4, 1, 1, 7), [1, 1], [0, 3], [1, 1], 1),
    "depthwise_7x7": ((1, 5, 8, 7), (5, 1, 7, 7), [1, 1], [3, 3], [1, 1], 5),
}
convolutions = pytest.mark.parametrize("name", CONVOLUTIONS)


def codes(generator, shape, dtype):
    """Any bytes: the bits above a narrow operand's are noise."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def pair(x_shape, w_shape, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return codes(generator, x_shape, dtypes[0]), codes(generator, w_shape, dtypes[1])


def is_depthwise(x_shape, w_shape, groups):
    return x_shape[1] == groups and w_shape[1] == 1


def convolve(x, w, table, stride, padding, dilation, groups, pad_code, **keywords):
    """The convolution, by lut_dwconv2d as well where it is depthwise."""
    y = ops.lut_conv2d(x, w, table, stride, padding, dilation, groups, pad_code, **keywords)
    if is_depthwise(x.shape, w.shape, groups):
        assert torch.equal(ops.lut_dwconv2d(x, w, table, stride, padding, dilation, pad_code, **keywords), y)
    return y


def calls(table, dtypes=(torch.uint8, torch.int8)):
    """``{operator: arguments}``, one small call of each."""
    conv, depthwise = CONVOLUTIONS["groups"], CONVOLUTIONS["depthwise_thrice"]
    return {
        "lut_matmul": (*pair(*MATMULS["broadcast"], dtypes), table),
        "lut_conv2d": (*pair(*conv[:2], dtypes), table, *conv[2:], 3),
        "lut_dwconv2d": (*pair(*depthwise[:2], dtypes), table, *depthwise[2:5], 3),
    }


OPERATORS = ["lut_matmul", "lut_conv2d", "lut_dwconv2d"]
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def assert_is(y, expected):
    assert y.dtype == torch.int32
    assert y.is_contiguous()
    assert torch.equal(y.long(), expected)


# Values


@tables
@dtypes
@pytest.mark.parametrize("name", MATMULS)
def test_matmul_is_gather_and_sum(name, dtypes, table, hostile, look_up_matmul):
    bits, largest = TABLES[table]
    table = hostile(bits, largest=largest).table
    x, w = pair(*MATMULS[name], dtypes)
    expected = look_up_matmul(x, w, table)
    for engine in ENGINES:
        assert_is(ops.lut_matmul(x, w, table, engine=engine), expected)


@tables
@dtypes
@convolutions
def test_convolution_is_gather_and_sum(name, dtypes, table, hostile, look_up_conv2d):
    bits, largest = TABLES[table]
    table = hostile(bits, largest=largest).table
    x_shape, w_shape, *geometry = CONVOLUTIONS[name]
    x, w = pair(x_shape, w_shape, dtypes)
    expected = look_up_conv2d(x, w, table, *geometry, 2)
    for engine in ENGINES:
        assert_is(convolve(x, w, table, *geometry, 2, engine=engine), expected)


@dtypes
@pytest.mark.parametrize("bits", [(8, 8), (4, 6), (7, 3)], ids=str)
def test_the_exact_table_gives_the_int64_product_of_the_values(dtypes, bits):
    def values(shape, bits, dtype):
        low = -(2 ** (bits - 1)) if dtype == torch.int8 else 0
        return torch.randint(low, low + 2**bits, shape, generator=generator)

    def axis(bits, dtype):
        code = torch.arange(2**bits, dtype=torch.int32)
        return torch.where(code < 2 ** (bits - 1), code, code - 2**bits) if dtype == torch.int8 else code

    generator = torch.Generator().manual_seed(bits[0])
    table = torch.outer(*(axis(n, dtype) for n, dtype in zip(bits, dtypes, strict=True)))
    for x_shape, w_shape in MATMULS.values():
        x, w = values(x_shape, bits[0], dtypes[0]), values(w_shape, bits[1], dtypes[1])
        assert_is(ops.lut_matmul(x.to(dtypes[0]), w.to(dtypes[1]), table), x @ w.mT)
    pad = 5 if dtypes[0] == torch.uint8 else -3
    for x_shape, w_shape, stride, padding, dilation, groups in CONVOLUTIONS.values():
        x, w = values(x_shape, bits[0], dtypes[0]), values(w_shape, bits[1], dtypes[1])
        padded = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=pad)
        columns = F.unfold(padded, w_shape[2:], dilation, 0, stride).long().unflatten(1, (groups, -1))
        expected = (w.view(groups, w_shape[0] // groups, -1) @ columns).flatten(1, 2)
        y = convolve(x.to(dtypes[0]), w.to(dtypes[1]), table, stride, padding, dilation, groups, pad)
        assert_is(y.flatten(2), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [8, (4, 6)], ids=str)
@pytest.mark.parametrize("name", ["not_square", "groups", "depthwise", "depthwise_7x7"])
def test_pad_code_is_multiplied_like_any_code(name, bits, engine, hostile, look_up_conv2d):
    """Negative codes are int8's, whatever x's dtype."""
    table = hostile(bits).table
    side = len(table)
    x_shape, w_shape, *geometry = CONVOLUTIONS[name]
    x, w = pair(x_shape, w_shape, (torch.uint8, torch.int8))
    seen = set()
    for code in (0, 1, side // 2 - 1, side // 2, side - 1):
        expected = look_up_conv2d(x, w, table, *geometry, code)
        names = [code] if code < side // 2 else [code, code - side]
        for operand, pad_code in itertools.product((x, x.view(torch.int8)), names):
            assert_is(convolve(operand, w, table, *geometry, pad_code, engine=engine), expected)
        seen.add(tuple(expected.flatten().tolist()))
    assert len(seen) == 5


def transposed(t):
    return t.mT.contiguous().mT


def reversed_dimensions(t):
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def sliced(t):
    larger = t.new_empty([2 * n + 3 for n in t.shape])
    view = larger[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)]
    return view.copy_(t)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else transposed(t)


@every_operator
@pytest.mark.parametrize("layout", [transposed, reversed_dimensions, sliced, channels_last], ids=lambda f: f.__name__)
def test_memory_layouts(operator, layout, hostile):
    x, w, table, *rest = calls(hostile((6, 4), largest=90_000).table)[operator]
    function = getattr(ops, operator)
    expected = function(x, w, table, *rest)
    for engine, *chosen in itertools.product(ENGINES, *[(False, True)] * 3):
        operands = [layout(t) if there else t for t, there in zip((x, w, table), chosen, strict=True)]
        assert_is(function(*operands, *rest, engine=engine), expected.long())
    assert_is(
        function(x[..., :1].expand(x.shape), w, table, *rest), function(x[..., :1] + x * 0, w, table, *rest).long()
    )


@every_operator
def test_a_table_written_in_place_is_seen(operator, hostile):
    table = hostile().table.clone()
    function, arguments = getattr(ops, operator), calls(table)[operator]
    before = function(*arguments)
    table.neg_()
    assert torch.equal(function(*arguments), -before)
    table[3, 5] = 2**31 - 1
    with pytest.raises(ValueError, match=r"table.*2\*\*31"):
        function(*arguments)


# Sums that could wrap


@pytest.mark.parametrize("largest", [2**27, -(2**27), 2**27 - 1, 1 - 2**27])
@pytest.mark.parametrize(
    ("operator", "x_shape", "w_shape", "rest"),
    [
        ("lut_matmul", (2, 3, None), (4, None), ()),
        ("lut_conv2d", (2, None, 2, 2), (3, None, 1, 1), ([1, 1], [0, 0], [1, 1], 1, 0)),
        ("lut_conv2d", (1, 4, 2, 20), (2, 2, 1, None), ([1, 1], [0, 0], [1, 1], 2, 0)),
        ("lut_dwconv2d", (1, 3, 2, 20), (6, 1, 2, None), ([1, 1], [0, 0], [1, 1], 0)),
        ("lut_conv2d", (1, 3, 20, 2), (6, 1, None, 1), ([1, 1], [0, 0], [1, 1], 3, 0)),
    ],
)
def test_k_times_the_largest_entry_is_bounded(operator, x_shape, w_shape, rest, largest, hostile):
    """Refused exactly where ``K·max|table|`` reaches 2³¹, for K products a sum; right up to there."""
    table = hostile().table.clone()
    table[7, 9] = largest
    doubled = 2 in w_shape[1:]  # K is twice the length asked for

    def call(depth):
        side = depth // 2 if doubled else depth
        x, w = ([side if n is None else n for n in shape] for shape in (x_shape, w_shape))
        x, w = torch.full(x, 7, dtype=torch.uint8), torch.full(w, 9, dtype=torch.int8)
        for engine in ENGINES:
            y = getattr(ops, operator)(x, w, table, *rest, engine=engine)
            assert (y.long() == depth * largest).all()

    within = (2**31 - 1) // abs(largest)
    assert within in (15, 16)
    call(within - within % 2 if doubled else within)
    with pytest.raises(ValueError, match=r"table.*2\*\*31"):
        call(within + 2 - within % 2 if doubled else within + 1)


@pytest.mark.parametrize("entry", [2**31 - 1, 1 - 2**31, -(2**31)])
def test_one_product_at_the_ends_of_int32(entry):
    table = torch.full((4, 8), 64, dtype=torch.int32)
    table[2, 5] = entry
    x, w = torch.tensor([[2]], dtype=torch.uint8), torch.tensor([[-3]], dtype=torch.int8)
    if entry == -(2**31):
        with pytest.raises(ValueError, match=r"table.*2\*\*31"):
            ops.lut_matmul(x, w, table)
    else:
        assert ops.lut_matmul(x, w, table).item() == entry


# Nothing in, nothing out

EMPTY_MATMULS = [
    ((0, 4), (3, 4)),
    ((2, 4), (0, 4)),
    ((2, 0), (3, 0)),
    ((0, 0), (0, 0)),
    ((0, 2, 4), (3, 4)),
    ((2, 4), (0, 3, 4)),
    ((3, 0, 2, 4), (1, 5, 4)),
    ((1, 2, 4), (0, 3, 4)),
    ((2, 3, 0), (2, 5, 0)),
]
# name: (x's shape, w's shape, padding, groups)
EMPTY_CONVOLUTIONS = {
    "batch": ((0, 4, 4, 5), (6, 2, 2, 3), [1, 0], 2),
    "filters": ((2, 4, 4, 5), (0, 2, 2, 3), [1, 0], 2),
    "channels": ((2, 0, 4, 5), (3, 0, 2, 3), [1, 0], 1),
    "channels_of_groups": ((2, 0, 4, 5), (4, 0, 2, 3), [1, 0], 2),
    "height": ((2, 3, 0, 5), (4, 3, 2, 3), [2, 0], 1),
    "width": ((2, 3, 4, 0), (4, 3, 2, 3), [0, 3], 1),
    "pixels": ((2, 4, 0, 0), (6, 2, 2, 3), [1, 2], 2),
    "depthwise_batch": ((0, 3, 4, 5), (6, 1, 2, 3), [0, 1], 3),
    "depthwise_multiplier": ((2, 3, 4, 5), (0, 1, 2, 3), [0, 1], 3),
    "depthwise_height": ((2, 3, 0, 5), (6, 1, 2, 3), [2, 0], 3),
    "depthwise_pixels": ((2, 3, 0, 0), (3, 1, 2, 3), [1, 2], 3),
}


@dtypes
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("x_shape", "w_shape"), EMPTY_MATMULS)
def test_empty_matmul(x_shape, w_shape, engine, dtypes, hostile, look_up_matmul):
    table, (x, w) = hostile().table, pair(x_shape, w_shape, dtypes)
    assert_is(ops.lut_matmul(x, w, table, engine=engine), look_up_matmul(x, w, table))


@dtypes
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EMPTY_CONVOLUTIONS)
def test_empty_convolution(name, engine, dtypes, hostile, look_up_conv2d):
    """An input without pixels still has padding, which is multiplied."""
    x_shape, w_shape, padding, groups = EMPTY_CONVOLUTIONS[name]
    table, (x, w) = hostile().table, pair(x_shape, w_shape, dtypes)
    geometry = [1, 2], padding, [1, 1], groups, 9
    assert_is(convolve(x, w, table, *geometry, engine=engine), look_up_conv2d(x, w, table, *geometry))


# Fakes, compilation, export


@dtypes
@every_operator
def test_opcheck(operator, dtypes, hostile):
    bits = 8 if dtypes[0] == dtypes[1] else (4, 6)
    torch.library.opcheck(getattr(ops, operator).default, calls(hostile(bits).table, dtypes)[operator])


@pytest.mark.parametrize("name", ["shared_weight", "shared_input", "broadcast_ones"])
def test_opcheck_of_batched_matmul(name, hostile):
    x, w = pair(*MATMULS[name], DTYPES[1])
    arguments = reversed_dimensions(x), transposed(w), hostile().table
    torch.library.opcheck(ops.lut_matmul.default, arguments, {"engine": "reference"})


@pytest.mark.parametrize("name", ["not_square", "mostly_padding", "depthwise"])
def test_opcheck_of_strided_convolutions(name, hostile):
    x_shape, w_shape, *geometry = CONVOLUTIONS[name]
    x, w = pair(x_shape, w_shape, DTYPES[2])
    torch.library.opcheck(ops.lut_conv2d.default, (channels_last(x), sliced(w), hostile().table, *geometry, -1))
    if is_depthwise(x_shape, w_shape, geometry[3]):
        arguments = sliced(x), channels_last(w), hostile().table, *geometry[:3], -1
        torch.library.opcheck(ops.lut_dwconv2d.default, arguments, {"engine": "cpu"})


def test_fakes_have_the_real_shape(hostile):
    table = hostile().table
    matmuls = [("lut_matmul", *pair(*shapes, DTYPES[1]), table) for shapes in [*MATMULS.values(), *EMPTY_MATMULS]]
    geometries = [*CONVOLUTIONS.values(), *((x, w, [1, 2], p, [1, 1], g) for x, w, p, g in EMPTY_CONVOLUTIONS.values())]
    convolutions = []
    for x_shape, w_shape, *geometry in geometries:
        operands = *pair(x_shape, w_shape, DTYPES[1]), table
        convolutions.append(("lut_conv2d", *operands, *geometry, 0))
        if is_depthwise(x_shape, w_shape, geometry[3]):
            convolutions.append(("lut_dwconv2d", *operands, *geometry[:3], 0))
    for operator, x, w, table, *rest in matmuls + convolutions:
        function = getattr(ops, operator)
        real = function(x, w, table, *rest, engine="reference")
        with FakeTensorMode() as mode:
            fake = function(*map(mode.from_tensor, (x, w, table)), *rest)
        meta = function(*(t.to("meta") for t in (x, w, table)), *rest)
        for y in (fake, meta):
            assert (y.shape, y.dtype, y.is_contiguous()) == (real.shape, torch.int32, real.is_contiguous())
        assert fake.device == real.device
        assert meta.is_meta


@every_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(operator, dynamic, hostile, compiled):
    x, w, table, *rest = calls(hostile().table)[operator]
    function = getattr(ops, operator)

    def around(x, w, table):
        return function(x + 1, w, table, *rest) * 2

    run = compiled(around, dynamic=dynamic)
    assert torch.equal(run(x, w, table), around(x, w, table))
    longer = torch.cat([x, x.flip(0), x])
    assert torch.equal(run(longer, w, table), around(longer, w, table))


@every_operator
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(operator, strict, hostile):
    x, w, table, *rest = calls(hostile().table)[operator]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", w)
            self.register_buffer("table", table)

        def forward(self, x):
            return getattr(ops, operator)(x, self.w, self.table, *rest).float()

    network = Network()
    dynamic = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("rows", min=4)}}
    program = torch.export.export(network, (x,), dynamic_shapes=dynamic, strict=strict)
    assert getattr(ops, operator).default in {node.target for node in program.graph.nodes}
    other = torch.cat([x, x.flip(0)]).repeat(2, 1, 2, 1)
    assert torch.equal(program.module()(other), network(other))


# Refusals

X, W, C, D = (3, 4), (5, 4), (2, 4, 5, 6), (6, 2, 3, 2)
G = dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=2, pad_code=0)
# operator, x's shape, w's shape, what differs, what the message names
SHAPE_ERRORS = [
    ("lut_matmul", (4,), W, {}, "x"),
    ("lut_matmul", (), W, {}, "x"),
    ("lut_matmul", X, (4,), {}, "w"),
    ("lut_matmul", X, (), {}, "w"),
    ("lut_matmul", X, (5, 3), {}, "w"),
    ("lut_matmul", (3, 1), W, {}, "x"),
    ("lut_matmul", (2, *X), (3, *W), {}, "w"),
    ("lut_conv2d", (4, 5, 6), D, {}, "x"),
    ("lut_conv2d", (1, *C), D, {}, "x"),
    ("lut_conv2d", C, (2, 3, 2), {}, "w"),
    ("lut_conv2d", C, (1, *D), {}, "w"),
    ("lut_conv2d", (2, 6, 5, 6), D, {}, "w"),
    ("lut_conv2d", C, (6, 4, 3, 2), {}, "w"),
    ("lut_conv2d", C, (5, 2, 3, 2), {}, "groups"),
    ("lut_conv2d", C, D, {"groups": 1}, "groups"),
    ("lut_conv2d", C, D, {"groups": 3}, "groups"),
    ("lut_conv2d", C, D, {"groups": 0}, "groups"),
    ("lut_conv2d", C, D, {"groups": -2}, "groups"),
    ("lut_conv2d", C, (6, 2, 6, 2), {}, "kernel"),
    ("lut_conv2d", C, (6, 2, 3, 7), {}, "kernel"),
    ("lut_conv2d", C, D, {"dilation": [3, 1]}, "kernel"),
    ("lut_conv2d", (2, 4, 0, 6), D, {}, "kernel"),
    ("lut_conv2d", C, (6, 2, 0, 2), {}, "kernel"),
    ("lut_conv2d", C, (6, 2, 3, 0), {}, "kernel"),
    ("lut_dwconv2d", (4, 5, 6), (4, 1, 3, 2), {}, "x"),
    ("lut_dwconv2d", (2, 0, 5, 6), (0, 1, 3, 2), {}, "x"),
    ("lut_dwconv2d", C, (4, 3, 2), {}, "w"),
    ("lut_dwconv2d", C, (8, 2, 3, 2), {}, "w"),
    ("lut_dwconv2d", C, (6, 1, 3, 2), {}, "w"),
    ("lut_dwconv2d", C, (4, 1, 6, 2), {}, "kernel"),
    ("lut_dwconv2d", C, (4, 1, 0, 2), {}, "kernel"),
]
for _name, _wrong in (
    ("stride", ([0, 1], [1, 0], [-1, 1], [1, 1, 1])),
    ("padding", ([-1, 0], [0, -1], [0, 0, 0])),
    ("dilation", ([0, 1], [1, 0], [1, 1, 1])),
    ("pad_code", (256, -129)),
):
    for _value in _wrong:
        SHAPE_ERRORS.append(("lut_conv2d", C, D, {_name: _value}, _name))
        SHAPE_ERRORS.append(("lut_dwconv2d", C, (8, 1, 3, 2), {_name: _value}, _name))


def refuses(operator, x, w, table, rest, named):
    """The kernel and the fake refuse alike, the empty input too."""
    function, word = getattr(ops, operator), rf"(?<!\w){named}(?!\w)"
    for engine in ("auto", "reference"):
        with pytest.raises(ValueError, match=word):
            function(x, w, table, *rest, engine=engine)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w, table)]
        with pytest.raises(ValueError, match=word):
            function(*fakes, *rest)


def geometry(operator, **changes):
    if operator == "lut_matmul":
        return []
    arguments = {**G, **changes}
    return [arguments[k] for k in G if operator == "lut_conv2d" or k != "groups"]


@pytest.mark.parametrize(("operator", "x_shape", "w_shape", "changes", "named"), SHAPE_ERRORS)
def test_wrong_shapes_are_named(operator, x_shape, w_shape, changes, named, hostile):
    refuses(operator, *pair(x_shape, w_shape, DTYPES[1]), hostile().table, geometry(operator, **changes), named)


@every_operator
def test_wrong_types_and_tables_are_named(operator, hostile):
    x, w, table, *rest = calls(hostile().table)[operator]
    for dtype in (torch.int32, torch.int16, torch.int64, torch.float32, torch.bool):
        refuses(operator, x.to(dtype), w, table, rest, "x")
        refuses(operator, x, w.to(dtype), table, rest, "w")
        refuses(operator, x, w, table.to(dtype) if dtype != torch.int32 else table.to(torch.int8), rest, "table")
    for shape in ((256,), (1, 256, 256), (256, 255), (512, 128), (128, 512), (2, 256), (256, 2), (256, 0), (96, 256)):
        refuses(operator, x, w, torch.zeros(shape, dtype=torch.int32), rest, "table")


@every_operator
def test_operands_on_two_devices(operator, hostile):
    arguments = calls(hostile().table)[operator]
    for moved, name in enumerate(("x", "w", "table")):
        operands = [t.to("meta") if i == moved else t for i, t in enumerate(arguments[:3])]
        with pytest.raises(ValueError, match=rf"\b{name}\b.*device"):
            getattr(ops, operator)(*operands, *arguments[3:])


# Engines


@every_operator
@pytest.mark.parametrize("empty", [False, True])
def test_engine_keyword(operator, empty, hostile):
    """An engine that does not exist or cannot run here says so, an empty input or not."""
    x, *rest = calls(hostile().table)[operator]
    function, x = getattr(ops, operator), x[:0] if empty else x
    expected = function(x, *rest)
    for engine in ("auto", *ENGINES):
        assert torch.equal(function(x, *rest, engine=engine), expected)
    for engine in ("abacus", "CPU", ""):
        with pytest.raises(ValueError, match=f"engine.*'reference'.*{engine!r}"):
            function(x, *rest, engine=engine)
    with pytest.raises((EngineError, ImportError), match="cuda"):
        function(x, *rest, engine="cuda")
    with use_engine("cuda"), pytest.raises((EngineError, ImportError), match="cuda"):
        function(x, *rest)
