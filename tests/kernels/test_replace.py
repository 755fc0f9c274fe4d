"""Swapping kernels in a running process: what is swapped in is right, what is not leaves no trace."""

import importlib
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from approxconv import kernels
from approxconv.engines import host_cuda, reference
from approxconv.kernels import KernelCompileError, KernelRejectedError, Replacement, sources, trial
from approxconv.kernels.verify import BenchmarkReport, Case, Failure, Timing, VerificationReport

replacing = importlib.import_module("approxconv.kernels.replace")  # the package's attribute is the function

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

CHECKOUT = Path(__file__).parents[2]
DEPTHWISE = kernels.source("lut_dwconv2d")
OWN = """
// A product sum of one's own, quick to compile.
#include "gather.cuh"

template <typename Entry>
__device__ void product_sum(const code* x, const code* w, const Entry* table, int* out, const Geometry& g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void lut_gemm_gather_int16(const code* x, const code* w, const short* table, int* out,
                                                 const Geometry g) {
    product_sum(x, w, table, out, g);
}

extern "C" __global__ void lut_gemm_gather_int32(const code* x, const code* w, const int* table, int* out,
                                                 const Geometry g) {
    product_sum(x, w, table, out, g);
}
"""
CASE = Case("lut_gemm", (2, 3), (4, 3))
RIGHT = VerificationReport("my_gemm", "host_cuda", 29)
WRONG = VerificationReport("my_gemm", "host_cuda", 1, (Failure(CASE, 1, 8, (0, 1), 5, 6),))
TIMED = BenchmarkReport("my_gemm", "a machine", (Timing(CASE, 0.5, None),))


def own_with(statement, head=""):
    return f"{head}{OWN}".replace("    gather(x,", f"    {statement}\n    gather(x,")


def try_to_replace(name, text, **options):
    return kernels.replace(name, text, engine="host_cuda", **options)


@pytest.fixture(scope="module", autouse=True)
def _session():
    """One for all tests, as each has to wait for its first trial."""
    assert replacing._session is None
    yield
    if replacing._session is not None:
        replacing._session._close()
        replacing._session = None
    sources.set_overlay(None)
    sources.reload()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.delenv("APPROXCONV_CUDA_SRC", raising=False)
    with sources.use_source(None):
        yield
        while names := kernels.replaced():
            kernels.undo(names[0])
    sources.set_overlay(None if replacing._session is None else replacing._session.folder)


@pytest.fixture
def accepting(monkeypatch):
    """Every text passes, for tests of what comes after."""

    def accept(self, name, text, engine, seed, timeout):
        return Replacement(name, RIGHT, TIMED)

    monkeypatch.setattr(replacing._Session, "try_out", accept)


@pytest.fixture(scope="module")
def depthwise():
    """A depthwise convolution and what it is."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 9, 7), (3, 1, 3, 3)
    x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
    table = torch.randint(-30_000, 30_000, (256, 256), dtype=torch.int32, generator=generator)
    arguments = x, w, table, (1, 1), (1, 1), (1, 1), 7
    return arguments, reference.lut_dwconv2d(*arguments)


class Computing:
    """A thread that computes again and again while the block runs, and keeps what went wrong."""

    def __init__(self, depthwise):
        self.arguments, self.expected = depthwise
        self.calls, self.wrong = 0, []
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._compute)

    def _compute(self):
        while not self._stop.is_set():
            try:
                if not torch.equal(host_cuda.lut_dwconv2d(*self.arguments), self.expected):
                    self.wrong.append("another result")
            except Exception as error:
                self.wrong.append(repr(error))
            self.calls += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


# What is right


@pytest.mark.slow
@needs_compiler
def test_a_right_kernel_takes_effect_while_another_thread_computes(tmp_path, depthwise):
    arguments, expected = depthwise
    (tmp_path / "mine.cuh").write_text("#pragma once\nconstexpr int FROM_MY_HEADER = 7;\n")
    packaged = {path: path.read_bytes() for path in sources.source_dir().iterdir()}
    text = f'#include "mine.cuh"\n{DEPTHWISE}\nconstexpr int MARK = FROM_MY_HEADER + 35;  // Σ 語 🙂\n'
    with kernels.use_source(tmp_path), Computing(depthwise) as computing:
        report = try_to_replace("lut_dwconv2d", text)
        assert kernels.source("lut_dwconv2d") == text
        assert kernels.read("lut_dwconv2d").constants["MARK"] == 42
        calls, limit = computing.calls, time.monotonic() + 60
        while computing.calls < calls + 3 and time.monotonic() < limit:
            time.sleep(0.01)
        assert torch.equal(host_cuda.lut_dwconv2d(*arguments), expected)
        assert kernels.replaced() == ["lut_dwconv2d"]
        assert kernels.undo("lut_dwconv2d") == DEPTHWISE == kernels.source("lut_dwconv2d")
        assert "MARK" not in kernels.read("lut_dwconv2d").constants
        assert torch.equal(host_cuda.lut_dwconv2d(*arguments), expected)
    assert computing.calls
    assert not computing.wrong
    assert kernels.replaced() == []
    assert {path: path.read_bytes() for path in sources.source_dir().iterdir()} == packaged
    assert [path.name for path in tmp_path.iterdir()] == ["mine.cuh"]

    assert report.name == "lut_dwconv2d"
    assert report.verification
    assert report.verification.passed == len(list(kernels.verify.__globals__["CASES"]["lut_dwconv2d"]()))
    assert report.benchmark.baseline == "the kernel before"
    assert all(timing.baseline > 0 for timing in report.benchmark.timings)
    assert str(report).startswith("lut_dwconv2d replaced\n")
    assert "times the kernel before" in str(report)


@pytest.mark.slow
@needs_compiler
def test_a_kernel_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "sign.cuh").write_text("constexpr int SIGN = 1;\n")
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))  # set after the process of the trial was started
    replacing.prepare()
    text = own_with("static_assert(SIGN == 1);", '#include "sign.cuh"\n')
    report = try_to_replace("my_gemm", text)
    assert report.benchmark.baseline == "the kernel in use"
    assert "my_gemm" in kernels.list()
    x, w = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((5, 12), (6, 12)))
    table = torch.randint(-99, 99, (256, 256), dtype=torch.int32)
    run = torch.ops.approxconv.lut_matmul
    assert torch.equal(run(x, w, table, engine="host_cuda:my_gemm"), run(x, w, table, engine="reference"))
    assert kernels.diff("my_gemm").startswith("--- my_gemm.cu\n+++ my_gemm.cu in use\n")
    assert kernels.undo("my_gemm") == ""
    assert "my_gemm" not in kernels.list()
    with pytest.raises(FileNotFoundError, match="my_gemm"):
        run(x, w, table, engine="host_cuda:my_gemm")
    with pytest.raises(FileNotFoundError, match="my_gemm"):
        kernels.diff("my_gemm")


@needs_compiler
def test_the_engine_runs_the_text_in_use(accepting, depthwise):
    arguments, expected = depthwise
    kernels.replace("lut_dwconv2d", DEPTHWISE.replace("sums[k] = g.bias;", "sums[k] = g.bias + 1;"))
    assert torch.equal(host_cuda.lut_dwconv2d(*arguments), expected + 1)
    kernels.undo("lut_dwconv2d")
    assert torch.equal(host_cuda.lut_dwconv2d(*arguments), expected)


@needs_compiler
def test_swaps_do_not_disturb_launches(depthwise):
    session = replacing._get_session()
    texts = [f"{DEPTHWISE}\nconstexpr int MARK = {number};\n" for number in range(2)]
    with Computing(depthwise) as computing:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for text in texts:
                session.put("lut_dwconv2d", text)
            for _ in texts:
                session.take_back("lut_dwconv2d")
    assert computing.calls
    assert not computing.wrong


@needs_compiler
def test_a_launch_planned_for_one_text_does_not_run_another(accepting, depthwise, monkeypatch):
    planned, built = [], []
    engine = kernels.KernelEngine("cpu", host_cuda._target, lambda plans, _: planned.extend(plans), host_cuda.compiler)
    engine.lut_dwconv2d(*depthwise[0])
    kernels.replace("lut_dwconv2d", DEPTHWISE.replace("STRIP = 8", "STRIP = 4"))  # the plan's blocks do not fit it

    def build(source, sanitize=None):
        built.append(source.fingerprint)
        raise RuntimeError("edited during the call")

    monkeypatch.setattr("approxconv.kernels.host.run.build", build)
    with pytest.raises(RuntimeError, match="edited during the call"):
        kernels.host.run_on_host(planned)
    assert set(built) <= {plan.version for plan in planned}


# What is not


@needs_compiler
def test_a_wrong_kernel_is_rejected(accepting, monkeypatch):
    before = own_with("// the one before")
    kernels.replace("my_gemm", before)
    monkeypatch.undo()  # from here on it is tried
    replacing.prepare()
    os.kill(replacing._session._waiting.pid, signal.SIGKILL)  # whoever did it: the next one does not wait for it
    replacing._session._waiting.wait()
    wrong = OWN.replace(
        "g);\n}", "g);\n    if (blockIdx.x + threadIdx.x + threadIdx.y == 0) out[g.out_at(0)] += 1;\n}", 1
    )
    with pytest.raises(KernelRejectedError, match=r"first y\[[\d, ]+\] = -?\d+, expected -?\d+") as caught:
        try_to_replace("my_gemm", wrong)
    report = caught.value.report
    assert not report
    assert all(failure.got == failure.expected + 1 for failure in report.failures)
    assert all(not any(failure.index) for failure in report.failures)
    assert str(caught.value).endswith("the kernel in use stays")
    assert kernels.source("my_gemm") == before
    assert kernels.replaced() == ["my_gemm"]


@needs_compiler
def test_a_compile_error_names_the_line():
    lines = DEPTHWISE.split("\n")
    number = next(n for n, line in enumerate(lines, 1) if "g.pad_code);" in line)
    lines[number - 1] = lines[number - 1].replace("g.pad_code", "g.pad_kode")
    with pytest.raises(KernelCompileError, match=rf"^lut_dwconv2d\.cu:{number}: error: .*pad_kode") as caught:
        try_to_replace("lut_dwconv2d", "\n".join(lines))
    assert caught.value.line == number
    assert caught.value.path.name == "lut_dwconv2d.cu"
    assert "pad_kode" in caught.value.log
    assert f"> {number} | {lines[number - 1]}".rstrip() in str(caught.value)
    assert kernels.replaced() == []
    assert kernels.source("lut_dwconv2d") == DEPTHWISE


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("*(volatile int*)8 = 1;", r"^my_gemm crashed with SIG[A-Z]+; the kernel in use stays"),
        ("__trap();", r"KernelTrapError: lut_gemm_gather_int\d+: .*thread .*; the kernel in use stays$"),
        ('printf("words\\n"); fflush(stdout); std::_Exit(0);', r"^my_gemm crashed with status 0; .*: (.*\n)*words$"),
    ],
    ids=["segfault", "trap", "exit"],
)
def test_a_crash_is_not_this_processs(statement, said):
    with pytest.raises(KernelRejectedError, match=said) as caught:
        try_to_replace("my_gemm", own_with(statement, "#include <cstdio>\n#include <cstdlib>\n"))
    assert caught.value.report is None
    assert kernels.replaced() == []
    assert "my_gemm" not in kernels.list()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@needs_compiler
def test_a_kernel_without_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))  # to keep nothing
    replacing.prepare()
    process = replacing._session._waiting
    started = tmp_path / "started"
    endless = f'fclose(fopen("{started}", "w")); for (;;) printf("%0512d", 0);'  # which nobody must keep
    before = resident_bytes() if Path("/proc/self/statm").exists() else None
    begin = time.monotonic()
    with pytest.raises(KernelRejectedError, match=r"^my_gemm did not end within 5 s; the kernel in use stays$"):
        try_to_replace("my_gemm", own_with(endless, "#include <cstdio>\n"), timeout=5)
    assert started.exists()
    assert time.monotonic() - begin < 15
    assert process.poll() is not None
    assert before is None or resident_bytes() - before < 2**28
    assert kernels.replaced() == []


@needs_compiler
def test_an_interrupt_ends_the_trial(tmp_path, monkeypatch, request):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))
    replacing.prepare()
    process = replacing._session._waiting
    assert os.getpgid(process.pid) != os.getpgid(0)  # the terminal's interrupt is not for it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        try_to_replace("my_gemm", own_with("for (;;);"))
    assert process.poll() is not None
    assert replacing._session._waiting.poll() is None  # ready for the next
    assert not replacing._lock.locked()
    assert kernels.replaced() == []


@pytest.mark.slow
@needs_compiler
def test_a_compiler_without_end_is_ended(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo 1 ;; *) sleep 1234 & echo $! > {tmp_path}/pid; wait ;; esac\n'
    )
    compiler.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    replacing.prepare()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))  # after that process was started
    with pytest.raises(KernelRejectedError, match="did not end within 6 s"):
        try_to_replace("my_gemm", OWN, timeout=6)
    with pytest.raises(ProcessLookupError):
        ended(int((tmp_path / "pid").read_text()))
    assert list((tmp_path / "temporary").iterdir()) == []


def ended(process):
    """Wait for a process that somebody else was told to end."""
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        os.kill(process, 0)
        time.sleep(0.05)


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "/x", "1x", "a b", "a.cu", "lut_gemm\n", "ä", "x" * 62, "x\0", None, 3, b"lut_gemm"]
)
def test_names_that_are_none(name):
    before = kernels.list()
    with pytest.raises(ValueError, match="name must be an identifier such as lut_gemm, got "):
        kernels.replace(name, OWN)
    assert kernels.list() == before


@pytest.mark.parametrize("text", [None, b"text", 3, Path("lut_gemm.cu"), ["line"]])
def test_texts_that_are_none(text):
    with pytest.raises(ValueError, match="text must be the source as a str, got "):
        kernels.replace("my_gemm", text)


def test_an_engine_that_is_none():
    with pytest.raises(ValueError, match="engine must be 'cuda', 'host_cuda' or None, got 'cpu'"):
        kernels.replace("my_gemm", OWN, engine="cpu")


def test_a_text_that_is_no_utf8_leaves_the_next_trial_ready():
    replacing.prepare()
    process = replacing._session._waiting
    with pytest.raises(ValueError, match="surrogates not allowed"):
        try_to_replace("my_gemm", f"{OWN}// \ud800")
    assert replacing._session._waiting is process
    assert process.poll() is None
    assert "my_gemm" not in kernels.list()


# The trial itself, in this process


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """``tried(name, text)``: what the trial answers."""
    for folder in ("candidate", "current", "chosen"):
        (tmp_path / folder).mkdir()

    def answer(name, text):
        (tmp_path / "candidate" / f"{name}.cu").write_text(text)
        folders = [str(tmp_path / folder) for folder in ("candidate", "current", "chosen")]
        request = *folders, name, "host_cuda", 0, str(tmp_path / "result"), dict(os.environ)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pickle.dumps(request))))
        trial.main()
        return pickle.loads((tmp_path / "result").read_bytes())

    environment = dict(os.environ)
    yield answer
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize(
    "text", ["", "// Σ 語\n", "int helper() { return 1; }", 'extern "C" __global__ void other() {}']
)
@pytest.mark.parametrize("name", ["my_gemm", "lut_gemm"])
@needs_compiler
def test_a_text_without_kernels_of_an_operator(tried, name, text):
    outcome = tried(name, text)
    assert type(outcome) is ValueError
    assert re.search(rf"{name}'? must define kernels .* it defines (none|other)", str(outcome))


def test_another_operators_kernels_do_not_stand_in(tried):
    outcome = tried("lut_gemm", kernels.source("lut_conv2d"))
    assert type(outcome) is ValueError
    assert str(outcome).startswith("lut_gemm must define kernels lut_gemm_…, it defines lut_conv2d_")


def test_a_missing_header_is_a_compile_error(tried):
    outcome = tried("my_gemm", f'// first\n#include "nowhere.cuh"\n{OWN}')
    assert type(outcome) is KernelCompileError
    assert str(outcome).startswith('my_gemm.cu:2: error: no header "nowhere.cuh"')
    assert (outcome.path.name, outcome.line) == ("my_gemm.cu", 2)
    assert '> 2 | #include "nowhere.cuh"' in str(outcome)


def test_a_header_that_misses_a_header(tried, tmp_path):
    (tmp_path / "chosen" / "mine.cuh").write_text('\n\n#include "nowhere.cuh"\n')
    outcome = tried("my_gemm", f'#include "mine.cuh"\n{OWN}')
    assert type(outcome) is KernelCompileError
    assert (outcome.path.name, outcome.line) == ("mine.cuh", 3)


@pytest.mark.parametrize(
    "broken", [KernelCompileError("k.cu:1: error: of the old one"), FileNotFoundError("a header"), KeyError("THREADS")]
)
def test_the_kernel_before_may_be_broken(tried, tmp_path, monkeypatch, broken):
    def benchmark(name, engine):
        if kernels.source(name) == "// broken":
            raise broken
        return TIMED

    (tmp_path / "current" / "my_gemm.cu").write_text("// broken")
    monkeypatch.setattr(trial, "verify", lambda name, engine, seed: RIGHT)
    monkeypatch.setattr(trial, "benchmark", benchmark)
    assert tried("my_gemm", OWN) == (RIGHT, TIMED)


def test_a_wrong_kernel_is_not_timed(tried, monkeypatch):
    monkeypatch.setattr(trial, "verify", lambda name, engine, seed: WRONG)
    monkeypatch.setattr(trial, "benchmark", None)
    assert tried("my_gemm", OWN) == (WRONG, None)


def test_the_trial_has_the_environment_of_the_call(tried, monkeypatch):
    monkeypatch.setenv("APPROXCONV_TEST", "set later")
    monkeypatch.setattr(trial, "verify", lambda name, engine, seed: os.environ.pop("APPROXCONV_TEST") and WRONG)
    assert tried("my_gemm", OWN) == (WRONG, None)


# History


def test_undo_goes_back_one_replacement_at_a_time(accepting):
    first, second = f"{DEPTHWISE}// first\n", f"{DEPTHWISE}// second\n"
    kernels.replace("lut_dwconv2d", first)
    kernels.replace("my_gemm", OWN)
    kernels.replace("lut_dwconv2d", second)
    assert kernels.replaced() == ["lut_dwconv2d", "my_gemm"]
    assert kernels.source("lut_dwconv2d") == second
    assert kernels.undo("lut_dwconv2d") == first == kernels.source("lut_dwconv2d")
    assert kernels.replaced() == ["lut_dwconv2d", "my_gemm"]
    assert kernels.undo("lut_dwconv2d") == DEPTHWISE == kernels.source("lut_dwconv2d")
    assert kernels.replaced() == ["my_gemm"]
    assert kernels.source("my_gemm") == OWN
    with pytest.raises(ValueError, match="'lut_dwconv2d' was not replaced; replaced: my_gemm"):
        kernels.undo("lut_dwconv2d")
    assert kernels.undo("my_gemm") == ""
    for name in ("my_gemm", "lut_gemm", "nowhere", ""):
        with pytest.raises(ValueError, match="was not replaced; replaced: none"):
            kernels.undo(name)


def test_undo_without_a_session(monkeypatch):
    monkeypatch.setattr(replacing, "_session", None)
    assert kernels.replaced() == []
    with pytest.raises(ValueError, match="'lut_gemm' was not replaced; replaced: none"):
        kernels.undo("lut_gemm")


def test_diff(accepting):
    assert kernels.diff("lut_dwconv2d") == ""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kernels.diff("nowhere")
    kernels.replace("lut_dwconv2d", DEPTHWISE.replace("STRIP = 8", "STRIP = 4"))
    assert [line for line in kernels.diff("lut_dwconv2d").splitlines() if line[0] in "+-"] == [
        "--- lut_dwconv2d.cu",
        "+++ lut_dwconv2d.cu in use",
        "-constexpr int STRIP = 8;  // output rows a thread",
        "+constexpr int STRIP = 4;  // output rows a thread",
    ]
    kernels.replace("lut_dwconv2d", DEPTHWISE)
    assert kernels.diff("lut_dwconv2d") == ""
    kernels.replace("my_gemm", "no newline")
    assert kernels.diff("my_gemm") == "--- my_gemm.cu\n+++ my_gemm.cu in use\n@@ -0,0 +1 @@\n+no newline\n"


def test_a_replacement_hides_an_edited_file(accepting, tmp_path, monkeypatch):
    """Which comes to light again as it is by then."""
    (tmp_path / "lut_dwconv2d.cu").write_text("// mine\n")
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))
    kernels.replace("lut_dwconv2d", "// replaced\n")
    (tmp_path / "lut_dwconv2d.cu").write_text("// mine, edited\n")
    assert kernels.source("lut_dwconv2d") == "// replaced\n"
    assert kernels.source_dir() == tmp_path
    assert kernels.diff("lut_dwconv2d").endswith("\n-// mine, edited\n+// replaced\n")
    with kernels.use_source(CHECKOUT / "cuda_src"):
        assert kernels.source("lut_dwconv2d") == "// replaced\n"
    assert kernels.undo("lut_dwconv2d") == "// mine, edited\n"
    kernels.replace("lut_dwconv2d", "// replaced\n")
    (tmp_path / "lut_dwconv2d.cu").unlink()
    assert kernels.undo("lut_dwconv2d") == DEPTHWISE


def test_a_text_stays_as_it_is(accepting):
    text = "// a\r\n\t// b  \n// Σ \x0c 語 🙂 \\n"
    kernels.replace("my_gemm", text)
    assert kernels.source("my_gemm") == text


# Its process


@needs_fork
def test_a_forked_child_has_its_own_replacements(accepting):
    kernels.replace("lut_dwconv2d", "// parent's")
    kernels.replace("lut_dwconv2d", "// parent's second")
    folder = replacing._session._folders
    child = os.fork()
    if not child:
        status = 1
        try:
            assert kernels.source("lut_dwconv2d") == "// parent's second"
            assert kernels.undo("lut_dwconv2d") == "// parent's"
            assert replacing._session._folders != folder
            kernels.replace("my_gemm", OWN)
            assert kernels.replaced() == ["lut_dwconv2d", "my_gemm"]
            replacing._session._close()
            assert not replacing._session._folders.exists()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.exists()
    assert kernels.source("lut_dwconv2d") == "// parent's second"
    assert kernels.replaced() == ["lut_dwconv2d"]
    assert kernels.undo("lut_dwconv2d") == "// parent's"


SCRIPT = """
import atexit, importlib, os, pathlib, sys
from approxconv import kernels
replacing = importlib.import_module("approxconv.kernels.replace")
text = pathlib.Path(sys.argv[2]).read_text()
if sys.argv[1] == "try":
    kernels.replace("my_gemm", text, engine="host_cuda")
else:
    replacing.prepare()
    replacing._session.put("my_gemm", text)
if not os.fork():
    atexit._run_exitfuncs()
    os._exit(0)
assert os.wait()[1] == 0
assert kernels.replaced() == ["my_gemm"]
assert kernels.source("my_gemm") == text
print(replacing._session._waiting.pid)
"""


@needs_fork
@pytest.mark.parametrize("way", ["prepare", pytest.param("try", marks=[pytest.mark.slow, needs_compiler])])
def test_nothing_is_left_at_exit(tmp_path, way):
    (tmp_path / "own.cu").write_text(OWN)
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", SCRIPT, way, tmp_path / "own.cu"],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.slow
def test_the_trial_is_of_the_library_that_asks(tmp_path):
    shutil.copytree(CHECKOUT / "approxconv", tmp_path / "approxconv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "cuda_src", tmp_path / "cuda_src")
    (tmp_path / "approxconv" / "kernels" / "trial.py").write_text("def main(): raise SystemExit('that of the copy')")
    script = (  # as a file in that folder would, run from here
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from approxconv import kernels\n"
        "try: kernels.replace('my_gemm', '', engine='host_cuda')\n"
        "except kernels.KernelRejectedError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout == "my_gemm crashed with status 1; the kernel in use stays: that of the copy\n", done.stderr


# Errors and reports


def test_errors_survive_pickling():
    rejected = pickle.loads(pickle.dumps(KernelRejectedError("wrong", WRONG)))
    assert (str(rejected), rejected.report) == ("wrong", WRONG)
    assert pickle.loads(pickle.dumps(KernelRejectedError("crashed"))).report is None
    error = KernelCompileError("k.cu:3: error: what", "the log", Path("/a/k.cu"), 3)
    loaded = pickle.loads(pickle.dumps(error))
    assert (str(loaded), loaded.log, loaded.path, loaded.line) == (str(error), error.log, error.path, error.line)
    replacement = Replacement("my_gemm", RIGHT, TIMED)
    assert pickle.loads(pickle.dumps(replacement)) == replacement


def test_a_report_beside_another():
    other_case = Case("lut_gemm", (9, 9), (9, 9))
    report = BenchmarkReport("k", "m", (Timing(CASE, 0.5, None), Timing(other_case, 0.25, 9.0)), "the packaged kernel")
    before = BenchmarkReport("k", "m", (Timing(CASE, 2.0, None),))
    beside = report.beside(before, "the kernel before")
    assert beside.baseline == "the kernel before"
    assert [(timing.seconds, timing.baseline) for timing in beside.timings] == [(0.5, 2.0), (0.25, None)]
    assert report.timings[1].baseline == 9.0  # left as it was
    assert str(beside).split("\n")[1].endswith(", 4.00 times the kernel before")
    assert "times" not in str(beside).split("\n")[2]
    assert "4.00" in beside._repr_html_()
    assert "speed to the kernel before" in beside._repr_html_()
    assert "speed to" not in BenchmarkReport("k", "m", (Timing(CASE, 1.0, None),))._repr_html_()


# The overlay


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Overlay, chosen and packaged, each with sources that say where they are from."""
    found = []
    for name, files in (("overlay", "a"), ("chosen", "ab"), ("packaged/cuda_src", "abc")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / f"{file}.cu").write_text(f'#include "{file}.cuh"\n// {folder.name}\n')
            (folder / f"{file}.cuh").write_text(f"// {folder.name}\n")
        found.append(folder)
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "packaged")
    sources.set_overlay(found[0])
    sources.use_source(found[1])
    return found


def test_the_overlay_comes_first(folders):
    overlay, chosen, packaged = folders
    assert sources.source_dir() == chosen
    assert [sources.source_path(name) for name in "abc"] == [overlay / "a.cu", chosen / "b.cu", packaged / "c.cu"]
    assert sources.read("a").files == (overlay / "a.cu", overlay / "a.cuh")
    (overlay / "a.cuh").unlink()
    assert sources.read("a").files == (overlay / "a.cu", chosen / "a.cuh")
    assert sources.list_sources() == ["a", "b", "c"]
    (overlay / "d.cu").write_text("")
    assert sources.list_sources() == ["a", "b", "c", "d"]
    sources.set_overlay(None)
    assert sources.read("a").files == (chosen / "a.cu", chosen / "a.cuh")
    assert sources.list_sources() == ["a", "b", "c"]
    assert sources.source_dir() == chosen


def test_the_overlay_is_seen_by_sources_that_were_read_before(folders):
    overlay, chosen, _ = folders
    sources.set_overlay(None)
    for path in chosen.iterdir():
        os.utime(path, (1e9, 1e9))  # as files are that nobody edits just now
    before = sources.read("a")
    assert sources.read("a") is before
    sources.set_overlay(overlay)
    assert sources.read("a").path == overlay / "a.cu"
    sources.set_overlay(None)
    assert sources.read("a").path == chosen / "a.cu"


def test_hidden_source_path(folders):
    overlay, chosen, packaged = folders
    (overlay / "d.cu").write_text("")
    assert sources.hidden_source_path("a") == chosen / "a.cu"
    assert sources.hidden_source_path("c") == packaged / "c.cu"
    assert sources.hidden_source_path("d") is None
    assert sources.hidden_source_path("nowhere") is None
    (chosen / "a.cu").unlink()
    assert sources.hidden_source_path("a") == packaged / "a.cu"
    sources.set_overlay(None)
    assert sources.hidden_source_path("a") == packaged / "a.cu"
    assert sources.hidden_source_path("d") is None


def test_copies_are_of_the_sources_in_use(folders, tmp_path):
    copied = sources.copy_sources(tmp_path / "copied")
    assert {path.name: path.read_text().rpartition("// ")[2].strip() for path in copied.glob("*.cu")} == {
        "a.cu": "overlay",
        "b.cu": "chosen",
        "c.cu": "cuda_src",
    }


@pytest.mark.slow
def test_a_folder_that_somebody_tidied_up_is_written_anew(accepting):
    kernels.replace("my_gemm", OWN)
    shutil.rmtree(replacing._session._folders)
    with pytest.raises(FileNotFoundError, match="the folder of replaced kernels is gone"):
        kernels.source("my_gemm")
    kernels.replace("other_gemm", OWN)
    assert kernels.source("my_gemm") == OWN
    assert kernels.replaced() == ["my_gemm", "other_gemm"]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(ValueError, match="timeout must be a finite number of seconds above 0, got"):
        kernels.replace("my_gemm", OWN, timeout=timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_an_engine_that_is_not_there():
    with pytest.raises(ValueError, match="engine 'cuda' needs a CUDA device"):
        kernels.replace("my_gemm", OWN, engine="cuda")
