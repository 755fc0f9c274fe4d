"""What a malformed file raises."""

from __future__ import annotations

from pathlib import Path


class FormatError(ValueError):
    """A file does not hold what its format says: ``path:line: expectation``, the line where there is one."""

    def __init__(self, path: Path, expectation: str, line: int | None = None) -> None:
        super().__init__(f"{path}{'' if line is None else f':{line}'}: {expectation}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, self.args


def _rebuild(message: str) -> FormatError:
    error = FormatError.__new__(FormatError)
    ValueError.__init__(error, message)
    return error
