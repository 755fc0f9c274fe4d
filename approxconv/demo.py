"""The main job on real data: what approximate multipliers cost a digit classifier, and what retraining wins back.

The data are the 1,797 handwritten digits (8×8 grey values) that scikit-learn ships, from E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ._version import __version__
from .multiplier import Multiplier
from .nn import approximate, calibrate, set_mode

EXACT = "exact_8u_8s"
MULTIPLIERS = (
    "drum6_8u_8s",
    "kulkarni_8u_8s",
    "mitchell_8u_8s",
    "bam_h0_v8_8u_8s",
    "drum2_8u_8s",
    "trunc4_8u_8s",
    "bam_h0_v10_8u_8s",
    "trunc5_8u_8s",
    "trunc6_8u_8s",
)
QUICK_MULTIPLIERS = ("drum6_8u_8s", "bam_h0_v10_8u_8s")
BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """Epochs of float training and of retraining."""

    train: int = 24
    retrain: int = 6


QUICK_SCHEDULE = Schedule(train=8, retrain=2)


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` in [0, 1] and labels, cut into a training and a held-out part."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int, device: torch.device) -> Digits:
        """Read scikit-learn's digits; a third is held out, stratified by label."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=597, random_state=seed, stratify=digits.target)
        train_x, test_x = (torch.tensor(x, dtype=torch.float32, device=device).unsqueeze(1) / 16 for x in parts[:2])
        train_y, test_y = (torch.tensor(y, dtype=torch.long, device=device) for y in parts[2:])
        return cls(train_x, train_y, test_x, test_y)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training part once, in random order."""
        order = torch.randperm(len(self.train_x), generator=generator).to(self.train_x.device)
        for picks in order.split(BATCH):
            yield self.train_x[picks], self.train_y[picks]


@dataclass(frozen=True)
class Result:
    """One row: a multiplier's error figures and the network's accuracies with it, in percent."""

    multiplier: str
    content_hash: str
    error: dict[str, float]
    accuracy_8bit: float
    accuracy_approximate: float
    accuracy_retrained: float
    images_per_second: float


def small_cnn() -> nn.Sequential:
    """A CNN for 8×8 images with a depthwise-separable block, about 14,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, data: Digits, epochs: int, lr: float, seed: int, tick: Callable[[], None]) -> None:
    """Adam with a cosine schedule on cross entropy; `tick` is called after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for x, y in data.batches(generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
        tick()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of held-out digits classified right, in percent."""
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in _held_out(data))
    return 100 * hits / len(data.test_y)


def _held_out(data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(data.test_x.split(256), data.test_y.split(256), strict=True)


@torch.inference_mode()
def images_per_second(model: nn.Module, data: Digits, repeats: int = 3) -> float:
    """Held-out images classified per second, best of `repeats` passes."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for x, _ in _held_out(data):
            model(x)
        if data.test_x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return len(data.test_x) / best


def evaluate(
    float_model: nn.Module, multiplier: Multiplier, data: Digits, epochs: int, seed: int, tick: Callable[[], None]
) -> Result:
    """Convert, calibrate, measure, retrain and measure again."""
    model = approximate(float_model, multiplier, first_last="approximate")
    calibrate(model, data.train_x.split(256))
    set_mode(model, "quantized")
    at_8bit = accuracy(model, data)
    set_mode(model, "approximate")
    before = accuracy(model, data)
    speed = images_per_second(model, data)
    train(model, data, epochs, 1e-3, seed, tick)
    return Result(
        multiplier.name,
        multiplier.content_hash,
        multiplier.metrics(),
        at_8bit,
        before,
        accuracy(model, data),
        speed,
    )


def _table(results: Sequence[Result], float_accuracy: float, device: torch.device) -> Table:
    title = f"Handwritten digits on {device.type}: held-out accuracy in % (float: {float_accuracy:.1f})"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("multiplier", no_wrap=True)
    for heading in ("MRE %", "MAE", "WCE", "EP %", "8-bit", "approx", "retrained", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        lost = row.accuracy_8bit - row.accuracy_approximate
        style = "red" if lost >= 5 else "yellow" if lost >= 1 else "green"
        table.add_row(
            Text(row.multiplier),
            f"{row.error['MRE%']:.2f}",
            f"{row.error['MAE']:.0f}",
            f"{row.error['WCE']:.0f}",
            f"{row.error['EP%']:.1f}",
            f"{row.accuracy_8bit:.1f}",
            f"[{style}]{row.accuracy_approximate:.1f}[/]",
            f"{row.accuracy_retrained:.1f}",
            f"{row.images_per_second:,.0f}",
        )
    return table


def plot(results: Sequence[Result], float_accuracy: float, path: Path) -> None:
    """Draw accuracy against mean relative error, before and after retraining, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = sorted(results, key=lambda row: row.error["MRE%"])
    x = [row.error["MRE%"] for row in rows]
    before, after = [row.accuracy_approximate for row in rows], [row.accuracy_retrained for row in rows]
    axes.axhline(float_accuracy, color="0.6", linestyle="--", linewidth=1, label="float")
    axes.vlines(x, before, after, color="0.8", linewidth=2)
    axes.plot(x, before, "o", color="tab:red", label="approximate")
    axes.plot(x, after, "^", color="tab:green", label="retrained")
    for row, value in zip(rows, x, strict=True):
        low = min(row.accuracy_approximate, row.accuracy_retrained)
        axes.annotate(
            row.multiplier, (value, low), xytext=(0, -8), textcoords="offset points", fontsize=7, rotation=90,
            ha="center", va="top", parse_math=False,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.02)
    axes.set_ylim(min(0, *before) - 25, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("mean relative error of the multiplier (%)")
    axes.set_ylabel("held-out accuracy (%)")
    axes.set_title("Handwritten digits on approximate multipliers")
    axes.legend(loc="center left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def run(
    multipliers: Sequence[Multiplier],
    *,
    device: torch.device,
    out: Path,
    seed: int = 0,
    schedule: Schedule | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the float network, try every multiplier on it, print the table, write ``results.json`` and the plot.

    Parameters
    ----------
    multipliers : sequence of Multiplier
        In the order of the table.
    device : torch.device
        Where everything runs.
    out : Path
        Folder for ``results.json`` and ``accuracy.png``; made if missing.
    seed : int
        Of the split, the weights and the order of the batches.
    schedule : Schedule, optional
        Epochs.
    console : rich.console.Console, optional
        Where progress and the table go.

    Returns
    -------
    dict
        What ``results.json`` holds.
    """
    schedule, console = schedule or Schedule(), console or Console()
    started = time.perf_counter()
    torch.manual_seed(seed)
    data = Digits.load(seed, device)
    out.mkdir(parents=True, exist_ok=True)
    float_model = small_cnn().to(device)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        total = schedule.train + schedule.retrain * len(multipliers)
        task = progress.add_task("float training", total=total)

        def tick() -> None:
            progress.advance(task)

        train(float_model, data, schedule.train, 5e-3, seed, tick)
        float_accuracy = accuracy(float_model, data)
        for multiplier in multipliers:
            progress.update(task, description=multiplier.name)
            results.append(evaluate(copy.deepcopy(float_model), multiplier, data, schedule.retrain, seed, tick))
        progress.update(task, description="done")
    console.print(_table(results, float_accuracy, device))
    report = {
        "approxconv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "seed": seed,
        "schedule": asdict(schedule),
        "accuracy_float": float_accuracy,
        "results": [asdict(result) for result in results],
        "seconds": time.perf_counter() - started,
    }
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(results, float_accuracy, out / "accuracy.png")
    written = f"{out / 'results.json'} and {out / 'accuracy.png'} written, {report['seconds']:.0f} s in all"
    console.print(Text(written))
    return report
