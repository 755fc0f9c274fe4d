"""Plans: geometry, choice of kernels, bounds of scratch, all without running anything."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from approxconv.kernels import Target, copy_sources, read, use_source
from approxconv.kernels.factored import PACK_BLOCKS, SCRATCH, factored_steps
from approxconv.kernels.planning import (
    GEOMETRY,
    PARTIAL_SCRATCH,
    TILING,
    W_SCRATCH,
    X_SCRATCH,
    Problem,
    Ref,
    bind,
    depthwise_steps,
    product_sum_steps,
)

H100 = Target(132, 227 * 2**10)
SMALL = Target(20, 64 * 2**10)  # a sm_75


def conv(
    batch=64, channels=64, size=56, filters=64, kernel=3, stride=1, padding=1, groups=1, entry="int16", dilation=1
):
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    depth, lanes, plane = channels // groups, filters // groups, size * size
    return Problem(
        x_shape=(batch, groups, depth, size, size),
        x_strides=(channels * plane, depth * plane, plane, size, 1),
        w_shape=(groups, lanes, depth, kernel, kernel),
        w_strides=(lanes * depth * kernel**2, depth * kernel**2, kernel**2, kernel, 1),
        out_size=(out, out),
        out_strides=(filters * out * out, lanes * out * out, out * out, 1),
        step=(stride, stride), pad=(padding, padding), dil=(dilation, dilation), pad_code=0, offset=0, entry=entry,
    )  # fmt: skip


def gemm(rows, lanes, depth, groups=1, entry="int16"):
    return Problem(
        x_shape=(1, groups, depth, rows, 1), x_strides=(0, rows * depth, 1, depth, 0),
        w_shape=(groups, lanes, depth, 1, 1), w_strides=(lanes * depth, depth, 1, 0, 0),
        out_size=(rows, 1), out_strides=(0, rows * lanes, 1, lanes),
        step=(1, 1), pad=(0, 0), dil=(1, 1), pad_code=0, offset=0, entry=entry,
    )  # fmt: skip


def steps_of(problem, op="lut_conv2d", target=H100, variant=None, source=None):
    source = source or op
    return product_sum_steps(problem, source, read(source).fingerprint, op, target, variant)


@pytest.mark.parametrize(
    ("dtype", "struct", "source"),
    [
        (GEOMETRY, "Geometry", "lut_dwconv2d"),
        (TILING, "Tiling", "lut_dwconv2d"),
        (PACK_BLOCKS, "PackBlocks", "factored_gemm"),
    ],
)
def test_structures_are_those_of_the_sources(dtype, struct, source):
    text = "".join(path.read_text() for path in read(source).files)
    body = re.search(rf"struct {struct} {{(.*?)\n\s*\n|struct {struct} {{(.*?)}};", text, re.DOTALL)
    fields = re.findall(r"^\s+(int64|int) ([\w, ]+);", body[1] or body[2], re.MULTILINE)
    declared = [(name, kind) for kind, names in fields for name in names.split(", ")]
    kinds = {"int64": np.int64, "int": np.int32}
    assert declared
    assert [(name, kinds[kind]) for name, kind in declared] == [(name, dtype[name]) for name in dtype.names]


@pytest.mark.parametrize(
    "problem", [conv(), conv(channels=512, filters=512, size=7), conv(channels=256, filters=256, size=14)]
)
def test_large_layers_go_through_row_tables_and_fill_the_device(problem):
    pack, run, *_ = steps_of(problem).steps
    assert pack.kernel == "lut_conv2d_pack_int16"
    assert run.kernel.startswith("lut_conv2d_rows")
    assert run.grid[0] * run.grid[1] >= 0.8 * H100.multiprocessors
    rows = int(run.kernel.split("_")[2].removeprefix("rows"))
    tiles = run.grid[0] // -(-problem.lanes // 8)
    assert problem.pixels <= tiles * rows * run.block[0] < problem.pixels + tiles * rows * 64


@pytest.mark.parametrize("problem", [conv(batch=1, size=4, channels=8, filters=8), conv(channels=64, groups=64)])
def test_what_cannot_pay_for_tables_is_gathered(problem):
    (step,) = steps_of(problem).steps
    assert step.kernel == "lut_conv2d_gather_int16"


def test_a_long_product_on_few_blocks_is_split():
    steps = steps_of(conv(batch=16, channels=512, filters=512, size=7))
    _, run, reduce = steps.steps
    assert run.grid[1] == reduce.arguments[-1] > 1
    scratch = dict(steps.scratch)
    assert scratch["partial"] == 4 * run.grid[1] * 16 * 512 * 49 <= PARTIAL_SCRATCH
    assert run.arguments[3] == Ref("partial")
    assert reduce.arguments[:2] == (Ref("partial"), Ref("out"))


def factored(problem, terms, has_by_row=False, op="factored_conv2d", target=H100, variant=None):
    return factored_steps(problem, op, read(op).fingerprint, op, target, terms, has_by_row, variant)


def cover(steps, problem):
    """How often each output element is written, by the geometry of every run."""
    counts = np.zeros(problem.images * problem.out_strides[0] or problem.groups * problem.out_strides[1], np.int32)
    for step in steps.steps:
        if "_pack" in step.kernel or step.kernel.endswith("_reduce"):
            continue
        at = next(at for at, argument in enumerate(step.arguments) if isinstance(argument, np.ndarray))
        g, out = step.arguments[at][0], step.arguments[at - 1]
        index = np.array(out.offset)
        for size, stride in (
            (g["images"], g["out_image"]), (g["groups"], g["out_group"]), (g["lanes"], g["out_lane"]),
            (g["out_h"] * g["out_w"], g["out_pixel"]),
        ):  # fmt: skip
            index = index[..., None] + np.arange(size) * stride
        np.add.at(counts, index.ravel(), 1)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        conv(batch=256, channels=64, size=56),
        conv(batch=2, channels=8, filters=8, size=1500),
        conv(batch=1, channels=3, filters=9, size=2600, padding=0, stride=2),
        conv(batch=1, channels=16, filters=8, size=9, dilation=1, kernel=3, groups=2),
    ],
)
def test_scratch_is_bounded_and_every_output_is_written_once(problem):
    steps = steps_of(problem, variant=(10, 384, 1))
    scratch = dict(steps.scratch)
    assert scratch["x_packed"] <= X_SCRATCH
    assert scratch["w_packed"] <= W_SCRATCH
    assert (cover(steps, problem) == 1).all()


def test_weights_beyond_the_scratch_are_packed_in_parts():
    problem = gemm(2048, 2000, 30_000)
    steps = steps_of(problem, "lut_gemm", variant=(10, 384, 1))
    assert len(steps.steps) > 2
    assert dict(steps.scratch)["w_packed"] <= W_SCRATCH
    assert (cover(steps, problem) == 1).all()


def test_total_scratch_is_below_64_mib():
    assert X_SCRATCH + W_SCRATCH + PARTIAL_SCRATCH < 64 * 2**20


@pytest.mark.parametrize(
    ("problem", "terms"),
    [
        (conv(batch=64, channels=256, filters=8, size=56), 5),
        (conv(channels=2048, filters=2048, size=7), 64),
        (conv(batch=2, channels=16, filters=8, size=9, groups=2), 4),
        (conv(batch=8, channels=64, size=56), 0),
        (gemm(500, 700, 20_000, groups=3), 17),
    ],
)
def test_factored_scratch_is_bounded_and_every_output_is_written_once(problem, terms):
    steps = factored(problem, terms, has_by_row=True, op="factored_gemm" if problem.taps == 1 else "factored_conv2d")
    assert sum(dict(steps.scratch).values()) <= SCRATCH < 64 * 2**20
    assert (cover(steps, problem) == 1).all()


def test_parts_of_one_size_are_weighed_once(monkeypatch):
    weighed = []

    def best(kernels, part, target):
        weighed.append(part)
        return 1.0, (64, 64, 8, 8, 1)

    monkeypatch.setattr("approxconv.kernels.factored._Kernels.best", best)
    steps = factored(gemm(8192, 32_000, 4096), 64, op="factored_gemm")
    assert len(steps.steps) > 100
    assert len(weighed) < 10


def test_a_weight_too_long_for_the_scratch_is_packed_alone():
    steps = factored(gemm(8, 3, 2_000_000), 64, op="factored_gemm")
    assert [step.kernel for step in steps.steps[::2]] == ["factored_gemm_pack"] * 3


@pytest.mark.parametrize(("terms", "slots"), [(1, 4), (4, 4), (5, 8), (8, 8), (16, 8)])
def test_passes_have_the_slots_that_suit(terms, slots):
    pack, run = factored(conv(batch=128), terms).steps
    assert run.kernel == f"factored_conv2d_tile64x{64 if slots == 8 else 56}_slots{slots}"
    assert pack.arguments[-1] == slots
    assert run.block == (256, 1, 1)


def test_a_long_factored_product_on_few_blocks_is_split_and_its_output_cleared():
    few = conv(batch=4, channels=512, filters=512, size=7)
    pack, run = factored(few, 5).steps
    assert run.grid[1] > 1
    assert run.grid[0] * run.grid[1] >= H100.multiprocessors // 2
    assert pack.arguments[-3]["zeros"] * 256 >= few.pixels * few.lanes
    for unsplit in (factored(conv(batch=128), 5), factored(few, 0)):
        assert unsplit.steps[1].grid[1] == 1
        assert unsplit.steps[0].arguments[-3]["zeros"] == 0


def test_sums_of_rows_are_packed_only_where_there_are_any():
    with_rows, without = (factored(conv(), 5, has).steps[0].arguments[-3] for has in (True, False))
    assert without["pixels"] == 0 < with_rows["pixels"]
    assert without["octets"] == with_rows["octets"] > 0
    nothing = factored(conv(), 0).steps[0].arguments[-3]
    assert nothing["octets"] == nothing["fragments"] == nothing["pixels"] == 0 < nothing["lanes"]


def test_factored_kernels_fit_a_small_device():
    (_, run) = factored(conv(batch=1, channels=16, filters=16, size=8), 8, target=SMALL).steps
    assert run.shared <= SMALL.shared_bytes


@pytest.mark.parametrize("variant", [(64, 64, 4, 1, 1), (32, 32, 8, 9, 1), (32, 32, 8, 1, 0)])
def test_factored_variants_that_there_are_not_are_refused(variant):
    with pytest.raises(ValueError, match=r"variant must be \(lanes, pixels, slots, warps, splits\).*got"):
        factored(conv(batch=1, size=4), 5, variant=variant)


def test_depthwise_uses_the_shared_memory_there_is():
    for target, copies in ((H100, 8), (SMALL, 4)):
        problem = conv(channels=32, filters=32, groups=32, kernel=3 if target is H100 else 5, padding=2, size=30)
        (step,) = depthwise_steps(problem, "lut_dwconv2d", read("lut_dwconv2d").fingerprint, target).steps
        assert step.kernel == "lut_dwconv2d_int16"
        assert step.shared <= target.shared_bytes
        tiling = step.arguments[-1][0]
        assert tiling["copies"] <= copies
        assert step.grid[0] == 32 * tiling["parts"]
        assert tiling["rows"] * tiling["row_tiles"] >= problem.out_size[0]
        assert tiling["cols"] * tiling["col_tiles"] >= problem.out_size[1]
        assert tiling["images"] * tiling["image_tiles"] >= problem.images


def test_a_kernel_too_large_for_shared_memory_is_gathered():
    problem = conv(batch=1, channels=2, filters=2, groups=2, size=80, kernel=61, padding=30)
    (step,) = depthwise_steps(problem, "lut_dwconv2d", read("lut_dwconv2d").fingerprint, SMALL).steps
    assert step.kernel == "lut_dwconv2d_gather_int16"


def test_tile_sizes_are_those_of_the_source(tmp_path):
    folder = copy_sources(tmp_path)
    header = folder / "row_tables.cuh"
    header.write_text(header.read_text().replace("THREADS = 384;", "THREADS = 256;"))
    with use_source(folder):
        _, run = steps_of(conv()).steps
        assert run.block[0] <= 256
    assert steps_of(conv()).steps[1].block[0] > 256


def test_a_source_without_a_fitting_kernel_is_named(tmp_path):
    (tmp_path / "mine.cu").write_text('extern "C" __global__ void lut_gemm_other(int a) {}\n')
    with use_source(tmp_path), pytest.raises(ValueError, match=r"'mine'.*int16"):
        steps_of(gemm(8, 8, 8), "lut_gemm", source="mine")


def test_bound_plans_point_into_the_tensors():
    problem = replace(conv(batch=64, channels=64, size=112), pad_code=5)
    steps = steps_of(problem, variant=(10, 384, 1))
    tensors = {
        "x": torch.zeros(64, 64, 112, 112, dtype=torch.uint8),
        "w": torch.zeros(64, 64, 3, 3, dtype=torch.uint8),
        "table": torch.zeros(256, 256, dtype=torch.int16),
        "out": torch.zeros(64, 64, 112, 112, dtype=torch.int32),
    }
    plans = bind(steps, "lut_conv2d", "", tensors)
    packs = [plan for plan in plans if "_pack_" in plan.kernel]
    assert len(packs) > 1
    offsets = [plan.arguments[0].data_ptr() - tensors["x"].data_ptr() for plan in packs]
    images = [int(plan.arguments[4][0]["images"]) for plan in packs]
    assert offsets == [64 * 112 * 112 * before for before in np.cumsum([0, *images[:-1]])]
    assert sum(images) == 64
