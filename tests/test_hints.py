"""The fix lines of all errors: their commands exist, with their options, and none writes over a file."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dexport.errors import free_name
from tests.commands import parsed

PACKAGE = Path(__file__).parent.parent / "dexport"
COMMAND = re.compile(r"`(dexport [^`]+)`|(?:^|: |then |or )(dexport (?!\.)[^`,;]+)")
WRITTEN = re.compile(r"(?:^|\s)(?:-o|--output|-out)\s+(?!and\b|or\b)(\S+)")
NAMED = re.compile(r"[A-Z_]+(\.\w+)?$")
"""A placeholder that the reader fills in; it is no file that could be there."""


def texts(node: ast.expr) -> Iterator[str]:
    """What an expression may say; what is filled in shows as X."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in parts)
        case ast.IfExp(body=body, orelse=other):
            yield from texts(body)
            yield from texts(other)
        case ast.BinOp(left=left, right=right):
            yield "".join(next(texts(side), "X") for side in (left, right))


def hints() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: next(texts(statement.value), "")
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            given = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
            if called.endswith("Error"):
                given += node.args[1:2]
            for hint in given:
                found = [constants[hint.id]] if isinstance(hint, ast.Name) and hint.id in constants else texts(hint)
                for text in found:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


HINTS = sorted(set(hints()))
COMMANDS = [(where, a or b) for where, text in HINTS for a, b in COMMAND.findall(text)]


def test_the_hints_were_found() -> None:
    assert len(HINTS) > 200
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_every_command_exists_with_its_options(where: str, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    try:
        parsed(words)
    except click.MissingParameter:  # the command by its name
        assert not any(word.startswith("-") for word in words), where
    except IndexError:  # a group by its name
        assert len(words) == 1


@pytest.mark.parametrize(("where", "text"), HINTS)
def test_no_fix_names_a_file_to_write_that_may_be_there(where: str, text: str) -> None:
    for target in WRITTEN.findall(text):
        name = target.strip("'`,;")
        assert "X" in name or NAMED.match(name), f"{where}: {text}"


@pytest.mark.parametrize("name", ["key.pem", "a.pub.pem", ".key", "plain", "with space.json", "-dash.png"])
def test_a_free_name_is_not_there(name: str, tmp_path: Path) -> None:
    seen = set()
    for _ in range(4):
        found = free_name(tmp_path / name)
        assert found not in seen and not found.exists() and found.parent == tmp_path
        assert found.name.startswith(name[0])
        seen.add(found)
        found.touch()
    (tmp_path / "link.pem").symlink_to("nowhere")
    assert free_name(tmp_path / "link.pem").name == "link-2.pem"
