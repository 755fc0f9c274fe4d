import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOKE = """
import torch, approxconv
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
                            torch.nn.Linear(4 * 25, 2))
x = torch.randn(2, 3, 5, 5)
approx = approxconv.calibrate(approxconv.approximate(model, "drum6_8u_8s"), [x])
y = approx(x)
with approxconv.use_engine("reference"):
    assert torch.equal(approx(x), y)
y.sum().backward()
assert all(p.grad is not None for p in approx.parameters())
print(approxconv.__file__)
"""
SOURCES = "from approxconv import kernels; print(kernels.source_dir(), *kernels.list())"
KERNELS = ["factored_conv2d", "factored_gemm", "lut_conv2d", "lut_dwconv2d", "lut_gemm"]


def run_python(code, *arguments, env=None, cwd=None, python=sys.executable):
    return subprocess.run(
        [python, *arguments, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False
    )


def test_import_is_light():
    code = (
        "import sys, approxconv\n"
        "heavy = {'cupy', 'numba', 'llvmlite', 'matplotlib', 'sklearn', 'rich'}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & heavy))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_cuda_without_cupy_names_the_extra():
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import torch\n"
        "from approxconv.engines import select\n"
        "select('auto', torch.device('cuda'))"
    )
    result = run_python(code)
    assert "ImportError" in result.stderr
    assert "approxconv[cuda12]" in result.stderr
    assert "approxconv[cuda13]" in result.stderr


@pytest.fixture
def open_folder():
    """Outside pytest's own, which it closes to other users whenever a session starts."""
    with tempfile.TemporaryDirectory(prefix="approxconv-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.slow
def test_everything_works_where_no_folder_is_writable(open_folder):
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to run as a user who may write nowhere")
    package = open_folder / "site"
    shutil.copytree(ROOT / "approxconv", package / "approxconv", ignore=shutil.ignore_patterns("__pycache__"))
    home = open_folder / "home"
    home.mkdir(mode=0o555)
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", SMOKE],
        capture_output=True, text=True, env=env, cwd="/", timeout=300, check=False,
    )  # fmt: skip
    if "Permission denied" in result.stderr and "site-packages" not in result.stderr and not result.stdout:
        pytest.skip("this interpreter cannot be run by another user")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(package)
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that it stays clean."""
    folder = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    built = subprocess.run(pip, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_runs_in_a_scratch_venv(wheel, tmp_path):
    scratch = tmp_path / "venv"
    venv.create(scratch, with_pip=True, symlinks=True)
    python = scratch / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    # The dependencies come from the environment of the tests, but not its approxconv: .pth files there are not read.
    (site,) = scratch.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    result = run_python(SMOKE, "-I", cwd=tmp_path, python=str(python))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(site)
    sources = run_python(SOURCES, "-I", cwd=tmp_path, python=str(python)).stdout.split()
    assert Path(sources[0]) == site / "approxconv" / "cuda_src"
    assert sources[1:] == KERNELS
    script = subprocess.run([scratch / "bin" / "approxconv", "--version"], capture_output=True, text=True, check=True)
    assert script.stdout.startswith("approxconv ")


def packaged_files():
    """What a distribution must hold: the package, and cuda_src inside it."""
    python = [path for pattern in ("*.py", "*.h", "*.cpp") for path in (ROOT / "approxconv").rglob(pattern)]
    kernels = [path for pattern in ("*.cu", "**/*.cuh") for path in (ROOT / "cuda_src").glob(pattern)]
    return [path.relative_to(ROOT).as_posix() for path in python], [
        path.relative_to(ROOT).as_posix() for path in kernels
    ]


def test_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("approxconv/", "approxconv-")) for name in names)
    python, kernels = packaged_files()
    expected = [*python, *(f"approxconv/{name}" for name in kernels)]
    assert sorted(expected) == sorted(name for name in names if name.startswith("approxconv/"))


def test_sdist_holds_the_kernels(source, tmp_path):
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    python, kernels = packaged_files()
    assert {*python, *kernels} <= names


def test_kernels_are_found_from_an_editable_install_and_a_bare_checkout(source, tmp_path):
    for environment in (None, {"PYTHONPATH": str(source), "PATH": os.environ["PATH"]}):
        result = run_python(SOURCES, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        folder, *names = result.stdout.split()
        assert Path(folder) == (ROOT if environment is None else source) / "cuda_src"
        assert names == KERNELS


def test_extras_are_pinned():
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    assert set(extras) == {"cuda12", "cuda13", "demo", "test", "notebooks"}
    wanted = config["options"]["install_requires"] + "\n".join(extras.values())
    names = {line.split(">")[0].split("=")[0].strip().lower() for line in wanted.splitlines() if line.strip()}
    pins = {
        line.split("==")[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    assert names <= pins


@pytest.mark.parametrize(
    "first",
    [
        "import approxconv.factorize",
        "from approxconv.factorize import Factorization",
        "import approxconv; approxconv.factorize; import approxconv.factorize",
    ],
)
def test_factorize_is_the_function_however_its_module_is_imported(first):
    code = (
        f"{first}\n"
        "import approxconv, pickle\n"
        "from approxconv.factorize import Factorization, factorize\n"
        "assert approxconv.factorize is factorize and approxconv.Factorization is Factorization\n"
        "factors = approxconv.factorize(approxconv.get_multiplier('exact_4u'))\n"
        "assert pickle.loads(pickle.dumps(factors)) == factors\n"
        "assert pickle.loads(pickle.dumps(approxconv.factorize)) is factorize"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
