"""TensorRT engines, the parent's side: choose a flavour, run the build in a child process, report.

A native crash in TensorRT cannot be caught, so this process never imports it: parse and build run in
:mod:`dexport.exporter.engine_worker`. The child's output and TensorRT's log go to a file that is kept;
progress and the result come back as JSON lines over a pipe of their own, which no library prints into.
POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dexport.choices import FLAVOURS
from dexport.errors import DexportError, GateError, InputError, MachineError, UsageError
from dexport.exporter import machine
from dexport.files import draft_of, write_whole

# One plan serves all targets, and bfloat16 attention does not build for sm75: so sm75 only on request.
DEFAULT_RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120")

TIMEOUT_VARIABLE = "DEXPORT_ENGINE_TIMEOUT"
DEFAULT_TIMEOUT_S = 4 * 3600
"""Seconds. What takes longer is taken for one that hangs."""

Shape = tuple[int, ...]
OnProgress = Callable[[str, int, int], None]

_MODULE = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRA = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_DISTRIBUTIONS = {"tensorrt": machine.TENSORRT_DISTRIBUTIONS, "tensorrt-rtx": machine.RTX_DISTRIBUTIONS}
_ERROR_CLASSES: dict[str, type[DexportError]] = {
    "gate": GateError,
    "usage": UsageError,
    "input": InputError,
    "machine": MachineError,
}
_POLL_S = 0.5
_PIPE_BYTES = 1 << 16
_LOG_LINES = 6
_LOG_LINE_WIDTH = 300


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


@dataclass(frozen=True)
class EngineRequest:
    """One engine to build.

    Attributes:
        shapes: input name -> its (min, opt, max) shape. Every input with a dynamic dimension needs an entry.
        expected_dtypes: ONNX node name -> ``float16``, ``float32`` or ``bfloat16``. Where a node becomes
            compute layers (convolution, matrix product, attention) each must yield that dtype; where it does
            not, its last layer must. A model-local function's call node counts by its last layer.
        workspace_mib: limit of the builder's scratch memory; None leaves it to TensorRT.
        log_path: where the child's output goes.
        failed_log: where a copy is kept when the build fails, if ``log_path`` goes with it. Nothing is there.
        plugin_modules: imported in the child before parsing with ``tensorrt``, to register plugins. Not
            imported with ``tensorrt-rtx``, which has no plugins and inlines the function bodies.
    """

    onnx_path: Path
    plan_path: Path
    choice: EngineChoice
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    expected_dtypes: Mapping[str, str]
    workspace_mib: int | None
    log_path: Path
    plugin_modules: tuple[str, ...] = ()
    failed_log: Path | None = None


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the engine; -1 is a dynamic dimension."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class EngineReport:
    """What was built. ``dataclasses.asdict`` of it is JSON.

    Attributes:
        plan_bytes: size of the plan file.
        sha256: of the plan file, hexadecimal.
        seconds_parse: of reading the ONNX file into a network.
        seconds_build: of building and writing the plan.
        peak_rss_bytes: peak memory of the child process.
        layers: number of layers in the network before TensorRT fuses them.
        dtype_census: layer type -> output dtype -> number of layers, of the same network.
        checked_nodes: how many ONNX nodes had their dtype asserted.
        fingerprint: what the engine depends on: flavour, version, targets, runtime_platform,
            hardware_compatibility, shapes, gpu.
    """

    flavour: str
    version: str
    targets: tuple[str, ...]
    plan_bytes: int
    sha256: str
    seconds_parse: float
    seconds_build: float
    peak_rss_bytes: int
    layers: int
    dtype_census: dict[str, dict[str, int]]
    checked_nodes: int
    fingerprint: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()


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


def build_engine(request: EngineRequest, on_progress: OnProgress | None = None) -> EngineReport:
    """Build one engine in a child process.

    Args:
        on_progress: called with (phase, step, steps) while the child works; the child dies if it raises.

    Errors:
        InputError: the ONNX file cannot be parsed.
        GateError: the parsed network does not have the dtypes that were asked for.
        UsageError: the shapes do not fit the inputs.
        MachineError: the child died, did not come to an end in ``DEXPORT_ENGINE_TIMEOUT`` seconds, or the build
            failed. No plan is left behind; the log is.
    """
    seconds = time_limit()
    part = draft_of(request.plan_path)
    _make_folders(request)
    try:
        result = _run_child(request, part, on_progress, seconds)
        _move_into_place(part, request.plan_path)
    finally:
        part.unlink(missing_ok=True)
    return _report(request, result)


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


def _make_folders(request: EngineRequest) -> None:
    try:
        for folder in (request.plan_path.parent, request.log_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"a folder for the engine cannot be made: {error}") from error


def _move_into_place(part: Path, plan_path: Path) -> None:
    try:
        part.replace(plan_path)
    except OSError as error:
        raise MachineError(f"{plan_path} cannot be written: {error}") from error


def _open_log(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise MachineError(f"the build log {path} cannot be written: {error}") from error


def time_limit() -> float:
    """Seconds that an engine may take: ``DEXPORT_ENGINE_TIMEOUT``.

    Errors:
        UsageError: it is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "") or str(DEFAULT_TIMEOUT_S)
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise UsageError(f"{TIMEOUT_VARIABLE}={text} is not a positive number", hint="give seconds, such as 14400")


def _run_child(request: EngineRequest, part: Path, on_progress: OnProgress | None, seconds: float) -> dict[str, Any]:
    """Run the worker to its end and return its result event; kill it if anything here goes wrong."""
    deadline = time.monotonic() + seconds
    error_event: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    with _started_child(request, part) as (child, events):
        for event in _read_events(child, events, deadline):
            if event["event"] == "progress" and on_progress:
                on_progress(event["phase"], event["step"], event["steps"])
            elif event["event"] == "error":
                error_event = event
            elif event["event"] == "result":
                result = event
        try:
            status: int | None = child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
    if error_event:
        raise _worker_error(error_event, request)
    if status is None:
        raise _late_error(seconds, request)
    if status != 0 or result is None:
        raise _death_error(status, request)
    return result


@contextlib.contextmanager
def _started_child(request: EngineRequest, part: Path) -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO]]:
    """Start the worker; yields it and the reading end of its event pipe. It does not outlive the block."""
    with tempfile.TemporaryDirectory(prefix="dexport-engine-") as folder, contextlib.ExitStack() as stack:
        read_fd, write_fd = os.pipe()
        events = stack.enter_context(os.fdopen(read_fd, "rb"))
        try:
            spec = _write_spec(request, part, write_fd, Path(folder))
            log = stack.enter_context(_open_log(request.log_path))
            # Its own session: Ctrl-C reaches only this process, which then kills the child.
            child = subprocess.Popen(
                _worker_command(spec),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                env=_child_environment(request.choice.flavour),
                start_new_session=True,
            )
        finally:
            # The child must hold the only writing end, or its death would not end the reading.
            os.close(write_fd)
        try:
            yield child, events
        finally:
            if child.poll() is None:
                # With all that it started: they share its session.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _worker_command(spec: Path) -> list[str]:
    return [sys.executable, "-m", "dexport.exporter.engine_worker", str(spec)]


def _child_environment(flavour: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavour == "tensorrt-rtx" else "0"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _write_spec(request: EngineRequest, part: Path, event_fd: int, folder: Path) -> Path:
    spec = {
        "flavour": request.choice.flavour,
        "targets": request.choice.targets,
        "onnx_path": str(request.onnx_path.absolute()),
        "part_path": str(part.absolute()),
        "shapes": dict(request.shapes),
        "expected_dtypes": dict(request.expected_dtypes),
        "workspace_mib": request.workspace_mib,
        "plugin_modules": request.plugin_modules,
        "event_fd": event_fd,
        "parent_pid": os.getpid(),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def _read_events(child: subprocess.Popen[bytes], events: BinaryIO, deadline: float) -> Iterator[dict[str, Any]]:
    """Events until the child ends, closes the pipe, or the time is over."""
    buffer = b""
    while (left := deadline - time.monotonic()) > 0:
        ended = child.poll() is not None
        # What a dead child has written is there already; who else holds the pipe is not waited for.
        ready, _, _ = select.select([events], [], [], 0 if ended else min(left, _POLL_S))
        if not ready:
            if ended:
                return
            continue
        read = os.read(events.fileno(), _PIPE_BYTES)
        if not read:
            return
        # A child that is killed while it writes leaves a last line without its end.
        *lines, buffer = (buffer + read).split(b"\n")
        yield from map(json.loads, lines)


def _kept_log(request: EngineRequest) -> str:
    """The line of a message that says where the log is; it is copied out of what is removed."""
    if request.failed_log is None:
        return f"log: {request.log_path}"
    try:
        write_whole(request.failed_log, request.log_path.read_bytes())
    except (OSError, DexportError) as error:
        return f"its log could not be kept: {error}"
    return f"log: {request.failed_log}"


def _worker_error(event: Mapping[str, Any], request: EngineRequest) -> DexportError:
    parts = [event["message"]]
    if event["kind"] == "machine":
        parts += [f"  {line}" for line in _last_lines(request.log_path, only_errors=True)]
    parts.append(_kept_log(request))
    return _ERROR_CLASSES[event["kind"]]("\n".join(parts), hint=event["hint"])


def _late_error(seconds: float, request: EngineRequest) -> MachineError:
    return MachineError(
        f"the {request.choice.flavour} builder did not come to an end in {seconds:g} s and was stopped\n"
        f"{_kept_log(request)}",
        hint=f"give it more time with {TIMEOUT_VARIABLE}, in seconds; building without --trt keeps the ONNX file",
    )


def _death_error(status: int, request: EngineRequest) -> MachineError:
    tail = "\n".join(f"  {line}" for line in _last_lines(request.log_path))
    return MachineError(
        f"the {request.choice.flavour} builder died: {_describe_status(status)}\n"
        f"its last words:\n{tail or '  (none)'}\n{_kept_log(request)}",
        hint=_death_hint(status),
    )


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _death_hint(status: int) -> str:
    if status == -signal.SIGKILL:
        return "out of memory is the usual cause: free some, or build on a larger machine"
    return "read the log; the ONNX file is unharmed, and building without --trt keeps it"


def _last_lines(log_path: Path, only_errors: bool = False) -> list[str]:
    """The end of the log; with ``only_errors`` the last lines that TensorRT marked as errors."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - 65536))
            text = log.read().decode(errors="replace")
    except OSError as error:
        return [f"(the log cannot be read: {error})"]
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if only_errors:
        lines = [line for line in lines if line.startswith("[E]")]
    return [line[:_LOG_LINE_WIDTH] for line in lines[-_LOG_LINES:]]


def _report(request: EngineRequest, result: Mapping[str, Any]) -> EngineReport:
    return EngineReport(
        flavour=request.choice.flavour,
        version=result["version"],
        targets=request.choice.targets,
        plan_bytes=result["plan_bytes"],
        sha256=result["sha256"],
        seconds_parse=result["seconds_parse"],
        seconds_build=result["seconds_build"],
        peak_rss_bytes=result["peak_rss_bytes"],
        layers=result["layers"],
        dtype_census=result["dtype_census"],
        checked_nodes=len(request.expected_dtypes),
        fingerprint=_fingerprint(request, result),
        inputs=_tensors(result["inputs"]),
        outputs=_tensors(result["outputs"]),
    )


def _fingerprint(request: EngineRequest, result: Mapping[str, Any]) -> dict[str, Any]:
    # A tensorrt engine is bound to the GPU it was built on; tensorrt-rtx compiles for the GPU when it loads.
    gpus = machine.visible_gpus() if request.choice.flavour == "tensorrt" else ()
    return {
        "flavour": request.choice.flavour,
        "version": result["version"],
        "targets": list(request.choice.targets),
        "runtime_platform": result["runtime_platform"],
        "hardware_compatibility": result["hardware_compatibility"],
        "shapes": {name: [list(shape) for shape in shapes] for name, shapes in request.shapes.items()},
        "gpu": asdict(gpus[0]) if gpus else None,
    }


def _tensors(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)
