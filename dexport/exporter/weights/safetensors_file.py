"""A safetensors file as an index of views, and the index file that joins several files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from dexport.errors import InputError
from dexport.exporter.weights.file import CheckpointFile
from dexport.exporter.weights.stored import LARGEST_RANK, Stored, contiguous

LENGTH = struct.Struct("<Q")
LARGEST_HEADER = 100_000_000
METADATA = "__metadata__"
LONGEST_REASON = 200
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_safetensors(file: CheckpointFile) -> list[dict[str, Stored]]:
    """Name -> view; twice where ``safetensors.save_model`` removed names of tied weights: with them, and without.

    Raises:
        InputError: not a whole safetensors file, or a dtype that PyTorch lacks.
    """
    try:
        header, start = _header(file)
        metadata = header.pop(METADATA, {})
        tensors = {name: _stored(file, name, facts, start) for name, facts in header.items()}
        spans = sorted((t.offset, t.offset + t.span * t.dtype.itemsize) for t in tensors.values())
        ends = [start, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != file.size:
            raise ValueError("its tensors do not fill it one after another")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = str(error).encode("unicode_escape").decode()[:LONGEST_REASON]
        raise InputError(
            f"{file.path} is not a whole safetensors file: {reason}", hint="copy or download it again"
        ) from error
    tied = {removed: tensors[kept] for removed, kept in metadata.items() if removed not in tensors and kept in tensors}
    return [tensors | tied, tensors] if tied else [tensors]


def read_shards(file: CheckpointFile) -> dict[str, Path]:
    """Name -> file beside the index.

    Raises:
        InputError: no index, or one that points out of its folder.
    """
    try:
        if file.size > LARGEST_HEADER:
            raise ValueError("it is too long")
        names = _parse(file.bytes_at(0, file.size))["weight_map"]
        if not names or not all(_is_plain(shard) for shard in names.values()):
            raise ValueError("it names no files, or files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).encode("unicode_escape").decode()[:LONGEST_REASON]
        raise InputError(
            f"{file.path} is not an index of checkpoint files: {reason}", hint="give the weights, or their index"
        ) from error
    return {name: file.path.parent / shard for name, shard in names.items()}


def _is_plain(shard: Any) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard and shard not in ("", ".", "..") and "\0" not in shard


def _header(file: CheckpointFile) -> tuple[dict[str, Any], int]:
    size = LENGTH.unpack(file.bytes_at(0, LENGTH.size))[0]
    start = LENGTH.size + size
    if size > LARGEST_HEADER or start > file.size:
        raise ValueError("its header is cut, or too long")
    header = _parse(file.bytes_at(LENGTH.size, size))
    metadata = header.get(METADATA, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no text")
    return header, start


def _parse(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands in it twice")
        return found

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError("it holds no names")
    return value


def _stored(file: CheckpointFile, name: str, facts: Any, start: int) -> Stored:
    shape, (begin, end) = tuple(facts["shape"]), facts["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or len(shape) > LARGEST_RANK:
        raise ValueError(f"{name} has no proper shape or place")
    if facts["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {facts['dtype']}, which PyTorch does not have")
    dtype, span = DTYPES[facts["dtype"]], 1
    for number in shape:
        span *= number
    if end - begin != span * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {list(shape)} of {facts['dtype']}")
    return Stored(file, start + begin, span, dtype, shape, contiguous(shape))
