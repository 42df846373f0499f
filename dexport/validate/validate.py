"""``dexport validate``: an existing bundle against PyTorch, level by level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dexport.bundle import DECODER, Bundle
from dexport.errors import UsageError
from dexport.exporter.origin import variant_of, weights_of
from dexport.exporter.recipes.recipe import Recipe
from dexport.runtime.pipeline import Pipeline
from dexport.validate.parity import ParityReport, check_parity, open_graph
from dexport.validate.reference import torch_session
from dexport.validate.trajectory import DEFAULT_SNR, TrajectoryReport, check_trajectory

LEVELS = ("forward", "trajectory")


@dataclass(frozen=True)
class Validation:
    """What was compared: forward parity of every network by name, and the trajectory of the whole."""

    bundle: str
    forward: Mapping[str, ParityReport]
    trajectory: TrajectoryReport | None

    @property
    def passed(self) -> bool:
        verdicts = [report.passed for report in self.forward.values()]
        if self.trajectory is not None:
            verdicts.append(self.trajectory.passed)
        return bool(verdicts) and all(verdicts)

    def to_json(self) -> dict[str, Any]:
        """JSON values. A level that was not asked for is null."""
        return {
            "bundle": self.bundle,
            "passed": self.passed,
            "forward": {name: report.to_json() for name, report in self.forward.items()} or None,
            "trajectory": self.trajectory and self.trajectory.to_json(),
        }


def validate(
    bundle: Bundle,
    levels: Sequence[str] = LEVELS,
    *,
    checkpoints: Mapping[str, str] | None = None,
    recipe: Recipe | None = None,
    labels: Sequence[int] = (0, 1),
    steps: int | None = None,
    sampler: str | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    snr_db: float | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> Validation:
    """Compare a bundle with the float32 PyTorch networks that it was built from.

    Args:
        levels: ``forward`` (single evaluations of every network), ``trajectory`` (whole sampling runs).
        checkpoints: where the weights are now, by part; ``""`` is a bundle that holds one network.
        recipe: for a bundle that was built from a recipe of one's own.
        labels: one image each, for the trajectory.
        snr_db: smallest SNR of the final latents; by default that of the bundle's precision.

    Raises:
        UsageError: an unknown level or part, a trajectory of something that cannot be sampled, weights that are gone.
        InputError: weights that are not those of the build.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise UsageError(f"no level {', '.join(unknown)}", hint=f"choose from {', '.join(LEVELS)}")
    networks = _networks(bundle)
    checkpoints = checkpoints or {}
    for name in checkpoints:
        if name not in networks:
            raise UsageError(f"the bundle has no part {name!r}", hint=f"it has {', '.join(map(repr, networks))}")

    forward: dict[str, ParityReport] = {}
    sessions = {}
    for name, part in networks.items():
        variant = variant_of(part.manifest, recipe)
        weights = weights_of(part.manifest["weights"], variant, checkpoints.get(name))
        if "forward" in levels:
            forward[name] = check_parity(
                variant,
                weights,
                part.model_path,
                precision=part.manifest["precision"]["name"],
                gate=gate_of(part),
                max_batch=part.manifest["batch"]["max"],
                on_progress=on_progress,
            )
        if "trajectory" in levels:
            sessions[name] = torch_session(variant, weights)
    if "trajectory" not in levels:
        return Validation(bundle.manifest["name"], forward, None)

    rounded = {name: open_graph(kind_of(part), part.model_path) for name, part in networks.items()}
    pipeline, reference = (
        Pipeline(
            bundle,
            sessions=[session for name, session in chosen.items() if not name.endswith(DECODER)],
            decoder_session=next((session for name, session in chosen.items() if name.endswith(DECODER)), None),
        )
        for chosen in (rounded, sessions)
    )
    trajectory = check_trajectory(
        pipeline,
        reference,
        labels,
        steps=steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        seed=seed,
        gate_snr_db=min(DEFAULT_SNR[gate_of(part)] for part in networks.values()) if snr_db is None else snr_db,
        on_progress=on_progress,
    )
    return Validation(bundle.manifest["name"], forward, trajectory)


def kind_of(part: Bundle) -> str:
    """Half precision is judged with every rounding made explicit, as ONNX Runtime leaves it out on a CPU."""
    return "as shipped" if part.manifest["precision"]["name"] == "fp32" else "rounded"


def gate_of(part: Bundle) -> str:
    """The name of the gate of a network: that of its least exact scheme, or its precision."""
    precision = part.manifest["precision"]
    return precision.get("gate", precision["name"])


def _networks(bundle: Bundle) -> dict[str, Bundle]:
    """Every network of a bundle by the path of its part; ``""`` for a bundle's own."""
    found = {} if bundle.stitch else {"": bundle}
    for name, part in bundle.parts.items():
        found |= {"/".join(filter(None, (name, inner))): network for inner, network in _networks(part).items()}
    return found
