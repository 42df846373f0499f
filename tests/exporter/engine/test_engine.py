"""Engines: refusals before work, the dtype assertion, and a child that may die in any way."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from dexport.errors import GateError, InputError, MachineError, UsageError
from dexport.exporter import machine
from dexport.exporter.engine import process
from dexport.exporter.engine.choice import DEFAULT_RTX_TARGETS, EngineChoice, choose_engine, parse_targets
from dexport.exporter.engine.process import EngineRequest, build_engine
from dexport.exporter.engine.worker import Layer, PlanFile, dtype_problems, node_names
from dexport.exporter.machine import Gpu
from dexport.exporter.network_build import _beside

ADA = Gpu("NVIDIA RTX 4090", "sm89", 24 << 30, "580.65.06")
HOPPER = Gpu("NVIDIA H100", "sm90", 80 << 30, "580.65.06")
WIDTH = 32
SHAPES = {"x": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))}
ALL_HALF = {
    "stem.conv": "float16",
    "norm": "float16",
    "attn.qkv": "float16",
    "attn.sdpa": "float16",
    "act": "float16",
    "head": "float16",
    "to_float": "float32",
}

rtx = pytest.mark.rtx


@pytest.fixture(autouse=True)
def _needs_rtx(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("rtx") and not importlib.util.find_spec("tensorrt_rtx"):
        pytest.skip("tensorrt-rtx is not installed (extra [rtx])")


def tiny_model(dtype: str = "float16", heads: int = 2, **attention: Any) -> onnx.ModelProto:
    """Convolution, LayerNormalization, MatMul, Attention, Gelu, MatMul over x (B,4,8,8) float32."""
    random = np.random.default_rng(0)
    inner = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) * 0.1).astype(dtype), name)

    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["inner"], "to_inner", to=inner),
        node("Conv", ["inner", "wc", "bc"], ["c"], "stem.conv", kernel_shape=[3, 3], pads=[1] * 4),
        node("Reshape", ["c", "rows"], ["r"], "reshape"),
        node("Transpose", ["r"], ["t"], "transpose", perm=[0, 2, 1]),
        node("LayerNormalization", ["t", "wn", "bn"], ["n"], "norm", axis=-1),
        node("MatMul", ["n", "wq"], ["qkv"], "attn.qkv"),
        node("Split", ["qkv"], ["q", "k", "v"], "split", axis=-1, num_outputs=3),
        node(
            "Attention",
            ["q", "k", "v"],
            ["a"],
            "attn.sdpa",
            q_num_heads=heads,
            kv_num_heads=heads,
            **attention,
        ),
        node("Gelu", ["a"], ["g"], "act", approximate="tanh"),
        node("MatMul", ["g", "wh"], ["h"], "head"),
        node("Cast", ["h"], ["out"], "to_float", to=TensorProto.FLOAT),
    ]
    weights = [
        weight("wc", WIDTH, 4, 3, 3),
        weight("bc", WIDTH),
        weight("wn", WIDTH),
        weight("bn", WIDTH),
        weight("wq", WIDTH, 3 * WIDTH),
        weight("wh", WIDTH, 16),
        numpy_helper.from_array(np.array([0, WIDTH, -1]), "rows"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", 64, 16])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., EngineRequest]:
    """Request for the tiny model; keyword arguments replace fields."""

    def make(
        model: onnx.ModelProto | None = None, targets: tuple[str, ...] = ("sm89",), **fields: Any
    ) -> EngineRequest:
        path = tmp_path / "model.onnx"
        onnx.save(
            model or tiny_model(),
            path,
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=0,
        )
        request = EngineRequest(
            onnx_path=path,
            plan_path=tmp_path / "engines" / "rtx.plan",
            choice=EngineChoice("tensorrt-rtx", targets, "test", ""),
            shapes=SHAPES,
            expected_dtypes={},
            workspace_mib=None,
            log_path=tmp_path / "logs" / "build.log",
        )
        return dataclasses.replace(request, **fields)

    return make


def no_plan_but_log(request: EngineRequest) -> bool:
    return not list(request.plan_path.parent.iterdir()) and request.log_path.is_file()


@rtx
@pytest.mark.parametrize("targets", [("sm89",), ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")])
def test_half_precision_build(make_request: Callable[..., EngineRequest], targets: tuple[str, ...]) -> None:
    request = make_request(targets=targets, expected_dtypes=ALL_HALF, workspace_mib=1024)
    phases: list[tuple[str, int, int]] = []
    report = build_engine(request, lambda *progress: phases.append(progress))
    data = request.plan_path.read_bytes()
    assert report.plan_bytes == len(data) > 0
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert [file.name for file in request.plan_path.parent.iterdir()] == ["rtx.plan"]
    assert report.dtype_census["CONVOLUTION"] == {"float16": 1}
    assert report.dtype_census["MATRIX_MULTIPLY"] == {"float16": 2}
    assert report.checked_nodes == len(ALL_HALF)
    assert report.peak_rss_bytes > 50 << 20
    assert report.seconds_build > 0
    assert report.inputs[0].shape == (-1, 4, 8, 8)
    assert report.fingerprint["targets"] == list(targets)
    assert phases[0] == ("Parsing ONNX", 0, 1)
    assert any(phase == "Building engine" and step == steps for phase, step, steps in phases)
    assert "Engine generation completed" in request.log_path.read_text()
    assert json.loads(json.dumps(dataclasses.asdict(report)))["flavour"] == "tensorrt-rtx"


@rtx
def test_float32_attention_and_small_heads_build(make_request: Callable[..., EngineRequest]) -> None:
    # Neither has a fused kernel on RTX 1.7: this holds only because attention may be decomposed.
    request = make_request(tiny_model("float32", heads=8), expected_dtypes={"attn.sdpa": "float32"})
    assert build_engine(request).plan_bytes > 0


@rtx
def test_wrong_expectation_stops_before_building(make_request: Callable[..., EngineRequest]) -> None:
    request = make_request(
        expected_dtypes={**ALL_HALF, "attn.qkv": "float32", "attn.sdpa": "bfloat16", "gone": "float16"}
    )
    phases: list[str] = []
    with pytest.raises(GateError, match="3 of 8 nodes") as caught:
        build_engine(request, lambda phase, *_: phases.append(phase))
    message = str(caught.value)
    assert "attn.qkv: expected float32, found float16 (matrix_multiply)" in message
    assert "attn.sdpa: expected bfloat16, found float16 (attention_input)" in message
    assert "gone: expected float16, but no layer" in message
    assert str(request.log_path) in message
    assert set(phases) == {"Parsing ONNX"}
    assert no_plan_but_log(request)


@rtx
def test_unsupported_attribute_is_named(make_request: Callable[..., EngineRequest]) -> None:
    request = make_request(tiny_model(softmax_precision=TensorProto.FLOAT))
    with pytest.raises(InputError, match=r"attn\.sdpa: .*softmax precision is not supported"):
        build_engine(request)
    assert no_plan_but_log(request)


@rtx
@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(range(256))])
def test_unparsable_onnx(make_request: Callable[..., EngineRequest], content: bytes) -> None:
    request = make_request()
    request.onnx_path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot parse .*model\.onnx"):
        build_engine(request)
    assert no_plan_but_log(request)


@rtx
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "input x has the dynamic shape"),
        ({**SHAPES, "y": ((1,), (1,), (1,))}, "no input is called y"),
        ({"x": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 9, 9))}, "does not fit"),
        ({"x": ((3, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))}, "out of order"),
    ],
)
def test_shapes_must_fit(make_request: Callable[..., EngineRequest], shapes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(make_request(shapes=shapes))


@rtx
def test_builder_failure_carries_its_own_words(make_request: Callable[..., EngineRequest]) -> None:
    model = tiny_model()
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.name == "to_inner" and attribute.name == "to":
                attribute.i = TensorProto.BFLOAT16
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(helper.make_tensor(weight.name, TensorProto.BFLOAT16, values.shape, values.flatten()))
    request = make_request(model, targets=("sm75",))
    with pytest.raises(MachineError, match=r"could not build the network:\n  \[E\]"):
        build_engine(request)
    assert no_plan_but_log(request)


@rtx
def test_child_killed_in_the_middle(make_request: Callable[..., EngineRequest]) -> None:
    request = make_request()

    def kill_child(phase: str, step: int, steps: int) -> None:  # noqa: ARG001
        if phase == "Building engine":
            for child in psutil.Process().children():
                child.kill()

    with pytest.raises(MachineError, match="killed by SIGKILL") as caught:
        build_engine(request, kill_child)
    assert str(request.log_path) in str(caught.value)
    assert "memory" in caught.value.hint
    assert no_plan_but_log(request)


@rtx
def test_failed_build_keeps_the_plan_of_before(make_request: Callable[..., EngineRequest]) -> None:
    request = make_request()
    build_engine(request)
    before = request.plan_path.read_bytes()
    request.onnx_path.write_bytes(b"")
    with pytest.raises(InputError):
        build_engine(request)
    assert request.plan_path.read_bytes() == before


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run this Python code in place of the worker; its first argument is the spec."""
    monkeypatch.setattr(process, "_worker_command", lambda spec: [sys.executable, "-c", code, str(spec)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; print('last word', flush=True); os.abort()", "killed by SIGABRT"),
        ("import ctypes; print('last word', flush=True); ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import sys; print('last word'); sys.exit(7)", "exit status 7"),
        ("print('last word')", "exit status 0"),
    ],
)
def test_child_crash(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    stand_in(monkeypatch, code)
    request = make_request()
    with pytest.raises(MachineError, match=message) as caught:
        build_engine(request)
    assert "last word" in str(caught.value)
    assert no_plan_but_log(request)


def test_torn_event_and_partial_plan_are_dropped(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "import json, os, pathlib, signal, sys\n"
        "spec = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "pathlib.Path(spec['part_path']).write_bytes(b'half a plan')\n"
        'os.write(spec["event_fd"], b\'{"event": "res\')\n'
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    request = make_request()
    with pytest.raises(MachineError, match="killed by SIGKILL"):
        build_engine(request)
    assert no_plan_but_log(request)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_exception_in_the_parent_kills_the_child(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    stand_in(
        monkeypatch,
        "import json, os, pathlib, sys, time\n"
        "spec = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        'os.write(spec["event_fd"], b\'{"event": "progress", "phase": "p", "step": 0, "steps": 1}\\n\')\n'
        "time.sleep(60)",
    )

    def interrupt(*_: object) -> None:
        raise error

    request = make_request()
    with pytest.raises(error):
        build_engine(request, interrupt)
    assert not psutil.Process().children()
    assert no_plan_but_log(request)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux")
def test_child_dies_with_a_killed_parent() -> None:
    child_code = (
        "import os, time; from dexport.exporter.engine.worker import die_with_parent;"
        "die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent_code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    # A container without an init never reaps it, so a zombie counts as dead.
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_events_do_not_mix_with_prints(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "import json, os, pathlib, sys\n"
        "spec = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        'print(\'{"event": "result"}\', flush=True)\n'
        'event = {"event": "error", "kind": "input", "message": "no good", "hint": "fix it"}\n'
        "os.write(spec['event_fd'], json.dumps(event).encode() + b'\\n')\n"
        "print(os.environ['POLYGRAPHY_USE_TENSORRT_RTX'])\n"
        "sys.exit(1)",
    )
    request = make_request()
    with pytest.raises(InputError, match="no good") as caught:
        build_engine(request)
    assert caught.value.hint == "fix it"
    assert request.log_path.read_text().splitlines()[-1] == "1"


HANGING = {
    "silent": "import time; time.sleep(60)",
    "talking": (
        "import json, os, pathlib, sys, time\n"
        "spec = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "while True:\n"
        '    os.write(spec["event_fd"], b\'{"event": "progress", "phase": "p", "step": 0, "steps": 1}\\n\')\n'
        "    time.sleep(0.01)"
    ),
    "with the pipe closed": (
        "import json, os, pathlib, sys, time\n"
        "os.close(json.loads(pathlib.Path(sys.argv[1]).read_text())['event_fd'])\n"
        "time.sleep(60)"
    ),
    "with children": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "in half a line": (
        "import json, os, pathlib, sys, time\n"
        "os.write(json.loads(pathlib.Path(sys.argv[1]).read_text())['event_fd'], b'{')\n"
        "time.sleep(60)"
    ),
}


@pytest.mark.parametrize("way", HANGING)
def test_a_child_that_does_not_end_is_stopped(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    stand_in(monkeypatch, HANGING[way])
    monkeypatch.setenv("DEXPORT_ENGINE_TIMEOUT", "1.5")
    request, started = make_request(), time.monotonic()
    with pytest.raises(MachineError, match=r"did not come to an end in 1\.5 s and was stopped") as caught:
        build_engine(request)
    assert time.monotonic() - started < 20
    assert "DEXPORT_ENGINE_TIMEOUT" in caught.value.hint
    assert not psutil.Process().children(recursive=True)
    assert no_plan_but_log(request)


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "import json, os, pathlib, subprocess, sys\n"
        "pipe = json.loads(pathlib.Path(sys.argv[1]).read_text())['event_fd']\n"
        "code = 'import time; time.sleep(20)'\n"
        "subprocess.Popen([sys.executable, '-c', code], pass_fds=(pipe,))\n"
        'os.write(pipe, b\'{"event": "error", "kind": "input", "message": "no good", "hint": ""}\\n\')\n'
        "os._exit(1)",
    )
    started = time.monotonic()
    with pytest.raises(InputError, match="no good"):
        build_engine(make_request())
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_time_limits_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEXPORT_ENGINE_TIMEOUT", text)
    with pytest.raises(UsageError, match=f"DEXPORT_ENGINE_TIMEOUT={text} is not a positive number"):
        process.time_limit()


def test_a_failed_build_keeps_a_copy_of_its_log(
    make_request: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, "print('last word'); raise SystemExit(7)")
    request = make_request(failed_log=tmp_path / "out.engine-0123abcd.log")
    with pytest.raises(MachineError, match=r"log: .*/out\.engine-0123abcd\.log"):
        build_engine(request)
    assert request.failed_log is not None
    assert request.failed_log.read_text() == "last word\n"
    request = make_request(failed_log=tmp_path)
    with pytest.raises(MachineError, match=r"(?s)last word.*its log could not be kept"):
        build_engine(request)


def test_logs_of_failures_do_not_meet_and_outlive_drafts(tmp_path: Path) -> None:
    output = tmp_path / ".out.partial-0123abcd" / "networks" / "decoder"
    names = {_beside(output) for _ in range(10)}
    assert len(names) == 10
    assert {path.parent for path in names} == {tmp_path}
    assert all(path.name.startswith("decoder.engine-") for path in names)


def test_unwritable_log_is_an_error_of_this_machine(make_request: Callable[..., EngineRequest]) -> None:
    request = make_request()
    request.log_path.mkdir(parents=True)
    with pytest.raises(MachineError, match=r"log .* cannot be written"):
        build_engine(request)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan.part"
    path.symlink_to("/dev/full")
    plan = PlanFile(path)
    assert plan.write(b"data") == 0
    with pytest.raises(MachineError, match="No space left on device") as caught:
        plan.close()
    assert "free some space" in caught.value.hint


def test_plan_file_hashes_what_it_writes(tmp_path: Path) -> None:
    plan = PlanFile(tmp_path / "engine.plan.part")
    assert [plan.write(b"ab"), plan.write(memoryview(b"cd"))] == [2, 2]
    assert plan.close() == hashlib.sha256(b"abcd").hexdigest()
    assert plan.size == 4


def test_layer_names_lead_to_nodes() -> None:
    assert node_names("qkv_2", "[ONNX Layer: qkv]") == ("qkv",)
    assert node_names("mm_9", "[ONNX Layer: mm | blocks.2.foo (DexFoo)]") == ("mm", "blocks.2.foo")
    assert node_names("sdpa_AttentionInput", "") == ("sdpa",)
    assert node_names("ONNXTRT_Broadcast", "") == ()


def test_dtype_rule() -> None:
    layers = [
        Layer("fc", "MATRIX_MULTIPLY", ("fc",), "float16"),
        Layer("fc_1", "ELEMENTWISE", ("fc",), "float32"),
        Layer("rms", "ELEMENTWISE", ("rms",), "float32"),
        Layer("rms_1", "ELEMENTWISE", ("rms",), "float16"),
        Layer("mm", "MATRIX_MULTIPLY", ("mm", "call"), "float32"),
        Layer("cast", "CAST", ("cast", "call"), "float16"),
    ]
    # Compute layers decide for fc; what comes out at the end decides for rms and for the function call.
    assert dtype_problems(layers, {"fc": "float16", "rms": "float16", "call": "float16", "mm": "float32"}) == []
    assert dtype_problems(layers, {"fc": "float32"}) == ["fc: expected float32, found float16 (matrix_multiply)"]
    assert dtype_problems(layers, {"no": "float32"})[0].startswith("no: expected float32, but no layer")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend which GPUs and importable modules there are."""

    def pretend(gpus: tuple[Gpu, ...] = (), modules: tuple[str, ...] = ("polygraphy", "tensorrt_rtx")) -> None:
        monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)

    return pretend


EVERYTHING = ("polygraphy", "tensorrt_rtx", "tensorrt")


def test_auto_without_gpu_is_rtx(world: Any) -> None:
    world()
    choice = choose_engine(default_targets=("sm89",))
    assert (choice.flavour, choice.targets) == ("tensorrt-rtx", ("sm89",))
    assert choice.reason == "no GPU on this machine, so tensorrt-rtx, which builds without one"
    assert choose_engine().targets == DEFAULT_RTX_TARGETS
    assert choose_engine(targets=["8.6", "SM_120", "86"]).targets == ("sm86", "sm120")


def test_auto_with_gpu(world: Any) -> None:
    world((HOPPER,), EVERYTHING)
    choice = choose_engine(default_targets=("sm89",))
    assert (choice.flavour, choice.targets) == ("tensorrt", ("sm90",))
    assert "NVIDIA H100" in choice.reason
    cross = choose_engine(targets=["sm89"])
    assert (cross.flavour, cross.targets) == ("tensorrt-rtx", ("sm89",))
    assert "only builds for the sm90" in cross.reason


def test_auto_with_gpu_and_no_tensorrt(world: Any) -> None:
    world((ADA,))
    choice = choose_engine(default_targets=("sm120",))
    assert (choice.flavour, choice.targets) == ("tensorrt-rtx", ("sm89",))
    assert "not installed" in choice.reason
    world((HOPPER,))
    with pytest.raises(MachineError, match=r"does not target SM 9\.0") as caught:
        choose_engine()
    assert "dexport[gpu]" in caught.value.hint


@pytest.mark.parametrize("target", ["sm90", "10.0", "sm103"])
def test_datacenter_targets_are_refused_on_rtx(world: Any, target: str) -> None:
    world()
    for flavour in ("auto", "tensorrt-rtx"):
        with pytest.raises(UsageError, match="TensorRT-RTX does not target SM ") as caught:
            choose_engine(flavour, [target])
        assert "--engine tensorrt on a machine with such a GPU" in caught.value.hint


@pytest.mark.parametrize("target", ["foo", "", "sm", "sm8", "sm8999", "9.10"])
def test_malformed_target(world: Any, target: str) -> None:
    world()
    with pytest.raises(UsageError, match="is not a compute capability"):
        choose_engine("auto", [target])


def test_targets_are_normalised() -> None:
    assert parse_targets(["sm89", "8.9", "89", "SM_75", "120", "12.1"]) == ("sm89", "sm75", "sm120", "sm121")


def test_unknown_flavour() -> None:
    with pytest.raises(UsageError, match="there is no engine 'trt'"):
        choose_engine("trt")


def test_tensorrt_needs_a_gpu(world: Any) -> None:
    world((), EVERYTHING)
    with pytest.raises(MachineError, match="needs a GPU to build") as caught:
        choose_engine("tensorrt")
    assert "--engine tensorrt-rtx" in caught.value.hint


def test_tensorrt_builds_only_for_the_gpu_here(world: Any) -> None:
    world((HOPPER,), EVERYTHING)
    with pytest.raises(UsageError, match=r"NVIDIA H100 \(sm90\), not for sm89"):
        choose_engine("tensorrt", ["sm89"])
    assert choose_engine("tensorrt", ["sm90"]).targets == ("sm90",)


@pytest.mark.parametrize(
    ("flavour", "modules", "missing", "extra"),
    [
        ("tensorrt-rtx", (), "tensorrt_rtx and polygraphy", "rtx"),
        ("tensorrt-rtx", ("polygraphy",), "tensorrt_rtx", "rtx"),
        ("tensorrt", ("polygraphy",), "tensorrt", "gpu"),
    ],
)
def test_missing_package_names_its_extra(
    world: Any, flavour: str, modules: tuple[str, ...], missing: str, extra: str
) -> None:
    world((ADA,), modules)
    with pytest.raises(MachineError, match=f"^{missing} must be installed") as caught:
        choose_engine(flavour)
    assert caught.value.hint == f"pip install 'dexport[{extra}]'"


def test_parent_never_imports_tensorrt() -> None:
    code = (
        "import sys; import dexport.exporter.engine.process; from dexport.exporter.engine.choice import choose_engine\n"
        "try: choose_engine('tensorrt-rtx', ['sm89'])\n"
        "except Exception as error: print(error)\n"
        "sys.exit(any(name in sys.modules for name in ('tensorrt', 'tensorrt_rtx', 'polygraphy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_signal_names() -> None:
    assert process._describe_status(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert process._describe_status(-40) == "killed by signal 40"
    assert process._describe_status(3) == "exit status 3"
    assert os.name == "posix"
