"""The engine on factored tables: multipliers through their byte forms, executed on the CPU, against the oracle."""

import shutil
from dataclasses import replace

import pytest
import torch

from approxconv.engines import host_cuda, reference
from approxconv.engines.byte_form import ByteForm, byte_form
from approxconv.engines.work import Work
from approxconv.factorize import factorize_table
from approxconv.kernels import KernelEngine, benchmark, factored, read
from approxconv.kernels.factored import FactoredKernelEngine, cuda_engine, host_engine
from approxconv.kernels.host import run_on_host
from approxconv.kernels.plan import SourceEditedError
from approxconv.kernels.verify import FactoredCase, moved
from approxconv.multiplier import operand_values

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")


def codes(*shape, seed=1):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def low_rank(a_signed, w_signed, rank=3):
    """A table of error rank `rank`, not commutative, with rows and columns of code 0 that are not 0."""
    generator = torch.Generator().manual_seed(rank)
    a, w = (torch.from_numpy(operand_values(8, signed)).int() for signed in (a_signed, w_signed))
    f, g = (torch.randint(-9, 9, (rank, 256), dtype=torch.int32, generator=generator) for _ in range(2))
    return a[:, None] * w + f.T @ g


@needs_compiler
@pytest.mark.parametrize(("a_signed", "w_signed"), [(False, True), (True, False), (False, False), (True, True)])
def test_factorised_tables(a_signed, w_signed):
    table = low_rank(a_signed, w_signed)
    form = byte_form(factorize_table(table))
    x, w = codes(2, 3, 19, 21), codes(1, 5, 21)
    assert torch.equal(host_engine().lut_matmul(x, w, form), reference.lut_matmul(x, w, table))
    x, w = codes(2, 7, 6, 5).contiguous(memory_format=torch.channels_last), codes(4, 7, 3, 2)
    geometry = ((1, 2), (2, 1), (1, 1), 1, 131)
    assert torch.equal(host_engine().lut_conv2d(x, w, form, *geometry), reference.lut_conv2d(x, w, table, *geometry))


@needs_compiler
@pytest.mark.parametrize("value", [0, 255])
def test_extreme_operands(value):
    form = ByteForm(
        torch.full((64, 256), 255, dtype=torch.uint8), torch.full((64, 256), -128, dtype=torch.int8), None,
        torch.zeros(256, dtype=torch.int32),
    )  # fmt: skip
    x, w = (torch.full((3, 40), value, dtype=torch.uint8) for _ in range(2))
    assert (host_engine().lut_matmul(x, w, form) == -128 * 255 * 64 * 40).all()


@needs_compiler
def test_factors_of_any_strides():
    u = codes(512, 6).T[:, ::2]
    v = (codes(6, 256, seed=2).view(torch.int8))[::2]
    form = ByteForm(u[:3], v, None, torch.arange(256, dtype=torch.int32))
    x, w = codes(9, 10), codes(4, 10)
    table = u[:3].int().T @ v.int() + form.by_column
    assert torch.equal(host_engine().lut_matmul(x, w, form), reference.lut_matmul(x, w, table))


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        FactoredCase("factored_gemm", (2, 90, 20), (70, 20), products=9, has_by_row=True, variant=(32, 32, 8, 1, 1)),
        FactoredCase(
            "factored_conv2d", (3, 6, 9, 7), (70, 3, 3, 3), geometry=((1, 2), (1, 2), (1, 1), 2, 9), products=4,
            has_by_row=True, variant=(32, 32, 4, 2, 2),
        ),
    ],
    ids=["product", "convolution"],
)  # fmt: skip
def test_problems_cut_to_the_scratch_are_right(case, monkeypatch):
    plans = []
    monkeypatch.setattr(factored, "X_SCRATCH", 3000)
    monkeypatch.setattr(factored, "SCRATCH", 19000)
    factored.factored_steps.cache_clear()
    engine = FactoredKernelEngine(
        "cpu",
        lambda device: host_cuda.TARGET,
        lambda some, device: plans.extend(some) or run_on_host(some),
        lambda: None,
    )
    operands = case.operands(torch.Generator().manual_seed(8))
    try:
        got = case.run(engine.with_kernel(None, case.variant), *operands)
    finally:
        factored.factored_steps.cache_clear()
    assert torch.equal(got, case.expected(*operands))
    assert len(plans) >= 8


@needs_compiler
def test_a_source_edited_during_a_call_is_planned_anew():
    edits = []

    def run(plans, device):
        if not edits:
            edits.append(plans)
            raise SourceEditedError(read(plans[0].source).path)
        run_on_host(plans)

    engine = FactoredKernelEngine("cpu", lambda device: host_cuda.TARGET, run, lambda: None)
    case = FactoredCase("factored_gemm", (3, 4), (2, 4), products=1)
    operands = case.operands(torch.Generator().manual_seed(8))
    assert torch.equal(case.run(engine, *operands), case.expected(*operands))
    assert len(edits) == 1


@needs_compiler
def test_the_kernels_are_timed_like_others():
    report = benchmark("factored_gemm", engine="host_cuda", repeats=1)
    assert [timing.case.op for timing in report.timings] == ["factored_gemm"]
    assert "5 products" in str(report)


def test_tensors_elsewhere_are_refused():
    assert "CUDA tensors" in cuda_engine().unavailable(torch.device("cpu"))
    assert "CPU tensors" in host_engine().unavailable(torch.device("cuda"))


@pytest.mark.parametrize(("engine", "kernel"), [(FactoredKernelEngine, "lut_gemm"), (KernelEngine, "factored_gemm")])
def test_kernels_of_other_operators_are_refused(engine, kernel):
    with pytest.raises(ValueError, match=rf"kernel source '{kernel}' must define kernels of {engine.operators[0]}, "):
        engine.beside(host_cuda.engine).with_kernel(kernel)


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((7, 5), False), ((12, 0), False)])
def test_devices_without_tensor_cores_for_bytes_are_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    engine = FactoredKernelEngine("cuda", lambda device: host_cuda.TARGET, lambda plans, device: None, lambda: None)
    reason = engine.unavailable(torch.device("cuda"))
    assert ("sm_75 or newer, got Old One" in reason) if refused else reason is None


def test_clocks_of_row_tables_are_those_of_the_operand_that_suits():
    form = ByteForm(codes(5, 256), codes(5, 256).view(torch.int8), None, torch.zeros(256, dtype=torch.int32))

    def looked_up(work):
        return host_engine().clocks(work, form, "int16", torch.device("cpu"))[0]

    few, many = (64, 512), (4096, 512)
    assert looked_up(Work.matmul(few, many)) == looked_up(Work.matmul(many, few))
    of_filters = Work("lut_conv2d", 1, 64, 4096, 512, 64 * 512)  # a convolution looks its activations up
    assert looked_up(of_filters) > 2 * looked_up(Work.matmul(few, many))


@pytest.mark.parametrize(("mma_clocks", "multiplied", "looked_up"), [(8, 28, 44), (16, 14, 28)])
def test_fewer_products_are_worth_it_on_smaller_tensor_cores(mma_clocks, multiplied, looked_up):
    """GPU_KERNELS.md: up to about 32 on an A100, 40 on an H100 and 16 on Ada."""
    target = replace(host_cuda.TARGET, mma_clocks=mma_clocks)
    engine = FactoredKernelEngine("cpu", lambda device: target, run_on_host, lambda: None)
    work = Work.matmul((12544, 2304), (256, 2304))
    for products in (multiplied, looked_up):
        form = ByteForm(codes(products, 256), codes(products, 256), None, torch.zeros(256, dtype=torch.int32))
        by_rows, by_products = engine.clocks(work, form, "int16", torch.device("cpu"))
        assert (by_products < by_rows) == (products == multiplied)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_operands_are_as_they_were_on_the_device_that_verifies(layout):
    case = FactoredCase("factored_conv2d", (2, 3, 4, 5), (3, 3, 1, 2), layout=layout, products=2)
    for operand in case.operands(torch.Generator().manual_seed(8)):
        copy = moved(operand, torch.device("cpu"))
        assert torch.equal(copy, operand)
        assert copy.stride() == operand.stride()
        assert moved(operand, torch.device("meta")).stride() == operand.stride()
