"""A report with everything in it, and one in which everything failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dexport.bundle import load_bundle
from dexport.validate.validate import Distribution, validate
from tests.validate.levels.test_distribution import noise

Report = dict[str, Any]


@pytest.fixture(scope="session")
def report(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    np.savez(folder / "real.npz", noise(50))
    chosen = Distribution(folder / "real.npz", "pixels", count=2, work=folder / "work")
    result = validate(
        load_bundle(plain), ["op", "forward", "trajectory", "distribution"], settings={"steps": 5}, distribution=chosen
    )
    return json.loads(json.dumps(result.to_json(), allow_nan=False))


@pytest.fixture(scope="session")
def failed(report: Report) -> Report:
    """With a baseline, blocks, names that must be escaped, and figures that are not finite."""
    bad = json.loads(json.dumps(report))
    bad["bundle"]["name"] = "<script>alert(1)</script> | `x`"
    bad |= {"verdict": "failed", "passed": False}
    bad["gates"][0] |= {"value": None, "verdict": "FAIL"}
    bad["gates"][-1] |= {"verdict": "inconclusive", "advice": "about 400 images", "low": -1.0, "high": 1.0}
    bad["forward"][""]["checks"][0] |= {"passed": False}
    bad["forward"][""]["checks"][0]["metrics"] |= {"relative_l2": None, "max_abs": None, "cosine": None}
    bad["trajectory"]["states"][-1] |= {"relative_l2": None}
    names = ("own", "propagated", "expected")
    bad["blocks"] = [
        {"path": f"blocks.{n}", **dict.fromkeys(names, 10.0 ** (n - 6)), "passed": n != 2} for n in range(4)
    ]
    bad["blocks"].append({"path": "", "own": 0.0, "propagated": None, "expected": None})
    change = {"metric": "forward/rounded/relative_l2", "before": 1e-4, "now": 3e-4, "limit": 2e-4}
    bad["baseline"] = {
        "path": "ci/a|b.json",
        "date": "2026-01-02T03:04:05+00:00",
        "dexport": "0.1.0",
        "tools": {"torch": ["2.11.0", "2.12.0"], "onnx": [None, "1.22.0"]},
        "files": ["model.onnx.data"],
        "changes": [
            {**change, "verdict": "worse", "text": "x3.00"},
            {**change, "metric": "trajectory/new/relative_l2", "before": None, "verdict": "same", "text": "new"},
        ],
    }
    return bad
