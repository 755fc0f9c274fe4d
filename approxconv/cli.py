"""The command line: ``approxconv demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ._version import __version__
from .formats import load_multiplier
from .multiplier import Multiplier
from .zoo import get_multiplier


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


def _demo(arguments: argparse.Namespace) -> None:
    missing = [package for package in ("sklearn", "matplotlib") if find_spec(package) is None]
    if missing:
        raise CommandError(f"the demo needs {' and '.join(missing)}: pip install 'approxconv[demo]'")
    from . import demo

    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise CommandError(f"--device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device here")
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
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    demo.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results.json and accuracy.png")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default 0)")
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
