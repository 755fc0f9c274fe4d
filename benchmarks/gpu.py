"""Layers of ResNet-18, ResNet-50 and MobileNetV2 on a GPU: LUT operators, factored, cuDNN, a gather as peers do it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from approxconv.engines.byte_form import ByteForm
from approxconv.kernels import Plan, launch, read, use_source
from approxconv.kernels.factored import cuda_engine
from approxconv.kernels.verify import device_seconds

from .cpu import geometric_mean

BATCH = 64
SOURCES = Path(__file__).parent
_FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU
_COPY_BYTES = 2**30
ERROR_RANKS = (1, 4, 16)  # of factored tables: a product more


@dataclass(frozen=True)
class Layer:
    """One convolution, padding kernel // 2, at batch 64."""

    network: str
    channels: int
    filters: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """One group a channel."""
        return self.groups > 1

    @property
    def name(self) -> str:
        """As in tables."""
        kind = " depthwise" if self.depthwise else ""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}×{self.kernel}"
        return f"{self.network}{kind} {self.channels}→{self.filters}, {kernel} at {self.size}×{self.size}{stride}"

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Products that are added."""
        return BATCH * self.out_size**2 * self.filters * self.channels // self.groups * self.kernel**2

    @property
    def bytes(self) -> int:
        """Codes in, int32 sums out."""
        return BATCH * (self.channels * self.size**2 + 4 * self.filters * self.out_size**2)


LAYERS = (
    Layer("ResNet-18", 3, 64, 7, 224, 2),
    *(Layer("ResNet-18", c, c, 3, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(
        Layer("ResNet-50", c, f, 1, s)
        for c, f, s in ((64, 256, 56), (256, 64, 56), (512, 128, 28), (256, 1024, 14), (2048, 512, 7))
    ),
    *(Layer("MobileNetV2", c, f, 1, s) for c, f, s in ((24, 144, 56), (96, 576, 14), (160, 960, 7))),
    *(
        Layer("MobileNetV2", c, c, 3, s, step, c)
        for c, s, step in ((32, 112, 1), (96, 112, 2), (144, 56, 1), (192, 28, 1), (576, 14, 1), (960, 7, 1))
    ),
)


@dataclass(frozen=True)
class Measurement:
    """Median seconds of each way to compute a layer.

    For a depthwise one `gather` is None, which peers do otherwise, and so are `int8`, one product of its patches' bytes
    by cuBLASLt, and `factored`, one figure for each of `ERROR_RANKS`.
    """

    layer: Layer
    seconds: float
    fp32: float
    tf32: float
    fp16: float
    gather: float | None
    int8: float | None = None
    factored: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes read and written a second by a copy, products a second by an int8 product."""

    copy: float
    int8: float


def _median(call: Callable[[], object], repeats: int) -> float:
    """Median seconds, each run with a cold second-level cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seen = []
    for repeat in range(repeats + 3):
        flush.zero_()
        seconds = device_seconds(call)
        if repeat >= 3:  # the first runs compile, choose algorithms and warm up
            seen.append(seconds)
    return statistics.median(seen)


def ceilings(repeats: int) -> Ceilings:
    """Measure the device."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.ones(n, n, dtype=torch.int8, device="cuda") for _ in range(2))
    return Ceilings(
        2 * _COPY_BYTES / _median(lambda: target.copy_(source), repeats),
        n**3 / _median(lambda: torch._int_mm(a, b.T), repeats),
    )


def host_microseconds(calls: int = 1000) -> float:
    """Host time of a small call of ``lut_matmul``, without waiting for the device."""
    import time

    x, w = (torch.zeros(64, 64, dtype=torch.uint8, device="cuda") for _ in range(2))
    table = torch.zeros(256, 256, dtype=torch.int32, device="cuda")
    for _ in range(10):
        torch.ops.approxconv.lut_matmul(x, w, table)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        torch.ops.approxconv.lut_matmul(x, w, table)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * elapsed / calls


def _native(layer: Layer, dtype: torch.dtype, tf32: bool, repeats: int) -> float:
    """cuDNN, in channels_last where that is its faster format."""
    times = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(BATCH, layer.channels, layer.size, layer.size, device="cuda", dtype=dtype)
        w = torch.randn(
            layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel, device="cuda", dtype=dtype
        )
        x, w = (tensor.contiguous(memory_format=memory_format) for tensor in (x, w))
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            arguments = (None, layer.stride, layer.kernel // 2, 1, layer.groups)
            times.append(_median(lambda: F.conv2d(x, w, *arguments), repeats))  # noqa: B023
    return min(times)


def gather_plan(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, y: torch.Tensor) -> Plan:
    """The peers' kernel: codes ``(M, K)`` and ``(N, K)``, an int32 table ``(256, 256)``, y int32 ``(M, N)``."""
    tile, sizes = read("gather_baseline").constants["TILE"], (*y.shape, x.shape[1])
    grid = (-(-len(x) // tile), -(-len(w) // tile), 1)
    return Plan(
        "gather_baseline", "gather_baseline", grid, (tile, tile, 1), 0, (x, w, table, y, *map(np.int32, sizes))
    )  # fmt: skip


def _patches(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The codes that each output pixel sees, ``(M, K)``."""
    pad = layer.kernel // 2
    patches = F.pad(x, (pad,) * 4).unfold(2, layer.kernel, layer.stride).unfold(3, layer.kernel, layer.stride)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.channels * layer.kernel**2)


def _gather(
    layer: Layer, x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, y: torch.Tensor, repeats: int
) -> float:
    """The peers' kernel on patches that were cut out beforehand, which is not timed; its result is compared with y."""
    rows = _patches(layer, x)
    out = torch.empty(len(rows), layer.filters, dtype=torch.int32, device="cuda")
    with use_source(SOURCES):
        plan = gather_plan(rows, w.reshape(layer.filters, -1), table, out)
        seconds = _median(lambda: launch([plan], out.device), repeats)
    if not torch.equal(out, y.permute(0, 2, 3, 1).reshape(out.shape)):
        raise AssertionError(f"{layer.name}: the engine and the baseline gather disagree")
    return seconds


def _int8(layer: Layer, x: torch.Tensor, w: torch.Tensor, repeats: int) -> float:
    """One product of bytes by cuBLASLt, on patches that were cut out beforehand, which is not timed."""
    rows, columns = (
        F.pad(codes, (0, -codes.shape[1] % 16)).view(torch.int8)  # which it wants of a length
        for codes in (_patches(layer, x), w.reshape(layer.filters, -1))
    )
    return _median(lambda: torch._int_mm(rows, columns.T), repeats)


def _factored(
    layer: Layer, x: torch.Tensor, w: torch.Tensor, geometry: Sequence[Sequence[int]], rank: int, repeats: int
) -> float:
    """The tensor-core kernels on a random table of an error rank; their result is compared with that of row tables."""
    generator = torch.Generator(device="cuda").manual_seed(rank)
    draw = {"size": (1 + rank, 256), "device": "cuda", "generator": generator}
    form = ByteForm(
        torch.randint(0, 256, dtype=torch.uint8, **draw), torch.randint(-128, 128, dtype=torch.int8, **draw), None,
        torch.zeros(256, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    table = (form.u.T.cpu().int() @ form.v.cpu().int()).cuda()
    engine = cuda_engine()
    got = engine.lut_conv2d(x, w, form, *geometry, 1, 0)
    if not torch.equal(got, torch.ops.approxconv.lut_conv2d(x, w, table, *geometry, 1, 0, engine="cuda")):
        raise AssertionError(f"{layer.name}: the factored engine and row tables disagree at rank {rank}")
    return _median(lambda: engine.lut_conv2d(x, w, form, *geometry, 1, 0), repeats)


def measure(layer: Layer, repeats: int) -> Measurement:
    """Time one layer; the baseline's result is compared with the engine's on the way."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)

    x = codes(BATCH, layer.channels, layer.size, layer.size)
    w = codes(layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel)
    table = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int32, device="cuda", generator=generator)
    geometry = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1])

    def approximate() -> torch.Tensor:
        if layer.depthwise:
            return torch.ops.approxconv.lut_dwconv2d(x, w, table, *geometry, 0)
        return torch.ops.approxconv.lut_conv2d(x, w, table, *geometry, 1, 0)

    y = approximate()
    return Measurement(
        layer,
        _median(approximate, repeats),
        _native(layer, torch.float32, False, repeats),
        _native(layer, torch.float32, True, repeats),
        _native(layer, torch.float16, True, repeats),
        None if layer.depthwise else _gather(layer, x, w, table, y, max(1, repeats // 5)),
        None if layer.depthwise else _int8(layer, x, w, repeats),
        None if layer.depthwise else tuple(_factored(layer, x, w, geometry, rank, repeats) for rank in ERROR_RANKS),
    )


def markdown(rows: Sequence[Measurement], best: Ceilings, host: float) -> str:
    """The table, and the means that the README quotes."""
    lines = [
        f"`lut_conv2d` and `lut_dwconv2d` with a random 16-bit table, engine `cuda`, batch {BATCH}, cold second-level "
        "cache; native is cuDNN in whichever of NCHW and channels_last is faster; the gather is a kernel as published "
        "emulators write it (`benchmarks/gather_baseline.cu`), on patches cut out beforehand. Factored: the "
        "tensor-core kernels on random tables of an error rank, TMAC/s; int8: one product of the patches' bytes by "
        "`_int_mm`, of which a table of rank R takes 1 + R. Medians.",
        "",
        f"Ceilings of this device: {best.copy / 1e9:.0f} GB/s by a copy, {best.int8 / 1e12:.0f} TMAC/s by `_int_mm`. "
        f"Host time of a small call: {host:.0f} µs.",
        "",
        "| layer | ms | TMAC/s | share of copy bandwidth | ratio to fp32 | to TF32 | to fp16 | times gather "
        f"| {' | '.join(f'factored, rank {rank}' for rank in ERROR_RANKS)} | int8 |",
        "|---|---|---|---|---|---|---|---|" + "---|" * (len(ERROR_RANKS) + 1),
    ]
    for row in rows:
        gain = "" if row.gather is None else f"{row.gather / row.seconds:.1f}"
        times = (None,) * (len(ERROR_RANKS) + 1) if row.factored is None else (*row.factored, row.int8)
        byte_rates = " | ".join("" if each is None else f"{row.layer.macs / each / 1e12:.1f}" for each in times)
        ratios = " | ".join(f"{native / row.seconds:.2f}" for native in (row.fp32, row.tf32, row.fp16))
        bandwidth = row.layer.bytes / row.seconds / best.copy
        lines.append(
            f"| {row.layer.name} | {1e3 * row.seconds:.3f} | {row.layer.macs / row.seconds / 1e12:.2f} "
            f"| {bandwidth:.2f} | {ratios} | {gain} | {byte_rates} |"
        )
    lines.append("")
    for label, some in (
        ("convolutions", [row for row in rows if not row.layer.depthwise]),
        ("depthwise", [row for row in rows if row.layer.depthwise]),
    ):
        if some:
            ratio = geometric_mean([row.fp32 / row.seconds for row in some])
            gains = [row.gather / row.seconds for row in some if row.gather is not None]
            gain = f", {geometric_mean(gains):.1f} times the gather" if gains else ""
            lines += [f"Geometric mean, {label}: {ratio:.2f} of native fp32{gain}.", ""]
    return "\n".join(lines)
