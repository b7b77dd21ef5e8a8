"""Casts give torch's numbers bit for bit, one NaN on every processor, and count what they lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from weight_conversion.files.casting import CHUNK, Array, Cast, Loss, unsigned
from weight_conversion.files.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

TYPES = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
CASTS = [(source, target) for source in TYPES for target in TYPES[1:] if source is not target]


def as_torch(bits: Array, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(getattr(torch, dtype.name))


def check(source: DType, target: DType, bits: Array) -> None:
    """Numbers are those of torch, a NaN stays one, and the losses are counted."""
    found = np.full(len(bits), 0x5A, unsigned(target.itemsize))
    loss = Cast(source, target)(bits, found)
    before, after = as_torch(bits, source), as_torch(found, target)
    nan = torch.isnan(before)
    expected = before.to(after.dtype)
    raw = {2: torch.int16, 4: torch.int32}[target.itemsize]
    assert torch.equal(after[~nan].view(raw), expected[~nan].view(raw))
    assert torch.equal(torch.isnan(after), nan)
    overflowed = int((torch.isinf(after) & torch.isfinite(before)).sum())
    assert loss == Loss(overflowed, int(((after == 0) & (before != 0)).sum()))


def interesting(dtype: DType) -> Array:
    """Bits around every boundary of every type: ends of ranges, halves between two numbers, and their neighbours."""
    halves = 2.0 ** np.arange(-160, 130)
    numbers = np.concatenate([halves * factor for factor in (1, 1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-11, 2 - 2**-9)])
    limits = [65504, 65519.99, 65520, 65536, 3.3895314e38, 3.3961776e38, 3.4028235e38, np.inf, 0.0]
    numbers = np.concatenate([numbers, limits])
    with np.errstate(over="ignore"):
        exact = {FLOAT64: numbers, FLOAT32: numbers.astype(np.float32), FLOAT16: numbers.astype(np.float16)}
        bits = exact.get(dtype, numbers.astype(np.float32)).view(unsigned(4 if dtype is BFLOAT16 else dtype.itemsize))
    bits = (bits >> 16).astype(np.uint16) if dtype is BFLOAT16 else bits
    sign = bits.dtype.type(1 << (8 * dtype.itemsize - 1))
    near = np.concatenate([bits + bits.dtype.type(step) for step in range(3)] + [bits - bits.dtype.type(1)])
    return np.concatenate([near, near ^ sign])


@pytest.mark.parametrize(("source", "target"), CASTS, ids=lambda dtype: dtype.name)
def test_numbers_at_every_boundary_are_those_of_torch(source: DType, target: DType) -> None:
    check(source, target, interesting(source))


@pytest.mark.parametrize(("source", "target"), [cast for cast in CASTS if cast[0].itemsize == 2], ids=str)
def test_all_values_of_a_16_bit_type(source: DType, target: DType) -> None:
    check(source, target, np.arange(1 << 16, dtype=np.uint16))


@pytest.mark.parametrize(("source", "target"), CASTS, ids=lambda dtype: dtype.name)
def test_random_bits_and_random_weights(source: DType, target: DType) -> None:
    random = np.random.default_rng(7)
    top = 1 << 8 * source.itemsize
    check(source, target, random.integers(0, top, 3 * CHUNK + 5, unsigned(source.itemsize), endpoint=False))
    weights = torch.from_numpy(random.standard_normal(CHUNK + 1) * 0.02).to(getattr(torch, source.name))
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source.itemsize]
    check(source, target, weights.view(raw).numpy().view(unsigned(source.itemsize)))


@pytest.mark.parametrize("target", [FLOAT16, BFLOAT16], ids=str)
@settings(max_examples=100, deadline=None)
@given(bits=nst.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, (1 << 32) - 1)))
def test_any_float32(target: DType, bits: Array) -> None:
    check(FLOAT32, target, bits)


def test_every_place_between_two_float16_and_bfloat16() -> None:
    """Half a last place and its neighbours, for every value: where rounding can go wrong."""
    every = np.arange(1 << 16, dtype=np.uint32) << 16
    steps = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    check(FLOAT32, BFLOAT16, (every[:, None] | steps).ravel())
    kept = np.arange(1 << 19, dtype=np.uint32) << 13
    check(FLOAT32, FLOAT16, (kept[:, None] | np.array([0x0FFF, 0x1000, 0x1001], np.uint32)).ravel())


NANS: list[tuple[DType, DType, dict[int, int]]] = [
    (FLOAT32, BFLOAT16, {0x7F800001: 0x7FC0, 0xFFFFFFFF: 0x7FC0, 0x7FC12345: 0x7FC0}),
    (FLOAT32, FLOAT16, {0x7F800001: 0x7E00, 0xFFFFFFFF: 0xFE00, 0x7FC12345: 0x7E00}),
    (BFLOAT16, FLOAT16, {0x7F81: 0x7E00, 0xFFFF: 0xFE00}),
    (FLOAT16, BFLOAT16, {0x7C01: 0x7FC0, 0xFFFF: 0x7FC0}),
    (FLOAT16, FLOAT32, {0x7C01: 0x7FC02000, 0xFE03: 0xFFC06000}),
    (BFLOAT16, FLOAT32, {0x7F81: 0x7F810000, 0xFFC0: 0xFFC00000}),
]


@pytest.mark.parametrize(("source", "target", "expected"), NANS, ids=str)
def test_a_nan_is_the_same_wherever_it_stands(source: DType, target: DType, expected: dict[int, int]) -> None:
    """torch gives other bits to a NaN by processor, length and position."""
    bits: Any = np.array(list(expected) * 37, unsigned(source.itemsize))
    found = np.empty(len(bits), unsigned(target.itemsize))
    for begin in (0, 1, 5):
        Cast(source, target)(bits[begin:], found[begin:])
        assert found[begin:].tolist() == (list(expected.values()) * 37)[begin:]
