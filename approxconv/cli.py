"""The command line: ``approxconv demo``, ``list``, ``show``, ``convert``, ``compare``, ``doctor``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

from ._display import printable
from ._version import __version__
from .diagnosis import doctor
from .engines import select
from .formats import list_formats, load_multiplier, options_of, save_multiplier
from .formats.format import ORDERS
from .gradients import GRADIENTS
from .multiplier import Multiplier
from .nn import approx_layers, approximate, calibrate, set_mode
from .nn.layer import MODES
from .quantization import OperandQuantization, Quantization
from .training import (
    Batches,
    Log,
    Score,
    Training,
    in_order,
    load_tensors,
    process_group,
    read_checkpoint,
    score,
)
from .zoo import get_multiplier, list_multipliers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

LARGEST_SEED = 2**32 - 1
_LONGEST_NAME, _LONGEST_MESSAGE = 60, 1000
CHECKPOINT = "checkpoint.pt"
_COMPARED = ("MAE", "WCE", "EP%", "MRE%", "MSE", "bias")

_FACTORIES = (
    "A factory is called without arguments; the current folder is searched for its module. Datasets yield "
    "(input, integer label)."
)


class CommandError(Exception):
    """Something the user can mend; printed without a traceback."""


def _multiplier(name_or_file: str, **options: Any) -> Multiplier:
    """A zoo name, or a file if there is one of that name."""
    path = Path(name_or_file)
    if path.suffix or path.is_file() or "/" in name_or_file:
        return load_multiplier(path, **options)
    if options:
        raise CommandError(f"{name_or_file} is a name of the zoo, not a file; it takes no --{', --'.join(options)}")
    return get_multiplier(name_or_file)


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_multiplier` that were given."""
    signed = {None: None, "signed": True, "unsigned": False}
    options = {
        "format": arguments.format,
        "a_signed": signed[arguments.activation],
        "w_signed": signed[arguments.weight],
        "bits": arguments.bits,
        "order": arguments.order,
        "swap": arguments.swap or None,
    }
    return {key: value for key, value in options.items() if value is not None}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _described(multiplier: Multiplier) -> dict[str, Any]:
    return {
        "name": multiplier.name,
        "activation": multiplier.a_format,
        "weight": multiplier.w_format,
        "metrics": multiplier.metrics(),
        "power_mW": multiplier.power,
        "info": multiplier.info,
        "content_hash": multiplier.content_hash,
    }


def _save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=120)


def _console(**options: Any) -> Console:
    from rich.console import Console

    return Console(highlight=False, **options)


def _figures_table(multipliers: Sequence[Multiplier], figures: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("multiplier", overflow="fold")
    for heading in ("formats", *figures, "mW"):
        table.add_column(heading, justify="right", no_wrap=True)
    for multiplier in multipliers:
        metrics, power = multiplier.metrics(), multiplier.power
        table.add_row(
            Text(printable(multiplier.name, _LONGEST_NAME)),
            f"{multiplier.a_format}×{multiplier.w_format}",
            *(_number(metrics[figure]) for figure in figures),
            "" if power is None else f"{power:.4g}",
        )
    return table


def _number(value: float) -> str:
    """Five significant digits, more for a whole number, without an exponent where it reads well."""
    if value == 0 or math.floor(math.log10(abs(value))) in range(-3, 10):
        digits = 0 if value == round(value) else max(4 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{digits}f}"
    return f"{value:.4e}"


def _aligned(lines: Mapping[str, Any]) -> str:
    shown = {printable(key, _LONGEST_NAME): printable(value, _LONGEST_MESSAGE) for key, value in lines.items()}
    width = max(map(len, shown))
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in shown.items())


def _list(arguments: argparse.Namespace) -> None:
    names = list_multipliers(arguments.pattern)
    if not names and arguments.pattern is not None:
        raise CommandError(f"no multiplier's name matches {arguments.pattern!r}; approxconv list shows all")
    if arguments.json:
        _print_json(names)
    else:
        print("\n".join(names))


def _show(arguments: argparse.Namespace) -> None:
    multiplier = _multiplier(arguments.multiplier, **_reading(arguments))
    if arguments.png is not None:
        _save_png(multiplier.plot(), arguments.png)
    if arguments.json:
        _print_json(_described(multiplier))
        return
    from rich.text import Text

    from .pictures import heat_map_text

    console = _console()
    heading = (
        f"{printable(multiplier.name, _LONGEST_NAME)}: activation {multiplier.a_format} × weight {multiplier.w_format}"
    )
    console.print(Text(heading, style="bold"))
    console.print(Text(_aligned({key: _number(value) for key, value in multiplier.metrics().items()})))
    if multiplier.info:
        console.print(Text("info", style="bold"))
        console.print(Text(_aligned(multiplier.info)))
    if arguments.png is None:
        width = min(64, console.width)
        console.print(heat_map_text(multiplier, width, color=console.color_system is not None))
    else:
        console.print(Text(f"{arguments.png} written"), soft_wrap=True)


def _convert(arguments: argparse.Namespace) -> None:
    multiplier = _multiplier(arguments.input, **_reading(arguments))
    if arguments.name is not None:
        multiplier.name = arguments.name
    options = {} if arguments.to_order is None else {"order": arguments.to_order}
    save_multiplier(multiplier, arguments.output, format=arguments.to, **options)
    _check_reading_back(multiplier, arguments)
    if arguments.json:
        _print_json(_described(multiplier) | {"output": str(arguments.output)})
    else:
        print(printable(f"{arguments.output} written: {multiplier!r}", _LONGEST_MESSAGE))


def _check_reading_back(multiplier: Multiplier, arguments: argparse.Namespace) -> None:
    """Say so where the file just written will be read as something else unless it is told."""
    options = {"format": arguments.to, "order": arguments.to_order}
    options = {key: value for key, value in options.items() if value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = load_multiplier(arguments.output, **options) == multiplier
    if not same:
        signs = [
            f"--{operand} {'' if signed else 'un'}signed"
            for operand, signed in zip(
                ("activation", "weight"), (multiplier.a_signed, multiplier.w_signed), strict=True
            )
        ]
        warnings.warn(f"{arguments.output} does not say it all: read it with {' '.join(signs)}", stacklevel=1)


def _fitting(name_or_file: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options for all files that this one takes: some may be zoo names, or of formats without them."""
    path = Path(name_or_file)
    if not options or not path.is_file():
        return {}
    return {key: value for key, value in options.items() if key in ("format", *options_of(path, options.get("format")))}


def _compare(arguments: argparse.Namespace) -> None:
    multipliers = [_multiplier(each, **_fitting(each, _reading(arguments))) for each in arguments.multipliers]
    if arguments.png is not None:
        from .pictures import compare

        _save_png(compare(multipliers, figure=arguments.figure), arguments.png)
    if arguments.json:
        _print_json([_described(multiplier) for multiplier in multipliers])
        return
    figures = dict.fromkeys((*_COMPARED, arguments.figure))
    console = _console()
    if not console.is_terminal:
        console.width = 200  # into a file or a pipe: no folded cells
    console.print(_figures_table(multipliers, list(figures)))
    if arguments.png is not None:
        print(f"{arguments.png} written")


def _device(name: str) -> torch.device:
    """The CPU, or a CUDA device that is there."""
    if re.fullmatch("cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count()
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
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


def _check_installed(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CommandError(f"the demo needs {' and '.join(missing)}: pip install 'approxconv[demo]'")


def _demo(arguments: argparse.Namespace) -> None:
    _check_installed("sklearn", "matplotlib")
    from rich.console import Console

    from . import demo

    device = _device(arguments.device)
    names = arguments.multiplier or (demo.QUICK_MULTIPLIERS if arguments.quick else demo.MULTIPLIERS)
    multipliers = [_multiplier(name) for name in dict.fromkeys((demo.EXACT, *names))]
    report = demo.run(
        multipliers,
        device=device,
        out=arguments.out,
        seed=arguments.seed,
        schedule=demo.QUICK_SCHEDULE if arguments.quick else demo.Schedule(),
        console=Console(stderr=arguments.json),
    )
    if arguments.json:
        _print_json(report)


def _made(spec: str, argument: str) -> Any:
    """What a factory given as ``module:factory`` returns."""
    module, _, factory = spec.partition(":")
    if not module or not factory:
        raise CommandError(f"{argument} must be MODULE:FACTORY, as in my_models:resnet, got {spec!r}")
    if module == "approxconv.demo":
        _check_installed("sklearn")
    if os.getcwd() not in sys.path:  # as python -m does
        sys.path.insert(0, os.getcwd())
    try:
        made = attrgetter(factory)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise CommandError(f"{argument} {spec}: {error}") from error
    if not callable(made):
        raise CommandError(f"{argument} {spec} must be callable, got {type(made).__name__}")
    return made()


def _model(arguments: argparse.Namespace) -> nn.Module:
    """The float model."""
    model = _made(arguments.model, "--model")
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {arguments.model} must return a torch.nn.Module, got {type(model).__name__}")
    if arguments.weights is not None:
        try:
            model.load_state_dict(load_tensors(arguments.weights))
        except (RuntimeError, TypeError, ValueError) as error:
            raise CommandError(f"--weights {arguments.weights}: {error}") from error
    return model


def _datasets(arguments: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """To train on and held out, of inputs and integer labels."""
    made, wanted = _made(arguments.dataset, "--dataset"), f"--dataset {arguments.dataset} must return"
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise CommandError(f"{wanted} a pair of datasets, to train on and held out, got {type(made).__name__}")
    for data in made:
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
            raise CommandError(f"{wanted} datasets with a length and indices, got {type(data).__name__}")
        sample = data[0]
        label = torch.as_tensor(sample[1]) if isinstance(sample, (tuple, list)) and len(sample) == 2 else None
        if label is None or label.ndim or label.is_floating_point():
            raise CommandError(f"{wanted} datasets of (input, integer label), got {type(sample).__name__}")
    return tuple(made)


def _per_layer(path: Path | None) -> dict[str, Any]:
    """What a YAML or JSON file says of layers, by pattern."""
    if path is None:
        return {}
    if path.suffix == ".json":
        load, malformed = json.loads, ValueError
    elif find_spec("yaml") is None:
        raise CommandError(f"--per-layer {path} needs PyYAML: pip install pyyaml, or write a .json file")
    else:
        import yaml

        load, malformed = yaml.safe_load, yaml.YAMLError
    try:
        choices = load(path.read_text())
    except malformed as error:
        raise CommandError(f"--per-layer {path}: {error}") from error
    if not isinstance(choices, dict):
        raise CommandError(f"--per-layer {path} must map patterns of layers to multipliers or settings")
    return {
        str(pattern): choice if isinstance(choice, dict) else {"multiplier": choice}
        for pattern, choice in choices.items()
    }


def _layer_settings(choice: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `approximate` takes of them; a multiplier's file is looked for beside the map first."""
    own = dict(choice)
    if "mode" in own:
        raise CommandError(
            f"--per-layer {path}: mode is --mode's; for exact products there is the multiplier exact_8u_8s"
        )
    try:
        if "multiplier" in own:
            beside = path.parent / str(own["multiplier"])
            own["multiplier"] = _multiplier(str(beside if beside.is_file() else own["multiplier"]))
        if "quantization" in own:
            parts = {
                name: OperandQuantization(**part) if isinstance(part, dict) else part
                for name, part in own["quantization"].items()
            }
            own["quantization"] = Quantization(**parts)
    except (TypeError, AttributeError, ValueError) as error:
        raise CommandError(f"--per-layer {path}: {error}") from error
    return own


@dataclass(frozen=True)
class _Experiment:
    """A converted, calibrated model with its data, and what it was made of."""

    model: nn.Module
    train: Dataset
    test: Dataset
    settings: dict[str, Any]


def _experiment(arguments: argparse.Namespace, device: torch.device) -> _Experiment:
    multiplier, per_layer = _multiplier(arguments.multiplier), _per_layer(arguments.per_layer)
    torch.manual_seed(arguments.seed)
    train, test = _datasets(arguments)
    model = approximate(
        _model(arguments).to(device),
        multiplier,
        skip=arguments.skip,
        per_layer={pattern: _layer_settings(choice, arguments.per_layer) for pattern, choice in per_layer.items()},
        first_last=arguments.first_last,
        gradient=arguments.gradient,
        engine=arguments.engine,
        inplace=True,
    )
    stride = max(1, len(train) // arguments.calibration)
    calibrate(model, in_order(Subset(train, range(0, len(train), stride)), arguments.batch_size, device=device))
    settings = {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "multiplier": f"{multiplier.name} ({multiplier.content_hash})",
        "per_layer": per_layer,
        "skip": arguments.skip,
        "first_last": arguments.first_last,
        "gradient": arguments.gradient,
    }
    return _Experiment(model, train, test, settings)


def _told(score: Score) -> str:
    return f"loss {score.loss:.4f}  accuracy {score.accuracy:6.2f} %  {score.images_per_second:,.0f} images/s"


def _evaluate(arguments: argparse.Namespace) -> None:
    device = _device(arguments.device)
    experiment = _experiment(arguments, device)
    if arguments.checkpoint is not None:
        path = arguments.checkpoint / CHECKPOINT if arguments.checkpoint.is_dir() else arguments.checkpoint
        layers = approx_layers(experiment.model)
        wanted = {name: layer.multiplier for name, layer in layers.items()}
        try:
            experiment.model.load_state_dict(read_checkpoint(path)["model"])
        except RuntimeError as error:
            raise CommandError(f"--checkpoint {path}: {error}") from error
        for name, layer in layers.items():
            layer.set_multiplier(wanted[name])
    console, scores = _console(stderr=arguments.json), {}
    for mode in arguments.mode or ("float", "quantized", "approximate"):
        set_mode(experiment.model, mode)
        batches = in_order(experiment.test, arguments.batch_size, device=device, workers=arguments.workers)
        with console.status(mode):
            scores[mode] = score(experiment.model, batches)
        console.print(f"{mode:12}{_told(scores[mode])}")
    if arguments.json:
        _print_json({mode: asdict(each) for mode, each in scores.items()})


def _retrain(arguments: argparse.Namespace) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    device, path = _device(arguments.device), arguments.checkpoint / CHECKPOINT
    with process_group(device) as (rank, ranks):
        experiment = _experiment(arguments, device)
        model = set_mode(experiment.model, arguments.mode)
        share = {"device": device, "rank": rank, "ranks": ranks, "workers": arguments.workers}
        training = Training.with_adam(
            DistributedDataParallel(model) if ranks > 1 else model,
            Batches(experiment.train, arguments.batch_size, seed=arguments.seed, **share),
            epochs=arguments.epochs,
            lr=arguments.lr,
            settings=experiment.settings | {name: getattr(arguments, name) for name in ("mode", "engine", "seed")},
        )
        console, log, tested = _console(stderr=arguments.json, quiet=rank > 0), None, None
        if training.resume(path):
            console.print(Text(f"{path}: goes on after {training.epoch} epochs and {training.step} batches"))
        if arguments.log is not None and rank == 0:
            log = Log(arguments.log, training.epoch, training.step)

        def held_out() -> Score:
            return score(model, in_order(experiment.test, arguments.batch_size, **share))

        def after_batch(done: Score) -> None:
            progress.update(bar, completed=training.step, description=f"loss {done.loss:.4f}")
            if log is not None:
                lr = training.optimizer.param_groups[0]["lr"]
                log.write(epoch=training.epoch, step=training.step, lr=lr, **asdict(done))

        def after_epoch(done: Score) -> None:
            nonlocal tested
            tested = held_out()
            console.print(f"epoch {training.epoch}/{arguments.epochs}  {_told(done)}  held out {tested.accuracy:.2f} %")
            if log is not None:
                log.write(epoch=training.epoch - 1, **asdict(done), held_out=asdict(tested))

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(training.batches))
            training.run(
                arguments.epochs,
                checkpoint=path,
                every=arguments.every,
                after_batch=after_batch,
                after_epoch=after_epoch,
            )
        result = tested or held_out()
        console.print(Text(f"{path}: held out: {_told(result)}"))
        if arguments.json and rank == 0:
            _print_json({"checkpoint": str(path), "epochs": training.epoch, **asdict(result)})


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    with Console(stderr=True).status("trying everything; the first time kernels are compiled, up to a minute"):
        diagnosis = doctor()
    if arguments.json:
        _print_json(diagnosis.to_dict())
    else:
        encoding = sys.stdout.encoding or "utf-8"
        print(str(diagnosis).encode(encoding, "replace").decode(encoding))  # the marks are not in every code page
    return 0 if diagnosis.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="approxconv",
        description="Neural networks on approximate multipliers.",
        epilog="example: approxconv show drum4_8u_8s. Exit codes: 0 done, 1 an error in the input, or "
        "something that doctor says to mend, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"approxconv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, help: str, example: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=description or f"{help[0].upper()}{help[1:]}.",
            epilog=f"example: {example}",
        )
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run)
        return added

    listing = command("list", _list, "names of the zoo's multipliers", "approxconv list 'drum*_8u'")
    listing.add_argument("pattern", nargs="?", metavar="PATTERN", help="shell-style filter of the names")

    show = command(
        "show",
        _show,
        "a multiplier's error figures and heat map",
        "approxconv show mul8u_17MJ.c --png mul8u_17MJ.png",
    )
    show.add_argument("multiplier", metavar="NAME|FILE", help="a name from approxconv list, or a file")
    show.add_argument("--png", type=Path, metavar="PNG", help="draw the heat map into this file")
    _add_reading(show)

    formats = "; ".join(f"{name} ({' '.join(suffixes)})" for name, suffixes in list_formats().items())
    convert = command(
        "convert",
        _convert,
        "a multiplier from one file format to another",
        "approxconv convert mul8u_17MJ.c mul8u_17MJ.bin",
        f"Convert a multiplier from one file format to another. Formats: {formats}; c_model can only be read. Only npz "
        "keeps name, operand formats and info.",
    )
    convert.add_argument("input", metavar="IN", help="a file, or a name from approxconv list")
    convert.add_argument("output", type=Path, metavar="OUT", help="the file to write; its suffix says the format")
    convert.add_argument(
        "--to", choices=list_formats(), metavar="FORMAT", help="format of OUT, where its suffix does not say"
    )
    convert.add_argument("--to-order", choices=ORDERS, help="which operand the rows of OUT belong to")
    convert.add_argument("--name", help="instead of the multiplier's own")
    _add_reading(convert)

    compare = command(
        "compare",
        _compare,
        "error figures and power of several multipliers",
        "approxconv compare drum4_8u mitchell_8u circuits/*.c --png compared.png",
    )
    compare.add_argument("multipliers", nargs="+", metavar="NAME|FILE", help="names from approxconv list, or files")
    compare.add_argument(
        "--figure",
        choices=sorted(Multiplier.exact(2).metrics()),
        default="MRE%",
        metavar="FIGURE",
        help="the error figure to draw, such as MRE%% (default) or MAE",
    )
    compare.add_argument("--png", type=Path, metavar="PNG", help="draw the error against the power into this file")
    _add_reading(compare)

    evaluate = command(
        "evaluate",
        _evaluate,
        "a network's accuracy in float, quantised and on a multiplier",
        "approxconv evaluate --multiplier drum4_8u_8s --model my_models:resnet --dataset my_data:cifar10",
        f"Convert a network, calibrate it and measure its held-out accuracy. {_FACTORIES}",
    )
    _add_experiment(evaluate)
    evaluate.add_argument(
        "--mode", action="append", choices=MODES, help="repeatable; default: float, quantized and approximate"
    )
    evaluate.add_argument("--checkpoint", type=Path, metavar="PATH", help="what approxconv retrain wrote")

    retrain = command(
        "retrain",
        _retrain,
        "train a network on a multiplier",
        "approxconv retrain --multiplier drum4_8u_8s --epochs 3 --checkpoint drum4 --log drum4.jsonl",
        "Convert a network, calibrate it and train it by Adam with a cosine schedule. The same command again goes on "
        "from the last checkpoint, bit for bit as if never cut off. Processes started by torchrun -m -- approxconv "
        f"retrain share each batch. {_FACTORIES}",
    )
    _add_experiment(retrain)
    retrain.add_argument("--mode", choices=MODES, default="approximate", help="to train in (default approximate)")
    retrain.add_argument("--epochs", type=_positive, default=6, metavar="N", help="in all (default 6)")
    retrain.add_argument("--lr", type=_rate, default=1e-3, metavar="X", help="first learning rate (default 1e-3)")
    retrain.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("retrain_results"),
        metavar="DIR",
        help=f"folder for {CHECKPOINT}, to go on from if it is there (default retrain_results)",
    )
    retrain.add_argument(
        "--every", type=_positive, metavar="N", help="write it after every N batches, too, not only after each epoch"
    )
    retrain.add_argument("--log", type=Path, metavar="FILE", help="JSON lines, an object for each batch and epoch")

    demo = command(
        "demo",
        _demo,
        "try multipliers on a handwritten-digit classifier and retrain it",
        "approxconv demo --multiplier drum4_8u_8s --multiplier my_table.npz --out results",
        "Train a small CNN on scikit-learn's handwritten digits, put approximate multipliers into it, retrain it, and "
        "compare.",
    )
    demo.add_argument(
        "--multiplier",
        action="append",
        metavar="NAME|FILE",
        help="a zoo name or a file; repeatable; default: a selection from nearly exact to brutal",
    )
    demo.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    demo.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results.json and accuracy.png")
    demo.add_argument("--seed", type=_seed, default=0, help="of the split, the weights and the batches (default 0)")
    demo.add_argument("--quick", action="store_true", help="few multipliers, few epochs")

    command(
        "doctor",
        _doctor,
        "what works here, and the command that mends what does not",
        "approxconv doctor",
        "Try torch, CUDA, CuPy, NVRTC, the kernel cache and every op on every engine; say what works, and what mends "
        "the rest. The exit code is 1 if something does not work that should work here.",
    )
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    reading = parser.add_argument_group("how files are read, where they do not say it themselves")
    reading.add_argument(
        "--format", choices=list_formats(), metavar="FORMAT", help=f"one of {', '.join(list_formats())}"
    )
    reading.add_argument("--bits", type=_bits, metavar="N|N,N", help="operand widths of a C model: activation, weight")
    for operand in ("activation", "weight"):
        reading.add_argument(f"--{operand}", choices=("signed", "unsigned"), help=f"how {operand} codes are read")
    reading.add_argument("--order", choices=ORDERS, help="which operand the rows of a table belong to")
    reading.add_argument("--swap", action="store_true", help="a C model's first parameter is the weight")


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--multiplier", required=True, metavar="NAME|FILE", help="a name from approxconv list, or a file"
    )
    parser.add_argument(
        "--per-layer",
        type=Path,
        metavar="FILE",
        help="YAML or JSON: pattern of layers → NAME|FILE, or multiplier, quantization, gradient, engine",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="layers to leave in float; repeatable"
    )
    parser.add_argument(
        "--first-last",
        choices=("approximate", "quantized", "float"),
        help="what becomes of the first and the last layer (default quantized, if there are others)",
    )
    parser.add_argument(
        "--model",
        default="approxconv.demo:trained_cnn",
        metavar="MODULE:FACTORY",
        help="returns a torch.nn.Module (default: a small CNN, trained on the digits)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict for it, by torch.save")
    parser.add_argument(
        "--dataset",
        default="approxconv.demo:digits",
        metavar="MODULE:FACTORY",
        help="returns two datasets, to train on and held out (default: scikit-learn's handwritten digits)",
    )
    parser.add_argument(
        "--gradient", choices=GRADIENTS, default="ste", help="what stands for the table's derivative (default ste)"
    )
    parser.add_argument("--engine", default="auto", help="auto (default) or an engine's name")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="of all devices together (default 64)"
    )
    parser.add_argument(
        "--calibration", type=_positive, default=1024, metavar="N", help="images for activation ranges (default 1024)"
    )
    parser.add_argument("--workers", type=_count, default=0, metavar="N", help="processes that load images (default 0)")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights, batches and augmentation (default 0)")


def _count(text: str, least: int = 0) -> int:
    if re.fullmatch("[0-9]{1,9}", text) is None or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an int of at least {least}, got {text[:20]!r}")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, 1)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text[:20]!r}")
    return rate


def _bits(text: str) -> int | tuple[int, ...]:
    """Widths as `load_multiplier` takes them."""
    if re.fullmatch("[0-9]{1,2}(,[0-9]{1,2})?", text) is None:
        raise argparse.ArgumentTypeError(f"must be a width or two, as in 8 or 8,4, got {text[:20]!r}")
    widths = tuple(map(int, text.split(",")))
    return widths if len(widths) == 2 else widths[0]


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"approxconv: warning: {printable(message, _LONGEST_MESSAGE)}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 after an error in the input or from doctor (2: usage)."""
    parsed = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _warn
            code = parsed.run(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandError, ValueError, OSError, ImportError) as error:
        print(f"approxconv: error: {printable(error, _LONGEST_MESSAGE)}", file=sys.stderr)
        return 1
    return code or 0
