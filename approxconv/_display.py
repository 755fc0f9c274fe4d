"""What terminals and notebooks show: printable, escaped, readable on dark and light themes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_CELL = "padding:2px 8px;text-align:left;background:transparent;border:0;border-bottom:1px solid currentColor"


def printable(text: object, longest: int) -> str:
    """One printable line of at most `longest` characters of a text that may be anything."""
    line = " ".join(str(text)[: 4 * longest].split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= longest else line[: longest - 1] + "…"


class Shown:
    """Shows as its ``str`` in IPython's terminal; subclasses add HTML for notebooks."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._repr_pretty_ = Shown._repr_pretty_  # IPython takes a dataclass's own __repr__ before a base's method

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def html_table(rows: Iterable[Sequence[object]], heading: Sequence[str] = ()) -> str:
    """An HTML table; the first cell of every row is its title."""
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(text)}</th>' for text in heading)
    body = "".join(_row([str(cell) for cell in row]) for row in rows)
    return (
        '<table style="border-collapse:collapse;background:transparent;margin:0.5em 0">'
        f"{head and f'<thead><tr>{head}</tr></thead>'}<tbody>{body}</tbody></table>"
    )


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    data = "".join(f'<td style="{_CELL};overflow-wrap:anywhere">{escape(text)}</td>' for text in others)
    return f'<tr style="background:transparent"><th scope="row" style="{_CELL}">{escape(first)}</th>{data}</tr>'


def titled(title: str, *parts: str) -> str:
    """A bold line above some HTML."""
    return f'<div style="color:currentColor"><strong>{escape(title)}</strong>{"".join(parts)}</div>'


def image(png: bytes, about: str) -> str:
    """A PNG that is part of the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{escape(about)}" style="max-width:100%" src="{source}">'


def preformatted(text: str, marked: int | None = None) -> str:
    """Text in a monospaced face, one of its lines marked."""
    lines = [escape(line) for line in text.split("\n")]
    if marked is not None and 0 <= marked < len(lines):
        lines[marked] = f'<strong style="border-left:4px solid currentColor;padding-left:4px">{lines[marked]}</strong>'
    style = "background:transparent;color:currentColor;font-family:monospace;line-height:1.3"
    return f'<pre style="{style}">{chr(10).join(lines)}</pre>'
