"""TensorRT-RTX, which has no plugins, takes the functions; the relative position bias does not become
constants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from running import model_of

from dexport.plugins.compile import PUBLISHED_SIZES
from dexport.plugins.functions import function_protos
from dexport.plugins.registry import find_op

pytestmark = pytest.mark.rtx
BLOCKS, TOKENS, WIDTH, HEADS, WINDOW = 28, 1024, 1152, 16, 32

BUILD = """
import json, sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), [str(parser.get_error(i)) for i in range(parser.num_errors)]
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
for index in range(network.num_inputs):
    tensor = network.get_input(index)
    if -1 in tensor.shape:
        profile.set_shape(tensor.name, *([d if d > 0 else batch for d in tensor.shape] for batch in (1, 2,
        4)))
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
print(json.dumps(plan.nbytes if plan is not None else None))
"""


def plan_size(model: onnx.ModelProto, folder: Path) -> int | None:
    """Bytes of the plan for SM 8.9, None if it does not build. In a child process: the library may abort."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'dexport[rtx]'")
    path = folder / "model.onnx"
    onnx.save(model, path)
    done = subprocess.run([sys.executable, "-c", BUILD, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "dtype", "wide"),
    [
        ("DexTMSA", torch.float16, False),
        ("DexTMSA", torch.float32, True),
        ("DexLinearAttention", torch.float16, False),
        ("DexLinearAttention", torch.float32, False),
        ("DexChannelAttention", torch.float16, False),
        ("DexChannelAttention", torch.float32, False),
    ],
    ids=str,
)
def test_functions_build(name: str, dtype: torch.dtype, wide: bool, tmp_path: Path) -> None:
    shapes, attributes = PUBLISHED_SIZES[name][0]
    model = model_of(find_op(name), [torch.zeros(shape, dtype=dtype) for shape in shapes], attributes, wide)
    assert plan_size(model, tmp_path)


def test_bias_of_diffit_512_is_not_stored(tmp_path: Path) -> None:
    """28 blocks of heads x T x T in float16 would be 0.94 GB; the tables are 3.6 MB."""
    nodes, tables, current = [], [], "qkv"
    for block in range(BLOCKS):
        table = np.random.default_rng(block).normal(size=(HEADS, (2 * WINDOW - 1) ** 2)).astype(np.float16)
        tables.append(numpy_helper.from_array(table, f"table_{block}"))
        inputs, out = [current, "time", f"table_{block}"], f"out_{block}"
        nodes.append(helper.make_node("DexTMSA", inputs, [out], domain="dexport", num_heads=HEADS, window=WINDOW))
        current = f"qkv_{block}"
        nodes.append(helper.make_node("Concat", [out] * 3, [current], axis=2))

    def info(value: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT16, shape)

    graph = helper.make_graph(
        nodes,
        "attention_of_diffit_512",
        [info("qkv", ["B", TOKENS, 3 * WIDTH]), info("time", ["B", 3 * WIDTH])],
        [info(current, ["B", TOKENS, 3 * WIDTH])],
        tables,
    )
    model = helper.make_model(
        graph,
        functions=function_protos(find_op("DexTMSA")),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("dexport", 1)],
        ir_version=10,
    )
    size = plan_size(model, tmp_path)
    assert size is not None
    assert size < 32 << 20
