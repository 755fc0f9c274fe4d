import copy
import itertools
import math
import pickle
import re
import types
from decimal import Decimal

import numpy as np
import pytest
import torch

from approxconv.formats import load_multiplier
from approxconv.multiplier import Multiplier, prepare

INT32 = -(2**31), 2**31 - 1
BITS = [(2, 2), (2, 8), (8, 2), (3, 5), (7, 4), (8, 8)]
FLAGS = list(itertools.product([False, True], repeat=2))
every_format = pytest.mark.parametrize(
    ("bits", "flags"),
    list(itertools.product(BITS, FLAGS)),
    ids=lambda pair: "x".join("us"[v] if isinstance(v, bool) else str(v) for v in pair),
)

# References work on one pair of Python ints at a time.


def value_of(code, bits, signed):
    return code - 2**bits if signed and code >= 2 ** (bits - 1) else code


def values_of(bits, signed):
    return [value_of(code, bits, signed) for code in range(2**bits)]


def sign(value):
    return (value > 0) - (value < 0)


def hostile(bits, flags=(False, False), low=INT32[0], high=INT32[1], name=""):
    """Neither commutative, nor zero-preserving, nor anything like a product."""
    table = np.random.default_rng(sum(bits)).integers(low, high + 1, (2 ** bits[0], 2 ** bits[1]))
    table[0, 0] = 64
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1], name=name)


def unsigned(table):
    return Multiplier(table, a_signed=False, w_signed=False)


def assert_holds(m, expected, bits, flags):
    assert m.table.dtype == torch.int32
    assert m.table.is_contiguous()
    assert m.table.tolist() == expected
    assert (m.a_bits, m.w_bits) == m.bits == bits
    assert (m.a_signed, m.w_signed) == flags


# What a table may be made of. Limits are the type's or int32's, the nearest to zero, and exact in the type.
HALF, SINGLE, BRAIN = 65504, 2**31 - 2**7, 2**31 - 2**23
NUMPY = {f"{kind}{size}": kind for size in (1, 2, 4, 8) for kind in "iu"}
NUMPY_LIMITS = {n: (max(np.iinfo(n).min, INT32[0]), min(np.iinfo(n).max, INT32[1])) for n in NUMPY} | {
    ">i4": INT32,
    ">u2": (0, 2**16 - 1),
    "f2": (-HALF, HALF),
    "f4": (INT32[0], SINGLE),
    "f8": INT32,
    ">f8": INT32,
    "g": INT32,
}
TORCH_LIMITS = {
    getattr(torch, f"{'u' * (kind == 'u')}int{8 * int(name[1:])}"): NUMPY_LIMITS[name] for name, kind in NUMPY.items()
} | {
    torch.float16: (-HALF, HALF),
    torch.bfloat16: (INT32[0], BRAIN),
    torch.float32: (INT32[0], SINGLE),
    torch.float64: INT32,
}


def extremes(low, high):
    return [[low, high, 0, 1, 2, 64, 3, high], [high, 5, low, 0, 7, 6, 1, low], [9] * 8, list(range(8))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", NUMPY_LIMITS)
def test_every_numpy_dtype_and_layout(dtype):
    rows = extremes(*NUMPY_LIMITS[dtype])
    array = np.array(rows, dtype)
    fortran, strided, frozen = np.asfortranarray(array), np.repeat(array, 2, axis=1)[::-1, ::2][::-1], array.copy()
    frozen.flags.writeable = False
    for table in (array, fortran, strided, frozen):
        assert_holds(Multiplier(table, a_signed=False, w_signed=True), rows, (2, 3), (False, True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", TORCH_LIMITS, ids=str)
def test_every_torch_dtype_and_layout(dtype):
    rows = extremes(*TORCH_LIMITS[dtype])
    tensor = torch.tensor(rows, dtype=torch.float64).to(dtype)
    for table in (tensor, tensor.T.contiguous().T, torch.stack([tensor, tensor], -1)[..., 1]):
        assert_holds(Multiplier(table, a_signed=True, w_signed=False), rows, (2, 3), (True, False))


def test_other_tables_that_hold_integers():
    rows = extremes(*INT32)
    fractions = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    negated = torch.complex(torch.zeros(4, 8, dtype=torch.float64), -fractions.detach()).conj().imag
    assert negated.is_neg()
    with torch.inference_mode():
        inference = torch.tensor(rows)
    tables = [rows, [[float(v) for v in row] for row in rows], tuple(map(np.array, rows)), list(torch.tensor(rows))]
    for table in [*tables, fractions, torch.nn.Parameter(fractions), negated, inference]:
        assert_holds(unsigned(table), rows, (2, 3), (False, False))
    assert not unsigned(fractions).table.requires_grad


def spoilt(value, dtype):
    """A valid table but for its last entry."""
    tensor = isinstance(dtype, torch.dtype)
    table = torch.zeros(4, 4, dtype=dtype) if tensor else np.zeros((4, 4), dtype)
    table[-1, -1] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((4, 4), bool), "dtype bool"),
        ([[True, False] * 2] * 4, "dtype bool"),
        (torch.ones(4, 4, dtype=torch.bool), "dtype .*bool"),
        (np.ones((4, 4), complex), "dtype complex128"),
        ([[1j] * 4] * 4, "dtype complex128"),
        (torch.ones(4, 4, dtype=torch.complex64), "dtype .*complex64"),
        (torch.ones(4, 4).to(torch.complex32), "dtype .*complex32"),
        (torch.ones(4, 4, device="meta"), "dense.*torch.strided on meta"),
        (torch.ones(4, 4).to_sparse(), "dense.*torch.sparse_coo on cpu"),
        (torch.ones(4, 4).to_mkldnn(), "dense.*torch._mkldnn on cpu"),
        (np.ones((4, 4), object), "dtype object"),
        (None, "dtype object"),
        ([["1"] * 4] * 4, "dtype <U1"),
        (np.ones((4, 4), "M8[s]"), "dtype datetime64"),
        ([[1, 2, 3, 4], [1, 2, 3]], "rectangular"),
        *[(spoilt(v, t), "finite") for v in (np.nan, np.inf, -np.inf) for t in ("f2", "f8", torch.bfloat16)],
        *[(spoilt(0.5, t), "integers, got 0.5") for t in ("f2", "f4", torch.float16, torch.bfloat16)],
        (spoilt(-(2**30) + 2**-20, "f8"), "integers, got -1073741823.9"),
        *[(spoilt(2**31, t), "int32.* 2147483648") for t in ("i8", "u4", "u8", "f4", "f8", torch.int64)],
        *[(spoilt(2**31, t), "int32.* 2147483648") for t in (torch.bfloat16, torch.float32, torch.float64)],
        *[(spoilt(INT32[0] - 1, t), "int32.* -2147483649") for t in ("i8", "f8", torch.int64, torch.float64)],
        (spoilt(-(2**31) - 2**8, "f4"), "int32.* -2147483904"),
        (spoilt(2**64 - 1, "u8"), "int32.* 18446744073709551615"),
        (spoilt(1e300, "f8"), "int32.* 1e\\+300"),
        ([[2**64] * 4] * 4, "int32"),
    ],
)
def test_what_no_table_holds_is_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message):
        unsigned(table)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
@pytest.mark.parametrize(
    "shape",
    [
        *[(), (0,), (4,), (256,), (65536,), (0, 0), (0, 256), (256, 0), (1, 1), (1, 256), (2, 2), (2, 256), (256, 2)],
        *[(3, 256), (256, 255), (512, 256), (256, 512), (2**9, 2**9), (4, 4, 1), (1, 4, 4), (256, 256, 2)],
    ],
)
def test_a_wrong_shape_is_refused_with_the_shape(make, shape):
    with pytest.raises(ValueError, match=f"shape .*got {re.escape(str(shape))}"):
        unsigned(make(shape))


@pytest.mark.parametrize("flag", [0, 1, None, "yes", np.int8(1), torch.tensor(True)])
@pytest.mark.parametrize("which", ["a_signed", "w_signed"])
def test_flags_are_bools(which, flag):
    flags = {"a_signed": False, "w_signed": False, which: flag}
    for build in (
        lambda: Multiplier(np.zeros((4, 4), int), **flags),
        lambda: Multiplier.exact(2, **flags),
        lambda: Multiplier.from_function(np.multiply, bits=2, **flags),
    ):
        with pytest.raises(ValueError, match=f"{which} must be True or False, got "):
            build()


def test_numpy_bools_are_flags():
    m = Multiplier(np.zeros((4, 4), int), a_signed=np.True_, w_signed=np.False_)
    assert (m.a_signed, m.w_signed) == (True, False)
    assert m == Multiplier(np.zeros((4, 4), int), a_signed=True, w_signed=False)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_a_table_and_its_source_do_not_share(make):
    rows = extremes(*INT32)
    source = make(np.array(rows, np.int32))
    built = [
        unsigned(source),
        unsigned(source[:, :]),
        Multiplier.from_function(lambda a, w: source, bits=(2, 3), a_signed=False, w_signed=False),
    ]
    low, high = built[0].prepared.low, built[0].prepared.high
    source[:] = 7
    for m in built:
        assert m.table.tolist() == rows
        assert (m.prepared.low, m.prepared.high) == (low, high) == INT32
        m.table.zero_()
    assert (source == 7).all()


@pytest.mark.parametrize(
    "derive",
    [
        Multiplier.by_value,
        Multiplier.error,
        lambda m: m.swap().table,
        lambda m: m.sign_magnitude().table,
        lambda m: copy.copy(m).table,
        lambda m: copy.deepcopy(m).table,
        lambda m: pickle.loads(pickle.dumps(m)).table,
        lambda m: m.prepared.rows,
        lambda m: m.prepared.columns,
    ],
    ids=["by_value", "error", "swap", "sign_magnitude", "copy", "deepcopy", "pickle", "rows", "columns"],
)
@pytest.mark.parametrize("bits", [(3, 5), (8, 8)])
def test_what_is_derived_does_not_share_with_the_table(bits, derive):
    m = hostile(bits, low=-(2**31) + 1)
    before = m.table.clone()
    derive(m).fill_(7)
    assert torch.equal(m.table, before)


@every_format
def test_exact(bits, flags):
    m = Multiplier.exact(bits, *flags)
    a, w = (values_of(n, signed) for n, signed in zip(bits, flags, strict=True))
    assert_holds(m, [[x * y for y in w] for x in a], bits, flags)
    assert not m.error().any()
    metrics = m.metrics()
    assert metrics == dict.fromkeys(metrics, 0)


def test_exact_s_defaults_are_uint8_times_int8():
    m = Multiplier.exact()
    assert (m.bits, m.a_signed, m.w_signed) == ((8, 8), False, True)
    assert m.table[255, 128] == 255 * -128
    assert Multiplier.exact(4, True).table[15, 15] == 1


@pytest.mark.parametrize("bits", [0, 1, 9, -3, 8.0, "8", None, True, (8,), (8, 8, 8), (8, 9), (1, 8), (8, 8.0)])
def test_bits_out_of_range(bits):
    for build in (
        lambda: Multiplier.exact(bits),
        lambda: Multiplier.from_function(np.multiply, bits=bits, a_signed=False, w_signed=False),
    ):
        with pytest.raises(ValueError, match=f"bits must be .*2 to 8.*got {re.escape(repr(bits))}"):
            build()


@every_format
def test_from_function_hands_over_values(bits, flags):
    seen = []

    def function(a, w):
        seen.extend([a.dtype, w.dtype, a.shape, w.shape])
        product = 1000 * a - 7 * w + 64
        a += 1  # the arrays are the function's to write to
        w[:] = 0
        return product

    m = Multiplier.from_function(function, bits=bits, a_signed=flags[0], w_signed=flags[1], name="odd")
    a, w = (values_of(n, signed) for n, signed in zip(bits, flags, strict=True))
    assert_holds(m, [[1000 * x - 7 * y + 64 for y in w] for x in a], bits, flags)
    shape = 2 ** bits[0], 2 ** bits[1]
    assert seen == [np.int64, np.int64, shape, shape]
    assert m.name == "odd"


def test_from_function_defaults_to_8_bits_and_takes_lists_tensors_and_whole_floats():
    flags = {"a_signed": True, "w_signed": False}
    expected = Multiplier.exact(8, True, False)
    for convert in (np.ndarray.tolist, torch.from_numpy, np.float64, np.asfortranarray):
        assert Multiplier.from_function(lambda a, w, convert=convert: convert(a * w), **flags) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, w: 3, r"shape \(4, 8\), got \(\)"),
        (lambda a, w: None, r"shape \(4, 8\), got \(\)"),
        (lambda a, w: [[1, 2], [3]], r"fn must return a rectangular array of shape \(4, 8\)"),
        (lambda a, w: torch.empty(4, 8, device="meta"), "dense"),
        (7, "fn must be callable, got 7"),
        (np.ones((4, 8)), "fn must be callable, got array"),
        (lambda a, w: (a * w).T, r"shape \(4, 8\), got \(8, 4\)"),
        (lambda a, w: (a * w).ravel(), r"shape \(4, 8\), got \(32,\)"),
        (lambda a, w: (a * w)[:, :4], r"shape \(4, 8\), got \(4, 4\)"),
        (lambda a, w: a * w / 2, "integers, got 0.5"),
        (lambda a, w: np.where(w == 7, np.nan, a * w), "finite"),
        (lambda a, w: a * w + 2**31 - 21, "int32.* 2147483648"),
        (lambda a, w: a > w, "dtype bool"),
        (lambda a, w: a + 1j * w, "dtype complex"),
    ],
)
def test_from_function_refuses_what_is_no_table(function, message):
    with pytest.raises(ValueError, match=message):
        Multiplier.from_function(function, bits=(2, 3), a_signed=False, w_signed=False)


@every_format
def test_by_value_ascends(bits, flags):
    m = hostile(bits, flags)
    table = m.table.tolist()
    a, w = (sorted(values_of(n, signed)) for n, signed in zip(bits, flags, strict=True))
    # Python's % is the code of a negative value.
    assert m.by_value().tolist() == [[table[x % len(table)][y % len(table[0])] for y in w] for x in a]
    assert m.by_value().dtype == torch.int32
    assert m.by_value().is_contiguous()
    assert (m.a_range, m.w_range) == ((a[0], a[-1]), (w[0], w[-1]))


@every_format
def test_error_is_by_code_and_does_not_wrap(bits, flags):
    m = hostile(bits, flags)
    m.table[1, 1], m.table[-1, -2] = INT32
    a, w = (values_of(n, signed) for n, signed in zip(bits, flags, strict=True))
    table = m.table.tolist()
    expected = [[t - x * y for t, y in zip(row, w, strict=True)] for row, x in zip(table, a, strict=True)]
    assert m.error().tolist() == expected
    assert m.error().dtype == torch.int64


@every_format
def test_swap(bits, flags):
    m = hostile(bits, flags)
    swapped = m.swap()
    assert_holds(swapped, [list(column) for column in zip(*m.table.tolist(), strict=True)], bits[::-1], flags[::-1])
    assert swapped != m
    assert swapped.swap() == m


@pytest.mark.parametrize("bits", BITS)
def test_sign_magnitude(bits):
    m = hostile(bits, low=-(2**31) + 1)
    table, (a, w) = m.table.tolist(), (values_of(n, True) for n in bits)
    expected = [[sign(x) * sign(y) * table[abs(x)][abs(y)] for y in w] for x in a]
    signed = m.sign_magnitude()
    assert_holds(signed, expected, bits, (True, True))
    assert table[0][0] == 64 != signed.table[0, 0]
    # The lowest value has no positive counterpart; its magnitude is the code of the same bits.
    lowest = tuple(2 ** (n - 1) for n in bits)
    assert signed.table[lowest] == m.table[lowest]
    assert signed.table[lowest[0], 1] == -m.table[lowest[0], 1]
    assert signed.table[-1, lowest[1]] == m.table[1, lowest[1]]


def test_sign_magnitude_of_what_int32_cannot_negate():
    table = np.zeros((4, 4), int)
    table[1, 2] = INT32[0]
    with pytest.raises(ValueError, match=r"int32.* 2147483648"):
        unsigned(table).sign_magnitude()


@pytest.mark.parametrize("flags", FLAGS[1:])
def test_sign_magnitude_of_a_signed_circuit(flags):
    with pytest.raises(ValueError, match=f"unsigned.*a_signed={flags[0]}, w_signed={flags[1]}"):
        hostile((3, 3), flags).sign_magnitude()


def test_equality_and_hash_tell_formats_and_entries_apart():
    numbers = np.random.default_rng(0).integers(*INT32, 64)
    shapes = [(8, 8), (4, 16), (16, 4)]
    every = [Multiplier(numbers.reshape(s), a_signed=f[0], w_signed=f[1]) for s in shapes for f in FLAGS]
    for place in (0, 63):
        other = numbers.copy()
        other[place] += 1
        every.append(unsigned(other.reshape(8, 8)))
    assert len({m.content_hash for m in every}) == len(set(every)) == len(every)
    for one, other in itertools.permutations(every, 2):
        assert one != other
    again = Multiplier(numbers.reshape(8, 8).tolist(), a_signed=False, w_signed=False, name="another name")
    assert again == every[0]
    assert again in set(every)
    assert again.content_hash == every[0].content_hash
    for stranger in (None, 0, every[0].table, every[0].content_hash):
        assert (every[0] == stranger) is False


@pytest.mark.parametrize(
    ("m", "content_hash"),
    [
        (Multiplier.exact(2), "f54ec20ad3b2ba59a3c4d57c7dde66105a131fbedbef33f64dfa4482dcbef1ea"),
        (
            Multiplier(np.arange(16).reshape(4, 4), a_signed=True, w_signed=False),
            "1edba7ae60c70cb7a99fc41dd84ba708d0be3a3499a87e118824729f31a47994",
        ),
    ],
    ids=["exact", "arange"],
)
def test_content_hash_is_that_of_files_already_written(m, content_hash):
    assert m.content_hash == content_hash


def test_content_hash_follows_the_table(tmp_path):
    m, other = unsigned(np.zeros((4, 4), int)), unsigned(np.eye(4, dtype=int))
    assert m.content_hash != other.content_hash
    m.table.fill_diagonal_(1)
    assert m == other
    assert m.content_hash == other.content_hash
    assert hash(m) == hash(other)
    m.save(tmp_path / "m.npz")
    assert load_multiplier(tmp_path / "m.npz") == other


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *[lambda m, p=protocol: pickle.loads(pickle.dumps(m, p)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)],
    ],
    ids=["copy", "deepcopy", *[f"pickle{p}" for p in range(pickle.HIGHEST_PROTOCOL + 1)]],
)
@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_duplicates(duplicate, flags):
    m = hostile((3, 5), flags, name="ödd")
    # What it remembers need not be duplicated, nor be in the way.
    assert (m.prepared.low, m.on("meta").shape, len(m.content_hash)) == (m.table.min(), m.table.shape, 64)
    twin = duplicate(m)
    assert_holds(twin, m.table.tolist(), (3, 5), flags)
    assert twin == m
    assert twin.content_hash == m.content_hash
    assert (twin.name, twin.prepared.low, twin.prepared.high) == ("ödd", m.prepared.low, m.prepared.high)
    twin.table[0, 0] += 1
    assert twin != m
    assert twin.prepared.rows[0, 0] == 65


def prepared_range(low, high, sides=(256, 256)):
    table = np.random.default_rng(0).integers(low, high + 1, sides)
    table[1, 0], table[0, 1] = low, high
    return torch.from_numpy(table.astype(np.int32))


def assert_prepared(known, table):
    """`known` is right for `table`, whatever forms it chose."""
    sides = table.shape
    codes = torch.arange(256)
    low, high = table.min().item(), table.max().item()
    assert (known.low, known.high, known.magnitude) == (low, high, max(abs(low), abs(high)))
    assert all(type(v) is int for v in (known.low, known.high, known.offset, known.magnitude))
    every_byte = table.long()[codes % sides[0]][:, codes % sides[1]]
    assert torch.equal(known.rows.long() + known.offset, every_byte)
    assert torch.equal(known.columns.long() + known.offset, every_byte.T)
    assert known.rows.is_contiguous()
    assert known.columns.is_contiguous()
    assert known.rows.dtype == known.columns.dtype == (torch.int16 if high - low < 2**16 else torch.int32)
    if max(abs(low), abs(high)) < 2**15:
        assert known.offset == 0


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (64, 64),
        (-3, 5),
        (-(2**15), 2**15 - 1),
        (0, 255 * 255),
        (0, 2**16 - 1),
        (0, 2**16),
        (1 - 2**16, 0),
        (-(2**16), 0),
        (-(2**15) - 1, 2**15 - 2),
        (-(2**15) - 1, 2**15 - 1),
        (10**6, 10**6 + 2**16 - 1),
        (INT32[0], INT32[0] + 2**16 - 1),
        (INT32[1] - 2**16 + 1, INT32[1]),
        (INT32[1] - 2**16, INT32[1]),
        (INT32[0], 0),
        INT32,
    ],
)
def test_prepare_finds_the_range_and_the_narrowest_form(low, high):
    table = prepared_range(low, high)
    assert_prepared(prepare(table), table)
    # Not stored row after row.
    assert_prepared(prepare(table.T), table.T)


@pytest.mark.parametrize("bits", [(2, 2), (2, 8), (8, 2), (3, 5), (7, 4)])
@pytest.mark.parametrize(("low", "high"), [(-100, 100), (-70, 2**16 - 71), INT32])
def test_prepare_repeats_a_narrow_table_over_the_unused_bits(bits, low, high):
    table = prepared_range(low, high, (2 ** bits[0], 2 ** bits[1]))
    assert_prepared(prepare(table), table)


def test_prepared_once_per_table_and_contents():
    m = hostile((3, 5), low=-100, high=100)
    known = m.prepared
    assert m.prepared is prepare(m.table) is known
    assert known.columns is m.prepared.columns
    twin = m.table.clone()
    assert prepare(twin) is not known
    assert_prepared(prepare(twin), twin)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.__setitem__((0, 0), INT32[0]),
        lambda t: t[2:].fill_(10**6),
        lambda t: t.copy_(prepared_range(5, 10**5, t.shape)),
        lambda t: t.neg_(),
        lambda t: torch.mul(t, 1000, out=t),
    ],
    ids=["entry", "view", "copy", "method", "out"],
)
def test_a_write_to_a_table_prepares_it_anew(write):
    table = prepared_range(-100, 120, (8, 32))
    before, known = table.clone(), prepare(table)
    write(table)
    assert not torch.equal(table, before)
    assert_prepared(prepare(table), table)
    assert prepare(table) is prepare(table)
    # What an earlier call returned stays that of the earlier table.
    assert_prepared(known, before)


def test_prepare_of_inference_tensors():
    with torch.inference_mode():
        table = prepared_range(-100, 100, (8, 32)).clone()
        assert table.is_inference()
        assert_prepared(prepare(table), table)
        table[3, 3] = INT32[1]
        assert_prepared(prepare(table), table)
    assert_prepared(prepare(table), table)


@pytest.mark.parametrize(
    "build",
    [
        lambda: unsigned(np.eye(4, dtype=int)),
        # A format that nothing else in the tests uses, as exact multipliers are kept.
        lambda: Multiplier.exact((7, 2), True, True),
        lambda: copy.deepcopy(hostile((2, 3))),
    ],
    ids=["table", "exact", "deepcopy"],
)
def test_a_multiplier_made_in_inference_mode_is_prepared_once_too(build):
    with torch.inference_mode():
        m = build()
        assert m.prepared is m.prepared
    assert m.prepared is m.prepared
    assert build().prepared.high == m.prepared.high


def test_copied_to_a_device_once():
    m = hostile((3, 5))
    assert m.on("cpu") is m.on(torch.device("cpu", 0)) is m.table
    there = m.on("meta")
    assert (there.device.type, there.dtype, there.shape) == ("meta", torch.int32, m.table.shape)
    assert m.on(torch.device("meta")) is there


def test_metrics_by_hand():
    # a·w for uint2 codes 0 1 2 3 and int2 codes 0 1 -2 -1, with five entries off: +1, +4, +2, -2, +3.
    table = [[0 + 1, 0, 0 + 4, 0], [0, 1 + 2, -2, -1], [0, 2, -4 - 2, -2], [0, 3, -6, -3 + 3]]
    m = Multiplier(table, a_signed=False, w_signed=True)
    expected = {
        "MAE": 12 / 16,
        "MAE%": 100 * 12 / 16 / 16,
        "WCE": 4,
        "WCE%": 25,
        "EP%": 100 * 5 / 16,
        # Over the nine pairs without a zero: 2/1, 2/4, 3/3.
        "MRE%": 100 * 3.5 / 9,
        "WCRE%": 200,
        "MSE": 34 / 16,
        "bias": 8 / 16,
        "variance": 34 / 16 - 1 / 4,
    }
    assert m.metrics() == pytest.approx(expected, rel=1e-12)
    assert m.swap().metrics() == pytest.approx(expected, rel=1e-12)
    other = Multiplier(table, a_signed=True, w_signed=False).metrics()
    assert other["MAE"] != expected["MAE"]


def test_metrics_of_unequal_widths_are_relative_to_all_product_bits():
    m = Multiplier.from_function(lambda a, w: a * w - 3, bits=(3, 6), a_signed=True, w_signed=False)
    metrics = m.metrics()
    assert metrics["MAE%"] == metrics["WCE%"] == 100 * 3 / 2**9
    assert (metrics["EP%"], metrics["WCRE%"], metrics["MSE"], metrics["bias"]) == (100, 300, 9, -3)
    assert metrics["variance"] == 0


def test_metrics_of_extreme_entries():
    m = unsigned(np.full((256, 256), INT32[0]))
    metrics = m.metrics()
    assert metrics["WCE"] == 2**31 + 255 * 255
    assert metrics["bias"] == -metrics["MAE"] == -(2**31) - 127.5**2
    assert metrics["MSE"] == pytest.approx(metrics["bias"] ** 2, rel=1e-4)


def weighted_metrics(m, a_hist, w_hist):
    """The figures by a plain double loop over pairs of codes."""
    a, w = (values_of(n, signed) for n, signed in zip(m.bits, (m.a_signed, m.w_signed), strict=True))
    total = sum(a_hist) * sum(w_hist)
    mae = mse = bias = wrong = relative = counted = 0.0
    worst, worst_relative = 0, 0.0 if total else math.nan
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(w)):
        share = a_hist[i] * w_hist[j] / total
        if not share:
            continue
        e = int(m.table[i, j]) - x * y
        mae, mse, bias = mae + share * abs(e), mse + share * e * e, bias + share * e
        wrong += share * (e != 0)
        worst = max(worst, abs(e))
        if x * y:
            counted += share
            relative += share * abs(e / (x * y))
            worst_relative = max(worst_relative, abs(e / (x * y)))
    full = 2 ** sum(m.bits)
    return {
        "MAE": mae,
        "MAE%": 100 * mae / full,
        "WCE": worst,
        "WCE%": 100 * worst / full,
        "WCRE%": 100 * worst_relative if counted else math.nan,
        "EP%": 100 * wrong,
        "MRE%": 100 * relative / counted if counted else math.nan,
        "MSE": mse,
        "bias": bias,
        "variance": mse - bias**2,
    }


def one_hot(codes, code):
    return [int(i == code) for i in range(codes)]


def near(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def half_wrong(bits, flags):
    """About every second entry is off by up to 20."""
    generator = np.random.default_rng(7)
    error = generator.integers(-20, 21, (2 ** bits[0], 2 ** bits[1])) * generator.integers(0, 2, (1, 2 ** bits[1]))
    return Multiplier(Multiplier.exact(bits, *flags).table.numpy() + error, a_signed=flags[0], w_signed=flags[1])


@pytest.mark.parametrize(("bits", "flags"), list(itertools.product(BITS[:-1], FLAGS)), ids=str)
def test_weighted_metrics_by_a_double_loop(bits, flags):
    m = half_wrong(bits, flags)
    generator = np.random.default_rng(1)
    a_hist, w_hist = (generator.integers(0, 5, 2**n) for n in bits)
    a_hist[1] = w_hist[1] = 3  # so that something is met
    ones = [[1] * 2**n for n in bits]
    for a, w in ((a_hist, w_hist), (a_hist, None), (None, w_hist)):
        expected = weighted_metrics(m, *(o if h is None else h.tolist() for h, o in zip((a, w), ones, strict=True)))
        assert m.metrics(a, w) == near(expected)
        assert m.metrics(w_hist=w, a_hist=a) == m.metrics(a, w)
        assert m.swap().metrics(w, a) == near(expected)


@pytest.mark.parametrize("bits", [(2, 3), (8, 8)])
def test_uniform_histograms_change_nothing(bits):
    m = half_wrong(bits, (False, True))
    plain = m.metrics()
    sides = [2**n for n in bits]
    for count in (1, 7, 0.1, 1e-300, 1e300, 2**62):
        a, w = ([count] * side for side in sides)
        for arguments in ((a, w), (a,), (None, w)):
            assert m.metrics(*arguments) == pytest.approx(plain, rel=1e-12, abs=1e-12)
    assert m.metrics(None, None) == plain


@pytest.mark.parametrize(("code_a", "code_w"), [(0, 0), (3, 5), (7, 15), (7, 0)])
def test_one_hot_histograms_pick_an_entry(code_a, code_w):
    m = hostile((3, 4), (True, True), low=-1000, high=1000)
    a, w = value_of(code_a, 3, True), value_of(code_w, 4, True)
    e = int(m.table[code_a, code_w]) - a * w
    metrics = m.metrics(one_hot(8, code_a), one_hot(16, code_w))
    assert (metrics["MAE"], metrics["WCE"], metrics["bias"]) == (abs(e), abs(e), e)
    assert (metrics["MSE"], metrics["variance"], metrics["EP%"]) == (e * e, 0, 100 * (e != 0))
    relative = 100 * abs(e / (a * w)) if a * w else math.nan
    assert (metrics["MRE%"], metrics["WCRE%"]) == near((relative, relative))


def test_no_relative_error_where_every_pair_met_has_a_zero():
    m = half_wrong((3, 4), (False, True))
    metrics = m.metrics(one_hot(8, 0))
    assert math.isnan(metrics["MRE%"])
    assert math.isnan(metrics["WCRE%"])
    others = {key: value for key, value in metrics.items() if key not in ("MRE%", "WCRE%")}
    assert all(map(math.isfinite, others.values()))
    assert metrics == near(weighted_metrics(m, one_hot(8, 0), [1] * 16))
    exact = Multiplier.exact((3, 4)).metrics(one_hot(8, 0))
    assert {key: value for key, value in exact.items() if value} == near({"WCRE%": math.nan, "MRE%": math.nan})


def test_worst_cases_are_of_pairs_that_are_met():
    table = Multiplier.exact(2, False, False).table.clone()
    table[3, 3] += 100
    table[1, 2] -= 4
    m = unsigned(table)
    assert m.metrics()["WCE"] == 100
    metrics = m.metrics([1, 1, 1, 0], [1, 1, 1, 1e-12])
    assert (metrics["WCE"], metrics["WCRE%"]) == (4, 200)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        np.array,
        lambda h: np.array(h, np.uint8),
        lambda h: np.array(h, ">f4"),
        lambda h: np.array(h, object),
        lambda h: [np.float32(v) for v in h],
        lambda h: np.repeat(np.array(h), 2)[::-2][::-1],
        torch.tensor,
        lambda h: torch.tensor(h, dtype=torch.bfloat16),
        lambda h: torch.tensor(h, dtype=torch.float16),
        lambda h: torch.tensor(h, dtype=torch.float32, requires_grad=True),
        lambda h: torch.nn.Parameter(torch.tensor(h, dtype=torch.float64)),
        lambda h: torch.tensor([h, h]).T[:, 0],
        lambda h: torch.bincount(torch.tensor([code for code, n in enumerate(h) for _ in range(n)]), minlength=len(h)),
    ],
)
def test_histograms_of_any_kind_of_numbers(convert):
    m = half_wrong((2, 3), (True, False))
    a_hist, w_hist = [3, 0, 1, 8], [0, 1, 2, 3, 4, 5, 6, 7]
    assert m.metrics(convert(a_hist), convert(w_hist)) == near(weighted_metrics(m, a_hist, w_hist))


def test_histograms_in_inference_mode():
    m = half_wrong((2, 2), (True, False))
    with torch.inference_mode():
        assert m.metrics(torch.tensor([1, 2, 3, 4])) == near(weighted_metrics(m, [1, 2, 3, 4], [1] * 4))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ([1, 2, 3], r"one count a code, shape \(4,\), got \(3,\)"),
        ([], r"shape \(4,\), got \(0,\)"),
        (1, r"shape \(4,\), got \(\)"),
        (np.ones((1, 4)), r"shape \(4,\), got \(1, 4\)"),
        (torch.ones(4, 1), r"shape \(4,\), got \(4, 1\)"),
        ([1, -1, 1, 1], "finite, not negative and not all zero, got values from -1.0 to 1.0"),
        ([0, 0, 0, 0], "not all zero, got values from 0.0 to 0.0"),
        ([1, math.nan, 1, 1], "finite, .* got values from nan"),
        ([1, math.inf, 1, 1], "finite, .* to inf"),
        (torch.tensor([1, math.inf, 1, 1]), "finite, .* to inf"),
        ([1, None, 1, 1], "finite, .* got values from nan"),
        ("1234", "hold numbers: got dtype <U4"),
        (["1", "2", "3", "4"], "hold numbers: got dtype <U1"),
        ([1j, 1, 1, 1], "hold numbers: got dtype complex128"),
        (torch.ones(4, dtype=torch.complex64), "hold numbers: got dtype complex64"),
        (torch.ones(4).to_sparse(), "hold numbers"),
        (torch.ones(4, device="meta"), "hold numbers"),
        ({0: 1, 1: 1, 2: 1, 3: 1}, "hold numbers"),
        ([10**400, 1, 1, 1], "hold numbers"),
        ([[1, 2], [3]], "hold numbers"),
        (np.ones(4, "M8[s]"), "hold numbers: got dtype datetime64"),
    ],
)
@pytest.mark.parametrize("which", ["a_hist", "w_hist"])
def test_what_is_no_histogram_is_refused_by_name(which, histogram, message):
    with pytest.raises(ValueError, match=f"^{which} must .*{message}"):
        Multiplier.exact(2).metrics(**{which: histogram})


def described(info=None, gradients=None):
    return Multiplier(np.zeros((4, 8), int), a_signed=True, w_signed=False, name="m", info=info, gradients=gradients)


@pytest.mark.parametrize(
    ("info", "power"),
    [
        ({"power": "0.425 mW"}, 0.425),
        ({"power": "301 uW"}, 0.301),
        ({"power": "301µW"}, 0.301),  # micro sign
        ({"power": "301 μW"}, 0.301),  # Greek mu
        ({"power": "12e1 nW"}, 1.2e-4),
        ({"power": " 2W "}, 2000),
        ({"power": "0.425"}, 0.425),
        ({"power": 0.425}, 0.425),
        ({"power": 3}, 3),
        ({"power": 1e-7}, 1e-7),
        ({"power": 0}, 0),
        ({"PDK45_PWR": "0.052 mW"}, 0.052),
        ({"PWR": "0.1 mW", "PDK45_PWR": "0.2 mW"}, 0.2),
        ({"PWR": "0.1 mW", "PDK45_PWR": "0.2 mW", "power": "0.3 mW"}, 0.3),
        ({"power": "unknown", "PWR": "0.1 mW"}, 0.1),
        ({"power": "3 dBm", "PWR": "0.1 mW"}, 0.1),
        ({"power": "3 MW"}, None),
        ({"power": "3 mw"}, None),
        ({"power": "-3 mW"}, None),
        ({"power": "1e999 mW"}, None),
        ({"power": "1e308 W"}, None),
        ({"power": "nan"}, None),
        ({"power": "inf mW"}, None),
        ({"power": "1.2.3 mW"}, None),
        ({"power": "."}, None),
        ({"power": "١ mW"}, None),
        ({"power": True}, None),
        ({"power": None}, None),
        ({"power": [0.4]}, None),
        ({"power": ""}, None),
        ({"power": "9" * 10**6}, None),
        ({"Power": 1}, None),
        ({}, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_power_in_milliwatts(info, power):
    assert described(info).power == (None if power is None else pytest.approx(power, rel=1e-12))


def test_power_follows_info():
    m = described()
    assert m.power is None
    m.info["power"] = "2 uW"
    assert m.power == pytest.approx(0.002)


def test_info_is_a_copy_of_what_json_holds():
    inner = [1, 2.5, None, True, "ö"]
    source = {"deep": {"list": inner}, "tuple": (1, 2)}
    m = described(source)
    assert m.info == {"deep": {"list": [1, 2.5, None, True, "ö"]}, "tuple": [1, 2]}
    inner.append(3)
    source["more"] = 1
    assert m.info == {"deep": {"list": [1, 2.5, None, True, "ö"]}, "tuple": [1, 2]}
    assert described().info == described({}).info == {}
    assert described(types.MappingProxyType({"a": 1})).info == {"a": 1}
    assert described().info is not described().info


def endless():
    info = {}
    info["self"] = info
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ([("a", 1)], "info must be a mapping with str keys, got \\[\\('a', 1\\)\\]"),
        ("power", "mapping with str keys, got 'power'"),
        ({1: 2}, "mapping with str keys, got {1: 2}"),
        ({"a": math.nan}, "what JSON can"),
        ({"a": math.inf}, "what JSON can"),
        ({"a": np.float32(1)}, "what JSON can: .*float32"),
        ({"a": {1, 2}}, "what JSON can: .*set"),
        ({"a": b"1"}, "what JSON can: .*bytes"),
        ({"a": {(1, 2): 3}}, "what JSON can"),
        (endless(), "what JSON can"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_info_is_refused(info, message):
    with pytest.raises(ValueError, match=message):
        described(info)


def test_info_and_gradients_take_no_part_in_equality():
    plain = described()
    other = described({"power": 1}, (np.ones((4, 8)), np.ones((4, 8))))
    assert plain == other
    assert hash(plain) == hash(other)
    assert plain.content_hash == other.content_hash


GRADIENTS = [[[i * 8 + j + 0.5 for j in range(8)] for i in range(4)], [[-j / 4 for j in range(8)] for i in range(4)]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "convert",
    [
        lambda g: g,
        np.array,
        lambda g: np.array(g, ">f8"),
        lambda g: np.asfortranarray(np.array(g, np.float16)),
        lambda g: np.array(g)[::-1].copy()[::-1],
        lambda g: np.frombuffer(np.array(g).tobytes()).reshape(4, 8),  # read-only
        lambda g: [torch.tensor(row) for row in g],
        torch.tensor,
        lambda g: torch.tensor(g, dtype=torch.float64, requires_grad=True),
        lambda g: torch.tensor(g, dtype=torch.float16),
        lambda g: torch.tensor(g).T.contiguous().T,
    ],
)
@pytest.mark.parametrize("pair", [tuple, list])
def test_gradients_of_any_kind_of_numbers(convert, pair):
    m = described(gradients=pair(map(convert, GRADIENTS)))
    assert isinstance(m.gradients, tuple)
    for got, expected in zip(m.gradients, GRADIENTS, strict=True):
        assert (got.dtype, got.device.type, got.is_contiguous(), got.requires_grad) == (
            torch.float32, "cpu", True, False,
        )  # fmt: skip
        assert got.tolist() == expected
    assert described().gradients is None


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_gradients_and_their_sources_do_not_share(make):
    source = make((4, 8), dtype={np.zeros: np.float32, torch.zeros: torch.float32}[make])
    m = described(gradients=(source, source))
    source += 1
    assert not m.gradients[0].any()
    m.gradients[0].fill_(3)
    assert not m.gradients[1].any()
    assert (source == 1).all()


def test_gradients_made_in_inference_mode_can_be_written():
    with torch.inference_mode():
        m = described(gradients=(torch.ones(4, 8), np.ones((4, 8))))
    for gradient in m.gradients:
        assert not gradient.is_inference()
        gradient.add_(1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (np.ones((4, 8)), "pair of tables, got ndarray"),
        (torch.ones(2, 4, 8), "pair of tables, got Tensor"),
        ((np.ones((4, 8)),), "pair of tables"),
        ((np.ones((4, 8)),) * 3, "pair of tables"),
        ({"a": 1, "w": 2}, "pair of tables, got dict"),
        ((np.ones((4, 8)), np.ones((8, 4))), r"table's shape \(4, 8\), got \(8, 4\)"),
        ((np.ones(32), np.ones(32)), r"table's shape \(4, 8\), got \(32,\)"),
        ((np.ones((4, 8)), np.full((4, 8), np.nan)), "finite"),
        ((torch.full((4, 8), math.inf), torch.ones(4, 8)), "finite"),
        ((np.full((4, 8), 1e300), np.ones((4, 8))), "finite in float32"),
        ((None, np.ones((4, 8))), "hold numbers"),
        ((np.full((4, 8), "1"), np.ones((4, 8))), "hold numbers: got dtype <U1"),
        ((np.ones((4, 8), complex), np.ones((4, 8))), "hold numbers: got dtype complex128"),
        ((torch.ones(4, 8, dtype=torch.complex64), torch.ones(4, 8)), "hold numbers: got dtype complex64"),
        ((torch.ones(4, 8, device="meta"), torch.ones(4, 8)), "hold numbers"),
        ((torch.ones(4, 8).to_sparse(), torch.ones(4, 8)), "hold numbers"),
        (([[1, 2], [3]], np.ones((4, 8))), "hold numbers"),
    ],
    ids=str,
)
def test_what_are_no_gradients_is_refused(gradients, message):
    with pytest.raises(ValueError, match=f"gradients must .*{message}"):
        described(gradients=gradients)


def test_swap_exchanges_the_gradients_and_keeps_info():
    m = described({"power": "2 mW", "deep": [1]}, GRADIENTS)
    swapped = m.swap()
    for got, of in zip(swapped.gradients, (1, 0), strict=True):
        assert got.tolist() == [list(column) for column in zip(*GRADIENTS[of], strict=True)]
        assert got.is_contiguous()
    assert (swapped.info, swapped.power, swapped.name) == (m.info, 2, "m_swapped")
    swapped.info["deep"].append(2)
    swapped.gradients[1].zero_()
    assert m.info["deep"] == [1]
    assert m.gradients[0].tolist() == GRADIENTS[0]
    again = swapped.swap()
    assert again.gradients[1].tolist() == GRADIENTS[1]
    assert described().swap().gradients is None


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *[lambda m, p=protocol: pickle.loads(pickle.dumps(m, p)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)],
    ],
    ids=["copy", "deepcopy", *[f"pickle{p}" for p in range(pickle.HIGHEST_PROTOCOL + 1)]],
)
def test_duplicates_keep_info_and_gradients_of_their_own(duplicate):
    m = described({"power": "2 mW", "deep": [1]}, GRADIENTS)
    twin = duplicate(m)
    assert (twin.info, twin.power) == (m.info, 2)
    assert [gradient.tolist() for gradient in twin.gradients] == GRADIENTS
    twin.info["deep"].append(2)
    for gradient in twin.gradients:
        gradient.zero_()
    assert m.info["deep"] == [1]
    assert [gradient.tolist() for gradient in m.gradients] == GRADIENTS
    assert duplicate(described()).gradients is None


def test_sign_magnitude_is_another_circuit():
    m = Multiplier(np.zeros((4, 4), int), a_signed=False, w_signed=False, info={"power": 1})
    assert m.sign_magnitude().info == {}
    assert m.sign_magnitude().gradients is None


@pytest.fixture(scope="module")
def evoapprox(reference_multipliers):
    """``[(Multiplier, its metrics, published figures)]``; a row is the code of the circuit's first argument."""
    return [(m, m.metrics(), m.info) for m in reference_multipliers.values()]


# 100 * 1.25 / 65536 is 0.0019.
MISPRINTS = {"MAE%": ["mul8s_1KVA"]}


@pytest.mark.parametrize("figure", ["MAE", "MAE%", "WCE", "WCE%", "WCRE%", "EP%", "MRE%", "MSE"])
def test_published_figures(evoapprox, figure):
    missed = []
    for m, metrics, published in evoapprox:
        printed = Decimal(published[figure].removesuffix(" %"))
        last_digit = Decimal(1).scaleb(printed.as_tuple().exponent)
        if abs(Decimal(metrics[figure]) - printed) > last_digit:
            missed.append(m.name)
    assert missed == MISPRINTS.get(figure, [])


def test_published_worst_case_by_value(evoapprox):
    for m, _, published in evoapprox:
        values = torch.arange(-128, 128) if m.name.startswith("mul8s") else torch.arange(256)
        assert (m.by_value() - torch.outer(values, values)).abs().max() == float(published["WCE"]), m.name
