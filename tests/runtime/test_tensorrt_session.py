"""The TensorRT session against a TensorRT and a CUDA driver that run on the host; refusals before them for real."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dexport
from dexport.bundle import Network, load_bundle
from dexport.errors import InputError, MachineError, UsageError
from dexport.plugins import tensorrt_plugin
from dexport.runtime import engine_runner, tensorrt_session
from dexport.runtime.decode import VaeDecoder
from dexport.runtime.session import open_session
from dexport.runtime.tensorrt_session import TensorRtSession
from tests.runtime.fake_gpu import FILE, PLAN, VERSION, FakeDriver, FakeEngine, FakeTensorRt, manifest, write_bundle

AGAIN = "`dexport build small --trt --fp16{}`, with the other options of its first build"


@pytest.fixture
def bundle(tmp_path: Path) -> Network:
    return write_bundle(tmp_path / "out").network


def inputs(batch: int = 2, **changed: Any) -> dict[str, Any]:
    x = np.arange(batch * 4, dtype=np.float32).reshape(batch, 4)
    return {"x": x, "y": np.arange(batch), "scale": np.float32(3), **changed}


def expected(feed: dict[str, Any]) -> np.ndarray:
    return np.asarray(feed["x"]) * feed["scale"] + np.asarray(feed["y"])[:, None]


def run(session: Any, batch: int = 2, **changed: Any) -> None:
    """Run once and compare."""
    feed = inputs(batch, **changed)
    results = session(**feed)
    assert list(results) == ["out"]
    assert results["out"].dtype == np.float32
    np.testing.assert_array_equal(results["out"], expected(feed))


# Running


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_it_computes(bundle: Network, trt: FakeTensorRt, driver: FakeDriver, cuda_graph: bool) -> None:
    with TensorRtSession(bundle, cuda_graph=cuda_graph) as session:
        for seed in range(4):
            run(session, scale=np.float32(seed))
        run(session, x=np.arange(8, dtype=np.float32).reshape(4, 2).T)
        run(session, y=[5, 6])
    assert driver.clean
    assert trt.enqueued == (2 if cuda_graph else 6)


def test_results_are_not_overwritten_by_the_next_run(bundle: Network, trt: FakeTensorRt) -> None:  # noqa: ARG001
    with TensorRtSession(bundle) as session:
        first, kept = inputs(), session(**inputs())["out"]
        run(session, scale=np.float32(7))
        np.testing.assert_array_equal(kept, expected(first))


def test_what_it_says_of_itself(bundle: Network, trt: FakeTensorRt) -> None:  # noqa: ARG001
    with TensorRtSession(bundle) as session:
        assert session.runner == f"TensorRT {VERSION}, Pretended GPU (sm89), captured CUDA graphs"
        assert session.outputs == ["out"]
        assert [(port.name, tuple(port.shape), port.type) for port in session.inputs.values()] == [
            ("x", ("B", 4), "tensor(float)"),
            ("y", ("B",), "tensor(int64)"),
            ("scale", (), "tensor(float)"),
        ]


@pytest.mark.parametrize("by_path", [True, False])
def test_it_is_the_provider_tensorrt(bundle: Network, trt: FakeTensorRt, driver: FakeDriver, by_path: bool) -> None:  # noqa: ARG001
    session = dexport.load(bundle.path, provider="tensorrt") if by_path else open_session(bundle, "tensorrt")
    assert isinstance(session, TensorRtSession)
    run(session)
    session.close()
    assert driver.clean


def test_unknown_provider(bundle: Network) -> None:
    with pytest.raises(UsageError, match="no provider 'tpu'") as caught:
        open_session(bundle, "tpu")
    assert caught.value.hint == "choose from cpu, cuda, tensorrt"


def test_a_decoder_finds_its_batch_and_sides(tmp_path: Path, trt: FakeTensorRt) -> None:
    io = {
        "inputs": [{"name": "z", "dtype": "float32", "shape": ["B", 4, 8, 8]}],
        "outputs": [{"name": "image", "dtype": "float32", "shape": ["B", 3, 64, 64]}],
    }
    trt.engine = type(
        "Decoder", (FakeEngine,), {"tensors": {"z": ("FLOAT", (-1, 4, 8, 8)), "image": ("FLOAT", (-1, 3, 64, 64))}}
    )
    with TensorRtSession(write_bundle(tmp_path / "out", io=io).network) as session:
        decoder = VaeDecoder(session, 1.0)
        assert (decoder._fixed_batch, decoder._sides) == (None, [8, 8])


# CUDA graphs


def test_each_shape_is_captured_at_its_second_run(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    with TensorRtSession(bundle) as session:
        run(session, 4)
        assert driver.calls.count("cuStreamBeginCapture") == 0
        for count in range(3):
            for batch in (4, 2):
                run(session, batch, scale=np.float32(count))
    assert driver.calls.count("cuStreamBeginCapture") == 2
    assert driver.calls.count("cuGraphLaunch") == 5
    # Each shape: a warm-up and a capture.
    assert trt.enqueued == 4
    assert [context.argument for context in trt.contexts] == ["USER_MANAGED"] * 2
    assert trt.contexts[0].scratch == trt.contexts[1].scratch
    assert driver.clean


def test_growing_buffers_drops_graphs_that_hold_their_addresses(
    bundle: Network, trt: FakeTensorRt, driver: FakeDriver
) -> None:
    with TensorRtSession(bundle) as session:
        for batch in (2, 2, 2, 4, 4, 2, 2, 2, 4):
            run(session, batch)
    assert driver.calls.count("cuStreamBeginCapture") == 3
    assert len(trt.contexts) == 3
    assert driver.clean


def test_buffers_grow_and_never_shrink(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:  # noqa: ARG001
    with TensorRtSession(bundle, cuda_graph=False) as session:
        sizes = []
        for batch in (1, 3, 2, 3):
            run(session, batch)
            sizes.append((driver.calls.count("cuMemAlloc"), sorted(map(len, driver.memory.values()))))
    first, grown = (4, [4, 8, 16, 16]), (7, [4, 24, 48, 48])
    assert sizes == [first, grown, grown, grown]


def test_kept_graphs_are_bounded(bundle: Network, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(engine_runner, "MOST_LANES", 2)
    with TensorRtSession(bundle) as session:
        for batch in (4, 3, 2, 1, 4):
            run(session, batch)
            assert len(session._engine._lanes) <= 2


def test_without_graphs_one_context_serves_every_shape(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    with TensorRtSession(bundle, cuda_graph=False) as session:
        assert session.runner.endswith(", no CUDA graph")
        for batch in (2, 4, 2, 2, 1):
            run(session, batch)
    assert [context.argument for context in trt.contexts] == ["STATIC"]
    assert "cuStreamBeginCapture" not in driver.calls


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_rtx_makes_its_own_graphs(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    trt = FakeTensorRt(driver, "1.7.1.116", rtx=True)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    engine = manifest(flavour="tensorrt-rtx", version="1.7.1.116")["engine"]
    with TensorRtSession(write_bundle(tmp_path / "out", engine=engine).network, cuda_graph=cuda_graph) as session:
        for batch in (2, 2, 2, 4):
            run(session, batch)
        graphs = "its own CUDA graphs" if cuda_graph else "no CUDA graph"
        assert session.runner == f"TensorRT-RTX 1.7.1.116, Pretended GPU (sm89), {graphs}"
    (context,) = trt.contexts
    used = getattr(context.argument, "cuda_graph_strategy", context.argument)
    assert used == ("WHOLE_GRAPH_CAPTURE" if cuda_graph else "STATIC")
    assert "cuStreamBeginCapture" not in driver.calls
    assert driver.clean


@pytest.mark.parametrize("function", ["capture", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_failed_capture_says_how_to_do_without(
    bundle: Network, trt: FakeTensorRt, driver: FakeDriver, function: str
) -> None:
    with TensorRtSession(bundle) as session:
        run(session)
        trt.refuse = function
        driver.fail(function, 1)
        with pytest.raises(MachineError, match="cannot be captured as a CUDA graph: ") as caught:
            session(**inputs())
        assert "cuda_graph=False" in caught.value.hint
        if function != "cuStreamEndCapture":
            trt.refuse = ""
            run(session)
    assert driver.clean


# Inputs that do not fit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "this model takes x, y, scale; got nothing"),
        (inputs(extra=1), "this model takes x, y, scale; got x, y, scale, extra"),
        (inputs(x=np.ones((2, 5), np.float32)), "input x has shape [2, 5], expected ['B', 4]"),
        (inputs(scale=np.ones(1, np.float32)), "input scale has shape [1], expected []"),
        (inputs(x=np.ones((2, 4))), "input x has dtype float64, expected tensor(float)"),
        (inputs(y=np.zeros(2, np.int32)), "input y has dtype int32, expected tensor(int64)"),
        (inputs(y=np.zeros(3, np.int64)), "input y has B = 3, but an input before it has 2"),
        (inputs(9), "input x has shape [9, 4]; this engine takes [1, 4] to [8, 4]: 1 to 8 where 9 is"),
        (inputs(0), "input x has shape [0, 4]; this engine takes [1, 4] to [8, 4]: 1 to 8 where 0 is"),
    ],
)
def test_input_that_does_not_fit_is_named(
    bundle: Network,
    trt: FakeTensorRt,
    given: dict[str, Any],
    message: str,
) -> None:
    with TensorRtSession(bundle) as session:
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$") as caught:
            session(**given)
        run(session)
    assert trt.enqueued == 1
    if "this engine takes" in message:
        assert AGAIN.format(" --profile NAME|FILE") in caught.value.hint


# What must be true before anything is deserialized


def test_a_bundle_without_an_engine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no TensorRT engine") as caught:
        TensorRtSession(write_bundle(tmp_path / "out", engine=None).network)
    assert caught.value.hint == f"build one: {AGAIN.format('')}"


def test_a_tampered_plan_is_refused_first(bundle: Network) -> None:
    (bundle.path / FILE).write_bytes(PLAN[::-1])
    with pytest.raises(InputError, match=re.escape(f"{FILE}: sha256 differs")):
        dexport.load(bundle.path, provider="tensorrt")


def test_another_version(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    trt.__version__ = "10.14.1.48"
    with pytest.raises(MachineError, match=f"tensorrt {VERSION}, but tensorrt 10.14.1.48 is installed") as caught:
        TensorRtSession(bundle)
    assert AGAIN.format(" --engine tensorrt") in caught.value.hint
    assert not driver.calls


def test_a_missing_package(bundle: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MachineError, match=f"was built with tensorrt {VERSION}, which is not installed: ") as caught:
        TensorRtSession(bundle)
    assert caught.value.hint == f"pip install 'dexport[gpu]', or build for what is here: {AGAIN.format('')}"


def test_the_other_flavour(bundle: Network, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRt(driver, "1.7.1.116", rtx=True))
    with pytest.raises(MachineError, match=re.escape("not installed (tensorrt-rtx 1.7.1.116 is, which cannot run it)")):
        TensorRtSession(bundle)


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "gpu"), ("tensorrt-rtx", "rtx")])
def test_missing_cuda_python_names_the_engines_extra(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, flavour: str, extra: str
) -> None:
    module = flavour.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, FakeTensorRt(driver, VERSION))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MachineError, match=r"cuda\.bindings\.driver is needed") as caught:
        TensorRtSession(write_bundle(tmp_path / "out", engine=manifest(flavour=flavour)["engine"]).network)
    assert caught.value.hint == f"pip install 'dexport[{extra}]'"


def test_no_gpu(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:  # noqa: ARG001
    driver.devices = 0
    with pytest.raises(MachineError, match=r"no NVIDIA GPU .*cuInit failed: CUDA_ERROR_NO_DEVICE") as caught:
        TensorRtSession(bundle)
    assert "--provider cpu" in caught.value.hint


def test_another_gpu(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    driver.capability = (12, 0)
    with pytest.raises(MachineError, match="was built for sm86, sm89; the Pretended GPU here is sm120") as caught:
        TensorRtSession(bundle)
    assert caught.value.hint == f"build for this one: {AGAIN.format(' --target sm120')}"
    assert trt.log is None


@pytest.mark.parametrize("embedded", [True, False])
def test_plugins_are_registered_first_where_the_engine_embeds_them(
    tmp_path: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    registered_first: list[bool] = []
    monkeypatch.setattr(tensorrt_plugin, "register_all", lambda: registered_first.append(trt.log is None))
    monkeypatch.delitem(sys.modules, tensorrt_session.PLUGINS, raising=False)
    ops = [{"name": "DexTMSA", "ptx_sha256": ["0" * 64] if embedded else []}]
    TensorRtSession(write_bundle(tmp_path / "out", custom_ops=ops).network).close()
    assert registered_first == ([True] if embedded else [])


def test_plugins_are_imported_without_torch_and_triton() -> None:
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'triton', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "from dexport.plugins import tensorrt_plugin\n"
        "for name in tensorrt_plugin.MODULES: importlib.import_module(f'dexport.plugins.{name}.plugin')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Failures


def test_a_plan_that_tensorrt_refuses(tmp_path: Path, trt: FakeTensorRt, driver: FakeDriver) -> None:  # noqa: ARG001
    with pytest.raises(MachineError, match=r"TensorRT cannot deserialize .*: magic tag differs$"):
        TensorRtSession(write_bundle(tmp_path / "out", plan=b"something else").network)
    assert driver.clean


@pytest.mark.parametrize("kind", ["INT32", "HALF"])
def test_an_engine_with_other_types(bundle: Network, trt: FakeTensorRt, driver: FakeDriver, kind: str) -> None:
    trt.engine = type("Other", (FakeEngine,), {"tensors": {**FakeEngine.tensors, "y": (kind, (-1,))}})
    with pytest.raises(InputError, match=rf"y \({kind}\).*; the manifest says .*y \(int64\)"):
        TensorRtSession(bundle)
    assert driver.clean


def test_a_context_that_cannot_be_made(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    trt.refuse = "context"
    with pytest.raises(MachineError, match="cannot create a context: no context today"):
        TensorRtSession(bundle, cuda_graph=False)
    assert driver.clean


def test_a_run_that_fails(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:
    with TensorRtSession(bundle) as session:
        trt.refuse = "run"
        with pytest.raises(MachineError, match="TensorRT cannot run the engine: cannot run today"):
            session(**inputs())
    assert driver.clean


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuStreamCreate"])
def test_an_error_while_opening_frees_everything(
    bundle: Network,
    trt: FakeTensorRt,  # noqa: ARG001
    driver: FakeDriver,
    function: str,
) -> None:
    driver.fail(function, 1)
    with pytest.raises(MachineError, match=f"^CUDA: {function} failed: CUDA_ERROR_ILLEGAL_ADDRESS, cuda error illegal"):
        TensorRtSession(bundle, cuda_graph=False)
    assert driver.clean


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("cuMemAlloc", 1),
        ("cuMemAlloc", 3),
        ("cuMemcpyHtoDAsync", 2),
        ("cuMemcpyDtoHAsync", 1),
        ("cuStreamSynchronize", 1),
    ],
)
def test_an_error_in_the_middle_frees_everything_and_can_be_survived(
    bundle: Network,
    trt: FakeTensorRt,  # noqa: ARG001
    driver: FakeDriver,
    function: str,
    number: int,
    cuda_graph: bool,
) -> None:
    with TensorRtSession(bundle, cuda_graph=cuda_graph) as session:
        for batch in (2, 4):
            driver.fail(function, number)
            with pytest.raises(MachineError, match=f"^CUDA: {function} failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
                session(**inputs(batch))
            run(session, batch)
    assert driver.clean
    driver.failures.clear()
    with (
        pytest.raises(MachineError, match=f"CUDA: {function} failed"),
        TensorRtSession(bundle, cuda_graph=cuda_graph) as session,
    ):
        driver.fail(function, number)
        session(**inputs())
    assert driver.clean


# The end


def test_closing_twice_and_running_after(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:  # noqa: ARG001
    session = TensorRtSession(bundle)
    run(session)
    session.close()
    session.close()
    assert driver.clean
    with pytest.raises(UsageError, match="is closed"):
        session(**inputs())


def test_a_forgotten_session_is_freed(bundle: Network, trt: FakeTensorRt, driver: FakeDriver) -> None:  # noqa: ARG001
    session = TensorRtSession(bundle)
    run(session)
    run(session)
    assert not driver.clean
    del session
    gc.collect()
    assert driver.clean


# The real packages, without a GPU


def real(module: str) -> Any:
    return pytest.importorskip(module, exc_type=ImportError)


def without_gpu() -> None:
    from dexport.exporter.machine import visible_gpus

    if visible_gpus():
        pytest.skip("there is a GPU")


@pytest.mark.rtx
def test_on_this_machine_without_a_gpu(tmp_path: Path) -> None:
    without_gpu()
    real("cuda.bindings.driver")
    trt = real("tensorrt_rtx")
    engine = manifest(flavour="tensorrt-rtx", version=trt.__version__)["engine"]
    bundle = write_bundle(tmp_path / "out", engine=engine)
    with pytest.raises(MachineError, match="no NVIDIA GPU can be used here") as caught:
        dexport.load(bundle.path, provider="tensorrt")
    assert caught.value.exit_code == 3
    assert load_bundle(bundle.path).network.entry()["engine"]["version"] == trt.__version__


@pytest.mark.rtx
def test_the_logger_of_the_real_tensorrt_keeps_errors() -> None:
    trt = real("tensorrt_rtx")
    log = engine_runner.make_log(trt)
    assert trt.Runtime(log).deserialize_cuda_engine(b"not a plan" * 100) is None
    assert log.errors
    assert len(log.errors) <= engine_runner.LOGGED_ERRORS


def test_the_stand_in_driver_has_only_names_of_the_real_one() -> None:
    driver = real("cuda.bindings.driver")
    for name in (name for name in vars(FakeDriver) if name.startswith("cu")):
        assert hasattr(driver, name), name
    for enum in ("CUstream_flags", "CUstreamCaptureMode", "CUdevice_attribute"):
        for member, value in vars(getattr(FakeDriver, enum)).items():
            assert int(getattr(getattr(driver, enum), member)) == value


@pytest.mark.rtx
def test_the_stand_in_tensorrt_has_only_names_of_the_real_one() -> None:
    trt = real("tensorrt_rtx")
    called = {
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_dtype create_runtime_config "
        "create_execution_context device_memory_size_v2",
        trt.IExecutionContext: "set_input_shape get_tensor_shape set_tensor_address set_device_memory execute_async_v3",
        trt.IRuntimeConfig: "cuda_graph_strategy",
        trt.Runtime: "deserialize_cuda_engine",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.CudaGraphStrategy: "WHOLE_GRAPH_CAPTURE",
        trt.DataType: " ".join(engine_runner.DTYPES),
    }
    assert all(hasattr(owner, name) for owner, names in called.items() for name in names.split())
