"""Names of a network and names of what traces and converts it never meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from dexport.errors import InputError
from dexport.exporter import passes
from dexport.exporter.export import check, save
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.pytorch.module_path import module_path
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import BATCH, Islands, Signature, TensorSpec
from dexport.exporter.tracing.trace import name_of_weight, trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from tests.golden import load_golden

NETWORKS = {
    "attributes of a graph module": ["code", "graph", "print_readable", "recompile", "meta", "add_submodule"],
    "attributes of a program": [
        "state_dict_",
        "graph_signature",
        "module_call_graph",
        "constants",
        "range_constraints",
    ],
    "modules of such names": ["code.weight", "graph.code", "meta.graph", "network.graph", "model.network.code"],
    "of the wrappers": ["network", "model", "_export_root", "root"],
    "alike but for a dot": ["a.b", "a_b", "p_a_b", "p_network_a_b", "b_a_b", "a.b_c", "a_b_c"],
    "modules alike but for a dot": ["a.b_c", "a_b.c", "a_b_c", "a.b_d", "c_a.b_d"],
    "of the ports": ["x", "t", "y", "out", "x_1", "out_1", "args_0", "inputs_0"],
    "modules called like ports": ["x.weight", "out.weight", "t.x", "y.out"],
    "of traced values": ["add", "mul", "mul_1", "add_1", "val_0", "val_1", "reshape", "reshape_1", "linear"],
    "of converted nodes": ["Add", "Mul", "Mul_1", "Add_1", "Reshape", "Cast", "m/Mul", "m.Mul", "node_add"],
    "of constants": [
        "constant_0",
        "constant_1",
        "reshape_to_Bx1",
        "reshape_to_Bx1_",
        "_tensor_constant0",
        "lifted_tensor_0",
    ],
    "with suffixes": ["a", "a/float16", "a/value", "a/T", "a/to_float16", "m.a", "m/a", "/a", "m.b/c"],
    "of symbols": ["B", "s77", "s21", "u0"],
    "hidden": ["_a", "_b.c", "__d"],
    "of any characters": ["a b", "it's.w", 'a"b.c', "back\\slash", "é", "0", "1.2", "[0]", "{x}", "%s", "\n"],
    "guidance": ["guidance.weight", "time_table.weight"],
}
HIDDEN = ["forward", "training", "_modules", "T_destination", "call_super_init", "type", "named_parameters"]


class Network(nn.Module):
    """Multiplies by weights and adds tables of any name, in modules that are called by a repeated block."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.paths = [name.split(".") for name in names]
        for number, path in enumerate(self.paths):
            owner = self
            for part in path[:-1]:
                if part not in owner._modules:
                    owner.add_module(part, Branch())
                owner = owner.get_submodule(part)
            if number % 3 == 2:
                owner.register_buffer(path[-1], torch.full((4,), 1.0 + number, device="cpu"), persistent=False)
            elif number % 3 == 1:
                owner.register_buffer(path[-1], torch.ones(4))
            else:
                owner.register_parameter(path[-1], nn.Parameter(torch.ones(4)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for path in self.paths:
            owner = self.get_submodule(".".join(path[:-1]))
            x = owner.use(x, path[-1]) if isinstance(owner, Branch) else x * getattr(owner, path[-1]) + 0.5
        return x + t.reshape(-1, 1) + y.reshape(-1, 1) + torch.tensor([0.5, 1.0, 1.5, 2.0])


class Branch(nn.Module):
    def use(self, x: Tensor, name: str) -> Tensor:
        return x * getattr(self, name) - 0.25


class Blocks(nn.Module):
    """The same names in repeated blocks."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({name: Block(names) for name in ("it's", 'a"b', "code", "_c")})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x, t, y)
        return x


class Block(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.graph = Network(names)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.graph(x, t, y).tanh()


def variant_of(constructor: Any, names: list[str]) -> Variant:
    def signature(_config: Any, _latent: Any) -> Signature:
        inputs = (
            TensorSpec("x", "float32", (BATCH, 4)),
            TensorSpec("t", "float32", (BATCH,)),
            TensorSpec("y", "int64", (BATCH,)),
        )
        return Signature(inputs, (TensorSpec("out", "float32", (BATCH, 4)),))

    recipe = replace(find_recipe("dico-s"), constructor=constructor, config={"names": names}, signature=signature)
    return resolve(recipe)


def assert_exported(variant: Variant, folder: Path) -> ir.Model:
    """In both precisions the network computes the same, under its own names.

    Returns:
        The graph as it was traced.
    """
    weights = open_weights(None, variant.outline, seed=2)
    ports = {spec.name for spec in (*variant.signature.inputs, *variant.signature.outputs)}
    feed = variant.signature.example(2, seed=1)
    with torch.no_grad():
        module = load_into(weights, variant.meta_module())
        results = module(*(torch.from_numpy(np.asarray(x)) for x in feed.values()))
        expected = (results if isinstance(results, Tensor) else results[0]).numpy()
    traced = trace(variant, weights)
    for precision, tolerance in (("fp32", 1e-5), ("fp16", 2e-2)):
        model = passes.clean()(traced.clone()).model
        names = set(model.graph.initializers)
        official = {name_of_weight(name, ports) for name in variant.outline.state_dict()}
        assert all({name, f"{name}.T"} & names for name in official)
        if precision == "fp16":
            ToLowPrecision(precision, Islands())(model)
        save(model, folder / f"{precision}.onnx")
        check(folder / f"{precision}.onnx")
        session = ort.InferenceSession(folder / f"{precision}.onnx", providers=["CPUExecutionProvider"])
        (out,) = session.run([variant.signature.outputs[0].name], feed)
        assert np.linalg.norm(out - expected) < tolerance * np.linalg.norm(expected)
    return traced


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_names_do(kind: str, tmp_path: Path) -> None:
    assert_exported(variant_of(Network, NETWORKS[kind]), tmp_path)


@pytest.mark.parametrize("kind", ["attributes of a graph module", "alike but for a dot", "of any characters"])
def test_any_names_do_in_repeated_blocks(kind: str, tmp_path: Path) -> None:
    traced = assert_exported(variant_of(Blocks, NETWORKS[kind]), tmp_path)
    paths = {module_path(node) for node in traced.graph}
    assert {"stages.it's.graph", 'stages.a"b.graph', "stages.code.graph", "stages._c.graph"} <= paths


class Shadowed(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self._modules[name] = nn.Linear(4, 4)

    def train(self, _mode: bool = True) -> Shadowed:
        return self

    def forward(self, x: Tensor, _t: Tensor, _y: Tensor) -> Tensor:
        for module in self._modules.values():
            x = module(x)
        return x


@pytest.mark.parametrize("name", HIDDEN)
def test_a_name_that_torch_cannot_reach_is_refused(name: str) -> None:
    variant = variant_of(Shadowed, [name])
    with pytest.raises(InputError, match=f"^{name} has the name of an attribute of Shadowed") as caught:
        trace(variant, open_weights(None, variant.outline))
    assert "another name" in caught.value.hint


def test_vitok_whose_codes_are_not_simple_has_a_parameter_called_code(tmp_path: Path) -> None:
    codes = {"simple": False, "posemb": "learned", "code_length": 32, "lengths": [16, 32]}
    settings = {**load_golden("vitok-v1-image").config, **codes}
    variant = resolve(find_recipe("vitok-v1-s-b-1x16-encoder"), settings, (64, 64))
    assert "code" in variant.outline.state_dict()
    assert_exported(variant, tmp_path)
