"""What docs/ names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def names_in(path):
    """Functions and classes, and ``Class.member`` for what is in one."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_name_exists(page):
    named = re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text())
    assert named
    missing = [(path, name) for path, name in named if name not in names_in(ROOT / path)]
    assert not missing
