"""The sanitizers see what they are there for: each planted fault is caught, and its correct twin passes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from approxconv.kernels import host
from approxconv.kernels.host import KernelTrapError, SanitizerError, run_on_host, watched
from approxconv.kernels.plan import Plan
from approxconv.kernels.sources import use_source

try:
    host.compiler()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

FAULTS = {  # kernel of faults.cu: sanitizer, what it reports
    "reads_behind_a_tensor": ("address", "AddressSanitizer: heap-buffer-overflow"),
    "reads_before_a_tensor": ("address", "AddressSanitizer: heap-buffer-overflow"),
    "writes_behind_a_tensor": ("address", "AddressSanitizer: heap-buffer-overflow"),
    "indexes_behind_static_shared": ("address", "runtime error: index 32 out of bounds"),
    "points_behind_static_shared": ("address", "AddressSanitizer: global-buffer-overflow"),
    "reads_behind_dynamic_shared": ("address", "AddressSanitizer: heap-buffer-overflow"),
    "writes_behind_dynamic_shared": ("address", "AddressSanitizer: heap-buffer-overflow"),
    "reads_shared_that_nobody_wrote": ("address", "AddressSanitizer: SEGV"),
    "reads_a_misaligned_vector": ("address", "runtime error: reference binding to misaligned address"),
    "writes_a_misaligned_vector": ("address", "runtime error: store to misaligned address"),
    "shifts_too_far": ("address", "runtime error: shift exponent 32 is too large"),
    "misses_a_syncthreads": ("thread", "ThreadSanitizer: data race"),
    "misses_a_syncthreads_before_reuse": ("thread", "ThreadSanitizer: data race"),
    "misses_a_syncwarp": ("thread", "ThreadSanitizer: data race"),
    "misses_a_syncthreads_between_warps": ("thread", "ThreadSanitizer: data race"),
    "sums_without_atomics": ("thread", "ThreadSanitizer: data race"),
    "writes_where_others_write": ("thread", "ThreadSanitizer: data race"),
}
RIGHT = Path(__file__).with_name("faults.cu").read_text()
WRONG = re.sub(r"\S.*// wrong: ?", "", RIGHT)
every_sanitizer = pytest.mark.parametrize("sanitizer", ["address", "thread"])


@pytest.fixture(scope="module", autouse=True)
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "right.cu").write_text(RIGHT)
    (folder / "wrong.cu").write_text(WRONG)
    with pytest.MonkeyPatch.context() as patch, use_source(folder):
        patch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield folder


def run(sanitizer, kernel, *arguments, block=1, grid=1, shared=0, source="right"):
    run_on_host([Plan(source, kernel, (grid, 1, 1), (block, 1, 1), shared, arguments)], sanitize=sanitizer)


def reverse(sanitizer, kernel, source):
    x, y = torch.arange(1, 33, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    block = 64 if kernel.endswith("between_warps") else 32
    run(sanitizer, kernel, x, y, block=block, shared=128, source=source)
    return y.tolist()


def test_every_fault_is_listed():
    heads = [text.rpartition("void ")[2].partition("(")[0] for text in RIGHT.split("// wrong:")[:-1]]
    assert heads == list(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_correct_kernel_passes(kernel):
    assert reverse(FAULTS[kernel][0], kernel, "right") == list(range(32, 0, -1))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_caught(kernel):
    sanitizer, finding = FAULTS[kernel]
    with pytest.raises(SanitizerError, match=rf"^wrong\.cu:\d+: {finding}.*, in {kernel}\n") as caught:
        reverse(sanitizer, kernel, "wrong")
    before, _, rest = RIGHT.partition(f"{kernel}(")
    first, lines = before.count("\n") + 1, rest.partition("\n}")[0].count("\n") + 1
    assert first < int(str(caught.value).split(":")[1]) < first + lines


@every_sanitizer
def test_blocks_run_one_after_the_other(sanitizer):
    x = torch.arange(20, dtype=torch.int32)
    run(sanitizer, "add", x, np.int32(20), np.int32(5), block=8, grid=3)
    assert torch.equal(x, torch.arange(5, 25, dtype=torch.int32))


def test_plans_run_in_order():
    x = torch.zeros(4, dtype=torch.int32)
    plans = [Plan("right", "add", (1, 1, 1), (4, 1, 1), 0, (x, np.int32(n), np.int32(2**n))) for n in range(5)]
    run_on_host(plans, sanitize="address")
    assert x.tolist() == [30, 28, 24, 16]


def test_only_what_a_view_spans_may_be_touched():
    storage = torch.arange(64, dtype=torch.int32)
    run("address", "add", storage[8:16], np.int32(8), np.int32(100), block=16)
    assert storage.tolist() == [*range(8), *range(108, 116), *range(16, 64)]
    with pytest.raises(SanitizerError, match="heap-buffer-overflow"):
        run("address", "add", storage[8:16], np.int32(9), np.int32(100), block=16)
    strided = storage.view(8, 8)[1:3, ::3]  # spans 8 … 22, with gaps that belong to it
    run("address", "add", strided, np.int32(15), np.int32(0), block=16)
    with pytest.raises(SanitizerError, match="heap-buffer-overflow"):
        run("address", "add", strided, np.int32(16), np.int32(0), block=16)


@every_sanitizer
def test_tensors_that_overlap_stay_so(sanitizer):
    storage = torch.arange(10, dtype=torch.int32)
    run(sanitizer, "move_by_one", storage[1:9], storage[0:8], block=8)
    assert storage.tolist() == [*range(1, 9), 8, 9]


def test_pointers_are_as_aligned_as_they_were():
    bytes_ = torch.arange(80, dtype=torch.uint8)
    y = torch.zeros(1, dtype=torch.int32)
    run("address", "load_vector", bytes_[16:32], y)
    assert y.item() == int.from_bytes(bytes(range(28, 32)), "little")
    with pytest.raises(SanitizerError, match=r"member access within misaligned address .* requires 16 byte"):
        run("address", "load_vector", bytes_[24:40], y)


def test_an_empty_tensor_holds_nothing():
    empty = torch.zeros(0, dtype=torch.int32)
    run("address", "add", empty, np.int32(0), np.int32(1), block=4)
    with pytest.raises(SanitizerError, match="AddressSanitizer"):
        run("address", "add", empty, np.int32(1), np.int32(1), block=4)


def test_read_only_memory_can_be_read(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(8, dtype=np.int32))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.from_numpy(x)
    y = torch.zeros(8, dtype=torch.int32)
    run("address", "move_by_one", tensor, y, block=8)
    assert y.tolist() == list(range(8))


@every_sanitizer
def test_traps_and_wrong_arguments_are_told_as_without_a_sanitizer(sanitizer):
    x = torch.tensor([3, -1, 2], dtype=torch.int32)
    with pytest.raises(KernelTrapError, match=r"^trap: block \(0, 0, 0\), thread \(1, 0, 0\): __trap\(\)$"):
        run(sanitizer, "trap", x, block=3)
    with pytest.raises(TypeError, match=r"^add: n is int \(4 bytes\), the plan has int64 \(8 bytes\)$"):
        run(sanitizer, "add", x, np.int64(3), np.int32(1))


def test_512_threads():
    x = torch.zeros(1000, dtype=torch.int32)
    run("address", "add", x, np.int32(1000), np.int32(1), block=512, grid=2)
    assert x.sum() == 1000


def test_a_sanitizer_that_does_not_start_is_no_fault_of_the_kernel(monkeypatch):
    said = "FATAL: ThreadSanitizer: unexpected memory mapping 0x1-0x2"
    monkeypatch.setattr(watched, "_fixed_addresses", lambda: ("sh", "-c", f"echo '{said}' >&2; exit 66"))
    with pytest.raises(RuntimeError, match=f"does not run on this machine: {said}"):
        run("thread", "add", torch.zeros(1), np.int32(1), np.int32(1))
