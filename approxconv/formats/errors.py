"""What a malformed file raises."""

from __future__ import annotations

from pathlib import Path


class FormatError(ValueError):
    """A file does not hold what its format says."""

    def __init__(self, path: Path, expectation: str) -> None:
        super().__init__(f"{path}: {expectation}")
