import json
import os
from pathlib import Path

import numpy as np
import pytest

from approxconv import Multiplier


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
