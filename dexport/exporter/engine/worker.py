"""TensorRT engines, the child's side: ``python -m dexport.exporter.engine.worker SPEC.json``.

Parses an ONNX file, asserts the dtypes of the network, builds it and streams the plan to a ``.part`` file. It
reports over the pipe ``event_fd`` of its spec, one JSON object per line: ``progress`` events, then either
``result`` or ``error``. Standard output and error belong to the libraries; the parent keeps them as the log.

Both flavours go through Polygraphy. ``tensorrt-rtx`` 1.7 is what this file has been run with. The
``tensorrt`` path (10.13 and later) is written from its documentation and HAS NOT BEEN EXECUTED: it needs
a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from dexport.errors import DexportError, GateError, InputError, MachineError, UsageError
from dexport.exporter.engine.mapped_weights import MappedWeights
from dexport.exporter.steps import peak_rss_bytes
from dexport.optional import optional_import

_DTYPES = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16"}
_COMPUTE_LAYERS = (
    "CONVOLUTION",
    "DECONVOLUTION",
    "MATRIX_MULTIPLY",
    "EINSUM",
    "ATTENTION_INPUT",
    "ATTENTION_OUTPUT",
    "FULLY_CONNECTED",
)
_KINDS = {GateError: "gate", UsageError: "usage", InputError: "input", MachineError: "machine"}
_MAX_NAMED = 5
_PROGRESS_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Layer:
    """A layer of the parsed network.

    Attributes:
        nodes: ONNX nodes it stems from: the node itself, then the function calls around it, innermost first.
        dtype: of its first output.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    dtype: str


class EventPipe:
    """Writes JSON lines to the parent. Thread-safe: TensorRT reports progress from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        """Send one event. Raises OSError when the parent no longer reads."""
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[self._file.write(line) :]


class PlanFile:
    """The plan on its way to disk, hashed as it is written.

    :meth:`write` never raises, because TensorRT calls it from C++; and TensorRT-RTX 1.7 reports success even
    when a write came up short, so :meth:`close` must be called to learn of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)

    def write(self, data: Any) -> int:
        """Write all of a bytes-like ``data``; returns how many bytes were written."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self.error = error
        self._digest.update(view[:written])
        self.size += written
        return written

    def close(self) -> str:
        """Flush to disk and return the sha256 in hexadecimal.

        Errors:
            MachineError: a write failed: disk full, quota, vanished folder.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = self.error or error
        self._file.close()
        if self.error:
            free_mib = shutil.disk_usage(self.path.parent).free >> 20
            raise MachineError(
                f"the plan cannot be written to {self.path.parent} after {self.size >> 20} MiB: "
                f"{self.error.strerror}; {free_mib} MiB are free there",
                hint="free some space or choose another output folder",
            )
        return self._digest.hexdigest()


def main(arguments: list[str]) -> int:
    """Run one build; returns the exit status."""
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    die_with_parent(spec["parent_pid"])
    pipe = EventPipe(spec["event_fd"])
    try:
        result = _build(spec, pipe)
    except DexportError as error:
        pipe.send("error", kind=_KINDS[type(error)], message=str(error), hint=error.hint)
        return 1
    pipe.send("result", **result)
    return 0


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent dies, even by SIGKILL. Does nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call above.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def dtype_problems(layers: list[Layer], expected: Mapping[str, str]) -> list[str]:
    """Compare the network with what was asked for; one sentence per ONNX node that differs or is missing."""
    own: dict[str, list[Layer]] = {}
    called: dict[str, list[Layer]] = {}
    for layer in layers:
        for depth, node in enumerate(layer.nodes):
            (called if depth else own).setdefault(node, []).append(layer)
    problems = []
    for node, dtype in expected.items():
        compute = [layer for layer in own.get(node, []) if layer.kind in _COMPUTE_LAYERS]
        # Without compute layers (a norm, a function call) only what comes out at the end was asked for.
        decisive = compute or (own.get(node) or called.get(node) or [])[-1:]
        if not decisive:
            problems.append(f"{node}: expected {dtype}, but no layer of the network stems from it")
        wrong = [layer for layer in decisive if layer.dtype != dtype]
        if wrong:
            found = ", ".join(sorted({f"{layer.dtype} ({layer.kind.lower()})" for layer in wrong}))
            problems.append(f"{node}: expected {dtype}, found {found}")
    return problems


def node_names(name: str, metadata: str) -> tuple[str, ...]:
    """ONNX nodes that a layer stems from.

    The parser writes ``[ONNX Layer: node]`` into the metadata, ``[ONNX Layer: node | call (Op) | ...]`` in a
    function body, and nothing for helper layers. An attention's input layer has no metadata, only a name. A
    node without a name is called ``node_of_<its first output>``.
    """
    found = re.fullmatch(r"\[ONNX Layer: (.*)\]", metadata, re.DOTALL)
    if not found:
        suffix = "_AttentionInput"
        return (name.removesuffix(suffix),) if name.endswith(suffix) else ()
    inner, *calls = found.group(1).split(" | ")
    return (inner, *(re.sub(r" \([^()]*\)$", "", call) for call in calls))


def _build(spec: Mapping[str, Any], pipe: EventPipe) -> dict[str, Any]:
    rtx = spec["flavour"] == "tensorrt-rtx"
    trt = optional_import("tensorrt_rtx" if rtx else "tensorrt")
    _quiet_polygraphy()
    if not rtx:
        for module in spec["plugin_modules"]:
            importlib.import_module(module)
    pipe.send("progress", phase="Parsing ONNX", step=0, steps=1)
    started = time.monotonic()
    # The parser owns memory that the network points to: it must live until the build is done.
    builder, network, parser, weights = _parse(trt, spec)
    parsed = time.monotonic()
    pipe.send("progress", phase="Parsing ONNX", step=1, steps=1)
    layers = _layers(network)
    _assert_types(trt, network, layers, spec["expected_dtypes"])
    _allow_decomposed_attention(trt, builder, network)
    config = _configure(trt, builder, network, spec, _progress_monitor(trt, pipe))
    with weights.dropping():
        plan, digest = _write_plan(trt, builder, network, config, Path(spec["part_path"]))
    built = time.monotonic()
    del parser
    return {
        "version": trt.__version__,
        "plan_bytes": plan.size,
        "sha256": digest,
        "seconds_parse": parsed - started,
        "seconds_build": built - parsed,
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": len(layers),
        "dtype_census": _census(layers),
        "runtime_platform": config.runtime_platform.name,
        # RTX has no such setting, and complains when it is read.
        "hardware_compatibility": None if rtx else config.hardware_compatibility_level.name,
        "inputs": _describe_tensors(network.get_input, network.num_inputs),
        "outputs": _describe_tensors(network.get_output, network.num_outputs),
    }


def _quiet_polygraphy() -> None:
    from polygraphy.logger import G_LOGGER

    # TensorRT's own INFO messages appear at this level; the one below fills the log with every tensor.
    G_LOGGER.module_severity = G_LOGGER.VERBOSE


def _parse(trt: Any, spec: Mapping[str, Any]) -> tuple[Any, Any, Any, MappedWeights]:
    """Read the ONNX file into a strongly typed network, which points to the weights in the files beside it."""
    from polygraphy.backend.trt import CreateNetwork, get_trt_logger

    path = Path(spec["onnx_path"])
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network = CreateNetwork(strongly_typed=typed)()
    trt.init_libnvinfer_plugins(get_trt_logger(), "")
    # Polygraphy's NetworkFromOnnxPath would do, but its error does not say what is wrong.
    parser = trt.OnnxParser(network, get_trt_logger())
    serialized = path.read_bytes()
    weights = MappedWeights(path.parent)
    parsed = False
    with contextlib.suppress(DecodeError):
        model = onnx.load_model_from_string(serialized)
        if parser.load_model_proto(serialized, str(path)):
            weights.load_into(parser, model)
            parsed = parser.parse_model_proto()
    # Bytes that happen to be valid protobuf parse as a model without a graph.
    if not parsed or parser.num_errors or not network.num_layers:
        raise InputError(
            f"{spec['flavour']} cannot parse {path}:\n{_parser_errors(parser)}",
            hint="is it an ONNX model, with its external data beside it, of operators that TensorRT has?",
        )
    return builder, network, parser, weights


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return "  it does not look like an ONNX model"
    return "\n".join(f"  {error.node_name() or 'model'}: {error.desc()}" for error in errors[:_MAX_NAMED])


def _layers(network: Any) -> list[Layer]:
    return [_layer(network.get_layer(index)) for index in range(network.num_layers)]


def _layer(layer: Any) -> Layer:
    output = layer.get_output(0) if layer.num_outputs else None
    dtype = _dtype(output) if output else "none"
    return Layer(layer.name, layer.type.name, node_names(layer.name, layer.metadata), dtype)


def _dtype(tensor: Any) -> str:
    name = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


def _census(layers: list[Layer]) -> dict[str, dict[str, int]]:
    census: dict[str, Counter[str]] = {}
    for layer in layers:
        census.setdefault(layer.kind, Counter())[layer.dtype] += 1
    return {kind: dict(counts) for kind, counts in sorted(census.items())}


def _assert_types(trt: Any, network: Any, layers: list[Layer], expected: Mapping[str, str]) -> None:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is not None and not network.get_flag(flag):
        raise GateError("the network is not strongly typed, so TensorRT would choose the precisions itself")
    problems = dtype_problems(layers, expected)
    if problems:
        more = len(problems) - _MAX_NAMED
        named = "\n".join(f"  {problem}" for problem in problems[:_MAX_NAMED])
        raise GateError(
            f"{len(problems)} of {len(expected)} nodes do not have the precision that was asked for:\n{named}"
            + (f"\n  and {more} more" if more > 0 else ""),
            hint="the graph's casts decide the precision: convert the ONNX file again",
        )


def _allow_decomposed_attention(trt: Any, builder: Any, network: Any) -> None:
    """Let attention fall back to plain kernels where no fused one exists.

    Without it RTX 1.7 refuses float32 attention and head sizes below 16. Fused kernels are still taken where
    they exist. Older TensorRT has no attention layers and decomposes by itself.
    """
    if hasattr(trt.LayerType, "ATTENTION_INPUT") and hasattr(trt, "IAttentionInputLayer"):
        from polygraphy.backend.trt import SetDecomposableAttentions

        SetDecomposableAttentions((builder, network))()


def _configure(trt: Any, builder: Any, network: Any, spec: Mapping[str, Any], monitor: Any) -> Any:
    _check_shapes(network, spec["shapes"])
    options: dict[str, Any] = {"profiles": [_profile(spec["shapes"])], "progress_monitor": monitor}
    if spec["workspace_mib"]:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: spec["workspace_mib"] << 20}
    if spec["flavour"] == "tensorrt-rtx":
        config = _configure_rtx(trt, builder, network, spec["targets"], options)
    else:
        from polygraphy.backend.trt import CreateConfig

        config = CreateConfig(**options)(builder, network)
    # On by default on RTX: float32 products would lose 13 bits of mantissa, and the islands need them.
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _configure_rtx(trt: Any, builder: Any, network: Any, targets: list[str], options: dict[str, Any]) -> Any:
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    unknown = [target for target in targets if not hasattr(trt.ComputeCapability, target.upper())]
    if unknown:
        raise UsageError(f"TensorRT-RTX {trt.__version__} does not target {', '.join(unknown)}")
    capabilities = [(int(target[2:-1]), int(target[-1])) for target in targets]
    config = CreateConfigRTX(compute_capabilities=capabilities, **options)(builder, network)
    # Polygraphy attaches an empty timing cache. It means nothing on RTX, and reading it asks for a GPU.
    config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)
    return config


def _profile(shapes: Mapping[str, Any]) -> Any:
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, (low, best, high) in shapes.items():
        profile.add(name, tuple(low), tuple(best), tuple(high))
    return profile


def _check_shapes(network: Any, shapes: Mapping[str, Any]) -> None:
    inputs = {tensor.name: tuple(tensor.shape) for tensor in _tensors(network.get_input, network.num_inputs)}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise UsageError(f"no input is called {', '.join(unknown)}; the inputs are {', '.join(inputs)}")
    for name, shape in inputs.items():
        if name not in shapes:
            if -1 in shape:
                raise UsageError(f"input {name} has the dynamic shape {shape} and needs min, opt and max shapes")
            continue
        for wanted in shapes[name]:
            fits = len(wanted) == len(shape) and all(dim in (-1, size) for dim, size in zip(shape, wanted, strict=True))
            if not fits:
                raise UsageError(f"input {name} has the shape {shape}; {tuple(wanted)} does not fit it")
        low, best, high = shapes[name]
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise UsageError(f"input {name}: min {low}, opt {best} and max {high} are out of order")


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> tuple[PlanFile, str]:
    """Build, and stream the plan to ``path``; returns the file and its sha256."""
    try:
        plan = PlanFile(path)
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}") from error
    if hasattr(builder, "build_serialized_network_to_stream") and hasattr(trt, "IStreamWriter"):
        built = builder.build_serialized_network_to_stream(network, config, _stream_writer(trt, plan))
    else:
        memory = builder.build_serialized_network(network, config)
        built = memory is not None and plan.write(memory) > 0
    digest = plan.close()
    if not built or plan.size == 0:
        raise MachineError(
            "TensorRT could not build the network:",
            hint="try one --target at a time; building without --trt keeps the ONNX file",
        )
    return plan, digest


def _stream_writer(trt: Any, plan: PlanFile) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return plan.write(data)

    return Writer()


def _progress_monitor(trt: Any, pipe: EventPipe) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Forwards phases and steps, at most one step per phase and interval. Called from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._sent: dict[str, float] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            self._send(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._send(phase_name, self._steps.get(phase_name, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._sent.get(phase_name, 0.0) >= _PROGRESS_INTERVAL_S:
                self._send(phase_name, step + 1)
            return True

        def _send(self, phase: str, step: int) -> None:
            self._sent[phase] = time.monotonic()
            try:
                pipe.send("progress", phase=phase, step=step, steps=self._steps.get(phase, 1))
            except OSError:
                # An exception may not cross into C++. Nobody reads any more: the parent is gone.
                os._exit(1)

    return Monitor()


def _tensors(get: Any, count: int) -> Iterator[Any]:
    return (get(index) for index in range(count))


def _describe_tensors(get: Any, count: int) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "dtype": _dtype(tensor), "shape": list(tensor.shape)} for tensor in _tensors(get, count)
    ]


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the native libraries' teardown: a crash in there would spoil a finished plan.
    os._exit(exit_status)
