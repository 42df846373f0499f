"""The report of a validation as JSON: the truth that the terminal, Markdown, JUnit and HTML are views of."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dexport.bundle import Bundle, Network
from dexport.errors import InputError, UsageError
from dexport.exporter.machine import package_versions
from dexport.exporter.quantize.schemes import FLOAT
from dexport.limits import shown
from dexport.runtime.programs.program import Program
from dexport.validate.gates import LOSSY, verdict_of
from dexport.validate.report.schema import Report, check_document, read_json
from dexport.verdict import Loss
from dexport.version import __version__

SCHEMA = 2
KIND = "dexport validation"
WRITE = "write one with `dexport validate BUNDLE -o NEW_REPORT.json`"
DEFAULT_LABELS = (0, 1)
NUMBERED = re.compile(r"^[^./]+(\.\d+)?")
"""A block of a network in the name of a node: ``blocks.3`` in ``blocks.3.attn.qkv/MatMul``."""
MOST_PSNR = 60.0
"""dB; what is more alike than that differs by less than a quarter of a level, and not always on the same machine."""


@dataclass(frozen=True)
class Run:
    """What a validation was asked for.

    Attributes:
        parts: every network of the bundle by name; ``""`` where there is one.
        given_labels: None where the defaults of each level hold.
        program: of the bundle, with the settings that were asked for; None where it has none.
        seed: of the draws.
        distribution: evaluator and images per class, where that level runs.
        identity: hashes of what was compared.
        accept_loss: more may be lost than is fit to ship, where the bundle was not built with that already.
    """

    bundle: Bundle
    parts: Mapping[str, Network]
    levels: tuple[str, ...]
    given_labels: tuple[int, ...] | None
    program: Program | None
    seed: int
    distribution: Mapping[str, Any] | None
    identity: Mapping[str, Any]
    accept_loss: bool = False

    @property
    def accepted(self) -> bool:
        """Whether a loss was accepted, here or when the bundle was built."""
        return self.accept_loss or self.bundle.manifest.get("accepted_loss") is True

    @property
    def labels(self) -> tuple[int, ...]:
        """Of the trajectories."""
        return DEFAULT_LABELS if self.given_labels is None else self.given_labels

    def classes(self, count: int | None) -> Sequence[int]:
        """Of the distribution: the given ones, or all; one for an unconditional network."""
        if self.given_labels is not None:
            return self.given_labels
        return range(1 if count is None else count)

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common to be compared."""
        labels = None if self.given_labels is None else list(self.given_labels)
        return {
            "levels": list(self.levels),
            "labels": labels,
            **({} if self.program is None else {**self.program.values, "seed": self.seed}),
            "distribution": None if self.distribution is None else dict(self.distribution),
            "reference": self.identity["reference"]["modules"],
        }

    def network(self) -> dict[str, Any]:
        """What was built, without its weights: recipe, configuration, precision and graphs of every network."""
        return {
            name or "network": {
                "recipe": part.manifest["recipe"]["name"],
                "config": part.manifest["config"],
                "latent": part.manifest["latent"],
                "graphs": list(part.graphs),
                "precision": precision_of(part),
            }
            for name, part in self.parts.items()
        }


def document(
    run: Run,
    *,
    ops: Mapping[str, Any] | None,
    forward: Mapping[str, Any] | None,
    trajectory: Mapping[str, Any] | None,
    distribution: Mapping[str, Any] | None,
    blocks: Sequence[Mapping[str, Any]] | None,
    gates: Sequence[Mapping[str, Any]],
    not_run: Sequence[str],
) -> dict[str, Any]:
    """The whole report, with the verdict of its gates alone.

    What a baseline says of it, :func:`~dexport.validate.report.baseline.judged` adds.

    A level that was not asked for is null; a figure that is not finite is null.
    """
    manifest = run.bundle.manifest
    verdict = verdict_of([gate["verdict"] for gate in gates])
    report: dict[str, Any] = {
        "kind": KIND,
        "schema": SCHEMA,
        "dexport": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict,
        "passed": verdict == "passed",
        "loss": {"accepted": run.accepted},
        "bundle": {
            "name": manifest["name"],
            "path": str(run.bundle.source),
            "status": manifest["status"],
            "built_with": manifest["dexport"],
            "weights": {name: _weights(part) for name, part in run.parts.items()},
            "random": any(part.manifest["weights"]["random"] for part in run.parts.values()),
            "sha256": run.identity["files"],
        },
        "network": run.network(),
        "settings": run.settings(),
        "gates": list(gates),
        "baseline": None,
        "not_run": list(not_run),
        "ops": ops,
        "forward": forward,
        "trajectory": trajectory,
        "distribution": distribution,
        "blocks": blocks,
        "metrics": {},
        "precision_map": precision_map(run.parts),
        "sizes": {name: part.manifest["sizes"] for name, part in run.parts.items()},
        "environment": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "machine": platform.machine(),
            "packages": {name: version for name, version in package_versions().items() if version},
        },
    }
    report["metrics"] = metrics(report)
    report["loss"] |= loss_of(report).to_json()
    return report


def loss_of(report: Mapping[str, Any]) -> Loss:
    """What was lost, as far as the levels that ran measured it."""
    checks = [check for parity in (report["forward"] or {}).values() for check in parity["checks"]]
    errors = [check["metrics"]["relative_l2"] for check in checks]
    trajectory = report["trajectory"]
    if trajectory is None or trajectory.get("tokens"):  # runs of ids part: neither states nor pictures are a measure
        trajectory = {"states": [{"snr_db": None}], "psnr_db": []}
    pictures = [value for value in trajectory["psnr_db"] if value is not None]
    return Loss(
        max((math.inf if error is None else error for error in errors), default=None),
        trajectory["states"][-1]["snr_db"],
        min(pictures, default=None),
    )


def acceptable(report: Mapping[str, Any]) -> bool:
    """Whether it passed, or lost what was accepted."""
    return report["passed"] or (report["verdict"] == LOSSY and report["loss"]["accepted"] is True)


def read_report(path: Path) -> dict[str, Any]:
    """A stored report.

    Raises:
        UsageError: no such file.
        InputError: another file, a newer schema, or what no validation writes; naming the place.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint=WRITE)
    report = read_json(path, WRITE)
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise InputError(
            f"{path} is not a report of a validation",
            hint=WRITE,
        )
    if report.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has report schema {shown(report.get('schema'))}; this dexport reads {SCHEMA}",
            hint=WRITE,
        )
    check_document(report, Report, path, WRITE)
    return report


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest keeps, and a baseline is made of."""
    return {
        **{name: report[name] for name in ("dexport", "date", "verdict", "loss", "settings", "network", "metrics")},
        "files": _model_files(report),
        "gates": [
            {key: gate[key] for key in ("metric", "value", "limit", "verdict", "low", "high")}
            for gate in report["gates"]
        ],
        "not_run": report["not_run"],
        "tools": report["environment"]["packages"],
    }


def metrics(report: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The figures that a baseline holds, by name; ``margin`` is half the interval of an estimate."""
    found: dict[str, dict[str, float | None]] = {}
    checks = (report["ops"] or {}).get("checks", [])
    _worst(found, ((f"op/{check['op']}/relative_l2", check["metrics"]["relative_l2"]) for check in checks))
    _worst(found, (("block/own/relative_l2", block["own"]) for block in report["blocks"] or ()))
    for part, parity in (report["forward"] or {}).items():
        start = "/".join(filter(None, ("forward", part)))
        rows = ((f"{start}/{check['kind']}/relative_l2", check["metrics"]["relative_l2"]) for check in parity["checks"])
        _worst(found, rows)
    if (trajectory := report["trajectory"]) is not None:
        _worst(found, (("trajectory/evaluation/relative_l2", at["relative_l2"]) for at in trajectory["evaluations"]))
        found["trajectory/final/relative_l2"] = {"value": trajectory["states"][-1]["relative_l2"]}
        if psnr := [MOST_PSNR if value is None else min(value, MOST_PSNR) for value in trajectory["psnr_db"]]:
            found["trajectory/pictures/psnr_db"] = {"value": min(psnr)}
            found["trajectory/pictures/ssim"] = {"value": min(trajectory["ssim"])}
        if lpips := trajectory["lpips"]:
            found["trajectory/pictures/lpips"] = {"value": max(lpips)}
    if (distribution := report["distribution"]) is not None:
        for name in ("delta", "kernel_delta"):
            if (delta := distribution[name]) is not None:
                margin = (delta["high"] - delta["low"]) / 2
                found[f"distribution/{distribution['evaluator']}/{name}"] = {"value": delta["delta"], "margin": margin}
    for part, sizes in report["sizes"].items():
        found["/".join(filter(None, ("size", part, "onnx_bytes")))] = {"value": sizes["onnx"]}
    return found


def _worst(found: dict[str, dict[str, float | None]], rows: Any) -> None:
    for name, value in rows:
        before = found.setdefault(name, {"value": 0.0})["value"]
        found[name] = {"value": None if value is None or before is None else max(before, value)}


def precision_of(part: Network) -> str:
    """``fp16``, ``fp16, int8, w8a8``, ``fp32, ternary int4``."""
    precision = part.manifest["precision"]
    ternary = part.manifest.get("ternary")
    words = [precision["name"], *sorted({*precision.get("layers", {}).values()} - {FLOAT})]
    if ternary:
        words.append(f"ternary {ternary['carrier']}" if isinstance(ternary.get("carrier"), str) else "ternary")
    return ", ".join(words)


def precision_map(parts: Mapping[str, Network]) -> list[dict[str, Any]]:
    """How many nodes of every block compute in which type, and how many of its layers are quantised."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, part in parts.items():
        precision = part.manifest["precision"]
        for graph in part.graphs:
            for node, dtype in part.entry(graph)["nodes"].items():
                nodes = _row(rows, name, node)["nodes"]
                nodes[dtype] = nodes.get(dtype, 0) + 1
        for layer, scheme in precision.get("layers", {}).items():
            _row(rows, name, layer)["quantised_layers"] += scheme != FLOAT
    return list(rows.values())


def _row(rows: dict[tuple[str, str], dict[str, Any]], part: str, node: str) -> dict[str, Any]:
    path, below, _ = node.partition("/")
    found = NUMBERED.match(path) if below or "." in path else None
    block = found[0] if found else "(root)"
    return rows.setdefault((part, block), {"part": part, "block": block, "nodes": {}, "quantised_layers": 0})


def _weights(part: Network) -> dict[str, Any]:
    weights = part.manifest["weights"]
    return {name: weights[name] for name in ("kind", "path", "sha256", "random")}


def _model_files(report: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the graphs and their weights; reports and engines differ from build to build."""
    files = report["bundle"]["sha256"]
    return {name: sha256 for name, sha256 in files.items() if name.endswith((".onnx", ".onnx.data"))}
