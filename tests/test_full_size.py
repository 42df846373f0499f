"""Published sizes, end to end. Random weights: no released checkpoint can be downloaded by a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import dexport
from dexport.bundle import load_bundle

EXPORT_PEAK = 1.0e9
PLAN_BYTES = (1.2e9, 1.6e9)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.rtx,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra [rtx]"),
]


@pytest.mark.parametrize("recipe", ["dico-xl", "dit-xl-2"])
def test_xl_builds_within_its_memory(recipe: str, tmp_path: Path) -> None:
    result = dexport.build(recipe, tmp_path / "out", precision="fp16", trt=True)
    assert result.verdict.passed
    manifest = load_bundle(tmp_path / "out").manifest
    peaks = {step["name"]: step["peak_rss_bytes"] for step in manifest["steps"]}
    assert max(peaks[name] for name in ("trace", "passes", "save")) < EXPORT_PEAK
    assert PLAN_BYTES[0] < manifest["engine"]["plan_bytes"] < PLAN_BYTES[1]
