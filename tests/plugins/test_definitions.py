"""Schema, ONNX function and kernels of an op say the same; the Swin index is the official one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import model_of
from safetensors.torch import load_file

from dexport.errors import InputError, UsageError
from dexport.plugins.compile import PUBLISHED_SIZES, parameters
from dexport.plugins.functions import function_proto
from dexport.plugins.op import DTYPES, Op, resolve, split_head
from dexport.plugins.registry import all_ops, find_op
from dexport.plugins.ternary_matmul.packing import pack, unpack
from dexport.plugins.tiles import candidates
from dexport.plugins.tmsa.reference import relative_position_index, tmsa

GOLDEN = Path(__file__).parent.parent / "goldens" / "diffit-latent.safetensors"
EACH_OP = pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
MAIN_OPS = [find_op(name) for name in PUBLISHED_SIZES]


@EACH_OP
def test_function_has_the_schema(op: Op) -> None:
    function = function_proto(op)
    assert (function.name, function.domain) == (op.name, "dexport")
    assert [name.partition("_")[2] for name in function.input] == [t.name for t in op.inputs]
    assert [name.partition("_")[2] for name in function.output] == [t.name for t in op.outputs]
    assert sorted(function.attribute) == sorted(a.name for a in op.attributes)
    assert {p.key: p.value for p in function.metadata_props} == {"dexport.version": str(op.version)}


@EACH_OP
def test_reference_has_the_schema(op: Op) -> None:
    # A custom operator's own signature is (*args, **kwargs); its schema is what it was declared with.
    target = resolve(op.reference)
    names = [*(t.name for t in op.inputs), *(a.name for a in op.attributes)]
    if hasattr(target, "_opoverload"):
        assert [argument.name for argument in target._opoverload._schema.arguments] == names
    else:
        assert list(inspect.signature(target).parameters) == names


@EACH_OP
def test_kernels_have_the_schema(op: Op) -> None:
    pytest.importorskip("triton")
    known = {t.name for t in (*op.inputs, *op.outputs)}
    for kernel in op.all_kernels():
        arguments = [name for name, _ in parameters(kernel)]
        function = kernel.function()
        names = list(function.arg_names)
        assert names[: len(arguments)] == arguments
        dims = _dims(op)
        for dtype in DTYPES:
            for tile in candidates(kernel, "sm90", dtype):
                assert set(names[len(arguments) :]) == {*kernel.constants(dims, dtype), *tile.blocks}
                assert all(size & (size - 1) == 0 for size in tile.blocks.values())
    first, last = op.kernels[0], op.kernels[-1]
    assert {t.name for t in first.inputs} <= known
    assert last.outputs == op.outputs


@pytest.mark.parametrize("op", MAIN_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_function_is_valid_in_every_type(op: Op, dtype: torch.dtype, wide: bool) -> None:
    shapes, attributes = PUBLISHED_SIZES[op.name][0]
    inputs = [
        torch.zeros(shape, dtype=torch.uint8 if tensor.dtype == "uint8" else dtype)
        for tensor, shape in zip(op.inputs, shapes, strict=True)
    ]
    model = model_of(op, inputs, attributes, wide)
    onnx.checker.check_model(model, full_check=True)
    assert len(model.SerializeToString()) < 8192  # nothing of size heads x T x T


def test_index_is_swins() -> None:
    weights = load_file(GOLDEN)
    official = weights["weights/blocks.0.attn.relative_position_index"]
    table = weights["weights/blocks.0.attn.relative_position_bias_table"]
    assert torch.equal(relative_position_index(8), official)
    assert table.shape == ((2 * 8 - 1) ** 2, 4)


def test_published_shapes_of_the_bias_are_small() -> None:
    shapes, attributes = PUBLISHED_SIZES["DexTMSA"][1]
    assert attributes["window"] == 32
    table = shapes[2][0] * shapes[2][1]
    assert 28 * table * 4 < 8 << 20


def test_split_head() -> None:
    assert {size: split_head(size) for size in (12, 16, 24, 64, 72, 96, 120, 128, 288)} == {
        12: (16, 0),
        16: (16, 0),
        24: (32, 0),
        64: (64, 0),
        72: (64, 16),
        96: (64, 32),
        120: (128, 0),
        128: (128, 0),
        288: (256, 32),
    }


def test_wrong_shapes_are_named() -> None:
    op = find_op("DexTMSA")
    good: list[tuple[int, ...]] = [(2, 9, 48), (2, 48), (2, 25)]
    assert op.dims(good, {"num_heads": 2, "window": 3})["head_dim"] == 8
    with pytest.raises(InputError, match="bias_table has shape"):
        op.dims([*good[:2], (2, 49)], {"num_heads": 2, "window": 3})
    with pytest.raises(InputError, match="qkv has shape"):
        op.dims(good, {"num_heads": 2, "window": 4})
    with pytest.raises(InputError, match=r"qkv has shape \(2, 9, 50\)"):
        op.dims([(2, 9, 50), (2, 50), (3, 25)], {"num_heads": 3, "window": 3})
    with pytest.raises(InputError, match="attributes"):
        op.dims(good, {"num_heads": 2})
    with pytest.raises(UsageError, match="there is no op DexNothing"):
        find_op("DexNothing")


def test_reference_traces_as_one_node() -> None:
    class Net(torch.nn.Module):
        def forward(self, qkv: torch.Tensor, time: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return tmsa(qkv, time, table.t(), 2, 3)

    batch = torch.export.Dim("B")
    program = torch.export.export(
        Net(),
        (torch.zeros(3, 9, 48), torch.zeros(3, 48), torch.zeros(25, 2)),
        dynamic_shapes=({0: batch}, {0: batch}, {}),
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "dexport.tmsa.default" in targets


def test_definitions_import_nothing_heavy() -> None:
    code = (
        "import sys, dexport.plugins.registry, dexport.plugins.tiles;"
        "bad = {'torch', 'onnx', 'triton', 'tensorrt', 'onnx_ir'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_and_references_need_torch_and_triton_only() -> None:
    """benchmarks/gpu/ops.py runs where nothing else of dexport's dependencies is installed."""
    pytest.importorskip("triton")
    modules = [f"dexport.plugins.{op}.{part}" for op in FOLDERS for part in ("kernel", "reference", "op")]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"import importlib\n[importlib.import_module(name) for name in {modules!r}]\n"
        "import dexport.plugins.compile, dexport.plugins.launch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ABSENT = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "click", "rich", "safetensors", "huggingface_hub")
FOLDERS = ("tmsa", "linear_attention", "channel_attention", "ternary_matmul")


def _dims(op: Op) -> dict[str, int]:
    name = "DexChannelAttention" if op.name.startswith("DexChannel") else op.name
    shapes, attributes = PUBLISHED_SIZES[name][0]
    return dict(find_op(name).dims(shapes, attributes))


@pytest.mark.parametrize("op", ["channel_attention", "linear_attention", "ternary_matmul", "tmsa"])
def test_gradients_are_those_of_the_reference(op: str) -> None:
    torch.manual_seed(0)
    inputs = {
        "channel_attention": lambda: (torch.randn(2, 3, 4, 4), torch.randn(3, 3, 1, 1), torch.randn(3)),
        "linear_attention": lambda: (*(torch.randn(2, 4, 6) for _ in range(3)), 2),
        "ternary_matmul": lambda: (torch.randn(2, 3, 5), pack(torch.randint(-1, 2, (8, 5))), torch.rand(1)),
        "tmsa": lambda: (torch.randn(2, 4, 12), torch.randn(2, 12), torch.randn(2, 9), 2, 2),
    }[op]()
    doubles = [
        x.double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    assert torch.autograd.gradcheck(getattr(torch.ops.dexport, op), doubles)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_packing_round_trips(quarter: int, columns: int, seed: int) -> None:
    values = torch.randint(-1, 2, (4 * quarter, columns), generator=torch.Generator().manual_seed(seed)).float()
    packed = pack(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (quarter, columns))
    assert torch.equal(unpack(packed), values)
    assert torch.equal(pack(unpack(packed)), packed)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 1535])
def test_rows_that_do_not_fill_bytes_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows cannot be packed"):
        pack(torch.zeros(rows, 3))
