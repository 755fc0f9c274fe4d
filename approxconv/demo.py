"""The main job on real data: what approximate multipliers cost a digit classifier, and what retraining wins back.

The data are the 1,797 handwritten digits (8×8 grey values) that scikit-learn ships, from E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from ._version import __version__
from .multiplier import Multiplier
from .nn import approximate, calibrate, set_mode
from .training import Batches, Score, Training, in_order, score

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


def digits(seed: int = 0, device: torch.device | str = "cpu") -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits to train on and held out, a third, stratified by label.

    Each holds images ``(N, 1, 8, 8)`` in [0, 1] and labels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=597, random_state=seed, stratify=data.target)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32, device=device).unsqueeze(1) / 16 for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.long, device=device) for y in parts[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


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


def trained_cnn() -> nn.Sequential:
    """A `small_cnn` trained on `digits`, always the same one; takes a few seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn()
        train(model, digits()[0], Schedule().train, 5e-3)
    return model


def train(
    model: nn.Module,
    data: Dataset,
    epochs: int,
    lr: float,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Train a classifier by `Training.with_adam`; `tick` is called after each epoch."""
    batches = Batches(data, BATCH, seed=seed, device=next(model.parameters()).device)
    Training.with_adam(model, batches, epochs=epochs, lr=lr).run(epochs, after_epoch=lambda _: tick())


def evaluate(
    float_model: nn.Module,
    multiplier: Multiplier,
    data: tuple[TensorDataset, TensorDataset],
    epochs: int,
    seed: int,
    tick: Callable[[], None],
) -> Result:
    """Convert, calibrate, measure, retrain and measure again."""
    train_data, test_data = data
    device = next(float_model.parameters()).device

    def measured(mode: str) -> Score:
        return score(set_mode(model, mode), in_order(test_data, device=device))

    model = approximate(float_model, multiplier, first_last="approximate")
    calibrate(model, in_order(train_data, device=device))
    at_8bit = measured("quantized").accuracy
    before = [measured("approximate") for _ in range(3)]
    train(model, train_data, epochs, 1e-3, seed, tick)
    return Result(
        multiplier.name,
        multiplier.content_hash,
        multiplier.metrics(),
        at_8bit,
        before[0].accuracy,
        measured("approximate").accuracy,
        max(each.images_per_second for each in before),
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
    data = digits(seed, device)
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

        train(float_model, data[0], schedule.train, 5e-3, seed, tick)
        float_accuracy = score(float_model, in_order(data[1], device=device)).accuracy
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
