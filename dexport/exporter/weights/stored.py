"""Where a tensor lies in a file, and how its bytes become its values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dexport.exporter.weights.file import CheckpointFile

LARGEST_RANK = 64
LARGEST_SIZE = 1 << 62


@dataclass(frozen=True)
class Storage:
    """A run of ``count`` elements that tensors are views of, ``start`` elements into the record ``key``."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0
    typed: bool = True


@dataclass(frozen=True)
class Strided:
    """A view of a storage, in elements, as an index describes it.

    Raises:
        ValueError: no such view of it exists.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool = False
    conjugate: bool = False

    def __post_init__(self) -> None:
        for numbers in (self.shape, self.stride):
            if type(numbers) is not tuple or len(numbers) > LARGEST_RANK or not all(map(_is_size, numbers)):
                raise ValueError("a tensor has sizes or strides that are none")
        if len(self.shape) != len(self.stride) or not (_is_size(self.offset) and _is_size(self.storage.count)):
            raise ValueError("a tensor has sizes, strides and an offset that do not go together")
        if math.prod(self.shape) * self.dtype.itemsize > LARGEST_SIZE:
            raise ValueError("a tensor is larger than any memory")
        available = self.storage.count * self.storage.dtype.itemsize
        if (self.offset + self.span) * self.dtype.itemsize > available and self.span:
            raise ValueError("a tensor reaches beyond its storage")

    @property
    def span(self) -> int:
        """Elements from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes in a file: ``span`` elements from ``offset`` (in bytes) on, of which it is a strided view.

    ``swap`` is the number of bytes whose order is to be turned round, 0 for none.
    """

    file: CheckpointFile
    offset: int
    span: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool = False
    conjugate: bool = False
    swap: int = 0

    def read(self) -> Tensor:
        """The values, in the dtype and with the strides that they are stored with.

        Raises:
            InputError: the file ends before them.
        """
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.file.read_at(self.offset, self.span * self.dtype.itemsize)
        if self.swap > 1:
            data = data.reshape(-1, self.swap)[:, ::-1].copy().reshape(-1)
        tensor = torch.from_numpy(data).view(self.dtype).as_strided(self.shape, self.stride)
        if self.negative:
            tensor = tensor.neg()
        return tensor.conj().resolve_conj() if self.conjugate else tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a dense tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
