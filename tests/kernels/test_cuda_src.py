"""Every kernel: compiled for every architecture, executed on the CPU against the oracle and under the sanitizers."""

import re
import shutil

import pytest
import torch

from approxconv.engines import host_cuda, reference
from approxconv.kernels import (
    KernelCompileError,
    KernelEngine,
    Target,
    compile_kernel,
    copy_sources,
    planning,
    read,
    use_source,
    verify,
)
from approxconv.kernels.compile import arch_limits
from approxconv.kernels.factored import host_engine
from approxconv.kernels.host import SanitizerError, run_on_host
from approxconv.kernels.planning import Problem, depthwise_steps
from approxconv.kernels.verify import Case, FactoredCase

SOURCES = ("lut_gemm", "lut_conv2d", "lut_dwconv2d", "factored_gemm", "factored_conv2d")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing comes from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def shared_bytes(source, kernel, constants):
    """Dynamic shared memory that a kernel is launched with."""
    if match := re.fullmatch(rf"{source}_tile(\d+)x\d+_slots(\d+)", kernel):
        stage = int(match[1]) // constants["FRAGMENT_LANES"] * int(match[2]) * 16 * constants["SLOT_VECTORS"]
        return constants["TABLE_BYTES"] + 2 * stage
    return constants["SHARED_BYTES"] if "_rows" in kernel else 0


# The oldest, the one with most and the newest; factored_conv2d is factored_gemm by another name. The others are slow.
SHORT = {"factored_conv2d": ("sm_90",)}
COMPILATIONS = [
    pytest.param(
        source, arch, marks=[] if arch in SHORT.get(source, ("sm_75", "sm_90", "sm_120")) else pytest.mark.slow
    )
    for source in SOURCES
    for arch in ARCHITECTURES
]


@pytest.mark.parametrize(("source", "arch"), COMPILATIONS)
def test_compiles_without_spills_within_the_architectures_limits(source, arch):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile")
    compiled = compile_kernel(source, arch)
    assert set(compiled.kernels) == set(read(source).kernels)
    assert "warning" not in compiled.log
    for name, resources in compiled.kernels.items():
        assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), name
        assert resources.registers * resources.max_threads <= 65536, name
        dynamic = shared_bytes(source, name, read(source).constants)
        assert resources.shared_bytes + dynamic <= arch_limits(arch).shared_block_bytes, name


@needs_compiler
@pytest.mark.parametrize("source", SOURCES)
def test_equals_the_oracle_on_the_host(source):
    report = verify(source, engine="host_cuda", seed=5)
    assert report.ok, str(report)
    assert report.passed > 20


WATCHED = (
    Case("lut_gemm", (70, 11), (9, 11), "uint16", variant=(2, 32, 2)),
    Case("lut_gemm", (40, 11), (9, 11), "int32", variant=(10, 32, 1), layout="sliced"),
    Case("lut_gemm", (33, 11), (9, 11), "int16"),
    Case(
        "lut_conv2d", (2, 9, 5, 6), (12, 3, 3, 2), "int16", geometry=((1, 2), (1, 2), (2, 1), 3, 9), variant=(5, 32, 1)
    ),
    Case("lut_conv2d", (1, 3, 5, 6), (9, 3, 3, 2), "int32", geometry=((2, 1), (0, 1), (1, 1), 1, 9)),
    Case("lut_dwconv2d", (2, 2, 9, 7), (4, 1, 3, 3), "int16", geometry=((1, 1), (1, 1), (1, 1), 2, 9)),
    Case("lut_dwconv2d", (1, 2, 9, 7), (2, 1, 5, 3), "int32", geometry=((2, 1), (2, 0), (1, 2), 2, 9), layout="sliced"),
    Case("lut_dwconv2d", (1, 1, 12, 7), (1, 1, 2, 2), "int16", geometry=((3, 1), (0, 0), (2, 1), 1, 9)),
    FactoredCase("factored_gemm", (35, 70), (33, 70), products=9, has_by_row=True, variant=(32, 32, 8, 1, 2)),
    FactoredCase("factored_gemm", (9, 33), (3, 33), products=3, layout="sliced", variant=(64, 56, 4, 1, 1)),
    FactoredCase(
        "factored_conv2d", (2, 9, 5, 6), (12, 3, 3, 2), geometry=((1, 2), (1, 2), (2, 1), 3, 9), products=5,
        has_by_row=True, variant=(64, 64, 8, 2, 1),
    ),
)  # fmt: skip


def run_watched(case, sanitize, kernel=None):
    operands = case.operands(torch.Generator().manual_seed(8))
    engine = host_engine() if isinstance(case, FactoredCase) else host_cuda.engine
    got = case.run(engine.with_kernel(kernel, case.variant).sanitized(sanitize), *operands)
    assert torch.equal(got, case.expected(*operands)), str(case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", WATCHED, ids=str)
def test_is_clean_under_address_and_undefined_behaviour_sanitizers(case):
    run_watched(case, "address")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", WATCHED[:1] + WATCHED[2:4] + WATCHED[5:6] + WATCHED[8:9], ids=str)
def test_is_clean_under_the_thread_sanitizer(case):
    run_watched(case, "thread")


def edited(folder, file, old, new, count=1):
    path = folder / file
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, count))


END_OF_STAGE = """codes[i] = *reinterpret_cast<const uint2*>(x + (x_at + row_at[i]));
        }
        __syncthreads();
"""


def test_depthwise_tables_fit_the_shared_memory_of_every_architecture():
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile")
    for arch in ARCHITECTURES:
        limits = arch_limits(arch)
        target = Target(40, limits.shared_block_bytes)
        static = compile_kernel("lut_dwconv2d", arch).kernels["lut_dwconv2d_int16"].shared_bytes
        for kernel in (1, 3, 5, 7, 11, 21, 31):
            problem = Problem(
                x_shape=(4, 8, 1, 60, 60), x_strides=(28800, 3600, 3600, 60, 1),
                w_shape=(8, 1, 1, kernel, kernel), w_strides=(kernel**2, kernel**2, kernel**2, kernel, 1),
                out_size=(60, 60), out_strides=(28800, 3600, 3600, 1), step=(1, 1), pad=(kernel // 2,) * 2,
                dil=(1, 1), pad_code=0, offset=0, entry="int16",
            )  # fmt: skip
            (step,) = depthwise_steps(problem, "lut_dwconv2d", read("lut_dwconv2d").fingerprint, target).steps
            assert static + step.shared <= limits.shared_block_bytes, (arch, kernel)


@needs_compiler
@pytest.mark.parametrize(
    ("case", "fewest"),
    [
        (Case("lut_gemm", (2, 90, 20), (19, 20), variant=(10, 32, 1)), 6),
        (
            Case("lut_conv2d", (3, 6, 9, 7), (8, 3, 3, 3), geometry=((1, 2), (1, 2), (1, 1), 2, 9), variant=(5, 32, 1)),
            6,
        ),
        (
            Case(
                "lut_conv2d", (1, 2, 40, 3), (9, 2, 3, 2), geometry=((3, 1), (4, 0), (2, 1), 1, 9), variant=(2, 32, 1)
            ),
            4,
        ),
    ],
    ids=["product", "convolution", "tall"],
)
def test_problems_cut_to_the_scratch_are_right(case, fewest, monkeypatch):
    plans = []
    monkeypatch.setattr(planning, "X_SCRATCH", 600)
    monkeypatch.setattr(planning, "W_SCRATCH", 700)
    planning.product_sum_steps.cache_clear()
    engine = KernelEngine(
        "cpu",
        lambda device: host_cuda.TARGET,
        lambda some, device: plans.extend(some) or run_on_host(some),
        lambda: None,
    )
    operands = case.operands(torch.Generator().manual_seed(8))
    try:
        got = case.run(engine.with_kernel(None, case.variant), *operands)
    finally:
        planning.product_sum_steps.cache_clear()
    assert torch.equal(got, case.run(reference, *operands))
    assert len(plans) >= fewest


@needs_compiler
@pytest.mark.slow
def test_a_planted_overrun_is_caught(tmp_path):
    folder = copy_sources(tmp_path)
    edited(
        folder,
        "row_tables.cuh",
        "min(first_row + i * int(blockDim.x), g.pixels() - 1)",
        "first_row + i * int(blockDim.x)",
    )
    with use_source(folder), pytest.raises(SanitizerError, match=r"heap-buffer-overflow.*row_tables"):
        run_watched(Case("lut_gemm", (63, 11), (8, 11), variant=(2, 32, 1)), "address")


@needs_compiler
@pytest.mark.slow
def test_a_removed_barrier_is_caught(tmp_path):
    folder = copy_sources(tmp_path)
    edited(folder, "row_tables.cuh", END_OF_STAGE, END_OF_STAGE.replace("        __syncthreads();\n", ""))
    with use_source(folder), pytest.raises(SanitizerError, match="data race"):
        run_watched(Case("lut_gemm", (40, 40), (9, 40), variant=(2, 32, 1)), "thread")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "    read(low, x_at), read(high, x_at + OCTET / 2);\n",
        "        wait_for_copies();\n",
        "u, terms, begin, end, g, packed);\n\n",
    ],
    ids=["passes", "stages", "end"],
)
def test_a_removed_barrier_of_the_factored_kernels_is_caught(tmp_path, before):
    folder = copy_sources(tmp_path)
    barrier = re.search(re.escape(before) + r" *__syncthreads\(\);.*\n", (folder / "factored.cuh").read_text())
    edited(folder, "factored.cuh", barrier[0], before)
    # The second warp's places in the output lie where the first one reads of the code that most pixels have.
    case = FactoredCase(
        "factored_conv2d", (1, 3, 4, 4), (9, 3, 3, 3), geometry=((1, 1), (2, 2), (1, 1), 1, 2), products=5,
        variant=(32, 32, 4, 2, 1),
    )  # fmt: skip
    # What another warp overwrote may be an address, which is read before the report is out.
    with use_source(folder), pytest.raises(SanitizerError, match=r"ThreadSanitizer: (data race|SEGV)"):
        run_watched(case, "thread")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("source", "file", "old", "new"),
    [
        ("lut_conv2d", "gather.cuh", "table + w_at[n][tap] * CODES + a", "table + a * CODES + w_at[n][tap]"),
        ("lut_gemm", "row_tables.cuh", "        if (real) products(", "        products("),
        ("lut_dwconv2d", "lut_dwconv2d.cu", "code(g.pad_code)", "code(0)"),
        *(
            pytest.param("factored_conv2d", "factored.cuh", *edit, marks=pytest.mark.slow)
            for edit in (
                ("channel >= walk.channels_left()) return 0", "channel >= walk.channels_left()) return 1"),
                ("inside ? x[c * g.x_channel] : g.pad_code", "inside ? x[c * g.x_channel] : 0"),
                ("min(octet, packed.stages - 1)", "min(begin, packed.stages - 1)"),
                ("        wait_for_copies();", "        // wait_for_copies();"),
            )
        ),
    ],
    ids=[
        "swapped table index", "unmasked tail", "padding with zero", "unmasked channels", "sums of zero padding",
        "octets of another quarter", "copies not waited for",
    ],
)  # fmt: skip
def test_verify_tells_a_wrong_edit_from_a_right_one(tmp_path, source, file, old, new):
    folder = copy_sources(tmp_path)
    with use_source(folder):
        edited(folder, file, old, new)
        report = verify(source, engine="host_cuda")
        assert not report
        assert re.search(r"first y\[[\d, ]+\] = -?\d+, expected -?\d+", str(report))
        edited(folder, file, new, f"{old} ")
        assert verify(source, engine="host_cuda")


def test_a_typo_is_shown_with_its_line(tmp_path):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC to compile")
    folder = copy_sources(tmp_path)
    edited(folder, "lut_gemm.cu", "    gather(x, w, table, out, g);", "    gather(x, w, table, out, g;")
    line = next(
        n for n, text in enumerate((folder / "lut_gemm.cu").read_text().splitlines(), 1) if text.endswith("out, g;")
    )
    with use_source(folder), pytest.raises(KernelCompileError) as failure:
        compile_kernel("lut_gemm", "sm_90")
    assert str(failure.value).startswith(f"lut_gemm.cu:{line}: error")
    assert f"> {line} |" in str(failure.value)
