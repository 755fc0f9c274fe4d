"""CUDA C++ on the CPU means what it means on a GPU: everything in the shim against formulas in Python."""

import math
import random
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from approxconv.kernels import host
from approxconv.kernels.compile import KernelCompileError, compile_kernel
from approxconv.kernels.host import KernelTrapError, run_on_host
from approxconv.kernels.host.build import build
from approxconv.kernels.plan import Plan
from approxconv.kernels.sources import read, use_source

try:
    COMPILER = host.compiler()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

POISON = 0xA5A5A5A5 - 2**32


@pytest.fixture(scope="module", autouse=True)
def sources(tmp_path_factory):
    """semantics.cu and the functions below are the kernel sources, built once for this module."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "semantics.cu").write_text(Path(__file__).with_name("semantics.cu").read_text())
    (folder / "functions.cu").write_text(functions_source())
    with pytest.MonkeyPatch.context() as patch, use_source(folder):
        patch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run(kernel, block, *arguments, grid=1, shared=0, source="semantics", mode=None):
    grid, block = ((size, 1, 1) if isinstance(size, int) else size for size in (grid, block))
    run_on_host([Plan(source, kernel, grid, block, shared, arguments)], sanitize=mode)


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def numbers(*shape, dtype=torch.int32):
    return torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---- functions of numbers --------------------------------------------------------------------------------------------


def wrap(value, bits=32, signed=True):
    value &= 2**bits - 1
    return value - 2**bits if signed and value >> bits - 1 else value


def word(value):
    return wrap(value, signed=False)


def fields(value, bits, signed):
    return [wrap(value >> at, bits, signed) for at in range(0, 32, bits)]


def dot(a, b, c, a_bits, signed, first=0):
    pairs = zip(fields(a, a_bits, signed), fields(b, 8, signed)[first:], strict=False)
    return wrap(c + sum(x * y for x, y in pairs), signed=signed)


def byte_perm(x, y, selector):
    eight = x.to_bytes(4, "little") + y.to_bytes(4, "little")
    return int.from_bytes(bytes(eight[selector >> 4 * n & 7] for n in range(4)), "little")


def to_integer(x, rounded, low, high):
    if math.isnan(x):
        return 0
    return min(max(x if math.isinf(x) else rounded(x), low), high)


def to_int(rounded):
    return lambda a: to_integer(a, rounded, -(2**31), 2**31 - 1)


def to_unsigned(rounded):
    return lambda a: to_integer(a, rounded, 0, 2**32 - 1)


def number_of_two(pick):
    return lambda a, b: b if math.isnan(a) else a if math.isnan(b) else pick(a, b)


def view(value, of, as_type):
    return np.array(value, of).view(as_type).item()


PREAMBLE = """
__device__ char4 chars(int w) { return make_char4(w, w >> 8, w >> 16, w >> 24); }
__device__ uchar4 uchars(unsigned w) { return make_uchar4(w, w >> 8, w >> 16, w >> 24); }
__device__ short2 shorts(int w) { return make_short2(w, w >> 16); }
__device__ ushort2 ushorts(unsigned w) { return make_ushort2(w, w >> 16); }
"""
I32, U32, I64, U64, F32 = "int", "unsigned", "long long", "unsigned long long", "float"
FUNCTIONS = [  # expression, type of its operands, type of its value, formula
    ("__dp4a(a, b, c)", I32, I32, lambda a, b, c: dot(a, b, c, 8, True)),
    ("__dp4a(a, b, c)", U32, U32, lambda a, b, c: dot(a, b, c, 8, False)),
    ("__dp4a(chars(a), chars(b), c)", I32, I32, lambda a, b, c: dot(a, b, c, 8, True)),
    ("__dp4a(uchars(a), uchars(b), c)", U32, U32, lambda a, b, c: dot(a, b, c, 8, False)),
    ("__dp2a_lo(a, b, c)", I32, I32, lambda a, b, c: dot(a, b, c, 16, True)),
    ("__dp2a_lo(a, b, c)", U32, U32, lambda a, b, c: dot(a, b, c, 16, False)),
    ("__dp2a_lo(shorts(a), chars(b), c)", I32, I32, lambda a, b, c: dot(a, b, c, 16, True)),
    ("__dp2a_lo(ushorts(a), uchars(b), c)", U32, U32, lambda a, b, c: dot(a, b, c, 16, False)),
    ("__dp2a_hi(a, b, c)", I32, I32, lambda a, b, c: dot(a, b, c, 16, True, 2)),
    ("__dp2a_hi(a, b, c)", U32, U32, lambda a, b, c: dot(a, b, c, 16, False, 2)),
    ("__dp2a_hi(shorts(a), chars(b), c)", I32, I32, lambda a, b, c: dot(a, b, c, 16, True, 2)),
    ("__dp2a_hi(ushorts(a), uchars(b), c)", U32, U32, lambda a, b, c: dot(a, b, c, 16, False, 2)),
    ("__byte_perm(a, b, c)", U32, U32, byte_perm),
    ("__popc(a)", U32, I32, lambda a: bin(a).count("1")),
    ("__popcll(a)", U64, I32, lambda a: bin(a).count("1")),
    ("__clz(a)", I32, I32, lambda a: 32 - word(a).bit_length()),
    ("__clzll(a)", I64, I32, lambda a: 64 - wrap(a, 64, False).bit_length()),
    ("__ffs(a)", I32, I32, lambda a: (a & -a).bit_length()),
    ("__ffsll(a)", I64, I32, lambda a: (a & -a).bit_length()),
    ("__brev(a)", U32, U32, lambda a: int(f"{a:032b}"[::-1], 2)),
    ("__brevll(a)", U64, U64, lambda a: int(f"{a:064b}"[::-1], 2)),
    ("__mulhi(a, b)", I32, I32, lambda a, b: a * b >> 32),
    ("__umulhi(a, b)", U32, U32, lambda a, b: a * b >> 32),
    ("__mul64hi(a, b)", I64, I64, lambda a, b: a * b >> 64),
    ("__umul64hi(a, b)", U64, U64, lambda a, b: a * b >> 64),
    ("__mul24(a, b)", I32, I32, lambda a, b: wrap(wrap(a, 24) * wrap(b, 24))),
    ("__umul24(a, b)", U32, U32, lambda a, b: word(a % 2**24 * (b % 2**24))),
    ("__funnelshift_l(a, b, c)", U32, U32, lambda a, b, c: word((b << 32 | a) << c % 32 >> 32)),
    ("__funnelshift_r(a, b, c)", U32, U32, lambda a, b, c: word((b << 32 | a) >> c % 32)),
    ("__funnelshift_lc(a, b, c)", U32, U32, lambda a, b, c: word((b << 32 | a) << min(c, 32) >> 32)),
    ("__funnelshift_rc(a, b, c)", U32, U32, lambda a, b, c: word((b << 32 | a) >> min(c, 32))),
    ("min(a, b)", I32, I32, min),
    ("max(a, b)", I64, I64, max),
    ("max(a, int(b))", U32, U32, max),
    ("min(short(a), short(b))", I32, I32, lambda a, b: min(wrap(a, 16), wrap(b, 16))),
    ("min(a, (long long)b)", U64, U64, min),
    ("min(a, b)", F32, F32, number_of_two(min)),
    ("max(a, b)", F32, F32, number_of_two(max)),
    ("__float2int_rn(a)", F32, I32, to_int(round)),
    ("__float2int_rz(a)", F32, I32, to_int(math.trunc)),
    ("__float2int_ru(a)", F32, I32, to_int(math.ceil)),
    ("__float2int_rd(a)", F32, I32, to_int(math.floor)),
    ("__float2uint_rn(a)", F32, U32, to_unsigned(round)),
    ("__float2uint_rz(a)", F32, U32, to_unsigned(math.trunc)),
    ("__float2uint_ru(a)", F32, U32, to_unsigned(math.ceil)),
    ("__float2uint_rd(a)", F32, U32, to_unsigned(math.floor)),
    ("__int2float_rn(a)", I32, F32, float),
    ("__uint2float_rn(a)", U32, F32, float),
    ("__float_as_int(a)", F32, I32, lambda a: view(a, np.float32, np.int32)),
    ("__float_as_uint(a)", F32, U32, lambda a: view(a, np.float32, np.uint32)),
    ("__int_as_float(a & 0x7F7FFFFF)", I32, F32, lambda a: view(a & 0x7F7FFFFF, np.int32, np.float32)),
    ("__uint_as_float(a & 0x7F7FFFFF)", U32, F32, lambda a: view(a & 0x7F7FFFFF, np.uint32, np.float32)),
    ("__fadd_rn(a, b)", F32, F32, lambda a, b: a + b),
    ("__fmul_rn(a, b)", F32, F32, lambda a, b: a * b),
    # Operands short enough for the exact value to be a double.
    ("__fmaf_rn(a, b, c)", "short", F32, lambda a, b, c: a * b + c),
    ("__fmaf_rn(a + 1e-3f, b + 1e-3f, 1.f)", "short", F32, lambda a, b: near(a) * near(b) + 1),
]
DTYPES = {I32: np.int32, U32: np.uint32, I64: np.int64, U64: np.uint64, F32: np.float32, "short": np.int16}
COUNT, BLOCK = 256, 64


def near(a):
    return float(np.float32(a) + np.float32(1e-3))


def functions_source():
    kernels = [
        f'extern "C" __global__ void f{number}(const {of}* as, const {of}* bs, const {of}* cs, {value}* out) {{\n'
        "    const int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
        f"    [[maybe_unused]] const {of} a = as[i], b = bs[i], c = cs[i];\n"
        f"    out[i] = {expression};\n}}\n"
        for number, (expression, of, value, _) in enumerate(FUNCTIONS)
    ]
    return PREAMBLE + "".join(kernels)


def operands(of, seed):
    """Corner cases, each met with others at random, then anything."""
    generator, dtype = random.Random(seed), DTYPES[of]
    if of == F32:
        corners = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**32, 2.0**33, math.inf, -math.inf, math.nan]
        rest = [generator.choice((1, 1e3, 1e9)) * generator.uniform(-5, 5) for _ in range(COUNT)]
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        corners = [
            low,
            high,
            0,
            1,
            high // 2,
            24,
            31,
            32,
            33,
            127,
            128,
            255,
            0x7FFF,
            *([-1, -128] if low else [0x8000]),
        ]
        rest = [generator.randint(low, high) for _ in range(COUNT)]
    values = [generator.choice(corners) for _ in range(COUNT // 2)] + rest[: COUNT // 2]
    return np.array(corners + values, dtype)[:COUNT]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)), ids=[f"{f[0]}-{f[1]}" for f in FUNCTIONS])
def test_function(number):
    _, of, value, formula = FUNCTIONS[number]
    arrays = [operands(of, seed) for seed in (1, 2, 3)]
    arity = 2 if formula in (min, max) else 1 if formula is float else formula.__code__.co_argcount
    with np.errstate(all="ignore"):
        values = [formula(*abc[:arity]) for abc in zip(*map(np.ndarray.tolist, arrays), strict=True)]
        expected = np.array(values, DTYPES[value])
    out = np.zeros(COUNT, DTYPES[value])
    tensors = map(torch.from_numpy, (*arrays, out))
    run(f"f{number}", BLOCK, *tensors, grid=COUNT // BLOCK, source="functions")
    np.testing.assert_array_equal(out, expected)


# ---- geometry and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "block"), [((3, 2, 2), (4, 3, 5)), ((1, 1, 1), (1, 1, 64)), ((5, 1, 3), (33, 1, 1))])
def test_every_thread_of_every_block_runs_once(grid, block):
    out = zeros(math.prod(grid) * math.prod(block), 4)
    run("geometry", block, out, grid=grid)
    expected = [
        [tx | ty << 8 | tz << 16, bx, by, bz]
        for bz in range(grid[2]) for by in range(grid[1]) for bx in range(grid[0])
        for tz in range(block[2]) for ty in range(block[1]) for tx in range(block[0])
    ]  # fmt: skip
    assert out.tolist() == expected


def test_scalars_of_every_type():
    values = [
        np.bool_(True), np.int8(-3), np.uint8(250), np.int16(-300), np.uint16(65000), np.int32(-(2**31)),
        np.uint32(2**32 - 1), np.int64(-(2**52)), np.uint64(2**53), np.float32(0.5), np.float64(0.1),
    ]  # fmt: skip
    out = zeros(11, dtype=torch.float64)
    run("scalars", 1, *values, out)
    assert out.tolist() == [float(value) for value in values]


# NumPy does not know that C aligns short2 to 4 bytes and uint4 to 16.
INNER = np.dtype({"names": ["byte", "pair"], "formats": [np.uint8, (np.int16, 2)], "offsets": [0, 4]})
STRUCTURE = np.dtype(
    {
        "names": ["wide", "narrow", "inner", "real", "vector"],
        "formats": [np.int64, np.int32, INNER, np.float32, (np.uint32, 4)],
        "offsets": [0, 8, 12, 20, 32],
    }
)


def test_a_structure_by_value():
    value = np.array([(2**40, -7, (200, (-5, 6)), 0.25, (2**32 - 1, 0, 0, 9))], STRUCTURE)
    out = zeros(8, dtype=torch.float64)
    run("structure", 2, value, np.int32(2), out)
    assert out.tolist() == [2 * x for x in (2**40, -7, 200, -5, 6, 0.25, 2**32 - 1, 9)]


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("poison", (), r"poison takes 1 arguments, the plan has 0"),
        ("traps", (np.int32(0), np.int64(0)), r"traps: thread is int \(4 bytes\), the plan has int64 \(8 bytes\)"),
        ("traps", (np.int32(0), np.float32(0)), r"thread is int \(4 bytes\), the plan has float32 \(4 bytes\)"),
        ("traps", (zeros(1), np.int32(0)), r"block is int \(4 bytes\), the plan has a tensor"),
        ("poison", (np.int64(0),), r"out is int\* \(8 bytes\), the plan has int64"),
        ("structure", (np.zeros(1, INNER), np.int32(1), zeros(9)), r"arguments is const Arguments \(48 bytes\)"),
        ("poison", (3,), "an argument is a tensor, a NumPy scalar or one structure in an array, got 3"),
        ("poison", (np.zeros(2, INNER),), "one structure in an array, got array"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernel, arguments, message):
    with pytest.raises(TypeError, match=message):
        run(kernel, 1, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1025}, r"a block is from \(1, 1, 1\) to \(1024, 1024, 64\), got \(1025, 1, 1\)"),
        ({"block": (64, 32, 1)}, "up to 1024 threads"),
        ({"block": (1, 1, 65)}, "a block is"),
        ({"grid": (1, 65536, 1)}, r"a grid is .* 65535\), got \(1, 65536, 1\)"),
        ({"grid": 0}, "a grid is"),
        ({"shared": 227 * 1024 + 1}, "232448 bytes of shared memory, got 232449"),
        ({"kernel": "hopper"}, r"hopper: an #if in .*semantics\.cu leaves it out where __CUDA_ARCH__ is not defined"),
        ({"kernel": "missing"}, r"no kernel 'missing' in .*semantics\.cu; there are: geometry, scalars"),
    ],
)
def test_launches_that_no_gpu_would_take_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"kernel": "nothing", "block": 1, **options})


def test_a_block_of_1024_threads_and_all_shared_memory():
    run("nothing", 1024, shared=227 * 1024)


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="poison: the host build runs on CPU tensors, got one on meta"):
        run("poison", 1, torch.zeros(4, device="meta"))


# ---- vectors and memory ----------------------------------------------------------------------------------------------


def test_sizes_and_alignments_of_vectors():
    out = zeros(24, 2)
    run("layouts", 1, out)
    char, short, four = [(2, 2), (3, 1), (4, 4)], [(4, 4), (6, 2), (8, 8)], [(8, 8), (12, 4), (16, 16)]
    expected = [*char, *char, *short, *short, *four, *four, *four, *[(16, 16)] * 3]
    assert [tuple(pair) for pair in out.tolist()] == expected


def test_makers_of_vectors():
    out = zeros(13)
    run("makers", 1, out)
    assert out.tolist() == [1, -2, 3, 4, 5, 6, 65535, 7, 8, 9, 12, 13, -14]


def test_loads_and_stores():
    x, y = numbers(10, 4), zeros(10, 4)
    run("copies", 1, x, y)
    assert torch.equal(x, y)


def test_constant_and_device_variables():
    out = zeros(1)
    for launches in (1, 2):
        run("globals", 4, out)
        assert out.item() == 14 * launches


@pytest.mark.parametrize(("kernel", "dtype"), [("atomics_int", torch.int32), ("atomics_long", torch.int64)])
def test_atomics(kernel, dtype):
    grid, block = 3, 70
    everyone = range(grid * block)
    cells = torch.tensor([0, 0, 0, 0, 0, -1, 0, 5, -1, 0], dtype=dtype)
    olds = zeros(len(everyone), dtype=dtype)
    run(kernel, block, cells, olds, grid=grid)
    xor = 0
    for me in everyone:
        xor ^= me
    # atomicMin is of unsigned numbers in 64 bits: −me is large there, and the 0 from before stays.
    least = -len(everyone) + 1 if dtype == torch.int32 else 0
    assert cells.tolist()[:5] == [len(everyone), -sum(everyone), len(everyone) - 1, least, 2**31 - 1]
    assert cells[5:8].tolist() == [-(2**31), xor, 5 + 3 * len(everyone)]
    assert cells[8] in everyone
    assert cells[9] == (-2 * len(everyone) if dtype == torch.int32 else 0)
    assert sorted(olds.tolist()) == list(everyone)


def test_atomic_sums_of_floating_point():
    sums = torch.zeros(1), zeros(1, dtype=torch.float64)
    run("atomics_float", 50, *sums, grid=2)
    assert [s.item() for s in sums] == [100, 50]


# ---- shared memory and barriers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "block"), [(1, 1), (5, 100), (3, 512), ((2, 3, 1), (8, 4, 2)), (2, 1024)])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("reverse_static", torch.int32), ("reverse_short", torch.int16), ("reverse_long", torch.int64)],
)
def test_shared_memory_of_one_block_at_a_time(kernel, dtype, grid, block):
    threads = block if isinstance(block, int) else math.prod(block)
    x = numbers(grid if isinstance(grid, int) else math.prod(grid), threads, dtype=dtype)
    y = torch.zeros_like(x)
    run(kernel, block, x, y, grid=grid, shared=0 if kernel == "reverse_static" else threads * x.element_size())
    assert torch.equal(y, x.flip(1))


def test_dynamic_shared_memory_declared_in_other_ways():
    x, y = numbers(4, 4), zeros(4, 4)
    run("transpose", (4, 4, 1), x, y, shared=64)
    assert torch.equal(y, x.T + 100)


def test_dynamic_shared_memory_is_poison_in_every_block():
    out = zeros(3, 40)
    run("poison", 40, out, grid=3, shared=160)
    assert torch.equal(out, torch.full_like(out, POISON))


@pytest.mark.parametrize("block", [2, 64, 512])
def test_a_barrier_a_level(block):
    x, sums = numbers(4, block), zeros(4)
    run("tree_sum", block, x, sums, grid=4)
    assert sums.tolist() == x.sum(1).tolist()


def test_a_barrier_waits_for_nobody_who_returned():
    out = zeros(3, 40)
    run("leaving", 40, out, grid=3)
    assert out.tolist() == [list(range(40))] * 3


def test_barriers_that_count():
    for rows in (torch.arange(70) % 3 == 0, torch.zeros(70), torch.ones(70)):
        x = torch.stack([rows, rows]).int()
        out = zeros(2, 70, 4)
        run("votes", 70, x, out, grid=2)
        count = int(rows.sum())
        assert out.unique(dim=1).tolist() == [[[count, count > 0, count == 70, 70 - count]]] * 2


def test_launches_from_several_threads_keep_their_shared_memory():
    pairs = [(numbers(2, 64) + i, zeros(2, 64)) for i in range(8)]
    threads = [threading.Thread(target=run, args=("reverse_static", 64, *pair), kwargs={"grid": 2}) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, x.flip(1)) for x, y in pairs)


def test_an_edited_source_has_static_memory_of_its_own(tmp_path):
    text = """
    template <int N> __device__ void look(int* out, int put) {
        __shared__ int cells[SIZE];
        *out = cells[0];
        cells[0] = put + N;
    }
    extern "C" __global__ void look_at(int* out, int put) { look<1>(out, put); }
    """
    out = zeros(1)
    with use_source(tmp_path):
        for size, put, found in ((4, 7, 0), (4, 9, 8), (400, 5, 0)):
            (tmp_path / "edited.cu").write_text(text.replace("SIZE", str(size)))
            run("look_at", 1, out, np.int32(put), source="edited")
            assert out.item() == found


# ---- warps -----------------------------------------------------------------------------------------------------------


def shuffle_source(way, lane, by, width):
    first = lane // width * width
    if way == "idx":
        return first + by % width
    other = {"up": lane - by % 32, "down": lane + by % 32, "xor": lane ^ by % 32}[way]
    inside = other >= first if way == "up" else other < first + width
    return other if inside else lane


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("shuffles_int", torch.int32), ("shuffles_float", torch.float32), ("shuffles_long", torch.int64)],
)
@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("by", [0, 1, 5, 17, 31])
def test_shuffles(kernel, dtype, by, width):
    x = numbers(64, dtype=dtype)
    out = zeros(64, 4, dtype=dtype)
    run(kernel, 64, x, out, np.int32(by), np.int32(width))
    expected = [
        [x[t // 32 * 32 + shuffle_source(way, t % 32, by, width)].item() for way in ("idx", "up", "down", "xor")]
        for t in range(64)
    ]
    assert out.tolist() == expected


def test_parts_of_a_warp():
    x = numbers(64)
    x[5], x[40], x[41] = 5, 5, 4
    out = zeros(64)
    run("parts", 64, x, out)
    expected = []
    for t in range(64):
        warp, lane = x[t // 32 * 32 :][:32], t % 32
        if lane < 16:
            mine = 0
            sums = [0] * 16
            for by in (8, 4, 2, 1):
                sums = [s + warp[at ^ by].item() + sums[at ^ by] for at, s in enumerate(sums)]
            mine = sums[lane]
        else:
            mine = int((warp[16:] > 0).sum())
        mine += warp[3].item()
        if lane % 2:
            found = bool((warp[1::2] == 5).any())
            mine += 1000 * found + 2000 * (not found)
        expected.append(mine + 4000)
    assert out.tolist() == expected


@pytest.mark.parametrize("threads", [1, 31, 32, 40, 64])
def test_ballots_of_whole_and_broken_warps(threads):
    x = (torch.arange(threads) % 3 == 0).int()
    out = np.zeros(threads, np.uint32)
    run("ballots", threads, x, torch.from_numpy(out))
    votes = [sum(int(x[t]) << t % 32 for t in range(first, min(first + 32, threads))) for first in (0, 32)]
    assert out.tolist() == [votes[t // 32] for t in range(threads)]


@pytest.mark.parametrize(("threads", "first"), [(32, 20), (20, 20), (64, 7)])
def test_a_lane_that_is_not_there_reads_as_poison(threads, first):
    x, out = numbers(threads), zeros(threads)
    run("absent", threads, x, out, np.int32(first))
    assert out[:first].tolist() == [*x[1:first].tolist(), POISON]


def test_warps_meet_for_shared_memory():
    x, out = numbers(64), zeros(64)
    run("syncwarp", 64, x, out)
    assert torch.equal(out, x.view(-1, 2).flip(1).flatten() + 7)


def test_a_mask_names_the_lane_that_calls():
    with pytest.raises(KernelTrapError, match=r"wrong_mask: block \(0, 0, 0\), thread .*mask that does not name it"):
        run("wrong_mask", 32)


# ---- traps, output and time ------------------------------------------------------------------------------------------


def test_a_trap_ends_the_launch_and_names_the_thread():
    for _ in range(2):
        with pytest.raises(KernelTrapError, match=r"^traps: block \(1, 0, 0\), thread \(5, 0, 0\): __trap\(\)$"):
            run("traps", 40, np.int32(1), np.int32(5), grid=3)
    run("traps", 40, np.int32(1), np.int32(40), grid=3)


def test_a_failed_assertion_is_a_trap_that_names_its_line():
    x = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    run("asserts", 3, x)
    message = r"thread \(3, 0, 0\): .*/semantics\.cu:\d+: assertion `x\[threadIdx\.x\] < 3` failed"
    with pytest.raises(KernelTrapError, match=message):
        run("asserts", 4, x)


def test_kernels_print(capfd):
    run("prints", 3)
    assert sorted(capfd.readouterr().out.splitlines()) == [f"thread {i} of 3" for i in range(3)]


def test_time_passes():
    out = zeros(1, dtype=torch.int64)
    run("clocks", 1, out)
    assert out.item() > 0


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["functions", "semantics"])
def test_the_kernels_of_these_tests_are_cuda(name):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile CUDA sources for a GPU")
    assert compile_kernel(name, "sm_90").kernels


@pytest.mark.parametrize("mode", [None, "address", "thread"])
def test_the_shim_compiles_without_warnings(tmp_path, monkeypatch, mode):
    (tmp_path / "tidy.cu").write_text(
        """extern "C" __global__ void tidy(const int* __restrict__ x, int* y, float scale) {
            extern __shared__ int s[];
            __shared__ int4 sum;
            s[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, __ldg(x + threadIdx.x), 1);
            if (__syncthreads_count(s[threadIdx.x] > 0) > 2) atomicMax(&sum.x, min(s[0], 5u) + int(max(scale, 2)));
            __threadfence();
            assert(y != nullptr);
            y[threadIdx.x] = __float2int_rn(scale) + __byte_perm(s[0], 1, 2) + sum.x;
        }"""
    )
    monkeypatch.setenv("CXX", shlex.join([*COMPILER, "-Wall", "-Wextra", "-Werror"]))
    with use_source(tmp_path):
        build(read("tidy"), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_the_shim_is_clean_itself(mode):
    """No race of its own in what synchronises threads, no undefined behaviour in what computes."""
    threads, x = 48, numbers(2, 48)
    runs = {
        "votes": (x, zeros(2, threads, 4)),
        "leaving": (zeros(2, threads),),
        "parts": (x, zeros(threads)),
        "ballots": (x, zeros(threads)),
        "absent": (x, zeros(threads), np.int32(37)),
        "syncwarp": (x, zeros(threads)),
        "reverse_long": (x.long(), x.long()),
        "atomics_int": (zeros(10), zeros(2, threads)),
        "atomics_float": (torch.zeros(1), zeros(1, dtype=torch.float64)),
    }
    for kernel, arguments in runs.items():
        run(kernel, threads, *arguments, grid=2, shared=8 * threads, mode=mode)


@pytest.mark.parametrize("file", ["broken.cu", "inner/broken.cuh"])
def test_compile_errors_name_the_users_line(tmp_path, file):
    header = "#pragma once\n__device__ void f(int* x) {\n    extern __shared__ int\n    s[];\n*x = s[0];\n}\n"
    texts = {
        "broken.cu": '#include "inner/broken.cuh"\nextern "C" __global__ void k(int* x) {\n    f(x);\n}\n',
        "inner/broken.cuh": header,
    }
    texts[file] = texts[file].replace("*x =" if "cuh" in file else "f(x)", "wrong =")
    line = 5 if "cuh" in file else 3
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with use_source(tmp_path), pytest.raises(KernelCompileError) as caught:
        run("k", 1, zeros(1), source="broken")
    assert str(caught.value).startswith(f"{Path(file).name}:{line}: error: 'wrong' was not declared")
    assert (caught.value.path, caught.value.line) == (tmp_path / file, line)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+20 compiler, and there is no 'no-such-compiler'"):
        run("nothing", 1)


def test_sanitizers_have_names():
    with pytest.raises(ValueError, match="sanitize must be one of None, 'address', 'thread', got 'memory'"):
        run_on_host([Plan("semantics", "nothing", (1, 1, 1), (1, 1, 1), 0, ())], sanitize="memory")
