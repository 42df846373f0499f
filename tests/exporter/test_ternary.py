"""Ternary storage: every carrier holds the values exactly, in the file and in a plain ONNX Runtime session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dexport
from benchmarks.ternary import DENSE, RESULTS, layer_model
from dexport.bundle import Bundle
from dexport.errors import InputError, UsageError
from dexport.exporter import passes
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.export import check, save
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.emulate_low_precision import EmulateLowPrecision
from dexport.exporter.passes.precision import ToLowPrecision, precision_map
from dexport.exporter.quantize.carriers import CARRIERS
from dexport.exporter.quantize.ternary import (
    FASTEST_IN_ONNXRUNTIME,
    StoreTernary,
    choose_storage,
    find_layer,
    ternary_layers,
)
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import DEFAULT_GATES
from dexport.exporter.recipes.terdit import RECIPES, adapt
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import resolve
from dexport.exporter.weights.checkpoint_view import View
from dexport.exporter.weights.loading import open_weights
from tests.golden import assert_golden, load_golden

EXACT = 5e-6
TINY = {"dim": 64, "n_layers": 1, "n_heads": 2, "multiple_of": 32, "num_classes": 3, "input_size": 8}
few = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
RTX = EngineChoice("tensorrt-rtx", ("sm89",), "", "")
TENSORRT = EngineChoice("tensorrt", ("sm90",), "", "")


def build_golden(form: str, folder: Path, **options: Any) -> Bundle:
    golden = load_golden(form)
    checkpoint = folder / "terdit.safetensors"
    save_file(golden.weights, checkpoint)
    options = {"settings": golden.config, "checkpoint": str(checkpoint), **options}
    return dexport.build("terdit-600m", folder / "out", **options).bundle


# The official model


@pytest.fixture(scope="module", params=["terdit-packed", "terdit-master"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def traced(form: str, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    golden = load_golden(form)
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "terdit.safetensors"
    save_file(golden.weights, checkpoint)
    variant = resolve(RECIPES[0], golden.config)
    return trace(variant, open_weights(checkpoint, variant.meta_module(), adapt=adapt))


def exported(traced: ir.Model, form: str, carrier: str, precision: str) -> ir.Model:
    """What ``dexport build`` saves; tracing once for all carriers is what makes these tests quick."""
    model = traced.clone()
    storage = choose_storage(resolve(RECIPES[0], load_golden(form).config), None, carrier, None, plugins=False)
    assert storage is not None
    StoreTernary(storage)(model)
    passes.clean()(model)
    if precision != "fp32":
        ToLowPrecision(precision, RECIPES[0].islands)(model)
    return model


def run(model: ir.Model, form: str, folder: Path) -> np.ndarray:
    """The output for the golden's inputs in a plain session, without any option of ours."""
    AttachFunctions()(model)
    save(model, folder / "model.onnx")
    check(folder / "model.onnx")
    inputs = {name: load_golden(form).inputs[name].numpy() for name in ("x", "t", "y")}
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["out"], {**inputs, "t": inputs["t"].astype(np.float32)})[0]


@pytest.mark.golden
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_plain_session_gives_the_official_output(traced: ir.Model, form: str, carrier: str, tmp_path: Path) -> None:
    out = run(exported(traced, form, carrier, "fp32"), form, tmp_path)
    expected = load_golden(form).outputs["forward"].numpy()
    assert_golden(out, expected)
    assert np.linalg.norm(out - expected) <= DEFAULT_GATES["fp32"] * np.linalg.norm(expected)


@pytest.mark.golden
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_half_precision_stays_within_its_gate(
    traced: ir.Model, form: str, carrier: str, rounded: bool, tmp_path: Path
) -> None:
    model = exported(traced, form, carrier, "fp16")
    products = {"packed": "DexTernaryMatMul", "nbits2": "MatMulNBits", "nbits4": "MatMulNBits"}.get(carrier, "MatMul")
    assert precision_map(model)[f"layers.1.feed_forward.w2/{products}"] == "float16"
    if rounded:
        EmulateLowPrecision()(model)
    expected = load_golden(form).outputs["forward"].numpy()
    error = np.linalg.norm(run(model, form, tmp_path) - expected)
    assert error <= DEFAULT_GATES["fp16"] * np.linalg.norm(expected)


def test_the_packed_file_holds_the_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    golden = load_golden("terdit-packed")
    bundle = build_golden("terdit-packed", tmp_path, ternary_carrier="packed", profile="ci")
    assert bundle.status == "passed"
    stored = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    weights = ternary_layers(resolve(RECIPES[0], golden.config))
    assert len(weights) == bundle.network.manifest["ternary"]["layers"] == 16
    for name in weights:
        np.testing.assert_array_equal(stored[name].const_value.numpy(), golden.weights[name].numpy())
    held = sum(value.const_value.nbytes for value in stored.values())
    assert held <= 1.1 * sum(tensor.nbytes for tensor in golden.weights.values())


def test_the_manifest_has_carrier_and_sizes(tmp_path: Path) -> None:
    bundle = build_golden("terdit-packed", tmp_path, parity=False)
    manifest, files = bundle.network.manifest, bundle.manifest["files"]
    assert manifest["ternary"]["carrier"] == FASTEST_IN_ONNXRUNTIME
    assert manifest["ternary"]["runs_in"] == ["onnxruntime"]
    assert manifest["sizes"]["checkpoint"] == (tmp_path / "terdit.safetensors").stat().st_size
    assert manifest["sizes"]["onnx"] == files["model.onnx"]["size"] + files["model.onnx.data"]["size"]
    assert manifest["sizes"]["plan"] is None
    assert manifest["sizes"]["peak_rss"] == max(step["peak_rss_bytes"] for step in manifest["steps"])


def test_dense_storage_on_request(tmp_path: Path) -> None:
    network = build_golden("terdit-packed", tmp_path, ternary=False, parity=False).network
    assert network.manifest["ternary"] is None
    assert not {"MatMulNBits", "DequantizeLinear", "DexTernaryMatMul"} & set(network.entry()["ops"]["final"])


@pytest.mark.rtx
@pytest.mark.parametrize("carrier", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_rtx_keeps_the_weights_small(carrier: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'dexport[rtx]'")
    network = build_golden(
        "terdit-packed",
        tmp_path,
        trt=True,
        targets=("sm89",),
        profile="ci",
        precision="fp16",
        parity=False,
        ternary_carrier=carrier,
    ).network
    manifest, engine = network.manifest, network.entry()["engine"]
    assert manifest["ternary"]["carrier"] == {"auto": "int4"}.get(carrier, carrier)
    census = engine["dtype_census"]
    assert census["CONSTANT"][manifest["ternary"]["carrier"]] == census["DEQUANTIZE"]["float16"] == 16
    assert manifest["sizes"]["plan"] == engine["plan_bytes"]


# One layer


@pytest.mark.parametrize("carrier", CARRIERS)
@given(data=st.data())
@few
def test_values_are_exact(carrier: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 20)) * (4 if carrier == "packed" else 1)
    columns = data.draw(st.integers(1, 20)) * (16 if carrier == "int4" else 1)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weight = rng.integers(-1, 2, (rows, columns)).astype(np.float32)
    path = tmp_path_factory.mktemp("layer") / "model.onnx"
    ir.save(layer_model(weight, carrier), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    identity = np.eye(columns, dtype=np.float32)[None]
    np.testing.assert_array_equal(session.run(None, {"x": identity})[0][0], weight.T)
    x = rng.standard_normal((2, 3, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T
    error = np.linalg.norm(session.run(None, {"x": x})[0] - expected)
    assert error <= EXACT * max(np.linalg.norm(expected), 1e-9 * np.linalg.norm(x))


@pytest.mark.parametrize("carrier", ["packed", "int4", "int8"])
def test_onnx_runtime_neither_unpacks_to_floats_nor_rounds_activations(carrier: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).integers(-1, 2, (256, 256)).astype(np.float32)
    ir.save(layer_model(weight, carrier), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    operators = {node.op_type for node in optimized.graph.node}
    assert "DequantizeLinear" in operators
    assert not {"MatMulNBits", "BitShift"} & operators
    largest = max(optimized.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    assert np.prod(largest.dims) == weight.size
    assert largest.data_type != onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("carrier", "shape", "message"),
    [
        ("packed", (6, 16), r"weight has 6 rows, which cannot be packed four to a byte"),
        ("int4", (4, 24), r"weight has 24 columns, no multiple of 16"),
    ],
)
def test_what_a_carrier_cannot_hold_is_refused(carrier: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        layer_model(np.zeros(shape, np.float32), carrier)
    assert "--ternary-carrier int8" in caught.value.hint


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("value", [2.0, -2.0, 0.5, 300.0])
def test_values_that_are_not_ternary_are_refused(carrier: str, value: float) -> None:
    weight = np.zeros((4, 16), np.float32)
    weight[3, 5] = value
    model = layer_model(weight, carrier)
    with pytest.raises(InputError, match="weight holds values that are not ternary"):
        model.graph.initializers["weight"].const_value.numpy()


def test_a_weight_that_is_used_otherwise_is_refused() -> None:
    model = layer_model(np.zeros((4, 16), np.float32), DENSE)
    with pytest.raises(InputError, match=r"absent is not used as \(x W\^T\) \* scale"):
        find_layer(model.graph, "absent")


# The pass and its choice


@pytest.mark.parametrize("carrier", CARRIERS)
def test_no_weight_is_read_before_the_file_is_written(
    traced: ir.Model, form: str, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(View, "_read", lambda self, name: reads.append(name) or self._entries[name].read())
    model = exported(traced, form, carrier, "fp32")
    assert not reads
    names = list(ternary_layers(resolve(RECIPES[0], load_golden(form).config)))
    for name in names:
        model.graph.initializers[name].const_value.tobytes()
    assert reads == names


@pytest.mark.parametrize(
    ("asked", "carrier", "engine", "plugins", "chosen"),
    [
        (None, "auto", None, False, FASTEST_IN_ONNXRUNTIME),
        (True, "auto", None, False, FASTEST_IN_ONNXRUNTIME),
        (None, "auto", RTX, False, "int4"),
        (None, "auto", TENSORRT, True, "int4"),
        (None, "int8", RTX, False, "int8"),
        (None, "packed", TENSORRT, True, "packed"),
        (None, "packed", None, False, "packed"),
        (False, "auto", RTX, False, None),
    ],
)
def test_choice(
    asked: bool | None, carrier: str, engine: EngineChoice | None, plugins: bool, chosen: str | None
) -> None:
    storage = choose_storage(resolve(RECIPES[0], TINY), asked, carrier, engine, plugins)
    assert (storage and storage.carrier.name) == chosen


@pytest.mark.parametrize(
    ("recipe", "asked", "carrier", "engine", "message"),
    [
        ("terdit-600m", False, "int8", None, "exclude each other"),
        ("terdit-600m", None, "int5", None, "there is no ternary carrier 'int5'"),
        ("terdit-600m", None, "nbits4", RTX, "tensorrt-rtx cannot read the ternary carrier nbits4"),
        ("terdit-600m", None, "packed", RTX, "tensorrt-rtx cannot read the ternary carrier packed"),
        ("terdit-600m", None, "packed", TENSORRT, "tensorrt cannot read the ternary carrier packed"),
    ],
)
def test_choices_that_are_refused(
    recipe: str, asked: bool | None, carrier: str, engine: EngineChoice | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_storage(resolve(find_recipe(recipe)), asked, carrier, engine, plugins=False)


def test_an_older_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need opset 23") as caught:
        dexport.build("terdit-600m", tmp_path / "out", settings=TINY, opset=22)
    assert "--quantize none" in caught.value.hint


def test_auto_is_what_the_benchmark_found() -> None:
    for carriers in json.loads(RESULTS.read_text())["batches"].values():
        exact = {name: entry["seconds"] for name, entry in carriers.items() if entry["exact"] and name != DENSE}
        assert set(exact) == set(CARRIERS)
        assert min(exact, key=exact.__getitem__) == FASTEST_IN_ONNXRUNTIME
