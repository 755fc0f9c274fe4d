"""The command line: ``approxconv demo``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ._version import __version__
from .engines import select
from .formats import load_multiplier
from .multiplier import Multiplier
from .zoo import get_multiplier

LARGEST_SEED = 2**32 - 1


class CommandError(Exception):
    """Something the user can mend; printed without a traceback."""


def _multiplier(name_or_file: str) -> Multiplier:
    """A zoo name, or a file if there is one of that name."""
    path = Path(name_or_file)
    if path.suffix or path.exists():
        multiplier = load_multiplier(path)
        multiplier.name = multiplier.name or path.stem
        return multiplier
    return get_multiplier(name_or_file)


def _device(name: str) -> torch.device:
    """The CPU, or a CUDA device that is there."""
    if re.fullmatch("cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise CommandError(f"--device {name}: torch sees {count or 'no'} CUDA device{'s' * (count != 1)} here")
    device = torch.device(name)
    select("auto", device)  # says now what is missing, not after training
    return device


def _seed(text: str) -> int:
    """A seed that torch, NumPy and scikit-learn all take."""
    if re.fullmatch("[0-9]{1,10}", text) is None or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be an int from 0 to {LARGEST_SEED}, got {text[:20]!r}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> None:
    missing = [package for package in ("sklearn", "matplotlib") if find_spec(package) is None]
    if missing:
        raise CommandError(f"the demo needs {' and '.join(missing)}: pip install 'approxconv[demo]'")
    from . import demo

    device = _device(arguments.device)
    names = arguments.multiplier or (demo.QUICK_MULTIPLIERS if arguments.quick else demo.MULTIPLIERS)
    multipliers = [_multiplier(name) for name in dict.fromkeys((demo.EXACT, *names))]
    demo.run(
        multipliers,
        device=device,
        out=arguments.out,
        seed=arguments.seed,
        schedule=demo.QUICK_SCHEDULE if arguments.quick else demo.Schedule(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="approxconv", description="Neural networks on approximate multipliers.")
    parser.add_argument("--version", action="version", version=f"approxconv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="try multipliers on a handwritten-digit classifier and retrain it",
        description="Train a small CNN on scikit-learn's handwritten digits, put approximate multipliers into it, "
        "retrain it, and compare.",
        epilog="example: approxconv demo --multiplier drum4_8u_8s --multiplier my_table.npz --out results",
    )
    demo.add_argument(
        "--multiplier",
        action="append",
        metavar="NAME|FILE",
        help="a zoo name or a table file (.npz, .npy); repeatable; default: a selection from nearly exact to brutal",
    )
    demo.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    demo.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results.json and accuracy.png")
    demo.add_argument("--seed", type=_seed, default=0, help="of the split, the weights and the batches (default 0)")
    demo.add_argument("--quick", action="store_true", help="few multipliers, few epochs")
    demo.set_defaults(run=_demo)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 after an error that is the input's (2: wrong usage)."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (CommandError, ValueError, OSError, ImportError) as error:
        print(f"approxconv: error: {error}", file=sys.stderr)
        return 1
    return 0
