"""``python -m benchmarks``: time the operators, print the table, keep it under ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import platform
import subprocess
from datetime import date
from pathlib import Path

import numba
import torch
from rich.console import Console
from rich.progress import track

import approxconv

from .cpu import CASES, Measurement, geometric_mean, measure

RESULTS = Path(__file__).parent / "results"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def _markdown(rows: list[Measurement]) -> str:
    lines = [
        f"# {_cpu_name()}, {torch.get_num_threads()} threads",
        "",
        f"{date.today()}, commit {_commit()}, approxconv {approxconv.__version__}, torch {torch.__version__}, "
        f"numba {numba.__version__}, Python {platform.python_version()}. Written by `python -m benchmarks --save`.",
        "",
        "`lut_conv2d` and `lut_dwconv2d` with a random 16-bit table, engine `cpu`, batch 16, 3×3 kernels, padding 1; "
        "native is fp32 `F.conv2d` in whichever of NCHW and channels_last is faster; the naive gather is a Numba "
        "`prange` loop that looks each product up. Medians of interleaved runs.",
        "",
        "| layer | approxconv ms | native ms | gather ms | approxconv GMAC/s | native GMAC/s | ratio to native "
        "| times gather |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case.name} | {1e3 * row.seconds:.2f} | {1e3 * row.native:.2f} | {1e3 * row.gather:.1f} "
            f"| {row.case.macs / row.seconds / 1e9:.1f} | {row.case.macs / row.native / 1e9:.1f} "
            f"| {row.ratio:.2f} | {row.gather / row.seconds:.1f} |"
        )
    lines.append("")
    for kind in dict.fromkeys(row.case.kind for row in rows):
        some = [row for row in rows if row.case.kind == kind]
        ratio = geometric_mean([row.ratio for row in some])
        gain = geometric_mean([row.gather / row.seconds for row in some])
        lines.append(f"Geometric mean, {kind}: {ratio:.2f} of native fp32, {gain:.1f} times the naive gather.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default 15)")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md")
    arguments = parser.parse_args()
    console = Console(width=160)
    rows = [measure(case, arguments.repeats) for case in track(CASES, "measuring", console=console)]
    text = _markdown(rows)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.save}.md").write_text(text)


main()
