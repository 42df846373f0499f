"""Foreign text made harmless: no control character of a name reaches a terminal, a log or a page.

What is not printable (control characters, line breaks, bidirectional overrides, lone surrogates) is shown as its
Python escape, such as ``\\x1b``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"} | {c: f"\\{c}" for c in "\\`*[]|"})
"""What would begin a tag, a link, a picture, a mention, code or another cell."""


def printable(text: object) -> str:
    """One line for a terminal."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(character if character.isprintable() else _escaped(character) for character in shown)


def printable_lines(text: object) -> str:
    """Several lines, the further ones indented, so that no break in a name begins a line that looks like ours."""
    first, *rest = str(text).split("\n")
    return "\n".join([printable(first), *(printable(line if line.startswith(" ") else f"    {line}") for line in rest)])


def markdown_text(text: object) -> str:
    """One line that Markdown, and HTML in it, show as it is."""
    return printable(text).translate(MARKDOWN)


def printable_values(value: Any) -> Any:
    """JSON values with every string, and every name in them, on one printable line."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(name): printable_values(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [printable_values(item) for item in value]
    return value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
