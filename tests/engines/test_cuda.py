"""The CUDA engine on a GPU: every op and Function against the oracle, streams, graphs, memory."""

import subprocess
import sys

import pytest
import torch

import approxconv
from approxconv import Multiplier
from approxconv.engines import cuda, reference
from approxconv.kernels import copy_sources, info, use_source, verify
from approxconv.kernels.verify import CASES
from approxconv.operators import (
    ApproxConv2dOp,
    ApproxDWConv2dOp,
    ApproxGeMMOp,
    Conv2dArgs,
    FastApproxConv2dOp,
    FastApproxGeMMOp,
)

MIB = 2**20
OPS = torch.ops.approxconv


def codes(*shape, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, shape, dtype=dtype, generator=generator)


def hostile(low=-(2**15), high=2**15, shape=(256, 256)):
    return torch.randint(low, high, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))


def low_rank():
    """Not commutative, not 0 at code 0, with sums of rows beside its products."""
    generator = torch.Generator().manual_seed(1)
    f, g = (torch.randint(-9, 10, (3, 256), dtype=torch.int32, generator=generator) for _ in range(2))
    a = torch.arange(256, dtype=torch.int32)
    return a[:, None] * a.to(torch.int8) + f.T @ g + 1000 * f[0, :, None] ** 2


def conv_on(x, w, table, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, pad_code=7, engine="auto"):
    return OPS.lut_conv2d(x, w, table, list(stride), list(padding), list(dilation), groups, pad_code, engine=engine)


of_both_engines = pytest.mark.parametrize(("engine", "make"), [("cuda", hostile), ("factored", low_rank)])


def test_cpu_tensors_are_refused():
    assert "CUDA tensors" in cuda.unavailable(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("source", CASES)
def test_every_kernel_equals_the_oracle(source):
    report = verify(source, engine="cuda", seed=2)
    assert report.ok, str(report)


@pytest.mark.gpu
@of_both_engines
@pytest.mark.parametrize(
    ("x", "w", "arguments"),
    [
        ((64, 64, 56, 56), (64, 64, 3, 3), {}),
        ((16, 512, 7, 7), (512, 512, 3, 3), {}),
        ((8, 3, 224, 224), (64, 3, 7, 7), {"stride": (2, 2), "padding": (3, 3)}),
        ((4, 96, 28, 20), (64, 24, 3, 5), {"stride": (1, 2), "dilation": (2, 1), "groups": 4}),
    ],
)
def test_large_convolutions(x, w, arguments, engine, make):
    x, w, table = codes(*x), codes(*w, seed=3), make()
    expected = conv_on(x, w, table, **arguments, engine="cpu")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = conv_on(
            x.cuda().contiguous(memory_format=memory_format), w.cuda(), table.cuda(), **arguments, engine=engine
        )
        assert torch.equal(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_large_depthwise(stride):
    x, w, table = codes(16, 96, 112, 112), codes(96, 1, 3, 3, seed=3), hostile()
    arguments = ([stride] * 2, [1, 1], [1, 1], 7)
    expected = OPS.lut_dwconv2d(x, w, table, *arguments, engine="cpu")
    assert torch.equal(OPS.lut_dwconv2d(x.cuda(), w.cuda(), table.cuda(), *arguments).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 1024, 512), (64, 1000, 512), (1, 1000, 512), (3000, 9, 4097)])
@pytest.mark.parametrize(("engine", "table"), [("cuda", hostile(0, 65026)), ("factored", low_rank())])
def test_products_of_any_proportions(m, n, k, engine, table):
    x, w = codes(m, k, dtype=torch.int8), codes(n, k, seed=3)
    expected = OPS.lut_matmul(x, w, table, engine="cpu")
    assert torch.equal(OPS.lut_matmul(x.cuda(), w.cuda(), table.cuda(), engine=engine).cpu(), expected)


FUNCTIONS = {
    "conv2d": lambda x, w, m: ApproxConv2dOp.apply(x, w, Conv2dArgs(4, 6, 3, 2, 1), (5, 5), m),
    "depthwise": lambda x, w, m: ApproxDWConv2dOp.apply(x, w[:4, :1], m, {"stride": 1, "padding": 1}),
    "gemm": lambda x, w, m: ApproxGeMMOp.apply(x, w[:, 0, :, :].flatten(1).repeat(1, 1), m),
    "fast conv2d": lambda x, w, m: FastApproxConv2dOp.apply(x, w, lambda op, x, w, kwargs: op(x, w, **kwargs), {}),
    "fast gemm": lambda x, w, m: FastApproxGeMMOp.apply(x, w[:, 0].flatten(1), lambda op, x, w, kwargs: op(x, w)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_gradients(name):
    multiplier = Multiplier(hostile(), a_signed=True, w_signed=True)
    shape = (2, 4, 9, 9)
    results = []
    for device in ("cpu", "cuda"):
        x, w = (codes(*s, dtype=torch.int8, seed=4).double().to(device).requires_grad_() for s in (shape, (6, 4, 3, 3)))
        y = FUNCTIONS[name](x, w, multiplier)
        y.backward(torch.ones_like(y))
        results.append([t.detach().cpu() for t in (y, x.grad, w.grad)])
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_autocast_leaves_codes_alone():
    x, w, table = codes(300, 40).cuda(), codes(20, 40).cuda(), hostile().cuda()
    with torch.autocast("cuda", torch.float16):
        y = OPS.lut_matmul(x, w, table)
    assert y.dtype == torch.int32
    assert torch.equal(y.cpu(), reference.lut_matmul(x.cpu(), w.cpu(), table.cpu()))


@pytest.mark.gpu
@of_both_engines
def test_a_side_stream_is_waited_for_by_nobody_else(engine, make):
    x, w = codes(2048, 512), codes(256, 512)
    table = make().cuda()
    OPS.lut_matmul(x.cuda(), w.cuda(), table, engine=engine)  # compiles, and reads the table
    expected = OPS.lut_matmul(x, w, table.cpu(), engine="cpu")
    pinned = [tensor.pin_memory() for tensor in (x, w)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # work that an unordered kernel would overtake
        y = OPS.lut_matmul(*(tensor.to("cuda", non_blocking=True) for tensor in pinned), table, engine=engine)
    assert not stream.query()  # nothing made the host wait
    stream.synchronize()
    assert torch.equal(y.cpu(), expected)


@pytest.mark.gpu
@of_both_engines
def test_a_table_met_on_one_stream_is_whole_on_another(engine, make):
    x, w = codes(8, 16, 14, 14).cuda(), codes(32, 16, 3, 3).cuda()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for seed in range(20):
        table = make().roll(seed, 0).cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            conv_on(x, w, table, engine=engine)
        with torch.cuda.stream(second):
            y = conv_on(x, w, table, engine=engine)
        torch.cuda.synchronize()
        assert torch.equal(y.cpu(), conv_on(x.cpu(), w.cpu(), table.cpu()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@of_both_engines
def test_another_device_than_the_current_one(engine, make):
    x, w, table = codes(300, 40), codes(20, 40), make()
    y = OPS.lut_matmul(*(tensor.to("cuda:1") for tensor in (x, w, table)), engine=engine)
    assert y.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), reference.lut_matmul(x, w, table))


@pytest.mark.gpu
@of_both_engines
def test_graph_capture_once_warmed_up(engine, make):
    x, w, table = codes(8, 16, 14, 14).cuda(), codes(32, 16, 3, 3).cuda(), make().cuda()
    depthwise = codes(16, 1, 3, 3).cuda()

    def run():
        return conv_on(x, w, table, engine=engine), OPS.lut_dwconv2d(x, depthwise, table, [1, 1], [1, 1], [1, 1], 7)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for seed in (5, 6):
        x.copy_(codes(*x.shape, seed=seed))
        w.copy_(codes(*w.shape, seed=seed))
        graph.replay()
        for got, expected in zip(outputs, run(), strict=True):
            assert torch.equal(got, expected)
    expected = conv_on(x.cpu(), w.cpu(), table.cpu())
    assert torch.equal(outputs[0].cpu(), expected)


@pytest.mark.gpu
def test_a_table_of_few_terms_met_while_a_graph_is_recorded_is_looked_up():
    x, w, table = codes(64, 64, 14, 14).cuda(), codes(64, 64, 3, 3).cuda(), low_rank().cuda()
    conv_on(x, w, table, engine="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv_on(x, w, table)
    graph.replay()
    assert torch.equal(y, conv_on(x, w, table, engine="factored"))


@pytest.mark.gpu
def test_an_edited_kernel_runs_at_the_next_call(tmp_path):
    x, w, table = codes(5, 12).cuda(), codes(6, 12).cuda(), hostile().cuda()
    expected = OPS.lut_matmul(x, w, table)
    folder = copy_sources(tmp_path)
    with use_source(folder):
        gather = folder / "gather.cuh"
        gather.write_text(gather.read_text().replace("int sum = g.bias;", "int sum = g.bias + 1;"))
        assert torch.equal(OPS.lut_matmul(x, w, table), expected + 1)
    assert torch.equal(OPS.lut_matmul(x, w, table), expected)


@pytest.mark.gpu
@of_both_engines
def test_memory_does_not_grow_and_scratch_is_bounded(engine, make):
    x, w, table = codes(32, 64, 56, 56).cuda(), codes(64, 64, 3, 3).cuda(), make().cuda()
    y = conv_on(x, w, table, engine=engine)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        y = conv_on(x, w, table, engine=engine)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 64 * MIB
    free = torch.cuda.mem_get_info()[0]
    for _ in range(100):
        conv_on(x, w, table, engine=engine)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= free - 2 * MIB


@pytest.mark.gpu
def test_layers_train_as_on_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    approx = approxconv.calibrate(approxconv.approximate(model, "drum4_8u_8s"), [x])
    results = []
    for device in ("cpu", "cuda"):
        approx = approx.to(device)
        approx.zero_grad()
        with torch.backends.cudnn.flags(allow_tf32=False):
            y = approx(x.to(device))
            y.square().sum().backward()
        results.append([y.detach().cpu(), *(p.grad.cpu() for p in approx.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_info_is_that_of_the_device():
    known = info("lut_gemm", "lut_gemm_rows10_int16")
    major, minor = torch.cuda.get_device_capability()
    assert known.arch == f"sm_{major}{minor}"
    assert known.spill_stores == 0


WORKER = """
import sys
import torch, approxconv
ops = torch.ops.approxconv
table = torch.arange(65536, dtype=torch.int32).view(256, 256)

def product(i):
    x = torch.full((300, 40), i, dtype=torch.uint8)
    try:
        return ops.lut_matmul(x.cuda(), x[:9].cuda(), table.cuda()).cpu()
    except RuntimeError as error:
        return str(error)

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return product(i)

if __name__ == "__main__":
    method = sys.argv[1]
    if method == "fork": product(0)
    loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context=method)
    for i, got in enumerate(loader):
        if method == "spawn": assert torch.equal(got, torch.full((300, 9), 40 * int(table[i, i]), dtype=torch.int32))
        else: assert "spawn" in got, got
    print("done")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_data_loader_workers(method, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(script), method], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "done", done.stderr
