"""Products of fragments on the CPU are those of the matrices that the PTX ISA says these are of; copies come late."""

from pathlib import Path

import pytest
import torch

from approxconv.kernels import Plan, compile_kernel, host, use_source
from approxconv.kernels.host import KernelTrapError, run_on_host

try:
    host.compiler()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

ROWS, DEPTH, COLUMNS, LANES = 16, 32, 8, 32
A_FRAGMENTS, B_FRAGMENTS = 2, 3


@pytest.fixture(scope="module", autouse=True)
def sources(tmp_path_factory):
    """products.cu includes a header of the packaged sources."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "products.cu").write_text(Path(__file__).with_name("products.cu").read_text())
    with pytest.MonkeyPatch.context() as patch, use_source(folder):
        patch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# PTX ISA, "Matrix fragments for mma.m16n8k32", 8-bit types: (row, column) of element i of a lane.


def of_a(lane, i):
    group, in_group = divmod(lane, 4)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, in_group * 4 + (i & 3) + (16 if i >= 8 else 0)


def of_b(lane, i):
    group, in_group = divmod(lane, 4)
    return in_group * 4 + (i & 3) + (16 if i >= 4 else 0), group


def of_c(lane, i):
    group, in_group = divmod(lane, 4)
    return group + (8 if i >= 2 else 0), in_group * 2 + (i & 1)


def fragments(matrices, place, elements):
    rows, columns = zip(*(place(lane, i) for lane in range(LANES) for i in range(elements)), strict=True)
    return matrices[:, list(rows), list(columns)].reshape(len(matrices), LANES, elements).contiguous()


def draw(low, high, shape, dtype):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("mode", [None, pytest.param("thread", marks=pytest.mark.slow)])
def test_products_of_fragments(extreme, mode):
    a = draw(-128, 128, (A_FRAGMENTS, ROWS, DEPTH), torch.int8)
    b = draw(0, 256, (B_FRAGMENTS, DEPTH, COLUMNS), torch.uint8)
    start = draw(-(2**31), 2**31, (A_FRAGMENTS * B_FRAGMENTS, ROWS, COLUMNS), torch.int32)
    if extreme:
        a, b, start = a.fill_(-128), b.fill_(255), start.fill_(-(2**31))  # it wraps
    c = fragments(start, of_c, 4)
    arguments = (fragments(a, of_a, 16), fragments(b, of_b, 8), c)
    run_on_host([Plan("products", "products", (1, 1, 1), (LANES, 1, 1), 0, arguments)], sanitize=mode)
    sums = torch.einsum("imk,jkn->ijmn", a.long(), b.long()).flatten(0, 1)
    assert torch.equal(c, fragments((start + 2 * sums).int(), of_c, 4))


def test_a_warp_that_is_not_whole_is_refused():
    arguments = (torch.zeros(2, 32, 4), torch.zeros(3, 32, 2), torch.zeros(6, 32, 4))
    with pytest.raises(KernelTrapError, match="an mma needs all 32 lanes of its warp"):
        run_on_host([Plan("products", "products", (1, 1, 1), (24, 1, 1), 0, arguments)])


def run_copies(source):
    before, after = (torch.zeros(LANES * 16, dtype=torch.uint8) for _ in range(2))
    run_on_host([Plan("products", "copies", (1, 1, 1), (LANES, 1, 1), 0, (source, before, after))])
    return before, after


def test_a_copy_is_there_only_once_it_was_waited_for():
    source = draw(0, 256, (LANES * 16,), torch.uint8)
    before, after = run_copies(source)
    assert (before == 0xA5).all()
    assert torch.equal(after, source)


def test_a_copy_from_between_two_places_is_refused():
    with pytest.raises(KernelTrapError, match="addresses aligned"):
        run_copies(torch.zeros(LANES * 16 + 4, dtype=torch.uint8)[4:])


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_the_products_of_these_tests_are_cuda(arch):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile")
    assert compile_kernel("products", arch).kernels
