"""`approxconv evaluate` and `approxconv retrain`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import approxconv
from approxconv import Multiplier
from approxconv.cli import main
from approxconv.training import in_order, read_checkpoint, score

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Models:
    @staticmethod
    def small():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 3)
        )

def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(240, 1, 5, 4, generator=generator)
    y = (x.flatten(1) @ torch.randn(20, 3, generator=generator)).argmax(1)
    return TensorDataset(x[:180], y[:180]), TensorDataset(x[180:], y[180:])

number = 3
def one(): return 1
def three(): return [1, 2], [3, 4], [5, 6]
def unsized(): return iter(()), iter(())
def unlabelled(): return [torch.zeros(1, 5, 4)], [torch.zeros(1, 5, 4)]
def regression(): return [(torch.zeros(1, 5, 4), 0.5)], [(torch.zeros(1, 5, 4), 0.5)]
"""
SETUP = ["--model", "factories:Models.small", "--dataset", "factories:data"]
RETRAIN = ["retrain", *SETUP, "--multiplier", "trunc1_4u_4s", "--epochs", "3", "--batch-size", "16", "--lr", "0.02"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the factories, in which everything runs."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; return what it printed as JSON."""

    def call(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def model_and_data():
    import factories

    torch.manual_seed(7)
    model = factories.Models.small()
    return model, *factories.data()


def figures(result):
    return {key: result[key] for key in ("loss", "accuracy", "images")}


def lines(path):
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in kept:
        entry.pop("images_per_second")
        entry.get("held_out", {}).pop("images_per_second", None)
    return kept


def test_evaluate_is_the_library_s(run, folder):
    sys.path.insert(0, str(folder))
    model, train, test = model_and_data()
    torch.save(model.state_dict(), folder / "weights.pt")
    result = run("evaluate", *SETUP, "--weights", folder / "weights.pt", "--multiplier", "trunc2_4u_4s",
                 "--first-last", "approximate", "--batch-size", 16)  # fmt: skip
    assert list(result) == ["float", "quantized", "approximate"]
    approx = approxconv.approximate(model.eval(), "trunc2_4u_4s", first_last="approximate")
    approxconv.calibrate(approx, in_order(train))
    for mode, found in result.items():
        approxconv.set_mode(approx, mode)
        wanted = score(approx, in_order(test, 16))
        assert figures(found) == {"loss": wanted.loss, "accuracy": wanted.accuracy, "images": 60}
    assert len({found["loss"] for found in result.values()}) == 3
    assert list(run("evaluate", *SETUP, "--multiplier", "trunc2_4u_4s", "--mode", "quantized")) == ["quantized"]


def test_evaluate_by_layer(run, folder):
    (folder / "maps").mkdir()
    Multiplier.from_function(lambda a, w: a * w + 3, bits=4, a_signed=False, w_signed=True).save(
        folder / "maps" / "mine.npz"
    )
    (folder / "maps" / "map.yaml").write_text(
        "0: mine.npz\n'4': {multiplier: trunc2_4u_4s, quantization: {weight: {bits: 3}}, gradient: lre}\n"
    )
    (folder / "map.json").write_text(json.dumps({"0": "maps/mine.npz", "4": {
        "multiplier": "trunc2_4u_4s", "quantization": {"weight": {"bits": 3}}}}))  # fmt: skip
    command = ["evaluate", *SETUP, "--multiplier", "exact_4u_4s", "--skip", "6", "--mode", "approximate"]
    plain = run(*command)
    mapped = run(*command, "--per-layer", folder / "maps" / "map.yaml")
    assert figures(mapped["approximate"]) != figures(plain["approximate"])
    assert figures(run(*command, "--per-layer", folder / "map.json")["approximate"]) == figures(mapped["approximate"])
    sys.path.insert(0, str(folder))
    import factories

    torch.manual_seed(0)
    train, test = factories.data()
    q3 = approxconv.quantization.Quantization(weight=approxconv.quantization.OperandQuantization(bits=3))
    model = approxconv.approximate(
        factories.Models.small(),
        "exact_4u_4s",
        skip="6",
        per_layer={
            "0": approxconv.load_multiplier(folder / "maps" / "mine.npz"),
            "4": {"multiplier": "trunc2_4u_4s", "quantization": q3},
        },
    )
    wanted = score(approxconv.calibrate(model, in_order(train)), in_order(test, 64))
    assert mapped["approximate"]["loss"] == wanted.loss


class KilledError(BaseException):
    pass


def test_retrain_learns_and_goes_on_where_it_was_cut_off(run, folder, monkeypatch, capsys):
    whole = run(*RETRAIN, "--checkpoint", "whole", "--log", "whole.jsonl")
    before = run("evaluate", *SETUP, "--multiplier", "trunc1_4u_4s", "--mode", "approximate")["approximate"]
    assert whole["accuracy"] > before["accuracy"] + 10
    step = torch.optim.Adam.step
    for kill_at in (5, 1, 14, 9):
        count = 0

        def dies(self, closure=None, kill_at=kill_at):
            nonlocal count
            count += 1
            if count == kill_at:
                raise KilledError
            return step(self, closure)

        monkeypatch.setattr(torch.optim.Adam, "step", dies)
        with pytest.raises(KilledError):
            main([*RETRAIN, "--checkpoint", "cut", "--log", "cut.jsonl", "--every", "2"])
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    capsys.readouterr()
    assert main([*RETRAIN, "--checkpoint", "cut", "--log", "cut.jsonl"]) == 0
    assert "cut/checkpoint.pt: goes on after 2 epochs and 0 batches" in capsys.readouterr().out
    again = run(*RETRAIN, "--checkpoint", "cut", "--log", "cut.jsonl")
    assert figures(again) == figures(whole)
    assert lines(folder / "cut.jsonl") == lines(folder / "whole.jsonl")
    a, b = (read_checkpoint(folder / name / "checkpoint.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    entries = lines(folder / "whole.jsonl")
    assert [(each["epoch"], each.get("step")) for each in entries] == [
        (epoch, step) for epoch in range(3) for step in (*range(1, 13), None)
    ]
    assert entries[-1]["held_out"] == figures(whole)
    assert entries[0]["lr"] == 0.02
    assert entries[-2]["lr"] == pytest.approx(0.005)
    assert sum(each["images"] for each in entries[:12]) == entries[12]["images"] == 180


def test_what_was_retrained_is_evaluated(run, fails, folder):
    result = run(*RETRAIN, "--checkpoint", "out")
    command = ["evaluate", *SETUP, "--batch-size", "16", "--mode", "approximate", "--checkpoint", "out", "--multiplier"]
    assert figures(run(*command, "trunc1_4u_4s")["approximate"]) == figures(result)
    assert run(*command, "trunc3_4u_4s")["approximate"]["loss"] > result["loss"]  # the same weights on another one
    assert "--checkpoint out/checkpoint.pt: " in fails(*command, "trunc1_4s")
    assert "lr = 0.02, this one has lr = 0.03" in fails(*RETRAIN[:-1], "0.03", "--checkpoint", "out")
    assert "No such file" in fails(*command[:-2], "nowhere", "--multiplier", "trunc1_4u_4s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "factories"], "--model must be MODULE:FACTORY, as in my_models:resnet, got 'factories'"),
        (["--model", "no_such_module:small"], "--model no_such_module:small: No module named"),
        (["--model", "factories:nope"], "--model factories:nope: module 'factories' has no attribute 'nope'"),
        (["--model", "factories:number"], "--model factories:number must be callable, got int"),
        (["--model", "factories:one"], "--model factories:one must return a torch.nn.Module, got int"),
        (["--dataset", "factories:one"], "--dataset factories:one must return a pair of datasets"),
        (["--dataset", "factories:three"], "must return a pair of datasets, to train on and held out, got tuple"),
        (["--dataset", "factories:unsized"], "must return datasets with a length and indices"),
        (["--dataset", "factories:unlabelled"], "must return datasets of (input, integer label), got Tensor"),
        (["--dataset", "factories:regression"], "must return datasets of (input, integer label), got tuple"),
        (["--weights", "factories.py"], "--weights factories.py: factories.py holds no tensors of torch.save"),
        (["--skip", "conv*"], "skip pattern 'conv*'"),
        (["--engine", "warp"], "'warp'"),
        (["--per-layer", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["--per-layer", "torn.yaml"], "--per-layer torn.yaml: "),
        (["--per-layer", "torn.json"], "--per-layer torn.json: "),
        (["--per-layer", "list.json"], "--per-layer list.json must map patterns of layers to multipliers"),
        (["--per-layer", "unknown.json"], "--per-layer unknown.json: no multiplier 'drm4'"),
        (["--per-layer", "mode.json"], "--per-layer mode.json: mode is --mode's"),
        (["--per-layer", "bits.json"], "--per-layer bits.json: "),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "retrain"])
def test_mistakes_are_named(fails, folder, command, arguments, message):
    (folder / "torn.yaml").write_text("'0': [")
    (folder / "torn.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    (folder / "unknown.json").write_text('{"0": "drm4"}')
    (folder / "mode.json").write_text('{"0": {"mode": "float"}}')
    (folder / "bits.json").write_text('{"0": {"quantization": {"weight": {"bit": 3}}}}')
    assert message in fails(command, *SETUP, "--multiplier", "trunc1_4u_4s", *arguments)
    assert not (folder / "retrain_results").exists()


def test_without_yaml(fails, folder, monkeypatch):
    (folder / "map.yml").write_text("'0': trunc1_4u_4s")
    find_spec = approxconv.cli.find_spec
    monkeypatch.setattr(approxconv.cli, "find_spec", lambda name: None if name == "yaml" else find_spec(name))
    message = fails("evaluate", *SETUP, "--multiplier", "trunc1_4u_4s", "--per-layer", "map.yml")
    assert "--per-layer map.yml needs PyYAML: pip install pyyaml, or write a .json file" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be an int of at least 1, got '0'"),
        (["--batch-size", "x"], "--batch-size: must be an int of at least 1, got 'x'"),
        (["--lr", "nan"], "--lr: must be a number above 0, got 'nan'"),
        (["--mode", "exact"], "--mode: invalid choice: 'exact'"),
        (["--seed", "-1"], "--seed: must be an int from 0"),
        (["--workers", "-1"], "--workers: must be an int of at least 0, got '-1'"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["retrain", "--multiplier", "drum4_8u_8s", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9(run, folder):
    whole = run(*RETRAIN, "--checkpoint", "whole", "--log", "whole.jsonl")
    command = [
        sys.executable,
        "-m",
        "approxconv",
        *RETRAIN,
        "--checkpoint",
        "cut",
        "--log",
        "cut.jsonl",
        "--every",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    log = folder / "cut.jsonl"
    for lines_before_kill in (4, 17):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while not log.exists() or log.read_text().count("\n") < lines_before_kill:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert figures(run(*RETRAIN, "--checkpoint", "cut", "--log", "cut.jsonl")) == figures(whole)
    assert lines(log) == lines(folder / "whole.jsonl")
    a, b = (read_checkpoint(folder / name / "checkpoint.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
