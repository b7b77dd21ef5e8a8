"""Casts between floating-point types, bit by bit: one result on every processor, and what was lost on the way.

    from        to                  how
    bfloat16    float32             the upper half of its bits
    float32     bfloat16            bits: half of the last place added, ties to even, cut off
    float32     float16             bits, where both are normal; else numpy's own, and NaN is mended
    float16     float32             table of all 65,536 values
    bfloat16    float16             bits, where both are normal; else table
    float16     bfloat16            table of all 65,536 values, made by way of float32
    float64     any                 by way of float32, as torch does

Numbers are rounded as torch rounds them, infinities and denormals included. What torch makes of a NaN depends on the
processor and on where in a tensor it stands; here it is what torch's portable code makes of it: bfloat16 7fc0, float16
7e00 with its sign; in float32 a NaN keeps its sign and payload and is quiet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

Array = np.ndarray[Any, np.dtype[Any]]
Pair = tuple[Array, Array]
"""Numbers and what became of them, elements as unsigned integers of their size."""
Step = Callable[[Array, Array], Pair]
"""Writes the second array from the first; returns those among which something can have been lost."""

CHUNK = 1 << 19
"""Elements that are cast at a time, a block of 16-bit ones: each array operation then takes long enough that threads,
which all need the interpreter between two of them, seldom wait for one another. With 2^14, which fits the caches, two
threads took as long as one."""

INFINITY = {FLOAT64: 0x7FF << 52, FLOAT32: 0xFF << 23, FLOAT16: 0x1F << 10, BFLOAT16: 0xFF << 7}
"""The bits of infinity; a magnitude above it is a NaN."""


@dataclass(frozen=True)
class Loss:
    """How many finite numbers became infinite, and how many that were not zero became zero."""

    overflowed: int = 0
    vanished: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.overflowed + other.overflowed, self.vanished + other.vanished)


def unsigned(itemsize: int) -> np.dtype[Any]:
    """Elements of this size as bits."""
    return np.dtype(f"u{itemsize}")


def narrows(source: DType, target: DType) -> bool:
    """Whether some numbers of the one type are not of the other, and are rounded."""
    return target.itemsize < source.itemsize or {source, target} == {FLOAT16, BFLOAT16}


class Cast:
    """Casts from one type to another. Has memory of its own to work in: each thread needs one."""

    def __init__(self, source: DType, target: DType) -> None:
        self._source, self._target = source, target
        self._step = _step(source, target)
        self._narrows = narrows(source, target)
        self._magnitudes = np.empty(CHUNK, unsigned(target.itemsize))

    def __call__(self, source: Array, target: Array) -> Loss:
        """Writes target [n] from source [n], both as unsigned integers."""
        loss = Loss()
        for begin in range(0, len(source), CHUNK):
            numbers, results = self._step(source[begin : begin + CHUNK], target[begin : begin + CHUNK])
            if self._narrows and len(numbers):
                loss += self._lost(numbers, results)
        return loss

    def _lost(self, source: Array, target: Array) -> Loss:
        magnitudes = np.left_shift(target, 1, out=self._magnitudes[: len(target)])  # without the sign
        infinity = 2 * INFINITY[self._target]
        overflowed = vanished = 0
        if magnitudes.max() >= infinity:
            was_finite = source << 1 < 2 * INFINITY[self._source]
            overflowed = int(np.count_nonzero(was_finite & (magnitudes >= infinity)))
        if not magnitudes.min():
            vanished = int(np.count_nonzero(source << 1)) - int(np.count_nonzero(magnitudes))
        return Loss(overflowed, vanished)


def _step(source: DType, target: DType) -> Step:
    if source is FLOAT64:
        return _by_way_of_float32(_step(FLOAT32, target))
    if source is target:
        return _copy
    if source is FLOAT32:
        return _Float32ToBfloat16() if target is BFLOAT16 else _ToFloat16(source, _Float32ToFloat16())
    if (source, target) == (BFLOAT16, FLOAT32):
        return _widen_bfloat16
    by_table = _ByTable(_table(source, target))
    return _ToFloat16(source, by_table) if target is FLOAT16 else by_table


class _ToFloat16:
    """Casts numbers that are normal in float16 by arithmetic, and the others, few in weights, by another step.

    Exponent and mantissa together round to the other mantissa as a whole number does, whose carry is the next exponent;
    then the exponent takes the other bias. The source has the bias 127, and may have a longer mantissa.
    """

    def __init__(self, source: DType, others: Step) -> None:
        self._others = others
        self._bits, self._abnormal = np.empty(CHUNK, unsigned(source.itemsize)), np.empty(CHUNK, np.bool_)
        mantissa = 23 if source is FLOAT32 else 7
        self._cut = mantissa - 10
        half = 1 << self._cut - 1 if self._cut > 0 else 0  # of the last place
        # the magnitudes that become normal are those from `first` on, `count` of them
        self._first = 127 - 14 << mantissa
        self._count = (30 << mantissa) - half

    def __call__(self, source: Array, target: Array) -> Pair:
        bits, abnormal = self._bits[: len(source)], self._abnormal[: len(source)]
        np.left_shift(source, 1, out=bits)  # without the sign
        np.subtract(bits, 2 * self._first, out=bits)
        np.greater_equal(bits, 2 * self._count, out=abnormal)
        self._normal(source, bits, target)
        others = np.flatnonzero(abnormal)
        numbers, results = source[others], np.empty(len(others), target.dtype)
        if len(others):
            self._others(numbers, results)
            target[others] = results
        return numbers, results

    def _normal(self, source: Array, bits: Array, target: Array) -> None:
        """`bits` are twice the distances of magnitudes from `first`, and are used up."""
        if self._cut > 0:
            _add_half(source, self._cut, bits)
            np.right_shift(bits, self._cut, out=target, casting="unsafe")
            np.subtract(target, 127 - 15 << 10 & 0xFFFF, out=target)
            np.bitwise_and(target, 0x7FFF, out=target)
            np.right_shift(source, 16, out=bits)
            np.bitwise_and(bits, 0x8000, out=bits)
        else:
            np.left_shift(bits, -self._cut - 1, out=target)
            np.add(target, 1 << 10, out=target)
            np.bitwise_and(source, 0x8000, out=bits)
        np.bitwise_or(target, bits, out=target, casting="unsafe")


class _ByTable:
    def __init__(self, table: Array) -> None:
        self._table = table

    def __call__(self, source: Array, target: Array) -> Pair:
        np.take(self._table, source, out=target, mode="clip")  # "clip" needs no check and no copy
        return source, target


@cache
def _table(source: DType, target: DType) -> Array:
    """What each of the 65,536 values of a 16-bit type becomes."""
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, np.uint32)
    (_widen_bfloat16 if source is BFLOAT16 else _widen_float16)(every, wide)
    if target is FLOAT32:
        return wide
    table = np.empty(1 << 16, np.uint16)
    step = _step(FLOAT32, target)
    for begin in range(0, 1 << 16, CHUNK):
        step(wide[begin : begin + CHUNK], table[begin : begin + CHUNK])
    return table


def _copy(bits: Array, out: Array) -> Pair:
    np.copyto(out, bits)
    return bits, out


def _widen_bfloat16(bits: Array, out: Array) -> Pair:
    np.copyto(out, bits)
    np.left_shift(out, 16, out=out)
    return bits, out


def _widen_float16(bits: Array, out: Array) -> Pair:
    np.copyto(out.view(np.float32), bits.view(np.float16))
    nan = bits & 0x7FFF > INFINITY[FLOAT16]
    sign, payload = (bits & 0x8000).astype(np.uint32), (bits & 0x3FF).astype(np.uint32)
    np.copyto(out, sign << 16 | 0x7FC00000 | payload << 13, where=nan)
    return bits, out


def _by_way_of_float32(step: Step) -> Step:
    wide = np.empty(CHUNK, np.uint32)

    def cast(bits: Array, out: Array) -> Pair:
        middle = wide[: len(bits)]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(middle.view(np.float32), bits.view(np.float64), casting="same_kind")
        step(middle, out)
        return bits, out

    return cast


def _add_half(source: Array, cut: int, out: Array) -> None:
    """Writes what, with its lowest `cut` bits cut off, is the source rounded, ties to even."""
    np.right_shift(source, cut, out=out)
    np.bitwise_and(out, 1, out=out)
    np.add(out, source, out=out)
    np.add(out, (1 << cut - 1) - 1, out=out)


class _Float32ToBfloat16:
    def __init__(self) -> None:
        self._bits = np.empty(CHUNK, np.uint32)

    def __call__(self, source: Array, target: Array) -> Pair:
        bits = self._bits[: len(source)]
        _add_half(source, 16, bits)
        np.right_shift(bits, 16, out=target, dtype=np.uint32, casting="unsafe")
        nan = _where_nan(source, bits)
        if nan is not None:
            np.copyto(target, 0x7FC0, where=nan)
        return source, target


class _Float32ToFloat16:
    def __init__(self) -> None:
        self._work = np.empty(CHUNK, np.uint32)

    def __call__(self, source: Array, target: Array) -> Pair:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(target.view(np.float16), source.view(np.float32), casting="same_kind")
        nan = _where_nan(source, self._work[: len(source)])
        if nan is not None:
            np.bitwise_or(target & 0x8000, 0x7E00, out=target, where=nan)
        return source, target


def _where_nan(source: Array, work: Array) -> Array | None:
    """Where a float32 is NaN, as booleans [n]; None if nowhere, which costs little. `work` [n] is used up."""
    np.left_shift(source, 1, out=work)  # without the sign
    return work > 2 * INFINITY[FLOAT32] if work.max() > 2 * INFINITY[FLOAT32] else None
