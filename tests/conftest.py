import json
import os
from pathlib import Path

import numpy as np
import pytest

from approxconv import Multiplier


def _low_rank(rank, bits=(8, 8), flags=(False, True), scale=1, seed=0):
    rng = np.random.default_rng(seed)
    f, g = rng.integers(-9, 10, (2 ** bits[0], rank)), rng.integers(-9, 10, (rank, 2 ** bits[1]))
    product = Multiplier.exact(bits, *flags).table.numpy()
    return Multiplier(scale * product + f @ g, a_signed=flags[0], w_signed=flags[1], name=f"rank {rank}")


@pytest.fixture(scope="session")
def low_rank():
    """Factory of multipliers with random factors: not commutative, and neither f(0) nor g(0) is 0."""
    return _low_rank


@pytest.fixture(scope="session")
def reference_multipliers():
    """EvoApproxLib's circuits by name, published figures as info; a row is the code of the circuit's first argument."""
    folder = os.environ.get("APPROXCONV_REFERENCE_LUTS")
    if not folder:
        pytest.skip("APPROXCONV_REFERENCE_LUTS names no folder with EvoApproxLib's tables")
    known = json.loads((Path(folder) / "mul8.json").read_text())
    with np.load(Path(folder) / "mul8.npz") as tables:
        circuits = {
            name: Multiplier(
                tables[name], a_signed=each["signed"], w_signed=each["signed"], name=name, info=each["published"]
            )
            for name, each in known.items()
        }
    assert len(circuits) == 25
    return circuits


@pytest.fixture
def fails(capsys):
    """Run a command that must exit with 1; return its one line on stderr."""
    from approxconv.cli import main

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("approxconv: error: ")
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") == 1
        return captured.err

    return call
