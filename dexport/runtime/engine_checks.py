"""What must be true before an engine is deserialized, cheapest first, each failure with the command that mends it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dexport.bundle import MANIFEST, Network, reading_manifest
from dexport.contract import CustomOp, Engine, from_json
from dexport.errors import InputError, MachineError, UsageError
from dexport.optional import EXTRA_OF, optional_import
from dexport.runtime.batches import BatchRange
from dexport.runtime.cuda import Gpu

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""By the engine's flavour."""
Range = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class EngineFacts:
    """What a bundle's manifest says of an engine.

    Attributes:
        flavour, version: of the TensorRT that built it.
        targets: compute capabilities it was built for, such as ``sm89``.
        ranges: input name -> its least, best and largest shape.
        plugins: whether it embeds plugins of the custom ops.
        command: what builds it, but for the options that a manifest does not repeat as such.
    """

    plan: Path
    flavour: str
    version: str
    targets: tuple[str, ...]
    ranges: Mapping[str, Range]
    plugins: bool
    command: str

    @property
    def module(self) -> str:
        """The Python module of its flavour."""
        return MODULES[self.flavour]

    @property
    def extra(self) -> str:
        """The extra of dexport that brings what it needs."""
        return EXTRA_OF[self.module]

    def rebuild(self, *options: str) -> str:
        """How to build it again with other options."""
        return _rebuild(self.command, *options)


def read_facts(network: Network, graph: str = "") -> EngineFacts:
    """Find the engine of a network's graph, by default of the main one.

    Raises:
        UsageError: it has none.
        InputError: the manifest says something else than dexport writes there.
    """
    bundle, entry = network.bundle, network.entry(graph)
    with reading_manifest(bundle):
        command = f"dexport build {network.manifest['name']} --trt --{network.manifest['precision']['name']}"
        recorded = entry["engine"]
    if recorded is None:
        raise UsageError(f"{bundle.path} has no TensorRT engine", hint=f"build one: {_rebuild(command)}")
    where = f"{bundle.path / MANIFEST}: networks.{network.name}.graphs.{graph or network.main_graph}"
    engine = from_json(Engine, recorded, f"{where}.engine")
    ops = from_json(tuple[CustomOp, ...], entry.get("custom_ops"), f"{where}.custom_ops")
    file = network.file(engine.file)
    for shapes in engine.fingerprint.shapes.values():
        if not _is_range(shapes):
            raise InputError(f"{where}.engine.fingerprint is no range of shapes", hint="build the bundle again")
    if file not in bundle.manifest["files"]:  # then its hash has not been checked
        raise InputError(f"{where}.engine.file is not in the bundle", hint="build the bundle again")
    return EngineFacts(
        plan=bundle.path / file,
        flavour=engine.flavour,
        version=engine.version,
        targets=engine.targets,
        ranges=engine.fingerprint.shapes,
        # Only kernels that an engine embeds are hashed.
        plugins=any(op.ptx_sha256 for op in ops),
        command=command,
    )


def _is_range(shapes: Range) -> bool:
    low, best, high = shapes
    return len(low) == len(best) == len(high) and all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))


def import_tensorrt(facts: EngineFacts) -> Any:
    """The TensorRT that built the engine: a plan is bound to the exact version.

    Raises:
        MachineError: it is missing, or another version is installed.
    """
    built = f"{facts.plan.name} was built with {facts.flavour} {facts.version}"
    try:
        trt: Any = optional_import(facts.module)
    except MachineError as error:
        raise MachineError(
            f"{built}, which is not installed{_other_flavour(facts)}: {error}",
            hint=f"{error.hint}, or build for what is here: {facts.rebuild()}",
        ) from error
    if trt.__version__ != facts.version:
        raise MachineError(
            f"{built}, but {facts.flavour} {trt.__version__} is installed, and a plan runs in its own version only",
            hint=f"install {facts.version}, or build again: {facts.rebuild('--engine', facts.flavour)}",
        )
    return trt


def check_target(facts: EngineFacts, gpu: Gpu) -> None:
    """Raises MachineError where the engine was not built for this GPU."""
    if gpu.target not in facts.targets:
        raise MachineError(
            f"{facts.plan.name} was built for {', '.join(facts.targets)}; the {gpu.name} here is {gpu.target}",
            hint=f"build for this one: {facts.rebuild('--target', gpu.target)}",
        )


def batches_of(facts: EngineFacts) -> BatchRange:
    """The batches that an engine was built for: first sizes that all of its inputs take."""
    ends = [(low[0], high[0]) for low, _, high in facts.ranges.values() if low]
    return BatchRange(max(low for low, _ in ends), min(high for _, high in ends)) if ends else BatchRange()


def check_ranges(facts: EngineFacts, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises UsageError where a size is outside of what the engine was built for; InputError for sizes not recorded."""
    for name, array in inputs.items():
        if name not in facts.ranges or len(facts.ranges[name][0]) != array.ndim:
            raise InputError(
                f"the manifest beside {facts.plan.name} does not say which shapes of {name} it takes",
                hint=f"build it again: {facts.rebuild()}",
            )
        low, _, high = facts.ranges[name]
        for size, least, most in zip(array.shape, low, high, strict=True):
            if not least <= size <= most:
                raise UsageError(
                    f"input {name} has shape {list(array.shape)}; this engine takes {list(low)} to {list(high)}: "
                    f"{least} to {most} where {size} is",
                    hint=f"use another batch, or build for this one: {facts.rebuild('--profile NAME|FILE')}",
                )


def _rebuild(command: str, *options: str) -> str:
    return f"`{' '.join((command, *options))}`, with the other options of its first build"


def _other_flavour(facts: EngineFacts) -> str:
    for flavour, module in MODULES.items():
        if flavour != facts.flavour:
            with contextlib.suppress(MachineError):
                version = getattr(optional_import(module), "__version__", "")
                return f" ({flavour} {version} is, which cannot run it)"
    return ""
