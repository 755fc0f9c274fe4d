"""``python -m benchmarks``: time the operators, print the table, keep it under ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import approxconv

from . import cpu, multipliers, network, training

RESULTS = Path(__file__).parent / "results"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def _cupy() -> list[str]:
    """The distribution that CuPy came in, if there is one."""
    return packages_distributions().get("cupy", [])[:1]


def _measure(what: str, repeats: int, console: Console) -> tuple[str, str, Callable[[Path], None] | None]:
    """The machine's name, the table and, if there is a plot beside it, what draws that to a file."""
    if what == "gpu":
        from . import gpu

        if not torch.cuda.is_available():
            raise SystemExit("benchmarks gpu: torch sees no CUDA device here")
        rows = [gpu.measure(layer, repeats) for layer in track(gpu.LAYERS, "measuring", console=console)]
        text = gpu.markdown(rows, gpu.ceilings(repeats), gpu.host_microseconds())
        return torch.cuda.get_device_name(), text, None
    machine = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if what == "multipliers":
        rows = [
            multipliers.measure(each, repeats)
            for each in track([*multipliers.multipliers()], "measuring", console=console)
        ]
        return machine, multipliers.markdown(rows), partial(multipliers.plot, rows)
    if what == "training":
        cases = [case for case in cpu.CASES if not case.depthwise]
        rows = [training.measure(case, repeats) for case in track(cases, "measuring", console=console)]
        return machine, training.markdown(rows), None
    if what == "network":
        return machine, network.markdown(network.measure(repeats)), None
    rows = [cpu.measure(case, repeats) for case in track((*cpu.CASES, *cpu.LINEAR), "measuring", console=console)]
    return machine, cpu.markdown(rows), None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("cpu", "multipliers", "training", "network", "gpu"),
        default="cpu",
        help="the CPU's engines by layer (default), by multiplier, in training, in a whole network; or the GPU's",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default 15)")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md, and its plot if it has one")
    arguments = parser.parse_args()
    console = Console(width=160)
    machine, table, plot = _measure(arguments.what, arguments.repeats, console)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba", *_cupy()))
    head = (
        f"{date.today()}, commit {_commit()}, approxconv {approxconv.__version__}, {versions}, Python "
        f"{platform.python_version()}. Written by `python -m benchmarks {arguments.what} --save`."
    )
    text = "\n\n".join([f"# {machine}", head, table])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        if plot is not None:
            plot(RESULTS / f"{arguments.save}.png")
            text += f"\n![The table as a plot]({arguments.save}.png)\n"
        (RESULTS / f"{arguments.save}.md").write_text(text)


main()
