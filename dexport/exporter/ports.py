"""Whether a recipe's ports are those of its network, before any work rests on them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from dexport.contract import BATCH, LABEL
from dexport.errors import InputError
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.diffusion import null_label
from dexport.exporter.recipes.recipe import Signature, TensorSpec
from dexport.exporter.untraceable import explained

if TYPE_CHECKING:
    from dexport.exporter.variant import Variant

BATCHES = (3, 2)
"""What differs between them is the batch. Sizes of 0 and 1 are special to PyTorch."""
HINT = "declare in the recipe's signature what the network takes and returns"
aten = torch.ops.aten
SAME_LABELS = frozenset({"_to_copy", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "clone", "expand"})


@fresh_torch()
def check_network(variant: Variant) -> None:
    """Run the network without memory for values, and refuse ports that are not those of its signature.

    Raises:
        InputError: it takes or returns something else, or cannot run; see :func:`explained`.
    """
    owner, signature = variant.recipe.name, variant.plain
    names = [spec.name for spec in signature.inputs]
    env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        network = variant.module()
        _check_arguments(owner, names, inspect.signature(network.forward))
        found = []
        for batch in BATCHES:
            inputs = [torch.zeros(spec.dims(batch), dtype=getattr(torch, spec.dtype)) for spec in signature.inputs]
            labels = [tensor for spec, tensor in zip(signature.inputs, inputs, strict=True) if spec.meaning == LABEL]
            with explained(owner, network), torch.no_grad(), _Tables(labels) as tables:
                result = network(*inputs)
            found.append(result if isinstance(result, tuple) else (result,))
    for spec, *tensors in zip(signature.outputs, *found, strict=True):
        # A size that depends on values is a symbol, which cannot be compared.
        shapes = [tuple(n if isinstance(n, int) else str(n) for n in tensor.shape) for tensor in tensors]
        if [tensor.dtype for tensor in tensors] != [getattr(torch, spec.dtype)] * 2 or shapes != [
            spec.dims(batch) for batch in BATCHES
        ]:
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            raise _differs(owner, spec, f"{dtype} {_symbolic(shapes)}")
    _check_rows(variant, tables.rows)


def _check_arguments(owner: str, names: Sequence[str], taken: inspect.Signature) -> None:
    """Refuse inputs that a forward does not take, or takes in another order."""
    problem = ""
    try:
        taken.bind(*names)
    except TypeError as error:
        problem = f": {error}"
    called = list(taken.parameters)[: len(names)]
    if problem or (set(called) == set(names) and called != list(names)):
        raise InputError(
            f"{owner}: inputs {', '.join(names)} are declared, and forward is called with them in this order, but "
            f"it takes {taken}{problem}",
            hint=HINT,
        )


def _symbolic(shapes: Sequence[tuple[Any, ...]]) -> list[Any]:
    """One shape for two batches: what follows the batch is the batch."""
    first, second = shapes
    if len(first) != len(second):
        return list(first)
    follows = [(a, b) == BATCHES for a, b in zip(first, second, strict=True)]
    return [BATCH if batch else size for batch, size in zip(follows, first, strict=True)]


def _check_rows(variant: Variant, rows: int | None) -> None:
    """Refuse labels that the network's table does not have."""
    labels = variant.plain.input(LABEL)
    if rows is None or labels is None:
        return
    largest = {"labels are declared up to": int(labels.high)}
    null = null_label(variant.recipe, variant.config)
    if null is not None:
        largest["guidance has the null label"] = null
    for what, label in largest.items():
        if label >= rows:
            raise InputError(
                f"{variant.recipe.name}: {what} {label}, and the network's label table has rows 0 to {rows - 1}",
                hint="correct the recipe's signature or its null label, which is the last row as a rule",
            )


def check_graph(owner: str, model: ir.Model, signature: Signature) -> None:
    """Refuse a traced graph whose outputs are not those of the signature.

    Raises:
        InputError: it names the port, what was declared and what came.
    """
    if len(model.graph.outputs) != len(signature.outputs):
        raise InputError(
            f"{owner}: {len(signature.outputs)} outputs are declared, and the graph has {len(model.graph.outputs)}",
            hint=HINT,
        )
    for spec, output in zip(signature.outputs, model.graph.outputs, strict=True):
        dims = [] if output.shape is None else [dim if isinstance(dim, int) else str(dim.value) for dim in output.shape]
        dtype = "" if output.dtype is None else output.dtype.numpy().name
        same = len(dims) == len(spec.shape) and all(
            BATCH in str(dim) if wanted == BATCH else dim == wanted
            for dim, wanted in zip(dims, spec.shape, strict=True)
        )
        if dtype != spec.dtype or not same:
            raise _differs(owner, spec, f"{dtype} {dims}")


def _differs(owner: str, spec: TensorSpec, came: str) -> InputError:
    return InputError(
        f"{owner}: output {spec.name} is declared as {spec.dtype} {list(spec.shape)}, and the network returns {came}",
        hint=HINT,
    )


class _Tables(TorchDispatchMode):
    """Sees which tables are indexed by labels; ``rows`` are those of the shortest one."""

    def __init__(self, labels: Sequence[Tensor]) -> None:
        super().__init__()
        self.rows: int | None = None
        self._labels = list(labels)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        by = (
            args[1] if func is aten.embedding.default else (args[1] or [None])[0] if func is aten.index.Tensor else None
        )
        if self._is_labels(by):
            self._indexed(args[0])
        elif func._schema.name.removeprefix("aten::") in SAME_LABELS and args and self._is_labels(args[0]):
            self._labels.append(result)
        return result

    def _is_labels(self, value: Any) -> bool:
        return any(value is labels for labels in self._labels)

    def _indexed(self, table: Tensor) -> None:
        rows = int(table.shape[0])
        self.rows = rows if self.rows is None else min(self.rows, rows)
