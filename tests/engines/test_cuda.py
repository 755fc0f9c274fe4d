"""The CUDA engine: its plans run through the very same .cu on the CPU here, and on the GPU where there is one."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from approxconv.engines import cuda, reference
from approxconv.kernels import source_path
from approxconv.multiplier import prepare

SHIM = Path(__file__).parent.parent / "host_cuda" / "cuda_on_host.h"


@pytest.fixture(scope="module")
def run_on_host(tmp_path_factory):
    """A function that executes a plan on the CPU, through g++, with the address and undefined-behaviour sanitisers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run CUDA sources on the CPU")
    folder = tmp_path_factory.mktemp("host_cuda")
    libraries = {}

    def build(source):
        path = source_path(source)
        wrappers = [f'#include "{SHIM}"\n#include "{path}"\n']
        for name, signature in re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', path.read_text()):
            names = [part.split()[-1].lstrip("*") for part in signature.split(",")]
            wrappers.append(
                f'extern "C" void host_{name}(const unsigned* grid, const unsigned* block, {signature}) '
                f"{{ run_grid({name}, grid, block, {', '.join(names)}); }}\n"
            )
        (folder / f"{source}.cpp").write_text("".join(wrappers))
        library = folder / f"{source}.so"
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-fsanitize=undefined"]
        flags += ["-fno-sanitize-recover=all"]
        subprocess.run(["g++", *flags, str(folder / f"{source}.cpp"), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    def run(plan):
        if plan.source not in libraries:
            libraries[plan.source] = build(plan.source)
        triple = ctypes.c_uint * 3
        arguments = []
        for argument in plan.arguments:
            if isinstance(argument, torch.Tensor):
                arguments.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                arguments.append({np.int32: ctypes.c_int, np.uint8: ctypes.c_ubyte}[type(argument)](argument.item()))
        getattr(libraries[plan.source], f"host_{plan.kernel}")(triple(*plan.grid), triple(*plan.block), *arguments)

    return run


def codes(generator, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


TABLES = {
    "narrow": lambda g: torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=g),
    "offset": lambda g: torch.randint(0, 65026, (256, 256), dtype=torch.int32, generator=g),
    "wide": lambda g: torch.randint(-(2**20), 2**20, (256, 256), dtype=torch.int32, generator=g),
    "4x6": lambda g: torch.randint(-500, 500, (16, 64), dtype=torch.int32, generator=g),
}
CONVS = [  # batch, channels, size, filters, kernel, stride, padding, dilation, groups
    (2, 3, (9, 7), 10, (3, 2), (1, 2), (1, 0), (1, 1), 1),
    (1, 6, (8, 11), 9, (2, 3), (3, 1), (2, 3), (2, 1), 3),
    (3, 5, (6, 6), 10, (3, 3), (1, 1), (1, 1), (1, 2), 5),
    (1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 2, (2, 2), 18, (3, 3), (2, 2), (4, 4), (1, 1), 2),
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("case", CONVS)
def test_conv2d_plan_on_the_host(run_on_host, table, case):
    generator = torch.Generator().manual_seed(3)
    batch, channels, size, filters, kernel, stride, padding, dilation, groups = case
    x, w = codes(generator, batch, channels, *size), codes(generator, filters, channels // groups, *kernel)
    entries = TABLES[table](generator)
    expected = reference.lut_conv2d(x, w, entries, stride, padding, dilation, groups, 200)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = torch.full_like(expected, -7)
        operands = (x.contiguous(memory_format=memory_format), w.contiguous(memory_format=memory_format))
        run_on_host(cuda.conv2d_plan(*operands, prepare(entries), y, (*stride, *padding, *dilation), groups, 200))
        assert torch.equal(y, expected)


@pytest.mark.parametrize("shapes", [((5, 3), (9, 3)), ((2, 1, 4, 7), (3, 6, 7)), ((300, 2), (1, 2))])
def test_matmul_plan_on_the_host(run_on_host, shapes):
    generator = torch.Generator().manual_seed(4)
    x, w = (codes(generator, *shape) for shape in shapes)
    entries = TABLES["offset"](generator)
    expected = reference.lut_matmul(x, w, entries)
    y = torch.full_like(expected, -7)
    run_on_host(cuda.matmul_plan(x, w, prepare(entries), y))
    assert torch.equal(y, expected)


def test_tile_sizes_are_read_from_the_source(tmp_path, monkeypatch):
    text = source_path("lut_conv2d").read_text()
    (tmp_path / "lut_conv2d.cu").write_text(text.replace("THREADS = 256", "THREADS = 64"))
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))
    x = torch.zeros(1, 1, 10, 10, dtype=torch.uint8)
    w = torch.zeros(3, 1, 1, 1, dtype=torch.uint8)
    y = torch.zeros(1, 3, 10, 10, dtype=torch.int32)
    table = torch.zeros(256, 256, dtype=torch.int32)
    plan = cuda.conv2d_plan(x, w, prepare(table), y, (1, 1, 0, 0, 1, 1), 1, 0)
    assert plan.block == (64, 1, 1)
    assert plan.grid == (2, 1, 1)


def test_missing_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source_path("lut_conv2d")
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lut_conv2d\.cu"):
        source_path("lut_conv2d")


def test_cpu_tensors_are_refused():
    assert "CUDA tensors" in cuda.unavailable(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("case", CONVS)
def test_conv2d_on_the_gpu(table, case):
    generator = torch.Generator().manual_seed(5)
    batch, channels, size, filters, kernel, stride, padding, dilation, groups = case
    x, w = codes(generator, batch, channels, *size), codes(generator, filters, channels // groups, *kernel)
    entries = TABLES[table](generator)
    expected = reference.lut_conv2d(x, w, entries, stride, padding, dilation, groups, 9)
    on_gpu = (tensor.cuda() for tensor in (x, w, entries))
    y = torch.ops.approxconv.lut_conv2d(*on_gpu, stride, padding, dilation, groups, 9, engine="cuda")
    assert torch.equal(y.cpu(), expected)


@pytest.mark.gpu
def test_matmul_on_the_gpu_on_a_side_stream():
    generator = torch.Generator().manual_seed(6)
    x, w, entries = codes(generator, 3, 70, 33), codes(generator, 3, 41, 33), TABLES["wide"](generator)
    with torch.cuda.stream(torch.cuda.Stream()):
        y = torch.ops.approxconv.lut_matmul(x.cuda(), w.cuda(), entries.cuda(), engine="cuda")
        assert torch.equal(y.cpu(), reference.lut_matmul(x, w, entries))
