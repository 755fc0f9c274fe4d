"""The few lines that only run with a GPU, against a CuPy that notes what it is asked for."""

import os
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from approxconv.kernels import Plan, Target, launch, read, reload
from approxconv.kernels.launch import device_target

launcher = sys.modules["approxconv.kernels.launch"]


class FakeFunction:
    def __init__(self, log, name):
        self.log, self.name, self.max_dynamic_shared_size_bytes = log, name, 48 * 2**10

    def __call__(self, grid, block, arguments, *, shared_mem):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.log.append(("launch", self.name, grid, block, shared_mem, arguments))


@pytest.fixture
def log(monkeypatch):
    """What was called, in order, while CuPy and the CUDA parts of torch are fakes."""
    calls = []

    @contextmanager
    def inside(name, value):
        calls.append((f"enter {name}", value))
        yield
        calls.append((f"exit {name}", value))

    class Device:
        compute_capability = "90"
        attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}  # noqa: RUF012

        def __init__(self, index):
            self.inside = inside("cupy device", index)

        def __enter__(self):
            return self.inside.__enter__()

        def __exit__(self, *exception):
            return self.inside.__exit__(*exception)

    class RawModule:
        def __init__(self, *, path):
            calls.append(("module", path))

        def get_function(self, name):
            return FakeFunction(calls, name)

    def from_dlpack(exporter):
        """As CuPy calls it, but for the stream, which must not matter."""
        assert exporter.__dlpack_device__()[1] == 0
        tensor = torch.from_dlpack(exporter.__dlpack__(stream=7, max_version=(1, 0)))
        calls.append(("dlpack", tensor.data_ptr()))
        return ("array", tensor.data_ptr())

    cupy = types.ModuleType("cupy")
    cupy.RawModule, cupy.from_dlpack = RawModule, from_dlpack
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        Stream=types.SimpleNamespace(from_external=lambda stream: inside("stream", stream.__cuda_stream__())),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda index: inside("torch device", index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=1000 + index))
    monkeypatch.setattr(
        launcher,
        "compile_kernel",
        lambda name, arch: types.SimpleNamespace(path=f"/cache/{name}.{arch}.cubin", source=read(name)),
    )
    monkeypatch.setattr(launcher, "_first_process", None)
    reload()
    device_target.cache_clear()
    yield calls
    reload()
    device_target.cache_clear()


def plan(*arguments, shared=0, kernel="lut_gemm_rows10_int16"):
    return Plan("lut_gemm", kernel, (7, 2, 1), (64, 1, 1), shared, arguments)


def test_a_plan_runs_on_torchs_device_and_stream(log):
    x, scalar = torch.zeros(3, requires_grad=True), np.int32(5)
    launch([plan(x, scalar)], torch.device("cuda", 1))
    assert log == [
        ("enter torch device", 1),
        ("enter cupy device", 1),
        ("enter stream", (0, 1001)),
        ("module", "/cache/lut_gemm.sm_90.cubin"),
        ("dlpack", x.data_ptr()),
        ("launch", "lut_gemm_rows10_int16", (7, 2, 1), (64, 1, 1), 0, (("array", x.data_ptr()), scalar)),
        ("exit stream", (0, 1001)),
        ("exit cupy device", 1),
        ("exit torch device", 1),
    ]


def test_device_without_index_is_the_current_one(log):
    launch([plan()], torch.device("cuda"))
    assert ("enter torch device", 3) in log


def test_tensors_cross_once_and_modules_load_once(log):
    x, y = torch.zeros(3), torch.zeros(4)
    for _ in range(2):
        launch([plan(x, y), plan(y, kernel="lut_gemm_reduce")], torch.device("cuda", 0))
    assert sum(entry[0] == "module" for entry in log) == 1
    assert [entry for entry in log if entry[0] == "dlpack"] == 2 * [("dlpack", t.data_ptr()) for t in (x, y)]
    assert [entry[1] for entry in log if entry[0] == "launch"] == 2 * ["lut_gemm_rows10_int16", "lut_gemm_reduce"]


def test_shared_memory_beyond_the_default_is_opted_in_to_and_stays_so(log):
    sizes = [0, 100_000, 60_000, 100_000]  # FakeFunction refuses more than it was last opted in to
    for size in sizes:
        launch([plan(shared=size)], torch.device("cuda", 0))
    assert [entry[4] for entry in log if entry[0] == "launch"] == sizes


def test_an_edited_source_is_loaded_at_the_next_launch(log, tmp_path):
    from approxconv.kernels import copy_sources, use_source

    folder = copy_sources(tmp_path / "mine")
    with use_source(folder):
        launch([plan()], torch.device("cuda", 0))
        (folder / "row_tables.cuh").write_text((folder / "row_tables.cuh").read_text() + "// edited\n")
        launch([plan()], torch.device("cuda", 0))
        launch([plan()], torch.device("cuda", 0))
    assert sum(entry[0] == "module" for entry in log) == 2


def test_a_plan_for_an_edited_source_is_not_run(log):
    with pytest.raises(RuntimeError, match=r"lut_gemm\.cu .*edited"):
        launch([replace(plan(), version="of yesterday")], torch.device("cuda", 0))
    assert not any(entry[0] == "launch" for entry in log)
    launch([replace(plan(), version=read("lut_gemm").fingerprint)], torch.device("cuda", 0))
    assert any(entry[0] == "launch" for entry in log)


@pytest.mark.parametrize(("capability", "mma_clocks"), [("75", 16), ("80", 8), ("89", 16), ("90", 8), ("120", 16)])
def test_target_is_read_from_the_device(log, monkeypatch, capability, mma_clocks):
    monkeypatch.setattr(sys.modules["cupy"].cuda.Device, "compute_capability", capability)
    assert device_target(0) == Target(132, 232448, mma_clocks)


def test_a_fork_after_the_first_launch_is_refused(log):
    launch([plan()], torch.device("cuda", 0))
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            launch([plan()], torch.device("cuda", 0))
            message = "launched"
        except RuntimeError as error:
            message = str(error)
        os.write(write_end, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert "'spawn'" in pipe.read()


def test_without_cupy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"approxconv\[cuda12\]"):
        launch([plan()], torch.device("cuda", 0))
