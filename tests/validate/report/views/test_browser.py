"""The page in headless Chromium: no errors, nothing wider than the window, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dexport.validate.report.views import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FRAME = """<!doctype html><html style="color-scheme: light dark"><body style="margin: 0">
<iframe src="report.html" style="border: 0; width: {width}px; height: 2000px"></iframe><script>
addEventListener("message", (event) => {{ document.documentElement.dataset.measured = event.data; }});
</script></body></html>"""
"""A window cannot be as narrow as a telephone, a frame can."""
MEASURE = """<script>
window.addEventListener("load", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const broken = [...document.images].filter((image) => !image.naturalWidth).length;
  const back = getComputedStyle(document.body).backgroundColor;
  const ink = getComputedStyle(document.body).color;
  parent.postMessage(JSON.stringify(
    {width: innerWidth, wide: root.scrollWidth, dark, broken, images: document.images.length, back, ink}), "*");
});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")


def open_page(page: str, folder: Path, width: int, dark: bool) -> tuple[dict[str, Any], str]:
    """What the page measures of itself, and what the browser logged on its console."""
    (folder / "report.html").write_text(page.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    file = folder / "frame.html"
    file.write_text(FRAME.format(width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", scheme]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found is not None, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(found[1].replace("&quot;", '"')), console


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page(report: dict[str, Any], tmp_path: Path, width: int, dark: bool) -> None:
    measured, console = open_page(html(report), tmp_path, width, dark)
    assert console == ""
    assert (measured["width"], measured["dark"]) == (width, dark)
    assert measured["wide"] <= width
    assert (measured["broken"], measured["images"]) == (0, 3 * len(report["distribution"]["pairs"]))
    back, ink = brightness(measured["back"]), brightness(measured["ink"])
    assert (back < 60 < 180 < ink) if dark else (ink < 60 < 180 < back)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_the_page_of_a_failure(failed: dict[str, Any], tmp_path: Path, width: int, dark: bool) -> None:
    measured, console = open_page(html(failed), tmp_path, width, dark)
    assert console == ""
    assert measured["wide"] <= measured["width"] == width


def test_errors_would_be_seen(report: dict[str, Any], tmp_path: Path) -> None:
    faulty = html(report).replace("</main>", '<div style="width:3000px">x</div></main><script>nothing()</script>')
    measured, console = open_page(faulty, tmp_path, 1280, dark=False)
    assert measured["wide"] > 1280
    assert "nothing is not defined" in console
