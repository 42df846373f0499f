"""Exported goldens in ONNX Runtime, through the public build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import dexport
from dexport.bundle import load_bundle
from tests.golden import Golden, assert_golden

RECIPES = {"dit-s": "dit-s-2", "dico-s": "dico-xl", "diffit-latent": "diffit-256"}
OPS = {"dit-s": set(), "dico-s": {"DexChannelAttention"}, "diffit-latent": {"DexTMSA"}}
NODES = {
    "dit-s": "blocks.2.attn.qkv/MatMul",
    "dico-s": "encoder_level_2.1.conv2/Conv",
    "diffit-latent": "blocks.1.attn/DexTMSA",
}
GRAPHS = {"none": "model", "fused": "guided"}
"""By where the guidance is."""
RELATIVE_L2_FP16 = 3e-3


@pytest.fixture(scope="module", params=["none-fp32", "fused-fp32", "fused-fp16"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def guidance(form: str) -> str:
    return form.partition("-")[0]


@pytest.fixture(scope="module")
def precision(form: str) -> str:
    return form.partition("-")[2]


@pytest.fixture(scope="module")
def bundle_path(guidance, golden, golden_name, golden_checkpoint, precision, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / f"{precision}-{guidance}"
    dexport.build(
        RECIPES[golden_name],
        path,
        settings=golden.config,
        latent=tuple(golden.inputs["x"].shape[2:]),
        checkpoint=str(golden_checkpoint),
        precision=precision,
        guidance=guidance,
    )
    return path


@pytest.fixture(scope="module")
def model_path(bundle_path: Path, guidance: str) -> Path:
    return bundle_path / f"{GRAPHS[guidance]}.onnx"


@pytest.mark.golden
def test_onnx_matches_the_official_output(model_path: Path, golden: Golden, guidance: str, precision: str) -> None:
    session = ort.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    inputs = {name: tensor.numpy() for name, tensor in golden.inputs.items()}
    if guidance == "fused":
        half = len(inputs["cfg_x"]) // 2
        feed = {name: inputs[f"cfg_{name}"][:half] for name in ("x", "t", "y")} | {"cfg_scale": inputs["cfg_scale"]}
        expected = golden.outputs["forward_with_cfg"][:half].numpy()
    else:
        feed = {name: inputs[name] for name in ("x", "t", "y")}
        expected = golden.outputs["forward"].numpy()
    feed["t"] = feed["t"].astype(np.float32)
    (out,) = session.run(["out"], feed)
    if precision == "fp32":
        assert_golden(out, expected)
    else:
        assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < RELATIVE_L2_FP16


def test_the_file_follows_the_onnx_contract(model_path: Path, golden_name: str, guidance: str) -> None:
    model = onnx.load(model_path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 23
    assert model.producer_name == "dexport"
    metadata = {p.key: p.value for p in model.metadata_props}
    assert (metadata["dexport.recipe"], metadata["dexport.graph"]) == (RECIPES[golden_name], GRAPHS[guidance])
    names = [value.name for value in model.graph.input]
    assert names == (["x", "t", "y", "cfg_scale"] if guidance == "fused" else ["x", "t", "y"])
    assert [value.name for value in model.graph.output] == ["out"]
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds["x"] == kinds["t"] == kinds["out"] == onnx.TensorProto.FLOAT
    assert kinds["y"] == onnx.TensorProto.INT64
    batches = {v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.input if v.name != "cfg_scale"}
    assert batches == {"B"}


def test_names_carry_the_module_path(model_path: Path, golden_name: str) -> None:
    names = [node.name for node in onnx.load(model_path, load_external_data=False).graph.node]
    assert NODES[golden_name] in names
    assert len(set(names)) == len(names)


def test_custom_ops_are_nodes_with_a_function_body(bundle_path: Path, model_path: Path, golden_name: str) -> None:
    model = onnx.load(model_path, load_external_data=False)
    assert {node.op_type for node in model.graph.node if node.domain == "dexport"} == OPS[golden_name]
    assert {function.name for function in model.functions} >= OPS[golden_name]
    recorded = load_bundle(bundle_path).network.entry()["custom_ops"]
    assert {op["name"] for op in recorded} == OPS[golden_name]
    assert all(op["version"] >= 1 and op["nodes"] > 0 and op["ptx_sha256"] == [] for op in recorded)


def test_graph_is_clean(bundle_path: Path, guidance: str) -> None:
    ops = load_bundle(bundle_path).network.entry()["ops"]
    leftovers = {"Constant", "Identity", "SplitToSequence", "SequenceAt", "CastLike", "Expand"} & set(ops["final"])
    assert leftovers <= ({"Expand"} if guidance == "fused" else set())
    assert sum(ops["final"].values()) - ops["final"].get("Cast", 0) < 0.6 * sum(ops["traced"].values())


def test_manifest_tells_the_whole_story(bundle_path: Path, golden: Golden, guidance: str, precision: str) -> None:
    bundle = load_bundle(bundle_path)
    manifest = bundle.network.manifest
    assert bundle.status == bundle.network.status == "passed"
    assert list(bundle.networks) == ["denoiser"]
    assert list(bundle.network.graphs) == [GRAPHS[guidance]]
    assert bundle.manifest["program"]["kind"] == "diffusion"
    assert manifest["config"] == {**manifest["config"], **golden.config}
    assert manifest["weights"]["kind"] == "safetensors"
    assert not manifest["weights"]["random"]
    assert len(manifest["weights"]["sha256"]) == 64
    assert bundle.network.entry()["engine"] is None
    assert bundle.network.entry()["parity"]["passed"]
    assert manifest["precision"]["name"] == precision
    assert {step["name"] for step in manifest["steps"]} >= {"trace", "passes", "save", "check", "parity"}
    assert all(step["peak_rss_bytes"] > 0 for step in manifest["steps"])
    reports = {f"reports/parity{'-guided' * (guidance == 'fused')}.{suffix}" for suffix in ("json", "md")}
    assert set(bundle.manifest["files"]) == {f"{GRAPHS[guidance]}.onnx", "model.onnx.data", *reports}


def test_islands_stay_in_float32(bundle_path: Path, precision: str) -> None:
    if precision == "fp32":
        pytest.skip("there are no islands in a float32 graph")
    nodes = load_bundle(bundle_path).network.entry()["nodes"]
    for name, dtype in nodes.items():
        path, _, op = name.rpartition("/")
        island = path.startswith(("t_embedder", "guidance")) or op.rstrip("_0123456789") in (
            "LayerNormalization",
            "ReduceMean",
        )
        if island:
            assert dtype == "float32", name
        elif op.startswith(("MatMul", "Conv", "Attention")):
            assert dtype == "float16", name
