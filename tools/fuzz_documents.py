"""Readers of JSON that others may have written: reports, baselines, records in manifests, precision maps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner

from dexport.bundle import MANIFEST, SCHEMA_VERSION
from dexport.cli import main
from dexport.errors import InputError
from dexport.exporter.quantize.precision_map import read_map, resolve_map
from dexport.validate.report.baseline import KIND, SCHEMA
from dexport.validate.report.document import summary
from tools.mutate import Rng, changed, damaged

REPORT = Path(__file__).parents[1] / "tests" / "validate" / "report" / "report.json"
"""A report with everything in it."""
ENDS = (0, 1, 2, 4)


def _mutated(rng: Rng, good: Any) -> bytes:
    text = json.dumps(good).encode()
    return damaged(rng, text) if rng.random() < 0.2 else json.dumps(changed(rng, good)).encode()


def _run(*arguments: object) -> None:
    """A command in this process: it ends as it should with one message, or this is a finding."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in ENDS, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    if result.exit_code in (2, 4):
        assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr, result.stderr
        raise InputError(result.stderr)


def _passed(report: dict[str, Any]) -> dict[str, Any]:
    gates = [{**gate, "verdict": "pass"} for gate in report["gates"]]
    return {**report, "gates": gates, "verdict": "passed", "passed": True, "baseline": None}


class Reports:
    """``dexport report`` in every form, and ``dexport baseline update``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.good = folder, json.loads(REPORT.read_text())
        self.passed = _passed(self.good)
        kept = ("dexport", "date", "verdict", "loss", "network", "settings", "metrics", "files", "tools")
        found = summary(self.good)
        self.baseline = {"kind": KIND, "schema": SCHEMA, **{name: found[name] for name in kept}}
        (folder / "baseline.json").write_text(json.dumps(self.baseline))

    def __call__(self, rng: Rng) -> None:
        path = self.folder / "report.json"
        path.write_bytes(_mutated(rng, rng.choice((self.good, self.passed))))
        views = [f"--{name}={self.folder / name}" for name in ("junit", "markdown", "html")]
        match rng.randrange(4):
            case 0:
                _run("baseline", "update", path, "-o", self.folder / "new.json")
            case 1:
                _run("report", path, "--baseline", self.folder / "baseline.json")
            case _:
                _run("report", path, *views)


class Baselines(Reports):
    """``dexport report --baseline``."""

    def __call__(self, rng: Rng) -> None:
        path = self.folder / "mutated.json"
        path.write_bytes(_mutated(rng, self.baseline))
        _run("report", REPORT, "--baseline", path)


class Records:
    """The validation that a manifest records: shown, and made a baseline."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = summary(_passed(json.loads(REPORT.read_text())))

    def __call__(self, rng: Rng) -> None:
        bundle = self.folder / "bundle"
        bundle.mkdir(exist_ok=True)
        record = changed(rng, self.good)
        manifest = {"schema": SCHEMA_VERSION, "status": "passed", "files": {}, "validation": record}
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        _run("baseline", "update", bundle, "-o", self.folder / "new.json")


class PrecisionMaps:
    """Files of ``--quantize map=FILE``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "map.json"
        names = ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head", "stem")
        self.layers: Any = {name: SimpleNamespace(convolution=name == "stem") for name in names}
        self.goods: tuple[Any, ...] = (
            {"blocks.*.mlp.fc1": "int8", "head": "float"},
            {
                "schema": SCHEMA_VERSION,
                "files": {},
                "networks": {"denoiser": {"precision": {"name": "fp16", "layers": {"blocks.0.mlp.fc1": "w8a8"}}}},
            },
        )

    def __call__(self, rng: Rng) -> None:
        self.path.write_bytes(_mutated(rng, rng.choice(self.goods)))
        resolve_map(read_map(self.path), self.layers, ["head"], ["blocks.2.attn.qkv"])
