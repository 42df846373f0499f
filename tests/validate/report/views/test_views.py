"""Views of a report: what they must show, that they are well formed, and ``dexport report``."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from dexport.cli import main
from dexport.validate.report.views import html, junit, markdown

Report = dict[str, Any]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def stored(report: Report, tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return path


def test_junit_counts_what_is_there(report: Report) -> None:
    root = ElementTree.fromstring(junit(report))
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"op", "forward", "trajectory", "distribution"}
    for suite in suites.values():
        assert int(suite.get("tests", "")) == len(suite)
        assert suite.get("failures") == "0"
    assert root.get("tests") == str(sum(len(suite) for suite in root))
    skipped = suites["op"].find("testcase/skipped")
    assert skipped is not None
    assert skipped.get("message") == "no custom ops"
    names = [case.get("name") for suite in root for case in suite]
    assert len(names) == len(set(names))


def test_junit_of_failures(failed: Report) -> None:
    root = ElementTree.fromstring(junit(failed))
    failures = list(root.iter("failure"))
    assert root.get("failures") == str(len(failures)) == "4"
    assert {failure.get("type") for failure in failures} == {"FAIL", "inconclusive", "worse"}
    assert any("about 400 images" in (failure.get("message") or "") for failure in failures)


def test_markdown_tables_are_whole(report: Report, failed: Report) -> None:
    for each in (report, failed):
        text = markdown(each)
        tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
        assert len(tables) >= 4
        for table in tables:
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table
    assert markdown(report).startswith("## ✅ dit-fashion: passed\n")


def test_markdown_tells_changes_and_intervals(failed: Report) -> None:
    text = markdown(failed)
    for expected in ("1 figure fell behind", "x3.00", "**WORSE**", "torch 2.11.0 → 2.12.0", "**inconclusive**"):
        assert expected in text


def test_html_needs_nothing_else_and_escapes(report: Report, failed: Report) -> None:
    for each in (report, failed):
        page = html(each)
        sources = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert sources
        assert all(source.startswith("data:") for source in sources)
        assert "url(" not in page
        assert "@import" not in page
        assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in html(failed)


HOSTILE = [
    "x\n\n# All gates passed",
    "x</code></td><script>alert(1)</script>",
    "\x1b]0;owned\x07",
    "![x](http://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "a | b | c",
    "`x` <img src=http://evil.example>",
    "@everyone",
    '" onload="alert(1)',
    "\x00\ufffe\ud800",
    "]]>&<!--",
]


class Tags(HTMLParser):
    """Which tags and attributes a browser finds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs


def fill(value: Any, text: str) -> Any:
    """Every string of a document but those that decide its form, replaced."""
    if isinstance(value, dict):
        fixed = ("verdict", "status", "better", "metric", "level", "kind", "option", "source")
        return {name: item if name in fixed else fill(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, text) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_strangers_stay_text(failed: Report, text: str) -> None:
    hostile = fill(failed, text)
    root = ElementTree.fromstring(junit(hostile))
    assert root.find("testsuite/testcase") is not None
    page = html(hostile)
    assert "default-src 'none'" in page
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert all((value or "").startswith("data:") for name, value in tags.attributes if name in ("src", "href"))
    lines = markdown(hostile)
    assert not re.search(r"^#+ All gates", lines, flags=re.MULTILINE)
    outside_code = re.sub(r"`[^`]*`", "", lines)
    assert not re.search(r"<(?!/?(?:sub|details|summary)>)", outside_code)
    assert "](" not in outside_code.replace("\\]", "")
    assert "@" not in outside_code
    for table in re.findall(r"(?:^\|.*\|\n)+", lines, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for view in (page, lines):
        assert all(character.isprintable() or character == "\n" for character in view)


def test_html_shows_every_section(report: Report, failed: Report) -> None:
    page, bad = html(report), html(failed)
    for expected in ("Along the trajectory", "Least alike", "Precision map", "final latents", "<svg", "95 % interval"):
        assert expected in page
    assert "gathered by its end" in page
    assert page.count("data:image/png;base64,") == 3 * len(report["distribution"]["pairs"])
    for expected in ("blocks.2", "Against the baseline", "not finite", "about 400 images"):
        assert expected in bad


def test_html_of_one_level(report: Report) -> None:
    lean = (
        report | dict.fromkeys(("ops", "forward", "trajectory", "distribution")) | {"gates": [], "verdict": "not run"}
    )
    assert "Nothing was judged" in html(lean)
    assert "Not run" in html(lean)
    ElementTree.fromstring(junit(lean))
    assert "not run" in markdown(lean)


def test_report_writes_every_view(stored: Path, tmp_path: Path, report: Report) -> None:
    paths = {view: tmp_path / "views" / f"r.{view}" for view in ("html", "markdown", "junit")}
    result = run("report", stored, *(word for view, path in paths.items() for word in (f"--{view}", path)))
    assert (result.exit_code, result.stdout) == (0, "")
    assert paths["html"].read_text() == html(report)
    assert paths["markdown"].read_text() == markdown(report) == run("report", stored).stdout
    assert paths["junit"].read_text() == junit(report)
    assert list(tmp_path.rglob("*.partial*")) == []


def test_report_against_a_baseline(stored: Path, tmp_path: Path, report: Report) -> None:
    assert run("baseline", "update", stored, "-o", tmp_path / "b.json").exit_code == 0
    assert run("report", stored, "--baseline", tmp_path / "b.json").exit_code == 0
    worse = json.loads(json.dumps(report))
    worse["metrics"]["trajectory/final/relative_l2"] = {"value": 1.0}
    stored.write_text(json.dumps(worse))
    result = run("report", stored, "--baseline", tmp_path / "b.json")
    assert result.exit_code == 1
    assert "**WORSE**" in result.stdout


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "does not exist"),
        ("{", 4, "is not JSON"),
        ("[]", 4, "not a report of a validation"),
        ('{"kind": "dexport validation", "schema": 99}', 4, "has report schema 99"),
        ('{"kind": "dexport validation", "schema": 2}', 4, "lacks dexport, date"),
    ],
)
def test_files_that_are_no_report(tmp_path: Path, content: str | None, code: int, message: str) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    result = run("report", tmp_path / "r.json")
    assert result.exit_code == code
    assert message in result.stderr
