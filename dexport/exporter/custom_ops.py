"""Custom ops of an exported graph: which ones, in which version, and the PTX that a plugin build embeds."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dexport.errors import MachineError, UsageError
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.machine import has_module
from dexport.plugins.compile import compile_kernel
from dexport.plugins.op import DOMAIN, DTYPES, DType, Op
from dexport.plugins.registry import find_op

REGISTRATION = "dexport.plugins.register"
"""Importing it registers the plugins with TensorRT."""
ANY_BATCH = 2
"""Kernels are not compiled for one batch size; this one only completes the shapes."""


@dataclass(frozen=True)
class CustomOp:
    """One op of a graph.

    Attributes:
        nodes: how many nodes of it there are.
        ptx_sha256: of every kernel that an engine with plugins embeds; empty when the function bodies are used.
    """

    name: str
    version: int
    nodes: int
    ptx_sha256: tuple[str, ...] = ()


def wants_plugins(asked: str, choice: EngineChoice | None) -> bool:
    """Whether the engine takes plugins. The ONNX file carries the function bodies either way.

    Args:
        asked: ``auto``, ``on`` or ``off``.

    Raises:
        UsageError: plugins for something that has none.
        MachineError: triton, which compiles the kernels, is missing.
    """
    if asked == "on" and choice is None:
        raise UsageError("--plugins on needs --trt: only TensorRT engines have plugins", hint="add --trt")
    if choice is None or asked == "off":
        return False
    if choice.flavour == "tensorrt-rtx":
        if asked == "on":
            raise UsageError(
                "TensorRT-RTX has no plugins; its engines use the function bodies",
                hint="leave --plugins out, or build with --engine tensorrt",
            )
        return False
    if asked == "on" and not has_module("triton"):
        raise MachineError("plugins are compiled by triton, which is not installed", "pip install 'dexport[plugins]'")
    return has_module("triton")


def custom_ops(model: ir.Model, plugin_target: str | None = None) -> tuple[CustomOp, ...]:
    """The ops of a graph; with a target such as ``sm90`` also the hashes of the kernels it gets there."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            nodes.setdefault(node.op_type, []).append(node)
    return tuple(
        CustomOp(name, find_op(name).version, len(found), _hashes(find_op(name), found, plugin_target))
        for name, found in nodes.items()
    )


def _hashes(op: Op, nodes: list[ir.Node], target: str | None) -> tuple[str, ...]:
    if target is None:
        return ()
    kernels = [part.plugin for part in ((op,) if op.plugin else map(find_op, op.parts)) if part.plugin]
    # Nodes of one shape share a kernel.
    calls = {(tuple(map(_shape, node.inputs)), _attributes(op, node), _dtype(node)) for node in nodes}
    compiled = (
        compile_kernel(kernel, op.dims(shapes, dict(attributes)), dtype, target)
        for shapes, attributes, dtype in calls
        for kernel in kernels
    )
    return tuple(sorted({kernel.ptx_sha256 for kernel in compiled}))


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.shape is not None
    return tuple(dim if isinstance(dim, int) else ANY_BATCH for dim in value.shape)


def _attributes(op: Op, node: ir.Node) -> tuple[tuple[str, int], ...]:
    return tuple((attribute.name, node.attributes[attribute.name].as_int()) for attribute in op.attributes)


def _dtype(node: ir.Node) -> DType:
    value = node.inputs[0]
    assert value is not None and value.dtype is not None
    name = value.dtype.numpy().name
    return next(dtype for dtype in DTYPES if dtype == name)
