"""What the index of a PyTorch file may name, and what each name makes of its arguments: views of storages."""

from __future__ import annotations

import functools
from typing import Any

import torch

from dexport.exporter.weights.stored import Storage, Strided
from dexport.exporter.weights.unpickle import ForbiddenError, Instance, Maker, Opaque

STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
    "Untyped": torch.uint8,
}
"""``torch.<name>Storage`` -> what it holds."""
QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, metadata: Any, dtype: torch.dtype) -> Strided | Opaque:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor is no view of a storage")
    if dtype in QUANTISED:
        return Opaque("a quantised tensor", is_tensor=True)
    bits = metadata if isinstance(metadata, dict) else {}
    return Strided(
        storage, dtype, offset, shape, stride, negative=bool(bits.get("neg")), conjugate=bool(bits.get("conj"))
    )


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Strided | Opaque:
    """``(storage, offset, size, stride[, requires_grad, backward_hooks[, metadata]])``."""
    dtype = storage.dtype if isinstance(storage, Storage) else torch.uint8
    return _tensor(storage, offset, shape, stride, rest[2] if len(rest) > 2 else None, dtype)


def _rebuild_typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Strided | Opaque:
    if not isinstance(dtype, torch.dtype):
        raise ValueError("the type of a tensor is none")
    return _tensor(storage, offset, shape, stride, metadata, dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, of: Any, arguments: Any, _state: Any) -> Any:
    """A plain tensor with attributes of its own; any other type is refused where it is named."""
    if not isinstance(function, Maker) or of not in PLAIN or type(arguments) is not tuple:
        return Opaque("a tensor of a type of its own", is_tensor=True)
    return function.make(*arguments)


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    """An OrderedDict, which always is filled afterwards but for Python 2, where it is a list of pairs."""
    if len(items) > LONGEST_OLD_DICTIONARY:
        raise ValueError("a dictionary is too long")
    return {key: value for key, value in items if type(key) is str}


def _unreadable(what: str) -> Maker:
    return Maker(lambda *_: Opaque(what, is_tensor=True))


LONGEST_OLD_DICTIONARY = 20_000
PARAMETER = Maker(lambda data=None, *_: data)
PLAIN_TENSOR = Opaque("torch.Tensor")
PLAIN = (PARAMETER, PLAIN_TENSOR)
OPAQUE = Maker(lambda *_: Opaque("no tensor"))
NAMES: dict[str, Any] = {
    "collections.OrderedDict": Maker(_dictionary),
    "collections.Counter": Maker(lambda *_: {}),
    "argparse.Namespace": Maker(lambda *_: Instance("argparse.Namespace")),
    "torch.nn.parameter.Parameter": PARAMETER,
    "torch.Tensor": PLAIN_TENSOR,
    "torch._tensor.Tensor": PLAIN_TENSOR,
    "torch.Size": Maker(lambda shape=(): shape),
    "torch.serialization._get_layout": OPAQUE,
    "torch.device": OPAQUE,
    "_codecs.encode": OPAQUE,
    "builtins.bytearray": OPAQUE,
    "builtins.set": OPAQUE,
    "builtins.frozenset": OPAQUE,
    "builtins.complex": OPAQUE,
    "torch._utils._rebuild_tensor": Maker(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Maker(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Maker(_rebuild_typed_tensor),
    "torch._utils._rebuild_parameter": Maker(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": Maker(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": Maker(_rebuild_from_type),
    "torch._utils._rebuild_qtensor": _unreadable("a quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": _unreadable("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("a tensor without values"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("a tensor subclass"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("a tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _unreadable("a tensor of another device"),
}


@functools.cache
def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def find(module: str, name: str) -> Any:
    """What the name stands for.

    Raises:
        ForbiddenError: it is none of a state dict's.
    """
    if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
        kind = name.removesuffix("Storage")
        if kind in STORAGES:
            return StorageKind(STORAGES[kind], kind != "Untyped")
    found = NAMES.get(f"{module}.{name}") or (_dtype(name) if module == "torch" else None)
    if found is None:
        raise ForbiddenError(f"{module}.{name}")
    return found


class StorageKind:
    """A class of storages, as a pickle names it; ``typed`` unless it holds plain bytes."""

    def __init__(self, dtype: torch.dtype, typed: bool) -> None:
        self.dtype = dtype
        self.typed = typed
