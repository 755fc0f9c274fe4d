"""The scripts in examples/ run, and what they retrain learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import approxconv
from approxconv.demo import digits, small_cnn
from approxconv.training import in_order, read_checkpoint, score

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KILLED = """
import os, runpy, signal, sys, torch
step, count = torch.optim.Adam.step, 0

def dies(self, closure=None):
    global count
    count += 1
    if count == 19 + 13 and os.environ["RANK"] == "1":  # after an epoch in float, in the third part of the other
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, closure)

torch.optim.Adam.step = dies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


def run(*command, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=check
    )


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("train_accelerate.py", "accelerate", ["--cpu"]),
        ("train_lightning.py", "lightning", ["--accelerator", "cpu"]),
    ],
)
def test_it_learns(name, package, options):
    pytest.importorskip(package, reason=f"needs {package}")
    said = run(EXAMPLES / name, "--epochs", 2, *options).stdout
    before, after = map(float, re.search(r"([\d.]+) % converted, ([\d.]+) % retrained", said).groups())
    assert after > max(before + 30, 80)


def accuracy(state):
    model = approxconv.approximate(small_cnn(), "trunc5_8u_8s")
    model.load_state_dict(state)
    return score(model, in_order(digits()[1])).accuracy


def told(said):
    return float(re.search(r"on 2 processes: ([\d.]+) %", said).group(1))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="FSDP2 on the CPU: gloo of older torch, pytorch issue 162338")
def test_fsdp(tmp_path):
    out = tmp_path / "model.pt"
    said = told(run(*TORCHRUN, EXAMPLES / "train_fsdp.py", "--epochs", 2, "--out", out).stdout)
    state = torch.load(out, weights_only=True)
    assert accuracy(state) == pytest.approx(said, abs=0.06)
    assert said > 80


def test_ddp_killed_goes_on_to_the_same_weights(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    example = [EXAMPLES / "train_ddp.py", "--epochs", 1, "--every", 5, "--checkpoint"]
    whole = told(run(*TORCHRUN, *example, tmp_path / "whole.pt").stdout)
    killed = run(*TORCHRUN, tmp_path / "killed.py", *example, tmp_path / "cut.pt", check=False)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    again = run(*TORCHRUN, *example, tmp_path / "cut.pt").stdout
    assert "goes on after 0 epochs and 10 batches" in again
    assert told(again) == whole
    a, b = (read_checkpoint(tmp_path / f"{name}.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert accuracy(a) == pytest.approx(whole, abs=0.06)
