"""ResNet-18 for images of 32×32: inference and a training step, against native fp32 and native fake quantisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxconv import Multiplier, approximate, calibrate, set_mode
from approxconv.nn import ApproxLayer

from .cpu import TABLES, medians, table_of
from .training import FakeQuantised

BATCH, SIZE, CLASSES = 32, 32, 10
NATIVE, FAKE = "native fp32", "native fake-quantised"
KINDS = ("inference", "training step")


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H/stride, W/stride)``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """He et al. 2016 with the 3×3 stem that is usual for CIFAR; `width` channels in the first stage."""
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks, channels = [], width
    for stage in range(4):
        for stride in (2 if stage else 1, 1):
            blocks.append(Block(channels, width << stage, stride))
            channels = width << stage
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _all_fake(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, FakeQuantised(child) if isinstance(child, ApproxLayer) else _all_fake(child))
    return module


@dataclass(frozen=True)
class Network:
    """Median seconds, ``[kind][what]``."""

    seconds: dict[str, dict[str, float]]


def measure(repeats: int, width: int = 64, batch: int = BATCH) -> Network:
    """Time all of it in one run, interleaved."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    native = resnet18(width)
    models: dict[str, nn.Module] = {}
    for name in TABLES:
        multiplier = Multiplier(table_of(name, generator), a_signed=True, w_signed=True, name=name)
        models[name] = calibrate(approximate(native, multiplier, first_last="approximate"), [images])
    models[FAKE] = _all_fake(set_mode(copy.deepcopy(models[TABLES[0]]), "quantized"))
    models[NATIVE] = native

    def inference(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.eval()
            with torch.no_grad():
                model(images)

        return run

    def training_step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def run() -> None:
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return run

    found = {}
    for kind, call in zip(KINDS, (inference, training_step), strict=True):
        times = medians([call(model) for model in models.values()], repeats)
        found[kind] = dict(zip(models, times, strict=True))
    return Network(found)


def markdown(result: Network, batch: int = BATCH) -> str:
    """The table."""
    lines = [
        f"ResNet-18 with a 3×3 stem, {batch} images of {SIZE}×{SIZE}, every layer approximate, engine `auto`; a "
        "training step is forward, straight-through backward and SGD. *Native fake-quantised* is the same model with "
        "torch's fake quantisation and exact fp32 products. Medians of interleaved runs; *times* is a time divided by "
        "the native one of that column's name.",
        "",
        "| | " + " | ".join(f"{kind} ms | times fp32 | times fake-quantised" for kind in KINDS) + " |",
        "|---" * (1 + 3 * len(KINDS)) + "|",
    ]
    for name in result.seconds[KINDS[0]]:
        cells = [name]
        for kind in KINDS:
            times = result.seconds[kind]
            cells += [f"{1e3 * times[name]:.0f}", *(f"{times[name] / times[other]:.2f}" for other in (NATIVE, FAKE))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
