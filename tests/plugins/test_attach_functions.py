"""A traced network keeps its ops as nodes, gets their functions, and runs in ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from running import error
from torch import Tensor, nn

from dexport.exporter.custom_ops import custom_ops
from dexport.exporter.passes import clean
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.recipes.recipe import Islands
from dexport.plugins.channel_attention.reference import channel_attention
from dexport.plugins.linear_attention.reference import linear_attention
from dexport.plugins.tmsa.reference import tmsa
from dexport.plugins.translation import translation_table

WINDOW, HEADS, WIDTH = 4, 2, 24


class Net(nn.Module):
    """One of each op; the names of inputs collide with names inside the functions on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv_temb = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = tmsa(self.qkv(x), self.qkv_temb(time), self.table.t(), HEADS, WINDOW)
        q, k, v = self.qkv(h).chunk(3, dim=2)
        h = linear_attention(q, k, v, HEADS)
        image = h.transpose(1, 2).unflatten(2, (WINDOW, WINDOW))
        return channel_attention(image, self.conv.weight, self.conv.bias)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def model(net: Net) -> ir.Model:
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    batch = torch.export.Dim("B")
    program = torch.export.export(
        net,
        (torch.zeros(3, WINDOW**2, WIDTH), torch.zeros(3, WIDTH)),
        dynamic_shapes=({0: batch}, {0: batch}),
    )
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=23,
        custom_translation_table=translation_table(),
    )
    assert exported is not None
    clean()(exported.model)
    return exported.model


def test_nodes_and_functions(model: ir.Model) -> None:
    assert {op.name: op.version for op in custom_ops(model)} == {
        "DexTMSA": 1,
        "DexLinearAttention": 1,
        "DexChannelAttention": 1,
    }
    assert AttachFunctions()(model).modified
    assert {key[1] for key in model.functions} == {
        "DexTMSA",
        "DexLinearAttention",
        "DexChannelAttention",
        "DexChannelAttentionPool",
        "DexChannelAttentionScale",
    }
    assert model.opset_imports["dexport"] == 1
    shapes = {n.op_type: n.outputs[0].shape for n in model.graph if n.domain == "dexport"}
    assert all(shape is not None and shape[1] in (WINDOW**2, WIDTH) for shape in shapes.values())


@pytest.mark.parametrize(("batch", "precision"), [(1, "fp32"), (4, "fp32"), (4, "fp16")])
def test_onnxruntime_computes_the_network(
    model: ir.Model, net: Net, batch: int, precision: str, tmp_path: Path
) -> None:
    model = ir.from_proto(ir.to_proto(model))
    if precision == "fp16":
        ToLowPrecision("fp16", Islands())(model)
    AttachFunctions()(model)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, time = torch.randn(batch, WINDOW**2, WIDTH), torch.randn(batch, WIDTH)
    names = [value.name for value in session.get_inputs()]
    (actual,) = session.run(None, dict(zip(names, (x.numpy(), time.numpy()), strict=True)))
    with torch.no_grad():
        expected = net(x, time)
    assert error(torch.from_numpy(actual), expected) <= {"fp32": 1e-5, "fp16": 1e-2}[precision]


def test_the_table_is_stored_transposed(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "DexTMSA")
    table = node.inputs[2]
    assert table is not None
    assert table.is_initializer()
    assert table.shape == ir.Shape([HEADS, (2 * WINDOW - 1) ** 2])


def test_a_model_without_ops_is_left_alone() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    model = ir.Model(graph, ir_version=10)
    assert not AttachFunctions()(model).modified
    assert not model.functions
