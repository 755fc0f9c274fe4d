import builtins
import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import approxconv
from approxconv import diagnosis, kernels
from approxconv.cli import main
from approxconv.diagnosis import Check, Diagnosis
from approxconv.engines import cpu

NAMES = ["Python", "CUDA", "CuPy", "NVRTC", "cache", "kernels", "C++", "engines", "threads", "pictures", "self-test"]
CPU = torch.device("cpu")
WIDTH = 110


@pytest.fixture(scope="module")
def healthy():
    return approxconv.doctor()


@pytest.fixture
def check():
    """Run one check as `doctor` does."""
    return lambda name: diagnosis._tried(name, diagnosis._CHECKS[name])


@pytest.fixture
def only(monkeypatch):
    """Have `doctor` run only some checks."""

    def select(*names, **others):
        chosen = {name: each for name, each in diagnosis._CHECKS.items() if name in names}
        monkeypatch.setattr(diagnosis, "_CHECKS", chosen | others)

    return select


@pytest.fixture
def without(monkeypatch):
    """Have imports of a package fail, as installed but broken or as not installed."""
    real_import, real_find_spec = builtins.__import__, importlib.util.find_spec

    def remove(package, error=None):
        def importing(name, globals=None, locals=None, fromlist=(), level=0):
            if level == 0 and name.partition(".")[0] == package:
                raise error or ModuleNotFoundError(f"No module named {package!r}")
            return real_import(name, globals, locals, fromlist, level)

        monkeypatch.setattr(builtins, "__import__", importing)
        if error is None:
            find = lambda name, *rest: None if name == package else real_find_spec(name, *rest)  # noqa: E731
            monkeypatch.setattr(diagnosis, "find_spec", find)
            installed = diagnosis._installed
            monkeypatch.setattr(diagnosis, "_installed", lambda name: None if package in name else installed(name))

    return remove


@pytest.fixture
def gpu(monkeypatch):
    """Have the checks believe in a GPU."""

    def pretend(driver=12080, torch_cuda="12.8"):
        monkeypatch.setattr(diagnosis, "_has_device", lambda: True)
        monkeypatch.setattr(diagnosis, "_driver", lambda: (1, driver))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

    return pretend


def lines_of(*checks):
    return str(Diagnosis(checks)).split("\n")


def test_what_works_here(healthy):
    by_name = {check.name: check for check in healthy.checks}
    assert list(by_name) == NAMES
    assert all(by_name[name].ok for name in ("Python", "kernels", "engines", "threads", "self-test")), healthy
    assert healthy.ok == all(check.ok is not False for check in healthy.checks)
    assert torch.__version__ in by_name["Python"].found
    assert str(torch.get_num_threads()) in by_name["threads"].found
    assert "auto: cpu" in by_name["engines"].found
    for op in ("lut_matmul", "lut_conv2d", "lut_dwconv2d", "cpu"):
        assert op in by_name["self-test"].found


def test_text_fits_a_terminal(healthy):
    lines = str(healthy).split("\n")
    assert len(lines) <= len(NAMES) + 1 + sum(bool(check.mend) for check in healthy.checks)
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("approxconv ")
    marks = {True: "✓", False: "✗", None: "–"}
    shown = [line for line in lines[1:] if not line.startswith("  →")]
    assert [line.split()[:2] for line in shown] == [[marks[check.ok], check.name] for check in healthy.checks]


def test_text_of_failures():
    assert lines_of(Check("C++", None, "no g++", "apt-get install g++"))[1:] == [
        "– C++       no g++  → apt-get install g++"
    ]
    head, line, mend = lines_of(Check("self-test", False, "x" * 500, "y" * 80))
    assert head.endswith("to mend: self-test")
    assert (len(line), line[-1]) == (WIDTH, "…")
    assert mend == f"  → {'y' * 80}"
    assert "to mend: a, b and c" in lines_of(*(Check(name, False, "") for name in "abc"))[0]


def test_all_failing_fits_too(gpu, only, monkeypatch):
    pytest.importorskip("cupy", reason="needs CuPy")
    gpu(driver=13000, torch_cuda="13.0")
    failing = {}
    monkeypatch.setattr(diagnosis, "_installed", lambda name: "1.0")
    for name, each in diagnosis._CHECKS.items():
        found = diagnosis._tried(name, each)
        failing[name] = lambda mend=found.mend: (False, "broken\n" * 99, mend)
    only(**failing)
    text = str(approxconv.doctor())
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert "pip uninstall -y cupy cupy-cuda11x cupy-cuda12x cupy-cuda13x && pip install 'approxconv[cuda13]'" in text


def test_shows_itself_once(healthy, capsys):
    assert repr(healthy) == str(healthy)
    written = []
    healthy._repr_pretty_(SimpleNamespace(text=written.append), False)
    assert written == [str(healthy)]
    html = Diagnosis((Check("a<b", False, "<&>", "mend 'it'"),))._repr_html_()
    assert "a&lt;b" in html
    assert "&lt;&amp;&gt;" in html
    assert "mend" in html
    assert capsys.readouterr().out == ""


def test_is_the_function_and_not_a_module():
    code = "import approxconv, sys; import approxconv.diagnosis; print(callable(approxconv.doctor))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


def test_command_line(only, capsys):
    only("Python", "threads", "kernels")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == f"{approxconv.doctor()}\n"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == approxconv.doctor().to_dict()
    assert Diagnosis(tuple(Check(**each) for each in found["checks"])) == approxconv.doctor()


def test_exit_code(only, capsys):
    only(broken=lambda: (False, "no", "mend --it"), absent=lambda: (None, "not needed"))
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "✗ broken    no  → mend --it" in captured.out
    assert captured.err == ""
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    only(absent=lambda: (None, "not needed"))
    assert main(["doctor"]) == 0


def test_marks_that_the_terminal_does_not_have():
    code = (
        "from approxconv import cli, diagnosis\n"
        "diagnosis._CHECKS = {'kept': lambda: (True, 'as is')}\n"
        "raise SystemExit(cli.main(['doctor']))"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "? kept" in done.stdout


def test_nothing_raises(only):
    def raise_import_error():
        try:
            raise OSError("\n====\nlibfirst.so: no such file\nmore")
        except OSError as error:
            raise ImportError("second") from error

    def raise_without_words():
        raise RuntimeError

    only(one=raise_import_error, other=raise_without_words)
    one, other = approxconv.doctor().checks
    assert one == Check("one", False, "OSError: libfirst.so: no such file")
    assert other == Check("other", False, "RuntimeError")


def test_another_default_device(only):
    only("self-test")
    torch.set_default_device("meta")
    try:
        diagnosed = approxconv.doctor()
    finally:
        torch.set_default_device(None)
    assert diagnosed.ok, diagnosed


def test_oldest_versions_are_those_of_the_package():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    dotted = lambda numbers: ".".join(map(str, numbers))  # noqa: E731
    assert config["options"]["python_requires"] == f">={dotted(diagnosis.OLDEST_PYTHON)}"
    assert f"torch>={dotted(diagnosis.OLDEST_TORCH)}" in config["options"]["install_requires"].split()


def test_old_torch(check, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    found = check("Python")
    assert found.ok is False
    assert "torch must be at least 2.6" in found.found
    assert found.mend == "pip install --upgrade 'torch>=2.6'"


def test_no_device(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnosis, "_driver", lambda: (0, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check("CUDA") == Check("CUDA", None, "no CUDA device (CUDA_VISIBLE_DEVICES='')")


@pytest.mark.parametrize(
    ("driver", "mend"), [(12040, "/whl/cu126"), (13000, "/whl/cu130"), (11040, "update NVIDIA's driver")]
)
def test_device_that_torch_cannot_use(check, monkeypatch, driver, mend):
    def init():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(diagnosis, "_driver", lambda: (2, driver))
    found = check("CUDA")
    assert found.ok is False
    assert found.found == "2 devices, but AssertionError: Torch not compiled with CUDA enabled"
    assert mend in found.mend


def test_device(check, gpu, monkeypatch):
    gpu(driver=12090, torch_cuda="12.8")
    properties = SimpleNamespace(name="NVIDIA RTX 6000 Ada Generation", major=8, minor=9, total_memory=48 * 2**30)
    for name, value in {"is_available": True, "init": None, "current_device": 0, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    found = check("CUDA")
    assert found.ok, found
    assert found.found == (
        "NVIDIA RTX 6000 Ada Generation (sm_89, 48 GiB, one of 2), torch for CUDA 12.8, driver for CUDA up to 12.9"
    )


def test_cupy_missing_without_a_device(check, without, monkeypatch):
    monkeypatch.setattr(diagnosis, "_has_device", lambda: False)
    without("cupy")
    assert (check("CuPy").ok, check("NVRTC").ok) == (None, None)


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_cupy_missing_with_a_device(check, without, gpu, cuda, extra):
    gpu(driver=13000, torch_cuda=cuda)
    without("cupy")
    for name in ("CuPy", "NVRTC"):
        found = check(name)
        assert found.ok is False
        assert found.mend == f"pip install 'approxconv[{extra}]'"


def test_cupy_broken(only, without):
    pytest.importorskip("cupy", reason="needs CuPy")
    without("cupy", ImportError("\n=====\nFailed to import CuPy.\nmore"))
    only("CuPy", "NVRTC", "engines")
    cupy, nvrtc, engines = approxconv.doctor().checks
    assert cupy.found == "installed, but ImportError: Failed to import CuPy."
    assert cupy.mend.startswith("pip install --force-reinstall cupy")
    assert (cupy.ok, nvrtc.ok, engines.ok) == (False, False, True)


def test_two_cupys(check, monkeypatch):
    pytest.importorskip("cupy", reason="needs CuPy")
    both = ("cupy-cuda12x", "cupy-cuda13x")
    monkeypatch.setattr(diagnosis, "_installed", lambda name: "14" if name in both else None)
    found = check("CuPy")
    assert found.ok is False
    assert found.mend.startswith("pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install")


def test_cupy_for_another_cuda(check, gpu):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    major = cupy.cuda.driver.get_build_version() // 1000
    gpu(driver=1000 * (major + 1), torch_cuda=f"{major + 1}.0")
    found = check("CuPy")
    assert found.ok
    assert f"torch is for CUDA {major + 1}.0" in found.found
    assert "pip uninstall -y cupy" in found.mend
    gpu(driver=1000 * (major - 1) + 80, torch_cuda=f"{major - 1}.8")
    found = check("CuPy")
    assert found.ok is False
    assert f"the driver supports CUDA up to {major - 1}.8" in found.found


def test_nvrtc_missing(check, monkeypatch):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")

    def missing():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    found = check("NVRTC")
    assert found.ok is False
    assert "libnvrtc.so.12" in found.found
    assert found.mend == f"pip install 'approxconv[{diagnosis._nvrtc_extra()}]'"


def test_nvrtc_that_does_not_know_the_device(check, gpu, monkeypatch):
    pytest.importorskip("cupy", reason="needs CuPy")
    gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (99, 9))
    found = check("NVRTC")
    assert found.ok is False
    assert "architecture" in found.found
    assert found.mend.startswith("pip install --upgrade nvidia-cuda-nvrtc")


def test_cache_in_use(check, monkeypatch, tmp_path):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "entry").mkdir(parents=True)
    (tmp_path / "cache" / "entry" / "manifest.json").write_bytes(b"{" * 1_500_000)
    found = check("cache")
    assert found.ok
    assert found.found == f"1.5 MB in 1 entries, writable: {tmp_path / 'cache'}"


def test_cache_that_cannot_be_written(check, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    if os.geteuid() != 0:
        folder = tmp_path / "cache"
        folder.mkdir(mode=0o555)
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(folder))
    found = check("cache")
    assert found.ok is False
    assert str(folder) in found.found
    assert "APPROXCONV_CACHE_DIR" in found.mend


def test_no_compiler(only, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    only("C++", "engines")
    compiler, engines = approxconv.doctor().checks
    assert compiler.ok is None
    assert "no 'g++'" in compiler.found
    assert compiler.mend.startswith("apt-get install g++")
    assert engines.ok
    assert "host_cuda" not in engines.found


def program(folder, text):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_wrong_compiler(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert check("C++").ok is False
    assert check("C++").mend == "unset CXX"
    monkeypatch.setenv("CXX", program(tmp_path, "exit 3"))
    assert check("C++").ok is False
    assert "status 3" in check("C++").found
    monkeypatch.setenv("CXX", program(tmp_path, "echo 'g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-4)'"))
    assert "C++20 needs g++ 11 or newer" in check("C++").found
    assert "g++-12" in check("C++").mend


def test_numba_broken(only, without, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("approxconv.engines.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    without("numba", ImportError("Numba needs NumPy 2.3 or less"))
    only("engines", "threads", "self-test")
    engines, threads, tested = approxconv.doctor().checks
    assert engines.ok is False
    assert "cpu: ImportError: Numba needs NumPy 2.3 or less" in engines.found
    assert engines.mend == "pip install --force-reinstall numba"
    assert threads.ok
    assert "Numba broken" in threads.found
    assert "cpu" not in tested.found.replace("host_cuda", "")


def test_auto_follows_use_engine(check):
    with approxconv.use_engine("reference"):
        assert "(auto: reference)" in check("engines").found


def test_threads(check, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(diagnosis, "_cores", lambda: 2)
    found = check("threads")
    assert found.ok
    assert found.found.startswith("torch 64 ")
    assert found.mend == "torch.set_num_threads(2)"


def test_pictures(check, monkeypatch):
    monkeypatch.setattr(diagnosis, "_installed", lambda name: "3.9" if name == "matplotlib" else None)
    assert check("pictures") == Check(
        "pictures", None, "adjustText not installed, matplotlib 3.9", "pip install 'approxconv[notebooks]'"
    )


def test_kernels_of_ones_own(check, monkeypatch, tmp_path):
    assert "packaged: " in check("kernels").found
    (tmp_path / "mine.cu").touch()
    with kernels.use_source(tmp_path):
        assert check("kernels").found == f"mine; by use_source: {tmp_path}"
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))
    assert check("kernels").found == f"mine; by $APPROXCONV_CUDA_SRC: {tmp_path}"
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path / "gone"))
    found = check("kernels")
    assert (found.ok, found.mend) == (False, "unset APPROXCONV_CUDA_SRC")
    assert "gone" in found.found


def test_kernels_that_cannot_be_read(check, tmp_path):
    (tmp_path / "lut_gemm.cu").write_text('#include "nowhere.cuh"\n')
    with kernels.use_source(tmp_path):
        found = check("kernels")
    assert (found.ok, found.mend) == (False, "approxconv.kernels.use_source(None)")
    assert "nowhere.cuh" in found.found


def test_self_test_names_what_is_wrong(check, monkeypatch):
    right = cpu.lut_conv2d

    def wrong(*arguments):
        y = right(*arguments)
        y[0, 1, 2, 0] += 1
        return y

    monkeypatch.setattr(cpu, "lut_conv2d", wrong)
    found = check("self-test")
    assert found.ok is False
    said = re.fullmatch(
        r"lut_conv2d on cpu: y\[0, 1, 2, 0\] = (-?\d+), expected (-?\d+), (\d+) of \d+ elements wrong", found.found
    )
    assert int(said[1]) == int(said[2]) + 1
    assert said[3] == "1"
    assert "use_engine('reference')" in found.mend


def test_self_test_names_an_exception(check, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("no such luck")

    for op in ("lut_matmul", "lut_dwconv2d"):
        monkeypatch.setattr(cpu, op, fail)
    found = check("self-test")
    assert found.found == "lut_matmul on cpu: ZeroDivisionError: no such luck (and 1 more)"


def test_self_test_sees_a_wrong_shape_or_dtype(check, monkeypatch):
    monkeypatch.setattr(cpu, "lut_matmul", lambda x, w, table: torch.zeros(1, dtype=torch.int64))
    assert "torch.int64 (1,), expected torch.int32 (1040, 19)" in check("self-test").found


def test_self_test_runs_kernels_of_ones_own(check, tmp_path):
    if "host_cuda" not in check("engines").found:
        pytest.skip("needs g++ to run CUDA sources on the CPU")
    (tmp_path / "lut_gemm.cu").write_text(f"{kernels.source('lut_gemm')}\n#error not yet\n")
    with kernels.use_source(tmp_path):
        tested, nvrtc = check("self-test"), check("NVRTC")
    assert tested.ok is False
    assert "lut_matmul on host_cuda: KernelCompileError: lut_gemm.cu:" in tested.found
    assert "not yet" in tested.found
    assert tested.mend == "approxconv.kernels.use_source(None)"
    if nvrtc.ok is not None:
        assert "not yet" in nvrtc.found
        assert nvrtc.mend == tested.mend


def test_compiler_that_compiles_nothing(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", program(tmp_path, '[ "$*" = --version ]'))
    assert check("C++").ok
    found = check("self-test")
    assert found.found.startswith("lut_matmul on host_cuda: KernelCompileError")
    assert found.found.endswith("(and 5 more)")
    assert found.mend.startswith("apt-get install g++")


@pytest.mark.parametrize("source", ["lut_gemm", "lut_conv2d", "lut_dwconv2d"])
def test_cases_are_hostile(source):
    cases = list(diagnosis._cases(source))
    assert {case.table for case in cases} == {"int16", "int32"}
    assert all(case.geometry[-1] != 0 for case in cases if case.geometry)
    for case in cases:
        *_, table = case.operands(torch.Generator().manual_seed(0))
        assert table[0, 0] != 0
        assert table.shape[0] != table.shape[1] or not torch.equal(table, table.T)
        assert diagnosis._wrong(source, "reference", CPU) is None
