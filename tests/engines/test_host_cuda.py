"""The CUDA kernels through the ops and layers, on the CPU; and kernels of one's own."""

import shutil

import pytest
import torch

import approxconv
from approxconv import EngineError
from approxconv.kernels import benchmark, copy_sources, use_source

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")


def codes(*shape, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, shape, dtype=dtype, generator=generator)


TABLE = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (codes(3, 300, 20), codes(9, 20, dtype=torch.int8)),
        (codes(2, 1, 7, 20, dtype=torch.int8), codes(3, 5, 20)),
        (codes(1, 700, 20).expand(2, 700, 20), codes(2, 30, 20)),
        (codes(5, 12), codes(400, 12)),
    ],
)
def test_matmul(x, w):
    run = torch.ops.approxconv.lut_matmul
    assert torch.equal(run(x, w, TABLE, engine="host_cuda"), run(x, w, TABLE, engine="reference"))


def test_layers_and_their_gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8, stride=2),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    approx = approxconv.calibrate(approxconv.approximate(model, "mitchell_8u"), [x])
    results = []
    for engine in ("reference", "host_cuda"):
        with approxconv.use_engine(engine):
            approx.zero_grad()
            y = approx(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in approx.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


DOUBLED = """
// A product sum that comes out twice too large.
#include "gather.cuh"

template <typename Entry>
__device__ void doubled(const code* x, const code* w, const Entry* table, int* out, Geometry g) {
    g.bias = 0;
    gather(x, w, table, out, g);
    __syncthreads();
    const int pixel = blockIdx.x % ceil_div(g.pixels(), GATHER_ROWS) * GATHER_ROWS + threadIdx.x;
    if (threadIdx.y == 0 && pixel < g.pixels())
        for (int n = 0; n < g.lanes; ++n) out[n * g.out_lane + g.out_at(pixel)] *= 2;
}

extern "C" __global__ void lut_gemm_gather_int16(const code* x, const code* w, const short* table, int* out,
                                                 const Geometry g) {
    doubled(x, w, table, out, g);
}
"""


@pytest.fixture
def own_kernel(tmp_path):
    (tmp_path / "doubled.cu").write_text(DOUBLED)
    with use_source(tmp_path):
        yield "host_cuda:doubled"


def test_own_kernel_is_chosen_by_op_layer_or_globally(own_kernel):
    x, w = codes(5, 12), codes(6, 12)
    run = torch.ops.approxconv.lut_matmul
    expected = 2 * run(x, w, TABLE, engine="reference")
    assert torch.equal(run(x, w, TABLE, engine=own_kernel), expected)
    with approxconv.use_engine(own_kernel):
        assert torch.equal(run(x, w, TABLE), expected)
        image = codes(1, 2, 4, 4)  # of an operator that it has no kernel of: the packaged one
        arguments = (image, codes(3, 2, 3, 3), TABLE, [1, 1], [0, 0], [1, 1], 1, 0)
        conv = torch.ops.approxconv.lut_conv2d
        assert torch.equal(conv(*arguments), conv(*arguments, engine="reference"))
    layer = approxconv.nn.ApproxLinear(12, 6, bias=False, multiplier="exact_8s", engine=own_kernel)
    real = torch.randn(5, 12)
    approxconv.calibrate(layer, [real])
    doubled = layer(real)
    layer.engine = "reference"
    assert torch.allclose(doubled, 2 * layer(real))


def test_own_kernel_is_timed_beside_the_packaged_one(own_kernel):
    report = benchmark("doubled", engine="host_cuda", repeats=1)
    (timing,) = report.timings  # of the one operator that it has kernels of
    assert timing.case.op == "lut_gemm"
    assert timing.case.macs == timing.case.x_shape[0] * timing.case.w_shape[0] * timing.case.x_shape[1]
    assert min(timing.seconds, timing.baseline) > 0
    assert "GMAC/s" in str(report)
    assert "times the kernel in use" in str(report)
    assert all(timing.baseline is None for timing in benchmark("lut_dwconv2d", engine="host_cuda", repeats=1).timings)


def test_kernels_that_are_none(tmp_path):
    x, w = codes(5, 12), codes(6, 12)
    run = torch.ops.approxconv.lut_matmul
    (tmp_path / "empty.cu").write_text("// nothing\n")
    with use_source(tmp_path):
        with pytest.raises(ValueError, match=r"'empty'.*lut_gemm"):
            run(x, w, TABLE, engine="host_cuda:empty")
        with pytest.raises(FileNotFoundError, match=r"missing\.cu"):
            run(x, w, TABLE, engine="host_cuda:missing")
    for name in ("cpu:mine", "host_cuda:", ":mine"):
        with pytest.raises(ValueError, match="'host_cuda:KERNEL'"):
            run(x, w, TABLE, engine=name)
    with pytest.raises(EngineError, match="CUDA tensors"):
        run(x, w, TABLE, engine="cuda")


def test_an_edit_takes_effect_at_the_next_call(tmp_path):
    x, w = codes(5, 12), codes(6, 12)
    run = torch.ops.approxconv.lut_matmul
    expected = run(x, w, TABLE, engine="reference")
    folder = copy_sources(tmp_path)
    with use_source(folder):
        assert torch.equal(run(x, w, TABLE, engine="host_cuda"), expected)
        gather = folder / "gather.cuh"
        gather.write_text(gather.read_text().replace("int sum = g.bias;", "int sum = g.bias + 1;"))
        assert torch.equal(run(x, w, TABLE, engine="host_cuda"), expected + 1)
    assert torch.equal(run(x, w, TABLE, engine="host_cuda"), expected)
