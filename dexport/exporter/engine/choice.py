"""Which TensorRT builds an engine, for which GPUs, and why that one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dexport.choices import FLAVOURS
from dexport.errors import MachineError, UsageError
from dexport.exporter import machine

# One plan serves all targets, and bfloat16 attention does not build for sm75: so sm75 only on request.
DEFAULT_RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120")

_MODULE = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRA = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_DISTRIBUTIONS = {"tensorrt": machine.TENSORRT_DISTRIBUTIONS, "tensorrt-rtx": machine.RTX_DISTRIBUTIONS}


@dataclass(frozen=True)
class EngineChoice:
    """Which TensorRT builds, for which GPUs, and why that one.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        targets: compute capabilities such as ``sm89``; exactly one for ``tensorrt``.
        reason: half a sentence for the user.
        version: version of the package that builds.
    """

    flavour: str
    targets: tuple[str, ...]
    reason: str
    version: str


def choose_engine(
    flavour: str = "auto", targets: Sequence[str] = (), default_targets: Sequence[str] = ()
) -> EngineChoice:
    """Decide which TensorRT builds for which GPUs; everything that can be refused is refused here.

    Args:
        flavour: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        targets: compute capabilities the user asked for: ``sm89``, ``8.9`` or ``89``.
        default_targets: used where the user named none and no GPU is here to decide (a profile's targets).

    Errors:
        UsageError: unknown flavour, malformed target, or a target that the flavour cannot build for.
        MachineError: the package is missing, or there is no GPU where one is needed.
    """
    if flavour not in ("auto", *FLAVOURS):
        raise UsageError(f"there is no engine {flavour!r}", hint=f"choose from auto, {', '.join(FLAVOURS)}")
    wanted = parse_targets(targets)
    gpus = machine.visible_gpus()
    if flavour == "tensorrt":
        return _choose_tensorrt(wanted, gpus, "asked for with --engine")
    if flavour == "tensorrt-rtx":
        return _choose_rtx(wanted, parse_targets(default_targets), gpus, "asked for with --engine")
    return _choose_auto(wanted, parse_targets(default_targets), gpus)


def parse_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """Normalise compute capabilities to ``sm89``, without duplicates, in order.

    Errors:
        UsageError: one of them is not a compute capability.
    """
    return tuple(dict.fromkeys(_parse_target(target) for target in targets))


def _choose_auto(wanted: tuple[str, ...], default: tuple[str, ...], gpus: Sequence[machine.Gpu]) -> EngineChoice:
    if not gpus:
        return _choose_rtx(wanted, default, gpus, "no GPU on this machine, so tensorrt-rtx, which builds without one")
    gpu = gpus[0]
    if not machine.has_module("tensorrt"):
        reason = "the tensorrt package is not installed, so tensorrt-rtx"
    elif wanted and wanted != (gpu.target,):
        reason = f"tensorrt only builds for the {gpu.target} of this machine, so tensorrt-rtx"
    else:
        return _choose_tensorrt(wanted, gpus, f"there is a {gpu.name} here, so tensorrt")
    if not wanted and gpu.target not in machine.RTX_TARGETS:
        raise MachineError(
            f"the tensorrt package is not installed, and tensorrt-rtx does not target "
            f"{_spell(gpu.target)}, which the {gpu.name} of this machine is",
            hint="pip install 'dexport[gpu]', or build for another GPU with --target, such as --target sm89",
        )
    return _choose_rtx(wanted, default, gpus, reason)


def _choose_rtx(
    wanted: tuple[str, ...], default: tuple[str, ...], gpus: Sequence[machine.Gpu], reason: str
) -> EngineChoice:
    here = (gpus[0].target,) if gpus else ()
    targets = wanted or here or default or DEFAULT_RTX_TARGETS
    refused = [target for target in targets if target not in machine.RTX_TARGETS]
    if refused:
        raise UsageError(
            f"TensorRT-RTX does not target {', '.join(map(_spell, refused))}; "
            f"it targets {', '.join(machine.RTX_TARGETS)}",
            hint="build with --engine tensorrt on a machine with such a GPU, or choose another --target",
        )
    _require_packages("tensorrt-rtx")
    return EngineChoice("tensorrt-rtx", targets, reason, _version("tensorrt-rtx"))


def _choose_tensorrt(wanted: tuple[str, ...], gpus: Sequence[machine.Gpu], reason: str) -> EngineChoice:
    if not gpus:
        raise MachineError(
            "tensorrt needs a GPU to build, and no NVIDIA GPU is visible here",
            hint="build with --engine tensorrt-rtx, which needs none, or on a machine with a GPU",
        )
    _require_packages("tensorrt")
    gpu = gpus[0]
    if wanted and wanted != (gpu.target,):
        raise UsageError(
            f"tensorrt builds for the GPU it runs on, {gpu.name} ({gpu.target}), not for {', '.join(wanted)}",
            hint="leave --target out, build on a machine with such a GPU, or use --engine tensorrt-rtx",
        )
    return EngineChoice("tensorrt", (gpu.target,), reason, _version("tensorrt"))


def _require_packages(flavour: str) -> None:
    missing = [module for module in (_MODULE[flavour], "polygraphy") if not machine.has_module(module)]
    if missing:
        raise MachineError(
            f"{' and '.join(missing)} must be installed to build {flavour} engines",
            hint=f"pip install 'dexport[{_EXTRA[flavour]}]'",
        )


def _version(flavour: str) -> str:
    return machine.package_version(_DISTRIBUTIONS[flavour]) or "unknown"


def _parse_target(target: str) -> str:
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", target.strip().lower())
    if not found:
        raise UsageError(
            f"{target!r} is not a compute capability",
            hint="write it as sm89 or 8.9; `dexport doctor` shows yours",
        )
    return f"sm{found.group(1)}{found.group(2)}"


def _spell(target: str) -> str:
    return f"SM {target[2:-1]}.{target[-1]}"
