import math
import shutil

import pytest
import torch

from approxconv import get_multiplier
from approxconv.engines import reference
from approxconv.kernels import compile_kernel, use_source
from approxconv.kernels.host import run_on_host
from benchmarks import cpu, gpu, multipliers, network, training
from benchmarks.cpu import CASES, Case, Linear, geometric_mean, measure


def test_cases_are_the_layers_they_are_named_after():
    assert [case.macs for case in CASES[:4]] == [
        16 * s * s * c * c * 9 for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))
    ]
    assert sum(case.depthwise for case in CASES) == 10


@pytest.mark.parametrize(
    "case",
    [Case("ResNet-18", 8, 6), Case("MobileNetV2 depthwise", 5, 7, 2), Linear(9, 5, 2)],
    ids=lambda case: case.name,
)
def test_a_small_case_is_measured(case):
    result = measure(case, repeats=2)
    assert min(*result.seconds.values(), result.native, result.gather) > 0
    assert result.ratio("rank 1") == result.native / result.seconds["rank 1"]
    assert f"| {case.name} |" in cpu.markdown([result])


def test_a_training_step_is_measured():
    step = training.measure(Case("ResNet-18", 4, 5), repeats=2)
    assert min(*step.seconds.values(), step.fake_quantised, step.native) > 0
    assert f"| {step.case.name} |" in training.markdown([step])


def test_a_network_is_measured():
    result = network.measure(repeats=1, width=4, batch=2)
    for times in result.seconds.values():
        assert min(times.values()) > 0
        assert list(times) == [*cpu.TABLES, network.FAKE, network.NATIVE]
    assert "| any table | " in network.markdown(result)


def test_the_network_is_resnet_18():
    model = network.resnet18()
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == 18 + 3  # and shortcuts
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_multipliers_are_measured_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(multipliers, "SIZE", 3)
    monkeypatch.setattr(multipliers, "CHANNELS", 4)
    rows = [multipliers.measure(get_multiplier(name), repeats=2) for name in ("kulkarni_8s", "mitchell_8u")]
    assert [(row.rank, row.products) for row in rows] == [(1, 2), (None, 0)]
    text = multipliers.markdown(rows)
    assert "| kulkarni_8s | 1 | 2 | " in text
    assert "| mitchell_8u | – | – | " in text
    multipliers.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_zoo_s_choice_exists():
    assert set(multipliers.ZOO) <= set(map(str, (get_multiplier(name).name for name in multipliers.ZOO)))


def test_geometric_mean():
    assert math.isclose(geometric_mean([2.0, 8.0]), 4.0)


def test_layers_are_those_of_the_networks():
    by_name = {layer.name: layer for layer in gpu.LAYERS}
    assert len(by_name) == len(gpu.LAYERS)
    stem = by_name["ResNet-18 3→64, 7×7 at 224×224, stride 2"]
    assert (stem.out_size, stem.macs) == (112, 64 * 112 * 112 * 64 * 147)
    depthwise = by_name["MobileNetV2 depthwise 96→96, 3×3 at 112×112, stride 2"]
    assert (depthwise.out_size, depthwise.macs) == (56, 64 * 56 * 56 * 96 * 9)
    assert depthwise.bytes == 64 * 96 * (112 * 112 + 4 * 56 * 56)


def test_the_gpu_table_says_what_was_measured():
    conv = next(layer for layer in gpu.LAYERS if not layer.depthwise)
    depthwise = next(layer for layer in gpu.LAYERS if layer.depthwise)
    rows = [
        gpu.Measurement(
            conv, 2e-3, fp32=1e-3, tf32=5e-4, fp16=25e-5, gather=8e-3, int8=1e-4, factored=(1e-4, 2e-4, 4e-4)
        ),
        gpu.Measurement(depthwise, 1e-3, fp32=1e-3, tf32=1e-3, fp16=1e-3, gather=None),
    ]
    text = gpu.markdown(rows, gpu.Ceilings(copy=2 * depthwise.bytes / 1e-3, int8=1e12), host=20)
    assert f"| {conv.name} | 2.000 | {conv.macs / 2e-3 / 1e12:.2f} |" in text
    rates = " | ".join(f"{conv.macs / seconds / 1e12:.1f}" for seconds in (1e-4, 2e-4, 4e-4, 1e-4))
    assert f"| 0.50 | 0.25 | 0.12 | 4.0 | {rates} |" in text
    assert (
        f"| {depthwise.name} | 1.000 | {depthwise.macs / 1e-3 / 1e12:.2f} | 0.50 | 1.00 | 1.00 | 1.00 |  |  |  |  |  |"
        in text
    )
    assert "convolutions: 0.50 of native fp32, 4.0 times the gather" in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")
def test_the_baseline_gather_is_right():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in ((37, 21), (19, 21)))
    table = torch.randint(-(2**20), 2**20, (256, 256), dtype=torch.int32, generator=generator)
    y = torch.empty(37, 19, dtype=torch.int32)
    with use_source(gpu.SOURCES):
        run_on_host([gpu.gather_plan(x, w, table, y)])
    assert torch.equal(y, reference.lut_matmul(x, w, table))


def test_the_baseline_gather_compiles():
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile")
    with use_source(gpu.SOURCES):
        (resources,) = compile_kernel("gather_baseline", "sm_90").kernels.values()
    assert resources.spill_stores == 0
