"""Tensors as places in files, and strided windows on them. Nothing here reads a byte.

A StoredTensor says where the elements of one tensor lie:

    file:  [ ... header ... | e0 e1 e2 e3 ... | ... ]
                            ^ offset (bytes)    element (i, j) at offset + itemsize * (i * strides[0] + j * strides[1])

A View is a window on a StoredTensor: the same arithmetic torch uses (narrow, unflatten, transpose), with the
tensor that it belongs to attached, so that a pair of Views says which bytes of which file go where.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .dtypes import DType

MAX_DIMENSIONS = 64
"""No tensor of a model has more: a file that says so is refused before time goes into reading it."""


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
    dtype: DType

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
    dtype: DType
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
"""Two windows of one shape that hold the same elements: (full tensor, part of a rank)."""


def across(pair: Pair, pieces: Sequence[View]) -> Iterator[Pair]:
    """A pair whose second window lies on a tensor that is stored in `pieces`, as pairs with windows on these.

    The pieces are whole tensors that, laid end to end, are the tensor that the window is on.
    """
    full, joined = pair
    ends = list(itertools.accumulate(math.prod(piece.shape) for piece in pieces))
    span = 1 + sum((size - 1) * stride for size, stride in zip(joined.shape, joined.strides, strict=True))
    index = _piece_with(ends, joined.offset, span)
    if index is not None:
        begin = ends[index - 1] if index else 0
        yield full, View(pieces[index].tensor, joined.shape, joined.strides, joined.offset - begin)
        return
    dim = max((d for d, size in enumerate(joined.shape) if size > 1), key=lambda d: joined.strides[d])
    size, stride = joined.shape[dim], joined.strides[dim]
    inner = span - (size - 1) * stride  # elements that one index along `dim` reaches over
    pieces_with = [_piece_with(ends, joined.offset + i * stride, inner) for i in range(size)]
    for piece, run in itertools.groupby(range(size), key=pieces_with.__getitem__):
        indices = list(run)
        runs = [(i, 1) for i in indices] if piece is None else [(indices[0], len(indices))]
        for start, length in runs:
            yield from across((full.narrow(dim, start, length), joined.narrow(dim, start, length)), pieces)


def _piece_with(ends: Sequence[int], start: int, span: int) -> int | None:
    """The piece that `span` elements from `start` on lie in as a whole; None where they lie in several."""
    index = bisect.bisect_right(ends, start)
    return index if start + span <= ends[index] else None
