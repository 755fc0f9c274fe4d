"""A training step of a convolution: approximate forward, straight-through backward, against exact fake quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from approxconv import Multiplier, calibrate
from approxconv.nn import ApproxConv2d, ApproxLayer

from .cpu import BATCH, TABLES, Case, geometric_mean, medians, table_of


@dataclass(frozen=True)
class Step:
    """Median seconds of a forward and a backward pass, by table, and of the fake-quantised and the plain layer."""

    case: Case
    seconds: dict[str, float]
    fake_quantised: float
    native: float


class FakeQuantised(nn.Module):
    """What a calibrated layer computes with exact products, in fp32 by torch's own operators."""

    def __init__(self, layer: ApproxLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer."""
        layer, a, w = self.layer, self.layer.activation_format, self.layer.weight_format
        zero_points = torch.zeros_like(layer.weight_scale, dtype=torch.int32)
        x = torch.fake_quantize_per_tensor_affine(x, layer.activation_scale, layer.activation_zero_point, a.low, a.high)
        weight = torch.fake_quantize_per_channel_affine(layer.weight, layer.weight_scale, zero_points, 0, w.low, w.high)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def measure(case: Case, repeats: int) -> Step:
    """Time one layer; all of it with gradients for input and parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, case.channels, case.size, case.size, generator=generator)
    plain = nn.Conv2d(case.channels, case.channels, 3, case.stride, 1)
    layers = {}
    for name in TABLES:
        multiplier = Multiplier(table_of(name, generator), a_signed=True, w_signed=True, name=name)
        layers[name] = ApproxConv2d.from_float(plain, multiplier)
        calibrate(layers[name], [x])
    x.requires_grad_()

    def step(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for tensor in (x, *plain.parameters()):
                tensor.grad = None
            forward(x).sum().backward()

        return run

    exact = FakeQuantised(next(iter(layers.values())))
    steps = [*(step(layer) for layer in layers.values()), step(exact), step(plain)]
    *ours, fake_quantised, native = medians(steps, repeats)
    return Step(case, dict(zip(layers, ours, strict=True)), fake_quantised, native)


def markdown(rows: Sequence[Step]) -> str:
    """The table, and its means."""
    lines = [
        "A training step of one 3×3 convolution at batch 16: forward and backward, gradients for input, weight "
        "and bias. `ApproxConv2d` in mode `approximate` with the engine that `auto` takes, by table (see above), "
        "against the same layer fake-quantised by torch with exact products, and against plain fp32. Medians of "
        "interleaved runs; *times* is our time divided by the fake-quantised layer's.",
        "",
        f"| layer | {' | '.join(f'{name} ms' for name in TABLES)} | fake-quantised ms | fp32 ms "
        f"| {' | '.join(f'{name}, times' for name in TABLES)} |",
        "|---" * (2 * len(TABLES) + 3) + "|",
    ]
    for row in rows:
        seconds = [*(row.seconds[name] for name in TABLES), row.fake_quantised, row.native]
        times = [row.seconds[name] / row.fake_quantised for name in TABLES]
        cells = [row.case.name, *(f"{1e3 * value:.1f}" for value in seconds), *(f"{value:.2f}" for value in times)]
        lines.append(f"| {' | '.join(cells)} |")
    means = (
        f"{name} {geometric_mean([row.seconds[name] / row.fake_quantised for row in rows]):.2f}" for name in TABLES
    )
    return "\n".join([*lines, "", f"Geometric mean: {', '.join(means)} times the fake-quantised step.", ""])
