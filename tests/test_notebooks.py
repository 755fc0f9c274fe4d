"""The committed notebooks read well on the web; `make test-slow` executes them."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_the_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_your_own_multiplier",
        "03_edit_a_kernel",
        "04_retrain",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_executed_from_top_to_bottom(path):
    assert path.stat().st_size <= 500_000
    notebook = json.loads(path.read_text())
    first, *others = notebook["cells"]
    assert first["cell_type"] == "markdown"
    introduction = "".join(first["source"])
    assert "You learn" in introduction
    assert re.search("(seconds|minute)\\s+on\\s+two\\s+CPU\\s+cores", introduction)
    code = [cell for cell in others if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) or "text/html" in output.get("data", {}) for output in outputs)


def test_the_quickstart_has_ten_cells():
    assert len(json.loads(NOTEBOOKS[0].read_text())["cells"]) == 10
