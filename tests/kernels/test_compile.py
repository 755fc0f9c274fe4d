"""Compiling for GPUs without one, and keeping the results; what compiles needs CuPy and NVRTC, the rest neither."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from approxconv.kernels import cache, compile, sources
from approxconv.kernels.compile import KernelCompileError, KernelInfo, arch_limits, compile_kernel, info

try:
    from cupy.cuda import nvrtc

    nvrtc.getVersion()
    missing = ""
except (ImportError, RuntimeError) as error:
    missing = str(error)

needs_nvrtc = pytest.mark.skipif(bool(missing), reason=f"needs CuPy and NVRTC to compile: {missing}")

COPY = """
#include "element.cuh"
extern "C" __global__ void __launch_bounds__(64, 2) copy(const element* x, element* y) {
    __shared__ element line[64];
    line[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = line[63 - threadIdx.x];
}
extern "C" __global__ void fill(element* y, int n) { y[threadIdx.x] = n; }
"""
ELEMENT = "#pragma once\ntypedef int element;\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of sources in use; the cache is empty, in memory and on disk."""
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "copy.cu").write_text(COPY)
    (folder / "element.cuh").write_text(ELEMENT)
    with sources.use_source(folder):
        yield folder
    sources.reload()


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one with each run of NVRTC."""
    calls = []
    real = nvrtc.compileProgram

    def counted(program, options):
        calls.append(options)
        real(program, options)

    monkeypatch.setattr(nvrtc, "compileProgram", counted)
    return calls


def run_python(code, **environment):
    """What a fresh Python prints."""
    env = os.environ | {"APPROXCONV_CUDA_SRC": str(sources.source_dir())} | environment
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Compiling


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_90a", "sm_120"])
def test_a_source_compiles(folder, arch):
    compiled = compile_kernel("copy", arch)
    assert compiled.path.read_bytes()[:4] == b"\x7fELF"
    assert compiled.arch == arch
    assert compiled.source is sources.read("copy")
    assert set(compiled.kernels) == {"copy", "fill"}
    assert compiled.kernels["copy"].shared_bytes == 256
    assert compiled.kernels["copy"].max_threads == 64
    assert compiled.kernels["fill"].max_threads is None
    assert compiled.kernels["copy"].registers > 0
    assert "Compiling entry function" in compiled.log


@needs_nvrtc
def test_spills_and_stack_are_reported(folder):
    (folder / "spill.cu").write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const int* x, int* y) {
    int held[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) held[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = held[i] * held[63 - i];
}
__device__ __noinline__ int look_up(const int* x, int i) {
    int held[32];
    for (int k = 0; k < 32; ++k) held[k] = x[k];
    return held[i % 32];
}
template <int N> __global__ void __launch_bounds__(32 * N, 1) stack(const int* x, int* y) { *y = look_up(x, *y) + N; }
template __global__ void stack<4>(const int*, int*);
""")
    kernels = compile_kernel("spill").kernels
    (mangled,) = set(kernels) - {"spill"}
    assert kernels["spill"].spill_stores > 0
    assert kernels["spill"].spill_loads > 0
    assert kernels["spill"].max_threads == 1024
    assert "stack" in mangled
    assert kernels[mangled].stack_bytes >= 128
    assert kernels[mangled].max_threads == 128


@needs_nvrtc
def test_options_are_passed_on(folder):
    (folder / "opt.cu").write_text('extern "C" __global__ void opt(int* y) { __shared__ int s[N]; y[0] = s[y[1]]; }')
    with pytest.raises(KernelCompileError, match=r'^opt\.cu:1: error: identifier "N" is undefined'):
        compile_kernel("opt")
    assert compile_kernel("opt", options=["-DN=8"]).kernels["opt"].shared_bytes == 32
    assert compile_kernel("opt", options=["-DN=16"]).kernels["opt"].shared_bytes == 64


@needs_nvrtc
def test_cudas_own_headers_are_found(folder):
    if not compile._cuda_headers():
        pytest.skip("needs CUDA's headers (nvidia-cuda-runtime)")
    (folder / "half.cu").write_text(
        '#include <cuda_fp16.h>\nextern "C" __global__ void half_of(__half* y) { *y = __hadd(*y, *y); }'
    )
    assert "half_of" in compile_kernel("half").kernels


@needs_nvrtc
def test_what_is_compiled_is_what_was_read(folder, monkeypatch):
    k = sources.read("copy")
    (folder / "element.cuh").write_text("#error edited meanwhile")
    monkeypatch.setattr(compile, "read", lambda _: k)
    assert compile_kernel("copy").kernels["copy"].shared_bytes == 256


@pytest.mark.parametrize("arch", ["90", "sm_9", "compute_90", "sm_90 -G", ""])
def test_a_strange_arch_is_refused(arch):
    with pytest.raises(ValueError, match="arch must be as in 'sm_90', got"):
        compile_kernel("copy", arch)


# Errors


@needs_nvrtc
def test_an_error_shows_the_line(folder):
    lines = ["// head", '#include "element.cuh"', 'extern "C" __global__ void bad(element* y) {', "    *y = 1", "}"]
    (folder / "bad.cu").write_text("\n".join([*lines, "element z = w;"]) + "\n")
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel("bad")
    path = folder / "bad.cu"
    assert str(caught.value).split("\n") == [
        'bad.cu:5: error: expected a ";"',
        '  3 | extern "C" __global__ void bad(element* y) {',
        "  4 |     *y = 1",
        "> 5 | }",
        "  6 | element z = w;",
        f"in {path}, with 2 more errors (see .log)",
    ]
    assert (caught.value.path, caught.value.line) == (path, 5)
    assert '"w" is undefined' in caught.value.log
    assert not any((folder.parent / "cache").glob("*/*"))


@needs_nvrtc
@pytest.mark.parametrize("name", ["parts of (1).cuh", "lib/parts.cuh"])
def test_an_error_in_a_header_names_the_header(folder, name):
    header = folder / name
    header.parent.mkdir(exist_ok=True)
    header.write_text("#pragma once\n\n__device__ int f() { return nothing; }\n")
    (folder / "bad.cu").write_text(f'#include "element.cuh"\n#include "{name}"\n')
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel("bad")
    assert str(caught.value).startswith(f'{header.name}:3: error: identifier "nothing" is undefined\n')
    assert "\n> 3 | __device__ int f() { return nothing; }\n" in str(caught.value)
    assert (caught.value.path, caught.value.line) == (header, 3)


@needs_nvrtc
def test_an_error_goes_away_by_an_edit(folder):
    (folder / "copy.cu").write_text(COPY.replace("63 -", "63 ?"))
    for _ in range(2):
        with pytest.raises(KernelCompileError, match=r"^copy\.cu:7: error: expected a"):
            compile_kernel("copy")
    (folder / "copy.cu").write_text(COPY)
    assert compile_kernel("copy").path.exists()


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "arch", "options", "message"),
    [
        ("", "sm_33", (), "big.cu: error: invalid value for --gpu-architecture (-arch)"),
        ("", "sm_90", ("-nonsense",), "big.cu: error: unrecognized option -nonsense found"),
        ("__shared__ int s[100000]; y[0] = s[y[1]];", "sm_90", (), "big.cu: error: Entry function 'big' uses too much"),
    ],
)
def test_errors_without_a_line_name_the_source(folder, text, arch, options, message):
    (folder / "big.cu").write_text(f'extern "C" __global__ void big(int* y) {{ {text} }}')
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel("big", arch, options)
    assert str(caught.value).startswith(message)
    assert (caught.value.path, caught.value.line) == (folder / "big.cu", None)


@pytest.mark.parametrize("place", ["{}(2)", "{}:2:7", "{}:2"])
@pytest.mark.parametrize("kind", ["error", "fatal error", "catastrophic error", "error #20-D"])
def test_logs_of_nvrtc_and_gcc_are_understood(folder, place, kind):
    header = folder / "element.cuh"
    log = f"In file included from {folder / 'copy.cu'}:2:\n{place.format(header)}: warning: w\n" * 2
    log += f"{place.format(header)}: {kind}: no such thing: (x)\n   2 | …\n"
    error = KernelCompileError.from_log(log, folder / "copy.cu")
    assert str(error).startswith("element.cuh:2: error: no such thing: (x)\n  1 | #pragma once\n> 2 | typedef int")
    assert str(error).endswith(f"\nin {header}")
    assert error.log == log


def test_a_log_that_names_a_file_that_is_not_there(tmp_path):
    error = KernelCompileError.from_log("generated.h(3): error: bad\n", tmp_path / "k.cu")
    assert str(error) == "generated.h:3: error: bad\nin generated.h"
    assert (
        str(KernelCompileError.from_log("crashed\n", tmp_path / "k.cu")) == f"k.cu: error: crashed\nin {tmp_path}/k.cu"
    )


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(KernelCompileError("k.cu:3: error: bad", "log", Path("k.cu"), 3)))
    assert (str(error), error.log, error.path, error.line) == ("k.cu:3: error: bad", "log", Path("k.cu"), 3)


# Once per version


@needs_nvrtc
def test_a_source_is_compiled_once_a_version(folder, calls):
    first = compile_kernel("copy")
    assert compile_kernel("copy") is first
    sources.reload()
    again = compile_kernel("copy")
    assert again is not first
    assert (again.path, again.kernels, again.log) == (first.path, first.kernels, first.log)
    assert len(calls) == 1
    compile_kernel("copy", "sm_80")
    compile_kernel("copy", options=("-DX",))
    assert len(calls) == 3
    (folder / "element.cuh").write_text(ELEMENT.replace("int", "short"))
    assert compile_kernel("copy").kernels["copy"].shared_bytes == 128
    assert len(calls) == 4
    (folder / "element.cuh").write_text(ELEMENT)
    assert compile_kernel("copy").path == first.path
    assert len(calls) == 4


@needs_nvrtc
def test_the_same_files_elsewhere_are_not_compiled_again(folder, calls):
    first = compile_kernel("copy")
    with sources.use_source(sources.copy_sources(folder.parent / "copied")):
        again = compile_kernel("copy")
    assert again.path == first.path
    assert again.source.path != first.source.path
    assert len(calls) == 1


@needs_nvrtc
def test_threads_compile_once(calls):
    threads = [threading.Thread(target=compile_kernel, args=("copy",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


@needs_nvrtc
def test_processes_compile_once(tmp_path):
    code = """
import os, time
from cupy.cuda import nvrtc
from approxconv.kernels.compile import compile_kernel
real = nvrtc.compileProgram
def slow(*arguments):
    with open(os.environ["COMPILED"], "a") as file:
        file.write("once\\n")
    time.sleep(1)
    real(*arguments)
nvrtc.compileProgram = slow
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os.write(1, f"{compile_kernel('copy').path}\\n".encode())  # whole lines, of whichever child
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""
    counter = tmp_path / "compiled"
    paths = run_python(code, COMPILED=str(counter)).split("\n")
    assert len(paths) == 4
    (path,) = set(paths)
    assert counter.read_text() == "once\n"
    assert Path(path).read_bytes()[:4] == b"\x7fELF"


@needs_nvrtc
def test_a_fresh_process_without_nvrtc_uses_the_disk(folder):
    path = compile_kernel("copy").path
    code = """
import sys
sys.modules["cupy"] = None
from approxconv.kernels import compile, sources
compiled = compile.compile_kernel("copy")
print(compiled.path, compiled.kernels["copy"].shared_bytes)
with open(sources.source_dir() / "element.cuh", "a") as file:
    file.write("// edited")
try:
    compile.compile_kernel("copy")
except ImportError as error:
    print(error)
"""
    hit, miss = run_python(code).split("\n")
    assert hit == f"{path} 256"
    assert "approxconv[cuda12]" in miss


@needs_nvrtc
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "unfinished", "no manifest"])
def test_damaged_entries_are_replaced(calls, damage):
    compiled = compile_kernel("copy")
    whole = compiled.path.read_bytes()
    if damage == "truncated":
        compiled.path.write_bytes(whole[:100])
    elif damage == "emptied":
        compiled.path.write_bytes(b"")
    elif damage == "removed":
        (compiled.path.parent / "resources.json").unlink()
    elif damage == "unfinished":
        (compiled.path.parent / "manifest.json").write_text('{"kernels.cu')
    else:
        (compiled.path.parent / "manifest.json").unlink()
    sources.reload()
    again = compile_kernel("copy")
    assert again.path == compiled.path
    assert again.path.read_bytes()[:4] == whole[:4]
    assert len(again.path.read_bytes()) == len(whole)
    assert again.kernels == compiled.kernels
    assert len(calls) == 2


@needs_nvrtc
def test_a_cache_that_is_deleted_is_filled_again(calls, tmp_path):
    compile_kernel("copy")
    shutil.rmtree(tmp_path / "cache")
    assert compile_kernel("copy").path.exists()
    assert len(calls) == 2


@pytest.mark.parametrize("module", ["cupy.cuda", "cupy"])
def test_missing_cupy_names_the_extras(monkeypatch, module):
    for name in ("cupy.cuda", module):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"approxconv\[cuda12\].*approxconv\[cuda13\]"):
        compile_kernel("copy")


@needs_nvrtc
def test_a_missing_nvrtc_library_names_the_extras(monkeypatch):
    def fail():
        raise RuntimeError("no libnvrtc.so.12")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    with pytest.raises(ImportError, match=r"approxconv\[cuda12\]"):
        compile_kernel("copy")


# The cache


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", "~/mine")
    assert cache.cache_dir() == tmp_path / "home" / "mine"
    monkeypatch.delenv("APPROXCONV_CACHE_DIR")
    assert cache.cache_dir() == tmp_path / "xdg" / "approxconv"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "approxconv"
    assert cache.cache_dir().is_dir()


def test_without_a_writable_folder_the_cache_is_the_processes_own(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    own = cache.cache_dir()
    assert own == cache.cache_dir()
    assert cache.cached_folder("key", lambda folder: (folder / "x").write_text("1")).parent == own
    code = "from approxconv.kernels import cache; print(cache.cache_dir(), cache.cache_dir().is_dir())"
    path, was_there = run_python(code).split()
    assert (was_there, path != str(own), Path(path).exists()) == ("True", True, False)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("1")
        raise KeyError("no")

    for _ in range(2):
        with pytest.raises(KeyError):
            cache.cached_folder("key", fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.lock"]
    whole = cache.cached_folder("key", lambda folder: (folder / "whole").write_text("1"))
    assert json.loads((whole / "manifest.json").read_text()).keys() == {"whole"}


def test_entries_are_found_by_pattern():
    for key in ("a-1", "a-2", "b-1"):
        os.utime(cache.cached_folder(key, lambda folder: (folder / "x").write_text("1")), (1e9, 1e9))
    newest = cache.cache_dir() / "a-1"
    os.utime(newest)
    assert cache.find_entry("a-*") == newest
    (newest / "x").unlink()
    assert cache.find_entry("a-*") == cache.cache_dir() / "a-2"
    assert cache.find_entry("c-*") is None


def test_without_file_locks_entries_are_still_whole(monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)

    def build_while_another_does(folder):
        if not (cache.cache_dir() / "key").exists():
            cache.cached_folder("key", lambda other: (other / "x").write_text("other"))
        (folder / "x").write_text("mine")

    assert (cache.cached_folder("key", build_while_another_does) / "x").read_text() in ("mine", "other")


# What a kernel takes


def kernel_info(registers, shared_bytes, arch, max_threads=None):
    return KernelInfo(registers, shared_bytes, 0, 0, 0, max_threads, "s", "k", arch)


@pytest.mark.parametrize(
    ("registers", "shared", "arch", "block", "dynamic", "occupancy"),
    [
        # 32 registers · 32 threads = 1024 a warp, 16 warps a quarter, 64 in all
        (32, 0, "sm_90", 256, 0, 1.0),
        (32, 0, "sm_86", 256, 0, 1.0),
        # 33 · 32 = 1056, handed out as 1280: 12 warps a quarter, 48 in all, 6 blocks of 8
        (33, 0, "sm_90", 256, 0, 48 / 64),
        (33, 0, "sm_75", 256, 0, 1.0),
        # 128 · 32 = 4096: 4 a quarter, 16 in all, one block of 16
        (128, 0, "sm_90", 512, 0, 16 / 64),
        (128, 0, "sm_120", 512, 0, 16 / 48),
        # 64 KiB + 1 KiB of the driver's in 228 KiB: 3 blocks; in 100 KiB: 1
        (16, 0, "sm_90", 512, 65536, 48 / 64),
        (16, 1024, "sm_100", 512, 64512, 48 / 64),
        (16, 0, "sm_89", 512, 65536, 16 / 48),
        # 32 KiB in 64 KiB, nothing reserved: 2 blocks
        (16, 0, "sm_75", 256, 32768, 16 / 32),
        # at most 32 blocks of one warp, 16 on sm_75 and sm_86, 24 on sm_89
        (16, 0, "sm_80", 32, 0, 32 / 64),
        (16, 0, "sm_75", 1, 0, 16 / 32),
        (16, 0, "sm_86", 32, 0, 16 / 48),
        (16, 0, "sm_89", (8, 2, 2), 0, 24 / 48),
        # a block of 1024 is 32 warps: one in 48
        (16, 0, "sm_87", 1024, 0, 32 / 48),
        # opt-in limit: 227 KiB of 228, 99 of 100, 64 of 64
        (16, 0, "sm_90", 128, 227 * 1024, 4 / 64),
        (16, 0, "sm_90", 128, 227 * 1024 + 1, 0),
        (16, 1, "sm_120", 128, 99 * 1024, 0),
        (16, 0, "sm_75", 128, 64 * 1024, 4 / 32),
        # more threads than registers or CUDA allow
        (255, 0, "sm_90", 256, 0, 8 / 64),
        (255, 0, "sm_90", 257, 0, 0),
        (16, 0, "sm_90a", (32, 32, 2), 0, 0),
    ],
)
def test_occupancy(registers, shared, arch, block, dynamic, occupancy):
    assert kernel_info(registers, shared, arch).occupancy(block, dynamic) == pytest.approx(occupancy)


def test_most_threads_a_block():
    assert kernel_info(16, 0, "sm_90").block_threads == 1024
    assert kernel_info(96, 0, "sm_90").block_threads == 640
    assert kernel_info(96, 0, "sm_90", max_threads=128).block_threads == 128
    assert kernel_info(96, 0, "sm_90", max_threads=128).occupancy(129) == 0


def test_strange_blocks_and_archs_are_refused():
    with pytest.raises(ValueError, match=r"at least one thread, got \(32, 0, 1\)"):
        kernel_info(16, 0, "sm_90").occupancy((32, 0, 1))
    with pytest.raises(ValueError, match=r"no limits are known of arch 'sm_37', only of sm_75, "):
        kernel_info(16, 0, "sm_37").occupancy(32)
    assert arch_limits("sm_90a").shared_block_bytes == 227 * 1024


@needs_nvrtc
def test_info(folder):
    every = info("copy", arch="sm_80")
    assert list(every) == ["copy", "fill"]
    one = info("copy", "copy", "sm_80")
    assert one == every["copy"]
    assert (one.shared_bytes, one.max_threads, one.spill_stores, one.stack_bytes) == (256, 64, 0, 0)
    assert one.occupancy(64) == 1.0  # 32 blocks of 2 warps
    assert str(one) == (
        f"copy (copy.cu, sm_80): {one.registers} registers, 256 B static shared, 0 B stack, no spills, "
        "at most 64 threads a block (100% occupancy)"
    )
    with pytest.raises(ValueError, match=r"no kernel 'paste' in .*copy\.cu; there are: copy, fill"):
        info("copy", "paste")


@needs_nvrtc
def test_info_is_of_the_current_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert info("copy", "copy").arch == "sm_90"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    assert info("copy", "copy").arch == "sm_86"
