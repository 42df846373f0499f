"""What a build writes into the bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dexport.contract import to_json
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.engine.process import EngineReport
from dexport.exporter.export import Exported
from dexport.exporter.machine import package_versions
from dexport.exporter.quantize.plan import SMOOTHED
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.steps import Step
from dexport.exporter.variant import Variant
from dexport.profiles import Profile
from dexport.runtime.programs.program import Program
from dexport.verdict import NOT_VERIFIED, Loss, worst_status
from dexport.version import __version__


class Verdict(Protocol):
    """What a verifier says about a build; ``status`` is ``passed``, ``lossy`` or ``failed``."""

    @property
    def passed(self) -> bool: ...

    @property
    def status(self) -> str: ...

    @property
    def loss(self) -> Loss: ...

    def summary(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Engine:
    """A built engine: why this flavour, where the plan is (relative to the bundle), and what the builder reported."""

    choice: EngineChoice
    file: str
    report: EngineReport


def network_entry(
    variant: Variant,
    *,
    weights: Mapping[str, Any],
    precision: str,
    islands: Islands,
    opset: int,
    no_passes: Sequence[str],
    profile: Profile,
    exported: Mapping[str, Exported],
    data_bytes: int,
    ternary: Mapping[str, Any] | None,
    engines: Mapping[str, Engine],
    verdicts: Mapping[str, Verdict],
    steps: list[Step],
    quantisation: Mapping[str, Any],
    ranges: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a manifest says of a network.

    Args:
        exported, engines, verdicts: by graph.
        data_bytes: of the weights file of all graphs.
        quantisation: the gate of the network, and what :meth:`Quantisation.describe` says where there is any.
    """
    quantised = {path: done for each in exported.values() for path, done in each.quantised.items()}
    tables = [each.time_tables for each in exported.values() if each.time_tables is not None]
    return {
        "name": variant.recipe.name,
        **judgement([(verdict.status, verdict.loss) for verdict in verdicts.values()]),
        "recipe": {"name": variant.recipe.name, "family": variant.recipe.family, "source": variant.recipe.source},
        "config": dict(variant.config),
        "latent": list(variant.latent),
        "graphs": {
            each.graph: {
                **to_json(each.signature.graph),
                "nodes": exported[each.graph].precisions,
                "custom_ops": [asdict(op) for op in exported[each.graph].custom_ops],
                "ops": {"traced": exported[each.graph].ops_traced, "final": exported[each.graph].ops},
                "engine": _engine(engines[each.graph]) if each.graph in engines else None,
                "parity": verdicts[each.graph].summary()
                if each.graph in verdicts
                else {"passed": None, "not_run": ["switched off"]},
            }
            for each in variant.each
        },
        "folded": None if variant.table is None else variant.table.steps,
        "weights": dict(weights),
        "opset": opset,
        "no_passes": list(no_passes),
        "precision": {
            "name": precision,
            "islands": None if precision == "fp32" and not quantised else asdict(islands),
            "layers": {},
            "carriers": {},
            "calibration": None,
            "budget": None,
            "smoothed": [path for path, done in quantised.items() if done == SMOOTHED],
            "ranges": ranges and dict(ranges),
            **quantisation,
        },
        "batch": {"min": profile.batch_min, "opt": profile.batch_opt, "max": profile.batch_max},
        "profile": profile.name,
        "ternary": ternary,
        "sizes": {
            "checkpoint": weights["size"],
            "onnx": sum(each.onnx_bytes for each in exported.values()) + data_bytes,
            "plan": sum(engine.report.plan_bytes for engine in engines.values()) or None,
            "peak_rss": max(step.peak_rss_bytes for step in steps),
            "time_tables": tables[0] if tables else None,
        },
        "steps": [asdict(step) for step in steps],
    }


def bundle_manifest(
    name: str, program: Program | None, networks: Mapping[str, Mapping[str, Any]], accepted: bool
) -> dict[str, Any]:
    """The manifest, but for the schema version and the file hashes, which the bundle adds.

    Args:
        networks: entries of :func:`network_entry` by name.
        accepted: whether ``--accept-loss`` was given.
    """
    entries = networks.values()
    return {
        "name": name,
        **judgement([(entry["status"], Loss.of_json(entry["loss"])) for entry in entries]),
        "accepted_loss": accepted,
        "dexport": __version__,
        "program": program and program.to_json(),
        "networks": dict(networks),
        "validation": None,  # by `dexport validate`
        "tools": package_versions(),
    }


def judgement(found: Sequence[tuple[str, Loss]]) -> dict[str, Any]:
    """What a manifest says of quality: the worst status and the worst figures."""
    return {
        "status": worst_status([status for status, _ in found] or [NOT_VERIFIED]),
        "loss": Loss().worst(loss for _, loss in found).to_json(),
    }


def _engine(engine: Engine) -> dict[str, Any]:
    return {
        "file": engine.file,
        "reason": engine.choice.reason,
        # A build does not run engines, with or without a GPU: parity above is of the ONNX file.
        "executed": False,
        **asdict(engine.report),
    }
