"""The custom ops of a bundle by themselves: the function body in its file, in ONNX Runtime, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import dexport.plugins.op
from dexport.exporter.gates import GATES
from dexport.exporter.pytorch.module_path import module_path
from dexport.plugins.op import DOMAIN, Op
from dexport.plugins.registry import find_op
from dexport.runtime.session import OnnxSession
from dexport.validate.levels.forward import finite_or_null
from dexport.validate.metrics import Metrics, compare
from dexport.validate.read_graph import read_graph

OF_OPS = {"float32": GATES["fp32"].op_l2, "float16": GATES["fp16"].op_l2}
"""Largest relative L2 by the type that an op computes in."""
BATCH = 2
NO_OPS = "no custom ops"


@dataclass(frozen=True)
class OpCheck:
    """Nodes of one op with the same shapes, type and attributes, of which the first one was run.

    Attributes:
        module: path of the module of that node.
        nodes: how many there are.
        shapes: of its inputs.
    """

    part: str
    op: str
    version: int
    module: str
    nodes: int
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: Mapping[str, int]
    metrics: Metrics
    gate: float

    @property
    def passed(self) -> bool:
        return self.metrics.finite and self.metrics.relative_l2 <= self.gate

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "metrics": finite_or_null(asdict(self.metrics)), "passed": self.passed}


@dataclass(frozen=True)
class OpReport:
    """Every kind of custom-op node, and what was not run and why."""

    checks: tuple[OpCheck, ...]
    not_run: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "passed": self.passed if self.checks else None,
            "checks": [check.to_json() for check in self.checks],
            "not_run": list(self.not_run),
        }


def check_ops(part: str, model_path: Path, *, limit: float | None = None, seed: int = 0) -> OpReport:
    """Run every kind of custom-op node of a graph by itself.

    Constant inputs have the values that they have in the graph, the others standard normal noise: batch 2.

    Args:
        part: name of the network in its bundle, for the report.
        limit: largest relative L2, in place of the type's.
    """
    model = read_graph(model_path)
    checks, not_run = [], []
    for nodes in _kinds(model):
        node = nodes[0]
        op = find_op(node.op_type)
        dtype = _dtype(node)
        if dtype not in OF_OPS:
            not_run.append(f"{op.name} in {dtype}: ONNX Runtime has no kernels for it on a CPU")
            continue
        inputs = _inputs(node, np.random.default_rng(seed))
        attributes = {a.name: node.attributes[a.name].as_int() for a in op.attributes}
        session = OnnxSession(ir.to_proto(_alone(model, node, inputs)).SerializeToString())
        wanted = dexport.plugins.op.resolve(op.reference)(*map(torch.from_numpy, inputs), **attributes)
        got = session(**{tensor.name: array for tensor, array in zip(op.inputs, inputs, strict=True)})
        checks.append(
            OpCheck(
                part=part,
                op=op.name,
                version=op.version,
                module=module_path(node) or node.name or "",
                nodes=len(nodes),
                dtype=dtype,
                shapes=tuple(array.shape for array in inputs),
                attributes=attributes,
                metrics=compare(wanted.numpy(), got[op.outputs[0].name]),
                gate=OF_OPS[dtype] if limit is None else limit,
            )
        )
    return OpReport(tuple(checks), tuple(not_run))


def _kinds(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Nodes of the domain, those that are alike together."""
    kinds: dict[Any, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            values = tuple((value.dtype, _shape(value)) for value in node.inputs if value is not None)
            attributes = tuple(sorted((name, attribute.as_int()) for name, attribute in node.attributes.items()))
            kinds.setdefault((node.op_type, values, attributes), []).append(node)
    yield from kinds.values()


def _inputs(node: ir.Node, rng: np.random.Generator) -> list[np.ndarray]:
    arrays = []
    for value in node.inputs:
        assert value is not None and value.dtype is not None
        if value.const_value is not None:
            arrays.append(np.array(value.const_value.numpy()))
        else:
            arrays.append(rng.standard_normal(_shape(value)).astype(value.dtype.numpy()))
    return arrays


def _alone(model: ir.Model, node: ir.Node, arrays: list[np.ndarray]) -> ir.Model:
    """A model of one such node, with the functions of the file."""
    op: Op = find_op(node.op_type)
    inputs = [
        ir.Value(name=tensor.name, type=ir.TensorType(value.dtype), shape=ir.Shape(array.shape))
        for tensor, value, array in zip(op.inputs, node.inputs, arrays, strict=True)
        if value is not None and value.dtype is not None
    ]
    alone = ir.node(op.name, inputs, attributes=dict(node.attributes), domain=DOMAIN)
    output = alone.outputs[0]
    output.name, output.type = op.outputs[0].name, node.outputs[0].type
    graph = ir.Graph(inputs, [output], nodes=[alone], opset_imports=dict(model.opset_imports), name="one_op")
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _dtype(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None and value.dtype is not None
    return str(value.dtype.numpy().name)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(dim if isinstance(dim, int) else BATCH for dim in value.shape)
