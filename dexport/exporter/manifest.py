"""What a build writes into the bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dexport.bundle import Bundle
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.engine.process import EngineReport
from dexport.exporter.export import Exported
from dexport.exporter.machine import package_versions
from dexport.exporter.quantize.plan import SMOOTHED
from dexport.exporter.recipes.recipe import Islands, TensorSpec
from dexport.exporter.steps import Step
from dexport.exporter.variant import LABELS, Variant
from dexport.profiles import Profile
from dexport.verdict import NOT_VERIFIED, Loss, worst_status
from dexport.version import __version__

LEARNED_VARIANCE = ", learned variance"


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


def compose(
    variant: Variant,
    *,
    weights: Mapping[str, Any],
    precision: str,
    islands: Islands,
    opset: int,
    no_passes: Sequence[str],
    profile: Profile,
    exported: Exported,
    ternary: Mapping[str, Any] | None,
    engine: Engine | None,
    verdict: Verdict | None,
    steps: list[Step],
    parts: Mapping[str, Bundle],
    quantisation: Mapping[str, Any],
    ranges: Mapping[str, Any] | None = None,
    accept_loss: bool = False,
) -> dict[str, Any]:
    """The manifest, but for the schema version and the file hashes, which the bundle adds.

    ``quantisation`` has the gate of the network, and what :meth:`Quantisation.describe` says where there is any.
    """
    signature = variant.signature
    return {
        "name": variant.recipe.name,
        **judgement(verdict, NOT_VERIFIED, accept_loss, parts),
        "dexport": __version__,
        "recipe": {"name": variant.recipe.name, "family": variant.recipe.family, "source": variant.recipe.source},
        "config": dict(variant.config),
        "latent": list(variant.latent),
        "guidance": variant.guidance_rule,
        "sampling": sampling(variant),
        "parts": list(parts),
        "weights": dict(weights),
        "opset": opset,
        "no_passes": list(no_passes),
        "precision": {
            "name": precision,
            "islands": None if precision == "fp32" and not exported.quantised else asdict(islands),
            "nodes": exported.precisions,
            "layers": {},
            "carriers": {},
            "calibration": None,
            "budget": None,
            "smoothed": [path for path, done in exported.quantised.items() if done == SMOOTHED],
            "ranges": ranges and dict(ranges),
            **quantisation,
        },
        "io": {"inputs": tensor_specs(signature.inputs), "outputs": tensor_specs(signature.outputs)},
        "batch": {"min": profile.batch_min, "opt": profile.batch_opt, "max": profile.batch_max},
        "profile": profile.name,
        "custom_ops": [asdict(op) for op in exported.custom_ops],
        "ops": {"traced": exported.ops_traced, "final": exported.ops},
        "ternary": ternary,
        "sizes": {
            "checkpoint": weights["size"],
            "onnx": exported.onnx_bytes,
            "plan": engine and engine.report.plan_bytes,
            "peak_rss": max(step.peak_rss_bytes for step in steps),
            "time_tables": exported.time_tables,
        },
        "engine": None if engine is None else _engine(engine),
        "parity": {"passed": None, "not_run": ["switched off"]} if verdict is None else verdict.summary(),
        "validation": None,  # by `dexport validate`
        "steps": [asdict(step) for step in steps],
        "tools": package_versions(),
    }


def judgement(verdict: Verdict | None, otherwise: str, accepted: bool, parts: Mapping[str, Bundle]) -> dict[str, Any]:
    """What a manifest says of quality: the worst of the bundle's own network and of its parts.

    Args:
        verdict: on the bundle's own network; where there is none, its status is ``otherwise``.
        accepted: whether ``--accept-loss`` was given.
    """
    status, loss = (otherwise, Loss()) if verdict is None else (verdict.status, verdict.loss)
    worst = loss.worst(part.loss for part in parts.values())
    return {
        "status": worst_status([status, *(part.status for part in parts.values())]),
        "loss": worst.to_json(),
        "accepted_loss": accepted,
    }


def sampling(variant: Variant) -> dict[str, Any] | None:
    """What a sampler has to know about a denoiser; None for anything else.

    What the recipe says of its own configuration and another one does not have is left out: names of other classes, and
    a learned variance.
    """
    recipe = variant.recipe
    if recipe.sampling is None:
        return None
    classes = [int(spec.high) + 1 for spec in variant.signature.inputs if spec.name == LABELS]
    guidance, table, names = recipe.guidance, variant.table, recipe.sampling.class_names
    state, out = variant.signature.inputs[0], variant.signature.outputs[0]
    learned = len(state.shape) > 1 and out.shape[1] != state.shape[1]
    return {
        **asdict(recipe.sampling),
        "prediction": recipe.sampling.prediction.removesuffix(LEARNED_VARIANCE) + LEARNED_VARIANCE * learned,
        "class_names": names if len(names) == (classes[0] if classes else 0) else (),
        **({} if table is None else {"steps": table.steps}),
        "folded": table and {"steps": table.steps, "times": list(table.times)},
        "classes": classes[0] if classes else None,
        "null_label": variant.null_label,
        "guidance": guidance and {"rule": guidance.rule_for(variant.config), "default_scale": guidance.default_scale},
    }


def tensor_specs(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    """Names, dtypes and shapes of inputs or outputs; ``"B"`` is the symbolic batch.

    Inputs by which a graph indexes a table have their values too: ``range``, both ends included, or ``choices``.
    """
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), **_values(spec)} for spec in specs]


def _values(spec: TensorSpec) -> dict[str, Any]:
    if spec.accepted is not None:
        return {"range": list(spec.accepted)}
    return {"choices": list(spec.choices)} if spec.choices else {}


def _engine(engine: Engine) -> dict[str, Any]:
    return {
        "file": engine.file,
        "reason": engine.choice.reason,
        # A build does not run engines, with or without a GPU: parity above is of the ONNX file.
        "executed": False,
        **asdict(engine.report),
    }
