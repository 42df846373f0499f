"""Every claim of the page on security names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| cannot", "| file"))]


@pytest.mark.parametrize(("file", "name"), NAMED.findall(PAGE))
def test_named_tests_exist(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_line_names_its_test(row: str) -> None:
    assert NAMED.search(row.rsplit(" | ", 1)[-1])


def test_the_page_is_found() -> None:
    assert len(ROWS) > 20
    assert PAGE.count("tests/") == len(NAMED.findall(PAGE))
    assert "security.md" in (ROOT / "mkdocs.yml").read_text()
    assert "docs/security.md" in (ROOT / "SECURITY.md").read_text()
    assert "docs/security.md" in (ROOT / "README.md").read_text()
