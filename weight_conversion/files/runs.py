"""A pair of windows as axes of strides, and what of it lies in a range of the full tensor: nothing is in memory yet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .views import Pair, StoredTensor


class Axis(NamedTuple):
    size: int
    full: int
    part: int


@dataclass(frozen=True)
class Run:
    """A pair of windows as axes (size, stride in full, stride in part), outermost in the full tensor first."""

    axes: tuple[Axis, ...]
    full: int
    part: int
    tensor: StoredTensor

    @property
    def sizes(self) -> list[int]:
        return [axis.size for axis in self.axes]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def full_span(self) -> int:
        return 1 + sum((axis.size - 1) * axis.full for axis in self.axes)

    @property
    def part_span(self) -> int:
        return 1 + sum((axis.size - 1) * axis.part for axis in self.axes)

    @property
    def in_one_piece(self) -> bool:
        return not self.axes or (len(self.axes) == 1 and self.axes[0].full == self.axes[0].part == 1)

    def within(self, begin: int, end: int) -> Iterator[Run]:
        """What of this run lies in elements [begin, end) of the full tensor."""
        if self.full >= end or self.full + self.full_span <= begin:
            return
        if begin <= self.full and self.full + self.full_span <= end:
            yield self
            return
        (size, stride, _), inner = self.axes[0], self.axes[1:]
        span = self.full_span - (size - 1) * stride  # of one index of the outermost axis
        touched = range(max(0, (begin - self.full - span) // stride + 1), min(size, -(-(end - self.full) // stride)))
        first = max(touched.start, -(-(begin - self.full) // stride))
        last = max(first, min(touched.stop, (end - self.full - span) // stride + 1))
        for index in range(touched.start, min(first, touched.stop)):
            yield from self._at(index, 1, inner).within(begin, end)
        if first < last:
            yield self._at(first, last - first, inner)
        for index in range(max(last, first), touched.stop):
            yield from self._at(index, 1, inner).within(begin, end)

    def _at(self, index: int, count: int, inner: tuple[Axis, ...]) -> Run:
        _, full, part = self.axes[0]
        axes = inner if count == 1 else (Axis(count, full, part), *inner)
        return Run(axes, self.full + index * full, self.part + index * part, self.tensor)


def as_run(pair: Pair) -> Run:
    """A pair with its axes in the order of the full tensor, those that continue each other merged."""
    window, part = pair
    axes = [Axis(*axis) for axis in zip(window.shape, window.strides, part.strides, strict=True) if axis[0] != 1]
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: -axis.full):
        outer = merged[-1] if merged else None
        if outer and outer.full == axis.full * axis.size and outer.part == axis.part * axis.size:
            merged[-1] = Axis(outer.size * axis.size, axis.full, axis.part)
        else:
            merged.append(axis)
    return Run(tuple(merged), window.offset, part.offset, part.tensor)
