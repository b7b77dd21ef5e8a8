"""Tensors as places in files, and strided windows on them. Nothing here reads a byte.

A StoredTensor says where the elements of one tensor lie:

    file:  [ ... header ... | e0 e1 e2 e3 ... | ... ]
                            ^ offset (bytes)    element (i, j) at offset + itemsize * (i * strides[0] + j * strides[1])

A View is a window on a StoredTensor: the same arithmetic torch uses (narrow, unflatten, transpose), with the
tensor that it belongs to attached, so that a pair of Views says which bytes of which file go where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of `shape`, in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file is to hold: its name there, shape and element type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the start of the file `path`, `strides` in elements."""

    name: str
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        expected = contiguous_strides(self.shape)
        return all(size == 1 or a == b for size, a, b in zip(self.shape, self.strides, expected, strict=True))

    def view(self) -> View:
        return View(self, self.shape, self.strides, 0)


@dataclass(frozen=True)
class View:
    """A strided window on `tensor`; `offset` and `strides` in elements from the tensor's first element."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def narrow(self, dim: int, start: int, length: int) -> View:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(f"[{start}, {start + length}) is outside dimension {dim} of {self.shape}")
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return View(self.tensor, shape, self.strides, self.offset + start * self.strides[dim])

    def chunk(self, chunks: int, dim: int) -> list[View]:
        """`chunks` equal windows along `dim`; ValueError where the dimension does not divide."""
        size, rest = divmod(self.shape[dim], chunks)
        if rest:
            raise ValueError(f"dimension {dim} of {self.shape} cannot be cut into {chunks} equal parts")
        return [self.narrow(dim, rank * size, size) for rank in range(chunks)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> View:
        """Dimension `dim` seen as several dimensions `sizes`, row-major."""
        if math.prod(sizes) != self.shape[dim]:
            raise ValueError(f"dimension {dim} of {self.shape} is not {tuple(sizes)}")
        inner = tuple(stride * self.strides[dim] for stride in contiguous_strides(sizes))
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], *inner, *self.strides[dim + 1 :])
        return View(self.tensor, shape, strides, self.offset)

    def transpose(self, dim0: int, dim1: int) -> View:
        shape, strides = list(self.shape), list(self.strides)
        shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
        strides[dim0], strides[dim1] = strides[dim1], strides[dim0]
        return View(self.tensor, tuple(shape), tuple(strides), self.offset)


Pair = tuple[View, View]
"""Two windows of one shape that hold the same elements: (full tensor, part of a tensor-parallel rank)."""
