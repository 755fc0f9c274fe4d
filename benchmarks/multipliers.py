"""Every reference circuit and a choice of the zoo on one layer: rank, engine, speed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from approxconv import Multiplier, get_multiplier
from approxconv.engines import choose, factored
from approxconv.engines.work import Work
from approxconv.factorize import factorize
from approxconv.pictures import new_picture

from .cpu import BATCH, medians

CHANNELS, SIZE = 128, 28
ZOO = (
    *(f"{family}_8u_8s" for family in ("exact", "drum4", "drum6", "trunc2", "trunc4", "kulkarni", "roba", "mitchell")),
    *(f"bam_h0_v{v}_8u_8s" for v in (4, 6, 8, 10)),
    *(f"{family}_8s" for family in ("bbm_v4", "bbm_v8", "r4abm1_p6", "r4abm2_p8")),
    *(f"{family}_8u" for family in ("loa6", "etm4", "ssm5", "essm4", "dsm5", "momeni1_c6", "momeni2_c8", "akbari1_c8")),
    *(f"{family}_8u" for family in ("alm_soa4", "alm_loa4", "perf_j0_k2")),
)


@dataclass(frozen=True)
class Row:
    """A multiplier: its number of terms (None: over 64), how it was computed, median seconds."""

    name: str
    rank: int | None
    products: int
    engine: str
    seconds: float
    native: float
    lookup: float

    @property
    def gmacs(self) -> float:
        """10⁹ products a second."""
        return BATCH * SIZE**2 * CHANNELS**2 * 9 / self.seconds / 1e9


def multipliers() -> Iterator[Multiplier]:
    """The circuits in the folder that ``APPROXCONV_REFERENCE_LUTS`` names, if it does, then `ZOO`."""
    if folder := os.environ.get("APPROXCONV_REFERENCE_LUTS"):
        known = json.loads((Path(folder) / "mul8.json").read_text())
        with np.load(Path(folder) / "mul8.npz") as tables:
            for name, each in sorted(known.items()):
                yield Multiplier(tables[name], a_signed=each["signed"], w_signed=each["signed"], name=name)
    for name in ZOO:
        yield get_multiplier(name)


def measure(multiplier: Multiplier, repeats: int) -> Row:
    """Time one multiplier; the two ways to compute it are compared with each other on the way."""
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, CHANNELS, SIZE, SIZE), (CHANNELS, CHANNELS, 3, 3)
    x, w = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    table, conv2d = multiplier.table, torch.ops.approxconv.lut_conv2d
    approximate, lookup = (partial(conv2d, x, w, table, *geometry, 0, engine=engine) for engine in ("auto", "cpu"))
    if not torch.equal(approximate(), lookup()):
        raise AssertionError(f"{multiplier.name}: the engines disagree")
    xf, wf = (tensor.float().contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    seconds, looked_up, native = medians([approximate, lookup, lambda: F.conv2d(xf, wf, padding=1)], repeats)
    factors, form = factorize(multiplier), factored.known_form(table)
    engine, _ = choose("auto", table, Work.conv2d(*shapes, *geometry))
    rank, products = (None, 0) if factors is None or form is None else (factors.rank, form.products)
    return Row(multiplier.name, rank, products, engine, seconds, native, looked_up)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        f"`lut_conv2d` {CHANNELS}→{CHANNELS}, 3×3, at {SIZE}×{SIZE}, batch {BATCH}, by multiplier, with the engine"
        " that `auto` takes. *Terms*: those beside the exact product (`factorize`), – where there are more than "
        "64; *products*: the 8-bit GEMMs that they take. *Ratio*: native fp32 time (channels_last) divided by "
        "ours; *times row tables*: theirs divided by ours. Every result equals the row tables', bit for bit.",
        "",
        "| multiplier | terms | products | engine | GMAC/s | ratio to native | times row tables |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        terms, products = ("–", "–") if row.rank is None else (row.rank, row.products)
        lines.append(
            f"| {row.name} | {terms} | {products} | {row.engine} | {row.gmacs:.0f} | {row.native / row.seconds:.2f} "
            f"| {row.lookup / row.seconds:.1f} |"
        )
    return "\n".join([*lines, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed as a share of native fp32, by multiplier, fastest first."""
    ordered = sorted(rows, key=lambda row: row.seconds / row.native)
    colors = {"factored": "tab:blue", "residual": "tab:green", "cpu": "tab:orange"}
    names = {
        "factored": "8-bit products of the factors",
        "residual": "the exact product and 8-bit row tables",
        "cpu": "row tables",
    }
    figure = new_picture(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for engine, color in colors.items():
        places = [i for i, row in enumerate(ordered) if row.engine == engine]
        heights = [ordered[i].native / ordered[i].seconds for i in places]
        axes.bar(places, heights, color=color, label=names[engine])
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.annotate("native fp32", (len(ordered) - 1, 1), ha="right", va="bottom", fontsize=8, color="0.3")
    axes.set_xticks(range(len(ordered)), [row.name for row in ordered], rotation=90, fontsize=6)
    axes.set_ylabel("speed, native fp32 = 1")
    axes.set_title(f"Bit-exact convolution {CHANNELS}→{CHANNELS}, 3×3, {SIZE}×{SIZE}, batch {BATCH}", fontsize=10)
    axes.legend(frameon=False)
    axes.margins(x=0.01)
    path.write_bytes(figure.png(110))
